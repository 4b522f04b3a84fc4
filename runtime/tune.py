"""Which OpenVINO properties answer soonest on this machine: tried on the parts themselves, kept in the model folder.

Each candidate is timed beside the default, taking turns, and the best one again, so that a noisy machine does not choose. What is
kept, and who reads it, is in settings.py. Knows no prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from transformers import GenerationConfig

from runtime.config import InternVLConfig, read_config
from runtime.device import Placement, place_parts
from runtime.embeddings import StatelessPart
from runtime.errors import InternVLError
from runtime.folder import CONFIG_FILE, check_folder
from runtime.language import OVLanguageModel
from runtime.settings import keep, machine

PROMPT_TOKENS, NEW_TOKENS = 512, 16  # of one measurement of the language part
ANSWER_TOKENS = 128  # of the answer that settings are chosen for, about one picture with all its tiles
LEAST_RUNS, MOST_RUNS, LEAST_SECONDS = 3, 40, 2.0  # of a comparison: short runs are many
LEAST_GAIN = 0.03  # of the time: less is noise
TUNED_PARTS = ("vision", "language")
Report = Callable[[str, int, int], None]  # what is tried, done, total


def tune(folder: Path, device: str = "CPU", report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Find the settings of both large parts, write them to the folder and return them.

    Returns {"parts": {part: properties}, "seconds": {"tile", "prompt_token", "token"}, "gain": {part: share of the time},
    "agreement": share of greedy tokens that are the default's, "tried": [...], "machine"}. Raises InternVLError kinds.
    """
    check_folder(folder)
    core = ov.Core()
    config = InternVLConfig.from_dict(read_config(folder / CONFIG_FILE))
    placed = place_parts(core, folder, device)
    plans = [(part, name, more) for part in TUNED_PARTS for name, more in candidates(core, placed[part].device)]
    tried: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, Any]] = {part: {} for part in TUNED_PARTS}
    gains, seconds = dict.fromkeys(TUNED_PARTS, 0.0), {"tile": 0.0, "prompt_token": 0.0, "token": 0.0}
    done = 0
    for part in TUNED_PARTS:
        default = _Trial(folder, core, placed[part], {}, config)
        seconds |= default()
        for _, name, more in [plan for plan in plans if plan[0] == part]:
            report(f"{part}, {name}", done, len(plans) + len(TUNED_PARTS) + 1)
            done += 1
            try:
                trial = _Trial(folder, core, placed[part], more, config)
            except InternVLError as error:  # a property that this device does not know
                tried.append({"part": part, "candidate": name, "refused": str(error)})
                continue
            gain, base, other = _beside(default, trial, config)
            tried.append({"part": part, "candidate": name, "gain": gain, **other})
            if not gains[part]:
                seconds |= base
            if gain > max(LEAST_GAIN, gains[part]):
                gains[part], chosen[part] = gain, more
        report(f"{part}, the best of them again", done, len(plans) + len(TUNED_PARTS) + 1)
        done += 1
        if chosen[part]:
            gain, _, other = _beside(default, _Trial(folder, core, placed[part], chosen[part], config), config)
            gains[part], chosen[part] = (gain, chosen[part]) if gain > LEAST_GAIN else (0.0, {})
            seconds |= other if chosen[part] else {}
        del default
    report("agreement", done, len(plans) + len(TUNED_PARTS) + 1)
    settings: dict[str, Any] = {
        "machine": machine(core, device),
        "parts": chosen,
        "seconds": seconds,
        "gain": gains,
        "agreement": _agreement(folder, device, config, chosen) if any(chosen.values()) else 1.0,
        "tried": tried,
    }
    keep(folder, device, settings)
    return settings


def candidates(core: ov.Core, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and properties that are worth a try on a device; none is in the default."""
    able = set(core.get_property(device, "OPTIMIZATION_CAPABILITIES")) if device in core.available_devices else set()
    if able & {"BF16", "FP16"}:
        yield "computed in f32", {"INFERENCE_PRECISION_HINT": "f32"}
    if "BF16" in able and "FP16" in able:
        yield "computed in bf16", {"INFERENCE_PRECISION_HINT": "bf16"}
    yield "activations not quantised", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    yield "activations quantised by 128", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
    if device == "CPU":
        yield "threads on all kinds of cores", {"SCHEDULING_CORE_TYPE": "ANY_CORE", "ENABLE_HYPER_THREADING": True}
        yield "threads on performance cores", {"SCHEDULING_CORE_TYPE": "PCORE_ONLY"}
        yield "threads pinned to cores", {"ENABLE_CPU_PINNING": True}


class _Trial:
    """One part with some properties; calling it measures {"tile"} or {"prompt_token", "token"} in seconds once."""

    def __init__(self, folder: Path, core: ov.Core, placement: Placement, more: dict[str, Any], config: InternVLConfig):
        placement = Placement(placement.part, placement.device, placement.properties | more)
        width = config.language["hidden_size"]
        rng = np.random.default_rng(0)
        self._run: Callable[[], dict[str, float]]
        if placement.part == "vision":
            vision = StatelessPart(folder, core, placement, width)
            tile = torch.from_numpy(rng.random((1, 3, config.tile_size, config.tile_size), np.float32))
            self._run = lambda: {"tile": _seconds(lambda: vision(tile))}
        else:
            language = OVLanguageModel(
                GenerationConfig(),
                folder,
                core,
                placement,
                config.language,
                lambda ids: ids,
                plain_length=config.plain_length,
                window=config.window,
                reuse=False,
            )
            embeds = 0.02 * rng.standard_normal((1, PROMPT_TOKENS + NEW_TOKENS, width)).astype(np.float32)
            self._run = lambda: _language_seconds(language, embeds)
        self._run()  # what is done once

    def __call__(self) -> dict[str, float]:
        return self._run()


def _language_seconds(language: OVLanguageModel, embeds: np.ndarray) -> dict[str, float]:
    cache, ones = language.new_cache(), np.ones((1, PROMPT_TOKENS), np.int64)
    prompt = _seconds(lambda: cache.feed(embeds[:, :PROMPT_TOKENS], ones, np.arange(PROMPT_TOKENS)))

    def write() -> None:
        for place in range(PROMPT_TOKENS, embeds.shape[1]):
            cache.feed(embeds[:, place : place + 1], ones[:, :1], np.array([place]))

    return {"prompt_token": prompt / PROMPT_TOKENS, "token": _seconds(write) / NEW_TOKENS}


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _beside(one: _Trial, other: _Trial, config: InternVLConfig) -> tuple[float, dict[str, float], dict[str, float]]:
    """What share of the time the other one saves, by medians or by the shortest runs, whichever is less; the medians of both."""
    runs: list[tuple[dict[str, float], dict[str, float]]] = []
    started = time.perf_counter()
    while len(runs) < LEAST_RUNS or (time.perf_counter() - started < LEAST_SECONDS and len(runs) < MOST_RUNS):
        runs.append((one(), other()))
    gains, middle = [], []
    for pick in (min, statistics.median):
        first, second = ({key: pick(run[place][key] for run in runs) for key in runs[0][0]} for place in (0, 1))
        gains.append(1 - _score(second, config) / _score(first, config))
        middle = [first, second]
    return min(gains), middle[0], middle[1]


def _score(seconds: dict[str, float], config: InternVLConfig) -> float:
    """Seconds of the answer that settings are chosen for, as far as this part takes them."""
    tokens = config.tokens_per_tile * (config.max_tiles + 1)
    return seconds["tile"] if "tile" in seconds else tokens * seconds["prompt_token"] + ANSWER_TOKENS * seconds["token"]


def _agreement(folder: Path, device: str, config: InternVLConfig, chosen: dict[str, dict[str, Any]]) -> float:
    """Share of the greedy tokens of a few answers that are the same under the default, up to the first that is not."""
    from runtime.model import OVInternVLChatModel

    answers: list[list[list[int]]] = []
    for properties in ({}, chosen):
        model = OVInternVLChatModel(folder, device, part_config=properties, tuned=False)
        found = []
        for seed, question in enumerate(("Describe this picture.", "What colour is it?", "How many are there?")):
            pixels = np.random.default_rng(seed).integers(0, 255, (config.tile_size, config.tile_size, 3), np.uint8)
            conversation = model.start_conversation()
            conversation.ask(question, images=[pixels], max_new_tokens=32, do_sample=False)
            found.append(conversation.turns[-1].tokens if conversation.turns else [])
        answers.append(found)
        del model
    same = total = 0
    for ours, theirs in zip(*answers, strict=True):
        differ = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        same, total = same + differ, total + max(len(ours), len(theirs))
    return same / total if total else 1.0
