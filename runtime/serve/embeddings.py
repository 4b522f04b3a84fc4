"""/v1/embeddings over a folder of InternVL-C and -G: texts and pictures to unit vectors, in OpenAI's form.

Keys, limits, errors and metrics are reception.py's. An input may also be an `image_url` or `text` part, not only text or token ids.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI
from pydantic import Field

from runtime.contrast.model import OpenedInternVL, unit
from runtime.errors import OptionError, PromptError
from runtime.folder.contrastive import TEXT_TOKENS
from runtime.serve.protocol import NUMBER, ImagePart, MediaRules, TextPart
from runtime.serve.protocol import Request as Body
from runtime.serve.reception import Metrics, Reception, Rules, base_app

MOST_INPUTS = 2048  # per request; OpenAI's limit
Ids = Annotated[list[Annotated[int, NUMBER, Field(ge=0)]], Field(min_length=1, max_length=TEXT_TOKENS)]
One = str | TextPart | ImagePart


class EmbeddingRequest(Body):
    """OpenAI's fields, and our own `mode` for pictures."""

    model: str = ""
    input: str | ImagePart | TextPart | Ids | Annotated[list[One | Ids], Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    mode: Literal["InternVL-C", "InternVL-G"] = "InternVL-C"
    user: Any = None  # ignored

    @property
    def inputs(self) -> list[One | list[int]]:
        """All inputs as a list, even a single one."""
        single = not isinstance(self.input, list) or isinstance(self.input[0], int)
        return [self.input] if single else self.input  # type: ignore[list-item,return-value]


def build_app(model: OpenedInternVL, rules: Rules) -> FastAPI:
    """The application over an opened folder."""
    reception = Reception(rules, Metrics())

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield

    app = base_app(reception, life, lambda: True)
    app.state.stop = lambda: None

    @app.post("/v1/embeddings")
    async def embeddings(ask: EmbeddingRequest) -> dict[str, Any]:
        reception.check_model(ask.model)
        if ask.dimensions not in (None, model.config.embed_dim):
            raise OptionError(f"dimensions is {ask.dimensions}: this model's vectors have {model.config.embed_dim} numbers")
        async with reception.place():
            vectors, read = await asyncio.to_thread(encode, model, ask, rules.media)
        reception.metrics.prompt_tokens.inc(read)
        data = [
            {"object": "embedding", "index": number, "embedding": _written(vector, ask.encoding_format)}
            for number, vector in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": rules.model_name, "usage": {"prompt_tokens": read, "total_tokens": read}}

    return app


def encode(model: OpenedInternVL, ask: EmbeddingRequest, media: MediaRules) -> tuple[np.ndarray, int]:
    """The unit vectors (N, E) of all inputs, and how many tokens of text were read. Raises PromptError, PictureError."""
    inputs, made = ask.inputs, np.zeros((len(ask.inputs), model.config.embed_dim), np.float32)
    of_pictures = [number for number, one in enumerate(inputs) if isinstance(one, ImagePart)]
    of_texts = [number for number, one in enumerate(inputs) if not isinstance(one, ImagePart)]
    texts = [_ids(model, inputs[number]) for number in of_texts]
    for start in range(0, len(of_pictures), model.pictures_at_once):
        batch = of_pictures[start : start + model.pictures_at_once]
        made[batch] = model.encode_images([media.picture(inputs[n].image_url.url) for n in batch], ask.mode)  # type: ignore[union-attr]
    if texts:
        made[of_texts] = unit(model.encode_ids(texts))
    return made, sum(map(len, texts))


def _ids(model: OpenedInternVL, one: Any) -> list[int]:
    if isinstance(one, list):
        wrong = [token for token in one if token >= model.config.qllama.vocab_size]
        if wrong:
            raise PromptError(f"there is no token {wrong[0]}: the vocabulary has {model.config.qllama.vocab_size}")
        return one
    return model.ids_of(one.text if isinstance(one, TextPart) else one)


def _written(vector: np.ndarray, form: str) -> list[float] | str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else [float(value) for value in vector]
