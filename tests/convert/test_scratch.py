"""python -m pytest tests/convert/test_scratch.py

Copies that a conversion makes of a checkpoint lie in mapped files and leave nothing behind.
"""

import errno
import gc
import os

import pytest
import torch

import convert
import convert.scratch
from convert.checkpoint import Checkpoint
from convert.reference.model import load_language
from convert.scratch import LEAST, Scratch
from tests.checkpoints import CONFIGS, make_checkpoint


def mapped(folder) -> int:
    """Bytes of this process that are mapped from files of a folder."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(folder) in line]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


needs_maps = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads what is mapped from /proc")


@needs_maps
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tensor_is_a_file_as_long_as_it_lives(tmp_path, dtype):
    scratch = Scratch(tmp_path)
    tensor = scratch.empty((3, LEAST), dtype=dtype)
    assert mapped(tmp_path) >= 3 * LEAST * dtype.itemsize
    values = torch.randn(3, LEAST).to(dtype)
    tensor.copy_(values)
    part = tensor[1].clone()
    assert torch.equal(part, values[1])
    assert not list(tmp_path.iterdir()), "an interrupted conversion would leave it"
    del tensor
    gc.collect()
    assert not mapped(tmp_path)


def test_small_tensors_stay_in_memory(tmp_path):
    assert Scratch(tmp_path).empty((4, 5), dtype=torch.float32).shape == (4, 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="takes room otherwise here")
def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Scratch(tmp_path).empty((LEAST,), dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_where_room_cannot_be_reserved_it_is_written(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert Scratch(tmp_path).empty((LEAST + 1,), dtype=torch.float32).sum() == 0


def test_what_is_left_is_deleted(tmp_path):
    (tmp_path / "scratch-1").write_bytes(b"left where mapped files cannot be deleted")
    (tmp_path / "other").write_bytes(b"not ours")
    Scratch(tmp_path).clear()
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("system", [os.name, "nt"], ids=["here", "windows"])
def test_nothing_is_left_in_a_folder(tmp_path, monkeypatch, system):
    """Where mapped files cannot be deleted, they are once they are not mapped any more."""
    folder = make_checkpoint(tmp_path / "checkpoint", "tiny-internlm2")
    monkeypatch.setattr(convert.scratch, "LEAST", 1)
    monkeypatch.setattr(convert.scratch, "DELETES_MAPPED", system != "nt")
    output = convert.convert(str(folder), tmp_path / "out", convert.ConvertOptions(weight_format="int8")).folder
    assert not [file.name for file in output.iterdir() if file.name.startswith(convert.scratch.PREFIX)]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@needs_maps
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-internlm2", {"hidden_size": 1024, "num_attention_heads": 16}),
        ("tiny-qwen3-moe", {"hidden_size": 1024}),
        ("tiny-gpt-oss", {"hidden_size": 1024, "intermediate_size": 256}),
    ],
)
def test_packed_rows_and_joined_experts_are_copied_to_disk(tmp_path, name, changes):
    folder = make_checkpoint(tmp_path / "checkpoint", name, llm_config=CONFIGS[name]["llm_config"] | changes)
    here = tmp_path / "scratch"
    here.mkdir()
    language = load_language(Checkpoint(folder), None, empty=Scratch(here).empty)
    assert mapped(here) >= 2 * LEAST
    plain = load_language(Checkpoint(folder), None)
    for (key, found), wanted in zip(language.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), key
