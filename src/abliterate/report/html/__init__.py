"""The record as one HTML page that needs nothing else: no request, no network, a strict policy. Never imports torch.

Described in docs/report.md. Everything that comes from a record is text: Jinja2 escapes it, and data of charts stand
as JSON in the page.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from abliterate.files.atomic import write_atomically
from abliterate.files.checkpoint import sha256
from abliterate.record import Record, finite, read_record, write_record
from abliterate.report.html.fitting import fitted
from abliterate.report.html.page import page_of
from abliterate.report.html.parts import Page
from abliterate.texts import printable_lines

FILE_NAME = "report.html"

#: Bytes of a page, and how often one that has more is cut again.
_MOST_BYTES, _TRIES = 2_000_000, 5

__all__ = ["FILE_NAME", "refresh_report", "render", "write_report"]


def render(record: Record) -> str:
    """The page as HTML, under 2 MB whatever the record holds. What the record has not is left out."""
    page = page_of(record)
    room = _MOST_BYTES - len(_html(replace(page, sections=[], warnings=[], tiles=[], answer="", subtitle="", title="")))
    for _ in range(_TRIES):
        text = _html(fitted(page, room))
        over = len(text.encode(errors="replace")) - _MOST_BYTES
        if over <= 0:
            break
        room -= over  # what stands around texts, tables and charts
    return text


def _html(page: Page) -> str:
    style, charts, script = text_of("style.css"), text_of("echarts.min.js"), text_of("report.js")
    policy = (
        f"default-src 'none'; script-src {hash_of(charts)} {hash_of(script)}; style-src {hash_of(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return template("page.html.j2").render(
        page=page,
        policy=policy,
        style=Markup(style),
        charts=Markup(charts),
        script=Markup(script),
        data=Markup(json_of(page.charts)),
    )


def write_report(record: Record, folder: Path) -> Path:
    """Write `report.html` into `folder`.

    Raises `CheckpointError` when it cannot be written.
    """
    path = folder / FILE_NAME
    write_atomically(path, render(record).encode(errors="replace"))
    return path


@functools.cache
def template(name: str) -> Template:
    """A page's template: everything is escaped, and text that could mislead is shown as escapes."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return environment.from_string(text_of(name))


@functools.cache
def text_of(name: str) -> str:
    """A file of the page's: style, script or template."""
    return files("abliterate.report.html").joinpath(name).read_text(encoding="utf-8")


def hash_of(text: str) -> str:
    """A source expression of a content security policy; browsers hash what stands between the tags."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shown(value: object) -> object:
    """Texts without what turns the order of letters around or has no glyph; the page's own parts as they are."""
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return finite(data) if isinstance(data, float) else _shown(data)


def json_of(data: object) -> str:
    """JSON that cannot end the element it stands in. What is not finite is null, as in the record."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def refresh_report(out: Path) -> Path:
    """Write the page of the record in `out` anew, and say where. A record that knows its files knows this one."""
    record = read_record(out)
    path = write_report(record, out)
    if record.files:
        write_record(record.model_copy(update={"files": {**record.files, FILE_NAME: sha256(path)}}), out)
    return path
