"""Search: points between the unedited model and the closed form, on the front of refusals against damage.

`search` proposes edits (`gradient`, `blackbox`, or both), measures the best of them by replies on validation prompts,
and chooses one; `held_out` and `evaluated` add what points do on held-out prompts, which nothing was chosen by.
"""

from abliterate.evaluation.probe import Level
from abliterate.finding.search.blackbox import trials_in
from abliterate.finding.search.objectives import OBJECTIVES, Objective, objectives_named
from abliterate.finding.search.points import Point
from abliterate.finding.search.search import Search, check_search, evaluated, held_out, method_of, search

__all__ = [
    "OBJECTIVES",
    "Level",
    "Objective",
    "Point",
    "Search",
    "check_search",
    "evaluated",
    "held_out",
    "method_of",
    "objectives_named",
    "search",
    "trials_in",
]
