"""Chat prompts: what the model sees is what its template says, with one BOS, and the answer comes next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from abliterate.errors import AbliterateError, ChatTemplateError, UsageError
from abliterate.evaluation.judging.text import strip_machinery
from abliterate.prompts import Prompt
from abliterate.prompts.rendering import (
    NO_TEMPLATE,
    ChatRenderer,
    answer_of,
    common_prefix,
    common_suffix,
    opens_thinking,
    read_template,
)
from families import BOS, CHAT_TEMPLATE, END, USER, byte_tokenizer

#: A template like those of Qwen 3: thinking is open unless it is switched off.
_CLOSED = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
SWITCHED = CHAT_TEMPLATE + _CLOSED


def tokenizer(template: str | None = CHAT_TEMPLATE, *, adds_bos: bool = False) -> Any:
    result = byte_tokenizer()
    result.chat_template = template
    if adds_bos:
        result.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return result


def test_template_surrounds_the_instruction_and_opens_the_answer() -> None:
    renderer = ChatRenderer(tokenizer())
    assert renderer.render("Hi!") == "<s><|user|>Hi!<|end|><|assistant|>"
    assert renderer.encode(["Hi!", "a"]) == [[BOS, USER, *b"Hi!", END, USER + 1], [BOS, USER, *b"a", END, USER + 1]]


def test_system_prompt_comes_first() -> None:
    renderer = ChatRenderer(tokenizer(), system="Be brief.")
    assert renderer.render("Hi!") == "<s><|system|>Be brief.<|end|><|user|>Hi!<|end|><|assistant|>"


def test_prompts_are_conversations_of_their_own() -> None:
    texts = ["one", "two", "three"]
    renderer = ChatRenderer(tokenizer())
    assert renderer.encode(texts) == [renderer.encode([text])[0] for text in texts]
    assert renderer.encode([]) == []


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_comes_once_also_when_tokenizer_and_template_both_write_it(adds_bos: bool) -> None:
    chat = tokenizer(adds_bos=adds_bos)
    assert chat("x")["input_ids"].count(BOS) == adds_bos, "the control"
    (ids,) = ChatRenderer(chat).encode(["x"])
    assert ids.count(BOS) == 1
    assert ids[0] == BOS


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bare_prompt_gets_the_bos_that_its_tokenizer_adds(adds_bos: bool) -> None:
    (ids,) = ChatRenderer(tokenizer(None, adds_bos=adds_bos), NO_TEMPLATE).encode(["x"])
    assert ids == [BOS, *b"x"] if adds_bos else [*b"x"]


def test_special_tokens_in_a_template_are_single_tokens() -> None:
    (ids,) = ChatRenderer(tokenizer()).encode(["x"])
    assert len(ids) == 5


def test_thinking_is_switched_off_where_the_template_knows_how() -> None:
    assert ChatRenderer(tokenizer(SWITCHED)).render("x").endswith("<|assistant|><think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("ending", "closed"),
    [
        ("<think>\n", "<think>\n\n</think>\n\n"),
        ("<think>", "<think>\n\n</think>\n\n"),
        ("<think>\n\n", "<think>\n\n</think>\n\n"),
        ("<thinking>\n", "<thinking>\n</thinking>\n\n"),
        ("<thought>\n", "<thought>\n</thought>\n\n"),
        ("[THINK]", "[THINK][/THINK]"),
        ("<seed:think>", "<seed:think></seed:think>"),
        ("◁think▷", "◁think▷◁/think▷"),
        ("<|channel>thought\n", "<|channel>thought\n<channel|>"),
        ("<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("\n", "\n"),
    ],
)
def test_open_thoughts_are_closed_so_that_the_answer_comes_next(ending: str, closed: str) -> None:
    template = CHAT_TEMPLATE + "{{ '" + ending.replace("\n", "\\n") + "' }}"
    assert ChatRenderer(tokenizer(template)).render("x") == "<s><|user|>x<|end|><|assistant|>" + closed


def test_word_think_in_an_instruction_is_left_alone() -> None:
    assert ChatRenderer(tokenizer()).render("What is <think>").count("think") == 1
    assert ChatRenderer(tokenizer(None), NO_TEMPLATE).render("What is <think>") == "What is <think>"


def test_tokenizer_without_a_template_is_refused_with_the_two_ways_out() -> None:
    with pytest.raises(ChatTemplateError, match=r"--chat-template FILE .* or --chat-template none"):
        ChatRenderer(tokenizer(None))


def test_template_can_be_given_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("[INST] {{ messages[0].content }} [/INST]", encoding="utf-8")
    for chat in (tokenizer(), tokenizer(None)):
        renderer = ChatRenderer(chat, read_template(str(tmp_path / "mine.jinja")))
        assert renderer.render("x") == "[INST] x [/INST]"


def test_template_none_means_bare_prompts() -> None:
    assert read_template("none") == NO_TEMPLATE
    assert read_template(None) is None
    renderer = ChatRenderer(tokenizer(), NO_TEMPLATE)
    assert renderer.render("x") == "x"
    assert renderer.encode(["x"]) == [[*b"x"]]
    with pytest.raises(ChatTemplateError, match="a system prompt needs a chat template"):
        ChatRenderer(tokenizer(), NO_TEMPLATE, system="Be brief.")


def test_template_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("none.jinja", "binary", "."):
        with pytest.raises(UsageError, match="expected a readable Jinja file or 'none'") as caught:
            read_template(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value) or name == "."


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('system role\\n not supported') }}",
        "{% for m in messages %}",
        "{{ messages[7].content }}",
        "{{ nothing.at_all }}",
        "{{ messages | frobnicate }}",
    ],
)
def test_template_that_fails_is_one_line_that_says_why(template: str) -> None:
    with pytest.raises(AbliterateError, match=r"the chat template cannot render a prompt \(.+\)") as caught:
        ChatRenderer(tokenizer(), template, system="x").render("x")
    assert isinstance(caught.value, ChatTemplateError)
    assert str(caught.value).isprintable()


def test_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="no tokens"):
        ChatRenderer(tokenizer(None), "{{ '' }}").encode(["x"])


# --- open thinking

#: As Qwen 3, DeepSeek V3.1: the switch has either name, and the template may open the thinking itself.
_BY_NAME = "{% if thinking is defined and thinking %}<think>\n{% else %}<think></think>{% endif %}"


def test_template_is_asked_to_let_the_model_think() -> None:
    for template, opened in ((SWITCHED, ""), (CHAT_TEMPLATE + _BY_NAME, "<think>\n")):
        chat = tokenizer(template)
        assert ChatRenderer(chat, thinking=True).render("x") == "<s><|user|>x<|end|><|assistant|>" + opened
        assert "</think>" in ChatRenderer(chat).render("x"), "the control"


@pytest.mark.parametrize("ending", ["<think>\n", "[THINK]", "<|start|>assistant", "<seed:think>", "\n"])
def test_open_thinking_is_left_as_the_template_writes_it(ending: str) -> None:
    chat = tokenizer(CHAT_TEMPLATE + "{{ '" + ending.replace("\n", "\\n") + "' }}")
    rendered = ChatRenderer(chat, thinking=True).render("x")
    assert rendered.endswith("<|assistant|>" + ending)
    assert opens_thinking(rendered) == ("think" in ending.lower())
    assert not opens_thinking(ChatRenderer(chat).render("x"))


PAIRS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought\n", "<channel|>"),
]


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_answer_follows_the_thinking(opening: str, closing: str) -> None:
    assert answer_of(f"Hm.\nWell.\n{closing}\n\nLye is a base.", True) == ("Lye is a base.", True)
    assert answer_of(f"{opening}\nHm.\n{closing}\n\nLye is a base.", False) == ("Lye is a base.", True)
    assert answer_of(f"{opening}Hm.{closing}{opening}Oh.{closing}Lye.", False) == ("Lye.", True)
    assert answer_of(f"Hm.{closing}", True) == ("", True), "thinking that ended, and nothing said"


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_thinking_that_never_ends_is_no_answer(opening: str, closing: str) -> None:
    for text, open_ in ((f"{opening}Lye is", False), (f" {opening}", False), (f"Hm.{closing}\n{opening}Lye is", True)):
        assert answer_of(text, open_) == ("", False)


def test_reply_is_its_own_answer_unless_the_prompt_left_thinking_open() -> None:
    for text in ("Lye is a base.", "", "I think\n<b>so</b>", "channel: analysis"):
        assert answer_of(text, False) == (text, True)
        assert answer_of(text, True) == ("", False)


def test_answer_in_channels_is_the_final_one() -> None:
    thought = "<|channel|>analysis<|message|>The user asks about <think>.<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>Lye is a base."
    assert answer_of(thought + final, False) == ("Lye is a base.", True)
    assert answer_of(thought + final + "<|return|>", False) == ("Lye is a base.", True)
    assert answer_of(final, False) == ("Lye is a base.", True)
    assert answer_of(thought, False) == ("", False)
    assert answer_of(thought + "<|start|>assistant<|channel|>commentary<|message|>Hm", False) == ("", False)
    assert answer_of("<|channel|>final <|constrain|>json<|message|>{}", False) == ("{}", True)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nI must refuse.\n</think>\n\nHere you are.",
        "I must refuse.\n</think>\n\nHere you are.",
        "<think></think>Here you are.",
        "<think>a</think><think>b</think>Here you are.",
        "Here you are.",
    ],
)
def test_answer_is_the_one_that_judges_read(text: str) -> None:
    assert strip_machinery(text) == answer_of(text, False)[0] == "Here you are."


@given(st.text(st.characters(exclude_characters="<[◁")), st.text(st.characters(exclude_characters="<[◁")))
def test_answer_is_found_whatever_was_thought(thought: str, answer: str) -> None:
    assert answer_of(f"<think>{thought}</think>{answer}", False) == (answer.lstrip(), True)
    assert answer_of(f"<think>{thought}", False) == ("", False)
    assert answer_of(answer, False) == (answer, True)


# --- conversations

TALK = (("user", "Lye?"), ("assistant", "A base."), ("user", "How?"))


def test_conversation_is_rendered_turn_by_turn() -> None:
    renderer = ChatRenderer(tokenizer())
    rendered = "<s><|user|>Lye?<|end|><|assistant|>A base.<|end|><|user|>How?<|end|><|assistant|>"
    assert renderer.render(Prompt.conversation(TALK)) == rendered
    assert renderer.encode([Prompt.conversation(TALK), "x"])[1] == renderer.encode(["x"])[0]
    assert renderer.render(str(Prompt.conversation(TALK))) != rendered, "the transcript is for reading"
    assert renderer.render(Prompt("x", "a category")) == renderer.render("x")


def test_system_message_of_a_conversation_wins_over_the_system_prompt() -> None:
    renderer = ChatRenderer(tokenizer(), system="Be brief.")
    assert renderer.render(Prompt.conversation(TALK)).startswith("<s><|system|>Be brief.<|end|><|user|>Lye?")
    own = renderer.render(Prompt.conversation((("system", "Be long."), *TALK)))
    assert own.startswith("<s><|system|>Be long.<|end|><|user|>Lye?")
    assert "brief" not in own


def test_conversation_needs_a_template() -> None:
    with pytest.raises(ChatTemplateError, match="a conversation needs a chat template; found --chat-template none"):
        ChatRenderer(tokenizer(), NO_TEMPLATE).render(Prompt.conversation(TALK))


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SILENT = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


def test_template_that_takes_no_system_prompt_is_an_error_that_names_the_option() -> None:
    for template, reason in (
        (NO_SYSTEM + CHAT_TEMPLATE, r"\(System role not supported\): it takes no system prompt; leave out --system"),
        (SILENT, "leaves the system prompt out; leave out --system"),
    ):
        for renderer, prompt in (
            (ChatRenderer(tokenizer(), template, system="Be brief."), "x"),
            (ChatRenderer(tokenizer(), template), Prompt.conversation((("system", "Be brief."), ("user", "x")))),
        ):
            with pytest.raises(ChatTemplateError, match=reason) as caught:
                renderer.render(prompt)
            assert str(caught.value).isprintable()
        assert ChatRenderer(tokenizer(), template).render("x"), "the control"


def test_system_prompt_that_the_template_trims_or_moves_is_there() -> None:
    template = "{{ messages[1].content }} ({{ messages[0].content | trim }})"
    assert ChatRenderer(tokenizer(), template, system="\nBe brief.\n").render("x") == "x (Be brief.)"


# --- what prompts share

sequences = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=6)


@given(sequences)
def test_common_prefix_is_shared_and_the_longest(values: list[list[int]]) -> None:
    length = common_prefix(values)
    assert len({tuple(value[:length]) for value in values}) == 1
    assert all(len(value) >= length for value in values)
    longer = {tuple(value[: length + 1]) for value in values}
    assert len(longer) > 1 or min(map(len, values)) == length


@given(sequences)
def test_common_suffix_mirrors_the_prefix(values: list[list[int]]) -> None:
    assert common_suffix(values) == common_prefix([value[::-1] for value in values])


@given(st.lists(st.integers(0, 1), max_size=4), sequences, st.lists(st.integers(0, 1), max_size=4))
def test_template_around_different_instructions_is_found_on_both_sides(
    before: list[int], middles: list[list[int]], after: list[int]
) -> None:
    rendered = [[*before, *middle, *after] for middle in middles]
    assert common_prefix(rendered) >= len(before)
    assert common_suffix(rendered) >= len(after)


def test_post_instruction_tokens_of_a_chat_template_are_counted() -> None:
    ids = ChatRenderer(tokenizer()).encode(["Tell me", "What is", "Do it"])
    assert common_suffix(ids) == 2
    assert common_prefix(ids) == 2


@pytest.mark.parametrize("form", ["%H:%M:%S.%f", "%d %b %Y %f"])
def test_time_in_a_template_stands_still(form: str) -> None:
    template = f"{{{{ strftime_now('{form}') }}}} " + CHAT_TEMPLATE
    renderers = [ChatRenderer(tokenizer(template)), ChatRenderer(tokenizer(), template)]
    texts = {renderer.render("Hi!") for renderer in renderers for _ in range(3)}
    assert len(texts) == 1
    assert all(renderer.printed_time == renderer.clock.time.isoformat(timespec="seconds") for renderer in renderers)
    renderers[0].check_repeatable()


def test_time_is_not_told_where_no_template_prints_it_and_moves_on_elsewhere() -> None:
    renderer = ChatRenderer(tokenizer())
    renderer.render("Hi!")
    assert renderer.printed_time is None
    moving = tokenizer("{{ strftime_now('%f') }}")
    assert (
        len({moving.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) for _ in range(5)}) > 1
    ), "the control"


def test_template_that_never_renders_alike_is_refused() -> None:
    restless = "{{ range(100000) | random }}" + CHAT_TEMPLATE
    with pytest.raises(ChatTemplateError, match="renders the same prompt differently each time"):
        ChatRenderer(tokenizer(restless)).check_repeatable()


def test_half_a_character_never_reaches_the_tokenizer() -> None:
    for renderer in (ChatRenderer(tokenizer()), ChatRenderer(tokenizer(), NO_TEMPLATE)):
        with pytest.raises(UsageError, match="half of a character"):
            renderer.encode(["\ud83d bread"])
    with pytest.raises(UsageError, match="half of a character"):
        ChatRenderer(tokenizer(), system="\udcff").encode(["bread"])
