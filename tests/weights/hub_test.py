"""Models by their name on the Hub: the library's own cache and client, offline and with a server in its place."""

import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import huggingface_hub.constants
import jax
import numpy as np
import pytest

import qwenla_jax
from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import to_dict
from qwenla_jax.evals.generate_options import make_options
from qwenla_jax.inference.load import model_config
from qwenla_jax.train import loop
from qwenla_jax.weights.hub import EMBEDDED, local_folder, pinned

COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An offline cache that holds the embedded checkpoint as model org/tiny, in the layout of the library."""
    model = tmp_path / "hub" / "models--org--tiny"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}", f"snapshots/{OLDER}"):
        (model / folder).mkdir(parents=True)
    for number, path in enumerate(sorted(EMBEDDED.iterdir())):
        blob = model / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        (model / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{blob.name}")
        (model / "snapshots" / OLDER / path.name).symlink_to(f"../../blobs/{blob.name}")
    (model / "refs" / "main").write_text(COMMIT)
    (model / "refs" / "v1").write_text(OLDER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cached_model_is_its_snapshot(cache):
    found = huggingface_hub.scan_cache_dir(cache)
    assert not found.warnings and {r.commit_hash for repo in found.repos for r in repo.revisions} == {COMMIT, OLDER}
    snapshots = cache / "models--org--tiny" / "snapshots"
    for name, commit in (("org/tiny", COMMIT), ("org/tiny@v1", OLDER), (f"org/tiny@{COMMIT}", COMMIT)):
        assert local_folder(name) == local_folder(name, weights=False) == snapshots / commit
        assert pinned(name) == f"org/tiny@{commit}"
    assert [pinned(name) for name in ("tiny", "random:tiny", None)] == ["tiny", "random:tiny", None]
    loaded, embedded = qwenla_jax.load("org/tiny"), qwenla_jax.load("tiny")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, embedded.params)
    assert loaded.tokenizer is not None and loaded.processor == embedded.processor


def test_settings_take_a_name_and_the_run_records_the_commit(cache, tmp_path, monkeypatch):
    options = from_config_dict(to_dict(RunOptions(init_from="org/tiny@v1")))
    assert model_config(options.inference) == model_config(RunOptions().inference)
    random = from_config_dict(to_dict(RunOptions(init_from="random:org/tiny")))
    assert model_config(random.inference) == model_config(RunOptions().inference)
    given = []

    def build(options):
        given.append(options)
        raise ValueError("far enough")

    monkeypatch.setattr(loop, "build", build)
    with pytest.raises(loop.RunRefused, match="far enough"):
        loop.run(options, tmp_path / "run")
    assert given == [replace(options, init_from=f"org/tiny@{OLDER}")]


def test_an_evaluation_records_the_commit_too(cache, tmp_path):
    (tmp_path / "gold.json").write_text("[]")
    options = make_options({"task": "mathvision", "model": "org/tiny@v1"}, [tmp_path / "gold.json"])
    assert options.model == str(cache / "models--org--tiny" / "snapshots" / OLDER) and options.weights


def test_a_folder_wins(cache, tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(local_folder("org/tiny")) == pinned("org/tiny") == "org/tiny"


@pytest.mark.parametrize("name", ["nowhere", "/org/none", "../none", "a/b/c", "org/none@", "-o/none", "org/none extra"])
def test_what_is_neither_is_refused(cache, name):
    with pytest.raises(FileNotFoundError, match="no such folder; expected one in Hugging Face format.*name of a model"):
        local_folder(name)


@pytest.mark.parametrize(
    ("name", "command"),
    [("org/none", "hf download org/none`"), ("org/tiny@v2", "hf download org/tiny --revision v2`")],
)
def test_what_is_not_cached_is_refused_with_the_command_that_downloads_it(cache, name, command):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder, and not to be had .* `{command}"):
        local_folder(name)


class Hub(http.server.BaseHTTPRequestHandler):
    """The few requests of the Hub that a download is made of."""

    files = {path.name: path.read_bytes() for path in EMBEDDED.iterdir()}
    files |= {"README.md": b"# A model", "pytorch_model.bin": b"weights", "onnx/model.safetensors": b"others"}

    def do_HEAD(self):
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        path = self.path.partition("?")[0]
        if path == "/api/models/org/tiny/revision/v1":
            body = json.dumps({"id": "org/tiny", "sha": COMMIT})
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            body = json.dumps(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": f"{number:040x}"}
                    for number, (name, data) in enumerate(self.files.items())
                ]
            )
        else:
            body = self.files.get(path.removeprefix(f"/org/tiny/resolve/{COMMIT}/"), None)
        data = body.encode() if isinstance(body, str) else body
        self.send_response(404 if data is None else 200)
        if data is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", f'"{abs(hash(path)):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data or b"")

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_a_command_downloads_what_it_needs_and_then_works_offline(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
    }

    def plan(name, **more):
        command = [sys.executable, "-m", "qwenla_jax", "convert", "from_hf", f"--src={name}"]
        command += [f"--dst={tmp_path / 'orbax'}", "--dry_run"]
        return subprocess.run(command, capture_output=True, text=True, env=environment | more, timeout=300)

    try:
        first = plan("org/tiny@v1")
        missing = plan("org/none")
    finally:
        server.shutdown()
    assert first.returncode == 0 and "104 chunks" in first.stdout, first.stderr
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == {
        name: data for name, data in Hub.files.items() if (EMBEDDED / name).is_file()
    }
    assert {token for path, token in server.seen if "/org/tiny/" in path} == {"Bearer hf_secret"}
    assert missing.returncode == 1 and "RepositoryNotFoundError" in missing.stderr
    assert "org/none: no such folder" in missing.stderr and "`hf download org/none`" in missing.stderr
    offline = plan("org/tiny@v1", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and offline.stdout == first.stdout, offline.stderr
