"""TPU pods: what the pod script runs, what that does on a host, and a preemption.

Oracles: argument vectors written down by hand, noted by stub programs; Python's shlex; hosts that are folders here, on
which the recorded ssh commands are run by a real shell.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POD = ROOT / "launch" / "cluster" / "tpu_pod.sh"
NASTY = [
    "--config=configs/brpo.py:7b",
    '--config.data.source=it\'s a "b".jsonl',
    "--config.data.system=$HOME `id`; *\\",
]
LINES = "--config.data.system=a\nb $HOME\x1b ü 'c'"
PLACE = ["--zone=us-west4-a", "--project=my project"]
FLAGS = ["--name=pod-1", "--zone", "us-west4-a", "--project=my project"]
SHAPE = ["--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite"]
WORKDIR = "gs://my-bucket/runs/it's one"
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
VM = ["gcloud", "compute", "tpus", "tpu-vm"]
CREATE = [*QUEUE, "create", "pod-1", *PLACE, "--node-id=pod-1", "--accelerator-type=v5litepod-16"]
CREATE += ["--runtime-version=v2-alpha-tpuv5-lite"]
DELETE = [*QUEUE, "delete", "pod-1", *PLACE, "--force", "--quiet"]
LOOK = [
    [*QUEUE, "describe", "pod-1", *PLACE, "--format=value(state.state)"],
    [*VM, "describe", "pod-1", *PLACE, "--format=value(state)"],
]
WORKER = "qwenla_jax/launch/cluster/tpu_worker.sh"


def on_hosts(command):
    return [*VM, "ssh", "pod-1", *PLACE, "--worker=all", f"--command={command}"]


def install(ref="HEAD", extra="tpu", python="3.12"):
    archive = f"{ROOT}/dist/pod-1.tar.gz"
    unpack = "rm -rf qwenla_jax.new && mkdir qwenla_jax.new && tar -xzf qwenla_jax.tar.gz -C qwenla_jax.new && bash "
    return [
        ["mkdir", "-p", f"{ROOT}/dist"],
        ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", ref],
        [*VM, "scp", archive, "pod-1:qwenla_jax.tar.gz", *PLACE, "--worker=all"],
        on_hosts(f"{unpack}qwenla_jax.new/launch/cluster/tpu_worker.sh install {extra} {python}"),
    ]


def start(*flags, workdir="/mnt/gcs/my-bucket/runs/it's one", mount="my-bucket"):
    first = f"bash {WORKER} mount {mount} && " if mount else ""
    return on_hosts(first + shlex.join(["bash", WORKER, "start", *flags, f"--workdir={workdir}", *NASTY]))


STATUS = on_hosts(f"if [ -f {WORKER} ]; then bash {WORKER} status; else echo qwenla_jax absent; fi")
STOP = on_hosts(f"bash {WORKER} stop")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["create", *SHAPE], [CREATE]),
        (["create", *SHAPE, "--spot", "--service_account=a@b"], [[*CREATE, "--spot", "--service-account=a@b"]]),
        (["install"], install()),
        (["install", "--ref=v1 beta", "--extra=tpu,demo", "--python=3.13"], install("v1 beta", "tpu,demo", "3.13")),
        (["run", f"--workdir={WORKDIR}", "--", *NASTY], [start("--distributed")]),
        (["run", f"--workdir={WORKDIR}", "--single_host", "--", *NASTY], [start()]),
        (["run", "--workdir=/nfs/x y", "--", *NASTY], [start("--distributed", workdir="/nfs/x y", mount=None)]),
        (["status"], [*LOOK, STATUS]),
        (["stop"], [STOP]),
        (["delete"], [DELETE]),
        (
            ["resume", *SHAPE, f"--workdir={WORKDIR}", "--", *NASTY],
            [*LOOK, STATUS, DELETE, CREATE, *install(), start("--distributed"), STOP],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_commands(stage, arguments, expected):
    stage.stub("gcloud", "git", "mkdir")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    dry = stage.run("bash", POD, arguments[0], *FLAGS, *arguments[1:at], "--dry_run", *arguments[at:])
    assert dry.returncode == 0, dry.stderr
    lines = [line for line in dry.stdout.splitlines() if not line.startswith("#")]
    assert [shlex.split(line) for line in lines] == expected
    # What is printed, run by a shell, ...
    assert stage.run("bash", "-e", "-c", dry.stdout).returncode == 0
    assert stage.calls() == expected
    if arguments[0] != "resume":
        # ... is what is run.
        stage.forget()
        assert stage.run("bash", POD, arguments[0], *FLAGS, *arguments[1:]).returncode == 0
        assert [call for call in stage.calls() if "--porcelain" not in call] == expected


def test_several_lines_reach_the_training(stage):
    stage.stub("gcloud")
    given = ["run", *FLAGS, "--workdir=/nfs/x", "--single_host"]
    dry = stage.run("bash", POD, *given, "--dry_run", "--", *NASTY, LINES)
    assert all(line.isprintable() for line in dry.stdout.splitlines()) and len(dry.stdout.splitlines()) == 1
    stage.run("bash", POD, *given, "--", *NASTY, LINES)
    assert stage.run("bash", "-e", "-c", dry.stdout).returncode == 0
    one, two = stage.calls()
    command = one[-1].removeprefix("--command=")
    stage.forget()
    message = stage.run("bash", "-c", f"bash() {{ printf '%s\\0' \"$@\"; }}; {command}").stdout.split("\0")[:-1]
    assert one == two and message == [WORKER, "start", "--workdir=/nfs/x", *NASTY, LINES]


class Host:
    """A folder that stands for a host's home, with a Python that notes its arguments and waits."""

    def __init__(self, stage, name="host"):
        self.stage, self.home = stage, stage.home / name
        self.home.mkdir()
        self.env = {"HOME": str(self.home), "QWENLA_JAX_MOUNTS": str(self.home / "mnt")}

    def install(self):
        (self.home / "qwenla_jax" / "launch" / "cluster").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "cluster" / "tpu_worker.sh", self.home / "qwenla_jax" / "launch" / "cluster")
        (self.home / "qwenla_jax" / "launch" / "train.py").touch()
        python = self.home / "qwenla_jax.venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(
            f"#!{sys.executable}\n"
            "import json, os, signal, sys, time\n"
            "from pathlib import Path\n"
            "home = Path(os.environ['HOME'])\n"
            "def end(number, frame):\n"
            "    with open(home / 'signals', 'a') as file: print(number, file=file)\n"
            "    time.sleep(float(os.environ.get('SAVES_S', '1.5')))\n"
            "    sys.exit(143)\n"
            "signal.signal(signal.SIGTERM, end)\n"
            "print('training', flush=True)\n"
            "(home / 'argv.json').write_text(json.dumps([os.getcwd(), *sys.argv[1:]]))\n"
            "wait = home / 'end'\n"
            "while not wait.is_file(): time.sleep(0.02)\n"
            "sys.exit(int(wait.read_text()))\n"
        )
        python.chmod(0o755)

    def ssh(self, command, **env):
        """As sshd does it: the words go to the user's shell, in his home."""
        return subprocess.run(
            ["bash", "-c", command],
            env=self.stage.env | self.env | env,
            cwd=self.home,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def state(self):
        return self.ssh(f"bash {WORKER} status").stdout.splitlines()[0]

    def wait(self, state):
        for _ in range(200):
            if self.state() == state:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.state()!r}, expected {state!r}")


@pytest.fixture
def host(stage):
    result = Host(stage)
    yield result
    pid = result.home / "qwenla_jax.run" / "pid"
    if pid.is_file():
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_run_on_a_host(stage, host):
    host.install()
    stage.stub("gcloud")
    stage.run("bash", POD, "run", *FLAGS, "--workdir=/nfs/x y", "--", *NASTY)
    (command,) = [arg.removeprefix("--command=") for arg in stage.calls()[0] if arg.startswith("--command=")]
    assert host.state() == "qwenla_jax idle"
    begun = host.ssh(command)
    assert begun.returncode == 0, begun.stderr
    host.wait("qwenla_jax running")
    argv = host.home / "argv.json"
    while not argv.is_file() or not argv.read_text():
        time.sleep(0.02)
    expected = [str(host.home / "qwenla_jax"), "launch/train.py", "--distributed", "--workdir=/nfs/x y", *NASTY]
    assert json.loads(argv.read_text()) == expected

    again = host.ssh(command)
    assert again.returncode == 3 and "continuing already" in again.stderr
    update = host.ssh(f"bash {WORKER} install tpu 3.12")
    assert update.returncode == 3 and "stop it first" in update.stderr

    stopped = host.ssh(f"bash {WORKER} stop")
    assert stopped.stdout == "qwenla_jax stopped\n"
    host.wait("qwenla_jax ended 143")
    assert (host.home / "signals").read_text() == "15\n"  # once
    assert "    training" in host.ssh(f"bash {WORKER} status").stdout
    assert host.ssh(f"bash {WORKER} stop").stdout == "qwenla_jax idle\n"


def test_stop_ends_what_does_not_end(host):
    host.install()
    assert host.ssh(f"bash {WORKER} start", SAVES_S="60").returncode == 0
    host.wait("qwenla_jax running")
    while not (host.home / "argv.json").is_file():  # by then it catches SIGTERM
        time.sleep(0.02)
    assert host.ssh(f"bash {WORKER} stop", QWENLA_JAX_STOP_S="0").stdout == "qwenla_jax stopped\n"
    host.wait("qwenla_jax ended 137")


def test_states_of_a_host(host):
    host.install()
    host.ssh(f"bash {WORKER} start")
    (host.home / "end").write_text("75")
    host.wait("qwenla_jax ended 75")
    # After a reboot: a number of a process that is another program's now, and nobody noted how the training ended.
    (host.home / "qwenla_jax.run" / "status").unlink()
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            (host.home / "qwenla_jax.run" / "pid").write_text(f"{other.pid}\n")
            assert host.state() == "qwenla_jax lost"
            assert host.ssh(f"bash {WORKER} stop").stdout == "qwenla_jax idle\n"
            assert other.poll() is None
        finally:
            other.kill()


def test_install_on_a_host(stage, host):
    stage.stub("uv")
    with tarfile.open(host.home / "qwenla_jax.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "launch", "launch")
    old = host.home / "qwenla_jax"
    old.mkdir()
    (old / "left over").touch()
    stage.stub("gcloud", "git", "mkdir")
    stage.run("bash", POD, "install", *FLAGS)
    command = stage.calls()[-1][-1].removeprefix("--command=")
    (stage.bin / "mkdir").unlink()
    stage.forget()
    result = host.ssh(command)
    assert result.returncode == 0, result.stderr
    new = str(host.home / "qwenla_jax.new")
    venv = str(host.home / "qwenla_jax.venv")
    assert stage.calls() == [
        ["uv", "venv", "--python", "3.12", venv],
        ["uv", "pip", "install", "--python", f"{venv}/bin/python", f"{new}[tpu]"],
    ]
    assert (old / "launch" / "cluster" / "tpu_worker.sh").is_file() and not (old / "left over").exists()
    assert not Path(new).exists()


def test_mount_takes_buckets_only(host):
    host.install()
    for name in ("../x", "a/../b", "..", "", "-x", "A"):
        result = host.ssh(f"bash {WORKER} mount {shlex.quote(name)}")
        assert result.returncode == 2 and f"'{name}' is no name of a bucket" in result.stderr
    assert not (host.home / "mnt").exists()


def test_mount(stage, host):
    host.install()
    stage.script("sudo", '#!/bin/sh\nexec "$@"\n')
    stage.stub("gcsfuse")
    stage.script("mountpoint", "#!/bin/sh\nexit 1\n")
    result = host.ssh(f"bash {WORKER} mount my-bucket")
    assert result.returncode == 0, result.stderr
    folder = host.home / "mnt" / "my-bucket"
    assert stage.calls() == [["gcsfuse", "--implicit-dirs", "my-bucket", str(folder)]]
    assert list(folder.iterdir()) == []
    # A second time: it is there.
    stage.script("mountpoint", "#!/bin/sh\nexit 0\n")
    assert host.ssh(f"bash {WORKER} mount my-bucket").returncode == 0
    assert len(stage.calls()) == 1
    # A bucket of the other kind: folders in it cannot be renamed.
    stage.script("mv", "#!/bin/sh\nexit 1\n")
    result = host.ssh(f"bash {WORKER} mount my-bucket")
    assert result.returncode == 1 and "--enable-hierarchical-namespace" in result.stderr
    assert list(folder.iterdir()) == []


def resume(stage, *more):
    flags = [*FLAGS, *SHAPE, "--poll_s=0", f"--workdir={WORKDIR}", *more]
    return stage.run("bash", POD, "resume", *flags, "--", *NASTY)


def collapsed(calls):
    """Calls with repetitions of the same one dropped, and without those that only look."""
    insertions = [*LOOK, STATUS]
    calls = [call for call in calls if call not in insertions and "--porcelain" not in call]
    return [call for before, call in zip([None, *calls], calls, strict=False) if call != before]


def test_resume_after_a_preemption(stage):
    stage.stub("gcloud", "git", "mkdir")
    queued = ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    stage.plays("gcloud", ["queued-resources", "describe"], *queued)
    stage.plays("gcloud", ["tpu-vm", "describe"], "READY", "PREEMPTED", "CREATING", "READY")
    done = "qwenla_jax ended 0\n    loss 1\nqwenla_jax ended 0"
    both = "qwenla_jax running\nqwenla_jax running"
    stage.plays("gcloud", ["ssh", " status;"], both, "qwenla_jax absent\nqwenla_jax absent", both, done)
    # The request is active, its node preempted: it is made again; then it is suspended, and made once more.
    result = resume(stage)
    assert result.returncode == 0, result.stderr
    again = [DELETE, CREATE]
    assert collapsed(stage.calls()) == [*again, *again, *install(), start("--distributed")]
    assert "slice lost: PREEMPTED" in result.stderr and "slice lost: SUSPENDED" in result.stderr
    assert f"the run is done: {WORKDIR}" in result.stderr


def test_resume_from_nothing(stage):
    stage.stub("git", "mkdir")
    # The first look finds no such request. A stub has one status a part, so this one is written out.
    count = stage.home / "count"
    stage.stub("gcloud")
    stub = (stage.bin / "gcloud").read_text()
    (stage.bin / "real").write_text(stub)
    (stage.bin / "real").chmod(0o755)
    stage.script(
        "gcloud",
        '#!/usr/bin/env bash\nif [[ "$*" == *"queued-resources describe"* && ! -e '
        f"{shlex.quote(str(count))} ]]; then : >{shlex.quote(str(count))}\n"
        "echo 'ERROR: NOT_FOUND: Resource projects/p/queuedResources/pod-1 was not found' >&2; exit 1; fi\n"
        f'exec {shlex.quote(str(stage.bin / "real"))} "$@"\n',
    )
    stage.plays("gcloud", ["queued-resources", "describe"], "ACCEPTED", "ACTIVE")
    stage.plays("gcloud", ["tpu-vm", "describe"], "READY")
    stage.plays("gcloud", ["ssh", " status;"], "qwenla_jax absent", "qwenla_jax running", "qwenla_jax ended 0")
    result = resume(stage, "--spot")
    assert result.returncode == 0, result.stderr
    assert collapsed(stage.calls()) == [[*CREATE, "--spot"], *install(), start("--distributed")]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["qwenla_jax ended 143", "qwenla_jax ended 0"], [start("--distributed")]),
        (["qwenla_jax ended 75\nqwenla_jax ended 134", "qwenla_jax ended 0"], [start("--distributed")]),
        (["qwenla_jax lost", "qwenla_jax ended 0"], [start("--distributed")]),
        # The first host is still writing.
        (["qwenla_jax running\nqwenla_jax ended 0"] * 3 + ["qwenla_jax ended 0"], []),
        # The others find out by themselves within one look, or not.
        (
            ["qwenla_jax running\nqwenla_jax ended 75", "qwenla_jax ended 75", "qwenla_jax ended 0"],
            [start("--distributed")],
        ),
        (["qwenla_jax running\nqwenla_jax ended 1"] * 2 + ["qwenla_jax ended 0"], [STOP, start("--distributed")]),
    ],
)
def test_resume_starts_again(stage, states, expected):
    stage.stub("gcloud", "git", "mkdir")
    stage.plays("gcloud", ["queued-resources", "describe"], "ACTIVE")
    stage.plays("gcloud", ["tpu-vm", "describe"], "READY")
    stage.plays("gcloud", ["ssh", " status;"], *states)
    result = resume(stage)
    assert result.returncode == 0, result.stderr
    assert collapsed(stage.calls()) == expected


def test_resume_gives_up(stage):
    stage.stub("gcloud", "git", "mkdir")
    stage.plays("gcloud", ["queued-resources", "describe"], "ACTIVE")
    stage.plays("gcloud", ["tpu-vm", "describe"], "READY")
    stage.plays("gcloud", ["ssh", " status;"], "qwenla_jax ended 1")
    result = resume(stage, "--attempts=3")
    assert result.returncode == 1 and "failure 3 of 3" in result.stderr
    assert stage.calls().count(start("--distributed")) == 3
    # Nothing is made or deleted because gcloud cannot be asked.
    stage.forget()
    stage.parts.clear()
    stage.plays("gcloud", ["queued-resources", "describe"], "", status=1, err="ERROR: your credentials are gone")
    result = resume(stage, "--attempts=2")
    assert result.returncode == 1 and "your credentials are gone" in result.stderr
    assert collapsed(stage.calls()) == []
