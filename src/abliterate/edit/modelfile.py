"""A Modelfile for Ollama, which writes chat templates in Go's language and reads no other.

What a chat template puts around messages is learnt by rendering conversations with it. Where it always puts the same
around what each role says, and asks for nothing else (a date, tools), the same is written in Go's language. Otherwise
the Modelfile says nothing of it, and Ollama chooses by the template in the GGUF file, if it knows that one.
"""

from __future__ import annotations

from typing import Any

from abliterate.errors import AbliterateError
from abliterate.prompts import ChatRenderer, Prompt

#: Texts that no template holds and none changes.
_SYSTEM, *_SAID = (f"nobody{number}said" for number in range(6))
_ROLES = ("user", "assistant")


def modelfile(gguf: str, tokenizer: Any) -> str:
    """The Modelfile of a GGUF file that lies beside it under the name `gguf`."""
    template = go_template(tokenizer)
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{gguf}"]
    return "\n".join([*lines, *([] if template is None else [f'TEMPLATE """{template}"""']), ""])


def go_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template in Go's language; None where it does not always put the same around messages.

    Of messages of the user and the assistant in turn, after one of the system or none, both render the same text.
    The token that llama.cpp puts at the beginning of every text by itself is left out.
    """
    try:
        renderer = ChatRenderer(tokenizer, thinking=True)
        around = {
            (count, system): _around(renderer, count, system=system) for count in (1, 3, 5) for system in (True, False)
        }
    except AbliterateError:  # no template, one that fails, or one that takes no system message
        return None
    begin, system, answer, again, *_ = around[5, True] or [""] * 4
    first, *_ = around[5, False] or [""]
    turns = [answer, again, answer, again, answer]
    for (count, told), found in around.items():
        if found != [*([begin, system] if told else [first]), *turns[:count]]:
            return None
    if renderer.printed_time is not None:
        return None
    bos = getattr(tokenizer, "bos_token", None)
    if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        begin, first = begin.removeprefix(bos), first.removeprefix(bos)
    if not all(map(_is_literal, (begin, system, first, answer, again))):
        return None
    return (
        "{{ range $i, $_ := .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{begin}{{{{ .Content }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{{{{ if eq $i 0 }}}}{first}{{{{ end }}}}{{{{ .Content }}}}{answer}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{again}{{{{ end }}}}'
        "{{ end }}"
    )


def _around(renderer: ChatRenderer, count: int, *, system: bool) -> list[str] | None:
    """What stands before, between and after so many messages; None where one is not there as it is, once, in turn."""
    said = [*([_SYSTEM] if system else []), *_SAID[:count]]
    roles = [*(["system"] if system else []), *(_ROLES[number % 2] for number in range(count))]
    rest = renderer.render(Prompt.conversation(list(zip(roles, said, strict=True))))
    if any(rest.count(text) != 1 for text in said):
        return None
    pieces = []
    for text in said:
        before, found, rest = rest.partition(text)
        pieces.append(before)
        if not found:
            return None
    return [*pieces, rest]


def _is_literal(text: str) -> bool:
    """Whether a text means itself in a Modelfile and in Go's templates."""
    plain = all(character.isprintable() or character in "\n\t" for character in text)
    return plain and not any(mark in text for mark in ("{{", "}}", '"""'))
