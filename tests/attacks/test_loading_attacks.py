"""What is loaded is what lies in the files: nothing is drawn at random, added, left out, or run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

import gguf_files
from abliterate.config import ApplySettings, ModelSettings, OutputSettings
from abliterate.edit.direction import Direction, save_direction
from abliterate.errors import AbliterateError, CheckpointError, ModelError, NumericalError, PromptError, UsageError
from abliterate.evaluation.compare import contender
from abliterate.evaluation.reply_cache import key_of
from abliterate.files.checkpoint import open_checkpoint
from abliterate.model.anatomy import study
from abliterate.model.batches import share_prefixes
from abliterate.model.hub import hub_id, snapshot
from abliterate.model.loading import LoadedModel, load, locate
from abliterate.monitor import Monitor
from abliterate.pipeline import apply
from abliterate.session import open_model
from families import BY_NAME, D_MODEL, VOCAB, save
from zoo import Entry

Tensors = dict[str, Tensor]
INDEX = "model.safetensors.index.json"
DOWN, HEAD, EMBEDDING = "model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(BY_NAME["llama"].model(), tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A whole model that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def configure(folder: Path, **values: Any) -> None:
    """Set fields of config.json; one that is `...` is taken out."""
    file = folder / "config.json"
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Deal the tensors out to two files with an index; what it lists."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    listed = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(listed.values()):
        save_file({name: tensors[name] for name in names if listed[name] == file}, folder / file, {"format": "pt"})
    index(folder, listed)
    return listed


def index(folder: Path, listed: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(listed)}))


def live(spec: Path | str, **options: Any) -> LoadedModel:
    return load(locate(str(spec), **options), device="cpu")


def offline(spec: Path | str) -> Any:
    return locate(str(spec)).anatomy()


LOADERS = [pytest.param(live, id="live"), pytest.param(offline, id="offline")]


def refused(error: pytest.ExceptionInfo[AbliterateError], *words: str) -> None:
    """One line that names what is wrong."""
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 1000
    assert all(word in text for word in words), text


# --- every number, and no other


def _reshape(tensors: Tensors) -> None:
    tensors[DOWN] = tensors[DOWN][:, :40].contiguous()


def _swap(tensors: Tensors) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING][:100].contiguous()


def _double(tensors: Tensors) -> None:
    tensors[DOWN.removeprefix("model.")] = tensors[DOWN] + 1


WRONG: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "one": (lambda found: found.pop(DOWN), ("1 tensors", "not in its files", DOWN)),
    "block": (
        lambda found: [found.pop(name) for name in [*found] if ".layers.1." in name],
        ("9 tensors", "not in its files", "model.layers.1."),
    ),
    "head": (lambda found: found.pop(HEAD), ("not in its files", HEAD)),
    "norm": (lambda found: found.pop("model.norm.weight"), ("not in its files", "model.norm.weight")),
    "shape": (_reshape, ("another shape", DOWN, "[48, 40] instead of [48, 80]")),
    "vocabulary": (_swap, ("another shape", EMBEDDING, "[100, 48]")),
    "twice": (_double, ("more than once", DOWN, f"layers.1.mlp.down_proj.weight and {DOWN}")),
    "bias": (
        lambda found: found.update({DOWN.replace("weight", "bias"): torch.ones(48)}),
        ("left out", "down_proj.bias"),
    ),
    "unmerged": (
        lambda found: found.update({DOWN.replace("weight", "lora_A.weight"): torch.ones(4, 80)}),
        ("left out", "lora_A"),
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_model_of_other_tensors_is_refused_by_name(kind: str, loader: Callable[[Path], Any], folder: Path) -> None:
    edit, words = WRONG[kind]
    change(folder, edit)
    with pytest.raises(CheckpointError) as error:
        loader(folder)
    refused(error, *words)


@pytest.mark.parametrize("loader", LOADERS)
def test_shards_are_asked_the_same(loader: Callable[[Path], Any], folder: Path) -> None:
    listed = shard(folder)
    loader(folder)
    file = folder / listed[DOWN]
    save_file({name: value for name, value in load_file(file).items() if name != DOWN}, file, {"format": "pt"})
    index(folder, {name: place for name, place in listed.items() if name != DOWN})
    with pytest.raises(CheckpointError) as error:
        loader(folder)
    refused(error, "not in its files", DOWN)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_a_model_may_lack_or_have_besides(loader: Callable[[Path], Any], folder: Path) -> None:
    """A tied head; a layer for multi-token prediction, which is named."""
    configure(folder, tie_word_embeddings=True)
    change(folder, lambda found: found.pop(HEAD))
    loader(folder)
    change(folder, lambda found: found.update({"mtp.0.weight": torch.ones(3, 3)}))
    (said,) = locate(str(folder)).description.warnings
    assert "mtp.0.weight" in said
    loader(folder)


EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda found: found.pop(EXPERT), ("cannot be put together", "layers.0.mlp.experts.gate_up_proj from 7")),
        (
            lambda found: found.update({EXPERT: found[EXPERT][:, :5].contiguous()}),
            ("cannot be put together", "layers.0"),
        ),
        (
            lambda found: [found.pop(name) for name in [*found] if "layers.0" in name and ".w2." in name],
            ("not in its files", "layers.0.mlp.experts.down_proj"),
        ),
        (
            lambda found: found.update(
                {name.replace(".0.w", ".4.w"): found[name].clone() for name in [*found] if "experts.0.w" in name}
            ),
            ("another shape", "[5, 48, 80] instead of [4, 48, 80]"),
        ),
    ],
    ids=["one", "shape", "kind", "further"],
)
def test_stacked_experts_are_all_there(
    edit: Callable[[Tensors], object], words: tuple[str, ...], loader: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = save(Entry("mixtral", "MixtralForCausalLM").model(), tmp_path / "mixtral")
    change(folder, edit)
    with pytest.raises(CheckpointError) as error:
        loader(folder)
    refused(error, *words)


def test_what_is_loaded_is_what_was_listed(folder: Path) -> None:
    """transformers would take other files than the ones that are edited and hashed."""
    expected = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in expected.items()}, folder / "other.safetensors", {"format": "pt"})
    configure(folder, transformers_weights="other.safetensors")
    found = live(folder).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- an index written for other shards


@pytest.mark.parametrize("loader", LOADERS)
def test_a_stale_index_is_named_and_what_is_not_needed_not_missed(loader: Callable[[Path], Any], folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    change(folder, lambda found: found.pop(HEAD))
    listed = shard(folder)
    index(folder, {**listed, HEAD: listed[DOWN]})
    loader(folder)
    (said,) = locate(str(folder)).description.warnings
    assert HEAD in said
    assert INDEX in said
    configure(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError) as error:
        loader(folder)
    refused(error, HEAD)


def test_a_tensor_in_another_shard_than_listed_is_found_and_what_is_written_is_listed_right(
    folder: Path, tmp_path: Path
) -> None:
    listed = shard(folder)
    (other,) = {*listed.values()} - {listed[DOWN]}
    index(folder, {**listed, DOWN: other})
    live(folder)
    out = applied(folder, tmp_path / "out")
    assert open_checkpoint(out).tensors.keys() == listed.keys()


def applied(folder: Path, out: Path) -> Path:
    basis = torch.nn.functional.normalize(torch.ones(1, D_MODEL))
    save_direction(out.with_suffix(".safetensors"), Direction(basis))
    apply(str(folder), out.with_suffix(".safetensors"), ApplySettings(output=OutputSettings(out=out)))
    return out


# --- ties


def test_a_head_of_its_own_is_one_whatever_the_configuration_says(folder: Path, tmp_path: Path) -> None:
    """Live and offline agree that nothing is tied: then `run` and `apply` write the same bytes."""
    expected = applied(folder, tmp_path / "untied")
    configure(folder, tie_word_embeddings=True)
    files = locate(str(folder))
    (said,) = files.description.warnings
    assert "tie_word_embeddings" in said
    model = load(files, device="cpu").model
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not any(writer.tied for writer in files.anatomy().writers)
    out = applied(folder, tmp_path / "flagged")
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_the_same_head_stored_twice_is_tied(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    change(folder, lambda found: found.update({HEAD: found[EMBEDDING].clone()}))
    files = locate(str(folder))
    assert files.description.warnings == ()
    model = load(files, device="cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert any(writer.tied for writer in files.anatomy().writers)


# --- what a configuration asks for


@pytest.mark.parametrize("said", [..., None, "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_a_dtype_to_compute_in_it_is_the_stored_one(dtype: str, said: Any, folder: Path) -> None:
    kind = getattr(torch, dtype)
    change(folder, lambda found: found.update({name: value.to(kind) for name, value in found.items()}))
    configure(folder, dtype=said, torch_dtype=...)
    assert live(folder).dtype == kind
    assert locate(str(folder)).skeleton().config.dtype == kind


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": [123]},
        {"architectures": "LlamaForCausalLM"},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**30},
        {"text_config": {"num_hidden_layers": 10**6}},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"hidden_size": 2**30},
        {"vocab_size": 2**30},
        {"head_dim": 10**9},
        {"dtype": "cat"},
        {"dtype": "nn"},
    ],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_configuration_of_another_model_is_refused_before_it_is_built(
    loader: Callable[[Path], Any], values: dict[str, Any], folder: Path
) -> None:
    configure(folder, **values)
    with pytest.raises(AbliterateError) as error:
        loader(folder)
    refused(error, "model")


def test_experts_are_bounded_by_what_is_stored(tmp_path: Path) -> None:
    folder = save(Entry("mixtral", "MixtralForCausalLM").model(), tmp_path / "mixtral", tokenizer=False)
    offline(folder)
    configure(folder, num_local_experts=10**7)
    with pytest.raises(CheckpointError) as error:
        offline(folder)
    refused(error, "num_local_experts")


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_weights_of_mlx_are_named(key: str, folder: Path) -> None:
    configure(folder, **{key: {"group_size": 64, "bits": 4}})
    with pytest.raises(ModelError) as error:
        live(folder)
    refused(error, "MLX", "full precision")
    with pytest.raises(ModelError, match="MLX"):
        locate(str(folder)).require_editable()


def test_a_configuration_with_a_byte_order_mark_says_so(folder: Path) -> None:
    file = folder / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with pytest.raises(CheckpointError) as error:
        live(folder)
    refused(error, "config.json", "byte order mark")


def test_tokens_that_the_model_does_not_have_are_named(folder: Path) -> None:
    """An embedding has no row for them: on a GPU that would end the whole process."""
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["vocab"] = {word: number + 1000 for word, number in told["model"]["vocab"].items()}
    file.write_text(json.dumps(told))
    opened = open_model(str(folder), ModelSettings(device="cpu"), Monitor())
    with pytest.raises(PromptError) as error:
        opened.renderer.encode(["Name a fruit."])
    refused(error, f"tokens below {VOCAB}", "another model's")


def test_numbers_too_large_to_compute_with_are_named(folder: Path) -> None:
    def enlarge(found: Tensors) -> None:
        found[DOWN].fill_(3e38)
        found[DOWN.replace("down", "up")] *= 0.01

    change(folder, enlarge)
    with pytest.raises(NumericalError, match=r"block model\.layers\.1: its numbers are too large"):
        study(live(folder).model)


# --- adapters


def adapter(folder: Path, seed: int = 0, **more: Any) -> Path:
    """A LoRA of all output maps of attention."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "target_modules": ["o_proj"]}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/base", **more}))
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"base_model.model.model.layers.{i}.self_attn.o_proj.lora_{part}.weight": torch.randn(
            shape, generator=generator
        )
        for i in range(3)
        for part, shape in (("A", (4, 48)), ("B", (48, 4)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_beside_a_model_is_named_and_no_part_of_it(folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    base = live(folder).model(ids).logits
    adapter(folder)
    found = live(folder)
    assert torch.equal(found.model(ids).logits, base)
    assert not [name for name, _ in found.model.named_modules() if "lora" in name]
    (said,) = found.files.description.warnings
    assert "adapter_config.json" in said
    out = applied(folder, tmp_path / "out")
    assert not [*out.glob("adapter*")], "readers of OUT would look for it"


def test_replies_of_a_model_with_an_adapter_are_not_kept(folder: Path, tmp_path: Path) -> None:
    from abliterate.model._compat import load_adapter

    loaded = live(folder)
    prompts = share_prefixes({"a": [[5, 6, 7], [5, 6, 8]]}, share=False)["a"]
    assert key_of(loaded, prompts, 4) is not None
    load_adapter(loaded.model, str(adapter(tmp_path / "lora")))
    assert key_of(loaded, prompts, 4) is None


@pytest.mark.parametrize(("more", "name"), [({}, "owner/base"), ({"base_model_name_or_path": 7}, "7")])
def test_an_adapter_alone_says_what_it_is(more: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        locate(str(adapter(tmp_path / "lora", **more)))
    refused(error, "only an adapter", name)


def test_an_adapter_is_loaded_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    from abliterate.model._compat import load_adapter
    from abliterate.model.completeness import check_adapter

    lora = adapter(tmp_path / "lora")
    check_adapter("lora", load_adapter(live(folder).model, str(lora)))
    file = lora / "adapter_model.safetensors"
    factors = load_file(file)
    gone = sorted(factors)[0]
    save_file({name: value for name, value in factors.items() if name != gone}, file)
    with pytest.raises(CheckpointError) as error:
        check_adapter("lora", load_adapter(live(folder).model, str(lora)))
    refused(error, "not in its file", "layers.0.self_attn.o_proj.lora_A")
    save_file({**factors, gone: factors[gone][:, :7].contiguous()}, file)
    with pytest.raises(CheckpointError) as error:
        check_adapter("lora", load_adapter(live(folder).model, str(lora)))
    refused(error, "another shape")


@pytest.mark.parametrize("more", [{"target_modules": "(a+)+$"}, {"layers_to_transform": [10**9]}, {"r": -1}])
def test_an_adapter_of_another_model_is_one_line(more: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    from abliterate.model._compat import load_adapter

    with pytest.raises(ModelError) as error:
        load_adapter(live(folder).model, str(adapter(tmp_path / "lora", **more)))
    refused(error, "cannot be put on the model")


def test_a_pickled_adapter_is_no_adapter(tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora")
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors"):
        contender(f"base+{lora}")


# --- GGUF


def gguf_refused(path: Path, *words: str) -> None:
    with pytest.raises(AbliterateError) as error:
        locate(str(path), dtype="float32")
    refused(error, *words)


def test_gguf_holds_every_tensor_of_its_model_and_no_other(tmp_path: Path, cache: Path) -> None:
    whole, path = gguf_files.tensors(), tmp_path / "tiny.gguf"
    found = live(gguf_files.write(path, whole), dtype="float32").model
    assert torch.equal(found.model.layers[1].mlp.down_proj.weight, torch.from_numpy(whole["blk.1.ffn_down.weight"]))
    kept = {*(cache / "gguf").iterdir()}
    gguf_files.write(path, {name: value for name, value in whole.items() if not name.startswith("blk.1.")})
    gguf_refused(path, "12 tensors", "not in its files", "model.layers.1.")
    gguf_files.write(path, whole | {"blk.1.ffn_down.weight": whole["blk.1.ffn_down.weight"][:, :32].copy()})
    gguf_refused(path, "another shape", "model.layers.1.mlp.down_proj.weight")
    gguf_files.write(path, whole | {"blk.1.attn_output.bias": whole["blk.1.attn_q.bias"]})
    gguf_refused(path, "left out", "blk.1.attn_output.bias")
    gguf_files.write(path, whole, blocks=2)
    gguf_refused(path, "left out", "blk.2.")
    gguf_files.write(path, whole, blocks=10**6)
    gguf_refused(path, "1000000", "block_count")
    assert {*(cache / "gguf").iterdir()} == kept, "nothing of what was refused is kept"


def test_gguf_settings_are_of_a_model_as_large_as_the_file(tmp_path: Path) -> None:
    """transformers takes those of a model of 7 billion where there are none, and would draw it at random."""
    path = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.tensors())
    whole = path.read_bytes()
    for key in (b"qwen2.embedding_length", b"qwen2.block_count"):
        assert whole.count(key) == 1
        path.write_bytes(whole.replace(key, key[:-1] + b"x"))
        gguf_refused(path, "as its settings say" if b"embedding" in key else "not in its files")


def test_a_gguf_list_ends_where_the_file_does(tmp_path: Path) -> None:
    path = gguf_files.smallest(tmp_path / "tiny.gguf")
    data = bytearray(path.read_bytes())
    key = b"tokenizer.ggml.tokens"
    at = data.index(key) + len(key) + 4 + 4  # after the type of the entry and that of its items
    assert int.from_bytes(data[at : at + 8], "little") == 8
    data[at : at + 8] = (2**50).to_bytes(8, "little")
    path.write_bytes(data)
    gguf_refused(path, "it ends before what it says it holds")


def test_a_split_gguf_is_read_whole_from_any_part(tmp_path: Path) -> None:
    first, second, third = gguf_files.split(tmp_path, 3)
    whole = live(gguf_files.write(tmp_path / "whole.gguf", gguf_files.tensors()), dtype="float32").model.state_dict()
    found = live(second, dtype="float32").model.state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    third.rename(tmp_path / "elsewhere.gguf")
    gguf_refused(first, "split into 3 files", third.name)
    gguf_refused(tmp_path / "elsewhere.gguf", "part 3 of 3")
    gguf_refused(tmp_path / "none-00001-of-00002.gguf", "no such file")


def test_parts_of_two_models_are_not_put_together(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = gguf_files.split(tmp_path / "a", 2), gguf_files.split(tmp_path / "b", 2, seed=1)
    shutil.copy(theirs[0], ours[1])
    gguf_refused(ours[0], ours[1].name, "part 2 of 2", "found part 1 of 2")
    stored = gguf_files.tensors()
    gguf_files.write(ours[1], stored, settings=False, split_no=1, split_count=2)
    gguf_refused(ours[0], "stored twice")


def test_a_gguf_that_was_written_over_is_read_again_whatever_its_times_say(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.tensors())
    before, about = locate(str(path)), path.stat()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_size == about.st_size
    assert locate(str(path)).folder != before.folder


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "added", "settings"])
def test_a_damaged_entry_of_the_cache_is_made_again(damage: str, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.tensors())
    folder = locate(str(path)).folder
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "gone":
        weights.unlink()
    elif damage == "added":
        (folder / "adapter_config.json").write_text("{}")
    else:
        configure(folder, num_hidden_layers=2)
    again = locate(str(path)).folder
    assert {file.name: file.read_bytes() for file in again.iterdir()} == whole


# --- code that comes along


def plant(folder: Path, name: str, **more: Any) -> Path:
    """Code that leaves a mark, named in the file `name`; the mark."""
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    file = folder / name
    there = json.loads(file.read_text()) if file.exists() else {}
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    file.write_text(json.dumps({**there, "auto_map": classes, **more}))
    return mark


def _asked(*_: object) -> str:
    raise AssertionError("the user was asked whether code may run")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_code_beside_a_gguf_is_not_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", _asked)
    path = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.tensors())
    mark = plant(tmp_path, name, model_type="mine", tokenizer_class="Mine")
    load(locate(str(path), trust_remote_code=True), device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_folder_is_neither_run_nor_asked_about(
    name: str, known: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", _asked)
    strange = {"model_type": "mine"} if name == "config.json" else {"tokenizer_class": "Mine"}
    mark = plant(folder, name, **({} if known else strange))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "evil.py").read_text())
    if known:
        live(folder)
        offline(folder)
    else:
        with pytest.raises(ModelError) as error:
            live(folder)
        refused(error, "custom code", "--trust-remote-code")
    assert not mark.exists()
    assert "evil" not in sys.modules


# --- the hub


@pytest.mark.parametrize(
    ("spec", "identifier"),
    [
        ("owner/name", "owner/name"),
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/name/", "owner/name"),
        ("http://www.huggingface.co/owner/name.v2-1/tree/main?not-for-all-audiences=true", "owner/name.v2-1"),
        ("huggingface.co/owner/name#usage", "owner/name"),
        ("https://hf.co/owner/name", "owner/name"),
        ("hf://owner/name", "owner/name"),
        ("name", None),
        ("https://huggingface.co/name", None),
        ("https://huggingface.co/datasets/owner/name", None),
        ("https://huggingface.co/owner/name/blob/main/model-Q4.gguf", None),
        ("https://huggingface.co/owner/name/tree/v2", None),
        ("https://example.com/owner/name", None),
        ("base+adapter", None),
        ("../name", None),
        ("owner/na me", None),
        ("owner/name\n", None),
    ],
)
def test_addresses_on_the_hub_are_ids(
    spec: str, identifier: str | None, monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> None:
    asked: list[str] = []

    def snapshot_download(repo: str, **_: Any) -> str:
        asked.append(repo)
        return str(made)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert hub_id(spec) == identifier
    if identifier is None:
        with pytest.raises(ModelError) as error:
            locate(spec)
        refused(error, "model")
        assert asked == []
    else:
        assert locate(spec).name == identifier
        assert asked == [identifier]


def test_copies_of_the_weights_on_the_hub_are_not_fetched(monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    held = [
        *("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", INDEX),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tekken.json"),
    ]
    copies = [
        *("original/consolidated.00.pth", "original/params.json", "original/model.safetensors", "pytorch_model.bin"),
        *("consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "consolidated.safetensors.index.json"),
        *("onnx/model.onnx", "onnx/config.json", "metal/model.safetensors", "evil.py", "model.gguf"),
    ]
    fetched: list[str] = []

    def snapshot_download(_: str, *, allow_patterns: list[str], ignore_patterns: list[str], tqdm_class: type) -> str:
        found = filter_repo_objects([*held, *copies], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.extend(found)
        return str(made)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    snapshot("owner/name", trust_remote_code=False)
    assert sorted(fetched) == sorted(held)
