"""build/igpu/run python -m pytest tests/igpu/test_exam_on_gpu.py

The built-in model as people run it: a thousand questions in float16, the same answers in float32, real overflows, a vision part
that computes in 8 bits, the commands, both engines.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from convert.exact import Part
from demo.shapes.evaluate import EvaluateOptions, evaluate
from runtime import pipeline
from runtime.__main__ import main
from runtime.answer.model import OpenedModel
from runtime.folder.files import OVERFLOWS_FILE, PART_FILES
from tests.conftest import DATA
from tests.igpu.conftest import KEPT

ROOT = Path(__file__).parents[2]
CHECKPOINT, PICTURE = ROOT / "demo" / "shapes" / "checkpoint", ROOT / "demo" / "examples" / "shapes.png"
QUESTION = "Which shape is purple?"
IN_FLOAT32 = 100  # questions of the exam


@pytest.fixture(scope="module")
def cpu_accuracy(converted):
    return evaluate(OpenedModel(converted(CHECKPOINT, weight_format="int4")), EvaluateOptions())["accuracy"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("weight_format", ["int4", "fp16"])
def test_a_thousand_questions_are_answered_as_on_a_cpu(converted, cpu_accuracy, weight_format):
    model = OpenedModel(converted(CHECKPOINT, weight_format=weight_format), "GPU", cache_dir=KEPT)
    assert evaluate(model, EvaluateOptions())["accuracy"] >= cpu_accuracy - 0.005


@pytest.mark.timeout(3600)
def test_in_float32_the_answers_are_the_same(shapes):
    options = EvaluateOptions(limit=IN_FLOAT32)
    found, wanted = (
        evaluate(OpenedModel(shapes, device, precision="accuracy", cache_dir=KEPT), options) for device in ("GPU", "CPU")
    )
    assert found == wanted  # wrong answers too, letter for letter


def test_a_vision_part_in_w8a8_gives_the_features_of_a_cpu(converted):
    folder = converted(CHECKPOINT, weight_format="int4")
    kinds = {node.get_type_name() for node in ov.Core().read_model(folder / PART_FILES["vision"]).get_ops()}
    assert "FakeQuantize" in kinds  # w8a8
    tiles = np.random.default_rng(0).standard_normal((2, 3, 112, 112)).astype(np.float32)
    wanted = Part(folder, "vision")(tiles)
    found = OpenedModel(folder, "CPU", vision_device="GPU", cache_dir=KEPT).encode_tiles(tiles)
    assert (found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.999


@pytest.fixture(scope="module")
def loud(tmp_path_factory, converted):
    """A tiny model whose residual streams begin at a million, in both large parts: norms make them small again in float32."""
    checkpoint = shutil.copytree(DATA / "golden" / "qwen2", tmp_path_factory.mktemp("loud") / "checkpoint")
    (file,) = checkpoint.glob("model*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("embed_tokens.weight") or ".embeddings." in name:
            tensors[name] = tensors[name] * 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    return converted(checkpoint, weight_format="fp32", verify=False)


def test_a_real_overflow_is_computed_again_told_once_and_remembered(loud, tmp_path, caplog):
    folder = shutil.copytree(loud, tmp_path / "model")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 112, 3), np.uint8))
    asked = {"images": [picture], "max_new_tokens": 8, "do_sample": False}
    wanted = OpenedModel(folder, precision="accuracy").start_conversation().ask("What?", **asked)
    assert OpenedModel(folder, "GPU", cache_dir=KEPT).start_conversation().ask("What?", **asked) == wanted
    said = [record.getMessage() for record in caplog.records if "overflows" in record.getMessage()]
    assert said == [
        f"the {part} part overflows in float16 on GPU: it is compiled again in float32, from now on"
        for part in ("vision", "language")
    ]
    assert json.loads((folder / OVERFLOWS_FILE).read_text()) == {"GPU": ["language", "vision"]}
    caplog.clear()
    assert OpenedModel(folder, "GPU", cache_dir=KEPT).start_conversation().ask("What?", **asked) == wanted
    assert not [record for record in caplog.records if "overflows" in record.getMessage()]


def test_the_commands_answer(converted, capsys):
    folder = str(converted(CHECKPOINT, weight_format="int4"))
    assert main(["chat", folder, QUESTION, "--image", str(PICTURE), "--device", "GPU", "--cache-dir", str(KEPT)]) == 0
    assert capsys.readouterr().out == "circle\n"
    given = ["--device", "GPU", "--cache-dir", str(KEPT), "--repeats", "1", "--warm-up", "0", "--max-new-tokens", "4"]
    assert main(["benchmark", folder, "--image", str(PICTURE), *given]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["device"] == "GPU"
    assert main(["doctor"]) == 0
    assert "GPU       " in capsys.readouterr().out


@pytest.mark.timeout(1800)
def test_the_batching_engine_answers(converted):
    with pipeline(converted(CHECKPOINT, weight_format="int4"), device="GPU", cache_dir=KEPT, cache_size=1) as pipe:
        assert [answer.text for answer in pipe([(QUESTION, str(PICTURE))] * 2)] == ["circle", "circle"]
