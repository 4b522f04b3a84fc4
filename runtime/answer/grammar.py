"""Constrained decoding: which tokens may come next in an answer that fits a JSON schema or calls functions.

The only file that knows llguidance. Knows a tokenizer and token ids; decode.py chooses among the allowed tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.answer.reading import THOUGHT_END, THOUGHT_START
from runtime.answer.tools import CALL_END, CALL_START, CALL_TAIL, CallRule, call_head
from runtime.errors import OptionError, not_installed
from runtime.folder.tokenizer import WRITABLE, Tokenizer, check_text

MOST_BYTES, MOST_NESTED = 16 << 10, 40  # of a schema: compiling a deep one takes minutes

TEXT, GAP = r"TEXT: /(.|\n)+/", r"gap: /\n{0,2}/"
WHITE_SPACE = r"[ \n]{0,8}"  # between JSON tokens: unbounded, some models would write nothing else


class Grammars:
    """Compiles grammars for one tokenizer; reads its vocabulary once (a second for 150,000 tokens).

    Raises OptionError where the library is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]):
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise not_installed(error, "serve", "; it makes answers follow a JSON schema") from None
        self._library = llguidance
        self._tokens = llguidance.LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=[*ends])
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def of(self, schema: str | None, calls: CallRule | None = None, *, thoughts: bool = False) -> Grammar:
        """The grammar of one answer that fits a schema or may call functions; with `thoughts`, a thought comes first.

        Raises OptionError for an unsupported schema.
        """
        if schema is not None:
            check_bounds(schema)
            rules = [f"answer: {_json(schema)}"]
        else:
            assert calls is not None
            check_calls(calls)
            rules = self._rules_of(calls)
        rules = ["start: thought gap answer" if thoughts else "start: answer", *self._thought(), *rules]
        grammar = self._library.LLMatcher.grammar_from_lark("\n".join(["%llguidance {}", *rules]))
        try:
            wrong = self._library.LLMatcher.validate_grammar(grammar, self._tokens)
        except ValueError as error:
            wrong = str(error)
        if wrong and not wrong.startswith("WARNING"):
            raise OptionError(f"the JSON schema cannot be followed ({' '.join(wrong.split())[:200]})")
        return Grammar(self._library.LLMatcher(self._tokens, grammar, log_level=0), self._vocabulary)

    def _thought(self) -> list[str]:
        """The rules of a thought and of the gap after it."""
        if self._has(THOUGHT_START):
            return [f"thought: {THOUGHT_START} TEXT? {THOUGHT_END}", GAP, TEXT]
        return [r"thought[lazy]: /<think>(.|\n)*<\/think>/", GAP, TEXT]

    def _rules_of(self, calls: CallRule) -> list[str]:
        """The rules of an answer with calls. A call must fit its schema from its start mark on.

        Where the mark is a token, text contains neither it nor other tokens in angle brackets, except writable ones.
        """
        token = self._has(CALL_START)
        start, end = (CALL_START, CALL_END) if token else (json.dumps(CALL_START), json.dumps(CALL_END))
        names = [f"call_{number}" for number in range(len(calls.functions))]
        bodies = [
            f"{name}: {json.dumps(call_head(function))} {_json(schema)} {json.dumps(CALL_TAIL)} {end}"
            for name, (function, schema) in zip(names, calls.functions, strict=True)
        ]
        body = f"({' | '.join(names)})"
        if calls.required:
            more = f'("\\n" {start} {body})*' if calls.several else ""
            return [f"answer: {start} {body} {more}", *bodies]
        others = [self._tokenizer.convert_tokens_to_ids(mark) for mark in WRITABLE if mark not in (CALL_START, CALL_END)]
        marks = ",".join(str(number) for number in others if number is not None)
        words = f"words: TEXT? (<[{marks}]>+ TEXT?)*" if marks else "words: TEXT?"
        lead = f"lead: words {start}" if token else f"lead[lazy]: /(.|\\n)*/ {start}"
        answer = f"(lead {body})* words" if calls.several else f"lead {body} | words"
        return [f"answer: {answer}", lead, words, *bodies]

    def _has(self, mark: str) -> bool:
        return self._tokenizer.convert_tokens_to_ids(mark) is not None


def _json(schema: str) -> str:
    return "%json " + json.dumps(json.loads(schema) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}})


class Grammar:
    """The grammar state of one answer."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher = matcher
        self._bits = np.zeros(-(-vocabulary // 32), np.int32)

    @property
    def ended(self) -> bool:
        """Whether no further token is allowed."""
        return bool(self._matcher.is_stopped())

    def allow(self, scores: np.ndarray) -> None:
        """Set the scores (V,) of tokens that must not come next to -inf."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(scores)]
        scores[: len(allowed)][allowed == 0] = -np.inf

    def take(self, token: int) -> None:
        """Advance by a chosen token."""
        self._matcher.consume_token(token)


def check_bounds(schema: str) -> None:
    """Raise OptionError unless a schema is a JSON object, small and shallow enough to compile in time."""
    check_text(schema)
    try:
        read = json.loads(schema)
    except ValueError as error:
        raise OptionError(f"the JSON schema is not JSON ({error})") from None
    if not isinstance(read, dict):
        raise OptionError(f"the JSON schema is a {type(read).__name__}, expected an object")
    if len(schema.encode()) > MOST_BYTES or _depth(read) > MOST_NESTED:
        raise OptionError(
            f"the JSON schema has more than {MOST_BYTES >> 10} KB or is nested more than {MOST_NESTED} deep: simplify it"
        )


def check_calls(calls: CallRule) -> None:
    """Raise OptionError for functions whose argument schemas fail `check_bounds`."""
    for name, schema in calls.functions:
        try:
            check_bounds(schema)
        except OptionError as error:
            raise OptionError(f"tool {name}: {error}") from None


def _depth(value: Any) -> int:
    """Nesting depth of lists and objects, without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth
