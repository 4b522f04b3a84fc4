"""OVInternVLChatModel: a model folder on devices, with upstream's calls and conversations.

Puts the parts together; what they do is in embeddings.py, language_part.py and language.py, what is asked of them in chat.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from runtime.chat import ChatModel, many_rows
from runtime.config import InternVLConfig, read_config
from runtime.device import place_parts
from runtime.embeddings import FEATURE_CACHE_BYTES, FeatureCache, StatelessPart
from runtime.errors import ModelFolderError
from runtime.folder import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_JSON_FILE,
    check_folder,
)
from runtime.kv_cache import KVCache
from runtime.language_part import LanguagePart
from runtime.settings import tuned_decode, tuned_properties
from runtime.stream import Progress

PATCHES_AT_ONCE = 4096  # four tiles of 448 pixels: more fall out of the processor's caches, fewer are more calls
OF_UPSTREAM = {"torch_dtype", "dtype", "low_cpu_mem_usage", "use_flash_attn", "trust_remote_code", "attn_implementation"}


class OVInternVLChatModel(ChatModel):
    """The three parts of a model folder, compiled for their devices.

    `device` is OpenVINO's name, `vision_device` another one for the vision part. `precision` accuracy trades speed for the digits
    of the PyTorch path. `cache_dir` keeps compiled models (on a GPU by default in the folder). `ov_config` holds OpenVINO
    properties of all parts, `part_config` of single ones. `feature_cache_bytes` bounds the cache of vision features, and
    `reuse_kv` off makes stateless calls compute their whole prompt. `language` off leaves the language part to somebody else:
    prompts can be made and embedded, and not answered. `tuned` off ignores what python -m runtime tune found for the devices.
    Raises ModelFolderError for a folder that is not whole or not converted, DeviceError for a device that is not there.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: str = "CPU",
        *,
        vision_device: str | None = None,
        precision: str = "default",
        cache_dir: str | Path | None = None,
        ov_config: Mapping[str, Any] | None = None,
        part_config: Mapping[str, Mapping[str, Any]] | None = None,
        feature_cache_bytes: int = FEATURE_CACHE_BYTES,
        reuse_kv: bool = True,
        language: bool = True,
        tuned: bool = True,
    ):
        self.folder = folder = Path(model_dir)
        check_folder(folder)
        raw = read_config(folder / CONFIG_FILE)
        self.config = InternVLConfig.from_dict(raw)
        if "img_context_token_id" not in raw:
            raise ModelFolderError(f"{folder / CONFIG_FILE} has no img_context_token_id: convert the checkpoint again")
        self.img_context_token_id = raw["img_context_token_id"]
        self.system_message = self.conv_template.system_message
        self.feature_cache = FeatureCache(feature_cache_bytes)
        self.tiles_at_once = max(1, PATCHES_AT_ONCE // self.config.grid_side**2)
        core = ov.Core()
        self.ov_device, self.ov_devices = device, [*core.available_devices]  # where it runs, and where it could
        placed = place_parts(
            core,
            folder,
            device,
            vision_device=vision_device,
            wide_vision=self.config.vision.norm_type == "rms_norm",
            precision=precision,
            cache_dir=cache_dir,
            ov_config=ov_config,
            part_config=part_config,
            tuned=partial(tuned_properties, folder, core) if tuned else lambda part, device: {},
            decode=partial(tuned_decode, folder, core) if tuned else lambda device: None,
        )
        width = self.config.language["hidden_size"]
        self.language_placement = placed["language"]
        self.generation_config = GenerationConfig.from_pretrained(folder, GENERATION_CONFIG_FILE)
        with ThreadPoolExecutor(2) as beside:
            vision = beside.submit(StatelessPart, folder, core, placed["vision"], width)
            if language:
                part = beside.submit(
                    LanguagePart,
                    folder,
                    core,
                    placed["language"],
                    width,
                    plain_length=self.config.plain_length,
                    window=self.config.window,
                    reuse=reuse_kv,
                    decode=placed.get("decode"),
                )
            self._text = StatelessPart(folder, core, placed["text_embeddings"], width)
            if language:
                from runtime.language import OVLanguageModel  # seconds, in which the parts compile

                self.language_model = OVLanguageModel(self.generation_config, self.config.language, self.embed_tokens)
                self.language_part = part.result()
            self._vision = vision.result()
        if language:  # better now than while somebody waits, and beside what comes first: a picture is read and looked at
            beside = ThreadPoolExecutor(1)
            self._packed = beside.submit(self.language_part.pack)
            beside.shutdown(wait=False)

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, device: str = "CPU", **options: Any) -> OVInternVLChatModel:
        """The class itself under upstream's name; what upstream says there of PyTorch has no meaning here and is dropped."""
        return cls(model_dir, device, **{name: value for name, value in options.items() if name not in OF_UPSTREAM})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:  # type: ignore[override]
        """The folder's tokenizer.

        As from_pretrained reads it, which parses the file several times and copies the result: 2 s where this takes 0.9 (1B).
        """
        settings = json.loads((self.folder / TOKENIZER_CONFIG_FILE).read_text(encoding="utf-8"))
        template = self.folder / CHAT_TEMPLATE_FILE
        if template.exists():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        return PreTrainedTokenizerFast(tokenizer_file=str(self.folder / TOKENIZER_JSON_FILE), **settings)

    @property
    def device(self) -> torch.device:
        """Where tensors are handed in and out: host memory."""
        return torch.device("cpu")

    def eval(self) -> OVInternVLChatModel:
        """Nothing to do: upstream's code calls it."""
        return self

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self._text(ids)

    def encode_tiles(self, pixel_values: Tensor) -> Tensor:
        return self._vision(pixel_values.float())

    def wait_until_packed(self) -> None:
        """Until the language part has done what is done once; generate does. Raises what went wrong there."""
        self._packed.result()

    def rest_vision(self) -> None:
        self._vision.rest()

    def new_cache(self) -> KVCache:
        return self.language_part.new_cache()

    def give_back(self, cache: KVCache) -> None:
        self.language_part.give_back(cache)

    def forget(self) -> None:
        super().forget()
        self.language_part.forget()

    def lend_cache(self, keys: np.ndarray) -> AbstractContextManager[KVCache]:
        return self.language_part.lend_cache(keys)

    def generate_from(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        visual_token_mask: Tensor,
        cache: KVCache | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Any:
        self.wait_until_packed()
        return self.language_model.generate(
            many_rows=many_rows(options),
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            visual_token_mask=visual_token_mask,
            cache=self.new_cache() if cache is None else cache,
            progress=progress,
            **options,
        )
