"""Options against strings taken apart by hand; the strange ones are how We-Math and SceMQA write some."""

import contextlib

import pytest
from measure import seconds

from qwenla_jax.data.datasets.multiple_choice import from_lines, from_string, letter_of, lettered, numbered
from qwenla_jax.data.datasets.placeholders import named_images, placeholder_fault, without_placeholders

STRINGS = {
    "A. 1;B. 2": ["A 1", "B 2"],
    "A. ①; ③;B. ②; ③;C. ②; ④;D. ①; ④; E. No": ["A ①; ③", "B ②; ③", "C ②; ④", "D ①; ④", "E No"],
    "A. ①;B．②;C. ③; D. Cannot": ["A ①", "B ②", "C ③", "D Cannot"],
    "A. to the right;  ; B. to the left;  ; C. No.  ; D. None": ["A to the right", "B to the left", "C No.", "D None"],
    "A. ∠AB;E.; B. ∠AB;C.; C. None.; D. It; E. No": ["A ∠AB;E.", "B ∠AB;C.", "C None.", "D It", "E No"],
    "A. north to ;C.  ;B. west to ;C.  ;C. south to ;C. ;D. No": [
        "A north to ;C.", "B west to ;C.", "C south to ;C.", "D No"],
    "A. 45° B. 60° ;C. 120°; D. No": ["A 45°", "B 60°", "C 120°", "D No"],
    "A. 4 B. 3 C. 2 ;D. 1; E. No": ["A 4", "B 3", "C 2", "D 1", "E No"],
    "A. Yes ;O.;B. Yes ;O.;C. No.; F. None": ["A Yes ;O.", "B Yes ;O.", "C No.", "F None"],
    "A. A; B. B; C. C; D. E; E. No": ["A A", "B B", "C C", "D E", "E No"],
    "A. 1.5;B. 0.15;C. 3": ["A 1.5", "B 0.15", "C 3"],
    "A. side B. of it; B. two; C. x": ["A side B. of it", "B two", "C x"],
}  # fmt: skip


@pytest.mark.parametrize("text", STRINGS)
def test_one_string(text):
    assert [f"{letter} {option}" for letter, option in from_string(text)] == STRINGS[text]


@pytest.mark.parametrize("text", ["", "B. 1; C. 2", "A. 1", "1; 2"])
def test_a_string_without_options_is_refused(text):
    with pytest.raises(ValueError, match="the options"):
        from_string(text)


def test_lines():
    assert from_lines("Half-Cell A: x\n\nWhich?\n\nA. a\nB. b\n") == (
        "Half-Cell A: x\n\nWhich?",
        (("A", "a"), ("B", "b")),
    )
    assert from_lines("Q\n(A)  one\r\n(B) two\n three\n(C) x") == ("Q", (("A", "one"), ("B", "two three"), ("C", "x")))
    assert from_lines("Q\n A. x. \n B. y. \x08 C. z\n D. w")[1] == (("A", "x."), ("B", "y."), ("C", "z"), ("D", "w"))
    assert from_lines("Q\n(A} x\n(B) y")[1] == (("A", "x"), ("B", "y"))
    # A name in a sentence, a lonely A, no options at all
    assert from_lines("A. Smith asks\nA. x\nB. y") == ("A. Smith asks", (("A", "x"), ("B", "y")))
    assert from_lines("B. first\nA. x\nB. y")[0] == "B. first"
    for text in ("Q?", "Q\nA. x", "Is A.B. well?"):
        assert from_lines(text) == (text, ())


def test_lists_and_letters():
    options = numbered(["red", " dark\nblue "])
    assert options == (("A", "red"), ("B", "dark blue"))
    assert [letter_of(text, options) for text in ("B", "(B)", "B.", "red", "green", "b")] == ["B"] * 3 + [
        "A",
        "green",
        "b",
    ]
    assert letter_of("1", numbered(["1", "1"])) == "1"
    assert [letter_of(text, options) for text in ("B. dark blue", r"\boxed{B}", "A or B")] == ["B", "B", "A or B"]
    with pytest.raises(ValueError, match="27 options"):
        numbered(["x"] * 27)


RED_BLUE = (("A", "red"), ("B", "blue"))


@pytest.mark.parametrize(
    "given",
    [
        ["red", "blue"],
        ["A. red", "B. blue"],
        ["(A) red", "(B) blue"],
        ["a) red", "b) blue"],
        ["B: blue", "A: red"],
        {"A": "red", "B": "blue"},
        {"B": "blue", "A": "red", "C": None, "D": float("nan")},
        {"option_a": "red", "option_b": "blue"},
        {"0": "red", "1": "blue"},
        {"label": ["A", "B"], "text": ["red", "blue"]},
        [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}],
        [{"A": "red"}, {"B": "blue"}],
        [("A", "red"), ("B", "blue")],
        ["red", "blue", None, None],
        "['red', 'blue']",
        "A. red\nB. blue",
        "A. red; B. blue",
    ],
)
def test_options_in_every_form_that_datasets_have(given):
    assert lettered(given) == RED_BLUE


def test_options_that_only_look_lettered_or_are_none():
    for texts in (["A.M.", "B.C."], ["A:B", "B:A"], ["A. Smith", "Jones"], ["(A)", "(B)"], ["B. x", "C. y"], ["A. x"]):
        assert [text for _, text in lettered(texts)] == texts
    assert lettered([]) == lettered(None) == lettered({}) == ()
    assert lettered([1, 2.5]) == (("A", "1"), ("B", "2.5"))
    for given in (["red", None, "blue"], ["red", ["blue"]], {"A": "x", "a": "y"}, {"first": "x"}, 3, [{"A": {}}]):
        with pytest.raises(ValueError, match="the options"):
            lettered(given)
    with pytest.raises(ValueError, match="the options"):
        lettered("[" * 50_000)


def test_placeholders():
    assert without_placeholders("<image>\nWhat is it?") == "What is it?"
    assert without_placeholders("Look <image1> here.\n<image1>") == "Look here."
    assert without_placeholders("Which?\n<image1>\n<image2>") == "Which?"
    assert (
        without_placeholders("The ant <image1> meets <image2>.\n<image3>") == "The ant (picture 1) meets (picture 2)."
    )
    assert without_placeholders("a < b <images> <|image_pad|>") == "a < b <images> <|image_pad|>"
    assert without_placeholders("Is <image 1> or <image 2> it?") == "Is (picture 1) or (picture 2) it?"
    assert named_images(["<image>", "<image 1>", "an <image>"], 1) == ("picture 2", "picture 1", "an picture 3")


# (question, images, whether one image has numbered parts) -> whether they fit
@pytest.mark.parametrize(
    "text, images, parts, fits",
    [
        ("q", 0, False, True), ("q", 3, False, True), ("<image>q", 1, False, True), ("<image>q", 0, False, False),
        ("<image>q", 2, False, False), ("<image><image>q", 2, False, True), ("<image><image>q", 1, False, False),
        ("<image1> or <image1>", 1, False, True), ("<image1> or <image 2>", 1, False, False),
        ("<image1>", 2, False, True), ("<image3>", 3, False, True), ("<image1> to <image5>", 1, True, True),
        ("<image1>", 0, True, False),
        ("<video>q", 0, False, False), ("<images>", 0, False, True),
    ],
)  # fmt: skip
def test_placeholders_without_an_image(text, images, parts, fits):
    assert (placeholder_fault(["x", text], images, parts) is None) is fits


@pytest.mark.parametrize(
    "part",
    [" ", "\t ", "\n", "<image>", "<image> ", "<image 1>", "<image", "A. x\n", "A.\n", "B. x\n", "(A) ", ";B.", "; "],
)
def test_long_texts_take_linear_time(part):
    """200,000 characters in a moment: of the two that were quadratic one took 15 s and the other 500."""
    text = part * (200_000 // len(part))

    def work():
        without_placeholders(text)
        without_placeholders("a" + text + "b")
        from_lines(text)
        from_lines("A. x\n" + text + "\nB. y")
        with contextlib.suppress(ValueError):
            lettered("A." + text)

    assert seconds(work, limit=3) <= 3
