"""Texts from elsewhere, made fit to be shown: what models, files and servers say is only ever text.

A text may hold what a terminal obeys (escape sequences), what turns the order of letters around (bidirectional
overrides), what nobody sees, or what Markdown takes for a heading, a link or HTML. Nothing is dropped: what is not
shown as it is stands there as an escape, so that one sees that it was there.
"""

from __future__ import annotations

import re
from typing import Any

#: What has no glyph: C0 and C1 controls, lone surrogates, marks and overrides of direction, separators of lines, spaces
#: of no width, tags. Joiners (U+200C, U+200D) stay: scripts and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
#: Half of a character each; in names of files, what stands for a byte that is not UTF-8.
_HALF = re.compile("[\ud800-\udfff]")
_BREAKS = re.compile(r"[\t\n\x0b\x0c\r\x85\u2028\u2029]+")


def printable(text: str) -> str:
    """A text on one line, what cannot be shown as an escape (``\\x1b``)."""
    return _HIDDEN.sub(_escaped, _BREAKS.sub(" ", text))


def printable_lines(text: str) -> str:
    """The same with its line breaks and tabs."""
    return _HIDDEN.sub(_escaped, text.replace("\r\n", "\n"))


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def encodable(value: Any) -> Any:
    """Texts, alone or in lists and dictionaries, that can be written: half characters in them become escapes."""
    if isinstance(value, str):
        return value if value.isascii() else _HALF.sub(_escaped, value)
    if isinstance(value, dict):
        return {encodable(key): encodable(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(encodable(one) for one in value)
    return value


def shown_json(text: str, encoding: str = "utf-8") -> str:
    """JSON that says the same with every character escaped that a terminal would obey or `encoding` does not have."""
    text = _HIDDEN.sub(_json_escaped, text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = re.sub(r"[^\x00-\x7f]", _json_escaped, text)
    return text


def _json_escaped(found: re.Match[str]) -> str:
    if found[0] in "\r\n\t":  # between values: within texts JSON has no such characters
        return found[0]
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


#: What means something within a line of Markdown, with mathematics and tables; and underscores but for those in a word.
_MARKS = re.compile(r"[\\`*\[\]<>|~$#]|(?<![^\W_])_|_(?![^\W_])")
_ADDRESS = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp)(?=:)|\bwww(?=\.)")
#: What would start a list, a quote, a rule or a heading of the line above.
_START = re.compile(r"^(\s*(?:\d{1,9}(?=[.)])|(?=[-+=:])))")


def markdown(text: str) -> str:
    """A text as words of a Markdown line: no heading, link, image, HTML, table or formula comes of it."""
    line = _MARKS.sub(r"\\\g<0>", printable(text).replace("&", "&amp;"))
    line = _ADDRESS.sub(lambda found: found[0] + "\\", line)
    return _START.sub(r"\1\\", line)


def markdown_code(text: str) -> str:
    """A text as code within a Markdown line, verbatim as far as it can be shown. In tables see `markdown`."""
    line = printable(text)
    fence = "`" * (1 + max(map(len, re.findall(r"`+", line)), default=0))
    space = " " if line.startswith(("`", " ")) or line.endswith(("`", " ")) or not line else ""
    return f"{fence}{space}{line}{space}{fence}"
