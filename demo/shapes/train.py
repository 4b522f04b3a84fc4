"""Train the small InternVL on drawn scenes and save it in the published layout.

A run is a pure function of its options: sample i is scene i of the seed, and an interrupted run resumes from its state file and
reaches the same weights. Knows nothing of OpenVINO.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from demo.shapes.curriculum import STARTS
from demo.shapes.layout import PRESETS, build_tokenizer, config_json
from demo.shapes.maker import SIDE
from demo.shapes.optimisers import optimisers
from demo.shapes.questions import TASKS, dialogue, make_question
from demo.shapes.samples import IGNORED, Batch, Encoder, collate
from demo.shapes.scenes import make_scene
from demo.shapes.student import Student
from runtime.folder.config import InternVLConfig

STATE_FILE, LOG_FILE = "state.pt", "log.jsonl"


@dataclass(frozen=True)
class TrainOptions:
    """One training run."""

    samples: int = 576_000  # scenes, with several questions each
    start: str | None = None  # checkpoint to start from, with new optimiser states; None: random values
    first: int = 0  # scenes that it has seen: the recipe continues after them, with a new warm-up
    seed: int = 1
    preset: str = "cpu"
    batch: int = 32  # scenes a step
    micro: int = 8  # scenes at once, in one thread
    turns: int = 8  # questions a scene, about
    rate: float = 3e-3
    warmup: int = 3_200  # scenes
    settle: int = 50_000  # scenes from which the rate falls as their inverse square root, so that a run may stop anywhere
    decay: float = 0.25  # share of the run, at its end, in which the rate falls to zero
    easy: int = 60_000  # scenes until full difficulty
    look: float = 0.5  # weight of the auxiliary loss: what stands where, from the patches alone
    average: float = 0.998  # decay a step of the averaged weights, which are saved

    @property
    def steps(self) -> int:
        return (self.samples - self.first) // self.batch

    @property
    def look_weight(self) -> float:
        """The weight of the auxiliary losses: 0 after a start from a checkpoint, which lacks their heads."""
        return 0.0 if self.start else self.look

    def rate_at(self, step: int) -> float:
        falling = (self.steps - step) / max(1, self.decay * self.steps)
        seen = (step + 1) * self.batch
        return self.rate * min(1.0, seen / self.warmup, (self.settle / seen) ** 0.5, falling)


class Steps(Dataset):
    """Item `step` is the data of one optimiser step: scenes sorted by length and cut into micro-batches."""

    def __init__(self, options: TrainOptions, encoder: Encoder, pad: int):
        self.options, self.encoder, self.pad = options, encoder, pad

    def __len__(self) -> int:
        return self.options.steps

    def __getitem__(self, step: int) -> list[Batch]:
        o = self.options
        samples = sorted((self.sample(o.first + step * o.batch + n) for n in range(o.batch)), key=lambda sample: len(sample[0]))
        even = o.first + step * o.batch >= STARTS["forms"] * o.easy
        return [collate(samples[n : n + o.micro], self.pad, even) for n in range(0, o.batch, o.micro)]

    def sample(self, index: int) -> tuple[list[int], list[int], np.ndarray, np.ndarray]:
        o = self.options
        level = index / o.easy
        scene = make_scene(o.seed, "train", index, level=level)
        turns = dialogue(scene, random.Random(f"turns/{o.seed}/{index}"), o.turns, level)
        tiles, looks = self.encoder.tiles(scene)
        ids, labels = self.encoder.text(scene, turns, [len(cut) for cut in tiles])
        return ids, labels, np.concatenate(tiles), np.concatenate(looks)


class Run:
    """A training run in a folder: model, averaged weights, optimisers, step; saved and resumed as one file."""

    def __init__(self, folder: Path, options: TrainOptions, device: str = "cpu"):
        self.folder, self.options, self.device = folder, options, device
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer()
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.config_json = config_json(PRESETS[options.preset], len(self.tokenizer), end)
        self.config = InternVLConfig.from_dict(self.config_json)
        torch.manual_seed(options.seed)
        self.student = Student(self.config, self.tokenizer)
        if options.start:
            self.student.start_from(Path(options.start))
        self.student.to(device)
        self.average = {name: tensor.detach().clone() for name, tensor in self.student.named_parameters()}
        self.optimisers = optimisers(self.student, options.rate)
        self.encoder = Encoder(self.config, self.tokenizer)
        # On a CPU, micro-batches side by side with one thread each are a third faster than one at a time with all threads.
        torch.set_num_threads(1)  # of this thread and of those that start later
        self.pool = ThreadPoolExecutor(1 if device.startswith("cuda") else os.cpu_count())
        self.step = 0
        self.seconds = 0.0

    def load(self) -> None:
        """Resume from the state file, if there is one."""
        if not (self.folder / STATE_FILE).exists():
            return
        state = torch.load(self.folder / STATE_FILE, map_location=self.device)
        self.student.load_state_dict(state["student"])
        self.average = state["average"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self, name: str = STATE_FILE) -> None:
        """Write the state beside its final name, then move it there."""
        state = {
            "student": self.student.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
            "options": asdict(self.options),
        }
        beside = self.folder / f"{name}.new"
        torch.save(state, beside)
        os.replace(beside, self.folder / name)

    def learn(self, batches: list[Batch]) -> dict[str, float]:
        """One optimiser step."""
        rate = self.options.rate_at(self.step)
        tokens = sum(float(batch["weights"][batch["labels"] != IGNORED].sum()) for batch in batches)
        parameters = list(self.student.parameters())

        def gradients(batch: Batch) -> tuple[float, float, tuple[Tensor, ...]]:
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
                answers, look = self.student.losses(batch)
            answers, look = answers / tokens, look / len(batches)
            found = torch.autograd.grad(answers + self.options.look_weight * look, parameters)
            return answers.item(), look.item(), found

        said = looked = 0.0
        for answers, look, found in self.pool.map(gradients, reversed(batches)):  # summed in this order, whichever ends first
            said, looked = said + answers, looked + look
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.options.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = [parameter for _, parameter in self.student.named_parameters()]
            torch._foreach_lerp_(list(self.average.values()), current, 1 - keep)
        return {"loss": round(said, 4), "look": round(looked, 4), "rate": rate}

    @torch.no_grad()
    def quiz(self, questions: int = 280) -> dict[str, float]:
        """Share of exam questions whose answer tokens are all the likeliest ones, with averaged weights: a quick check."""
        trained = {name: parameter.detach().clone() for name, parameter in self.student.named_parameters()}
        self.student.load_state_dict(self.average)
        right: dict[str, list[bool]] = {task: [] for task in TASKS}
        for start in range(0, questions, 14):
            samples, tasks = [], []
            for index in range(start, start + 14):
                question = make_question(self.options.seed, "train", index)
                tiles, looks = self.encoder.tiles(question.scene)
                text = self.encoder.text(question.scene, question.turns, [len(cut) for cut in tiles], last_only=True)
                samples.append((*text, np.concatenate(tiles), np.concatenate(looks)))
                tasks.append(question.task)
            batch = {name: tensor.to(self.device) for name, tensor in collate(samples, self.tokenizer.pad_token_id).items()}
            logits, labels, *_ = self.student(batch)
            hits = (logits.argmax(-1) == labels).split((batch["labels"] != IGNORED).sum(1).tolist())
            for task, hit in zip(tasks, hits, strict=True):
                right[task].append(bool(hit.all()))
        self.student.load_state_dict(trained)
        return {task: round(sum(hits) / len(hits), 3) for task, hits in right.items()}

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint in the published layout."""
        save_checkpoint(folder, self.average, self.tokenizer, self.config_json)


def save_checkpoint(folder: Path, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]) -> None:
    """Write a student's weights in bfloat16 as a checkpoint in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.removeprefix("vision.") if name.startswith("vision.") else "language_model." + name.removeprefix("language."): tensor
        for name, tensor in weights.items()
        if not name.startswith("look")
    }
    stored = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    end = config["llm_config"]["eos_token_id"]
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {"eos_token_id": [end], "max_new_tokens": 256, "do_sample": False}),
        ("preprocessor_config.json", {"size": SIDE, "crop_size": SIDE, "do_resize": True}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_run(folder: Path) -> Run:
    """A run as its state file has it, options included."""
    run = Run(folder, TrainOptions(**torch.load(folder / STATE_FILE)["options"]))
    run.load()
    return run


def stay(_: int) -> None:
    """Ignore SIGTERM, which service managers send to the whole group: the process that saves handles it and ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train(
    folder: Path, output: Path | None, options: TrainOptions, *, device: str = "cpu", minutes: float = 1e9, looks_every: int = 200
) -> Run:
    """Train until all samples are seen, `minutes` have passed or the process is asked to end; export when done."""
    run = Run(folder, options, device)
    run.load()
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    steps = Steps(options, run.encoder, run.tokenizer.pad_token_id)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(run.step, options.steps),
        num_workers=worker_count(),
        prefetch_factor=4,
        worker_init_fn=stay,
    )
    started = time.monotonic()
    bar = tqdm(loader, initial=run.step, total=options.steps, unit="step", mininterval=5, file=sys.stderr)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
        for batches in bar:
            begun = time.monotonic()
            measured = run.learn(batches)
            run.seconds += time.monotonic() - begun
            bar.set_postfix(loss=measured["loss"], look=measured["look"], refresh=False)
            if run.step % looks_every == 0:
                measured |= run.quiz()
            if run.step % 20 == 0:
                print(json.dumps({"step": run.step, "seconds": round(run.seconds), **measured}), file=log, flush=True)
            if run.step == int(options.steps * (1 - options.decay)):
                run.save("before-decay.pt")
            if run.step % looks_every == 0:
                run.save()
            if asked or time.monotonic() - started > 60 * minutes:
                break
    bar.close()
    signal.signal(signal.SIGTERM, before)
    run.save()
    if run.step == options.steps and output:
        run.export(output)
    return run


def worker_count() -> int:
    """Processes that draw scenes beside the one that trains."""
    return max(1, min(12, (os.cpu_count() or 2) - 1))
