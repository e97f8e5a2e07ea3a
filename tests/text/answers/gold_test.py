"""Right answers as datasets write them. Oracle: each taken apart by hand, and what a response with the answer gets."""

import pytest
from measure import seconds

from qwenla_jax.text.answers.gold import unmatchable, unwrap_gold
from qwenla_jax.text.answers.match import matches


@pytest.mark.parametrize(
    "gold, bare",
    [
        ("<answer> 3 </answer>", "3"),
        ("<think>It is 4, <answer>4</answer>?</think>\n<answer>\n(B)\n</answer>", "(B)"),
        ("<ANSWER>red</Answer>", "red"),
        ("<CONCLUSION> B </CONCLUSION>", "B"),
        ("<final_answer>1</final_answer>.", "1"),
        ("<|begin_of_box|>5<|end_of_box|>", "5"),
        ("<think>so</think> 7", "7"),
        ("2 + 3 = 5, twice that.\n#### 10", "10"),
        ("#### 1,000", "1,000"),
        ("We add.\nThe answer is: 7", "7"),
        ("We add.\nAnswer: x = 7", "x = 7"),
        (r"<answer>\boxed{\frac{1}{2}}</answer>", r"\boxed{\frac{1}{2}}"),
        # What stays as it is.
        ("3", "3"),
        ("1 < x < 3", "1 < x < 3"),
        ("# 5", "# 5"),
        ("</b>", "</b>"),
        ("<answer>3", "<answer>3"),
        ("The answer is: 7", "The answer is: 7"),
    ],
)
def test_wrappings(gold, bare):
    assert unwrap_gold(gold) == bare
    assert unwrap_gold(f"\n {gold} ") == bare


@pytest.mark.parametrize("gold", ["<answer>3", "<foo>3</foo>", "...", "?!", "x <|im_end|>", "</SUMMARY>"])
def test_what_no_response_can_match_is_reported(gold):
    message = unmatchable(unwrap_gold(gold))
    assert message is not None and "expected" in message


@pytest.mark.parametrize("gold", ["3", "-", "+", "π", "°", "∞", "</b>", "1 < x", "a<b>c", "<", "$$x$$", "No."])
def test_what_a_response_can_match_is_not(gold):
    assert unmatchable(gold) is None and matches(gold, gold)


@pytest.mark.parametrize(
    "part", ["<answer>", "</answer>", "<answer>3</answer>", "<think>", "\n#### ", "\nAnswer: ", "<", "<a "]
)
def test_time_is_linear(part):
    text = part * (400_000 // len(part))
    assert seconds(lambda: unmatchable(unwrap_gold(text)), limit=2) <= 2
