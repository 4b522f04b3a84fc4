"""python -m pytest tests/demo/test_teach_places.py

The training of places: vectors say what stands where, joined conversations have the values they have alone, and every stage starts.
"""

import json
import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed: it carries the fonts of the scenes")

from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel
from demo.shapes.branches import collate_rows, join
from demo.shapes.extents import LENGTH, NAMED, code, edges_of, things, windows
from demo.shapes.layout import PRESETS, build_tokenizer, config_json
from demo.shapes.place_samples import STAGES, PlaceOptions, PlaceSteps
from demo.shapes.places import overlap, teach_places
from demo.shapes.samples import IGNORED, Encoder
from demo.shapes.scenes import make_scene
from demo.shapes.student import Student
from demo.shapes.texts import COLOURS, SHAPES
from runtime.answer.boxes import Box, find_boxes, intersection_over_union
from runtime.folder.config import InternVLConfig

SMALL = {"finds": 2, "others": 2, "micro": 2, "measured": 10, "checked": 2}
OPTIONS = PlaceOptions.of("demo/shapes/checkpoint", "joint")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def config(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return InternVLConfig.from_dict(config_json(PRESETS["cpu"], len(tokenizer), end))


@pytest.fixture(scope="module")
def steps(config, tokenizer):
    return PlaceSteps(OPTIONS, Encoder(config, tokenizer))


def coloured_box(picture, colour):
    """Left, top, right, bottom of the pixels near a colour, as fractions: measured, not told."""
    pixels = np.asarray(picture, int)
    near = (abs(pixels - np.array(COLOURS[colour][1])).max(-1) <= 15).nonzero()
    height, width = pixels.shape[:2]
    return (near[1].min() / width, near[0].min() / height, (near[1].max() + 1) / width, (near[0].max() + 1) / height)


def test_things_have_the_edges_of_their_pixels():
    checked = 0
    for index in range(30):
        scene = make_scene(3, "train", index, kind="find", size=(112, 336))
        found = things(scene.canvases[0])
        colours = [list(COLOURS)[thing.colour] for thing in found]
        for thing, colour in zip(found, colours, strict=True):
            if colours.count(colour) == 1 and list(SHAPES)[thing.shape] in ("circle", "square", "cross"):
                seen = coloured_box(scene.canvases[0].picture, colour)
                assert np.abs(np.array(seen) - thing.corners).max() < 2 / 112
                checked += 1
    assert checked > 10


def test_every_thing_of_the_exam_owns_a_cell_that_tells_its_box():
    for index in range(40):
        size = ((112, 112), (336, 112))[index % 2]
        (canvas,) = make_scene(4, "test", index, kind="find", size=size).canvases
        vectors = torch.from_numpy(code(things(canvas), (0.0, 0.0, 1.0, 1.0), 4))
        told = edges_of(vectors[vectors[:, 0] == NAMED])
        for thing in things(canvas):
            assert overlap(told, torch.tensor(thing.corners)).max() > 0.99


def test_a_tile_of_a_grid_tells_the_visible_part():
    (canvas,) = make_scene(4, "test", 1, kind="find", size=(336, 112)).canvases
    found = things(canvas)
    shown = windows(3, 1, 4)
    assert shown[-1] == (0, 0, 1, 1)
    for left, top, right, bottom in shown[:3]:
        vectors = torch.from_numpy(code(found, (left, top, right, bottom), 4))
        told = edges_of(vectors[vectors[:, 0] == NAMED])
        visible = [t for t in found if min(t.corners[2], right) - max(t.corners[0], left) > 0.01]
        assert bool(len(told)) == bool(visible)
        for one in visible:
            x1, x2 = (min(1.0, max(0.0, (one.corners[n] - left) * 3)) for n in (0, 2))
            assert overlap(told, torch.tensor([x1, one.corners[1], x2, one.corners[3]])).max() > 0.99
    assert code([], (0, 0, 1, 1), 4).shape == (16, LENGTH)


def test_overlap_agrees_with_the_exam():
    rng = random.Random(1)
    for _ in range(50):
        one, other = ([*sorted((rng.random(), rng.random())), *sorted((rng.random(), rng.random()))] for _ in range(2))
        one, other = ([b[0], b[2], b[1], b[3]] for b in (one, other))
        expected = intersection_over_union(Box("", *one), Box("", *other))
        assert overlap(torch.tensor(one), torch.tensor(other)).item() == pytest.approx(expected, abs=1e-5)


def test_joined_conversations_have_the_values_they_have_alone(steps, config, tokenizer):
    torch.manual_seed(0)
    student = Student(config, tokenizer)
    student.start_from(Path(OPTIONS.start))
    scene = next(s for n in range(50) if len((s := make_scene(5, "train", n, kind="find", language="en")).groups) > 3)
    texts = [steps.encoder.text(scene, group, [1]) for group in scene.groups]
    context = torch.randn(16, config.language["hidden_size"])

    @torch.no_grad()
    def logits(batch):
        embeds = student.language.get_input_embeddings()(batch["ids"])
        embeds = embeds.masked_scatter((batch["ids"] == student.context_id)[..., None], context)
        given = {"attention_mask": batch["scores"], "position_ids": batch["positions"]}
        hidden = student.language.model(inputs_embeds=embeds, **given, use_cache=False).last_hidden_state
        return student.language.lm_head(hidden[:, :-1][batch["labels"][:, 1:] != IGNORED])

    row = join([(*text, [1.0] * len(text[0]), [-1] * len(text[0])) for text in texts])
    alone = [logits({"ids": torch.tensor([i]), "labels": torch.tensor([k]), "scores": None, "positions": None}) for i, k in texts]
    assert len(row.ids) < 0.7 * sum(len(ids) for ids, _ in texts)
    assert torch.allclose(logits(collate_rows([row], 0)), torch.cat(alone), atol=1e-3)


def test_samples_weigh_digits_and_are_repeatable(steps, tokenizer):
    sample, again = steps.find(7), steps.find(7)
    assert (sample.tiles == again.tiles).all()
    assert (sample.row.ids == again.row.ids).all()
    assert len(sample.vectors) == len(sample.tiles)
    assert set(np.round(sample.row.weights, 3)) == {0.0, np.float32(0.1), np.float32(0.4), 1.0}
    looking = sample.row.looks >= 0
    assert looking.any()
    assert {*sample.row.ids[looking]} == {tokenizer.convert_tokens_to_ids("<box>")}
    told = tokenizer.decode(sample.row.labels[sample.row.labels != IGNORED])
    assert find_boxes(told, (1000, 1000))
    assert all(bool(weight) == (label != IGNORED) for weight, label in zip(sample.row.weights, sample.row.labels, strict=True))


def run_stages(folder):
    """In a process of its own: after products with AMX in the main thread, the end of a worker that draws scenes kills pytest's."""

    def options(stage):
        return PlaceOptions.of(OPTIONS.start, stage, steps=2, **SMALL)

    straight = teach_places(folder / "straight", None, options("vision"))
    teach_places(folder / "run", None, options("vision"), minutes=0)
    resumed = teach_places(folder / "run", None, options("vision"))
    assert straight.step == resumed.step == 2
    assert all(torch.equal(straight.average[name], value) for name, value in resumed.average.items())
    for stage in STAGES[1:]:
        teach_places(folder / "run", folder / stage, options(stage))


def test_stages_resume_and_end_in_a_checkpoint_that_answers(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=run_stages, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "joint.jsonl").read_text().splitlines()]
    assert {"keep", "vectors", "find_answers", "others_answers", "answers 112 x 112, 1"} <= set(log[-1])
    for stage in ("joint", "mend"):
        model = InternVLChatModel.from_checkpoint(Checkpoint(tmp_path / stage))
        assert isinstance(model.start_conversation().ask("Hello", max_new_tokens=4), str)
