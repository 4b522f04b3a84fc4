"""OpenAI's routes that generate answers, whole or as a stream of events, over one engine.

Knows the forms of requests and answers; answering.py does the work in between.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from runtime.answer.chat_core import Prompt
from runtime.answer.decode import Decoding
from runtime.answer.reading import Said
from runtime.answer.tools import Call
from runtime.errors import InternVLError
from runtime.serve.answering import Asked, Choice, Server, usage
from runtime.serve.engine import Engine, Piece
from runtime.serve.protocol import ChatRequest, CompletionRequest, message_of, new_call_id, told_call
from runtime.serve.reception import Refused, Rules, base_app
from runtime.serve.responses import ResponsesRequest, ResponseWriter

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


def build_app(engine: Engine, rules: Rules) -> FastAPI:
    """The application over an engine, which it closes on shutdown. `app.state.stop()` ends all answers."""
    server = Server(engine, rules)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()
        await asyncio.to_thread(engine.close)

    app = base_app(server, life, lambda: engine.alive)
    app.state.stop = server.stop
    check_model = server.check_model

    @app.post("/v1/chat/completions")
    async def chat(ask: ChatRequest, request: Request) -> Any:
        check_model(ask.model)
        async with server.place():
            asked = await server.asked(ask)
            frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": rules.model_name}
            if not ask.stream:
                choices = [asked.choice() for _ in range(ask.count)]
                await server.whole(request, [asked.prompt], asked.decoding, ask.count, partial(_take, choices))
                said = [
                    {
                        "index": number,
                        "message": message_of(choice.reader),  # type: ignore[arg-type]
                        "logprobs": server.logprobs(choice.tokens) if ask.logprobs else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for number, choice in enumerate(choices)
                ]
                return {**frame, "object": "chat.completion", "choices": said, "usage": usage([asked.prompt], choices)}
        events = _chat_events(server, ask, asked, frame)
        return StreamingResponse(_told(server, events), media_type="text/event-stream")

    @app.post("/v1/responses")
    async def respond(ask: ResponsesRequest, request: Request) -> Any:
        check_model(ask.model)
        chat = ask.as_chat()
        async with server.place():
            asked = await server.asked(chat)
            choice, writer = asked.choice(), ResponseWriter(ask, rules.model_name, new_call_id)

            def take(_: int, piece: Piece) -> list[str]:
                return writer.add(choice.add(piece), server.logprobs([*piece.tokens])["content"] if chat.logprobs else [])

            if not ask.stream:
                await server.whole(request, [asked.prompt], asked.decoding, 1, take)
                writer.end(choice.finish_reason, usage([asked.prompt], [choice]))
                return writer.response

        async def events() -> AsyncIterator[str]:
            for event in writer.begin():
                yield event
            async for number, piece in server.pieces([asked.prompt], asked.decoding, 1):
                for event in take(number, piece):
                    yield event
            for event in writer.end(choice.finish_reason, usage([asked.prompt], [choice])):
                yield event

        return StreamingResponse(_told(server, events(), writer.fail, end=""), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def complete(ask: CompletionRequest, request: Request) -> Any:
        check_model(ask.model)
        texts = [ask.prompt] if isinstance(ask.prompt, str) else ask.prompt
        async with server.place():
            prompts = [await server.plain_prompt(text) for text in texts]
            longest = max(prompts, key=lambda prompt: len(prompt.ids))
            decoding = server.decoding(
                ask,
                longest,
                ask.max_tokens or COMPLETION_TOKENS,
                logprobs=ask.logprobs is not None,
                top_logprobs=server.alternatives(ask.logprobs or 0),
            )
            frame: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "model": rules.model_name}
            frame["created"] = int(time.time())
            if not ask.stream:
                choices = [Choice() for _ in range(len(prompts) * ask.count)]
                await server.whole(request, prompts, decoding, ask.count, partial(_take, choices))
                said = [
                    {
                        "index": number,
                        "text": (texts[number // ask.count] if ask.echo else "") + choice.text,
                        "logprobs": server.old_logprobs(choice.tokens) if ask.logprobs is not None else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for number, choice in enumerate(choices)
                ]
                return {**frame, "choices": said, "usage": usage(prompts, choices)}
        events = _text_events(server, ask, prompts, texts, decoding, frame)
        return StreamingResponse(_told(server, events), media_type="text/event-stream")

    return app


def _event(frame: dict[str, Any], choices: list[dict[str, Any]], **more: Any) -> str:
    return f"data: {json.dumps({**frame, 'choices': choices, **more}, ensure_ascii=False)}\n\n"


def _failed(message: str) -> str:
    return f"data: {json.dumps({'error': {'message': message, 'type': 'server_error', 'param': None, 'code': None}})}\n\n"


async def _told(
    server: Server, events: AsyncIterator[str], failed: Callable[[str], str] = _failed, *, end: str = "data: [DONE]\n\n"
) -> AsyncIterator[str]:
    """Events, then an error if there was one, then `end`: a stream that has begun cannot change its HTTP status."""
    try:
        async with server.place(sure=True):
            async for event in events:
                yield event
    except (Refused, InternVLError) as error:
        yield failed(str(error))
    if end:
        yield end


def _take(choices: list[Choice], number: int, piece: Piece) -> None:
    choices[number].add(piece)


def _delta(said: Said) -> dict[str, Any]:
    """The delta of a chunk for the next piece of an answer."""
    if said.name:
        return {"tool_calls": [{"index": said.call, **told_call(Call(said.name, ""))}]}
    if said.call is not None:
        return {"tool_calls": [{"index": said.call, "function": {"arguments": said.arguments}}]}
    return {"reasoning_content": said.thought} if said.thought else {"content": said.content}


async def _chat_events(server: Server, ask: ChatRequest, asked: Asked, frame: dict[str, Any]) -> AsyncIterator[str]:
    """The chunks of a streamed chat completion."""
    frame, choices = {**frame, "object": "chat.completion.chunk"}, [asked.choice() for _ in range(ask.count)]
    for number in range(ask.count):
        yield _event(frame, [{"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    async for number, piece in server.pieces([asked.prompt], asked.decoding, ask.count):
        choice = choices[number]
        deltas = [_delta(said) for said in choice.add(piece)]
        logprobs = server.logprobs([*piece.tokens]) if ask.logprobs and piece.tokens else None
        if not deltas and (logprobs or choice.finish_reason):
            deltas = [{}]
        for place, delta in enumerate(deltas):
            reason = choice.finish_reason if place == len(deltas) - 1 else None
            chunk = {"index": number, "delta": delta, "logprobs": None if place else logprobs, "finish_reason": reason}
            yield _event(frame, [chunk])
    if ask.stream_options is not None and ask.stream_options.include_usage:
        yield _event(frame, [], usage=usage([asked.prompt], choices))


async def _text_events(
    server: Server, ask: CompletionRequest, prompts: list[Prompt], texts: list[str], decoding: Decoding, frame: dict[str, Any]
) -> AsyncIterator[str]:
    """The chunks of a streamed text completion."""
    choices = [Choice() for _ in range(len(prompts) * ask.count)]
    for number in range(len(prompts) * ask.count if ask.echo else 0):
        yield _event(frame, [{"index": number, "text": texts[number // ask.count], "logprobs": None, "finish_reason": None}])
    async for number, piece in server.pieces(prompts, decoding, ask.count):
        choices[number].add(piece)
        logprobs = server.old_logprobs([*piece.tokens]) if ask.logprobs is not None else None
        if piece.text or logprobs or piece.finish_reason:
            yield _event(frame, [{"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}])
    if ask.stream_options is not None and ask.stream_options.include_usage:
        yield _event(frame, [], usage=usage(prompts, choices))
