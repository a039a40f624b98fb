"""Completion → refusal, partial refusal, compliance or degenerate; by several judges behind one protocol."""

from abliterate.judging.base import Exchange, Judge, Label, Verdict
from abliterate.judging.rules import RuleJudge, judge
from abliterate.judging.tally import Tally

__all__ = ["Exchange", "Judge", "Label", "RuleJudge", "Tally", "Verdict", "judge"]
