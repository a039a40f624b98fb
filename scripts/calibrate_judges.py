"""Measure the judges of the package on replies that people have labelled, and write the calibrations that come with it.

Run ``python scripts/calibrate_judges.py FOLDER`` after a change of the rules or of the learnt judge. FOLDER holds
``xstest_half.csv`` (replies to every second prompt of XSTest, Röttger et al. 2024, CC-BY-4.0; the column ``model`` says
whose) and ``pyrit_refusal.csv``, ``pyrit_refusal_extra.csv`` (PyRIT's evaluation sets, MIT). Only counts are written.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import tempfile
from pathlib import Path

from pydantic import TypeAdapter

from abliterate.evaluation import judging
from abliterate.evaluation.judging import Judge, RuleJudge
from abliterate.evaluation.judging.calibration import Calibration, compare
from abliterate.evaluation.judging.labelled import LABEL, PROMPT, RESPONSE, read_labelled
from abliterate.evaluation.judging.learnt import LearntJudge

#: What the groups of labelled replies are called.
GROUPS = {
    "llama2new": "Llama 2 to half of XSTest",
    "mistralguard": "Mistral with a guarding prompt to half of XSTest",
    "pyrit": "PyRIT's sets of refusals",
}


def rows(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Prompt, reply and label of each group."""
    csv.field_size_limit(2**31 - 1)
    found: dict[str, list[tuple[str, str, str]]] = {name: [] for name in GROUPS}
    for name in ("xstest_half", "pyrit_refusal", "pyrit_refusal_extra"):
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(line for line in lines if not line.startswith("#")):
                values = [next(row[column] for column in names if column in row) for names in (PROMPT, RESPONSE, LABEL)]
                found[row.get("model", "pyrit")].append((values[0], values[1], values[2]))
    return found


def calibrate(judge: Judge, group: str, labelled: list[tuple[str, str, str]]) -> Calibration:
    """The calibration of a judge on one group."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labelled.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([(PROMPT[0], RESPONSE[0], LABEL[0]), *labelled])
        known = read_labelled(path)
        found = compare(judge, known, judge.judge(known.exchanges), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return found.model_copy(update={"source": f"{GROUPS[group]}, {found.n} replies", "source_sha256": sha256})


def main() -> None:
    """Write the calibrations, and say what they are."""
    parser = argparse.ArgumentParser(description="Calibrate the judges of the package.")
    parser.add_argument("folder", type=Path, help="where the labelled replies lie")
    groups = rows(parser.parse_args().folder)
    found = [calibrate(judge, name, of) for judge in (RuleJudge(), LearntJudge()) for name, of in groups.items()]
    for one in found:
        figures = f"recall {one.recall.value:.3f}, specificity {one.specificity.value:.3f}"
        print(f"{one.fingerprint:20} {one.source:64} {figures}")
    path = Path(judging.__file__).parent / "calibrations.json"
    path.write_bytes(TypeAdapter(list[Calibration]).dump_json(found, indent=1) + b"\n")


if __name__ == "__main__":
    main()
