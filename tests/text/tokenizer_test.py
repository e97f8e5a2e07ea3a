"""The tokenizer against transformers' AutoTokenizer, on a trained small one and on the released one."""

import json
import pickle
import subprocess
import sys
import threading
import time
import unicodedata

import pytest
from transformers import AutoTokenizer

from qwenla_jax.data.synthetic.scenes import COLORS, SHAPES, SIZES
from qwenla_jax.data.synthetic.tokenizer_texts import tokenizer_texts
from qwenla_jax.text.special_tokens import QWEN_CONTROL_TOKENS, QWEN_TEXT_TOKENS, TAGS
from qwenla_jax.text.tokenizer import Tokenizer, train_tiny_tokenizer

TEXTS = [
    "",
    " ",
    "How many red circles are there?",
    "I'Ll don't WE'RE x''s",
    "line\n\n  two\r\n\r\n\tthree   \n ",
    "12345 6.7e-8 ½ ①",
    "ünïcödé e\u0301 \u212b \ufb01 汉字 日本語 עברית 🎉👩\u200d👩\u200d👧 \u00a0\u3000x",
    "\x00\x7f\ufeff\ufffd",
    "<SUMMARY>a b</SUMMARY> <CAPTION></CAPTION>\n<REFLECTION></REFLECTION><summary> <SUMMARY >",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n",
    "<tool_call>{}</tool_call><|fim_prefix|><|im_end|<|im_end|>>",
]


@pytest.fixture(scope="module")
def tiny():
    return train_tiny_tokenizer(tokenizer_texts(200))


@pytest.fixture(scope="module")
def released(shared_data):
    return Tokenizer.from_folder(shared_data / "tokenizer")


def same_as_transformers(tok, folder):
    tok.save(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tok.vocab_size
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert tok.encode(text) == ids, text
        assert tok.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
        assert b"".join(map(tok.token_bytes, ids)).decode() == unicodedata.normalize("NFC", text)
        assert all(tok.token_bytes(i).decode(errors="replace") == tok.decode([i]) for i in ids)
    again = Tokenizer.from_folder(folder)
    assert [again.encode(text) for text in TEXTS] == [tok.encode(text) for text in TEXTS]
    return theirs


def test_tiny_is_what_transformers_loads(tiny, tmp_path):
    theirs = same_as_transformers(tiny, tmp_path)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "that"},
        {"role": "user", "content": "and?"},
    ]
    assert theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n"
        "<|im_start|>assistant\nthat<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_released_is_what_transformers_loads_and_takes_the_tags_at_the_next_ids(released, shared_data, tmp_path):
    assert released.vocab_size == 151_665
    with pytest.raises(ValueError, match="<SUMMARY>, .*with_tags"):
        _ = released.ids
    tagged = released.with_tags()
    ids = tagged.ids
    assert [ids.tags[tag] for tag in TAGS] == list(range(151_665, 151_675)) and tagged.vocab_size == 151_675
    # Written down in the data folder's own description.
    assert (ids.vision_start, ids.vision_end, ids.image_pad, ids.video_pad) == (151_652, 151_653, 151_655, 151_656)
    assert ids.im_end == 151_645
    assert released.vocab_size == 151_665  # unchanged by with_tags
    theirs = same_as_transformers(tagged, tmp_path)
    # As Qwen's own <tool_call>, a tag is text to a decoder that skips special tokens.
    assert theirs.decode([ids.im_end, ids.reflection_open], skip_special_tokens=True) == "<REFLECTION>"


def test_split_is_qwens(shared_data, tmp_path):
    """Where merges over digits and line breaks would pay, only Qwen's own split keeps them from being learnt."""
    tok = train_tiny_tokenizer(["2024 2024\n\n2024, don't DON'T!!\n\n  2024"] * 50)
    theirs = same_as_transformers(tok, tmp_path)
    for text in ("2024", "a 20242024\n\n2024", "don't DON'T!!\n\n"):
        assert tok.encode(text) == theirs.encode(text)
    assert len(tok.encode("2024")) == 4  # one token a digit
    spec = json.loads((shared_data / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    tok.save(tmp_path)
    ours = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["pre_tokenizer"] == spec["pre_tokenizer"] and ours["normalizer"] == spec["normalizer"]


def test_a_calls_truncation_and_padding_do_not_stay(tiny, tmp_path):
    """transformers leaves in the files what a padded call asked for; a question of any length keeps all its tokens."""
    tiny.save(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs(["a", "b c"], max_length=24, padding="max_length", truncation=True)
    theirs.save_pretrained(tmp_path / "padded")
    spec = json.loads((tmp_path / "padded" / "tokenizer.json").read_text(encoding="utf-8"))
    assert spec["truncation"]["max_length"] == 24 and spec["padding"]
    _change(tmp_path / "padded" / "tokenizer_config.json", split_special_tokens=True)
    loaded = Tokenizer.from_folder(tmp_path / "padded")
    for text in (*TEXTS, "How many red circles are there? " * 20):
        assert loaded.encode(text) == tiny.encode(text) and loaded.encode_plain(text) == tiny.encode_plain(text)
    loaded.save(tmp_path / "again")
    spec = json.loads((tmp_path / "again" / "tokenizer.json").read_text(encoding="utf-8"))
    assert spec["truncation"] is None and spec["padding"] is None
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("a")["input_ids"] == tiny.encode("a")


def _change(file, **changes):
    """Rewrites keys of a JSON object; None removes one."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def test_every_layout_of_the_files(tiny, tmp_path):
    """Added tokens, vocabulary and template stand in different files with the years; AutoTokenizer reads the same."""
    spec = None
    for name in ("vocab and merges", "added_tokens.json", "added_tokens_decoder", "saved by 5", "no config"):
        folder = tmp_path / name
        tiny.save(folder)
        spec = spec or json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if name == "vocab and merges":
            (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]), encoding="utf-8")
            merges = [" ".join(pair) for pair in spec["model"]["merges"]]
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
            (folder / "tokenizer.json").unlink()
        if name.startswith("added"):
            few = [token for token in spec["added_tokens"] if token["content"] not in TAGS]
            _change(folder / "tokenizer.json", added_tokens=few)
        if name == "added_tokens.json":
            _change(folder / "tokenizer_config.json", added_tokens_decoder=None, additional_special_tokens=None)
            (folder / name).write_text(json.dumps({tag: tiny.token_to_id(tag) for tag in TAGS}))
        if name == "saved by 5":
            AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        if name == "no config":
            (folder / "tokenizer_config.json").unlink()
        loaded, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert loaded.encode(text) == tiny.encode(text), (name, text)
            assert loaded.encode(text) == theirs.encode(text, add_special_tokens=False), (name, text)
        same_as_transformers(loaded, tmp_path / "again")
    released = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "extra_special_tokens" not in released and "backend" not in released  # what 4.x cannot read


def test_any_text_encodes_and_comes_back_in_nfc(tiny):
    everything = "".join(chr(code) for code in (*range(0x300), *range(0x4E00, 0x4E40), *range(0x1F300, 0x1F340)))
    for text in (*TEXTS, everything):
        want = unicodedata.normalize("NFC", text)
        assert tiny.decode(tiny.encode(text)) == want
        assert tiny.decode(tiny.encode_plain(text)) == want


def test_plain_text_injects_nothing(tiny, released):
    for tok in (tiny, released.with_tags()):
        special = {tok.token_to_id(token) for token in (*QWEN_CONTROL_TOKENS, *QWEN_TEXT_TOKENS, *TAGS)}
        for token in (*QWEN_CONTROL_TOKENS, *QWEN_TEXT_TOKENS, *TAGS):
            assert tok.encode(token) == [tok.token_to_id(token)]
            assert not special & set(tok.encode_plain(f"a{token} {token}"))
        assert tok.encode_plain("plain words") == tok.encode("plain words")


def test_other_threads_run_while_a_long_text_is_encoded(tiny):
    text, ticks, ended = "The e\u0301 \u6c49 <|im_end|> quick\n" * 20_000, [], threading.Event()

    def tick():
        while not ended.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.perf_counter()
    ids = tiny.encode_plain(text)
    within = started, time.perf_counter()
    ended.set()
    thread.join()
    assert sum(within[0] < at < within[1] for at in ticks) > 3
    assert tiny.decode(ids) == unicodedata.normalize("NFC", text)
    assert ids[: len(ids) // 20_000] == tiny.encode_plain(text[: len(text) // 20_000])


def test_ids_and_sizes_are_found_once(tiny, monkeypatch):
    known = tiny.vocab_size, tiny.longest_token, tiny.ids
    monkeypatch.setattr(tiny, "_backend", None)
    assert (tiny.vocab_size, tiny.longest_token, tiny.ids) == known


def test_decode_keeps_tags_and_drops_control_tokens_on_request(tiny):
    text = "<|im_start|><SUMMARY>red</SUMMARY><REFLECTION></REFLECTION><tool_call><|im_end|><|endoftext|>"
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    assert tiny.decode(ids, skip_special=True) == "<SUMMARY>red</SUMMARY><REFLECTION></REFLECTION><tool_call>"
    half = tiny.encode_plain("é")[:1]
    assert tiny.decode(half) == "\ufffd" and tiny.decode([10**6, *half]) == "\ufffd"


def test_special_tokens_are_the_last_ids(tiny):
    added = [tiny.token_to_id(token) for token in (*QWEN_CONTROL_TOKENS, *QWEN_TEXT_TOKENS, *TAGS)]
    assert added == list(range(tiny.vocab_size - 32, tiny.vocab_size)) and tiny.vocab_size <= 512


def test_scene_words_are_single_tokens(tiny):
    for word in (*COLORS, *SHAPES, *SIZES, "yes", "no"):
        assert len(tiny.encode(word)) == 1, word
    for word in (*COLORS, *SHAPES, *SIZES):
        assert len(tiny.encode(f" {word}")) == 1, word


def test_training_is_the_same_in_another_process():
    code = (
        "import hashlib; from qwenla_jax.data.synthetic.tokenizer_texts import tokenizer_texts\n"
        "from qwenla_jax.text.tokenizer import train_tiny_tokenizer\n"
        "tok = train_tiny_tokenizer(tokenizer_texts(100))\n"
        "print([tok.encode(t) for t in ('How many red circles?', 'compare squares')], tok.vocab_size)"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1 and runs.pop().strip()


def test_pickle(tiny):
    copy = pickle.loads(pickle.dumps(tiny))
    assert [copy.encode(text) for text in TEXTS] == [tiny.encode(text) for text in TEXTS] and copy.ids == tiny.ids


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: transformers cannot read the tokenizer"):
        Tokenizer.from_folder(tmp_path)
    train_tiny_tokenizer(["a"]).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json: holds a list; expected an object"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="vocab_size=287: expected at least 288"):
        train_tiny_tokenizer(["a"], vocab_size=287)
