"""Behaviour files: read strictly, put around prompts, and cut so that pairs stay together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abliterate.config import PromptSettings
from abliterate.errors import PromptError
from abliterate.prompts import Behaviour, build_contrastive_set, load_behaviour
from abliterate.prompts.baselines import text_baselines
from abliterate.prompts.behaviour import asked_of, builtin_behaviours, schema
from abliterate.prompts.contrastive import fingerprint, normalise
from abliterate.prompts.prompt import messages_of

QUESTIONS = [f"What is the number {number}?" for number in range(60)]
STAYS = [f"Is {number} even?" for number in range(40)]
FIELDS: dict[str, Any] = {
    "name": "chatty",
    "more": {"prompts": QUESTIONS, "system": "Be long.", "suffix": " Please."},
    "less": {"system": "Be short."},
    "shows": {"longer_than": 30},
}


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def changed(**fields: Any) -> dict[str, Any]:
    return {**FIELDS, **fields}


def test_refusal_as_a_behaviour_has_the_prompts_that_it_always_had() -> None:
    named, default = build_contrastive_set(PromptSettings(behaviour="refusal")), build_contrastive_set()
    assert named.sha256 == default.sha256
    assert default.sources == dict.fromkeys(
        ("harmful", "harmless", "eval_harmful", "eval_harmless", "borderline"), "builtin"
    )
    assert default.behaviour.names["harmful"] == "harmful"


@pytest.mark.parametrize("name", builtin_behaviours())
def test_builtin_behaviours_have_prompts_in_every_part(name: str) -> None:
    found = build_contrastive_set(PromptSettings(behaviour=name))
    for side in (found.harmful, found.harmless):
        assert min(side.counts.values()) >= 20
    assert not set(found.learnt_from) & {fingerprint(asked_of(text)) for text in found.harmful.test}


def test_both_sides_ask_the_same_prompts_in_the_same_parts() -> None:
    found = build_contrastive_set(PromptSettings(behaviour=FIELDS))
    for part in ("train", "val"):
        more, less = getattr(found.harmful, part), getattr(found.harmless, part)
        assert [asked_of(text) for text in more] == [asked_of(text) for text in less]
        for one, other in zip(more, less, strict=True):
            assert messages_of(one) == (("system", "Be long."), ("user", f"{asked_of(one)} Please."))
            assert messages_of(other) == (("system", "Be short."), ("user", str(asked_of(other))))


def test_held_out_prompts_are_asked_plainly_beside_others() -> None:
    found = build_contrastive_set(PromptSettings(behaviour=FIELDS))
    assert set(found.harmful.test) < set(QUESTIONS)
    assert set(found.harmless.test) == set(build_contrastive_set().harmless.test)
    assert "borderline" not in found.test_texts
    trained = {str(asked_of(text)) for text in (*found.harmful.train, *found.harmful.val)}
    assert not trained & set(found.harmful.test)


def test_the_same_prompts_are_told_apart_by_nothing_without_the_model() -> None:
    assert text_baselines(build_contrastive_set(PromptSettings(behaviour=FIELDS))) == (0.5, 0.5)


def test_other_sides_than_pairs_are_asked_with_what_is_put_around_them() -> None:
    fields = changed(less={"prompts": [f"Say {number}." for number in range(40)], "prefix": "Now: "})
    found = build_contrastive_set(PromptSettings(behaviour=fields))
    assert all(str(text).startswith("Now: Say") for text in found.harmless.test)
    assert messages_of(found.harmful.test[0])[0] == ("system", "Be long.")


def test_what_is_to_stay_is_evaluated_and_kept_apart() -> None:
    found = build_contrastive_set(PromptSettings(behaviour="over-refusal"))
    harmful = build_contrastive_set().harmful
    assert found.keep is not None
    assert found.keep.train == harmful.train
    assert found.test_texts["borderline"] == harmful.test
    assert found.behaviour.names["borderline"] == "harmful"
    assert found.sensitive == {"borderline", "keep"}


def test_sets_that_may_hold_harmful_prompts_are_sensitive() -> None:
    assert build_contrastive_set().sensitive == {"harmful"}
    assert not build_contrastive_set(PromptSettings(behaviour="verbosity")).sensitive
    for fields, sets in (
        (changed(more={"prompts": "builtin:harmful", "system": "Be long."}), {"harmful"}),
        (changed(others={"prompts": "builtin:harmful"}), {"harmful", "harmless"}),
        (changed(), {"harmful"}),
        (
            changed(keep={"prompts": STAYS}, more={"prompts": "builtin:verbosity.jsonl", "system": "a"}),
            {"borderline", "keep"},
        ),
    ):
        assert build_contrastive_set(PromptSettings(behaviour=fields)).sensitive == sets
    safe = PromptSettings(behaviour="verbosity", borderline="builtin:harmful")
    assert build_contrastive_set(safe).sensitive == {"borderline"}


def test_what_is_to_stay_is_disjoint_from_what_is_evaluated() -> None:
    fields = changed(keep={"prompts": [*QUESTIONS[:10], *STAYS]})
    found = build_contrastive_set(PromptSettings(behaviour=fields))
    assert found.keep is not None
    tested = {normalise(text) for text in (*found.harmful.test, *found.harmless.test)}
    assert not tested & {normalise(text) for part in (found.keep.train, found.keep.val) for text in part}
    others = changed(keep={"prompts": [*QUESTIONS[:10], *STAYS[1:]]})
    assert build_contrastive_set(PromptSettings(behaviour=others)).sha256 != found.sha256
    with pytest.raises(PromptError, match="to stay"):
        build_contrastive_set(PromptSettings(behaviour=changed(keep={"prompts": ["One alone."]})))
    with pytest.raises(PromptError, match="set of its own there"):
        build_contrastive_set(PromptSettings(behaviour=fields, borderline="builtin:borderline"))


def test_a_set_that_is_used_up_is_named() -> None:
    fields = changed(more={"prompts": "builtin:harmless", "system": "Be long."})
    with pytest.raises(PromptError, match="harmless prompts: expected some in the test split"):
        build_contrastive_set(PromptSettings(behaviour=fields))


def test_a_file_names_prompts_that_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asked.txt").write_text("\n".join(QUESTIONS), encoding="utf-8")
    spec = written(
        tmp_path,
        'name = "chatty"\n[more]\nprompts = "asked.txt"\nsystem = "Be long."\n[less]\nsystem = "Be short."\n'
        "[shows]\nlonger_than = 30\n",
    )
    monkeypatch.chdir("/")
    found = build_contrastive_set(PromptSettings(behaviour=spec))
    assert found.sources["harmful"] == str(tmp_path / "asked.txt")
    assert found.harmful.counts == {"train": 38, "val": 10, "test": 12}


def test_an_object_and_its_mapping_are_the_same_behaviour() -> None:
    one = Behaviour.model_validate(FIELDS)
    texts = [build_contrastive_set(PromptSettings(behaviour=value)).sha256 for value in (one, FIELDS)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "cannot be read"),
        ('name = "Big Name"', "name"),
        ('name = "x"', "more"),
        ('name = "x"\n[more]\nprompts = ["a"]\n[less]\nprompts = ["b"]\n[shows]\n', "expected one of phrases"),
        (
            'name = "x"\n[more]\nprompts = ["a"]\n[less]\nprompts = ["b"]\n[shows]\nphrases = ["a"]\njudge = "rules"\n',
            "and",
        ),
        ('name = "x"\n[more]\nprompts = ["a"]\n[shows]\nphrases = ["a"]\n', "another system, prefix or suffix"),
        ('name = "x"\n[more]\nsystem = "a"\n[less]\nprompts = ["b"]\n[shows]\nphrases = ["a"]\n', "expected prompts"),
        (
            'name = "x"\n[more]\nprompts = ["a"]\n[less]\nprompts = ["b"]\n[shows]\nlonger_than = 3\nat_least = 2\n',
            "phrases",
        ),
        ('name = "x"\nwho = "me"\n[more]\nprompts = ["a"]\n[shows]\nphrases = ["a"]\n', "who"),
        ('name = "x"\n[more]\nprompts = ["a"]\n[less]\nprompts = ["b"]\n[shows]\nlonger_than = true\n', "longer_than"),
        (
            'name = "x"\n[more]\nprompts = ["a"]\n[less]\nprompts = ["b"]\n[shows]\njudge = "rules"\nrubric = "a"\n',
            "rubric",
        ),
        ('name = "x"\n[more]\nprompts = "/etc/passwd"\n[less]\nprompts = ["b"]\n[shows]\nphrases = ["a"]\n', "beside"),
        ('name = "x"\n[more]\nprompts = "../a.txt"\n[less]\nprompts = ["b"]\n[shows]\nphrases = ["a"]\n', "beside"),
        (
            'name = "x"\n[more]\nprompts = "advbench=/etc/passwd"\n[less]\nprompts = ["b"]\n[shows]\nphrases = ["a"]\n',
            "beside",
        ),
        ('name = "x"\n[more]\nprompts = []\n[less]\nprompts = ["b"]\n[shows]\nphrases = ["a"]\n', "more"),
        ('name = "x"\n[more]\nprompts = ["a"]\n[less]\nprompts = ["b"]\n[shows]\nphrases = ["^ *"]\n', "phrases"),
        ("a." * 3000 + "b = 1", ""),
        ("x = " + "[" * 5000, ""),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PromptError) as caught:
        load_behaviour(written(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "behaviour" in str(caught.value)


def test_a_file_in_the_current_folder_is_not_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "asked.txt").write_text("What is it?", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    text = 'name = "x"\n[more]\nprompts = "asked.txt"\n[less]\nprompts = ["b"]\n[shows]\nphrases = ["a"]\n'
    with pytest.raises(PromptError, match="expected a file beside it"):
        load_behaviour(written(tmp_path, text))


def test_a_name_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(PromptError, match="expected a TOML file or one of hedging, language"):
        load_behaviour("politeness")
    with pytest.raises(PromptError, match="found none"):
        load_behaviour("nowhere.toml")


def test_prompts_of_the_other_side_cannot_be_given_to_pairs() -> None:
    with pytest.raises(PromptError, match="same prompts on both sides"):
        build_contrastive_set(PromptSettings(behaviour=FIELDS, harmless=QUESTIONS))


def test_other_prompts_may_be_given_to_a_behaviour() -> None:
    others = [f"Why is {number} odd?" for number in range(1, 100, 2)]
    found = build_contrastive_set(PromptSettings(behaviour=FIELDS, harmful=others))
    assert set(map(asked_of, found.harmful.train)) < set(others)


def test_the_schema_names_every_field() -> None:
    found = schema()
    assert set(found["properties"]) == set(Behaviour.model_fields)
    assert found["additionalProperties"] is False
