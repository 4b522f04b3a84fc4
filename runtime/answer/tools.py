"""Functions that a model may call: how they stand in the system message, a call in an answer, a result in a question.

The form is the one that Qwen's language models were trained with, which is Hermes': the chat template in tokenizer_config.json of
Qwen/Qwen2.5-7B-Instruct and Qwen/Qwen3-8B. Knows texts; which tokens an answer may have is the grammar's, who asks is the server's.
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

TRAINED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")  # language models that know this form
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESULT_START, RESULT_END = "<tool_response>\n", "\n</tool_response>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')  # of a call that is read
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

    `required` answers are a call, `several` may be more than one.
    """

    functions: tuple[tuple[str, str], ...]
    required: bool = False
    several: bool = True


@dataclass(frozen=True)
class Call:
    """One call of a function, with its arguments as JSON text."""

    name: str
    arguments: str


def check_language(config: InternVLConfig) -> None:
    """Raise OptionError for a model whose language model was not trained with this form."""
    if config.language_architecture not in TRAINED:
        raise OptionError(
            f"this model's language model ({config.language_architecture}) was not trained to call tools; those of "
            "InternVL2-1B, 2.5, 3 and 3.5 with Qwen2 or Qwen3 were: leave tools out"
        )


def with_tools(system: str, functions: Sequence[Mapping[str, Any]]) -> str:
    """The system message that tells of functions, each as OpenAI has it: name, description, parameters."""
    lines = (json.dumps({"type": "function", "function": function}, ensure_ascii=False) for function in functions)
    return (system + _BEFORE if system else _BEFORE.lstrip("\n")) + "".join(f"\n{line}" for line in lines) + _AFTER


def call_head(name: str) -> str:
    """What stands between the start of a call and its arguments."""
    return f'\n{{"name": {json.dumps(name)}, "arguments": '


CALL_TAIL = "}\n"  # between the arguments and the end of a call


def written_answer(text: str, calls: Sequence[Call]) -> str:
    """An answer of the history with its calls, as the model wrote it."""
    said = [CALL_START + call_head(call.name) + call.arguments + CALL_TAIL + CALL_END for call in calls]
    return "\n".join(([text] if text else []) + said)


def written_result(text: str) -> list[str]:
    """What a function returned, as pieces of a question: the marks around it are ours."""
    return [RESULT_START, Typed(text), RESULT_END]
