"""python -m tests.bench_quality CHECKPOINT FOLDER...: the judge of a recipe, on a checkpoint that has been trained.

Questions and texts here are neither those that a recipe is calibrated on (CALIBRATION, MODULES, PACKAGES of convert/questions.py)
nor those by which recipes were chosen (PROOF; CHOOSING by a search). Answers are the reference's own, texts are passages of
Python's library and of our documents; both are read by the language part alone, with the reference's inputs. Ends with a line of
JSON.
"""

from __future__ import annotations

import argparse
import calendar
import difflib
import fractions
import json
import sched
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from convert.answers import Answer, Kept, Question, answer, fingerprint, hidden_states, prompts_of
from convert.checkpoint import Checkpoint
from convert.exact import LanguagePart
from convert.quality import Measured
from convert.reference.model import compute_in_float32, load_language, load_text_embeddings
from convert.tokenizer import end_tokens, load_tokenizer
from runtime.folder.files import bytes_of

ROOT = Path(__file__).parents[1]
QUESTIONS = (
    "What causes the seasons on Earth?",
    "Write a Python function that checks whether a word is a palindrome, and two tests for it.",
    "Name the planets of the solar system from the smallest to the largest.",
    "Describe an old bookshop to somebody who cannot see it.",
    "请解释什么是通货膨胀。",
    "用Python写一个快速排序。",
    "Translate to Spanish: Please bring your passport and two photographs to the second floor.",
    "What are the advantages and the disadvantages of working from home?",
    "Write a Dockerfile for a small Flask application.",
    "If five machines make five parts in five minutes, how long do 100 machines take for 100 parts?",
    "Write a letter of complaint about a late parcel.",
    "Explain recursion with an example in Java.",
    "What is the Pythagorean theorem used for?",
    "Rédige une courte description d'un chat qui dort au soleil.",
    "Give me a YAML file that describes a recipe for pancakes.",
    "How do I undo the last commit in git without losing my changes?",
    "Who was Marie Curie?",
    "Write a haiku about snow, then explain its form.",
    "Compare TCP and UDP in a table.",
    "List the steps of making tea, numbered.",
    "Warum ist Brot nach einem Tag hart?",
    "Write a unit test with pytest for a function that parses dates.",
    "What is the difference between weather radar and satellite pictures?",
    "给出三个提高睡眠质量的建议。",
)
TEXT_TOKENS, TEXT_LETTERS = 192, 4000
TEXTS = [
    (Path(str(difflib.__file__)), 0),
    (ROOT / "docs" / "speed.md", 2000),
    (Path(str(sched.__file__)), 200),
    (ROOT / "demo" / "shapes" / "README.md", 500),
    (Path(str(calendar.__file__)), 0),
    (Path(str(fractions.__file__)), 3000),
]
AT_ONCE = 12


def judged(checkpoint: Checkpoint, kept: Kept) -> Iterator[tuple[str, str]]:
    """Keep what the reference says; yield the kind and the key of each answer and text."""
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    prompts = prompts_of([Question(text) for text in QUESTIONS], tokenizer, 1)
    texts = [tokenizer.encode(file.read_text(encoding="utf-8")[at : at + TEXT_LETTERS])[:TEXT_TOKENS] for file, at in TEXTS]
    names = [f"text-{number}" for number in range(len(texts))]
    if any(key not in kept for key in [*names, *(prompt.key for prompt in prompts)]):
        table, ends = load_text_embeddings(checkpoint, None), end_tokens(tokenizer, checkpoint.config, checkpoint.folder)
        model = load_language(checkpoint, None, single=True)
        compute_in_float32(model)
        for start in range(0, len(prompts), AT_ONCE):
            batch = prompts[start : start + AT_ONCE]
            for prompt, one in zip(batch, answer(model, table, batch, [None] * len(batch), ends), strict=True):
                kept.put_answer(prompt.key, one)
        for name, ids in zip(names, texts, strict=True):
            embeds = F.embedding(torch.tensor(ids), table).float()
            states = hidden_states(model, embeds[None], torch.ones(1, len(ids), dtype=torch.int64))
            with torch.inference_mode():
                said = model.lm_head(states[0, :-1]).log_softmax(-1).half().numpy()
            kept.put_answer(name, Answer(np.array(ids), 1, -1, embeds.numpy(), said))
    for prompt in prompts:
        yield "answers", prompt.key
    for name in names:
        yield "texts", name


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tests.bench_quality", description="Judge folders of a trained checkpoint.")
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    p.add_argument("folders", metavar="FOLDER", type=Path, nargs="+")
    p.add_argument("--cache", metavar="DIR", type=Path, default=Path("build/judged"), help="(default: %(default)s)")
    options = p.parse_args()
    checkpoint = Checkpoint(options.checkpoint)
    kept = Kept(options.cache, fingerprint(checkpoint), name=checkpoint.name)
    keys = [*judged(checkpoint, kept)]
    rows = []
    for folder in options.folders:
        language, found = LanguagePart(folder), {"answers": Measured(), "texts": Measured()}
        for kind, key in keys:
            one = kept.answer(key)
            places = slice(one.prompt_tokens - 1, one.prompt_tokens - 1 + len(one.log_probs))
            logits = language.logits(one.embeds[None], np.ones((1, len(one.ids)), np.int64), visual=one.visual[None])[0, places]
            found[kind].add(torch.from_numpy(one.log_probs).float(), torch.from_numpy(logits).log_softmax(-1))
        rows.append({"folder": folder.name, "language_mb": bytes_of(folder, "language") / 1e6})
        for kind, measured in found.items():
            rows[-1] |= {f"{kind}_{name}": value for name, value in measured.to_dict().items()} | {
                f"{kind}_tokens": measured.tokens
            }
        print(
            " ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in rows[-1].items()),
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
