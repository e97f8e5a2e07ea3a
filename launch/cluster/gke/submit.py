"""Submits a training to GKE: submit.py --name=... --image=... --workdir=gs://... -- --config=...

One TPU slice as a JobSet (jobset.yaml beside this file, `kubectl apply`), or with --xpk_cluster as a workload of xpk.
The flags of launch/train.py stand behind `--`. The image is that of the Dockerfile here. The work folder is on the file
system, so the bucket is mounted with Cloud Storage FUSE at /mnt/gcs/BUCKET; it must have been made with
--enable-hierarchical-namespace, because checkpoints are folders that are renamed. xpk mounts what it was told once:
`xpk storage attach NAME --type=gcsfuse --bucket=BUCKET --mount-point=/mnt/gcs/BUCKET --readonly=false ...`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

MOUNT = "/mnt/gcs"
TEMPLATE = Path(__file__).with_name("jobset.yaml")

_NAME = flags.DEFINE_string("name", None, "name of the job: small letters, digits and hyphens, at most 40")
_IMAGE = flags.DEFINE_string("image", None, "container image, built with launch/cluster/gke/Dockerfile")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: gs://BUCKET/PATH")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the manifest and the command, run nothing")
_ACCELERATOR = flags.DEFINE_string("accelerator", None, "the node pool's label, such as tpu-v5-lite-podslice")
_TOPOLOGY = flags.DEFINE_string("topology", None, "the slice's shape in chips, such as 4x4 or 2x2x4")
_CHIPS_PER_HOST = flags.DEFINE_integer("chips_per_host", 4, "TPU chips of one node", 1, 64)
_NAMESPACE = flags.DEFINE_string("namespace", "default", "Kubernetes namespace")
_SERVICE_ACCOUNT = flags.DEFINE_string("service_account", "default", "Kubernetes account that may write the bucket")
_SPOT = flags.DEFINE_bool("spot", False, "only on spot nodes")
_MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 10, "restarts of a run that ended badly", 0, 10**6)
_GRACE_S = flags.DEFINE_integer("grace_s", 300, "seconds that a run gets to save", 1, 10**6)
_XPK_CLUSTER = flags.DEFINE_string("xpk_cluster", None, "submit with xpk, to this cluster")
_TPU_TYPE = flags.DEFINE_string("tpu_type", None, "xpk: the slice, such as v5litepod-16")
_XPK_STORAGE = flags.DEFINE_string("xpk_storage", None, "xpk: name of the storage that mounts the bucket")
_PROJECT = flags.DEFINE_string("project", None, "xpk: Google Cloud project")
_ZONE = flags.DEFINE_string("zone", None, "xpk: zone of the cluster")


def hosts_of(topology: str, chips_per_host: int) -> int:
    """How many nodes a slice has.

    Args:
      topology: the slice's shape in chips, such as "4x4".
      chips_per_host: chips of one node.

    Raises:
      ValueError: it is no shape, or does not consist of whole nodes.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}", topology):
        raise ValueError(f"--topology: got {topology!r}, expected chips along each axis, such as 4x4 or 2x2x4")
    chips = math.prod(map(int, topology.split("x")))
    if chips % chips_per_host:
        raise ValueError(
            f"--topology: the {chips} chips of {topology} are no multiple of --chips_per_host={chips_per_host}"
        )
    return chips // chips_per_host


def mounted(workdir: str) -> tuple[str, str]:
    """Bucket of a work folder, and where the run sees the folder.

    Raises:
      ValueError: it is no folder in a bucket.
    """
    result = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+)/(.+?)/?", workdir)
    if result is None or not {"", ".", ".."}.isdisjoint(result[2].split("/")):
        raise ValueError(f"--workdir: got {workdir!r}, expected gs://BUCKET/PATH without empty, . or .. parts")
    return result[1], f"{MOUNT}/{result[1]}/{result[2]}"


def check_trainer(arguments: Sequence[str]) -> None:
    """Refuses flags of launch/train.py that this script sets, and their absence where they are needed.

    Raises:
      ValueError: naming the flag.
    """
    names = [re.sub(r"^--?", "", argument).partition("=")[0] for argument in arguments]
    for name in ("workdir", "distributed", "nodistributed"):
        if name in names:
            raise ValueError(f"--{name} behind --: this script sets it")
    if "config" not in names:
        raise ValueError("no --config behind --; expected as in: -- --config=configs/brpo.py:7b")


def check_printable(name: str, value: str) -> None:
    """Refuses line breaks, control characters and halves of characters.

    Raises:
      ValueError: naming the flag.
    """
    if not value.isprintable():
        raise ValueError(f"{name}: got {value!r}, expected one line without control characters")


def check_encodable(argument: str) -> None:
    """Refuses an argument of the training that is not UTF-8.

    Raises:
      ValueError: naming it.
    """
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument.partition('=')[0]!r} behind --: it is not UTF-8") from error


def yaml_value(value: Any) -> str:
    """A value that JSON can hold, as YAML: what YAML does not take as it is, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e]", lambda match: match[0] if match[0].isprintable() else _escaped(match[0]), text)


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def unexpanded(text: str) -> str:
    """A text that is itself again when Kubernetes has put variables in for $(NAME) and single $ for double ones."""
    return text.replace("$", "$$")


def one_line(command: Sequence[str]) -> str:
    """A command as bash reads it back, on one line: xpk puts it into a block of YAML, in a container's command."""
    return " ".join(
        shlex.quote(word)
        if word.isprintable()
        else "$'" + "".join(c if c.isprintable() and c not in "\\'" else _bash_escaped(c) for c in word) + "'"
        for word in command
    )


def _bash_escaped(letter: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in letter.encode())


def manifest(values: dict[str, Any]) -> str:
    """The template with its names replaced by values that JSON can hold."""
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute({name: yaml_value(value) for name, value in values.items()})


def _jobset(name: str, trainer: list[str]) -> tuple[list[str], str]:
    for flag in (_ACCELERATOR, _TOPOLOGY):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing")
    hosts = hosts_of(_TOPOLOGY.value, _CHIPS_PER_HOST.value)
    bucket, workdir = mounted(_WORKDIR.value)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": _ACCELERATOR.value,
        "cloud.google.com/gke-tpu-topology": _TOPOLOGY.value,
    }
    if _SPOT.value:
        selector["cloud.google.com/gke-spot"] = "true"
    text = manifest(
        {
            "name": name,
            "namespace": _NAMESPACE.value,
            "max_restarts": _MAX_RESTARTS.value,
            "hosts": hosts,
            "service_account": _SERVICE_ACCOUNT.value,
            "grace_s": _GRACE_S.value,
            "node_selector": selector,
            "image": _IMAGE.value,
            "args": [
                unexpanded(argument)
                for argument in (["--distributed"] if hosts > 1 else []) + [f"--workdir={workdir}", *trainer]
            ],
            "chips": _CHIPS_PER_HOST.value,
            "mount": f"{MOUNT}/{bucket}",
            "bucket": bucket,
        }
    )
    return ["kubectl", "apply", "-f", "-"], text


def _xpk(name: str, trainer: list[str]) -> tuple[list[str], str]:
    for flag in (_TPU_TYPE, _XPK_STORAGE):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing; --xpk_cluster needs it")
    _, workdir = mounted(_WORKDIR.value)
    inner = one_line(["python", "launch/train.py", "--distributed", f"--workdir={workdir}", *trainer])
    command = ["xpk", "workload", "create", f"--cluster={_XPK_CLUSTER.value}", f"--workload={name}"]
    command += [f"--tpu-type={_TPU_TYPE.value}", "--num-slices=1", f"--docker-image={_IMAGE.value}"]
    command += [f"--storage={_XPK_STORAGE.value}", f"--max-restarts={_MAX_RESTARTS.value}"]
    # xpk restarts after the statuses 127 to 255 by itself; 1 is an exception, 75 a stall.
    command += ["--restart-on-exit-codes=1,75", f"--termination-grace-period-seconds={_GRACE_S.value}"]
    command += [f"--{flag.name}={flag.value}" for flag in (_PROJECT, _ZONE) if flag.value]
    return [*command, f"--command={unexpanded(inner)}"], ""


def main(argv: list[str]) -> None:
    """Checks, then submits or prints."""
    try:
        for flag in (_NAME, _IMAGE, _WORKDIR):
            if not flag.value:
                raise ValueError(f"--{flag.name} is missing")
        for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
            if isinstance(flag.value, str):
                check_printable(f"--{flag.name}", flag.value)
        for argument in argv[1:]:
            check_encodable(argument)
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", _NAME.value):
            raise ValueError(
                f"--name: got {_NAME.value!r}, expected at most 40 small letters, digits and hyphens, a letter first"
            )
        check_trainer(argv[1:])
        command, text = (_xpk if _XPK_CLUSTER.value else _jobset)(_NAME.value, argv[1:])
    except ValueError as error:
        sys.exit(f"submit.py: {error}")
    if _DRY_RUN.value:
        print(f"{shlex.join(command)} <<'MANIFEST'\n{text}MANIFEST" if text else shlex.join(command))
        return
    print(f"+ {shlex.join(command)}", file=sys.stderr)
    try:
        sys.exit(subprocess.run(command, input=text, text=True, check=False).returncode)
    except FileNotFoundError:
        sys.exit(f"submit.py: there is no program {command[0]!r} here")


if __name__ == "__main__":
    app.run(main)
