"""/v1/responses, OpenAI's newer route, without stored state: texts, pictures, tools and thoughts, whole or streamed.

A request becomes one of chat completions; this file has its fields, and writes the answer in this route's form. Field and event
names are those of openai/openai-python@v3.57.0 src/openai/types/responses. Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, StrictBool, Tag, ValidationInfo, model_validator

from runtime.answer.reading import Said
from runtime.serve.protocol import (
    MOST_MESSAGES,
    MOST_PARTS,
    MOST_TOOLS,
    MOST_TOP_LOGPROBS,
    NUMBER,
    ChatRequest,
    Effort,
    Function,
    Request,
)

REFUSED = {  # fields that are refused, since ignoring them would mislead, and why
    "access_programs": "there are no such programs",
    "background": "nothing is stored: the answer comes on this connection",
    "context_management": "prompts are never shortened",
    "conversation": "nothing is stored: send the whole input",
    "image": "the models make no pictures",
    "moderation": "there is no moderation",
    "previous_response_id": "nothing is stored: send the whole input",
    "prompt": "no prompts are stored: send the text",
}
IGNORED = (  # fields that change no answer here
    *("background_options", "max_tool_calls", "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    *("safety_identifier", "service_tier", "store", "user"),
)
LOGPROBS = "message.output_text.logprobs"  # a value of `include`


class InputText(BaseModel):
    type: Literal["input_text", "output_text", "summary_text", "reasoning_text"]
    text: str


class InputImage(BaseModel):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class InputFile(BaseModel):
    type: Literal["input_file"]
    file_data: str
    filename: str | None = None


class Refusal(BaseModel):
    type: Literal["refusal"]
    refusal: str


Content = Annotated[InputText | InputImage | InputFile | Refusal, Field(discriminator="type")]
Contents = Annotated[list[Content], Field(max_length=MOST_PARTS)]


class MessageItem(BaseModel):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Contents


class CallItem(BaseModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResultItem(BaseModel):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Contents


class ThoughtItem(BaseModel):
    type: Literal["reasoning"]
    content: list[InputText] | None = None


def _kind(item: Any) -> str:
    """The type of an item; a message may leave it out."""
    return str(item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message"))


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Function):
    type: Literal["function"]


class NamedFunction(BaseModel):
    type: Literal["function"]
    name: str


class Format(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class Text(BaseModel):
    format: Format | None = None


class Reasoning(BaseModel):
    effort: Effort | None = None


def _refuse(value: Any, info: ValidationInfo) -> Any:
    if value:
        raise ValueError(f"not supported here: {REFUSED[str(info.field_name)]}")
    return value


Nothing = Annotated[Any, AfterValidator(_refuse)]


class ResponsesRequest(Request):
    """The request body of /v1/responses."""

    model: str = ""
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    stream: StrictBool | None = False
    max_output_tokens: Annotated[int, NUMBER, Field(ge=1)] | None = None
    temperature: Annotated[float, NUMBER, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, NUMBER, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, NUMBER, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: StrictBool | None = True
    text: Text | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    stream_options: dict[str, Any] | None = None
    access_programs: Nothing = None
    background: Nothing = None
    context_management: Nothing = None
    conversation: Nothing = None
    image: Nothing = None
    moderation: Nothing = None
    previous_response_id: Nothing = None
    prompt: Nothing = None

    @model_validator(mode="after")
    def is_a_chat(self) -> ResponsesRequest:
        """Apply the checks of chat completions."""
        self.as_chat()
        return self

    def as_chat(self) -> ChatRequest:
        """This request as one of chat completions. Raises ValueError."""
        shape = self.text.format if self.text and self.text.format else Format(schema=None)
        wanted: dict[str, Any] = {"type": shape.type}
        if shape.type == "json_schema":
            if shape.schema_ is None:
                raise ValueError("text.format: a schema is missing")
            wanted["json_schema"] = {"schema": shape.schema_}
        chosen: Any = self.tool_choice
        if isinstance(chosen, NamedFunction):
            chosen = {"type": "function", "function": {"name": chosen.name}}
        tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or []]
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": self._messages(),
                "stream": self.stream,
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "logprobs": LOGPROBS in (self.include or []) or bool(self.top_logprobs),
                "top_logprobs": self.top_logprobs,
                "tools": tools or None,
                "tool_choice": chosen,
                "parallel_tool_calls": self.parallel_tool_calls is not False,
                "response_format": wanted,
                "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            }
        )

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        thought = ""
        for item in [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input:
            if isinstance(item, ThoughtItem):
                thought = "\n".join(part.text for part in item.content or [])
            elif isinstance(item, CallItem):
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                messages.append({"role": "assistant", "tool_calls": [call], "reasoning_content": thought})
            elif isinstance(item, ResultItem):
                messages.append({"role": "tool", "content": _content(item.output)})
            else:
                own = {"reasoning_content": thought} if item.role == "assistant" else {}
                messages.append({"role": item.role, "content": _content(item.content), **own})
            thought = thought if isinstance(item, ThoughtItem) else ""
        return messages


def _content(given: str | list[Content]) -> str | list[dict[str, Any]]:
    """Content in the form of chat completions."""
    if isinstance(given, str):
        return given
    made: list[dict[str, Any]] = []
    for part in given:
        if isinstance(part, InputImage):
            detail = {} if part.detail in (None, "original") else {"detail": part.detail}
            made.append({"type": "image_url", "image_url": {"url": part.image_url, **detail}})
        elif isinstance(part, InputFile):
            made.append({"type": "file", "file": {"file_data": part.file_data}})
        else:
            made.append({"type": "text", "text": part.refusal if isinstance(part, Refusal) else part.text})
    return made


class ResponseWriter:
    """One response in progress: its items so far, and the events that stream it."""

    def __init__(self, ask: ResponsesRequest, model: str, new_call_id: Callable[[], str]):
        self._new_call_id, self._count = new_call_id, 0
        shape = Format(schema=None) if ask.text is None or ask.text.format is None else ask.text.format
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": ask.instructions,
            "max_output_tokens": ask.max_output_tokens,
            "model": model,
            "output": [],
            "parallel_tool_calls": ask.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": ask.reasoning.effort if ask.reasoning else None, "summary": None},
            "store": False,
            "temperature": ask.temperature,
            "text": {"format": shape.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": ask.tool_choice.model_dump()
            if isinstance(ask.tool_choice, NamedFunction)
            else ask.tool_choice or "auto",
            "tools": [{"strict": False, **tool.model_dump()} for tool in ask.tools or []],
            "top_p": ask.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": {},
        }
        self._item: dict[str, Any] | None = None  # in progress

    def begin(self) -> list[str]:
        """The events before the first text."""
        return [self._event(kind, response=self.response) for kind in ("response.created", "response.in_progress")]

    def add(self, told: Iterable[Said], logprobs: list[dict[str, Any]]) -> list[str]:
        """The events of new pieces, which have these log probabilities."""
        return [event for said in told for event in self._said(said, logprobs)]

    def end(self, finish_reason: str | None, usage: dict[str, Any]) -> list[str]:
        """The last events; `response` is final after them."""
        cut = finish_reason == "length"
        events = [*self._close("incomplete" if cut else "completed")]
        self.response["status"] = "incomplete" if cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self.response["completed_at"] = None if cut else int(time.time())
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage.get("completion_tokens_details", {"reasoning_tokens": 0}),
            "total_tokens": usage["total_tokens"],
        }
        return [*events, self._event(f"response.{self.response['status']}", response=self.response)]

    def fail(self, message: str) -> str:
        """The event of an answer that failed."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return self._event("response.failed", response=self.response)

    def _event(self, kind: str, **fields: Any) -> str:
        told = json.dumps({"type": kind, "sequence_number": self._count, **fields}, ensure_ascii=False)
        self._count += 1
        return f"event: {kind}\ndata: {told}\n\n"

    def _said(self, said: Said, logprobs: list[dict[str, Any]]) -> Iterator[str]:
        if said.name:
            item = {"type": "function_call", "call_id": self._new_call_id(), "name": said.name, "arguments": ""}
            yield from self._open(item, "fc")
        elif said.call is not None:
            yield from self._grow("response.function_call_arguments.delta", "arguments", said.arguments)
        elif said.thought:
            if self._item is None or self._item["type"] != "reasoning":
                yield from self._open({"type": "reasoning", "summary": [], "content": []}, "rs")
            yield from self._grow("response.reasoning_text.delta", "text", said.thought, content_index=0)
        else:
            if self._item is None or self._item["type"] != "message":
                yield from self._open({"type": "message", "role": "assistant", "content": []}, "msg")
            assert self._item is not None
            self._item["content"][0]["logprobs"] += logprobs
            yield from self._grow("response.output_text.delta", "text", said.content, content_index=0, logprobs=logprobs)

    @property
    def _where(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}

    def _open(self, item: dict[str, Any], short: str) -> Iterator[str]:
        yield from self._close("completed")
        self._item = {"id": f"{short}_{uuid.uuid4().hex}", "status": "in_progress", **item}
        self.response["output"].append(self._item)
        yield self._event("response.output_item.added", output_index=self._where["output_index"], item=self._item)
        if "content" in item:
            thinks = item["type"] == "reasoning"
            part = (
                {"type": "reasoning_text", "text": ""}
                if thinks
                else {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            )
            self._item["content"] = [part]
            yield self._event("response.content_part.added", **self._where, content_index=0, part=part)

    def _grow(self, kind: str, field: str, text: str, **more: Any) -> Iterator[str]:
        assert self._item is not None
        (self._item if field == "arguments" else self._item["content"][0])[field] += text
        yield self._event(kind, **self._where, delta=text, **more)

    def _close(self, status: str) -> Iterator[str]:
        item = self._item
        if item is None:
            return
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._where, **done)
        else:
            part = item["content"][0]
            thinks, text = item["type"] == "reasoning", {"text": part["text"], "content_index": 0}
            kind = "response.reasoning_text.done" if thinks else "response.output_text.done"
            yield self._event(kind, **self._where, **text, **({} if thinks else {"logprobs": part["logprobs"]}))
            yield self._event("response.content_part.done", **self._where, content_index=0, part=part)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=self._where["output_index"], item=item)
        self._item = None
