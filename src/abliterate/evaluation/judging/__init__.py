"""Reply → refusal, evasion, partial, compliance, degenerate or no verdict; by several judges behind one protocol."""

from abliterate.evaluation.judging.base import Exchange, Judge, Label, Verdict
from abliterate.evaluation.judging.cut import is_cut_off
from abliterate.evaluation.judging.rules import RuleJudge, judge
from abliterate.evaluation.judging.tally import Tally

__all__ = ["Exchange", "Judge", "Label", "RuleJudge", "Tally", "Verdict", "is_cut_off", "judge"]
