"""The proof of a folder of InternVL-C and -G or of InternViT: each part in float32 against the PyTorch path, on a small input.

The bounds and the comparison are those of verify.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from convert.checkpoint import ContrastiveCheckpoint
from convert.exact import EXACT
from convert.reference.contrastive import FeaturesPart, QLlamaPart, QueryPoolPart, VisionEmbeddingPart
from convert.reference.contrastive_model import causal_bias, load_part, load_table
from convert.reference.model import compute_in_float32
from convert.scratch import Scratch
from convert.verify import GREEDY_TOKENS, SEED, Report, Row, compare
from runtime.folder.contrastive import ContrastiveConfig
from runtime.folder.files import PART_FILES

TEXT_LENGTHS = (3, 7)  # tokens of the two compared texts
PROMPT_TOKENS = 4  # of a caption


@torch.inference_mode()
def verify(checkpoint: ContrastiveCheckpoint, folder: Path, formats: dict[str, str]) -> Report:
    """Run one picture, two texts and a caption through the reference and the folder, one part in memory at a time."""
    config, random = checkpoint.config, torch.Generator().manual_seed(SEED)
    scratch = Scratch(folder)

    def loaded(kind: type[nn.Module]) -> nn.Module:
        part = load_part(kind, checkpoint, None, empty=scratch.empty)
        compute_in_float32(part)
        return part

    def run(part: str, *arrays: Tensor) -> list[np.ndarray]:
        request = ov.Core().compile_model(folder / PART_FILES[part], "CPU", EXACT).create_infer_request()
        return [*request.infer([array.numpy() for array in arrays]).values()]

    def joined(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors])

    rows: list[Row] = []

    def compared(part: str, expected: list[Tensor], found: list[np.ndarray]) -> None:
        rows.append(compare(part, formats, joined(expected), joined([torch.from_numpy(each) for each in found]).numpy()))

    picture = torch.randn(1, 3, config.image_size, config.image_size, generator=random)
    if not isinstance(config, ContrastiveConfig):
        compared("vision", [loaded(FeaturesPart)(picture)[-1]], run("vision", picture))
        return Report(rows)
    table = load_table(checkpoint, None, empty=scratch.empty)
    rest = config.qllama.vocab_size - 3
    texts = [3 + torch.randint(rest, (1, length), generator=random) for length in TEXT_LENGTHS]
    queries = torch.arange(config.qllama.vocab_size, len(table))
    prompt = 3 + torch.randint(rest, (PROMPT_TOKENS,), generator=random)
    written = torch.cat([*(text[0] for text in texts), queries, prompt])[None]
    looked_up = table[written].float()
    compared("text_embeddings", [looked_up], run("text_embeddings", written))
    of_texts = [table[text].float() for text in texts]
    of_caption = table[torch.cat([queries, prompt])[None]].float()

    part = loaded(VisionEmbeddingPart)
    tokens, embeds = part(picture)
    del part
    scratch.clear()
    compared("vision", [tokens, embeds], run("vision", picture))

    reference = loaded(QLlamaPart)
    bias = causal_bias(torch.ones(1, of_caption.shape[1], dtype=torch.bool), torch.float32)
    bias[:, :, : len(queries), : len(queries)] = 0
    places = torch.arange(of_caption.shape[1])
    of_texts_alone = [
        reference(
            text, causal_bias(torch.ones(text.shape[:2], dtype=torch.bool), torch.float32), torch.arange(text.shape[1])[None]
        )[1]
        for text in of_texts
    ]
    logits, _, hidden, past = reference(of_caption, bias, places[None], tokens, places[: len(queries)])
    greedy, steps = [int(logits[0, -1].argmax())], []
    while len(greedy) < GREEDY_TOKENS:
        steps.append(table[torch.tensor([[greedy[-1]]])].float())
        length = len(places) + len(steps)
        free = torch.zeros(1, 1, 1, length)
        after, _, _, past = reference(steps[-1], free, torch.tensor([[length - 1]]), past=past)
        greedy.append(int(after[0, -1].argmax()))
    del reference, past
    scratch.clear()

    request = ov.Core().compile_model(folder / PART_FILES["qllama"], "CPU", EXACT).create_infer_request()
    nothing, nowhere = tokens[:, :0], places[:0]

    def decode(embeds: Tensor, bias: Tensor, places: Tensor, image: Tensor, looking: Tensor) -> list[np.ndarray]:
        inputs = (embeds, bias, places, image, looking)
        return [each.copy() for each in request.infer([*(array.numpy() for array in inputs), np.zeros(1, np.int32)]).values()]

    found_texts = []
    for text in of_texts:
        request.reset_state()
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        found_texts.append(decode(text, causal_bias(mask, torch.float32), torch.arange(text.shape[1])[None], nothing, nowhere)[1])
    request.reset_state()
    found = decode(of_caption, bias, places[None], tokens, places[: len(queries)])
    compared("qllama", [*of_texts_alone, logits, hidden], [*found_texts, found[0], found[2]])
    agreed = int(found[0][0, -1].argmax() == greedy[0])
    for number, step in enumerate(steps):
        length = len(places) + number + 1
        after_step = decode(step, torch.zeros(1, 1, 1, length), torch.tensor([[length - 1]]), nothing, nowhere)[0]
        agreed += int(after_step[0, -1].argmax() == greedy[number + 1])

    of_queries = hidden[:, : len(queries)]
    compared("query_pool", [loaded(QueryPoolPart)(of_queries)], run("query_pool", of_queries))
    return Report(rows, None, agreed, len(greedy))
