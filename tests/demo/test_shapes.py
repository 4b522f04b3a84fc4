"""python -m pytest tests/demo/test_shapes.py

The small model of demo/shapes: its scenes say the truth and keep their splits apart, its training can be interrupted, its exam
counts right, and the shipped checkpoint answers.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel, expected_shapes
from convert.tokenizer import load_tokenizer
from demo.shapes.curriculum import FINDING, KINDS, LATER
from demo.shapes.drawing import draw_shape, extent
from demo.shapes.find_scenes import FRAMES
from demo.shapes.maker import SPLITS, in_split
from demo.shapes.questions import LATE, TASKS, dialogue, make_place_question, make_question
from demo.shapes.scenes import make_scene
from demo.shapes.texts import COLOURS, EXERCISES, SHAPES, TEXTS
from runtime.answer.boxes import find_boxes
from runtime.answer.prompt import IMAGE_MARK

pytest.importorskip("matplotlib", reason="matplotlib is not installed: it carries the fonts of the scenes")

from demo.shapes import evaluate as exam
from demo.shapes.layout import PRESETS, Sizes, build_tokenizer, config_json
from demo.shapes.samples import IGNORED, Encoder, collate
from demo.shapes.train import Run, Steps, TrainOptions, train
from runtime.folder.config import InternVLConfig

SHIPPED = Path(__file__).parents[2] / "demo" / "shapes" / "checkpoint"
TINY_SIZES = Sizes(32, 64, 1, 2, 32, 64, 1, 2, 1)
TINY = TrainOptions(preset="tiny", samples=80, batch=8, micro=4, warmup=16, easy=10)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return Encoder(InternVLConfig.from_dict(config_json(Sizes(), len(tokenizer), end)), tokenizer)


def scenes(count=40, split="test", **options):
    return [make_scene(7, split, index, **options) for index in range(count)]


# ---- scenes


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_pictures(kind):
    first, second = (make_scene(3, "train", 5, kind=kind) for _ in range(2))
    assert first.groups == second.groups
    assert [c.picture.tobytes() for c in first.canvases] == [c.picture.tobytes() for c in second.canvases]
    assert first.groups != make_scene(4, "train", 5, kind=kind).groups


def test_a_scene_and_a_word_belong_to_one_split_only():
    for kind in ("grid", "row", "chart"):
        described = {}
        for split in SPLITS:
            found = scenes(60, split, kind=kind, language="en")
            described[split] = {group[0].answer for scene in found for group in scene.groups if group[0].task == "describe"}
        assert not described["train"] & described["test"]
        assert not described["test"] & described["held_out"]
    words = {
        split: {turn.answer for scene in scenes(80, split, kind="text") for group in scene.groups for turn in group[:1]}
        & {
            turn.answer
            for scene in scenes(80, split, kind="text")
            for group in scene.groups
            for turn in group
            if turn.task == "word"
        }
        for split in SPLITS
    }
    assert len(words["train"]) > 30
    assert not words["train"] & words["test"]
    assert not words["train"] & words["held_out"]
    assert all(in_split(word, "test") and not in_split(word, "train") for word in words["test"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_scene_has_one_mark_a_picture_and_one_answer_a_question(kind):
    for scene in scenes(30, kind=kind):
        assert scene.prefix.count(IMAGE_MARK) == len(scene.canvases)
        answers = {}
        for group in scene.groups:
            assert answers.setdefault(group[0].question, group[0].answer) == group[0].answer


def blobs(picture):
    """Connected patches of the picture that are not its ground: [(middle x, middle y, pixels, mean RGB)], without scene code."""
    pixels = np.asarray(picture).astype(int)
    ground = pixels[0, 0]
    free = np.abs(pixels - ground).sum(-1) > 60
    found = []
    while free.any():
        y, x = np.argwhere(free)[0]
        stack, members = [(y, x)], []
        free[y, x] = False
        while stack:
            y, x = stack.pop()
            members.append((y, x))
            for ny, nx in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= ny < free.shape[0] and 0 <= nx < free.shape[1] and free[ny, nx]:
                    free[ny, nx] = False
                    stack.append((ny, nx))
        if len(members) > 20:
            rows, columns = np.array(members).T
            found.append((columns.mean(), rows.mean(), len(members), np.median(pixels[rows, columns], axis=0)))
    return found


def colour_of(rgb):
    return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name][1]) - rgb).sum())


def test_answers_about_shapes_are_what_the_pixels_show():
    checked = 0
    for scene in scenes(60, kind="grid", language="en"):
        picture = scene.canvases[0].picture
        seen = blobs(picture)
        colours = [colour_of(rgb) for *_, rgb in seen]
        for group in scene.groups:
            turn, words = group[0], group[0].question.rstrip("?").split()
            if turn.question == "How many shapes are there?":
                assert int(turn.answer) == len(seen)
            elif turn.task == "count" and words[2] in COLOURS:
                assert int(turn.answer) == colours.count(words[2])
            elif turn.question.startswith("Where is the") and colours.count(words[3]) == 1:
                x, y, *_ = seen[colours.index(words[3])]
                rows, columns = ("top", "", "bottom"), ("left", "", "right")
                place = f"{rows[int(3 * y / picture.height)]} {columns[int(3 * x / picture.width)]}".strip() or "center"
                assert turn.answer == place
            else:
                continue
            checked += 1
    assert checked > 100


def test_a_moving_shape_moves_where_the_answer_says():
    for scene in scenes(20, kind="motion", language="en"):
        answer = next(g[0].answer for g in scene.groups if g[0].question.startswith("Which way does the"))
        first, last = (np.asarray(scene.canvases[n].picture).astype(int) for n in (0, -1))
        ground = first[0, 0]

        def middle(pixels, ground=ground):
            rows, columns = np.nonzero(np.abs(pixels - ground).sum(-1) > 60)
            return columns.mean(), rows.mean()

        (x, y), (to_x, to_y) = middle(first), middle(last)
        moved = {"left": x - to_x, "right": to_x - x, "up": y - to_y, "down": to_y - y}
        assert max(moved, key=moved.get) == answer


def test_a_bar_is_as_high_as_the_answer_says():
    for scene in scenes(20, kind="chart", language="en"):
        pixels = np.asarray(scene.canvases[0].picture).astype(int)
        for group in scene.groups:
            words = group[0].question.split()
            if " bar?" not in group[0].question:
                continue
            colour = next(word for word in words if word in COLOURS)
            near = np.abs(pixels - np.array(COLOURS[colour][1])).max(-1) <= 16
            column = near[:, near.sum(0).argmax()]
            assert round(column.sum() / 10) == int(group[0].answer)


def test_both_languages_have_the_same_questions():
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()


def test_tasks_take_turns_and_follow_ups_have_two_turns():
    asked = [make_question(1, "test", index) for index in range(2 * len(TASKS))]
    assert [question.task for question in asked] == [*TASKS, *TASKS]
    assert all(len(question.turns) == 1 + (question.task == "follow_up") for question in asked)


def test_a_dialogue_asks_no_question_twice_and_starts_with_any():
    firsts = set()
    for index, scene in enumerate(scenes(60, kind="grid", language="en")):
        turns = dialogue(scene, random.Random(index), 8, level=1)
        questions = [turn.question for turn in turns if turn.task != "follow_up"]
        assert len(set(questions)) == len(questions)
        firsts.add(turns[0].task)
    assert firsts >= {"describe", "count", "shape", "colour", "position"}


def test_late_in_training_answers_can_seldom_be_copied_from_a_description():
    def share_last(level):
        talks = [dialogue(scene, random.Random(n), 8, level=level) for n, scene in enumerate(scenes(80, kind="grid"))]
        places = [[turn.task for turn in talk].index("describe") + 1 - len(talk) for talk in talks if "describe" in str(talk)]
        return places.count(0) / len(places)

    assert share_last(1) < 0.4
    assert share_last(LATE) > 0.7


def test_exercises_say_what_the_scene_shows_and_are_for_training_only():
    """A name is followed at once by what the scene's own questions say of it."""
    checked = Counter()
    for kind in ("forms", "grid", "compare", "motion"):
        for scene in scenes(60, "train", kind=kind, language="en", level=LATER):
            asked = {turn.question: turn.answer for group in scene.groups for turn in group}
            for question, listed in asked.items():
                for name, value in (pair.rsplit(" ", 1) for pair in listed.split(", ") if question in EXERCISES["en"].values()):
                    if question == EXERCISES["en"]["colours"]:
                        wanted = asked[f"What colour is the {name}?"]
                    elif question == EXERCISES["en"]["counts"]:
                        wanted = asked[f"How many of the shape {name} are there?"]
                    elif question == EXERCISES["en"]["pictures"]:
                        wanted = asked[f"Which picture has the {name}?"]
                    elif question == EXERCISES["en"]["moves"]:
                        wanted = asked.get(f"Which way does the {name} move?", "0")
                    else:
                        continue
                    assert value == wanted
                    checked[question] += 1
    assert len(checked) == 4
    assert min(checked.values()) > 20
    assert not any(turn.task == "exercise" for scene in scenes(60, level=1) for group in scene.groups for turn in group)
    known = build_tokenizer().get_vocab()
    assert known == PreTrainedTokenizerFast.from_pretrained(SHIPPED).get_vocab(), "exercises must not change the vocabulary"


# ---- tokenizer and samples


@pytest.mark.parametrize("text", ["HELLO", "42017", 'a "ZEBRA" in red'])
def test_letters_and_digits_are_one_token_each(tokenizer, text):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]
    printed = [piece for piece in pieces if any(c.isupper() or c.isdigit() for c in piece)]
    assert all(len(piece.strip()) == 1 for piece in printed)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_names_are_one_token_and_the_system_message_a_few(tokenizer, encoder):
    for word in [*(f" {shape}" for shape in SHAPES), *SHAPES.values(), *(f" {colour}" for colour in COLOURS)]:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
    assert len(encoder.ids(encoder.template.system_message)) <= 10


def test_the_answers_of_a_sample_can_be_made_to_weigh_by_the_root_of_their_length():
    none = np.zeros((0, 3, 2, 2), np.float32)
    labels = [IGNORED, 7, IGNORED, 1, 2, 3, 4]
    weights = [collate([(labels, labels, none, none)], 0, even)["weights"][0].tolist() for even in (False, True)]
    assert weights == [[1] * 7, [1, 1, 1, 0.5, 0.5, 0.5, 0.5]]


def test_a_sample_has_the_tokens_that_chat_sends(tokenizer, encoder):
    """The training text is put together from pieces; chat() encodes one rendered prompt."""
    from runtime.answer.prompt import expand_marks, render

    for scene in scenes(10):
        turns = dialogue(scene, random.Random(0), 4, level=1)
        tiles = [len(cut) for cut in encoder.tiles(scene)[0]]
        ids, labels = encoder.text(scene, turns, tiles)
        asked = [scene.prefix * (n == 0) + turn.question for n, turn in enumerate(turns)]
        history = [(question, turn.answer) for question, turn in zip(asked, turns, strict=True)]
        prompt = render(encoder.template, encoder.template.system_message, history[:-1], asked[-1])
        whole = expand_marks(prompt, tiles, encoder.config.tokens_per_tile) + turns[-1].answer + "<|im_end|>"
        assert ids == tokenizer.encode(whole)
        answered = [label for label in labels if label != IGNORED]
        assert tokenizer.decode(answered) == "".join(turn.answer + "<|im_end|>" for turn in turns)


def test_marks_stand_on_the_patches_of_their_tile(encoder):
    scene = make_scene(7, "test", 0, kind="small_text")
    tiles, looks = encoder.tiles(scene)
    assert (looks[0][-1] == -1).all()  # the thumbnail's patches are not labelled
    dark = (tiles[0][:-1] - tiles[0][0][:, :1, :1]).min(1) < -0.8  # (N, S, S)
    patches = dark.reshape(len(dark), 8, 14, 8, 14).any((2, 4)).reshape(len(dark), 64)
    letters = looks[0][:-1, :, :36].any(-1)
    assert letters.any()
    assert (patches & letters).sum() >= 0.8 * letters.sum()


# ---- boxes


def test_a_true_box_holds_what_was_drawn_and_nothing_else():
    """Seen in the pixels: everything in the box and nothing around it has the thing's colour."""
    seen = 0
    for index in range(60):
        scene = make_scene(7, "test", index, kind="find", language="en", size=(112, 112))
        found = blobs(scene.canvases[0].picture)
        for group in scene.groups:
            if group[0].task not in ("find_small", "find_large"):
                continue
            ((x1, y1, x2, y2),) = group[0].boxes
            inside = [blob for blob in found if x1 <= blob[0] <= x2 and y1 <= blob[1] <= y2]
            if len(found) == len({*scene.canvases[0].marks}) // 2 and len(inside) == 1:
                assert f"{colour_of(inside[0][3])} " in group[0].question
                seen += 1
    assert seen > 40


@pytest.mark.parametrize("shape", SHAPES)
def test_the_extent_of_a_shape_is_that_of_its_pixels(shape):
    canvas = Image.new("L", (200, 160))
    draw_shape(ImageDraw.Draw(canvas), shape, 90, 80, 60, (255,))
    assert extent(shape, 90, 80, 60) == pytest.approx(canvas.getbbox(), abs=1.5)


@pytest.mark.parametrize("size", [None, *FRAMES])
def test_answers_about_boxes_are_what_find_boxes_reads(size):
    for index in range(20):
        scene = make_scene(7, "train", index, kind="find", level=FINDING, size=size)
        wide, high = scene.canvases[0].picture.size
        assert size is None or (wide, high) == size
        for turn in (turn for group in scene.groups for turn in group):
            read = find_boxes(turn.answer, (wide, high))
            assert len(read) == len(turn.boxes) > 0
            for box, (x1, y1, x2, y2) in zip(read, turn.boxes, strict=True):
                assert (box.x1, box.x2) == pytest.approx((x1, x2), abs=wide / 1000)
                assert (box.y1, box.y2) == pytest.approx((y1, y2), abs=high / 1000)
                assert 0 <= x1 < x2 <= wide
                assert 0 <= y1 < y2 <= high


def test_boxes_are_asked_for_in_training_alone_and_late():
    assert not any(make_scene(7, "train", index, level=FINDING - 0.1).kind == "find" for index in range(100))
    kinds = [make_scene(7, "train", index, level=FINDING).kind for index in range(100)]
    assert 30 < kinds.count("find") < 70
    assert not any(question.scene.kind == "find" for question in (make_question(1, "test", index) for index in range(28)))


def test_questions_about_places_take_turns():
    asked = [make_place_question(1, "test", index) for index in range(8)]
    assert [size for _, size in asked] == [*FRAMES, *FRAMES]
    assert [question.task for question, _ in asked] == ["find_small"] * 4 + ["find_large"] * 4
    assert all(len(question.turns) == 1 and len(question.turns[0].boxes) == 1 for question, _ in asked)


def test_the_exam_of_places_is_refcocos_rule():
    """The first box of an answer counts; half of the union is enough."""

    class Guesser:
        def start_conversation(self):
            return self

        def ask(self, question, images=(), max_tiles=None, **_):
            asked.append(max_tiles)
            number = len(asked) - 1
            turn, (wide, high) = make_place_question(1, "test", number)[0].turns[0], make_place_question(1, "test", number)[1]
            x1, y1, x2, y2 = turn.boxes[0]
            half = f"a[[{1000 * x1 / wide}, {1000 * y1 / high}, {1000 * x2 / wide}, {1000 * (y1 + (y2 - y1) * 0.51) / high}]]"
            return {0: turn.answer, 1: half, 2: f"a[[0, 0, 1, 999]] {turn.answer}", 3: "nowhere"}[number % 4]

    asked: list[int] = []
    result = exam.evaluate_places(Guesser(), exam.EvaluateOptions(limit=8))
    assert (result["questions"], result["right"], result["accuracy"]) == (8, 4, 0.5)
    assert [mistake["index"] for mistake in result["mistakes"]] == [2, 3, 6, 7]
    assert result["tasks"]["112 x 112 small"]["mean_iou"] == pytest.approx(1, abs=0.05)
    assert result["tasks"]["112 x 336 large"]["mean_iou"] == pytest.approx(0.51, abs=0.001)
    assert result["tasks"]["4000 x 300 small"] == {"questions": 1, "right": 0, "accuracy": 0.0, "mean_iou": 0.0}
    assert {*asked} == {12}
    assert "mean IoU" in exam.table(result)
    exam.evaluate_places(Guesser(), exam.EvaluateOptions(limit=1, max_tiles=1))
    assert asked[-1] == 1


def test_a_run_starts_from_a_checkpoint(tmp_path):
    """The weights that are saved are the checkpoint's, and the scenes those behind what it has seen."""
    options = TrainOptions(start=str(SHIPPED), first=576_000, samples=576_000 + 64, batch=8)
    run = Run(tmp_path, options)
    run.export(tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (SHIPPED, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert options.steps == 8
    steps = Steps(options, run.encoder, run.tokenizer.pad_token_id)
    assert any(
        (steps.sample(576_000)[0] == row[row != run.tokenizer.pad_token_id].tolist()) for batch in steps[0] for row in batch["ids"]
    )


# ---- training


def train_small(folder: Path):
    """One whole run, one that is interrupted and taken up again, and one that sees the same scenes over and over."""
    PRESETS["tiny"] = TINY_SIZES
    whole = train(folder / "whole", None, TINY, looks_every=100)
    first = train(folder / "parts", None, TINY, minutes=0, looks_every=100)
    second = train(folder / "parts", folder / "checkpoint", TINY, looks_every=100)
    again = Run(folder / "again", replace(TINY, samples=8 * 100, rate=1e-2))
    batches = Steps(again.options, again.encoder, again.tokenizer.pad_token_id)[0]
    losses = [again.learn(batches)["loss"] for _ in range(12)]
    print(json.dumps({"steps": [whole.step, first.step, second.step], "losses": losses}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Training in a process of its own, as users have it: it sets torch's threads and forks workers."""
    folder = tmp_path_factory.mktemp("training")
    code = "import sys; from pathlib import Path; from tests.demo.test_shapes import train_small; train_small(Path(sys.argv[1]))"
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_an_interrupted_run_ends_with_the_same_weights(trained):
    folder, told = trained
    assert told["steps"] == [10, 1, 10]
    whole, parts = (torch.load(folder / name / "state.pt") for name in ("whole", "parts"))
    assert whole["student"].keys() == parts["student"].keys()
    for name, tensor in whole["student"].items():
        assert torch.equal(parts["student"][name], tensor), name

    checkpoint = Checkpoint(folder / "checkpoint")
    checkpoint.check(expected_shapes(checkpoint.config, tied=False))
    assert set(checkpoint.dtypes.values()) == {"BF16"}
    model = InternVLChatModel.from_checkpoint(checkpoint)
    stored = parts["average"]["vision.vision_model.embeddings.patch_embedding.weight"].bfloat16().float()
    assert torch.equal(model.vision.vision_model.embeddings.patch_embedding.weight, stored)


@pytest.mark.skipif(os.name == "nt", reason="there are no process groups to signal")
def test_a_signal_to_the_whole_group_saves_what_was_learnt(tmp_path):
    """The workers that draw scenes must not die of it."""
    command = [sys.executable, "-m", "demo.shapes", "train", str(tmp_path / "run"), str(tmp_path / "out"), "--batch", "8"]
    command += ["--samples", "8000"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, cwd=Path(__file__).parents[2])
    told = b""
    try:
        while b"loss=" not in told:
            more = running.stderr.read1(1 << 16)
            assert more, told.decode()[-2000:]
            told += more
        os.killpg(running.pid, signal.SIGTERM)
        _, rest = running.communicate(timeout=120)
        assert running.returncode == 0, rest.decode()[-2000:]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert torch.load(tmp_path / "run" / "state.pt")["step"] > 0


def test_training_lowers_the_loss_on_what_it_saw(trained):
    _, told = trained
    assert told["losses"][-1] < 0.8 * told["losses"][0]


def test_the_rate_rises_stays_and_falls():
    options = TrainOptions(samples=64_000, batch=64, warmup=6_400, decay=0.25, rate=1.0)
    assert options.rate_at(0) == pytest.approx(0.01)
    assert options.rate_at(400) == 1.0
    assert options.rate_at(875) == pytest.approx(0.5)
    assert options.rate_at(999) == pytest.approx(0.004)


# ---- exam


class Oracle:
    """Stands for a model: says the expected answer, but for every fifth question something else."""

    def start_conversation(self):
        return self

    def ask(self, question, images=(), max_tiles=None, **_):
        assert question.count(IMAGE_MARK) == len(images)
        index, turn = self.queue.pop(0)
        return "no" if index % 5 == 0 else f" {turn.answer} "


def test_the_exam_counts_right_answers_a_task():
    model = Oracle()
    questions = [make_question(1, "test", index) for index in range(28)]
    model.queue = [(index, turn) for index, question in enumerate(questions) for turn in question.turns]
    result = exam.evaluate(model, exam.EvaluateOptions(limit=28))
    assert (result["questions"], result["right"]) == (28, 22)
    assert result["tasks"]["shape"] == {"questions": 2, "right": 1, "accuracy": 0.5}  # questions 0 and 14
    assert result["tasks"]["number"] == {"questions": 2, "right": 1, "accuracy": 0.5}  # questions 6 and 20
    assert [mistake["index"] for mistake in result["mistakes"]] == [0, 5, 10, 15, 20, 25]


def test_fewer_tiles_and_noise_change_what_is_shown():
    question = make_question(1, "test", list(TASKS).index("small_text"))
    shown = []

    class Looker:
        def start_conversation(self):
            return self

        def ask(self, question, images=(), max_tiles=None, **_):
            shown.append((images, max_tiles))
            return "?"

    exam.ask(Looker(), question)
    exam.ask(Looker(), question, max_tiles=1)
    exam.ask(Looker(), question, noise=random.Random(0))
    (plain, tiles), (_, one), (noisy, _) = [each for each in shown if each[0]]
    assert (tiles, one) == (None, 1)
    assert [each.size for each in noisy] == [each.size for each in plain]
    assert np.asarray(noisy[0]).std() > 60 > np.asarray(plain[0]).std()


# ---- the shipped checkpoint


@pytest.fixture(scope="module")
def shipped():
    if not (SHIPPED / "model.safetensors").exists():
        pytest.skip("demo/shapes/checkpoint has no weights yet")
    return exam.open_model(SHIPPED)


def test_the_shipped_checkpoint_is_small_and_whole(shipped):
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 12_000_000
    checkpoint = Checkpoint(SHIPPED)
    checkpoint.check(expected_shapes(checkpoint.config, tied=False))
    tokenizer = load_tokenizer(SHIPPED, checkpoint.config)
    assert len(tokenizer) == checkpoint.config.language["vocab_size"]
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_the_shipped_checkpoint_answers_and_looks_at_the_picture(shipped):
    """28 questions of the test split; the floor is far below what the model card says, and far above what noise reaches."""
    assert exam.evaluate(shipped, exam.EvaluateOptions(limit=28))["accuracy"] >= 0.85
    assert exam.evaluate(shipped, exam.EvaluateOptions(limit=14, noise=True))["accuracy"] <= 0.2


def test_the_shipped_checkpoint_names_shapes(shipped):
    for index in range(0, 5 * len(TASKS), len(TASKS)):
        question = make_question(1, "test", index)
        assert exam.ask(shipped, question) == question.turns[-1].answer
