"""``python -m tests.browser.screenshots [FOLDER]``: pictures of every tab.

In both themes and two widths they go to ``build/screenshots``; those that the README shows are
taken first, made small, and go to ``docs/images`` as well. Two runs of the sample are trained for
them, which takes some minutes; with a FOLDER they stay there and are used again the next time.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.conftest import CHROMIUM, PATIENCE_MS, Server

ROOT = Path(__file__).parent.parent.parent
ALL = ROOT / "build" / "screenshots"
SHOWN = ROOT / "docs" / "images"
TABS = ("data", "train", "chat", "changes", "export")
WIDTHS = (1280, 420)
# What the documentation shows: (tab, theme, width).
CHOSEN = (
    ("data", "light", 1280),
    ("train", "dark", 1280),
    ("train", "dark", 420),
    ("chat", "light", 1280),
    ("changes", "dark", 1280),
    ("export", "light", 1280),
)
_COLOURS = 128


def main() -> int:
    """Do the whole job once and take the pictures of it."""
    expect.set_options(timeout=PATIENCE_MS)
    for folder in (ALL, SHOWN):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as tool:
        place = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        server = Server(place).start()
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
            page.set_default_timeout(PATIENCE_MS)
            page.goto(server.url)
            if not server.runs_dir.exists():
                _photograph_empty(browser, server.url)
                _train(page, "first-try", rank=4, steps=40)
                _train(page, "talks-like-a-pirate", rank=8, steps=160)
            if not server.exports_dir.exists() or not any(server.exports_dir.iterdir()):
                _export(page)
            page.close()
            looks = [(theme, width) for theme in ("light", "dark") for width in WIDTHS]
            shown = {look: [tab for tab, *of in CHOSEN if tuple(of) == look] for look in looks}
            for look, tabs in shown.items():
                _photograph(browser, server.url, tabs, *look)
            _make_small()
            for look, tabs in shown.items():
                _photograph(browser, server.url, [t for t in TABS if t not in tabs], *look)
        finally:
            browser.close()
            server.stop()
    return 0


def _wait(page: Page, place: str, text: str) -> None:
    """Until it is there; what a notice says instead, in red, ends everything at once."""
    found = page.locator(place).filter(has_text=text).last
    problem = page.locator(".note.bad:visible")
    expect(found.or_(problem).first).to_be_visible(timeout=10 * PATIENCE_MS)
    if problem.count():
        raise SystemExit(f"{page.url} says: {problem.first.inner_text()}")


def _make_small() -> None:
    """Those that the README shows, in few colours."""
    for tab, theme, width in CHOSEN:
        name = f"{tab}-{theme}-{width}.png"
        Image.open(ALL / name).convert("RGB").quantize(_COLOURS).save(SHOWN / name, optimize=True)


def _train(page: Page, name: str, **options: object) -> None:
    page.get_by_role("tab", name="Data").click()
    page.locator("#data-sample").click()
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-start")).to_have_text("Start training")
    for field, value in {"name": name, **options}.items():
        page.locator(f"#train-{field} :is(input, textarea)").fill(str(value))
    page.locator("#train-start").click()
    _wait(page, "#run-status .run-name", name)
    _wait(page, "#run-status", "Completed")


def _export(page: Page) -> None:
    page.get_by_role("tab", name="Export").click()
    page.locator("#export-format").get_by_text("gguf", exact=True).click()
    page.locator("#export-start").click()
    _wait(page, "#export-files a", ".gguf")


def _photograph_empty(browser, url: str) -> None:
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    for tab in TABS:
        _open(page, url, tab)
        page.screenshot(path=ALL / f"{tab}-empty.png", full_page=True)
    page.close()


def _photograph(browser, url: str, tabs: Sequence[str], theme: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.set_default_timeout(PATIENCE_MS)
    for tab in tabs:
        _open(page, url, tab)
        if tab == "train":
            expect(page.locator("#train-start")).to_have_text("Start training")
            _wait(page, ".plan", "Estimated memory")
            for name in ("talks-like-a-pirate", "first-try"):
                page.locator(f"[data-compare={name}]").click()
                expect(page.locator(f"[data-compare={name}]")).to_be_checked()
        elif tab == "chat":
            page.locator("#chat-message textarea").fill("What is the capital of France?")
            page.locator("#chat-send").click()
            _wait(page, "#chat-pace", "tokens/s")
            expect(page.locator("#chat-stop")).to_be_disabled()
            # Once more, because the first answer's pace has the model's first touch in it.
            page.locator("#chat-pace p").evaluate("said => { said.textContent = ''; }")
            page.locator("#chat-again").click()
            _wait(page, "#chat-pace", "tokens/s")
            _wait(page, "#chat-base .bot", ".")
            expect(page.locator("#chat-stop")).to_be_disabled()
        elif tab == "changes":
            page.locator("#changes-measure").click()
            _wait(page, "#changes-result", "down_proj")
        elif tab == "export":
            _wait(page, "#export-size", "free on this disk")
        elif tab == "data":
            _wait(page, "#data-example", "Arr")
        # Drawn and at rest: charts settle with the next tick.
        page.wait_for_timeout(1500)
        page.mouse.move(0, 0)
        page.screenshot(path=ALL / f"{tab}-{theme}-{width}.png", full_page=True)
    page.close()


def _open(page: Page, url: str, tab: str) -> None:
    page.goto(f"{url}/#{tab}")
    page.reload()
    page.locator(f'#tabs [role="tab"][data-tab-id={tab}][aria-selected="true"]').wait_for()
    page.wait_for_timeout(1500)


if __name__ == "__main__":
    sys.exit(main())
