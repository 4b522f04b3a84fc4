"""python -m runtime info FOLDER: the contents of a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runtime.commands.options import add_folder
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.contrastive import CHAT, CONTRASTIVE, MODES, ContrastiveConfig, FeaturesConfig
from runtime.folder.files import CONFIG_FILE, PART_FILES, PARTS_OF, bytes_of, check_folder, kind_of_folder, parts_of
from runtime.folder.quality import read_quality
from runtime.parts.device import MODEL_CACHE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)


def run(folder: Path) -> None:
    """Print the contents of a model folder."""
    from runtime.parts.compile_cache import bytes_kept

    kind = kind_of_folder(folder)
    check_folder(folder, kind)
    raw = read_config(folder / CONFIG_FILE)
    rows = {"folder": folder, **(_of_chat(raw) if kind == CHAT else _of_others(raw, kind))}
    parts = parts_of(InternVLConfig.from_dict(raw)) if kind == CHAT else PARTS_OF[kind]
    rows |= {part: f"{bytes_of(folder, part) / 1e6:.1f} MB  {PART_FILES[part]}" for part in parts}
    if (folder / MODEL_CACHE).is_dir():
        rows["compiled"] = f"{bytes_kept(folder / MODEL_CACHE) / 1e6:.1f} MB  {MODEL_CACHE}"
    rows |= read_quality(folder)
    for name, value in rows.items():
        print(f"{name:<16} {value}")


def _of_chat(raw: dict[str, Any]) -> dict[str, str]:
    config = InternVLConfig.from_dict(raw)
    tiles = f"{config.min_tiles} to {config.max_tiles}" if config.dynamic_image_size else "1"
    each = f"{config.tokens_per_tile}" + (f" or {config.few_per_tile}" if config.flash else "")
    return {
        "language model": f"{config.language_architecture}, {config.language.get('num_hidden_layers')} layers",
        "vision model": f"InternViT, {config.vision.num_hidden_layers} layers of {config.vision.hidden_size}",
        "template": config.template,
        "context": f"{config.context_length} tokens",
        "tiles": f"{tiles} of {config.tile_size} pixels, {each} tokens each",
    }


def _of_others(raw: dict[str, Any], kind: str) -> dict[str, str]:
    config = ContrastiveConfig.from_dict(raw) if kind == CONTRASTIVE else FeaturesConfig.from_dict(raw)
    vision = config.vision
    rows = {
        "vision model": f"InternViT, {vision.num_hidden_layers} layers of {vision.hidden_size}",
        "pictures": f"{config.image_size} x {config.image_size} pixels",
    }
    if isinstance(config, ContrastiveConfig):
        q = config.qllama
        rows["QLLaMA"] = f"{q.num_hidden_layers} layers of {q.hidden_size}, {config.queries} queries"
        rows["embeddings"] = f"{config.embed_dim} numbers, modes {' and '.join(MODES)}"
    return rows
