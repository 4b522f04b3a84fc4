"""What several test files use: the golden sets, folders converted once a session, the shared real data where it exists.

Imports torch and the converter only for tests that use them, so that a plain installation runs the others.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import torch

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"  # real tokenizers and pictures; the project stands without it
GOLDEN = ["qwen2", "internlm2", "phi3", "llama-6b-vision", "chat-v1-2", "qwen3", "qwen3-moe", "hf-native", "mono-internvl", "lora"]

HAS_TORCH = importlib.util.find_spec("torch") is not None
NEEDS_TORCH = re.compile(
    r"^(?:import|from) (?:torch|transformers|safetensors|convert|tests\.checkpoints|tests\.convert)\b", re.MULTILINE
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without torch a file that imports it, or what needs it, is left out."""
    if HAS_TORCH or collection_path.suffix != ".py":
        return None
    return NEEDS_TORCH.search(collection_path.read_text(encoding="utf-8")) is not None or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"converted", "tiny", "golden"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker("converts")


@dataclass(frozen=True)
class Golden:
    """What the original implementation computes on one tiny checkpoint."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    notes: dict[str, Any]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def context_id(self) -> int:
        return self.notes["image_context_token_id"]


@pytest.fixture(params=GOLDEN)
def golden(request: pytest.FixtureRequest) -> Golden:
    from safetensors.torch import load_file

    folder = DATA / "golden" / request.param
    return Golden(folder, load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text()))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory):
    """Convert a checkpoint folder with given options, once a session; unless asked for, without the proof and int4 by rounding.

    Most tests do not look at either, and rounding takes a tenth of a recipe's time.
    """
    done: dict[Any, Path] = {}

    def run(source: Path, **options: Any) -> Path:
        pytest.importorskip("torch", reason="a conversion needs the extra [convert]")
        from convert import ConvertOptions, convert

        options = {"verify": False, "recipe": "fast"} | options
        key = (source, tuple(sorted(options.items())))
        if key not in done:
            output = tmp_path_factory.mktemp("converted") / source.name
            done[key] = convert(str(source), output, ConvertOptions(**options)).folder
        return done[key]

    return run


@pytest.fixture(scope="session")
def shapes(converted) -> Path:
    """The built-in model in int8: answers as the reference does, and is there in seconds; do not change it."""
    return converted(Path(__file__).parents[1] / "demo" / "shapes" / "checkpoint", weight_format="int8", verify=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """The tiny random checkpoint of a name of tests/checkpoints.py, made once a session; do not change it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        pytest.importorskip("torch", reason="a checkpoint is made with torch")
        from tests.checkpoints import make_checkpoint

        return root / name if (root / name).exists() else make_checkpoint(root / name, name)

    return make


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames of 64 x 48 at 10 frames a second; frame n is grey of 4 n."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(60):
            pixels = np.full((48, 64, 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    return path


def embeddings(reference: Any, ids: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
    """What the language part reads of a prompt (B, T) with the features of its pictures."""
    import torch

    return torch.from_numpy(reference.merge(ids.numpy(), None if features is None else features.cpu().numpy()))


def data_url(file: Path) -> str:
    """A picture as clients of the server send it."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def shared(path: str) -> Path:
    """A file of the shared real data; skips the test where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"shared/{path} is not here: this test needs real data that is not part of the project")
    return found
