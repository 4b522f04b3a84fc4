"""The tokenizer of a model folder: text to token ids and back, by the tokenizers library alone.

Reads tokenizer.json and the added tokens of tokenizer_config.json; knows no prompts. Method and option names are transformers'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.decoders import DecodeStream

from runtime.errors import PromptError, TokenizerError
from runtime.folder.files import TOKENIZER_CONFIG_FILE, TOKENIZER_JSON_FILE


class Tokenizer:
    """A tokenizer of the tokenizers library; several threads may use it."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a model folder. Raises TokenizerError when a file is missing or cannot be read."""
        file = folder / TOKENIZER_JSON_FILE
        if not file.exists():
            raise TokenizerError(
                f"{folder} has no {file.name}: convert the checkpoint again, or put the {file.name} of its tokenizer there "
                "(transformers' AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(FOLDER) writes it)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
            _add_missing(backend, folder / TOKENIZER_CONFIG_FILE)
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} cannot be read ({error}): fetch the tokenizer files again") from None
        return cls(backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises PromptError for what is no text."""
        check_text(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of one token, None where there is none."""
        return self.backend.token_to_id(token)

    def decode_stream(self) -> TokenDecoder:
        """What turns the tokens of one answer into text as they come."""
        return TokenDecoder(self.backend)


class TokenDecoder:
    """Tokens of one answer, one after the other -> text, as soon as it is whole characters; special tokens are left out."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend, self._stream = backend, DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """The text that this token completes."""
        return self._stream.step(self._backend, token) or ""


def check_text(text: Any) -> None:
    """Raise PromptError for what cannot be tokenised: no text at all, or half of a character."""
    if not isinstance(text, str):
        raise PromptError(f"a {type(text).__name__} is no text: give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text has half of a character in it, the lone surrogate U+{ord(text[error.start]):04X} at place {error.start}: "
            "leave it out, or decode the text with errors='replace'"
        ) from None


def _add_missing(backend: tokenizers.Tokenizer, file: Path) -> None:
    """Add the tokens that tokenizer_config.json names and tokenizer.json lacks, as transformers does. Raises TokenizerError."""
    if not file.exists():
        return
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
        tokens = sorted((int(number), token) for number, token in named.items())
    except (ValueError, AttributeError, TypeError) as error:
        raise TokenizerError(f"{file} cannot be read ({error}): fetch the tokenizer files again") from None
    for number, token in tokens:
        if backend.token_to_id(token["content"]) is None:
            backend.add_tokens([AddedToken(**{key: value for key, value in token.items() if key != "__type"})])
        if backend.token_to_id(token["content"]) != number:
            raise TokenizerError(
                f"{file} gives {token['content']} the id {number}, {TOKENIZER_JSON_FILE} "
                f"{backend.token_to_id(token['content'])}: the files are of two tokenizers; fetch them again"
            )
