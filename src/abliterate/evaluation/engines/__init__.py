"""What computes replies instead of the live model: vLLM in this process, or a server somewhere.

All answer the same token ids greedily, for the original model and for the edited one, so that before and after differ
by the edit and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from abliterate.errors import UsageError
from abliterate.evaluation.engines.base import Engine, EngineState, Pair, Progress, states_of
from abliterate.evaluation.engines.server import ServerEngine
from abliterate.evaluation.engines.vllm import VllmEngine

__all__ = ["Engine", "EngineState", "Pair", "Progress", "ServerEngine", "VllmEngine", "open_engine", "states_of"]


def open_engine(spec: str, pair: Pair, **options: Any) -> Engine:
    """The engine that `spec` names, for the two states of `pair`.

    `spec` is "vllm", or the address of an OpenAI-compatible server (http://HOST:PORT/v1). `options`
    are the engine's own: for vLLM those of `vllm.LLM`, for a server `concurrency`, `timeout` and `retries`.

    Raises `UsageError` for another spec, and when `pair` lacks what the engine needs.
    """
    maker = _server if spec.startswith(("http://", "https://")) else _MAKERS.get(spec)
    if maker is None:
        known = ", ".join(_MAKERS)
        raise UsageError(
            f"engine '{spec}': expected transformers, {known} or the address of a server (http://HOST:PORT/v1)"
        )
    return maker(spec, pair, options)


def _vllm(spec: str, pair: Pair, options: Mapping[str, Any]) -> Engine:
    if pair.folder is None:
        raise UsageError("engine vllm: expected the folder of a model, found none; give it a model on disk")
    return VllmEngine(pair.folder, pair.tokenizer, pair.ends, edited=pair.edited, **options)


def _server(spec: str, pair: Pair, options: Mapping[str, Any]) -> Engine:
    return ServerEngine(spec, pair, **options)


_MAKERS: Mapping[str, Callable[[str, Pair, Mapping[str, Any]], Engine]] = {"vllm": _vllm}
