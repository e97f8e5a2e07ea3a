"""Folders that a run may and may not work in."""

import os
import shutil
import subprocess
import sys

import pytest

from qwenla_jax.run.workdir import RUN_FILE, Hold, WorkdirError, opened


def test_a_new_folder_and_the_same_again(tmp_path):
    for _ in range(2):
        with opened(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b" / "run.json").is_file()


def test_two_processes_do_not_share_one(tmp_path):
    code = f"""
from pathlib import Path
from qwenla_jax.run.workdir import WorkdirError, opened
try:
    with opened(Path({str(tmp_path)!r})):
        print("in")
except WorkdirError as error:
    print(error)
"""
    other = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout  # noqa: E731
    with opened(tmp_path):
        assert f"{tmp_path}: another run works in it (process {os.getpid()} on " in other()
    assert other() == "in\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "hf", "checkpoints"])
def test_somebody_elses_folder_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(WorkdirError, match=f"{tmp_path} holds {name}, but no run.json"):
        with opened(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_deleted_replaced_or_emptied_is_found_out(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(WorkdirError, match="not the folder of process 0"):
        Hold(run)
    for harm in (
        lambda: shutil.rmtree(run),
        lambda: run.rename(tmp_path / "moved"),
        lambda: [path.unlink() for path in run.iterdir()],
        lambda: (run / RUN_FILE).unlink(),
    ):
        with opened(run):
            hold = Hold(run)
            hold.check()
            harm()
            with pytest.raises(WorkdirError, match=f"{run}: the work folder was deleted .*run.json is gone"):
                hold.check()
            (run / "lock").unlink(missing_ok=True)
            with opened(run), pytest.raises(WorkdirError, match="another run has begun in it"):
                hold.check()


def test_empty_folders_are_nobodys(tmp_path):
    (tmp_path / "checkpoints" / "a").mkdir(parents=True)
    with opened(tmp_path):
        pass


def test_files_that_a_run_does_not_write_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with opened(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_or_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot be made"):
        with opened(tmp_path / "file" / "run"):
            pass
    for folder in ("/proc/self", "/sys/kernel"):  # refuse new files to everybody, root too
        with pytest.raises(WorkdirError, match=f"{folder}: the work folder cannot be written"):
            with opened(type(tmp_path)(folder)):
                pass
