"""Where the files of a checkpoint are: the embedded one, a folder, or a model of the Hugging Face Hub.

Cache, token, offline mode and progress are those of `huggingface_hub` and its environment variables. Processes that
share a cache may ask at once: the library locks each file, so that one of them downloads it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "tiny"  # the checkpoint that comes with the package
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?")
_SMALL_FILES = ("*.json", "*.txt", "*.jinja")


def hub_name(name: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """`Qwen/Qwen2.5-VL-3B-Instruct@main` -> its model and revision (None: not given); None where it is no such name.

    A path that exists is never the name of a model.
    """
    match = _NAME.fullmatch(os.fspath(name))
    if match is None or os.path.exists(name):
        return None
    return match["repo"], match["revision"]


def local_folder(name: str | os.PathLike[str], weights: bool = True) -> Path:
    """The folder that holds a checkpoint, which is downloaded if it is a model of the Hub and not in the cache yet.

    Args:
      name: "tiny", the embedded checkpoint; a folder; or a model of the Hub, `ORG/NAME` or `ORG/NAME@REVISION`.
      weights: False: of a model of the Hub only the small files (config, tokenizer, image processor).

    Raises:
      FileNotFoundError: there is no such folder, and no such model, or it cannot be downloaded.
    """
    if os.fspath(name) == "tiny":
        return EMBEDDED
    if os.path.isdir(name):
        return Path(name)
    model = hub_name(name)
    if model is None:
        raise FileNotFoundError(
            f"{os.fspath(name)}: no such folder; expected one in Hugging Face format, with a config.json, the name of "
            "a model on the Hugging Face Hub such as Qwen/Qwen2.5-VL-3B-Instruct, or tiny"
        )
    repo, revision = model
    # Imported here: whoever has a folder need not wait for it.
    from huggingface_hub import snapshot_download

    patterns: list[str] = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the library's own types and those of its HTTP client
        reason = next(iter(str(error).splitlines()), "")
        command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        raise FileNotFoundError(
            f"{os.fspath(name)}: no such folder, and not to be had from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); where there is a network, `{command}` downloads it"
        ) from error


def pinned(name: str | None) -> str | None:
    """The name of a model of the Hub with the commit that it stands for now, downloaded; another name as it is.

    Raises:
      FileNotFoundError: as `local_folder`.
    """
    model = hub_name(name or "")
    return name if name is None or model is None else f"{model[0]}@{local_folder(name).name}"
