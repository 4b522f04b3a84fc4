"""The exam: unseen questions put through the public chat() call, answers compared exactly; accuracy a task.

Takes a model folder or a checkpoint and asks both the same way. Knows nothing of training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from demo.shapes.scenes import TASKS, Question, make_question
from runtime.chat import ChatModel
from runtime.folder import PART_FILES
from runtime.image import Tiling, cut_tiles

NEW_TOKENS = 128  # the longest description has about 60


@dataclass(frozen=True)
class EvaluateOptions:
    """What is asked, and how the pictures are spoilt to see whether they matter."""

    limit: int = 1000
    seed: int = 1
    split: str = "test"
    max_tiles: int | None = None  # of a picture; None: as the checkpoint was trained
    noise: bool = False  # show noise of the same size instead


def open_model(folder: Path, device: str = "CPU") -> tuple[ChatModel, PreTrainedTokenizerBase]:
    """Open a model folder on an OpenVINO device, or a checkpoint as the PyTorch reference in float32."""
    if (folder / PART_FILES["language"]).exists():
        from runtime.model import OVInternVLChatModel

        return OVInternVLChatModel(folder, device), PreTrainedTokenizerFast.from_pretrained(folder)
    from convert.checkpoint import Checkpoint
    from convert.reference.model import InternVLChatModel
    from convert.tokenizer import load_tokenizer

    checkpoint = Checkpoint(folder)
    model = InternVLChatModel.from_checkpoint(checkpoint, device=device.lower())
    return model, load_tokenizer(checkpoint.folder, checkpoint.config)


def tiles_of(question: Question, tiling: Tiling, *, noise: random.Random | None = None) -> tuple[torch.Tensor, list[int]]:
    """Tiles of all pictures of a question (N, 3, S, S), and their number a picture; frames and pairs are one tile each."""
    used = tiling if question.scene.tiled else Tiling(tiling.side, 1, 1, thumbnail=False)
    cut = []
    for canvas in question.scene.canvases:
        picture = canvas.picture
        if noise is not None:
            picture = Image.frombytes("RGB", picture.size, noise.randbytes(picture.width * picture.height * 3))
        cut.append(cut_tiles(picture, used))
    return torch.from_numpy(np.concatenate(cut)), [len(tiles) for tiles in cut]


def ask(model: ChatModel, tokenizer: PreTrainedTokenizerBase, question: Question, pixels: torch.Tensor, tiles: list[int]) -> str:
    """Put the turns of a question one after another, the model's own answers in between; return the last answer."""
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    history: list[tuple[str, str]] | None = None
    answer = ""
    for n, turn in enumerate(question.turns):
        asked = turn.question if n else question.scene.prefix + turn.question
        answer, history = model.chat(
            tokenizer, pixels, asked, options, history=history, return_history=True, num_patches_list=tiles
        )
    return answer


def evaluate(model: ChatModel, tokenizer: PreTrainedTokenizerBase, options: EvaluateOptions) -> dict[str, Any]:
    """-> {"questions", "right", "accuracy", "tasks": {task: {"questions", "right", "accuracy"}}, "mistakes": the first ones}."""
    tiling = Tiling.of(model.config)
    if options.max_tiles is not None:
        tiling = Tiling(tiling.side, 1, options.max_tiles, tiling.thumbnail)
    counts = {task: [0, 0] for task in TASKS}
    mistakes = []
    for index in tqdm(range(options.limit), unit="question", mininterval=1):
        question = make_question(options.seed, options.split, index)
        noise = random.Random(f"noise/{options.seed}/{index}") if options.noise else None
        given = ask(model, tokenizer, question, *tiles_of(question, tiling, noise=noise)).strip()
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


def _score(questions: int, right: int) -> dict[str, Any]:
    return {"questions": questions, "right": right, "accuracy": round(right / max(1, questions), 4)}


def table(result: dict[str, Any]) -> str:
    """The result as lines for a person."""
    rows = [*result["tasks"].items(), ("all", result)]
    lines = [f"{name:<12}{row['right']:>6} of {row['questions']:<6}{row['accuracy']:>8.1%}" for name, row in rows]
    return "\n".join(["task         right of asked  accuracy", *lines])
