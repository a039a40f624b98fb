"""Every file from outside is opened, bounded, decoded and parsed here.

What a user names may be a pipe, a device or a folder; it may be endless, hold bytes that are no text, be nested a
million deep, or hold numbers of a million digits. Each kind of file says how large it may be and which error refuses
it; what comes back is its content, or one line that says what was expected and what was found.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from abliterate.errors import AbliterateError, CheckpointError
from abliterate.files.portable import NO_WAIT, open_file
from abliterate.texts import printable

Model = TypeVar("Model", bound=BaseModel)

#: Containers within containers; what is read is walked by functions that call themselves.
DEPTH = 64
#: Decimal numbers are smaller than this: squares of them, and sums of many, are still finite.
LARGEST = 1e150
#: Digits of a whole number: enough for one of 128 bits.
DIGITS = 40

MB = 10**6

_CALLED = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_REPR = reprlib.Repr()  # of a few elements only: what is damaged can hold millions
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlist = 30
#: What could make strings that UTF-8 or C cannot hold.
_ODD_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")


def short(value: object) -> str:
    """What a value looks like, in at most 80 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def readable_size(nbytes: int) -> str:
    """A number of bytes for a reader."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**7 else f"{nbytes} bytes"


class NotRegularError(OSError):
    """There is something at a path that is no regular file; its text says what."""


def open_regular(path: Path) -> int:
    """A descriptor to read the regular file `path`. Links are followed; it never waits for the other end of a pipe.

    Raises `NotRegularError` for what is no regular file, `OSError` where nothing can be opened.
    """
    try:
        fd = open_file(path, os.O_RDONLY | NO_WAIT)
    except ValueError as error:  # a NUL in the name
        raise NotRegularError(f"no name of a file ({error})") from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise NotRegularError(_CALLED.get(stat.S_IFMT(mode), "no regular file"))


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file from outside.

    `what` it is called after "expected", the bytes it has at most, the error that refuses it, and what to do then. Of
    `raw_texts` nothing is refused for what a string in its JSON holds: whoever reads them says in which row it was.
    """

    what: str
    most_bytes: int
    error: type[AbliterateError] = CheckpointError
    todo: str = ""
    raw_texts: bool = False

    def refused(self, path: Path | str, found: str) -> AbliterateError:
        """The error for a file of this kind, on one line."""
        return self.error(printable(f"{path}: expected {self.what}, found {found}{self.todo and f'; {self.todo}'}"))

    def read(self, path: Path) -> bytes:
        """All bytes of a file. Raises `error` for what is no regular file, cannot be read, or is too large."""
        with self.opened(path) as file:
            try:
                data = file.read(os.fstat(file.fileno()).st_size + 1)
            except OSError as error:
                raise self.refused(path, f"one that cannot be read ({error.strerror or error})") from error
        return data

    def opened(self, path: Path) -> BufferedReader:
        """A file to read bytes from, in size and kind as it should be."""
        try:
            file = open(open_regular(path), "rb")  # noqa: SIM115 - it is given away
        except FileNotFoundError as error:
            raise self.refused(path, "none") from error
        except NotRegularError as error:
            raise self.refused(path, str(error)) from error
        except OSError as error:
            raise self.refused(path, f"one that cannot be read ({error.strerror or error})") from error
        if (size := os.fstat(file.fileno()).st_size) > self.most_bytes:
            file.close()
            most = readable_size(self.most_bytes)
            raise self.refused(path, f"one of {readable_size(size)}, more than the {most} that it may have")
        return file

    def text(self, path: Path) -> str:
        """A file as text. Raises `error` also for what is not UTF-8 (a mark at the beginning is left out), or NUL."""
        return self.decoded(path, self.read(path))

    def decoded(self, path: Path | str, data: bytes) -> str:
        """Bytes as text, as `text` reads them."""
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise self.refused(path, "UTF-16; save it as UTF-8")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.refused(path, f"a byte that is not UTF-8 at {error.start}") from error
        if (nul := text.find("\0")) >= 0:
            raise self.refused(path, f"a NUL character at {nul}")
        return text

    def json(self, path: Path) -> Any:
        """A file of JSON (see `parse_json`)."""
        return self.parsed(path, self.text(path))

    def parsed(self, path: Path | str, text: str | bytes) -> Any:
        """A text of JSON that came with `path`."""
        if isinstance(text, bytes):
            text = self.decoded(path, text)
        try:
            return parse_json(text, raw_texts=self.raw_texts)
        except ValueError as error:
            raise self.refused(path, f"JSON that cannot be used ({error})") from error

    def toml(self, path: Path) -> dict[str, Any]:
        """A file of TOML, with what is refused in JSON refused here too."""
        import tomllib

        try:
            value = tomllib.loads(self.text(path))
            check_plain(value)
        except (ValueError, RecursionError) as error:
            raise self.refused(path, f"one that cannot be read ({error})") from error
        return value

    def json_lines(self, path: Path) -> list[tuple[int, Any]]:
        """A file with a JSON value on each line that is not blank, and the numbers of those lines from 1."""
        values = []
        for number, text in enumerate(self.text(path).split("\n"), 1):  # splitlines() would cut at U+2028 inside a text
            if text.strip():
                try:
                    values.append((number, parse_json(text, raw_texts=self.raw_texts)))
                except ValueError as error:
                    raise self.refused(path, f"line {number}, which is not JSON that can be used ({error})") from error
        return values

    def fields(self, path: Path) -> dict[str, Any]:
        """A file with one JSON object."""
        value = self.json(path)
        if not isinstance(value, dict):
            raise self.refused(path, named(value))
        return value

    def model(self, path: Path, model: type[Model]) -> Model:
        """A file with one JSON object of the form `model`."""
        return self.checked(path, self.fields(path), model)

    def checked(self, path: Path | str, value: object, model: type[Model]) -> Model:
        """What was read, in the form `model`; the error names the field."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise self.refused(path, f"another or a damaged one ({wrong(error)})") from error


def wrong(error: ValidationError) -> str:
    """The first thing that a model of pydantic finds wrong, as `field.field: what`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ")
    return f"{where and f'{short(where)[1:-1]}: '}{said[:1].lower()}{' '.join(said.split())[1:200]}"


def named(value: object) -> str:
    """What kind of JSON a value is, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def parse_json(text: str, *, whole: Callable[[str], Any] | None = None, raw_texts: bool = False) -> Any:
    """JSON whose values anything can hold: no key twice, no NaN or infinity, no endless number, nesting or half letter.

    With `whole`, all numbers are read by it, and nesting is left to the caller; with `raw_texts`, what is in strings.
    Raises ValueError, with the reason on one line.
    """
    hooks: dict[str, Any] = {"parse_int": _integer, "parse_float": _decimal, "parse_constant": _no_constant}
    if whole is not None:
        hooks = dict.fromkeys(hooks, whole)
    try:
        value = json.loads(text, object_pairs_hook=_unique, **hooks)
        odd = not raw_texts and _ODD_ESCAPE.search(text) is not None
        if whole is not None and odd:
            json.dumps(value, ensure_ascii=False).encode()
        elif odd or (whole is None and text.count("[") + text.count("{") > DEPTH):
            check_plain(value, texts=odd)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string holds half a letter, which UTF-8 cannot write") from None
    return value


def check_plain(value: object, *, texts: bool = True) -> None:
    """Raise ValueError for what is nested too deeply, or for strings (`texts`) with NUL or half of a surrogate pair."""
    level: list[object] = [value]
    for _ in range(DEPTH + 1):
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                if texts:
                    check_text(item)
            elif isinstance(item, Mapping):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                below += item
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {DEPTH} deep")


def check_text(text: str) -> None:
    """Raise ValueError for a string that holds NUL or half of a surrogate pair."""
    if "\0" in text:
        raise ValueError("a string holds NUL")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half a letter, which UTF-8 cannot write") from None


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`; ValueError for a key that comes twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {short(key)} comes twice")
        result[key] = value
    return result


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _decimal(text: str) -> float:
    value = float(text)
    if not abs(value) < LARGEST:
        raise ValueError(f"the number {text[:DIGITS]}, which is beyond all that can be computed with")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, expected a finite number")
