"""Oracle: equality of the record that went in and the one that came out, byte for byte through a pipe's encoding."""

import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rewards.records import record

from qwenla_jax.rewards import RewardRecord

# Any code point, surrogates included; two of them side by side must not become one character.
anything = st.text(alphabet=st.characters(codec=None, categories=None, exclude_categories=()))
anything = st.one_of(anything, st.text(alphabet='\x00\n\r\x1f\x7f\u2028\ud83d\ude00\udfff"\\😀'))


@settings(deadline=None)
@given(anything, anything, st.lists(st.integers(0, 10**9)), st.integers(0, 10**9), st.booleans())
@example("\ud83d\ude00", "\x00", [], 0, True)
def test_round_trip(response, question, lengths, num_tokens, finished):
    before = RewardRecord("", question, "3", "", response, tuple(lengths), num_tokens, finished, (question, "", "b"))
    line = before.to_json()
    assert "\n" not in line
    wire = line.encode("utf-8", "surrogatepass")
    after = RewardRecord.from_json(wire.decode("utf-8", "surrogatepass"))
    assert after == before
    assert [ord(c) for c in after.response] == [ord(c) for c in response]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 3),
        ("response", None),
        ("num_tokens", 1.5),
        ("num_tokens", True),
        ("finished", 1),
        ("reflection_tokens", "12"),
        ("reflection_tokens", ["1"]),
        ("options", "AB"),
        ("options", [1]),
        ("options", None),
    ],
)
def test_wrong_type(field, value):
    values = dataclasses.asdict(record("a")) | {field: value}
    with pytest.raises(ValueError, match=f"reward record, {field}"):
        RewardRecord.from_json(json.dumps(values))


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"id": "3"}', "null"])
def test_no_record(line):
    with pytest.raises(ValueError):
        RewardRecord.from_json(line)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record("a").response = "b"
