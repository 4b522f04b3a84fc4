"""The tokenizer of InternVL-C and -G: texts to token ids and back, by the checkpoint's own SentencePiece model.

Uses SentencePiece itself: many Chinese pieces of the model have equal scores, and SentencePiece breaks ties by a rule of its own.
Knows nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.errors import TokenizerError, not_installed
from runtime.folder.contrastive import QLlamaConfig
from runtime.folder.files import SENTENCEPIECE_FILE


class Sentences:
    """A SentencePiece model. Raises TokenizerError when its file is missing or broken, OptionError without sentencepiece."""

    def __init__(self, folder: Path, config: QLlamaConfig):
        file = folder / SENTENCEPIECE_FILE
        if not file.exists():
            raise TokenizerError(
                f"{folder} has no {SENTENCEPIECE_FILE}: words cannot be read, give token ids, or put the checkpoint's file there"
            )
        try:
            import sentencepiece
        except ModuleNotFoundError as error:
            raise not_installed(error, "search") from None
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError, TypeError) as error:
            raise TokenizerError(f"{file} cannot be read ({error}): fetch it again") from None
        self._config = config

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self._pieces.vocab_size()

    def encode(self, text: str, *, end: bool) -> list[int]:
        """The BOS token and the tokens of the text; with `end` also the EOS token."""
        return [self._config.bos_token_id, *self._pieces.encode(text), *([self._config.eos_token_id] if end else [])]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens and surrounding spaces."""
        return str(self._pieces.decode([i for i in ids if i < self.size])).strip()
