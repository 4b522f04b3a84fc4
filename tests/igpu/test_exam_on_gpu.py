"""build/igpu/run python -m pytest tests/igpu/test_exam_on_gpu.py

The built-in model in float16, as people run it: a thousand questions, real overflows, the commands, the page, both engines.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from demo.shapes.evaluate import EvaluateOptions, evaluate
from runtime import pipeline
from runtime.__main__ import main
from runtime.answer.model import OpenedModel
from runtime.errors import DeviceError
from runtime.folder.files import OVERFLOWS_FILE
from tests.conftest import DATA
from tests.igpu.conftest import KEPT

ROOT = Path(__file__).parents[2]
CHECKPOINT, PICTURE = ROOT / "demo" / "shapes" / "checkpoint", ROOT / "demo" / "examples" / "shapes.png"
QUESTION = "Which shape is purple?"


@pytest.fixture(scope="module")
def cpu_accuracy(converted):
    return evaluate(OpenedModel(converted(CHECKPOINT, weight_format="int4")), EvaluateOptions())["accuracy"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("weight_format", ["int4", "fp16"])
def test_a_thousand_questions_are_answered_as_on_a_cpu(converted, cpu_accuracy, weight_format):
    model = OpenedModel(converted(CHECKPOINT, weight_format=weight_format), "GPU", cache_dir=KEPT)
    assert evaluate(model, EvaluateOptions())["accuracy"] >= cpu_accuracy - 0.005


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


def test_ctrl_c_ends_a_compilation_at_once_and_leaves_nothing(shapes, tmp_path):
    command = [
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
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
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
