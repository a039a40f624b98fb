"""Replies of unchanged models come back as they were, and only for the very same question to the very same model."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abliterate.evaluation import reply_cache as baseline
from abliterate.evaluation.reply_cache import keep, kept_replies, key_of
from abliterate.files.cache import DiskCache
from abliterate.files.checkpoint import sha256
from abliterate.model.batches import BatchSize, Encoded, hooked
from abliterate.model.decoding import Decoding
from abliterate.model.generation import Reply, complete
from abliterate.model.loading import LoadedModel, locate
from abliterate.model.loading import load as load_model
from families import BY_NAME, byte_tokenizer, save

PROMPTS = Encoded((1, 2, 3), ((4, 5), (6,), (7, 8, 9)))
REPLIES = [Reply((72, 105), "Hi", True), Reply((), "", True), Reply((83, 111), "So", False, True)]
KEY = "0" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(BY_NAME["llama"].model(), tmp_path / "model", shards=2)


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(locate(str(folder)), device="cpu")


def files(cache: Path, kind: str = "answers") -> list[Path]:
    return sorted((cache / kind).iterdir())


# --- what is kept comes back


def test_replies_come_back_as_they_were(loaded: LoadedModel) -> None:
    key = key_of(loaded, PROMPTS, 8)
    assert key is not None
    assert kept_replies(key, loaded.tokenizer) is None
    replies = complete(loaded.model, loaded.tokenizer, PROMPTS, 8, BatchSize(4))
    keep(key, replies)
    assert kept_replies(key_of(loaded, PROMPTS, 8), loaded.tokenizer) == replies
    assert any(reply.text for reply in replies)


def test_flags_and_empty_replies_come_back() -> None:
    keep(KEY, REPLIES)
    assert kept_replies(KEY, byte_tokenizer()) == REPLIES
    keep(KEY, REPLIES[:1])
    assert kept_replies(KEY, byte_tokenizer()) == REPLIES[:1]


def test_files_are_the_owners_and_hold_no_text(cache: Path) -> None:
    keep(KEY, [Reply(tuple(b"a secret answer"), "a secret answer", True)])
    (file,) = files(cache)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert "secret" not in file.read_text()


# --- a key holds all that replies depend on


def rewritten(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_same_question_has_the_same_key_in_another_place(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    other = load_model(locate(str(save(BY_NAME["llama"].model(), tmp_path / "again", shards=2))), device="cpu")
    assert key_of(other, PROMPTS, 8) == key_of(loaded, PROMPTS, 8)
    (folder / "README.md").write_text("something else")
    assert key_of(other, PROMPTS, 8) == key_of(loaded, PROMPTS, 8)


def test_other_questions_have_other_keys(loaded: LoadedModel, folder: Path) -> None:
    half = load_model(loaded.files, device="cpu", dtype="bfloat16")
    keys = {
        "as it is": key_of(loaded, PROMPTS, 8),
        "longer": key_of(loaded, PROMPTS, 9),
        "early": key_of(loaded, PROMPTS, 8, Decoding(rule="rules-2")),
        "another judge": key_of(loaded, PROMPTS, 8, Decoding(rule="rules-3")),
        "penalty": key_of(loaded, PROMPTS, 8, Decoding({"repetition_penalty": 1.1})),
        "drawn": key_of(loaded, PROMPTS, 8, Decoding({"do_sample": True})),
        "another seed": key_of(loaded, PROMPTS, 8, Decoding({"do_sample": True}, seed=1)),
        "another sample": key_of(loaded, PROMPTS, 8, Decoding({"do_sample": True}, sample=1)),
        "fewer": key_of(loaded, PROMPTS.take([0, 1]), 8),
        "order": key_of(loaded, PROMPTS.take([1, 0, 2]), 8),
        "prefix": key_of(loaded, Encoded((1, 2, 9), PROMPTS.suffixes), 8),
        "dtype": key_of(half, PROMPTS, 8),
    }
    loaded.model.generation_config.eos_token_id = 77
    keys["ends"] = key_of(loaded, PROMPTS, 8)
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys)


def test_versions_are_part_of_the_key(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key_of(loaded, PROMPTS, 8)}
    for module in ("abliterate.evaluation.reply_cache", "torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.__version__", "0.0.0")
            keys.add(key_of(loaded, PROMPTS, 8))
    assert len(keys) == 4


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_changed_descriptions_change_the_key(loaded: LoadedModel, folder: Path, name: str) -> None:
    before = key_of(loaded, PROMPTS, 8)
    rewritten(folder, name, lambda content: content.update(extra=1))
    assert key_of(loaded, PROMPTS, 8) not in (before, None)


def test_changed_weights_change_the_key_though_size_and_time_stay(loaded: LoadedModel, folder: Path) -> None:
    before = key_of(loaded, PROMPTS, 8)
    shard = max(folder.glob("*.safetensors"))
    times, content = shard.stat(), bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert shard.stat().st_size == times.st_size
    assert shard.stat().st_mtime_ns == times.st_mtime_ns
    assert key_of(loaded, PROMPTS, 8) not in (before, None)


def test_files_are_hashed_once(loaded: LoadedModel, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(baseline, "sha256", counted)
    first = key_of(loaded, PROMPTS, 8)
    assert {path.name for path in folder.glob("*.safetensors")} | {"config.json"} < set(hashed)
    hashed.clear()
    assert key_of(loaded, PROMPTS, 8) == first
    assert hashed == []
    for file in files(cache, "hashes"):  # a damaged memory is none
        file.write_text(file.read_text()[:-3])
    assert key_of(loaded, PROMPTS, 8) == first
    assert len(hashed) == len(files(cache, "hashes"))


# --- what has no key


def test_edited_states_have_no_key(loaded: LoadedModel) -> None:
    block = loaded.model.model.layers[0]
    with hooked([block.register_forward_hook(lambda *_: None)]):
        assert key_of(loaded, PROMPTS, 8) is None
    assert key_of(loaded, PROMPTS, 8) is not None
    complete(loaded.model, loaded.tokenizer, PROMPTS, 2, BatchSize(4))  # leaves no hook behind
    assert key_of(loaded, PROMPTS, 8) is not None


def test_foreign_code_and_codes_have_no_key(loaded: LoadedModel) -> None:
    class Foreign(type(loaded.model)):  # type: ignore[misc]
        pass

    own = type(loaded.model)
    loaded.model.__class__ = Foreign
    assert key_of(loaded, PROMPTS, 8) is None
    loaded.model.__class__ = own
    loaded.model.is_quantized = True
    assert key_of(loaded, PROMPTS, 8) is None


def test_nothing_is_kept_without_a_key(cache: Path) -> None:
    keep(None, REPLIES)
    assert kept_replies(None, byte_tokenizer()) is None
    assert not cache.exists()


# --- damage and limits


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:70],
        lambda content: content.replace(b"72", b"73"),
        lambda content: b"\xff" + content,
        lambda content: content.partition(b"\n")[2],
    ],
)
def test_damaged_replies_are_ignored_and_made_again(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    keep(KEY, REPLIES)
    (file,) = files(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    assert kept_replies(KEY, byte_tokenizer()) is None
    keep(KEY, REPLIES)
    assert kept_replies(KEY, byte_tokenizer()) == REPLIES


def test_replies_of_another_format_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ({"tokens": [[72]]}, {"format": 0, "tokens": [[72]], "ended": [True], "stopped": [False]}):
        baseline._REPLIES.write(KEY, value)
        assert kept_replies(KEY, byte_tokenizer()) is None
    keep(KEY, REPLIES)
    assert kept_replies(KEY, byte_tokenizer()) == REPLIES
    monkeypatch.setattr(baseline, "_FORMAT", baseline._FORMAT + 1)
    assert kept_replies(KEY, byte_tokenizer()) is None


def test_replies_unused_for_longest_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{n:064x}" for n in range(4)]
    for key in keys[:3]:
        keep(key, REPLIES)
    each = files(cache)[0].stat().st_size
    few = DiskCache("answers", 3 * each)
    monkeypatch.setattr(baseline, "_REPLIES", few)
    monkeypatch.setattr("abliterate.files.cache._PRUNE_EVERY", 0.0)
    oldest, *kept = keys[1:3]
    for age, key in enumerate((keys[0], oldest, *kept)):
        os.utime(few.place(key), (1000 + age, 1000 + age))
    (cache / "answers" / "draft").write_bytes(b"of a run that was killed")
    os.utime(cache / "answers" / "draft", (1, 1))
    assert kept_replies(keys[0], byte_tokenizer()) is not None  # used just now
    keep(keys[3], REPLIES)
    assert files(cache) == sorted(few.place(key) for key in (keys[0], *kept, keys[3]))


def test_interrupted_writing_leaves_what_was_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(KEY, REPLIES)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            keep(KEY, REPLIES[:1])
    assert len(files(cache)) == 1
    assert kept_replies(KEY, byte_tokenizer()) == REPLIES


def test_cache_that_cannot_be_written_is_done_without(cache: Path, loaded: LoadedModel) -> None:
    cache.write_text("a file where the folder should be")
    key = key_of(loaded, PROMPTS, 8)
    assert key is not None
    keep(key, REPLIES)
    assert kept_replies(key, byte_tokenizer()) is None


def test_all_of_a_reply_is_kept() -> None:
    """A new field of replies must be kept too (in another format), or be made from the tokens like the text."""
    assert {field.name for field in dataclasses.fields(Reply)} == {"tokens", "text", "ended", "stopped"}
