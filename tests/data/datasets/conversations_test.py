"""Conversations and columns as people have them: published record shapes, and files that `datasets` itself writes.

Oracle: the same questions in this project's own JSONL form; OpenAI's, LLaVA's and TRL's shapes are written out from
their documentation.
"""

import base64
import io
import json

import pytest
from dataset_faults import check
from PIL import Image

from qwenla_jax.data.batching.example import to_sft_example
from qwenla_jax.data.datasets.jsonl import jsonl
from qwenla_jax.data.datasets.parquet import parquet_questions
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.text.tokenizer import Tokenizer

RESPONSE = "<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING><CONCLUSION>B</CONCLUSION>"
OPTIONS = ["red", "blue"]
ASKED = ["Which?\nA. red\nB. blue", "What differs?\nA. red\nB. blue", "Which is not here?\nA. red\nB. blue"]
SIZES = [[(40, 30)], [(41, 30), (42, 31)], []]  # of each question's images


def image(size):
    return Image.effect_noise(size, 60).convert("RGB")


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def images():
    return [[image(size) for size in sizes] for sizes in SIZES]


@pytest.fixture
def paths(tmp_path, images):
    result = []
    for number, several in enumerate(images):
        result.append([])
        for item, each in enumerate(several):
            (tmp_path / "pics").mkdir(exist_ok=True)
            each.save(tmp_path / "pics" / f"{number}.{item}.png")
            result[-1].append(f"pics/{number}.{item}.png")
    return result


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def told(record):
    """All that a record says but its id and kind."""
    pixels = [(each.size, each.tobytes()) for each in record.images]
    return record.question, record.answer, record.response, record.options, record.system, pixels


@pytest.fixture
def own(tmp_path, images, paths):
    """The records by hand; the project's own form gives the same."""
    pixels = [[(each.size, each.tobytes()) for each in several] for several in images]
    want = [(ASKED[n], "B", RESPONSE, tuple(OPTIONS), None, pixels[n]) for n in range(3)]
    row = {"answer": "B", "response": RESPONSE, "options": OPTIONS}
    dataset = jsonl(
        write(tmp_path / "own.jsonl", [row | {"id": str(n), "image": paths[n], "question": ASKED[n]} for n in range(2)])
    )
    assert [told(dataset[n]) for n in range(2)] == want[:2]
    return want


def url(image):
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def openai(n, images):
    """platform.openai.com/docs/guides/vision: content parts with data URLs."""
    parts = [{"type": "image_url", "image_url": {"url": url(each), "detail": "low"}} for each in images[n]]
    content = [{"type": "text", "text": ASKED[n]}, *parts] if parts else ASKED[n]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": RESPONSE}]


def llava(n):
    """LLaVA-Instruct: an image tag a line above the question."""
    tags = "".join("<image>\n" for _ in SIZES[n])
    return [{"from": "human", "value": tags + ASKED[n]}, {"from": "gpt", "value": RESPONSE}]


def trl(n):
    """TRL's vision form: parts without data, the images in a column."""
    parts = [*({"type": "image"} for _ in SIZES[n]), {"type": "text", "text": ASKED[n]}]
    return [{"role": "user", "content": parts}]


FORMS = {
    "openai": lambda n, images, paths: {"messages": openai(n, images)},
    "llava": lambda n, images, paths: {"id": n, "image": (*paths[n], None)[0], "conversations": llava(n)}
    | ({"image": paths[n]} if len(paths[n]) > 1 else {}),
    "sharegpt": lambda n, images, paths: {"conversations": llava(n), "images": [{"path": p} for p in paths[n]]},
    "trl": lambda n, images, paths: {"prompt": trl(n), "images": paths[n], "solution": "B", "response": RESPONSE},
    "base64": lambda n, images, paths: {
        "question": ASKED[n], "gold": "<answer> B </answer>", "response": RESPONSE, "messages": None,
        "images": [base64.b64encode(png(each)).decode() for each in images[n]]},
    "file": lambda n, images, paths: {
        "messages": [{"role": "user", "content": [*({"type": "image", "image": f"file://{p}"} for p in paths[n]),
                                                  {"type": "text", "text": ASKED[n]}]}],
        "response": RESPONSE, "answer": "B"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_published_shapes_in_jsonl(tmp_path, images, paths, own, form):
    if form == "file":
        paths = [[str(tmp_path / each) for each in several] for several in paths]
    last = 2 if form == "base64" else 3  # a question of columns alone needs an image
    rows = [FORMS[form](n, images, paths) | {"options": OPTIONS} for n in range(last)]
    dataset = jsonl(write(tmp_path / "x.jsonl", rows))
    assert check(dataset).problems == ()
    assert [told(dataset[n]) for n in range(last)] == own[:last]
    assert [dataset[n].id for n in range(last)] == (
        [str(n) for n in range(3)] if form == "llava" else [str(n + 1) for n in range(last)]
    )


@pytest.fixture
def saved(images):
    """The questions as `datasets` holds them, with images in a column; its own features, its own files."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [{"role": turn["from"].replace("human", "user").replace("gpt", "assistant"),
                       "content": turn["value"]} for turn in llava(n)], "images": images[n], "options": OPTIONS}
        for n in range(3)
    ]  # fmt: skip
    text = datasets.Value("string")
    features = {"messages": datasets.List({"role": text, "content": text}), "images": datasets.List(datasets.Image())}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features | {"options": datasets.List(text)}))


@pytest.mark.parametrize("shards", [1, 2])
def test_what_datasets_saves(tmp_path, saved, own, shards):
    saved.save_to_disk(tmp_path / "disk", num_shards=shards)
    (tmp_path / "disk" / "data-00007-of-00008.arrow").write_bytes(b"of an earlier time")
    saved.to_parquet(tmp_path / "x.parquet")
    for path in (tmp_path / "disk", tmp_path / "x.parquet"):
        dataset = parquet_questions(path)
        assert check(dataset).problems == ()
        assert [told(dataset[n]) for n in range(3)] == own
    turned = saved.select([2, 0]).map(lambda row: row)  # indices are resolved when it is saved
    turned.save_to_disk(tmp_path / "turned")
    assert [told(parquet_questions(tmp_path / "turned")[n]) for n in range(2)] == [own[2], own[0]]


def test_splits_that_datasets_saves(tmp_path, saved):
    datasets = pytest.importorskip("datasets")
    parts = datasets.DatasetDict(train=saved, test=saved.select([0]))
    parts.save_to_disk(tmp_path / "parts")
    sizes = {split: len(make_source(f"parquet:{tmp_path / 'parts'}", split, seed=0)) for split in ("train", "held_out")}
    assert sizes == {"train": 3, "held_out": 1}
    with pytest.raises(ValueError, match=r"several splits \(test, train\); name one: .*parts/test"):
        parquet_questions(tmp_path / "parts")
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "one")
    assert len(parquet_questions(tmp_path / "one")) == 3
    (tmp_path / "one" / "train" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="state.json: _data_files is missing"):
        parquet_questions(tmp_path / "one" / "train")


def test_a_broken_arrow_file_is_named(tmp_path, saved):
    saved.save_to_disk(tmp_path / "disk")
    (file,) = (tmp_path / "disk").glob("*.arrow")
    whole = file.read_bytes()
    for content in (b"no", whole[:100], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"\.arrow: (not an Arrow file that can be read|reading it ended)"):
            parquet_questions(tmp_path / "disk")
    (tmp_path / "disk" / "state.json").unlink()
    file.write_bytes(whole)
    assert len(parquet_questions(file)) == len(parquet_questions(tmp_path / "disk")) == 3


def test_columns_are_named_by_the_setting(tmp_path, images, own):
    datasets = pytest.importorskip("datasets")
    row = {"prompt_text": ASKED[0], "label": "B", "img": images[0][0], "out": RESPONSE, "picks": OPTIONS}
    rows = [row | {"question": "no"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    rows[0]["img"] = url(images[0][0])
    write(tmp_path / "x.jsonl", rows)
    columns = "#columns=question:prompt_text|answer:label|image:img|response:out|options:picks"
    for name in (f"{tmp_path}/x.jsonl", f"parquet:{tmp_path}/x.parquet"):
        source = make_source(name + columns, "cold_start", seed=0, whole=True)
        assert told(source[0]) == own[0]
        with pytest.raises(ValueError, match=r"no column 'labl' \(columns=answer:labl\); it has prompt_text, label"):
            make_source(name + columns.replace("label", "labl"), "train", seed=0, whole=True)
    datasets.Dataset.from_list([{"question": "q", "answer": "1", "n": 3}]).to_parquet(tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y.parquet: cannot read images from n \(int64\)"):
        make_source(f"parquet:{tmp_path}/y.parquet#columns=image:n", "train", seed=0, whole=True)


def test_a_system_message_is_the_records_own(tmp_path, images, paths):
    talk = [{"role": "system", "content": "Be brief."}, *openai(0, images)]
    rows = [{"messages": talk}, {"messages": openai(0, images)}]
    rows.append({"image": paths[0], "question": "q", "answer": "B", "response": RESPONSE, "system": "Be brief."})
    tokenizer = Tokenizer.from_folder("qwenla_jax/assets/tiny")
    settings = ProcessorSettings.from_json("qwenla_jax/assets/tiny/preprocessor_config.json")
    dataset = jsonl(write(tmp_path / "x.jsonl", rows))
    texts = [
        tokenizer.decode(to_sft_example(dataset[n], tokenizer, settings, ImageLayout(), "The run's.").ids_T)
        for n in range(3)
    ]
    assert [text.partition("<|im_end|>")[0] for text in texts] == [
        "<|im_start|>system\nBe brief.", "<|im_start|>system\nThe run's.", "<|im_start|>system\nBe brief."]  # fmt: skip


def test_a_second_question_is_refused_or_left_out(tmp_path, images, own):
    talk = openai(0, images) + [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "C"}]
    path = write(tmp_path / "x.jsonl", [{"messages": talk, "options": OPTIONS}])
    (problem,) = check(jsonl(path)).problems
    assert problem.reason == "several_turns" and "holds 2 questions" in problem.message
    assert told(make_source(f"{path}#turns=first", "train", seed=0, whole=True)[0]) == own[0]


USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "3"}


@pytest.mark.parametrize(
    "row, reason, message",
    [
        ({"messages": [BOT, USER]}, "conversation", r"messages\[0\] is from 'assistant'; expected a user and an"),
        ({"messages": [USER, USER]}, "conversation", r"messages\[1\] is from 'user'; expected a user and an assistant"),
        ({"messages": [USER, BOT, {"role": "tool"}]}, "conversation", r"messages\[2\] is from 'tool'; expected one of"),
        ({"messages": "q"}, "conversation", "messages is 'q'; expected a list of"),
        ({"messages": [{"role": "system", "content": "s"}]}, "conversation", "messages holds no question"),
        ({"messages": [USER]}, "field", "no answer: neither a column .answer, final_answer, .* nor an assistant's"),
        ({"messages": [USER | {"content": [{"type": "video", "video": "a.mp4"}]}, BOT]}, "video", "holds a video"),
        ({"messages": [USER | {"content": [{"type": "audio"}]}, BOT]}, "conversation", "expected parts of type text"),
        ({"messages": [USER | {"content": "<video>q"}, BOT]}, "image_absent", "has a place for a video"),
        ({"messages": [USER, BOT], "videos": ["a.mp4"]}, "video", "videos: records for training have images only"),
        ({"messages": [USER | {"content": "<image>q"}, BOT]}, "image_absent", "has places for 1 .* the record has 0"),
        ({"messages": [USER | {"content": "<image>q"}, BOT], "images": ["pics/0.0.png", "pics/1.0.png"]},
         "image_absent", "has places for 1 .* the record has 2"),
        ({"messages": [USER | {"content": [{"type": "image", "image": "pics/0.0.png"}, {"type": "text", "text": "q"}]}],
          "answer": "3", "image": "pics/1.0.png"}, "image_absent", "images are both in messages and in a column"),
        ({"messages": [USER, BOT | {"content": [{"type": "image"}]}]}, "conversation", "holds an image"),
        ({"messages": [USER, BOT], "image": "pics/none.png"}, "image_absent", "no such file beside x.jsonl"),
        ({"messages": [USER, BOT], "image": "https://host/a.png"}, "image_absent", "nothing is downloaded"),
        ({"messages": [USER, BOT], "image": {"height": 3}}, "image_absent", "image holds None for an image"),
        ({"messages": [USER, BOT], "image": "data:image/png;base64,$"}, "image_base64", "neither base64"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path, paths, row, reason, message):
    path = write(tmp_path / "x.jsonl", [row])
    (problem,) = check(jsonl(path)).problems
    assert problem.reason == reason
    with pytest.raises(ValueError, match=rf"x.jsonl:1.*{message}"):
        jsonl(path)[0]
