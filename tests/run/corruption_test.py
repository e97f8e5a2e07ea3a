"""Corrupt checkpoints: the one before is used, and said, or the run is refused by name.

Oracle: files cut, flipped and deleted by hand; the bytes of the arrays that were saved first.
"""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenla_jax.config.run_options import CheckpointOptions, OptimOptions, RunOptions
from qwenla_jax.run import checksums
from qwenla_jax.run.checkpoints import CheckpointError, Checkpoints, SaveError
from qwenla_jax.run.workdir import Hold, WorkdirError, opened

OPTIONS = RunOptions(steps=20, checkpoint=CheckpointOptions(every=4, keep=2))
ROOT = Path(__file__).resolve().parents[2]


def state_of(step):
    rng = np.random.default_rng(step)
    return {"a": jnp.asarray(rng.normal(size=(64, 33)), jnp.float32), "b": {"c": jnp.asarray(rng.normal(size=5))}}


def same_bits(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, OPTIONS) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, state_of(step))
    return folder


@pytest.fixture
def run(two_saved, tmp_path):
    return Path(shutil.copytree(two_saved, tmp_path / "run"))


def files(workdir, step):
    below = sorted(p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file())
    return [*below, workdir / "checksums" / f"{step}.json"]


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    if not content:
        content = bytearray(b"\0")  # an empty file that is no longer empty
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def names(two_saved):
    return [path.relative_to(two_saved) for path in files(two_saved, 8)]


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["truncated", "flipped", "deleted"])
def test_every_file_of_the_newest_checkpoint(harm, two_saved, tmp_path):
    """One file after the other; nothing but the checkpoint before comes out, to the last bit."""
    cases = names(two_saved)
    assert len(cases) >= 10
    for number, name in enumerate(cases):
        workdir = Path(shutil.copytree(two_saved, tmp_path / str(number)))
        if harm is cut and not (workdir / name).stat().st_size:
            continue  # nothing to cut
        harm(workdir / name)
        said = []
        with Checkpoints(workdir, OPTIONS, said.append) as checkpoints:
            state, step = checkpoints.restore_newest(state_of(0))
            whole = harm is Path.unlink and name.parts[0] == "checksums"
            assert step == (8 if whole else 4), (name, said)
            assert same_bits(state, state_of(step)) and str(workdir / "checkpoints" / "8") in said[0]
            assert ("has no checksums" if whole else "is corrupt") in said[0]
            # What was corrupt does not stand in the way of the same step, done again.
            checkpoints.save(8, state_of(88))
        with Checkpoints(workdir, OPTIONS) as checkpoints:
            state, step = checkpoints.restore_newest(state_of(0))
        assert step == 8 and same_bits(state, state_of(8 if whole else 88))


def test_a_whole_folder_that_is_gone(run):
    shutil.rmtree(run / "checkpoints" / "8")
    said = []
    with Checkpoints(run, OPTIONS, said.append) as checkpoints:
        state, step = checkpoints.restore_newest(state_of(0))
    assert step == 4 and same_bits(state, state_of(4)) and "the folder is gone" in said[0]


def test_corruption_that_no_checksum_shows(run):
    """Ended while the checksums were taken, then corrupt: found while it is read."""
    (run / "checksums" / "8.json").unlink()
    for path in files(run, 8)[:-1]:
        if "ocdbt" in path.as_posix() or path.parent.name == "d":
            cut(path)
    said = []
    with Checkpoints(run, OPTIONS, said.append) as checkpoints:
        state, step = checkpoints.restore_newest(state_of(0))
    assert step == 4 and same_bits(state, state_of(4))
    assert "has no checksums" in said[0] and "cannot be re" in said[1]


def test_none_left_is_refused_and_stays_refused(run):
    for step in (4, 8):
        flip(max(files(run, step)[:-1], key=lambda path: path.stat().st_size))
    for _ in range(2):
        with Checkpoints(run, OPTIONS) as checkpoints:
            with pytest.raises(CheckpointError, match=r"none of its checkpoints \(4, 8\) can be used.*corrupt"):
                checkpoints.latest_step()
    assert {path.name for path in (run / "corrupt").iterdir()} == {"4-0", "8-0"}


def test_the_best_is_kept_whatever_its_age(tmp_path):
    said = []
    with Checkpoints(tmp_path, OPTIONS, said.append) as checkpoints:
        for step, rating in ((4, 0.5), (8, 0.75), (12, 0.25), (16, None), (20, 0.5)):
            if rating is not None and step != 20:
                checkpoints.rate(step, rating)
            checkpoints.save(step, state_of(step))
        checkpoints.rate(20, 0.5)  # evaluated after it was saved
        assert checkpoints.best_step() == 8
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
    assert kept == [8, 16, 20] and not said
    assert sorted(path.stem for path in (tmp_path / "checksums").iterdir()) == ["16", "20", "8"]
    assert json.loads((tmp_path / "checksums" / "20.json").read_text())["rating"] == 0.5
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        assert checkpoints.best_step() == 8 and same_bits(checkpoints.restore(state_of(0), 8), state_of(8))


def test_checksums_are_sha256_of_the_files(run):
    content = json.loads((run / "checksums" / "8.json").read_text())["files"]
    message = {name: checksum for name, (_, checksum) in content.items()}
    lines = subprocess.run(
        ["sha256sum", *message], cwd=run / "checkpoints" / "8", capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {line.split(maxsplit=1)[1]: line.split()[0] for line in lines} == message
    assert checksums.corruption(run / "checksums" / "8.json", run / "checkpoints" / "8") is None


def test_other_settings_are_refused_and_not_taken_for_corruption(run):
    other = dataclasses.replace(OPTIONS, optim=OptimOptions(b1=0.5))
    with Checkpoints(run, other) as checkpoints:
        with pytest.raises(CheckpointError, match="config.optim.b1: 0.9 in the checkpoint, 0.5 now"):
            checkpoints.restore_newest(state_of(0))
    assert not (run / "corrupt").exists()


def test_too_little_space_is_reported_before_anything_is_written(run, monkeypatch):
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with Checkpoints(run, OPTIONS) as checkpoints:
        with pytest.raises(SaveError, match=r"checkpoints/12 needs .* GB, and the disk has 0.00 GB left"):
            checkpoints.save(12, state_of(12))
        monkeypatch.undo()
        checkpoints.save(12, state_of(12))
        checkpoints.wait()
        assert checkpoints.latest_step() == 12


@pytest.mark.parametrize("wait_s", [0.0, 0.01, 0.05, None], ids=str)
def test_a_work_folder_that_is_deleted_is_not_half_made_again(tmp_path, wait_s):
    """Before a write has begun, while it is under way, and when it is done."""
    big = {"a": jnp.asarray(np.random.default_rng(1).normal(size=(1000, 1000)), jnp.float32)}
    run, said = tmp_path / "run", []
    with opened(run), pytest.raises((SaveError, WorkdirError), match="the work folder was deleted or replaced"):
        with Checkpoints(run, OPTIONS, said.append, Hold(run)) as checkpoints:
            checkpoints.save(4, state_of(4))
            checkpoints.save(8, big)
            if wait_s is None:
                checkpoints.wait()
            else:
                time.sleep(wait_s)
            shutil.rmtree(run, ignore_errors=True)
            while run.exists() and not said:  # a write may put something into a folder while it is being removed
                shutil.rmtree(run, ignore_errors=True)
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)  # as such a write does on a busy machine
            checkpoints.save(12, state_of(12))
    assert not run.exists()
    with opened(run):
        pass


def test_only_the_checkpoints_deleted(run):
    said = []
    with Checkpoints(run, OPTIONS, said.append) as checkpoints:
        shutil.rmtree(run / "checkpoints")
        checkpoints.save(12, state_of(12))
    with Checkpoints(run, OPTIONS, said.append) as checkpoints:
        assert checkpoints.latest_step() == 12 and said == []


def test_checksums_that_somebody_changed(run):
    for content in ("[" * 10**5, "[]", '{"rating": "good"}', '{"rating": 1e999}', '{"rating": ' + "9" * 400 + "}", "{"):
        (run / "checksums" / "4.json").write_text(content)
        (run / "checksums" / "8.json").write_text('{"files": {"x": [' + "9" * 400 + ", 3]}}")
        said = []
        with Checkpoints(Path(shutil.copytree(run, run.parent / "copy")), OPTIONS, said.append) as checkpoints:
            assert checkpoints.best_step() is None
            with pytest.raises(CheckpointError, match="none of its checkpoints"):
                checkpoints.latest_step()
            checkpoints.rate(8, 0.5)
        shutil.rmtree(run.parent / "copy")


def test_a_write_that_fails_leaves_the_earlier_ones(run):
    """The kernel refuses files above 20 kB, as it refuses all of them on a full disk."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT / "tests" / "run")!r})
import corruption_test as t
import jax.numpy as jnp
said = []
big = {{"a": jnp.asarray(t.np.random.default_rng(1).normal(size=(300, 300)), jnp.float32)}}
with t.Checkpoints({str(run)!r}, t.OPTIONS, said.append) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(12, big)
        checkpoints.wait()
        print("written")
    except t.SaveError as error:
        print("refused:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    state, step = checkpoints.restore_newest(t.state_of(0))
    print("then", step, t.same_bits(state, t.state_of(8)), said)
    checkpoints.save(12, t.state_of(12))
with t.Checkpoints({str(run)!r}, t.OPTIONS) as checkpoints:
    state, step = checkpoints.restore_newest(t.state_of(0))
    print("at last", step, t.same_bits(state, t.state_of(12)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("refused:") and f"{run / 'checkpoints' / '12'} could not be written" in lines[0]
    assert os.strerror(errno.EFBIG) in done.stdout or "File too large" in done.stdout
    assert lines[-2:] == ["then 8 True []", "at last 12 True"], done.stdout
