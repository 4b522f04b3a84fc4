"""Training of the small InternVL-C and -G: contrast of pictures and descriptions in both modes, and captions.

A run is determined by its options, saves its state, and resumes from it. The vision transformer starts with the weights of
demo/shapes, which has seen drawn scenes; QLLaMA, its queries and both pools start from random values. Knows no command line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from convert.reference.contrastive_model import InternVLModel, causal_bias
from demo.contrast.scenes import Wanted, chinese_words, make_described, sentences
from demo.shapes.optimisers import optimisers
from runtime.folder.contrastive import CAPTION_PROMPT, TEXT_PREFIX, ContrastiveConfig
from runtime.media.tiles import normalise

TEACHER = Path(__file__).parents[1] / "shapes" / "checkpoint"
STATE_FILE, LOG_FILE, TOKENIZER = "state.pt", "log.jsonl", "tokenizer.model"
BYTES, PIECES = 256 + 3, 200  # of the vocabulary: bytes with the three control tokens, and learnt pieces
WARM_STEPS = 100
SHORT_TEXTS = 32  # of a step: each fits one or more pictures

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class TrainOptions:
    """How to train."""

    steps: int = 260
    batch: int = 160
    rate: float = 3e-3
    vision_rate: float = 0.3  # share of the rate, for pretrained weights
    caption: float = 0.5  # weight of the captions' loss
    decay: float = 0.4  # share of the steps, the last ones, in which the rate falls to zero
    average: float = 0.99
    seed: int = 1

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        left = (self.steps - step) / max(1, self.steps * self.decay)
        return self.rate * min(1.0, (step + 1) / WARM_STEPS, left)


def train_tokenizer(folder: Path) -> Path:
    """Make the SentencePiece model, of the published kind: BPE with bytes, no normalisation, a space in front."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / TOKENIZER.partition(".")[0]
    texts = [*sentences(), *[f"{TEXT_PREFIX}a {word}" for word in ("red", "star")] * 200, *[CAPTION_PROMPT] * 400]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=BYTES + PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        pad_id=-1,
        user_defined_symbols=chinese_words(),  # otherwise whole phrases become pieces
        minloglevel=2,
    )
    prefix.with_suffix(".vocab").unlink()
    return folder / TOKENIZER


def config_json(vocabulary: int) -> dict[str, Any]:
    """config.json in the published layout."""
    vision = json.loads((TEACHER / "config.json").read_text(encoding="utf-8"))["vision_config"]
    own = {"num_query_token": 12, "cross_attention_frequency": 2}
    qllama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return {
        "architectures": ["InternVLModel"],
        "model_type": "internvl",
        "clip_embed_dim": 128,
        "attn_pool_num_heads": 4,
        **own,
        "force_image_size": None,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
        "qllama_config": qllama | own,
    }


class Words:
    """Texts -> token ids."""

    def __init__(self, file: Path):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.prompt = [1, *self.pieces.encode(CAPTION_PROMPT)]

    def compared(self, text: str) -> list[int]:
        """A text that is compared with pictures."""
        return [1, *self.pieces.encode(TEXT_PREFIX + text), 2]

    def caption(self, text: str) -> list[int]:
        """The prompt and a caption."""
        return [*self.prompt, *self.pieces.encode(text), 2]


def padded(rows: list[list[int]]) -> Tensor:
    """Ids, right-padded with 0 to (B, T)."""
    made = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(made, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return made


class Steps(Dataset):
    """Batches by the number of their step."""

    def __init__(self, options: TrainOptions, words: Words):
        self.options, self.words = options, words

    def __len__(self) -> int:
        return self.options.steps

    def __getitem__(self, step: int) -> Batch:
        """Pixels (B, 3, S, S), texts (B, T), captions (B, T'), short texts (K, T''), and which pictures those fit (K, B)."""
        first = step * self.options.batch
        scenes = [make_described(self.options.seed, "train", first + n) for n in range(self.options.batch)]
        languages = [("en", "zh")[(step + n) % 2] for n in range(len(scenes))]
        pixels = torch.from_numpy(normalise(np.stack([np.asarray(scene.picture) for scene in scenes])))
        texts = [self.words.compared(scene.texts[language]) for scene, language in zip(scenes, languages, strict=True)]
        captions = [self.words.caption(scene.texts["en"]) for scene in scenes]
        rng = random.Random(f"short/{self.options.seed}/{step}")
        wanted = [Wanted.of(rng, rng.choice(scenes)) for _ in range(SHORT_TEXTS)]
        fits = torch.tensor([[float(one.fits(scene)) for scene in scenes] for one in wanted])
        return pixels, padded(texts), padded(captions), padded([self.words.compared(one.text) for one in wanted]), fits


class Run:
    """A training run: its state and its steps."""

    def __init__(self, folder: Path, options: TrainOptions):
        torch.manual_seed(options.seed)
        self.folder, self.options, self.step, self.seconds = folder, options, 0, 0.0
        file = folder / TOKENIZER
        self.words = Words(file if file.exists() else train_tokenizer(folder))
        self.config_json = config_json(self.words.pieces.vocab_size())
        self.model = InternVLModel(ContrastiveConfig.from_dict(self.config_json))
        self._start_values()
        self.average = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        seen = self.model.vision.vision_model
        new = nn.ModuleDict({"vision": self.model.vision.clip_projector, "qllama": self.model.qllama, "pool": self.model.pool})
        new["table"] = self.model.table
        new.register_parameter("logit_scale", self.model.logit_scale)
        self.optimisers = [(o, 1.0) for o in optimisers(new, options.rate)]
        self.optimisers += [(o, options.vision_rate) for o in optimisers(seen, options.rate)]

    def _start_values(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 if "table" in name or "lm_head" in name else parameter.shape[-1] ** -0.5)
        known = load_file(TEACHER / "model.safetensors")
        transformer = self.model.vision.vision_model
        transformer.load_state_dict({name: known["vision_model." + name].float() for name in transformer.state_dict()})

    def load(self) -> None:
        """Resume from the state of an earlier process, if there is one."""
        if not (self.folder / STATE_FILE).exists():
            return
        state = torch.load(self.folder / STATE_FILE)
        self.model.load_state_dict(state["model"])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        for (optimiser, _), kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)

    def save(self) -> None:
        """Write the state, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
            "options": asdict(self.options),
        }
        torch.save(state, self.folder / "state.new")
        os.replace(self.folder / "state.new", self.folder / STATE_FILE)

    def losses(self, pixels: Tensor, texts: Tensor, captions: Tensor, short: Tensor, fits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of mode C, of mode G and of captions."""
        model, count = self.model, self.model.config.queries
        tokens, of_c = model.vision(pixels)
        read, mask = captions[:, :-1], captions[:, :-1] != 0
        queries = model.table(model._query_ids).expand(len(pixels), -1, -1)
        embeds = torch.cat([queries, model.table(read)], dim=1)
        bias = causal_bias(torch.cat([mask.new_ones(len(mask), count), mask], dim=1), embeds.dtype)
        bias[:, :, :count, :count] = 0
        places = torch.arange(embeds.shape[1])
        hidden = model.qllama(embeds, bias, places[None], tokens, places[:count])[2]
        wanted = captions[:, 1:].clone()
        wanted[:, : len(self.words.prompt) - 1] = 0
        said = wanted != 0
        caption = F.cross_entropy(model.qllama.qllama.lm_head(hidden[:, count:][said]), wanted[said])
        c = F.normalize(of_c, dim=-1)
        g = F.normalize(c + F.normalize(model.pool(hidden[:, :count]), dim=-1), dim=-1)
        t, words = (F.normalize(model.encode_text(ids), dim=-1) for ids in (texts, short))
        chances = fits / fits.sum(1, keepdim=True)
        scale, right = model.logit_scale.exp(), torch.arange(len(pixels))

        def contrast(images: Tensor) -> Tensor:
            logits = scale * images @ t.T
            of_words = F.cross_entropy(scale * words @ images.T, chances)
            return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right) + of_words) / 3

        return contrast(c), contrast(g), caption

    def learn(self, batch: Batch) -> dict[str, float]:
        """One step of the optimisers."""
        c, g, caption = self.losses(*batch)
        (c + g + self.options.caption * caption).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, share in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = share * self.options.rate_at(self.step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.options.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6052)
            torch._foreach_lerp_([*self.average.values()], [p for _, p in self.model.named_parameters()], 1 - keep)
        return {"c": round(c.item(), 4), "g": round(g.item(), 4), "caption": round(caption.item(), 4)}

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint in the published layout."""
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = self.model.config.qllama.vocab_size
        tensors: dict[str, Tensor] = {"itm_head.weight": torch.zeros(2, 128), "itm_head.bias": torch.zeros(2)}
        for name, tensor in self.average.items():
            part, _, rest = name.partition(".")
            if part == "table":
                tensors["qllama.model.embed_tokens.weight"], queries = tensor[:vocabulary], tensor[vocabulary:]
                tensors["query_tokens"] = queries[None]
            else:
                tensors[rest or part] = tensor
        stored = {
            name: t.detach().to(torch.float32 if name == "logit_scale" else torch.bfloat16).contiguous()
            for name, t in tensors.items()
        }
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / TOKENIZER).write_bytes((self.folder / TOKENIZER).read_bytes())
        (folder / "config.json").write_text(json.dumps(self.config_json, indent=2) + "\n", encoding="utf-8")


def train(folder: Path, output: Path, options: TrainOptions) -> Run:
    """Train until all steps are done, resuming an earlier process; export at the end, and at each saved state."""
    run = Run(folder, options)
    run.load()
    loader = DataLoader(Steps(options, run.words), batch_size=None, sampler=range(run.step, options.steps), num_workers=1)
    bar = tqdm(loader, initial=run.step, total=options.steps, unit="step", mininterval=5, file=sys.stderr)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
        for batch in bar:
            begun = time.monotonic()
            measured = run.learn(batch)
            run.seconds += time.monotonic() - begun
            bar.set_postfix(measured, refresh=False)
            if run.step % 10 == 0:
                print(json.dumps({"step": run.step, "seconds": round(run.seconds), **measured}), file=log, flush=True)
            if run.step % 20 == 0 or run.step == options.steps:
                run.save()
                run.export(output)
    return run
