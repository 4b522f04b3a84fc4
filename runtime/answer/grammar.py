"""Answers that fit a JSON schema: which tokens may come next.

The only file that knows llguidance. Knows a tokenizer and token ids; the choice among the tokens that may come is the decoding's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.errors import OptionError, not_installed
from runtime.folder.tokenizer import Tokenizer

MOST_BYTES, MOST_NESTED = 16 << 10, 40  # of a schema: compiling a deep one takes minutes

WHITE_SPACE = r"[ \n]{0,8}"  # between the parts of an answer: some models would write nothing else


class Grammars:
    """Makes the grammars of answers for one tokenizer, whose vocabulary is read once (a second for 150,000 tokens).

    Raises OptionError where the library is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]):
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise not_installed(error, "serve", "; it writes answers after a JSON schema") from None
        self._library = llguidance
        self._tokens = llguidance.LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=[*ends])
        self._vocabulary = vocabulary

    def of(self, schema: str) -> Grammar:
        """The grammar of one answer that fits a schema. Raises OptionError for a schema that cannot be followed."""
        check_bounds(schema)
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": WHITE_SPACE})
            wrong = self._library.LLMatcher.validate_grammar(grammar, self._tokens)
        except ValueError as error:
            wrong = str(error)
        if wrong and not wrong.startswith("WARNING"):
            raise OptionError(f"the JSON schema cannot be followed ({' '.join(wrong.split())[:200]})")
        return Grammar(self._library.LLMatcher(self._tokens, grammar, log_level=0), self._vocabulary)


class Grammar:
    """One answer as far as it is written."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher = matcher
        self._bits = np.zeros(-(-vocabulary // 32), np.int32)

    @property
    def ended(self) -> bool:
        """Whether nothing can come any more."""
        return bool(self._matcher.is_stopped())

    def allow(self, scores: np.ndarray) -> None:
        """Take the chance from the tokens (V,) that must not come next."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(scores)]
        scores[: len(allowed)][allowed == 0] = -np.inf

    def take(self, token: int) -> None:
        """A token was chosen."""
        self._matcher.consume_token(token)


def check_bounds(schema: str) -> None:
    """Raise OptionError for what is no JSON object, or a schema that is larger or nested deeper than can be followed in time."""
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


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth
