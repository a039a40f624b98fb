"""A good file of every kind that is read, with its reader: for `fuzzing`."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import save, save_file

import gguf_files
from abliterate import record as rec
from abliterate.config import PromptSettings
from abliterate.edit.adapters import read_adapter_config
from abliterate.edit.direction import Candidates, Direction, Recipe, Site, load_direction, save_direction
from abliterate.edit.gguf import read_control_vector, write_control_vector
from abliterate.edit.plan import Edit, Plan
from abliterate.edit.steering import SteeringVectors
from abliterate.edit.undo import restore
from abliterate.edit.weights import edit_checkpoint
from abliterate.errors import AbliterateError
from abliterate.evaluation import servers
from abliterate.evaluation.capability.tasks import load_tasks
from abliterate.evaluation.engines.vllm import read_adapter as read_for_vllm
from abliterate.evaluation.judging import Exchange
from abliterate.evaluation.judging.calibration import Calibration
from abliterate.evaluation.judging.calibration import read as read_calibration
from abliterate.evaluation.judging.drift import Profile
from abliterate.evaluation.judging.labelled import read_exchanges, read_labelled
from abliterate.evaluation.judging.llm import read_answer
from abliterate.evaluation.judging.scorers import scorer_of
from abliterate.evaluation.reply_cache import kept_replies
from abliterate.files.cache import DiskCache, digest
from abliterate.files.checkpoint import open_checkpoint, read_shard
from abliterate.files.checkpoint.journal import Journal, read_key
from abliterate.files.configuration import read_config
from abliterate.files.storage import how_stored
from abliterate.forensics.repair import read_adapter
from abliterate.model.anatomy import Kind as WriterKind
from abliterate.model.anatomy import Stored, Writer
from abliterate.model.gguf_source import dequantise
from abliterate.prompts import ChatRenderer, build_contrastive_set
from abliterate.prompts.rendering import read_template
from abliterate.prompts.sources import load_prompts
from abliterate.report.html import render
from abliterate.report.tables.record import show_record
from families import byte_tokenizer
from fuzzing import Kind, in_header, in_json, in_lines
from records import full_record

TOKENIZER = byte_tokenizer()

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]},
    "text_config": {"hidden_size": 8},
}
ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a fruit.", "response": "An apple.", "label": "compliance", "category": "food"},
    {"prompt": 'Say "no", please', "response": "I cannot, sorry.", "label": "refusal", "category": None},
    {"prompt": "Größe?", "response": "", "label": "degenerate", "category": "x"},
]
TALKS = [
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "id": 1},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "id": 2},
]
QUESTIONS = [
    {"question": "1 + 1?", "options": ["1", "2"], "answer": "B"},
    {"question": "2 + 2?", "options": ["4", "5"], "answer": "A"},
]


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    cells = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in row.values()) for row in rows]
    return "\n".join([",".join(rows[0]), *cells]).encode()


def _record(path: Path) -> None:
    record = rec.read_record(path.parent)
    show_record(record, Console(file=io.StringIO(), width=100))
    if path.stat().st_size % 4 == 0:  # the page takes fifty times as long as all the rest
        render(record)


def _small_record() -> bytes:
    return full_record().model_dump_json().encode()


def _direction() -> bytes:
    basis = torch.nn.functional.normalize(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)))
    candidates = Candidates(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    direction = Direction(
        basis,
        candidates,
        mean=torch.ones(8),
        recipe=Recipe({"model.layers.0.mlp": 0.5}),
        site=Site(1, -1),
        model="m",
        learnt_from=frozenset({"ab" * 6}),
        facts={"prompts": {"harmful": 4}},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "d.safetensors")
        save_direction(path, direction)
        return path.read_bytes()


@functools.cache
def _edited() -> dict[str, bytes]:
    """The files of an edited checkpoint of two tensors."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "in"), Path(name, "out")
        source.mkdir()
        target.mkdir()
        tensors = {"w": torch.randn(8, 4).bfloat16(), "e": torch.randn(4, 8)}
        save_file(tensors, source / "model.safetensors")
        basis = torch.nn.functional.normalize(torch.ones(1, 8))
        writers = (
            Writer("mlp", WriterKind.MLP, 0, "w", 0, None),
            Writer("embedding", WriterKind.EMBEDDING, None, "e", 1, None),
        )
        plan = Plan(tuple(Edit(writer, basis, 1.0, norm_preserving=True) for writer in writers), basis, 1.0, ())
        names = {"w": (Stored("w", "w", 0),), "e": (Stored("e", "e", 1),)}
        edit_checkpoint(open_checkpoint(source), target, plan, names)
        return {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}


def _undo(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as target:
        restore(open_checkpoint(path.parent / "model"), [path], Path(target))


def _adapter() -> bytes:
    name = "base_model.model.model.layers.0.mlp.down_proj"
    return save({f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(8, 2)})


ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["down_proj"],
    "bias": "none",
    "rank_pattern": {},
    "use_rslora": False,
    "target_parameters": None,
}


def _adapter_files(path: Path) -> None:
    for read in (read_adapter, read_for_vllm):
        with contextlib.suppress(AbliterateError):
            read(path.parent)
    read_adapter_config(path.parent)
    read_shard(path.parent / "adapter_model.safetensors")


def _calibration(path: Path) -> None:
    read_calibration(path, "scripted-1")


def _calibration_file() -> bytes:
    made = Calibration(
        judge="scripted",
        fingerprint="scripted-1",
        source="x.csv",
        source_sha256="ab" * 32,
        two_way=False,
        confusion={"refusal": {"refusal": 3, "compliance": 1}, "compliance": {"compliance": 4}},
        profile=Profile(refused={"refusal": 3, "answer, longer": 1}, answered={"answer, longer": 4}),
    )
    return made.model_dump_json().encode()


def _replies(path: Path) -> None:
    """What is damaged is the value; its digest is that of the damaged text, as whoever damages it would see to."""
    text = path.read_bytes().decode(errors="replace")
    cache = DiskCache("kept", 10**6)
    with (
        mock.patch("abliterate.files.cache.cache_folder", return_value=path.parent),
        mock.patch("abliterate.evaluation.reply_cache._REPLIES", cache),
    ):
        cache.place("k").parent.mkdir(exist_ok=True)
        cache.place("k").write_text(f"{digest(text)}\n{text}")
        kept_replies("k", TOKENIZER)


def _journal(path: Path) -> None:
    read_key(path.parent)
    Journal(path.parent, "a key")


def _trials(path: Path) -> None:
    from abliterate.finding.search.blackbox import Journal as Trials
    from abliterate.finding.search.blackbox import _storage, _study

    trials = Trials(path, True)
    with _storage(trials) as storage:
        _study(storage, 2, {"seed": 0}, trials)


def _trials_file() -> bytes:
    import optuna

    from abliterate.finding.search.blackbox import Journal as Trials
    from abliterate.finding.search.blackbox import _storage, _study

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trials.log")
        trials = Trials(path, False)
        with _storage(trials) as storage:
            study = _study(storage, 2, {"seed": 0}, trials)
            for _ in range(2):
                trial = study.ask()
                trial.suggest_float("x", 0.0, 1.0)
                study.tell(trial, [0.1, 0.2])
        return path.read_bytes()


def _server(path: Path) -> None:
    data = path.read_bytes()
    read_answer(data.decode(errors="replace"))
    models = (servers.Completion, servers.ChatCompletion, servers.Listing)
    for kind in models:
        with contextlib.suppress(AbliterateError):
            servers.COMPLETION.checked("server", servers.COMPLETION.parsed("server", data), kind)
    servers.COMPLETION.parsed("server", data)


#: Bytes of the settings of the smallest GGUF file.
GGUF_SETTINGS = 2000
ANSWER = {
    "choices": [{"text": "a", "finish_reason": "stop", "token_ids": [1, 2], "message": {"content": "b"}}],
    "usage": {"prompt_tokens": 3},
    "data": [{"id": "m", "parent": None, "owned_by": "vllm"}],
}
TEMPLATE = (
    b"{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content | trim }}{% else %}{{ m['role'] ~ ':' }}"
    b"{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


BEHAVIOUR = b"""
name = "chatty"
description = "Saying much."
shown = "ran on"
[more]
prompts = ["What is rain?", "What is snow?", "Who baked this?", "Why is it late?", "Where is it?", "When was that?"]
system = "Be long."
[less]
system = "Be short."
[others]
prompts = ["Say hello.", "Say goodbye."]
[shows]
phrases = ["^well", "as * said", "on the one hand"]
unless = ["no"]
at_least = 2
within = 300
[read]
at = "reply"
tokens = 12
"""


def _behaviour(path: Path) -> None:
    found = build_contrastive_set(PromptSettings(behaviour=str(path))).behaviour
    if (scorer := scorer_of(found)) is not None:
        scorer.judge([Exchange("What is rain?", "Well, as I said, on the one hand it is wet. " * 3)])


def _template(path: Path) -> None:
    ChatRenderer(TOKENIZER, read_template(str(path))).render("Name a fruit.")


def _parquet() -> bytes:
    import datetime
    from decimal import Decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "prompt": ["Name a fruit.", None, "Größe?"],
            "day": [datetime.date(2020, 1, 1), None, datetime.date(1, 1, 1)],
            "price": [Decimal("1.5"), Decimal("2.5"), None],
            "raw": [b"\xff", b"", None],
            "messages": [[{"role": "user", "content": "Hi"}], [], None],
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _gguf(path: Path) -> None:
    from abliterate.edit.gguf import stored_architecture

    stored_architecture(path)


def _gguf_file() -> bytes:
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.gguf")
        writer = GGUFWriter(str(path), "llama")
        writer.add_uint32("llama.block_count", 2)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_tensor("w", torch.ones(4, 4).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _control_vector(path: Path) -> None:
    read_control_vector(path)


def _control_vector_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "v.gguf")
        write_control_vector(path, {2: torch.ones(4), 3: torch.ones(4)}, architecture="llama", layers=4)
        return path.read_bytes()


def _in_settings(rng: random.Random, data: bytes) -> bytes:
    """A GGUF file with another whole number somewhere in its counts, settings or descriptions of tensors."""
    size = rng.choice((1, 2, 4, 8))
    at = rng.randrange(4, GGUF_SETTINGS - size)
    number = rng.choice((0, 1, 2, 3, 7, 8, 9, 12, 255, 2**15, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
    return data[:at] + int(number % 256**size).to_bytes(size, "little") + data[at + size :]


def _small_gguf() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return gguf_files.smallest(Path(folder, "m.gguf")).read_bytes()


def _opened_gguf(path: Path) -> None:
    """The whole file made a folder, as a model that is loaded."""
    with tempfile.TemporaryDirectory(dir=path.parent) as target:
        dequantise(path, Path(target), torch.float32)


def _model_config(path: Path) -> None:
    read_config(path.parent)
    how_stored(open_checkpoint(path.parent))


def _weights() -> bytes:
    return save({"a.weight": torch.ones(8, 8), "b.weight": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})


INDEX = {
    "metadata": {"total_size": 264},
    "weight_map": {"a.weight": "m-1.safetensors", "b.weight": "m-1.safetensors"},
}
JOURNAL = [
    {"key": "a key"},
    {
        "file": "model.safetensors",
        "nbytes": 3,
        "sha256": "ab",
        "source_sha256": None,
        "note": None,
        "files": {"scratch/u": 2},
    },
]


def _labelled(path: Path) -> None:
    read_labelled(path)
    read_exchanges(path)


def kinds() -> Iterator[Kind]:
    """All of them."""
    undo = _edited()
    beside = {f"model/{name}": data for name, data in undo.items() if name != "undo.safetensors"}
    prompts = lambda path: load_prompts(str(path))  # noqa: E731
    tasks = lambda path: load_tasks([path])  # noqa: E731
    config = {"model.safetensors": _weights()}
    yield Kind("abliteration.json", _small_record(), _record, in_json)
    yield Kind("direction.safetensors", _direction(), load_direction, in_header)
    layered = save({"layer.1": torch.ones(8), "layer.12": torch.zeros(8)})
    yield Kind("layers.safetensors", layered, SteeringVectors.load, in_header)
    yield Kind("undo.safetensors", undo["undo.safetensors"], _undo, in_header, beside)
    yield Kind(
        "adapter_config.json",
        json.dumps(ADAPTER_CONFIG).encode(),
        _adapter_files,
        in_json,
        {"adapter_model.safetensors": _adapter()},
    )
    yield Kind(
        "adapter_model.safetensors",
        _adapter(),
        _adapter_files,
        in_header,
        {"adapter_config.json": json.dumps(ADAPTER_CONFIG).encode()},
    )
    yield Kind("calibration.json", _calibration_file(), _calibration, in_json)
    yield Kind("labelled.csv", _csv(ROWS), _labelled)
    yield Kind("labelled.jsonl", _lines(ROWS), _labelled, in_lines)
    yield Kind("prompts.jsonl", _lines(ROWS), prompts, in_lines)
    yield Kind("talks.jsonl", _lines(TALKS), prompts, in_lines)
    yield Kind("prompts.json", json.dumps({"prompts": [row["prompt"] for row in ROWS]}).encode(), prompts, in_json)
    yield Kind("prompts.csv", _csv(ROWS), prompts)
    yield Kind("prompts.txt", "Name a fruit.\nGröße?\n".encode(), prompts)
    yield Kind("prompts.parquet", _parquet(), prompts)
    yield Kind("tasks.jsonl", _lines(QUESTIONS), tasks, in_lines)
    yield Kind("tasks.json", json.dumps(QUESTIONS).encode(), tasks, in_json)
    yield Kind("tasks.csv", _csv([{"question": "1?", "A": "1", "B": "2", "answer": "A"}]), tasks)
    yield Kind("config.json", json.dumps(CONFIG).encode(), _model_config, in_json, config)
    yield Kind(
        "model.safetensors.index.json",
        json.dumps(INDEX).encode(),
        lambda path: open_checkpoint(path.parent),
        in_json,
        {"m-1.safetensors": _weights()},
    )
    yield Kind("model.safetensors", _weights(), read_shard, in_header)
    yield Kind("journal.jsonl", _lines(JOURNAL), _journal, in_lines)
    yield Kind("trials.log", _trials_file(), _trials, in_lines)
    yield Kind("kept.json", json.dumps(_kept()).encode(), _replies, in_json)
    yield Kind("answer.json", json.dumps(ANSWER).encode(), _server, in_json)
    yield Kind("template.jinja", TEMPLATE, _template)
    yield Kind("behaviour.toml", BEHAVIOUR, _behaviour)
    yield Kind("model.gguf", _gguf_file(), _gguf)
    yield Kind("control.gguf", _control_vector_file(), _control_vector)
    yield Kind("opened/model.gguf", _small_gguf(), _opened_gguf, _in_settings)


def _kept() -> dict[str, Any]:
    return {"format": 1, "tokens": [[1, 2], [3]], "ended": [True, False], "stopped": [False, False]}
