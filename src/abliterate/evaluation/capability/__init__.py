"""What a model can do, before and after an edit: a quick check on local files, and lm-eval's tasks.

`load_tasks` and `check` need no further library; `lm_eval_tasks` needs the extra ``eval``. Both measure a live model in
the state in which it is, so an edit can be measured as hooks, and both keep what became of every single item, so
that changes are of the same items and carry the error of paired measurements.
"""

from abliterate.evaluation.capability.choosing import Way
from abliterate.evaluation.capability.harness import Score, ScoreChange, check_task_files, lm_eval_tasks, score_changes
from abliterate.evaluation.capability.quick import Change, TaskResult, change, check
from abliterate.evaluation.capability.tasks import Choice, Problem, Task, load_tasks

__all__ = [
    "Change",
    "Choice",
    "Problem",
    "Score",
    "ScoreChange",
    "Task",
    "TaskResult",
    "Way",
    "change",
    "check",
    "check_task_files",
    "lm_eval_tasks",
    "load_tasks",
    "score_changes",
]
