"""A conversion: source -> checks -> parts -> tokenizer and configuration -> proof -> model folder.

Calls the steps in order and prints a line for each; the imported files do the work.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert import contrast
from convert.calibration import calibration_samples, calibration_tiles, divided, find_pictures, tiles_at_hand
from convert.checkpoint import Checkpoint
from convert.compress import check_group_size, compress, eight_bits, four_bits
from convert.exact import Part
from convert.four_bits import Ready
from convert.lora import Later
from convert.options import AUTO, W8A8, ConvertOptions, Recipe, check_packed
from convert.questions import CALIBRATION_TOKENS, OF_PICTURE_TOKENS, calibration_texts, questions_of_proof
from convert.recipe import SINGULAR, exchange, matrices_of, round_by_inputs, take_place
from convert.reference.language import EXPERTS, PACKED, language_kind
from convert.reference.model import expected_shapes, is_tied, load_language, load_router, load_text_embeddings, load_vision
from convert.reference.router import KEPT_EXACT
from convert.reference.router import TENSORS as ROUTER
from convert.scratch import Scratch
from convert.search import adapted
from convert.serving import add_to_repository, write_graph
from convert.steps import BYTES_A_WEIGHT, LOAD_TYPES, Summary, in_8_bits, preprocessor_config, save_part, step, write_json
from convert.tokenizer import context_id, generation_config, load_tokenizer, save_tokenizer
from convert.trace import forget_traces, trace_language, trace_router, trace_text_embeddings, trace_vision
from convert.verify import verify
from convert.weight_files import some
from runtime.errors import OptionError
from runtime.folder.contrastive import CHAT
from runtime.folder.files import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    PREPROCESSOR_CONFIG_FILE,
    bytes_of,
    check_space,
    kind_of_folder,
    new_folder,
    parts_of,
)
from runtime.media.tiles import Tiling
from runtime.parts import memory

CONFIGURATION_CODE = "configuration_internvl_chat.py"  # ours, for optimum-intel
TOKENIZER_BYTES = 40_000_000
SEARCH_BYTES = 1.6  # a weight: in four and in eight bits


def run(there: Path, source: str, final: Path, options: ConvertOptions) -> Summary:
    """Convert the checkpoint in the folder `there`, given as `source`, to `final`; see convert.convert."""
    started = time.monotonic()
    memory.return_freed_memory()
    # 1) find every mistake before any work
    if kind_of_folder(there) != CHAT:
        return contrast.run(there, Path(source).name, final, options)
    checkpoint = Checkpoint(
        there,
        name=Path(source).absolute().name,
        template=options.template,
        system_message=options.system_message,
        adapter=Path(options.adapter) if options.adapter else None,
    )
    language_kind(checkpoint.config)
    if options.serving is not None and checkpoint.config.has_visual_experts:
        raise OptionError("OpenVINO Model Server cannot run visual experts: leave --serving out and use python -m runtime serve")
    for note in checkpoint.notes:
        print(note, flush=True)
    if checkpoint.config.system_message is not None:
        print(f"system message: {checkpoint.config.system_message}", flush=True)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    checkpoint.check(expected_shapes(checkpoint.config, tied=is_tied(checkpoint)))
    if checkpoint.recipe is not None:
        check_packed(options, str(checkpoint.recipe), checkpoint.packed_with_lora)
    formats = options.formats(parts_of(checkpoint.config), vision_is_6b=checkpoint.config.vision.qk_normalization)
    found = find_pictures(options.dataset, options.num_samples) if options.dataset else []
    pictures, apart = divided(found)
    check_space(final, _expected_bytes(checkpoint, formats, options))
    if options.max_loss is not None and _recipe(checkpoint, options) is None:
        kind = "is packed" if checkpoint.recipe is not None else "has experts, which are rounded one by one"
        raise OptionError(f"the checkpoint {kind}: --max-loss has nothing to search, leave it out")
    if checkpoint.recipe is None:
        recipe = _recipe(checkpoint, options)
        for part in {*formats} - {"text_embeddings"}:
            group = recipe.group if recipe is not None and part == "language" else options.nncf_group
            check_group_size(_row_widths(checkpoint, formats, part), group)
    with new_folder(final, force=options.force) as work:
        summary = Summary(final)
        # 2) the tokenizer, in parallel with the parts: it is Python's work, theirs mostly is not
        with ThreadPoolExecutor(max_workers=1) as pool:
            saved_tokenizer = pool.submit(save_tokenizer, tokenizer, work)
            # 3) one part in memory at a time
            for part in parts_of(checkpoint.config):
                with step(f"{part} ({W8A8 if formats[part] == AUTO else formats[part]})", partial(bytes_of, work, part)):
                    samples: Iterable[Any] = ()
                    # the language part comes last: its calibration inputs come from the other parts
                    if part == "language" and options.calibrates_language:
                        saved_tokenizer.result()
                        samples = calibration_samples(pictures, work, checkpoint.config, tokenizer)
                    if formats[part] in (AUTO, W8A8):
                        samples = calibration_tiles(pictures, Tiling.of(checkpoint.config))
                    formats[part] = _convert_part(
                        part, checkpoint, formats[part], options, tokenizer, source, work, samples, summary
                    )
                summary.part_bytes[part] = bytes_of(work, part)
            with step("tokenizer"):
                saved_tokenizer.result()
                _write_configuration(checkpoint, tokenizer, work)
                if options.serving is not None:
                    write_graph(work)
        summary.seconds = time.monotonic() - started
        # 4) the proof
        if options.verify:
            with step("verify"):
                cache = Path(options.reference_cache) if options.reference_cache else None
                questions = questions_of_proof(checkpoint.config.tile_size, apart)
                summary.report = verify(checkpoint, work, tokenizer, formats, questions, cache, summary.search)
            print(*summary.report.lines(), sep="\n", flush=True)
            summary.report.raise_if_drifted()
            summary.verify_seconds = time.monotonic() - started - summary.seconds
    if options.serving is not None:
        add_to_repository(final.parent, final.name)
    summary.peak_bytes = memory.peak_bytes()
    return summary


def _convert_part(
    part: str,
    checkpoint: Checkpoint,
    weight_format: str,
    options: ConvertOptions,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    work: Path,
    samples: Iterable[Any],
    summary: Summary,
) -> str:
    """Load, trace, compress and save one part; return its weight format, which resolves `AUTO`."""
    dtype, scratch = LOAD_TYPES.get(weight_format), Scratch(work)
    recipe = _recipe(checkpoint, options) if part == "language" and weight_format == "int4" else None
    later = Later() if _merges_later(weight_format, checkpoint, options) else None
    ready = None
    fours = checkpoint.recipe is not None or recipe is not None or _rounds_experts(checkpoint, options)
    if part == "language" and weight_format == "int4" and fours:
        ready = Ready(scratch.empty, partial(four_bits, group_size=options.nncf_group if recipe is None else recipe.group))
    if part == "language" and weight_format == "int8" and checkpoint.recipe is None and _rounds_experts(checkpoint, options):
        ready = Ready(scratch.empty, eight_bits)
    model = {
        "text_embeddings": lambda: trace_text_embeddings(load_text_embeddings(checkpoint, dtype)),
        "vision": lambda: trace_vision(load_vision(checkpoint, dtype, empty=scratch.empty, later=later)),
        "router": lambda: trace_router(load_router(checkpoint, dtype, empty=scratch.empty)),
        "language": lambda: trace_language(
            _in_four_bits(checkpoint, tokenizer, work, recipe, scratch, ready, options, summary)
            if recipe is not None and ready is not None
            else load_language(checkpoint, dtype, head_only=True, empty=scratch.empty, later=later, ready=ready),
            quantised=dtype is None,
            ready=ready,
        ),
    }[part]()
    if weight_format in (AUTO, W8A8):
        tiles, unseen = tiles_at_hand(checkpoint.config.tile_size)
        disk = scratch if checkpoint.config.vision.qk_normalization else None
        model, weight_format, summary.proof = in_8_bits(model, weight_format, [*tiles, *samples], unseen, disk)
        samples = ()
    # with a packed checkpoint or our own recipe, NNCF compresses only the remaining matrices
    rest = "int8" if weight_format == "int4" and part == "language" and (checkpoint.recipe or recipe) else weight_format
    model = compress(model, rest, options, samples, later, spared=KEPT_EXACT if part == "router" else None)
    save_part(model, part, work, Path(source).name, weight_format, summary)
    del model
    forget_traces()
    scratch.clear()
    return weight_format


def _rounds_experts(checkpoint: Checkpoint, options: ConvertOptions) -> bool:
    """Whether experts are rounded one by one before tracing: where NNCF would use nothing but their weights."""
    return language_kind(checkpoint.config).experts is not None and options.looks_once and not options.sym


def _recipe(checkpoint: Checkpoint, options: ConvertOptions) -> Recipe | None:
    """The recipe that calibrates int4 of the language part; None for packed checkpoints and for experts."""
    packed = checkpoint.recipe is not None or language_kind(checkpoint.config).experts is not None
    return None if packed else options.by_inputs


def _in_four_bits(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    recipe: Recipe,
    scratch: Scratch,
    ready: Ready,
    options: ConvertOptions,
    summary: Summary,
) -> PreTrainedModel:
    """The language part with its matrices in `ready`, quantised to four bits on texts that the checkpoint itself writes."""
    if options.max_loss is not None:
        journal = summary.folder.with_name(f"{summary.folder.name}.tried.json")
        model, found, recipe, summary.search = adapted(checkpoint, tokenizer, work, scratch, options, journal)
        take_place(model, found, recipe, ready, partial(four_bits, group_size=recipe.group))
        return model
    model = load_language(checkpoint, None, head_only=True, empty=scratch.empty)
    recipe = exchange(model, recipe)
    print("language: int4 calibrated on its own answers (GPTQ); --recipe fast is quicker and loses more", flush=True)
    rope = copy.deepcopy(model.model.rotary_emb)  # some models change it in a forward and cannot be traced afterwards
    steps = CALIBRATION_TOKENS + OF_PICTURE_TOKENS + len(matrices_of(model)) + recipe.exchanged
    with tqdm(total=steps, desc="Calibrating int4", disable=None, leave=False) as bar:
        texts = calibration_texts(checkpoint, model, tokenizer, Part(work, "vision"), bar.update)
        found, rounded = round_by_inputs(model, texts, recipe, scratch.empty, bar.update)
    model.model.rotary_emb = rope
    if rounded:
        print(SINGULAR + some(rounded), flush=True)
    take_place(model, found, recipe, ready, partial(four_bits, group_size=recipe.group))
    return model


def _merges_later(weight_format: str, checkpoint: Checkpoint, options: ConvertOptions) -> bool:
    """Whether LoRA is merged when a matrix is compressed: not if something reads or casts the matrix before."""
    sees = weight_format == "int4" and _recipe(checkpoint, options) is not None
    return weight_format in ("int8", "int4") and options.looks_once and not sees


def _part_of(name: str) -> str:
    """The part of a tensor by its published name; an embedding table counts as the language part's."""
    return "language" if name.startswith("language_model.") else "router" if ROUTER.search(name) else "vision"


def _row_widths(checkpoint: Checkpoint, formats: dict[str, str], part: str) -> list[int]:
    """The row width of every matrix of a part that becomes int4; GPT-OSS stores its experts transposed."""
    widths = []
    for name, shape in checkpoint.shapes.items():
        if _part_of(name) != part:
            continue
        vocabulary = "embed" in name or "lm_head" in name or name.endswith("output.weight")
        if formats[part] == "int4" and not vocabulary and len(shape) > 1 and not name.endswith("_bias"):
            widths.append(shape[1] if len(shape) == 3 else shape[-1])
    return widths


def _expected_bytes(checkpoint: Checkpoint, formats: dict[str, str], options: ConvertOptions) -> int:
    """An estimate of the folder's size on disk, plus the scratch copies of one part."""
    sizes, copies = dict.fromkeys(formats, 0.0), dict.fromkeys(formats, 0.0)
    for name, shape in checkpoint.shapes.items():
        part = "text_embeddings" if name.startswith("language_model.") and "embed" in name else _part_of(name)
        weights = torch.Size(shape).numel()
        sizes[part] += weights * BYTES_A_WEIGHT[formats[part]]
        if part == "text_embeddings":
            continue
        stored, cast = 4 if checkpoint.dtypes[name] == "F32" else 2, LOAD_TYPES.get(formats[part])
        one_by_one = {"int4": 0.55, "int8": 1.01 if checkpoint.recipe is None else 4}.get(formats[part], 4)
        rounded = EXPERTS in name and _rounds_experts(checkpoint, options)
        wanted = cast.itemsize if cast else one_by_one if rounded else 4 if EXPERTS in name else stored
        copies[part] += weights * (
            stored if checkpoint.copies(name, later=_merges_later(formats[part], checkpoint, options)) else 0
        )
        copies[part] += weights * (SEARCH_BYTES if part == "language" and options.max_loss is not None else 0)
        copies[part] += weights * ((wanted if wanted != stored or EXPERTS in name else 0) + (stored if PACKED in name else 0))
    return int(sum(sizes.values()) + max(copies.values())) + TOKENIZER_BYTES


def _write_configuration(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, work: Path) -> None:
    generation = generation_config(tokenizer, checkpoint.config, checkpoint.folder)
    config = checkpoint.raw_config | {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "hidden_size": checkpoint.config.language["hidden_size"],
        "img_context_token_id": context_id(tokenizer),
        "eos_token_id": generation["eos_token_id"][0],
        "pad_token_id": generation["pad_token_id"],
        "transformers_version": transformers.__version__,
    }
    shutil.copy(Path(__file__).with_name(CONFIGURATION_CODE), work)
    for name, content in (
        (CONFIG_FILE, config),
        (GENERATION_CONFIG_FILE, generation),
        (PREPROCESSOR_CONFIG_FILE, preprocessor_config(checkpoint.config.tile_size)),
    ):
        write_json(work / name, content)
