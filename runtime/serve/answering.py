"""A request as the engine takes it, and its answer piece by piece: the common work of the routes that generate answers.

Knows no routes and no forms of events.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
from fastapi import Request

from runtime.answer.chat_core import Prompt
from runtime.answer.decode import Decoding, Token
from runtime.answer.prompt import THINKING_TOKENS
from runtime.answer.reading import AnswerReader, Said
from runtime.errors import PromptError
from runtime.media.web import is_web_address
from runtime.serve.engine import Engine, Piece, ProcessEnded, decoding_of
from runtime.serve.protocol import ChatRequest, ImagePart, RefusalPart, TextPart, Writing
from runtime.serve.reception import Metrics, Reception, Refused, Rules
from runtime.serve.turns import prompt_of_request

SLOW_AT_ONCE = 4  # requests whose media take long
LOOK_SECONDS = 0.5  # between checks that a client is still connected


@dataclass(frozen=True)
class Asked:
    """A chat request as the engine takes it; `thinking` if the prompt ends inside a thought."""

    prompt: Prompt
    decoding: Decoding
    thinking: bool

    def choice(self) -> Choice:
        """An empty answer to the request."""
        return Choice(AnswerReader(calls=self.decoding.calls is not None, thinking=self.thinking))


@dataclass
class Choice:
    """One answer as far as it is written, parsed by `reader` if there is one."""

    reader: AnswerReader | None = None
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    thought_tokens: int = 0
    finish_reason: str | None = None

    def add(self, piece: Piece) -> list[Said]:
        """Add the next piece; returns what the reader parsed from it."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason
        if self.reader is None:
            return []
        thinking = self.reader.thinking
        told = self.reader.add(piece.text, end=piece.finish_reason is not None)
        self.thought_tokens += len(piece.tokens) if thinking or self.reader.thinking else 0
        if self.reader.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return told


class Server(Reception):
    """The common work of the routes that generate answers."""

    def __init__(self, engine: Engine, rules: Rules):
        super().__init__(rules, Metrics(engine))
        self.engine = engine
        self._slow = ThreadPoolExecutor(SLOW_AT_ONCE, "media")
        self._told: set[asyncio.Queue[tuple[int, Piece]]] = set()  # queues of the answers that are being written

    def stop(self) -> None:
        """End all answers with an error, because the server shuts down. Must run in the event loop's thread."""
        for told in self._told:
            told.put_nowait((0, Piece("", error=Refused(503, "the server is being stopped", "stopping"))))

    def close(self) -> None:
        """Start opening no more media."""
        self._slow.shutdown(wait=False, cancel_futures=True)

    # requests

    async def asked(self, ask: ChatRequest) -> Asked:
        """Open the pictures and tokenise, in a thread. Raises InternVLError kinds."""
        model, thinking = self.engine.model, ask.thinks(default=self.rules.thinking)

        def prepare() -> tuple[Prompt, bool]:
            prompt, inside = prompt_of_request(ask, model, self.rules.media, thinking=thinking)
            return model.route(prompt), inside

        where = self._slow if takes_long(ask) else None
        prompt, inside = await asyncio.get_running_loop().run_in_executor(where, prepare)
        schema, calls = ask.schema_text, ask.calls
        decoding = self.decoding(
            ask,
            prompt,
            ask.most_tokens or (THINKING_TOKENS if thinking else None),
            logprobs=bool(ask.logprobs),
            top_logprobs=ask.top_logprobs or 0,
            json_schema=schema,
            calls=calls,
            thoughts=thinking and (schema is not None or (calls is not None and calls.required)),
        )
        return Asked(prompt, decoding, inside)

    async def plain_prompt(self, text: str) -> Prompt:
        """The prompt of a text without a chat template. Raises PromptError for an empty text."""
        ids = await asyncio.to_thread(self.engine.model.tokenizer.encode, text)
        if not ids:
            raise PromptError("the prompt is empty: write one")
        return Prompt(np.array(ids, np.int64), [])

    def decoding(self, ask: Writing, prompt: Prompt, most_tokens: int | None, **more: Any) -> Decoding:
        """Decoding options: the request's, then generation_config.json's, then the defaults of Decoding."""
        model = self.engine.model
        model.check(prompt)
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return decoding_of(
            model,
            most_tokens,
            model.config.context_length and model.config.context_length - len(prompt.ids),
            {name: getattr(ask, name) for name in names},
            presence_penalty=ask.presence_penalty or 0.0,
            frequency_penalty=ask.frequency_penalty or 0.0,
            seed=secrets.randbits(32) if ask.seed is None else ask.seed,
            stop_strings=tuple(ask.stops),
            ignore_eos=ask.ignore_eos,
            skip_special_tokens=ask.skip_special_tokens is not False,
            prompt_lookup_num_tokens=ask.prompt_lookup_num_tokens,
            **more,
        )

    # answers

    async def pieces(self, prompts: list[Prompt], decoding: Decoding, count: int) -> AsyncIterator[tuple[int, Piece]]:
        """`count` answers to each prompt, as (number, piece); all are cancelled if the caller stops reading."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()
        started, first, left = time.perf_counter(), True, len(prompts) * count

        def teller(number: int) -> Callable[[Piece], None]:
            def tell(piece: Piece) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(told.put_nowait, (number, piece))

            return tell

        cancels = []
        self._told.add(told)
        self.metrics.waiting.inc()
        try:
            for number in range(left):
                prompt = prompts[number // count]
                own = replace(decoding, seed=(decoding.seed or 0) + number % count)
                cancels.append(self.engine.start(prompt, own, teller(number)))
                self.metrics.prompt_tokens.inc(len(prompt.ids) if number % count == 0 else 0)
            tokens = 0
            async with asyncio.timeout(self.rules.limits.seconds):
                while left:
                    number, piece = await told.get()
                    if isinstance(piece.error, ProcessEnded):
                        raise Refused(503, str(piece.error), "process_ended", {"Retry-After": "1"})
                    if piece.error is not None:
                        raise piece.error
                    if first and piece.tokens:
                        self.metrics.waiting.dec()
                        self.metrics.first_token.observe(time.perf_counter() - started)
                        first, begun = False, time.perf_counter()
                    tokens += len(piece.tokens)
                    left -= piece.finish_reason is not None
                    yield number, piece
            self.metrics.new_tokens.inc(tokens)
            if tokens > 1:
                self.metrics.token.observe((time.perf_counter() - begun) / (tokens - 1))
        except TimeoutError:
            raise Refused(504, f"the answer took longer than {self.rules.limits.seconds:g} s", "timeout") from None
        finally:
            if first:
                self.metrics.waiting.dec()
            self._told.discard(told)
            for cancel in cancels:
                cancel()

    async def whole(
        self, request: Request, prompts: list[Prompt], decoding: Decoding, count: int, take: Callable[[int, Piece], Any]
    ) -> None:
        """Generate `count` whole answers to each prompt and `take` their pieces. Raises Refused if the client disconnects."""

        async def collect() -> None:
            async for number, piece in self.pieces(prompts, decoding, count):
                take(number, piece)

        work = asyncio.create_task(collect())
        try:
            while not work.done():
                await asyncio.wait([work], timeout=LOOK_SECONDS)
                if not work.done() and await request.is_disconnected():
                    raise Refused(499, "the client is gone", "gone")
            work.result()
        finally:
            work.cancel()

    def word(self, token: int) -> str:
        """The text of one token."""
        return self.engine.model.tokenizer.decode([token])

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        """Tokens and log probabilities in the form of chat completions."""

        def one(token: int, value: float) -> dict[str, Any]:
            word = self.word(token)
            return {"token": word, "logprob": value, "bytes": [*word.encode()]}

        return {"content": [one(t.id, t.logprob) | {"top_logprobs": [one(*other) for other in t.top]} for t in tokens]}

    def alternatives(self, count: int) -> int:
        """How many likeliest tokens to report per token; 1 becomes 0 on an engine without alternatives: the chosen one is it."""
        return count if count > 1 or self.engine.tells_alternatives else 0

    def old_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        """Tokens and log probabilities in the form of completions."""
        words = [self.word(token.id) for token in tokens]
        return {
            "tokens": words,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.word(i): value for i, value in token.top} for token in tokens]
            if any(t.top for t in tokens)
            else None,
            "text_offset": [*accumulate(map(len, words), initial=0)][:-1],
        }


def takes_long(ask: ChatRequest) -> bool:
    """Whether the request has slow media (web addresses, videos, documents), which get their own threads."""
    parts = [part for message in ask.messages if isinstance(message.content, list) for part in message.content]
    return any(
        is_web_address(part.image_url.url) if isinstance(part, ImagePart) else not isinstance(part, TextPart | RefusalPart)
        for part in parts
    )


def usage(prompts: list[Prompt], choices: list[Choice]) -> dict[str, Any]:
    """The numbers of prompt tokens and new tokens, in OpenAI's form."""
    read, written = sum(len(prompt.ids) for prompt in prompts), sum(len(choice.tokens) for choice in choices)
    thought = sum(choice.thought_tokens for choice in choices)
    details = {"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, **details}
