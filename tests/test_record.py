"""The record and the model card: complete, honest, redacted, and readable without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from abliterate import record as rec
from abliterate.errors import CheckpointError, UsageError
from abliterate.record import REDACTED_WORDS, Record, read_record, redact, write_record
from abliterate.report.card import NOTICE, render_card, write_card
from abliterate.report.wording import rate
from abliterate.texts import encodable


def rates(refusals: int, n: int = 100, degenerate: int = 0) -> rec.RatePart:
    return rec.RatePart(refusals=refusals, degenerate=degenerate, n=n, rate=refusals / n, ci95=(0.25, 0.5))


def site(**changes: Any) -> rec.SitePart:
    values = {"layer": 14, "position": -2, "bypass": -3.25, "induce": 1.5, "kl": 0.042, "prompts": 80}
    return rec.SitePart(**{**values, "norm": 2.0, "dprime": 4.0, "auroc": 0.99, **changes})


def make(**changes: Any) -> Record:
    behaviour = rec.BehaviourPart(harmful=rates(97), harmless=rates(1), borderline=rates(40))
    after = rec.BehaviourPart(harmful=rates(3, degenerate=2), harmless=rates(0), borderline=rates(5))
    shift = {
        "kl_first_token": 0.0123,
        "kl_reply": 0.0,
        "nll_before": 0.0,
        "nll_after": 0.0,
        "prompts": 64,
        "tokens": 900,
    }
    answer = rec.AnswerPart(prompt="p", label="refusal", evidence="", tokens=9, text="I […]", redacted=True)
    values: dict[str, Any] = {
        "created": "2026-01-02T03:04:05+00:00",
        "versions": {"abliterate": "0.1.0"},
        "settings": {"model": "owner/model", "seed": 0},
        "model": rec.ModelPart(
            name="owner/model",
            kind="hub",
            architecture="LlamaForCausalLM",
            d_model=64,
            layers=24,
            dtype="bfloat16",
            device="cpu",
            source_sha256={"model.safetensors": "ab"},
        ),
        "anatomy": rec.AnatomyPart(writers=49, worst_closure=1e-6, tolerance=1e-3),
        "selection": rec.SelectionPart(
            chosen=site(),
            met_rule=True,
            control=rec.ControlPart(bypass=4.75, induce=-6.5, kl=0.001, norm=2.0),
            harmful=5.125,
            harmless=-7.0,
            max_kl=0.1,
            min_induce=0.0,
            max_depth=0.8,
            trained_on={"harmful": 300, "harmless": 310},
            candidates=[site(), site(layer=13)],
        ),
        "plan": rec.PlanPart(
            strength=1.0,
            rank=1,
            edits=[
                rec.ResidualPart(
                    tensor=f"t{i}",
                    writer="w",
                    kind="mlp",
                    dtype="BF16",
                    shape=[64, 64],
                    before=2.0,
                    after=0.01 * i,
                    ratio=0.005 * i,
                    change=0.1,
                )
                for i in range(3)
            ],
            left_alone={"model.embed_tokens": "tied to the head"},
        ),
        "evaluation": rec.EvaluationPart(
            max_new_tokens=32,
            before=behaviour,
            after=after,
            shift=rec.ShiftPart(**shift),
            answers={"before": {"harmful": [answer]}, "after": {}},
        ),
        "warnings": ["something to mind"],
    }
    return Record(**{**values, **changes})


# --- the record


def test_record_round_trips_through_its_file(tmp_path: Path) -> None:
    made = make()
    assert write_record(made, tmp_path) == tmp_path / "abliteration.json"
    assert read_record(tmp_path) == made


def test_record_of_a_bare_edit_round_trips_too(tmp_path: Path) -> None:
    made = make(selection=None, evaluation=None, prompts=None, plan=None)
    write_record(made, tmp_path)
    assert read_record(tmp_path) == made


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    part = rec.RatePart(refusals=0, degenerate=0, n=0, rate=rec.finite(math.nan), ci95=(0.0, 1.0))
    behaviour = rec.BehaviourPart(harmful=part, harmless=part, borderline=part)
    evaluation = make().evaluation
    assert evaluation is not None
    write_record(make(evaluation=evaluation.model_copy(update={"before": behaviour})), tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "abliteration.json").read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=refuse)
    assert data["evaluation"]["before"]["harmful"]["rate"] is None
    assert read_record(tmp_path).evaluation is not None
    assert rec.finite(0.5) == 0.5
    assert rec.finite(math.inf) is None


def test_record_is_text_that_people_can_read(tmp_path: Path) -> None:
    write_record(make(warnings=["Größe"]), tmp_path)
    text = (tmp_path / "abliteration.json").read_text(encoding="utf-8")
    assert "Größe" in text
    assert text.endswith("}\n")
    assert text.count("\n") > 50


def test_unknown_fields_and_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        make(surprise=1)
    write_record(make(), tmp_path)
    file = tmp_path / "abliteration.json"
    whole = json.loads(file.read_text())
    for damage, said in (
        ({"schema_version": 2}, "expected a record of schema version 1, found version 2"),
        ({"surprise": 1}, "expected the record of a run, .*surprise: extra inputs"),
        ({"model": None}, "expected the record of a run, .*model: input should be"),
        ({"timings_s": {"all": 10**400}}, "a number of 401 digits"),
        ({"peak_memory_bytes": {"all": -1}}, "peak_memory_bytes.all: input should be greater"),
    ):
        file.write_text(json.dumps(whole | damage))
        with pytest.raises(UsageError, match=said) as caught:
            read_record(tmp_path)
        assert str(caught.value).isprintable()
    file.write_text("{")
    with pytest.raises(UsageError, match="expected the record of a run"):
        read_record(tmp_path)


def test_folder_without_a_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected the record of a run, found none") as caught:
        read_record(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_record_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        make().created = "now"  # type: ignore[misc]


def test_schema_can_be_given_to_other_programs() -> None:
    schema = Record.model_json_schema()
    assert {"evaluation", "selection", "timings_s", "peak_memory_bytes"} <= schema["properties"].keys()


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for write in (write_record, write_card):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write(make(), tmp_path / "file")


# --- redaction


def test_redacted_reply_keeps_its_first_words_only() -> None:
    assert redact("To make it, first take two litres of petrol") == "To make it, first […]"
    assert redact("I  can't\nhelp with that") == "I can't help with […]"
    assert redact("Sure") == "Sure"
    assert redact("") == ""


@given(st.text())
def test_redacted_reply_never_holds_more_words_than_allowed(text: str) -> None:
    kept = redact(text).removesuffix(" […]").split()
    assert kept == text.split()[:REDACTED_WORDS]


# --- the card

#: How cards name what an edit leaves in the weights.
REMAINING, RATIO = "remaining projection on", "‖r̂ᵀW′‖ / ‖r̂ᵀW‖"


def test_card_gives_counts_intervals_and_side_effects() -> None:
    card = render_card(make())
    assert "| harmful | 97/100 = 97 % [25, 50] | 3/100 = 3 % [25, 50] (2 degenerate) |" in card
    assert "| borderline | 40/100" in card
    assert "KL of the first token 0.012" in card
    assert "64 harmless prompts" in card


def test_card_says_what_was_done_and_what_the_control_did() -> None:
    card = render_card(make())
    assert "layer 14 of 24, position -2: bypass -3.25 (before: 5.12), induce 1.50" in card
    assert "random direction of the same norm: bypass 4.75" in card
    assert "3 tensors" in card
    assert f"{REMAINING} the direction {RATIO} 0.65 % (rounding to the stored format)" in card
    assert "model.embed_tokens: left alone, tied to the head" in card
    assert "- Warning: something to mind" in card


def planned(**changes: Any) -> Record:
    made = make()
    assert made.plan is not None
    return make(plan=made.plan.model_copy(update=changes))


def test_card_gives_the_strengths_that_were_used_and_blames_rounding_only_for_a_full_removal() -> None:
    several = render_card(planned(strengths={"a": 0.5, "b": 1.25, "c": 0.0, "d": 1.0}))
    assert f"3 tensors with strength 0.5 to 1.25: {REMAINING} the direction {RATIO} 0.65 %." in several
    half = render_card(planned(strengths={"a": 0.5, "b": 0.5}))
    assert f"3 tensors with strength 0.5: {REMAINING} the direction {RATIO} 0.65 %." in half
    assert "rounding" not in several + half
    assert "(rounding to the stored format)" in render_card(planned(strengths={"a": 1.0, "b": 0.0}))


def test_card_of_an_affine_edit_does_not_call_what_was_put_back_rounding() -> None:
    card = render_card(planned(variant={"affine": True}))
    assert "3 tensors with strength 1, what harmless prompts have along the direction put back" in card
    assert "rounding" not in card
    assert "- The edit: affine True." in card


def test_card_of_a_subspace_says_how_many_directions() -> None:
    card = render_card(planned(rank=3).model_copy(update={"settings": {"finding": {"subspace": "svd"}}}))
    assert "along 3 directions of the residual stream" in card
    assert f"{REMAINING} the 3 directions {RATIO} 0.65 %" in card
    assert "The edit (svd) was made around the difference of means at layer 14" in card
    assert "one direction" not in card


@pytest.mark.parametrize(
    ("realisation", "files", "parts"),
    [
        ("lora", ["adapter_model.safetensors"], ["library_name: peft", "A LoRA adapter", "PeftModel.from_pretrained"]),
        (
            "lora",
            ["biased/adapter_model.safetensors", "plain/adapter_model.safetensors"],
            ["Two adapters that belong together", "m.set_adapter(['plain', 'biased'])"],
        ),
        ("gguf-lora", ["a.gguf"], ["library_name: gguf", "A GGUF LoRA", "--lora a.gguf"]),
        ("control-vector", ["v.gguf"], ["library_name: gguf", "It steers", "--control-vector v.gguf"]),
    ],
)
def test_card_of_an_adapter_says_what_it_is_and_claims_no_edited_tensors(
    realisation: str, files: list[str], parts: list[str]
) -> None:
    card = render_card(planned(realisation=realisation, files=files, edits=[]))
    assert all(part in card for part in parts)
    assert "tensors with strength" not in card
    assert "A version of" not in card
    assert NOTICE in card
    assert "## How to use it" not in render_card(make())


def test_many_writers_left_alone_for_one_reason_are_counted() -> None:
    left = {f"model.layers.{i}.mlp": "not chosen" for i in range(5)} | {"model.embed_tokens": "tied to the head"}
    card = render_card(planned(left_alone=left))
    assert "- 5 writers: left alone, not chosen." in card
    assert "- model.embed_tokens: left alone, tied to the head." in card


def test_record_keeps_what_undo_and_adapters_need(tmp_path: Path) -> None:
    made = planned(
        variant={"layers": "1-3", "affine": True},
        strengths={"w": 0.5},
        files=["adapter_model.safetensors"],
        copied={"lm_head.weight": "embed.weight"},
        undo=["undo.safetensors"],
    )
    model = made.model.model_copy(update={"folder": "/models/one", "storage": "fp8"})
    made = made.model_copy(update={"model": model, "output_sha256": {"a": "b"}, "left_out": ["x.bin"]})
    write_record(made, tmp_path)
    assert read_record(tmp_path) == made
    old = json.loads((tmp_path / "abliteration.json").read_text())
    for name in ("variant", "strengths", "files", "copied", "undo", "realisation"):
        del old["plan"][name]
    for name in ("folder", "storage"):
        del old["model"][name]
    (tmp_path / "abliteration.json").write_text(json.dumps(old))
    read = read_record(tmp_path)
    assert read.plan is not None
    assert (read.plan.realisation, read.plan.undo, read.model.folder) == ("weights", [], "")


def test_card_of_a_strengthened_model_does_not_say_it_was_weakened() -> None:
    record = make()
    assert record.plan is not None
    card = render_card(record.model_copy(update={"plan": record.plan.model_copy(update={"strength": -1.0})}))
    assert NOTICE not in card
    assert "uncensored" not in card
    assert "rounding" not in card


def test_card_keeps_the_licence_of_the_original(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Original\n")
    card = write_card(make(), tmp_path).read_text()
    assert "license: apache-2.0" in card.split("---")[1]
    assert "# Original" not in card


def test_card_carries_the_notice_and_where_the_model_comes_from() -> None:
    card = render_card(make())
    assert NOTICE in card
    front = card.split("---")[1]
    assert "base_model: owner/model" in front
    assert "- abliterated" in front
    assert card.startswith("---\n")
    assert "# model, abliterated" in card


def test_local_folder_is_not_given_as_a_base_model_on_the_hub() -> None:
    local = make().model.model_copy(update={"name": "/home/someone/secret/model", "kind": "folder"})
    card = render_card(make(model=local))
    assert "base_model" not in card
    assert "/home/someone" not in card


def test_card_of_a_bare_edit_claims_no_measurement() -> None:
    card = render_card(make(selection=None, evaluation=None))
    assert "Measured" not in card
    assert "difference of means" not in card
    assert NOTICE in card


def test_card_replaces_the_one_of_the_original(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# The original, safe model")
    write_card(make(), tmp_path)
    assert "original, safe" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (rates(41), "41/100 = 41 % [25, 50]"),
        (rates(0, degenerate=3), "0/100 = 0 % [25, 50] (3 degenerate)"),
        (rec.RatePart(refusals=0, degenerate=0, n=0, rate=None, ci95=(0.0, 1.0)), "no prompts"),
    ],
)
def test_rate_shows_counts_percentage_and_interval(part: rec.RatePart, text: str) -> None:
    assert rate(part) == text


def test_texts_are_made_fit_once_however_deep_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = make().model_dump(mode="json"), list[object]()
    data["warnings"] = ["half: \udc80"]
    data["model"]["name"] = "a\udc80b"

    def counted(value: Any) -> Any:
        seen.append(value)
        return encodable(value)

    monkeypatch.setattr(rec, "encodable", counted)
    record = rec.Record.model_validate(data)
    assert len(seen) == 1
    assert (record.warnings, record.model.name) == (["half: \\udc80"], "a\\udc80b")
    with pytest.raises(ValidationError):
        rec.Record.model_validate({**data, "model": {}})
    part = rec.ModelPart.model_validate(data["model"])  # a part by itself, after one that was refused
    assert part.name == "a\\udc80b"
    assert len(seen) == 3
