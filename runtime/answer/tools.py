"""Functions that a model may call: the format of their list in the system message, of calls in answers, of results.

The format is that of Qwen's language models, which is Hermes': the chat template in tokenizer_config.json of
Qwen/Qwen2.5-7B-Instruct and Qwen/Qwen3-8B. Knows texts; grammar.py restricts the tokens, and the server takes the requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import OptionError
from runtime.folder.config import InternVLConfig
from runtime.folder.tokenizer import Typed

TRAINED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")  # language models trained with this format
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESULT_START, RESULT_END = "<tool_response>\n", "\n</tool_response>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')  # the beginning of a call, for parsing
ANY_OBJECT = '{"type": "object", "properties": {}}'
_BEFORE = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


@dataclass(frozen=True)
class CallRule:
    """Which functions an answer may call: names with JSON schemas of their arguments, as text.

    `required`: the answer must be a call. `several`: it may contain more than one.
    """

    functions: tuple[tuple[str, str], ...]
    required: bool = False
    several: bool = True


@dataclass(frozen=True)
class Call:
    """A function call, with its arguments as JSON text."""

    name: str
    arguments: str


def check_language(config: InternVLConfig) -> None:
    """Raise OptionError for a model whose language model was not trained with this format."""
    if config.language_architecture not in TRAINED:
        raise OptionError(
            f"this model's language model ({config.language_architecture}) was not trained to call tools; those of "
            "InternVL2-1B, 2.5, 3 and 3.5 with Qwen2 or Qwen3 were: leave tools out"
        )


def with_tools(system: str, functions: Sequence[Mapping[str, Any]]) -> str:
    """The system message with the functions, each in OpenAI's format: name, description, parameters."""
    lines = (json.dumps({"type": "function", "function": function}, ensure_ascii=False) for function in functions)
    return (system + _BEFORE if system else _BEFORE.lstrip("\n")) + "".join(f"\n{line}" for line in lines) + _AFTER


def call_head(name: str) -> str:
    """The text between the start of a call and its arguments."""
    return f'\n{{"name": {json.dumps(name)}, "arguments": '


CALL_TAIL = "}\n"  # between the arguments and the end of a call


def written_answer(text: str, calls: Sequence[Call]) -> str:
    """An answer of the history with its calls, in the format of the model."""
    said = [CALL_START + call_head(call.name) + call.arguments + CALL_TAIL + CALL_END for call in calls]
    return "\n".join(([text] if text else []) + said)


def written_result(text: str) -> list[str]:
    """The result of a function as pieces of a question; only the result is Typed."""
    return [RESULT_START, Typed(text), RESULT_END]
