"""200 real questions with their images: ids and pixel values as transformers makes them of the same files.

The ids' oracle is the released chat template (the copy that TRL brings along), rendered and tokenized by transformers;
the pixels' oracle is its image processor with the published settings, free and under the paper's two caps.
"""

import dataclasses
import json
from importlib import resources

import numpy as np
import pytest
from PIL import Image, ImageOps

from qwenla_jax.data.batching.example import to_prompt_example
from qwenla_jax.data.images.decode import open_image
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings, smart_resize
from qwenla_jax.data.record import Record
from qwenla_jax.text.tokenizer import Tokenizer

COUNT = 200
SYSTEM = "You are a helpful assistant."
LAYOUT = ImageLayout()
CAPS = {"published": None, "BRPO": 640 * 480, "SFT": 262_144}
# Free, a large image takes seconds on both sides: those beyond are compared under the caps only.
FREE_PIXELS = 400_000


def _pairs(data):
    """(name, question, path) from three sets, in their files' order; those of one image, which their path names."""
    for line in (data / "mathvision" / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield f"mathvision {row['id']}", row["question"], data / "mathvision" / row["image"]
    for row in json.loads((data / "we_math" / "data" / "testmini.json").read_text(encoding="utf-8")):
        yield (
            f"we_math {row['key']} {row['question number']}",
            f"{row['question']}\n{row['option']}",
            data / "we_math" / "data" / row["image_path"],
        )
    for folder, name in (("Multiple_Choice", "multiple_choice"), ("Free_Response", "free_response")):
        subjects = json.loads((data / "scemqa" / folder / f"{name}.json").read_text(encoding="utf-8"))
        for rows in subjects.values():
            for row in rows:
                (path,) = (data / "scemqa" / folder).glob(row["ImagePath"] + ".*")
                yield f"scemqa {folder} {row['ImagePath']}", row["Question"], path


@pytest.fixture(scope="module")
def pairs(shared_data):
    """200 of the pairs, spread over the three sets."""
    result = list(_pairs(shared_data))
    assert len(result) >= COUNT and all(path.is_file() for _, _, path in result)
    chosen = [result[i] for i in np.linspace(0, len(result) - 1, COUNT).round().astype(int)]
    assert len({(question, path) for _, question, path in chosen}) == COUNT
    assert {name.split()[0] for name, _, _ in chosen} == {"mathvision", "we_math", "scemqa"}
    return chosen


@pytest.fixture(scope="module")
def published(shared_data):
    return ProcessorSettings.from_json(shared_data / "configs" / "preprocessor_config.json")


@pytest.fixture(scope="module")
def tokenizers(shared_data):
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "tokenizer"
    return Tokenizer.from_folder(folder).with_tags(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def template():
    pytest.importorskip("trl")
    return (resources.files("trl") / "chat_templates" / "qwen2_5_vl.jinja").read_text(encoding="utf-8")


def _official_pixels(path, settings, shared_data):
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = pil.Qwen2VLImageProcessorPil.from_pretrained(shared_data / "configs")
    size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    with Image.open(path) as image:
        out = processor(images=[ImageOps.exif_transpose(image)], size=size, return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"].tolist()


def _official_ids(question, grid, theirs, template, system):
    """The template's text, the one placeholder widened as transformers' processor does, tokenized by transformers."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    tokens = grid[0] * grid[1] * grid[2] // 4
    return theirs.encode(text.replace("<|image_pad|>", "<|image_pad|>" * tokens, 1), add_special_tokens=False)


@pytest.mark.slow
@pytest.mark.parametrize("cap", CAPS)
def test_ids_and_pixels(pairs, published, tokenizers, template, shared_data, cap):
    tok, theirs = tokenizers
    settings = published if CAPS[cap] is None else dataclasses.replace(published, max_pixels=CAPS[cap])
    compared = shrunk = 0
    for name, question, path in pairs:
        image = open_image(path, name)
        if CAPS[cap] is None and image.width * image.height > FREE_PIXELS:
            continue
        record = Record(name, (image,), question, "", None, "question")
        # None has the template make up its system turn; another text replaces it.
        for given, ours in ((None, SYSTEM), ("Answer in the five sections.", "Answer in the five sections.")):
            example = to_prompt_example(record, tok, settings, LAYOUT, ours)
            frame = example.frames[0]
            grid = [1, frame.rows * 2, frame.cols * 2]
            assert example.ids_T.tolist() == _official_ids(question, grid, theirs, template, given), name
        expected, official_grid = _official_pixels(path, settings, shared_data)
        assert official_grid == [grid], name
        assert cap == "published" or frame.rows * frame.cols * 784 <= CAPS[cap], name
        merged = frame.patches_SxC.reshape(-1, 4, 1176)[frame.gather_M].reshape(-1, 1176)
        np.testing.assert_array_equal(merged, expected, err_msg=name)
        compared += 1
        shrunk += smart_resize(image.height, image.width, 28, 3136, 12_845_056) != (
            frame.rows * 28,
            frame.cols * 28,
        )
    assert compared == COUNT if CAPS[cap] else compared > COUNT * 0.7, compared
    assert shrunk > 5 if CAPS[cap] else shrunk == 0, shrunk
