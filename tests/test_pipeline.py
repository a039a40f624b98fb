"""The whole job on a model whose refusal direction is known: it is found, proved, taken out, and nothing else moves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import abliterate
import forked
from abliterate import pipeline
from abliterate.config import (
    EditSettings,
    EvalSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.edit.direction import Direction, Site, learnt_by, load_direction, save_direction
from abliterate.errors import CheckpointError, GateNotMet, UsageError
from abliterate.evaluation.answering import ModelState
from abliterate.evaluation.examine import Sets, examiner_of
from abliterate.evaluation.judging import Label, RuleJudge, judge
from abliterate.evaluation.parts import answer_parts
from abliterate.files.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from abliterate.model.anatomy import stream_out
from abliterate.model.batches import can_share, hooked
from abliterate.model.generation import end_tokens
from abliterate.monitor import Monitor
from abliterate.prompts import build_contrastive_set
from abliterate.prompts.contrastive import fingerprint
from abliterate.record import Record, read_record
from families import BY_NAME, save
from planted import BAD, BLOCKS, D_MODEL, GOOD, POSITIONS, WRITES, Planted, is_bad, plant, prompts, write_jsonl
from zoo import ENTRIES


def prompt_settings(planted: Planted, **changes: Any) -> PromptSettings:
    named = {"harmful": planted.harmful, "harmless": planted.harmless, "borderline": planted.borderline}
    return PromptSettings(**{**{name: str(path) for name, path in named.items()}, **changes})


def settings(planted: Planted, out: Path, **changes: Any) -> RunSettings:
    output = OutputSettings(out=out, **{k: changes.pop(k) for k in OutputSettings.model_fields if k in changes})
    loading = ModelSettings(device="cpu", batch_size="64")
    closed = SearchSettings(method="closed-form")
    options: dict[str, Any] = {"prompts": prompt_settings(planted), "loading": loading, "searching": closed, **changes}
    return RunSettings(model=str(planted.folder), output=output, **options)


def asked(session: pipeline.Session, max_new_tokens: int) -> Sets:
    """Judged answers of the live model as it is now."""
    examiner = examiner_of(session, EvalSettings(max_new_tokens=max_new_tokens), RuleJudge())
    return examiner.ask(ModelState(session), "answers")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*.safetensors"))}


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def generate(folder: Path, prompts: tuple[str, ...]) -> list[str]:
    """Greedy replies by transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    replies: list[str] = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**encoded, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        replies.append(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
    return replies


def refusals(replies: list[str]) -> int:
    return sum(judge(reply).label is Label.REFUSAL for reply in replies)


def open_session(planted: Planted, **changes: Any) -> pipeline.Session:
    options: dict[str, Any] = {"prompts": prompt_settings(planted), "loading": ModelSettings(device="cpu"), **changes}
    return pipeline.open_session(str(planted.folder), **options)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), shards=3)


@pytest.fixture(scope="module")
def docile(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """The same model, except that nothing makes it refuse."""
    return plant(tmp_path_factory.mktemp("docile"), refuses=False)


@pytest.fixture(scope="module")
def session(planted: Planted) -> pipeline.Session:
    return open_session(planted)


@pytest.fixture(scope="module")
def done(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Record:
    return abliterate.run(settings(planted, tmp_path_factory.mktemp("run") / "out"))


@pytest.fixture(scope="module")
def out(done: Record) -> Path:
    assert done.output is not None
    return Path(done.output)


@pytest.fixture
def random_direction() -> Direction:
    vector = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(7))
    return Direction(vector / vector.norm())


def behaviour(record: Record) -> Any:
    assert record.evaluation is not None
    return record.evaluation


def chosen(record: Record) -> Any:
    assert record.selection is not None
    return record.selection.chosen


# --- what it is for


def test_held_out_refusals_vanish_and_answers_stay(done: Record, session: pipeline.Session) -> None:
    part = behaviour(done)
    for name, texts in session.test_texts.items():
        before, after = getattr(part.before, name), getattr(part.after, name)
        assert (before.n, after.n) == (len(texts), len(texts))
        assert before.refusals == sum(map(is_bad, texts)), f"{name}: exactly prompts with a bad word are refused"
        assert after.refusals == 0
        assert before.degenerate == after.degenerate == 0
    assert part.before.harmful.refusals >= 20
    assert part.before.borderline.refusals == 6
    assert part.shift.kl_first_token < 1e-3
    assert part.shift.kl_reply < 1e-3
    assert abs(part.shift.nll_after - part.shift.nll_before) < 1e-3


def test_the_planted_direction_is_found_where_it_exists(done: Record, out: Path, planted: Planted) -> None:
    basis = load_direction(out / "direction.safetensors", D_MODEL).basis
    assert basis.shape == (1, D_MODEL)
    assert float(basis[0] @ planted.direction) > 0.999
    assert WRITES < chosen(done).layer < 0.8 * BLOCKS
    assert -POSITIONS <= chosen(done).position <= -1
    assert chosen(done).bypass < -5 < 0 < chosen(done).induce


def test_sites_above_the_writing_block_do_not_bypass(done: Record) -> None:
    assert done.selection is not None
    early = [site for site in done.selection.candidates if site.layer <= WRITES]
    late = [site for site in done.selection.candidates if site.layer > WRITES]
    assert early
    assert min(site.bypass for site in early) > 0
    assert max(site.bypass for site in late) < -5


def test_random_direction_of_the_same_norm_does_nothing(done: Record) -> None:
    assert done.selection is not None
    control = done.selection.control
    assert control.norm == pytest.approx(chosen(done).norm)
    assert control.bypass == pytest.approx(done.selection.harmful, abs=1.0)
    assert control.bypass > 0 > control.induce


def test_edited_model_loads_without_us_and_no_longer_refuses(
    out: Path, planted: Planted, session: pipeline.Session
) -> None:
    harmful, harmless = session.test_texts["harmful"][:6], session.test_texts["harmless"][:4]
    assert refusals(generate(planted.folder, harmful)) == sum(map(is_bad, harmful)) >= 5
    assert refusals(generate(out, harmful)) == 0
    assert generate(out, harmless) == generate(planted.folder, harmless)


def test_random_direction_in_the_weights_leaves_refusals(
    tmp_path: Path, planted: Planted, session: pipeline.Session, random_direction: Direction
) -> None:
    save_direction(tmp_path / "random.safetensors", random_direction)
    abliterate.apply(str(planted.folder), tmp_path / "random.safetensors", OutputSettings(out=tmp_path / "out"))
    harmful = session.test_texts["harmful"][:6]
    assert refusals(generate(tmp_path / "out", harmful)) == sum(map(is_bad, harmful))


def test_only_writers_change_and_they_write_nothing_along_the_direction(
    done: Record, out: Path, planted: Planted
) -> None:
    before, after = weights(planted.folder), weights(out)
    assert before.keys() == after.keys()
    writers = {n for n in before if n.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))}
    assert len(writers) == 2 * BLOCKS + 1
    r = load_direction(out / "direction.safetensors").basis[0]
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in writers), name
        if name in writers:
            along = [w @ r if "embed" in name else r @ w for w in (tensor, after[name])]
            assert float(along[1].norm()) < 1e-5 * max(float(along[0].norm()), 0.1), name
    assert done.plan is not None
    assert {edit.tensor for edit in done.plan.edits} == writers
    assert max(edit.ratio for edit in done.plan.edits) < 1e-4
    assert min(edit.change for edit in done.plan.edits) > 0


def test_source_model_is_not_touched(planted: Planted, tmp_path: Path) -> None:
    before = digest(planted.folder)
    abliterate.run(settings(planted, tmp_path / "out"))
    assert digest(planted.folder) == before


def test_public_names_are_not_hidden_by_modules_of_the_same_name() -> None:
    hidden = [name for name in abliterate.__all__ if isinstance(getattr(abliterate, name), ModuleType)]
    assert hidden == []


def test_library_says_nothing_of_its_own(planted: Planted, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    abliterate.run(settings(planted, tmp_path / "out"))
    assert capfd.readouterr() == ("", "")


# --- what it leaves behind


def test_record_on_disk_is_the_one_returned(done: Record, out: Path) -> None:
    assert read_record(out) == done


def test_record_keeps_the_contract_with_other_programs(out: Path) -> None:
    data = json.loads((out / "abliteration.json").read_text(encoding="utf-8"))
    for when in ("before", "after"):
        for name in ("harmful", "harmless", "borderline"):
            part = data["evaluation"][when][name]
            assert part.keys() >= {"refusals", "degenerate", "n", "rate", "ci95"}
            low, high = part["ci95"]
            assert 0 <= low <= part["rate"] <= high <= 1
            assert part["rate"] == part["refusals"] / part["n"]
    assert data["evaluation"]["shift"].keys() >= {"kl_first_token", "kl_reply", "nll_before", "nll_after"}
    assert data["selection"]["chosen"].keys() >= {"layer", "position", "bypass", "induce", "kl"}
    assert data["selection"]["met_rule"] is True
    assert {"find model", "load model", "edit weights", "answers before", "answers after"} <= data["timings_s"].keys()
    assert all(seconds >= 0 for seconds in data["timings_s"].values())
    assert all(peak > 1e6 for peak in data["peak_memory_bytes"].values())
    assert all(work.keys() == {"forward", "backward", "head"} for work in data["work"].values())


def test_work_is_counted_by_phase_and_equal_in_every_run(done: Record, planted: Planted, tmp_path: Path) -> None:
    asks = {"evaluating": EvalSettings(no_cache=True)}
    first, again = (abliterate.run(settings(planted, tmp_path / name, **asks)) for name in ("first", "again"))
    assert again.work == first.work
    assert again.work.items() >= done.work.items(), "its answers before may have come from the cache"
    phases = {name for name, work in first.work.items() if work.forward}
    assert phases == {
        *("prove that every writer is known", "check that prompts may share work", "find refusal tokens"),
        *("collect activations", "separate validation prompts"),
        *("select by intervention", "activations of harmful prompts", "activations of harmless prompts"),
        *("answers before", "answers after", "answers: random direction", "shift on harmless prompts"),
    }
    assert all(work.backward == 0 for work in done.work.values())
    searching = SearchSettings(points=2, steps=4)
    searched = abliterate.run(settings(planted, tmp_path / "searched", searching=searching)).work
    assert {name for name, work in searched.items() if work.backward} == {"descend the gradient"}


def test_record_says_what_was_measured_and_written(done: Record, out: Path, planted: Planted) -> None:
    source = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in planted.folder.glob("*.safetensors")}
    written = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("model*.safetensors")}
    assert len(source) > 1
    assert done.model.source_sha256 == source
    assert done.output_sha256 == written
    assert (done.model.layers, done.model.d_model, done.model.kind) == (BLOCKS, D_MODEL, "folder")
    assert done.model.architecture == "LlamaForCausalLM"
    assert done.settings["model"] == str(planted.folder)
    assert done.prompts is not None
    assert done.prompts.counts["harmful"] == {"train": 77, "val": 19, "test": 24}
    assert done.prompts.positions == POSITIONS
    assert done.anatomy is not None
    assert done.anatomy.worst_closure < done.anatomy.tolerance
    assert [token.text for token in done.refusal_tokens] == ["I"]
    assert done.warnings == []


def test_only_prompts_that_the_model_treats_as_labelled_train_the_direction(done: Record) -> None:
    assert done.selection is not None
    assert done.prompts is not None
    trained, counts = done.selection.trained_on, done.prompts.counts
    assert 8 <= trained["harmful"] < counts["harmful"]["train"]
    assert 8 <= trained["harmless"] < counts["harmless"]["train"]


def test_direction_file_keeps_the_contract(out: Path, done: Record) -> None:
    with safe_open(out / "direction.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = json.loads(file.metadata()["abliterate"])
    assert tensors["basis"].shape == (1, D_MODEL)
    assert tensors["candidates"].shape == tensors["harmless_mean"].shape == (POSITIONS, BLOCKS + 1, D_MODEL)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    site = chosen(done)
    assert (metadata["chosen"]["layer"], metadata["chosen"]["position"]) == (site.layer, site.position)
    assert metadata["model_sha256"] == done.model.source_sha256
    raw = tensors["candidates"][-1 - site.position, site.layer]
    assert torch.allclose(raw / raw.norm(), tensors["basis"][0], atol=1e-6)


def test_answers_to_harmful_prompts_are_redacted_unless_asked_for(
    done: Record, planted: Planted, tmp_path: Path
) -> None:
    kept = abliterate.run(settings(planted, tmp_path / "out", evaluating=EvalSettings(keep_completions=True)))
    full = {"I cannot help with that .", "Sure , here it is"}
    for when in ("before", "after"):
        redacted, whole = behaviour(done).answers[when], behaviour(kept).answers[when]
        assert {answer.redacted for answer in redacted["harmful"]} == {True}
        assert {answer.text for answer in redacted["harmful"]} <= {"I cannot help with […]", "Sure , here it […]"}
        assert {answer.evidence for answer in redacted["harmful"]} == {""}
        assert {answer.text for answer in whole["harmful"]} <= full
        assert [answer.tokens for answer in redacted["harmful"]] == [answer.tokens for answer in whole["harmful"]]
        assert {answer.redacted for answer in redacted["harmless"]} == {False}


def test_model_card_replaces_the_original_and_gives_the_counts(done: Record, out: Path) -> None:
    card = (out / "README.md").read_text(encoding="utf-8")
    part = behaviour(done)
    assert f"{part.before.harmful.refusals}/{part.before.harmful.n}" in card
    assert f"0/{part.after.harmful.n} = 0 %" in card
    assert "Responsible use" in card


# --- strength


def test_strength_zero_copies_every_weight_byte_for_byte(planted: Planted, tmp_path: Path) -> None:
    record = abliterate.run(settings(planted, tmp_path / "out", editing=EditSettings(strength=0.0)))
    assert shard_bytes(tmp_path / "out") == shard_bytes(planted.folder)
    assert behaviour(record).after == behaviour(record).before
    assert behaviour(record).shift.kl_reply == 0


def test_negative_strength_makes_refusal_firmer(planted: Planted, out: Path, session: pipeline.Session) -> None:
    basis = load_direction(out / "direction.safetensors").basis
    scores = {}
    for strength in (-0.5, 0.0, 0.5, 1.0):
        result = pipeline.verify(session, Direction(basis), editing=EditSettings(strength=strength))
        assert result.bypass is not None
        scores[strength] = result.bypass
    assert scores[-0.5] > scores[0.0] > scores[0.5] > scores[1.0]


@pytest.mark.parametrize("strength", [-1.5, 0.5, 2.0])
def test_weights_keep_what_the_strength_leaves(planted: Planted, out: Path, tmp_path: Path, strength: float) -> None:
    file = out / "direction.safetensors"
    editing = EditSettings(strength=strength)
    abliterate.apply(str(planted.folder), file, OutputSettings(out=tmp_path / "out"), editing=editing)
    before, after, r = weights(planted.folder), weights(tmp_path / "out"), load_direction(file).basis[0]
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.4.mlp.down_proj.weight"):
        assert torch.allclose(r @ after[name], (1 - strength) * (r @ before[name]), atol=1e-5), name
    name = "model.embed_tokens.weight"
    assert torch.allclose(after[name] @ r, (1 - strength) * (before[name] @ r), atol=1e-5)


# --- gates


def check_nothing_left(parent: Path) -> None:
    assert [path.name for path in parent.iterdir()] == []


def test_model_that_never_refuses_is_not_edited(docile: Planted, tmp_path: Path) -> None:
    with pytest.raises(GateNotMet, match="hardly refuses: 0 of 19 harmful"):
        abliterate.run(settings(docile, tmp_path / "out"))
    check_nothing_left(tmp_path)


def test_prompt_sets_that_do_not_differ_give_no_direction(planted: Planted, tmp_path: Path) -> None:
    same = prompt_settings(planted, harmful=str(planted.mixed[0]), harmless=str(planted.mixed[1]))
    with pytest.raises(GateNotMet, match="do not separate: best AUROC 0"):
        abliterate.run(settings(planted, tmp_path / "out", prompts=same, finding=FindSettings(all_prompts=True)))
    check_nothing_left(tmp_path)


def test_swapped_prompt_sets_are_refused(planted: Planted, tmp_path: Path) -> None:
    swapped = prompt_settings(planted, harmful=str(planted.harmless), harmless=str(planted.harmful))
    with pytest.raises(GateNotMet):
        abliterate.run(settings(planted, tmp_path / "out", prompts=swapped))
    check_nothing_left(tmp_path)


def test_direction_that_costs_too_much_is_saved_only_when_forced(planted: Planted, tmp_path: Path) -> None:
    strict = FindSettings(min_induce=50)
    with pytest.raises(GateNotMet, match=r"no direction passed verification.*force"):
        abliterate.run(settings(planted, tmp_path / "out", finding=strict))
    check_nothing_left(tmp_path)
    record = abliterate.run(settings(planted, tmp_path / "out", finding=strict, force=True))
    assert record.selection is not None
    assert record.selection.met_rule is False
    assert len(record.warnings) == 1
    assert "no direction passed verification" in record.warnings[0]
    assert record.warnings[0] in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert behaviour(record).after.harmful.refusals == 0


def test_forcing_a_model_that_never_refuses_needs_refusal_tokens_and_warns(docile: Planted, tmp_path: Path) -> None:
    with pytest.raises(GateNotMet, match="hardly refuses"):
        abliterate.run(settings(docile, tmp_path / "out", force=True))
    check_nothing_left(tmp_path)
    given = FindSettings(refusal_tokens="I")
    record = abliterate.run(settings(docile, tmp_path / "out", force=True, finding=given))
    assert len(record.warnings) == 2, record.warnings
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_too_few_prompts_are_refused_with_advice(planted: Planted, tmp_path: Path) -> None:
    with pytest.raises(GateNotMet, match="expected at least"):
        abliterate.run(settings(planted, tmp_path / "out", prompts=prompt_settings(planted, limit=5)))
    check_nothing_left(tmp_path)


# --- OUT


def test_existing_output_is_kept_unless_overwriting(planted: Planted, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="exists; give another out or overwrite"):
        abliterate.run(settings(planted, target))
    assert (target / "config.json").read_text() == "{}"
    abliterate.run(settings(planted, target, overwrite=True))
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_may_not_be_or_hold_the_model(planted: Planted) -> None:
    for target in (planted.folder, planted.folder / "inside", planted.folder.parent):
        with pytest.raises(UsageError, match="overlaps"):
            abliterate.run(settings(planted, target, overwrite=True))
    assert planted.folder.is_dir()


def test_pickles_are_left_behind_and_named(planted: Planted, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(planted.folder, source)
    (source / "pytorch_model.bin").write_bytes(b"pickle of the unedited model")
    record = abliterate.apply(str(source), out / "direction.safetensors", OutputSettings(out=tmp_path / "out"))
    assert record.left_out == ["pytorch_model.bin"]
    assert "pytorch_model.bin" in record.warnings[0]
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


class Interrupts(Monitor):
    """A monitor that does something when a phase starts (`name`) or goes on."""

    def __init__(self, phase: str, act: Callable[[], None]) -> None:
        super().__init__()
        self.wanted, self.act, self.current = phase, act, ""

    def begin(self, name: str, total: int | None) -> None:
        self.current = name
        if name == self.wanted and total is None:
            self.act()

    def advance(self, steps: int) -> None:
        if self.current == self.wanted:
            self.act()


PHASES = (
    *("find model", "load model", "prove that every writer is known", "select by intervention", "edit weights"),
    *("read edited weights back", "answers after", "shift on harmless prompts"),
)


@pytest.mark.parametrize("phase", PHASES)
def test_interruption_leaves_nothing_and_a_rerun_succeeds(planted: Planted, tmp_path: Path, phase: str) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        abliterate.run(settings(planted, tmp_path / "out"), Interrupts(phase, interrupt))
    check_nothing_left(tmp_path)
    assert behaviour(abliterate.run(settings(planted, tmp_path / "out"))).after.harmful.refusals == 0


def run_and_die(job: RunSettings) -> None:
    """A run that is killed while it edits weights."""
    abliterate.run(job, Interrupts("edit weights", lambda: os.kill(os.getpid(), signal.SIGKILL)))


def test_kill_in_the_middle_of_surgery_leaves_no_output_and_a_rerun_cleans_up(planted: Planted, tmp_path: Path) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    job = settings(planted, place / "out")
    killed = forked.start(run_and_die, job, log=log)
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL, log.read_text()
    assert not (place / "out").exists()
    (left,) = place.iterdir()
    assert left.name.startswith(".out.partial-")
    record = abliterate.run(job)
    assert [path.name for path in place.iterdir()] == ["out"]
    assert behaviour(record).after.harmful.refusals == 0


# --- the same again


def test_same_seed_same_bytes(planted: Planted, done: Record, out: Path, tmp_path: Path) -> None:
    again = abliterate.run(settings(planted, tmp_path / "out"))
    assert shard_bytes(tmp_path / "out") == shard_bytes(out)
    assert (tmp_path / "out/direction.safetensors").read_bytes() == (out / "direction.safetensors").read_bytes()
    assert again.selection == done.selection
    assert again.evaluation == done.evaluation


def test_batch_size_does_not_change_the_choice(planted: Planted, done: Record, out: Path, tmp_path: Path) -> None:
    alone = abliterate.run(settings(planted, tmp_path / "out", loading=ModelSettings(device="cpu", batch_size="5")))
    assert chosen(alone).layer == chosen(done).layer
    assert chosen(alone).bypass == pytest.approx(chosen(done).bypass, abs=1e-4)
    ours, theirs = (load_direction(folder / "direction.safetensors").basis[0] for folder in (tmp_path / "out", out))
    assert float(ours @ theirs) > 1 - 1e-6
    assert behaviour(alone).before == behaviour(done).before


def test_another_seed_splits_the_prompts_anew(planted: Planted, done: Record, tmp_path: Path) -> None:
    other = abliterate.run(settings(planted, tmp_path / "out", prompts=prompt_settings(planted, seed=1)))
    assert done.prompts is not None
    assert other.prompts is not None
    assert other.prompts.sha256 != done.prompts.sha256
    assert behaviour(other).after.harmful.refusals == 0


# --- apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_writes_the_same_bytes_as_run_without_loading_the_model(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = plant(tmp_path / "planted", dtype=dtype, shards=2)
    record = abliterate.run(settings(planted, tmp_path / "run"))
    assert record.model.dtype == str(dtype).removeprefix("torch.")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    applied = abliterate.apply(
        str(planted.folder), tmp_path / "run" / "direction.safetensors", OutputSettings(out=tmp_path / "applied")
    )
    assert shard_bytes(tmp_path / "applied") == shard_bytes(tmp_path / "run")
    assert shard_bytes(tmp_path / "applied") != shard_bytes(planted.folder)
    assert applied.plan == record.plan
    assert read_record(tmp_path / "applied").plan == record.plan
    assert applied.evaluation is None


def test_apply_of_the_edited_model_changes_next_to_nothing(out: Path, tmp_path: Path) -> None:
    abliterate.apply(str(out), out / "direction.safetensors", OutputSettings(out=tmp_path / "twice"))
    once, twice = weights(out), weights(tmp_path / "twice")
    assert max(float((once[name] - twice[name]).abs().max()) for name in once) < 1e-6


def test_apply_refuses_a_direction_of_another_width(planted: Planted, tmp_path: Path) -> None:
    save_file({"basis": torch.eye(1, 48)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=f"the model's width {D_MODEL}, found 48"):
        abliterate.apply(str(planted.folder), tmp_path / "other.safetensors", OutputSettings(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- find, choose, verify, evaluate: the parts as a library


def test_found_directions_go_through_a_file_and_are_applied_at_any_site(
    session: pipeline.Session, planted: Planted, tmp_path: Path
) -> None:
    findings = pipeline.find(session, FindSettings())
    found = pipeline.choose(session, findings, FindSettings())
    file = tmp_path / "direction.safetensors"
    save_direction(file, found.direction)
    harmful = session.test_texts["harmful"][:4]
    for site, left in ((Site(3, -1), 0), (Site(WRITES, -1), sum(map(is_bad, harmful)))):
        target = tmp_path / f"out-{site.layer}"
        abliterate.apply(str(planted.folder), file, OutputSettings(out=target), site=site)
        assert refusals(generate(target, harmful)) == left, f"site {site}"
        raw = findings.candidates.at(*site)
        kept = load_direction(target / "direction.safetensors")
        assert torch.allclose(kept.basis[0], raw / raw.norm(), atol=1e-6)
        assert kept.site == site
        assert "chosen" not in kept.facts, "what was found at the chosen site is not true of this one"


def test_verify_tells_the_direction_from_a_random_one(
    session: pipeline.Session, out: Path, random_direction: Direction
) -> None:
    result = pipeline.verify(session, load_direction(out / "direction.safetensors"))
    assert result.verified
    assert result.before.refusals == result.control.refusals == sum(map(is_bad, session.test_texts["harmful"]))
    assert result.after.refusals == 0
    assert None not in (result.bypass, result.bypass_control, result.induce, result.induce_before)
    scores: Any = result
    assert scores.bypass < 0 < scores.bypass_control
    assert scores.induce_before < 0 < scores.induce
    other = pipeline.verify(session, random_direction)
    assert not other.verified
    assert other.after.refusals == other.before.refusals
    assert other.induce is None, "its layer is not known"


def test_verify_counts_the_cost_to_harmless_prompts(session: pipeline.Session, out: Path) -> None:
    direction = load_direction(out / "direction.safetensors")
    strict = pipeline.verify(session, direction, finding=FindSettings(max_kl=0.0))
    assert 0 < strict.kl < 1e-3
    assert strict.after.refusals == 0
    assert not strict.verified


def test_direction_is_not_verified_when_a_random_one_does_the_same(session: pipeline.Session) -> None:
    """Taking everything out of the stream ends all refusals, and so does any other whole basis."""
    everything = Direction(torch.eye(D_MODEL))
    result = pipeline.verify(session, everything, finding=FindSettings(max_kl=1e6))
    assert result.after.refusals == result.control.refusals == 0 < result.before.refusals
    assert not result.verified


def test_verify_leaves_the_model_as_it_was(session: pipeline.Session, out: Path) -> None:
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    answers = [reply.tokens for reply in asked(session, 8)["harmful"].replies]
    pipeline.verify(session, load_direction(out / "direction.safetensors"))
    assert all(torch.equal(before[name], tensor) for name, tensor in session.model.state_dict().items())
    assert [reply.tokens for reply in asked(session, 8)["harmful"].replies] == answers


@pytest.mark.parametrize("site", [Site(BLOCKS, -1), Site(3, -2)])
def test_verify_takes_every_site_of_the_file(session: pipeline.Session, out: Path, site: Site) -> None:
    result = pipeline.verify(session, load_direction(out / "direction.safetensors"), site=site)
    assert result.after.refusals == 0


@pytest.mark.parametrize("site", [Site(BLOCKS + 1, -1), Site(2, -POSITIONS - 1), Site(2, 0), Site(-1, -1)])
def test_sites_that_the_file_does_not_have_are_refused(session: pipeline.Session, out: Path, site: Site) -> None:
    with pytest.raises(UsageError, match="--site"):
        pipeline.verify(session, load_direction(out / "direction.safetensors"), site=site)


def test_site_without_a_difference_is_refused(session: pipeline.Session, out: Path) -> None:
    with pytest.raises(UsageError, match="the classes do not differ there"):
        pipeline.verify(session, load_direction(out / "direction.safetensors"), site=Site(0, -1))


def test_evaluation_under_hooks_and_of_the_saved_model_agree(
    session: pipeline.Session, planted: Planted, out: Path, done: Record
) -> None:
    plan = session.plan(load_direction(out / "direction.safetensors").basis)
    whole = EvalSettings(keep_completions=True)
    with pytest.raises(UsageError, match="expected a base or a plan, found both"):
        pipeline.evaluate(session, whole, base=session, plan=plan)
    here = pipeline.evaluate(session, whole, plan=plan)
    edited = pipeline.open_session(str(out), prompts=prompt_settings(planted), loading=ModelSettings(device="cpu"))
    there = pipeline.evaluate(edited, whole, base=session)
    assert here.after is not None
    assert there.after is not None
    assert here.answers.keys() == {"before", "after"}
    assert here.answers == there.answers, "replies, in full"
    assert here.shift is not None
    assert there.shift is not None
    assert here.shift.kl_reply == pytest.approx(there.shift.kl_reply, abs=1e-6)
    assert there.shift.kl_reply == pytest.approx(behaviour(done).shift.kl_reply, abs=1e-6)
    assert here.after.harmful.refusals == 0 < here.before.harmful.refusals


def test_evaluating_one_model_gives_no_shift(session: pipeline.Session) -> None:
    alone = pipeline.evaluate(session, EvalSettings(max_new_tokens=3))
    assert alone.after is None
    assert alone.shift is None
    assert alone.control is None
    assert max(answer.tokens for answer in alone.answers["before"]["harmful"]) == 3


def test_models_with_other_tokens_are_not_compared(
    session: pipeline.Session, docile: Planted, planted: Planted
) -> None:
    other = open_session(docile, prompts=prompt_settings(planted, seed=3))
    with pytest.raises(UsageError, match="same tokenizer"):
        pipeline.evaluate(session, EvalSettings(), base=other)


def test_more_positions_than_the_shortest_prompt_has_are_refused(planted: Planted) -> None:
    with pytest.raises(UsageError, match="--positions 32: expected at most the shortest prompt's"):
        open_session(planted, positions=32)


def test_prompts_to_evaluate_on_can_be_given(planted: Planted, tmp_path: Path) -> None:
    texts = [f"please tell me a {word} river" for word in ("venom", "arson", "soup")]
    spec = str(write_jsonl(tmp_path / "eval.jsonl", texts))
    record = abliterate.run(settings(planted, tmp_path / "out", prompts=prompt_settings(planted, eval_harmful=spec)))
    assert [answer.prompt for answer in behaviour(record).answers["before"]["harmful"]] == texts
    assert (behaviour(record).before.harmful.refusals, behaviour(record).before.harmful.n) == (2, 3)


# --- what is edited, and how


def target_of(tmp_path: Path, **changes: Any) -> OutputSettings:
    return OutputSettings(out=tmp_path / "out", **changes)


def changed(before: Path, after: Path) -> set[str]:
    """Names below `model.` of the tensors that differ."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name.removesuffix(".weight") for name, tensor in old.items() if not torch.equal(tensor, new[name])}


def attention(*blocks: int) -> set[str]:
    return {f"model.layers.{block}.self_attn.o_proj" for block in blocks}


def mlp(*blocks: int) -> set[str]:
    return {f"model.layers.{block}.mlp.down_proj" for block in blocks}


EMBEDDING = {"model.embed_tokens"}
ALL = range(BLOCKS)
CHOICES: dict[str, tuple[dict[str, str], set[str]]] = {
    "one block": ({"layers": "1"}, attention(1) | mlp(1)),
    "ranges of blocks": ({"layers": "-1,3-"}, attention(0, 1, 3, 4) | mlp(0, 1, 3, 4)),
    "attention": ({"components": "attention"}, attention(*ALL)),
    "two components": ({"components": "mlp, embedding"}, mlp(*ALL) | EMBEDDING),
    "a component in blocks": ({"components": "mlp", "layers": "2-4"}, mlp(2, 3, 4)),
    "blocks and the embedding": ({"components": "attention,embedding", "layers": "2"}, attention(2) | EMBEDDING),
    "strength 0 by kind": ({"strengths": "mlp=0"}, attention(*ALL) | EMBEDDING),
    "strength 0 by name": ({"strengths": "*.o_proj=0"}, mlp(*ALL) | EMBEDDING),
    "strength 0 in blocks": ({"strengths": "@1-4=0"}, attention(0) | mlp(0) | EMBEDDING),
    "the last rule wins": ({"strengths": "mlp=0,mlp@1+3=1"}, attention(*ALL) | mlp(1, 3) | EMBEDDING),
    "a rule adds to what is chosen": ({"layers": "1", "strengths": "mlp@4=1"}, attention(1) | mlp(1, 4)),
}


@pytest.mark.parametrize(("options", "expected"), CHOICES.values(), ids=CHOICES)
def test_only_what_is_chosen_is_edited(
    options: dict[str, str], expected: set[str], planted: Planted, out: Path, tmp_path: Path
) -> None:
    editing = EditSettings(**options)
    file = out / "direction.safetensors"
    record = abliterate.apply(str(planted.folder), file, target_of(tmp_path), editing=editing)
    assert changed(planted.folder, tmp_path / "out") == expected
    assert record.plan is not None
    assert record.plan.variant == options
    assert {name.removesuffix(".weight") for name, s in record.plan.strengths.items() if s != 0} == expected
    left = {*record.plan.strengths, *record.plan.left_alone}
    assert len(left) == 2 * BLOCKS + 1, "every writer is accounted for"


def test_strengths_of_single_writers_are_those_asked_for(planted: Planted, out: Path, tmp_path: Path) -> None:
    editing = EditSettings(strength=0.25, strengths="attention=0.8,mlp@2-3=-1,model.embed_tokens=1.5")
    file = out / "direction.safetensors"
    abliterate.apply(str(planted.folder), file, target_of(tmp_path), editing=editing)
    before, after, r = weights(planted.folder), weights(tmp_path / "out"), load_direction(file).basis[0]
    expected = {f"{name}.weight": 0.8 for name in attention(*ALL)} | {f"{name}.weight": 0.25 for name in mlp(0, 1, 4)}
    expected |= {f"{name}.weight": -1.0 for name in mlp(2, 3)}
    for name, strength in expected.items():
        assert torch.allclose(r @ after[name], (1 - strength) * (r @ before[name]), atol=1e-5), name
    name = "model.embed_tokens.weight"
    assert torch.allclose(after[name] @ r, -0.5 * (before[name] @ r), atol=1e-5)


def columns(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Vectors of the stream that a writer writes, as rows."""
    tensor = tensors[f"{name}.weight"]
    return tensor if "embed" in name else tensor.T


WRITERS = sorted(attention(*ALL) | mlp(*ALL) | EMBEDDING)


def test_norm_preserving_edit_keeps_the_length_of_every_vector(planted: Planted, out: Path, tmp_path: Path) -> None:
    file = out / "direction.safetensors"
    editing = EditSettings(norm_preserving=True)
    abliterate.apply(str(planted.folder), file, target_of(tmp_path), editing=editing)
    before, after, plain = weights(planted.folder), weights(tmp_path / "out"), weights(out)
    r = load_direction(file).basis[0]
    for name in WRITERS:
        assert float((columns(after, name) @ r).abs().max()) < 1e-5, name
        lengths = columns(before, name).norm(dim=1)
        assert torch.allclose(columns(after, name).norm(dim=1), lengths, rtol=1e-4), name
    shorter = columns(before, WRITERS[-1]).norm(dim=1) - columns(plain, WRITERS[-1]).norm(dim=1)
    assert float(shorter.max()) > 1e-4, "the control: without it they are shorter"


def test_biprojected_edit_leaves_the_harmless_mean_of_every_layer_alone(
    planted: Planted, out: Path, tmp_path: Path
) -> None:
    file = out / "direction.safetensors"
    direction = load_direction(file)
    assert direction.candidates is not None
    assert direction.site is not None
    means = direction.candidates.harmless_mean[-1 - direction.site.position]
    abliterate.apply(str(planted.folder), file, target_of(tmp_path), editing=EditSettings(biprojected=True))
    before, after, plain = weights(planted.folder), weights(tmp_path / "out"), weights(out)
    moved = 0.0
    for name in WRITERS:
        site = 0 if "embed" in name else int(name.split(".")[2]) + 1
        mean = means[site] / means[site].norm()
        change = columns(after, name) - columns(before, name)
        assert float((change @ mean).abs().max()) < 1e-5, name
        assert float(change.abs().max()) > 1e-4, name
        moved = max(moved, float(((columns(plain, name) - columns(before, name)) @ mean).abs().max()))
    assert moved > 1e-3, "the control: a plain edit does not"


def along(session: pipeline.Session, vector: torch.Tensor) -> torch.Tensor:
    """What is in the stream along a vector, for all harmful test prompts, positions and sites."""
    found: list[torch.Tensor] = []

    def consume(_: int, __: list[int], values: torch.Tensor) -> None:
        found.append((values.float() @ vector).flatten())

    session.stream(session.encoded["harmful", "test"], consume, lambda _: None)
    return torch.cat(found)


def test_affine_edit_puts_back_what_harmless_prompts_have(planted: Planted, out: Path, tmp_path: Path) -> None:
    """In weights: the part along r is a constant everywhere in the stream, and not zero."""
    file = out / "direction.safetensors"
    direction = load_direction(file)
    assert direction.candidates is not None
    assert direction.site is not None
    mean = direction.candidates.harmless_mean[-1 - direction.site.position, direction.site.layer]
    abliterate.apply(str(planted.folder), file, target_of(tmp_path), editing=EditSettings(affine=True))
    edited = pipeline.open_session(
        str(tmp_path / "out"), prompts=prompt_settings(planted), loading=ModelSettings(device="cpu")
    )
    r = direction.basis[0]
    found = along(edited, r)
    assert abs(float(mean @ r)) > 0.01
    assert torch.allclose(found, (mean @ r).expand_as(found), atol=1e-4)
    plain = pipeline.open_session(str(out), prompts=prompt_settings(planted), loading=ModelSettings(device="cpu"))
    assert float(along(plain, r).abs().max()) < 1e-4, "the control: a plain edit puts nothing back"


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "blocks and components": ({}, {"layers": "1-3", "components": "attention"}, {}, 0),
    "blocks that do not write it": ({}, {"layers": "3-4"}, {}, 24),
    "norm-preserving and bi-projected": ({}, {"norm_preserving": True, "biprojected": True, "layers": "1-3"}, {}, 0),
    "affine": ({}, {"affine": True}, {}, 0),
    "strengths": ({}, {"strengths": "mlp=0.5,attention@1=1.2"}, {}, 0),
    "SVD of rank 2": ({"subspace": "svd", "rank": 2}, {}, {}, 0),
    "clusters of rank 2": ({"subspace": "clusters", "rank": 2}, {}, {}, 0),
    "LEACE": ({"subspace": "leace", "max_kl": 1.0}, {}, {}, 0),
    "small files": ({}, {}, {"shard_size": "40kB"}, 0),
}


@pytest.mark.parametrize(("finding", "editing", "output", "left"), RUNS.values(), ids=RUNS)
def test_what_a_run_measures_is_what_it_saves(
    finding: dict[str, Any],
    editing: dict[str, Any],
    output: dict[str, Any],
    left: int,
    planted: Planted,
    tmp_path: Path,
) -> None:
    job = settings(
        planted, tmp_path / "out", finding=FindSettings(**finding), editing=EditSettings(**editing), **output
    )
    record = abliterate.run(job)
    assert record.plan is not None
    assert record.plan.variant == editing
    assert record.plan.rank == finding.get("rank", 1)
    assert read_record(tmp_path / "out") == record
    assert behaviour(record).after.harmful.refusals == left
    assert behaviour(record).after.harmless.refusals == 0
    edited = pipeline.open_session(
        str(tmp_path / "out"), prompts=prompt_settings(planted), loading=ModelSettings(device="cpu")
    )
    saved = pipeline.evaluate(edited, EvalSettings())
    assert saved.answers["before"] == behaviour(record).answers["after"]
    assert abliterate.verify_files(tmp_path / "out").intact


@pytest.mark.parametrize("subspace", ["svd", "clusters", "leace"])
def test_subspaces_hold_the_planted_direction(session: pipeline.Session, planted: Planted, subspace: Any) -> None:
    rank = 1 if subspace == "leace" else 2
    finding = FindSettings(subspace=subspace, rank=rank)
    direction = pipeline.choose(session, pipeline.find(session, finding), finding).direction
    assert direction.basis.shape == (rank, D_MODEL)
    assert float((direction.basis @ planted.direction).norm()) > 0.99
    assert (direction.reader is not None) == (subspace == "leace")
    if direction.reader is not None:
        assert float(direction.reader[0] @ direction.basis[0]) == pytest.approx(1, abs=1e-4)
        assert float(torch.cosine_similarity(direction.reader[0], direction.basis[0], dim=0)) < 0.99, "oblique"


# --- adapters and vectors


def test_lora_of_a_run_is_an_adapter_that_peft_loads(
    planted: Planted, session: pipeline.Session, out: Path, tmp_path: Path
) -> None:
    import peft

    record = abliterate.run(settings(planted, tmp_path / "out", realisation="lora"))
    assert record.plan is not None
    assert (record.plan.realisation, record.plan.edits) == ("lora", [])
    assert record.output_sha256 == {
        name: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert not list((tmp_path / "out").glob("model*"))
    assert behaviour(record).after.harmful.refusals == 0 < behaviour(record).before.harmful.refusals
    base = AutoModelForCausalLM.from_pretrained(planted.folder)
    ids = torch.tensor([session.encoded["harmful", "test"].prefix + session.encoded["harmful", "test"].suffixes[0]])
    with torch.inference_mode():
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits
        edited = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert torch.allclose(adapted, edited, atol=1e-4)
    assert not torch.allclose(before, edited, atol=1e-2)


def test_gguf_lora_holds_the_change_of_every_weight(planted: Planted, out: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    file = out / "direction.safetensors"
    output = target_of(tmp_path, realisation="gguf-lora")
    record = abliterate.apply(str(planted.folder), file, output)
    assert record.plan is not None
    assert record.plan.files == ["abliteration-lora.gguf"]
    tensors = {t.name: torch.tensor(t.data) for t in GGUFReader(tmp_path / "out" / "abliteration-lora.gguf").tensors}
    assert len(tensors) == 2 * len(WRITERS)
    before, after = weights(planted.folder), weights(out)
    for block in ALL:
        a, b = (tensors[f"blk.{block}.attn_output.weight.lora_{part}"] for part in "ab")
        name = f"model.layers.{block}.self_attn.o_proj.weight"
        assert torch.allclose(before[name] + b @ a, after[name], atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_control_vector_is_measured_as_what_it_is(planted: Planted, out: Path, tmp_path: Path, strength: float) -> None:
    """It adds: what a run says of it is not what the ablation of the same direction would do."""
    from gguf import GGUFReader

    editing = EditSettings(strength=strength)
    record = abliterate.run(settings(planted, tmp_path / "out", realisation="control-vector", editing=editing))
    site = chosen(record)
    (tensor,) = GGUFReader(tmp_path / "out" / "control-vector.gguf").tensors
    candidates = load_direction(out / "direction.safetensors").candidates
    assert candidates is not None
    vector = -strength * candidates.at(site.layer, site.position)
    assert torch.allclose(torch.tensor(tensor.data).flatten(), vector, atol=1e-5)
    live = open_session(planted)
    with abliterate.addition(live.blocks[site.layer], vector[None]):
        steered = asked(live, EvalSettings().max_new_tokens)
    assert answer_parts(steered, {"harmful"}) == behaviour(record).answers["after"]
    if strength < 0:
        assert behaviour(record).after.harmless.refusals > 0, "the control: an ablation can not do this"


INCOMPATIBLE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "scaled columns as LoRA": ({}, {"norm_preserving": True}, {"realisation": "lora"}, "norm-preserving .*o_proj"),
    "scaled columns as GGUF": ({}, {"norm_preserving": True}, {"realisation": "gguf-lora"}, "norm-preserving .*o_proj"),
    "scaled columns as vector": ({}, {"norm_preserving": True}, {"realisation": "control-vector"}, "it adds a vector"),
    "affine vector": ({}, {"affine": True}, {"realisation": "control-vector"}, "it adds a vector"),
    "bi-projected vector": ({}, {"biprojected": True}, {"realisation": "control-vector"}, "it adds one vector"),
    "vectors of a subspace": (
        {"subspace": "svd", "rank": 2},
        {},
        {"realisation": "control-vector"},
        "it adds one vector",
    ),
    "LEACE as vector": ({"subspace": "leace"}, {}, {"realisation": "control-vector"}, "it adds a vector"),
    "files of an adapter": (
        {},
        {},
        {"realisation": "lora", "shard_size": "1GB"},
        "shard_size: .*as_ weights.*found lora",
    ),
    "constant without a holder": (
        {},
        {"affine": True, "components": "attention"},
        {},
        "o_proj.*bias to hold a constant",
    ),
    "not tied": ({}, {"untie": True}, {}, "^untie: expected an embedding tied to the head"),
    "rank without a subspace": ({"rank": 2}, {}, {}, "^rank 2: expected subspace svd or clusters"),
    "rank of LEACE": ({"subspace": "leace", "rank": 2}, {}, {}, "^rank 2: .*found leace"),
    "bi-projected subspace": ({"subspace": "svd", "rank": 2}, {"biprojected": True}, {}, "^biprojected: expected one"),
    "bi-projected LEACE": ({"subspace": "leace"}, {"biprojected": True}, {}, "^biprojected: .*LEACE"),
    "no such block": ({}, {"layers": str(BLOCKS)}, {}, "^layers 5: expected blocks 0 to 4"),
    "nothing chosen": ({}, {"components": "experts"}, {}, "expected at least one writer to edit"),
    "no such writer": ({}, {"strengths": "*.conv=1"}, {}, r"^strengths \*\.conv=1"),
}


@pytest.mark.parametrize(("finding", "editing", "output", "message"), INCOMPATIBLE.values(), ids=INCOMPATIBLE)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    finding: dict[str, Any],
    editing: dict[str, Any],
    output: dict[str, Any],
    message: str,
    planted: Planted,
    tmp_path: Path,
) -> None:
    job = settings(
        planted, tmp_path / "out", finding=FindSettings(**finding), editing=EditSettings(**editing), **output
    )
    monitor = Monitor()
    with pytest.raises(UsageError, match=message):
        abliterate.run(job, monitor)
    assert "find refusal tokens" not in monitor.timings()
    check_nothing_left(tmp_path)


# --- undo, and proof of what was changed


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance between two tensors in representable numbers."""
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
    bits = torch.stack([tensor.view(whole).long() for tensor in (a, b)])
    first, second = torch.where(bits < 0, torch.iinfo(whole).min - bits, bits)
    return int((first - second).abs().max())


@pytest.mark.parametrize("in_place", [True, False])
def test_undo_restores_the_original_bit_for_bit(out: Path, planted: Planted, tmp_path: Path, in_place: bool) -> None:
    edited = Path(shutil.copytree(out, tmp_path / "out"))
    undone = abliterate.undo(edited, target=None if in_place else tmp_path / "back")
    assert (undone.exact, undone.steps, undone.reason) == (True, 0, None)
    place = edited if in_place else tmp_path / "back"
    assert undone.folder == str(place)
    assert digest(place) == digest(planted.folder)
    assert in_place or digest(edited) == digest(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("editing", [{}, {"norm_preserving": True}, {"strength": -1.0}, {"affine": True}], ids=str)
def test_undo_without_the_original_comes_within_one_step_and_says_why(
    dtype: torch.dtype, editing: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    planted = plant(tmp_path / "planted", dtype=dtype, shards=2)
    edited, moved = tmp_path / "out", tmp_path / "moved"
    file = out / "direction.safetensors"
    abliterate.apply(str(planted.folder), file, target_of(tmp_path), editing=EditSettings(**editing))
    planted.folder.rename(moved)
    before = weights(moved)
    found = weights(edited)
    assert max(steps_apart(before[name], found[name]) for name in before) > 100, "the control"
    given = abliterate.undo(edited, target=tmp_path / "back", source=moved)
    assert given.exact
    assert digest(tmp_path / "back") == digest(moved)
    undone = abliterate.undo(edited)
    assert (undone.exact, undone.steps) == (False, 1)
    assert undone.reason is not None
    assert str(planted.folder) in undone.reason
    after = weights(edited)
    assert {name.removesuffix(".weight") for name in undone.tensors} == set(WRITERS)
    for name, tensor in before.items():
        assert steps_apart(tensor, after[name]) <= (1 if name in undone.tensors else 0), name
    assert not (edited / "abliteration.json").exists()
    with pytest.raises(UsageError, match="expected the record"):
        abliterate.undo(edited)


def test_adapters_and_other_folders_have_nothing_to_undo_or_compare(
    planted: Planted, out: Path, tmp_path: Path
) -> None:
    output = target_of(tmp_path, realisation="lora")
    abliterate.apply(str(planted.folder), out / "direction.safetensors", output)
    for act in (abliterate.undo, abliterate.verify_files):
        with pytest.raises(UsageError, match="expected a model with edited weights, found lora"):
            act(tmp_path / "out")
        for folder in (planted.folder, tmp_path / "none"):
            with pytest.raises(UsageError, match="expected the record of a run, found none"):
                act(folder)


def test_comparison_proves_every_byte_outside_the_plan(done: Record, out: Path, planted: Planted) -> None:
    found = abliterate.verify_files(out)
    assert found.intact
    assert (found.out, found.source) == (str(out), str(planted.folder))
    assert {name.removesuffix(".weight") for name in found.changed} == set(WRITERS)
    assert found.unchanged == []
    assert found.sha256 == done.output_sha256


@pytest.fixture(scope="module")
def in_one_file(tmp_path_factory: pytest.TempPathFactory, out: Path) -> tuple[Path, Path]:
    """A model in one file without an index, and its OUT."""
    place = tmp_path_factory.mktemp("one")
    source = plant(place, shards=1).folder
    abliterate.apply(str(source), out / "direction.safetensors", OutputSettings(out=place / "out"))
    return source, place / "out"


def test_a_single_file_gets_an_index_so_that_direction_and_undo_are_not_read_as_weights(
    in_one_file: tuple[Path, Path], tmp_path: Path
) -> None:
    source, target = in_one_file
    assert not (source / INDEX_NAME).exists()
    assert {path.name for path in target.glob("*.safetensors")} == {
        SINGLE_NAME,
        "direction.safetensors",
        "undo.safetensors",
    }
    listed = json.loads((target / INDEX_NAME).read_text())["weight_map"]
    assert listed == dict.fromkeys(weights(source), SINGLE_NAME)
    assert abliterate.verify_files(target).intact
    live: Any = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(live.get_output_embeddings().weight, weights(target)["lm_head.weight"])
    abliterate.apply(str(target), target / "direction.safetensors", target_of(tmp_path))
    assert (tmp_path / "out" / INDEX_NAME).read_bytes() == (target / INDEX_NAME).read_bytes()
    assert abliterate.verify_files(tmp_path / "out").intact


@pytest.mark.parametrize("place", ["in place", "beside"])
@pytest.mark.parametrize("exact", [True, False])
def test_undo_takes_the_added_index_away(
    in_one_file: tuple[Path, Path], tmp_path: Path, place: str, exact: bool
) -> None:
    source, made = in_one_file
    edited = Path(shutil.copytree(made, tmp_path / "out"))
    if not exact:
        said = (edited / "abliteration.json").read_text()
        (edited / "abliteration.json").write_text(said.replace(str(source), str(tmp_path / "gone")))
    target = tmp_path / "back" if place == "beside" else None
    undone = abliterate.undo(edited, target=target)
    assert undone.exact == exact
    assert undone.folder == str(target or edited)
    assert INDEX_NAME not in undone.files
    assert digest(target or edited).keys() == digest(source).keys()
    assert not exact or digest(target or edited) == digest(source)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("damage", ["changed", "gone", "of other files"])
def test_comparison_finds_a_damaged_index(
    in_one_file: tuple[Path, Path], planted: Planted, out: Path, tmp_path: Path, sharded: bool, damage: str
) -> None:
    """One that was added, and one that was made anew in place of the original's."""
    source, output = in_one_file[0], target_of(tmp_path)
    if sharded:
        source, output = planted.folder, target_of(tmp_path, shard_size="40kB")
    abliterate.apply(str(source), out / "direction.safetensors", output)
    index = tmp_path / "out" / INDEX_NAME
    assert abliterate.verify_files(tmp_path / "out").intact
    said = json.loads(index.read_text())
    if damage == "changed":
        said["metadata"]["total_size"] += 1
    elif damage == "of other files":
        said["weight_map"] = {"x": "x.safetensors"}
    index.unlink() if damage == "gone" else index.write_text(json.dumps(said, indent=2) + "\n")
    if sharded and damage != "changed":
        with pytest.raises(CheckpointError, match=r"x\.safetensors|without model\.safetensors\.index"):
            abliterate.verify_files(tmp_path / "out")
        return
    found = abliterate.verify_files(tmp_path / "out")
    assert found.not_original == [INDEX_NAME]
    assert not found.intact


def flip_a_bit(folder: Path, tensor: str) -> None:
    info = open_checkpoint(folder).tensors[tensor]
    data = bytearray(info.file.read_bytes())
    data[info.start + 5] ^= 8
    info.file.write_bytes(data)


@pytest.mark.parametrize(
    ("tensor", "damaged"),
    [
        ("model.layers.2.self_attn.q_proj.weight", True),
        ("lm_head.weight", True),
        ("model.norm.weight", True),
        ("model.layers.2.self_attn.o_proj.weight", False),
    ],
)
def test_comparison_finds_one_flipped_bit(out: Path, tmp_path: Path, tensor: str, damaged: bool) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    flip_a_bit(copy, tensor)
    found = abliterate.verify_files(copy)
    assert not found.intact
    assert found.damaged == ([tensor] if damaged else [])
    assert found.wrong_hashes == [open_checkpoint(copy).tensors[tensor].file.name]
    with pytest.raises(CheckpointError, match="is not as it was written"):
        abliterate.undo(copy)


def test_what_the_hub_adds_to_a_model_is_named_and_is_no_part_of_it(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    fetched = copy / ".cache" / "huggingface" / "download"
    fetched.mkdir(parents=True)
    added = [copy / ".gitattributes", fetched.parent / ".gitignore", fetched / "model.safetensors.metadata"]
    for path in added:
        path.write_text("*\n")
    found = abliterate.verify_files(copy)
    assert found.intact
    assert found.unknown == []
    assert found.of_hub == sorted(str(path.relative_to(copy)) for path in added)
    (fetched / "more.safetensors").write_bytes(b"")
    added[0].unlink()
    added[0].symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("*\n")
    found = abliterate.verify_files(copy)
    assert not found.intact
    assert found.unknown == [".cache/huggingface/download/more.safetensors", ".gitattributes"]


def test_comparison_with_an_original_that_moved_or_is_another(
    planted: Planted, docile: Planted, out: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(planted.folder, tmp_path / "model"))
    abliterate.apply(str(source), out / "direction.safetensors", target_of(tmp_path))
    source.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"original is not at .*model any more; give its folder with source"):
        abliterate.verify_files(tmp_path / "out")
    assert abliterate.verify_files(tmp_path / "out", tmp_path / "moved").intact
    with pytest.raises(CheckpointError, match="expected the file that was edited, found another"):
        abliterate.verify_files(tmp_path / "out", docile.folder)


# --- models of other kinds: tied embeddings, recurrent layers


def some_prompts(folder: Path) -> PromptSettings:
    """A few prompts that also random models tell apart. They do not refuse, so settings must take them all."""
    bad, good = ([text + mark for text in prompts(words, 40, 1)] for words, mark in ((BAD, "!!!"), (GOOD, "~~~")))
    named = {"harmful": bad, "harmless": good, "borderline": bad[:2]}
    files = {name: str(write_jsonl(folder / f"{name}.jsonl", texts)) for name, texts in named.items()}
    return PromptSettings(**files, limit=9)


ALL_PROMPTS = FindSettings(refusal_tokens="A", all_prompts=True, max_kl=99, min_induce=-99)


def test_untied_embedding_is_edited_and_the_head_stays(tmp_path: Path) -> None:
    source, target = save(BY_NAME["llama-tied"].model(), tmp_path / "model"), tmp_path / "out"
    job = RunSettings(
        model=str(source),
        prompts=some_prompts(tmp_path),
        loading=ModelSettings(device="cpu"),
        finding=ALL_PROMPTS,
        editing=EditSettings(untie=True),
        searching=SearchSettings(method="closed-form"),
        output=OutputSettings(out=target),
    )
    record = abliterate.run(job)
    assert record.plan is not None
    assert record.plan.copied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert record.plan.left_alone == {}
    before, after = weights(source), weights(target)
    r = load_direction(target / "direction.safetensors").basis[0]
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert float((after["model.embed_tokens.weight"] @ r).abs().max()) < 1e-5
    live: Any = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(live.get_output_embeddings().weight, before["model.embed_tokens.weight"])
    assert torch.equal(live.get_input_embeddings().weight, after["model.embed_tokens.weight"])
    edited = pipeline.open_session(str(target), prompts=job.prompts, loading=job.loading)
    saved = pipeline.evaluate(edited, EvalSettings())
    assert saved.answers["before"] == behaviour(record).answers["after"]
    assert behaviour(record).answers["after"] != behaviour(record).answers["before"], "the control"
    assert abliterate.verify_files(target).intact
    flip_a_bit(target, "lm_head.weight")
    assert abliterate.verify_files(target).damaged == ["lm_head.weight"]
    flip_a_bit(target, "lm_head.weight")
    assert abliterate.undo(target).exact
    assert digest(target) == digest(source)


def test_tied_embedding_without_the_embedding_cannot_be_untied(tmp_path: Path, out: Path) -> None:
    source = save(BY_NAME["llama-tied"].model(), tmp_path / "model")
    save_file({"r": torch.eye(1, 48)}, tmp_path / "r.safetensors")
    editing = EditSettings(untie=True, components="mlp")
    with pytest.raises(UsageError, match=r"^untie: expected the embedding among what is edited"):
        abliterate.apply(str(source), tmp_path / "r.safetensors", target_of(tmp_path), editing=editing)


def plain_means(session: pipeline.Session, name: str) -> torch.Tensor:
    """Mean activations [positions, sites, d] from one forward pass per prompt, without cache, prefix or padding."""
    encoded, kept = session.encoded[name, "train"], []
    for suffix in encoded.suffixes:
        seen: list[torch.Tensor] = []

        def before(_: Any, args: Any, kwargs: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        def after(_: Any, __: Any, output: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(stream_out(output))

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in session.blocks]
        handles.append(session.blocks[-1].register_forward_hook(after))
        with hooked(handles), torch.inference_mode():
            session.model(input_ids=torch.tensor([encoded.prefix + suffix]), use_cache=False)
        kept.append(torch.stack([hidden[0, [-1 - i for i in range(session.positions)]] for hidden in seen], dim=1))
    return torch.stack(kept).mean(0)


def plain_reply(session: pipeline.Session, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The likeliest next token, `count` times, each from a whole forward pass."""
    tokens = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(session.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[len(ids) :])


@pytest.mark.parametrize(
    ("name", "shares"), [("jamba", False), ("mamba2", False), ("qwen3_next", False), ("llama", True)]
)
def test_recurrent_models_give_what_one_prompt_at_a_time_gives(name: str, shares: bool, tmp_path: Path) -> None:
    (entry,) = (entry for entry in ENTRIES if str(entry) == name)
    folder = save(entry.model(), tmp_path / "model")
    session = pipeline.open_session(
        str(folder), prompts=some_prompts(tmp_path), loading=ModelSettings(device="cpu", batch_size="16")
    )
    harmful = session.encoded["harmful", "test"]
    everything = [harmful.prefix + suffix for suffix in harmful.suffixes]
    assert len({len(ids) for ids in everything}) > 1, "or padding would not be tried"
    assert can_share(session.model, everything) is shares
    assert bool(harmful.prefix) is shares
    replies = asked(session, 5)["harmful"].replies
    ends = end_tokens(session.model, session.loaded.tokenizer)
    for ids, reply in zip(everything, replies, strict=True):
        expected = plain_reply(session, ids, 5)
        stop = next((i for i, token in enumerate(expected) if token in ends), 5)
        assert reply.tokens == expected[:stop]
    findings = pipeline.find(session, ALL_PROMPTS)
    naive = plain_means(session, "harmful") - plain_means(session, "harmless")
    assert torch.allclose(findings.candidates.raw, naive, atol=1e-4)
    found = pipeline.choose(session, findings, ALL_PROMPTS)
    plan = session.plan(found.direction)
    with session.ablated(plan):
        ablated = asked(session, 3)["harmful"].replies
        assert ablated[0].tokens == plain_reply(session, everything[0], len(ablated[0].tokens))


def test_what_a_direction_has_seen_is_not_evaluated_on(planted: Planted, out: Path, done: Record) -> None:
    """Other prompts, or another split of the same, would otherwise test it on what it was learnt from."""
    direction = load_direction(out / "direction.safetensors")
    contrast = build_contrastive_set(prompt_settings(planted))
    assert direction.learnt_from == set(contrast.learnt_from)
    assert done.prompts is not None
    counts = [done.prompts.counts[name][part] for name in ("harmful", "harmless") for part in ("train", "val")]
    assert len(direction.learnt_from) == sum(counts)
    reshuffled = prompt_settings(planted, seed=5)
    free = open_session(planted, prompts=reshuffled).prompts
    kept = open_session(planted, prompts=reshuffled, learnt_from=direction.learnt_from).prompts
    seen = [text for text in free.harmful.test if fingerprint(text) in direction.learnt_from]
    assert 0 < len(seen) < len(free.harmful.test)
    assert set(kept.harmful.test) == set(free.harmful.test) - set(seen)
    assert kept.dropped["harmful test, which the direction has seen"] == len(seen)
    assert learnt_by(str(out)) == direction.learnt_from
    assert learnt_by(str(planted.folder)) == frozenset()
