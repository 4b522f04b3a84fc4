"""The questions to a checkpoint: to calibrate its language part, to choose a recipe, to prove a folder; texts from its answers.

The sets share no question and no picture (tests check it); tests/bench_quality.py, which judges recipes, has one of its own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.answers import Question, prompts_of, write
from convert.calibration import question_of, tile_of, tiles_kept_apart, tiles_seen, tiles_to_choose_by
from convert.checkpoint import Checkpoint
from convert.exact import Part
from convert.recipe import Texts
from convert.reference.model import in_float32, load_text_embeddings
from convert.tokenizer import end_tokens

CALIBRATION_TOKENS, OF_PICTURE_TOKENS = 64, 16  # most tokens of an answer; answers about pictures need a batch of their own

# Answered greedily; typical kinds of questions: facts, code, tables, JSON, translation, sums, letters, stories.
CALIBRATION = (
    "What is the capital of Australia, and what is it known for?",
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "Translate to French: The library closes at six, but you may return books through the slot by the door.",
    "请用中文介绍一下长城的历史。",
    "用三句话解释什么是光合作用。",
    "List five healthy breakfasts with a short reason for each.",
    "Write a SQL query that gives the ten customers with the highest total of orders in 2023.",
    "Describe a busy market street in the morning: people, colours, sounds.",
    "A train leaves at 9:40 and arrives at 13:15. How long does it take? Show the steps.",
    "Give a JSON object with the fields name, age, city and hobbies for an invented person.",
    "Write a short, polite e-mail that moves a meeting from Tuesday to Thursday.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise the plot of Romeo and Juliet in one paragraph.",
    "Write a JavaScript function that removes duplicates from an array and explain it.",
    "写一个Python程序，读取CSV文件并计算每一列的平均值。",
    "Wie funktioniert ein Kühlschrank? Antworte kurz.",
    "Solve 3x + 7 = 25 and check the result.",
    "Write a table in Markdown that compares bicycles, buses and cars by price, speed and comfort.",
    "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explique la diferencia entre clima y tiempo meteorológico.",
    "Write HTML for a page with a heading, a picture and a form with two fields.",
    "What should a person do when a kitchen fire starts?",
    "Explain how a hash table works, and what happens when two keys collide.",
)
# About pictures on which the vision part is calibrated too.
OF_SEEN = ("Describe this picture in detail.", "What is in the middle?", "请描述这张图片。", "Read the text in this picture.")
# Texts other than answers that every installation has: source code of Python's library, and descriptions of packages.
MODULES = (
    *("textwrap", "heapq", "statistics", "argparse", "json.decoder", "zipfile", "random", "gzip"),
    *("urllib.parse", "logging", "pathlib", "email.message", "http.client", "tokenize", "inspect", "html.parser"),
)
PACKAGES = (
    "numpy",
    "pillow",
    "tqdm",
    "transformers",
    "huggingface-hub",
    "safetensors",
    "openvino",
    "tokenizers",
    "nncf",
    "packaging",
)
PASSAGE_TOKENS = 256

# By their answers a search (search.py) chooses; it never sees those of the proof.
CHOOSING = (
    "Why do ships float although steel is heavier than water?",
    "Write a Python function that merges two sorted lists.",
    "Translate to Italian: The bakery opens before seven, and the first loaves are sold within minutes.",
    "用一段话介绍一下西湖。",
    "Give me a packing list for three days of hiking in the mountains.",
    "Write a bash script that counts the lines of all .txt files in a folder.",
    "What is the sum of the first ten odd numbers? Show how you found it.",
    "Describe a kitchen where somebody has just baked bread.",
    "Return a JSON object that describes a bus stop: name, position, lines.",
    "Explain the difference between a virus and a bacterium.",
    "请写一个SQL语句，删除重复的行。",
    "Wie entsteht ein Regenbogen? Antworte in zwei Sätzen.",
    "Write a thank-you note to a neighbour who watered the plants.",
    "Compare three kinds of renewable energy in a Markdown table.",
    "What does the HTTP status code 304 mean, and when is it sent?",
    "Write the first lines of a detective story that begins in a museum.",
)
OF_CHOSEN = ("What can be read here?", "Describe the window and what is in it.")  # a page, a window

PROOF = (
    "Who painted the Mona Lisa, and where does it hang?",
    "Write a Python class for a bank account with deposit and withdraw.",
    "Describe a rainy afternoon in a small harbour town.",
    "什么是人工智能？请举两个例子。",
    "Explain the water cycle to a child.",
    "Which is larger, 3/7 or 5/12? Explain.",
    "Return a JSON list of three books with title, author and year.",
    "Was ist der Unterschied zwischen Strom und Spannung?",
)
OF_PICTURES = (  # a page, a chart, a photograph
    "What is written here, and where?",
    "Which colours do you see?",
    "Is this a photograph? What does it show?",
)


@torch.no_grad()
def calibration_texts(
    checkpoint: Checkpoint, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vision: Part, reached: Callable[[], Any]
) -> Texts:
    """The questions with the checkpoint's own answers, and passages of texts; `reached` is called once per decode step.

    `model` is its decoder over mapped matrices, `vision` the part that is converted already. If an answer is empty, the text is
    the question alone.
    """
    table = load_text_embeddings(checkpoint, None)
    plain = [Question(text) for text in CALIBRATION]
    pictured = [Question(text, tile) for text, tile in zip(OF_SEEN, tiles_seen(checkpoint.config.tile_size), strict=True)]
    prompts = prompts_of([*plain, *pictured], tokenizer, checkpoint.config.tokens_per_tile)
    ids = [torch.from_numpy(prompt.ids) for prompt in prompts]
    embeds = [F.embedding(one, table).float() for one in ids]
    visual = [torch.eq(one, prompts[0].context).long() for one in ids]
    for prompt, rows, here in zip(prompts, embeds, visual, strict=True):
        if prompt.tile is not None:
            rows[here.bool()] = torch.from_numpy(np.array(vision(prompt.tile))).flatten(0, 1)
    ends = end_tokens(tokenizer, checkpoint.config, checkpoint.folder)
    written: list[list[int]] = [[] for _ in ids]
    with in_float32(model):
        for wanted in (False, True):  # prompts with a picture are much longer, and a batch is as long as its longest
            some = [number for number, here in enumerate(visual) if bool(here.any()) == wanted]
            count = OF_PICTURE_TOKENS if wanted else CALIBRATION_TOKENS
            more = write(model, table, [embeds[n] for n in some], [visual[n] for n in some], count, ends, reached=reached)
            for number, one in zip(some, more, strict=True):
                written[number] = one
    whole = [
        torch.cat([rows, F.embedding(torch.tensor(more, dtype=torch.int64), table).float()])
        for rows, more in zip(embeds, written, strict=True)
    ]
    passages = [torch.tensor(tokenizer.encode(text)[:PASSAGE_TOKENS], dtype=torch.int64) for text in _passages()]
    whole += [F.embedding(one, table).float() for one in passages if len(one)]
    nothing = torch.zeros(0, dtype=torch.int64)
    marks = [*visual, *([nothing] * (len(whole) - len(visual)))]
    return packed(whole, [F.pad(here, (0, len(rows) - len(here))) for here, rows in zip(marks, whole, strict=True)])


def _passages() -> Iterator[str]:
    """A piece of each installed text, from a third of its length on: after licences and badges."""
    texts = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            texts.append(str(metadata.metadata(name).json.get("description", "")))
    for text in texts:
        if len(text) > PASSAGE_TOKENS:
            yield text[len(text) // 3 :][: 20 * PASSAGE_TOKENS]


def packed(texts: list[Tensor], visual: list[Tensor]) -> Texts:
    """Pack texts (T, D), and their marks of context tokens (T), into rows of the longest's length: short ones share a row."""
    longest = max(map(len, texts))
    rows: list[list[int]] = []
    for number in sorted(range(len(texts)), key=lambda number: len(texts[number]), reverse=True):
        room = (row for row in rows if sum(len(texts[n]) for n in row) + len(texts[number]) <= longest)
        found = next(room, None)
        if found is None:
            rows.append([number])
        else:
            found.append(number)
    joined = [[torch.cat([kind[number] for number in row]) for row in rows] for kind in (texts, visual)]
    there = [torch.ones(len(row), dtype=torch.int64) for row in joined[0]]
    return Texts(*(pad_sequence(kind, batch_first=True) for kind in (joined[0], there, joined[1])))


def questions_of_choosing(side: int) -> list[Question]:
    """The questions by which a search chooses, some about drawn pictures that nothing else uses."""
    own = [Question(text, tile) for text, tile in zip(OF_CHOSEN, tiles_to_choose_by(side), strict=True)]
    return [*(Question(text) for text in CHOOSING), *own]


def questions_of_proof(side: int, pictures: Iterable[Path] = ()) -> list[Question]:
    """The questions that prove a folder: plain ones, and some about held-out pictures.

    `pictures` of a dataset are added as one tile each, with their questions (PICTURE.txt, or a general one).
    """
    own = [Question(text, tile) for text, tile in zip(OF_PICTURES, tiles_kept_apart(side), strict=False)]
    given = [Question(question_of(path), tile_of(path, side)) for path in pictures]
    return [*(Question(text) for text in PROOF), *own, *given]
