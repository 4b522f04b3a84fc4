"""Train the small InternVL on drawn scenes and save it in the published layout.

Vision transformer, projector and language model are the reference's own modules, so that the tensors have the published names.
A run is a pure function of its options: sample i is scene i of the seed, and an interrupted run resumes from its state file and
reaches the same weights. Knows nothing of OpenVINO.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from convert.reference.language import language_config
from convert.reference.vision import VisionPart, pixel_shuffle
from demo.shapes.scenes import SIDE, STARTS, TASKS, Scene, Turn, dialogue, literals, make_question, make_scene
from demo.shapes.texts import COLOURS, DIGITS, LETTERS, SHAPES
from runtime.answer.prompt import CONTEXT_TOKEN, expand_marks, get_template
from runtime.folder.config import InternVLConfig
from runtime.media.tiles import Tiling, choose_grid, cut_tiles

SPECIAL_TOKENS = [
    *["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"],
    *["<ref>", "</ref>", "<box>", "</box>"],
]
# How Qwen2 splits text before its merges: huggingface/transformers@v5.5.4 src/transformers/models/qwen2/tokenization_qwen2.py
QWEN2_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = "Hermes-2"
WHATS = [*LETTERS, *DIGITS, *SHAPES, *COLOURS]  # classes of the auxiliary head
IGNORED = -100
STATE_FILE, LOG_FILE = "state.pt", "log.jsonl"


@dataclass(frozen=True)
class Sizes:
    """Widths and depths; every matrix has a multiple of 128 columns, as int4 groups need."""

    vision_width: int = 128
    vision_inner: int = 512
    vision_layers: int = 6
    vision_heads: int = 4
    width: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    key_heads: int = 2


PRESETS = {"cpu": Sizes(), "gpu": Sizes(256, 512, 5, 8, 256, 512, 4, 8, 2)}  # gpu: as large as 12 MB hold


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


# ---- tokenizer and configuration


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the generator's own texts: its words are one token, printed letters and digits one each."""
    template = get_template(TEMPLATE)
    fixed = [*re.split("[A-Z]+", template.system_message), "system\n", "user\n", "assistant\n"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*literals(), *fixed], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=8192
    )


def config_json(sizes: Sizes, vocabulary: int, end: int) -> dict[str, Any]:
    """config.json as OpenGVLab/InternVL2-1B has it, with other sizes."""
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "num_channels": 3,
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_inner,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "image_size": SIDE,
        "patch_size": 14,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
    }
    language = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "eos_token_id": end,
        "tie_word_embeddings": False,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "llm_config": language,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": TEMPLATE,
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }


# ---- samples


class Encoder:
    """Scenes and turns -> token ids, labels and tiles, exactly as chat() would send them."""

    def __init__(self, config: InternVLConfig, tokenizer: PreTrainedTokenizerFast):
        self.config, self.template = config, get_template(config.template)
        self.backend = tokenizer.backend_tokenizer
        self.tiling = Tiling.of(config)
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) > 20_000:
                self.known.clear()
            self.known[text] = self.backend.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def text(self, scene: Scene, turns: list[Turn], tiles: list[int], *, last_only: bool = False) -> tuple[list[int], list[int]]:
        """Ids of the whole dialogue, and labels: the ids of the answers, their end token included, IGNORED elsewhere."""
        t = self.template
        ids = list(self.ids(t.system + t.system_message + t.sep))
        labels = [IGNORED] * len(ids)
        for n, turn in enumerate(turns):
            asked = t.user + (scene.prefix if n == 0 else "") + turn.question + t.sep + t.assistant
            question = self.ids(expand_marks(asked, tiles if n == 0 else [], self.config.tokens_per_tile))
            answer = self.ids(turn.answer + t.sep)
            counts = not last_only or n == len(turns) - 1
            ids += question + answer
            labels += [IGNORED] * len(question) + (answer if counts else [IGNORED] * len(answer))
        return ids, labels

    def tiles(self, scene: Scene) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Tiles of each picture (N, 3, S, S), and what stands on their patches (N, patches, classes); -1 where not known."""
        tiling = self.tiling.at_most(scene.max_tiles)
        tiles = [cut_tiles(canvas.picture, tiling) for canvas in scene.canvases]
        looks = [self._look(canvas, tiling, len(cut)) for canvas, cut in zip(scene.canvases, tiles, strict=True)]
        return tiles, looks

    def _look(self, canvas: Any, tiling: Tiling, tiles: int) -> np.ndarray:
        side, patch = self.config.grid_side, self.config.vision.patch_size
        looks = np.full((tiles, side * side, len(WHATS)), -1, np.int8)
        columns, rows = choose_grid(*canvas.picture.size, tiling)
        scales = (columns * SIDE / canvas.picture.width, rows * SIDE / canvas.picture.height)
        whole = np.zeros((rows * side, columns * side, len(WHATS)), np.int8)
        for mark in canvas.marks:
            left, top, right, bottom = (value * scales[n % 2] / patch for n, value in enumerate(mark.box))
            if len(mark.what) > 1:  # a shape or colour: the patches whose middle it covers; a letter: the patch of its centre
                left, top = min(left + 0.5, (left + right) / 2), min(top + 0.5, (top + bottom) / 2)
                right, bottom = max(right - 0.5, left), max(bottom - 0.5, top)
            whole[max(0, int(top)) : int(bottom) + 1, max(0, int(left)) : int(right) + 1, WHATS.index(mark.what)] = 1
        for row in range(rows):
            for column in range(columns):
                cell = whole[row * side : (row + 1) * side, column * side : (column + 1) * side]
                looks[row * columns + column] = cell.reshape(side * side, -1)
        return looks


Batch = dict[str, Tensor]


def collate(samples: list[tuple[list[int], list[int], np.ndarray, np.ndarray]], pad: int, even: bool = False) -> Batch:
    """Pad on the right, where a causal mask hides the padding. Each token of an answer weighs 1 or, if `even`, one over the
    square root of the answer's length, so that descriptions do not outweigh short answers."""
    longest = max(len(ids) for ids, *_ in samples)
    ids = torch.full((len(samples), longest), pad)
    labels = torch.full((len(samples), longest), IGNORED)
    for row, (own, expected, _, _) in enumerate(samples):
        ids[row, : len(own)] = torch.tensor(own)
        labels[row, : len(own)] = torch.tensor(expected)
    weights = torch.ones(labels.shape)
    if even:
        for row, (_, expected, _, _) in enumerate(samples):
            start = 0
            for known, run in groupby(expected, lambda label: label != IGNORED):
                end = start + len(list(run))
                if known:
                    weights[row, start:end] = (end - start) ** -0.5
                start = end
    tiles, looks = (torch.from_numpy(np.concatenate([sample[n] for sample in samples])) for n in (2, 3))
    return {"ids": ids, "labels": labels, "weights": weights, "tiles": tiles, "looks": looks}


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


# ---- model


class Student(nn.Module):
    """The trained modules, and auxiliary heads that are not saved."""

    def __init__(self, config: InternVLConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.config, self.context_id = config, tokenizer.convert_tokens_to_ids(CONTEXT_TOKEN)
        # The words of each class, each one token: letters and digits as they are, names in English and in Chinese.
        english = [what if len(what) == 1 else f" {what}" for what in WHATS]
        chinese = [*SHAPES.values(), *(name for name, _ in COLOURS.values())]
        self.words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in [*english, *chinese]]
        self.vision = VisionPart(config)
        self.language = Qwen2ForCausalLM(language_config(config))
        self.look = nn.Linear(config.vision.hidden_size, len(WHATS))
        self.look_words = nn.Parameter(torch.zeros(len(self.words)))
        self.start_values(config.vision.num_hidden_layers, len(self.language.model.layers))

    @torch.no_grad()
    def start_values(self, vision_layers: int, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith((".ls1", ".ls2")) or ("norm" in name and name.endswith("weight")) or name.endswith("mlp1.0.weight"):
                parameter.fill_(1.0)
            elif parameter.ndim == 1:
                parameter.zero_()
            elif name.endswith("position_embedding"):
                parameter.copy_(waves(self.config.grid_side, parameter.shape[-1]))
            elif "embed" in name and "patch" not in name:
                parameter.normal_(std=0.2)
            elif name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()  # every residual branch starts at zero
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)

    def start_from(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint that `export` wrote; what is not saved keeps its starting values."""
        stored = load_file(checkpoint / "model.safetensors")
        for name, parameter in self.named_parameters():
            if not name.startswith("look"):
                stored_name = name.removeprefix("vision.").replace("language.", "language_model.", 1)
                parameter.data.copy_(stored[stored_name])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> logits (M, V) at the M labelled positions, their labels; auxiliary logits of patches (N, patches, classes) and of
        context embeddings (N, P, words): their similarity to the embeddings of the classes' words."""
        c = self.config
        patches = self.vision.vision_model(batch["tiles"], self.vision.layers_run)[:, 1:]
        features = self.vision.mlp1(pixel_shuffle(patches, c.grid_side, c.shuffle_factor, c.ps_version))
        embeds = self.language.get_input_embeddings()(batch["ids"])
        here = batch["ids"] == self.context_id
        embeds = embeds.masked_scatter(here[..., None], features.to(embeds.dtype))
        hidden = self.language.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        labelled = batch["labels"][:, 1:] != IGNORED
        logits = self.language.lm_head(hidden[:, :-1][labelled])
        words = self.language.get_input_embeddings().weight[self.words]  # (words, D)
        alike = features @ words.T + self.look_words
        return logits.float(), batch["labels"][:, 1:][labelled], self.look(patches).float(), alike.float()

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> weighted sum of the losses of the answers' tokens, mean auxiliary loss."""
        logits, labels, looks, alike = self(batch)
        known = batch["looks"][:, 0, 0] >= 0
        expected = batch["looks"][known].float()  # (tiles, patches, classes)
        factor, side = self.config.shuffle_factor, self.config.grid_side
        joined = pixel_shuffle(expected, side, factor, "v2").unflatten(-1, (factor**2, -1)).amax(-2)  # (tiles, P, classes)
        joined = torch.cat([joined, joined[..., len(LETTERS + DIGITS) :]], dim=-1)
        look = F.binary_cross_entropy_with_logits(looks[known], expected) * len(WHATS)
        look = look + F.binary_cross_entropy_with_logits(alike[known], joined) * len(WHATS) / factor**2
        weights = batch["weights"][:, 1:][batch["labels"][:, 1:] != IGNORED]
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum(), look


def waves(side: int, width: int) -> Tensor:
    """Position table (1, 1 + side * side, width) to start from: sines and cosines of row and column, zero for the class token."""
    frequencies = torch.pi / 2 ** torch.linspace(0, 3, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    table = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], dim=-1)
    return torch.cat([torch.zeros(1, width), table.reshape(side * side, width)])[None]


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices: K. Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks" (2024), with the step scaled to the size of Adam's: J. Liu et al., "Muon is scalable for LLM training" (2025).

    torch's own computes in bfloat16, which takes more time on a CPU than the rest of the step.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                moved = []
                for parameter in parameters:
                    memory = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    memory.lerp_(parameter.grad, 1 - group["momentum"])
                    moved.append(parameter.grad.lerp(memory, group["momentum"]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, direction in zip(parameters, orthogonal(torch.stack(moved)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=size)


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """The nearest (half-)orthogonal matrices to (B, rows, columns), roughly, by Newton-Schulz iteration."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def optimisers(student: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformers, AdamW for the rest."""
    inner, rest = [], []
    for name, parameter in student.named_parameters():
        (inner if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    return [
        Muon(inner, lr=rate),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


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
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name.removeprefix("vision.")
            if name.startswith("vision.")
            else "language_model." + name.removeprefix("language."): tensor
            for name, tensor in self.average.items()
            if not name.startswith("look")
        }
        stored = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)
        end = self.config_json["llm_config"]["eos_token_id"]
        for name, content in (
            ("config.json", self.config_json),
            ("generation_config.json", {"eos_token_id": [end], "max_new_tokens": 256, "do_sample": False}),
            ("preprocessor_config.json", {"size": SIDE, "crop_size": SIDE, "do_resize": True}),
        ):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_run(folder: Path) -> Run:
    """A run as its state file has it, options included."""
    run = Run(folder, TrainOptions(**torch.load(folder / STATE_FILE)["options"]))
    run.load()
    return run


def _stay(_: int) -> None:
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
        num_workers=_workers(),
        prefetch_factor=4,
        worker_init_fn=_stay,
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


def _workers() -> int:
    return max(1, min(12, (os.cpu_count() or 2) - 1))
