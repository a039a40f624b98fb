"""However much a plan holds, and however many windows load one: memory and pages stay within bounds."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from abliterate.edit.direction import Candidates, Direction, Site, save_direction
from abliterate.errors import UsageError
from abliterate.lab.bench import Bench, Heat
from abliterate.lab.markup import heat_map
from abliterate.lab.opening import heat_of
from abliterate.lab.shelf import Shelf
from abliterate.lab.windows import FOUND, Desk, choices
from abliterate.record import Record
from abliterate.report.html import render
from abliterate.report.html.fitting import fitted
from abliterate.report.html.page import page_of
from abliterate.report.html.parts import Figure, Page, Section, Table
from records import full_record


def direction(positions: int, sites: int = 25, d: int = 4) -> Direction:
    raw = torch.randn(positions, sites, d, generator=torch.Generator().manual_seed(positions))
    return Direction(torch.eye(1, d), Candidates(raw, torch.ones_like(raw)))


def bench(plan: Direction, sites: int = 25) -> Bench:
    """What the page asks of a bench, without a model."""
    asked: Any = SimpleNamespace(direction=plan, anatomy=SimpleNamespace(layers=sites - 1), heat=heat_of(plan))
    asked.sites, asked.chosen = Bench.sites.fget(asked), plan.site  # type: ignore[attr-defined]
    return cast(Bench, asked)


@pytest.mark.parametrize(("positions", "sites"), [(5000, 25), (100_000, 3), (3, 5000), (1, 25)])
def test_a_page_stays_small_whatever_a_plan_holds(positions: int, sites: int) -> None:
    asked = bench(direction(positions, sites, d=2), sites)
    page = heat_map(asked.heat, asked.sites, Site(1, -1))
    listed = choices(asked)
    cells = max(2000, sites)
    assert len(page.encode()) < 250 * cells + 60 * positions_of(page) + 2000
    assert len(page.encode()) < 1_500_000
    assert 1 < len(listed) <= cells + 1
    assert page.count("aria-pressed") == 1
    assert ("not shown" in page) == (positions * sites > 2000 and positions > 1)


def positions_of(page: str) -> int:
    return page.count('<th scope="row">')


def test_what_is_left_out_is_said_and_the_rest_is_as_it_was() -> None:
    values = torch.arange(3000.0).reshape(1500, 2)
    page = heat_map(Heat("what", values, "high"), [Site(0, -1)], None)
    assert "positions -1001 to -1500 are not shown" in page
    assert page.count("<button") == 2000
    assert "1999.00 (best)" in page
    whole = heat_map(Heat("what", values[:1000], "high"), [Site(0, -1)], None)
    assert page.replace("; positions -1001 to -1500 are not shown", "") == whole


def saved(folder: Path, number: int, d: int = 4096) -> Path:
    path = folder / f"{number}.safetensors"
    save_direction(path, Direction(torch.eye(number + 1, d)[-1:]))
    return path


def loads(path: Path, seen: list[weakref.ref[Direction]]) -> Callable[[], Direction]:
    def load() -> Direction:
        from abliterate.edit.direction import load_direction

        found = load_direction(path)
        seen.append(weakref.ref(found.basis))  # type: ignore[arg-type]
        return found

    return load


def test_windows_that_load_plans_share_a_bounded_shelf(tmp_path: Path) -> None:
    paths = [saved(tmp_path, number) for number in range(20)]
    room = 3 * paths[0].stat().st_size + 100
    shelf, seen = Shelf(room), list[weakref.ref[Direction]]()
    keys = [shelf.put(path, loads(path, seen)) for path in paths]
    gc.collect()
    assert shelf.nbytes <= room
    assert sum(ref() is not None for ref in seen) == 3
    assert shelf.get(keys[-1]).basis[0, 19] == 1
    with pytest.raises(UsageError, match=r"put away.*load it again"):
        shelf.get(keys[0])
    shelf.get(keys[17])  # used again: it stays, the next oldest goes
    keys.append(shelf.put(paths[0], loads(paths[0], seen)))
    shelf.get(keys[17])
    with pytest.raises(UsageError, match="put away"):
        shelf.get(keys[18])


def test_a_plan_that_two_windows_load_is_kept_once(tmp_path: Path) -> None:
    path, seen = saved(tmp_path, 1), list[weakref.ref[Direction]]()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    shelf = Shelf()
    assert shelf.put(path, loads(path, seen)) == shelf.put(copy, loads(copy, seen))
    assert len(seen) == 1
    assert shelf.nbytes == path.stat().st_size


def test_a_plan_too_large_is_one_line_and_moves_nothing(tmp_path: Path) -> None:
    small, large = saved(tmp_path, 1), saved(tmp_path, 2, d=65536)
    shelf = Shelf(small.stat().st_size + 10)
    key = shelf.put(small, loads(small, []))
    with pytest.raises(UsageError, match=r"2.safetensors: expected a plan, found one of \d+ bytes, more than"):
        shelf.put(large, loads(large, []))

    def fails() -> Direction:
        raise UsageError("no")

    other = saved(tmp_path, 3)
    with pytest.raises(UsageError, match="no"):
        shelf.put(other, fails)
    assert shelf.get(key).basis[0, 1] == 1


def test_a_window_whose_plan_was_put_away_says_so_in_its_place() -> None:
    desk = Desk(bench(direction(2)))
    assert "load it again" in desk.heat("gone", FOUND)
    assert "load it again" in desk.colour("gone", cast(Any, None), 0)
    with pytest.raises(UsageError, match="load it again"):
        desk.save("gone", "name")


# --- the report

MOST = 2_000_000

#: Texts that grow when they are escaped, and such as make a page stumble.
TEXTS = ("\"'<&>", "\U0001f600", "\ud800", "\x00\x1b[31m", "</script>", "word ")

Path_ = tuple[str | int, ...]


def growable(data: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Where a record holds a list, a mapping or a text."""
    if isinstance(data, list | dict | str) and path:
        yield path
    if isinstance(data, list | dict):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data[:1]):
            yield from growable(value, (*path, key))


def grow(data: Any, path: Path_, n: int, text: str) -> None:
    """Make what stands there `n` long."""
    *way, last = path
    for key in way:
        data = data[key]
    value = data[last]
    if isinstance(value, str):
        data[last] = text * n
    elif isinstance(value, list):
        data[last] = (value * n)[:n]
    elif value:
        example = next(iter(value.values()))
        data[last] = value | {f"{text}{number}": example for number in range(n)}


def allowed(path: Path_) -> bool:
    """Whether a record may hold more there."""
    data = full_record().model_dump(mode="json")
    grow(data, path, 3, "x")
    try:
        Record.model_validate(data)
    except ValueError:
        return False
    return True


PATHS = [path for path in growable(full_record().model_dump(mode="json")) if allowed(path)]


def rendered(paths: Sequence[Path_], n: int, text: str) -> str:
    data = full_record().model_dump(mode="json")
    for path in sorted(paths, key=len, reverse=True):  # what lies deepest first, before it is repeated
        grow(data, path, n, text)
    return render(Record.model_validate(data))


@pytest.mark.parametrize("text", TEXTS)
def test_a_report_keeps_its_size_when_all_grows_at_once(text: str) -> None:
    shallow = [path for path in PATHS if sum(isinstance(part, int) for part in path) < 2]
    page = rendered(shallow, 40 if text.isprintable() else 20, text)  # each of the others is escaped one by one
    assert len(page.encode(errors="replace")) <= MOST
    assert "</html>" in page


@pytest.mark.parametrize(
    "path",
    [
        *[("settings",), ("separation", "prompts"), ("search", "points"), ("evaluation", "shift", "worst")],
        *[("audit", "rows", 0, "name"), ("evaluation", "capability"), ("warnings",), ("timings_s",)],
    ],
)
def test_a_report_keeps_its_size_when_one_thing_is_huge_and_says_what_it_left_out(path: Path_) -> None:
    assert path in PATHS
    page = rendered([path], 60_000 if path[-1] == "prompts" else 20_000, "\"'<&>")
    assert len(page.encode()) <= MOST
    assert re.search(r"do not fit|more (rows )?in the record|the record has all|more to draw|…</td>", page), path


def test_the_page_of_a_run_is_not_cut() -> None:
    page = page_of(full_record())
    whole = fitted(page, 100_000)
    assert len(whole.sections) == len(page.sections)
    for section, before in zip(whole.sections, page.sections, strict=True):
        assert list(section.text) == list(before.text)
        for figure, other in zip(section.figures, before.figures, strict=True):
            assert [list(row) for row in figure.table.rows] == [list(row) for row in other.table.rows]
            assert (figure.chart, figure.note, figure.table.more) == (other.chart, other.note, other.table.more)


def test_a_chart_that_does_not_fit_is_left_out_and_that_is_said() -> None:
    chart = {"kind": "dots", "groups": ["x" * 5000]}
    figure = Figure("f", "F", Table(["a"], [["1"], ["2"]]), chart, "A note.")
    (section,) = fitted(Page("t", "", "", [], [Section("s", "S", figures=[figure])]), 4000).sections
    (cut,) = section.figures
    assert cut.chart is None
    assert cut.note == "A note. There is more to draw than fits on this page."
    assert len(cut.table.rows) == 2
