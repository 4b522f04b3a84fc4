"""python -m pytest tests/runtime/contrast/test_search.py

Words, labels, captions and indexes with the small model: what people do with a folder of InternVL-C and -G, and get wrong.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

import runtime.__main__
from demo.contrast.scenes import things_of
from runtime import OVInternVL
from runtime.contrast import embed as embedding
from runtime.contrast.embed import embed
from runtime.contrast.index import Index
from runtime.contrast.zeroshot import recalls
from runtime.errors import OptionError, PromptError
from tests.conftest import data_url

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(small):
    return OVInternVL(small)


@pytest.fixture(scope="module")
def index(model, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "vectors.npz"
    embed(model, [pictures], out)
    return out


def told(capsys, *arguments):
    """Exit code, output and errors of a command."""
    capsys.readouterr()
    code = runtime.__main__.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_ids_are_those_of_sentencepiece(model, small):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(small / "tokenizer.model"))
    for text in ("a red star", "红色的五角星", "  two  spaces", "naïve 🙂", "<unk></s>"):
        assert model.ids_of(text) == [1, *pieces.encode("summarize:" + text), 2]


def test_long_texts_are_cut_and_said_once(small, caplog):
    model, long = OVInternVL(small), "a red star " * 40
    with caplog.at_level(logging.WARNING):
        ids = model.ids_of(long)
        model.ids_of(long)
    assert len(ids) == 80
    assert ids[-1] == 2
    assert len([record for record in caplog.records if "more than 80" in record.message]) == 1


@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_descriptions_find_their_pictures(model, scenes, mode, language):
    cosines = model.similarity([scene.picture for scene in scenes], [scene.texts[language] for scene in scenes], mode)
    assert recalls(cosines.T, np.arange(len(scenes)))["image_retrieval_recall@1"] >= 0.95
    assert np.abs(np.linalg.norm(model.encode_images([scenes[0].picture], mode), axis=1) - 1).max() < 1e-5


def test_sources_of_a_picture_give_the_same_vector(model, pictures):
    path = pictures / "00.png"
    found = model.encode_images(
        [path, str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path)), data_url(path)]
    )
    assert np.abs(found - found[0]).max() < 1e-6


def test_captions_name_what_is_there(model, scenes):
    written = model.caption([scene.picture for scene in scenes], num_beams=1, max_new_tokens=60)
    assert sum(things_of(caption) == scene.things for caption, scene in zip(written, scenes, strict=True)) >= 20
    assert isinstance(model.caption(scenes[0].picture), str)


def test_labels_get_probabilities(model, scenes):
    single = next(scene for scene in scenes if len(scene.items) == 1)
    item = single.items[0]
    labels = [f"{item.colour} {item.shape}", "orange cross" if item.colour != "orange" else "blue cross"]
    found = model.classify(single.picture, labels, ["a {c}", "a photo of a {c}"])
    assert found.shape == (2,)
    assert found.sum() == pytest.approx(1)
    assert found[0] > 0.5
    assert model.classify([single.picture] * 2, labels).shape == (2, 2)


def test_the_index_is_plain_numpy(index, small, pictures):
    with np.load(index) as stored:
        assert stored["vectors"].shape == (24, 128)
        assert stored["vectors"].dtype == np.float32
        about = json.loads(str(stored["about"]))
        assert [Path(path).name for path in stored["paths"]][-1] == "23.png"
    assert about["format"] == 1
    assert Path(about["model"]) == small.resolve()
    assert [*about["skipped"]] == [str(pictures / "broken.jpg")]


def test_embedding_again_adds_only_what_is_new(model, index, pictures, scenes, tmp_path, monkeypatch):
    more = tmp_path / "vectors.npz"
    more.write_bytes(index.read_bytes())
    scenes[0].picture.save(tmp_path / "new.png")
    read = []
    monkeypatch.setattr(embedding, "open_picture", lambda path: read.append(path) or Image.open(path).convert("RGB"))
    found = embed(model, [pictures, tmp_path], more)
    assert [path.name for path in read] == ["new.png"]
    assert len(found.paths) == len(set(found.paths)) == 25


def test_a_killed_run_goes_on_and_has_each_picture_once(small, scenes, tmp_path):
    """kill -9 twice in the middle; the third run ends it."""
    folder, out = tmp_path / "many", tmp_path / "vectors.npz"
    folder.mkdir()
    for number in range(400):
        scenes[number % len(scenes)].picture.resize((24, 24)).save(folder / f"{number:04}.png")
    (folder / "0007.png").write_bytes(b"broken")
    command = [sys.executable, "-m", "runtime", "embed", str(small), str(folder), "--out", str(out)]
    journal = tmp_path / "vectors.npz.journal" / "lines.jsonl"
    for least in (60, 180):
        process = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < least):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():
            pytest.fail("the run was over before it was killed: give it more pictures")
    with journal.open("ab") as lines:
        lines.write(b'{"path": "/half')  # as a kill in the middle of a write leaves it
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = Index.read(out)
    assert sorted(Path(path).name for path in found.paths) == [f"{number:04}.png" for number in range(400) if number != 7]
    assert [Path(path).name for path in found.skipped] == ["0007.png"]
    assert "skipped:" in done.stderr
    assert not journal.exists()
    whole = OVInternVL(small).encode_images([folder / "0399.png"])
    assert np.abs(found.vectors[found.paths.index(str(folder / "0399.png"))] - whole[0]).max() < 0.01


def test_rows_without_their_lines_are_cut_off(model, scenes, tmp_path):
    from runtime.contrast.index import About, Journal

    about = About("model", "print", "InternVL-C")
    first = Journal(tmp_path / "v.npz", about, 4)
    first.add(["a"], np.ones((1, 4)), {})
    first._vectors.write(np.full(4, 9, np.float32).tobytes()[:7])  # killed between both writes
    first._vectors.flush()
    second = Journal(tmp_path / "v.npz", about, 4)
    second.add(["b"], np.full((1, 4), 2), {"c": "broken"})
    made = second.finish()
    assert made.paths == ["a", "b"]
    assert made.vectors.tolist() == [[1] * 4, [2] * 4]
    assert made.skipped == {"c": "broken"}


def test_search_prints_scores_and_paths_and_a_page(index, capsys, tmp_path, scenes):
    text = scenes[3].texts["en"]
    code, out, _ = told(capsys, "search", index, text, "--top", 3, "--html", tmp_path / "page.html")
    lines = out.splitlines()
    assert code == 0
    assert len(lines) == 3
    assert lines[0].endswith("03.png")
    assert [*map(float, (line.split()[0] for line in lines))] == sorted((float(line.split()[0]) for line in lines), reverse=True)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "03.png" in page


def test_search_finds_the_like_of_a_picture(index, pictures, capsys):
    _, out, _ = told(capsys, "search", index, "--image", pictures / "05.png", "--top", 1)
    assert out.startswith(("1.0000", "0.9999"))
    assert out.strip().endswith("05.png")


def test_nearest_neighbours_are_the_sorted_ones():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(70_000, 8)).astype(np.float32)
    index, query = Index(None, vectors, [*map(str, range(len(vectors)))]), random.normal(size=8).astype(np.float32)
    best = index.nearest(query, 5)
    assert [int(path) for _, path in best] == np.argsort(-(vectors @ query))[:5].tolist()
    assert len(index.nearest(query, 10**6)) == len(vectors)


def test_the_caption_command_writes_a_line_a_picture(small, pictures, capsys, scenes):
    _, out, _ = told(capsys, "caption", small, pictures / "00.png", pictures / "01.png")
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(pictures / "00.png"), str(pictures / "01.png")]


@pytest.fixture
def dataset(tmp_path, scenes):
    """Class folders of pictures with one thing each, named after its colour."""
    for number, scene in enumerate(scenes):
        if len(scene.items) == 1:
            folder = tmp_path / "data" / scene.items[0].colour
            folder.mkdir(parents=True, exist_ok=True)
            scene.picture.save(folder / f"{number}.png")
    return tmp_path / "data"


def test_class_folders_are_evaluated(small, dataset, capsys, tmp_path):
    colours = sorted(path.name for path in dataset.iterdir())
    (tmp_path / "classes.txt").write_text("\n".join(colours))
    (tmp_path / "templates.txt").write_text("{c}\na photo of a {c} square\n")
    arguments = ["--classes", tmp_path / "classes.txt", "--templates", tmp_path / "templates.txt"]
    code, out, _ = told(capsys, "classify", small, dataset, *arguments)
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert result["classes"] == len(colours)
    assert 0.5 <= result["acc1"] <= (result["acc5"] or 1)


def test_top_1_and_top_5_are_those_of_a_sorted_list(model, dataset):
    """Against scores that are sorted one by one, as CLIP_benchmark's accuracy does."""
    from runtime.contrast.zeroshot import evaluate_classes

    result = evaluate_classes(model, dataset)
    names = sorted(path.name for path in dataset.iterdir())
    files = [(path, number) for number, name in enumerate(names) for path in sorted((dataset / name).iterdir())]
    scores = model.encode_images([path for path, _ in files], crop=True) @ model.class_vectors(names).T
    order = np.argsort(-scores, axis=1)
    for top in (1, 5):
        hits = [number in order[row, :top] for row, (_, number) in enumerate(files)]
        assert result[f"acc{top}"] == (pytest.approx(np.mean(hits)) if len(names) >= top else None)


def test_recall_counts_any_right_caption_of_a_picture():
    scores = np.array([[0.9, 0.1], [0.2, 0.3], [0.1, 0.8]])  # captions 0 and 1 are of picture 0
    found = recalls(scores, np.array([0, 0, 1]))
    assert found["image_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert found["text_retrieval_recall@1"] == 1


def test_pairs_are_evaluated(small, pictures, scenes, tmp_path, capsys):
    lines = [f"{pictures}/{'deeper/' if n == 23 else ''}{n:02}.png\t{scene.texts['en']}" for n, scene in enumerate(scenes)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    _, out, _ = told(capsys, "classify", small, tmp_path / "pairs.tsv", "--mode", "InternVL-G")
    result = json.loads(out.splitlines()[-1])
    assert result["captions"] == 24
    assert result["text_retrieval_recall@1"] >= 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{chat}", "x"], "is a folder, not an index"),
        (["search", "{index}", "x", "--model", "{chat}"], "holds a chat model"),
        (["search", "{index}"], "nothing to look for"),
        (["search", "{index}", " "], "no text that could be compared"),
        (["search", "{index}", "x", "--top", "0"], "top 0 is not positive"),
        (["search", "{index}", "--image", "gone.png"], "gone.png does not exist"),
        (["search", "gone.npz", "x"], "gone.npz does not exist"),
        (["search", "{labels}", "x"], "is not an index"),
        (["search", "{other}", "x"], "they cannot be compared"),
        (["chat", "{small}", "hello"], "holds InternVL-C and -G"),
        (["serve", "{small}", "--vision-device", "CPU", "--port", "0"], "--vision-device is for chat models"),
        (["embed", "{chat}", "{pictures}", "--out", "{new}"], "holds a chat model"),
        (["embed", "{small}", "{empty}", "--out", "{new}"], "there are no pictures in"),
        (["embed", "{small}", "{pictures}", "--out", "{labels}"], "does not end in .npz"),
        (["embed", "{small}", "{pictures}", "--out", "{other}"], "they cannot be compared"),
        (["embed", "{small}", "{pictures}", "--out", "{index}", "--mode", "InternVL-G"], "they cannot be compared"),
        (["classify", "{small}", "{picture}"], "give --labels FILE"),
        (["classify", "{small}", "{picture}", "--labels", "{nothing}"], "has no labels"),
        (["classify", "{small}", "{picture}", "--labels", "{twice}"], "twice, like 'red'"),
        (["classify", "{small}", "{picture}", "--labels", "{labels}", "--templates", "{labels}"], "has no {c}"),
        (["classify", "{small}", "{picture}", "--classes", "{labels}"], "give --labels"),
        (["classify", "{small}", "{empty}"], "has no folders"),
        (["classify", "{small}", "{pictures}", "--classes", "{labels}"], "has 1 folders and there are 2 classes"),
        (["classify", "{small}", "{bad_pairs}"], "line 2: expected a picture, a tab and its caption"),
        (["caption", "{chat}", "{picture}"], "holds a chat model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_mistake_is_one_line(arguments, message, small, shapes, index, pictures, tmp_path, capsys):
    files = {"labels": "red\nblue\n", "nothing": "\n \n", "twice": "red\nblue\nred\n", "bad_pairs": "a.png\tx\nb.png\n"}
    places = {"chat": shapes, "small": small, "index": index, "pictures": pictures, "picture": pictures / "00.png"}
    for name, text in files.items():
        places[name] = tmp_path / (name + (".tsv" if "pairs" in name else ".txt"))
        places[name].write_text(text)
    places |= {"empty": tmp_path / "empty", "new": tmp_path / "new.npz", "other": tmp_path / "other.npz"}
    places["empty"].mkdir()
    own = Index.read(index)
    Index(type(own.about)(own.about.model, "another", own.about.mode), own.vectors, own.paths).write(places["other"])
    code, _, error = told(capsys, *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_empty_labels_and_texts_are_told(model):
    with pytest.raises(OptionError, match="no labels"):
        model.class_vectors([])
    with pytest.raises(PromptError, match="no text"):
        model.encode_texts([""])


def test_info_says_what_the_parts_are(small, capsys):
    _, out, _ = told(capsys, "info", small)
    assert "128 numbers, modes InternVL-C and InternVL-G" in out
    assert "openvino_qllama_model.xml" in out


def test_the_page_finds_pictures(model, index):
    gr = pytest.importorskip("gradio")
    from demo.search import Search, make_search

    read = Index.read(index)
    assert make_search(model, read) is not None
    search = Search(model, read)
    assert search.find(" ", None, 3) == []
    found = search.find("a red star", None, 3)
    assert len(found) == 3
    assert isinstance(found[0][0], Image.Image)
    assert search.find("", read.paths[4], 1)[0][1] == "04.png 1.00"
    with pytest.raises(gr.Error, match="does not exist"):
        search.find("", "gone.png", 1)


def test_vectors_of_the_server_are_the_models(model, pictures):
    testclient = pytest.importorskip("fastapi.testclient")
    from runtime.serve.embeddings import build_app
    from runtime.serve.reception import Rules

    with testclient.TestClient(build_app(model, Rules("small", "sesame"))) as client:
        key = {"Authorization": "Bearer sesame"}

        def post(**body):
            return client.post("/v1/embeddings", json=body, headers=key)

        wanted = model.encode_texts(["a red star", "红色"])
        many = post(model="small", input=["a red star", "红色"]).json()
        assert np.abs(np.array([one["embedding"] for one in many["data"]]) - wanted).max() < 1e-5
        assert many["usage"]["prompt_tokens"] == len(model.ids_of("a red star")) + len(model.ids_of("红色"))
        packed = post(input="a red star", encoding_format="base64").json()["data"][0]["embedding"]
        assert np.abs(np.frombuffer(base64.b64decode(packed), np.float32) - wanted[0]).max() < 1e-5
        ids = post(input=model.ids_of("a red star")).json()["data"][0]["embedding"]
        assert np.abs(np.array(ids) - wanted[0]).max() < 1e-5
        part = {"type": "image_url", "image_url": {"url": data_url(pictures / "00.png")}}
        mixed = post(input=[part, "红色"], mode="InternVL-G").json()["data"]
        picture = model.encode_images([pictures / "00.png"], "InternVL-G")[0]
        assert np.abs(np.array(mixed[0]["embedding"]) - picture).max() < 1e-5
        assert np.abs(np.array(mixed[1]["embedding"]) - wanted[1]).max() < 1e-5
        assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 401
        assert client.get("/v1/models", headers=key).json()["data"][0]["id"] == "small"
        assert client.get("/health").status_code == 200
        for body, message in (
            ({"input": []}, "input"),
            ({"input": " "}, "no text"),
            ({"input": [10**6]}, "there is no token 1000000"),
            ({"input": "x", "model": "other"}, "there is no model 'other'"),
            ({"input": "x", "dimensions": 64}, "have 128 numbers"),
            ({"input": {"type": "image_url", "image_url": "/etc/passwd"}}, "no file that may be read"),
            ({"input": {"type": "image_url", "image_url": "http://127.0.0.1/x.png"}}, "not"),
        ):
            answer = post(**body)
            assert answer.status_code in (400, 404)
            assert message in answer.json()["error"]["message"]
