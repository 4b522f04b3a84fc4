"""What InternVL-C and -G cost: conversion and answers in the 14B's shape with few layers, and pictures a second beside PyTorch.

    python -m tests.bench_contrast shape --work FOLDER [--vision-layers N] [--decoder-layers N] [--weight-format int4]
    python -m tests.bench_contrast throughput --work FOLDER [--wide [--vision-layers N]]

Random weights; nothing here depends on their values. Each part of the work is a process of its own, so that its memory is. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

VISION_14B = {
    **{"model_type": "intern_vit_6b", "hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25},
    **{"image_size": 224, "patch_size": 14, "qk_normalization": True, "qkv_bias": False, "norm_type": "rms_norm"},
}
QLLAMA_14B = {"vocab_size": 49954, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
VISION_300M = {
    **{"model_type": "intern_vit_6b", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
    **{"image_size": 224, "patch_size": 14, "qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm"},
}
QLLAMA_SMALL = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_hidden_layers": 2}
TEXT_IDS = [1, *range(100, 118), 2]  # a short sentence


def make_checkpoint(folder: Path, vision: dict[str, Any], qllama: dict[str, Any]) -> Path:
    """Random weights in bfloat16 in the published layout, one file a part so that memory holds one part."""
    import torch
    from safetensors.torch import save_file

    from convert.reference.contrastive_model import PARTS
    from runtime.folder.contrastive import ContrastiveConfig

    folder.mkdir(parents=True)
    raw = {"model_type": "internvl", "vision_config": vision, "qllama_config": qllama}
    (folder / "config.json").write_text(json.dumps(raw))
    config, weight_map = ContrastiveConfig.from_dict(raw), {}
    width = config.qllama.hidden_size
    rest = {
        "qllama.model.embed_tokens.weight": (config.qllama.vocab_size, width),
        "query_tokens": (1, config.queries, width),
        "logit_scale": (),
        "itm_head.weight": (2, width),
        "itm_head.bias": (2,),
    }
    with torch.device("meta"):
        groups = [{name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()} for kind in PARTS]
    for number, group in enumerate([*groups, rest]):
        name = f"model-{number}.safetensors"
        tensors = {
            key: (0.02 * torch.randn(shape, dtype=torch.bfloat16) if len(shape) > 1 else torch.full(shape, 0.1).bfloat16())
            for key, shape in group.items()
        }
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


class AnonymousPeak:
    """The largest anonymous resident memory of this process while the block runs, looked at every 20 ms."""

    def __enter__(self) -> AnonymousPeak:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = max(self.bytes, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def convert_folder(source: Path, output: Path, weight_format: str, vision: str = "auto") -> dict[str, Any]:
    from convert import ConvertOptions, convert

    with AnonymousPeak() as peak:
        made = convert(str(source), output, ConvertOptions(weight_format=weight_format, vision_weight_format=vision, force=True))
    return {
        "seconds": made.seconds,
        "verify_seconds": made.verify_seconds,
        "anonymous_bytes": peak.bytes,
        "part_bytes": made.part_bytes,
        "folder_bytes": sum(file.stat().st_size for file in output.iterdir()),
        "cosines": {row.part: row.cosine for row in made.report.rows} if made.report else {},
    }


def ask_folder(folder: Path) -> dict[str, Any]:
    """Seconds a picture in each mode, a text, a token of a caption; five times after a first one."""
    from runtime import OVInternVL

    model = OVInternVL(folder)
    picture = np.random.default_rng(0).integers(0, 256, (640, 480, 3), np.uint8)
    found: dict[str, Any] = {}
    with AnonymousPeak() as peak:
        for name, work in {
            "picture_C": lambda: model.encode_images([picture]),
            "picture_G": lambda: model.encode_images([picture], "InternVL-G"),
            "text": lambda: model.encode_ids([TEXT_IDS]),
            "caption_12_tokens": lambda: model.write_captions(
                model.pixels_of(picture), [1, 5, 6], {"max_new_tokens": 12, "min_new_tokens": 12}
            ),
        }.items():
            times = []
            for _ in range(6):
                started = time.perf_counter()
                work()
                times.append(time.perf_counter() - started)
            found[name] = {"first": times[0], "shortest": min(times[1:]), "median": float(np.median(times[1:]))}
    return found | {"anonymous_bytes": peak.bytes}


def throughput(work: Path, wide_layers: int = 0, pictures: int = 32) -> dict[str, Any]:
    """Pictures a second from files to vectors: our embed on each weight format, and the PyTorch path in both types, by turns.

    InternViT-300M's shape, or some layers of InternViT-6B's and no float32.
    """
    import torch
    from PIL import Image

    from convert.checkpoint import ContrastiveCheckpoint
    from convert.reference.contrastive_model import InternVLModel
    from runtime import OVInternVL
    from runtime.contrast.embed import embed
    from runtime.media.fit import squeezed
    from runtime.media.picture import open_picture
    from runtime.media.tiles import normalise

    source, files = work / (f"6B-{wide_layers}" if wide_layers else "300M"), work / "photographs"
    if not source.exists():
        vision = VISION_14B | {"num_hidden_layers": wide_layers} if wide_layers else VISION_300M | {"num_hidden_layers": 24}
        make_checkpoint(source, vision, QLLAMA_SMALL)
    files.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(pictures):
        pixels = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).resize((640, 480))
        data = io.BytesIO()
        pixels.save(data, "JPEG")
        (files / f"{number:04}.jpg").write_bytes(data.getvalue())
    models = {}
    for weight_format, vision in (("fp16" if wide_layers else "fp32", "auto"), ("int8", "auto"), ("w8a8", "w8a8")):
        folder = Path(f"{source}-{weight_format}")
        if not folder.exists():
            convert_folder(source, folder, "int8" if weight_format == "w8a8" else weight_format, vision)
        models[weight_format] = OVInternVL(folder)
    checkpoint = ContrastiveCheckpoint(source)
    paths = sorted(files.iterdir())

    def ours(model: OVInternVL) -> None:
        out = work / "vectors.npz"
        out.unlink(missing_ok=True)
        assert len(embed(model, [files], out).paths) == pictures

    def theirs(model: InternVLModel, dtype: torch.dtype) -> None:
        """As upstream's evaluation does: a batch at a time, pictures opened before it."""
        with torch.inference_mode():
            for start in range(0, pictures, 16):
                pixels = normalise(np.stack([squeezed(open_picture(path), 224) for path in paths[start : start + 16]]))
                model.encode_image(torch.from_numpy(pixels).to(dtype), "InternVL-C")

    runs = {f"openvino {name}": lambda model=model: ours(model) for name, model in models.items()}
    for dtype in (torch.bfloat16,) if wide_layers else (torch.float32, torch.bfloat16):
        reference = InternVLModel.from_checkpoint(checkpoint, dtype=dtype)
        runs[f"pytorch {dtype}".replace("torch.", "")] = lambda model=reference, dtype=dtype: theirs(model, dtype)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(3):  # the first one warms up
        for name, work_once in runs.items():
            started = time.perf_counter()
            work_once()
            if turn:
                found[name].append(pictures / (time.perf_counter() - started))
    return {name: {"median": float(np.median(rates)), "all": rates} for name, rates in found.items()}


def child(*arguments: str) -> dict[str, Any]:
    """What another process of this file says in its last line."""
    command = [sys.executable, "-m", "tests.bench_contrast", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["shape", "throughput", "make", "convert", "ask"])
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--vision-layers", type=int, default=2)
    p.add_argument("--decoder-layers", type=int, default=2)
    p.add_argument("--weight-format", default="int4")
    p.add_argument("--wide", action="store_true", help="throughput in InternViT-6B's shape")
    options = p.parse_args()
    source = options.work / f"14B-{options.vision_layers}-{options.decoder_layers}"
    output = Path(f"{source}-{options.weight_format}")
    common = ["--work", str(options.work), "--vision-layers", str(options.vision_layers)]
    common += ["--decoder-layers", str(options.decoder_layers), "--weight-format", options.weight_format]
    if options.what == "make":
        vision, qllama = VISION_14B | {"num_hidden_layers": options.vision_layers}, QLLAMA_14B
        make_checkpoint(source, vision, qllama | {"num_hidden_layers": options.decoder_layers})
        result: dict[str, Any] = {}
    elif options.what == "convert":
        result = convert_folder(source, output, options.weight_format)
    elif options.what == "ask":
        result = ask_folder(output)
    elif options.what == "throughput":
        result = throughput(options.work, options.vision_layers if options.wide else 0)
    else:
        if not source.exists():
            child("make", *common)
        result = {"convert": child("convert", *common), "ask": child("ask", *common)}
    versions = {"cpus": os.cpu_count(), "vision_layers": options.vision_layers, "decoder_layers": options.decoder_layers}
    print(json.dumps({"what": options.what, **versions, "weight_format": options.weight_format, **result}))


if __name__ == "__main__":
    main()
