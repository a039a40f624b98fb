"""Capability: files read as they are meant, answers found, planted knowledge scored, lm-eval on models with hooks."""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import sys
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from abliterate.edit.hooks import ablation
from abliterate.edit.plan import Plan, make_plan
from abliterate.errors import ModelError, UsageError
from abliterate.evaluation.capability import (
    Choice,
    Problem,
    Score,
    TaskResult,
    change,
    check,
    lm_eval_tasks,
    load_tasks,
    score_changes,
)
from abliterate.evaluation.capability import quick as quick_module
from abliterate.evaluation.capability.arithmetic import final_number, reference_number
from abliterate.evaluation.capability.choosing import Way, letter_prompt, letter_scores, letter_tokens
from abliterate.model import loading as models
from abliterate.model.anatomy import study
from abliterate.model.batches import BatchSize
from abliterate.model.generation import Reply
from abliterate.prompts.rendering import ChatRenderer
from families import BY_NAME, D_MODEL, byte_tokenizer

# --- files


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


LISTED = ["north", "south", "east", "west"]
LETTERED = "A. north\nB. south\nC. east\nD. west"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Where?", "options": LETTERED, "answer": "C. east"},
        {"question": "Where?", "options": LETTERED, "answer": "C"},
        {"question": "Where?", "choices": LISTED, "answer": 2},
        {"question": "Where?", "choices": LISTED, "answer": "2"},
        {"prompt": "Where?", "options": LISTED, "target": "east"},
        {"input": "Where?", "A": "north", "B": "south", "C": "east", "D": "west", "label": "(C)"},
        {"problem": "Where?", "options": json.dumps(LISTED), "answerKey": "C."},
        {"question": " Where? ", "options": "(A) north\n(B) south\n(C) east\n(D) west", "answer": "C) east"},
    ],
)
def test_multiple_choice_is_read_however_it_is_written(row: dict[str, Any], tmp_path: Path) -> None:
    (task,) = load_tasks([write(tmp_path / "compass.jsonl", [row])])
    assert task.name == "compass"
    assert task.items == (Choice("Where?", tuple(LISTED), 2),)


def test_json_and_csv_hold_the_same_task_as_jsonl(tmp_path: Path) -> None:
    rows = [{"question": "Where?", "options": LETTERED, "answer": letter} for letter in "ABD"]
    jsonl = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    first, *others = load_tasks([jsonl, tmp_path / "b.json", tmp_path / "c.csv"])
    assert [item.answer for item in first.items] == [0, 1, 3]
    assert all(other.digest == first.digest for other in others)


def test_option_over_several_lines_stays_one_option(tmp_path: Path) -> None:
    row = {"question": "Which?", "options": "A. one\nand more\nB. two", "answer": "A. one\nand more"}
    (task,) = load_tasks([write(tmp_path / "t.jsonl", [row])])
    assert task.items == (Choice("Which?", ("one\nand more", "two"), 0),)


def test_answer_with_two_meanings_has_the_one_that_fits_the_whole_file(tmp_path: Path) -> None:
    numbers = {"question": "How many?", "choices": ["1", "2", "3", "0"]}
    by_index = [numbers | {"answer": "2"}, {"question": "Where?", "choices": LISTED, "answer": "1"}]
    by_text = [numbers | {"answer": "2"}, {"question": "Where?", "choices": LISTED, "answer": "south"}]
    (indices,) = load_tasks([write(tmp_path / "i.jsonl", by_index)])
    assert [item.answer for item in indices.items] == [2, 1]
    (texts,) = load_tasks([write(tmp_path / "t.jsonl", by_text)])
    assert [item.answer for item in texts.items] == [1, 1]
    with pytest.raises(UsageError, match=r"row 1: .* found '2', which is several of them"):
        load_tasks([write(tmp_path / "both.jsonl", by_index[:1])])


def test_problems_are_told_by_their_columns(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}]
    rows.append({"question": "x?", "answer": 1200})
    (task,) = load_tasks([write(tmp_path / "sums.jsonl", rows)])
    assert task.items == (Problem("2 + 2?", "4"), Problem("x?", "1200"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], r"at least one question, found none"),
        ([{"question": "Where?"}], r"row 1: expected a column answer or target or .*, found question"),
        ([{"text": "Where?", "answer": "4"}], r"row 1: expected a column question or"),
        ([{"question": "", "answer": "4"}], r"expected text as 'question', found ''"),
        (
            [{"question": "Why?", "answer": "because"}],
            r"row 1: expected a number .* found 'because'; .* column options",
        ),
        ([{"question": "Why?", "answer": True}], r"expected a number"),
        ([{"question": "Why?", "options": ["one"], "answer": 0}], r"expected 2 to 26 options"),
        ([{"question": "Why?", "options": "one, two", "answer": "A"}], r"expected 2 to 26 options"),
        ([{"question": "Why?", "options": ["one", ""], "answer": "A"}], r"text in every option"),
        ([{"question": "Why?", "options": LISTED, "answer": "E"}], r"found 'E', which is none of them"),
        ([{"question": "Why?", "options": LISTED, "answer": 4}], r"found 4, which is none of them"),
        ([{"question": "Why?", "options": LETTERED, "answer": "A. south"}], r"none of them"),
    ],
)
def test_wrong_files_say_what_is_wrong_in_one_line(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load_tasks([write(tmp_path / "t.jsonl", rows)])
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"question": ')
    (tmp_path / "object.json").write_text("{}")
    for name, said in [
        ("none.jsonl", "expected a file of questions, found none"),
        ("broken.jsonl", "line 1, which is not JSON"),
        ("object.json", "one object for each question"),
        ("t.parquet", "expected .jsonl, .json or .csv, found '.parquet'"),
    ]:
        with pytest.raises(UsageError, match=said):
            load_tasks([tmp_path / name])


def test_limit_draws_the_same_items_for_the_same_seed_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"question": f"{i}?", "answer": i} for i in range(50)])
    drawn = [load_tasks([path], 10, seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    numbers = [int(str(item.answer)) for item in drawn[0].items]
    assert len(numbers) == 10
    assert numbers == sorted(numbers) != list(range(10))
    assert len(load_tasks([path], 99)[0].items) == 50


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    row = [{"question": "2?", "answer": 2}]
    with pytest.raises(UsageError, match="different names"):
        load_tasks([write(tmp_path / "t.jsonl", row), write(tmp_path / "other" / "t.jsonl", row)])


# --- numbers in replies


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("#### 72", "72"),
        ("It is 5 + 3 = 8.\nAnswer: 8", "8"),
        ("Answer: 1,234,567.", "1234567"),
        ("**Answer:** $18", "18"),
        ("**Answer**: $18.50 per day for 3 days", "18.50"),
        ("The final answer is **-3**.", "-3"),
        ("The answer is:\n\n42 apples, 6 more than 36", "42"),
        ("The answer is 16 - 3 = 13.", "13"),
        ("So \\(x = 4\\) and \\[\\boxed{1{,}000}\\]", "1"),
        ("Thus \\boxed{-5\\text{ m}} in 3 s", "-5"),
        ("Thus \\boxed{\\$1,000}.", "1000"),
        ("Answer: 3? No. Answer: 4", "4"),
        ("Answer: 7\nThe answer is above.", "7"),
        ("First 3, then 4, so 12 in all.", "12"),
        ("He pays -$5", "-5"),
        ("He pays $-5", "-5"),
        ("10-5 apples", "5"),
        ("= \N{MINUS SIGN}7", "-7"),
        ("a range of 3.5%", "3.5"),
        (".5 of it", "0.5"),
        ("To answer 3 questions he needs 20 minutes", "20"),
        ("It took 1234 steps", "1234"),
        ("On 2024,5 of them", "5"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_final_number_of_a_reply(reply: str, number: str | None) -> None:
    assert final_number(reply) == (None if number is None else Decimal(number))


def test_reply_that_was_cut_off_counts_only_what_it_names_as_its_answer() -> None:
    assert final_number("3 and 4 make 7, so then 7 times", ended=False) is None
    assert final_number("Answer: 7. Let me check: 3 and", ended=False) == 7
    assert final_number("3 and 4 make 7", ended=True) == 7


@pytest.mark.parametrize(
    ("answer", "number"),
    [("so 5.\n#### 1,080", 1080), ("-4", -4), (7, 7), (2.5, Decimal("2.5")), ("$3", 3), ("four", None), ("", None)],
)
def test_reference_numbers(answer: object, number: object) -> None:
    assert reference_number(answer) == number


# --- planted knowledge


def tiny(**changes: Any) -> Any:
    return BY_NAME["llama"].model(max_position_embeddings=1024, **changes)


def always(token: str, strength: float = 1e4) -> Any:
    """A model that says `token` whatever it is asked."""
    model = tiny()
    bias = torch.zeros(model.lm_head.out_features)
    bias[ord(token)] = strength
    model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    return model


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of several lengths; the right letters are B, B, D, A, B, C, …"""
    rows = [
        {"question": f"Question {i}{' indeed' * (i % 4)}?", "options": LISTED[: 2 + i % 3], "answer": answer}
        for i, answer in enumerate([1, 1, 3, 0, 1, 2, 0, 1, 1, 0])
    ]
    return write(tmp_path_factory.mktemp("quiz") / "quiz.jsonl", rows)


def ask(model: Any, path: Path, rows: int = 4, way: Way = "letter") -> TaskResult:
    tokenizer = byte_tokenizer()
    (result,) = check(model, ChatRenderer(tokenizer), load_tasks([path]), BatchSize(rows, 4096), way=way)
    return result


@pytest.mark.parametrize(("letter", "right"), [("A", 3), ("B", 5)])
def test_model_that_always_says_one_letter_scores_the_share_of_that_letter(letter: str, right: int, quiz: Path) -> None:
    result = ask(always(letter), quiz)
    assert set(result.answers) == {letter}
    assert sum(result.correct) == right
    assert result.accuracy.value == right / 10
    low, high = result.accuracy.ci95
    assert low < right / 10 < high


def test_letter_that_is_no_option_is_never_chosen(quiz: Path) -> None:
    answers = ask(always("D"), quiz).answers
    assert all((answer == "D") == (i % 3 == 2) for i, answer in enumerate(answers))


def test_choice_is_that_of_the_whole_pass_and_does_not_depend_on_the_batch(quiz: Path) -> None:
    model, tokenizer = tiny(), byte_tokenizer()
    (task,) = load_tasks([quiz])
    alone, together = ask(model, quiz, rows=1), ask(model, quiz, rows=10)
    assert alone == together
    assert len(set(alone.answers)) > 1
    for item, answer in zip(task.items, alone.answers, strict=True):
        assert isinstance(item, Choice)
        (ids,) = ChatRenderer(tokenizer).encode([letter_prompt(item)])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert answer == "ABCD"[int(logits[65 : 65 + len(item.options)].argmax())]


def test_option_text_is_scored_as_a_reply_to_the_question_alone(tmp_path: Path) -> None:
    model, tokenizer = tiny(), byte_tokenizer()
    rows = [
        {"question": f"Question {i}{' indeed' * (i % 3)}?", "options": [f"{i}th", "it", f"say {7 * i}", "q"][i % 3 :]}
        for i in range(9)
    ]
    path = write(tmp_path / "t.jsonl", [row | {"answer": 0} for row in rows])
    alone, together = ask(model, path, rows=1, way="text"), ask(model, path, rows=9, way="text")
    assert alone == together
    assert alone.answers != ask(model, path, way="letter").answers
    for row, answer in zip(rows, alone.answers, strict=True):
        (ids,) = ChatRenderer(tokenizer).encode([str(row["question"])])
        scores = []
        for text in row["options"]:
            reply = list(text.encode())
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + reply])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            scores.append(float(logits[torch.arange(len(reply)), reply].sum()))
        assert answer == "ABCD"[scores.index(max(scores))]


def test_model_that_always_says_b_prefers_options_of_bs(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "options": ["AA", "BB", "CC"], "answer": i % 3} for i in range(6)]
    path = write(tmp_path / "t.jsonl", rows)
    assert ask(always("B"), path, way="text").correct == (False, True, False) * 2
    assert ask(always("C"), path, way="text").correct == (False, False, True) * 2


def test_accuracy_is_told_from_guessing(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "options": LISTED, "answer": 1} for i in range(10)]
    path = write(tmp_path / "t.jsonl", rows)
    knowing, wrong = ask(always("B"), path), ask(always("A"), path)
    assert knowing.chance == wrong.chance == 0.25
    assert (knowing.above_chance, wrong.above_chance) == (True, False)


def test_both_spellings_of_a_letter_count_together() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([" A", " B"])
    spaced = tokenizer.convert_tokens_to_ids([" A", " B"])
    assert letter_tokens(tokenizer, 3) == [(65, spaced[0]), (66, spaced[1]), (67,)]
    logits = torch.full((1, len(tokenizer)), -100.0)
    logits[0, 65], logits[0, spaced[0]], logits[0, 66] = 1.0, 1.0, 1.5  # A twice: log 2 + 1 > 1.5
    scores = letter_scores(logits, letter_tokens(tokenizer, 2))
    assert scores.argmax(-1).tolist() == [0]


def test_tokenizer_without_letters_is_refused() -> None:
    class Blank:
        def convert_tokens_to_ids(self, _: str) -> int:
            return 0

        def encode(self, _: str, **__: Any) -> list[int]:
            return [0]

        def decode(self, _: list[int]) -> str:
            return "<unk>"

    with pytest.raises(ModelError, match="expected a token 'A'"):
        letter_tokens(Blank(), 2)


def test_arithmetic_counts_the_numbers_that_replies_end_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [("2 + 2 = 4. Answer: 4.0", True), ("It is 7", True), ("so 3 and then 5", False), ("who knows", True)]
    replies = [Reply((), text, ended) for text, ended in said]
    asked: list[int] = []

    def scripted(*args: Any) -> list[Reply]:
        asked.append(args[3])
        return replies

    monkeypatch.setattr(quick_module, "complete", scripted)
    result = ask(tiny(), write(tmp_path / "t.jsonl", [{"question": f"{i}?", "answer": i} for i in (4, 8, 5, 1)]))
    assert result.correct == (True, False, False, False)
    assert result.answers == ("4.0", "7", "", "")
    assert asked == [384]


def test_arithmetic_is_generated_under_the_limit(tmp_path: Path) -> None:
    tokenizer, seen = byte_tokenizer(), list[int]()
    tasks = load_tasks([write(tmp_path / "t.jsonl", [{"question": f"{i}?", "answer": 4} for i in range(3)])])
    check(always("4"), ChatRenderer(tokenizer), tasks, BatchSize(2), seen.append, max_new_tokens=5)
    assert sum(seen) == 3


@pytest.mark.parametrize("way", ["letter", "text"])
def test_progress_counts_questions(way: Way, quiz: Path) -> None:
    tokenizer, seen = byte_tokenizer(), list[int]()
    check(tiny(), ChatRenderer(tokenizer), load_tasks([quiz]), BatchSize(3), seen.append, way=way)
    assert sum(seen) == 10
    assert len(seen) > 3


def test_change_pairs_items(quiz: Path) -> None:
    before, after = ask(always("B"), quiz), ask(always("A"), quiz)
    found = change(before, after)
    assert (found.n, found.before, found.after, found.lost, found.gained) == (10, 5, 3, 5, 3)
    assert found.difference.value == pytest.approx(-0.2)
    low, high = found.difference.ci95
    assert low < -0.2 < high
    assert found.p == pytest.approx(1 - 70 / 256)  # of 8 coins exactly 4 heads, both sides
    same = change(before, before)
    assert (same.lost, same.gained, same.difference.value, same.p) == (0, 0, 0, 1)


def test_results_on_other_items_are_not_compared(quiz: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "quiz.jsonl", [{"question": "Where?", "options": LISTED, "answer": 0}] * 10)
    model = always("A")
    for after in (ask(model, other), ask(model, quiz, way="text")):
        with pytest.raises(UsageError, match="expected results on the same items"):
            change(ask(model, quiz), after)


# --- hooks


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def plans(model: Any) -> Callable[[float], Plan]:
    """Plans of a given strength that take ten directions out, which no answer can survive unchanged."""
    anatomy = study(model)
    basis = torch.randn(10, D_MODEL, generator=torch.Generator().manual_seed(11))
    return lambda strength: make_plan(anatomy, basis, strength=strength)


def test_quick_check_sees_hooks(model: Any, plans: Callable[[float], Plan], quiz: Path) -> None:
    original = ask(model, quiz)
    with ablation(model, plans(0.0)):
        assert ask(model, quiz) == original
    with ablation(model, plans(1.0)):
        assert ask(model, quiz).answers != original.answers
    assert ask(model, quiz) == original


# --- lm-eval


@pytest.fixture(scope="module")
def local_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks, their data beside them under relative names, and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    letters = [[chr(97 + (7 * i + 5 * j) % 26) for j in range(3)] for i in range(12)]
    rows = [{"q": f"Question {i}?", "choices": own, "right": i % 3} for i, own in enumerate(letters)]
    write(folder / "items.jsonl", rows)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "items.jsonl"}}, "test_split": "test"}
    choice = {
        "task": "local_choice",
        **common,
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 3},
    }
    words = {
        "task": "local_words",
        **common,
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "4444",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for config in (choice, words):
        (folder / f"{config['task']}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


with_lm_eval = pytest.mark.usefixtures("offline")


def harness(model: Any, *tasks: Path | str, **options: Any) -> dict[tuple[str, str], Score]:
    scores = lm_eval_tasks(model, byte_tokenizer(), [str(task) for task in tasks], **{"batch_size": 4, **options})
    return {(score.task, score.metric): score for score in scores}


@with_lm_eval
def test_lm_eval_scores_a_local_task(model: Any, local_task: Path, capfd: pytest.CaptureFixture[str]) -> None:
    random.seed(5)
    expected_random, level = random.Random(5).random(), logging.getLogger("lm_eval").level
    scores = harness(model, local_task / "local_choice.yaml")
    assert set(scores) == {("local_choice", "acc"), ("local_choice", "acc_norm")}
    score = scores["local_choice", "acc"]
    assert (score.filter, len(score.values)) == ("none", 12)
    assert score.value == pytest.approx(sum(score.values) / 12)
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / 11) ** 0.5)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert random.random() == expected_random
    assert logging.getLogger("lm_eval").level == level


@with_lm_eval
def test_lm_eval_sees_what_a_model_says(local_task: Path) -> None:
    """The same folder for two models: one says 4444 whatever it is asked, one 5555."""
    says = {token: harness(always(token), local_task)["local_words", "exact_match"] for token in "45"}
    assert (says["4"].value, says["5"].value) == (1, 0)
    assert says["4"].values == (1.0,) * 12


@with_lm_eval
def test_lm_eval_sees_hooks_of_the_very_model(model: Any, plans: Callable[[float], Plan], local_task: Path) -> None:
    task = local_task / "local_choice.yaml"
    original = harness(model, task)
    with ablation(model, plans(0.0)):
        assert harness(model, task) == original
    with ablation(model, plans(1.0)):
        edited = harness(model, task)
    assert edited["local_choice", "acc"].values != original["local_choice", "acc"].values
    assert harness(model, task) == original
    (changed, _) = score_changes(list(original.values()), list(edited.values()))
    differences = torch.tensor(edited["local_choice", "acc"].values) - torch.tensor(
        original["local_choice", "acc"].values
    )
    assert changed.delta == pytest.approx(float(differences.mean()))
    assert changed.stderr == pytest.approx(float(differences.std()) / 12**0.5, rel=1e-5)
    (same, _) = score_changes(list(original.values()), list(original.values()))
    assert (same.delta, same.stderr) == (0, 0)


@with_lm_eval
@pytest.mark.parametrize("rows", [3, 64])
def test_lm_eval_scores_do_not_depend_on_rows_at_once(model: Any, local_task: Path, rows: int) -> None:
    alone, together = (harness(model, local_task, batch_size=size) for size in (1, rows))
    assert alone == together
    assert {key[0] for key in alone} == {"local_choice", "local_words"}


@with_lm_eval
def test_lm_eval_takes_limit_and_chat_template(model: Any, local_task: Path) -> None:
    task = local_task / "local_choice.yaml"
    plain, chat = harness(model, task, limit=6), harness(model, task, limit=6, chat_template=True)
    key = ("local_choice", "acc")
    assert len(plain[key].values) == len(chat[key].values) == 6
    with pytest.raises(UsageError, match="same documents and prompts"):
        score_changes([plain[key]], [chat[key]])


@with_lm_eval
def test_lm_eval_group_is_paired_over_all_its_documents(
    model: Any, local_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    config = json.loads((local_task / "local_choice.yaml").read_text())
    config["dataset_kwargs"]["data_files"]["test"] = str(local_task / "items.jsonl")
    group = {
        "group": "both",
        "task": [{**config, "task": "first"}, {**config, "task": "second"}],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    scores = harness(model, tmp_path / "both.yaml")
    score = scores["both", "acc"]
    assert len(score.values) == 24
    assert score_changes([score], [score])[0].stderr == 0


@with_lm_eval
def test_lm_eval_leaves_a_head_of_its_own_and_the_tokenizer_as_they_are(local_task: Path) -> None:
    """HFLM ties the weights of the model that it is given."""
    model = BY_NAME["llama-tied"].model(max_position_embeddings=1024)
    head, tokenizer = model.lm_head, byte_tokenizer()
    tokenizer.pad_token = None
    head.weight = own = nn.Parameter(head.weight.detach().clone() * 2, requires_grad=False)
    lm_eval_tasks(model, tokenizer, [str(local_task / "local_choice.yaml")], limit=2)
    assert model.lm_head.weight is own
    assert tokenizer.pad_token is None
    model.tie_weights()
    assert model.lm_head.weight is not own, "the control: tying would have taken it away"


def test_metric_that_is_no_mean_has_no_paired_error() -> None:
    def score(value: float, values: tuple[float, ...]) -> Score:
        return Score("t", "f1", "none", value, None, values, "d")

    means = score_changes([score(0.5, (0, 1))], [score(1.0, (1, 1))])[0]
    assert (means.delta, means.stderr) == (0.5, 0.5)
    assert score_changes([score(0.6, (0, 1))], [score(1.0, (1, 1))])[0].stderr is None
    assert score_changes([score(0.6, ())], [score(1.0, ())])[0].stderr is None


@with_lm_eval
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "none.yaml", r"expected a task file, found no such file"),
        (lambda folder: folder, r"expected .yaml files with a key 'task', found none"),
        (lambda folder: _yaml(folder, "a: [b"), r"cannot be loaded \("),
        (lambda folder: _yaml(folder, "colour: red"), r"cannot be loaded \("),
        (lambda folder: _yaml(folder, _TASK.replace("FILE", "nowhere.jsonl")), r"cannot be loaded \(.*nowhere.jsonl"),
        (lambda folder: _yaml(folder, _TASK.replace("json\n", "someone/nothing\n")), r"cannot be loaded \("),
    ],
)
def test_lm_eval_task_that_cannot_be_had_is_one_line(
    make: Callable[[Path], Path], said: str, tmp_path: Path, model: Any
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        harness(model, make(tmp_path))
    assert "\n" not in str(caught.value)


_TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{q}}"
"""


def _yaml(folder: Path, text: str) -> Path:
    (folder / "t.yaml").write_text(text)
    return folder / "t.yaml"


@with_lm_eval
def test_lm_eval_name_that_is_unknown_is_met_with_names_that_are_alike(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Known:
        task_index = dict.fromkeys(["hellaswag", "gsm8k"])
        all_tasks = ("hellaswag", "gsm8k")

    monkeypatch.setattr("abliterate.evaluation.capability.harness._known_tasks", Known)
    with pytest.raises(UsageError, match="did you mean hellaswag"):
        harness(model, "helaswag")


def test_without_the_extra_its_name_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UsageError, match=r"pip install 'abliterate\[eval\]'"):
        lm_eval_tasks(model, byte_tokenizer(), ["gsm8k"])


# --- a real chat model

GGUF = (
    Path(os.environ.get("ABLITERATE_CACHE", "~/.cache/abliterate")).expanduser()
    / "models"
    / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
)

#: A question, its answer, and three that are wrong.
KNOWN = (
    ("What is the capital of France?", "Paris", "Madrid", "Rome", "Vienna"),
    ("Which planet is closest to the Sun?", "Mercury", "Mars", "Saturn", "Neptune"),
    ("How many days does a week have?", "seven", "five", "nine", "twelve"),
    ("What does a thermometer measure?", "temperature", "weight", "speed", "loudness"),
    ("Which gas do people need to breathe?", "oxygen", "helium", "neon", "argon"),
    ("Which animal barks?", "the dog", "the cat", "the cow", "the owl"),
    ("What is 7 times 8?", "56", "54", "48", "63"),
    ("Which of these is a programming language?", "Python", "Granite", "Violin", "Cotton"),
    ("Which ocean lies between Europe and North America?", "Atlantic", "Indian", "Pacific", "Arctic"),
    ("What is frozen water called?", "ice", "steam", "sand", "smoke"),
    ("Which metal is attracted by a magnet?", "iron", "gold", "copper", "aluminium"),
    ("What do bees make?", "honey", "milk", "silk", "wool"),
    ("Which language is spoken most in Brazil?", "Portuguese", "Russian", "Japanese", "Arabic"),
    ("How many sides does a triangle have?", "three", "four", "five", "six"),
    ("Which organ pumps blood?", "the heart", "the liver", "the lung", "the kidney"),
    ("What is the chemical formula of water?", "H2O", "CO2", "NaCl", "O3"),
    ("Who wrote Hamlet?", "William Shakespeare", "Isaac Newton", "Marie Curie", "Vincent van Gogh"),
    ("Which number is prime?", "13", "15", "21", "27"),
    ("Which country has Tokyo as its capital?", "Japan", "China", "India", "Canada"),
    ("What do plants take up from sunlight?", "energy", "salt", "iron", "sound"),
)


@pytest.mark.real_model
@pytest.mark.skipif(not GGUF.is_file(), reason="the demo model is not here: python scripts/demo_model.py qwen")
def test_real_model_knows_what_everybody_knows_and_not_its_opposite(tmp_path: Path) -> None:
    loaded = models.load(models.locate(str(GGUF)), device="cpu")
    places = random.Random(0).choices(range(4), k=len(KNOWN))
    rows = []
    for (question, right, *wrong), place in zip(KNOWN, places, strict=True):
        rows.append({"question": question, "options": [*wrong[:place], right, *wrong[place:]], "answer": place})
    shifted = [row | {"answer": (place + 1) % 4} for row, place in zip(rows[:8], places[:8], strict=True)]
    tasks = load_tasks([write(tmp_path / "known.jsonl", rows), write(tmp_path / "shifted.jsonl", shifted)])
    renderer = ChatRenderer(loaded.tokenizer)
    known, others = check(loaded.model, renderer, tasks, BatchSize(32), way="text")
    assert known.accuracy.value >= 0.7
    assert known.above_chance
    assert others.accuracy.value <= 0.25, "the control: other answers counted as right"
