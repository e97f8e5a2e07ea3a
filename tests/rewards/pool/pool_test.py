"""Oracles: what each badly behaved reward is, by hand; `score` in this process for its neighbours, /proc."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from rewards.records import record

from qwenla_jax.rewards import RewardError, RewardPool, RewardScores, RewardSettings, score

DEADLINE = 0.5  # seconds for a record; what is not meant to be late takes a few milliseconds

SOURCE = r"""
import ctypes, os, random, resource, signal, subprocess, sys, threading, time
import numpy as np

def length(record):
    return len(record.response) / 7

def bad(record):
    return globals()[record.id](record) if record.id in globals() else 0.5

def loop(record):
    while True:
        pass
def sleep(record):
    time.sleep(1000)
def deaf(record):
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    time.sleep(1000)
def stop_itself(record):
    os.kill(os.getpid(), signal.SIGSTOP)
def segfault(record):
    ctypes.string_at(0)
def kill_itself(record):
    os.kill(os.getpid(), signal.SIGKILL)
def kill_group(record):
    os.killpg(0, signal.SIGKILL)
def kill_parent(record):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
def stop_parent(record):
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(1000)
def sys_exit(record):
    sys.exit(0)
def sys_exit_text(record):
    sys.exit("bye")
def os_exit(record):
    os._exit(0)
def close_files(record):
    os.closerange(0, 4096)
    return 1.0
def garbage(record):
    for fd in range(3, 64):
        try:
            os.write(fd, b'["value", 99, 1.0]\n\xff\xfe{[\n' * 3)
        except OSError:
            pass
    return 1.0
def flood(record):
    for fd in range(3, 64):
        try:
            os.write(fd, b"x" * (1 << 22))
        except OSError:
            pass
    return 1.0
def flood_for_ever(record):
    while True:
        flood(record)
def half_answer(record):
    for fd in range(3, 64):
        try:
            os.write(fd, bytes(3) + b"\x09[")
        except OSError:
            pass
    time.sleep(1000)
def allocate(record):
    return len(bytearray(50 << 30))
def allocate_array(record):
    return np.ones(50 << 27).sum()
def reserve(record):
    return np.empty(2 << 30, np.uint8)[0]
def recurse(record):
    return recurse(record)
def raise_error(record):
    raise LookupError("no such thing")
def raise_long(record):
    raise LookupError("\ud800" + "x" * 10**7)
class Stop(BaseException):
    pass
def raise_base(record):
    raise Stop("now")
def interrupt(record):
    raise KeyboardInterrupt
class Unreadable(Exception):
    def __str__(self):
        os._exit(7)
def raise_unreadable(record):
    raise Unreadable
class Slow:
    shape = ()
    def item(self):
        time.sleep(1000)
def slow_number(record):
    return Slow()
def nan(record):
    return float("nan")
def inf(record):
    return np.float32("inf")
def none(record):
    pass
def text(record):
    return "x"
def digits(record):
    return "1.0"
def huge_text(record):
    return "x" * 10**7
def several(record):
    return [1, 2]
def array(record):
    return np.array([1, 2])
def row(record):
    return np.array([1.0])

# These count, whatever else they do.
def nap(record):
    time.sleep(0.15)
    return 0.5
def fork_and_return(record):
    if os.fork() == 0:
        return 2.0
    time.sleep(0.1)
    return 1.0
def fork_and_raise(record):
    if os.fork() == 0:
        raise ValueError
    return 1.0
def fork_bomb(record):
    for _ in range(4):
        os.fork()
    if os.getpid() != os.getsid(0):
        time.sleep(1000)
    return 1.0
def leave_child(record):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    return 1.0
def leave_daemon(record):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            time.sleep(1000)
        os._exit(0)
    return 1.0
def daemon_works(record):
    reading, writing = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            time.sleep(0.3)
            os.write(writing, b"x")
        os._exit(0)
    os.close(writing)
    return len(os.read(reading, 1))
def daemon_and_loop(record):
    leave_daemon(record)
    loop(record)
def leave_thread(record):
    def later():
        time.sleep(0.05)
        os._exit(1)
    threading.Thread(target=later).start()
    return 1.0
def leave_files(record):
    bad.kept = [open(os.devnull) for _ in range(200)]
    return 1.0
def print_much(record):
    for _ in range(40):
        print("x" * 10**5)
        sys.stderr.write("y" * 10**5)
        os.write(1, b'["value", 0, 9.0]\n' * 1000)
    sys.stdout.flush()
    return 1.0
def read_input(record):
    return len(sys.stdin.read(1)) + 1
def close_standard(record):
    sys.stdout.close(); sys.stderr.close(); os.close(0)
    return 1.0
def truth(record):
    return True
def scalar(record):
    return np.float64(1)
def no_axes(record):
    return np.array(1)
"""

# name: kind, what the message says
BAD = {
    "loop": ("timeout", "within 0.5 s"),
    "sleep": ("timeout", "within 0.5 s"),
    "deaf": ("timeout", "within 0.5 s"),
    "stop_itself": ("timeout", "within 0.5 s"),
    "slow_number": ("timeout", "within 0.5 s"),
    "segfault": ("crash", "SIGSEGV"),
    "kill_itself": ("crash", "SIGKILL"),
    "kill_group": ("crash", "SIGKILL"),
    "kill_parent": ("crash", "ended the rewards' fork server, exit status -9"),
    "sys_exit": ("crash", "status"),
    "sys_exit_text": ("crash", "status"),
    "os_exit": ("crash", "status 0"),
    "raise_unreadable": ("crash", "status 7"),
    "close_files": ("crash", "process"),
    "garbage": ("crash", "no answer"),
    "flood": ("crash", "no answer"),
    "flood_for_ever": ("crash", "no answer"),
    "allocate": ("raised", "MemoryError"),
    "allocate_array": ("raised", "MemoryError: Unable to allocate 50.0 GiB"),
    "reserve": ("raised", "MemoryError: Unable to allocate 2.00 GiB"),
    "recurse": ("raised", "RecursionError"),
    "raise_error": ("raised", "LookupError: no such thing"),
    "raise_long": ("raised", "LookupError: \ud800xxx"),
    "raise_base": ("raised", "Stop: now"),
    "interrupt": ("raised", "KeyboardInterrupt"),
    "nan": ("value", "returned nan"),
    "inf": ("value", "returned inf"),
    "none": ("value", "returned NoneType"),
    "text": ("value", "returned str"),
    "digits": ("value", "returned str"),
    "huge_text": ("value", "returned str"),
    "several": ("value", "returned list"),
    "array": ("value", "shape (2,)"),
    "row": ("value", "shape (1,)"),
}
ODD = (
    "fork_and_return fork_and_raise fork_bomb leave_child leave_daemon leave_thread leave_files print_much read_input "
    "close_standard truth scalar no_axes"
).split()

MARK = "QWENLA_TEST_MARK"
EXTRA = (("users:length", 0.125), ("users:bad", 2.0))
SETTINGS = RewardSettings(target_length=4.0, overlong=1.0, overlong_buffer=2, max_tokens=6, extra=EXTRA)
PARTS = ("<SUMMARY>s</SUMMARY>", "<CAPTION>c</CAPTION>", "<REASONING>r</REASONING>", "<REFLECTION>w w</REFLECTION>")


def good(count):
    texts = [
        "".join(PARTS[: i % 5]) + f"<CONCLUSION>{i % 4}</CONCLUSION>" + "\ud800 x\x00" * (i % 3) for i in range(count)
    ]
    return [record(text, id=str(i)) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the users' rewards above are importable from."""
    path = tmp_path_factory.mktemp("users")
    (path / "users.py").write_text(SOURCE, encoding="utf-8")
    return path


@pytest.fixture
def users(folder, monkeypatch):
    """Every process that a pool starts during the test inherits this mark; none may be left over."""
    monkeypatch.syspath_prepend(folder)
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    assert_no_processes(mark)


@pytest.fixture(scope="module")
def one_worker(folder):
    """A pool that has to survive all bad and odd rewards, and the mark of its processes."""
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv(MARK, mark)
        with RewardPool(SETTINGS, workers=1, deadline_s=DEADLINE, memory_mb=1024) as pool:
            yield pool, mark
    assert_no_processes(mark)


def marked_processes(mark):
    result = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    result.append(int(entry.name))
        except OSError:
            pass  # it has just ended, or is not ours
    return result


def processes_of_rewards(mark):
    return [
        pid
        for pid in marked_processes(mark)
        if b"qwenla_jax.rewards.pool.fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def assert_no_processes(mark, besides=()):
    until = time.monotonic() + 4
    while (left := set(marked_processes(mark)) - set(besides)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left, [Path(f"/proc/{pid}/stat").read_text() for pid in left]


def assert_only_the_fork_server_is_left(mark):
    until = time.monotonic() + 2
    while len(marked_processes(mark)) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(marked_processes(mark)) == 1


@pytest.mark.parametrize("name", BAD)
def test_bad_reward_costs_its_own_record_only(one_worker, name):
    pool, mark = one_worker
    records = good(20)
    expected = [score(r, SETTINGS) for r in records]
    records[5] = dataclasses.replace(records[5], id=name)
    enough = DEADLINE + 3
    if name == "kill_parent":  # then fork servers start anew, which takes as long as the machine is slow
        start = time.monotonic()
        with RewardPool(SETTINGS, workers=1) as other:
            other.score(good(1))
        enough += 3 * (time.monotonic() - start)
    start = time.monotonic()
    got = pool.score(records)
    assert time.monotonic() - start < enough
    error = got.pop(5)
    assert isinstance(error, RewardError), error
    kind, message = BAD[name]
    # Who kills the worker itself is found by trying each record alone; which of its rewards it was is not known.
    assert (error.kind, error.name) == (kind, "" if name == "kill_parent" else "bad"), error
    assert message in error.message and len(error.message) <= 300
    assert bool(error.traceback) == (kind == "raised") and len(error.traceback) <= 4000
    if name == "raise_error":
        *where, raised = error.traceback.rstrip().splitlines()
        assert "users.py" in where[1] and "worker.py" not in error.traceback
        assert where[-1].strip() == 'raise LookupError("no such thing")' and raised == "LookupError: no such thing"
    assert got == expected[:5] + expected[6:]
    assert_only_the_fork_server_is_left(mark)
    assert pool.score(good(20)) == expected


@pytest.mark.parametrize("name", ODD)
def test_odd_reward_counts(one_worker, name):
    pool, mark = one_worker
    records = good(20)
    expected = [score(r, SETTINGS) for r in records]
    records[5] = dataclasses.replace(records[5], id=name)
    more = expected[5].extra | {"bad": 1.0}
    expected[5] = dataclasses.replace(expected[5], extra=more, total=expected[5].total + 2.0 * 0.5)
    assert pool.score(records) == expected
    assert_only_the_fork_server_is_left(mark)  # what it left is killed while the pool lives on
    assert pool.score(good(20))[6:] == expected[6:]


def test_what_a_reward_leaves_does_not_reach_the_next_record(one_worker):
    pool, _ = one_worker
    records = good(3)
    expected = [score(r, SETTINGS) for r in records]
    records = [dataclasses.replace(r, id=name) for r, name in zip(records, ("leave_thread", "nap", "2"), strict=True)]
    assert pool.score(records)[1:] == expected[1:]


def test_the_deadline_is_one_record_s(one_worker):
    pool, _ = one_worker
    records = good(10)
    napping = [dataclasses.replace(r, id="nap") for r in records]
    assert pool.score(napping) == [score(r, SETTINGS) for r in records]


@pytest.mark.parametrize("workers", [1, 3])
def test_all_at_once(users, workers):
    records, names = good(3 * len(BAD)), list(BAD)
    expected = [score(r, SETTINGS) for r in records]
    for i, name in enumerate(names):
        records[3 * i + 1] = dataclasses.replace(records[3 * i + 1], id=name)
    with RewardPool(SETTINGS, workers=workers, deadline_s=DEADLINE, memory_mb=1024) as pool:
        got = pool.score(records)
        assert {name: error.kind for name, error in zip(names, got[1::3], strict=True)} == {n: BAD[n][0] for n in names}
        assert got[0::3] == expected[0::3] and got[2::3] == expected[2::3]
        assert pool.score(good(3)) == expected[:3]


@pytest.mark.parametrize("name", ["stop_parent", "half_answer"])
def test_stopped_fork_server_is_replaced(users, monkeypatch, name):
    monkeypatch.setattr("qwenla_jax.rewards.pool.pool.GRACE_S", 0.2)
    records = good(4)
    records[1] = dataclasses.replace(records[1], id=name)
    with RewardPool(SETTINGS, workers=1, deadline_s=DEADLINE) as pool:
        start = time.monotonic()
        got = pool.score(records)
        assert time.monotonic() - start < 10
        assert got[1] == RewardError("crash", "", "computing a reward took the rewards' fork server more than 0.7 s")
        assert [got[i] for i in (0, 2, 3)] == [score(records[i], SETTINGS) for i in (0, 2, 3)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_as_in_this_process(users, workers):
    records = good(70)
    expected = [score(r, SETTINGS) for r in records]
    assert len({scores.total for scores in expected}) > 10
    with RewardPool(SETTINGS, workers=workers) as pool:
        for count in (70, 0, 1, 16, 17, 70):
            assert pool.score(records[:count]) == expected[:count]


def test_state_does_not_depend_on_the_number_of_workers(users_module):
    # A reward with a memory, which it should not have, and one with the order of a set.
    users_module("users", "seen = []\ndef count(r):\n    seen.append(r)\n    return len(seen)\n")
    users_module("more", "def order(r):\n    return int(''.join(set(map(str, range(9)))))\n")
    settings = RewardSettings(extra=(("users:count", 1.0), ("more:order", 1.0)))
    result = []
    for workers in (1, 2, 3):
        with RewardPool(settings, workers=workers) as pool:
            result += [pool.score(good(40)) for _ in range(2)]
    assert all(scores == result[0] for scores in result)


def test_end_of_a_worker_leaves_the_others_processes(users):
    records = [dataclasses.replace(r, id="os_exit") for r in good(48)]
    records[0] = dataclasses.replace(records[0], id="daemon_works")
    with RewardPool(SETTINGS, workers=2) as pool:
        first, *others = pool.score(records)
    assert first.extra["bad"] == 1.0 and {error.message for error in others} == {"its process ended with status 0"}


def test_without_users_rewards():
    with RewardPool(RewardSettings(), workers=1) as pool:
        assert pool.score(good(9)) == [score(r, RewardSettings()) for r in good(9)]


def test_large_texts(users):
    records = [record("<CONCLUSION>3</CONCLUSION>" + "\U0001f600\ud83d\ude00\ud800\n" * 500_000) for _ in range(3)]
    with RewardPool(SETTINGS) as pool:
        assert pool.score(records) == [score(r, SETTINGS) for r in records]


def test_step_deadline(users):
    records = [dataclasses.replace(r, id="sleep") if i % 2 else r for i, r in enumerate(good(60))]
    with RewardPool(SETTINGS, workers=2, deadline_s=0.2, step_deadline_s=2.0) as pool:
        start = time.monotonic()
        got = pool.score(records)
        assert time.monotonic() - start < 5
        assert isinstance(got[0], RewardScores) and {e.kind for e in got if isinstance(e, RewardError)} == {"timeout"}
        assert got[-1] == RewardError("timeout", "", "the step's 2 s were over")
        assert got[1] == RewardError("timeout", "bad", "no answer within 0.2 s")
        assert len(got) == 60
        assert pool.score(good(20)) == [score(r, SETTINGS) for r in good(20)]


def test_interrupted_call(users, monkeypatch):
    records = [dataclasses.replace(r, id="sleep") for r in good(3)]
    with RewardPool(SETTINGS, workers=2, deadline_s=30) as pool:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                pool.score(records)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert pool.score(good(20)) == [score(r, SETTINGS) for r in good(20)]


def test_fork_server_that_died_between_two_calls(users):
    with RewardPool(SETTINGS, workers=2) as pool:
        pool.score(good(3))
        for pid in marked_processes(users):
            os.kill(pid, signal.SIGKILL)
        assert pool.score(good(20)) == [score(r, SETTINGS) for r in good(20)]


def test_reward_that_can_no_longer_be_imported(users, users_module, tmp_path):
    users_module("users", SOURCE)
    records = good(4)
    records[1] = dataclasses.replace(records[1], id="kill_parent")
    with RewardPool(SETTINGS, workers=1) as pool:
        (tmp_path / "users.py").write_text("1 / 0", encoding="utf-8")
        got = pool.score(records)
        assert [error.kind for error in got[1:]] == ["crash"] * 3
        assert "ZeroDivisionError" in got[3].message and "could be started" in got[3].message
        assert pool.score(good(1))[0].kind == "crash"
        (tmp_path / "users.py").write_text(SOURCE, encoding="utf-8")
        pool.score(good(1))
        assert pool.score(good(4)) == [score(r, SETTINGS) for r in good(4)]


def test_close(users):
    pool = RewardPool(SETTINGS, workers=2)
    assert len(marked_processes(users)) == 1  # the fork server; nothing computes yet
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 2
    assert not marked_processes(users)
    with pytest.raises(ValueError, match="closed"):
        pool.score(good(1))


def test_close_with_a_stopped_fork_server(users):
    pool = RewardPool(SETTINGS, workers=3)
    for pid in marked_processes(users):
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 4
    assert not marked_processes(users)


TRAINER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores it
sys.path.insert(0, sys.argv[1])
from rewards.records import record
from qwenla_jax.rewards import RewardPool, RewardSettings
settings = RewardSettings(extra=(("users:bad", 1.0),))
with RewardPool(settings, workers=2, deadline_s=1000.0, step_deadline_s=1000.0) as pool:
    # A process that is forked later, as data loaders do, holds the pipes to the workers open.
    if sys.argv[2] == "forked" and os.fork() == 0:
        time.sleep(6)
        os._exit(0)
    print("ready", flush=True)
    if sys.argv[2] in ("idle", "forked"):
        sys.stdin.read()
    pool.score([record("", id=sys.argv[2]) for _ in range(40)])
"""


@pytest.mark.parametrize("doing", ["loop", "deaf", "daemon_and_loop", "idle", "forked"])
def test_workers_end_with_a_killed_trainer(users, folder, doing):
    command = [sys.executable, "-c", TRAINER, str(folder), doing]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as trainer:
        assert trainer.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        assert len(marked_processes(users)) >= (2 if doing == "idle" else 3)
        forked = set(marked_processes(users)) - {*processes_of_rewards(users), trainer.pid}
        trainer.kill()
    assert_no_processes(users, besides=forked)
    for pid in forked:
        os.kill(pid, signal.SIGKILL)


def test_workers_that_hang_in_an_import_end_with_a_killed_trainer(users, users_module):
    users_module("hanging", "import time\ntime.sleep(1000)")
    code = "from qwenla_jax.rewards import *\nsettings = RewardSettings(extra=(('hanging:f', 1.0),))\n"
    code += "RewardPool(settings, start_deadline_s=1.0)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env) as trainer:
        until = time.monotonic() + 5
        while not processes_of_rewards(users) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.3)
        trainer.kill()
    assert_no_processes(users)


def test_workers_end_with_a_killed_fork_server_and_trainer(users, folder):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(folder), "loop"], env=env, **pipes) as trainer:
        assert trainer.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        trainer.send_signal(signal.SIGSTOP)  # it must not be the one who kills them
        processes = processes_of_rewards(users)
        assert len(processes) == 3
        for pid in processes:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(trainer.pid):
                os.kill(pid, signal.SIGKILL)
        trainer.kill()
    assert_no_processes(users)


def test_ctrl_c_does_not_reach_the_fork_server(users, folder):
    # The terminal sends SIGINT to the whole foreground group.
    command = [sys.executable, "-c", TRAINER, str(folder), "idle"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as trainer:
        assert trainer.stdout.readline() == b"ready\n"
        (server,) = [pid for pid in marked_processes(users) if pid != trainer.pid]
        assert os.getpgid(server) != trainer.pid and os.getsid(server) != trainer.pid
        os.killpg(trainer.pid, signal.SIGINT)
        trainer.wait(10)
    assert_no_processes(users)


@pytest.mark.parametrize(
    ("source", "function", "message"),
    [
        ("", "absent", "'users:absent'.*no absent.*want a function"),
        ("1 / 0", "f", "'users:f'.*ZeroDivisionError.*want a module"),
        ("import absent_module", "f", "'users:f'.*absent_module"),
        ("raise SystemExit(3)", "f", "'users:f'.*SystemExit"),
        ("f = 3", "f", "'users:f' is a int; want a function"),
        ("def f(): return 1", "f", r"'users:f': f\(\) is called with one record"),
        ("def f(a, b): return 1", "f", r"'users:f': f\(a, b\) is called with one record"),
        ("import os; os._exit(3)", "f", "importing 'users:f' ended the rewards' fork server, exit status 3"),
        ("import ctypes; ctypes.string_at(0)", "f", "importing 'users:f' ended the rewards' fork server.*status -11"),
        ("import time; time.sleep(1000)", "f", "importing 'users:f' took the rewards' fork server more than 2 s"),
        (
            "import signal, time; signal.signal(14, signal.SIG_IGN); time.sleep(1000)",
            "f",
            "took the rewards' fork server more",
        ),
        ("print('x' * 10**7)\ndef f(): return 1", "f", "called with one record"),
    ],
)
def test_refused_at_the_start(users, users_module, source, function, message):
    users_module("users", source)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        RewardPool(RewardSettings(extra=((f"users:{function}", 1.0),)), start_deadline_s=2 if "sleep" in source else 30)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("setting", "value"),
    [("workers", 0), ("workers", 1.5), ("deadline_s", 0), ("step_deadline_s", float("nan")), ("memory_mb", -1)],
)
def test_settings_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        RewardPool(RewardSettings(), **{setting: value})


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_module_in_the_working_directory(tmp_path, monkeypatch, safe_path):
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    (tmp_path / "beside_the_run.py").write_text("def f(record): return 0.5", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) not in sys.path
    with RewardPool(RewardSettings(extra=(("beside_the_run:f", 1.0),)), workers=1) as pool:
        assert pool.score(good(1))[0].extra == {"f": 0.5}


def test_module_on_pythonpath(tmp_path, monkeypatch):
    (tmp_path / "on_the_path.py").write_text("def f(record): return 0.5", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    code = (
        "from rewards.pool.pool_test import *\n"
        "with RewardPool(RewardSettings(extra=(('on_the_path:f', 1.0),)), workers=1) as pool:\n"
        "    print(pool.score(good(1))[0].extra)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "{'f': 0.5}\n", done.stderr


def test_rewards_do_not_need_jax():
    code = "import sys, qwenla_jax.rewards.pool.fork_server; print([m for m in sys.modules if m == 'jax'])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout == "[]\n"


def test_reward_s_process_has_no_jax(users_module):
    users_module("users", "import sys\ndef f(record): return 'jax' in sys.modules\n")
    with RewardPool(RewardSettings(extra=(("users:f", 1.0),)), workers=1) as pool:
        assert pool.score(good(1))[0].extra == {"f": 0.0}


def test_many_open_files(users):
    # A training process may have more files open than `select` can name.
    opened = []
    try:
        while not opened or opened[-1].fileno() < 1100:
            opened.append(open(os.devnull))
        with RewardPool(SETTINGS, workers=1, deadline_s=DEADLINE) as pool:
            assert pool.score(good(3)) == [score(r, SETTINGS) for r in good(3)]
    except OSError:
        pytest.skip("this system allows fewer open files")
    finally:
        for file in opened:
            file.close()
