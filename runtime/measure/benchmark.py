"""How fast a model folder answers: first token, time per token, second turn, the same picture again, peak memory.

Measures whole conversations, not single parts. Medians over repeats, after a warm-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.answer.model import OpenedModel
from runtime.parts.memory import peak_bytes

QUESTION, SECOND_QUESTION = "Describe this picture.", "What colour is it?"
PICTURE_SIZE = (1000, 750)  # 13 tiles for most models


def benchmark(
    folder: Path,
    image: Path | None = None,
    *,
    max_tiles: int | None = None,
    max_new_tokens: int = 32,
    repeats: int = 3,
    warm_up: int = 1,
    report: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Open `folder` with the model's `options` and time conversations about `image`, or a random picture.

    Returns medians in seconds; `report` gets a line for each run. Answers may be shorter than `max_new_tokens`.
    """
    started = time.perf_counter()
    model = OpenedModel(folder, **options)
    load = time.perf_counter() - started
    random = np.random.default_rng(0).integers(0, 255, (PICTURE_SIZE[1], PICTURE_SIZE[0], 3), np.uint8)
    source = Image.fromarray(random) if image is None else image
    exactly: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    runs: list[dict[str, float]] = []
    counts: dict[str, int] = {}
    for number in range(warm_up + repeats):
        conversation = other = None  # otherwise their KV caches would be reused
        model.forget()
        conversation = model.start_conversation()
        conversation.ask(QUESTION, images=[source], max_tiles=max_tiles, **exactly)
        first = conversation.statistics
        conversation.ask(SECOND_QUESTION, **exactly)
        second = conversation.statistics
        other = model.start_conversation()
        other.ask(SECOND_QUESTION, images=[source], max_tiles=max_tiles, **exactly)
        again = other.statistics
        assert first is not None
        assert second is not None
        assert again is not None
        run = {
            "first_token_seconds": first.first_token_seconds,
            "token_seconds": first.token_seconds or 0.0,
            "second_turn_seconds": second.first_token_seconds,
            "same_picture_seconds": again.first_token_seconds,
        }
        counts = {"tiles": first.tiles, "prompt_tokens": first.prompt_tokens, "new_tokens": first.new_tokens}
        report(f"{'warm-up' if number < warm_up else 'run'} {number + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in run.items()))
        if number >= warm_up:
            runs.append(run)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"folder": folder.name, "load_seconds": load, **counts, **medians, "peak_gb": peak_bytes() / 1e9, "repeats": repeats}
