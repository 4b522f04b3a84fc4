"""The language parts of some model folders by turns: what a prompt and a token take.

    python -m tests.bench_language FOLDER... [--tokens 300] [--turns 5] [--step 16]

Opened as answers open them, decode in its second compilation where the processor has one. Embeddings are random, so that tokens
take experts as evenly as they can. The last line is JSON: seconds of a prompt and of a token, the shortest and the median, by
folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino as ov

from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.files import CONFIG_FILE
from runtime.parts.device import place_parts
from runtime.parts.language_part import LanguagePart

SIZE = 0.5  # of an embedding's numbers


class Part:
    """A language part with its times: of prompts of `tokens` tokens, and of single tokens after them, `step` at a time."""

    def __init__(self, folder: Path, core: ov.Core, tokens: int, step: int, properties: dict[str, Any]):
        config = InternVLConfig.from_dict(read_config(folder / CONFIG_FILE))
        self.width: int = config.language["hidden_size"]
        placed = place_parts(core, folder, "CPU", part_config={"language": properties})
        self._part = LanguagePart(
            folder,
            core,
            placed["language"],
            self.width,
            plain_length=config.plain_length,
            window=config.window,
            reuse=False,
            later=placed.get("later"),
        )
        self._part.pack()
        self._part.take_second()
        self._tokens, self._step = tokens, step
        self._random = np.random.default_rng(0)
        self.prompts: list[float] = []
        self.steps: list[float] = []

    def turn(self) -> None:
        """One prompt, then `step` tokens."""
        cache = self._part.new_cache()
        self.prompts.append(self._feed(cache, self._tokens))
        self._feed(cache, 1)  # a new cache makes its request for single tokens
        self.steps += [self._feed(cache, 1) for _ in range(self._step)]

    def _feed(self, cache: Any, count: int) -> float:
        embeds = SIZE * self._random.standard_normal((1, count, self.width), np.float32)
        started = time.perf_counter()
        cache.feed(embeds, np.ones((1, count), np.int64), np.arange(count))
        return time.perf_counter() - started

    def forget(self) -> None:
        """Drop what was measured so far."""
        self.prompts, self.steps = [], []


def compare(
    folders: list[Path], tokens: int, turns: int, step: int, properties: dict[str, Any]
) -> dict[str, dict[str, list[float]]]:
    """The shortest and the median seconds of a prompt and of a token, by folder; a first turn of each is not counted."""
    core = ov.Core()
    parts = {str(folder): Part(folder, core, tokens, step, properties) for folder in folders}
    for number in range(turns + 1):
        for part in parts.values():
            if number == 1:
                part.forget()
            part.turn()
    return {
        name: {kind: [min(times), median(times)] for kind, times in (("prompt", part.prompts), ("token", part.steps))}
        for name, part in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=300, help="of a prompt (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="prompts of each folder (default: %(default)s)")
    parser.add_argument("--step", type=int, default=16, help="single tokens after a prompt (default: %(default)s)")
    parser.add_argument("--property", action="append", default=[], metavar="NAME=VALUE", help="of OpenVINO, for all parts")
    given = parser.parse_args()
    properties = dict(text.split("=", 1) for text in given.property)
    found = compare(given.folders, given.tokens, given.turns, given.step, properties)
    for name, times in found.items():
        told = (f"{kind} {1000 * low:.1f}, {1000 * middle:.1f} ms" for kind, (low, middle) in times.items())
        print(name, *told, sep="; ", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
