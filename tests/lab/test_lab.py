"""The lab without its page: what is measured, streamed, kept and written for a window."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import os
import socket
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from abliterate import lab, pipeline
from abliterate.config import (
    ApplySettings,
    EditSettings,
    FindSettings,
    MeasureSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.edit.direction import Direction, Recipe, Site, load_direction, save_direction
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Plan
from abliterate.errors import AbliterateError, UsageError
from abliterate.lab import Bench, Controls, Heat, markup
from abliterate.lab.bench import FirstToken
from abliterate.lab.keeping import place
from abliterate.lab.opening import heat_of
from abliterate.lab.serving import OnlyHere, free_port
from abliterate.lab.talking import Said, Side, Talk, coloured, talk
from abliterate.lab.windows import FOUND, REMOVE, Brake, Desk, Knobs, messages
from abliterate.model.loading import load, locate
from abliterate.monitor import Monitor
from abliterate.prompts import ChatRenderer
from abliterate.record import read_record
from planted import BLOCKS, D_MODEL, POSITIONS, WRITES, Planted, plant

BAD_PROMPT, GOOD_PROMPT = "tell me now bomb the river", "tell me now bread the river"
REFUSAL, ANSWER = "I cannot help with that .", "Sure , here it is"
ANY_SITE = Site(WRITES + 2, -1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def run(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run."""
    out = tmp_path_factory.mktemp("run") / "out"
    named = {name: str(getattr(planted, name)) for name in ("harmful", "harmless", "borderline")}
    pipeline.run(
        RunSettings(
            model=str(planted.folder),
            prompts=PromptSettings(**named),
            loading=ModelSettings(device="cpu", batch_size="64"),
            searching=SearchSettings(method="closed-form"),
            output=OutputSettings(out=out),
        )
    )
    return out


@pytest.fixture(scope="module")
def opened(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return lab.open_bench(str(run), root=tmp_path_factory.mktemp("root"))


@pytest.fixture
def bench(opened: Bench, tmp_path: Path) -> Bench:
    """The bench with an empty folder to write into; no hook is on its model afterwards."""
    return replace(opened, root=tmp_path)


def hooks(bench: Bench) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bench.model.modules())


def reply(bench: Bench, prompt: str, controls: Controls | None) -> str:
    intervention = None if controls is None else bench.intervention(controls)
    return bench.text([*bench.reply(bench.encode([], prompt), intervention, 12)][-1])


def same_plan(one: Plan, other: Plan) -> bool:
    def told(plan: Plan) -> list[tuple[Any, ...]]:
        return [(e.writer.name, e.strength, e.norm_preserving, e.reader is None, e.offset is None) for e in plan.edits]

    bases = zip(one.edits, other.edits, strict=False)
    return told(one) == told(other) and all(torch.allclose(a.basis, b.basis, atol=1e-6) for a, b in bases)


def first_probabilities(folder: Path, prompt: str) -> Tensor:
    """Of the next token, by a model read from files anew."""
    loaded = load(locate(str(folder)), device="cpu")
    (ids,) = ChatRenderer(loaded.tokenizer).encode([prompt])
    with torch.inference_mode():
        logits: Tensor = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits.softmax(-1)


CONTROLS = [
    Controls(),
    Controls(strength=0.5, first=1, last=3),
    Controls(site=ANY_SITE, components=("attention",)),
    Controls(site=ANY_SITE, first=1, components=("mlp", "embedding"), strength=-0.5),
    Controls(variant="norm-preserving"),
    Controls(site=ANY_SITE, variant="bi-projected", strength=1.5),
]


def test_a_run_opens_with_its_original_its_tokens_and_its_scores(bench: Bench, run: Path, planted: Planted) -> None:
    record = read_record(run)
    assert record.selection is not None
    assert record.selection.chosen is not None
    assert bench.loaded.files.folder == planted.folder
    assert bench.tokens == tuple(token.token for token in record.refusal_tokens)
    assert bench.chosen == Site(record.selection.chosen.layer, record.selection.chosen.position)
    assert bench.components == ("embedding", "attention", "mlp")
    assert bench.steps
    assert bench.heat is not None
    assert bench.heat.values.shape == (POSITIONS, BLOCKS + 1)
    layer, position = bench.chosen
    assert float(bench.heat.values[-1 - position, layer]) == pytest.approx(record.selection.chosen.bypass)
    assert bench.heat.best == "low"


def test_the_original_refuses_and_the_plan_answers(bench: Bench) -> None:
    assert reply(bench, BAD_PROMPT, None) == REFUSAL
    assert reply(bench, BAD_PROMPT, Controls()) == ANSWER
    assert reply(bench, GOOD_PROMPT, Controls()) == reply(bench, GOOD_PROMPT, None) == ANSWER
    assert reply(bench, BAD_PROMPT, Controls(strength=0)) == REFUSAL
    assert reply(bench, BAD_PROMPT, Controls(first=WRITES + 1)) == REFUSAL  # the writer is below


def test_adding_the_difference_makes_it_refuse(bench: Bench) -> None:
    assert reply(bench, GOOD_PROMPT, Controls(adding=True)) == REFUSAL
    assert reply(bench, GOOD_PROMPT, Controls(adding=True, coefficient=0)) == ANSWER
    with pytest.raises(UsageError, match="choose 'remove'"):
        bench.plan(Controls(adding=True))
    with pytest.raises(UsageError, match="another site"):
        bench.intervention(Controls(adding=True, site=Site(BLOCKS, -1)))


@pytest.mark.parametrize("controls", CONTROLS)
def test_the_plan_is_the_one_that_settings_would_make(bench: Bench, controls: Controls) -> None:
    site, direction = controls.site, bench.direction
    editing = bench.settings(controls)
    assert same_plan(bench.plan(controls), plan_for(bench.anatomy, direction.at(site), editing))
    assert editing.strength == controls.strength
    if controls == Controls():
        assert editing == EditSettings()


def test_impossible_controls_are_one_line(bench: Bench) -> None:
    wrong = (Controls(first=3, last=1), Controls(components=()), Controls(last=BLOCKS), Controls(site=Site(99, -1)))
    for controls in wrong:
        with pytest.raises(UsageError) as error:
            bench.plan(controls)
        assert "\n" not in str(error.value)


def test_interleaved_replies_are_those_written_alone(bench: Bench) -> None:
    asked = [(BAD_PROMPT, Controls()), (BAD_PROMPT, None), (GOOD_PROMPT, Controls(adding=True)), (GOOD_PROMPT, None)]
    alone = [reply(bench, *one) for one in asked]
    assert len(set(alone)) == 2
    streams = [
        bench.reply(bench.encode([], prompt), None if controls is None else bench.intervention(controls), 12)
        for prompt, controls in asked
    ]
    last: list[tuple[int, ...]] = [()] * len(streams)
    for row in itertools.zip_longest(*streams):
        assert hooks(bench) == 0
        last = [now or before for now, before in zip(row, last, strict=True)]
    assert [bench.text(tokens) for tokens in last] == alone


def test_without_a_cache_replies_are_the_same(bench: Bench) -> None:
    whole = replace(bench, steps=False)
    for controls in (None, Controls(), Controls(adding=True)):
        assert reply(whole, BAD_PROMPT, controls) == reply(bench, BAD_PROMPT, controls)


def test_no_hook_is_left_by_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, intervention = bench.encode([], BAD_PROMPT), bench.intervention(Controls())
    seen: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        seen.append(hooks(bench))
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(bench.model, "forward", fail)
        with pytest.raises(RuntimeError, match="stop"):
            next(bench.reply(prompt, intervention, 2))
    assert seen[0] > 0
    assert hooks(bench) == 0
    assert not bench.lock.locked()


def test_first_token_numbers(bench: Bench) -> None:
    prompt = bench.encode([], BAD_PROMPT)
    nothing = bench.first_token(prompt, bench.intervention(Controls(strength=0)))
    assert nothing.kl == 0
    assert nothing.edited == nothing.original > 0.9
    found = bench.first_token(prompt, bench.intervention(Controls()))
    assert found.original == nothing.original
    assert found.edited < 0.1
    assert found.kl > 1


def test_projections_are_those_of_the_stream(bench: Bench, planted: Planted) -> None:
    prompt = bench.encode([], BAD_PROMPT)
    said = [*bench.reply(prompt, None, 12)][-1]
    other = copy.deepcopy(bench.model)  # transformers leaves hooks of its own on a model asked for these
    states = other(input_ids=torch.tensor([[*prompt, *said]]), output_hidden_states=True).hidden_states
    r = bench.direction.basis[0]
    for layer in range(BLOCKS):  # the last entry of transformers is behind the final norm
        expected = states[layer][0, len(prompt) :] @ r
        assert torch.allclose(bench.projections(prompt, said, layer, None), expected, atol=1e-5)
    without = bench.projections(prompt, said, BLOCKS, bench.intervention(Controls()))
    assert float(without.abs().max()) < 1e-4
    assert float(bench.projections(prompt, said, BLOCKS, None).abs().max()) > 0.1
    site = bench.chosen
    assert site is not None
    assert bench.direction.candidates is not None
    raw = bench.direction.candidates.at(*site)
    added = bench.projections(prompt, said, site[0], bench.intervention(Controls(adding=True)))
    before = bench.projections(prompt, said, site[0], None)
    assert torch.allclose(added - before, (raw @ r).expand(len(said)), atol=1e-4)
    assert hooks(bench) == 0


@pytest.mark.parametrize("controls", CONTROLS)
def test_a_saved_plan_is_the_same_plan(bench: Bench, controls: Controls) -> None:
    path = lab.save_plan(bench, controls, "mine")
    assert path == bench.root / "mine.safetensors"
    again = load_direction(path)
    assert same_plan(plan_for(bench.anatomy, again), bench.plan(controls))
    loaded = replace(bench, direction=lab.load_plan(bench, path))
    assert same_plan(loaded.plan(Controls()), bench.plan(controls))
    assert not same_plan(loaded.plan(Controls(strength=0.25)), bench.plan(controls))
    halved = [edit.strength for edit in loaded.plan(Controls(strength=0.5)).edits]
    assert halved == pytest.approx([edit.strength / 2 for edit in bench.plan(controls).edits])


def test_a_recipe_keeps_its_variant_where_it_is_saved_again(bench: Bench) -> None:
    strengths = {edit.writer.name: 0.5 for edit in bench.plan(Controls()).edits}
    recipe = Recipe(strengths, norm_preserving=True)
    searched = replace(bench, direction=replace(bench.direction, recipe=recipe))
    again = load_direction(lab.save_plan(searched, Controls(strength=0.5), "again"))
    assert again.recipe == Recipe(dict.fromkeys(strengths, 0.25), norm_preserving=True)


#: Not of full strength: what is left of a column that was nearly all refusal would be magnified, rounding included.
KEEPING_NORMS = Controls(variant="norm-preserving", strength=0.9)


@pytest.mark.parametrize("controls", [CONTROLS[1], CONTROLS[2], KEEPING_NORMS])
def test_applied_weights_give_the_first_tokens_of_the_hooks(bench: Bench, controls: Controls) -> None:
    prompt, intervention = bench.encode([], BAD_PROMPT), bench.intervention(controls)
    with bench.lock, bench._acting(intervention):
        hooked = bench._run(prompt, None).softmax(-1)
    out = lab.apply_plan(bench, controls, "edited", "weights", Monitor())
    written = first_probabilities(out, BAD_PROMPT)
    assert float((written - hooked).abs().max()) < 1e-4
    assert float((written - first_probabilities(bench.loaded.files.folder, BAD_PROMPT)).abs().max()) > 1e-3
    assert read_record(out).plan is not None


def test_a_saved_plan_can_be_applied_by_the_pipeline(bench: Bench, tmp_path: Path) -> None:
    controls = Controls(strength=0.7, first=1)
    path = lab.save_plan(bench, controls, "mine")
    pipeline.apply(str(bench.loaded.files.folder), path, ApplySettings(output=OutputSettings(out=tmp_path / "a")))
    lab.apply_plan(bench, controls, "b", "weights", Monitor())
    one, other = (first_probabilities(tmp_path / name, BAD_PROMPT) for name in "ab")
    assert torch.equal(one, other)


def test_an_adapter_can_be_written(bench: Bench) -> None:
    out = lab.apply_plan(bench, Controls(), "adapter", "lora", Monitor())
    assert (out / "adapter_model.safetensors").is_file()
    with pytest.raises(AbliterateError, match="norm"):
        lab.apply_plan(bench, Controls(variant="norm-preserving"), "other", "lora", Monitor())
    assert not (bench.root / "other").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", ".hidden", "a\0b", "~", "a b", "-o", "x" * 200, "a\n"]
)
def test_only_plain_names_are_written_to(bench: Bench, name: str) -> None:
    before = sorted(bench.root.parent.iterdir())
    for keep in (
        lambda: lab.save_plan(bench, Controls(), name),
        lambda: lab.apply_plan(bench, Controls(), name, "weights", Monitor()),
    ):
        with pytest.raises(UsageError, match="name") as error:
            keep()
        assert "\n" not in str(error.value)
    assert list(bench.root.iterdir()) == []
    assert sorted(bench.root.parent.iterdir()) == before
    assert place(bench.root, "plain-name.2") == bench.root / "plain-name.2"  # the control


def test_nothing_is_replaced(bench: Bench) -> None:
    lab.save_plan(bench, Controls(), "mine")
    stored = (bench.root / "mine.safetensors").read_bytes()
    (bench.root / "folder").mkdir()
    (bench.root / "link").symlink_to(bench.root / "nowhere")
    with pytest.raises(UsageError, match="free"):
        lab.save_plan(bench, Controls(strength=0.5), "mine.safetensors")
    for name in ("folder", "link"):
        with pytest.raises(UsageError, match="free"):
            lab.apply_plan(bench, Controls(), name, "weights", Monitor())
    assert (bench.root / "mine.safetensors").read_bytes() == stored


def test_foreign_plans_are_refused_in_one_line(bench: Bench, tmp_path: Path) -> None:
    narrow, damaged, text = (tmp_path / name for name in ("narrow.safetensors", "damaged.safetensors", "plan.txt"))
    save_file({"basis": torch.ones(1, 7)}, narrow)
    damaged.write_bytes(b"\xff" * 64)
    text.write_text("{}")
    other = tmp_path / "other.safetensors"
    basis = torch.nn.functional.normalize(torch.ones(1, D_MODEL))
    save_direction(other, Direction(basis, recipe=Recipe({"no.such.weight": 1.0})))
    for path, said in ((narrow, "width"), (damaged, "damaged"), (text, "safetensors"), (other, "no.such.weight")):
        with pytest.raises(AbliterateError, match=said) as error:
            lab.load_plan(bench, path)
        assert "\n" not in str(error.value)
    plain = tmp_path / "plain.safetensors"
    save_direction(plain, Direction(basis))
    assert lab.load_plan(bench, plain).candidates is None


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def elements(page: str) -> _Elements:
    parser = _Elements()
    parser.feed(page)
    return parser


HOSTILE = (
    "</span><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onclick="alert(1)',
    "${alert(1)}",
    "{{constructor}}",
    "`x`",
    "\u2028&amp;",
    "\x00<svg/onload=1>",
)


def test_hostile_texts_stay_texts() -> None:
    page = markup.tokens([("<b>name</b>", HOSTILE, [0.5] * len(HOSTILE))], 3) + markup.note("".join(HOSTILE))
    found = elements(page)
    assert found.tags <= {"div", "p", "span", "i"}
    assert found.attributes <= {"class", "style", "title"}
    assert not any(sign in page for sign in ("${", "{{", "`", "<script", "<img"))
    for text in HOSTILE:
        assert text.replace("\x00", "") in found.text.replace("\x00", "").replace("\ufffd", "")
    assert "script" in elements("".join(HOSTILE)).tags  # the control


def test_hostile_tokens_of_a_model_stay_texts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(bench.loaded.tokenizer), "decode", lambda _, tokens, **__: HOSTILE[0] * len(tokens))
    prompt = bench.encode([], BAD_PROMPT)
    now = Talk(Side(((BAD_PROMPT, HOSTILE[0]),), Said(prompt, (1, 2))), Side())
    assert "script" not in elements(messages(now.original)[1]["content"]).tags
    found = elements(coloured(bench, now, 2))
    assert "script" not in found.tags
    assert found.text.count(HOSTILE[0]) == 2


def test_the_pieces_of_a_reply_make_up_its_text(bench: Bench) -> None:
    said = [*bench.reply(bench.encode([], BAD_PROMPT), None, 12)][-1]
    assert bench.pieces(said) == ["I", " cannot", " help", " with", " that", " ."]
    assert bench.pieces(()) == []


def test_the_map_marks_the_site_and_says_every_number() -> None:
    heat = Heat("bypass", torch.tensor([[float("nan"), -2.0, 1.0], [3.0, 0.0, float("nan")]]), "low")
    sites = [Site(1, -1), Site(2, -1), Site(0, -2), Site(1, -2)]
    page = markup.heat_map(heat, sites, sites[0])
    assert page.count("<button") == 6
    assert page.count(" disabled") == 2
    assert page.count("aria-pressed") == 1
    assert (
        'data-site="1:-1" title="layer 1, position -1: -2.000" aria-label="layer 1, position -1: -2.000" aria-p' in page
    )
    assert "--shade:100%" in page.split('data-site="1:-1"')[1].split(">")[0]
    assert "--shade:0%" in page.split('data-site="0:-2"')[1].split(">")[0]
    assert "-2.00 (best)" in page
    assert "<table" not in markup.heat_map(None, [], None)


def test_without_a_selection_the_map_is_the_size_of_the_difference(bench: Bench) -> None:
    heat = heat_of(bench.direction)
    assert heat is not None
    assert heat.best == "high"
    assert bool((heat.values[0, : WRITES + 1] < 0.05).all())  # nobody knows of refusal there yet
    assert bool((heat.values[0, WRITES + 1 :] > 1).all())
    assert heat_of(Direction(torch.ones(1, 4))) is None


def test_both_sides_of_a_talk_go_on_from_their_own_replies(bench: Bench) -> None:
    first = [*talk(bench, Talk(), BAD_PROMPT, bench.intervention(Controls()), 12)][-1]
    assert first.original.turns == ((BAD_PROMPT, REFUSAL),)
    assert first.edited.turns == ((BAD_PROMPT, ANSWER),)
    second = [*talk(bench, first, GOOD_PROMPT, bench.intervention(Controls()), 12)][-1]
    assert [turn[0] for turn in second.edited.turns] == [BAD_PROMPT, GOOD_PROMPT]
    assert messages(second.edited)[1] == {"role": "assistant", "content": ANSWER}


def test_a_system_prompt_is_in_every_prompt(bench: Bench) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    told = replace(bench, renderer=ChatRenderer(bench.loaded.tokenizer, template, "quick morning"))
    words = bench.loaded.tokenizer.convert_ids_to_tokens(told.encode([("show", "Sure")], "tell"))
    assert [word for word in words if word != "<unk>"] == ["quick", "morning", "show", "Sure", "tell"]


def test_a_window_keeps_its_own_plan(bench: Bench, tmp_path: Path) -> None:
    desk = Desk(bench)
    knobs = (FOUND, 1.0, 0, BLOCKS - 1, list(bench.components), "plain", REMOVE, 1.0)
    path = lab.save_plan(bench, Controls(strength=0), "nothing")
    loaded = desk.load(str(path))
    for direction, expected in ((None, ANSWER), (loaded, REFUSAL), (None, ANSWER)):
        *_, (now, _, _) = desk.send(direction, Talk(), Brake(), BAD_PROMPT, 12, *knobs)
        assert now.edited.turns[-1][1] == expected
    assert desk.at(loaded).heat == bench.heat
    assert 'data-of="kl">0.0000' in desk.measure(loaded, Talk(), BAD_PROMPT, *knobs)
    assert "first prompt" in desk.measure(None, Talk(), " ", *knobs)
    assert "layers" in desk.measure(None, Talk(), BAD_PROMPT, FOUND, 1.0, 3, 1, *knobs[4:])
    with pytest.raises(UsageError, match="prompt"):
        next(desk.send(None, Talk(), Brake(), " ", 12, *knobs))
    with pytest.raises(UsageError, match="ranges"):
        _ = Knobs("3:x", *knobs[1:]).controls
    with pytest.raises(UsageError, match="ranges"):
        _ = Knobs(FOUND, 99.0, *knobs[2:]).controls


def test_the_brake_ends_replies_where_they_are(bench: Bench) -> None:
    desk, brake = Desk(bench), Brake()
    knobs = (FOUND, 1.0, 0, BLOCKS - 1, list(bench.components), "plain", REMOVE, 1.0)
    replies = desk.send(None, Talk(), brake, BAD_PROMPT, 12, *knobs)
    seen = [next(replies)[0] for _ in range(3)]
    desk.stop(brake)
    assert list(replies) == []
    assert seen[-1].original.turns[-1][1] == "I cannot"
    assert len([*desk.send(None, seen[-1], brake, BAD_PROMPT, 12, *knobs)]) > 3  # the next is not held up
    assert desk.clear(brake) == (Talk(), [], [])


def test_bars_say_the_probabilities() -> None:
    page = markup.first_token(FirstToken(0.75, 0.0625, 1.25))
    assert 'data-value="0.062500000" data-of="plan"' in page
    assert "1.2500" in page


def test_a_model_is_opened_by_finding_a_direction(planted: Planted, tmp_path: Path) -> None:
    named = {name: str(getattr(planted, name)) for name in ("harmful", "harmless", "borderline")}
    found = lab.open_bench(
        str(planted.folder),
        MeasureSettings(loading=ModelSettings(device="cpu", batch_size="64"), prompts=PromptSettings(**named)),
        root=tmp_path,
    )
    assert found.heat is not None
    assert found.heat.what.startswith("d′")
    assert reply(found, BAD_PROMPT, Controls()) == ANSWER


def test_a_direction_file_opens_the_model_that_it_names(run: Path, planted: Planted, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_direction(path, load_direction(run / "direction.safetensors"))
    named = {name: str(getattr(planted, name)) for name in ("harmful", "harmless", "borderline")}
    measuring = MeasureSettings(finding=FindSettings(refusal_tokens="I"), prompts=PromptSettings(**named))
    opened = lab.open_bench(str(path), measuring, root=tmp_path)
    assert opened.heat is not None
    assert opened.heat.best == "high"
    save_direction(path, Direction(torch.eye(1, D_MODEL)))
    with pytest.raises(UsageError, match="names its model"):
        lab.open_bench(str(path))


def test_a_record_cannot_allow_code_and_options_come_before_it(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    record = json.loads((run / "abliteration.json").read_text())
    record["settings"]["loading"] |= {"trust_remote_code": True, "system": None, "dtype": "bfloat16"}
    (other / "abliteration.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="beside the record"):
        lab.open_bench(str(other))
    os.link(run / "direction.safetensors", other / "direction.safetensors")
    opened = lab.open_bench(str(other))
    assert opened.loading.trust_remote_code is False
    assert opened.loaded.dtype == torch.bfloat16
    wide = MeasureSettings(loading=ModelSettings(dtype="float32"))
    assert lab.open_bench(str(other), wide).loaded.dtype == torch.float32


def answered(host: str, origin: str | None) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of a request, behind the guard."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", host.encode())] + ([] if origin is None else [(b"origin", origin.encode())])
    asyncio.run(OnlyHere(app, port=7860)({"type": "http", "headers": headers}, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_only_this_servers_own_pages_are_answered() -> None:
    status, headers = answered("127.0.0.1:7860", None)
    assert status == 200
    assert b"connect-src 'self'" in headers[b"content-security-policy"]
    assert answered("localhost:7860", "http://localhost:7860")[0] == 200
    for host, origin in (
        ("evil.example:7860", None),
        ("127.0.0.1:80", None),
        ("127.0.0.1:7860", "http://evil.example"),
        ("127.0.0.1:7860", "null"),
        ("127.0.0.1:7860", "http://127.0.0.1:9999"),
    ):
        assert answered(host, origin)[0] == 403


def test_a_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="--port"):
            free_port(taken.getsockname()[1])
    assert free_port(None) >= 7860


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UsageError, match=r"pip install 'abliterate\[lab\]'"):
        lab.serve("nothing")
