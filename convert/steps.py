"""Steps of every conversion: the summary, a step that prints its time and memory, a part in 8 bits, saving a part, JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch

from convert.compress import bit_widths, compress
from convert.options import AUTO, W8A8, ConvertOptions
from convert.quantise import LEAST_COSINE, LEAST_WORST, quantise
from convert.scratch import Scratch
from convert.verify import Report
from runtime import __version__
from runtime.folder.files import PART_FILES, save_model
from runtime.media.tiles import IMAGENET_MEAN, IMAGENET_STD
from runtime.parts import memory

LOAD_TYPES = {"fp32": torch.float32, "fp16": torch.float16}  # other formats start from the stored type, mapped
BYTES_A_WEIGHT = {"fp32": 4.0, "fp16": 2.0, W8A8: 1.02, AUTO: 1.02, "int8": 1.02, "int4": 0.70}  # with an int8 head and scales


@dataclass
class Summary:
    """What a conversion wrote, and the time and memory that it took."""

    folder: Path
    seconds: float = 0.0
    verify_seconds: float = 0.0
    peak_bytes: int = 0
    part_bytes: dict[str, int] = field(default_factory=dict)
    widths: dict[str, dict[str, float]] = field(default_factory=dict)
    proof: str = ""  # of a vision part in w8a8
    search: dict[str, Any] | None = None  # of --max-loss
    report: Report | None = None

    def lines(self) -> list[str]:
        """The final table: files, sizes, bit widths."""
        rows = [f"{'file':<44}{'size':>10}   weights"]
        for part in self.part_bytes:
            widths = ", ".join(f"{share:.0%} {kind}" for kind, share in self.widths[part].items() if share >= 0.005)
            told = f" ({self.proof})" if part == "vision" and self.proof else ""
            rows.append(f"{PART_FILES[part]:<44}{self.part_bytes[part] / 1e6:>7.1f} MB   {widths}{told}")
        took = f"{self.seconds:.0f} s" + (f" + {self.verify_seconds:.0f} s to verify" if self.report else ", not verified")
        total = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        return [*rows, f"{str(self.folder) + '/':<44}{total / 1e6:>7.1f} MB   in {took}, peak {self.peak_bytes / 1e9:.2f} GB"]


def preprocessor_config(side: int) -> dict[str, Any]:
    """preprocessor_config.json for pictures of `side` pixels.

    openvino_genai reads the side from size.shortest_edge only and falls back to 336 without it.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def step(name: str, size: Callable[[], int] | None = None) -> Iterator[None]:
    """Print the name of a step, then its time, the bytes it wrote and the peak memory so far."""
    started = time.monotonic()
    print(f"{name} ...", flush=True)
    yield
    took = f"{time.monotonic() - started:.1f} s" + (f", {size() / 1e6:.1f} MB" if size else "")
    print(f"{name}: {took}, peak memory {memory.peak_bytes() / 1e9:.2f} GB", flush=True)


def in_8_bits(
    model: ov.Model, weight_format: str, tiles: Sequence[np.ndarray], unseen: Sequence[np.ndarray], disk: Scratch | None
) -> tuple[ov.Model, str, str]:
    """The vision part in w8a8, or unchanged for int8 if w8a8 is neither proven nor requested; its format; a line on the proof.

    With `disk` it is computed in int8 to find ranges, and what is made is kept on the disk: for InternViT-6B, which fills the
    memory of a machine in 16 bits.
    """
    large: dict[str, Any] = {}
    if disk is not None:
        large = {"light": disk.mapped(compress(model.clone(), "int8", ConvertOptions())), "mapped": disk.mapped}
    made, proof = quantise(model, tiles, unseen, **large)
    if proof.holds or weight_format == W8A8:
        return made, W8A8, f"w8a8: {proof}" + ("" if proof.holds else f", below {LEAST_COSINE} and {LEAST_WORST}")
    return model, "int8", f"int8, since w8a8 gives {proof}"


def save_part(model: ov.Model, part: str, work: Path, source: str, weight_format: str, summary: Summary) -> None:
    """Write a part with its source in rt_info, and note the bit widths of its weights. Raises OSError."""
    for key, value in {"version": __version__, "source": source, "weight_format": weight_format}.items():
        model.set_rt_info(value, ["internvl_openvino", key])
    save_model(model, work / PART_FILES[part])
    summary.widths[part] = bit_widths(model)
