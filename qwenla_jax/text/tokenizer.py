"""Tokenizers, read by transformers and written in the released layout; and the training of the embedded default's."""

import functools
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwenla_jax.text import special_tokens as st
from qwenla_jax.text.chat_template import fitting_template
from qwenla_jax.text.special_tokens import TokenIds
from qwenla_jax.utils.json_files import read_bytes, read_object

# How Qwen2 splits text before BPE: a fact of the released tokenizer.json, which a trained tokenizer must share so that
# transformers' Qwen2Tokenizer, which sets this split itself, gives the same ids.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How byte-level BPE writes bytes: those that print as themselves, the others, in order, as characters from U+0100 on.
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTED)
_BYTES = MappingProxyType({**{chr(b): b for b in _PRINTED}, **{chr(256 + n): b for n, b in enumerate(_OTHERS)}})

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json")
_TEXT_FILES = ("merges.txt", "chat_template.jinja")
_MOST_IDS = 2**20
_LONG_TEXT = 2**15  # characters
_MAX_BYTES = 256 << 20  # of each of these files; the released tokenizer.json has 7 MB


class Tokenizer:
    """Text to ids and back. Picklable, so that data workers can carry it."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        """Wraps a loaded tokenizer, and resets truncation, padding and splitting of special tokens in it.

        Args:
          backend: the tokenizer.
          config: entries of its tokenizer_config.json that `save` writes again: chat_template, model_max_length and
            add_prefix_space. None: those of a new one.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._backend = backend
        self._config = dict(config or {})
        spec = json.loads(backend.to_str())
        self._added = frozenset(token["id"] for token in spec["added_tokens"])
        spec["added_tokens"] = []
        # Without its added tokens the same BPE takes "<|image_pad|>" for eleven ordinary characters or so.
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
        dropped = (backend.token_to_id(token) for token in st.QWEN_CONTROL_TOKENS)
        self._control = frozenset(index for index in dropped if index is not None)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face folder, through transformers, from any of the files that it knows.

        A call's truncation, padding and splitting of special tokens, which transformers leaves in the files, are reset.

        Raises:
          ValueError: a file is missing or broken, or is not a tokenizer of Qwen's kind; the message names it.
        """
        folder = Path(path)
        if not in_folder(folder):
            raise ValueError(
                f"{folder / 'tokenizer.json'}: no such file; expected a Hugging Face folder that has a tokenizer.json"
            )
        for name in _JSON_FILES:
            if (folder / name).exists():
                _check_ids(folder / name, read_object(folder / name, _MAX_BYTES))
        for name in _TEXT_FILES:
            if (folder / name).exists():
                read_bytes(folder / name, _MAX_BYTES)
        kind = _transformers_class()
        try:
            theirs = kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return cls(theirs.backend_tokenizer, _kept(theirs))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever broken files can raise in it; a panic of `tokenizers` is no Exception
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder / 'tokenizer.json'}: transformers cannot read the tokenizer: {cause}") from error

    @functools.cached_property
    def vocab_size(self) -> int:
        """The highest id plus one (the embedding matrix may have more rows)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def longest_token(self) -> int:
        """The most bytes of a token, and so the most characters in NFC that one token stands for."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @functools.cached_property
    def ids(self) -> TokenIds:
        """The ids of the special tokens. Raises ValueError where some are missing, as released ones lack the tags."""
        return TokenIds.from_tokenizer(self)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, None where there is no such token."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which the strings of special tokens stand for these tokens. Adds nothing of its own."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special, so that a user's text cannot inject an `<|image_pad|>`."""
        if len(text) > _LONG_TEXT:  # a batch, because other threads of Python run while a batch is encoded
            return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary give nothing.

        Args:
          ids: token ids.
          skip_special: drop Qwen's control tokens. The ten tags are kept in both cases.
        """
        kept = [int(index) for index in ids if not (skip_special and int(index) in self._control)]
        return self._backend.decode(kept, skip_special_tokens=False)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token, which may be some of a character's; joined they are the text of the tokens.

        An id beyond the vocabulary gives nothing.
        """
        token = self._backend.id_to_token(index) or ""
        return token.encode() if index in self._added else bytes(_BYTES[char] for char in token)

    def with_tags(self) -> "Tokenizer":
        """This tokenizer with the ten tags as single tokens at the next free ids (a tag that is there keeps its id).

        As Qwen's `<tool_call>` they are no control tokens: a decoder that skips special tokens keeps them. Released
        Qwen2.5-VL tokenizers end at 151,664, so there the tags become 151,665 to 151,674, which are spare rows of the
        released embedding. Paper silent: which ids.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_tokens([_added(tag, special=False) for tag in st.TAGS])
        return Tokenizer(backend, self._config)

    def save(self, folder: str | Path, system: str | None = None) -> None:
        """Writes the tokenizer in the released layout, which AutoTokenizer of any release of transformers loads.

        tokenizer.json, tokenizer_config.json, and the chat template once more as chat_template.jinja, where processors
        look for it. The template gives the tokens that `prompts` gives: see `fitting_template`.

        Args:
          folder: where to.
          system: text of the system turn that the model was trained with; None: it had no such turn.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec = json.loads(self._backend.to_str())
        for token in (added := spec["added_tokens"]):  # in files of others the tags may be control tokens
            token["special"] = token["special"] and token["content"] not in st.TAGS
        template = fitting_template(self._config.get("chat_template"), system)
        config = {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": st.IM_END,
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": st.ENDOFTEXT,
            "split_special_tokens": False,
            "unk_token": None,
            **self._config,
            "chat_template": template,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
            },
            "additional_special_tokens": [
                token["content"] for token in added if token["special"] and token["content"] != st.ENDOFTEXT
            ],
        }
        for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", dict(sorted(config.items())))):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def in_folder(folder: Path) -> bool:
    """Whether a folder has a tokenizer, in either of the layouts that Qwen's came in."""
    return (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()


def train_tiny_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Tokenizer:
    """Trains a byte-level BPE in Qwen2's manner: NFC, Qwen's split, 256 bytes, merges, then the special tokens.

    Qwen's 22 added tokens and the ten tags take the last ids, the tags the very last. Any text encodes.

    Args:
      texts: the dataset. Tags and special tokens in it are cut out, so that no merge is spent on them.
      vocab_size: ids in all; a dataset that has too few merges in it gives fewer.

    Raises:
      ValueError: `vocab_size` leaves no room for the bytes and the special tokens.
    """
    added = [
        *(_added(token, special=True) for token in st.QWEN_CONTROL_TOKENS),
        *(_added(token, special=False) for token in st.QWEN_TEXT_TOKENS),
        *(_added(token, special=False) for token in st.TAGS),
    ]
    least = 256 + len(added)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size}: expected at least {least} (256 bytes, {len(added)} special tokens)")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    names = [token.content for token in added]
    backend.train_from_iterator((piece for text in texts for piece in _cut(text, names)), trainer=trainer)
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return Tokenizer(backend)


def _cut(text: str, names: Sequence[str]) -> list[str]:
    """The pieces of a text between the special tokens."""
    for name in names:
        text = text.replace(name, "\0")
    return [piece for piece in text.split("\0") if piece]


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=special)


def _check_ids(file: Path, content: dict[str, Any]) -> None:
    """Refuses ids by the million: `tokenizers` counts up to the highest, present or not."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else content
    ids = vocab.values() if isinstance(vocab, dict) else ()
    largest = max((index for index in ids if type(index) is int), default=0)
    if largest > _MOST_IDS and file.name != "tokenizer_config.json":
        raise ValueError(f"{file}: has an id of {largest}; at most {_MOST_IDS:,} are supported")


def _transformers_class() -> Any:
    """The class of every Qwen2.5 tokenizer; AutoTokenizer, which finds it, imports torch where that is installed."""
    log = logging.getLogger("transformers")
    log.disabled = True  # where there is no torch, the import reports it
    try:
        from transformers import Qwen2Tokenizer
    finally:
        log.disabled = False
    return Qwen2Tokenizer


def _kept(theirs: Any) -> dict[str, Any]:
    """What of transformers' tokenizer is written again; of several chat templates the default one."""
    template = theirs.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    config: dict[str, Any] = {"add_prefix_space": theirs.init_kwargs.get("add_prefix_space") is True}
    if isinstance(template, str):
        config["chat_template"] = template
    if isinstance(theirs.model_max_length, int) and 0 < theirs.model_max_length < 10**18:  # else: not known
        config["model_max_length"] = theirs.model_max_length
    return config
