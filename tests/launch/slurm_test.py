"""SLURM: what is submitted, and how a job ends, with a stand-in for srun that treats the tasks as it does.

Oracles: argument vectors written down by hand, noted by stub programs; trainings that note the signals they get.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "launch" / "cluster" / "slurm.sh"
JOB = ROOT / "launch" / "cluster" / "slurm.sbatch"
NASTY = ["--config=configs/brpo.py:7b", '--config.data.source=it\'s a "b".jsonl']

# srun --kill-on-bad-exit: starts the tasks; when one ends badly the others are killed; the highest status is its own.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys, time
assert sys.argv[1] == "--kill-on-bad-exit=1", sys.argv
tasks = [subprocess.Popen(sys.argv[2:], env=os.environ | {{"SLURM_PROCID": str(n)}}, start_new_session=True)
         for n in range(int(os.environ["TASKS"]))]
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        time.sleep(0.2)
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, 9)
                task.wait()
    time.sleep(0.02)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""

# A training: `ends` gives what each task does by itself: a status, or it waits for SIGTERM and takes a while to save.
TRAINING = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path
work, task = Path(sys.argv[1]), int(os.environ["SLURM_PROCID"])
def stop(number, frame):
    with open(work / f"signals.{{task}}", "a") as file: print(number, file=file)
    time.sleep(0.3 + 2.5 * (task == 0))
    (work / f"saved.{{task}}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(work / f"pids.{{task}}").write_text(f"{{os.getppid()}} {{os.getpid()}}")
(work / f"argv.{{task}}").write_text(json.dumps([os.getcwd(), *sys.argv[2:]]))
ends = sys.argv[2 + task]
if ends != "wait": sys.exit(int(ends))
time.sleep(60)
"""


def test_submits(stage):
    stage.stub("sbatch", "mkdir")
    python = sys.executable
    given = [
        "--workdir=/s/a b",
        "--nodes=2",
        "--gpus_per_node",
        "4",
        "--time=2-00:00:00",
        "--partition=gpu",
        "--qos=hi",
    ]
    given += [
        "--cpus_per_gpu=8",
        "--warning_s=600",
        "--sbatch=--constraint=h100&nv",
        f"--python={python}",
        "--",
        *NASTY,
    ]
    expected = [
        ["mkdir", "-p", "/s/a b"],
        [
            *["sbatch", "--job-name=qwenla_jax", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"],
            *["--time=2-00:00:00", "--signal=B:USR1@600", "--requeue", "--open-mode=append"],
            *["--output=/s/a b/slurm-%j.log", f"--chdir={ROOT}", "--partition=gpu", "--qos=hi", "--cpus-per-task=8"],
            *["--constraint=h100&nv", str(JOB), "/s/a b", "20", python, "launch/train.py", "--distributed"],
            *["--workdir=/s/a b", *NASTY],
        ],
    ]
    dry = stage.run("bash", SLURM, "--dry_run", *given)
    assert [shlex.split(line) for line in dry.stdout.splitlines() if line[0] != "#"] == expected
    assert stage.run("bash", "-e", "-c", dry.stdout).returncode == 0
    assert stage.calls() == expected
    stage.forget()
    assert stage.run("bash", SLURM, *given).returncode == 0
    assert stage.calls() == expected


def test_a_dry_run_is_lines_of_commands_and_comments(stage):
    """Whatever the training is given: nothing of it leaves the comment, and the command is what is run."""
    stage.stub("sbatch", "mkdir")
    lines = "--config.data.system=a\nmkdir /left; \t\x1b[2J \x9b ü 'b' $(mkdir x)"
    given = ["--workdir=/s", f"--python={sys.executable}", "--", *NASTY, lines]
    dry = stage.run("bash", SLURM, "--dry_run", *given)
    assert dry.returncode == 0 and all(line.isprintable() for line in dry.stdout.splitlines())
    assert [line.split()[0] for line in dry.stdout.splitlines()] == ["mkdir", "sbatch", "#", "#"]
    assert stage.run("bash", "-e", "-c", dry.stdout).returncode == 0
    printed = stage.calls()
    assert printed[0] == ["mkdir", "-p", "/s"] and printed[1][-1] == lines and len(printed) == 2
    stage.forget()
    assert stage.run("bash", SLURM, *given).returncode == 0
    assert stage.calls() == printed


def test_one_gpu_is_not_distributed(stage):
    stage.stub("sbatch", "mkdir")
    result = stage.run("bash", SLURM, "--dry_run", "--gpus_per_node=1", "--workdir=/x", "--", *NASTY)
    assert "--distributed" not in result.stdout


class Job:
    """One job: the script that SLURM runs, with its variables."""

    def __init__(self, stage, ends, restarts=0, max_requeues=20):
        self.stage, self.work = stage, stage.home / "work folder"
        self.work.mkdir()
        stage.stub("scontrol")
        stage.script("srun", SRUN)
        stage.script("training", TRAINING)
        variables = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts), "TASKS": str(len(ends))}
        self.process = subprocess.Popen(
            ["bash", str(JOB), str(self.work), str(max_requeues), "training", str(self.work), *ends],
            env=stage.env | variables,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def begun(self, tasks):
        while not all((self.work / f"argv.{task}").is_file() for task in range(tasks)):
            time.sleep(0.02)

    def end(self):
        self.out, _ = self.process.communicate(timeout=30)
        return self.process.returncode

    def signals(self, task):
        return (self.work / f"signals.{task}").read_text().split()


def test_saves_and_queues_itself_again(stage):
    job = Job(stage, ["wait", "wait"])
    job.begun(2)
    job.process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    job.process.send_signal(signal.SIGUSR1)  # twice, and yet:
    assert job.end() == 0, job.out
    assert job.signals(0) == job.signals(1) == ["15"]
    # The first task takes longer; that the other one has ended does not end it.
    assert (job.work / "saved.0").is_file() and (job.work / "saved.1").is_file()
    assert stage.calls() == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "requeued"),
    [
        (["0", "0"], 0, 0, False),
        (["1", "wait"], 0, 137, False),
        (["1", "1"], 0, 1, False),
        (["75", "wait"], 0, 0, True),
        (["75", "wait"], 2, 0, True),
        (["75", "wait"], 3, 137, False),
        (["143", "143"], 0, 143, False),  # nobody warned this script: the job was cancelled
        (["130"], 0, 130, False),
    ],
)
def test_ends(stage, ends, restarts, status, requeued):
    job = Job(stage, ends, restarts, max_requeues=3)
    assert job.end() == status, job.out
    assert stage.calls() == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_cancelled(stage):
    job = Job(stage, ["wait"])
    job.begun(1)
    # SIGTERM to the script and to all processes of the step: the training saves, and is told once.
    job.process.send_signal(signal.SIGTERM)
    for pid in (job.work / "pids.0").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    assert job.end() == 143, job.out
    assert (job.work / "saved.0").is_file() and job.signals(0) == ["15"]
    assert "tasks ended with 143 (srun: 0)" in job.out
    assert stage.calls() == []
