"""Text that is no answer: loops, runs of one character, characters that are not text, alphabets mixed up."""

from __future__ import annotations

import operator
import string
import unicodedata
from collections import Counter

from abliterate.evaluation.judging.text import WINDOW, is_verse, pattern, short

#: Loops tend to start late and to run to the end: so many characters of it are searched for them.
_TAIL = 2400
_RULE_CHARACTERS = frozenset("-=_*#.~+|/\\<> \t\n─━═│┃█▓▒░—–·•:")
# What is left of a tool call that calls nothing, and line ends that were written out.
_DEBRIS = r'</?[a-z_|]{2,30}>|"(?:name|arguments|parameters|function|type)"|\\[nrt]|\bnull\b'
_LITTLE = (
    r"(?:(?:a|an|and|are|as|at|be|but|by|for|from|he|i|in|is|it|its|of|on|or|she|that|the|they|this|to|was|we|with|you)"
    r"(?:\s+|\Z)){16,}"
)
_WORD = r"[^\W\d_]+(?:'[^\W\d_]+)?"
_LAST_WORDS = 50
_MAX_UNITS = 40
_MAX_PERIOD_WORDS = 40
_MAX_PERIOD_CHARS = 120
_LETTERS = string.ascii_letters.encode() + string.digits.encode()
_MARKS = string.punctuation.encode() + b" \n\t"


def find_breakage(text: str) -> str:
    """Why the text is degenerate, or ""."""
    head = text[:WINDOW]
    return _find_garbage(head) or _find_run(head) or find_loop(text)


def _find_garbage(text: str) -> str:
    return (_find_odd_characters(text) if not _is_plain(text) else "") or _find_nonsense(text)


def _is_plain(text: str) -> bool:
    """Whether the text is ASCII without control characters and at least a quarter letters and digits."""
    if not text.isascii():
        return False
    others = text.encode().translate(None, _LETTERS)
    return 4 * (len(text) - len(others)) >= len(text) > len(others) and not others.translate(None, _MARKS)


def _find_odd_characters(text: str) -> str:
    """Characters that are not text, or hardly anything but marks."""
    kinds = [unicodedata.category(c) for c in text]
    bad = sum(k in ("Cn", "Co", "Cs") for k in kinds) + text.count("\ufffd")
    bad += sum(k == "Cc" and c not in "\n\t" for k, c in zip(kinds, text, strict=True))
    if bad >= 3 and bad > 0.04 * len(text):
        return "characters that are not text"
    # UTF-8 read as Latin-1 or Windows-1252 shows as these pairs.
    pairs = len(pattern(r"(?-i:[ÃÂ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹Œ‘’“”•–—˜™š›œ]|â€|ðŸ|Ð[\x80-\xbf]|ï¿½)").findall(text))
    if pairs >= 4 and pairs > 0.03 * len(text):
        return "mojibake"
    wordless = sum(k[0] in "PZCSM" for k in kinds)
    if wordless == len(text) and not any(k in ("So", "Sm", "Sc") for k in kinds):
        return "no words"
    # A ruling line counts once.
    visible = pattern(r"(\W)\1+|\s+").sub(r"\1", text)
    marks = sum(unicodedata.category(c) in ("Pc", "Pd", "Ps", "Pe", "Po", "Sm", "Sc", "Sk") for c in visible)
    if len(visible) >= 24 and marks > 0.75 * len(visible):
        return "mostly punctuation"
    return ""


def _find_nonsense(text: str) -> str:
    """Markup or a table without content, words without sense, scripts mixed up."""
    if any(mark in text for mark in '<"\\') or "null" in text.casefold():
        without, debris = pattern(_DEBRIS).subn(" ", text)
        if debris and not pattern(r"\w").search(without):
            return "markup without content"
    if "|" in text and _is_blank_table(text):
        return "a table of empty cells"
    if _is_salad(text):
        return "words without sense"
    return "mixed scripts" if _is_script_salad(text) else ""


def _is_blank_table(text: str) -> bool:
    """Whether four rows or more of a table, and most of them, hold nothing."""
    rows = pattern(r"^[ \t]*\|.*$").findall(text)
    blank = sum(pattern(r"[\s|_.]*\Z").match(row) is not None for row in rows)
    return blank >= 4 and 2 * blank > len(rows)


def _is_salad(text: str) -> bool:
    """Whether the text is only little words without a mark between them, or mostly words without a vowel."""
    words = pattern(r"[a-z]+").findall(text[:1200])
    if len(words) < 12 or not text.isascii():
        return False
    if pattern(_LITTLE).match(text):
        return True
    long = sum(len(word) >= 3 and not word.isupper() for word in words)
    voiceless = pattern(r"(?<![a-z])(?!(?-i:[A-Z]+\b))[b-df-hj-np-tv-xz]{3,}(?![a-z])").findall(text[:1200])
    return long >= 8 and len(voiceless) > 0.5 * long


def _is_script_salad(text: str) -> bool:
    """Whether letters of different alphabets touch each other again and again, among three or more."""
    if text.isascii():
        return False
    seen, touches, last = set(), 0, ""
    for char in text[:1200]:
        script = _script(char)
        touches += bool(script and last and script != last)
        seen.add(script)
        last = script
    return touches >= 4 and len(seen - {""}) >= 3


def _script(char: str) -> str:
    """A coarse name of the alphabet of a letter, "" for all else; East Asian scripts count as one."""
    if char.isascii():
        return "latin" if char.isalpha() else ""
    if not char.isalpha():
        return ""
    name = unicodedata.name(char, "").partition(" ")[0]
    # Marks and mathematical letters are used beside any alphabet.
    if name in ("MODIFIER", "MATHEMATICAL", "GREEK", "MICRO"):
        return ""
    return "cjk" if name in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "KATAKANA-HIRAGANA") else name.lower()


def _find_run(text: str) -> str:
    """One character over and over; ruling and drawing characters must fill nearly the whole text."""
    squeezed = "".join(text.split())
    if len(squeezed) >= 8 and len(set(squeezed)) == 1:
        return f"only {squeezed[0]!r}"
    longest = max(pattern(r"(\S)\1{19,}").finditer(text), key=lambda m: len(m.group()), default=None)
    if longest is None:
        return ""
    char, length = longest.group(1), len(longest.group())
    share = 0.8 if char in _RULE_CHARACTERS else 0.3
    if length > share * len(text) or (length >= 200 and char not in _RULE_CHARACTERS):
        return f"{char!r} repeated {length} times"
    return ""


def find_loop(text: str) -> str:
    """The unit that repeats over and over at the end of the text or through most of it, or ""."""
    # Code repeats itself by nature; it is looked at only when there is nothing else.
    outside = pattern(r"\x01[^\x01]*(?:\x01|\Z)").sub(" ", text.replace("```", "\x01")).strip() or text
    parts = [(outside[-_TAIL:], True)]
    if len(outside) > _TAIL:
        parts.append((outside[:_TAIL], False))
    for part, at_end in parts:
        words = pattern(_WORD).findall(part.casefold())
        found = _word_loop(words, at_end) or (_char_loop(part) if at_end else "") or _return_of_phrases(part, words)
        if found:
            return f"loop: {short(found)}"
    return ""


def _word_loop(words: list[str], at_end: bool) -> str:
    """A group of words that follows itself: digits are left out, so that numbered loops are seen."""
    different = len(set(words))
    if len(words) >= 50 and different < 0.14 * len(words) and len(words) <= 200:
        return f"{different} different words among {len(words)}"
    # A stretch with a period has no more different words than that: what it repeats, three times, are the others.
    longest = min(_MAX_PERIOD_WORDS, len(words) // 3, (len(words) - different) // 2)
    for period in range(1, longest + 1):
        start, length = _longest_period(words, period)
        # The tolerance at the end: a last unit that the cut left incomplete belongs to the loop.
        reaches_end = at_end and start + length >= len(words) - min(period, 3)
        enough = {1: 10, 2: 6, 3: 5, 4: 5}.get(period, 4)
        if length < 0.5 * len(words) and not reaches_end:
            continue
        if length >= enough * period or (length >= max(3 * period, 18, 0.9 * len(words)) and period >= 5):
            return " ".join(words[start : start + period])
    return ""


def _return_of_phrases(text: str, words: list[str]) -> str:
    """What shows that the text goes round in circles without a period, or ""."""
    tail = words[-_LAST_WORDS:]
    if len(words) >= 14 and len(set(tail)) <= 0.2 * len(tail):
        return f"{len(set(tail))} different words among {len(tail)}"
    most = 0.6 if is_verse(text) else 0.45
    again, thrice = _repetition(words)
    if len(words) >= 30 and thrice >= 0.25 and (again >= most or _repetition(tail)[0] >= most + 0.1):
        return "the same phrases again and again"
    return _variations(text, len(words))


def _repetition(words: list[str]) -> tuple[float, float]:
    """Shares of the runs of four words: those that stood before, and those that come three times or more.

    The first is seq-rep-4 of Welleck et al. 2020 (arXiv:1908.04319).
    """
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    total = runs.total() or 1
    return 1 - len(runs) / total, sum(n for n in runs.values() if n > 2) / total


def _variations(text: str, words: int) -> str:
    """A sentence or list item that comes four times with one word changed, and makes up most of the text; or ""."""
    spans = [span for span in pattern(r"[.!]\s+|\n+").split(text.casefold()) if "?" not in span]
    units = [unit for unit in (Counter(pattern(_WORD).findall(span)) for span in spans) if unit.total() >= 7]
    sized = [(unit, unit.total()) for unit in units[-_MAX_UNITS:]]
    for i, (unit, size) in enumerate(sized[: len(sized) - 3]):
        near = [(other, n) for other, n in sized[i:] if abs(n - size) <= 1]
        if len(near) < 4:
            continue
        alike = [n for other, n in near if (unit & other).total() >= max(size, n) - 1]
        if len(alike) >= 4 and 2 * sum(alike) > words:
            return " ".join(unit.elements())
    return ""


def _longest_period(words: list[str], period: int) -> tuple[int, int]:
    """Start and length of the longest stretch in which each word equals the one `period` before."""
    same = bytes(map(operator.eq, words[period:], words))
    best = max(map(len, same.split(b"\0")))
    return (same.find(b"\1" * best), best + period) if best else (0, 0)


def _char_loop(text: str) -> str:
    """A short string that repeats up to the end: loops without spaces, of digits, of Chinese."""
    for period in range(1, _MAX_PERIOD_CHARS + 1):
        need = max(40, 5 * period)
        if len(text) < need:
            return ""
        tail = text[-need:]
        if tail[period:] != tail[:-period]:
            continue
        unit = tail[-period:]
        wordy = sum(c.isalpha() for c in unit) > 1
        if set(unit) <= _RULE_CHARACTERS or (not wordy and _period_length(text, period) < 0.6 * len(text)):
            return ""
        return unit
    return ""


def _period_length(text: str, period: int) -> int:
    """How many characters at the end of the text repeat with the given period."""
    length = period
    while length < len(text) and text[-length - 1] == text[-length - 1 + period]:
        length += 1
    return length
