"""Selection beside the procedure that Arditi et al. 2024 published, written down here a second time and on its own.

What is taken from their paper (§2.3, §2.4, appendix C) and their released code: a direction is ablated from the input
of every block and from the output of every attention and MLP; it is added, unnormalised, to the input of its own
block; scores are log-odds of the refusal tokens with 10⁻⁸ in both logarithms, KL with 10⁻⁶; and a site is dropped from
a fifth of the depth before the end on, with KL above 0.1, or with an induce score below 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.config import FindSettings, ModelSettings, PromptSettings
from abliterate.edit.direction import Site
from abliterate.finding.find import Findings, choose, find, scorer_of
from abliterate.model.batches import Encoded
from abliterate.session import Session, open_session
from planted import BLOCKS, plant


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    planted = plant(tmp_path_factory.mktemp("planted"))
    prompts = PromptSettings(
        harmful=str(planted.harmful), harmless=str(planted.harmless), borderline=str(planted.borderline)
    )
    return open_session(str(planted.folder), loading=ModelSettings(device="cpu"), prompts=prompts)


@pytest.fixture(scope="module")
def findings(session: Session) -> Findings:
    return find(session, FindSettings())


def whole(prompts: Encoded, rows: Sequence[int]) -> list[list[int]]:
    return [[*prompts.prefix, *prompts.suffixes[row]] for row in rows]


def last_logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """One prompt at a time, whole, without a cache and without padding."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([list(ids)])).logits[0, -1].double() for ids in sequences])


def odds(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    p: Tensor = logits.softmax(-1)[:, list(tokens)].sum(-1)
    return (p + 1e-8).log() - (1 - p + 1e-8).log()


def divergence(base: Tensor, edited: Tensor) -> Tensor:
    p, q = base.softmax(-1), edited.softmax(-1)
    nats: Tensor = (p * ((p + 1e-6).log() - (q + 1e-6).log())).sum(-1)
    return nats


@contextlib.contextmanager
def hooks(handles: Callable[[], list[Any]]) -> Iterator[None]:
    added = handles()
    yield
    for handle in added:
        handle.remove()


def ablation(model: Any, r: Tensor) -> list[Any]:
    unit = r / r.norm()

    def without(x: Tensor) -> Tensor:
        rest: Tensor = x - (x @ unit)[..., None] * unit
        return rest

    def into(_: Any, args: Any) -> Any:
        return (without(args[0]), *args[1:])

    def out_of(_: Any, __: Any, output: Any) -> Any:
        return (without(output[0]), *output[1:]) if isinstance(output, tuple) else without(output)

    layers = model.model.layers
    return [
        *(layer.register_forward_pre_hook(into) for layer in layers),
        *(layer.self_attn.register_forward_hook(out_of) for layer in layers),
        *(layer.mlp.register_forward_hook(out_of) for layer in layers),
    ]


def addition(model: Any, r: Tensor, layer: int) -> list[Any]:
    return [model.model.layers[layer].register_forward_pre_hook(lambda _, args: (args[0] + r, *args[1:]))]


Scores = dict[Site, tuple[float, float, float]]


@pytest.fixture(scope="module")
def published(session: Session, findings: Findings) -> Scores:
    """Bypass, induce and KL of every site, as they compute them."""
    model, tokens, rows = session.model, findings.ids, scorer_of(session, findings).rows
    harmful = whole(session.encoded["harmful", "val"], rows.harmful)
    harmless = whole(session.encoded["harmless", "val"], rows.harmless)
    base = last_logits(model, harmless)
    found: Scores = {}
    for layer in range(BLOCKS):
        for position in findings.candidates.positions:
            r = findings.candidates.at(layer, position)
            if float(r.norm()) < 1e-6:
                continue
            with hooks(lambda r=r: ablation(model, r)):  # type: ignore[misc]
                bypass = odds(last_logits(model, harmful), tokens).mean()
                kl = divergence(base, last_logits(model, harmless)).mean()
            with hooks(lambda r=r, layer=layer: addition(model, r, layer)):  # type: ignore[misc]
                induce = odds(last_logits(model, harmless), tokens).mean()
            found[Site(layer, position)] = float(bypass), float(induce), float(kl)
    return found


def test_every_site_has_the_published_scores(session: Session, findings: Findings, published: Scores) -> None:
    scorer = scorer_of(session, findings)
    for site, expected in published.items():
        (scores,) = scorer.score(findings.candidates.at(*site)[None], [site.layer], None)
        assert scores == pytest.approx(expected, abs=2e-2, rel=1e-3), site  # the 10⁻⁸ counts where refusals are rare
    bypass = [scores[0] for scores in published.values()]
    assert max(bypass) - min(bypass) > 1, "sites differ, so that agreeing means something"


def test_the_site_is_the_one_that_the_published_rule_takes(
    session: Session, findings: Findings, published: Scores
) -> None:
    kept = {
        site: bypass
        for site, (bypass, induce, kl) in published.items()
        if site.layer < int(0.8 * BLOCKS) and kl <= 0.1 and induce >= 0
    }
    assert 0 < len(kept) < len(published), "the rule drops some sites and not all"
    found = choose(session, findings, FindSettings())
    assert found.met_rule
    assert found.direction.site == min(kept, key=lambda site: kept[site])


def test_directions_are_differences_of_means_of_what_transformers_calls_hidden_states(
    session: Session, findings: Findings
) -> None:
    model, means = session.model, {}
    for name, sign in (("harmful", 1.0), ("harmless", -1.0)):
        prompts = session.encoded[name, "train"]
        states = []
        for ids in whole(prompts, range(len(prompts))):
            with torch.no_grad():
                output = model(torch.tensor([ids]), output_hidden_states=True)
            if sign * float(odds(output.logits[:, -1].double(), findings.ids)) > 0:
                states.append(torch.stack([state[0] for state in output.hidden_states[:-1]])[:, -session.positions :])
        means[name] = torch.stack([state.double() for state in states]).mean(0)
        assert len(states) == findings.trained_on[name]
    expected = (means["harmful"] - means["harmless"]).flip(1).transpose(0, 1)  # [k, L, d], position -1 first
    assert torch.allclose(findings.candidates.raw[:, :BLOCKS].double(), expected, atol=1e-5)


def test_findings_of_a_live_session_are_values(session: Session, findings: Findings, tmp_path: Path) -> None:
    """They hold no model: they are pickled, compared and printed in a line."""
    import pickle

    found = choose(session, findings, FindSettings())
    for value in (findings, found, found.direction, found.selection, session.loaded.files):
        copy = pickle.loads(pickle.dumps(value))
        assert copy == value
        assert "\n" not in repr(value)
        assert len(repr(value)) < 2000 or value is found.selection
        assert len(pickle.dumps(value)) < 200_000
    assert found.direction != found.direction.at(Site(2, -1))
