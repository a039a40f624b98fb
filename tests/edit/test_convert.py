"""A model as one GGUF file: what llama.cpp's programs are given, what comes of it, and what is left when they fail.

A program stands in for llama.cpp (`converter_stand_in`); where the real one is built (`scripts/llama_cpp.py`) the last
test runs it.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import converter_stand_in
import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import abliterate
import forked
from abliterate.config import ApplySettings, FileSettings, OutputSettings
from abliterate.edit.convert import FOLDER, check_converts, find_tools
from abliterate.edit.direction import Direction, save_direction
from abliterate.edit.modelfile import go_template, modelfile
from abliterate.errors import AbliterateError, UsageError
from abliterate.pipeline import apply
from abliterate.report.card import render_card
from calling import Cli
from demo import GGUF, demo_model
from planted import BLOCKS, Planted, plant, tokenizer


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), shards=2)


@pytest.fixture(scope="module")
def direction(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("direction") / "planted.safetensors"
    save_file({"direction": planted.direction}, file)
    return file


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-in was given, a line each time; it is installed, and nothing else is."""
    monkeypatch.setenv(FOLDER, str(converter_stand_in.make(tmp_path / "llama.cpp")))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return tmp_path / "log"


def told(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def stored(path: Path) -> dict[str, torch.Tensor]:
    """The numbers of a GGUF file, by name."""
    tensors = gguf.GGUFReader(path).tensors
    return {one.name: torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)) for one in tensors}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_gguf_holds_the_edited_weights(cli: Cli, planted: Planted, direction: Path, log: Path, tmp_path: Path) -> None:
    out, reference = tmp_path / "out", tmp_path / "reference"
    result = cli("apply", planted.folder, "--direction", direction, "-o", out, "--as", "gguf", "-q")
    assert result.code == 0
    assert f"Model (GGUF): {out}" in result.out
    assert f"ollama create out -f {out}/Modelfile" in result.out
    assert names_in(out) == {
        *("model.gguf", "Modelfile", "README.md", "report.html", "abliteration.json", "direction.safetensors")
    }
    assert cli("apply", planted.folder, "--direction", direction, "-o", reference, "-q").code == 0
    edited = {name: value for file in reference.glob("model*.safetensors") for name, value in load_file(file).items()}
    found = stored(out / "model.gguf")
    for block in range(BLOCKS):
        for name, theirs in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
            assert torch.equal(found[f"blk.{block}.{theirs}.weight"], edited[f"model.layers.{block}.{name}.weight"])
    assert len(found) == len(edited)

    record = abliterate.read_record(out)
    assert record.plan is not None
    assert record.plan.realisation == "gguf"
    assert record.plan.files == ["model.gguf", "Modelfile"]
    assert set(record.output_sha256) == {"model.gguf", "Modelfile"}
    ours = {part.tensor: part for part in record.plan.edits}
    before = {part.tensor: part for part in abliterate.read_record(reference).plan.edits}  # type: ignore[union-attr]
    assert ours.keys() == before.keys()
    for name, part in ours.items():
        assert part.format == "F32"
        assert math.isclose(part.before, before[name].before)
        assert math.isclose(part.after, before[name].after, abs_tol=1e-6)
        assert part.rounding == 0
    checked, converted = told(log)
    assert (checked["program"], converted["program"]) == ("vocabulary", "converter")
    assert {one["offline"] for one in (checked, converted)} == {"1"}
    assert (converted["outtype"], converted["model-name"]) == ("auto", f"{planted.folder.name} abliterated")
    for command in ("undo", "check"):
        cli(command, out, "-q").failed(2, "expected a model with edited weights, found gguf")


def test_quantised_numbers_are_measured_and_coarse_ones_warned_of(
    planted: Planted, direction: Path, log: Path, tmp_path: Path
) -> None:
    """The control is 16 bits: the same edit, and nothing to warn of."""
    made = {}
    for kind in ("Q4_0", "F32"):
        output = OutputSettings(out=tmp_path / kind, realisation="gguf", gguf_type=kind)
        made[kind] = apply(str(planted.folder), direction, ApplySettings(output=output))
    work = [one for one in told(log) if one["program"] != "vocabulary"]
    assert [one["program"] for one in work] == ["converter", "quantiser", "converter"]
    assert [one.get("outtype", one.get("type")) for one in work] == ["auto", "Q4_0", "f32"]
    record = made["Q4_0"]
    assert record.plan is not None
    assert record.plan.files == ["model-Q4_0.gguf", "Modelfile"]
    assert not list((tmp_path / "Q4_0").glob("*16-bit*"))
    found = stored(tmp_path / "Q4_0" / "model-Q4_0.gguf")
    for part in record.plan.edits:
        if "o_proj" in part.tensor:
            weight = found[f"blk.{part.tensor.split('.')[2]}.attn_output.weight"]
            assert part.format == "Q4_0"
            assert math.isclose(part.after, float((planted.direction @ weight).norm()), rel_tol=1e-4)
            assert math.isclose(part.ratio, part.after / part.before)
            assert part.rounding > 0.01
    assert any("stored as Q4_0" in warning and "% of the direction" in warning for warning in record.warnings)
    assert made["F32"].warnings == []
    card = render_card(record)
    for said in ("library_name: gguf", "before the conversion", "remaining projection", "llama-cli -m model-Q4_0.gguf"):
        assert said in card


def test_run_is_measured_through_hooks_and_names_what_to_do_next(
    cli: Cli, planted: Planted, log: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prompts = [part for name in ("harmful", "harmless") for part in (f"--{name}", getattr(planted, name))]
    settings = ["--no-control", "--search", "closed-form", "--max-new-tokens", "8", "--judge", "rules"]
    result = cli("run", planted.folder, *prompts, "-o", out, "--as", "gguf", "--gguf-type", "q8_0", *settings, "-q")
    assert result.code == 0, result
    assert f"llama-cli -m {out}/model-Q8_0.gguf" in result.out
    assert "That was measured before the numbers were stored" in " ".join(result.out.split())
    evaluation = abliterate.read_record(out).evaluation
    assert evaluation is not None
    assert evaluation.after is not None
    assert evaluation.after.harmful.refusals == 0 < evaluation.before.harmful.refusals


# --- what is not there, and what goes wrong


@pytest.mark.parametrize(
    ("kind", "missing"), [(None, "convert_hf_to_gguf.py"), ("Q4_K_M", "llama-quantize model.gguf")]
)
def test_without_llama_cpp_the_recipe_is_said_before_anything_is_fetched(
    cli: Cli, direction: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str | None, missing: str
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    more = [] if kind is None else ["--gguf-type", kind]
    result = cli("apply", "no/such-model", "--direction", direction, "-o", tmp_path / "out", "--as", "gguf", *more)
    result.failed(2, FOLDER, "https://github.com/ggml-org/llama.cpp", "OUT --outfile model.gguf", missing)


def test_programs_are_found_on_the_path_and_never_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = converter_stand_in.make(tmp_path / "llama.cpp")
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", "build/bin"]))
    with pytest.raises(UsageError, match=r"convert_hf_to_gguf\.py"):
        find_tools(None)
    monkeypatch.setenv("PATH", str(checkout))
    assert find_tools("Q8_0").converter == checkout / "convert_hf_to_gguf.py"
    with pytest.raises(UsageError, match=r"expected llama\.cpp's llama-quantize"):
        find_tools("Q4_K_M")
    monkeypatch.setenv("PATH", os.pathsep.join([str(checkout), str(checkout / "build" / "bin")]))
    assert find_tools("Q4_K_M").quantiser == checkout / "build" / "bin" / "llama-quantize"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--as", "weights", "--gguf-type", "Q8_0"], "--gguf-type: expected --as gguf with it, found weights"),
        (["--as", "gguf", "--gguf-type", "Q9"], "--gguf-type Q9: "),
        (["--as", "gguf", "--shard-size", "1GB"], "--shard-size: expected --as weights with it, found gguf"),
    ],
)
def test_options_that_do_not_go_together(
    cli: Cli, planted: Planted, direction: Path, log: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    cli("apply", planted.folder, "--direction", direction, "-o", tmp_path / "out", *options).failed(2, said)
    assert not log.exists()


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("converter fails", "Q8_0", "convert_hf_to_gguf.py failed (exit code 1): INFO: Loading model / NotImplemented"),
        ("quantiser fails", "Q4_K_M", "llama-quantize failed (exit code 1): llama_model_quantize: failed"),
        ("no GGUF", "F16", "expected a GGUF file from it, found none"),
    ],
)
def test_a_program_that_fails_leaves_nothing(
    cli: Cli,
    planted: Planted,
    direction: Path,
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    kind: str,
    said: str,
) -> None:
    monkeypatch.setenv("STAND_IN", what)
    place = tmp_path / "place"
    place.mkdir()
    arguments = ("apply", planted.folder, "--direction", direction, "-o", place / "out", "--as", "gguf")
    cli(*arguments, "--gguf-type", kind, "-q").failed(1, said)
    assert names_in(place) == set()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_killed_while_converting_leaves_no_out(
    planted: Planted, direction: Path, log: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """The next one begins anew, and nothing of the first is left."""
    place = tmp_path / "place"
    place.mkdir()
    arguments = ("apply", str(planted.folder), "--direction", str(direction), "-o", str(place / "out"))
    first = forked.start(forked.command, *arguments, "--as", "gguf", "-q", log=tmp_path / "said", STAND_IN="never ends")
    try:
        end = time.monotonic() + 120
        while not list(place.rglob("model.gguf")) and time.monotonic() < end and first.is_alive():
            time.sleep(0.05)
        assert list(place.rglob("model.gguf")), "it got as far as the converter"
        os.kill(first.pid, how)
        first.join(60)
        assert first.exitcode not in (None, 0)
    finally:
        os.killpg(first.pid, signal.SIGKILL) if how is signal.SIGKILL else first.kill()
    assert not (place / "out").exists()
    if how is not signal.SIGKILL:
        assert names_in(place) == set()
    output = OutputSettings(out=place / "out", realisation="gguf")
    apply(str(planted.folder), direction, ApplySettings(output=output))
    assert names_in(place) == {"out"}
    assert (place / "out" / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_a_model_that_the_converter_does_not_know_is_refused_before_any_work(
    cli: Cli, direction: Path, log: Path, tmp_path: Path
) -> None:
    folder = plant(tmp_path / "model").folder
    check_converts(find_tools(None), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForCausalLM"]}))
    result = cli("apply", folder, "--direction", direction, "-o", tmp_path / "out", "--as", "gguf", "-q")
    result.failed(1, "convert_hf_to_gguf.py failed (exit code 1)", "Model OtherForCausalLM is not supported")
    assert [one["program"] for one in told(log)] == ["vocabulary"] * 2
    assert {"tokenizer.json", "model.safetensors"} <= set(told(log)[0]["files"])


@pytest.mark.parametrize("trusted", [False, True])
def test_code_beside_a_model_reaches_the_converter_only_where_it_is_trusted(
    direction: Path, log: Path, tmp_path: Path, trusted: bool
) -> None:
    """The converter runs what `auto_map` names without asking."""
    folder = plant(tmp_path / "model").folder
    (folder / "tokenization_own.py").write_text("raise SystemExit('this was run')\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["auto_map"] = {"AutoUnknown": "tokenization_own.Own"}
        (folder / name).write_text(json.dumps(settings))
    settings = ApplySettings(
        output=OutputSettings(out=tmp_path / "out", realisation="gguf"), loading=FileSettings(trust_remote_code=trusted)
    )
    try:
        apply(str(folder), direction, settings)
    except AbliterateError:
        assert trusted, "only a model that may run its code can fail over it"
    assert told(log)
    for given in told(log):
        assert ("tokenization_own.py" in given["files"]) == trusted
        assert ("auto_map" in given["config"]) == trusted


# --- the Modelfile


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m.content + ' [/]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
CHATS = [
    [("user", "Hello there")],
    [("system", "Be\nbrief."), ("user", "Hello")],
    [("user", "One"), ("assistant", "Two"), ("user", "Three {{ four }}")],
    [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"), ("user", "E")],
]


def rendered(template: str, chat: list[tuple[str, str]]) -> str:
    """What Go makes of a template of this one shape."""
    shape = re.fullmatch(
        r'\{\{ range \$i, \$_ := \.Messages \}\}\{\{ if eq \.Role "system" \}\}(.*?)\{\{ \.Content \}\}(.*?)'
        r'\{\{ else if eq \.Role "user" \}\}\{\{ if eq \$i 0 \}\}(.*?)\{\{ end \}\}\{\{ \.Content \}\}(.*?)'
        r'\{\{ else if eq \.Role "assistant" \}\}\{\{ \.Content \}\}(.*?)\{\{ end \}\}\{\{ end \}\}',
        template,
        re.DOTALL,
    )
    assert shape is not None
    begin, system, first, answer, again = shape.groups()
    text = ""
    for number, (role, content) in enumerate(chat):
        if role == "system":
            text += begin + content + system
        elif role == "user":
            text += (first if number == 0 else "") + content + answer
        else:
            text += content + again
    return text


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, WITH_BOS], ids=["chatml", "default system", "bos"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_template_in_go_renders_what_the_models_own_does(template: str, adds_bos: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    one = tokenizer()
    one.chat_template = template
    if adds_bos:
        one.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", one.bos_token_id)]
        )
    found = go_template(one)
    assert found is not None
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        wanted = one.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered(found, chat) == (wanted.removeprefix("<s>") if adds_bos else wanted)
    assert "\nFROM ./model.gguf\n" in modelfile("model.gguf", one)
    assert f'TEMPLATE """{found}"""\n' in modelfile("model.gguf", one)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
        "{{ strftime_now('%d %b %Y') }}" + CHATML,
        CHATML.replace("assistant\n'", "assistant\n<think>\n'"),
        CHATML.replace("'<|im_end|>'", "'{{ end }}'"),
        CHATML.replace("m.content", "m.content | upper"),
        "{{ messages[0].content }}" + CHATML,
        "{% if messages | length > 3 %}{{ 'long' }}{% endif %}" + CHATML,
    ],
    ids=["none", "no system", "refuses", "date", "thinks", "Go's marks", "changed", "twice", "other at length"],
)
def test_a_template_that_go_could_not_follow_is_left_to_ollama(template: str | None) -> None:
    one = tokenizer()
    one.chat_template = template
    assert go_template(one) is None
    assert modelfile("m.gguf", one) == "# ollama create NAME -f Modelfile\nFROM ./m.gguf\n"


# --- the real llama.cpp


@pytest.mark.llama_cpp
@demo_model
def test_real_converter_makes_a_model_that_can_be_read_again(tmp_path: Path) -> None:
    try:
        find_tools("Q4_K_M")
    except UsageError:
        pytest.skip(f"llama.cpp's programs are not here: python scripts/llama_cpp.py FOLDER, then set {FOLDER}")
    basis = torch.nn.functional.normalize(torch.randn(1, 896, generator=torch.Generator().manual_seed(1)))
    save_direction(tmp_path / "d.safetensors", Direction(basis))
    rests = {}
    for kind in ("Q8_0", "Q4_K_M"):
        output = OutputSettings(out=tmp_path / kind, realisation="gguf", gguf_type=kind)
        record = apply(str(GGUF), tmp_path / "d.safetensors", ApplySettings(output=output))
        assert record.plan is not None
        assert len(record.plan.edits) == 49
        after, before = (math.hypot(*(getattr(one, name) for one in record.plan.edits)) for name in ("after", "before"))
        rests[kind] = after / before
    assert rests["Q8_0"] < 0.02 < rests["Q4_K_M"]
    read = gguf.GGUFReader(tmp_path / "Q4_K_M" / "model-Q4_K_M.gguf")
    assert str(read.fields["general.name"].contents()).endswith("abliterated")
    assert "tokenizer.chat_template" in read.fields
    assert 'TEMPLATE """' in (tmp_path / "Q4_K_M" / "Modelfile").read_text()
