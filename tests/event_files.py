"""TensorBoard's event files, read through tensorboardX's protocol buffers."""

import struct

from tensorboardX.proto.event_pb2 import Event


def events(workdir):
    """All events, by file name; a record is: length (8 bytes), checksum (4), payload, checksum (4)."""
    result = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            result.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return result
