"""The reference of InternVL-C and -G as one model, and loaders of its parts; converted parts must agree with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.checkpoint import ContrastiveCheckpoint, Shapes
from convert.reference.contrastive import FeaturesPart, QLlamaPart, QueryPoolPart, VisionEmbeddingPart
from convert.reference.language import Empty
from convert.reference.model import cast
from runtime.folder.contrastive import MODES, ContrastiveConfig, check_mode

TABLE, QUERIES, SCALE = "qllama.model.embed_tokens.weight", "query_tokens", "logit_scale"
Part = TypeVar("Part", bound=nn.Module)


def expected_shapes(checkpoint: ContrastiveCheckpoint) -> Shapes:
    """Every tensor of a checkpoint with this configuration, by its published name."""
    config = checkpoint.config
    kinds = PARTS if isinstance(config, ContrastiveConfig) else (FeaturesPart,)
    with torch.device("meta"):
        found = {name: tuple(t.shape) for kind in kinds for name, t in kind(config).state_dict().items()}  # type: ignore[arg-type]
    if isinstance(config, ContrastiveConfig):
        width = config.qllama.hidden_size
        found |= {TABLE: (config.qllama.vocab_size, width), QUERIES: (1, config.queries, width), SCALE: ()}
        found |= {"itm_head.weight": (2, width), "itm_head.bias": (2,)}  # for training; not used here
    return found


PARTS = (VisionEmbeddingPart, QLlamaPart, QueryPoolPart)


def load_part(
    kind: Callable[..., Part],
    checkpoint: ContrastiveCheckpoint,
    dtype: torch.dtype | None = torch.float32,
    *,
    empty: Empty = torch.empty,
) -> Part:
    """Load one part. `dtype` None keeps matrices as they are stored, mapped from the file; copies go to memory from `empty`."""
    with torch.device("meta"):
        part = kind(checkpoint.config)
    part.load_state_dict(cast(checkpoint.tensors(part.state_dict(), empty=empty), dtype, part, empty), assign=True)
    transformer = getattr(part, "vision_model", None)
    if transformer is not None:
        transformer.embeddings.fit_position_table()
    return part.requires_grad_(False).eval()


def load_table(
    checkpoint: ContrastiveCheckpoint, dtype: torch.dtype | None = torch.float32, *, empty: Empty = torch.empty
) -> Tensor:
    """The embedding table with the queries as its last rows, (V + Q, D)."""
    found = checkpoint.tensors([TABLE, QUERIES])
    table, queries = found[TABLE], found[QUERIES][0]
    made = empty((len(table) + len(queries), table.shape[1]), dtype=dtype or table.dtype)
    made[: len(table)].copy_(table)
    made[len(table) :].copy_(queries)
    return made


class InternVLModel(nn.Module):
    """The reference: upstream's calls of InternVL-C and -G on PyTorch, CPU or CUDA."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        self.vision, self.qllama, self.pool = VisionEmbeddingPart(config), QLlamaPart(config), QueryPoolPart(config)
        self.table = nn.Embedding(config.qllama.vocab_size + config.queries, config.qllama.hidden_size)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))

    @classmethod
    def from_checkpoint(
        cls, checkpoint: ContrastiveCheckpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> InternVLModel:
        """Load the whole checkpoint as float32 or bfloat16 to `device`."""
        assert isinstance(checkpoint.config, ContrastiveConfig)
        with torch.device("meta"):
            model = cls(checkpoint.config)
        model.vision = load_part(VisionEmbeddingPart, checkpoint, dtype)
        model.qllama = load_part(QLlamaPart, checkpoint, dtype)
        model.pool = load_part(QueryPoolPart, checkpoint, dtype)
        model.table = nn.Embedding.from_pretrained(load_table(checkpoint, dtype))
        model.logit_scale = nn.Parameter(checkpoint.tensors([SCALE])[SCALE].float())
        return model.requires_grad_(False).eval().to(device)

    @property
    def _query_ids(self) -> Tensor:
        first = self.config.qllama.vocab_size
        return torch.arange(first, first + self.config.queries, device=self.table.weight.device)

    def run_queries(self, tokens: Tensor) -> Tensor:
        """Tokens of pictures (B, N, C) -> hidden states of the queries (B, Q, D), which attend to each other and the picture."""
        count = self.config.queries
        embeds = self.table(self._query_ids).expand(len(tokens), -1, -1)
        places = torch.arange(count, device=tokens.device)
        bias = embeds.new_zeros(1, 1, count, count)
        return self.qllama(embeds, bias, places[None], tokens, places)[2]

    def encode_image(self, pixel_values: Tensor, mode: str) -> Tensor:
        """Pictures (B, 3, S, S) -> embeddings (B, E): in mode C as they are, in mode G the sum of two unit vectors."""
        check_mode(mode)
        tokens, embeds = self.vision(pixel_values)
        if mode == MODES[0]:
            return embeds
        return F.normalize(embeds, dim=-1) + F.normalize(self.pool(self.run_queries(tokens)), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids of texts (B, T), padded on the right -> embeddings (B, E)."""
        pad = self.config.qllama.pad_token_id
        lengths = (ids != pad).sum(1)
        count = int(lengths.max())
        ids, mask = left_padded(ids, lengths, count, pad)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        embeds = self.table(ids)
        return self.qllama(embeds, causal_bias(mask, embeds.dtype), positions)[1]

    def forward(self, image: Tensor, text: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) and texts (K, T) -> logits (B, K), and their transpose (K, B)."""
        images = F.normalize(self.encode_image(image, mode), dim=-1)
        texts = F.normalize(self.encode_text(text), dim=-1)
        logits = self.logit_scale.exp() * images @ texts.t()
        return logits, logits.t()

    def caption_steps(self, tokens: Tensor, prompt: Tensor) -> Iterator[Tensor]:
        """Logits (1, 1, V) after the queries and prompt (1, T) of one picture, then after each token (1, 1) that is sent."""
        count, length = self.config.queries, self.config.queries + prompt.shape[1]
        embeds = torch.cat([self.table(self._query_ids)[None], self.table(prompt)], dim=1)
        bias = causal_bias(torch.ones(1, length, dtype=torch.bool, device=prompt.device), embeds.dtype)
        bias[:, :, :count, :count] = 0
        places = torch.arange(length, device=prompt.device)
        logits, _, _, past = self.qllama(embeds, bias, places[None], tokens, places[:count])
        while True:
            token = yield logits
            length += 1
            position = torch.full((1, 1), length - 1, device=prompt.device)
            logits, _, _, past = self.qllama(self.table(token), embeds.new_zeros(1, 1, 1, length), position, past=past)


def left_padded(ids: Tensor, lengths: Tensor, count: int, pad: int) -> tuple[Tensor, Tensor]:
    """Texts (B, T) padded on the right -> (B, count) padded on the left, and the mask (B, count) of tokens."""
    mask = torch.arange(count, device=ids.device) >= (count - lengths)[:, None]
    made = ids.new_full((len(ids), count), pad)
    for row, length in enumerate(lengths.tolist()):
        made[row, count - length :] = ids[row, :length]
    return made, mask


def causal_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask of tokens (B, T) -> bias (B, 1, T, T): each attends to itself and the tokens before it; padding only to itself."""
    count = mask.shape[1]
    seen = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril() & mask[:, None]
    seen = seen | torch.eye(count, dtype=torch.bool, device=mask.device)
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
