"""python -m runtime score ANSWERS --truth FILE --metric NAME: the accuracy of a job's answers, alone or compared with others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

METRICS = ("exact", "relaxed", "anls", "vqa", "bleu", "contains", "refcoco")
SHOWN, WIDE = 20, 36  # rows that differ; letters of a text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("answers", metavar="ANSWERS", type=Path, help="file that python -m runtime batch wrote")
    parser.add_argument(
        "--truth", metavar="FILE", type=Path, required=True, help="JSON lines or a table with id and answer or answers"
    )
    parser.add_argument("--metric", choices=METRICS, required=True, help="refcoco: boxes; the truth has box and size in pixels")
    parser.add_argument("--beside", metavar="OTHER", type=Path, help="another file of answers, to compare scores and rows")


def run(answers: Path, truth: Path, metric: str, beside: Path | None) -> None:
    """Print a table, and a last line of JSON. Raises OptionError."""
    from runtime.job.score import read_truth, score

    right = read_truth(truth, metric)
    files = [answers] if beside is None else [answers, beside]
    scored = [score(file, right, metric) for file in files]
    wide = max(len(str(file)) for file in files)
    for file, each in zip(files, scored, strict=True):
        iou = "" if each.mean_iou is None else f", mean IoU {each.mean_iou:.4f}"
        missing = f", {each.missing} without an answer" if each.missing else ""
        print(f"{file!s:<{wide}}  {metric} {each.score:.4f}{iou} over {len(each.texts)} rows{missing}")
    told = [{"answers": str(file), **each.summary()} for file, each in zip(files, scored, strict=True)]
    if beside is None:
        print(json.dumps(told[0]))
        return
    one, other = scored
    differ = [name for name in right if one.texts[name] != other.texts[name]]
    better = sum(one.values[name] > other.values[name] for name in one.values)
    worse = sum(one.values[name] < other.values[name] for name in one.values)
    print(f"{len(differ)} rows differ" + (f": {better} better, {worse} worse in {answers}" if one.values else ""))
    for name in sorted(differ, key=lambda name: -abs(one.values.get(name, 0) - other.values.get(name, 0)))[:SHOWN]:
        values = f"{one.values[name]:.2f} {other.values[name]:.2f}  " if one.values else ""
        print(f"{name:<12} {values}{_short(one.texts[name]):<{WIDE}}  {_short(other.texts[name])}")
    print(json.dumps({"scores": told, "differ": len(differ), "better": better, "worse": worse}))


def _short(text: str | None) -> str:
    text = "(none)" if text is None else " ".join(text.split())
    return text if len(text) <= WIDE else text[: WIDE - 1] + "…"
