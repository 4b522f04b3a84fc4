"""python -m pytest tests/convert/test_convert.py

The command as a user meets it: what it prints, what it writes, and one clear line for everything that can be wrong.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from convert import ConvertOptions, convert, pipeline
from convert.__main__ import main
from convert.calibration import TILES, calibration_tiles
from convert.checkpoint import Checkpoint
from runtime.errors import DriftError
from runtime.folder.files import PART_FILES, PARTS
from runtime.media.tiles import Tiling
from tests.checkpoints import make_checkpoint
from tests.conftest import DATA

ROOT = Path(__file__).parents[2]
INT4 = ["--group-size", "32"]


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_clear_line(capsys, message: str, *arguments, code: int = 2):
    """The command exits with `code`, says `message` in one line and leaves nothing beside what was there."""
    output = Path(arguments[1])
    before = sorted(output.parent.iterdir())
    found, _, err = run(capsys, *arguments)
    assert found == code, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert message in lines[0]
    assert sorted(output.parent.iterdir()) == before


def test_it_says_what_it_does_and_proves_the_result(capsys, tiny, tmp_path):
    code, out, err = run(capsys, tiny("tiny-qwen2"), tmp_path / "out", *INT4)
    assert code == 0, err
    for part, weights in (("text_embeddings", "int8"), ("vision", "w8a8"), ("language", "int4")):
        assert f"{part} ({weights}) ..." in out
        assert f"{part} ({weights}): " in out
        assert PART_FILES[part] in out
    assert "peak memory" in out
    assert "KL a token" in out
    assert "72% int4, 27% int8" in out
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_output_is_named_after_source_and_weight_format(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, tiny("tiny-qwen2"), "--weight-format", "fp16", "--no-verify")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-qwen2-fp16"]


def test_python_files_of_a_checkpoint_are_never_run(tiny):
    """tests/checkpoints.py puts a modeling file there that ends the process."""
    assert "SystemExit" in (tiny("tiny-qwen2") / "modeling_internvl_chat.py").read_text()


def test_fp16_and_int8_stay_within_their_bounds(tiny, tmp_path):
    for weight_format in ("fp32", "fp16", "int8"):
        report = convert(str(tiny("tiny-phi3")), tmp_path / weight_format, ConvertOptions(weight_format=weight_format)).report
        assert not any(row.drifted for row in report.rows)
        assert report.quality.parts["all"].same > 0.97


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_drifts_exits_1_and_leaves_no_folder(capsys, tiny, tmp_path, monkeypatch, part):
    """One part is converted from weights with their rows turned over; the proof loads the right ones."""
    real = getattr(pipeline, f"load_{part}")

    def damaged(*arguments, **options):
        loaded = real(*arguments, **options)
        matrices = [loaded] if part == "text_embeddings" else [p for p in loaded.parameters() if p.ndim == 2 and not p.is_meta]
        for matrix in matrices:
            matrix.data = matrix.data.flip(0)
        return loaded

    monkeypatch.setattr(pipeline, f"load_{part}", damaged)
    message = f"differs from the PyTorch path by more than its weight format allows: {part} (fp32"
    source = DATA / "golden" / "flash" if part == "router" else tiny("tiny-qwen2")
    assert_one_clear_line(capsys, message, source, tmp_path / "out", "--weight-format", "fp32", code=1)


def test_nan_counts_as_drift():
    from convert.verify import Report, Row

    with pytest.raises(DriftError, match="vision"):
        Report([Row("vision", "int4", float("nan"), 0.0, 1.0, float("nan"))]).raise_if_drifted()


def test_data_aware_compression_uses_the_pictures(capsys, tiny, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 255, (60, 90, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{n}.png")
    (pictures / "0.txt").write_text("What colour is it?")
    arguments = ["--scale-estimation", "--awq", "--dataset", pictures, "--num-samples", "2", *INT4, "--no-verify"]
    code, _, err = run(capsys, tiny("tiny-qwen2"), tmp_path / "aware", *arguments)
    assert code == 0, err
    assert run(capsys, tiny("tiny-qwen2"), tmp_path / "free", *INT4, "--no-verify")[0] == 0
    aware, free = ((tmp_path / name / "openvino_language_model.bin").read_bytes() for name in ("aware", "free"))
    assert aware != free


def test_w8a8_computes_the_vision_part_in_8_bits(capsys, tiny, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(4):
        pixels = np.random.default_rng(n).integers(0, 255, (30, 45, 3), np.uint8)
        Image.fromarray(pixels).resize((90, 60)).save(pictures / f"{n}.png")
    arguments = ["--vision-weight-format", "w8a8", "--weight-format", "int8"]
    code, out, err = run(capsys, tiny("tiny-qwen2"), tmp_path / "out", *arguments)
    assert code == 0, err
    assert "vision          w8a8" in out
    model = ov.Core().read_model(tmp_path / "out" / "openvino_vision_embeddings_model.xml")
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert 0 < kinds.count("FakeQuantize") <= 3 * 4 + 2  # of random weights, some may be too noisy
    pictures = sorted(pictures.iterdir())
    tiles = calibration_tiles(pictures, Tiling.of(Checkpoint(tiny("tiny-qwen2")).config))
    assert len(tiles) == TILES < 4 * 7
    assert tiles[0].shape == (1, 3, 56, 56)


def test_a_dataset_without_pictures_is_told(capsys, tiny, tmp_path):
    arguments = (tiny("tiny-qwen2"), tmp_path / "out", "--awq", "--dataset", tmp_path / "none")
    assert_one_clear_line(capsys, "is not a folder with pictures (.jpg,", *arguments)


def test_a_group_size_that_does_not_divide_is_told_with_one_that_does(capsys, tiny, tmp_path):
    message = "group size 128 does not divide a layer 64 wide: use --group-size 64 or --group-size -1"
    assert_one_clear_line(capsys, message, tiny("tiny-qwen2"), tmp_path / "out", "--recipe", "small")
    assert run(capsys, tiny("tiny-qwen2"), tmp_path / "out", "--recipe", "fast", "--group-size", "64", "--no-verify")[0] == 0


def test_an_existing_output_is_refused(capsys, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    assert_one_clear_line(capsys, "exists already: choose another output folder", tiny("tiny-qwen2"), tmp_path / "out")


def test_force_replaces_a_model_folder_when_the_new_one_is_whole(capsys, tiny, tmp_path):
    output = tmp_path / "out"
    assert run(capsys, tiny("tiny-qwen2"), output, *INT4, "--no-verify")[0] == 0
    (output / "old").touch()
    broken = make_checkpoint(tmp_path / "broken", "tiny-qwen2")
    (broken / "tokenizer.json").write_text("{")
    assert run(capsys, broken, output, *INT4, "--force")[0] == 2
    assert (output / "old").exists(), "a failed conversion leaves the old folder"
    assert run(capsys, tiny("tiny-llama"), output, *INT4, "--no-verify", "--force")[0] == 0
    assert not (output / "old").exists()
    assert json.loads((output / "config.json").read_text())["llm_config"]["model_type"] == "llama"


def test_force_does_not_delete_what_is_no_model_folder(capsys, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    message = "so it is not a model folder: --force will not delete it"
    assert_one_clear_line(capsys, message, tiny("tiny-qwen2"), tmp_path / "out", "--force")
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_too_little_disk_is_told_before_any_work(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1_000_000))
    assert_one_clear_line(capsys, "has 0.00 GB free, about 0.04 GB are needed", tiny("tiny-qwen2"), tmp_path / "out")


def test_a_write_that_fails_midway_is_told(tiny, tmp_path):
    """A limit on the size of a file stands in for a full disk: the same calls fail, in OpenVINO and in Python."""
    resource = pytest.importorskip("resource")
    limit = 40_000
    done = subprocess.run(
        [sys.executable, "-m", "convert", str(tiny("tiny-qwen2")), str(tmp_path / "out"), "--no-verify", *INT4],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written, its disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_an_interrupted_conversion_leaves_nothing(tiny, tmp_path, sent):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "convert", str(tiny("tiny-qwen2")), str(tmp_path / "out"), *INT4],
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    for line in process.stdout:
        if line.startswith("vision (w8a8) ..."):
            break
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"], "midway, beside the final name"
    process.send_signal(sent)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: interrupted, no folder was written; run the same command to start again" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


GEMMA = {"architectures": ["GemmaForCausalLM"]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda f: (f / "config.json").unlink(), "has no config.json", id="no config"),
        pytest.param(lambda f: (f / "config.json").write_text("{"), "is not JSON", id="no JSON"),
        pytest.param(lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer", id="no tokenizer"),
        pytest.param(lambda f: truncate(f / "model.safetensors"), "is not a whole safetensors file", id="truncated"),
        pytest.param(lambda f: without(f, "mlp1.1.bias"), "1 missing: mlp1.1.bias", id="a tensor missing"),
        pytest.param(lambda f: edit(f, model_type="qwen2_vl"), "model_type is 'qwen2_vl'", id="another model"),
        pytest.param(lambda f: edit(f, template="vicuna"), "template 'vicuna' is not known", id="another template"),
        pytest.param(lambda f: edit(f, llm_config=GEMMA), "GemmaForCausalLM is not supported; supported are", id="language model"),
        pytest.param(
            lambda f: edit(f, llm_config={"architectures": ["Qwen2ForCausalLM"]}), "llm_config has no vocab_size", id="no sizes"
        ),
    ],
)
def test_a_broken_checkpoint_is_told(capsys, tmp_path, damage, message):
    folder = make_checkpoint(tmp_path / "checkpoint", "tiny-qwen2")
    damage(folder)
    assert_one_clear_line(capsys, message, folder, tmp_path / "out")


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_source_that_is_not_there_is_told(capsys, tmp_path):
    assert_one_clear_line(capsys, "is neither a folder nor a hub id like OpenGVLab/InternVL2-1B", "./nowhere", tmp_path / "out")


def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "save_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(tiny("tiny-qwen2")), str(tmp_path / "out"), *INT4])
    assert not list(tmp_path.iterdir())
