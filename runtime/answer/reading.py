"""An incremental parser of answers: thoughts, content, and function calls with their arguments.

Text comes in pieces of any size, and is returned as soon as it is clear what it belongs to. Knows the marks, no tokens and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.answer.tools import CALL_END, CALL_START, HEAD, Call

THOUGHT_START, THOUGHT_END = "<think>", "</think>"


@dataclass(frozen=True)
class Said:
    """A parsed piece: thought, content, or of call number `call` first its `name`, then parts of its arguments."""

    thought: str = ""
    content: str = ""
    call: int | None = None
    name: str = ""
    arguments: str = ""


class AnswerReader:
    """Parses one answer. `calls`: it may contain calls. `thinking`: the prompt ends inside a thought."""

    def __init__(self, *, calls: bool = False, thinking: bool = False):
        self.thought, self.content, self.calls = "", "", list[Call]()
        self._may_call = calls
        self._left = ""  # received, and not returned yet
        self._state = self._thought if thinking else self._begin
        self._fresh = True  # no content since a thought or a call
        self._json = _JsonEnd()

    @property
    def thinking(self) -> bool:
        """Whether the answer is inside a thought."""
        return self._state == self._thought

    def add(self, text: str, *, end: bool = False) -> list[Said]:
        """The pieces that have become certain; with `end`, all that is left."""
        self._left += text
        told: list[Said] = []
        state = None
        while state != self._state:  # each state runs until it needs more text or hands over
            state = self._state
            told += [self._noted(said) for said in state(end)]
        return told

    def _noted(self, said: Said) -> Said:
        self.thought += said.thought
        self.content += said.content
        if said.name:
            self.calls.append(Call(said.name, ""))
        elif said.call is not None:
            self.calls[-1] = Call(self.calls[-1].name, self.calls[-1].arguments + said.arguments)
        return said

    def _begin(self, end: bool) -> Iterator[Said]:
        text = self._left.lstrip()
        if text.startswith(THOUGHT_START):
            self._left, self._state = text.removeprefix(THOUGHT_START), self._thought
        elif end or not THOUGHT_START.startswith(text):
            self._state = self._words
        yield from ()

    def _thought(self, end: bool) -> Iterator[Said]:
        if not self.thought:
            self._left = self._left.lstrip("\n")
        before, mark, after = self._left.partition(THOUGHT_END)
        if mark:
            self._left, self._state = after, self._words
            before = before.rstrip("\n")
        else:
            before, self._left = (before, "") if end else _certain(before, THOUGHT_END, "\n")
        if before:
            yield Said(thought=before)

    def _words(self, end: bool) -> Iterator[Said]:
        if self._fresh:
            self._left = self._left.lstrip()
        if not self._may_call:
            before, self._left = self._left, ""
        else:
            before, mark, after = self._left.partition(CALL_START)
            if mark:
                self._left, self._state = after, self._head
                before = before.rstrip()
            else:
                before, self._left = (before, "") if end else _certain(before, CALL_START, None)
        if before:
            line = "\n" if self._fresh and self.content else ""  # after a call
            self._fresh = False
            yield Said(content=line + before)

    def _head(self, end: bool) -> Iterator[Said]:
        found = HEAD.match(self._left)
        if found and len(found[0]) < len(self._left):
            self._left, self._state, self._json = self._left[found.end() :], self._arguments, _JsonEnd()
            yield Said(call=len(self.calls), name=str(json.loads(found[1])))
        elif CALL_END in self._left or end:  # no call after all
            before, mark, self._left = self._left.partition(CALL_END)
            self._state = self._words
            if before.strip():
                yield Said(content=CALL_START + before + mark)

    def _arguments(self, end: bool) -> Iterator[Said]:
        length = self._json.length(self._left)
        if length is not None:
            self._state = self._tail
        now, self._left = self._left[:length], "" if length is None else self._left[length:]
        if now:
            yield Said(call=len(self.calls) - 1, arguments=now)

    def _tail(self, end: bool) -> Iterator[Said]:
        _, mark, after = self._left.partition(CALL_END)
        if mark:
            self._left, self._state, self._fresh = after, self._words, True
        elif end:
            self._left = ""
        yield from ()


class _JsonEnd:
    """Finds the end of a JSON object or list that comes in pieces, by counting brackets outside strings."""

    def __init__(self) -> None:
        self._depth, self._in_text, self._escaped = 0, False, False

    def length(self, text: str) -> int | None:
        """How many characters of this piece belong to the value; None if all do and the value goes on."""
        for at, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped, self._in_text = letter == "\\", letter != '"'
            elif letter == '"':
                self._in_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + (self._depth == 0)
        return None


def _certain(text: str, mark: str, spaces: str | None) -> tuple[str, str]:
    """A text -> the part that is certain, and the rest: a possible beginning of a mark, with the white space before it."""
    begun = next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
    sure = text[: len(text) - begun].rstrip(spaces)
    return sure, text[len(sure) :]
