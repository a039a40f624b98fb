"""The types that people have at hand, at the public functions: what a parameter needs is made of them, or named.

A path may be a string, a vector a list or an array, settings a mapping, a site a pair. What cannot become what a
parameter is annotated with is an error that says so, before anything is begun. Errors of these functions name options
as keywords, where the command line's name them as flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar

from abliterate.errors import AbliterateError, UsageError

P = ParamSpec("P")
R = TypeVar("R")


#: A command in backticks, which stays; or an option, with what stands for its value in capitals.
_OPTION = re.compile(
    r"`[^`]*`|(?<![\w/.-])(?:--(?P<name>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)|-o)(?P<value> [A-Z][A-Z_.:@]*\b)?(?![\w-])"
)


def keywords_in(message: str) -> str:
    """A message that names options as a shell does (`--max-kl`, `-o OUT`), with Python's keywords in their place."""

    def keyword(match: re.Match[str]) -> str:
        if match[0].startswith("`"):
            return match[0]
        name = (match["name"] or "out").replace("-", "_")
        value = "" if match["value"] is None else f"={match['value'].strip()}"
        return f"{'as_' if name == 'as' else name}{value}"

    return _OPTION.sub(keyword, message)


@contextlib.contextmanager
def in_words_of_python() -> Iterator[None]:
    """Errors of this package that leave the `with` name options as keywords: whoever called wrote Python."""
    try:
        yield
    except AbliterateError as error:
        error.args = (keywords_in(str(error)),)
        raise


@functools.cache
def natural(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose arguments may be of natural types. Raises `UsageError`, naming the parameter, for others.

    What it raises names options as keywords.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(inspect.unwrap(function))
    variadic = {name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_POSITIONAL}

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        with in_words_of_python():
            for name, value in bound.arguments.items():
                what = f"{function.__name__}: {name}"
                if name in variadic:
                    bound.arguments[name] = tuple(as_type(what, one, hints[name]) for one in value)
                elif name in hints:
                    bound.arguments[name] = as_type(what, value, hints[name])
            return function(*bound.args, **bound.kwargs)

    return called


def speaks_python(kind: type[R]) -> type[R]:
    """A class whose public methods raise errors that name options as keywords."""
    for name, method in vars(kind).copy().items():
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(kind, name, _speaking(method))
    return kind


def _speaking(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method, or one that gives a context manager, which raises when it is entered."""
    manages = inspect.isgeneratorfunction(inspect.unwrap(method))

    @contextlib.contextmanager
    def entered(manager: Any) -> Iterator[Any]:
        with in_words_of_python(), manager as value:
            yield value

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        with in_words_of_python():
            found = method(*args, **kwargs)
        return entered(found) if manages else found

    return called


def as_type(what: str, value: Any, wanted: Any) -> Any:
    """A value as the type `wanted`, which is as annotations write it. Raises `UsageError`, beginning with `what`."""
    options = typing.get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    if value is None and NoneType in options:
        return None
    if any(isinstance(option, type) and option is not Any and _is(value, option) for option in options):
        return value
    failed: UsageError | None = None
    for option in options:
        if option is NoneType:
            continue
        try:
            return _as_option(what, value, option)
        except UsageError as error:
            # The best word on a value is that of the kind it was nearest to, which read it and found a fault.
            failed = error if failed is None or error.__cause__ is not None else failed
    assert failed is not None
    raise failed


def _as_option(what: str, value: Any, option: Any) -> Any:
    """The same for one type."""
    origin = typing.get_origin(option)
    if origin is Sequence:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise UsageError(f"{what}: expected a list, found {type(value).__name__}")
        return [as_type(what, one, typing.get_args(option)[0]) for one in value]
    if origin is os.PathLike:
        option, origin = str, None
    if option is Any or not isinstance(option, type) or origin is not None or getattr(option, "_is_protocol", False):
        return value  # Any, callables and other forms: the function sees for itself
    try:
        made = _made(value, option)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _other(what, value, option) from error
    if made is None:
        raise _other(what, value, option)
    return made


def _other(what: str, value: object, option: type) -> UsageError:
    return UsageError(f"{what}: expected {_name(option)}, found {type(value).__name__}")


def _is(value: object, option: type) -> bool:
    """Whether a value may stay as it is; a number is no flag, and what is to be a float may be whole."""
    if isinstance(value, bool):
        return option is bool
    if hasattr(option, "array_type"):
        return (
            isinstance(value, option.array_type)
            and value.ndim == len(getattr(option, "dims", ()))
            and value.is_floating_point()
        )
    return isinstance(value, (int, float) if option is float else option)


def _made(value: Any, option: type) -> Any:
    """What `value` becomes as an `option`; None where nothing can be made of it."""
    if option is Path or option is str:
        return option(os.fspath(value)) if not isinstance(value, bytes) else None
    if option in (int, float):
        return _number(value, option)
    if hasattr(option, "array_type"):
        return tensor(value, len(getattr(option, "dims", ())))
    if (make := getattr(option, "natural", None)) is not None:
        return make(value)
    if hasattr(option, "_fields") and isinstance(value, tuple | list):  # a named tuple
        return option(*(as_type(name, one, int) for name, one in zip(option._fields, value, strict=True)))
    return None


def _number(value: Any, option: type) -> Any:
    """A number of numpy or torch as Python's; texts and flags are none."""
    if isinstance(value, str | bytes | bool) or (option is int and float(value) != int(value)):
        return None
    return option(value)


def tensor(value: Any, dims: int) -> Any:
    """Numbers as a floating-point tensor with `dims` axes; one vector is a row of a matrix."""
    import torch

    if isinstance(value, Mapping | str | bytes | NoneType):
        raise TypeError(type(value).__name__)
    found = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    if found.is_complex():
        raise TypeError("complex")
    found = found if found.is_floating_point() else found.float()
    found = found[None] if found.ndim == 1 and dims == 2 else found
    if found.ndim != dims:
        raise UsageError(f"expected numbers along {dims} axes, found {found.ndim}")
    return found


def as_numbers(what: str, value: Any, dims: int) -> Any:
    """Numbers as a floating-point tensor with `dims` axes. Raises `UsageError`, beginning with `what`."""
    try:
        return tensor(value, dims)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"{what}: expected numbers, found {type(value).__name__}") from error


def tensors(owner: object, dims: Mapping[str, int]) -> None:
    """Make tensors of fields of a frozen value, each with so many axes; None stays."""
    optional = {field.name for field in dataclasses.fields(owner) if field.default is None}  # type: ignore[arg-type]
    for name, axes in dims.items():
        value = getattr(owner, name)
        if value is None and name in optional:
            continue
        object.__setattr__(owner, name, as_numbers(f"{type(owner).__name__}: {name}", value, axes))


def _name(option: type) -> str:
    return {"Path": "a path", "str": "a text", "float": "a number", "int": "a whole number"}.get(
        option.__name__, "numbers" if hasattr(option, "array_type") else option.__name__
    )
