"""Broken records: each kind told by `check`, skipped and counted while training; filters."""

import json

import pytest
from dataset_faults import check
from PIL import Image

from qwenla_jax.data.batching.loader import make_pipeline
from qwenla_jax.data.datasets.mathvision import mathvision
from qwenla_jax.data.datasets.parquet import parquet_questions
from qwenla_jax.data.sources.mixture import Mixture
from qwenla_jax.data.sources.skip_invalid import SkipInvalid, TooManyInvalid
from qwenla_jax.data.sources.splits import SelectedRecords

ROW = {"question": "q", "options": [], "answer": "1", "subject": "s", "image": "good.png"}
# id -> what is wrong with it, and its reason
BAD = {
    "2": ({"answer": " "}, "empty_answer"),
    "3": ({"question": "<image1>"}, "empty_question"),
    "5": ({"image": "none.png"}, "image_absent"),
    "6": ({"image": "cut.png"}, "image_invalid"),
    "7": ({"image": "text.png"}, "image_format"),
    "8": ({"image": "empty.png"}, "image_empty"),
    "9": ({"options": ["x", "y"], "answer": "C"}, "answer_not_among_options"),
    "10": ({"options": "A. x"}, "options"),
    "11": ({"answer": None}, "field"),
    "12": ({"id": "0"}, "duplicate_id"),
}


@pytest.fixture
def path(tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    rows = [json.dumps(ROW | {"id": str(n)} | BAD.get(str(n), ({},))[0]) for n in range(13)]
    rows += ["{", "[]", json.dumps(ROW | {"id": "15"})]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    return tmp_path / "test.jsonl"


def test_check_names_every_fault(path):
    result = check(mathvision(path))
    want = [(int(name) + 1, reason) for name, (_, reason) in BAD.items()] + [(14, "not_json"), (15, "not_an_object")]
    assert [(p.where, p.reason) for p in result.problems] == [(f"{path}:{line}", reason) for line, reason in want]
    assert (result.size, result.invalid) == (16, 12)
    text = result.text()
    assert text.startswith("mathvision: 16 records, 12 of them invalid\n") and "  duplicate_id: 1\n" in text
    assert f"{path}:13: id '0' stands at {path}:1 already; ids must differ" in text
    assert f"{path}:10: the answer 'C' is none of the options A, B" in text
    assert "... and 10 more" in result.text(most=2)


def test_skipping_takes_the_next_whole_record(path):
    whole = ["0", "1", "4", "15"]
    want = ["0", "1", "4", "4", "4"] + ["15"] * 11
    for order in (range(16), reversed(range(16)), [7, 3, 7, 12, 0, 15]):
        source = SkipInvalid(mathvision(path), most=12)
        order = list(order)
        assert [source[i].id for i in order] == [want[i] for i in order]
    assert set(want) == set(whole)
    source = SkipInvalid(mathvision(path), most=12)
    for i in range(16):
        source[i]
        source[i]
    # A row that could not be read, and an image that could not be decoded, are told apart from the text's faults.
    assert source.skipped() == {
        "empty_answer": 1, "empty_question": 1, "image_absent": 1, "invalid": 1, "format": 1, "empty": 1, "field": 1,
        "answer_not_among_options": 1, "options": 1, "duplicate_id": 1, "not_json": 1, "not_an_object": 1}  # fmt: skip


def test_skipping_goes_round_the_end_and_stops_at_its_bound(path):
    lines = path.read_text().splitlines()[:14]
    path.write_text("\n".join(lines))
    assert SkipInvalid(mathvision(path), most=13)[13].id == "0"
    source = SkipInvalid(mathvision(path), most=2)
    assert [source[2].id, source[3].id, source[2].id, source[4].id] == ["4"] * 4  # two are broken, however often read
    with pytest.raises(
        TooManyInvalid, match=r"3 records are invalid, at most 2 may be: (?s:.*)test.jsonl:3: the answer is"
    ):
        source[5]
    path.write_text(lines[2])
    with pytest.raises(TooManyInvalid, match="all 1 records are invalid: empty_answer 1"):
        SkipInvalid(mathvision(path), most=5)[0]
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        SkipInvalid(mathvision(path), most=-1)


def test_skipping_lets_the_bound_of_an_inner_source_through_and_hides_no_other_error(path):
    mixed = Mixture({"m": SkipInvalid(mathvision(path), most=1)}, {"m": 1})
    with pytest.raises(TooManyInvalid, match="at most 1"):
        [SkipInvalid(mixed, most=100)[i] for i in range(16)]

    class Wrong:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise KeyError("a fault of the program")

    with pytest.raises(KeyError):
        SkipInvalid(Wrong(), most=5)[0]


def test_a_pipeline_over_broken_records_restarts_exactly(path):
    def batches(start, threads):
        source = SkipInvalid(mathvision(path), most=12)
        ids = make_pipeline(source, lambda r: r.id, tuple, 3, seed=5, start_step=start, threads=threads)
        return [next(ids) for _ in range(12 - start)]

    assert batches(0, 0)[4:] == batches(4, 2)


def test_filters_count(path, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": (tmp_path / "good.png").read_bytes(), "path": "x"}
    columns = {
        "question": ["q"] * 6,
        "answer": ["A", "A", "A", "1", "A", "Z"],
        "options": [["x"] * n for n in (2, 5, 2, 0, 5, 9)],
        "kind": ["a", "a", "b", "a", "b", "a"],
        "images": [[image], [image], [image, image], [], [], [image]],
    }
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table(columns | {"images": pa.array(columns["images"], kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = parquet_questions(tmp_path / "x.parquet")

    def filtered(size=None, **filters):
        return SelectedRecords(dataset, "parquet", "train", whole=True, filters=filters, size=size)

    left = filtered(images="1", max_options="4")
    assert len(left) == 1 and left[0].answer == "A" and len(left[0].images) == 1
    assert left.left_out == {"no_image": 2, "several_images": 1, "many_options": 2}
    kinds = filtered(kinds="b")
    assert [kinds.raw_record(i).kind for i in range(len(kinds))] == ["b", "b"] and kinds.left_out == {"other_kind": 4}
    assert len(filtered(size=2)) == 2
    with pytest.raises(ValueError, match=r"leave nothing of its 6 records \(other_kind 6\)"):
        filtered(kinds="c")
    # A row that cannot be read stays, to be refused by name.
    rest = SelectedRecords(mathvision(path), "mathvision", "train", whole=True, filters={"kinds": "c"})
    assert (len(rest.faults), rest.left_out) == (5, {"other_kind": 11})
