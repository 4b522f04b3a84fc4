"""python -m runtime info FOLDER: what a model folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.commands.options import add_folder
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.files import CONFIG_FILE, PART_FILES, bytes_of, check_folder, parts_of
from runtime.parts.device import MODEL_CACHE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)


def run(folder: Path) -> None:
    """Print what a model folder holds."""
    from runtime.parts.compile_cache import bytes_kept

    check_folder(folder)
    config = InternVLConfig.from_dict(read_config(folder / CONFIG_FILE))
    tiles = f"{config.min_tiles} to {config.max_tiles}" if config.dynamic_image_size else "1"
    each = f"{config.tokens_per_tile}" + (f" or {config.few_per_tile}" if config.flash else "")
    rows = {
        "folder": folder,
        "language model": f"{config.language_architecture}, {config.language.get('num_hidden_layers')} layers",
        "vision model": f"InternViT, {config.vision.num_hidden_layers} layers of {config.vision.hidden_size}",
        "template": config.template,
        "context": f"{config.context_length} tokens",
        "tiles": f"{tiles} of {config.tile_size} pixels, {each} tokens each",
        **{part: f"{bytes_of(folder, part) / 1e6:.1f} MB  {PART_FILES[part]}" for part in parts_of(config)},
    }
    if (folder / MODEL_CACHE).is_dir():
        rows["compiled"] = f"{bytes_kept(folder / MODEL_CACHE) / 1e6:.1f} MB  {MODEL_CACHE}"
    for name, value in rows.items():
        print(f"{name:<16} {value}")
