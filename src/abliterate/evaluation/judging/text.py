"""A reply made readable for rules: chat machinery, typography, markup and quoted speech taken out."""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache

from abliterate.evaluation.judging.literals import needed
from abliterate.prompts.thinking import answer_of

#: Characters in which phrases are looked for.
WINDOW = 4000
#: A sentence that starts behind so many characters declines nothing.
LATE = 1500
#: So many replies are read once for all judges and all that they ask about them.
_RECENT = 64

_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("‘’‛ʼ´`＇", "'"),
        **dict.fromkeys("“”„‟«»「」『』＂", '"'),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe0f", None),
        **dict.fromkeys("\u00a0\u2007\u202f", " "),
        **dict.fromkeys("‐‑", "-"),
        "\u2028": "\n",
        "\u2029": "\n",
    }
)


@cache
def pattern(expression: str) -> re.Pattern[str]:
    """A regular expression that ignores case, compiled once."""
    return re.compile(expression, re.IGNORECASE | re.MULTILINE)


@lru_cache(maxsize=1024)
def search(expression: str, text: str) -> re.Match[str] | None:
    """The first match in the text, case ignored: what `pattern(expression).search(text)` finds, mostly sooner.

    Searches that cannot succeed are told by literals, and by the text in lower case; what was sought once is known.
    """
    small, ascii_only = _lower(text), text.isascii()
    if not ascii_only or len(text) > _SHORT or len(expression) > _LONG:
        literals = _needed(expression)
        for literal in literals:
            if literal in small:
                break
        else:
            if literals:
                return None
    lower = _lower_pattern(expression) if ascii_only else None
    if lower is not None and lower.search(small) is None:
        return None
    return pattern(expression).search(text)


#: In shorter texts a shorter expression is sought sooner than its literals (measured).
_SHORT, _LONG = 300, 1000

_needed = cache(needed)


@lru_cache(maxsize=256)
def _lower(text: str) -> str:
    """The text in lower case. Both letters i that are not ASCII match an i where case is ignored."""
    return text.lower() if text.isascii() else text.replace("İ", "i").replace("ı", "i").casefold()


@cache
def _lower_pattern(expression: str) -> re.Pattern[str] | None:
    """The expression for lower-case ASCII, which is faster; None of one that tells capitals from small letters."""
    capitals = re.search(r"[A-Z]", re.sub(r"\\.|\(\?P<\w+>", "", expression))
    return None if capitals or "(?-i" in expression else re.compile(expression, re.MULTILINE)


def strip_machinery(reply: str) -> str:
    """Remove what belongs to the chat format: special tokens and thinking, also thinking that never ends."""
    return read_answer(reply)[0]


@lru_cache(maxsize=_RECENT)
def read_answer(reply: str) -> tuple[str, bool]:
    """The answer without what belongs to the chat format, and whether the thinking before it, if any, was finished."""
    answer, finished = answer_of(reply, False)
    text = pattern(_SPECIAL_TOKEN).sub(" ", answer).replace("\r\n", "\n").replace("\r", "\n")
    # Special tokens may have stood before the mark that opens the thinking.
    text, finished_below = answer_of(text.translate(_INVISIBLE).strip(), False)
    return text.strip(), finished and finished_below


_INVISIBLE = dict.fromkeys(map(ord, "\0\u200b\u2060\ufeff"), None)

_SPECIAL_TOKEN = (
    r"<[|｜][^<>|｜\n]{1,40}[|｜]>(?:(?:assistant|user|system)\b)?"
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>(?:(?:model|user)\b)?|\[/?INST\]|\[(?:PAD|UNK|EOS)\]"
)


@lru_cache(maxsize=_RECENT)
def prose(text: str) -> str:
    """Reduce to plain prose: no markup, no quoted speech, code blocks shown only as `<code>`."""
    text = unicodedata.normalize("NFKC", text[:WINDOW].replace("```", "\x01").translate(_TYPOGRAPHY))[:WINDOW]
    without_code = pattern(r"\x01[^\x01]*(?:\x01|\Z)").sub("\n<code>\n", text)
    if without_code.replace("<code>", "").strip():
        text = without_code
    text = pattern(_LITERAL_IN_CODE).sub(r'\1"..."', text.replace("\x01", ""))
    text = pattern(r"^[ \t]*[*+•·▪][ \t]+").sub("- ", text)
    text = pattern(r"[*_~#]{1,3}(?=\S)|(?<=\S)[*_~#]{1,3}|^[ \t]*>[ \t]?").sub("", text)
    return _mask_speech(_unwrap(text.strip()))


# Code without a fence: a text in single quotes that is returned, raised, printed, passed or assigned.
_LITERAL_IN_CODE = (
    r"((?:^\s*(?:return|raise|throw|echo|puts|print|say|yield)\s+|\w\(\s*|<<\s*|=\s*)[bfru]{0,2})"
    r"'(?:[^'\\\n]|\\.){1,400}(?:'|\Z)"
)


def _unwrap(text: str) -> str:
    """Drop quotation marks around the whole reply, the shell of a JSON object, and a role or emoji in front."""
    while len(text) > 6 and text.startswith('"""') and text.endswith('"""'):
        text = text[3:-3].strip()
    if text.startswith("{"):
        text = "\n".join(pattern(r'"[\w-]+"\s*:\s*"((?:[^"\\]|\\.){1,2000})').findall(text)) or text
    if text.startswith('"') and '"' not in text[1:-1]:
        text = text.strip('"')
    # With a second name at a line's start the first one is a speaker in a script.
    if len(pattern(r"^[a-z][\w .'-]{0,20}:(?=\s)").findall(text[:1200])) > 1:
        return text
    head = pattern(
        r"[^\w\[\"'<-]*"
        r"(?:\[[^\]\n]{1,30}\]\s*)?"
        r"(?:(?:short|quick|brief|final|my)\s+(?:answer|response|reply|note)\s?:\s+)?"
        r"(?:(?!subject|title|dear|scene|step|ingredients|chapter|refused|blocked|denied|rejected|error|usage)[a-z][\w-]{0,20}\s?:\s+)?"
    ).match(text)
    return text[head.end() :] if head else text


def _mask_speech(text: str) -> str:
    """Blank out quoted speech, so that a character's words are not taken for the model's."""
    text = pattern(r'"[^"\n]{1,400}"').sub('"..."', text)
    # A quotation that the cut left open: the mark follows a space and something follows the mark.
    text = pattern(r'(?<=[\s,:(])"(?=\w)[^"\n]{0,400}\Z').sub('"..."', text)
    # Single quotes: an apostrophe between letters does not close.
    return pattern(r"(?<![\w'])'(?=[a-z])(?:[^'\n]|(?<=\w)'(?=\w)){1,200}[,.!?]'(?!\w)").sub('"..."', text)


@lru_cache(maxsize=_RECENT)
def sentences(prose: str) -> tuple[tuple[int, str], ...]:
    """Start and text of each sentence that begins in the first `LATE` characters."""
    spans = pattern(r"[^\s.!?。][^.!?。\n]*(?:[.!?。]+(?!\s|\Z)[^.!?。\n]*)*[.!?。]*")
    return tuple((m.start(), m.group()) for m in spans.finditer(prose[: LATE + 600]) if m.start() < LATE)


def short(phrase: str) -> str:
    """A phrase on one line, cut for showing."""
    return " ".join(phrase.split())[:100]


def is_verse(text: str) -> bool:
    """Whether the text is four short lines or more, half of them ending in a comma or the like."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(pattern(r"[-*+•>|#]|\d").match(line) for line in lines):
        return False
    return len(lines) >= 4 and len(text) < 60 * len(lines) and 2 * sum(x[-1] in ",;" for x in lines) >= len(lines)
