"""The conversion of InternVL-C and -G and of InternViT alone: parts, tokenizer, configuration, proof; pipeline.py is chat's.

One part is in memory at a time. Knows the parts; what they compute is in reference/contrastive.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import openvino as ov
import torch

from convert.calibration import calibration_tiles, find_pictures, tiles_at_hand
from convert.checkpoint import ContrastiveCheckpoint, Empty
from convert.compress import check_group_size, compress
from convert.options import AUTO, W8A8, ConvertOptions
from convert.reference.contrastive import FeaturesPart, QLlamaPart, QueryPoolPart, VisionEmbeddingPart
from convert.reference.contrastive_model import SCALE, expected_shapes, load_part, load_table
from convert.scratch import Scratch
from convert.steps import BYTES_A_WEIGHT, LOAD_TYPES, Summary, in_8_bits, preprocessor_config, save_part, step, write_json
from convert.trace import (
    forget_traces,
    trace_features,
    trace_qllama,
    trace_query_pool,
    trace_text_embeddings,
    trace_vision_embedding,
)
from convert.verify_contrast import verify
from runtime.errors import OptionError, TokenizerError
from runtime.folder.contrastive import CONTRASTIVE, ContrastiveConfig
from runtime.folder.files import (
    CONFIG_FILE,
    PARTS_OF,
    PREPROCESSOR_CONFIG_FILE,
    SENTENCEPIECE_FILE,
    bytes_of,
    check_space,
    new_folder,
)
from runtime.folder.sentences import Sentences
from runtime.media.tiles import Tiling
from runtime.parts import memory

OF_CHAT = {  # options for chat models only
    "template": "--template",
    "system_message": "--system-message",
    "adapter": "--adapter",
    "serving": "--serving",
    "scale_estimation": "--scale-estimation",
    "reference_cache": "--reference-cache",
    "max_loss": "--max-loss",
}
INTERNVIT_6B_FORMATS = ("fp32", "fp16", "int8", W8A8)


def run(folder: Path, source: str, final: Path, options: ConvertOptions) -> Summary:
    """Convert the checkpoint in `folder`, called `source`, to `final`; see convert.convert."""
    started = time.monotonic()
    # 1) find every mistake before any work
    for name, flag in OF_CHAT.items():
        if getattr(options, name):
            raise OptionError(f"{flag} is for chat models; {source} is none")
    checkpoint = ContrastiveCheckpoint(folder)
    for note in checkpoint.notes:
        print(note, flush=True)
    checkpoint.check(expected_shapes(checkpoint))
    formats = _formats(checkpoint, options)
    check_group_size(_row_widths(checkpoint, formats), options.nncf_group)
    check_space(final, _expected_bytes(checkpoint, formats))
    words = _words(checkpoint)
    pictures = find_pictures(options.dataset, options.num_samples) if options.dataset else []
    with new_folder(final, force=options.force) as work:
        summary = Summary(final)
        # 2) one part in memory at a time
        for part in PARTS_OF[checkpoint.kind]:
            with step(f"{part} ({W8A8 if formats[part] == AUTO else formats[part]})", partial(bytes_of, work, part)):
                formats[part] = _convert_part(part, checkpoint, formats[part], options, source, work, pictures, summary)
            summary.part_bytes[part] = bytes_of(work, part)
        # 3) tokenizer and configuration
        if words is not None:
            shutil.copy(folder / SENTENCEPIECE_FILE, work)
        config = checkpoint.raw_config
        if checkpoint.kind == CONTRASTIVE:
            config = config | {"logit_scale": float(checkpoint.tensors([SCALE])[SCALE])}
        write_json(work / CONFIG_FILE, config)
        write_json(work / PREPROCESSOR_CONFIG_FILE, preprocessor_config(checkpoint.config.image_size))
        summary.seconds = time.monotonic() - started
        # 4) the proof
        if options.verify:
            with step("verify"):
                summary.report = verify(checkpoint, work, formats)
            print(*summary.report.lines(), sep="\n", flush=True)
            summary.report.raise_if_drifted()
            summary.verify_seconds = time.monotonic() - started - summary.seconds
    summary.peak_bytes = memory.peak_bytes()
    return summary


def _formats(checkpoint: ContrastiveCheckpoint, options: ConvertOptions) -> dict[str, str]:
    """The weight format of each part. Raises OptionError for an InternViT-6B below int8, or options that contradict each other."""
    vision = options.formats(["vision"], vision_is_6b=False)["vision"]
    if _is_6b(checkpoint) and vision not in (AUTO, *INTERNVIT_6B_FORMATS):
        raise OptionError(f"InternViT-6B loses too much in {vision}: use {', '.join(INTERNVIT_6B_FORMATS)} for the vision part")
    if options.dataset and vision not in (AUTO, W8A8):
        raise OptionError("the dataset is not used: leave it out; only a vision part in w8a8 is calibrated on it")
    small = {"int4": "int8"}.get(options.weight_format, options.weight_format)
    chosen = {
        "text_embeddings": options.text_embeddings_weight_format or small,
        "vision": vision,
        "qllama": options.weight_format,
        "query_pool": small,
    }
    return {part: chosen[part] for part in PARTS_OF[checkpoint.kind]}


def _words(checkpoint: ContrastiveCheckpoint) -> Sentences | None:
    """The tokenizer, if there is one. Raises TokenizerError if it does not fit the embedding table."""
    if not isinstance(checkpoint.config, ContrastiveConfig):
        return None
    if not (checkpoint.folder / SENTENCEPIECE_FILE).exists():
        print(
            f"there is no {SENTENCEPIECE_FILE}: the folder will take texts as token ids only, and write captions as such",
            flush=True,
        )
        return None
    words, rows = Sentences(checkpoint.folder, checkpoint.config.qllama), checkpoint.config.qllama.vocab_size
    if words.size > rows:
        raise TokenizerError(f"{SENTENCEPIECE_FILE} has {words.size} pieces, but the embedding table has {rows} rows")
    return words


def _row_widths(checkpoint: ContrastiveCheckpoint, formats: dict[str, str]) -> list[int]:
    """The row width of every matrix that becomes int4."""
    widths = []
    for name, shape in checkpoint.shapes.items():
        part = "qllama" if name.startswith("qllama.model.layers") else "vision" if name.startswith("vision_model.") else None
        if part in formats and formats[part] == "int4" and len(shape) == 2:
            widths.append(shape[-1])
    return widths


def _expected_bytes(checkpoint: ContrastiveCheckpoint, formats: dict[str, str]) -> int:
    """At most so many bytes of disk: every part has as many a weight as the widest one, or is small.

    Two copies of an InternViT-6B in 8 bits are there as well while its w8a8 is made.
    """
    weights = {name: torch.Size(shape).numel() for name, shape in checkpoint.shapes.items()}
    of_vision = sum(count for name, count in weights.items() if not name.startswith("qllama."))
    copies = 2 if _is_6b(checkpoint) and formats["vision"] in (AUTO, W8A8) else 0
    return int(sum(weights.values()) * max(BYTES_A_WEIGHT[each] for each in formats.values()) + copies * of_vision)


def _is_6b(checkpoint: ContrastiveCheckpoint) -> bool:
    return bool(checkpoint.config.vision.qk_normalization)


def _convert_part(
    part: str,
    checkpoint: ContrastiveCheckpoint,
    weight_format: str,
    options: ConvertOptions,
    source: str,
    work: Path,
    pictures: list[Path],
    summary: Summary,
) -> str:
    """Load, trace, compress and save one part; return its weight format, which resolves `AUTO`."""
    dtype, scratch = LOAD_TYPES.get(weight_format), Scratch(work)
    model = _trace(part, checkpoint, dtype, scratch.empty)
    if weight_format in (AUTO, W8A8):
        side = checkpoint.config.image_size
        tiles, unseen = tiles_at_hand(side)
        tiles += calibration_tiles(pictures, Tiling(side, max_tiles=1))
        disk = scratch if _is_6b(checkpoint) else None
        model, weight_format, summary.proof = in_8_bits(model, weight_format, tiles, unseen, disk)
    model = compress(model, weight_format, options)
    save_part(model, part, work, source, weight_format, summary)
    del model
    forget_traces()
    scratch.clear()
    return weight_format


def _trace(part: str, checkpoint: ContrastiveCheckpoint, dtype: torch.dtype | None, empty: Empty) -> ov.Model:
    made: dict[str, Callable[[], ov.Model]] = {
        "text_embeddings": lambda: trace_text_embeddings(load_table(checkpoint, dtype, empty=empty)),
        "vision": lambda: (
            trace_vision_embedding(load_part(VisionEmbeddingPart, checkpoint, dtype, empty=empty))
            if checkpoint.kind == CONTRASTIVE
            else trace_features(load_part(FeaturesPart, checkpoint, dtype, empty=empty))
        ),
        "qllama": lambda: trace_qllama(load_part(QLlamaPart, checkpoint, dtype, empty=empty)),
        "query_pool": lambda: trace_query_pool(load_part(QueryPoolPart, checkpoint, dtype, empty=empty)),
    }
    return made[part]()
