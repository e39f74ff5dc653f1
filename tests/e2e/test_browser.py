"""The page in a real browser: it draws without complaint, its filters and keys work, and nothing covers anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_folder

from upturn.report.page import write_page

sync = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")

SIZES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--headless=new"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(run_folder.whole(tmp_path_factory.mktemp("run"))).as_uri()


class Opened:
    """A page that was opened, and everything it complained about."""

    def __init__(self, browser: Any, address: str, size: str = "desk", **settings: Any) -> None:
        self.context = browser.new_context(viewport=SIZES[size], offline=True, **settings)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self._check(request.url))
        self.page.goto(address)

    def _check(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.complaints.append(url)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.complaints == []

    def told(self) -> str:
        """What the browser of drafts says is shown."""
        return self.page.locator("#browser output").inner_text()

    def kinds(self) -> set[str]:
        """Kinds of the chains that are shown."""
        return set(self.page.locator("details.chain:visible").evaluate_all("all => all.map(one => one.dataset.kind)"))

    def open_chains(self) -> list[int]:
        """Places of the open chains among those that are shown."""
        return self.page.locator("details.chain:visible").evaluate_all(
            "all => all.flatMap((one, place) => one.open ? [place] : [])"
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_without_complaint_and_fits_the_screen(browser: Any, address: str, size: str, scheme: str):
    with Opened(browser, address, size, color_scheme=scheme) as opened:
        page = opened.page
        width = SIZES[size]["width"]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("h1").inner_text().startswith("It refines: turn 2 is right 29.0 points more often")
        assert page.locator("svg:visible").count() == 6
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width, "also with everything open"


COVERED = """
() => [...document.querySelectorAll('svg')].filter(svg => svg.getClientRects().length).flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent.trim(), text.getBoundingClientRect()]);
  const covers = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
  const found = [];
  boxes.forEach(([one, a], place) => boxes.slice(place + 1).forEach(([other, b]) => {
    if (one && other && covers(a, b)) found.push(`${svg.querySelector('title').textContent}: ${one} / ${other}`);
  }));
  const frame = document.documentElement.clientWidth;
  boxes.forEach(([one, a]) => { if (a.left < 0 || a.right > frame) found.push(`outside: ${one}`); });
  return found;
})
"""


@pytest.mark.parametrize("size", SIZES)
def test_no_label_of_a_figure_covers_another(browser: Any, address: str, size: str):
    with Opened(browser, address, size) as opened:
        assert opened.page.evaluate(COVERED) == []


def test_the_filters_of_the_drafts_work(browser: Any, address: str):
    with Opened(browser, address) as opened:
        page = opened.page
        assert opened.told() == "1 to 12 of 60 chains"
        page.get_by_label("right → wrong").check()
        assert (opened.told(), opened.kinds()) == ("1 to 2 of 2 chains", {"broken"})
        page.get_by_label("base", exact=True).check()
        assert opened.told() == "1 to 12 of 20 chains"
        page.get_by_label("Later chains").click()
        assert opened.told() == "13 to 20 of 20 chains"
        assert page.get_by_label("Later chains").is_disabled()
        page.locator("[name=path]").select_option("wr")
        assert opened.told() == "No chain is like this."
        page.get_by_label("wrong → right").check()
        assert (opened.told(), opened.kinds()) == ("1 to 2 of 2 chains", {"fixed"})
        page.get_by_role("button", name="Clear").click()
        page.wait_for_function("document.querySelector('#browser output').textContent.includes('of 60')")
        page.locator("[name=words]").fill("שלום")
        assert opened.told() == "1 to 1 of 1 chains"
        page.locator("[name=words]").fill("")
        page.locator("[name=task]").select_option("keywords")
        assert opened.told() == "1 to 12 of 60 chains"


def test_chains_open_by_keyboard_and_cross_the_pages(browser: Any, address: str):
    with Opened(browser, address) as opened:
        page = opened.page
        assert opened.open_chains() == [0]
        page.keyboard.press("j")
        assert opened.open_chains() == [1]
        assert page.evaluate("document.activeElement.matches('details[open] > summary')")
        for _ in range(11):
            page.keyboard.press("j")
        assert (opened.told(), opened.open_chains()) == ("13 to 24 of 60 chains", [0])
        page.keyboard.press("k")
        assert (opened.told(), opened.open_chains()) == ("1 to 12 of 60 chains", [11])
        page.locator("[name=words]").press("j")
        assert page.locator("[name=words]").input_value() == "j", "letters are letters where one writes"


def test_everything_can_be_reached_with_tab_and_shows_where_one_is(browser: Any, address: str):
    with Opened(browser, address) as opened:
        page = opened.page
        seen = set()
        for _ in range(90):
            page.keyboard.press("Tab")
            tag, outline = page.evaluate(
                "(() => { const at = document.activeElement;"
                " const drawn = at.matches('fieldset input') ? at.parentElement : at;"
                " return [at.tagName.toLowerCase(), getComputedStyle(drawn).outlineStyle]; })()"
            )
            seen.add(tag)
            assert tag == "body" or outline != "none", tag
        assert {"a", "summary", "input", "select", "button", "div"} <= seen


def test_hostile_drafts_are_text(browser: Any, address: str):
    with Opened(browser, address) as opened:
        opened.page.locator("[name=words]").fill("not a comment")
        chain = opened.page.locator("details.chain:visible")
        chain.evaluate("one => one.open = true")
        shown = chain.locator(".text").first.inner_text()
        assert shown.startswith(
            "</script><script>alert(1)</script> <!-- not a comment --> \"quoted\" 'too' & <b>bold</b>"
        )
        assert "bell ␇, escape ␛[31m, nul ␀," in shown and "世界こんにちは" in shown
        assert shown.endswith("{{ 7 * 7 }}, turn 1"), "right-to-left text does not turn what follows"


def test_without_a_script_every_draft_can_be_read(browser: Any, address: str):
    with Opened(browser, address, java_script_enabled=False) as opened:
        page = opened.page
        assert page.locator("form.filters").is_hidden()
        assert page.locator("details.chain").count() == page.locator("details.chain:visible").count() == 180
        page.locator("details.chain summary").nth(5).click()
        assert page.locator("details.chain").nth(5).locator(".text").last.is_visible()


def test_the_arms_of_a_comparison_draw_without_complaint(browser: Any, tmp_path: Path):
    from upturn.cli import reports

    better, worse = run_folder.chains(30, 2, 68), run_folder.chains(5, 5, 90)
    folders = [
        run_folder.write(tmp_path / name, run_folder.summary_of(chains), [chains], config=f"arm: {name}\n")
        for name, chains in (("with a rather long name", better), ("b", worse), ("c", worse), ("d", better))
    ]
    path, *_ = reports.side_by_side(folders, [], None, tmp_path / "compare.html")
    for size, shape in SIZES.items():
        with Opened(browser, path.as_uri(), size) as opened:
            assert opened.page.evaluate("document.documentElement.scrollWidth") == shape["width"]
            assert opened.page.evaluate(COVERED) == []
