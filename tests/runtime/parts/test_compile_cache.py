"""python -m pytest tests/runtime/parts/test_compile_cache.py

Compiled parts on the disk: found again, never mistaken for another's, never half. A CPU keeps its parts as a GPU does; what is said
of a GPU is said of a stand-in that lists one.
"""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from runtime.__main__ import main
from runtime.answer.model import OpenedModel
from runtime.folder.files import PART_FILES
from runtime.parts import compile_cache
from runtime.parts.compile_cache import WHOLE_FILE, bytes_kept, kept_in
from runtime.parts.device import MODEL_CACHE, Placement
from runtime.parts.stateless_part import StatelessPart
from tests.runtime.parts.test_device import LAPTOP

ROOT = Path(__file__).parents[3]
ON_GPU = Placement("vision", "GPU", {})


@pytest.fixture
def folder(tiny, converted, tmp_path):
    return shutil.copytree(converted(tiny("tiny-qwen2"), weight_format="fp32"), tmp_path / "model")


@pytest.fixture
def vision(folder, tmp_path):
    """Open the vision part, as kept in tmp_path/kept -> whether it came from there, its features of one tile."""
    placement = Placement("vision", "CPU", {"CACHE_DIR": str(tmp_path / "kept"), "INFERENCE_PRECISION_HINT": "f32"})
    tile = np.random.default_rng(0).random((1, 3, 56, 56), np.float32)

    def open_part():
        part = StatelessPart(folder, ov.Core(), placement, 64)
        return part._compiled.get_property("LOADED_FROM_CACHE"), part(tile)

    return open_part


@pytest.fixture
def said(monkeypatch):
    """The lines that were logged; pytest's own fixture misses those of loggers that another test has turned off."""
    lines: list[str] = []
    monkeypatch.setattr(compile_cache.logger, "warning", lambda text, *given: lines.append(text % given))
    return lines


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "kept").iterdir() if not path.is_symlink())


def write(base, core=LAPTOP, xml=None, placement=ON_GPU, properties=None):
    """Keep a compiled part, without compiling one -> the folder of it, and whether it was there."""
    with kept_in(base, core, placement, xml, properties or {}) as where:
        there = (where / WHOLE_FILE).exists()
        if not there:
            (where / "1.blob").write_bytes(b"kernels")
    return sorted(path for path in base.iterdir() if path.name.startswith(placement.part)), there


def test_a_part_is_found_again_and_answers_the_same(vision, tmp_path):
    (first, made), (second, found) = vision(), vision()
    assert (first, second) == (False, True)
    assert np.array_equal(made, found)
    assert len(kept(tmp_path)) == 1
    assert bytes_kept(tmp_path / "kept") > 100_000


def test_changed_weights_are_compiled_anew(vision, folder, tmp_path):
    _, before = vision()
    weights = (folder / PART_FILES["vision"]).with_suffix(".bin")
    values = np.fromfile(weights, np.float32)
    values[np.abs(values) > 1e-6] *= 1.5  # what is a whole number here is none that small
    weights.write_bytes(values.tobytes())
    cached, after = vision()
    assert not cached
    assert not np.allclose(before, after)
    assert vision()[0]


def test_what_was_cut_short_is_compiled_anew_in_one_line(vision, tmp_path, said):
    _, before = vision()
    (blob,) = (tmp_path / "kept").glob("[!.]*/*.blob")
    blob.write_bytes(blob.read_bytes()[:1000])
    cached, after = vision()
    assert not cached
    assert np.array_equal(before, after)
    assert said == [f"{blob.parent} is incomplete: the part is compiled again"]
    assert vision()[0]


@pytest.mark.parametrize("changed", ["driver", "openvino", "device", "file"])
def test_what_was_made_for_something_else_is_never_used_and_goes(tmp_path, monkeypatch, changed):
    base, xml = tmp_path / "kept", tmp_path / "part.xml"
    xml.write_text("<net/>")
    monkeypatch.setattr(compile_cache, "_drivers", lambda: ["24.1"])
    core = LAPTOP
    (old,), there = write(base, core, xml)
    assert not there
    assert write(base, core, xml) == ([old], True)
    if changed == "driver":
        monkeypatch.setattr(compile_cache, "_drivers", lambda: ["24.2"])
    elif changed == "openvino":
        monkeypatch.setattr(ov, "get_version", lambda: "2027.0")
    elif changed == "device":
        monkeypatch.setattr(compile_cache, "_identity", lambda core, device: f"another {device}")
    else:
        xml.write_text("<net name='other'/>")
    (new,), there = write(base, core, xml)
    assert not there
    assert new != old


def test_what_was_made_with_other_properties_stays(tmp_path):
    base, xml = tmp_path / "kept", tmp_path / "part.xml"
    xml.write_text("<net/>")
    write(base, LAPTOP, xml)
    assert len(write(base, LAPTOP, xml, properties={"INFERENCE_PRECISION_HINT": "f32"})[0]) == 2
    assert write(base, LAPTOP, xml)[1]


def test_a_gpu_is_said_to_take_minutes_once(tmp_path, said):
    xml = tmp_path / "part.xml"
    xml.write_text("<net/>")
    for _ in range(2):
        write(tmp_path / "kept", LAPTOP, xml)
    where = tmp_path / "kept"
    assert said == [f"compiling the vision part for GPU, which takes minutes; it is kept in {where} for the next start"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_what_ends_in_the_middle_leaves_nothing(tmp_path, end):
    xml, base = tmp_path / "part.xml", tmp_path / "kept"
    xml.write_text("<net/>")

    def compile_half():
        with kept_in(base, LAPTOP, ON_GPU, xml, {}) as where:
            (where / "1.blob").write_bytes(b"half")
            raise end

    with pytest.raises(end):
        compile_half()
    assert [*base.iterdir()] == []


def test_a_folder_that_cannot_be_written_is_said_and_the_answer_comes(folder, tmp_path, said):
    (tmp_path / "file").write_text("")
    model = OpenedModel(folder, cache_dir=tmp_path / "file" / "kept")
    assert model.start_conversation().ask("What?", max_new_tokens=2) is not None
    assert {*said} == {f"{tmp_path / 'file' / 'kept'} cannot be written (Not a directory): compiled parts are not kept"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as Unix does")
def test_a_full_disk_is_said_and_the_answer_comes(folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "runtime",
            "chat",
            str(folder),
            "What?",
            "--max-new-tokens",
            "2",
            "--cache-dir",
            str(tmp_path / "kept"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'kept'} cannot be written (the disk is full): the compiled part is not kept" in done.stderr
    assert kept(tmp_path) == []


def test_the_size_is_told_and_nothing_is_kept_where_nobody_wants_it(folder, tmp_path, capsys):
    question = ["chat", str(folder), "What?", "--max-new-tokens", "2"]
    assert main([*question, "--no-cache"]) == 0
    assert main(["info", str(folder)]) == 0
    assert "compiled" not in capsys.readouterr().out
    assert main([*question, "--cache-dir", str(folder / MODEL_CACHE)]) == 0
    assert main(["info", str(folder)]) == 0
    assert f"compiled         {bytes_kept(folder / MODEL_CACHE) / 1e6:.1f} MB  {MODEL_CACHE}" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="looks for a link, which Windows need not give")
def test_kernels_that_a_gpu_adds_while_it_runs_are_kept_and_the_link_goes(tmp_path):
    """OpenVINO goes on writing where it was told to when the part was compiled."""
    code = f"""
from pathlib import Path
from tests.runtime.parts.test_compile_cache import LAPTOP, ON_GPU, kept_in
with kept_in(Path({str(tmp_path / "kept")!r}), LAPTOP, ON_GPU, Path({str(tmp_path / "part.xml")!r}), {{}}) as where:
    (where / "1.blob").write_bytes(b"kernels")
(where / "2.cl_cache").write_bytes(b"one more")
"""
    (tmp_path / "part.xml").write_text("<net/>")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    (whole,) = kept(tmp_path)
    assert {path.name for path in (tmp_path / "kept" / whole).iterdir()} == {"1.blob", "2.cl_cache", WHOLE_FILE}
