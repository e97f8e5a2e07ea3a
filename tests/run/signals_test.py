"""Signals to a process of its own: when it ends, with which status, and after what."""

import signal
import subprocess
import sys
import time

import pytest

HEAD = """
import os, signal, sys, time, ctypes
from qwenla_jax.run.signals import Interrupt, Stopped
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores it
def deaf(seconds):  # one instruction for the interpreter, as a compilation is: its handlers do not run meanwhile
    libc = ctypes.CDLL(None)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        libc.usleep(int(min(left, 0.9) * 1e6))
said = []
with Interrupt(said.append) as interrupt:
    interrupt.check()
    print("ready", flush=True)
"""


def run(body, *signals, check_stop=0.3):
    child = subprocess.Popen([sys.executable, "-c", HEAD + body], text=True, stdout=subprocess.PIPE)
    assert child.stdout.readline() == "ready\n"
    begin = time.monotonic()
    for number in signals:
        time.sleep(check_stop)
        child.send_signal(number)
    rest = child.stdout.read()
    return child.wait(), rest, time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_ends_at_the_next_safe_point(number):
    body = """
    deaf(1.5)
    print("still here", interrupt.requested, said, flush=True)
    try:
        interrupt.check("before the update")
    except Stopped as stopped:
        print(stopped.number, stopped)
"""
    status, rest, seconds = run(body, number)
    assert status == 0 and seconds > 1.2
    assert f"still here {int(number)}" in rest and "once more ends at once" in rest
    assert f"{int(number)} {number.name} before the update" in rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_ends_at_once_whatever_goes_on(number):
    status, rest, seconds = run("\n    deaf(20)\n    print('never')", number, number)
    assert status == 128 + number and seconds < 5 and "never" not in rest


def test_before_and_after_it_signals_are_what_they_were():
    status, rest, _ = run("""
    pass
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
print("as before")
""")
    assert status == 0 and "as before" in rest


def test_elsewhere_than_in_the_main_thread_it_does_nothing():
    status, rest, _ = run("""
    pass
import threading
def work():
    with Interrupt() as other:
        other.check()
    print("fine")
thread = threading.Thread(target=work)
thread.start()
thread.join()
""")
    assert status == 0 and "fine" in rest
