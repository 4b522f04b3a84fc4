"""python -m pytest -m clients tests/clients/test_lmms_eval.py    (make clients installs what it needs)

lmms-eval measures the built-in model over the server, by its model for OpenAI's interface, on a tiny task of drawn pictures. It
has an environment of its own, since it wants an older PyAV than we do.
"""

import base64
import json
import os
import subprocess

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")

from demo.shapes.scenes import make_scene
from runtime import OVInternVLChatModel
from tests.runtime.serve.server import ROOT, started

pytestmark = pytest.mark.clients
LMMS_EVAL = ROOT / "build" / "clients" / "lmms-eval" / "bin" / "lmms-eval"
SCENES = 8
TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
  cache_dir: {cache}
task: drawn_shapes
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures_of
doc_to_text: !function utils.question_of
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 64
  temperature: 0
process_results: !function utils.compare
metric_list:
  - metric: same
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
import base64, io
from PIL import Image

def pictures_of(row):
    return [Image.open(io.BytesIO(base64.b64decode(row["picture"]))).convert("RGB")]

def question_of(row, lmms_eval_specific_kwargs=None):
    return row["question"]

def compare(row, results):
    return {"same": float(results[0].strip() == row["answer"])}
"""


def test_lmms_eval_gets_the_command_lines_answers(shapes, tmp_path):
    if not LMMS_EVAL.exists():
        pytest.skip("lmms-eval is not installed: make clients")
    model, rows = OVInternVLChatModel(shapes), []
    for number in range(SCENES):
        scene = make_scene(17, "test", number, kind="grid", language="en")
        scene.canvases[0].picture.convert("RGB").save(tmp_path / "picture.png")
        question = scene.groups[0][0].question
        answer = model.start_conversation().ask(question, images=[tmp_path / "picture.png"], do_sample=False)
        picture = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
        rows.append(json.dumps({"picture": picture, "question": question, "answer": answer}))
    task = tmp_path / "task"
    task.mkdir()
    (task / "rows.jsonl").write_text("\n".join(rows))
    (task / "drawn_shapes.yaml").write_text(TASK.format(rows=task / "rows.jsonl", cache=tmp_path / "cache"))
    (task / "utils.py").write_text(UTILS)
    with started(shapes, tmp_path, "--api-key", "sesame") as server:
        arguments = f"model_version=shapes,base_url={server.address}/v1,api_key=sesame,num_concurrent=4,timeout=60,max_retries=1"
        command = [LMMS_EVAL, "--model", "openai", "--model_args", arguments, "--tasks", "drawn_shapes", "--include_path", task]
        done = subprocess.run(
            [*map(str, command), "--batch_size", "1", "--output_path", str(tmp_path / "found")],
            cwd=tmp_path,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [*(tmp_path / "found").rglob("*results.json")]
    assert found, done.stderr[-3000:]
    read = json.loads(found[0].read_text())
    assert read["results"]["drawn_shapes"]["same,none"] == 1.0, read["results"]
    assert read["n-samples"]["drawn_shapes"]["effective"] == SCENES
