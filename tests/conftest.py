"""What several test files use: the golden sets, folders converted once a session, the shared real data where it exists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert import ConvertOptions, convert
from tests.checkpoints import make_checkpoint

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"  # real tokenizers and pictures; the project stands without it
GOLDEN = ["qwen2", "internlm2", "phi3", "llama-6b-vision", "chat-v1-2"]


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
    folder = DATA / "golden" / request.param
    return Golden(folder, load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text()))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory):
    """Convert a checkpoint folder with given options, once a session."""
    done: dict[Any, Path] = {}

    def run(source: Path, **options: Any) -> Path:
        key = (source, tuple(sorted(options.items())))
        if key not in done:
            output = tmp_path_factory.mktemp("converted") / source.name
            done[key] = convert(str(source), output, ConvertOptions(**options)).folder
        return done[key]

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """The tiny random checkpoint of a name of tests/checkpoints.py, made once a session; do not change it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        return root / name if (root / name).exists() else make_checkpoint(root / name, name)

    return make


def shared(path: str) -> Path:
    """A file of the shared real data; skips the test where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"shared/{path} is not here: this test needs real data that is not part of the project")
    return found
