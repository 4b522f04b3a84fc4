"""Find the fastest OpenVINO settings of this machine: candidates are timed on the parts, the best are kept in the model folder.

A candidate and the default run by turns, and the best candidate is timed a second time, so that noise does not decide. settings.py
stores and reads the result. Knows no prompts.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from runtime.errors import DeviceError, InternVLError, ModelFolderError
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.files import CONFIG_FILE, DECODE_FILE, PART_FILES, TUNED_FILE, bytes_of, check_folder, check_space, save_model
from runtime.folder.settings import BEST, keep, machine, settings_of
from runtime.parts.device import COMBINING, Placement, place_parts
from runtime.parts.language_part import LanguagePart
from runtime.parts.part import ACTIVATION_GROUP, read_part
from runtime.parts.rows import to_int8_rows
from runtime.parts.stateless_part import StatelessPart

PROMPT_TOKENS, NEW_TOKENS = 512, 16  # of one measurement of the language part
ANSWER_TOKENS = 128  # of the answer that settings are optimised for, about one picture with all its tiles
LEAST_RUNS, MOST_RUNS, LEAST_SECONDS = 3, 40, 2.0  # of a comparison: short runs are repeated more often
LEAST_GAIN = {"vision": 0.05, "language": 0.05, "decode": 0.1}  # of the time: less is noise, or not worth a second copy of weights
TUNED_PARTS, STAGES = ("vision", "language"), tuple(LEAST_GAIN)
TRIED_FILE = ".tuned_decode.xml"  # before it is known to be worth keeping
RULER_QUESTIONS = 1000
RULER = "demo.shapes"  # the exam that gives the accuracy, if the folder was converted from its checkpoint
Report = Callable[[str, int, int], None]  # what is tried, done, total
Plans = dict[str, tuple[dict[str, Any], Callable[[], "_Trial"]]]  # what is kept of each candidate if it wins, and its trial


def tune(folder: Path, device: str = "CPU", report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Find settings for the vision part, the language part and decode, write them to the folder and return them.

    Returns {"parts": {part: properties}, "decode": {"file", "properties", "bytes"} or None, "seconds": {"tile", "prompt_token",
    "token"}, "gain": {stage: share of the time}, "agreement": share of greedy tokens equal to the default's, "accuracy": share of
    right answers {"default", "tuned"} of the built-in model, else None, "tried": [...], "machine"}. Raises InternVLError kinds.
    """
    check_folder(folder)
    if not os.access(folder, os.W_OK):
        raise ModelFolderError(
            f"{folder} cannot be written, and tune keeps its settings there: copy the folder to where you may write"
        )
    core = ov.Core()
    if device == BEST:
        return _tune_devices(folder, core, report)
    if device.partition(":")[0] in COMBINING:
        raise DeviceError(f"{device} combines devices: tune one of them, like {core.available_devices[0]}")
    config = InternVLConfig.from_dict(read_config(folder / CONFIG_FILE))
    placed = place_parts(core, folder, device)
    trial = partial(_Trial, folder, core, config)
    found: dict[str, Any] = {"machine": machine(core, device), "parts": {}, "decode": None, "seconds": {}, "gain": {}, "tried": []}
    numbers = [len([*candidates(core, device, stage)]) for stage in STAGES]
    total = 1 + sum(numbers) + sum(1 for stage, number in zip(STAGES, numbers, strict=True) if number or stage in TUNED_PARTS)

    def hold(stage: str, default: _Trial, plans: Plans) -> dict[str, Any] | None:
        return _contest(stage, default, plans, config, found, lambda what, done: report(what, done, total))

    for part in TUNED_PARTS:
        plans: Plans = {}
        for name, more in candidates(core, placed[part].device, part):
            plans[name] = more, partial(trial, _with(placed[part], more))
        chosen = hold(part, trial(placed[part]), plans)
        found["parts"][part] = chosen or {}
        placed[part] = _with(placed[part], chosen or {})
    placed = place_parts(core, folder, device, tuned=lambda device: found)
    try:
        found["decode"] = _tune_decode(folder, core, placed["language"], placed.get("later"), config, trial, hold)
        keep(folder, device, found | {"agreement": 1.0, "accuracy": None})
    finally:
        for file in _both(folder / TRIED_FILE):
            file.unlink(missing_ok=True)
    report("agreement", total - 1, total)
    changed = found["decode"] or any(found["parts"].values())
    found |= {
        "agreement": _agreement(folder, device, config) if changed else 1.0,
        "accuracy": _accuracy(folder, device) if changed else None,
    }
    keep(folder, device, found)
    return found


def _tune_devices(folder: Path, core: ov.Core, report: Report) -> dict[str, Any]:
    """Tune each device, then time each large part, tuned, on each device against the CPU; for `--device auto`.

    The parts of an answer run one after the other, so the best device of each part gives the best pair of devices. Returns
    {"device", "vision_device"} and "seconds", "gain", "tried", "machine" as for a single one.
    """
    config = InternVLConfig.from_dict(read_config(folder / CONFIG_FILE))
    devices = [name for name in core.available_devices if name == "CPU" or name.startswith("GPU")]
    for name in devices:
        tune(folder, name, lambda what, done, total, name=name: report(f"{name}, {what}", done, total))  # type: ignore[misc]
    placed = {name: place_parts(core, folder, name, tuned=partial(settings_of, folder, core)) for name in devices}
    found: dict[str, Any] = {"machine": machine(core, BEST), "seconds": {}, "gain": {}, "tried": []}

    def trial(device: str, part: str) -> _Trial:
        decode = placed[device].get("decode") or placed[device].get("later")
        return _Trial(folder, core, config, placed[device][part], decode if part == "language" else None)

    for part, key in (("language", "device"), ("vision", "vision_device")):
        plans: Plans = {f"on {name}": ({"device": name}, partial(trial, name, part)) for name in devices if name != "CPU"}
        chosen = _contest(part, trial("CPU", part), plans, config, found, lambda what, done: report(what, done, 2 * len(devices)))
        found[key] = (chosen or {"device": "CPU"})["device"]
    keep(folder, BEST, found)
    return found


def candidates(core: ov.Core, device: str, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and properties of the candidates on a device; none is part of the default.

    For "decode" the language part is compiled a second time; {"rows": True} gives it int8 weights with a scale a row.
    """
    able = set(core.get_property(device, "OPTIMIZATION_CAPABILITIES")) if device in core.available_devices else set()
    if stage == "decode":
        if device == "CPU":
            yield "int8 weights, a scale a row", {"rows": True}
            if "BF16" in able:
                yield "computed in f32", {"INFERENCE_PRECISION_HINT": "f32"}
                yield "int8 weights, a scale a row, in f32", {"rows": True, "INFERENCE_PRECISION_HINT": "f32"}
        return
    if able & {"BF16", "FP16"}:
        yield "computed in f32", {"INFERENCE_PRECISION_HINT": "f32"}
    if "BF16" in able and "FP16" in able:
        yield "computed in bf16", {"INFERENCE_PRECISION_HINT": "bf16"}
    yield "activations not quantised", {ACTIVATION_GROUP: 0}
    group = 32 if device == "CPU" else 128  # the default of a CPU is the larger group
    yield f"activations quantised by {group}", {ACTIVATION_GROUP: group}
    if device == "CPU":
        yield "threads on all kinds of cores", {"SCHEDULING_CORE_TYPE": "ANY_CORE", "ENABLE_HYPER_THREADING": True}
        yield "threads on performance cores", {"SCHEDULING_CORE_TYPE": "PCORE_ONLY"}


def _with(placement: Placement, more: dict[str, Any]) -> Placement:
    return replace(placement, properties=placement.properties | more)


def _both(xml: Path) -> tuple[Path, Path]:
    return xml, xml.with_suffix(".bin")


def _contest(
    stage: str,
    default: _Trial,
    plans: Plans,
    config: InternVLConfig,
    found: dict[str, Any],
    tell: Callable[[str, int], None],
) -> dict[str, Any] | None:
    """What to keep of the candidate that wins twice, None for the default; adds to "tried", "gain" and "seconds" of `found`."""
    done = len(found["tried"]) + len(found["gain"])
    best, gain = "", 0.0
    found["seconds"] |= default()
    for number, (name, (_, make)) in enumerate(plans.items()):
        tell(f"{stage}, {name}", done + number)
        try:
            trial = make()
        except InternVLError as error:  # a property that this device does not know
            found["tried"].append({"stage": stage, "candidate": name, "refused": str(error)})
            continue
        if "SCHEDULING_CORE_TYPE" in plans[name][0] and trial.threads == default.threads:
            found["tried"].append({"stage": stage, "candidate": name, "refused": "the default's threads"})
            continue
        gained, base, other = _beside(default, trial, stage, config)
        found["tried"].append({"stage": stage, "candidate": name, "gain": gained, **other})
        if not best:
            found["seconds"] |= base
        if gained > max(LEAST_GAIN[stage], gain):
            best, gain = name, gained
    tell(f"{stage}, the best one again", done + len(plans))
    found["gain"][stage] = 0.0
    if not best:
        return None
    properties, make = plans[best]
    gained, _, other = _beside(default, make(), stage, config)
    if gained <= LEAST_GAIN[stage]:
        return None
    found["gain"][stage] = gained
    found["seconds"] |= other
    return properties


def _tune_decode(
    folder: Path,
    core: ov.Core,
    language: Placement,
    default: Placement | None,
    config: InternVLConfig,
    trial: Callable[..., _Trial],
    hold: Callable[[str, _Trial, Plans], dict[str, Any] | None],
) -> dict[str, Any] | None:
    """The second compilation of the language part if it decodes faster than `default`: its file, properties and bytes."""
    offered = [*candidates(core, language.device, "decode")]
    if default is not None:
        offered = [(name, more) for name, more in offered if _with(language, more) != default]
    if not offered:  # the kept file of decode belongs to the CPU, not to this device
        return None
    if any("rows" in more for _, more in offered):
        check_space(folder, 2 * bytes_of(folder, "language"))
        model = read_part(core, folder, language, config.language["hidden_size"])
        if not to_int8_rows(model):
            offered = [(name, more) for name, more in offered if "rows" not in more]
        save_model(model, folder / TRIED_FILE)
        del model
    plans: Plans = {}
    for name, more in offered:
        file = TRIED_FILE if "rows" in more else PART_FILES["language"]
        properties = {key: value for key, value in more.items() if key != "rows"}
        second = replace(_with(language, properties), other_file=file)
        plans[name] = {"file": file, "properties": properties}, partial(trial, language, second)
    chosen = hold("decode", trial(language, default), plans) if plans else None
    for target in _both(folder / DECODE_FILE):
        target.unlink(missing_ok=True)
    if chosen is None:
        return None
    size = (folder / chosen["file"]).with_suffix(".bin").stat().st_size
    if chosen["file"] == TRIED_FILE:
        chosen = chosen | {"file": DECODE_FILE}
        for source, target in zip(_both(folder / TRIED_FILE), _both(folder / DECODE_FILE), strict=True):
            source.replace(target)
    return chosen | {"bytes": size}


class _Trial:
    """One placed part; a call measures {"tile"} or {"prompt_token", "token"} once, in seconds."""

    def __init__(self, folder: Path, core: ov.Core, config: InternVLConfig, placement: Placement, decode: Placement | None = None):
        width = config.language["hidden_size"]
        rng = np.random.default_rng(0)
        self._run: Callable[[], dict[str, float]]
        if placement.part == "vision":
            vision = StatelessPart(folder, core, placement, width)
            self.threads = vision.threads
            tile = rng.random((1, 3, config.tile_size, config.tile_size), np.float32)
            self._run = lambda: {"tile": _seconds(lambda: vision(tile))}
        else:
            language = LanguagePart(
                folder,
                core,
                placement,
                width,
                plain_length=config.plain_length,
                window=config.window,
                reuse=False,
                decode=decode,
            )
            language.pack()
            self.threads = language.threads
            embeds = 0.02 * rng.standard_normal((1, PROMPT_TOKENS + NEW_TOKENS, width)).astype(np.float32)
            self._run = lambda: _language_seconds(language, embeds)
        self._warm = False

    def __call__(self) -> dict[str, float]:
        if not self._warm:
            self._run()  # warm-up
            self._warm = True
        return self._run()


def _language_seconds(language: LanguagePart, embeds: np.ndarray) -> dict[str, float]:
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


def _beside(one: _Trial, other: _Trial, stage: str, config: InternVLConfig) -> tuple[float, dict[str, float], dict[str, float]]:
    """The share of the time that `other` saves, by medians or by the shortest runs, whichever is less; the medians of both.

    A candidate that saves too little in the first pair of runs is not measured further.
    """
    rule = _SCORES[stage]
    runs: list[tuple[dict[str, float], dict[str, float]]] = []
    started = time.perf_counter()
    while len(runs) < LEAST_RUNS or (time.perf_counter() - started < LEAST_SECONDS and len(runs) < MOST_RUNS):
        runs.append((one(), other()))
        if len(runs) == 1 and rule(runs[0][1], config) > (1 - LEAST_GAIN[stage]) * rule(runs[0][0], config):
            break
    gains, middle = [], []
    for pick in (min, statistics.median):
        first, second = ({key: pick(run[place][key] for run in runs) for key in runs[0][0]} for place in (0, 1))
        gains.append(1 - rule(second, config) / rule(first, config))
        middle = [first, second]
    return min(gains), middle[0], middle[1]


def _language_score(seconds: dict[str, float], config: InternVLConfig) -> float:
    """Seconds of the language part in the answer that settings are optimised for."""
    tokens = config.tokens_per_tile * (config.max_tiles + 1)
    return tokens * seconds["prompt_token"] + ANSWER_TOKENS * seconds["token"]


_SCORES: dict[str, Callable[[dict[str, float], InternVLConfig], float]] = {
    "vision": lambda seconds, config: seconds["tile"],
    "language": _language_score,
    "decode": lambda seconds, config: seconds["token"],
}


def _agreement(folder: Path, device: str, config: InternVLConfig) -> float:
    """Share of the greedy tokens of a few answers that equal the default's, up to the first difference."""
    from runtime.answer.model import OpenedModel

    answers: list[list[list[int]]] = []
    for tuned in (False, True):
        model = OpenedModel(folder, device, tuned=tuned)
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


def _accuracy(folder: Path, device: str) -> dict[str, float] | None:
    """Share of right answers with default and tuned settings, if the folder is the built-in model; runs processes of their own."""
    spec = find_spec(RULER) if find_spec(RULER.partition(".")[0]) else None
    if spec is None or not spec.submodule_search_locations:
        return None
    ours, theirs = (
        read_config(folder / CONFIG_FILE),
        read_config(Path(spec.submodule_search_locations[0], "checkpoint", CONFIG_FILE)),
    )
    if any(ours.get(name) != theirs[name] for name in ("llm_config", "vision_config", "template")):
        return None
    with tempfile.TemporaryDirectory() as work:
        plain = shutil.copytree(folder, Path(work, "default"), ignore=shutil.ignore_patterns(TUNED_FILE))
        right = {}
        for name, asked in (("default", plain), ("tuned", folder)):
            command = [sys.executable, "-m", RULER, "evaluate", str(asked), "--device", device, "--limit", str(RULER_QUESTIONS)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            if "is not installed" in done.stderr:  # a package that draws the questions
                return None
            done.check_returncode()
            right[name] = json.loads(done.stdout.splitlines()[-1])["accuracy"]
    return right
