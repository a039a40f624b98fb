"""What errors call options: flags on the command line, keywords in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

import abliterate as ab
from abliterate.config.natural import in_words_of_python, keywords_in
from abliterate.errors import AbliterateError, UsageError
from calling import Cli
from planted import Planted, plant


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize(
    ("shell", "python"),
    [
        ("above --max-kl 0.1; give another --max-kl", "above max_kl 0.1; give another max_kl"),
        ("give --chat-template FILE or leave it", "give chat_template=FILE or leave it"),
        ("--as lora: expected --as weights", "as_ lora: expected as_ weights"),
        ("it exists; give another -o or --overwrite", "it exists; give another out or overwrite"),
        ("-o OUT", "out=OUT"),
        ("run `abliterate compare A --base B` first", "run `abliterate compare A --base B` first"),
        (
            "a file called a--b-o, or 1 --2, or -other, or /--out",
            "a file called a--b-o, or 1 --2, or -other, or /--out",
        ),
        ("nothing of the kind", "nothing of the kind"),
    ],
)
def test_flags_become_keywords(shell: str, python: str) -> None:
    assert keywords_in(shell) == python
    assert keywords_in(python) == python
    with pytest.raises(UsageError) as caught, in_words_of_python():
        raise UsageError(shell)
    assert str(caught.value) == python


def test_one_fault_is_named_in_the_words_of_who_made_it(
    cli: Cli, planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direction = tmp_path / "direction.safetensors"
    save_file({"direction": planted.direction}, direction)
    for out in ("shell", "python"):
        (tmp_path / out).mkdir()
        (tmp_path / out / "mine.txt").write_text("mine")
    shell = cli("apply", planted.folder, "--direction", direction, "-o", tmp_path / "shell", "--as", "lora")
    shell.failed(2, "give another -o or --overwrite")
    with pytest.raises(AbliterateError, match=r"give another out or overwrite$"):
        ab.apply(planted.folder, direction, out=tmp_path / "python", as_="lora")
    with pytest.raises(AbliterateError, match="shard_size: expected as_ weights with it"):
        ab.apply(planted.folder, direction, out=tmp_path / "new", as_="lora", shard_size="1GB")


def test_methods_and_what_they_enter_speak_python_too(planted: Planted) -> None:
    model = ab.load(planted.folder, device="cpu")
    with pytest.raises(UsageError, match=r"untie") as caught:
        model.save(planted.direction, "out", untie=True)
    assert "--" not in str(caught.value)
    with pytest.raises(UsageError) as entered, model.steer(planted.direction, layers="3-99"):
        pass
    assert "--" not in str(entered.value)
    with model.ablate(planted.direction) as plan:
        assert plan.edits, "the control: what does not fail is as it was"
