"""The parts as OpenVINO models: names, dynamic axes, KV cache as state.

Takes modules of convert/reference, returns ov.Model whose weights share the module's memory (mapped from the checkpoint).
The signatures are the contract with openvino_genai and optimum-intel: names of inputs and outputs, float32 in and out, logits at
all positions. The language part goes through optimum-intel's patches, which give the graph that GenAI's paged attention
recognises: huggingface/optimum-intel@e1de5bee optimum/exporters/openvino/convert.py export_pytorch. Differences:
nothing is written to disk in between, and the trace is not run a second time to check it (verify.py does better).
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openvino as ov
import torch
from openvino._offline_transformations import apply_moc_transformations
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.patch_model import __make_16bit_traceable as keep_16bit_weights
from openvino.frontend.pytorch.patch_model import unpatch_model
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from optimum.exporters.openvino.utils import _get_input_info, clear_class_registry
from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.four_bits import Ready
from convert.reference.contrastive import FeaturesPart, QLlamaPart, QueryPoolPart, VisionEmbeddingPart
from convert.reference.language import LlamaWithVisualExperts
from convert.reference.router import RouterPart
from convert.reference.vision import VisionPart
from runtime.parts.part import PATCHES, VISUAL_MASK

ACTIVATIONS_SCALE_FACTOR = "8.0"  # keeps float16 activations of the GPU plugin from overflowing; optimum-intel's value
PATCHED_FORWARD = "_openvino_module_extension_patch_orig_forward"  # where keep_16bit_weights leaves a module's own forward
EXAMPLE_TILES, EXAMPLE_TOKENS = 1, 2


def trace_text_embeddings(table: Tensor) -> ov.Model:
    """Embedding table (V, D) -> model `input` (B, T) int64 -> `inputs_embeds` (B, T, D) float32."""
    example = {"input": torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64)}
    with _quiet():
        model = _to_openvino(nn.Embedding.from_pretrained(table), example, [ov.PartialShape([-1, -1])])
    return _name(model, ["input"], ["inputs_embeds"])


def trace_vision(part: VisionPart) -> ov.Model:
    """Vision part -> model `pixel_values` (N, 3, S, S) float32 -> `last_hidden_state` (N, P, D) float32.

    For a router, the inner tensor of the patches gets a name. It is no output: other runtimes expect a single one.
    """
    side, routed = part.config.tile_size, part.config.flash is not None
    example = {"pixel_values": torch.zeros(EXAMPLE_TILES, 3, side, side)}
    with _quiet():
        model = _to_openvino(_WithPatches(part) if routed else part, example, [ov.PartialShape([-1, 3, side, side])])
    if routed:
        result = model.get_results()[1]
        model.remove_result(result)
        result.input_value(0).get_tensor().add_names({PATCHES})
    return _name(model, ["pixel_values"], ["last_hidden_state"])


class _WithPatches(nn.Module):
    """A vision part that also returns its patches."""

    def __init__(self, part: VisionPart):
        super().__init__()
        self.part = part

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.part.patches(pixel_values)
        return self.part.context(patches), patches


def trace_router(part: RouterPart) -> ov.Model:
    """Router part -> model `patch_hidden_state` (N, side * side, C) -> `few_hidden_state` (N, P', D), `probabilities` (N, 2)."""
    c = part.config
    shape = (c.grid_side**2, c.vision.hidden_size)
    with _quiet():
        model = _to_openvino(part, {"patches": torch.zeros(EXAMPLE_TILES, *shape)}, [ov.PartialShape([-1, *shape])])
    return _name(model, [PATCHES], ["few_hidden_state", "probabilities"])


def trace_language(model: PreTrainedModel, *, quantised: bool, ready: Ready | None = None) -> ov.Model:
    """Decoder -> stateful model `inputs_embeds` (B, T, D), `attention_mask` (B, past + T), `position_ids` (B, T), `beam_idx` (B).

    Its output is `logits` (B, T, V) float32 at all positions; keys and values live in states of (B, heads, past, head size).
    A model with visual experts has one more input, `visual_token_mask` (B, T) int64, 1 on context tokens.
    With `quantised` weights the device chooses the KV cache's precision; otherwise float16 is set, as optimum-intel does. The
    matrices in `ready` replace their placeholders.
    """
    from optimum.exporters.openvino.model_configs import get_vlm_text_generation_config
    from optimum.exporters.openvino.stateful import patch_stateful

    export = get_vlm_text_generation_config(model.config.model_type, model.config, "int64", "fp32")
    example = export.rename_ambiguous_inputs(export.generate_dummy_inputs(framework="pt"))
    patcher = export.patch_model_for_export(model)
    routed = isinstance(model, LlamaWithVisualExperts)
    forward = patcher.patched_forward
    order = [
        name for name in inspect.signature(patcher.orig_forward).parameters if name in example or (routed and name == VISUAL_MASK)
    ]

    @functools.wraps(forward)  # the decoder orders the example's inputs by this signature
    def with_tuple_outputs(*args: Any, **kwargs: Any) -> tuple:
        outputs = forward(**dict(zip(order, args, strict=False)), **kwargs)
        return tuple(tuple(value) if isinstance(value, list) else value for value in outputs.values())

    patcher.patched_forward = with_tuple_outputs
    with _quiet(), patcher:
        inputs = [(item.name, item.shape) for item in _get_input_info(model, export, example)]
        if routed:  # the last argument of its forward
            example[VISUAL_MASK] = torch.ones(example["inputs_embeds"].shape[:2], dtype=torch.int64)
            inputs.append((VISUAL_MASK, ov.PartialShape([-1, -1])))
        traced = _to_openvino(model, example, [shape for _, shape in inputs], ready)
    _take_turned(traced)
    _name(traced, [name for name, _ in inputs], list(export.outputs))
    patch_stateful(model.config, traced)
    traced.set_rt_info(ACTIVATIONS_SCALE_FACTOR, ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
    if not quantised:
        traced.set_rt_info("f16", ["runtime_options", "KV_CACHE_PRECISION"])
    return traced


def trace_vision_embedding(part: VisionEmbeddingPart) -> ov.Model:
    """InternVL-C's vision part -> model `pixel_values` (N, 3, S, S) -> `last_hidden_state` (N, T, C), `image_embeds` (N, E)."""
    return _trace_pictures(part, part.config.image_size, ["last_hidden_state", "image_embeds"])


def trace_features(part: FeaturesPart) -> ov.Model:
    """InternViT -> model `pixel_values` (N, 3, S, S) -> `last_hidden_state` (N, T, C).

    The tensors of the other layers are named hidden_states.0 (the embeddings) and so on; a caller can make them outputs.
    """
    names = [f"hidden_states.{number}" for number in range(part.config.vision.num_hidden_layers + 1)]
    model = _trace_pictures(part, part.config.image_size, names)
    for result, name in zip(model.get_results()[:-1], names, strict=False):
        result.input_value(0).get_tensor().set_names({name})  # a name on the result would be removed with it
        model.remove_result(result)
    model.output().get_tensor().set_names({"last_hidden_state"})
    return model


def _trace_pictures(part: nn.Module, side: int, outputs: list[str]) -> ov.Model:
    example = {"pixel_values": torch.zeros(EXAMPLE_TILES, 3, side, side)}
    with _quiet():
        model = _to_openvino(part, example, [ov.PartialShape([-1, 3, side, side])])
    return _name(model, ["pixel_values"], outputs)


def trace_query_pool(part: QueryPoolPart) -> ov.Model:
    """The second pool -> model `hidden_states` (N, Q, D) -> `image_embeds` (N, E)."""
    width = part.config.qllama.hidden_size
    example = {"hidden_states": torch.zeros(1, EXAMPLE_TOKENS, width)}
    with _quiet():
        model = _to_openvino(part, example, [ov.PartialShape([-1, -1, width])])
    return _name(model, ["hidden_states"], ["image_embeds"])


class _FlatCache(nn.Module):
    """QLLaMA with its cache as single tensors, keys and values alternating, as tracing requires."""

    def __init__(self, part: QLlamaPart):
        super().__init__()
        self.part = part

    def forward(self, inputs_embeds, attention_bias, position_ids, vision_hidden_states, looking, *past):
        known = list(zip(past[::2], past[1::2], strict=True))
        *found, presents = self.part(inputs_embeds, attention_bias, position_ids, vision_hidden_states, looking, known)
        return (*found, *(tensor for pair in presents for tensor in pair))


def trace_qllama(part: QLlamaPart) -> ov.Model:
    """QLLaMA -> stateful model `inputs_embeds` (B, T, D), `attention_bias` (B, 1, T, past + T), `position_ids` (B, T),
    `vision_hidden_states` (B, N, C), `looking` (K) int64, `beam_idx` (B).

    The bias is added to scores; `looking` are the columns that attend to the picture, none if N is 0. Outputs: `logits` (B, 1, V)
    after the last column, `text_embeds` (B, E) of the last column, `last_hidden_state` (B, T, D).
    """
    from optimum.exporters.openvino.stateful import fuse_cache_reorder, make_stateful

    q, width = part.config.qllama, part.config.vision.hidden_size
    past = [torch.zeros(1, q.num_attention_heads, 1, q.head_size) for _ in range(2 * q.num_hidden_layers)]
    inputs = {  # an example, and a shape with -1 for dynamic axes
        "inputs_embeds": (torch.zeros(1, EXAMPLE_TOKENS, q.hidden_size), [-1, -1, q.hidden_size]),
        "attention_bias": (torch.zeros(1, 1, EXAMPLE_TOKENS, EXAMPLE_TOKENS + 1), [-1, 1, -1, -1]),
        "position_ids": (torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64), [-1, -1]),
        "vision_hidden_states": (torch.zeros(1, 3, width), [-1, -1, width]),
        "looking": (torch.zeros(1, dtype=torch.int64), [-1]),
    }
    kept = [f"{kind}.{number}" for number in range(q.num_hidden_layers) for kind in ("key", "value")]
    shapes = [ov.PartialShape(shape) for _, shape in inputs.values()]
    shapes += [ov.PartialShape([-1, q.num_attention_heads, -1, q.head_size]) for _ in kept]
    with _quiet():
        traced = _to_openvino(_FlatCache(part), (*(example for example, _ in inputs.values()), *past), shapes)
    pasts, presents = [f"past.{name}" for name in kept], [f"present.{name}" for name in kept]
    _name(traced, [*inputs, *pasts], ["logits", "text_embeds", "last_hidden_state", *presents])
    fuse_cache_reorder(traced, [traced.input(name) for name in inputs], pasts, gather_dim=0)
    make_stateful(traced, [], pasts, presents, batch_dim=0)
    return traced


def _to_openvino(
    module: nn.Module,
    example: dict[str, Any] | tuple[Tensor, ...],
    shapes: list[ov.PartialShape],
    ready: Ready | None = None,
) -> ov.Model:
    """Trace on an example, then open the axes; ov.convert_model's steps without its second validation and its telemetry."""
    keep_16bit_weights(module)
    try:
        decoder = TorchScriptPythonDecoder(module, example_input=example, trace_kwargs={"check_trace": False})
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    finally:  # otherwise torch.bmm stays patched and computes nothing
        unpatch_model(module, PATCHED_FORWARD)
    for parameter, shape in zip(model.get_parameters(), shapes, strict=True):
        parameter.set_partial_shape(shape)
    _take_turned(model)
    if ready is not None:  # before the next step copies constants of three axes
        ready.insert(model)
    apply_moc_transformations(model, cf=False, smart_reshape=True)
    return model


def _take_turned(model: ov.Model) -> None:
    """Fold transposes of constants into the matrix multiplications that read them.

    NNCF compresses only constants directly before a multiplication: the joined experts of GPT-OSS would stay float32.
    """
    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        turn = node.input_value(1).get_node()
        if turn.get_type_name() != "Transpose" or turn.input_value(0).get_node().get_type_name() != "Constant":
            continue
        rank = len(turn.get_output_partial_shape(0))
        order = turn.input_value(1).get_node().get_vector().tolist()
        if order == [*range(rank - 2), rank - 1, rank - 2]:
            node.input(1).replace_source_output(turn.input_value(0))
            node.set_attribute("transpose_b", not node.get_attributes()["transpose_b"])
    model.validate_nodes_and_infer_types()


def forget_traces() -> None:
    """Release all modules traced so far, and with them the checkpoint's mapped pages.

    TorchScript keeps every traced module. The models made here use that memory: call this once they are no longer used.
    """
    clear_class_registry()


def _name(model: ov.Model, inputs: list[str], outputs: list[str]) -> ov.Model:
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)  # paged attention looks a parameter up by this name
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of a trace; verify.py finds what a trace gets wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
