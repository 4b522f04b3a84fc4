"""python -m tests.bench_state FOLDER --device GPU: what it costs to read, cut and write OpenVINO's state of the language part.

Done when a turn is edited and when another conversation asks in between. By turns, the median and the shortest of some; ends with a
line of JSON. Tokens are zeros: what they say changes no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.answer.model import OpenedModel
from runtime.parts.stateful_cache import StatefulCache

REPEATS = 5


class Held:
    """A KV cache of some tokens in OpenVINO's state."""

    def __init__(self, model: OpenedModel, tokens: int):
        self._width = model.config.language["hidden_size"]
        self.cache = model.new_cache()
        if not isinstance(self.cache, StatefulCache):
            raise SystemExit(f"{model.ov_device} keeps pages, not OpenVINO's state: give --device GPU, or HETERO:CPU to try")
        self._tokens = tokens
        self.fill()

    def fill(self) -> None:
        """Feed what is missing, and one token more, so that the state is in the request."""
        keys = np.arange(self._tokens)
        kept = self.cache.keep(keys)
        self._feed(self._tokens - kept)
        self.token()

    def token(self) -> None:
        """An ordinary token."""
        self._feed(1)

    def set_aside(self) -> None:
        """Read the state, as before another conversation's turn; the next token writes it again."""
        self.cache._turns.states_of(self.cache)

    def cut(self) -> None:
        """Drop the second half, as when a turn is edited."""
        self.cache.keep(np.arange(self._tokens // 2 + 1))

    def _feed(self, count: int) -> None:
        self.cache.feed(np.zeros((1, count, self._width), np.float32), np.ones((1, count), np.int64), None)


def milliseconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def measure(model: OpenedModel, tokens: int) -> dict[str, Any]:
    """One row of the table."""
    held, found = Held(model, tokens), dict[str, list[float]]()
    for _ in range(REPEATS):
        for name, work in (("token", held.token), ("set aside", held.set_aside), ("token after it", held.token)):
            found.setdefault(name, []).append(milliseconds(work))
        found.setdefault("cut to half", []).append(milliseconds(held.cut))
        found.setdefault("token after the cut", []).append(milliseconds(held.token))
        held.fill()
    size = sum(state.get_byte_size() for state in held.cache._turns.states_of(held.cache).values())
    return {"tokens": tokens, "megabytes": size / 1e6} | {
        name: {"median": statistics.median(each), "shortest": min(each)} for name, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="GPU")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[250, 1000, 2000])
    given = parser.parse_args()
    model = OpenedModel(given.folder, given.device, vision_device="CPU", cache_dir=given.cache_dir)
    rows = []
    for tokens in given.tokens:
        rows.append(measure(model, tokens))
        times = "   ".join(f"{name} {each['median']:.1f}" for name, each in rows[-1].items() if isinstance(each, dict))
        print(f"{tokens} tokens, {rows[-1]['megabytes']:.1f} MB, milliseconds: {times}", flush=True)
    print(json.dumps({"folder": given.folder.name, "device": given.device, "rows": rows}))


if __name__ == "__main__":
    main()
