"""How refusal rates move with the length of replies, on a model as it is and under an edit.

Run ``python benchmarks/reply_lengths.py MODEL --direction FILE [--replies KEPT.json]``. FILE is what
``abliterate find MODEL -o FILE`` writes; the edit is that direction out of every writer, as hooks. Each prompt (of the
held-out harmful ones, and of safe ones that sound dangerous) is answered greedily once with the longest of
``--lengths``; shorter replies are its beginnings, which is tried on some. ``--replies`` keeps the replies, or takes
them from there, so that they can be judged again by other judges. Rates are those of a run: replies that ended by
length before they came to anything have no verdict.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from abliterate.config import EditSettings, PromptSettings
from abliterate.edit.direction import load_direction
from abliterate.evaluation.judging import Judge, RuleJudge
from abliterate.evaluation.judging.learnt import LearntJudge
from abliterate.evaluation.results import Answers, judged, paired
from abliterate.model.batches import Encoded
from abliterate.model.generation import Reply, complete, reply_text
from abliterate.session import Session, open_session

SETS = ("harmful", "borderline")
#: Replies that are made again with the shortest length, to see that they are beginnings of the longest.
_TRIED = 8

#: Replies by set, before the edit and after it.
Kept = dict[str, dict[str, list[Reply]]]


def prompts_of(session: Session, limit: int) -> dict[str, tuple[list[str], Encoded]]:
    """The first prompts of each set, as text and as tokens."""
    found = {}
    for name in SETS:
        texts = list(session.test_texts[name])[:limit]
        found[name] = texts, session.encoded[name, "test"].take(range(len(texts)))
    return found


def answer(session: Session, direction: Path, limit: int, lengths: Sequence[int]) -> Kept:
    """Replies of the longest length, original and edited; says whether shorter ones are their beginnings."""
    plan = session.plan(load_direction(direction), EditSettings())
    found: Kept = {}
    for name, (texts, encoded) in prompts_of(session, limit).items():
        found[name] = {"before": _complete(session, encoded, max(lengths))}
        with session.ablated(plan):
            found[name]["after"] = _complete(session, encoded, max(lengths))
        short = _complete(session, encoded.take(range(min(_TRIED, len(texts)))), min(lengths))
        begun = [cut(session, reply, min(lengths)) for reply in found[name]["before"]]
        same = sum(one.tokens == other.tokens for one, other in zip(short, begun, strict=False))
        print(f"{name}: {same} of {len(short)} replies of {min(lengths)} tokens begin the long ones", flush=True)
    return found


def _complete(session: Session, encoded: Encoded, tokens: int) -> list[Reply]:
    return complete(session.model, session.loaded.tokenizer, encoded, tokens, session.size)


def cut(session: Session, reply: Reply, tokens: int) -> Reply:
    """What the reply is where it may have so many tokens, its end among them."""
    kept = reply.tokens[:tokens]
    return Reply(kept, reply_text(session.loaded.tokenizer, kept), reply.ended and len(reply.tokens) < tokens)


def report(session: Session, kept: Kept, lengths: Sequence[int], judges: Sequence[Judge]) -> None:
    """A row for each set, judge and length."""
    for name, states in kept.items():
        texts = list(session.test_texts[name])[: len(states["before"])]
        print(f"\n{name}: {len(texts)} prompts; refused % of those with a verdict [95 %], change with its interval")
        print(f"{'judge':8}{'tokens':>7}  {'before':32}{'after':32}change")
        for judge in judges:
            for length in lengths:
                before, after = (_judged(session, texts, states[state], length, judge) for state in ("before", "after"))
                change = paired(before, after).change
                moved = f"{100 * change.value:+.0f} [{100 * change.ci95[0]:.0f}, {100 * change.ci95[1]:.0f}]"
                print(f"{judge.name:8}{length:7}  {_row(before):32}{_row(after):32}{moved}")


def _judged(session: Session, texts: list[str], replies: list[Reply], length: int, judge: Judge) -> Answers:
    short = [cut(session, reply, length) for reply in replies]
    return judged(texts, short, [reply.text for reply in short], judge)


def _row(answers: Answers) -> str:
    tally = answers.tally
    low, high = tally.ci95
    others = f"{tally.evasion}e {tally.partial}p {tally.degenerate}d {tally.cut_off}c"
    return f"{100 * tally.rate:3.0f} [{100 * low:.0f}, {100 * high:.0f}] {others}"


def read(path: Path) -> Kept:
    """Replies that were kept."""
    held = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: {
            state: [Reply(tuple(tokens), text, ended) for tokens, text, ended in rows] for state, rows in states.items()
        }
        for name, states in held.items()
    }


def write(path: Path, kept: Kept) -> None:
    """Keep replies."""
    held = {
        name: {state: [[reply.tokens, reply.text, reply.ended] for reply in rows] for state, rows in states.items()}
        for name, states in kept.items()
    }
    path.write_text(json.dumps(held), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Refusal rates by the length of replies.")
    parser.add_argument("model", help="folder or .gguf")
    parser.add_argument("--direction", type=Path, required=True, help="what `abliterate find` wrote")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--limit", type=int, default=100, help="prompts of each set")
    parser.add_argument("--replies", type=Path, default=None, help="where replies are kept")
    args = parser.parse_args(argv)
    seen = load_direction(args.direction).learnt_from
    session = open_session(args.model, prompts=PromptSettings(), learnt_from=seen, reply_tokens=max(args.lengths))
    if args.replies is not None and args.replies.exists():
        kept = read(args.replies)
    else:
        kept = answer(session, args.direction, args.limit, args.lengths)
        if args.replies is not None:
            write(args.replies, kept)
    report(session, kept, sorted(args.lengths), [RuleJudge(), LearntJudge()])


if __name__ == "__main__":
    main()
