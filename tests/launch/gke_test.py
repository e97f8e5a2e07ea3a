"""GKE: the manifest read back by PyYAML, and what kubectl and xpk are given.

Oracles: PyYAML, which reads YAML as Kubernetes does; the required fields and allowed values of the public schemas of
JobSet (jobset.x-k8s.io/v1alpha2), Job and Pod, written down by hand; stubs that note their arguments and input.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GKE = ROOT / "launch" / "cluster" / "gke" / "submit.py"
NASTY = [
    "--config=configs/brpo.py:7b",
    '--config.data.source=it\'s a "b": #c\n{}.jsonl',
    "--config.data.system=$(ls) $(HOME) $HOME $$ $$$(HOME) $(A ü 🙂",
]
LINES = "--config.data.system=a\nb\t\x1b[2J\x85\u2028\ufeff\u200b\U000e0001 'c'\\n"


def expanded(text):
    """What a container is given, by Kubernetes' documentation: $(NAME) is the variable's value where there is such a
    variable, and $$ is one $, so that $$(NAME) is $(NAME)."""
    names = {"HOME": "/root", "ls": "listed"}
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else names.get(m[1], m[0]), text)


FLAGS = ["--name=brpo-7b", "--image=eu.pkg.dev/p/r/q:1", "--workdir=gs://my-bucket/runs/it's one", "--spot"]
SLICE = ["--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--service_account=trainer", "--namespace=team"]


def test_manifest(stage):
    stage.stub("kubectl", reads=True)
    result = stage.run(sys.executable, GKE, *FLAGS, *SLICE, "--", *NASTY, LINES)
    assert result.returncode == 0, result.stderr
    ((argv, text),) = stage.calls_with_input()
    assert argv == ["kubectl", "apply", "-f", "-"]
    document = yaml.safe_load(text)
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert document["metadata"]["name"] == "brpo-7b" and document["metadata"]["namespace"] == "team"
    policy = document["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 10
    for rule in policy["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
    (replicated,) = document["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"} and replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    # 16 chips, 4 a host. The schema of Job allows podFailurePolicy only with restartPolicy Never.
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    pod = job["template"]["spec"]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "trainer"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["image"] == "eu.pkg.dev/p/r/q:1"
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    args = ["--distributed", "--workdir=/mnt/gcs/my-bucket/runs/it's one", *NASTY, LINES]
    assert [expanded(arg) for arg in container["args"]] == args and container["args"] != args
    (volume,) = pod["volumes"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/mnt/gcs/my-bucket"}]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"


def test_dry_run_prints_what_is_run(stage):
    stage.stub("kubectl", reads=True)
    flags = [*FLAGS, *SLICE, "--", *NASTY]
    dry = stage.run(sys.executable, GKE, "--dry_run", *flags)
    assert dry.returncode == 0 and stage.calls() == []
    assert stage.run("bash", "-e", "-c", dry.stdout).returncode == 0
    stage.run(sys.executable, GKE, *flags)
    printed, run = stage.calls_with_input()
    assert printed == run


def test_one_host_is_not_distributed(stage):
    flags = [*FLAGS, "--accelerator=tpu-v6e-slice", "--topology=2x4", "--chips_per_host=8", "--dry_run", "--", *NASTY]
    result = stage.run(sys.executable, GKE, *flags)
    assert "--distributed" not in result.stdout and '"google.com/tpu": 8' not in result.stdout
    assert "google.com/tpu: 8" in result.stdout and "parallelism: 1" in result.stdout


def test_xpk(stage):
    stage.stub("xpk")
    more = ["--xpk_cluster=c", "--tpu_type=v5litepod-16", "--xpk_storage=s", "--project=p", "--zone=z"]
    more += ["--", *NASTY, LINES]
    dry = stage.run(sys.executable, GKE, *FLAGS, "--dry_run", *more)
    assert stage.calls() == []
    assert stage.run(sys.executable, GKE, *FLAGS, *more).returncode == 0
    (call,) = stage.calls()
    assert shlex.split(dry.stdout) == call
    expected = ["xpk", "workload", "create", "--cluster=c", "--workload=brpo-7b", "--tpu-type=v5litepod-16"]
    expected += ["--num-slices=1", "--docker-image=eu.pkg.dev/p/r/q:1", "--storage=s", "--max-restarts=10"]
    expected += ["--restart-on-exit-codes=1,75", "--termination-grace-period-seconds=300", "--project=p", "--zone=z"]
    assert call[:-1] == expected
    # xpk puts it on one line of a container's command, in which Kubernetes expands too; then bash reads it.
    line = call[-1].removeprefix("--command=")
    assert line.isprintable()
    message = stage.run("bash", "-c", f"python() {{ printf '%s\\0' \"$@\"; }}; {expanded(line)}").stdout.split("\0")[
        :-1
    ]
    assert message == ["launch/train.py", "--distributed", "--workdir=/mnt/gcs/my-bucket/runs/it's one", *NASTY, LINES]


def test_no_kubectl(stage):
    result = stage.run(sys.executable, GKE, *FLAGS, *SLICE, "--", *NASTY, PATH=str(stage.bin))
    assert result.returncode != 0 and "there is no program 'kubectl' here" in result.stderr


@pytest.mark.parametrize(("topology", "chips", "hosts"), [("1x1", 1, 1), ("4x4", 8, 2), ("4x4x8", 4, 32)])
def test_hosts(stage, topology, chips, hosts):
    flags = [*FLAGS, "--accelerator=tpu-v5p-slice", f"--topology={topology}", f"--chips_per_host={chips}", "--dry_run"]
    result = stage.run(sys.executable, GKE, *flags, "--", *NASTY)
    assert f"parallelism: {hosts}\n" in result.stdout and f"completions: {hosts}\n" in result.stdout


WRONG = ["gs://b", "gs://bucket", "gs://bucket/", "gs://bucket//x", "s3://bucket/x", "gs://bucket/../../etc"]
WRONG += ["gs://bucket/a/../b", "gs://bucket/..", "gs://bucket/./a", "gs://bucket/a//b", "gs://bucket/a//", "gs://../x"]
WRONG += ["gs://bucket/\nb", "gs://bucket/a\n", "gs://bucket/a\x1b[2J", "gs://bucket/a\u2028"]


@pytest.mark.parametrize("workdir", WRONG)
def test_work_folders_outside_of_a_bucket(stage, workdir):
    result = stage.run(sys.executable, GKE, *FLAGS, *SLICE, f"--workdir={workdir}", "--dry_run", "--", *NASTY)
    assert result.returncode != 0 and f"--workdir: got {workdir!r}" in result.stderr


def test_a_work_folder_with_dots_in_its_names(stage):
    flags = [*FLAGS, *SLICE, "--workdir=gs://bucket/..a/b../...", "--dry_run", "--", *NASTY]
    assert "/mnt/gcs/bucket/..a/b../..." in stage.run(sys.executable, GKE, *flags).stdout


@pytest.mark.parametrize("flag", ["name", "image", "accelerator", "topology", "namespace", "service_account"])
def test_flags_of_several_lines(stage, flag):
    flags = [*FLAGS, *SLICE, f"--{flag}=a\nb: c", "--dry_run", "--", *NASTY]
    result = stage.run(sys.executable, GKE, *flags)
    assert result.returncode != 0 and not result.stdout
    assert result.stderr == f"submit.py: --{flag}: got 'a\\nb: c', expected one line without control characters\n"


def test_image_holds_what_the_job_runs():
    lines = (ROOT / "launch" / "cluster" / "gke" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert {"qwenla_jax", "configs", "launch", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"} <= copied
    assert 'ENTRYPOINT ["python", "launch/train.py"]' in lines
