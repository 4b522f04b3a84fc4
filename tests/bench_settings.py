"""python -m tests.bench_settings FOLDER: what the formats of keys, values and activations cost, beside float32 on the same folder.

The language part reads a text of our documents and code in the runtime's own pages on a CPU; after some lengths of it the next
tokens are read one by one, as an answer is, and the log probabilities of each are compared. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from convert.quality import Measured
from runtime.answer.model import OpenedModel

ROOT = Path(__file__).parents[1]
LENGTHS, JUDGED = (300, 3400, 8000), 64
TEXT = (
    "docs/serving.md",
    "runtime/answer/chat_core.py",
    "docs/speed-conversion.md",
    "runtime/parts/paged_cache.py",
    "docs/models.md",
)
# EXECUTION_MODE_HINT ACCURACY is not set: with it OpenVINO 2026 takes KV_CACHE_PRECISION and computes with f32 all the same.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
SETTINGS = {  # what differs from EXACT; None is the runtime's default
    "keys and values in u8": {"KV_CACHE_PRECISION": "u8"},
    "keys and values in u4": {"KEY_CACHE_PRECISION": "u4", "VALUE_CACHE_PRECISION": "u4"},
    "the default": None,
    "computed in bf16, keys and values in bf16": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
    "activations in groups of 128": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"},
    "keys in u8, values in u4": {"KEY_CACHE_PRECISION": "u8", "VALUE_CACHE_PRECISION": "u4"},
    "activations in groups of 32": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"},
    "keys and values in f16": {"KV_CACHE_PRECISION": "f16"},
    "computed in bf16, keys and values in u8": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "u8"},
    "activations in groups of 64": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"},
}


def read(folder: Path, config: dict[str, str] | None, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """The log probabilities (JUDGED, V) of the tokens behind each length, teacher-forced; a token judged is a decode step."""
    model = OpenedModel(folder, "CPU", ov_config=config, tuned=False)
    model.wait_until_packed()
    model.language_part.take_second()  # decode is compiled apart after some answers, where that is the default
    ids = np.array(model.tokenizer.encode("\n".join((ROOT / file).read_text(encoding="utf-8") for file in TEXT)))
    if len(ids) < lengths[-1] + JUDGED:
        raise SystemExit(f"the text has {len(ids)} tokens")
    cache, at = model.new_cache(), 0
    cache.keep(ids)
    for length in lengths:
        said = []
        for end in range(length, length + JUDGED):
            embeds = np.array(model.embed_tokens(ids[None, at:end]))
            logits = cache.feed(embeds, np.ones((1, end - at), np.int64), ids[at:end])[0, 0]
            said.append(torch.from_numpy(np.array(logits)).log_softmax(-1))
            at = end
        yield torch.stack(said)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tests.bench_settings", description="Judge the formats that a CPU computes with.")
    p.add_argument("folder", metavar="FOLDER", type=Path)
    p.add_argument("--lengths", metavar="N", type=int, nargs="+", default=LENGTHS, help="rising (default: %(default)s)")
    p.add_argument("--only", metavar="TEXT", default="", help="settings whose name has this")
    options = p.parse_args()
    wanted, rows = [*read(options.folder, EXACT, options.lengths)], []
    for name in (name for name in SETTINGS if options.only in name):
        changes, cells = SETTINGS[name], {}
        for length, one, said in zip(
            options.lengths,
            wanted,
            read(options.folder, None if changes is None else EXACT | changes, options.lengths),
            strict=True,
        ):
            found = Measured()
            found.add(one, said)
            cells[str(length)] = found.to_dict()
        rows.append({"setting": name, **cells})
        print(f"| {name} |", *(f"{cell['kl']:.5f}, {cell['same']:.1%} |" for cell in cells.values()), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
