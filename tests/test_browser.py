"""Pages in a real browser: nothing is asked for or run, all can be read by day and by night, wide and narrow, and by
who cannot see; the live page follows its run and leaves the reader where he is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser as browsers
import page_readers
import pages
import pytest
from browser import Seen
from test_data_page import chat, looked_at
from test_page_evaluations import FORGETTING, JUDGE, OBSERVED, SAFETY, evaluation
from test_page_of_run import all_fields, exported

from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.report.composed import of_run
from mlxtune.report.drawing.plots import Interval, histogram, intervals
from mlxtune.report.evaluations import OfRun
from mlxtune.report.html import joined, tag
from mlxtune.report.live.fresh import Fresh
from mlxtune.report.live.server import Server
from mlxtune.report.live.view import View
from mlxtune.report.page import LIVE_POLICY, Section, page
from mlxtune.report.run_record import read_run
from mlxtune.report.sections import data as data_section
from mlxtune.report.sections.comparing import Other
from mlxtune.report.tables import callout, facts, folded, table

HOSTILE = (
    '<img src=x onerror="alert(1)">',
    "</script><script>alert(2)</script>",
    "<!--",
    "]]>&lt;&amp;",
    '"><svg/onload=alert(3)>',
    "javascript:alert(4)",
    "<base href=https://example.org/><link rel=stylesheet href=//example.org/x.css>",
    "</title></style></textarea><iframe src=//example.org>",
    "\x1b]52;c;ZXZpbA==\x07\x00\u202eevil\u2066",
    "<meta http-equiv=refresh content='0;url=//example.org'>",
)
ALL = " ".join(HOSTILE)
LONG = "x" * 400  # a word that fits no line


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browsers.started(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Path]:
    """Pages as files: a run that went well, evaluated and beside another; one in which everything that others wrote is
    hostile; and every part that pages are made of.
    """
    folder = tmp_path_factory.mktemp("pages")
    first = read_run(pages.write(folder / "run", pages.told(40), {"train.lr": 1e-4}))
    second = read_run(pages.write(folder / "other" / "run", pages.told(30), {"train.lr": 1e-3}))
    extra = {"judge": JUDGE, "forgetting": FORGETTING, "safety": SAFETY}
    plain = [evaluation(folder / name, "no", tuned, more=extra) for name, tuned in (("one", "yes"), ("two", "yes no"))]
    events, config = all_fields(f"{ALL} {LONG}")
    exported(folder, HOSTILE[0])
    hostile = read_run(pages.write(folder / f"hostile {HOSTILE[1].replace('/', '|')}", events, config))
    bad = [evaluation(folder / "bad", ALL, f"{LONG} {ALL}", more={"observations": [{**OBSERVED, "fix": ALL}]})]
    texts = {
        "run": of_run(first, OfRun(plain[:1]), [Other(second, plain[1:])]),
        "hostile": of_run(hostile, OfRun(bad, [ALL]), [Other(first)]),
        "parts": page(f"Parts {ALL}", tag("p", "Every part: ", ALL), parts(tokenizer_folder, folder), {"all": HOSTILE}),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def parts(tokenizer_folder: Path, folder: Path) -> list[Section]:
    """Sections of everything there is, with texts that fit no line."""
    rows = [chat(f"{text} {LONG}", ALL, system=text) for text in HOSTILE]
    data = looked_at(rows, load_tokenizer(tokenizer_folder), folder, limit=2048)
    bins = [(float(low), float(low + 10), low) for low in range(0, 200, 10)]
    cells = [[text, LONG if at == 0 else "x", "1.5"] for at, text in enumerate(HOSTILE)]
    return [
        Section(
            "tables",
            "Tables",
            joined(table("Numbers", ["what", "one", "two"], cells, (2,)), facts("Facts", {ALL: LONG})),
        ),
        Section("data", "Data", data_section.of_survey(data)),
        Section("folded", "Folded", joined(folded(ALL, tag("p", LONG)), folded("Open", tag("pre", ALL), is_open=True))),
        Section("boxes", "Boxes", joined([callout(kind, ALL) for kind in ("good", "bad", "neutral", "warning")])),
        Section(
            "plots",
            "Plots",
            joined(
                histogram("Lengths", "tokens", bins),
                intervals("Differences", "points", [Interval(text[:30], -1, 2, 4) for text in HOSTILE]),
            ),
        ),
    ]


NAMES = ("run", "hostile", "parts")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scripts", [True, False], ids=["with scripts", "without scripts"])
def test_a_page_asks_for_nothing_runs_nothing_and_breaks_no_policy(
    browser: Any, files: dict[str, Path], name: str, scripts: bool
) -> None:
    with browsers.shown(browser, files[name].as_uri(), scripts=scripts) as seen:
        seen.page.wait_for_timeout(50)
        assert seen.page.locator("h1").inner_text()
        assert seen.page.locator("section").count() >= 1
        assert seen.requests == [files[name].as_uri()]
        assert seen.said == []
        if scripts:
            assert seen.violations() == []
        assert (
            seen.page.locator("img, iframe, base, object, embed, form, input, a[href^='http'], a[href*=':']").count()
            == 0
        )
        assert seen.page.evaluate("[...document.scripts].filter(one => one.type !== 'application/json').length") == 0
        # What others wrote is there, to be read.
        if name != "run":
            text = seen.page.locator("body").inner_text()
            assert HOSTILE[0] in text and "\\x1b]52" in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everyone_can_read_a_page_by_day_and_by_night(
    browser: Any, files: dict[str, Path], name: str, scheme: str
) -> None:
    with browsers.shown(browser, files[name].as_uri(), scheme=scheme) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert seen.axe() == []
        ground = seen.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]


@pytest.mark.parametrize("name", NAMES)
def test_on_a_phone_a_page_scrolls_down_alone_and_its_tables_by_themselves(
    browser: Any, files: dict[str, Path], name: str
) -> None:
    with browsers.shown(browser, files[name].as_uri(), width=360) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert seen.too_wide() == []


OVERLAPS = """[...document.querySelectorAll("svg.drawing")].flatMap(drawing => {
    const {width} = drawing.viewBox.baseVal;
    const texts = [...drawing.querySelectorAll("text")];
    const outside = texts.filter(one => one.getBBox().x < -1 || one.getBBox().x + one.getBBox().width > width + 1);
    const bars = [...drawing.querySelectorAll("path.line:not(.points)")].map(one => one.getBBox());
    const notes = drawing.querySelector(".frame ~ .end") ? texts.filter(one => one.matches(".end")) : [];
    const crossed = notes.filter(one => one.matches(".label") === false && bars.some(bar => {
        const {x, y, width, height} = one.getBBox();
        return bar.x < x + width && x < bar.x + bar.width && bar.y < y + height && y < bar.y + bar.height;
    }));
    return [...outside, ...crossed].map(one => one.textContent);
})"""


@pytest.mark.parametrize("name", ["run", "parts"])
def test_no_text_leaves_its_drawing_or_lies_on_the_bar_of_an_interval(
    browser: Any, files: dict[str, Path], name: str
) -> None:
    with browsers.shown(browser, files[name].as_uri()) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert seen.page.locator("svg.drawing text").count() > 10
        assert seen.page.evaluate(OVERLAPS) == []


def test_a_table_that_is_too_wide_for_a_phone_scrolls_by_the_keyboard(browser: Any, files: dict[str, Path]) -> None:
    with browsers.shown(browser, files["parts"].as_uri(), width=360) as seen:
        seen.page.locator(".scrolled").first.focus()
        for _ in range(3):
            seen.page.keyboard.press("ArrowRight")
        seen.until("document.querySelector('.scrolled').scrollLeft > 0")
        assert seen.page.evaluate("document.documentElement.scrollLeft") == 0


def test_on_paper_a_page_is_light_shows_what_is_folded_and_has_no_list_of_sections(
    browser: Any, files: dict[str, Path]
) -> None:
    with browsers.shown(browser, files["parts"].as_uri(), scheme="dark") as seen:
        seen.page.emulate_media(media="print")
        assert seen.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert not seen.page.locator("nav").is_visible()
        assert seen.page.locator("details p").first.is_visible()


@pytest.mark.parametrize("name", NAMES)
def test_html5lib_finds_no_error(files: dict[str, Path], name: str) -> None:
    page_readers.whole(files[name].read_text(encoding="utf-8"))


def test_what_should_be_found_is_found(browser: Any, tmp_path: Path) -> None:
    """The checks above, of a page in which everything is wrong."""
    bad = tmp_path / "bad.html"
    wide = "<div style='width: 900px'>wide</div>"
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    bad.write_text(f"<html><head>{policy}</head><body>{wide}<img src='https://example.org/x.png'><p></div></body>")
    with browsers.shown(browser, bad.as_uri(), width=360) as seen:
        seen.page.wait_for_timeout(50)
        assert any("img-src" in text for text in seen.violations())
        assert any("Content Security Policy" in text for text in seen.said)
        assert any(text.startswith("image-alt") for text in seen.axe())
    assert page_readers.faults(bad.read_text())
    bad.write_text(wide)
    with browsers.shown(browser, bad.as_uri(), width=360) as seen:
        assert seen.too_wide()
    bad.write_text("<img src='https://example.org/x.png'>")
    with browsers.shown(browser, bad.as_uri()) as seen:
        assert "https://example.org/x.png" in seen.requests and seen.said


# The live page


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Path, Server]]:
    """A run in progress, and its page, served."""
    run = pages.write(tmp_path / "run", pages.told(5)[:-1])
    token = "abcdefghijklmnopqrstuv"
    view = View(run, (), token)
    policy = f"{LIVE_POLICY}; frame-ancestors 'none'"
    with Server(0, token, Fresh(view.look, view.page).page, policy, print) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield run, server
        server.shutdown()
        thread.join()


def waits_for(seen: Seen, text: str) -> float:
    """Seconds until the page holds a text."""
    return seen.until("text => document.documentElement.outerHTML.includes(text)", text)


def test_the_live_page_shows_a_step_within_three_seconds_and_asks_its_own_server_alone(
    browser: Any, live: tuple[Path, Server]
) -> None:
    run, server = live
    with browsers.shown(browser, server.address, offline=False) as seen:
        waits_for(seen, "Live: this page follows the run.")
        pages.append(run, pages.event(6, 0.98765))
        assert waits_for(seen, "0.98765") < 3
        seen.quiet(server.address)
        assert seen.axe() == []


def test_the_live_page_works_without_scripts(
    browser: Any, live: tuple[Path, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, server = live
    monkeypatch.setattr("mlxtune.report.page.REFRESH_SECONDS", 1)
    with browsers.shown(browser, server.address, offline=False, scripts=False) as seen:
        assert seen.page.locator("noscript meta").count() == 1
        pages.append(run, pages.event(6, 0.98765))
        seen.page.wait_for_event("load", timeout=10_000)
        assert "0.98765" in seen.page.content() and seen.said == []


def test_the_live_page_leaves_the_reader_where_he_is(browser: Any, live: tuple[Path, Server]) -> None:
    run, server = live
    with browsers.shown(browser, server.address, width=360, offline=False) as seen:
        waits_for(seen, "Live: this page follows the run.")
        seen.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = !one.open; })")
        folded = """Object.fromEntries([...document.querySelectorAll("details")].map(
            one => [one.querySelector("summary").textContent, one.open]))"""
        opened = seen.page.evaluate(folded)
        # In a section that the next step changes.
        seen.page.evaluate("document.querySelector('#curves summary').focus({preventScroll: true})")
        seen.page.evaluate("document.querySelector('#curves .plot').scrollLeft = 50")
        seen.page.evaluate("scrollTo(0, 300)")
        where = """[scrollY, document.querySelector("#curves .plot").scrollLeft, document.activeElement.textContent,
            document.activeElement.closest("section")?.id]"""
        before = seen.page.evaluate(where)
        assert before[0] == 300 and before[1] == 50 and before[3] == "curves"
        pages.append(run, pages.event(6, 0.98765), {"kind": "note", "text": "a new note"})
        waits_for(seen, "0.98765")
        assert seen.page.evaluate(where) == before
        assert len(opened) > 1 and opened.items() <= seen.page.evaluate(folded).items()


def test_a_live_page_whose_server_has_ended_says_so_and_stays(browser: Any, live: tuple[Path, Server]) -> None:
    _, server = live
    with browsers.shown(browser, server.address, offline=False) as seen:
        waits_for(seen, "Live: this page follows the run.")
        seen.page.context.set_offline(True)
        waits_for(seen, "Not live any more")
        assert seen.page.locator("h1").inner_text() == "Run run"
        seen.page.context.set_offline(False)
        waits_for(seen, "Live: this page follows the run.")
