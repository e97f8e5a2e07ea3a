"""The messages of pool, worker and executor over pipes: one a line, each a JSON array.

pool -> worker: first `[settings, options]`, then for each chunk the array of its records' `RewardRecord.to_json`.
worker -> pool: `["loading", spec]` before an import, then `["ready"]` or `["refused", message]`; for every chunk
`["executor", pid]` whenever it starts one, and the executor's answers.
executor -> worker: `["value", item, number]` for each component in order, or `["error", item, kind, message,
traceback]`, which ends the item; `["leave"]` requests a new executor.
"""

import json
import os
from collections import deque
from typing import Any


def pack(message: Any) -> bytes:
    """One line. Lone surrogates come back as they were, see `RewardRecord.to_json`."""
    text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass") + b"\n"


class Lines:
    """The messages that arrive in a pipe.

    Attributes:
      fd: the pipe.
      messages: what arrived and has not been taken yet.
      ended: the other side has closed the pipe.
      fault: an error in what arrived, else None. Nothing after it is read.
    """

    def __init__(self, fd: int, limit: int | None = None) -> None:
        """Reads from `fd`; a line of more than `limit` bytes is a fault."""
        self.fd = fd
        self.messages: deque[Any] = deque()
        self.ended = False
        self.fault: str | None = None
        self._limit = limit
        self._rest = bytearray()

    def read(self) -> None:
        """Reads what is available; waits only where the pipe is a blocking one."""
        try:
            data = os.read(self.fd, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            self.ended = True
        if self.fault is not None:
            return
        self._rest += data
        if b"\n" in data:
            *lines, self._rest = self._rest.split(b"\n")
            try:
                for line in lines:
                    self.messages.append(json.loads(line.decode("utf-8", "surrogatepass")))
            except (ValueError, RecursionError) as error:
                self.fault = f"{type(error).__name__}: {error}"[:100]
        if self._limit is not None and len(self._rest) > self._limit:
            self.fault = f"a message of more than {self._limit} bytes"
