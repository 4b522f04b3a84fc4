"""The models of the family as a table: what they are made of, how far they are proven, how large they are in int4.

Sizes follow from the published shapes (tests/checkpoints.py) and from what int4 means in convert/compress.py, memory from the sizes
and from what was measured on those that were run (docs/speed-conversion.md).

    python -m tests.family        # the table of docs/models.md
"""

from __future__ import annotations

import math

from convert.options import RECIPES
from tests.checkpoints import CONFIGS, tensor_shapes

GOLDEN, CLASS, LAYOUT = "the original's numbers", "transformers' class", "names and shapes"
KINDS = {  # llm_config.architectures -> (name, what proves it)
    "Qwen2ForCausalLM": ("Qwen2", GOLDEN),
    "Qwen3ForCausalLM": ("Qwen3", GOLDEN),
    "Qwen3MoeForCausalLM": ("Qwen3-MoE", GOLDEN),
    "GptOssForCausalLM": ("GPT-OSS", CLASS),
    "LlamaForCausalLM": ("Llama", GOLDEN),
    "Phi3ForCausalLM": ("Phi-3", GOLDEN),
    "InternLM2ForCausalLM": ("InternLM2", GOLDEN),
    "InternLM2VEForCausalLM": ("InternLM2 with visual experts", GOLDEN),
    "InternLM3ForCausalLM": ("InternLM3", LAYOUT),
}
CONVERTED = ("InternVL2-1B", "InternVL2-2B", "InternVL2-4B", "InternVL2-8B")  # at full size, with random weights
CONVERTING, RUNNING = 1.6e9, 1.6e9  # bytes beside the largest compressed part, and beside vision and language part
CALIBRATING = 2.2e9  # bytes while the ranges of InternViT-300M are found
SCALE_INT4, SCALE_INT8 = 2.5, 3  # bytes of the scale and the zero point that weights share


def int4_bytes(config: dict) -> dict[str, float]:
    """Bytes of each part of a model folder: int4 with an int8 head, the other parts in 8 bits, vectors in float32.

    A router is not compressed: 16 bits, its attention in float32.
    """
    rounded = next(size for size in (128, 64, 32) if not config["llm_config"]["hidden_size"] % size)
    experts = any(key in config["llm_config"] for key in ("num_experts", "num_local_experts"))
    group = rounded if experts else RECIPES["default"].group
    sizes = {"text_embeddings": 0.0, "vision": 0.0, "language": 0.0}
    for name, shape in tensor_shapes(config):
        weights, rows = math.prod(shape), shape[0]
        language = name.startswith("language_model.")
        if name.startswith(("mlp2.", "gating.", "pooling_before_gating.")):
            if not name.startswith(tuple(f"pooling_before_gating.{what}{n}." for what in ("attn", "norm") for n in "34")):
                width = 4 if len(shape) == 1 or "in_proj" in name else 1 if name.startswith("mlp2.") else 2
                sizes["router"] = sizes.get("router", 0.0) + width * weights
            continue
        part = "vision" if not language else "text_embeddings" if "embed" in name else "language"
        wide = part == "text_embeddings" or "head" in name or name.endswith("output.weight")
        if len(shape) == 1 or "embedding" in name.partition("vision_model.")[2]:
            sizes[part] += 4 * weights
        elif wide or part == "vision":
            sizes[part] += weights + SCALE_INT8 * rows
        else:
            sizes[part] += weights / 2 + SCALE_INT4 * weights / group
    return sizes


def memory(config: dict) -> tuple[float, float]:
    """Anonymous bytes to convert to int4, and to answer about a picture."""
    sizes = int4_bytes(config)
    experts = sum(math.prod(shape) for name, shape in tensor_shapes(config) if ".mlp.experts." in name)  # go to mapped files
    largest = max((sizes | {"language": sizes["language"] - experts / 2}).values())
    converting = max(largest + CONVERTING, CALIBRATING)
    return converting, sum(sizes.values()) - sizes["text_embeddings"] + RUNNING


def rows() -> list[str]:
    """The table, a line a model."""
    heads = ["model", "vision", "language model", "parameters", "int4 folder", "memory to convert", "to run", "proven by"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, config in CONFIGS.items():
        if name.startswith("tiny-"):
            continue
        kind, proof = KINDS[config["llm_config"]["architectures"][0]]
        vision = config["vision_config"]
        eyes = "patches only" if vision["model_type"] == "intern_vit_patch" else "6B" if vision["qk_normalization"] else "300M"
        count = sum(math.prod(shape) for _, shape in tensor_shapes(config))
        proof += ", full size" if name in CONVERTED else ""
        sizes = [sum(int4_bytes(config).values()), *memory(config)]
        cells = [name, eyes, kind, f"{count / 1e9:.1f} B", *(f"{size / 1e9:.1f} GB" for size in sizes), proof]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print(*rows(), sep="\n")
