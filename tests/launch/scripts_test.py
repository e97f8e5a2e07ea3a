"""Every shell script by shellcheck, and no launcher starts anything when it is called wrongly or in a dry run.

Oracles: shellcheck (the program, from its wheel), and stubs that write down every call.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/cluster/*.sh"), *ROOT.glob("launch/cluster/*.sbatch"), ROOT / ".ci" / "run"])
POD = ROOT / "launch" / "cluster" / "tpu_pod.sh"
SLURM = ROOT / "launch" / "cluster" / "slurm.sh"
GKE = ROOT / "launch" / "cluster" / "gke" / "submit.py"
HERE = ["--name=pod", "--zone=us-west4-a"]
MADE = ["--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite"]
CONFIG = ["--", "--config=configs/brpo.py"]
SLICE = ["--name=job", "--image=r/i:1", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--workdir=gs://bucket/run"]
TOOLS = ("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "git", "ssh", "mkdir")


def shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    result = beside if beside.is_file() else shutil.which("shellcheck")
    assert result, "shellcheck is missing; it comes with: pip install -e '.[test]'"
    return str(result)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    result = subprocess.run([shellcheck(), "-x", str(path)], cwd=ROOT, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout


def test_shellcheck_finds_faults(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm -rf $1/*\n")
    result = subprocess.run([shellcheck(), tmp_path / "bad.sh"], text=True, capture_output=True, check=False)
    assert result.returncode == 1 and "SC2086" in result.stdout


def command(script):
    return [sys.executable, script] if script.suffix == ".py" else ["bash", script]


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        (POD, [], "unknown command ''"),
        (POD, ["begin", *HERE], "unknown command 'begin'; valid: create, install, run"),
        (POD, ["status", "--zone=z"], "--name is missing"),
        (POD, ["status", "--name=pod"], "--zone is missing"),
        (POD, ["status", *HERE, "--nmae=x"], "unknown flag --nmae; valid: --accelerator_type"),
        (POD, ["status", *HERE, "--dry-run"], "unknown flag --dry-run"),
        (POD, ["status", *HERE, "--$(mkdir x)"], "unknown flag --$(mkdir x)"),
        (POD, ["status", *HERE, "--spot=yes"], "--spot takes no value"),
        (POD, ["status", "--zone=z", "--name"], "--name lacks its value"),
        (POD, ["status", "--zone=z", "--name="], "--name is empty"),
        (POD, ["status", "--zone=z", "--name=Pod"], "--name: got 'Pod'"),
        (POD, ["status", *HERE, "extra"], "unexpected argument 'extra'"),
        (POD, ["status", *HERE, *CONFIG], "status takes no flags of the training, got '--config=configs/brpo.py'"),
        (POD, ["status", *HERE, "--poll_s=soon"], "--poll_s: got 'soon'"),
        (POD, ["create", *HERE], "--accelerator_type is missing"),
        (POD, ["create", *HERE, MADE[0]], "--runtime_version is missing"),
        (POD, ["run", *HERE, *CONFIG], "--workdir is missing"),
        (POD, ["run", *HERE, "--workdir=runs/brpo", *CONFIG], "--workdir: got 'runs/brpo', expected gs://"),
        (POD, ["run", *HERE, "--workdir=gs://bucket", *CONFIG], "--workdir: got 'gs://bucket'"),
        (POD, ["run", *HERE, "--workdir=gs://bu/../../etc", *CONFIG], "without empty, . or .. parts"),
        (POD, ["run", *HERE, "--workdir=gs://bu/a/..", *CONFIG], "--workdir: got 'gs://bu/a/..'"),
        (POD, ["run", *HERE, "--workdir=gs://bu/./a", *CONFIG], "--workdir: got 'gs://bu/./a'"),
        (POD, ["run", *HERE, "--workdir=gs://bu/a//b", *CONFIG], "--workdir: got 'gs://bu/a//b'"),
        (POD, ["run", *HERE, "--workdir=gs://bu/a\nb", *CONFIG], "--workdir holds a line break"),
        (POD, ["run", *HERE, "--workdir=/a\x1b[2Jb", *CONFIG], "--workdir holds a line break or another control"),
        (POD, ["run", *HERE, "--workdir=/a\x9b2Jb", *CONFIG], "--workdir holds a line break or another control"),
        (POD, ["status\nx", *HERE], "unknown command"),
        (POD, ["status", *HERE, "x\x1b[2J"], "unexpected argument"),
        (POD, ["install", *HERE, "--ref=--exec=mkdir"], "--ref: got '--exec=mkdir', expected a commit"),
        (POD, ["install", *HERE, "--extra=tpu] @ file:///x"], "--extra: got 'tpu] @ file:///x', expected names"),
        (POD, ["install", *HERE, "--python=/x"], "--python: got '/x', expected a version"),
        (SLURM, ["--workdir=/x\nmkdir y", *CONFIG], "--workdir holds a line break"),
        (SLURM, ["--workdir=/x\\n", *CONFIG], "expected an absolute path without a % or a backslash"),
        (SLURM, ["--workdir=/x", "--sbatch=other.sh", *CONFIG], "--sbatch: got 'other.sh', expected an option"),
        (SLURM, ["--workdir=/x", "--partition=a\nb", *CONFIG], "--partition holds a line break"),
        (POD, ["run", *HERE, "--workdir=gs://bu/x"], "no --config behind --"),
        (POD, ["run", *HERE, "--workdir=gs://bu/x", *CONFIG, "--workdir=/x"], "--workdir stands before --"),
        (POD, ["run", *HERE, "--workdir=gs://bu/x", *CONFIG, "--distributed"], "--distributed: the launcher decides"),
        (POD, ["resume", *HERE, "--workdir=gs://bu/x", *CONFIG], "--accelerator_type is missing"),
        (SLURM, CONFIG, "--workdir is missing"),
        (SLURM, ["--workdir=runs/x", *CONFIG], "--workdir: got 'runs/x', expected an absolute path"),
        (SLURM, ["--workdir=/x%j", *CONFIG], "--workdir: got '/x%j'"),
        (SLURM, ["--workdir=/x", "--nodes=0", *CONFIG], "--nodes: got '0', expected a whole number of at least 1"),
        (SLURM, ["--workdir=/x", "--gpus_per_node=8.5", *CONFIG], "--gpus_per_node: got '8.5'"),
        (SLURM, ["--workdir=/x", "--time=a day", *CONFIG], "--time: got 'a day'"),
        (SLURM, ["--workdir=/x", "--gpus=8", *CONFIG], "unknown flag --gpus; valid: --account"),
        (SLURM, ["--workdir=/x"], "no --config behind --"),
        (SLURM, ["--workdir=/x", "--python=/none/python", *CONFIG], "--python: there is no program /none/python"),
        (GKE, SLICE[1:] + CONFIG, "--name is missing"),
        (GKE, [*SLICE, "--name=Job", *CONFIG], "--name: got 'Job'"),
        (GKE, [*SLICE, "--topology=4by4", *CONFIG], "--topology: got '4by4'"),
        (GKE, [*SLICE, "--topology=99999999999999x1", *CONFIG], "--topology: got '99999999999999x1'"),
        (GKE, [*SLICE, f"--grace_s={10**20}", *CONFIG], "grace_s"),
        (GKE, [*SLICE, "--topology=3x3", *CONFIG], "--topology: the 9 chips of 3x3 are no multiple of"),
        (GKE, [*SLICE, "--workdir=/x", *CONFIG], "--workdir: got '/x', expected gs://BUCKET/PATH"),
        (GKE, SLICE, "no --config behind --"),
        (GKE, [*SLICE, *CONFIG, "--workdir=/x"], "--workdir behind --"),
        (GKE, [*SLICE, "--accelarator=x", *CONFIG], "Unknown command line flag 'accelarator'"),
        (GKE, [*SLICE, "--xpk_cluster=c", *CONFIG], "--tpu_type is missing"),
    ],
)
def test_wrong_flags(stage, script, arguments, named):
    stage.stub(*TOOLS)
    result = stage.run(*command(script), *arguments)
    assert result.returncode != 0
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert stage.calls() == []


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        *[(POD, [name, *HERE]) for name in ("install", "status", "stop", "delete")],
        (POD, ["create", *HERE, *MADE]),
        (POD, ["run", *HERE, "--workdir=gs://bucket/x", *CONFIG]),
        (POD, ["resume", *HERE, *MADE, "--workdir=gs://bucket/x", *CONFIG]),
        (SLURM, ["--workdir=/x", *CONFIG]),
        (GKE, [*SLICE, *CONFIG]),
        (GKE, [*SLICE, "--xpk_cluster=c", "--tpu_type=v5litepod-16", "--xpk_storage=s", *CONFIG]),
    ],
)
def test_dry_run_runs_nothing(stage, script, arguments):
    stage.stub(*TOOLS)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    before = sorted(stage.home.rglob("*"))
    result = stage.run(*command(script), *arguments[:at], "--dry_run", *arguments[at:])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert stage.calls() == []
    assert sorted(stage.home.rglob("*")) == before


def test_help_names_every_flag(stage):
    for script in (POD, SLURM):
        text = script.read_text()
        flags = re.findall(r"\[(\w+)\]=", text[text.index("defaults=(") : text.index('parse_flags "$@"')])
        shown = stage.run("bash", script, "--help")
        assert shown.returncode == 0 and len(flags) > 8
        assert [flag for flag in flags if f"--{flag}" not in shown.stdout] == []


def test_readme_commands(stage):
    section = (ROOT / "README.md").read_text().partition("\n## Pods and clusters\n")[2].partition("\n## ")[0]
    lines = section.split("```")[1].replace("\\\n", " ").replace("BUCKET", "bucket").strip().splitlines()
    assert [shlex.split(line)[line.startswith("python")] for line in lines] == [
        "launch/cluster/tpu_pod.sh",
        "launch/cluster/slurm.sh",
        "launch/cluster/gke/submit.py",
    ]
    stage.stub(*TOOLS)
    for line in lines:
        words = shlex.split(line)
        at = words.index("--")
        script, *flags = words[words[0] == "python" : at]
        result = stage.run(*command(ROOT / script), *flags, "--dry_run", *words[at:])
        assert result.returncode == 0, result.stderr
