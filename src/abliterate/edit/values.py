"""Values that hold tensors and can still be compared, pickled, and printed in a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class TensorValue:
    """Base of frozen dataclasses with fields that are tensors: two are equal when all fields are, number by number."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        """Whether both are of one class and hold equal fields."""
        if type(other) is not type(self):
            return NotImplemented
        return all(_equal(getattr(self, name), getattr(other, name)) for name in _fields(self))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The class and its fields, tensors by their shapes, in a line; fields that hold nothing are left out."""
        shown = {name: _shown(getattr(self, name)) for name in _fields(self)}
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in shown.items() if text)})"


def _fields(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if value is None or (isinstance(value, Mapping | tuple | frozenset) and not value):
        return ""
    if isinstance(value, Mapping | frozenset) or (isinstance(value, tuple) and len(value) > 4):
        return f"<{len(value)}>"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
