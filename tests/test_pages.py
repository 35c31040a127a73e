"""Pages in a browser: headless Chromium as Debian has it, on a phone's width and on a desktop's, in light and in dark.

Where there is none, these are skipped: `apt-get install chromium` brings it. Nothing here needs a network.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

import test_gate_report as gates
from coreai_zoo.gate import GateResult
from coreai_zoo.gates.report import render as render_report
from coreai_zoo.planning.catalogue_page import render as render_catalogue

PHONE, DESKTOP = 360, 1280
# No sandbox: the tests may run as root, and open nothing but pages of their own.
ARGUMENTS = [
    f"--{name}"
    for name in (
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("ZOO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="There is no Chromium to look at pages with: apt-get install chromium"
)

bundle = gates.bundle  # the fixture
looks = pytest.mark.parametrize(("width", "scheme"), [(w, s) for w in (PHONE, DESKTOP) for s in ("light", "dark")])
Record = dict[str, Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One process for all tests of this file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def look(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Open a page; after the test it has asked for nothing but itself, and its console is empty."""
    heard: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_page(html: str, width: int = PHONE, scheme: str = "light", place: str = "", **options: Any) -> Page:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: asked.append(request.url.partition("#")[0]))
        page.goto(f"{file.as_uri()}{place}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
    assert set(asked) <= {(tmp_path / "page.html").as_uri()}


@pytest.fixture
def report(bundle: gates.Bundle) -> str:
    """A report of everything there can be: flips, running text, little headroom, another bundle beside it."""
    peaks = [{"layer 2, a rather long place in the residual stream": 20000.0, "c": 1e-3}]
    run = gates.Run(
        bundle,
        "the oracle",
        "the control",
        ["toy", "-p", "a rather long prompt " * 4],
        {"judge": 1.0},
        [GateResult("prefill", True, "9 positions: within the bounds")],
        gates.text_of,
        corpus=gates.over_corpus(flips=3),
    )
    record = gates.transcript(run, gates.judged(flip_at=[6, 9], peaks=peaks))
    return render_report(record, gates.record_over(bundle, gates.over_corpus()))


@pytest.fixture(scope="module")
def record(catalogue_folder: Path) -> Record:
    """A part of the catalogue: two entries, of which one is too large for most machines, by three recipes."""
    whole = json.loads((catalogue_folder / "catalogue.json").read_text(encoding="utf-8"))
    for kind, names in (
        ("entries", {"qwen3.6-27b", "qwen3.5-397b-a17b"}),
        ("recipes", {"int8hu", "int4lin", "mix68"}),
    ):
        whole[kind] = [each for each in whole[kind] if each["name"] in names]
    kept = [{each["name"] for each in whole[kind]} for kind in ("entries", "recipes")]
    for kind in ("bundles", "refused"):
        whole[kind] = [each for each in whole[kind] if each["entry"] in kept[0] and each["recipe"] in kept[1]]
    return dict(whole)


@pytest.fixture(scope="module")
def catalogue(record: Record) -> str:
    return render_catalogue(record)


@pytest.fixture
def page_of(request: pytest.FixtureRequest) -> Callable[[str], str]:
    return request.getfixturevalue


# ---------------------------------------------------------------------------------------------------------------------
# Every page
# ---------------------------------------------------------------------------------------------------------------------


@looks
@pytest.mark.parametrize("name", ["report", "catalogue"])
def test_a_page_can_be_used_by_everybody(
    name: str, width: int, scheme: str, page_of: Callable[[str], str], look: Callable[..., Page]
) -> None:
    page = look(page_of(name), width, scheme)
    # A card of each kind opened, and all of a report's.
    page.evaluate("[...document.querySelectorAll('details')].slice(0, 4).forEach((each) => each.open = true)")

    assert sideways(page) == 0
    assert broken_rules(page) == []


def sideways(page: Page) -> int:
    """How many pixels a page can be scrolled to the side."""
    found: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return found


def broken_rules(page: Page, rule: str | None = None) -> list[str]:
    """What axe-core has against a page, its best practices included; or what one of its rules has."""
    options: Record = {"resultTypes": ["violations"]}  # half the time of telling what is fine as well
    if rule is not None:
        options["runOnly"] = {"type": "rule", "values": [rule]}
    return [
        f"{broken['id']}: {node['html'][:120]}: {node['failureSummary']}"
        for broken in Axe().run(page, options=options).response["violations"]
        for node in broken["nodes"]
    ]


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (("--soft: #545f6d", "--soft: #b5bdc6"), "color-contrast"),
        (('<html lang="en">', "<html>"), "html-has-lang"),
        (('role="img" aria-label=', 'role="img" data-label='), "svg-img-alt"),
        (('role="region" aria-label="code: bounds" tabindex="0"', ""), "scrollable-region-focusable"),
        (("<h2>", "<h4>"), "heading-order"),
        (("<main", "<div"), "landmark-one-main"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_broken_is_noticed(spoil: tuple[str, str], rule: str, report: str, look: Callable[..., Page]) -> None:
    assert spoil[0] in report
    assert broken_rules(look(report), rule) == []
    assert broken_rules(look(report.replace(*spoil)), rule) != []


def test_a_page_that_is_too_wide_is_noticed(report: str, look: Callable[..., Page]) -> None:
    wide = look(report.replace(".scroll { overflow-x: auto;", ".scroll {"))
    assert sideways(wide) > 0


@pytest.mark.parametrize("name", ["report", "catalogue"])
def test_the_first_key_skips_to_what_the_page_is_about(
    name: str, page_of: Callable[[str], str], look: Callable[..., Page]
) -> None:
    page = look(page_of(name))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    box = page.locator(".skip").bounding_box()
    assert box is not None and box["y"] >= 0, "it is seen while it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "MAIN"


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------

# Of each label of each chart: its text, the size of its letters on the screen, and where it is.
LABELS = """
[...document.querySelectorAll("svg.chart")].map((chart) => [...chart.querySelectorAll("text")].map((text) => {
  const { left, right, top, bottom } = text.getBoundingClientRect();
  const { a, b } = text.getScreenCTM();
  const size = parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b);
  return { text: text.textContent, size, left, right, top, bottom };
}))
"""


def overlap(one: Record, other: Record) -> bool:
    beside = one["right"] <= other["left"] or other["right"] <= one["left"]
    return not (beside or one["bottom"] <= other["top"] + 2 or other["bottom"] <= one["top"] + 2)


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_labels_of_charts_can_be_read(width: int, report: str, look: Callable[..., Page]) -> None:
    charts = look(report, width).evaluate(LABELS)
    assert len(charts) == 2 + 2 * 3
    for labels in charts:
        assert len(labels) > 6
        for label in labels:
            assert label["size"] >= 11
            assert label["left"] >= 0 and label["right"] <= width, label["text"]
        for place, label in enumerate(labels):
            assert [other["text"] for other in labels[place + 1 :] if overlap(label, other)] == []


def test_a_chart_is_as_wide_as_the_page_and_its_marks_are_on_its_axes(report: str, look: Callable[..., Page]) -> None:
    for width in (PHONE, DESKTOP):
        page = look(report, width)
        axis, line, marks = page.evaluate(
            """() => {
                const chart = document.querySelectorAll("#code svg.chart")[0];
                const box = (element) => element.getBoundingClientRect();
                const line = box(chart.querySelector(".line.candidate"));
                const centre = (element) => (box(element).left + box(element).right) / 2;
                return [box(chart.querySelector(".axis")), line, [...chart.querySelectorAll(".mark")].map(centre)];
            }"""
        )
        assert axis["width"] > 0.6 * min(width, 1000)
        # The first and the last position are at the ends of the axis, of the line as of the marks.
        assert (line["left"], line["right"]) == pytest.approx((axis["left"], axis["right"]), abs=1.5)
        assert (min(marks), max(marks)) == pytest.approx((axis["left"], axis["right"]), abs=1.5)


def test_a_wide_table_is_scrolled_with_keys(report: str, look: Callable[..., Page]) -> None:
    page = look(report)
    region = page.get_by_role("region", name="All prompts")
    assert region.evaluate("(element) => element.scrollWidth > element.clientWidth")
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")


def test_a_chart_says_what_can_be_seen_in_it(report: str, look: Callable[..., Page]) -> None:
    names = [chart.get_attribute("aria-label") or "" for chart in look(report).locator("svg.chart").all()]
    assert any("Of 32 positions the error of 2 is at least half the margin" in name for name in names)
    assert any(name.startswith("code: margin and error by position. Same top token: 14, ties: 0, ") for name in names)
    assert all(". " in name for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue
# ---------------------------------------------------------------------------------------------------------------------


def shown(page: Page) -> list[str]:
    """The commands of the bundles that are there to see."""
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('details.bundle:not([hidden]) .command')].map((each) => each.textContent)"
    )
    return found


def expected(record: Record, memory: int | None, chip: str | None, context: int) -> list[Record]:
    """The bundles that meet filters, from the record."""
    sold = next((each["memory_gib"] for each in record["chips"] if each["name"] == chip), None)
    return [
        bundle
        for bundle in record["bundles"]
        if any(
            fit["most_context"] is not None
            and fit["most_context"] >= context
            and memory in (None, fit["memory_gib"])
            and (sold is None or fit["memory_gib"] in sold)
            for fit in bundle["fits"]
        )
    ]


@pytest.mark.parametrize(
    ("memory", "chip", "context"),
    [
        (48, None, None),
        (None, "M4", None),
        (None, None, 262144),
        (48, "M4 Pro", 65536),
        (512, "M3 Ultra", 4096),
        (16, "M4", 262144),
    ],
)
def test_filters_leave_what_meets_them(
    memory: int | None, chip: str | None, context: int | None, catalogue: str, record: Record, look: Callable[..., Page]
) -> None:
    page = look(catalogue)
    chosen = {"memory": memory, "chip": chip, "context": context}
    for name, value in chosen.items():
        if value is not None:
            page.get_by_label(name.capitalize()).select_option(str(value))
    left = expected(record, memory, chip, context or 0)

    commands = [command.partition(" --max-context")[0] for command in shown(page)]
    assert commands == [bundle["command"] for bundle in left]
    assert page.get_by_role("status").inner_text() == f"{len(left)} of {len(record['bundles'])} bundles"
    address = parse_qs(page.url.partition("#")[2])
    assert address == {name: [str(value)] for name, value in chosen.items() if value is not None}
    page.reload()
    assert [command.partition(" --max-context")[0] for command in shown(page)] == commands, "the address says it all"

    page.get_by_role("button", name="Clear").click()
    page.wait_for_function("location.hash === '' || location.hash === '#'")
    assert shown(page) == [bundle["command"] for bundle in record["bundles"]]


def test_a_filtered_bundle_says_context_rate_and_how_to_build_it_for_that(
    catalogue: str, record: Record, look: Callable[..., Page]
) -> None:
    page = look(catalogue, place="#memory=48&chip=M4+Pro&context=65536")
    (bundle,) = (
        each
        for each in record["bundles"]
        if each["command"] == "zoo build qwen3.6-27b --recipe int8hu --contract static-s1"
    )
    (most,) = (fit["most_context"] for fit in bundle["fits"] if fit["memory_gib"] == 48)
    card = page.locator("details.bundle", has_text=bundle["command"])
    assert f"up to {most:,} tokens in 48 GB, 7.9 tokens/s on M4 Pro" in card.locator("summary").inner_text()
    assert f"{bundle['command']} --max-context 65536" in shown(page)

    page.get_by_label("Context").select_option("")
    assert bundle["command"] in shown(page), "what it is built with by itself fits"
    # Less than what a bundle is built with by itself.
    page = look(catalogue, place="#memory=36")
    (tight,) = (
        each
        for each in record["bundles"]
        if each["command"] == "zoo build qwen3.6-27b --recipe mix68 --contract static-s1"
    )
    (most,) = (fit["most_context"] for fit in tight["fits"] if fit["memory_gib"] == 36)
    assert most > tight["states"]["context"] and tight["command"] in shown(page)


def test_a_memory_that_a_chip_is_not_sold_with_is_told(catalogue: str, look: Callable[..., Page]) -> None:
    page = look(catalogue, place="#memory=512&chip=M4")
    assert shown(page) == []
    assert page.get_by_role("status").inner_text().endswith(": the M4 is not sold with 512 GB")
    assert page.get_by_text("Nothing of it meets the filters.").count() == 2
    assert page.get_by_text("Nothing of it meets the filters.").first.is_visible()


@pytest.mark.parametrize("place", ["#memory=1000&chip=Z80&context=x", "#qwen3.6-27b", "#=", "#memory"])
def test_an_address_that_says_nothing_known_shows_everything(
    place: str, catalogue: str, record: Record, look: Callable[..., Page]
) -> None:
    assert len(shown(look(catalogue, place=place))) == len(record["bundles"])


def test_a_link_to_a_model_leaves_the_filters_in_the_address(catalogue: str, look: Callable[..., Page]) -> None:
    page = look(catalogue, place="#memory=48")
    page.get_by_role("navigation").get_by_role("link", name="Qwen3.5 397B-A17B").click()
    assert page.url.endswith("#memory=48")
    assert page.evaluate("document.activeElement.id") == "qwen3.5-397b-a17b"


def test_a_bundle_is_opened_with_keys(catalogue: str, look: Callable[..., Page]) -> None:
    page = look(catalogue)
    card = page.locator("details.bundle").first
    card.locator("summary").focus()
    page.keyboard.press("Enter")
    assert card.get_by_role("table").count() == 3
    assert card.locator(".command").is_visible()


def test_without_a_script_everything_is_there_and_no_filter_that_does_nothing(
    catalogue: str, record: Record, look: Callable[..., Page]
) -> None:
    page = look(catalogue, java_script_enabled=False)
    assert page.locator("details.bundle summary").count() == len(record["bundles"])
    assert page.locator("details.bundle summary").last.is_visible()
    assert not page.locator("#filters").is_visible()
    page.locator("details.bundle summary").first.click()
    assert page.locator(".command").first.is_visible()
