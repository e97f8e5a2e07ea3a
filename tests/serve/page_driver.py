"""What `page_check.py` drives: servers, and a page in a browser."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import BrowserContext
from server_process import ServerProcess

SLOW = 300_000  # ms; programs compile


@contextlib.contextmanager
def server(python: str, *flags: str) -> Iterator[str]:
    """A server of its own, ready; its address."""
    with tempfile.TemporaryDirectory() as folder:
        started = ServerProcess(Path(folder) / "log", ("--grace-period=0", *flags), python=python)
        try:
            yield f"{started.url}/"
        finally:
            started.process.terminate()
            started.process.wait()


class Check:
    """A page under check. Its requests stay with the server, and its console stays empty."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.url, self.page = url, context.new_page()
        self.page.set_default_timeout(SLOW)
        self.complaints: list[str] = []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda r: self._asked(r.url))
        self.page.goto(url)
        self.page.wait_for_selector("#server.ready", timeout=SLOW)

    def _asked(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.complaints.append(f"asked for {url[:80]}")

    def quiet(self) -> None:
        """Nothing was logged, and nothing asked of another host."""
        assert not self.complaints, self.complaints

    def ask(self, panels: int = 1) -> None:
        """Asks, and waits for answers and attention."""
        self.page.click("#go")
        self.page.wait_for_function(
            "n => document.querySelectorAll('.cards.ready').length === n && document.querySelector('#stop').hidden",
            arg=panels,
            timeout=SLOW,
        )

    def fits(self, state: str) -> None:
        """No horizontal overflow, and nothing serious for axe."""
        wide = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], f"{state}: {wide[0]} px in {wide[1]}"
        violations = Axe().run(self.page).response["violations"]
        bad = [v for v in violations if v["impact"] in ("serious", "critical")]
        assert not bad, f"{state}: {json.dumps(bad, indent=1)[:3000]}"
        for violation in violations:
            print(f"    axe, {state}: {violation['impact']}: {violation['id']}: {violation['help']}")

    def pixels(self, selector: str) -> str:
        """What a canvas shows."""
        return self.page.eval_on_selector(selector, "canvas => canvas.toDataURL()")

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.page.text_content(selector) or ""


def shoot(check: Check, shots: Path | None, name: str, full: bool) -> None:
    """A screenshot."""
    if shots is None:
        return
    page = check.page
    if not full:
        page.evaluate("document.querySelector('.panel').scrollIntoView()")
    page.mouse.move(2, 2)
    image = Image.open(io.BytesIO(page.screenshot(full_page=full))).convert("RGB")
    image = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    image.save(shots / f"{name}.png", optimize=True)
