"""The exams: unseen questions in conversations; exact answers and accuracy per task, or boxes by intersection over union.

Takes a model folder or a checkpoint and asks both the same way. Knows nothing of training.
Rule for boxes: OpenGVLab/InternVL@2410d1d internvl_chat/eval/refcoco/evaluate_grounding.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from demo.shapes.find_scenes import FRAMES
from demo.shapes.questions import TASKS, Question, make_place_question, make_question
from runtime.answer.boxes import Box, find_boxes, intersection_over_union
from runtime.answer.chat_model import ChatModel
from runtime.answer.model import OpenedModel
from runtime.folder.files import PART_FILES

NEW_TOKENS = 128  # the longest description has about 60
LEAST_SHARED = 0.5  # intersection over union of a right box
PLACE_TILES = 12  # of a picture in the exam of boxes


@dataclass(frozen=True)
class EvaluateOptions:
    """The questions, and how the pictures are degraded, to see whether they matter."""

    limit: int = 1000
    seed: int = 1
    split: str = "test"
    max_tiles: int | None = None  # of a picture; None: as the checkpoint was trained
    noise: bool = False  # show noise of the same size instead


def open_model(folder: Path, device: str = "CPU") -> ChatModel:
    """Open a model folder on an OpenVINO device, or a checkpoint as the PyTorch reference in float32."""
    if (folder / PART_FILES["language"]).exists():
        return OpenedModel(folder, device)
    import torch

    from convert.checkpoint import Checkpoint
    from convert.reference.model import InternVLChatModel

    torch.set_num_threads(1)  # at such widths a second thread makes the PyTorch path slower
    return InternVLChatModel.from_checkpoint(Checkpoint(folder), device=device.lower())


def pictures_of(question: Question, noise: random.Random | None = None) -> list[Image.Image]:
    """The pictures of a question, or noise of their sizes."""
    pictures = [canvas.picture for canvas in question.scene.canvases]
    if noise is None:
        return pictures
    return [Image.frombytes("RGB", one.size, noise.randbytes(one.width * one.height * 3)) for one in pictures]


def ask(model: ChatModel, question: Question, *, max_tiles: int | None = None, noise: random.Random | None = None) -> str:
    """Put the turns of a question one after another, the model's own answers in between; return the last answer.

    Frames and pairs are one tile each.
    """
    conversation, answer = model.start_conversation(), ""
    for n, turn in enumerate(question.turns):
        given: dict[str, Any] = {}
        if n == 0:
            given = {
                "images": pictures_of(question, noise),
                "max_tiles": max_tiles if question.scene.kind == "find" else question.scene.max_tiles or max_tiles,
            }
        text = turn.question if n else question.scene.prefix + turn.question
        answer = conversation.ask(text, **given, max_new_tokens=NEW_TOKENS, do_sample=False)
    return answer


def evaluate(model: ChatModel, options: EvaluateOptions) -> dict[str, Any]:
    """-> {"questions", "right", "accuracy", "tasks": {task: {"questions", "right", "accuracy"}}, "mistakes": all of them}."""
    counts = {task: [0, 0] for task in TASKS}
    mistakes = []
    for index in tqdm(range(options.limit), unit="question", mininterval=1):
        question = make_question(options.seed, options.split, index)
        noise = random.Random(f"noise/{options.seed}/{index}") if options.noise else None
        given = ask(model, question, max_tiles=options.max_tiles, noise=noise).strip()
        expected = question.turns[-1].answer
        counts[question.task][0] += 1
        counts[question.task][1] += given == expected
        if given != expected:
            mistakes.append({"index": index, "question": question.turns[-1].question, "expected": expected, "given": given})
    asked, right = (sum(count[n] for count in counts.values()) for n in (0, 1))
    return {
        **_score(asked, right),
        "tasks": {task: _score(*count) for task, count in counts.items() if count[0]},
        "mistakes": mistakes,
    }


def evaluate_places(model: ChatModel, options: EvaluateOptions) -> dict[str, Any]:
    """Ask for single boxes; an answer's first box is right if its intersection over union with the true one is at least 0.5.

    -> what `evaluate` returns, with "mean_iou" everywhere; "tasks" are the sizes of pictures, each with small and large things.
    """
    shared: dict[str, list[float]] = {f"{w} x {h} {size}": [] for w, h in FRAMES for size in ("small", "large")}
    mistakes = []
    for index in tqdm(range(options.limit), unit="question", mininterval=1):
        question, (width, height) = make_place_question(options.seed, options.split, index)
        noise = random.Random(f"noise/{options.seed}/{index}") if options.noise else None
        given = ask(model, question, max_tiles=options.max_tiles or PLACE_TILES, noise=noise)
        (corners,) = question.turns[-1].boxes
        found = find_boxes(given, (width, height))
        iou = intersection_over_union(found[0], Box("", *corners)) if found else 0.0
        shared[f"{width} x {height} {question.task.removeprefix('find_')}"].append(iou)
        if iou < LEAST_SHARED:
            expected = question.turns[-1].answer
            mistakes.append({"index": index, "question": question.turns[-1].question, "expected": expected, "given": given})
    return {
        **_places([iou for each in shared.values() for iou in each]),
        "tasks": {name: _places(each) for name, each in shared.items() if each},
        "mistakes": mistakes,
    }


def _places(shared: list[float]) -> dict[str, Any]:
    right = sum(iou >= LEAST_SHARED for iou in shared)
    return {**_score(len(shared), right), "mean_iou": round(sum(shared) / max(1, len(shared)), 4)}


def _score(questions: int, right: int) -> dict[str, Any]:
    return {"questions": questions, "right": right, "accuracy": round(right / max(1, questions), 4)}


def table(result: dict[str, Any]) -> str:
    """The result as lines for a person."""
    rows = [*result["tasks"].items(), ("all", result)]
    wide = max(12, *(len(name) + 1 for name, _ in rows))
    lines = [f"{name:<{wide}}{row['right']:>6} of {row['questions']:<6}{row['accuracy']:>8.1%}" for name, row in rows]
    if "mean_iou" in result:
        lines = [f"{line}{row['mean_iou']:>10.3f}" for line, (_, row) in zip(lines, rows, strict=True)]
    head = f"{'task':<{wide}} right of asked  accuracy"
    return "\n".join([head + "  mean IoU" * ("mean_iou" in result), *lines])
