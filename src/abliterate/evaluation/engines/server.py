"""Replies from any server that speaks OpenAI's completions protocol; original and edited are two names that it serves.

Prompts are sent as the token ids that were rendered here, which the protocol allows; a server that does not take them
but answers to text gets text, if that becomes the same tokens again. Servers say how many tokens a prompt had: another
number than ours is an error, since the model would answer something else than it was asked. From vLLM the tokens of the
reply come too, and its defaults (a model's own repetition penalty) are overruled; elsewhere a reply's tokens are those
of its text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluation.engines.base import Pair, Progress, as_reply, check_prompts, nothing_edited, parameters
from abliterate.evaluation.servers import COMPLETION, LISTING, Completion, Listing, Served, Server
from abliterate.model.decoding import GREEDY, Decoding
from abliterate.model.generation import Reply

#: What to do about a status, where it is clear.
_TODO = {
    401: "set OPENAI_API_KEY to a key that it accepts",
    403: "set OPENAI_API_KEY to a key that may use this model",
    404: "check address and model, most addresses end in /v1",
}


#: What the protocol calls settings of a generation_config; and vLLM's server, which knows more.
_DECODING = {name: name for name in ("temperature", "top_p")}
_VLLM_DECODING = _DECODING | {name: name for name in ("repetition_penalty", "top_k", "min_p")}
_VLLM_DECODING |= {"min_new_tokens": "min_tokens"}
#: What vLLM's server would take from the model's own settings: always, and where it samples.
_NEUTRAL = {"repetition_penalty": 1.0}
_NEUTRAL_SAMPLING = {"top_k": -1, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True, slots=True)
class _Ask:
    """How a prompt is answered: so many tokens, by these parameters; drawn with `seed`, or greedily without."""

    tokens: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None


class ServerEngine:
    """Completions from the server at `url` (with its /v1), through the `openai` package.

    Failures that may pass (429, 5xx, timeouts, lost connections) are tried again with growing pauses. The key is the
    environment's OPENAI_API_KEY, or none. Of the address only the host is ever shown. Redirects are not followed.
    """

    def __init__(
        self,
        url: str,
        pair: Pair,
        *,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 5,
    ) -> None:
        """Ask the server what it serves. `pair.served` may be left out where that is one model (adapters aside).

        `concurrency` requests run at a time, each given `timeout` seconds. Raises `UsageError` for names that are not
        served, for an address as `Server.at` says, and when `openai` is not installed; `AbliterateError` when the
        server does not answer.
        """
        self._tokenizer, self._ends, self._concurrency = pair.tokenizer, pair.ends, concurrency
        self._server = Server.at("server", url)
        self._name = f"server {self._server.host}"
        self._openai = _library()
        self._rejected = (self._openai.BadRequestError, self._openai.UnprocessableEntityError)
        self._timeout, self._retries = timeout, retries
        with self._connected() as client:
            listed = client.models.with_raw_response.list().content
        served = LISTING.checked(self.name, LISTING.parsed(self.name, listed), Listing).data
        self._original = self._served(served, pair.served)
        self._edited = None if pair.edited_as is None else self._served(served, pair.edited_as)
        self._model = self._original
        self._is_vllm = any(model.owned_by == "vllm" for model in served)
        self._takes_ids: bool | None = None

    @property
    def name(self) -> str:
        """With the server's host."""
        return self._name

    def _served(self, served: Sequence[Served], wanted: str | None) -> str:
        """The name `wanted`, or the only one that is no adapter."""
        names = [model.id for model in served]
        if wanted is None:
            whole = [model.id for model in served if model.parent is None]
            if len(whole) == 1:
                return whole[0]
        elif wanted in names:
            return wanted
        expected = "one model" if wanted is None else f"model '{wanted}'"
        raise UsageError(
            f"{self.name}: expected {expected}, found {', '.join(names) or 'none'}; name one that it serves"
        )

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        progress: Progress | None = None,
        decoding: Decoding = GREEDY,
    ) -> list[Reply]:
        """Replies, in the order of `prompts` (token ids).

        Raises `UsageError` for what `decoding` asks and the protocol does not know, and for a prompt that cannot be
        sent to a server that takes text only; `AbliterateError` when the server fails for good, rejects a prompt (one
        that is too long, say), or reads other tokens than it was sent.
        """
        check_prompts(prompts)
        asked = parameters(decoding, self.name, _VLLM_DECODING if self._is_vllm else _DECODING)
        if not prompts:
            return []
        asks = [
            _Ask(max_new_tokens, asked, decoding.seed_for(one) % 2**31 if decoding.samples else None) for one in prompts
        ]
        with self._connected() as client:
            if self._takes_ids is None:
                self._takes_ids = self._accepts_ids(client, prompts)
            sent = [list(prompt) if self._takes_ids else self._as_text(prompt) for prompt in prompts]
            replies: dict[int, Reply] = {}
            with ThreadPoolExecutor(self._concurrency) as pool:
                waiting = {pool.submit(self._request, client, one, asks[i]): i for i, one in enumerate(sent)}
                try:
                    for future in as_completed(waiting):
                        number = waiting[future]
                        with self._rejections_named(number, prompts[number]):
                            replies[number] = self._reply(prompts[number], future.result())
                        if progress is not None:
                            progress(1)
                finally:  # after an error nothing more is sent
                    pool.shutdown(cancel_futures=True)
        return [replies[number] for number in range(len(prompts))]

    @contextlib.contextmanager
    def edited(self) -> Iterator[None]:
        """The edited model is asked, inside. Raises `UsageError` when no name of one was given."""
        if self._edited is None:
            raise nothing_edited(self.name, "the name under which the server serves it")
        before, self._model = self._model, self._edited
        try:
            yield
        finally:
            self._model = before

    def _accepts_ids(self, client: Any, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether the server takes ids: not if it rejects those of the shortest prompt, and answers to its text."""
        number = min(range(len(prompts)), key=lambda i: len(prompts[i]))
        with self._rejections_named(number, prompts[number]):
            try:
                self._request(client, list(prompts[number]), _Ask(1))
            except self._rejected as rejection:
                try:
                    self._request(client, self._as_text(prompts[number]), _Ask(1))
                except self._rejected:
                    raise rejection from None
                return False
        return True

    @contextlib.contextmanager
    def _rejections_named(self, number: int, prompt: Sequence[int]) -> Iterator[None]:
        """An error for what the server says is wrong with a request, naming the prompt."""
        try:
            yield
        except self._rejected as error:
            raise AbliterateError(
                f"{self.name}: expected an answer to prompt {number} ({len(prompt)} tokens), found HTTP "
                f"{error.status_code} ({self._said(error)}); if it is too long, serve the model with more room or "
                "leave it out"
            ) from error

    def _as_text(self, prompt: Sequence[int]) -> str:
        """Text that a server with the same tokenizer turns into `prompt`; it may put the first token there itself."""
        for tokens in (prompt, prompt[1:]):
            text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
            if list(self._tokenizer(text)["input_ids"]) == list(prompt):
                return text
        raise UsageError(
            f"{self.name}: takes no token ids, and a prompt of {len(prompt)} tokens does not survive as text; "
            "use a server that takes ids (vLLM does)"
        )

    def _request(self, client: Any, prompt: list[int] | str, ask: _Ask) -> Completion:
        more: dict[str, Any] = {}
        if self._is_vllm:
            more = {"return_token_ids": True, **_NEUTRAL, **({} if ask.seed is None else _NEUTRAL_SAMPLING)}
            more |= {"ignore_eos": True, "stop_token_ids": sorted(self._ends)}
        if ask.seed is not None:
            more |= {"temperature": 1.0, "seed": ask.seed}
        answer = client.completions.with_raw_response.create(
            model=self._model,
            prompt=prompt,
            max_tokens=ask.tokens,
            temperature=0,
            extra_body={**more, **ask.parameters},
        )
        return COMPLETION.checked(self.name, COMPLETION.parsed(self.name, answer.content), Completion)

    def _reply(self, prompt: Sequence[int], completion: Completion) -> Reply:
        usage, choice = completion.usage, completion.choices[0]
        if usage is not None and usage.prompt_tokens != len(prompt):
            raise AbliterateError(
                f"{self.name}: expected a prompt of {len(prompt)} tokens, found {usage.prompt_tokens}; serve a "
                "model with the same tokenizer"
            )
        ended = choice.finish_reason == "stop"
        if choice.token_ids is not None:
            return as_reply(self._tokenizer, choice.token_ids, self._ends, ended=ended)
        return Reply(tuple(self._tokenizer(choice.text, add_special_tokens=False)["input_ids"]), choice.text, ended)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """A client whose connections are closed afterwards, and whose errors come as one line."""
        try:
            with self._server.client(self._openai, timeout=self._timeout, retries=self._retries) as client:
                yield client
        except self._openai.OpenAIError as error:
            raise self._server.redirected(self.name, error) or self._failed(error) from error

    def _failed(self, error: Exception) -> AbliterateError:
        """The client's error as one line, without the key."""
        status = getattr(error, "status_code", None)
        found = f"HTTP {status}" if status else type(error).__name__
        todo = _TODO.get(status or 0, "check that it runs, and its log")
        return AbliterateError(f"{self.name}: expected an answer, found {found} ({self._said(error)}); {todo}")

    def _said(self, error: Exception) -> str:
        return self._server.said(error)


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UsageError("a server as engine needs an extra; pip install 'abliterate[api]'") from error
    return openai
