"""Encode many pictures into an index: threads read, batches are encoded, a journal keeps the vectors. Knows no terminal."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.contrast.index import About, Index, Journal, find_pictures, fingerprint_of
from runtime.contrast.model import OpenedInternVL, unit
from runtime.errors import OptionError, PictureError
from runtime.folder.contrastive import MODES
from runtime.media.fit import squeezed
from runtime.media.picture import open_picture
from runtime.media.tiles import normalise

READERS = os.cpu_count() or 1  # threads that open and resize pictures
BATCHES_AHEAD = 3

Report = Callable[[int, int], None]  # pictures done, total


def picture_kinds() -> frozenset[str]:
    """File suffixes that count as pictures inside folders."""
    import pi_heif

    pi_heif.register_heif_opener()
    Image.init()
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_PICTURES
    )


NO_PICTURES = ("PDF", "MPEG")  # formats that Pillow lists, but does not read as pictures


def embed(model: OpenedInternVL, given: Sequence[Path], out: Path, mode: str = MODES[0], report: Report | None = None) -> Index:
    """Encode the pictures among files and folders that the index `out` lacks, and write it.

    An interrupted run is resumed. Files that cannot be read as pictures are skipped, and listed in the index. Raises OptionError
    if there are no pictures, or if `out` belongs to another model.
    """
    if out.suffix != ".npz":
        raise OptionError(f"--out {out} does not end in .npz: name the index so")
    wanted = [*dict.fromkeys(os.path.abspath(path) for path in find_pictures(given, picture_kinds()))]
    if not wanted:
        raise OptionError(f"there are no pictures in {', '.join(map(str, given))}: give files, or folders with pictures")
    about = About(str(model.folder.resolve()), fingerprint_of(model.folder), mode)
    journal = Journal(out, about, model.config.embed_dim)
    missing = [path for path in wanted if path not in journal.done]
    done = len(wanted) - len(missing)
    if report is not None:
        report(done, len(wanted))
    for paths, pixels, skipped in read_batches(missing, model.config.image_size, model.pictures_at_once):
        vectors = unit(model.encode_pixels(normalise(pixels), mode)) if paths else np.zeros((0, model.config.embed_dim))
        journal.add(paths, vectors, skipped)
        done += len(paths) + len(skipped)
        if report is not None:
            report(done, len(wanted))
    return journal.finish()


def read_batches(paths: Sequence[str], side: int, size: int) -> Iterator[tuple[list[str], np.ndarray, dict[str, str]]]:
    """Batches of pictures: the paths that were read, their pixels (n, S, S, 3), and why the others were not."""
    with ThreadPoolExecutor(READERS, "pictures") as pool:
        waiting: deque[list[Future[np.ndarray | str]]] = deque()
        batches = [paths[start : start + size] for start in range(0, len(paths), size)]
        for number, batch in enumerate(batches):
            for later in batches[number + len(waiting) : number + BATCHES_AHEAD]:
                waiting.append([pool.submit(_read, path, side) for path in later])
            found = [future.result() for future in waiting.popleft()]
            read = [(path, one) for path, one in zip(batch, found, strict=True) if not isinstance(one, str)]
            skipped = {path: one for path, one in zip(batch, found, strict=True) if isinstance(one, str)}
            pixels = np.stack([one for _, one in read]) if read else np.zeros((0, side, side, 3), np.uint8)
            yield [path for path, _ in read], pixels, skipped


def _read(path: str, side: int) -> np.ndarray | str:
    """Pixels of one picture, or why it cannot be read."""
    try:
        return squeezed(open_picture(Path(path)), side)
    except PictureError as error:
        return str(error)
