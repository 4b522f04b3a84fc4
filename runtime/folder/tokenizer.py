"""The tokenizer of a model folder: text to token ids and back, by the tokenizers library alone.

Reads tokenizer.json and the added tokens of tokenizer_config.json. Of prompts it knows only which pieces a user typed. Method
and option names are transformers'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.decoders import DecodeStream

from runtime.errors import PromptError, TokenizerError
from runtime.folder.files import TOKENIZER_CONFIG_FILE, TOKENIZER_JSON_FILE

PLACE_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
WRITABLE = (  # added tokens that stay tokens in typed text too: boxes, thoughts and calls; none of them ends a turn
    *PLACE_TOKENS,
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
)
GUARDS = "\ufdd0", "\ufdd1"  # enclose special tokens of the template, where typed ones are text; Unicode noncharacters


class Typed(str):
    """A piece of a prompt that a user typed: special tokens spelt in it are plain text."""

    __slots__ = ()


class Tokenizer:
    """A tokenizer of the tokenizers library; safe to use from several threads."""

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
        """Token ids of a text. Raises PromptError for what is not text."""
        check_text(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pieces(self, pieces: Sequence[str], add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt in pieces, as of the joined text; special tokens spelt in a Typed piece are plain text.

        Raises PromptError for what is not text.
        """
        if not any(isinstance(piece, Typed) and self._reserved.search(piece) for piece in pieces):
            return self.encode("".join(pieces), add_special_tokens)
        text = "".join(self._guarded(piece) for piece in pieces)
        check_text(text)
        twin, meant = self._twin
        return [meant.get(found, found) for found in twin.encode(text, add_special_tokens=add_special_tokens).ids]

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _reserved(self) -> re.Pattern[str]:
        """Tokens that users cannot type: special ones and those in angle brackets, but not plain words that a vocabulary adds."""
        marks = [token.content for token in self._added.values() if token.special or re.fullmatch("<.*>", token.content)]
        return _any_of({*marks} - {*WRITABLE})

    @cached_property
    def _twin(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The same tokenizer with reserved tokens as plain text except between guards, and the map from its ids to ours.

        Built when a user first types a special token: the second vocabulary takes as long to load as the first.
        """
        written = json.loads(self.backend.to_str())
        if merges := written["model"].get("merges"):  # a SentencePiece model's may merge pieces into a control token
            written["model"]["merges"] = [pair for pair in merges if not self._reserved.fullmatch("".join(pair))]
        twin = tokenizers.Tokenizer.from_str(json.dumps(written))
        special = [token for token in self._added.values() if self._reserved.fullmatch(token.content)]
        twin.add_special_tokens([AddedToken(token.content, special=True) for token in special if not token.special])
        twin.encode_special_tokens = True
        first, last = GUARDS
        for token in self._added.values():
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            twin.add_tokens([AddedToken(first + token.content + last, special=False, **flags)])
        return twin, {twin.token_to_id(first + token.content + last): number for number, token in self._added.items()}

    def _guarded(self, piece: str) -> str:
        """A piece with guards around its special tokens; in a Typed piece around the writable ones alone."""
        first, last = GUARDS
        tokens = self._writable if isinstance(piece, Typed) else self._all
        return tokens.sub(lambda found: first + found[0] + last, piece.replace(first, "\ufffd").replace(last, "\ufffd"))

    @cached_property
    def _writable(self) -> re.Pattern[str]:
        return _any_of({token.content for token in self._added.values()} & {*WRITABLE})

    @cached_property
    def _all(self) -> re.Pattern[str]:
        return _any_of({token.content for token in self._added.values()})

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token, None where the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    @cached_property
    def place_ids(self) -> frozenset[int]:
        """Ids of the tokens around labels and boxes that this vocabulary has."""
        return frozenset(number for number, token in self._added.items() if token.content in PLACE_TOKENS)

    def decode_stream(self, skip_special_tokens: bool = True) -> TokenDecoder:
        """A decoder that turns the tokens of one answer into text as they come."""
        return TokenDecoder(self.backend, skip_special_tokens)


class TokenDecoder:
    """Tokens of one answer, one at a time -> text, as soon as its characters are complete."""

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool):
        self._backend, self._stream = backend, DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, token: int) -> str:
        """The text that this token completes."""
        return self._stream.step(self._backend, token) or ""


def check_text(text: Any) -> None:
    """Raise PromptError for what cannot be tokenised: a value that is not a str, or a lone surrogate."""
    if not isinstance(text, str):
        raise PromptError(f"a text is a str, this is a {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text has half of a character, the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}: "
            "remove it, or decode the text with errors='replace'"
        ) from None


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern that matches any of these texts, longest first; it matches nothing where there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")


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
                f"{backend.token_to_id(token['content'])}: the files come from two tokenizers; fetch them again"
            )
