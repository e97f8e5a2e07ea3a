"""`qwenla serve` with the embedded checkpoint, in a process of its own.

Oracle: the official openai client; `inference.ask`, which knows nothing of the server; transformers' count of tokens.
"""

import base64
import collections
import io
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from transformers import AutoTokenizer

import qwenla_jax
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.serve.engine_loop import STEPS
from qwenla_jax.text.answers.match import extract_conclusion
from qwenla_jax.weights.hub import EMBEDDED

KEY = "sk-of-the-test"
QUESTION = "Is there a purple square?"
GRACE = 2
FLAGS = [
    "--port=0",
    "--max-model-len=160",
    '--limit-mm-per-prompt={"image": 2}',
    "--max-num-seqs=2",
    f"--grace-period={GRACE}",
    f"--api-key={KEY}",
    "--served-model-name=qwenla",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its process, its address and the file of its log."""
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as stderr:
        command = [sys.executable, "-m", "qwenla_jax", "serve", *FLAGS]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        line = process.stdout.readline()
        url = line.split()[2].removesuffix("/v1,")
        codes = []
        while not codes or codes[-1] != 200:
            assert process.poll() is None, log.read_text()
            try:
                codes.append(httpx.get(f"{url}/health").status_code)
            except httpx.ConnectError:
                pass
            time.sleep(0.1)
        assert set(codes) == {503, 200}
        yield process, url, log
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def scene():
    return make_scene(0, 1, 7).image


def messages(images, question=QUESTION):
    parts = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url, "detail": "auto"}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0).chat.completions.create


ROUTE = {"mode": "route", "keep_ratio": 0.25}


def test_answers_are_those_of_ask(server, scene):
    """Content, reasoning, sections, insertions with their attention, and counts, at once and in a stream."""
    _, url, _ = server
    checkpoint, theirs = qwenla_jax.load(EMBEDDED), AutoTokenizer.from_pretrained(EMBEDDED)
    images, look, inserted = [scene, make_scene(0, 1, 8).image], {"reattention": ROUTE}, []
    for temperature, seed in ((0.0, 0), (1.0, 2), (1.0, 18)):
        drawn = {"temperature": temperature, "seed": seed}
        want = qwenla_jax.ask(
            checkpoint, images, QUESTION, max_new_tokens=64, reattention="route", keep_ratio=0.25, **drawn
        )
        given = {"model": "qwenla", "messages": messages(images), **drawn}
        got = client(url)(**given, max_tokens=64, extra_body=look | {"return_reattention": True})
        message, conclusion = got.choices[0].message, extract_conclusion(want.text)
        assert conclusion and message.content == conclusion and got.choices[0].finish_reason == "stop"
        assert message.reasoning == want.text.partition("<CONCLUSION>")[0].strip()
        assert message.sections == want.to_dict()["sections"]
        assert message.reattention["text"] == want.text and message.reattention["skipped"] == want.skipped
        insertions = want.to_dict()["reattention"]
        assert rounded(message.reattention["insertions"]) == rounded(insertions)
        short = ("position", "offset", "selected_tokens", "visual_tokens")
        assert message.insertions == [{name: one[name] for name in short} for one in insertions]
        assert got.usage.completion_tokens == len(want.token_ids)
        turn = {"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": QUESTION}]}
        prompt = theirs(theirs.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))["input_ids"]
        assert got.usage.prompt_tokens == len(prompt) + 15 * len(images)  # an image has 16 tokens
        chunks = list(client(url)(**given, max_tokens=64, stream=True, extra_body=look))
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        reasoning = "".join(delta.model_extra.get("reasoning") or "" for delta in deltas)
        assert ("".join(delta.content or "" for delta in deltas), reasoning) == (message.content, message.reasoning)
        assert deltas[-1].sections == message.sections and deltas[-1].insertions == message.insertions
        assert len(deltas) > 4
        cut = client(url)(**given, max_tokens=9, extra_body=look).choices[0]
        assert cut.message.content == checkpoint.tokenizer.decode(want.token_ids[:9]) and cut.finish_reason == "length"
        assert cut.message.reasoning is None
        inserted += [one["selected_tokens"] for one in insertions]
    assert len(inserted) >= 2 and set(inserted) == {8}


def test_the_modes_of_reattention(server, scene):
    """Each by what it alone does, with the seed of an answer that reflects."""
    _, url, _ = server
    given = {"model": "qwenla", "messages": messages([scene]), "temperature": 1, "seed": 11, "max_tokens": 64}
    shown = {}
    for mode in ("none", "copy", "route", "vision_only", None):
        extra = {"reattention": {"mode": mode}} if mode else None
        message = client(url)(**given, extra_body=extra).choices[0].message
        assert "<REFLECTION>" in message.reasoning
        assert ("<REFLECTION></REFLECTION>" in message.reasoning) == (mode == "vision_only")
        shown[mode] = [one["selected_tokens"] for one in message.insertions]
    assert shown == {"none": [], "copy": [16], "route": [8], "vision_only": [16], None: [16]}
    fewer = client(url)(**given, extra_body={"reattention": {"max_insertions": 0}}).choices[0].message
    assert "<REFLECTION>" in fewer.reasoning and fewer.insertions == []


def test_the_attention_of_an_answer(server, scene):
    """The insertions are those of return_reattention; maps add up; and a stream gives the same answer in one piece."""
    _, url, _ = server
    given = {"model": "qwenla", "messages": messages([scene]), "temperature": 1, "seed": 11, "max_tokens": 64}
    asked = {"return_token_ids": True, "return_selection": True, "separate_reasoning": False}
    look = {"reattention": {"mode": "route", "keep_ratio": 0.3}}
    got = client(url)(**given, extra_body=asked | look | {"return_reattention": True}).choices[0]
    chunks = list(client(url)(**given, extra_body=asked | look, stream=True))
    last = chunks[-1].choices[0]
    content = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert got.message.content == content == got.message.reattention["text"] and got.message.reasoning is None
    assert last.token_ids == got.token_ids and last.delta.insertions == got.message.insertions
    full = got.message.reattention["insertions"]
    assert [one["images"] for one in got.message.insertions] == [one["images"] for one in full]
    assert [len(one["images"][0]["selected"]) for one in full] == [5]
    body = {"messages": messages([scene]), "token_ids": last.token_ids, "insertions": last.delta.insertions}
    found = httpx.post(f"{url}/v1/reattention/attention", headers={"Authorization": f"Bearer {KEY}"}, json=body)
    attention = found.json()
    assert found.status_code == 200 and rounded(attention["insertions"]) == rounded(full)
    assert "".join(attention["tokens"]) == content
    (image,) = attention["images"]
    for name in ("original", "inserted"):
        cells = np.frombuffer(base64.b64decode(image[name]), "<f4").reshape(len(last.token_ids), -1)
        np.testing.assert_allclose(cells.sum(1), attention[name], atol=1e-4)


def test_the_page_and_its_examples(server):
    """With their seeds the embedded checkpoint reflects, and what is shown stands again."""
    _, url, _ = server
    assert "Qwen Look Again" in httpx.get(url).text
    settings = httpx.get(f"{url}/page/settings.json").json()
    assert settings["model"] == "qwenla" and settings["key"] and settings["embedded"]
    for example in settings["examples"]:
        image = Image.open(io.BytesIO(httpx.get(f"{url}/{example['image']}").content))
        given = {"temperature": example["temperature"], "seed": example["seed"], "max_tokens": 100}
        for mode, tokens in (("route", 8), ("copy", 16)):
            extra = {"reattention": {"mode": mode, "keep_ratio": 0.5}, "separate_reasoning": False}
            asked = messages([image], example["question"])
            message = client(url)(model="qwenla", messages=asked, **given, extra_body=extra).choices[0].message
            names = [section["name"] for section in message.sections]
            assert names == ["SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"], (example, message)
            assert [one["selected_tokens"] for one in message.insertions] == [tokens], "choose another seed"


def rounded(value):
    """Numbers to five digits, for attention that programs of other shapes compute."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def test_requests_as_harnesses_send_them(server, scene):
    """n, seed, stop strings, log-probabilities, literal <image>, several turns, more tokens than there is room for."""
    _, url, _ = server
    ask = client(url)
    asked = messages([scene], "<image>How many circles are there? Answer:")
    asked = [
        {"role": "system", "content": "Be brief."},
        *asked,
        {"role": "assistant", "content": "2"},
        *messages([scene]),
    ]
    one = ask(model="qwenla", messages=asked, max_tokens=32768, temperature=0.7, seed=7, top_p=0.9, user="u")
    again = ask(model="qwenla", messages=asked, max_completion_tokens=150, temperature=0.7, seed=7, top_p=0.9, n=3)
    assert again.choices[0].message == one.choices[0].message
    assert len({choice.message.reasoning for choice in again.choices}) > 1
    assert one.choices[0].message.content and one.usage.total_tokens <= 160
    assert (one.choices[0].finish_reason == "length") == (one.usage.total_tokens == 160)
    text = ask(model="qwenla", messages=messages([scene]), temperature=0, logprobs=True)
    tokens = text.choices[0].logprobs.content
    whole = text.choices[0].message.reasoning + f"<CONCLUSION>{text.choices[0].message.content}</CONCLUSION>"
    assert "".join(token.token for token in tokens) == whole
    assert len(tokens) == text.usage.completion_tokens - 1 and all(token.logprob <= 0 for token in tokens)
    settings = {"model": "qwenla", "messages": messages([scene]), "logprobs": True}
    likely = {"temperature": 1, "seed": 3, "extra_body": {"top_k": 1}, "top_logprobs": 4}
    same = ask(**settings, **likely).choices[0].logprobs.content  # the most likely token at any temperature
    assert [(token.token, token.logprob) for token in same] == [(token.token, token.logprob) for token in tokens]
    for token in same:
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
        likelihoods = [each.logprob for each in token.top_logprobs]
        assert likelihoods == sorted(likelihoods, reverse=True) and len(likelihoods) == 4
    stream = [choice for chunk in ask(**settings, **likely, stream=True) for choice in chunk.choices]
    assert [token for choice in stream if choice.logprobs for token in choice.logprobs.content] == same
    # An answer that describes the scene in a reflection, as the greedy one repeats hardly a word.
    drawn, alone = settings | {"temperature": 1, "seed": 20}, {"reattention": {"mode": "none"}}
    words = ask(**drawn, extra_body=alone).choices[0].logprobs.content
    often = collections.Counter(token.token for token in words).most_common(1)[0]
    for name, value in (("frequency_penalty", 2), ("presence_penalty", 2), ("repetition_penalty", 5)):
        other = ask(**drawn, max_tokens=len(words), extra_body=alone | {name: value})
        assert sum(token.token == often[0] for token in other.choices[0].logprobs.content) < often[1]
    stops = ["</CAPTION>", "never"]
    cut = ask(model="qwenla", messages=messages([scene]), temperature=0, stop=stops, logprobs=True)
    assert len(cut.choices[0].logprobs.content) == cut.usage.completion_tokens
    assert cut.choices[0].finish_reason == "stop" and cut.usage.completion_tokens < text.usage.completion_tokens
    assert cut.choices[0].message.content == whole.partition("</CAPTION>")[0]
    with pytest.raises(openai.BadRequestError) as error:
        ask(model="qwenla", messages=messages([scene], "long " * 300))
    assert error.value.code == "context_length_exceeded"


def test_a_stream_has_the_log_probabilities_of_the_whole_answer(server, scene):
    """Of every token and each of its alternatives, in answers that end in the middle of a loop of the engine.

    By the model, at a limit or at a stop string; beside answers whose client leaves.
    """
    _, url, _ = server
    theirs, ends = AutoTokenizer.from_pretrained(EMBEDDED), set()
    given = {"model": "qwenla", "messages": messages([scene]), "temperature": 1, "seed": 5, "n": 3, "logprobs": True}
    for more in ({}, {"max_tokens": 21}, {"stop": ["</CAPTION>", "circle"]}):
        asked = given | more | {"top_logprobs": 5, "extra_body": {"return_token_ids": True}}
        leaving = client(url)(**given | {"seed": 6}, stream=True)
        next(iter(leaving))
        entries = [[], [], []]
        for number, chunk in enumerate(client(url)(**asked, stream=True)):
            if number == 4:
                leaving.close()
            for choice in chunk.choices:
                entries[choice.index] += choice.logprobs.content if choice.logprobs else []
        for row, choice in zip(entries, client(url)(**asked).choices, strict=True):
            assert row == choice.logprobs.content
            ids = [i for i in choice.token_ids if i != theirs.eos_token_id]  # the stop token has no entry
            assert [entry.token for entry in row] == [theirs.decode([i]) for i in ids]
            assert all(len(entry.top_logprobs) == 5 for entry in row)
            if len(choice.token_ids) % STEPS:
                ends.add((choice.finish_reason, "stop" in more))
    assert ends >= {("stop", False), ("length", False), ("stop", True)}


def test_sigterm_lets_running_answers_end(server, scene):
    """And the log has neither key nor prompt nor image in it."""
    process, url, log = server
    stream = client(url)(model="qwenla", messages=messages([scene]), stream=True, n=4, temperature=1, seed=1)
    first = next(iter(stream))
    process.send_signal(signal.SIGTERM)
    codes = []
    while not codes or codes[-1] == 200:
        codes.append(httpx.get(f"{url}/health").status_code)
    assert codes[-1] == 503
    with pytest.raises(openai.InternalServerError) as error:
        client(url)(model="qwenla", messages=messages([scene]))
    assert error.value.status_code == 503 and error.value.code == "draining"
    chunks = [first, *stream]
    assert sorted(c.index for chunk in chunks for c in chunk.choices if c.finish_reason) == [0, 1, 2, 3]
    assert process.wait(60) == 0
    text = log.read_text()
    assert "tokens in" in text
    for secret in (KEY, "purple", "Be brief", "iVBOR", "long"):
        assert secret not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit-mm-per-prompt=3"], 'expected {"image": N} with N of 1 to 256'),
        (["--allowed-origins=x"], "expected ["),
        (["--port=99999"], "--port: got '99999'"),
        (["--host=no.such.host.invalid"], "--host, --port: no.such.host.invalid:8000"),
        (["--answer=all"], "invalid choice: 'all'"),
    ],
)
def test_flags(flags, message, capsys):
    from qwenla_jax.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["serve", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name"),
    [("tiny", "tiny"), ("Org/Model-3B", "Org/Model-3B"), ("Org/Model-3B@main", "Org/Model-3B"), ("FOLDER/own", "own")],
)
def test_the_model_is_called_by_its_name_on_the_hub_or_its_folder(model, name, tmp_path, monkeypatch):
    from qwenla_jax.cli import serve as command
    from qwenla_jax.serve import http_server

    (tmp_path / "own").mkdir()
    served = []
    monkeypatch.setattr(http_server, "serve", lambda options, *_: served.append(options))
    monkeypatch.setattr(command, "keep_compiled_programs", lambda: None)
    assert command.main(["--port=0", f"--model={model.replace('FOLDER', str(tmp_path))}"]) == 0
    assert served[0].served_model_name == (name,)


def test_a_model_that_is_not_there_ends_it(tmp_path):
    command = [sys.executable, "-m", "qwenla_jax", "serve", "--port=0", f"--model={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 2 and f"qwenla serve: --model: {tmp_path}" in done.stderr and "config.json" in done.stderr
