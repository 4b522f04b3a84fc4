"""python -m pytest tests/runtime/job/test_batch.py

Jobs of many questions: answers are a conversation's, row by row; a job that was killed goes on, with every id once; what is wrong
with a row is the row's, and what is wrong with a job is one line.
"""

import base64
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime.__main__
from demo.shapes.scenes import make_scene
from runtime import batch
from runtime.answer.model import OpenedModel
from runtime.answer.turn import Question
from runtime.commands import batch as command
from runtime.errors import OptionError
from runtime.job import ask, workers
from runtime.job.answers import ANSWERED, FAILED, SEEN, Ids, read_answers, text_of
from tests.conftest import DATA, data_url

ROOT = Path(__file__).parents[3]
PICTURE, PAIR = ROOT / "demo" / "examples" / "shapes.png", [ROOT / "demo" / "examples" / f"pair-{n}.png" for n in (1, 2)]
QUESTIONS = ["Describe the picture.", "Which shape is purple?", "How many shapes are there?", "What colour is the star?"]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(shapes):
    return OpenedModel(shapes)


@pytest.fixture(autouse=True)
def opened(model, monkeypatch):
    """Jobs of this process take the model that is open; those of other processes open it."""
    monkeypatch.setattr(command, "open_model", lambda folder, **_: model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of twelve drawn scenes, and 48 requests about them."""
    folder = tmp_path_factory.mktemp("pictures")
    with open(folder / "requests.jsonl", "w") as file:
        for number in range(12):
            scene = make_scene(3, "test", number, kind="grid", language="en").canvases[0].picture
            scene.convert("RGB").save(folder / f"{number}.png")
            for asked, question in enumerate(QUESTIONS):
                file.write(json.dumps({"id": f"{number}-{asked}", "image": f"{number}.png", "question": question}) + "\n")
    return folder


@pytest.fixture(scope="module")
def rows(pictures):
    """The requests as Python has them."""
    read = [json.loads(line) for line in (pictures / "requests.jsonl").read_text().splitlines()]
    return [row | {"image": str(pictures / row["image"])} for row in read]


def chat(*content, **more):
    """A row of the Batch API's form, but for its id."""
    body = {"model": "any", "messages": [{"role": "user", "content": [*content]}], **more}
    return {"method": "POST", "url": "/v1/chat/completions", "body": body}


def shown(file: Path):
    return {"type": "image_url", "image_url": {"url": data_url(file)}}


def said(text: str):
    return {"type": "text", "text": text}


def run(*arguments) -> int:
    return runtime.__main__.main(["batch", *map(str, arguments)])


def texts(file: Path) -> dict[str, str | None]:
    """Id -> text of a file of answers, in which no id comes twice."""
    lines = [*read_answers(file)]
    found = {line["custom_id"]: text_of(line) for line in lines}
    assert len(found) == len(lines)
    return found


def test_answers_are_those_of_a_conversation(shapes, video):
    """Rows of both forms about one picture, two, a video, none, in chunks that share and do not.

    In float32: by default a job computes a token in another company than a conversation, and tokens nearly as likely change places.
    """
    model, rows, wanted = OpenedModel(shapes, precision="accuracy"), [], {}

    def asked(name, row, question, **about):
        rows.append({"custom_id": name, **row})
        wanted[name] = model.start_conversation().ask(question, do_sample=False, **about)

    for number, question in enumerate(QUESTIONS * 12):  # more than are written at once
        asked(f"short-{number}", {"image": str(PICTURE), "question": question}, question, images=[PICTURE])
    for number, question in enumerate(QUESTIONS):
        asked(f"chat-{number}", chat(shown(PICTURE), said(question)), question, images=[PICTURE])
    compare = "Image-1: <image>\nImage-2: <image>\nWhich picture has more shapes?"
    asked("pair", {"images": [*map(str, PAIR)], "question": compare}, compare, images=PAIR)
    asked("chat-pair", chat(shown(PAIR[0]), shown(PAIR[1]), said(compare)), compare, images=PAIR)
    asked("video", {"video": str(video), "question": "Describe the picture."}, "Describe the picture.", video=video)
    asked("text", {"question": "How many shapes are there?"}, "How many shapes are there?")
    asked("short", chat(shown(PICTURE), said(QUESTIONS[0]), max_tokens=3), QUESTIONS[0], images=[PICTURE], max_new_tokens=3)
    asked("stop", chat(shown(PICTURE), said(QUESTIONS[0]), stop=["and"]), QUESTIONS[0], images=[PICTURE], stop_strings=["and"])
    answers = {answer.id: answer for answer in batch(model, rows)}
    assert {name: answer.error or answer.text for name, answer in answers.items()} == wanted
    assert (answers["short"].finish_reason, answers["short"].completion_tokens) == ("length", 3)
    assert (answers["stop"].finish_reason, answers["pair"].pictures, answers["video"].pictures) == ("stop", 2, 8)


def test_a_small_cache_changes_no_answer(model, rows):
    """Rows wait for each other; one that needs more than there is is answered alone."""
    some = {answer.id: answer.text for answer in batch(model, rows, cache_size=1e-6, max_new_tokens=40)}
    assert some == {answer.id: answer.text for answer in batch(model, rows, max_new_tokens=40)}
    assert len(some) == len(rows)


def test_a_picture_of_several_rows_is_opened_and_looked_at_once(model, pictures, monkeypatch):
    opened = []
    monkeypatch.setattr(ask, "LOOKED_AT_ONCE", 4)
    real = ask.Question.cut
    monkeypatch.setattr(ask.Question, "cut", lambda self, *given: opened.append(self.images) or real(self, *given))
    rows = [{"image": str(pictures / f"{number}.png"), "question": text} for text in QUESTIONS for number in range(12)]
    before = model.feature_cache.misses
    assert not any(answer.error for answer in batch(model, rows))
    assert len(opened) == 12
    assert model.feature_cache.misses - before <= 12


@pytest.mark.parametrize("device", ["CPU", "HETERO:CPU"], ids=["pages", "state"])
def test_positions_that_depend_on_the_length_are_kept(converted, device):
    """Past its plain length of 64 tokens this model turns positions in another way; with OpenVINO's state nothing is shared."""
    folder = converted(DATA / "golden" / "dynamic-rope", weight_format="fp32")
    model = OpenedModel(folder, device, ov_config={"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"})
    model.system_message = ""
    rows = [{"question": "a" * count} for count in (3, 30, 5, 60)]
    lengths = [len(model.prompt_of("", [Question(row["question"]).open(model.config)]).ids) for row in rows]
    assert lengths[2] + 9 < model.config.plain_length < lengths[3] < model.config.context_length - 9
    wanted = [model.start_conversation().ask(row["question"], do_sample=False, max_new_tokens=9) for row in rows]
    found = {answer.id: answer.text for answer in batch(model, rows, max_new_tokens=9)}
    assert [found[str(number)] for number in (1, 2, 3, 4)] == wanted


def test_a_schema_holds(model, tmp_path):
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'internvl-openvino[serve]'")
    rows = [{"image": PICTURE, "question": "How many shapes are there?"}, chat(shown(PICTURE), said("How many shapes are there?"))]
    (found, other) = batch(model, rows, schema=json.dumps(SCHEMA))
    wanted = model.start_conversation().ask("How many shapes are there?", images=[PICTURE], do_sample=False, schema=SCHEMA)
    assert found.text == other.text == wanted
    assert isinstance(json.loads(wanted)["n"], int)


def test_seeds_repeat_and_pictures_need_no_file(model):
    drawn = chat(shown(PICTURE), said("Describe the picture."), temperature=1.5, seed=7)
    (one, two), (plain,) = (
        batch(model, [drawn, drawn]),
        batch(model, [np.asarray(Image.open(PICTURE).convert("RGB"))], question="?"),
    )
    assert one.text == two.text
    assert plain.text
    assert not plain.error


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_a_job_that_is_killed_goes_on(shapes, model, pictures, rows, tmp_path, name, capsys):
    """Twice with kill -9, then with half of a line at its end; by way of a process that is heard, so that it has begun."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'internvl-openvino[tables]'")
    out, dice = tmp_path / name, random.Random(name)
    lines = out if out.suffix == ".jsonl" else tmp_path / f"{name}.jsonl"
    asked = [sys.executable, "-m", "runtime", "batch", *map(str, (shapes, pictures / "requests.jsonl", out))]
    job = subprocess.Popen(asked, stdout=subprocess.PIPE)
    begun = time.monotonic()
    while not lines.exists() or not lines.stat().st_size:
        assert time.monotonic() - begun < 60
        time.sleep(0.005)
    time.sleep(dice.uniform(0, 0.1))
    job.kill()
    job.wait()
    job.stdout.close()
    assert not out.exists() or out == lines
    with open(lines, "ab") as file:
        file.write(b'{"id": "batch_req_9", "custom_id": "9-')
    assert run(shapes, pictures / "requests.jsonl", out) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == 48 == summary["before"] + summary["answered"]
    assert texts(out) == {answer.id: answer.text for answer in batch(model, rows)}
    assert run(shapes, pictures / "requests.jsonl", out) == 0
    assert json.loads(capsys.readouterr().out)["before"] == 48


def test_a_bad_row_is_its_own_mistake(shapes, pictures, tmp_path, capsys):
    """Everything that can be wrong with one; then what could be put right is tried again."""
    (tmp_path / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:300])
    good = str(pictures / "0.png")

    def asked(name, image, question="Which shape is purple?"):
        return json.dumps({"id": name, "image": image, "question": question})

    rows = [
        asked("good", good),
        asked("gone", "later.png"),
        asked("broken", "broken.png"),
        "{not JSON",
        '["a list"]',
        "",
        '{"id": "good", "question": "Again?"}',
        asked("silent", good, None),
        '{"id": [1], "question": "?"}',
        '{"id": "empty", "image": {"bytes": null, "path": null}, "question": "?"}',
        json.dumps({"custom_id": "url", "url": "/v1/embeddings", "body": {}}),
        json.dumps({"custom_id": "none", "body": {"messages": []}}),
        json.dumps({"custom_id": "two", **chat(said("?"), n=2)}),
        asked("marks", good, "<image> and <image>"),
        '{"id": "half", "question": "\\ud800"}',
        asked("last", good),
    ]
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join(rows))
    assert run(shapes, requests, out) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answered"], summary["failed"]) == (2, 13)
    errors = {line["custom_id"]: line["error"]["message"] for line in read_answers(out) if line["error"]}
    for name, words in {
        "gone": "later.png does not exist",
        "broken": "cannot be read as a picture",
        "#4": "line 4 is not JSON",
        "#5": "a request is a JSON object",
        "#7": "the id 'good' is used twice",
        "silent": "--question",
        "#9": "the id is a list",
        "empty": "neither a path",
        "url": "POST /v1/embeddings is not supported: use POST /v1/chat/completions",
        "none": "body.messages",
        "two": "body.n: a row has one answer",
        "marks": "2 <image> marks for 1 pictures",
        "half": "character",
    }.items():
        assert words in errors.pop(name), name
    assert not errors
    Image.open(good).save(tmp_path / "later.png")
    assert run(shapes, requests, out) == 0  # errors are kept
    assert json.loads(capsys.readouterr().out)["before"] == 15
    assert run(shapes, requests, out, "--retry-failed") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["before"], summary["answered"], summary["failed"]) == (2, 1, 12)
    assert texts(out)["gone"] == texts(out)["good"] == texts(out)["last"] != ""


def refused(capsys, *arguments) -> str:
    assert run(*arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


def test_strict_ends_at_a_bad_row(shapes, tmp_path, capsys):
    (tmp_path / "requests.jsonl").write_text('{"id": "a", "question": "Hm?"}\nno\n')
    told = refused(capsys, shapes, tmp_path / "requests.jsonl", tmp_path / "out.jsonl", "--strict")
    assert "row #2: line 2 is not JSON" in told
    assert "#2" not in texts(tmp_path / "out.jsonl")


def test_a_file_belongs_to_one_job(shapes, pictures, tmp_path, capsys):
    """Of one request file, one model, one way to ask; and one process at a time writes to it."""
    requests, other, out = pictures / "requests.jsonl", tmp_path / "other.jsonl", tmp_path / "out.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text('{"id": "a", "question": "Hm?"}\n')
    assert run(shapes, few, out) == 0
    capsys.readouterr()
    assert "its request file is few.jsonl" in refused(capsys, shapes, requests, out)
    assert "its max tiles is none, here is 2" in refused(capsys, shapes, few, out, "--max-tiles", 2)
    elsewhere = Path(shutil.copytree(shapes, tmp_path / "checkpoint"))
    with open(elsewhere / "openvino_language_model.bin", "r+b") as weights:
        weights.write(b"another")
    assert "its model is checkpoint" in refused(capsys, elsewhere, few, out)
    other.write_text("mine\n")
    assert "does not say which job wrote it" in refused(capsys, shapes, few, other)
    assert other.read_text() == "mine\n"
    with open(out, "a") as file:
        file.write("[]\n")
    assert "a line that is not an answer" in refused(capsys, shapes, few, out)
    code = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    held = subprocess.Popen([sys.executable, "-c", code, f"{out}.job"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held.stdout.readline()
    assert f"another job writes to {out}" in refused(capsys, shapes, few, out)
    held.communicate()


def test_a_full_disk_ends_a_job_that_goes_on_later(shapes, pictures, tmp_path, capsys):
    """A limit on the size of files in the place of a disk."""
    out, limit = tmp_path / "out.jsonl", 10_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        told = refused(capsys, shapes, pictures / "requests.jsonl", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)
    assert "free some space; run the same command again" in told
    count = len(texts(out))
    assert 10 < count < 48
    assert out.read_bytes().endswith(b"\n")
    assert run(shapes, pictures / "requests.jsonl", out) == 0
    assert json.loads(capsys.readouterr().out)["before"] == count
    assert len(texts(out)) == 48


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_tables_are_read(model, pictures, tmp_path, kind):
    """Pictures as paths, bytes and datasets' structs; as datasets keeps its own files too."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'internvl-openvino[tables]'")
    from pyarrow import ipc, parquet

    from runtime.job.requests import Requests

    data = (pictures / "0.png").read_bytes()
    tables = [
        {"id": ["a"], "image": [str(pictures / "0.png")], "question": [QUESTIONS[0]], "label": ["x"]},
        {"image": [data], "question": [QUESTIONS[0]]},
        {"id": [5], "image": [{"bytes": data, "path": "gone.png"}]},
        {"id": ["c"], "images": [[{"bytes": None, "path": str(pictures / "0.png")}]]},
    ]
    found = []
    for number, columns in enumerate(tables):
        table, file = arrow.table(columns), tmp_path / f"{number}.{'parquet' if kind == 'parquet' else 'arrow'}"
        if kind == "parquet":
            parquet.write_table(table, file)
        else:
            with (ipc.new_file if kind == "arrow" else ipc.new_stream)(file, table.schema) as out:
                out.write_table(table)
        requests = Requests(file, QUESTIONS[0])
        assert requests.count() == 1
        found += [*ask.answers(model, ask.Asking(), 1 << 28, requests)]
    assert [answer.id for answer in found] == ["a", "1", "5", "c"]
    assert len({answer.error or answer.text for answer in found}) == 1
    assert not found[0].error


def test_sources_that_are_none(tmp_path, shapes, capsys):
    assert "does not exist" in refused(capsys, shapes, tmp_path / "no.jsonl", tmp_path / "out.jsonl")
    assert "--question" in refused(capsys, shapes, tmp_path, tmp_path / "out.jsonl")
    (tmp_path / "no.parquet").write_bytes(b"no")
    assert "cannot be read as a table" in refused(capsys, shapes, tmp_path / "no.parquet", tmp_path / "out.jsonl")
    (tmp_path / "a.jsonl").write_text("")
    assert "cannot be written" in refused(capsys, shapes, tmp_path / "a.jsonl", tmp_path / "no" / "out.jsonl")
    assert "cache size 0" in refused(capsys, shapes, tmp_path / "a.jsonl", tmp_path / "out.jsonl", "--cache-size", 0)
    with pytest.raises(OptionError, match="max tiles 0"):
        next(batch(shapes, [], max_tiles=0))


def test_a_folder_of_pictures(shapes, pictures, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(shapes, pictures, out, "--question", QUESTIONS[0], "--max-new-tokens", 4) == 0
    assert {*texts(out)} == {f"{number}.png" for number in range(12)}
    assert json.loads(capsys.readouterr().out)["pictures"] == 12


def test_marks_of_ids_are_those_of_a_dictionary():
    """Many more than the table begins with, some of them again."""
    ids, plain, dice = Ids(), {}, random.Random(0)
    for _ in range(30_000):
        name, mark = str(dice.randrange(20_000)), dice.choice((SEEN, ANSWERED, FAILED))
        assert ids.mark(name, mark) == plain.get(name, 0)
        plain[name] = plain.get(name, 0) | mark
    assert ids.mark("other", 0) == 0


def test_bytes_of_a_picture_are_taken(model):
    file = io.BytesIO()
    Image.open(PICTURE).save(file, "PNG")
    rows = [{"image": file.getvalue()}, {"image": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}]
    one, two = batch(model, rows, question="Which shape is purple?")
    assert one.text == two.text == model.start_conversation().ask("Which shape is purple?", images=[PICTURE], do_sample=False)


def test_datasets_map_a_column_of_answers(model, pictures):
    """In batches, by one model that stays open."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'datasets<5'")
    asked = datasets.Dataset.from_dict(
        {"image": [str(pictures / f"{number}.png") for number in range(6)], "question": QUESTIONS[:3] * 2}
    ).cast_column("image", datasets.Image())

    def answered(columns):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        found = {answer.id: answer.text for answer in batch(model, rows)}
        return {"answer": [found[str(place)] for place in range(1, len(rows) + 1)]}

    made = asked.map(answered, batched=True, batch_size=4, new_fingerprint="1", keep_in_memory=True)
    plain = [{"image": str(pictures / f"{number}.png"), "question": QUESTIONS[number % 3]} for number in range(6)]
    wanted = {answer.id: answer.text for answer in batch(model, plain)}
    assert made["answer"] == [wanted[str(place)] for place in range(1, 7)]


def test_workers_share_a_job(shapes, rows, tmp_path, model):
    """Two processes, each on a core; in a program of its own, as they are started anew."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core is no two")
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    requests.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "gone", "image": "no.png", "question": "?"}]))
    command = [sys.executable, "-m", "runtime", "batch", str(shapes), str(requests), str(out), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = texts(out)
    assert found.pop("gone") is None
    assert found == {answer.id: answer.text for answer in batch(model, rows)}
    done = subprocess.run([*command[:-1], "99"], capture_output=True, text=True)
    assert "99 workers for" in done.stderr


def test_cores_are_shared_out_by_nodes(monkeypatch, tmp_path):
    """Two nodes with every other core, as some systems number them."""
    for number, cores in enumerate(["0,2,4-4,6", "1,3,5,7"]):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(cores + "\n")
    monkeypatch.setattr(workers, "NODES", tmp_path)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: {*range(8)})
    assert workers.shares_of_cores(2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert workers.shares_of_cores(3) == [[0, 2], [4, 6, 1], [3, 5, 7]]
