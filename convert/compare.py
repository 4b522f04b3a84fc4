"""python -m convert compare FOLDER FOLDER...: what model folders of one checkpoint lose, side by side, with size and speed.

All are measured on the same answers: the checkpoint's (--reference), or the first folder's. Other tools may have written the
folders, if the parts have the same names. Knows how to read folders; quality.py measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from convert.answers import TOKENS, Answer, Kept, Prompt, fingerprint, prompts_of
from convert.calibration import find_pictures
from convert.checkpoint import Checkpoint, resolve
from convert.exact import LanguagePart, Part
from convert.quality import Quality, measure
from convert.questions import questions_of_proof
from convert.reference.model import load_text_embeddings
from convert.scratch import Scratch
from convert.tokenizer import load_tokenizer
from convert.verify import ask_reference, reference_steps
from runtime.errors import InternVLError, ModelFolderError, OptionError, not_installed
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.files import CONFIG_FILE, GENERATION_CONFIG_FILE, PARTS, bytes_of, check_folder
from runtime.folder.quality import WHOLE
from runtime.terminal import CommandParser

LEAST_ALIKE = 0.98  # cosine of some rows of the embedding table; about 0.99 in int4, near 0 for another checkpoint
ROWS = 64
PICTURES = 32  # most pictures of a dataset
QUESTION, REPEATS = "Describe this picture.", 5  # of --speed; the first run is not counted


def parser() -> argparse.ArgumentParser:
    p = CommandParser(prog="python -m convert compare", description="Compare what model folders of one checkpoint lose.")
    p.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="model folders, two or more, or one with --reference")
    p.add_argument(
        "--reference", metavar="CHECKPOINT", help="checkpoint whose answers are the measure (default: the first folder's)"
    )
    p.add_argument("--reference-cache", metavar="FOLDER", help="folder that keeps the checkpoint's answers (default: none)")
    p.add_argument("--dataset", metavar="FOLDER", help="more pictures to ask about; NAME.txt next to NAME.jpg is the question")
    p.add_argument(
        "--speed", action="store_true", help="time the first token and the others, about a picture of one tile, by turns"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object per folder instead of a table")
    p.add_argument("--plot", metavar="FILE", type=Path, help="write a plot of quality against size (.png, .svg)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.plot is not None:
            _pyplot()  # before minutes of work
        rows = compare(
            options.folders,
            reference=options.reference,
            reference_cache=options.reference_cache,
            dataset=options.dataset,
            speed=options.speed,
        )
        print(*(map(json.dumps, rows) if options.json else _table(rows)), sep="\n", flush=True)
        if options.plot is not None:
            _plot(rows, options.plot)
    except InternVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def compare(
    folders: Sequence[Path],
    *,
    reference: str | None = None,
    reference_cache: str | None = None,
    dataset: str | None = None,
    speed: bool = False,
) -> list[dict[str, Any]]:
    """What each folder loses, as `Quality.to_dict` gives it, with its `folder`, `bytes` and, for `speed`, seconds.

    Raises OptionError, ModelFolderError for incomplete folders or different checkpoints, CheckpointError for the reference.
    """
    if len(folders) < 2 and reference is None:
        raise OptionError("there is one folder: give another one, or its checkpoint with --reference")
    if reference_cache is not None and reference is None:
        raise OptionError("the reference cache is not used without a checkpoint: give it with --reference")
    for folder in folders:
        check_folder(folder)
    checkpoint = None if reference is None else Checkpoint(resolve(reference), name=Path(reference).absolute().name)
    first = checkpoint.config if checkpoint is not None else _config(folders[0])
    tokenizer = load_tokenizer(checkpoint.folder if checkpoint is not None else folders[0], first)
    rows = None if checkpoint is None else load_text_embeddings(checkpoint, None)[:ROWS].float().numpy()
    _check_alike(folders, _shape(first), rows, str(reference or folders[0]))
    pictures = find_pictures(dataset, PICTURES) if dataset is not None else []
    prompts = prompts_of(questions_of_proof(first.tile_size, pictures), tokenizer, first.tokens_per_tile)
    found = []
    with TemporaryDirectory() as beside:
        steps = (0 if checkpoint is None else reference_steps(len(prompts))) + len(prompts) * (len(folders) + (checkpoint is None))
        with tqdm(total=steps, desc="Comparing", disable=None, leave=False) as bar:
            if checkpoint is not None:
                kept = Kept(Path(reference_cache or beside), fingerprint(checkpoint), name=checkpoint.name)
                ask_reference(checkpoint, tokenizer, prompts, kept, Scratch(Path(beside)), bar)
            else:
                kept = Kept(Path(beside), "", name=folders[0].name)
                for key, answer in _answers_of(folders[0], prompts, bar):
                    kept.put_answer(key, answer)
            for folder in folders:
                answers = ((kept.answer(prompt.key), prompt.tile) for prompt in prompts)
                found.append(_row(folder, measure(folder, answers, len(prompts), bar.update)))
    if speed:
        for row, seconds in zip(found, _by_turns(folders), strict=True):
            row |= seconds
    return found


def _config(folder: Path) -> InternVLConfig:
    return InternVLConfig.from_dict(read_config(folder / CONFIG_FILE))


def _shape(config: InternVLConfig) -> str:
    sizes = [str(config.language.get(key)) for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")]
    return f"{config.language_architecture} {' x '.join(sizes)}"


def _row(folder: Path, quality: Quality) -> dict[str, Any]:
    sizes = {part: bytes_of(folder, part) for part in PARTS}
    return {"folder": str(folder), "bytes": sum(sizes.values()), "part_bytes": sizes, **quality.to_dict()}


def _check_alike(folders: Sequence[Path], shape: str, rows: np.ndarray | None, other: str) -> None:
    """Raise ModelFolderError unless all have a language model of one `shape` and, up to rounding, the same embedding table."""
    ids = np.arange(ROWS)[None]
    for folder in folders:
        own_shape = _shape(_config(folder))
        if own_shape != shape:
            raise ModelFolderError(
                f"{folder} and {other} are of different checkpoints ({own_shape}; {shape}): compare folders of one"
            )
        own = np.array(Part(folder, "text_embeddings")(ids))[0]
        if rows is None:
            rows = own
        alike = float((own * rows).sum() / np.sqrt((own * own).sum() * (rows * rows).sum())) if own.shape == rows.shape else 0.0
        if not alike >= LEAST_ALIKE:
            raise ModelFolderError(
                f"{folder} and {other} are of different checkpoints (their embedding tables differ): compare folders of one"
            )


def _answers_of(folder: Path, prompts: Sequence[Prompt], bar: tqdm) -> Iterator[tuple[str, Answer]]:
    """A folder's own greedy answers, as `convert.answers.answer` gives the reference's."""
    vision, text, language = Part(folder, "vision"), Part(folder, "text_embeddings"), LanguagePart(folder)
    ends = read_config(folder / GENERATION_CONFIG_FILE)["eos_token_id"]
    ends = {*ends} if isinstance(ends, list) else {ends}
    for prompt in prompts:
        embeds = np.array(text(prompt.ids[None]))  # (1, T, D)
        here = prompt.ids == prompt.context
        if prompt.tile is not None:
            embeds[0, here] = np.array(vision(prompt.tile)).reshape(-1, embeds.shape[-1])
        ids, fed, said = prompt.ids.tolist(), embeds, []
        for number in range(TOKENS):
            mask = np.ones((1, len(ids)), np.int64)
            visual = here.astype(np.int64)[None] if not number else None
            logits = torch.from_numpy(np.array(language.logits(fed, mask, visual=visual, reset=not number)[0, -1]))
            if int(logits.argmax()) in ends:
                break
            said.append(logits.log_softmax(-1).half().numpy())
            ids.append(int(logits.argmax()))
            fed = np.array(text(np.array([ids[-1:]])))
            embeds = np.concatenate([embeds, fed], axis=1)
        log_probs = np.stack(said) if said else np.zeros((0, 1), np.float16)
        yield prompt.key, Answer(np.array(ids), len(prompt.ids), prompt.context, embeds[0], log_probs)
        bar.update()


def _by_turns(folders: Sequence[Path]) -> list[dict[str, float]]:
    """Each folder's seconds to the first token about a picture of one tile and per later token: medians, and the least."""
    from PIL import Image

    from runtime.answer.model import OpenedModel

    models = [OpenedModel(folder) for folder in folders]
    pixels = np.random.default_rng(0).integers(0, 255, (448, 448, 3), np.uint8)
    runs: list[list[tuple[float, float]]] = [[] for _ in folders]
    for number in range(1 + REPEATS):
        for model, own in zip(models, runs, strict=True):
            model.forget()
            conversation = model.start_conversation()
            conversation.ask(QUESTION, images=[Image.fromarray(pixels)], max_tiles=1, max_new_tokens=TOKENS, do_sample=False)
            took = conversation.statistics
            assert took is not None
            if number:
                own.append((took.first_token_seconds, took.token_seconds or 0.0))
    return [
        {
            "first_token_seconds": statistics.median(first for first, _ in own),
            "token_seconds": statistics.median(token for _, token in own),
            "least_token_seconds": min(token for _, token in own),
        }
        for own in runs
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["folder"]) for row in rows)
    timed = "token_seconds" in rows[0]
    heads = f"{'size':>11}{'KL a token':>12}{'same token':>12}{'first other':>13}{'language KL':>13}{'vision KL':>11}"
    lines = [f"{'folder':<{width}}{heads}" + (f"{'first token':>13}{'a token':>11}" if timed else "")]
    for row in rows:
        parts, size = row["parts"], f"{row['bytes'] / 1e6:.1f} MB"
        if WHOLE not in parts:
            lines.append(f"{row['folder']:<{width}}{size:>11}   the answers are empty")
            continue
        whole = parts[WHOLE]
        line = f"{row['folder']:<{width}}{size:>11}{whole['kl']:>12.5f}{whole['same']:>12.1%}{whole['first'] or 'none':>13}"
        line += f"{parts['language']['kl']:>13.5f}{parts['vision']['kl'] if 'vision' in parts else 0:>11.5f}"
        lines.append(line + (f"{row['first_token_seconds']:>11.3f} s{row['token_seconds'] * 1e3:>8.1f} ms" if timed else ""))
    asked = f"{rows[0]['questions']} of {rows[0]['asked']} questions, {rows[0]['tokens']} tokens"
    return [*lines, asked]


def _pyplot() -> Any:
    """Matplotlib's pyplot, without a screen. Raises OptionError if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise not_installed(error, "demo", "; --plot draws with it") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot KL per token against megabytes. Raises OptionError if nothing was measured or the file cannot be written."""
    pyplot = _pyplot()
    if any(WHOLE not in row["parts"] for row in rows):
        raise OptionError("the answers are empty: there is nothing to plot")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        at = row["bytes"] / 1e6, row["parts"][WHOLE]["kl"]
        axes.plot(*at, "o")
        axes.annotate(Path(row["folder"]).name, at, xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="size, MB", ylabel="KL of the next token to the reference", ylim=(0, None))
    axes.margins(x=0.2)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} cannot be written: {error}") from None
    finally:
        pyplot.close(figure)
