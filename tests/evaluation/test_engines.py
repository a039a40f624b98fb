"""Engines answer the same prompts with the same tokens, original and edited, and refuse what they cannot do."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from abliterate.config import ModelSettings, PromptSettings
from abliterate.edit.lora import low_rank_live, write_peft
from abliterate.edit.plan import Plan, make_plan
from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluation.answering import ModelState
from abliterate.evaluation.engines import Engine, Pair, ServerEngine, VllmEngine, open_engine, states_of
from abliterate.evaluation.engines.vllm import read_adapter
from abliterate.model.anatomy import study
from abliterate.model.batches import BatchSize, Encoded, share_prefix
from abliterate.model.decoding import Decoding
from abliterate.model.generation import Reply, complete
from abliterate.session import Session, open_session
from families import BOS, BY_NAME, D_MODEL, END, EOS, byte_tokenizer, save
from planted import BAD, GOOD, prompts, write_jsonl

PROMPTS: list[list[int]] = [[5, 77, 130, 200, 9], [1, 2, 3], [250, 40, 40, 7, 8, 99, 101], [5, 77, 130]]
ENDS = frozenset([EOS, END])
TOKENIZER = byte_tokenizer()


def plan_for(model: Any, seed: int = 1) -> Plan:
    basis: Tensor = torch.linalg.qr(torch.randn(D_MODEL, 1, generator=torch.Generator().manual_seed(seed)))[0].T
    return make_plan(study(model), basis.contiguous())


def tokens(replies: Sequence[Reply]) -> list[tuple[int, ...]]:
    return [reply.tokens for reply in replies]


# ---------------------------------------------------------------------------------------------- the live model


@pytest.fixture
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Session:
    files = {"harmful": BAD, "harmless": GOOD, "borderline": GOOD}
    for number, (name, words) in enumerate(files.items()):
        write_jsonl(tmp_path / f"{name}.jsonl", prompts(words, 12, number))
    folder = save(BY_NAME[request.param].model(), tmp_path / "model")
    named = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    return open_session(str(folder), loading=ModelSettings(device="cpu"), prompts=PromptSettings(**named))


def states(session: Session) -> tuple[ModelState, ModelState]:
    """The original, and the model under the hooks of a plan."""
    plan = plan_for(session.model)
    return ModelState(session), ModelState(session, lambda: session.ablated(plan))


@pytest.mark.parametrize("live", ["qwen2", "gemma3"], indirect=True)
def test_live_replies_are_those_of_generation_and_the_edit_is_on_inside_only(live: Session) -> None:
    original, edited = states(live)
    encoded = share_prefix(PROMPTS, share=False)

    def alone(prompt: Sequence[int]) -> tuple[int, ...]:
        return complete(live.model, TOKENIZER, share_prefix([prompt], share=False), 12, BatchSize(1))[0].tokens

    wanted = [alone(prompt) for prompt in PROMPTS]
    with live.ablated(plan_for(live.model)):
        wanted_edited = [alone(prompt) for prompt in PROMPTS]
    seen: list[int] = []
    assert tokens(original.complete(encoded, 12, seen.append)) == wanted
    assert tokens(edited.complete(encoded, 12, seen.append)) == wanted_edited
    assert tokens(original.complete(encoded, 12, seen.append)) == wanted != wanted_edited
    assert sum(seen) == 3 * len(PROMPTS)


@pytest.mark.parametrize("live", ["qwen2"], indirect=True)
def test_the_original_is_back_when_an_answer_is_broken_off(live: Session) -> None:
    (original, edited), encoded = states(live), share_prefix(PROMPTS, share=False)
    before = original.complete(encoded, 6, lambda _: None)

    def broken(_: int) -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        edited.complete(encoded, 6, broken)
    assert original.complete(encoded, 6, lambda _: None) == before


# ----------------------------------------------------------------------------------------------------- a server


def answer_of(model: str, prompt: Sequence[int], limit: int) -> list[int]:
    """What the stub says: readable bytes that depend on the model and on every token of the prompt, then an end."""
    state = sum((i + 1) * token for i, token in enumerate(prompt)) + (7 if model == "edited" else 0)
    reply = [97 + (state * (i + 3)) % 26 for i in range(state % 5 + 2)] + [EOS]
    return reply[:limit]


@dataclass
class Stub:
    """An OpenAI-compatible server that computes nothing. `trouble` may refuse a request: (status, message)."""

    takes_ids: bool = True
    room: int = 100
    vllm: bool = True
    wrong_count: int = 0
    trouble: Callable[[int], tuple[int, str] | None] = lambda _: None
    slow: Callable[[int], float] = lambda _: 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: Any = field(default_factory=threading.Lock)
    url: str = ""

    def models(self) -> list[dict[str, Any]]:
        owner = "vllm" if self.vllm else "someone"
        names = {"base": None, "edited": "base"}
        return [{"id": n, "object": "model", "created": 0, "owned_by": owner, "parent": p} for n, p in names.items()]

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.slow(number))
        with self.lock:
            self.running -= 1
        if (trouble := self.trouble(number)) is not None:
            return trouble[0], {"error": {"message": trouble[1]}}
        prompt = body["prompt"]
        if isinstance(prompt, list) and not self.takes_ids:
            return 400, {"error": {"message": "prompt: expected a string"}}
        ids = prompt if isinstance(prompt, list) else TOKENIZER(prompt)["input_ids"]
        if len(ids) > self.room:
            return 400, {"error": {"message": f"no more than {self.room} tokens"}}
        return 200, self.completion(body, ids)

    def completion(self, body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        reply = answer_of(body["model"], ids, body["max_tokens"])
        choice: dict[str, Any] = {"index": 0, "text": TOKENIZER.decode(reply, skip_special_tokens=True)}
        choice["finish_reason"] = "stop" if reply[-1] == EOS else "length"
        if body.get("return_token_ids"):
            choice["token_ids"] = reply
        usage = {"prompt_tokens": len(ids) + self.wrong_count, "completion_tokens": len(reply), "total_tokens": 0}
        kind = {"id": "1", "object": "text_completion", "created": 0, "model": body["model"]}
        return {**kind, "choices": [choice], "usage": usage}


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            self.reply(200 if found else 404, {"object": "list", "data": stub.models()} if found else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.reply(*stub.answer(body))

        def reply(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")


def ask(stub: Stub, **options: Any) -> ServerEngine:
    return ServerEngine(stub.url, Pair(TOKENIZER, ENDS, edited_as="edited"), **options)


READABLE = [list(b"hello"), list(b"a longer prompt"), list(b"x"), list(b"yes and no")]


@pytest.mark.parametrize("takes_ids", [True, False])
@pytest.mark.parametrize("vllm", [True, False])
def test_a_server_answers_in_order_under_both_names(takes_ids: bool, vllm: bool) -> None:
    prompts = READABLE * 5
    with serving(Stub(takes_ids=takes_ids, vllm=vllm, slow=lambda n: 0.02 if n % 4 == 1 else 0.0)) as stub:
        engine = ask(stub)
        seen: list[int] = []
        replies = engine.complete(prompts, 20, seen.append)
        with engine.edited():
            edited = engine.complete(prompts, 20)
        assert engine.complete(prompts[:2], 20) == replies[:2]
    assert tokens(replies) == [tuple(answer_of("base", prompt, 20)[:-1]) for prompt in prompts]
    assert tokens(edited) == [tuple(answer_of("edited", prompt, 20)[:-1]) for prompt in prompts]
    assert replies != edited
    assert all(reply.ended and reply.text == bytes(reply.tokens).decode() for reply in replies)
    assert sum(seen) == len(prompts)
    assert {type(body["prompt"]) for body in stub.bodies[1:]} == {list if takes_ids else str}
    assert all(body["temperature"] == 0 for body in stub.bodies)
    assert all(("repetition_penalty" in body) == vllm for body in stub.bodies)
    assert engine.name == f"server {stub.url.split('/')[2]}"


ASKED = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


@pytest.mark.parametrize("vllm", [True, False])
def test_a_server_is_asked_for_what_the_model_asks_and_refuses_what_it_does_not_know(vllm: bool) -> None:
    with serving(Stub(vllm=vllm)) as stub:
        engine = ask(stub)
        engine.complete(READABLE, 20, decoding=Decoding(ASKED, sample=1))
        sent = [body for body in stub.bodies if body["max_tokens"] == 20]
        assert {(body["temperature"], body["top_p"]) for body in sent} == {(0.7, 0.9)}
        assert len({body["seed"] for body in sent}) == len(READABLE), "draws of its own for each prompt"
        more = Decoding({**ASKED, "top_k": 20, "repetition_penalty": 1.1})
        stub.bodies.clear()
        if vllm:
            engine.complete(READABLE, 20, decoding=more)
            assert {(body["top_k"], body["repetition_penalty"]) for body in stub.bodies} == {(20, 1.1)}
        else:
            with pytest.raises(UsageError, match=r"asks for top_k 20, repetition_penalty 1.1, which server .* cannot"):
                engine.complete(READABLE, 20, decoding=more)
            assert stub.bodies == []
        with pytest.raises(UsageError, match="suppress_tokens"):
            engine.complete(READABLE, 20, decoding=Decoding({"suppress_tokens": [1]}))


def test_vllm_is_asked_for_what_the_model_asks(tmp_path: Path, llm: type[FakeLLM]) -> None:
    engine = vllm_engine(tmp_path)
    engine.complete(READABLE, 9, decoding=Decoding({**ASKED, "top_k": 20, "min_new_tokens": 2}))
    _, params, _ = llm.made[0].calls[0]
    assert {(one.temperature, one.top_p, one.top_k, one.min_tokens) for one in params} == {(0.7, 0.9, 20, 2)}
    assert len({one.seed for one in params}) == len(READABLE)
    engine.complete(READABLE, 9, decoding=Decoding({"repetition_penalty": 1.2}))
    assert {(one.temperature, one.repetition_penalty) for one in llm.made[0].calls[1][1]} == {(0.0, 1.2)}
    with pytest.raises(UsageError, match=r"no_repeat_ngram_size 3, which vllm .* cannot be asked for"):
        engine.complete(READABLE, 9, decoding=Decoding({"no_repeat_ngram_size": 3}))


def test_replies_cut_at_the_limit_have_not_ended() -> None:
    with serving(Stub()) as stub:
        replies = ask(stub).complete(READABLE, 2)
    assert [reply.ended for reply in replies] == [False] * 4
    assert [len(reply.tokens) for reply in replies] == [2] * 4


def test_requests_run_side_by_side_up_to_the_limit() -> None:
    with serving(Stub(slow=lambda _: 0.05)) as stub:
        ask(stub, concurrency=3).complete(READABLE * 3, 4)
        assert stub.most == 3
        stub.most = 0
        ask(stub, concurrency=1).complete(READABLE, 4)
        assert stub.most == 1


def test_what_may_pass_is_tried_again() -> None:
    with serving(
        Stub(trouble=lambda n: (429, "slow down") if n in (1, 3) else (503, "busy") if n == 4 else None)
    ) as stub:
        replies = ask(stub).complete(READABLE, 20)
        assert tokens(replies) == [tuple(answer_of("base", prompt, 20)[:-1]) for prompt in READABLE]
        assert len(stub.bodies) == 1 + 4 + 3


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, r"found HTTP 500 \(.*no memory.*\); check that it runs"),
        (401, r"found HTTP 401 \(.*key … is wrong.*\); set OPENAI_API_KEY"),
        (404, r"found HTTP 404 .*; check address and model"),
    ],
)
def test_what_does_not_pass_is_one_line_without_the_key(status: int, message: str) -> None:
    text = "the key sk-secret is wrong" if status == 401 else "no\nmemory"
    with serving(Stub(trouble=lambda n: (status, text) if n > 2 else None)) as stub:
        with pytest.raises(AbliterateError, match=message) as caught:
            ask(stub, retries=1).complete(READABLE * 4, 4)
        assert "\n" not in str(caught.value)
        assert "sk-secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AbliterateError, match=r"^server 127.0.0.1:9: expected an answer, found APIConnectionError"):
        ServerEngine("http://127.0.0.1:9/v1", Pair(TOKENIZER, ENDS), retries=0)


def test_a_server_that_reads_other_tokens_is_an_error() -> None:
    with (
        serving(Stub(wrong_count=1)) as stub,
        pytest.raises(AbliterateError, match="expected a prompt of 5 tokens, found 6"),
    ):
        ask(stub).complete(READABLE[:1], 4)


@pytest.mark.parametrize("takes_ids", [True, False])
def test_a_prompt_that_is_rejected_is_named_and_says_nothing_about_ids(takes_ids: bool) -> None:
    with serving(Stub(takes_ids=takes_ids, room=12)) as stub:
        engine = ask(stub)
        with pytest.raises(
            AbliterateError,
            match=r"answer to prompt 1 \(15 tokens\), found HTTP 400 .*no more than 12 tokens.* too long",
        ):
            engine.complete(READABLE, 4)
        assert len(engine.complete([READABLE[0], READABLE[2]], 4)) == 2
        assert type(stub.bodies[-1]["prompt"]) is (list if takes_ids else str)


def test_a_server_that_rejects_ids_and_text_is_not_said_to_take_text() -> None:
    with serving(Stub(room=1)) as stub:
        engine = ask(stub)
        with pytest.raises(AbliterateError, match=r"prompt 0 \(5 tokens\), found HTTP 400 .*no more than 1 tokens"):
            engine.complete(READABLE[:2], 4)
        stub.room = 100
        engine.complete(READABLE, 4)
        assert {type(body["prompt"]) for body in stub.bodies[2:]} == {list}


def test_after_an_error_nothing_more_is_sent() -> None:
    with serving(Stub(wrong_count=1, slow=lambda n: 0.1 * (n > 1))) as stub:
        with pytest.raises(AbliterateError, match="expected a prompt of"):
            ask(stub, concurrency=2).complete(READABLE * 5, 4)
        assert len(stub.bodies) <= 5  # of 21


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hidden@127.0.0.1:9/v1",
        "http://hidden@[::1/v1",
        "http://127.0.0.1:9/v1?key=hidden",
        "http://:9/hidden",
    ],
)
def test_an_address_with_more_than_an_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UsageError, match=r"^server: expected a URL") as caught:
        open_engine(url, Pair(TOKENIZER, ENDS))
    assert "hidden" not in str(caught.value)


def test_text_is_sent_only_if_it_becomes_the_same_tokens() -> None:
    with serving(Stub(takes_ids=False)) as stub:
        engine = ask(stub)
        marked = [[BOS, *b"hello", END]]
        engine.complete(marked, 4)
        assert stub.bodies[-1]["prompt"] == "<s>hello<|end|>"
        with pytest.raises(UsageError, match="a prompt of 2 tokens does not survive as text"):
            engine.complete([[0xC3, 0x28]], 4)  # no UTF-8


def test_names_that_are_not_served_are_refused() -> None:
    with serving(Stub()) as stub:
        with pytest.raises(UsageError, match="expected model 'other', found base, edited; name one"):
            ServerEngine(stub.url, Pair(TOKENIZER, ENDS, served="other"))
        with pytest.raises(UsageError, match="expected model 'better', found base, edited"):
            ServerEngine(stub.url, Pair(TOKENIZER, ENDS, edited_as="better"))
        swapped = ServerEngine(stub.url, Pair(TOKENIZER, ENDS, served="edited"))
        assert tokens(swapped.complete(READABLE, 20))[0] == tuple(answer_of("edited", READABLE[0], 20)[:-1])


# --------------------------------------------------------------------------------------------------------- vLLM


class FakeLLM:
    """Stands for `vllm.LLM`: replies name the folder and whether the adapter was asked for."""

    made: list[FakeLLM]
    holds: tuple[str, ...] = ()
    refuses: str = ""

    def __init__(self, model: str, **options: Any) -> None:
        if options.get("dtype") == "odd":
            raise ValueError("no such\ndtype")
        self.folder, self.options, self.calls = model, options, list[Any]()
        self.llm_engine = SimpleNamespace(add_lora=self.add_lora)
        names = ("model.layers.0.mlp.down_proj", *type(self).holds)
        self.modules = [(name, SimpleNamespace(lora_b_stacked=(torch.zeros(1, 1, 4, 8),))) for name in names]
        type(self).made.append(self)

    def add_lora(self, request: Any) -> bool:
        if type(self).refuses:
            raise ValueError(type(self).refuses)
        for _, module in self.modules:
            module.lora_b_stacked[0].fill_(1)
        return True

    def apply_model(self, look: Callable[[Any], Any]) -> list[Any]:
        return [look(SimpleNamespace(named_modules=lambda: self.modules))]

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
        assert not use_tqdm
        self.calls.append((prompts, params, lora_request))
        mark = (ord("e") if lora_request else ord("o")) if "whole" not in self.folder else ord("w")
        pairs = zip(prompts, params, strict=True)
        token_ids = [[mark, *prompt["prompt_token_ids"], EOS][: one.max_tokens] for prompt, one in pairs]
        reasons = ["stop" if ids[-1] == EOS else "length" for ids in token_ids]
        ended = zip(token_ids, reasons, strict=True)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=i, finish_reason=r)]) for i, r in ended]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    class Fresh(FakeLLM):
        made: list[FakeLLM] = []  # noqa: RUF012

    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vars(vllm).update(LLM=Fresh, SamplingParams=lambda **given: SimpleNamespace(**given), __version__="0.0")
    vars(request).update(LoRARequest=lambda *given: given)
    for name, module in (("vllm", vllm), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    return Fresh


def write_adapter(
    folder: Path, modules: Sequence[str] = ("layers.0.mlp.down_proj",), rank: int = 1, **config: Any
) -> Path:
    folder.mkdir(parents=True)
    names = [f"base_model.model.model.{module}.lora_{side}.weight" for module in modules for side in "AB"]
    save_file({name: torch.ones(rank, 4) for name in names}, folder / "adapter_model.safetensors")
    given = {"r": rank, "lora_alpha": rank, "bias": "none", "lora_bias": False, "target_parameters": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


def vllm_engine(folder: Path, edited: Path | None = None, **options: Any) -> VllmEngine:
    return VllmEngine(folder, TOKENIZER, ENDS, edited=edited, **options)


def test_vllm_gets_ids_and_the_adapter_inside_only(tmp_path: Path, llm: type[FakeLLM]) -> None:
    adapter = write_adapter(tmp_path / "adapter", rank=3)
    engine = vllm_engine(tmp_path / "model", adapter, max_model_len=99)
    assert llm.made == []
    before = engine.complete(READABLE, 40)
    with engine.edited():
        edited = engine.complete(READABLE, 40)
    assert engine.complete(READABLE, 40) == before
    (made,) = llm.made
    assert made.options["max_model_len"] == 99
    assert made.options["enable_lora"]
    assert made.options["max_lora_rank"] == 8
    assert [request for _, _, request in made.calls] == [None, ("edited", 1, str(adapter)), None]
    assert tokens(before) == [(ord("o"), *prompt) for prompt in READABLE]
    assert tokens(edited) == [(ord("e"), *prompt) for prompt in READABLE]
    assert before[0] == Reply(tuple(b"ohello"), "ohello", ended=True)
    _, (params, *_), _ = made.calls[0]
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.0, 40, True)
    assert params.stop_token_ids == sorted(ENDS)
    assert engine.name == "vllm 0.0"


def test_vllm_replies_cut_at_the_limit_have_not_ended(tmp_path: Path, llm: type[FakeLLM]) -> None:
    seen: list[int] = []
    replies = vllm_engine(tmp_path).complete(READABLE * 100, 3, seen.append)
    assert replies[0] == Reply(tuple(b"ohe"), "ohe", ended=False)
    assert tokens(replies) == [(ord("o"), *prompt)[:3] for prompt in READABLE * 100]
    assert seen == [256, 144]
    assert "enable_lora" not in llm.made[0].options


def test_vllm_takes_a_whole_edited_model_in_the_place_of_the_first(tmp_path: Path, llm: type[FakeLLM]) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    engine = vllm_engine(tmp_path / "model", whole)
    first = [engine.complete(READABLE, 9) for _ in range(2)]
    with engine.edited():
        edited = engine.complete(READABLE, 9)
    assert first[0] == first[1] == engine.complete(READABLE, 9)
    assert edited[0].text == "whello"
    assert [made.folder for made in llm.made] == [str(tmp_path / "model"), str(whole), str(tmp_path / "model")]
    assert all(request is None for made in llm.made for _, _, request in made.calls)


def test_what_vllm_refuses_or_passes_over_is_named_before_the_first_reply(tmp_path: Path, llm: type[FakeLLM]) -> None:
    adapter = write_adapter(tmp_path / "adapter", ("layers.0.mlp.down_proj", "embed_tokens"))
    llm.refuses = "While loading: expected target modules"
    way_out = "; write an edited model with 'abliterate apply'"
    with pytest.raises(UsageError, match=f"vLLM cannot hold model.embed_tokens{way_out}"):
        vllm_engine(tmp_path, adapter).complete(READABLE, 9)
    llm.refuses, llm.holds = "rank 9 is\n too much", ("model.embed_tokens",)
    with pytest.raises(UsageError, match=f"vLLM cannot hold it: rank 9 is too much{way_out}"):
        vllm_engine(tmp_path, adapter).complete(READABLE, 9)
    llm.refuses, llm.holds = "", ()
    with pytest.raises(UsageError, match=r"expected 2 changed modules in vLLM, found 1 \(without model.embed_tokens\)"):
        vllm_engine(tmp_path, adapter).complete(READABLE, 9)
    llm.holds = ("model.embed_tokens",)
    assert len(vllm_engine(tmp_path, adapter).complete(READABLE, 9)) == 4
    assert [len(made.calls) for made in llm.made] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_bias": True}, "vLLM cannot hold changes of biases"),
        ({"bias": "all"}, "vLLM cannot hold changes of biases"),
        ({"target_parameters": ["layers.0.mlp.experts.down_proj"]}, "changes of layers.0.mlp.experts.down_proj"),
        ({"r": 600}, "expected a rank of at most 512, found 600"),
    ],
)
def test_adapters_that_vllm_never_holds_are_refused_unloaded(
    tmp_path: Path, llm: type[FakeLLM], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"{message}.*; write an edited model"):
        vllm_engine(tmp_path, write_adapter(tmp_path / "adapter", **config))
    assert vllm_engine(tmp_path, write_adapter(tmp_path / "other"))
    assert llm.made == []


def test_folders_that_are_no_adapter_and_no_model_are_refused(tmp_path: Path, llm: type[FakeLLM]) -> None:
    for part in ("plain", "biased"):
        write_adapter(tmp_path / "two" / part)
    with pytest.raises(UsageError, match="expected one adapter, found biased, plain"):
        vllm_engine(tmp_path, tmp_path / "two")
    with pytest.raises(UsageError, match=r"expected an adapter_config.json or a config.json, found neither"):
        vllm_engine(tmp_path, tmp_path / "nowhere")


def test_an_adapter_of_ours_is_read_as_what_it_changes(tmp_path: Path) -> None:
    model = BY_NAME["qwen2"].model()
    plan = plan_for(model)
    (folder,) = write_peft(tmp_path / "adapter", low_rank_live(model, plan), model=model, base_model="qwen2")
    adapter = read_adapter(folder)
    assert adapter is not None
    assert adapter.rank == 1
    assert adapter.modules == {edit.writer.module for edit in plan.edits} >= {"model.embed_tokens"}
    assert read_adapter(save(model, tmp_path / "model")) is None


def test_what_vllm_says_comes_on_one_line(tmp_path: Path, llm: type[FakeLLM]) -> None:
    with pytest.raises(AbliterateError, match=r"vllm 0.0 cannot load '.*': no such dtype$"):
        vllm_engine(tmp_path, dtype="odd").complete(READABLE, 9)


def test_without_vllm_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"engine vllm: cannot be imported .*; install vllm beside abliterate"):
        vllm_engine(tmp_path)


# ------------------------------------------------------------------------------------------------- all of them


@pytest.fixture(params=["vllm", "server"])
def engine_of(request: pytest.FixtureRequest, tmp_path: Path, llm: type[FakeLLM]) -> Iterator[Callable[[], Engine]]:
    pair = Pair(TOKENIZER, ENDS, folder=tmp_path)
    with serving(Stub()) as stub:
        yield lambda: open_engine(stub.url if request.param == "server" else request.param, pair)


def test_every_engine_keeps_the_same_manners(engine_of: Callable[[], Engine]) -> None:
    engine = engine_of()
    assert engine.complete([], 5) == []
    assert len(engine.complete(READABLE, 5)) == 4
    with pytest.raises(UsageError, match="prompt 1: expected at least one token, found none"):
        engine.complete([[1], []], 5)
    with pytest.raises(UsageError, match=r"engine .*: expected an edited model, found none; give it"), engine.edited():
        pass


def test_states_ask_whole_prompts_of_the_original_and_inside_of_the_edited_model() -> None:
    encoded = Encoded((104, 105), ((33,), (63, 63)))
    whole = [[104, 105, 33], [104, 105, 63, 63]]
    with serving(Stub()) as stub:
        engine = ask(stub)
        original, edited = states_of(engine, edited=True)
        assert states_of(engine, edited=False) == (original, None)
        assert edited is not None
        seen: list[int] = []
        replies = [state.complete(encoded, 20, seen.append) for state in (original, edited, original)]
    names = ("base", "edited", "base")
    assert [tokens(each) for each in replies] == [
        [tuple(answer_of(name, prompt, 20)[:-1]) for prompt in whole] for name in names
    ]
    assert sum(seen) == 3 * len(whole)


def test_engines_are_chosen_by_name_or_address() -> None:
    pair = Pair(TOKENIZER, ENDS)
    for unknown in ("tgi", "transformers"):
        with pytest.raises(
            UsageError, match=f"engine '{unknown}': expected transformers, vllm or the address of a server"
        ):
            open_engine(unknown, pair)
    with pytest.raises(UsageError, match="engine vllm: expected the folder of a model"):
        open_engine("vllm", pair)
