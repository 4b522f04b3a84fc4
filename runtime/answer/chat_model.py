"""The public calls of an opened model, for any backend: conversations, and batches of questions.

Combines the chat core and its conversations; knows no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.answer.chat_core import ChatCore
from runtime.answer.conversation import Conversation
from runtime.answer.decode import Decoding
from runtime.answer.stream import Statistics, TextStream
from runtime.answer.turn import Question
from runtime.errors import OptionError
from runtime.progress import Progress


class ChatModel(ChatCore):
    """A chat core with conversations and batches."""

    def start_conversation(self, system: str | None = None) -> Conversation:
        """Start a new conversation; `system` is the system message, by default the model's."""
        return Conversation(self, self.system_message if system is None else system)

    def ask_batch(
        self,
        questions: Sequence[str | Question],
        *,
        system: str | None = None,
        statistics: Statistics | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[str]:
        """The answers to a batch of questions, each without a history.

        A question is a text, or a Question with its pictures. `options` are those of Decoding, by transformers' names;
        `num_return_sequences` gives that many answers per question, one after the other. Raises subclasses of InternVLError.
        """
        if not questions:
            return []
        if isinstance(questions, str):
            raise OptionError("ask_batch takes a list of questions: ask one in a conversation, or in a list of one")
        decoding = self.decoding_of(options)
        turns = [self.open_turn(one if isinstance(one, Question) else Question(one), progress) for one in questions]
        prompts = [self.prompt_of(self.system_message if system is None else system, [turn]) for turn in turns]
        answers = self.answers(prompts, decoding, statistics, progress)
        return [self._text_of([token.id for token in tokens], decoding) for tokens in answers]

    def text_of(self, decoding: Decoding) -> TextStream:
        """The text stream of one answer with these decoding options."""
        skips = decoding.skip_special_tokens
        return TextStream(self.tokenizer, self.conv_template, decoding.stop_strings, skip_special_tokens=skips)

    def _text_of(self, ids: Sequence[int], decoding: Decoding) -> str:
        stream = self.text_of(decoding)
        return "".join([*(stream.add(token) for token in ids), stream.end()])
