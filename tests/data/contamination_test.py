"""The leak guard against real images: every re-encoded and resized copy is found, and no other image."""

import hashlib
import io
import json

import pytest
from measure import seconds
from PIL import Image

from qwenla_jax.data.contamination import (
    Fingerprint,
    Fingerprints,
    coco_number,
    file_leaks,
    find_leaks,
    image_fingerprint,
    take_fingerprints,
)
from qwenla_jax.data.datasets.mathvision import mathvision
from qwenla_jax.data.datasets.scemqa import scemqa
from qwenla_jax.data.datasets.we_math import we_math
from qwenla_jax.data.synthetic.source import SceneSource


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return Image.open(io.BytesIO(out.getvalue())).convert("RGB")


def scaled(image, share, how=Image.Resampling.BICUBIC):
    return image.resize((max(28, round(image.width * share)), max(28, round(image.height * share))), how)


COPIES = {
    "jpeg 30": lambda image: encoded(image, "JPEG", quality=30),
    "webp 50": lambda image: encoded(image, "WEBP", quality=50),
    "palette": lambda image: image.convert("P").convert("RGB"),
    "half": lambda image: scaled(image, 0.5),
    "a third": lambda image: scaled(image, 1 / 3, Image.Resampling.LANCZOS),
    "twice": lambda image: scaled(image, 2),
    "half as jpeg 40": lambda image: encoded(scaled(image, 0.5), "JPEG", quality=40),
    "multiples of 28": lambda image: image.resize(
        (max(28, round(image.width / 28) * 28), max(28, round(image.height / 28) * 28))
    ),
}


@pytest.fixture(scope="module")
def images(shared_data):
    """252 real images by their file; some files hold the same pixels."""
    folders = {"mathvision": "mathvision/images/*", "we_math": "we_math/data/*/image/*", "scemqa": "scemqa/*/*/*.*g"}
    result = {}
    for pattern in folders.values():
        for path in sorted(shared_data.glob(pattern)):
            with Image.open(path) as image:
                result[str(path)] = image.convert("RGB")
    assert len(result) == 252
    return result


@pytest.fixture(scope="module")
def evaluated(images):
    return prints("eval", {name: image_fingerprint(image, name) for name, image in images.items()})


@pytest.fixture(scope="module")
def twins(images):
    """Pairs of files with the same pixels, by comparing bytes."""
    groups = {}
    for name, image in images.items():
        groups.setdefault((image.size, hashlib.sha256(image.tobytes()).hexdigest()), []).append(name)
    return {(a, b) for group in groups.values() for a in group for b in group}


def prints(name, by_id):
    return Fingerprints(name, tuple(by_id), tuple(by_id.values()))


def test_no_image_is_taken_for_another(evaluated, twins):
    report = find_leaks(evaluated, evaluated)
    assert {(leak.trained, leak.evaluated) for leak in report.leaks} == twins and len(twins) == 252 + 2 * 9


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_found_and_nothing_else(images, evaluated, twins, copy):
    chosen = list(images)[::3]  # a third of them, for time; all of them were tried once
    copies = {name: image_fingerprint(COPIES[copy](images[name]), name) for name in chosen}
    report = find_leaks(prints("train", copies), evaluated)
    result = {(leak.trained, leak.evaluated) for leak in report.leaks}
    assert result == {pair for pair in twins if pair[0] in copies}
    assert report.images == (len(chosen), len(chosen)) and set(report.ids()) == set(chosen)


def test_scenes_of_different_splits_do_not_look_the_same():
    trained, held = (take_fingerprints(SceneSource(0, split, size=60), split) for split in ("train", "held_out"))
    report = find_leaks(trained, held)
    assert not report.leaks and not report.same_ids and report.images == (60, 0)
    assert report.text() == "0 images of 60 of train are in held_out\n0 ids of train are in held_out"


def test_corpora_show_their_files(shared_data):
    folders = shared_data / "we_math" / "data", shared_data / "mathvision", shared_data / "scemqa"
    ours = [take_fingerprints(open_one(folder), open_one.__name__) for open_one, folder in
            zip((we_math, mathvision, scemqa), folders, strict=True)]  # fmt: skip
    assert [len(each.images) for each in ours] == [50, 160, 48] and not any(each.unread for each in ours)
    for first in ours:
        for second in ours:
            report = find_leaks(first, second)
            if first is not second:
                assert not report.leaks and not report.same_ids
            else:
                assert {leak.how for leak in report.leaks} <= {"file", "pixels"} and report.images[0] == report.images[
                    1
                ]


def test_the_same_file_pixels_and_look_are_told_apart(tmp_path):
    noise = Image.effect_noise((80, 60), 90).convert("RGB")
    noise.paste("red", (10, 10, 50, 40))
    content = {}
    for name, kind in (("x.png", "PNG"), ("y.bmp", "BMP"), ("z.jpg", "JPEG"), ("other.png", "PNG")):
        image = noise.transpose(Image.Transpose.ROTATE_180) if name == "other.png" else noise
        image.save(tmp_path / name, kind)
        content[name] = (tmp_path / name).read_bytes()
    train = [image_fingerprint(Image.open(io.BytesIO(data)), name, data, name) for name, data in content.items()]
    judged = Fingerprints("eval", ("q",), (image_fingerprint(noise, "q", content["x.png"]),))
    report = find_leaks(Fingerprints("train", tuple(content), tuple(train)), judged)
    assert [(leak.trained, leak.how) for leak in report.leaks] == [
        ("x.png", "file"),
        ("y.bmp", "pixels"),
        ("z.jpg", "look"),
    ]
    assert report.text().splitlines()[:2] == [
        "3 images of 4 of train are in eval: x.png, y.bmp, z.jpg",
        "  by file, 1 pairs: x.png = q",
    ]
    assert "3 images of 4 of train are in eval: x.png, ... and 2 more" in report.text(most=1)


def test_images_of_one_colour_are_the_same_only_by_their_pixels():
    red, blue = (image_fingerprint(Image.new("RGB", (50, 50), color), color) for color in ("red", "blue"))
    small = image_fingerprint(Image.new("RGB", (25, 25), "red"), "small")
    assert red.phash is None and red.pixels != blue.pixels != small.pixels
    again = Fingerprints("e", ("r",), (image_fingerprint(Image.new("RGB", (50, 50), "red"), "r"),))
    assert find_leaks(Fingerprints("t", ("a", "b", "c"), (red, blue, small)), again).ids() == ("red",)
    # The same bytes in another shape are another image.
    wide = image_fingerprint(Image.new("RGB", (100, 25), "red"), "wide")
    assert not find_leaks(Fingerprints("t", ("w",), (wide,)), again).leaks


def named(name, images):
    """Fingerprints of (id, file name), as of an evaluation whose images are not there."""
    prints = tuple(Fingerprint(record, number=coco_number(file)) for record, file in images)
    return Fingerprints(name, tuple(record for record, _ in images), prints)


def test_coco_images_meet_pope_by_their_numbers(shared_data):
    lines = (shared_data / "hallucination" / "coco_pope_random.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    names = sorted({row["image"] for row in rows})
    number = int(names[0][-16:-4])
    pope = named("POPE", [(f"pope-{i}", row["image"]) for i, row in enumerate(rows)])
    trained = named(
        "LLaVA-CoT", [("a", f"coco/train2017/{number:012}.jpg"), ("b", "coco/train2017/999999999999.jpg"),
                      ("c", f"sqa/train/{number:012}/image.png"), ("d", f"chartqa/{number:012}.png")])  # fmt: skip
    report = find_leaks(trained, pope)
    assert report.ids() == ("a",) and report.images == (4, 1)
    assert len(report.leaks) == sum(row["image"] == names[0] for row in rows)
    assert coco_number("COCO_val2014_000000310196.jpg") == 310196 and coco_number("images/12.jpg") is None


def test_files_that_cannot_be_read_are_compared_by_name_alone(tmp_path):
    """Two empty files have one length, and are no images."""
    row = {"question": "q", "options": [], "answer": "1"}
    for name in ("trained", "judged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "empty.png").write_bytes(b"")
        Image.new("RGB", (40, 40), "red").save(tmp_path / name / "a.png")
        rows = [row | {"id": f"{name} {file}", "image": f"{file}.png"} for file in ("a", "empty")]
        (tmp_path / name / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = file_leaks(mathvision(tmp_path / "trained"), mathvision(tmp_path / "judged"))
    assert [(leak.trained, leak.how) for leak in report.leaks] == [("trained a", "file")]


def test_names_are_looked_through_in_linear_time():
    assert coco_number("train2017/000000000007.jpg") == 7 and coco_number("atrain2017/000000000007.jpg") is None
    for name, number in (("coco/" * 100_000 + "000000000007.jpg", 7), ("coco/" * 100_000, None)):
        assert coco_number(name) == number and seconds(coco_number, name, limit=0.5) <= 0.5


def test_ids_and_unread_records(tmp_path):
    row = {"question": "q", "options": [], "answer": "1", "image": "a.png"}
    Image.effect_noise((40, 40), 90).save(tmp_path / "a.png")
    lines = [json.dumps(row | {"id": "1"}), json.dumps(row | {"id": "2", "image": "none.png"}), "{"]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    ours = take_fingerprints(mathvision(tmp_path), "train")
    assert ours.ids == ("1", "2") and len(ours.images) == 1 and len(ours.unread) == 2
    report = find_leaks(ours, Fingerprints("eval", ("2", "3"), ()))
    assert report.same_ids == ("2",) and "1 ids of train are in eval: 2" in report.text()
    assert "2 records cannot be read and were not compared" in report.text()
