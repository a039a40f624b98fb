"""How an evaluation is shown: rates and their changes, the shift on harmless prompts, control, capability."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement

from abliterate.report.wording import (
    REFUSING,
    SETS,
    Words,
    drifted,
    estimate,
    judged_by,
    others,
    pvalue,
    rate,
    replies_of,
    states_of,
    words_of,
)
from abliterate.texts.terminal import Table, plain, write

if TYPE_CHECKING:
    from abliterate.record import (
        CapabilityPart,
        ControlEffectPart,
        EstimatePart,
        EvaluationPart,
        MannerPart,
        RatePart,
        ShiftPart,
    )
    from abliterate.report.wording import State

#: Tables without vertical rules: six columns fit 80 characters.
PLAIN: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}


def show_evaluation(part: EvaluationPart, console: Console) -> None:
    """All that was measured; of one model alone, its rates."""
    words = words_of(part.behaviour)
    _show_rates(part, console)
    if part.thinking is not None:
        title = "The same with the model's thinking open"
        print_rates(title, states_of(part.thinking), console, words)
    broken = [
        f"{words(name)} {estimate(pair.change, 100, '+.0f', ' %')}, p {pvalue(pair.p)}"
        for name, pair in part.degenerate.items()
        if pair.before_only or pair.after_only
    ]
    if broken:
        write(console, f"Degenerate replies, change: {'; '.join(broken)}.")
    _show_categories(part, console)
    if part.shift is not None:
        _show_shift(part.shift, part.control, console, words)
    if "harmless" in part.manner:
        _show_manner(part.manner["harmless"], console, words)
    if part.capability:
        write(console, capability_table(part.capability))


def _show_rates(part: EvaluationPart, console: Console) -> None:
    measured = states_of(part) if part.after is not None else [("", part.before, {})]
    words = words_of(part.behaviour)
    print_rates(f"{words.rates} on held-out prompts", measured, console, words)
    write(console, f"{replies_of(part.max_new_tokens, part.decoding)}.", style="dim")
    if part.judge is not None:
        write(console, judged_by(part.judge), style="dim")
    if unlike := drifted(measured):
        write(console, unlike, style="dim")


def print_rates(title: str, states: list[State], console: Console, words: Words = REFUSING) -> None:
    """A row per set and state: 95 % Wilson intervals, corrected for the judge's errors, and the paired change.

    A narrow terminal shows fewer columns, never half a number.
    """
    corrected = any(getattr(behaviour, name).corrected for _, behaviour, _ in states for name in SETS)
    extra = [*(["corrected"] if corrected else []), *(["change", "p"] if len(states) > 1 else [])]
    table = _rates(title, states, extra, words)
    for column in ("corrected", "p", "change"):
        if column in extra and not fits(table, console):
            extra.remove(column)
            table = _rates(title, states, extra, words)
    write(console, table)
    remarks = [
        f"{words(name)} {state}".strip() + f": {also}"
        for name in SETS
        for state, behaviour, _ in states
        if (also := others(getattr(behaviour, name)))
    ]
    if remarks:
        write(console, f"{'; '.join(remarks)}.")


def fits(table: Table, console: Console) -> bool:
    """Whether a table has the width it asks for: no cell is wrapped or cut."""
    unbound = console.options.update_width(10_000)
    return Measurement.get(console, unbound, table).maximum <= console.width


def _rates(title: str, states: list[State], extra: list[str], words: Words) -> Table:
    several = len(states) > 1
    table = Table(title=title, title_justify="left", **PLAIN)
    for column in ("prompts", words.shown, "% [95 %]", *extra):
        table.add_column(column, no_wrap=True)
    for name in SETS:
        if name in words.sets and not any(_counts(getattr(behaviour, name)) for _, behaviour, _ in states):
            continue  # a behaviour need not have a third set
        if several:
            table.add_row(plain(words(name), "bold"))
        for state, behaviour, pairs in states:
            part: RatePart = getattr(behaviour, name)
            pair = pairs.get(name)
            known = {
                "corrected": "" if part.corrected is None else estimate(part.corrected, 100, ".0f"),
                "change": "" if pair is None else estimate(pair.change, 100, "+.0f"),
                "p": "" if pair is None else pvalue(pair.p),
            }
            cells = [f"  {state}" if several else words(name), f"{part.refusals}/{part.n}", percent(part)]
            table.add_row(*cells, *(known[column] for column in extra))
    return table


def _counts(part: RatePart) -> bool:
    return bool(part.n or part.unknown or part.cut_off)


def percent(part: RatePart) -> str:
    """'41 [32, 51]': a rate in per cent."""
    low, high = part.ci95
    return f"{100 * part.refusals / part.n:.0f} [{100 * low:.0f}, {100 * high:.0f}]" if part.n else "–"


def _show_categories(part: EvaluationPart, console: Console) -> None:
    before, after = part.categories.get("before", {}), part.categories.get("after", {})
    if not before:
        return
    for shown in (rate, _rate_alone, _counted):
        table = _categories(part, before, after, shown)
        if fits(table, console):
            break
    write(console, table)


def _categories(
    part: EvaluationPart, before: dict[str, RatePart], after: dict[str, RatePart], shown: Callable[[RatePart], str]
) -> Table:
    words = words_of(part.behaviour)
    title = f"{words('harmful').capitalize()} prompts by category"
    table = Table(title=title, title_justify="left", **PLAIN)
    for column in ("category", "before", "after", "p") if after else ("category", words.shown):
        table.add_column(column)
    for name, first in before.items():
        cells = [name.replace("_", " "), shown(first)]
        if name in after:
            pair = part.paired_categories.get(name)
            cells += [shown(after[name]), "" if pair is None else pvalue(pair.p)]
        table.add_row(*cells)
    return table


def _rate_alone(part: RatePart) -> str:
    return rate(part.model_copy(update=dict.fromkeys(("evasion", "partial", "degenerate", "cut_off", "unknown"), 0)))


def _counted(part: RatePart) -> str:
    return f"{part.refusals}/{part.n}"


def _show_shift(shift: ShiftPart, control: ControlEffectPart | None, console: Console, words: Words) -> None:
    rows = [("edit", shift)]
    if control is not None and control.shift is not None:
        rows.append(("random", control.shift))
    for spread, names in ((True, _LONG), (False, _LONG), (False, _SHORT)):
        table = _shifts(rows, names, words, spread=spread)
        if fits(table, console):
            break
    write(console, table)
    if shift.nll_before is not None:
        write(
            console,
            f"NLL of the original's own replies: {shift.nll_before:.3f} nats per token before, "
            f"{shift.nll_after:.3f} after.",
        )
    if shift.worst:
        listed = "; ".join(f"{moved.kl_reply:.3f} {moved.prompt!r}" for moved in shift.worst)
        write(console, f"Moved most (KL over the reply): {listed}.")
    if control is not None and control.size is not None and control.size_of_edit is not None:
        write(
            console,
            f"The edit changes the weights it edits by {100 * control.size_of_edit:.1f} % of their norm, the "
            f"random direction by {100 * control.size:.1f} %.",
        )


#: What a row of shifts is about, by the field it comes from: for wide and for narrow terminals.
_LONG = {"kl_first_token": "KL, first token", "kl_reply": "KL, reply", "nll_change": "ΔNLL of own replies"}
_SHORT = {"kl_first_token": "first", "kl_reply": "reply", "nll_change": "own"}


def _shifts(rows: list[tuple[str, ShiftPart]], names: dict[str, str], words: Words, *, spread: bool) -> Table:
    """Means with their intervals; with `spread` also how the prompts lie around them."""
    columns = ("median", "p95", "worst") if spread else ()
    fewer = "".join(f" ({name}: {one.prompts})" for name, one in rows[1:] if one.prompts != rows[0][1].prompts)
    title = f"Shift on {rows[0][1].prompts} {words('harmless')} prompts{fewer}, nats per token"
    if names is _SHORT:
        title += ": KL of the first token and of the reply, ΔNLL of own replies"
    table = Table(title=title, title_justify="left", **PLAIN)
    for column in ("", "", "mean [95 %]", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    for key in ("kl_first_token", "kl_reply"):
        for number, (state, one) in enumerate(rows):
            values = [getattr(one, f"{key}_{which}") for which in ("median", "p95", "max")] if spread else []
            shown = ("" if value is None else f"{value:.3f}" for value in values)
            table.add_row("" if number else names[key], state, _mean(one, key), *shown)
    for number, (state, one) in enumerate(rows):
        change = "" if one.nll_change is None else estimate(one.nll_change, 1, "+.3f")
        table.add_row("" if number else names["nll_change"], state, change, *([""] * len(columns)))
    return table


def _mean(shift: ShiftPart, key: str) -> str:
    value, ends = getattr(shift, key), getattr(shift, f"{key}_ci95")
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]")


def _show_manner(part: MannerPart, console: Console, words: Words) -> None:
    write(
        console,
        f"{words('harmless').capitalize()} replies: {_value(part.tokens_before, '.1f')} → "
        f"{_value(part.tokens_after, '.1f')} tokens "
        f"(change {estimate(part.tokens_change, 1, '+.1f')}); repeated 4-grams "
        f"{_value(part.repetition_before, '.1%')} → {_value(part.repetition_after, '.1%')} "
        f"(change {estimate(part.repetition_change, 100, '+.1f', ' %')}).",
    )


def _value(part: EstimatePart, form: str) -> str:
    return "–" if part.value is None else format(part.value, form).replace("%", " %")


def capability_table(parts: list[CapabilityPart]) -> Table:
    """Scores of every task, before and after."""
    table = Table(title="Capability [95 %]", title_justify="left", **PLAIN)
    changed = any(part.after is not None for part in parts)
    scores = ("before", "after", "change") if changed else ("score",)
    for column in ("task", "metric", "n", *scores):
        table.add_column(column, justify="right" if column == "n" else "left")
    for part in parts:
        cells = [part.task, part.metric, str(part.n), _score(part)]
        if changed:
            cells.append("" if part.after is None else estimate(part.after, 1, ".3f"))
            cells.append(_capability_change(part))
        table.add_row(*cells)
    if any(part.above_chance is False for part in parts):
        table.caption = "* not known to be above guessing: a model that guesses loses nothing by an edit"
        table.caption_justify = "left"
    return table


def _score(part: CapabilityPart) -> str:
    return estimate(part.before, 1, ".3f") + ("*" if part.above_chance is False else "")


def _capability_change(part: CapabilityPart) -> str:
    if part.change is None or part.change.value is None:
        return ""
    if part.change_se is not None:
        return f"{part.change.value:+.3f} ± {part.change_se:.3f}"
    return estimate(part.change, 1, "+.3f") + ("" if part.p is None else f", p {pvalue(part.p)}")
