"""The reference as one model, with the checkpoint's own weights on CPU or CUDA; converted parts must agree with it.

The loaders, one per part, serve the conversion too, which holds one part in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from convert.checkpoint import Checkpoint, Shapes
from convert.four_bits import Matrices, Ready
from convert.lora import Later
from convert.reference.language import (
    EXPERTS,
    PREFIX,
    Empty,
    LlamaWithVisualExperts,
    apart,
    build_language,
    language_kind,
    published_shapes,
    to_transformers,
)
from convert.reference.router import RouterPart
from convert.reference.vision import VisionPart
from convert.tokenizer import load_tokenizer
from runtime.answer.features import FeatureCache
from runtime.answer.prompt import CONTEXT_TOKEN
from runtime.folder.config import InternVLConfig
from runtime.folder.tokenizer import Tokenizer
from runtime.parts.part import VISUAL_MASK
from runtime.progress import Progress
from runtime.upstream.chat import UpstreamCalls

ROWS_AT_ONCE = 8192  # of a matrix that is cast on use; bounds the extra memory of a large head


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding table: decided by the tensors, since published config.json files contradict them."""
    return PREFIX + language_kind(checkpoint.config).head not in checkpoint.shapes


def expected_shapes(config: InternVLConfig, *, tied: bool) -> Shapes:
    """Every tensor of a checkpoint with this configuration, by its published name."""
    with torch.device("meta"):
        parts = [VisionPart(config), *([RouterPart(config)] if config.flash else [])]
    seen = {name: tuple(tensor.shape) for part in parts for name, tensor in part.state_dict().items()}
    return seen | published_shapes(config, tied=tied)


def load_vision(
    checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32, *, empty: Empty = torch.empty, later: Later | None = None
) -> VisionPart:
    """Load the vision part. `dtype` None keeps the matrices as they are stored, mapped from the file.

    Copies go to memory from `empty`; matrices that can be merged later are registered in `later`.
    """
    with torch.device("meta"):
        part = VisionPart(checkpoint.config)
    part.load_state_dict(cast(checkpoint.tensors(part.state_dict(), empty=empty, later=later), dtype, part, empty), assign=True)
    part.vision_model.embeddings.fit_position_table()
    return part.requires_grad_(False).eval()


def load_router(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32, *, empty: Empty = torch.empty) -> RouterPart:
    """Load the router part of a checkpoint that has one; `dtype` and `empty` as in `load_vision`."""
    with torch.device("meta"):
        part = RouterPart(checkpoint.config)
    part.load_state_dict(cast(checkpoint.tensors(part.state_dict(), empty=empty), dtype, part, empty), assign=True)
    return part.requires_grad_(False).eval()


def load_language(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    *,
    head_only: bool = False,
    empty: Empty = torch.empty,
    later: Later | None = None,
    ready: Ready | None = None,
    single: bool = False,
) -> PreTrainedModel:
    """Load the language part; `dtype`, `empty` and `later` as in `load_vision`. Four-bit matrices are registered in `ready`.

    `single` does not join experts: each matrix is read from the checkpoint on use, and the model cannot be traced.

    `head_only` leaves the embedding table out (it stays on the meta device) if the head does not need it: the traced part takes
    embeddings, so the table would only take memory.
    """
    tied = is_tied(checkpoint)
    model = build_language(checkpoint.config, tied=tied)
    names = published_shapes(checkpoint.config, tied=tied)
    table = text_table_name(checkpoint)
    wanted = [name for name in names if tied or not head_only or name != table]
    if single:
        wanted, kinds = _single_experts(checkpoint, wanted)
    mapped = checkpoint.tensors(wanted, empty=empty, later=later, ready=ready, unpacked=dtype or torch.float16)
    if single:
        for name, matrices in kinds.items():
            place, _, matrix = name.removeprefix(PREFIX).rpartition(".")
            model.get_submodule(place).leave(matrix, matrices)  # type: ignore[operator]
    state = cast(to_transformers(checkpoint.config, mapped, dtype, empty, later, ready), dtype, model, empty)
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    elif head_only:
        state["model.embed_tokens.weight"] = model.model.embed_tokens.weight
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _single_experts(checkpoint: Checkpoint, names: list[str]) -> tuple[list[str], dict[str, Matrices]]:
    """Names of tensors that belong to no single expert, and the matrices of experts by kind and layer, in order of experts."""
    kind, shapes = language_kind(checkpoint.config), checkpoint.shapes
    if kind.experts is None:
        return names, {}
    if not kind.turned_experts:
        own = [name for name in names if EXPERTS in name]
        return [name for name in names if EXPERTS not in name], {**apart(checkpoint.tensors(own))[1]}
    own = [name for name in names if EXPERTS in name and len(shapes[name]) == 3]
    found: dict[str, Matrices] = {name: checkpoint.experts(name) for name in own}
    return [name for name in names if name not in found], found


def load_text_embeddings(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """Load the embedding table, (V, D)."""
    name = text_table_name(checkpoint)
    table = checkpoint.tensors([name])[name]
    return table.to(dtype or table.dtype)


def text_table_name(checkpoint: Checkpoint) -> str:
    """The published name of the embedding table."""
    kind = language_kind(checkpoint.config)
    return PREFIX + next((theirs for theirs, ours in kind.names if "embed_tokens" in ours), "model.embed_tokens.") + "weight"


def cast(tensors: dict[str, Tensor], dtype: torch.dtype | None, part: nn.Module, empty: Empty) -> dict[str, Tensor]:
    """Cast to `dtype`. None leaves matrices of linear layers and tables as they are stored, and casts the rest to float32: a 16-bit
    norm would lose digits, and joined experts cannot be traced in 16 bits."""
    kept = {f"{name}.weight" for name, module in part.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}

    def one(name: str, tensor: Tensor) -> Tensor:
        wanted = dtype or (tensor.dtype if name in kept else torch.float32)
        return tensor if tensor.dtype == wanted else empty(tensor.shape, dtype=wanted).copy_(tensor)

    return {name: one(name, tensor) for name, tensor in tensors.items()}


class _CastAtUse(nn.Linear):
    """A linear layer that computes in its input's type whatever type its matrix is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        biases = self.bias.split(ROWS_AT_ONCE) if self.bias is not None else [None] * len(self.weight)
        rows = zip(self.weight.split(ROWS_AT_ONCE), biases, strict=False)
        return torch.cat([F.linear(x, w.to(x.dtype), b) for w, b in rows], dim=-1)


class _FloatRows(nn.Embedding):
    """An embedding table that returns float32 rows whatever type it is stored in."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


def compute_in_float32(part: nn.Module) -> None:
    """Make a part loaded with `dtype` None compute in float32 over its mapped matrices: slower, but in little memory."""
    for module in part.modules():
        if type(module) is nn.Linear:
            module.__class__ = _CastAtUse
        elif type(module) is nn.Embedding:
            module.__class__ = _FloatRows


class _InBfloat16(nn.Linear):
    """A linear layer that computes in bfloat16 and returns its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16)).to(x.dtype)
        return out if self.bias is None else out + self.bias


def quick_type() -> torch.dtype:
    """The type in which this processor multiplies fastest: bfloat16 if it has instructions for it, else float32."""
    return torch.bfloat16 if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else torch.float32


@contextmanager
def multiplying_quickly() -> Iterator[None]:
    """Inside, products of float32 matrices round their factors to `quick_type` and sum in float32, on every thread."""
    before = torch.get_float32_matmul_precision()
    if quick_type() == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def computing_quickly(part: nn.Module) -> Iterator[None]:
    """Inside, a part that computes in float32 over mapped matrices multiplies in `quick_type`: good enough to decode."""
    modules = [module for module in part.modules() if type(module) is _CastAtUse] if quick_type() == torch.bfloat16 else []
    for module in modules:
        module.__class__ = _InBfloat16  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = _CastAtUse


@contextmanager
def in_float32(part: nn.Module) -> Iterator[None]:
    """Inside, a part computes in float32 over its mapped matrices; afterwards it can be traced as before."""
    kinds = {module: module.__class__ for module in part.modules()}
    compute_in_float32(part)
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


class InternVLChatModel(nn.Module, UpstreamCalls):
    """The reference: upstream's calls and conversations on PyTorch, CPU or CUDA."""

    tiles_at_once = 4

    def __init__(
        self,
        config: InternVLConfig,
        vision: VisionPart,
        language: PreTrainedModel,
        tokenizer: Tokenizer,
        router: RouterPart | None = None,
    ):
        super().__init__()
        self.config, self.vision, self.router, self.language, self.tokenizer = config, vision, router, language, tokenizer
        self.flash = config.flash
        self.img_context_token_id = tokenizer.encode(CONTEXT_TOKEN, add_special_tokens=False)[0]
        self.system_message = self.conv_template.system_message
        self.feature_cache = FeatureCache(0)  # no cache: every tile is encoded again, as upstream does
        self.generation_defaults: dict[str, Any] = {}

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> InternVLChatModel:
        """Load the whole checkpoint as float32 or bfloat16 to `device`, "cpu" or "cuda"."""
        tokenizer = Tokenizer(load_tokenizer(checkpoint.folder, checkpoint.config).backend_tokenizer)
        router = load_router(checkpoint, dtype) if checkpoint.config.flash else None
        language = load_language(checkpoint, dtype)
        return cls(checkpoint.config, load_vision(checkpoint, dtype), language, tokenizer, router).to(device)

    @property
    def _where(self) -> Tensor:
        """A tensor with the device and type of the model's computation."""
        return self.vision.mlp1[0].weight  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self._where.device

    @torch.no_grad()
    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        return self.language.get_input_embeddings()(torch.from_numpy(ids).to(self.device)).float().cpu().numpy()

    @torch.no_grad()
    def encode_tiles(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.vision(torch.from_numpy(pixel_values).to(self._where)).float().cpu().numpy()

    @torch.no_grad()
    def route_tiles(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert self.router is not None
        patches = self.vision.patches(torch.from_numpy(pixel_values).to(self._where))
        few, probabilities = self.router(patches)
        rows, few, suffice = (t.float().cpu().numpy() for t in (self.vision.context(patches), few, probabilities[:, 0]))
        return rows, few, suffice

    def new_cache(self) -> ReferenceCache:
        return ReferenceCache(self)

    @torch.no_grad()
    def generate_from(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        visual_token_mask: Tensor,
        cache: Any = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Any:
        options |= self.routing(visual_token_mask)
        embeds, mask = inputs_embeds.to(self._where), attention_mask.to(self.device)
        return self.language.generate(inputs_embeds=embeds, attention_mask=mask, **options)  # type: ignore[operator]

    @torch.no_grad()
    def logits(self, inputs_embeds: Tensor, visual_token_mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D), no padding -> logits (B, T, V); the mask (B, T) is for visual experts."""
        return self.language(inputs_embeds=inputs_embeds.to(self._where), use_cache=False, **self.routing(visual_token_mask)).logits

    def routing(self, visual_token_mask: Tensor | None) -> dict[str, Tensor]:
        """The mask as an argument, if this language model takes it."""
        if visual_token_mask is None or not isinstance(self.language, LlamaWithVisualExperts):
            return {}
        return {VISUAL_MASK: visual_token_mask.to(self._where.device)}


class ReferenceCache:
    """The interface of runtime's KV caches over transformers' own: every prompt is prefilled anew and at once, as upstream does."""

    room_for_drafts = free_guesses = 0
    ids = np.zeros(0, np.int64)

    def __init__(self, model: InternVLChatModel):
        self.busy = Lock()
        self._model = model
        self.keep(self.ids)

    def keep(self, keys: np.ndarray) -> int:
        """Clear the cache and keep nothing; returns 0 tokens."""
        self._past: Any = None
        self._mask = torch.zeros((1, 0), dtype=torch.int64)
        return 0

    def cancel(self) -> None:
        """Do nothing: a step is short."""

    def reorder(self, rows: list[int]) -> None:
        """Let row i continue row `rows[i]`."""
        self._past.reorder_cache(torch.tensor(rows, device=self._model.device))
        self._mask = self._mask[rows]

    @torch.no_grad()
    def feed(
        self,
        embeds: np.ndarray,
        mask: np.ndarray,
        keys: np.ndarray | None,
        progress: Progress | None = None,
        visual: np.ndarray | None = None,
    ) -> np.ndarray:
        """Embeddings (B, T, D) of new tokens under their mask (B, T) -> logits (B, 1, V) of the last position."""
        if progress is not None:
            progress("prefill", 0, int(mask.sum()))
        model, new = self._model, torch.from_numpy(mask)
        self._mask = new if self._past is None else torch.cat([self._mask, new], dim=1)
        told = model.routing(torch.from_numpy(visual)) if visual is not None else {}
        found = model.language(
            inputs_embeds=torch.from_numpy(embeds).to(model._where),
            attention_mask=self._mask.to(model.device),
            position_ids=(self._mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :].to(model.device),
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
            **told,
        )
        self._past = found.past_key_values
        return found.logits[:, -1:].float().cpu().numpy()
