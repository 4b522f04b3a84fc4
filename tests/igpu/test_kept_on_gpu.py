"""build/igpu/run python -m pytest tests/igpu/test_kept_on_gpu.py

Compiled parts on the disk as the GPU plugin writes and reads them: found again, cut short, interrupted, and where nothing can be
written; what is not there is one line.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from runtime.answer.model import OpenedModel
from runtime.errors import DeviceError
from runtime.parts.device import place_part
from runtime.parts.stateless_part import StatelessPart
from tests.conftest import DATA

ROOT = Path(__file__).parents[2]
TILE = np.random.default_rng(0).random((1, 3, 56, 56), np.float32)
WIDTH = 64  # of the language model
ONE_PART = """
import sys
from tests.igpu.test_kept_on_gpu import opened
print(float(opened(*sys.argv[1:])[1].sum()))
"""


def opened(folder, kept):
    """The vision part on the GPU in float32, and the features of a tile."""
    core = ov.Core()
    part = StatelessPart(
        Path(folder), core, place_part(core, Path(folder), "vision", "GPU", precision="accuracy", cache_dir=kept), 64
    )
    return part, part(TILE)


@pytest.fixture
def small(converted):
    return converted(DATA / "golden" / "qwen2", weight_format="fp32")


def test_a_part_is_found_again_and_one_cut_short_is_compiled_anew_in_one_line(small, tmp_path, caplog):
    compiled = f"compiling the vision part for GPU, which takes minutes; it is kept in {tmp_path} for the next start"
    _, wanted = opened(small, tmp_path)
    assert caplog.messages == [compiled]
    caplog.clear()
    part, found = opened(small, tmp_path)
    assert part._compiled.get_property("LOADED_FROM_CACHE")
    assert np.array_equal(found, wanted)
    assert caplog.messages == []
    (blob,) = tmp_path.glob("[!.]*/*.blob")
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:1000])
    part, found = opened(small, tmp_path)
    assert not part._compiled.get_property("LOADED_FROM_CACHE")
    assert np.array_equal(found, wanted)
    assert caplog.messages == [f"{blob.parent} is incomplete: the part is compiled again", compiled]


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as Unix does")
def test_where_nothing_can_be_written_one_line_says_so_and_the_answer_comes(small, tmp_path):
    (tmp_path / "file").write_text("")
    unwritable, full = tmp_path / "file" / "kept", tmp_path / "full"
    said = {
        unwritable: [
            f"{unwritable} cannot be written (Not a directory): compiled parts are not kept",
            "compiling the vision part for GPU, which takes minutes; it is not kept for the next start",
        ],
        full: [
            f"compiling the vision part for GPU, which takes minutes; it is kept in {full} for the next start",
            f"{full} cannot be written (the disk is full): the compiled part is not kept",
        ],
    }
    printed = set()
    for kept, lines in said.items():
        limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", sys.executable, "-c", ONE_PART, str(small), str(kept)]
        done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr.splitlines()) == (0, lines)
        printed.add(done.stdout)
    assert len(printed) == 1
    assert [*full.iterdir()] == []


def test_ctrl_c_ends_a_compilation_at_once_and_leaves_nothing(shapes, tmp_path):
    asked = [
        sys.executable,
        "-m",
        "runtime",
        "chat",
        str(shapes),
        "Hello",
        "--device",
        "GPU",
        "--cache-dir",
        str(tmp_path / "kept"),
    ]
    process = subprocess.Popen(asked, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert "which takes minutes" in process.stderr.readline()
    time.sleep(2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert [name for name in os.listdir(tmp_path / "kept") if "text_embeddings" not in name] == []  # those were whole


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "GPU.1"}, "there is no device GPU.1 here; there are CPU, GPU"),
        ({"device": "GPU", "ov_config": {"NO_SUCH_PROPERTY": 1}}, "cannot run the .* part .*NO_SUCH_PROPERTY"),
    ],
)
def test_what_is_not_there_is_one_line(shapes, given, said):
    assert "GPU" in ov.Core().available_devices
    with pytest.raises(DeviceError, match=said) as error:
        OpenedModel(shapes, **given)
    assert "\n" not in str(error.value)
