"""What several test files use: the golden sets, folders converted once a run, the shared real data where it exists.

Imports torch and the converter only for tests that use them, so that a plain installation runs the others.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Models of tests are so small that a second thread only waits; read by torch when it is imported, here and in processes of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import filelock
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


MODULES = 200  # that a test imports at once: a heavy library


class Heap:
    """Python's garbage collection without what libraries leave for good: with torch imported a full one takes half a second."""

    def __init__(self) -> None:
        self._modules = 0
        gc.disable()  # while the tests are imported

    def freeze(self) -> None:
        if len(sys.modules) > self._modules + MODULES:
            self._modules = len(sys.modules)
            gc.collect()
            gc.freeze()
            gc.enable()


heap = Heap()


def pytest_collection_finish() -> None:
    heap.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    heap.freeze()


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
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """A file or folder of a run, made by the first test that asks for it, whichever of the run's processes it is in."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"

    def path(name: str, make: Callable[[Path], Any]) -> Path:
        """`make` writes it whole or raises."""
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{name.replace('/', '-')}.lock"):
            if not target.exists():
                make(target)
        return target

    return path


@pytest.fixture(scope="session")
def converted(once):
    """Convert a checkpoint folder with given options, once a run; unless asked for, without the proof and int4 by rounding.

    Most tests do not look at either, and rounding takes a tenth of a recipe's time.
    """

    def run(source: Path, **options: Any) -> Path:
        pytest.importorskip("torch", reason="a conversion needs the extra [convert]")
        from convert import ConvertOptions, convert

        options = {"verify": False, "recipe": "fast"} | options
        key = hashlib.sha256(repr((str(source), sorted(options.items()))).encode()).hexdigest()[:16]
        return once(f"{key}/{source.name}", lambda folder: convert(str(source), folder, ConvertOptions(**options)))

    return run


@pytest.fixture(scope="session")
def shapes(converted) -> Path:
    """The built-in model in int8: answers as the reference does, and is there in seconds; do not change it."""
    return converted(Path(__file__).parents[1] / "demo" / "shapes" / "checkpoint", weight_format="int8", verify=False)


@pytest.fixture(scope="session")
def tiny(once):
    """The tiny random checkpoint of a name of tests/checkpoints.py, made once a run; do not change it."""

    def make(name: str) -> Path:
        pytest.importorskip("torch", reason="a checkpoint is made with torch")
        from tests.checkpoints import make_checkpoint

        return once(f"checkpoints/{name}", lambda folder: make_checkpoint(folder, name))

    return make


REAL_TOKENIZERS = {"InternVL2-1B": "internvl2-1b", "InternVL2-2B": "internlm2"}  # published name: folder in shared


@pytest.fixture(params=REAL_TOKENIZERS)
def real_tokenizer(request: pytest.FixtureRequest, once) -> tuple[Path, Any]:
    """The tokenizer files that a conversion writes for a published name, and its configuration; do not change them."""
    from convert.tokenizer import load_tokenizer, save_tokenizer
    from runtime.folder.config import InternVLConfig
    from tests.checkpoints import CONFIGS

    config = InternVLConfig.from_dict(CONFIGS[request.param])
    source = shared(f"data/tokenizers/{REAL_TOKENIZERS[request.param]}")

    def make(folder: Path) -> None:
        folder.mkdir()
        save_tokenizer(load_tokenizer(source, config), folder)

    return once(f"tokenizers/{request.param}", make), config


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
