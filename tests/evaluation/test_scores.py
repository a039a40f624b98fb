"""Numbers read off next-token distributions, against their definitions, also where logits are extreme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from abliterate import pipeline
from abliterate.config import ModelSettings, PromptSettings
from abliterate.errors import GateNotMet
from abliterate.evaluation.judging import Label, Verdict, judge
from abliterate.evaluation.scores import kl_divergence, log_likelihood, refusal_score
from abliterate.finding.refusal_tokens import Refusals, find_refusals
from planted import is_bad, plant


def naive_score(logits: Tensor, tokens: Sequence[int]) -> float:
    p = float(logits.double().softmax(-1)[list(tokens)].sum())
    return math.log(p) - math.log1p(-p)


@given(st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=9), st.data())
def test_refusal_score_is_the_log_odds_of_the_tokens_together(values: list[float], data: st.DataObject) -> None:
    tokens = data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1, max_size=len(values) - 1))
    logits = torch.tensor(values)
    assert float(refusal_score(logits, sorted(tokens))) == pytest.approx(naive_score(logits, sorted(tokens)), abs=1e-4)


@pytest.mark.parametrize("gap", [-1e4, -200.0, -50.0, 50.0, 200.0, 1e4])
def test_refusal_score_stays_finite_where_the_probability_rounds_to_zero_or_one(gap: float) -> None:
    logits = torch.tensor([gap, 0.0, -torch.inf, 0.0])
    assert float(refusal_score(logits, [0])) == pytest.approx(gap - math.log(2), rel=1e-6)


def test_refusal_score_of_one_prompt_does_not_depend_on_the_others() -> None:
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0)) * 9
    together = refusal_score(logits, [1, 4])
    assert together.shape == (3, 5)
    assert together.dtype == torch.float64
    alone = torch.stack([refusal_score(row, [1, 4]) for row in logits.flatten(0, 1)]).reshape(3, 5)
    assert torch.equal(together, alone)


def test_refusal_score_does_not_mind_a_shift_of_all_logits_or_a_token_twice() -> None:
    logits = torch.tensor([1.0, 2.0, -3.0, 0.5])
    score = refusal_score(logits, [0, 2])
    assert float(refusal_score(logits + 7, [0, 2])) == pytest.approx(float(score), abs=1e-5)
    assert torch.equal(refusal_score(logits, [2, 0, 0]), score)


def test_refusal_score_leaves_the_logits_as_they_are() -> None:
    logits = torch.tensor([1.0, 2.0, -3.0])
    refusal_score(logits, [1])
    assert logits.tolist() == [1.0, 2.0, -3.0]


def test_kl_is_that_of_torch_and_base_comes_first() -> None:
    generator = torch.Generator().manual_seed(0)
    base, edited = (torch.randn(4, 7, 50, generator=generator) * 4 for _ in range(2))
    expected = torch.nn.functional.kl_div(
        edited.double().log_softmax(-1), base.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert torch.allclose(kl_divergence(base, edited).double(), expected, atol=1e-5)
    assert not torch.allclose(kl_divergence(edited, base).double(), expected, atol=1e-2)


def test_kl_of_equal_distributions_is_zero_and_never_negative() -> None:
    logits = torch.randn(100, 1000, generator=torch.Generator().manual_seed(1)) * 30
    assert float(kl_divergence(logits, logits + 3).abs().max()) < 1e-5
    close = kl_divergence(logits, logits + 1e-5 * torch.randn_like(logits))
    assert float(close.min()) >= 0
    assert float(close.max()) < 1e-4


def test_kl_of_known_distributions() -> None:
    base, edited = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(kl_divergence(base, edited)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)


def test_kl_where_a_token_has_no_probability() -> None:
    some, none = torch.tensor([0.0, 1.0, -torch.inf]), torch.tensor([0.0, -torch.inf, 1.0])
    assert float(kl_divergence(some, some)) == 0
    assert float(kl_divergence(some, torch.tensor([0.0, 1.0, 2.0]))) == pytest.approx(
        math.log1p(math.e**2 / (1 + math.e))
    )
    assert float(kl_divergence(some, none)) == math.inf
    tiny = torch.tensor([0.0, -1000.0])  # a probability that rounds to zero counts as none
    assert float(kl_divergence(tiny, torch.tensor([0.0, -torch.inf]))) == 0


def test_log_likelihood_is_minus_the_cross_entropy_of_torch() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)) * 5
    targets = torch.arange(6) * 6
    expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(log_likelihood(logits, targets), expected, atol=1e-5)


# --- refusal tokens


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Session:
    planted = plant(tmp_path_factory.mktemp("planted"))
    prompts = PromptSettings(harmful=str(planted.harmful), harmless=str(planted.harmless))
    return pipeline.open_session(str(planted.folder), prompts=prompts, loading=ModelSettings(device="cpu"))


def search(session: pipeline.Session, judge: Callable[[str], Verdict] = judge) -> Refusals:
    val = session.encoded["harmful", "val"], session.encoded["harmless", "val"]
    return find_refusals(session.model, session.loaded.tokenizer, *val, session.size, judge)


def token(session: pipeline.Session, word: str) -> int:
    found: int = session.loaded.tokenizer.convert_tokens_to_ids(word)
    return found


def test_first_word_of_the_models_own_refusals_is_found(session: pipeline.Session) -> None:
    found = search(session)
    refused = [text for text in session.prompts.harmful.val if is_bad(text)]
    assert (found.refused, found.prompts) == (len(refused), len(session.prompts.harmful.val))
    assert found.ids == (token(session, "I"),)
    (only,) = found.tokens
    assert only.text == "I"
    assert only.probability > 0.9 > 0.1 > only.probability_answering
    assert only.refusals == only.trials > 0


def test_word_that_a_harmful_prompt_is_obeyed_with_is_no_refusal_token(
    session: pipeline.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However likely a word is on harmful prompts: what counts is that replies that start with it refuse."""
    both = [token(session, "Sure"), token(session, "I")]
    monkeypatch.setattr("abliterate.finding.refusal_tokens.candidates", lambda *_: both)
    assert search(session).ids == (token(session, "I"),)


def test_refusals_that_no_first_word_tells_apart_are_a_gate(
    session: pipeline.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tried in ([], [token(session, "Sure")]):
        monkeypatch.setattr("abliterate.finding.refusal_tokens.candidates", lambda *_, tried=tried: tried)
        with pytest.raises(GateNotMet, match=r"no first token tells that from answering .*'I'.*--refusal-tokens"):
            search(session)


@pytest.mark.parametrize("label", [Label.COMPLIANCE, Label.DEGENERATE])
def test_model_that_never_refuses_has_no_refusal_tokens(session: pipeline.Session, label: Label) -> None:
    found = search(session, lambda _: Verdict(label))
    assert (found.refused, found.prompts, found.tokens) == (0, 19, ())


def test_model_that_refuses_everything_is_a_gate(session: pipeline.Session) -> None:
    with pytest.raises(GateNotMet, match=r"the model answers none of .* give harmless prompts that it answers"):
        search(session, lambda _: Verdict(Label.REFUSAL))
