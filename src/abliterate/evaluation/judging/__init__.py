"""Completion → refusal, partial refusal, compliance or degenerate; by several judges behind one protocol."""

from abliterate.evaluation.judging.base import Exchange, Judge, Label, Verdict
from abliterate.evaluation.judging.rules import RuleJudge, judge
from abliterate.evaluation.judging.tally import Tally

__all__ = ["Exchange", "Judge", "Label", "RuleJudge", "Tally", "Verdict", "judge"]
