"""What was asked, and how to see it again."""

from __future__ import annotations

import json

from abliterate.record import Record
from abliterate.report.glossary import GLOSSARY
from abliterate.report.html.parts import Figure, Section, Table, short
from abliterate.report.wording import asked, seed

#: Characters of the command line that are shown.
_LONGEST = 4000


def question(record: Record) -> Section:
    """The model, the prompts, and what refusals start with."""
    table = Table(["", ""], [[name, short(value)] for name, value in asked(record)], words=frozenset({0, 1}))
    return Section("asked", "What was asked?", figures=[Figure("asked-of", "Model and prompts", table, folded=False)])


def reproduce(record: Record) -> Section:
    """The command, versions, hashes, seeds, times."""
    figures = []
    rows = [["made", record.created], *([name, version] for name, version in record.versions.items())]
    if (given := seed(record)) is not None:
        rows.append(["seed", given])
    if record.prompts is not None:
        rows.append(["SHA-256 of all prompts", record.prompts.sha256])
    if record.evaluation is not None and record.evaluation.judge is not None:
        judge = record.evaluation.judge
        rows.append(["judge", f"{judge.name} ({judge.fingerprint})"])
    for what, hashes in (("read", record.model.source_sha256), ("written", record.output_sha256)):
        rows += [[f"{what}: {short(name, 80)}", digest] for name, digest in list(hashes.items())[:100]]
    figures.append(Figure("provenance", "Versions, seeds and SHA-256", Table(["", ""], rows, words=frozenset({0, 1}))))
    settings = [
        [name, short(json.dumps(value, ensure_ascii=False))]
        for name, value in _flat("", record.settings)
        if value not in (None, "", {}, [])
    ]
    figures.append(Figure("settings", "Settings", Table(["setting", "value"], settings, words=frozenset({0, 1}))))
    if record.timings_s:
        peaks = record.peak_memory_bytes
        phases = [
            [name, f"{seconds:.1f}", f"{peaks[name] / 1e9:.2f} GB" if name in peaks else "", *_work(record, name)]
            for name, seconds in record.timings_s.items()
        ]
        columns = ["tokens × blocks forwards", "backwards", "tokens through the head"]
        table = Table(["phase", "seconds", "peak memory", *columns], phases)
        figures.append(Figure("times", "Time, memory and work", table))
    text = [] if record.command else ["It was started from Python; the settings below are those of abliterate.run."]
    return Section("reproduce", "How to see it again?", text, figures, code=record.command[:_LONGEST])


def _work(record: Record, phase: str) -> list[str]:
    work = record.work.get(phase)
    return ["", "", ""] if work is None else [f"{n:,}" for n in (work.forward, work.backward, work.head)]


def _flat(prefix: str, settings: dict[str, object]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in settings.items():
        key = f"{prefix}.{name}" if prefix else name
        rows += _flat(key, value) if isinstance(value, dict) else [(key, value)]
    return rows


def glossary(record: Record) -> Section:
    """What the words of the page mean."""
    rows = [[word, meaning] for word, meaning in GLOSSARY.items()]
    table = Table(["word", "meaning"], rows, words=frozenset({0, 1}))
    return Section("glossary", "What do the words mean?", figures=[Figure("words", "Glossary", table)])
