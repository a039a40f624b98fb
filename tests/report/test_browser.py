"""The report in a real browser: charts are drawn, nothing is asked for, and without scripts the tables are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE

import browser
from abliterate.report.html import write_report
from records import full_record


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(full_record(HOSTILE), tmp_path_factory.mktemp("report"))


def opened(chromium: Any, report: Path, complaints: list[str], **options: Any) -> Any:
    """A page with the report; what it complains of or asks for goes to `complaints`."""
    page = chromium.new_context(**options).new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: complaints.append(request.url) if request.url != report.as_uri() else None)
    page.goto(report.as_uri())
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_all_charts_are_drawn_and_nothing_is_wider_than_the_window(
    chromium: Any, report: Path, width: int, scheme: str
) -> None:
    complaints: list[str] = []
    page = opened(chromium, report, complaints, viewport={"width": width, "height": 800}, color_scheme=scheme)
    marks = page.evaluate(
        "[...document.querySelectorAll('[data-chart]')].map(e => e.querySelectorAll('svg path, svg circle').length)"
    )
    assert len(marks) == 20
    assert min(marks) > 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img").count() == 0
    page.context.close()
    assert complaints == []


def test_hovering_tells_the_prompt_as_text(chromium: Any, report: Path) -> None:
    complaints: list[str] = []
    page = opened(chromium, report, complaints, viewport={"width": 1280, "height": 900})
    chart = page.locator("[data-chart=scatter]")
    chart.scroll_into_view_if_needed()
    point = page.evaluate(
        "(() => { const c = echarts.getInstanceByDom(document.querySelector('[data-chart=scatter]'));"
        " return c.convertToPixel({seriesIndex: 0}, c.getOption().series[0].data[0].slice(0, 2)); })()"
    )
    box = chart.bounding_box()
    page.mouse.move(box["x"] + point[0], box["y"] + point[1])
    page.wait_for_function("document.querySelector('[data-chart=scatter]').textContent.includes('alert(1)')")
    page.context.close()
    assert complaints == []


def test_colours_follow_the_system(chromium: Any, report: Path) -> None:
    page = opened(chromium, report, [], color_scheme="light")
    light = page.inner_html("[data-chart=rates]")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => document.querySelector('[data-chart=rates]').innerHTML !== before", arg=light)
    page.context.close()


def test_without_scripts_the_tables_are_shown(chromium: Any, report: Path) -> None:
    page = opened(chromium, report, [], java_script_enabled=False)
    assert page.locator("table").count() == page.locator("table:visible").count() > 13
    assert page.locator(".chart:visible").count() == 0
    page.context.close()


def test_it_prints_with_all_its_tables(chromium: Any, report: Path) -> None:
    complaints: list[str] = []
    page = opened(chromium, report, complaints, color_scheme="dark")
    assert page.locator("table:visible").count() < page.locator("table").count()  # folded on a screen
    assert len(page.pdf()) > 50_000
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("table:visible").count() == page.locator("table").count()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("table:visible").count() < page.locator("table").count()
    page.context.close()
    assert complaints == []
