"""A model folder, opened: its parts compiled for their devices, its tokenizer and settings read.

A backend of chat_core.py over the parts of runtime/parts. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov

from runtime.answer.chat_model import ChatModel
from runtime.answer.decode import Decoding
from runtime.answer.features import FEATURE_CACHE_BYTES, FeatureCache
from runtime.answer.prompt import CONTEXT_TOKEN
from runtime.errors import InternVLError, ModelFolderError, TokenizerError
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.files import CONFIG_FILE, GENERATION_CONFIG_FILE, PART_FILES, check_folder
from runtime.folder.generation import read_generation_config
from runtime.folder.settings import BEST, overflowing, settings_of
from runtime.folder.tokenizer import Tokenizer
from runtime.parts.device import choose_devices, place_parts
from runtime.parts.kv_cache import KVCache
from runtime.parts.language_part import LanguagePart
from runtime.parts.part import PATCHES
from runtime.parts.stateless_part import StatelessPart
from runtime.progress import Progress, beside

GLANCE_SECONDS = 1.0  # how often progress is reported
PATCHES_AT_ONCE = 4096  # four tiles of 448 pixels: more exceed the CPU's caches, fewer need more calls


class OpenedModel(ChatModel):
    """The parts of a model folder, compiled for their devices.

    `device` is OpenVINO's name, or auto: the best one that tune found, else a rule; `vision_device` is another one for the vision
    part. `precision` accuracy trades speed for the accuracy of the PyTorch path. `cache_dir` stores compiled parts (default: on
    a GPU, inside the folder; False: nowhere). `ov_config` holds OpenVINO properties of all parts, `part_config` of single ones.
    `feature_cache_bytes` bounds the cache of image features, and `reuse_kv` off makes stateless calls compute their whole prompt.
    `language` off does not open the language part: prompts can be made and embedded, but not answered. `tuned` off ignores the
    settings that python -m runtime tune found for the devices. `flash` off gives every tile all of its context tokens, where a
    router may remove most of them. `progress` reports every second how many parts are compiled.
    Raises ModelFolderError for a folder that is incomplete or not converted, TokenizerError for one without its tokenizer,
    DeviceError for a device that does not exist.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: str = "CPU",
        *,
        vision_device: str | None = None,
        precision: str = "default",
        cache_dir: str | Path | Literal[False] | None = None,
        ov_config: Mapping[str, Any] | None = None,
        part_config: Mapping[str, Mapping[str, Any]] | None = None,
        feature_cache_bytes: int = FEATURE_CACHE_BYTES,
        reuse_kv: bool = True,
        language: bool = True,
        tuned: bool = True,
        flash: bool = True,
        progress: Progress | None = None,
    ):
        self.folder = folder = Path(model_dir)
        check_folder(folder)
        raw = read_config(folder / CONFIG_FILE)
        self.config = InternVLConfig.from_dict(raw)
        self.system_message = self.conv_template.system_message
        self.flash = self.config.flash if flash else None
        if self.flash is not None and not (folder / PART_FILES["router"]).exists():
            raise ModelFolderError(
                f"{folder} has no {PART_FILES['router']}, which flash_mode in config.json needs: convert the checkpoint again, "
                "or answer with all context tokens (--no-flash, flash=False)"
            )
        self.feature_cache = FeatureCache(feature_cache_bytes)
        self.tiles_at_once = max(1, PATCHES_AT_ONCE // self.config.grid_side**2)
        self.generation_defaults = _checked_defaults(folder / GENERATION_CONFIG_FILE)
        core = ov.Core()
        self.choice = None
        if device == BEST:
            self.choice = choose_devices(core, settings_of(folder, core, BEST) if tuned else None)
            device, vision_device = self.choice.language, vision_device or self.choice.vision
        self.ov_device, self.ov_devices = device, [*core.available_devices]  # the device in use, and those available
        placed = place_parts(
            core,
            folder,
            device,
            vision_device=vision_device,
            wide_vision=self.config.vision.norm_type == "rms_norm",
            router=self.flash is not None,
            precision=precision,
            cache_dir=cache_dir,
            ov_config=ov_config,
            part_config=part_config,
            tuned=partial(settings_of, folder, core) if tuned else lambda device: None,
            overflowing=partial(overflowing, folder),
        )
        width = self.config.language["hidden_size"]
        self.language_placement = placed["language"]
        # Compiling releases the GIL, so parts compile in parallel.
        patches = [] if self.flash is None else [PATCHES]
        vision = beside(lambda: StatelessPart(folder, core, placed["vision"], width, patches))
        text = beside(lambda: StatelessPart(folder, core, placed["text_embeddings"], width))
        opening: list[Future[Any]] = [vision, text]
        if self.flash is not None:
            router = beside(lambda: StatelessPart(folder, core, placed["router"], width))
            opening.append(router)
        if language:
            part = beside(
                lambda: LanguagePart(
                    folder,
                    core,
                    placed["language"],
                    width,
                    plain_length=self.config.plain_length,
                    window=self.config.window,
                    reuse=reuse_kv,
                    decode=placed.get("decode"),
                    later=placed.get("later"),
                )
            )
            opening.append(part)
        try:
            self.tokenizer = Tokenizer.from_folder(folder)
            self.img_context_token_id = _context_id(self.tokenizer, raw, folder)
        finally:
            _wait(opening, progress)
        self._text, self._vision = text.result(), vision.result()
        if self.flash is not None:
            self._router = router.result()
        if language:
            self.language_part = part.result()
            self.language_part.pack_when_idle()

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        return self._text(ids)

    def encode_tiles(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._vision(pixel_values)

    def route_tiles(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, patches = self._vision.run(pixel_values, [0, 1])
        few, probabilities = self._router.run(patches, [0, 1])
        return rows, few, probabilities[:, 0]

    def settle(self) -> None:
        self.language_part.settle()

    def rest(self) -> None:
        self.language_part.rest()

    def wait_until_packed(self) -> None:
        """Run the one-time packing of the language part now. Raises its errors."""
        self.language_part.settle()
        self.language_part.pack()

    def release_vision(self) -> None:
        self._vision.release()
        if self.flash is not None:
            self._router.release()

    def new_cache(self) -> KVCache:
        return self.language_part.new_cache()

    def give_back(self, cache: KVCache) -> None:
        self.language_part.give_back(cache)

    def forget(self) -> None:
        super().forget()
        self.language_part.forget()

    def lend_cache(self, keys: np.ndarray) -> AbstractContextManager[KVCache]:
        return self.language_part.lend_cache(keys)


def _wait(opening: Sequence[Future[Any]], progress: Progress | None) -> None:
    """Wait until all parts are opened or have failed; Ctrl-C ends the wait."""
    while (seen := wait(opening, timeout=GLANCE_SECONDS)).not_done:
        if progress is not None:
            progress("parts", len(seen.done), len(opening))


def _checked_defaults(file: Path) -> dict[str, Any]:
    """The values of generation_config.json, validated. Raises ModelFolderError."""
    defaults = read_generation_config(file)
    try:
        Decoding.of(defaults, {})
    except InternVLError as error:
        raise ModelFolderError(f"{file}: {error}; correct it, or convert the checkpoint again") from None
    return defaults


def _context_id(tokenizer: Tokenizer, raw: Mapping[str, Any], folder: Path) -> int:
    """The id of the context token, on which config.json and the tokenizer must agree; optimum-cli's config.json may omit it.

    Raises TokenizerError, ModelFolderError.
    """
    found, named = tokenizer.convert_tokens_to_ids(CONTEXT_TOKEN), raw.get("img_context_token_id")
    if found is None:
        raise TokenizerError(
            f"the tokenizer of {folder} has no {CONTEXT_TOKEN}, which stands for pictures: it is not an InternVL tokenizer; "
            "fetch the tokenizer files again and convert the checkpoint again"
        )
    if named not in (None, found):
        raise ModelFolderError(
            f"{folder / CONFIG_FILE} says img_context_token_id {named}, the tokenizer gives {CONTEXT_TOKEN} the id {found}: "
            "the folder mixes two models; convert the checkpoint again"
        )
    return found
