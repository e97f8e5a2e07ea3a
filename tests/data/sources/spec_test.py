"""How sources are named, against forms written out by hand."""

import subprocess
import sys
from fractions import Fraction

import pytest

from qwenla_jax.data.sources.spec import parse, problems


@pytest.mark.parametrize(
    "spec, want",
    [
        ("scenes", [("scenes", "scenes", "", {}, 1)]),
        ("a/b.jsonl", [("b", "jsonl", "a/b.jsonl", {}, 1)]),
        ("a/b.jsonl#turns=first*2", [("b", "jsonl", "a/b.jsonl", {"turns": "first"}, 2)]),
        ("we_math:/d", [("we_math", "we_math", "/d", {}, 1)]),
        ("parquet:/d/train-*.parquet", [("parquet", "parquet", "/d/train-*.parquet", {}, 1)]),
        ("parquet:/d/*.parquet*.5", [("parquet", "parquet", "/d/*.parquet", {}, Fraction(1, 2))]),
        (
            "mathvision:/d#max_options=5&kinds=algebra|solid geometry*3,scenes",
            [
                ("mathvision", "mathvision", "/d", {"max_options": "5", "kinds": "algebra|solid geometry"}, 3),
                ("scenes", "scenes", "", {}, 1),
            ],
        ),
        (
            "geometry3k:/d/train*2,geometry3k:/d/val*1.5,x.jsonl*2",
            [
                ("geometry3k", "geometry3k", "/d/train", {}, 2),
                ("geometry3k.2", "geometry3k", "/d/val", {}, Fraction(3, 2)),
                ("x", "jsonl", "x.jsonl", {}, 2),
            ],
        ),
    ],
)
def test_forms(spec, want):
    assert [(p.name, p.reader, p.path, dict(p.keys), p.weight) for p in parse(spec)] == want


@pytest.mark.parametrize(
    "spec, message",
    [
        ("wemath:/d", "'wemath:/d': expected scenes, easy_vqa, an existing .jsonl file, or NAME:PATH with a NAME of"),
        ("", "'': expected scenes"),
        ("scenes,", "'': expected scenes"),
        ("we_math:", "'we_math:': expected a path after we_math:"),
        ("scenes*0", "'scenes.0': the weight is 0"),
        (
            "we_math:/d#colour=red",
            "'colour=red' is no KEY=VALUE with a KEY of max_options, images, kinds, turns",
        ),
        ("we_math:/d#max_options=few", "max_options=few, expected a whole number"),
        ("we_math:/d#images=2", "images=2, expected 1"),
        ("we_math:/d#turns=first", "turns=first, expected turns=first, of llava_cot, parquet or JSONL"),
        ("we_math:/d#columns=answer:x", "the columns of we_math are known; expected columns=... of parquet or JSONL"),
        ("x.jsonl#columns=colour:x", "'colour:x' is no FIELD:COLUMN with a FIELD of question, answer, image"),
        ("x.jsonl#turns=last", "turns=last, expected turns=first"),
        ("scenes,we_math:/no/such/folder", "there is no file or folder '/no/such/folder'"),
        ("parquet:/no/*.parquet", r"there is no file or folder '/no/\*.parquet'"),
        ("no.jsonl*2,scenes", "there is no file 'no.jsonl'; expected scenes, easy_vqa, an existing .jsonl"),
    ],
)
def test_what_is_wrong_is_named(spec, message):
    with pytest.raises(AssertionError, match=message):
        assert not list(problems(spec)), " ".join(problems(spec))


def test_a_file_is_taken_as_it_is_called(tmp_path):
    odd = tmp_path / "a,b*2.jsonl"
    odd.touch()
    (part,) = parse(str(odd))
    assert part.path == str(odd) and part.weight == 1 and not list(problems(str(odd)))


def test_refusing_needs_no_heavy_import():
    code = (
        "import sys; from qwenla_jax.data.sources.spec import parse; parse('we_math:/d'); "
        "assert not {'jax', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
