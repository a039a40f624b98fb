"""One plan as hooks, as weights and as a LoRA adapter is one model, for every variant; or it is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from abliterate.algebra import SHORTEST, orthonormal, project_out
from abliterate.config import EditSettings, OutputSettings
from abliterate.edit.direction import Candidates, Direction, Site
from abliterate.edit.hooks import ablation
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.edit.write import EditTarget, opened, realise
from abliterate.errors import UsageError
from abliterate.model.anatomy import Anatomy, stream_out, study
from abliterate.model.batches import hooked
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import Monitor
from families import BY_NAME, D_MODEL, load, save
from zoo import ENTRIES

pytestmark = [
    # Said by libraries to each other.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute"),
]

IDS = torch.randint(4, 256, (2, 10), generator=torch.Generator().manual_seed(3))
#: Where the directions are said to have been measured.
SITE = Site(layer=2, position=-1)
_ZOO = {str(entry): entry for entry in ENTRIES}

#: Models made of a family of `families` with another configuration.
_CHANGED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "granite-tied": ("granite", {"tie_word_embeddings": True}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 32}),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    # Not the seeds of the models: with those the direction would be an embedding's first row.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3000 + seed))


@cache
def model_of(name: str) -> Any:
    if name in _CHANGED:
        family, changes = _CHANGED[name]
        return BY_NAME[family].model(**changes)
    return BY_NAME[name].model() if name in BY_NAME else _ZOO[name].model()


@cache
def anatomy_of(name: str) -> Anatomy:
    return study(model_of(name))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a model's name to its checkpoint, written once."""

    @cache
    def write(name: str) -> Path:
        return save(model_of(name), tmp_path_factory.mktemp("stored") / name, tokenizer=False)

    return write


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return logits


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- directions


def candidates(sites: int) -> Candidates:
    return Candidates(random(1, sites, D_MODEL, seed=1), random(1, sites, D_MODEL, seed=2))


def straight(name: str, k: int = 1) -> Direction:
    """Random orthonormal rows, with means at every site."""
    return Direction(orthonormal(random(k, D_MODEL)), candidates(anatomy_of(name).layers + 1), site=SITE)


def projected(name: str) -> Direction:
    """A direction without its component along the harmless mean."""
    found = straight(name)
    assert found.candidates is not None
    return replace(found, basis=orthonormal(project_out(found.basis, found.candidates.harmless_mean[0, 2:3])))


def oblique(_: str) -> Direction:
    """LEACE of two classes in closed form: L along their difference, R along Σ⁻¹ times it, R Lᵀ = 1."""
    mixing, gap = random(D_MODEL, D_MODEL, seed=3), random(D_MODEL, seed=4)
    harmful, harmless = random(200, D_MODEL, seed=5) @ mixing + gap, random(200, D_MODEL, seed=6) @ mixing
    everything = torch.cat([harmful, harmless]).double()
    r = harmful.double().mean(0) - harmless.double().mean(0)
    basis = r / r.norm()
    reader = torch.linalg.solve(everything.T.cov(), r)
    reader = reader / (reader @ basis)
    assert float(reader.norm()) > 1.5, "the control: an orthogonal projection is another edit"
    return Direction(basis.float()[None], reader=reader.float()[None], mean=everything.mean(0).float(), site=SITE)


# --- variants


@dataclass(frozen=True, slots=True)
class Case:
    """Settings, what direction they are for, and whether the model is another one afterwards."""

    settings: EditSettings
    direction: Callable[[str], Direction] = straight
    changes: bool = True


def three(name: str) -> Direction:
    return straight(name, 3)


#: Rules that fit every model; the last one that fits a writer decides.
_RULES = "@1=0.4,embedding=0.7,*.2.*=-0.25"

CASES: Mapping[str, Case] = {
    "plain": Case(EditSettings()),
    "subspace": Case(EditSettings(), three),
    "norm-preserving": Case(EditSettings(norm_preserving=True)),
    "projected": Case(EditSettings(), projected),
    "biprojected": Case(EditSettings(biprojected=True)),
    "affine": Case(EditSettings(affine=True)),
    "leace": Case(EditSettings(), oblique),
    "leace-affine": Case(EditSettings(affine=True), oblique),
    "layers": Case(EditSettings(layers="0,2-")),
    "components": Case(EditSettings(components="attention,state_space,experts")),
    "strengths": Case(EditSettings(strengths=_RULES), three),
    "stronger": Case(EditSettings(strength=-0.5)),
    "zero": Case(EditSettings(strength=0, affine=True, norm_preserving=True), changes=False),
    "untied": Case(EditSettings(untie=True)),
    "untied-affine": Case(EditSettings(untie=True, affine=True)),
    "all-at-once": Case(EditSettings(norm_preserving=True, affine=True, strengths=_RULES)),
    "norms-of-attention": Case(
        EditSettings(norm_preserving=True, components="attention,embedding", strength=0.7), three
    ),
    "affine-subspace": Case(EditSettings(affine=True, strength=0.5), three),
    "untied-everything": Case(EditSettings(untie=True, affine=True, norm_preserving=True)),
}
_UNTIED = ("untied", "untied-affine", "untied-everything")
_ALL = tuple(name for name in CASES if name not in _UNTIED)
_SOME = ("norm-preserving", "biprojected", "affine", "leace", "strengths")

#: Which variants are tried on which models.
TRIED: Mapping[str, tuple[str, ...]] = {
    "llama": _ALL,
    "llama-tied": (*_SOME, *_UNTIED),
    "gpt2": _SOME,
    "gpt2-tied": tuple(CASES),
    "gemma2": (*_ALL, "leace-affine"),
    "gemma2-tied": ("affine", "untied-affine"),
    "gemma3": ("affine", "all-at-once"),
    "granite": _SOME,
    "opt": _SOME,
    "opt-projected": ("norm-preserving", "affine", "all-at-once"),
    "mixtral": (*_SOME, "components", "norms-of-attention", "affine-subspace"),
    "gpt_oss": (*_SOME, "components", "norms-of-attention", "leace-affine"),
    "qwen2_moe": (*_SOME, "norms-of-attention"),
    "deepseek_v3": _SOME,
    "jamba": (*_SOME, "components"),
    "bloom": (*_SOME, "untied-affine"),
    "mamba2": _SOME,
    "jetmoe": ("affine", "norm-preserving"),
    "granitemoeshared": ("norm-preserving",),
}

_FUSED = ("mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3", "jamba", "jetmoe", "granitemoeshared")
_NO_HOLDER = "found none among what is edited; see --untie"


def refused(name: str, case: str, realisation: str) -> str | None:
    """What a realisation says of a variant that it cannot hold; None if it holds it."""
    settings = CASES[case].settings
    if realisation == "plan":
        return _refused_plan(name, case)
    if realisation == "hooks":
        fused = name in _FUSED and settings.norm_preserving and case != "norms-of-attention"
        return r"writer '.*(experts|linear)': a norm-preserving edit cannot be hooks" if fused else None
    without_bias = {"llama-tied": "model.layers.0.self_attn.o_proj", "jetmoe": None}.get(name)
    holds_none = settings.affine and not settings.untie and without_bias
    if realisation == "weights":
        return rf"writer '{without_bias}': expected a bias to hold a constant" if holds_none else None
    return _refused_adapter(name, settings, f"an offset needs a bias.*{without_bias}" if holds_none else None)


def _refused_plan(name: str, case: str) -> str | None:
    if name.startswith("gemma") and case.startswith("leace"):
        return r"writer 'model\.layers\.0\.self_attn\.o_proj': an oblique edit"
    return _NO_HOLDER if (name, case) == ("gemma2-tied", "affine") else None


def _refused_adapter(name: str, settings: EditSettings, offset: str | None) -> str | None:
    if settings.strength == 0:
        return "expected at least one edit"
    if settings.norm_preserving:
        return "a LoRA adapter cannot hold this edit: .*norm-preserving scales a whole weight"
    if name == "jetmoe" or (name == "bloom" and settings.untie):
        return "expected a map with a weight, found none"
    if offset is not None:
        return offset
    if settings.untie:
        return "--untie: an adapter cannot untie the head"
    return r"PEFT holds no 'out_proj' of mamba2 models" if name == "mamba2" else None


# --- realisations


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """No file may be left in `folder` when the body is refused."""
    try:
        yield
    except UsageError:
        assert not [path for path in folder.rglob("*") if path.is_file()]
        raise


def write(name: str, source: Path, plan: Plan, direction: Direction, out: Path, realisation: str) -> tuple[str, ...]:
    """Write `plan` into the new folder `out`, as a run does; what was written."""
    files = ModelOnDisk(str(source), "folder", source)
    target = EditTarget(files, anatomy_of(name), model_of(name))
    output = OutputSettings.model_validate({"out": out, "realisation": realisation})
    with opened(output, target, plan) as staging, nothing_written(staging.folder):
        return realise(plan, direction, target, staging, output, Monitor()).written


def adapted(name: str, out: Path, folders: tuple[str, ...]) -> Any:
    """A copy of the model with the adapters of `out` put on by PEFT."""
    names = [folder.replace(".", "whole") for folder in folders]
    wrapped: Any = peft.PeftModel.from_pretrained(
        copy.deepcopy(model_of(name)), out / folders[0], adapter_name=names[0]
    )
    for adapter, folder in zip(names[1:], folders[1:], strict=True):
        wrapped.load_adapter(out / folder, adapter_name=adapter)
    wrapped.base_model.set_adapter(names, inference_mode=True)
    return wrapped


def logits_by(realisation: str, name: str, source: Path, plan: Plan, direction: Direction, out: Path) -> Tensor:
    """Logits of the model with `plan`, realised one way."""
    if realisation == "hooks":
        with ablation(model_of(name), plan):
            return logits_of(model_of(name))
    written = write(name, source, plan, direction, out, realisation)
    if realisation == "lora":
        return logits_of(adapted(name, out, written))
    return logits_of(load(out, attention=model_of(name).config._attn_implementation))


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in TRIED.items() for case in dict.fromkeys(cases)]
)
def test_realisations_agree_or_refuse_by_name(
    name: str, case: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    direction = CASES[case].direction(name)
    if (said := refused(name, case, "plan")) is not None:
        with pytest.raises(UsageError, match=said):
            plan_for(anatomy_of(name), direction, CASES[case].settings)
        return
    plan = plan_for(anatomy_of(name), direction, CASES[case].settings)
    before = logits_of(model_of(name))
    found: dict[str, Tensor] = {}
    for realisation in ("hooks", "weights", "lora"):
        out = tmp_path / realisation
        if (said := refused(name, case, realisation)) is not None:
            with pytest.raises(UsageError, match=said):
                logits_by(realisation, name, stored(name), plan, direction, out)
            assert not list(tmp_path.glob(f"*{realisation}*"))
        else:
            found[realisation] = logits_by(realisation, name, stored(name), plan, direction, out)
    assert torch.equal(logits_of(model_of(name)), before), "hooks are gone"
    for realisation, logits in found.items():
        assert distance(logits, next(iter(found.values()))) < 1e-4, realisation
        assert (distance(logits, before) > 1e-3) == CASES[case].changes, realisation


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_another_direction_is_another_model(name: str) -> None:
    model, made_of = model_of(name), straight(name)
    other = replace(made_of, basis=orthonormal(random(1, D_MODEL, seed=77)))
    found = []
    for direction in (made_of, other):
        with ablation(model, plan_for(anatomy_of(name), direction)):
            found.append(logits_of(model))
    assert distance(found[1], found[0]) > 0.02


# --- norm-preserving


@pytest.mark.parametrize("name", ["llama", "gpt2-tied", "gemma2", "mixtral", "gpt_oss", "mamba2", "opt-projected"])
@pytest.mark.parametrize("k", [1, 3])
def test_norm_preserving_keeps_every_vector_as_long_and_writes_nothing_along_the_direction(
    name: str, k: int, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    direction = straight(name, k)
    kept, plain = (
        plan_for(anatomy_of(name), direction, EditSettings(norm_preserving=keep, untie=name == "gpt2-tied"))
        for keep in (True, False)
    )
    models = []
    for plan, folder in ((kept, "kept"), (plain, "plain")):
        write(name, stored(name), plan, direction, tmp_path / folder, "weights")
        models.append(load(tmp_path / folder))
    for edit in kept.edits:
        assert edit.writer.weight is not None
        old, new, control = (
            model.get_parameter(edit.writer.weight).movedim(edit.writer.axis, -1) for model in (model_of(name), *models)
        )
        lengths = old.norm(dim=-1)
        torch.testing.assert_close(new.norm(dim=-1), lengths, rtol=1e-5, atol=0)
        assert float((new @ edit.basis.T).abs().max()) < 1e-5 * float(lengths.max()), edit.writer.module
        assert float((control.norm(dim=-1) / lengths).min()) < 0.97, edit.writer.module
        assert torch.allclose(new, control * (lengths / control.norm(dim=-1))[..., None], atol=1e-5)
        if edit.writer.bias is not None:
            biases = [model.get_parameter(edit.writer.bias) for model in models]
            assert torch.equal(biases[0], biases[1]), "a bias is not given its length back"


@pytest.mark.parametrize("share", [0.999, 0.99999, 1.0])
def test_what_is_nearly_all_direction_is_not_blown_up(
    share: float, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    """A column and a row of the embedding: where less than a hundredth would be left, rounding is all there is."""
    model, direction = copy.deepcopy(model_of("llama")), straight("llama")
    other = orthonormal(torch.cat([direction.basis, random(1, D_MODEL, seed=5)]))[1]
    rest = (1 - share**2) ** 0.5
    vector = share * direction.basis[0] + rest * other
    model.model.layers[1].mlp.down_proj.weight[:, 3] = 2 * vector
    model.model.embed_tokens.weight[int(IDS[0, 4])] = vector
    source = save(model, tmp_path / "source", tokenizer=False)
    plan = plan_for(anatomy_of("llama"), direction, EditSettings(norm_preserving=True))
    with ablation(model, plan):
        hooks = logits_of(model)
    write("llama", source, plan, direction, tmp_path / "out", "weights")
    edited = load(tmp_path / "out")
    assert distance(logits_of(edited), hooks) < 1e-4
    left = float(edited.model.layers[1].mlp.down_proj.weight[:, 3].norm())
    assert left == pytest.approx(2 if rest > SHORTEST else 2 * rest, rel=1e-3, abs=1e-5)


@contextmanager
def sites_of(model: Any, anatomy: Anatomy) -> Iterator[list[Tensor]]:
    """The stream [tokens, d] where it enters each block and leaves the last, in a forward pass inside."""
    seen: list[Tensor] = []
    blocks = [model.get_submodule(name) for name in anatomy.blocks]

    def entering(_: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).reshape(-1, anatomy.d_model).clone())

    def leaving(_: Any, __: Any, output: Any) -> None:
        seen.append(stream_out(output).reshape(-1, anatomy.d_model).clone())

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    with hooked([*handles, blocks[-1].register_forward_hook(leaving)]):
        yield seen
    assert len(seen) == anatomy.layers + 1


def stream_of(model: Any, name: str, plan: Plan | None = None) -> list[Tensor]:
    with sites_of(model, anatomy_of(name)) as seen:
        if plan is None:
            logits_of(model)
            return seen
        with ablation(model, plan):
            logits_of(model)
    return seen


_COMPLETE = ("llama", "llama-tied", "gpt2-tied", "gemma2", "gemma3", "gemma3-tied", "granite", "opt-projected")


@pytest.mark.parametrize("name", [*_COMPLETE, "gpt_oss", "bloom", "mamba2", "jamba", "deepseek_v3"])
@pytest.mark.parametrize("realisation", ["hooks", "weights"])
def test_affine_puts_the_mean_back_at_every_site_of_every_token(
    name: str, realisation: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    tied = any(writer.tied for writer in anatomy_of(name).writers)
    direction, model = straight(name, 3), model_of(name)
    affine, plain = (
        plan_for(anatomy_of(name), direction, EditSettings(affine=put_back, untie=tied)) for put_back in (True, False)
    )
    assert direction.candidates is not None
    expected = direction.candidates.harmless_mean[0, 2] @ direction.basis.T
    if realisation == "weights":
        write(name, stored(name), affine, direction, tmp_path / "out", "weights")
        found = stream_of(load(tmp_path / "out", attention=model.config._attn_implementation), name)
    else:
        found = stream_of(model, name, affine)
    controls = stream_of(model, name, plain), stream_of(model, name)
    assert float(expected.norm()) > 0.5
    for after, without, before in zip(found, *controls, strict=True):
        size = float(before.norm(dim=-1).max())
        assert float((after @ direction.basis.T - expected).abs().max()) < 1e-5 * size
        assert float((without @ direction.basis.T).abs().max()) < 1e-5 * size
        assert float((before @ direction.basis.T - expected).abs().max()) > 1e-2 * size


def test_leace_of_an_embedding_behind_a_norm_is_refused() -> None:
    with pytest.raises(UsageError, match=r"writer 'transformer\.word_embeddings': an oblique edit"):
        plan_for(anatomy_of("bloom"), oblique("bloom"), EditSettings(untie=True))


@pytest.mark.parametrize("name", ["llama", "gpt2-tied", "gpt_oss"])
def test_affine_leace_leaves_of_every_token_what_the_mean_holds(name: str) -> None:
    direction = oblique(name)
    tied = any(writer.tied for writer in anatomy_of(name).writers)
    plan = plan_for(anatomy_of(name), direction, EditSettings(affine=True, untie=tied))
    assert direction.reader is not None
    assert direction.mean is not None
    expected = direction.reader @ direction.mean
    for after, before in zip(stream_of(model_of(name), name, plan), stream_of(model_of(name), name), strict=True):
        size = float(before.norm(dim=-1).max() * direction.reader.norm())
        assert float((after @ direction.reader.T - expected).abs().max()) < 1e-5 * size
        assert float((before @ direction.reader.T - expected).abs().max()) > 1e-2 * size


def constant_at_sites(name: str) -> tuple[Tensor, Tensor]:
    """What an affine edit adds along the direction to every token behind the first block, and what it should."""
    direction = straight(name)
    affine, plain = (plan_for(anatomy_of(name), direction, EditSettings(affine=put_back)) for put_back in (True, False))
    streams = (torch.stack(stream_of(model_of(name), name, plan)) @ direction.basis[0] for plan in (affine, plain))
    assert direction.candidates is not None
    with_mean, without = streams
    return (with_mean - without)[1:], direction.candidates.harmless_mean[0, 2] @ direction.basis[0]


@pytest.mark.parametrize(
    "name",
    [
        "llama-tied",
        "gpt2-tied",
        "jetmoe",
        "bloom",
        "granite-tied",
    ],
)
def test_of_a_tied_embedding_the_constant_is_added_to_what_it_writes(name: str) -> None:
    found, expected = constant_at_sites(name)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-4)


# --- untied


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "gemma3-tied", "bloom"])
def test_untied_head_is_the_old_embedding_and_transformers_knows(
    name: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    direction, model = straight(name), model_of(name)
    plan = plan_for(anatomy_of(name), direction, EditSettings(untie=True))
    assert plan.left_alone == ()
    write(name, stored(name), plan, direction, tmp_path / "out", "weights")
    edited = load(tmp_path / "out", attention=model.config._attn_implementation)
    head, embedding = edited.get_output_embeddings().weight, edited.get_input_embeddings().weight
    old = model.get_input_embeddings().weight
    assert not edited.config.tie_word_embeddings
    assert torch.equal(head, old)
    assert float((embedding @ plan.edits[0].basis.T).abs().max()) < 1e-5
    assert float((old @ plan.edits[0].basis.T).abs().max()) > 0.5
    tied = plan_for(anatomy_of(name), direction)
    with ablation(model, plan):
        hooks = logits_of(model)
    assert distance(logits_of(edited), hooks) < 1e-4
    with ablation(model, tied):
        assert distance(logits_of(model), hooks) > 1e-2, "the control: the embedding counts"


def test_untying_what_is_not_tied_or_not_edited_is_refused(stored: Callable[[str], Path], tmp_path: Path) -> None:
    for name, settings, said in (
        ("llama", EditSettings(untie=True), "expected an embedding tied to the head, found one that is not"),
        ("llama-tied", EditSettings(untie=True, components="mlp"), "expected the embedding among what is edited"),
    ):
        plan = plan_for(anatomy_of(name), straight(name), settings)
        with pytest.raises(UsageError, match=said):
            write(name, stored(name), plan, straight(name), tmp_path / name, "weights")
        assert not list(tmp_path.iterdir())


# --- several plans at once


def test_plans_that_differ_in_more_than_their_directions_are_refused() -> None:
    model, anatomy, first = model_of("llama"), anatomy_of("llama"), straight("llama")
    second = replace(first, basis=orthonormal(random(1, D_MODEL, seed=77)))
    plain = plan_for(anatomy, first)
    with ablation(model, plain, plan_for(anatomy, second)):
        pass
    for settings in (
        EditSettings(strength=0.5),
        EditSettings(layers="1"),
        EditSettings(strengths="mlp=0.5"),
        EditSettings(norm_preserving=True),
        EditSettings(affine=True),
    ):
        with (
            pytest.raises(UsageError, match="several plans at once"),
            ablation(model, plain, plan_for(anatomy, second, settings)),
        ):
            pass
    for other in (straight("llama", 3), replace(second, reader=random(1, D_MODEL))):
        with pytest.raises(UsageError, match="several plans at once"), ablation(model, plain, plan_for(anatomy, other)):
            pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
