"""Runs in the interpreter that has llama.cpp: next-token logits and greedy replies under adapters and control vectors.

    python llama_worker.py JOB.json OUT.npz

The job: `model`, `prompts` (lists of tokens), `runs` (name → `lora` file, `vector` file (.npy, as llama.cpp takes it:
layers 1, 2, … one after another), both optional), and `new_tokens` to reply with. The result, per run: `NAME.logits`
[prompts, vocabulary] and `NAME.replies` [prompts, new_tokens]. No import of ours: that interpreter has none of it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

F32 = 0  # GGML_TYPE_F32


def main(job: Mapping[str, Any], out: Path) -> None:
    llama: Any = importlib.import_module("llama_cpp")
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(job["model"].encode(), llama.llama_model_default_params())
    assert model, "llama.cpp did not load the model"
    results: Any = {}
    for name, run in job["runs"].items():
        context = _context(llama, model, run)
        answers = [_answer(llama, model, context, prompt, job["new_tokens"]) for prompt in job["prompts"]]
        results[f"{name}.logits"] = np.stack([logits for logits, _ in answers])
        results[f"{name}.replies"] = np.array([reply for _, reply in answers], dtype=np.int64)
        llama.llama_free(context)
    np.savez(out, **results)


def _context(llama: Any, model: Any, run: Mapping[str, str]) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = F32
    params.flash_attn_type = 0
    context = llama.llama_init_from_model(model, params)
    assert context
    if "lora" in run:
        adapter = llama.llama_adapter_lora_init(model, run["lora"].encode())
        assert adapter, "llama.cpp did not load the adapter"
        adapters, scales = (llama.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert llama.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    if "vector" in run:
        width, last = llama.llama_model_n_embd(model), llama.llama_model_n_layer(model)
        values = np.load(run["vector"]).astype(np.float32).ravel()
        data = (ctypes.c_float * len(values))(*values)
        assert llama.llama_set_adapter_cvec(context, data, len(values), width, 1, last) == 0
    return context


def _answer(llama: Any, model: Any, context: Any, prompt: Sequence[int], new: int) -> tuple[Any, list[int]]:
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    first = logits = _last_logits(llama, model, context, prompt)
    reply = []
    for _ in range(new):
        reply.append(int(logits.argmax()))
        logits = _last_logits(llama, model, context, reply[-1:])
    return first, reply


def _last_logits(llama: Any, model: Any, context: Any, tokens: Sequence[int]) -> Any:
    array = (llama.llama_token * len(tokens))(*tokens)
    assert llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))) == 0
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (size,)).copy()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
