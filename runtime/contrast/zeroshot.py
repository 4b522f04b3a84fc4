"""Zero-shot evaluation of InternVL-C and -G: classification, and retrieval of pictures by captions and captions by pictures.

Definitions are those of LAION-AI/CLIP_benchmark, metrics/zeroshot_classification.py and metrics/zeroshot_retrieval.py. A data set
is a folder of class folders (torchvision's ImageFolder); pairs are lines of a picture, a tab and its caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.contrast.embed import picture_kinds
from runtime.contrast.index import find_pictures
from runtime.contrast.model import TEMPLATES, OpenedInternVL, check_labels, check_templates
from runtime.errors import OptionError
from runtime.folder.contrastive import MODES

Report = Callable[[int, int], None]
TOPS, RECALLS = (1, 5), (1, 5, 10)


def read_lines(file: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty. Raises OptionError when it cannot be read or there are none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = [line for line in lines if line]
    if not found:
        raise OptionError(f"{file} has no {what}: write one a line")
    return found


def read_labels(file: Path) -> list[str]:
    """The labels of a file, one a line. Raises OptionError for none or duplicates."""
    labels = read_lines(file, "labels")
    try:
        check_labels(labels)
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from None
    return labels


def read_templates(file: Path) -> list[str]:
    """The templates of a file, one a line, with {c} for the label. Raises OptionError."""
    templates = read_lines(file, "templates")
    try:
        check_templates(templates)
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from None
    return templates


def evaluate_classes(
    model: OpenedInternVL,
    dataset: Path,
    labels: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    mode: str = MODES[0],
    report: Report | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy and mean recall per class over a folder of class folders; `labels` are in the order of folder names.

    Without labels the folder names serve. Raises OptionError for a folder that is no data set, PictureError for a broken picture.
    """
    folders = sorted(path for path in dataset.iterdir() if path.is_dir()) if dataset.is_dir() else []
    if not folders:
        raise OptionError(f"{dataset} has no folders: give one folder a class, with its pictures")
    labels = [folder.name for folder in folders] if labels is None else labels
    if len(labels) != len(folders):
        raise OptionError(
            f"{dataset} has {len(folders)} folders and there are {len(labels)} classes: give one a folder, in their order"
        )
    kinds = picture_kinds()
    pictures = [(path, number) for number, folder in enumerate(folders) for path in find_pictures([folder], kinds)]
    if not pictures:
        raise OptionError(f"there are no pictures in the folders of {dataset}")
    vectors = model.class_vectors(labels, templates)
    ranks, wanted, size = [], np.array([number for _, number in pictures]), model.pictures_at_once
    for start in range(0, len(pictures), size):
        batch = pictures[start : start + size]
        scores = model.encode_images([path for path, _ in batch], mode, crop=True) @ vectors.T
        right = scores[np.arange(len(batch)), wanted[start : start + size]]
        ranks.append((scores > right[:, None]).sum(1))
        if report is not None:
            report(start + len(batch), len(pictures))
    rank = np.concatenate(ranks)
    recalls = [float((rank[wanted == number] == 0).mean()) for number in sorted({*wanted.tolist()})]
    tops = {f"acc{top}": float((rank < top).mean()) if len(labels) >= top else None for top in TOPS}
    return {"pictures": len(pictures), "classes": len(labels), **tops, "mean_per_class_recall": float(np.mean(recalls))}


def read_pairs(file: Path) -> list[tuple[Path, str]]:
    """Pictures, relative to the file's folder, and their captions. Raises OptionError for a line that is no pair."""
    pairs = []
    for number, line in enumerate(read_lines(file, "pairs"), 1):
        picture, tab, caption = line.partition("\t")
        if not tab or not caption.strip():
            raise OptionError(f"{file}, line {number}: expected a picture, a tab and its caption")
        pairs.append((file.parent / picture, caption.strip()))
    return pairs


def evaluate_retrieval(
    model: OpenedInternVL, pairs: Sequence[tuple[Path, str]], mode: str = MODES[0], report: Report | None = None
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 of pictures by captions and of captions by pictures; a picture may have several captions."""
    pictures = [*dict.fromkeys(path for path, _ in pairs)]
    place = {path: number for number, path in enumerate(pictures)}
    of_caption, size = np.array([place[path] for path, _ in pairs]), model.pictures_at_once
    found = []
    for start in range(0, len(pictures), size):
        found.append(model.encode_images(pictures[start : start + size], mode))
        if report is not None:
            report(min(start + size, len(pictures)), len(pictures))
    scores = model.encode_texts([caption for _, caption in pairs]) @ np.concatenate(found).T  # (captions, pictures)
    return {"pictures": len(pictures), "captions": len(pairs), **recalls(scores, of_caption)}


def recalls(scores: np.ndarray, of_caption: np.ndarray) -> dict[str, float]:
    """Scores (captions, pictures) and the picture of each caption -> recall at k: the share with a right match in the best k."""
    right = np.zeros(scores.shape, bool)
    right[np.arange(len(of_caption)), of_caption] = True
    made: dict[str, float] = {}
    for name, table, fits in (("image", scores, right), ("text", scores.T, right.T)):
        best = np.argsort(-table, axis=1, kind="stable")
        hits = np.take_along_axis(fits, best, 1)
        made |= {f"{name}_retrieval_recall@{k}": float(hits[:, :k].any(1).mean()) for k in RECALLS}
    return made
