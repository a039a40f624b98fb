"""Every trial of heretic-llm 1.4.0 on a local model: what it measured, when, and the edit itself.

It needs an environment of its own. heretic-llm comes without its dependencies because one of them, the extra
``kernels`` of transformers, cannot always be had; the package is for GPUs. For CPUs, with the repository's constraints:

    python -m venv heretic-env
    heretic-env/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    heretic-env/bin/pip install -c constraints.txt transformers accelerate~=1.13 bitsandbytes~=0.49 datasets~=4.7 \\
        huggingface-hub~=1.7 immutabledict~=4.3 langdetect~=1.0 'lm-eval[hf]~=0.4' numpy~=2.2 optuna~=4.7 peft~=0.19 \\
        psutil~=7.2 py-cpuinfo~=9.0 pydantic-settings~=2.13 questionary~=2.1 rich~=14.3 tomli-w~=1.2 tqdm~=4.67
    heretic-env/bin/pip install --no-deps heretic-llm==1.4.0
    heretic-env/bin/python benchmarks/heretic_trials.py MODEL_FOLDER --prompts PROMPTS.json --out FOLDER --trials 12

PROMPTS.json holds four lists of strings: ``train_harmful``, ``train_harmless``, ``eval_harmful``, ``eval_harmless``.

What runs is heretic's own ``run()`` with its default settings, except for the prompts, the number of trials, the seed
and what the options say. It is only watched: at the calls by which it loads, prepares and starts its study, the time is
taken; after a trial, its edit is saved; and the question which trial to keep is answered with "none". With its default
of 60 startup trials, a study of fewer trials is a random search, TPE never begins.

On CPUs, bfloat16 has a trap that is not heretic's. In the pass over a batch of prompts, generation gives the head a
slice of the hidden states, for which torch 2.13 copies the head's weights once per prompt (272 MB for a vocabulary of
152 k and a width of 896; one thread took 8.1 s for 8 prompts, and 0.02 s when the slice was contiguous, with equal
results). At a batch of 128, where heretic's search for a batch size ends, it asks for 35 GB. ``--contiguous-head``
copies the slice first and changes nothing else; without it, heretic runs as it is installed.

In FOLDER:

- ``facts.json``: versions, settings, refusals before any edit, seconds of each phase; at the end also the trials that
  heretic offers (its Pareto front), peak memory and the seconds in all.
- ``trials.jsonl``: a line per trial, written when the trial ends. ``seconds`` count from the start of this script to
  the end of the trial, without the time for saving edits.
- ``trial-00/`` and so on: the edit as the LoRA adapter that heretic itself evaluates (``peft``, float32).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
PROMPTS = {  # heretic's setting -> key in PROMPTS.json
    "bad_prompts": "train_harmful",
    "good_prompts": "train_harmless",
    "bad_evaluation_prompts": "eval_harmful",
    "good_evaluation_prompts": "eval_harmless",
}
PACKAGES = ("heretic-llm", "torch", "transformers", "peft", "optuna", "accelerate", "datasets")


def peak_megabytes() -> float:
    """The most memory that was resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class Watch:
    """Follows one run of heretic and writes down what happens."""

    def __init__(self, folder: Path, contiguous_head: bool) -> None:
        """Nothing happened yet."""
        self.folder = folder
        self.contiguous_head = contiguous_head
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.saving = 0.0
        self.model: Any = None
        self.evaluator: Any = None

    def now(self) -> float:
        """Seconds since the start, without those for saving edits."""
        return time.perf_counter() - STARTED - self.saving

    def phase(self, name: str) -> None:
        """The phase ``name`` ends here."""
        self.seconds[name] = round(self.now() - sum(self.seconds.values()), 3)

    def load(self, load: Any, settings: Any) -> Any:
        """Around the loading of the model. The search for a batch size follows, up to the first replies in batches."""
        self.model = load(settings)
        if self.contiguous_head:
            head = self.model.model.get_output_embeddings()
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        self.phase("load")
        reply = self.model.get_responses_batched

        def first(*args: Any, **kwargs: Any) -> Any:
            self.model.get_responses_batched = reply
            self.phase("batch_size")
            return reply(*args, **kwargs)

        self.model.get_responses_batched = first
        return self.model

    def baseline(self, evaluate: Any, settings: Any, model: Any) -> Any:
        """Around the measurement of the model as it is. The residuals' means follow."""
        self.phase("prefix")
        self.evaluator = evaluate(settings, model)
        self.phase("baseline")
        return self.evaluator

    def study(self, create: Any, **options: Any) -> Any:
        """Around the creation of the study, which then reports every trial."""
        self.phase("residuals")
        settings = self.model.settings
        self.facts |= {
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "dtype": str(self.model.dtype),
            "batch_size": settings.batch_size,
            "response_prefix": settings.response_prefix,
            "base_refusals": self.evaluator.base_refusals,
            "seconds_by_phase": self.seconds,
            "seconds_before_trials": round(self.now(), 3),
            "peak_mb_before_trials": peak_megabytes(),
            "settings": settings.model_dump(mode="json"),
        }
        self.write_facts()
        study = create(**options)
        study.optimize = functools.partial(study.optimize, callbacks=[self.trial])
        return study

    def trial(self, study: Any, trial: Any) -> None:
        """One trial has ended; the model is still in its state."""
        seconds = self.now()
        if "kl_divergence" not in trial.user_attrs:  # interrupted
            return
        before = time.perf_counter()
        name = f"trial-{trial.number:02d}"
        self.model.model.save_pretrained(self.folder / name)
        line = {
            "trial": trial.number,
            "direction_index": trial.user_attrs["direction_index"],  # null: each layer its own
            "parameters": trial.user_attrs["parameters"],
            "sampled": trial.params,
            "refusals": trial.user_attrs["refusals"],
            "of": trial.user_attrs["n_bad_prompts"],
            "kl": trial.user_attrs["kl_divergence"],
            "scores": trial.values,
            "seconds": round(seconds, 3),
            "trial_seconds": round(trial.duration.total_seconds(), 3),
            "peak_mb": peak_megabytes(),
            "adapter": name,
        }
        with (self.folder / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.saving += time.perf_counter() - before

    def choose(self, question: str, choices: list[Any]) -> str:
        """The answer to heretic's question at the end: none of these. An empty string makes it return."""
        offered = [choice.value for choice in choices if hasattr(choice.value, "number")]
        self.facts["pareto"] = [trial.number for trial in offered]
        return ""

    def write_facts(self) -> None:
        """``facts.json`` as far as it is known."""
        (self.folder / "facts.json").write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")


def read_prompts(path: Path) -> dict[str, list[str]]:
    """The four lists."""
    lists = json.loads(path.read_text(encoding="utf-8"))
    for key in PROMPTS.values():
        prompts = lists.get(key)
        if not prompts or not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            sys.exit(f"{path}: {key} is not a list of strings")
    return {key: lists[key] for key in PROMPTS.values()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run heretic-llm's search and keep every trial.")
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--prompts", type=Path, required=True, metavar="PROMPTS.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist or be empty")
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--tokens", type=int, help="tokens per reply (default: heretic's, 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: heretic's)")
    parser.add_argument("--batch-size", type=int, help="skip the search for one")
    parser.add_argument("--contiguous-head", action="store_true", help="see the beginning of this file")
    parser.add_argument("--max-batch", type=int, help="end of that search (default: heretic's, 128)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    model, folder = options.model.resolve(), options.out.resolve()
    prompts = read_prompts(options.prompts)
    if not (model / "config.json").is_file():
        sys.exit(f"{model}: no config.json")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder}: not empty")

    # heretic also reads its settings from the command line, the environment and the current folder
    sys.argv[1:] = []
    for name in [name for name in os.environ if name.upper().startswith("HERETIC_")]:
        del os.environ[name]
    os.chdir(folder)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local

    import torch
    from datasets import Dataset
    from heretic import main as heretic  # type: ignore[import-not-found]
    from heretic.config import Settings  # type: ignore[import-not-found]

    chosen = {
        "max_response_length": options.tokens,
        "system_prompt": options.system,
        "batch_size": options.batch_size,
        "max_batch_size": options.max_batch,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    for setting, key in PROMPTS.items():
        Dataset.from_dict({"text": prompts[key]}).save_to_disk(folder / "prompts" / key)
        chosen[setting] = {"dataset": str(folder / "prompts" / key), "split": "train", "column": "text"}
    chosen |= {"model": str(model), "n_trials": options.trials, "seed": options.seed}

    watch = Watch(folder, options.contiguous_head)
    watch.facts = {
        "threads": torch.get_num_threads(),
        "contiguous_head": options.contiguous_head,
        "prompts": {key: len(lines) for key, lines in prompts.items()},
    }
    watch.phase("imports")
    heretic.Settings = functools.partial(Settings, **chosen)
    heretic.Model = functools.partial(watch.load, heretic.Model)
    heretic.Evaluator = functools.partial(watch.baseline, heretic.Evaluator)
    heretic.optuna.create_study = functools.partial(watch.study, heretic.optuna.create_study)
    heretic.prompt_select = watch.choose
    heretic.run()

    watch.facts |= {
        "seconds": round(watch.now(), 3),
        "saving_seconds": round(watch.saving, 3),
        "peak_mb": peak_megabytes(),
    }
    watch.write_facts()


if __name__ == "__main__":
    main()
