"""Drives the page of `qwenla serve` in a browser: every feature, three widths, both themes, axe, and screenshots.

No part of the test suite, for it needs a browser:

    pip install playwright axe-playwright-python pillow && apt-get install chromium
    python tests/serve/page_check.py --chromium=/usr/bin/chromium --shots=docs/figures

Oracles: axe-core; the server's own answers; bash and the openai client, which run the code that the page shows; a
second page that opens the exported file. Servers run with `--python`, which may be of another environment.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from page_driver import SLOW, Check, server, shoot
from playwright.sync_api import Browser, expect, sync_playwright
from playwright.sync_api import TimeoutError as NotInTime
from server_process import metric

WIDTHS = {375: 812, 768: 1024, 1440: 900}
KEY = "sk-of-the-check"
EVIL = "<img src=x onerror=document.title='hacked'><script>document.title='hacked'</script> $HOME `id` \\ \"q\" 'q'"
MARKED = "circle or square?"


def first_answer(check: Check) -> None:
    """The example is ready; the answer streams in cards; an eye shows its tokens; a word its attention."""
    page = check.page
    assert page.input_value("#question") and "Skip" in check.text(".skip")
    box = page.locator("#go").bounding_box()
    size = page.viewport_size
    assert box and size and box["y"] + box["height"] <= size["height"], f"the button is below the fold: {box}"
    page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => window.seen.push(document.querySelector('.cards')"
        "?.textContent.length ?? 0)).observe(document.querySelector('#panels'), {subtree: true, childList: true}) }"
    )
    plain = None
    page.click("#go")
    page.wait_for_selector(".look")
    page.wait_for_selector("#export:not([hidden])")
    lengths = page.evaluate("window.seen")
    assert len({n for n in lengths if n}) > 3, f"it did not stream: {lengths}"
    names = page.locator(".card h4").all_text_contents()
    assert names == ["SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"], names
    assert check.text("button.look") == "Look 1: 8 of 16 tokens inserted"
    expect(page.locator("button.look")).to_have_attribute("aria-pressed", "true")
    selected = check.pixels(".stage canvas")
    page.wait_for_selector(".cards.ready", timeout=SLOW)
    assert page.locator(".chart .look-mark").count() == 1 and page.locator(".pair figure").count() == 2
    assert "before the look" in check.text(".pair") and "in the reflection" in check.text(".pair")
    assert "8 most attended of 16" in check.text(".caption")
    page.hover(".card.caption .word:last-child")
    assert "“objects”" in check.text(".caption") and "on inserted tokens: none" in check.text(".pair")
    assert check.pixels(".stage canvas") != selected
    page.hover(".card.conclusion .word")
    assert "none" not in check.text(".pair") and page.get_attribute(".chart .cursor", "visibility") == "visible"
    page.mouse.move(2, 2)
    assert check.pixels(".stage canvas") == selected != plain
    page.focus("button.look")
    page.keyboard.press("Shift+Tab")  # the words are one stop of the keyboard, the first in the first card
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "big" and "“big”" in check.text(".caption")
    assert "“big”" in check.text(".panel .unseen")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.closest('.card').className") == "card conclusion"
    page.evaluate("document.activeElement.blur()")


def words_stay(check: Check) -> None:
    """What a word shows moves no word away from under the pointer."""
    page = check.page
    for name in ("summary", "reflection", "conclusion"):
        word = page.locator(f".card.{name} .word").last
        word.hover()
        before = word.bounding_box()
        page.wait_for_timeout(300)
        assert word.bounding_box() == before and page.locator(".word:hover").count() == 1, name
    page.mouse.move(2, 2)


def comparison(check: Check) -> None:
    """Three answers of one seed, equal up to the reflection; the slider says what ROUTE keeps."""
    page = check.page
    page.focus("#keep")
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    assert check.text("#keep-shown") == "25%"
    page.check("[value=compare]")
    check.ask(3)
    panels = page.locator(".panel")
    said = [panels.nth(i).locator(".card").all_text_contents() for i in range(3)]
    assert said[0][:3] == said[1][:3] == said[2][:3]
    looks = [panels.nth(i).locator("button.look").all_text_contents() for i in range(3)]
    assert looks == [[], ["Look 1: all 16 tokens inserted"], ["Look 1: 4 of 16 tokens inserted"]]
    assert "text alone" in panels.nth(0).inner_text()


def images(check: Check, folder: Path) -> None:
    """Chosen, dropped and pasted; what is no image is refused; painted over by pointer and by keyboard."""
    page = check.page
    page.check("[value=route]")
    page.locator(".example").nth(0).click()
    page.wait_for_function("document.querySelector('#question').value.startsWith('What color')")
    example = check.pixels("#image")
    scene = urllib.request.urlopen(f"{check.url}page/scene-94.png").read()
    (folder / "scene.png").write_bytes(scene)
    (folder / "note.png").write_text("no image")
    page.set_input_files("#file", folder / "scene.png")
    page.wait_for_function("old => document.querySelector('#image').toDataURL() !== old", arg=example)
    chosen = check.pixels("#image")
    page.set_input_files("#file", folder / "note.png")
    expect(page.locator("#error")).to_contain_text("note.png is no image")
    hand_over = """([data, kind]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "given.png", {type: "image/png"}));
        const given = kind === "drop" ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true})
          : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
        document.querySelector("#drop").dispatchEvent(given);
    }"""
    for kind, number in (("drop", 214), ("paste", 344)):
        data = urllib.request.urlopen(f"{check.url}page/scene-{number}.png").read()
        before = check.pixels("#image")
        page.evaluate(hand_over, [base64.b64encode(data).decode(), kind])
        page.wait_for_function("old => document.querySelector('#image').toDataURL() !== old", arg=before)
    expect(page.locator("#error")).to_be_hidden()
    assert chosen != check.pixels("#image")


def painting(check: Check) -> None:
    """The yellow triangle is painted over, and the model is asked again."""
    page = check.page
    page.check("[value=route]")
    page.locator(".example").nth(0).click()
    page.wait_for_function("document.querySelector('#question').value.startsWith('What color')")
    check.ask()
    clean = check.pixels("#image")
    page.click("#paint")
    box = page.locator("#image").bounding_box()
    assert box
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    page.eval_on_selector("#paint-size", "e => { e.value = 0.4; e.dispatchEvent(new Event('input', {bubbles: true})) }")
    page.mouse.move(*at(0.18, 0.2))
    page.mouse.down()
    page.mouse.move(*at(0.22, 0.24), steps=4)
    page.mouse.up()
    painted = check.pixels("#image")
    assert painted != clean
    check.ask()
    assert "Without paint it answered “purple”" in check.text("#remark")
    page.focus("#image")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    assert check.pixels("#image") != painted
    page.click("#paint-undo")
    assert check.pixels("#image") == painted
    page.click("#paint-clear")
    assert check.pixels("#image") == clean
    page.click("#paint")


def code(check: Check, python: str, folder: Path) -> None:
    """The commands that the page shows give the answer that it shows; a question with quotes and markup too."""
    page = check.page
    page.click("#code summary")
    for question in ("What color is the big triangle?", EVIL):
        page.fill("#question", question)
        check.ask()
        assert page.title() == "Qwen Look Again"
        want = page.evaluate("document.querySelector('.card.conclusion .text')?.textContent.trim() ?? ''")
        with page.expect_download() as download:
            page.click("#save-image")
        download.value.save_as(folder / "image.png")
        page.click("[data-copy=curl]")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == check.text("#curl")
        answer = subprocess.run(["bash", "-c", copied], cwd=folder, capture_output=True, text=True, check=True).stdout
        message = json.loads(answer)["choices"][0]["message"]
        assert want in message["content"], (want, message)
        page.click("[data-copy=python]")
        (folder / "ask.py").write_text(page.evaluate("navigator.clipboard.readText()"))
        run = subprocess.run([python, "ask.py"], cwd=folder, capture_output=True, text=True)
        assert run.returncode == 0 and message["content"] in run.stdout, run
    page.click("#code summary")


def exported(check: Check, browser: Browser, folder: Path) -> None:
    """The file shows the same without scripts and without a network; what was asked is text in it."""
    page = check.page
    page.fill("#question", EVIL)
    page.check("[value=compare]")
    check.ask(3)
    with page.expect_download() as download:
        page.click("#export")
    path = folder / "export.html"
    download.value.save_as(path)
    text = path.read_text()
    assert "default-src 'none'" in text and not re.search(
        r"<script|https?://(?!www\.w3\.org)", text.partition("<body")[0]
    )
    context = browser.new_context(offline=True, viewport={"width": 375, "height": 812})
    shown = context.new_page()
    asked: list[str] = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(path.as_uri())
    assert shown.text_content("h1") == EVIL and "hacked" not in shown.title().partition(":")[0]
    assert shown.locator("script").count() == 0 and shown.locator("img[src=x]").count() == 0
    assert all(url.startswith(("file:", "data:")) for url in asked)
    there = lambda page: [t.strip() for t in page.locator(".card .text").all_text_contents()]  # noqa: E731
    assert there(shown) == there(page) and there(page), (there(shown), there(page))
    assert all(shown.locator("img").evaluate_all("images => images.map((image) => image.naturalWidth > 0)"))
    assert shown.evaluate("document.documentElement.scrollWidth") <= 375
    assert not [v for v in Axe().run(shown).response["violations"] if v["impact"] in ("serious", "critical")]
    context.close()


def hostile(check: Check, folder: Path) -> None:
    """Whatever a model writes is text, on the page and in the file."""
    page = check.page
    said = f"{EVIL}<SUMMARY>{EVIL}</SUMMARY><REFLECTION>&lt;b&gt;{EVIL}"
    last = {"index": 0, "delta": {"insertions": []}, "finish_reason": "stop", "token_ids": [1, 2, 3]}
    events = [{"choices": [{"index": 0, "delta": {"content": said}, "finish_reason": None}]}, {"choices": [last]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.check("[value=copy]")
    check.ask()
    page.unroute("**/v1/chat/completions")
    shown = "".join(page.locator(".panel .card .text").all_text_contents())
    assert shown.count(EVIL) == 3 and "&lt;b&gt;" in shown
    assert page.locator(".panel :is(img, script, b)").count() == 0 and page.title() == "Qwen Look Again"
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(folder / "hostile.html")
    opened = page.context.browser.new_page()
    opened.goto((folder / "hostile.html").as_uri())
    assert opened.locator("script, img[src=x], .card b").count() == 0 and "hacked" not in opened.title()[:20]
    assert "".join(opened.locator(".card .text").all_text_contents()).count(EVIL) == 3
    opened.close()


def stopping(check: Check) -> None:
    """Stop ends the answer on the server too; too long a question is refused in the server's words."""
    page = check.page
    page.check("[value=route]")
    page.click("text=Sampling")
    page.fill("#temperature", "2")  # answers ramble on
    page.fill("#tokens", "2000")
    aborted = metric(check.url, 'vllm:request_success_total{finished_reason="abort"')
    for seed in range(40):  # until an answer is long enough to be stopped
        page.fill("#seed", str(seed))
        page.click("#go")
        page.wait_for_selector(".card")
        try:
            page.click("#stop", timeout=300)
            break
        except NotInTime:
            expect(page.locator("#stop")).to_be_hidden(timeout=SLOW)
    expect(page.locator(".state").first).to_have_text("stopped")
    expect(page.locator("#stop")).to_be_hidden()
    for _ in range(100):
        if metric(check.url, 'vllm:request_success_total{finished_reason="abort"') == aborted + 1:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the server went on")
    page.fill("#question", "long " * 3000)
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("tokens, images included; at most")
    check.complaints = [text for text in check.complaints if "400" not in text]  # the browser logs the status
    page.fill("#question", MARKED)
    page.fill("#temperature", "0")
    page.fill("#tokens", "64")
    check.ask()
    expect(page.locator("#error")).to_be_hidden()
    if page.locator("#no-reflection").is_visible():
        page.click("#seek")
        page.wait_for_selector(".look, #error:not([hidden])", timeout=SLOW)
        page.wait_for_selector("#stop", state="hidden", timeout=SLOW)
        assert page.locator("button.look").count() or "12 seeds" in check.text("#error")


def looks_right(browser: Browser, url: str, shots: Path | None) -> None:
    """Every width in both themes: no overflow, nothing for axe, the whole by keyboard."""
    for width, height in WIDTHS.items():
        for theme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            check = Check(context, url)
            name = f"{width} {theme}"
            check.fits(f"{name} start")
            if (width, theme) == (1440, "light"):
                first_answer(check)
            else:
                check.ask()
            check.fits(f"{name} answer")
            words_stay(check)
            shoot(check, shots, f"page_{width}_{theme}", full=width > 375)
            check.page.check("[value=compare]")
            check.ask(3)
            check.page.click("text=Sampling")
            check.page.click("#code summary")
            check.page.click("#paint")
            check.fits(f"{name} compare")
            check.page.evaluate("for (const open of document.querySelectorAll('details')) open.open = false")
            check.page.click("#paint")
            shoot(check, shots, f"page_compare_{width}_{theme}", full=width > 375)
            check.quiet()
            print(f"  {name}: fits, axe finds nothing serious")
            context.close()


def with_key(browser: Browser, python: str) -> None:
    """The key is asked for, is in no storage, and opens the server; a server that is gone is said to be."""
    context = browser.new_context()
    with server(python, f"--api-key={KEY}") as url:
        check = Check(context, url)
        page = check.page
        page.click("#go")
        expect(page.locator("#error")).to_contain_text("expected Authorization: Bearer KEY")
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", KEY)
        check.ask()
        stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert stored == [0, 0, ""] and KEY not in page.content() and not context.cookies()
        inline = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
        with contextlib.suppress(Exception):
            page.evaluate(f"() => {{ {inline} }}")
        assert page.evaluate("window.ran") is None
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("The server cannot be reached")
    context.close()


def main() -> int:
    """Runs all checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", metavar="FILE", help="the browser; default: playwright's own")
    parser.add_argument("--python", metavar="FILE", default=sys.executable, help="runs servers and the shown program")
    parser.add_argument("--shots", metavar="DIR", type=Path, help="folder for screenshots; default: none are taken")
    parser.add_argument("--quick", action="store_true", help="one width and theme, without screenshots")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    launch: dict[str, Any] = {"executable_path": args.chromium} if args.chromium else {}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as name:
        browser = playwright.chromium.launch(args=["--no-sandbox"], **launch)
        folder = Path(name)
        with server(args.python) as url:
            if not args.quick:
                looks_right(browser, url, args.shots)
            context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            check = Check(context, url)
            for step in (comparison, painting):
                step(check)
                print(f"  {step.__name__}: {(step.__doc__ or '').strip()}")
            images(check, folder)
            print(f"  images: {images.__doc__}")
            check.page.locator(".example").nth(0).click()
            code(check, args.python, folder)
            print(f"  code: {code.__doc__}")
            exported(check, browser, folder)
            print(f"  exported: {exported.__doc__}")
            hostile(check, folder)
            print(f"  hostile: {hostile.__doc__}")
            stopping(check)
            print(f"  stopping: {stopping.__doc__}")
            check.quiet()
        with_key(browser, args.python)
        print(f"  with_key: {with_key.__doc__}")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
