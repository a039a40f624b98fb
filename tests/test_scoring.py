"""Numbers read off next-token distributions, against their definitions, also where logits are extreme."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from abliterate.errors import GateNotMet
from abliterate.judging import Label, Verdict
from abliterate.scoring import find_refusal_tokens, kl_divergence, log_likelihood, refusal_score

EGO, SORRY, CREATING, SURE, HERE = range(5)
WORDS = {EGO: "I", SORRY: "Sorry", CREATING: "Creating", SURE: "Sure", HERE: "Here"}


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


def test_log_likelihood_is_minus_the_cross_entropy_of_torch() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)) * 5
    targets = torch.arange(6) * 6
    expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(log_likelihood(logits, targets), expected, atol=1e-5)


# --- refusal tokens


def verdicts(refusals: int, compliances: int, degenerate: int = 0) -> list[Verdict]:
    labels = [Label.REFUSAL] * refusals + [Label.COMPLIANCE] * compliances + [Label.DEGENERATE] * degenerate
    return [Verdict(label) for label in labels]


def find(first_of_refusals: list[int], first_of_compliances: list[int]) -> list[str]:
    replies = [[token, 99] for token in (*first_of_refusals, *first_of_compliances)]
    labels = verdicts(len(first_of_refusals), len(first_of_compliances))
    return [token.text for token in find_refusal_tokens(replies, labels, WORDS)]


def test_words_that_refusals_start_with_are_found_most_common_first() -> None:
    assert find([EGO] * 30 + [SORRY] * 10, [SURE] * 30 + [HERE] * 10) == ["I", "Sorry"]


def test_word_that_harmful_prompts_are_obeyed_with_is_no_refusal_token() -> None:
    harmful_but_obeyed = [CREATING] * 20
    assert find([EGO] * 20, [*harmful_but_obeyed, *[SURE] * 40]) == ["I"]
    assert find([EGO] * 20 + [CREATING] * 3, [*harmful_but_obeyed, *[SURE] * 20]) == ["I"]


def test_rare_and_single_first_words_are_left_out() -> None:
    assert find([EGO] * 50 + [SORRY] * 2, [SURE] * 50) == ["I"]
    assert find([EGO] * 9 + [SORRY], [SURE] * 10) == ["I"]


def test_counts_are_reported_with_each_token() -> None:
    replies = [[EGO], [EGO], [EGO], [SURE], [EGO], [SURE], [SURE], [SURE], [SURE], [SURE]]
    (found,) = find_refusal_tokens(replies, verdicts(3, 7), WORDS)
    assert (found.token, found.text, found.in_refusals, found.in_compliances) == (EGO, "I", 3, 1)


def test_degenerate_and_empty_replies_count_on_neither_side() -> None:
    replies: list[list[int]] = [[EGO], [EGO], [SURE], [SURE], *[[EGO]] * 50, []]
    labels = [*verdicts(2, 2, 50), Verdict(Label.EMPTY)]
    (found,) = find_refusal_tokens(replies, labels, WORDS)
    assert (found.in_refusals, found.in_compliances) == (2, 0)


def test_word_that_starts_every_reply_marks_nothing() -> None:
    with pytest.raises(GateNotMet, match=r"no first token marks refusals \(20 refusals.*'I' \(20\).*--refusal-tokens"):
        find([EGO] * 20, [EGO] * 20)


def test_model_without_refusals_has_no_refusal_tokens() -> None:
    with pytest.raises(GateNotMet, match=r"\(0 refusals, most common first tokens: none\)"):
        find([], [SURE] * 20)
    with pytest.raises(GateNotMet, match="1 refusals"):
        find([EGO], [SURE] * 20)
