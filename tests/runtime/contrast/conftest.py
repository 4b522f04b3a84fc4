"""The small InternVL-C and -G in int8, and its drawn scenes, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.contrast.scenes import unseen

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def small(converted):
    """Its model folder; do not change it."""
    return converted(ROOT / "demo" / "contrast" / "checkpoint", weight_format="int8", verify=False)


@pytest.fixture(scope="session")
def scenes():
    return unseen(1, 24)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, scenes):
    """A folder of 24 pictures, one of which lies deeper, with two files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deeper").mkdir()
    for number, scene in enumerate(scenes):
        scene.picture.save(folder / ("deeper" if number == 23 else ".") / f"{number:02}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder
