"""python -m pytest -m ray tests/runtime/job/test_ray.py

A job on a Ray cluster of two local nodes: one is killed midway, and nothing is lost and nothing twice.
"""

import json
import os
import sys
import threading
import time

import pytest

import runtime.__main__
from demo.shapes.scenes import make_scene
from runtime import batch
from runtime.job.answers import read_answers, text_of
from runtime.job.cluster import Left

PICTURES, QUESTIONS = (
    100,
    ["Describe the picture.", "Which shape is purple?", "How many shapes are there?", "What colour is the star?"],
)


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one core each."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'internvl-openvino[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's workers make way for everybody else
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    made.other = made.add_node(num_cpus=1, object_store_memory=100 << 20)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.ray
def test_a_node_that_dies_loses_nothing(cluster, shapes, tmp_path, capsys):
    """A quarter of the rows has been answered by then; a bad row and an id that comes twice are told all the same."""
    rows = []
    for number in range(PICTURES):
        file = tmp_path / f"{number}.png"
        make_scene(3, "test", number, kind="grid", language="en").canvases[0].picture.convert("RGB").save(file)
        rows += [{"id": f"{number}-{n}", "image": file.name, "question": text} for n, text in enumerate(QUESTIONS)]
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    requests.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "gone", "image": "no.png"}, rows[0]]))

    def kill() -> None:
        while not out.exists() or out.read_bytes().count(b"\n") < len(rows) // 4:
            time.sleep(0.02)
        cluster.remove_node(cluster.other, allow_graceful=False)

    killing = threading.Thread(target=kill)
    killing.start()
    asked = ["batch", str(shapes), str(requests), str(out), "--question", "Hm?", "--ray", cluster.address]
    assert runtime.__main__.main(asked) == 0
    killing.join()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["answered"], summary["failed"]) == (len(rows), 2)
    lines = [*read_answers(out)]
    names = [line["custom_id"] for line in lines]
    assert sorted(names) == sorted([row["id"] for row in rows] + ["gone", f"#{len(rows) + 2}"])
    found = {line["custom_id"]: text_of(line) for line in lines}
    asked = [row | {"image": str(tmp_path / row["image"])} for row in rows[:100]]
    assert {answer.id: answer.text for answer in batch(shapes, asked)} == {row["id"]: found[row["id"]] for row in asked}
    assert (
        runtime.__main__.main(["batch", str(shapes), str(requests), str(out), "--question", "Hm?", "--ray", cluster.address]) == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["before"] == len(lines)


def test_without_ray_it_is_one_line(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "requests.jsonl").write_text('{"id": "a", "question": "Hm?"}\n')
    asked = ["batch", str(shapes), str(tmp_path / "requests.jsonl"), str(tmp_path / "out.jsonl"), "--ray"]
    assert runtime.__main__.main(asked) == 2
    told = capsys.readouterr().err
    assert told == "error: ray is not installed: pip install 'internvl-openvino[ray]'; it spreads a job over machines\n"


def test_bits_of_rows_are_a_set():
    left, wanted = Left(), {1, 7, 8, 9, 4096, 100_000}
    for number in wanted:
        left.add(number)
    assert {number for number in range(200_000) if number in left} == wanted


def test_nothing_is_reported_to_anybody(monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'internvl-openvino[ray]'")
    from runtime.job.cluster import library

    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    library()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
