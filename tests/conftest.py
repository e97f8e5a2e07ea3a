"""Fixtures shared by all tests."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.utils.libtpu import skip_without_tpu

# For programs that run for milliseconds: a small BRPO run took 37 s of processor time with none of the two, 25 with the
# first, 40 with the second and 13 with both. What is computed stays the same but for the rounding of sums.
COMPILE_FAST = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")


def runs_with(flags: Sequence[str]) -> bool:
    """Whether this XLA has the flags; one that it lacks would end every process, so a process of its own tries them."""
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(trial, env=env, capture_output=True).returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    """Programs compile fast, and once for all processes of a test session: most of the suite's time is compiling.

    Flags that stand in XLA_FLAGS already are kept and come last, so that they win.
    """
    skip_without_tpu()
    # torch's threads wait for each other spinning, and two test processes share the cores: a file that compares with
    # transformers took 75 s of processor time with two threads and 57 with one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not hasattr(config, "workerinput"):
        flags = COMPILE_FAST if runs_with(COMPILE_FAST) else [flag for flag in COMPILE_FAST if runs_with([flag])]
        os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
        folder = tempfile.TemporaryDirectory(prefix="qwenla_jax_compiled_")
        config.add_cleanup(folder.cleanup)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder.name)
        # Where transformers copies the code of an export that it runs; read when it is imported.
        os.environ.setdefault("HF_MODULES_CACHE", os.path.join(folder.name, "hf_modules"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party data with known answers, which is not part of the repository."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the third-party test data is not at {path}")
    return path


def _with_another_head(folder, change):
    """Saves the embedded checkpoint with an output matrix [D, V] of its own, which `change(head, tok)` changes."""
    import qwenla_jax

    loaded = qwenla_jax.load(Path(qwenla_jax.__file__).parent / "assets" / "tiny", dtype="float32")
    head = np.array(loaded.params["decoder"]["embed"]["embedding"]).T
    change(head, loaded.tokenizer)
    config = dataclasses.replace(loaded.config, text=dataclasses.replace(loaded.config.text, tie_word_embeddings=False))
    params = loaded.params | {"decoder": loaded.params["decoder"] | {"lm_head": {"kernel": head}}}
    return qwenla_jax.save(folder, config, params, tokenizer=loaded.tokenizer, processor=loaded.processor)


def _describes(head, tok):
    head[:, [tok.encode(digit)[0] for digit in "0123456789"]] *= 0.8


@pytest.fixture(scope="session")
def describing(tmp_path_factory):
    """A checkpoint whose captions name objects, not their number: the embedded one with another output matrix."""
    return _with_another_head(tmp_path_factory.mktemp("describing") / "hf", _describes)


@pytest.fixture(scope="session")
def reflecting(tmp_path_factory):
    """A checkpoint that describes as `describing` does, and reflects whenever it would conclude."""

    def change(head, tok):
        _describes(head, tok)
        head[:, tok.ids.tags["<REFLECTION>"]] = 1.1 * head[:, tok.ids.tags["<CONCLUSION>"]]

    return _with_another_head(tmp_path_factory.mktemp("reflecting") / "hf", change)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A square scene, and a strip of one and a half: 4 x 4 and 3 x 4 visual tokens or so. Files, then images."""
    from qwenla_jax.data.synthetic.scenes import make_scene

    square = make_scene(7, 5, 0).image
    strip = Image.new("RGB", (168, 112), (217, 217, 217))
    strip.paste(make_scene(7, 5, 1).image, (50, 0))
    folder = tmp_path_factory.mktemp("images")
    square.save(folder / "square.png")
    strip.save(folder / "strip.png")
    return folder / "square.png", folder / "strip.png"
