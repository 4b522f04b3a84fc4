"""The parts of a model folder in float32 on the CPU: arrays in, arrays out, for comparison and calibration.

Reads a folder as any runtime would; knows nothing of the reference.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov

from runtime.folder.files import PART_FILES
from runtime.parts.part import VISUAL_MASK

# Compute in float32 throughout, so that measurements show the weights' error and not the device's.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "EXECUTION_MODE_HINT": "ACCURACY",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class Part:
    """One part of a model folder on the CPU in float32: arrays in, an array out."""

    def __init__(self, folder: Path, part: str):
        self._request = ov.Core().compile_model(folder / PART_FILES[part], "CPU", EXACT).create_infer_request()

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Tiles (N, 3, S, S) -> image features (N, P, D), or token ids (B, T) -> embeddings (B, T, D)."""
        return self._request.infer([array])[0]


class LanguagePart(Part):
    """The stateful language part, with one KV cache."""

    def __init__(self, folder: Path):
        super().__init__(folder, "language")
        self._routed = any(VISUAL_MASK in port.get_names() for port in self._request.model_inputs)

    def logits(
        self, embeds: np.ndarray, attention_mask: np.ndarray, *, visual: np.ndarray | None = None, reset: bool = True
    ) -> np.ndarray:
        """Embeddings (B, T, D) under a mask (B, past + T) -> logits (B, T, V), valid until the next call.

        `visual` (B, T) is 1 on context tokens, for visual experts. `reset` clears the KV cache first.
        """
        if reset:
            self._request.reset_state()
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -embeds.shape[1] :]
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": attention_mask,
            "position_ids": positions,
            "beam_idx": np.arange(len(embeds), dtype=np.int32),
        }
        if self._routed:
            inputs[VISUAL_MASK] = np.zeros(embeds.shape[:2], np.int64) if visual is None else visual
        self._request.infer(inputs, share_outputs=True)
        return self._request.get_tensor("logits").data
