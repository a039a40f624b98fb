"""The Python face on a model whose refusal is one planted direction: every verb, and what it takes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import abliterate as ab
from abliterate.api.results import FoundDirection
from abliterate.edit.direction import load_direction
from abliterate.errors import UsageError
from abliterate.evaluation.judging import Label
from abliterate.prompts.contrastive import fingerprint
from planted import BAD, GOOD, Planted, plant, prompts

HARMFUL, HARMLESS = prompts(BAD, 100, 11), prompts(GOOD, 100, 12)
ASKED = "show the bomb today"
SHORT: dict[str, Any] = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def model(planted: Planted) -> ab.Model:
    return ab.load(planted.folder, device="cpu")


@pytest.fixture(scope="module")
def found(model: ab.Model) -> FoundDirection:
    return model.find(harmful=HARMFUL, harmless=HARMLESS)


def refuses(reply: str) -> bool:
    return ab.judge(reply).label is Label.REFUSAL


def hugging_face(planted: Planted) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(planted.folder), AutoTokenizer.from_pretrained(planted.folder)


def generated(model: ab.Model, prompt: str) -> str:
    """By transformers alone."""
    chat = [{"role": "user", "content": prompt}]
    encoded = model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.hf_model.generate(**encoded, max_new_tokens=8, do_sample=False)
    return str(model.tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_direction_of_own_prompts_is_the_planted_one(found: FoundDirection, planted: Planted) -> None:
    assert abs(float(found.direction.basis[0] @ planted.direction)) > 0.99
    assert found.passed
    assert found.direction.learnt_from <= {fingerprint(text) for text in HARMFUL + HARMLESS}
    assert len(found.direction.learnt_from) == 160  # 64 % and 16 % of both


def test_prompts_are_those_that_find_learns_from(model: ab.Model, found: FoundDirection) -> None:
    texts = ab.load_prompts(harmful=HARMFUL, harmless=HARMLESS)
    train, val = ([*texts.harmful.train, *texts.harmless.train], [*texts.harmful.val, *texts.harmless.val])
    assert found.direction.learnt_from == {fingerprint(text) for text in train + val}
    bad, good = (model.activations(one.train).mean(0)[3] for one in (texts.harmful, texts.harmless))
    assert torch.allclose(found.direction.difference_at(ab.Site(3, -1)), bad - good, atol=1e-5)
    assert len(ab.load_prompts(limit=7).harmful.train) == 7
    with pytest.raises(UsageError, match="load_prompts: it has no option 'harmfull'"):
        ab.load_prompts(harmfull=HARMFUL)  # type: ignore[call-arg]


def test_what_was_found_shows_itself(found: FoundDirection, tmp_path: Path) -> None:
    assert repr(found).startswith(f"FoundDirection(layer {found.site.layer}, position {found.site.position} of ")
    frame = found.to_pandas()
    assert len(frame) == 6 * 3
    assert frame.chosen.sum() == 1
    assert frame[frame.chosen].auroc.item() == 1.0
    assert "<table>" in found._repr_html_()
    shown: Any = found.plot()
    shown.savefig(tmp_path / "found.png")
    assert shown._repr_png_().startswith(b"\x89PNG"), "in a notebook, without pyplot"
    found.save(tmp_path / "d.safetensors")
    assert load_direction(tmp_path / "d.safetensors").learnt_from == found.direction.learnt_from
    assert pickle.loads(pickle.dumps(found)) == found


def test_hooks_hold_for_chat_and_for_transformers_and_go_away(model: ab.Model, found: FoundDirection) -> None:
    assert refuses(model.chat(ASKED))
    with model.ablate(found.direction, strength=1.0) as plan:
        assert len(plan.edits) == len(model.anatomy.writers)
        assert not refuses(model.chat(ASKED, max_new_tokens=8))
        assert not refuses(generated(model, ASKED))
    assert refuses(generated(model, ASKED))


@pytest.mark.parametrize("form", ["vector", "list", "rows", "array", "point", "file", "found"])
def test_a_direction_is_whatever_holds_one(form: str, model: ab.Model, found: FoundDirection, tmp_path: Path) -> None:
    found.save(tmp_path / "d.safetensors")
    vector = found.direction.basis[0]
    given: dict[str, Any] = {
        "vector": ab.Direction(3 * vector),
        "list": vector.tolist(),
        "rows": vector[None],
        "array": vector.numpy(),
        "point": model.plan(found),
        "file": str(tmp_path / "d.safetensors"),
        "found": found,
    }
    with model.ablate(given[form]):
        assert not refuses(model.chat(ASKED))


@pytest.mark.parametrize("wrong", [None, 5, "nothing.safetensors", [1.0, 2.0], object()])
def test_what_is_no_direction_of_this_model_is_named(wrong: Any, model: ab.Model) -> None:
    with pytest.raises(UsageError, match="direction"), model.ablate(wrong):
        pass


def test_own_activations_make_a_direction(model: ab.Model, planted: Planted) -> None:
    bad, good = (model.activations(group)[:, -2] for group in (HARMFUL, HARMLESS))
    direction = ab.Direction.from_activations(bad, good.tolist(), prompts=HARMFUL)
    assert abs(float(direction.basis[0] @ planted.direction)) > 0.99
    assert fingerprint(HARMFUL[0]) in direction.learnt_from
    for wrong in ((bad, good[:, :3]), (bad[:0], good), (bad, "text"), (bad, good[None])):
        with pytest.raises(UsageError, match="from_activations"):
            ab.Direction.from_activations(*wrong)


def test_activations_are_the_residual_stream_of_transformers(model: ab.Model) -> None:
    found = model.activations([ASKED, "tell the bread"], position=-2)
    for row, text in enumerate((ASKED, "tell the bread")):
        chat = [{"role": "user", "content": text}]
        encoded = model.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        states = model.hf_model(**encoded, output_hidden_states=True).hidden_states
        expected = torch.stack([state[0, -2] for state in states[:-1]])  # the last one is behind the final norm
        assert torch.allclose(found[row, :-1], expected, atol=1e-5)
        ids = encoded["input_ids"][0].tolist()
        assert torch.allclose(model.activations([ids], position=-2)[0], found[row], atol=1e-5)


def test_vectors_can_be_added(model: ab.Model, found: FoundDirection) -> None:
    assert not refuses(model.chat("show the bread today"))
    with model.add(found, 1.0) as added:
        assert {layer: vector.shape for layer, vector in added.items()} == {found.site.layer: (64,)}
        assert refuses(model.chat("show the bread today"))
    with model.add(found.direction.basis, -8.0, layer=found.site.layer):
        assert not refuses(model.chat(ASKED))
    for wrong in ({"layer": 6}, {"layer": -1}):
        with pytest.raises(UsageError, match="layer=0 to 5"), model.add(found, 1.0, **wrong):
            pass
    unknown: Any
    for unknown in (ab.Direction(found.direction.basis), {6: found}, {"one": found}, {}):
        with pytest.raises(UsageError, match=r"^add: "), model.add(unknown):
            pass


@torch.no_grad()
def test_a_vector_for_each_layer_is_added_where_it_says(model: ab.Model) -> None:
    vectors = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    plain = model.activations([ASKED])[0]
    for layer in range(6):
        with model.add({layer: vectors[layer].numpy()}, 2.0):
            moved = model.activations([ASKED])[0]
        assert torch.equal(moved[:layer], plain[:layer])
        assert torch.allclose(moved[layer] - plain[layer], 2 * vectors[layer], atol=1e-5)
    ids = torch.tensor([[1, 3, 4]])
    with model.add({2: vectors[2], 5: vectors[5]}):
        together = model.hf_model(ids).logits
    with model.add(vectors[2], layer=2), model.add(vectors[5], layer=5):
        assert torch.equal(model.hf_model(ids).logits, together)


def test_evaluation_is_paired_and_on_prompts_not_seen(model: ab.Model, found: FoundDirection) -> None:
    part = model.evaluate(found, **SHORT)
    assert part.before.harmful.n == 20
    assert part.before.harmful.refusals == 20
    assert part.after is not None
    assert part.after.harmful.refusals == 0
    assert "harmful" in part.paired
    assert part.control is not None
    assert "Refusals on held-out prompts" in str(part)
    assert "Refusals" in str(part._repr_html_())
    assert len(repr(part)) < 300
    alone = model.evaluate(**SHORT)
    assert alone.after is None
    assert alone.before.harmful.refusals == 20


def test_prompts_that_a_direction_has_seen_are_left_out(model: ab.Model, found: FoundDirection) -> None:
    part = model.evaluate(found, harmful=HARMFUL, harmless=HARMLESS, seed=5, **SHORT)
    assert part.before.harmful.n < 20  # another shuffle: most of its test prompts were learnt from


def test_verify_is_proof_by_intervention(model: ab.Model, found: FoundDirection) -> None:
    assert model.verify(found, harmful=HARMFUL, harmless=HARMLESS, **SHORT).verified
    other = torch.randn(64, generator=torch.Generator().manual_seed(1))
    assert not model.verify(ab.Direction(other), **SHORT).verified


def test_a_search_gives_a_front(model: ab.Model, found: FoundDirection, tmp_path: Path) -> None:
    front = model.search(start=found, harmful=HARMFUL, harmless=HARMLESS, points=2, steps=6, **SHORT)
    assert len(front) == 2
    assert front[front.chosen] is front.best
    assert list(front) == [front[0], front[1]]
    assert front[-1].direction.learnt_from == found.direction.learnt_from
    assert "point" in front.to_pandas().columns
    assert repr(front).startswith("Front(2 points, best [")
    assert "Points of the search" in str(front)
    assert "Points of the search" in str(front._repr_html_())
    front.plot().savefig(tmp_path / "front.png")
    assert pickle.loads(pickle.dumps(front)) == front
    with model.ablate(front[0]):
        model.chat(ASKED)
    record = model.save(front.best, tmp_path / "out")
    assert record.plan is not None
    changed = {edit.writer.weight for edit in model.plan(front.best).edits if edit.changes}
    assert {edit.tensor for edit in record.plan.edits} == changed


@pytest.mark.parametrize("form", ["weights", "lora"])
def test_what_is_saved_is_the_edit(form: Any, model: ab.Model, found: FoundDirection, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = model.save(found, str(out), as_=form)
    assert record.plan is not None
    assert record.plan.realisation == form
    assert load_direction(out / "direction.safetensors").learnt_from == found.direction.learnt_from
    with pytest.raises(UsageError, match="out"):
        model.save(found, out, as_=form)
    if form == "weights":
        edited = ab.load(out)
        assert not refuses(edited.chat(ASKED))
        assert ab.undo(str(out), target=str(tmp_path / "back")).exact
        assert ab.inspect(out, base=model.name).verdict == "altered"


def test_live_weights_are_edited_and_restored_bit_by_bit(
    planted: Planted, found: FoundDirection, tmp_path: Path
) -> None:
    model = ab.load(planted.folder, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.hf_model.state_dict().items()}
    assert model.apply_(found) is model
    assert "edited in memory" in repr(model)
    assert not refuses(generated(model, ASKED))
    with pytest.raises(UsageError, match="restore"):
        model.save(found, tmp_path / "out")
    saved = ab.load(planted.folder).save(found, tmp_path / "out")
    assert saved.output is not None
    files = ab.load(tmp_path / "out").hf_model.state_dict()
    for name, tensor in model.hf_model.state_dict().items():
        assert torch.allclose(tensor, files[name], atol=1e-6), name
    model.apply_(found, strength=-1.0)
    model.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.hf_model.state_dict().items())


def test_a_loaded_model_is_wrapped(planted: Planted, found: FoundDirection, tmp_path: Path) -> None:
    live, tokenizer = hugging_face(planted)
    model = ab.wrap(live, tokenizer)
    assert model.hf_model is live
    mine = model.find(harmful=HARMFUL, harmless=HARMLESS)
    assert torch.equal(mine.direction.basis, found.direction.basis)
    with model.ablate(mine):
        assert not refuses(generated(model, ASKED))
    part = model.evaluate(mine, **SHORT)
    assert part.after is not None
    assert part.after.harmful.refusals == 0
    model.save(mine, tmp_path / "out")
    assert not refuses(ab.load(tmp_path / "out").chat(ASKED))


def test_numbers_in_memory_are_what_is_saved(planted: Planted, found: FoundDirection, tmp_path: Path) -> None:
    """The control: a model that was changed since it was loaded is not written from its files."""
    live, tokenizer = hugging_face(planted)
    live.get_output_embeddings().weight.data.mul_(2)
    ab.wrap(live, tokenizer).save(found, tmp_path / "out")
    saved = ab.load(tmp_path / "out").hf_model
    assert torch.equal(saved.get_output_embeddings().weight, live.get_output_embeddings().weight)


def test_a_pipeline_is_wrapped(planted: Planted, found: FoundDirection) -> None:
    live, tokenizer = hugging_face(planted)
    chain = pipeline("text-generation", model=live, tokenizer=tokenizer)
    model = ab.wrap(chain)
    chat = [{"role": "user", "content": ASKED}]
    with model.ablate(found):
        reply = chain(chat, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]["content"]
    assert not refuses(reply)


def test_a_peft_model_is_wrapped_with_its_adapter_merged(
    planted: Planted, found: FoundDirection, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    ab.load(planted.folder).save(found, tmp_path / "lora", as_="lora")
    live, tokenizer = hugging_face(planted)
    adapted = peft.PeftModel.from_pretrained(live, str(tmp_path / "lora"))
    model = ab.wrap(adapted, tokenizer)
    assert not refuses(model.chat(ASKED))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((torch.nn.Linear(2, 2), None), "expected a live model"),
        (("text", None), "expected a live model"),
        ((None, None), "expected a live model"),
    ],
)
def test_what_cannot_be_wrapped_is_named(given: tuple[Any, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ab.wrap(*given)


def test_a_model_without_its_tokenizer_is_named(planted: Planted) -> None:
    live, _ = hugging_face(planted)
    with pytest.raises(UsageError, match="tokenizer"):
        ab.wrap(live)
    with pytest.raises(UsageError, match="dtype does nothing"):
        ab.wrap(live, AutoTokenizer.from_pretrained(planted.folder), dtype="float32")


@pytest.mark.parametrize("verb", ["find", "evaluate", "search", "verify"])
def test_an_option_that_is_none_is_named(verb: str, model: ab.Model, found: FoundDirection) -> None:
    arguments = [found] if verb in ("verify",) else []
    with pytest.raises(UsageError, match=f"^{verb}: it has no option 'harmfull'; did you mean 'harmful'"):
        getattr(model, verb)(*arguments, harmfull=["a"])


# ------------------------------------------------------------------------------------------------ steering and reading


def test_a_model_is_steered_for_whatever_runs_it(model: ab.Model, found: FoundDirection) -> None:
    assert refuses(model.chat(ASKED))
    for given in (found, found.direction, {3: 2.5 * found.direction.basis[0]}):
        with model.steer(given, -1.0) as steering:
            assert not refuses(model.chat(ASKED))
            assert not refuses(generated(model, ASKED))
        assert steering.coefficient == -1
    with model.steer(found, operation="ablate", tokens="generated"):
        assert not refuses(generated(model, ASKED))
    with model.steer(found, 0.5, operation="scale", layers=[3, 4]) as steering:
        assert steering.layers == (3, 4)
    assert refuses(model.chat(ASKED))
    with pytest.raises(UsageError, match="operation: "), model.steer(found, operation="turn"):  # type: ignore[arg-type]
        pass
    with pytest.raises(UsageError, match="direction: Direction: basis: expected"), model.steer(3.5):  # type: ignore[arg-type]
        pass


def test_a_sweep_is_rows_a_table_and_a_figure(model: ab.Model, found: FoundDirection) -> None:
    result = model.sweep(found, [0.5, -0.5], harmful=HARMFUL, harmless=HARMLESS, **SHORT)
    assert repr(result) == f"DoseResponse(add at layers [{found.site.layer}], coefficients [-0.5, 0.5])"
    plain, low, high, *random = result.rows()
    assert [(row["coefficient"], row["random"]) for row in random] == [(-0.5, True), (0.5, True)]
    assert (plain["coefficient"], plain["kl"], plain["harmful"]) == (None, 0, 1)
    assert low["harmful"] < high["harmful"]
    assert low["harmless"] < high["harmless"]
    assert low["harmful_score"] < plain["harmful_score"] < high["harmful_score"]
    assert low["harmful_low"] <= low["harmful"] <= low["harmful_high"]
    assert list(result.to_pandas()["coefficient"])[1:3] == [-0.5, 0.5]
    assert "by coefficient" in str(result)
    assert "<pre" in str(result._repr_html_())
    (above, below) = result.plot().axes
    assert {line.get_label() for line in above.lines} == {"harmful refused", "harmless refused", "broken"}
    assert np.asarray(below.lines[0].get_xdata()).tolist() == [-0.5, 0.5]
    assert pickle.loads(pickle.dumps(result)) == result
    part = ab.steer(model, found, coefficients=[-0.5, 0.5], harmful=HARMFUL, harmless=HARMLESS, **SHORT)
    assert part == result.part


def test_a_reading_shows_itself(model: ab.Model, found: FoundDirection, tmp_path: Path) -> None:
    part = model.read(ASKED, found)
    (text,) = part.texts
    assert part.layer == found.site.layer
    assert text.projections[part.layer][-1] > 1
    shown = str(part._repr_html_())
    assert "background-color: #" in shown
    assert "highest: " in str(part)
    pair = model.read([("show the soup", "Sure , here"), [{"role": "user", "content": ASKED}]], found, layer=1)
    assert [len(one.tokens) - one.prompt for one in pair.texts] == [3, 0]
    assert pair.layer == 1
    assert ab.read(model, found, ASKED, out=tmp_path / "r.html").texts == part.texts
    assert "<!doctype html>" in (tmp_path / "r.html").read_text(encoding="utf-8")
    (tmp_path / "t.txt").write_text(f"{ASKED}\nshow\n", encoding="utf-8")
    read = ab.read(model, found, file=tmp_path / "t.txt", limit=1)
    assert (read.texts, read.left_out) == (part.texts, 1)


def test_given_prompts_are_answered_steered(planted: Planted, model: ab.Model, found: FoundDirection) -> None:
    part = ab.steer(model, found, ASKED, coefficient=-1.0, max_new_tokens=5)
    assert {dose: sets["given"][0].text for dose, sets in part.answers.items()} == {
        "none": "I cannot help with that",
        "-1": "Sure , here it is",
    }
    with pytest.raises(UsageError, match="has no option 'coeficient'"):
        ab.steer(model, found, ASKED, coeficient=1)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="found a model in memory"):
        ab.steer(model, found, out="x")
