"""Judges of other behaviours than refusal: by phrases, length, language, or a function that somebody installed.

A reply that shows the behaviour gets the label `REFUSAL`, whose meaning is then the behaviour's: everything that counts
labels counts what is shown. Broken replies are `DEGENERATE` as they are of refusals.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluation.judging.base import Exchange, Judge, Label, Verdict
from abliterate.evaluation.judging.breakage import find_breakage
from abliterate.evaluation.judging.text import WINDOW, read_answer, short
from abliterate.prompts.behaviour import Behaviour, Shows

#: The group of entry points that scorers are installed under: functions (prompt, reply) -> bool.
SCORERS = "abliterate.scorers"
#: Words in place of a `*` of a phrase.
_GAP = r"(?:\s+\S+){0,3}?\s+"

#: Words that hold English sentences together, and are words of no other language that is common.
_ENGLISH = frozenset(
    re.findall(
        r"\w+",
        """the of and to that is was for it with are this be have from they which you or had by not but what can there
        their when who will your how has been more if would were these its about than other such some into only could
        them time because any most should between through where after our does did being here then also""",
    )
)
#: At least this share of the words of an English text are of these, and at most that share of another language's.
_ENGLISH_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class ScorerJudge:
    """A judge of whether a behaviour shows; `find` gives what shows it in a reply, "" where nothing does."""

    name: str
    fingerprint: str
    find: Callable[[str, str], str]

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """A verdict for each exchange, in order."""
        return [self._verdict(exchange) for exchange in exchanges]

    def _verdict(self, exchange: Exchange) -> Verdict:
        text, finished = read_answer(exchange.reply)
        if not finished:
            return Verdict(Label.UNKNOWN, "thinking was not finished")
        if broken := "no text" if not text else find_breakage(text):
            return Verdict(Label.DEGENERATE, broken)
        found = self.find(exchange.prompt, text)
        return Verdict(Label.REFUSAL, short(found)) if found else Verdict(Label.COMPLIANCE)


def scorer_of(behaviour: Behaviour) -> Judge | None:
    """The judge of a behaviour that shows by phrases, length, language or a scorer; None where its judge is named.

    Raises `UsageError` for a scorer that is not installed.
    """
    shows = behaviour.shows
    if shows.judge is not None:
        return None
    digest = hashlib.sha256(json.dumps(shows.model_dump(), sort_keys=True).encode()).hexdigest()[:12]
    name, find = _finder(shows)
    return ScorerJudge(f"{name} of {behaviour.name}", f"{behaviour.name} by {name} {digest}", find)


def _finder(shows: Shows) -> tuple[str, Callable[[str, str], str]]:
    if shows.phrases is not None:
        return "phrases", _by_phrases(shows)
    if shows.longer_than is not None:
        most = shows.longer_than

        def long(_: str, text: str) -> str:
            count = len(text.split())
            return f"{count} words" if count > most else ""

        return f"more than {most} words", long
    if shows.language is not None:
        return "language", lambda _, text: "English" if is_english(text) else ""
    return f"scorer {shows.scorer}", _installed(shows.scorer or "")


def _by_phrases(shows: Shows) -> Callable[[str, str], str]:
    wanted = [phrase_pattern(phrase) for phrase in shows.phrases or ()]
    unwanted = [phrase_pattern(phrase) for phrase in shows.unless]

    def find(_: str, text: str) -> str:
        text = plain(text)[: min(shows.within or WINDOW, WINDOW)]
        if any(expression.search(text) for expression in unwanted):
            return ""
        places = {match.start(): match.group() for one in wanted for match in one.finditer(text)}
        return places[min(places)] if len(places) >= shows.at_least else ""

    return find


def phrase_pattern(phrase: str) -> re.Pattern[str]:
    """A phrase as an expression: whole words, any space between them; ^ is the very start, * up to three words."""
    start, body = (r"\A\W*", phrase[1:]) if phrase.startswith("^") else ("", phrase)
    parts = [r"\s+".join(map(re.escape, plain(part).split())) for part in body.split("*")]
    inside = _GAP.join(part for part in parts if part)
    before = r"(?<!\w)" if inside[:1] and (inside[0].isalnum() or inside[0] == "_") else ""
    after = r"(?!\w)" if inside and (inside[-1].isalnum() or inside[-1] == "_") else ""
    return re.compile(f"{start}{before}{inside}{after}")


def plain(text: str) -> str:
    """Case folded, typographic marks made plain, marks of emphasis dropped."""
    folded = unicodedata.normalize("NFKC", text).translate(_MARKS).casefold()
    return re.sub(r"[*_`]+(?=\S)|(?<=\S)[*_`]+", "", folded)


_MARKS = str.maketrans({**dict.fromkeys("‘’´`", "'"), **dict.fromkeys("“”„", '"'), "—": "-", "–": "-"})


def is_english(text: str) -> bool:
    """Whether a text is in English, by the share of its words that hold English sentences together.

    Of texts without letters of the Latin alphabet, or of a word or two, nothing can be said: they are not.
    """
    letters = [letter for letter in text if letter.isalpha()]
    latin = sum("LATIN" in unicodedata.name(letter, "") for letter in letters[:400])
    words = re.findall(r"[^\W\d_]+", text.casefold())
    if len(words) < 3 or latin < 0.8 * len(letters[:400]):
        return False
    return sum(word in _ENGLISH for word in words) >= _ENGLISH_SHARE * len(words)


def _installed(name: str) -> Callable[[str, str], str]:
    found = {entry.name: entry for entry in entry_points(group=SCORERS)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise UsageError(f"scorer '{name}': expected an entry point of the group {SCORERS} ({known})")
    function: Any = found[name].load()

    def find(prompt: str, text: str) -> str:
        try:
            return "scorer" if function(prompt, text) else ""
        except Exception as error:  # whatever somebody's function raises
            raise AbliterateError(
                f"scorer '{name}': it failed ({type(error).__name__}: {short(str(error))})"
            ) from error

    return find
