"""What a model is asked: a benchmark's question as text.

Paper silent on the prompts of its evaluation. "structured" is what training asks: the question with its options written
out, and nothing on the form of the answer, which the trained model writes by itself. "plain" adds a line that says in
which form the benchmark's scorer looks for the answer; the benchmarks differ there, and the wording is ours. Anything
else is a text with {question} in it.
"""

from __future__ import annotations

import re

from qwenla_jax.data.datasets.raw_record import without_placeholders
from qwenla_jax.evals.task import Item

FORMS = ("structured", "plain")
_PLACE = "{question}"
_IN_IMAGE = "Answer the question that the picture shows."
_LINE_BREAK = re.compile(r"\\n(?![a-z])")  # MathVision writes some line breaks so, and LaTeX has \ne and \nu


def check_form(form: str) -> None:
    """Refuses what is no form of prompts.

    Raises:
      ValueError: it is neither of `FORMS` nor a text with {question} in it.
    """
    if form not in FORMS and _PLACE not in form:
        raise ValueError(f"prompt: got {form!r}, expected {', '.join(FORMS)}, or a text with {_PLACE} in it")


def prompt_of(task: str, item: Item, form: str) -> str:
    """The user's text in a form (see `check_form`), "" where the item has no question.

    The images come first, as in training. Placeholders of images go, or become "(image 2)" where there are several.
    """
    text = _LINE_BREAK.sub("\n", item.question) if task == "mathvision" else item.question
    text = without_placeholders(re.sub(r"<image\s+(\d+)>", r"<image\1>", text))
    if task == "mmmu_pro" and item.kind == "vision":
        text = _IN_IMAGE  # question and options stand in the image; the file's text of them is for the scorer
    if not text or form == "structured":
        return text
    if form == "plain":
        return "\n".join(filter(None, (text, _answer_form(task, item, text))))
    return form.replace(_PLACE, text)


def _answer_form(task: str, item: Item, text: str) -> str:
    if task in ("pope", "mme"):
        return "" if "yes or no" in text.lower() else "Answer with yes or no."
    if task in ("chair", "mmhal"):
        return ""
    return "Answer with the letter of one option." if item.options else "Answer with a single word, number or phrase."
