"""The trained modules: vision transformer, projector and language model, and the losses of a batch.

The modules are the reference's own, so that the tensors have the published names. Knows nothing of steps or rates.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from convert.reference.language import language_config
from convert.reference.vision import VisionPart, pixel_shuffle
from demo.shapes.samples import IGNORED, WHATS, Batch
from demo.shapes.texts import COLOURS, DIGITS, LETTERS, SHAPES
from runtime.answer.prompt import CONTEXT_TOKEN
from runtime.folder.config import InternVLConfig


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
