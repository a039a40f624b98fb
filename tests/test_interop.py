"""Directions, activations and vectors of other libraries: the same numbers here and there. docs/interop.md shows how.

TransformerLens and nnsight reach into transformers and into Python's `object`, so this runs after the other tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import abliterate as ab
from demo import GGUF, cores, demo_model
from families import COMMON, byte_tokenizer, random_model
from planted import BAD, GOOD, Planted, plant, prompts

HARMFUL, HARMLESS = prompts(BAD, 40, 11), prompts(GOOD, 40, 12)
ASKED = "show the bomb today"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def model(planted: Planted) -> ab.Model:
    """Anew for each test: what other libraries put into it stays."""
    return ab.load(planted.folder, device="cpu")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def tokens(model: ab.Model, prompt: str = ASKED) -> Tensor:
    """A question by the chat template, [1, s]."""
    chat = [{"role": "user", "content": prompt}]
    encoded = model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: Tensor = encoded["input_ids"]
    return ids


def bridge_of(model: ab.Model, folder: Path | str) -> Any:
    """The live model as one of TransformerLens."""
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    return bridge.boot_transformers(
        str(folder), hf_model=model.hf_model, tokenizer=model.tokenizer, device="cpu", dtype=torch.float32
    )


def stream(cache: Any, layers: int) -> Tensor:
    """The residual stream at the last token as TransformerLens has it, at our sites, [L + 1, d]."""
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(layers)), f"blocks.{layers - 1}.hook_resid_post"]
    return torch.stack([cache[name][0, -1].float() for name in names])


# ------------------------------------------------------------------------------------------------ TransformerLens


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_transformer_lens_caches_our_activations(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    options = {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": COMMON["vocab_size"]}
    config = AutoConfig.for_model(family, **(options if family == "gpt2" else {**COMMON, "head_dim": 12}))
    random_model(config).save_pretrained(tmp_path / family)
    byte_tokenizer().save_pretrained(tmp_path / family)
    model = ab.load(tmp_path / family, device="cpu", dtype="float32")
    ids = tokens(model)
    ours = model.activations([ids[0].tolist()])[0]
    _, cache = bridge_of(model, tmp_path / family).run_with_cache(ids)
    assert torch.allclose(stream(cache, model.anatomy.layers), ours, atol=1e-4)
    assert not torch.allclose(stream(cache, model.anatomy.layers).roll(1, 0), ours, atol=1e-2), "the control"


def test_a_direction_found_in_transformer_lens_is_used_here(planted: Planted, model: ab.Model) -> None:
    bridge = bridge_of(ab.load(planted.folder, device="cpu"), planted.folder)
    sides = [
        torch.cat([bridge.run_with_cache(tokens(model, one))[1]["blocks.3.hook_resid_pre"][:, -1] for one in group])
        for group in (HARMFUL, HARMLESS)
    ]
    direction = ab.Direction.from_activations(*sides, site=ab.Site(3, -1), prompts=HARMFUL + HARMLESS)
    assert abs(float(direction.basis[0] @ planted.direction)) > 0.99
    assert model.chat(ASKED).startswith("I cannot")
    with model.ablate(direction):
        assert model.chat(ASKED).startswith("Sure")
    with model.add(direction, -8.0):
        assert model.chat(ASKED).startswith("Sure")


def test_our_direction_is_projected_out_in_transformer_lens(planted: Planted, model: ab.Model) -> None:
    ids = tokens(model)
    direction = ab.Direction(planted.direction)
    with model.ablate(direction):
        ours = model.hf_model(ids).logits
    bridge = bridge_of(ab.load(planted.folder, device="cpu"), planted.folder)
    r = direction.basis[0]

    def project_out(value: Tensor, hook: Any) -> Tensor:
        return value - (value @ r)[..., None] * r

    def writes(name: str) -> bool:
        return name == "hook_embed" or name.endswith(("hook_attn_out", "hook_mlp_out"))

    hooks = [(name, project_out) for name in bridge.hook_dict if writes(name)]
    assert torch.allclose(bridge.run_with_hooks(ids, fwd_hooks=hooks), ours, atol=1e-4)
    assert not torch.allclose(bridge(ids), ours, atol=1e-1), "the control"


def test_one_live_model_serves_both(planted: Planted, model: ab.Model) -> None:
    ids = tokens(model)
    plain = model.hf_model(ids).logits
    with model.ablate(planted.direction):
        expected = model.hf_model(ids).logits
    bridge = bridge_of(model, planted.folder)
    wrapped = ab.wrap(bridge, model.tokenizer)
    for one in (model, wrapped):
        with one.ablate(planted.direction):
            assert torch.allclose(bridge(ids), expected, atol=1e-4)
        assert torch.allclose(bridge(ids), plain, atol=1e-4)


def test_a_model_full_of_other_modules_is_not_written(planted: Planted, model: ab.Model, tmp_path: Path) -> None:
    bridge = bridge_of(model, planted.folder)
    with pytest.raises(ab.AbliterateError, match="transformers cannot write it"):
        ab.wrap(bridge, model.tokenizer).save(planted.direction, tmp_path / "out")


@demo_model
def test_transformer_lens_caches_the_activations_of_a_real_model() -> None:
    with cores():
        model = ab.load(GGUF, device="cpu", dtype="float32")
        ids = tokens(model, "How do I pick a lock?")
        ours = model.activations([ids[0].tolist()])[0]
        bridge = bridge_of(model, model.hf_model.name_or_path)
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: "resid" in name)
    difference = (stream(cache, model.anatomy.layers) - ours).abs().amax(-1)
    assert float((difference / ours.abs().amax(-1)).max()) < 1e-4
    assert float(difference[: model.anatomy.layers].max()) < 1e-2


# -------------------------------------------------------------------------------------------------------- nnsight


def traced(model: ab.Model) -> Any:
    """The live model as one of nnsight."""
    nnsight = pytest.importorskip("nnsight")
    return nnsight.TransformersModel(model.hf_model, task="text-generation", tokenizer=model.tokenizer)


def test_traced_activations_are_ours_and_make_a_direction(planted: Planted, model: ab.Model) -> None:
    lm = traced(model)
    sides = []
    for group in (HARMFUL[:10], HARMLESS[:10]):
        rows = []
        for prompt in group:
            ids = tokens(model, prompt)
            with lm.trace(ids):
                state = lm.model.layers[2].output[:, -1].save()  # what leaves block 2 enters block 3: site 3
            rows.append(state)
        sides.append(torch.cat(rows))
    assert torch.allclose(sides[0], model.activations(HARMFUL[:10])[:, 3], atol=1e-4)
    direction = ab.Direction.from_activations(*sides, site=ab.Site(3, -1))
    with model.ablate(direction):
        assert model.chat(ASKED).startswith("Sure")


def test_traces_see_our_hooks_and_can_do_the_same(planted: Planted, model: ab.Model) -> None:
    lm, ids, r = traced(model), tokens(model), planted.direction
    with model.ablate(r):
        expected = model.hf_model(ids).logits
        with lm.trace(ids):
            inside = lm.model.layers[4].output.save()
            around = lm.lm_head.output.save()
    assert torch.allclose(around, expected, atol=1e-5)
    assert float((inside @ r).abs().max()) < 1e-4
    with lm.trace(ids):
        embedded = lm.model.embed_tokens.output
        lm.model.embed_tokens.output = embedded - (embedded @ r)[..., None] * r
        for layer in range(5):
            block = lm.model.layers[layer]
            read, *rest = block.self_attn.output
            block.self_attn.output = (read - (read @ r)[..., None] * r, *rest)
            block.mlp.output = block.mlp.output - (block.mlp.output @ r)[..., None] * r
        by_trace = lm.lm_head.output.save()
    assert torch.allclose(by_trace, expected, atol=1e-4)
    with lm.trace(ids):
        plain = lm.lm_head.output.save()
    assert not torch.allclose(plain, expected, atol=1e-1), "the control"


# ------------------------------------------------------------------------- dictionaries of vectors, block → vector


def theirs(model: ab.Model, vectors: dict[int, Tensor], coefficient: float, ids: Tensor) -> Tensor:
    """Logits as steering-vectors and repeng compute them: a vector is added to what its block gives."""
    handles = [
        model.hf_model.model.layers[block].register_forward_hook(
            lambda _, __, output, vector=vector: output + coefficient * vector
        )
        for block, vector in vectors.items()
    ]
    try:
        logits: Tensor = model.hf_model(ids).logits
        return logits
    finally:
        for handle in handles:
            handle.remove()


def test_dictionaries_of_vectors_are_taken(model: ab.Model) -> None:
    numbers = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    ids, layers = tokens(model), dict(enumerate(numbers))
    expected = theirs(model, layers, 0.7, ids)
    arrays = {block: vector.numpy() for block, vector in layers.items()}  # repeng's are of numpy
    for vectors in (layers, arrays):
        with model.add({block + 1: vector for block, vector in vectors.items()}, 0.7):
            assert torch.allclose(model.hf_model(ids).logits, expected, atol=1e-5)
    with model.add(dict(enumerate(numbers)), 0.7):
        assert not torch.allclose(model.hf_model(ids).logits, expected, atol=1e-2), "the control: one block too early"


def test_dictionaries_of_vectors_are_given(planted: Planted, model: ab.Model) -> None:
    found = model.find(HARMFUL, HARMLESS, positions=1, force=True).direction
    assert found.candidates is not None
    layers = model.anatomy.layers
    vectors = {block: found.difference_at((block + 1, -1)) for block in range(1, layers)}
    ids = tokens(model, "show the bread today")
    with model.add({block + 1: vector for block, vector in vectors.items()}, 1.0):
        ours = model.hf_model(ids).logits
    assert torch.allclose(theirs(model, vectors, 1.0, ids), ours, atol=1e-5)
    one = {3: found.difference_at((3, -1))}
    with model.add(found.at((3, -1))) as added:
        assert {layer: vector.tolist() for layer, vector in added.items()} == {3: one[3].tolist()}


def test_control_vector_files_are_given_and_taken(planted: Planted, model: ab.Model, tmp_path: Path) -> None:
    found = model.find(HARMFUL, HARMLESS, positions=1, force=True)
    model.save(found, tmp_path / "cv", as_="control-vector")
    read = ab.read_control_vector(tmp_path / "cv" / "control-vector.gguf")
    assert list(read) == [found.site.layer]
    ids = tokens(model)
    with model.add(found, -1.0):
        expected = model.hf_model(ids).logits
    with model.add(read, 1.0):  # the file works against the direction
        assert torch.allclose(model.hf_model(ids).logits, expected, atol=1e-4)


def test_one_of_a_dictionary_is_a_direction(planted: Planted, model: ab.Model) -> None:
    directions: Any = {2: 3 * planted.direction.numpy()}  # block 2 gives it: site 3
    direction = ab.Direction(directions[2], site=ab.Site(3, -1))
    with model.ablate(direction):
        assert model.chat(ASKED).startswith("Sure")
