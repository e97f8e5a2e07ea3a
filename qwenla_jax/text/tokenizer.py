"""A thin wrapper over `tokenizers`, and the training of the small tokenizer of the embedded default."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwenla_jax.text import special_tokens as st
from qwenla_jax.text.special_tokens import TokenIds

# How Qwen2 splits text before BPE: a fact of the released tokenizer.json, which a trained tokenizer must share so that
# transformers' Qwen2Tokenizer, which sets this split itself, gives the same ids.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# One turn after the other in Qwen2.5-VL's layout, content a string or a list of text and image parts. No system turn
# is made up where the conversation has none.
CHAT_TEMPLATE = (
    "{%- for turn in messages -%}"
    "{{- '<|im_start|>' + turn['role'] + '\n' -}}"
    "{%- if turn['content'] is string -%}{{- turn['content'] -}}{%- else -%}"
    "{%- for part in turn['content'] -%}"
    "{%- if part['type'] in ['image', 'image_url'] -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


class Tokenizer:
    """Text to ids and back. Picklable, so that data workers can carry it."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        """Wraps a loaded tokenizer.

        Args:
          backend: the tokenizer; it is not changed afterwards.
          config: what stood in its tokenizer_config.json; `save` writes it again. None: a new one.
        """
        self._backend = backend
        self._config = dict(config) if config else _new_config()
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = []
        # Without its added tokens the same BPE takes "<|image_pad|>" for eleven ordinary characters or so.
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
        dropped = (backend.token_to_id(token) for token in st.QWEN_CONTROL_TOKENS)
        self._control = frozenset(index for index in dropped if index is not None)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json` (and `tokenizer_config.json` where there is one) of a Hugging Face folder.

        Raises:
          ValueError: the file is missing or is not a tokenizer; the message names the file.
        """
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file}: no such file; expected a Hugging Face folder that has a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises the bare class
            raise ValueError(f"{file}: not a readable tokenizer.json: {error}") from error
        config_file = Path(path) / "tokenizer_config.json"
        config = None
        if config_file.is_file():
            try:
                config = json.loads(config_file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{config_file}: not valid JSON: {error}") from error
            if not isinstance(config, dict):
                raise ValueError(f"{config_file}: expected a JSON object, found {type(config).__name__}")
        return cls(backend, config)

    @property
    def vocab_size(self) -> int:
        """The highest id plus one (the embedding matrix may have more rows)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def ids(self) -> TokenIds:
        """The ids of the special tokens.

        Raises:
          ValueError: some are missing (a released tokenizer lacks the tags; see `with_tags`).
        """
        return TokenIds.from_tokenizer(self)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, None where there is no such token."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which the strings of special tokens stand for these tokens. Adds nothing of its own."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special, so that a user's text cannot inject an `<|image_pad|>`."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary give nothing.

        Args:
          ids: token ids.
          skip_special: drop Qwen's control tokens. The ten tags are kept in both cases.
        """
        kept = [int(index) for index in ids if not (skip_special and int(index) in self._control)]
        return self._backend.decode(kept, skip_special_tokens=False)

    def with_tags(self) -> "Tokenizer":
        """This tokenizer with the ten tags as special tokens at the next free ids (a tag that is there stays).

        Released Qwen2.5-VL tokenizers end at 151,664, so there the tags become 151,665 to 151,674, which are spare
        rows of the released embedding. Paper silent: which ids.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([_added(tag, special=True) for tag in st.TAGS])
        return Tokenizer(backend, self._config)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec = json.loads(self._backend.to_str())
        config = dict(self._config)
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in spec["added_tokens"]
        }
        config["additional_special_tokens"] = [
            token["content"] for token in spec["added_tokens"] if token["special"] and token["content"] != st.ENDOFTEXT
        ]
        self._backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def train_tiny_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Tokenizer:
    """Trains a byte-level BPE in Qwen2's manner: NFC, Qwen's split, 256 bytes, merges, then the special tokens.

    Qwen's 22 added tokens and the ten tags take the last ids, the tags the very last. Any text encodes.

    Args:
      texts: the corpus. Tags and special tokens in it are cut out, so that no merge is spent on them.
      vocab_size: ids in all; a corpus that has too few merges in it gives fewer.

    Raises:
      ValueError: `vocab_size` leaves no room for the bytes and the special tokens.
    """
    added = [
        *(_added(token, special=True) for token in st.QWEN_CONTROL_TOKENS),
        *(_added(token, special=False) for token in st.QWEN_TEXT_TOKENS),
        *(_added(token, special=True) for token in st.TAGS),
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
    backend.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
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


def _new_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": st.IM_END,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": st.ENDOFTEXT,
        "split_special_tokens": False,
        "unk_token": None,
    }
