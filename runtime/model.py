"""OVInternVLChatModel: a model folder on a device, with upstream's calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from runtime.chat import ChatModel
from runtime.config import InternVLConfig, read_config
from runtime.errors import DeviceError
from runtime.folder import CONFIG_FILE, PART_FILES, check_folder
from runtime.language import OVLanguageModel
from runtime.prompt import get_template

TILES_AT_ONCE = 4  # bounds the vision part's memory; attention takes 70 MB a tile


class OVInternVLChatModel(ChatModel):
    """The three parts of a model folder, compiled for a device.

    Raises ModelFolderError for a folder that is not whole or not converted, DeviceError for a device that is not there.
    """

    def __init__(self, model_dir: str | Path, device: str = "CPU", *, ov_config: dict[str, Any] | None = None):
        folder = Path(model_dir)
        check_folder(folder)
        raw = read_config(folder / CONFIG_FILE)
        self.config = InternVLConfig.from_dict(raw)
        self.context_id = raw["img_context_token_id"]
        self.system_message = get_template(self.config.template).system_message
        core, properties = ov.Core(), ov_config or {}
        if device.split(".")[0].split(":")[0] not in {"AUTO", "HETERO", *(name.split(".")[0] for name in core.available_devices)}:
            raise DeviceError(f"there is no device {device} here; there are {', '.join(core.available_devices)}")
        self._text_request, self._vision_request = (
            core.compile_model(folder / PART_FILES[part], device, properties).create_infer_request()
            for part in ("text_embeddings", "vision")
        )
        self.language_model = OVLanguageModel(folder, core, device, properties, self.config.language, self.embed_tokens)

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, device: str = "CPU", **options: Any) -> OVInternVLChatModel:
        """The same as the class itself, under the name that upstream's code calls."""
        return cls(model_dir, device, **options)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self._text_request.infer([ids.numpy()])[0]))

    def encode_tiles(self, pixel_values: Tensor) -> Tensor:
        batches = pixel_values.float().split(TILES_AT_ONCE)
        return torch.from_numpy(np.concatenate([self._vision_request.infer([batch.numpy()])[0] for batch in batches]))

    def generate_from(self, inputs_embeds: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        return self.language_model.generate(  # type: ignore[misc]
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options
        )
