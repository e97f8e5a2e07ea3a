"""Oracle: the file system, and JAX's own events: the second start of a run writes nothing and reads everything."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qwenla_jax.utils.compile_cache import keep_compiled_programs

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("CACHE_DIR", "CACHE_MAX_SIZE")
RUN = """
import json, sys
from qwenla_jax.utils.compile_cache import keep_compiled_programs
keep_compiled_programs()
from qwenla_jax.cli.train import main
from qwenla_jax.utils.compile_counter import CompileCounter
with CompileCounter() as counter:
    main(sys.argv[1:])
print(json.dumps([counter.count, counter.hits, counter.misses]))
"""
SETTINGS = [
    "--config=brpo", "--config.steps=1", "--config.data.batch_size=2", "--config.brpo.group_size=2",
    "--config.eval.every=0", "--config.eval.final_size=2", "--config.eval.batch_size=2",
    "--config.eval.attention=False",
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(f"JAX_COMPILATION_{name}", "")  # so that it is undone
        del os.environ[f"JAX_COMPILATION_{name}"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qwenla_jax" / "compilations"


def test_the_folder_is_the_users_alone_and_bounded(home):
    keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(home)
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 4 * 2**30
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    home.chmod(0o777)
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    keep_compiled_programs()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_an_entry_that_a_killed_run_left_half_written_is_dropped(home):
    keep_compiled_programs()
    folder = Path(os.environ.pop("JAX_COMPILATION_CACHE_DIR"))
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).touch()
    keep_compiled_programs()
    assert sorted(path.name for path in folder.iterdir()) == ["whole-atime", "whole-cache"]


def test_what_the_user_has_set_is_kept(monkeypatch, home):
    for value in ("", "/somewhere"):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
        keep_compiled_programs()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == value and not home.exists()
        assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ


@pytest.mark.parametrize("reason", ["Not a directory", "belongs to another user", "cannot be written"])
def test_a_folder_that_cannot_be_used_is_not(reason, monkeypatch, home, capsys):
    if reason == "Not a directory":
        home.parent.write_text("")
    elif reason == "belongs to another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept") and reason in line


def test_a_second_start_compiles_nothing(tmp_path):
    counts = []
    for start in range(2):
        command = [sys.executable, "-c", RUN, *SETTINGS, f"--workdir={tmp_path / str(start)}"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_PERSISTENT_CACHE")}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    (count, hits, misses), second = counts
    assert count == hits + misses and misses > 5 and second == [count, count, 0]
