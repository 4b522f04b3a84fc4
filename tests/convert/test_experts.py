"""python -m pytest tests/convert/test_experts.py

Experts are compressed one by one, before there is a graph: the bytes are NNCF's, and the proof reads them where they lie.
"""

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as opset
from safetensors.torch import load_file

from convert.checkpoint import Checkpoint
from convert.reference.experts import MATRICES, Experts
from convert.reference.model import compute_in_float32, load_language
from runtime.folder.files import PART_FILES

NAME = "tiny-qwen3-moe"


def by_nncf(matrices: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
    """What NNCF makes of a constant (E, rows, columns) of a graph."""
    x = opset.parameter([matrices.shape[0], -1, matrices.shape[2]], dtype=ov.Type.f32)
    model = ov.Model([opset.matmul(x, opset.constant(matrices, name="w"), False, True)], [x])
    mode = nncf.CompressWeightsMode.INT4_ASYM
    model = nncf.compress_weights(model, mode=mode, group_size=group_size, all_layers=True)
    return constants(model, "w")


def constants(model: ov.Model, name: str) -> dict[str, np.ndarray]:
    """Codes, zeros and scales under a name, as bytes."""
    nodes = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    return {end: np.array(nodes[name + end].data).view(np.uint8).ravel() for end in ("", "/zero_point", "/scale")}


def test_the_bytes_are_those_of_nncf(tiny, converted):
    model = ov.Core().read_model(converted(tiny(NAME), group_size=32, verify=False) / PART_FILES["language"])
    tensors = load_file(tiny(NAME) / "model.safetensors")
    for layer in range(2):
        for matrix in MATRICES:
            own = [tensors[f"language_model.model.layers.{layer}.mlp.experts.{e}.{matrix}.weight"].float() for e in range(6)]
            wanted = by_nncf(torch.stack(own).numpy(), 32)
            found = constants(model, f"self.model.layers.{layer}.mlp.experts.{matrix}")
            for end, values in wanted.items():
                assert np.array_equal(found[end], values), (layer, matrix, end)


def test_a_processor_computes_only_the_experts_that_tokens_take(tiny, converted):
    compiled = ov.Core().compile_model(converted(tiny(NAME), group_size=32, verify=False) / PART_FILES["language"], "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("GatherMatmul") == 2 * 3


def test_experts_that_stay_where_they_lie_compute_the_same(tiny):
    checkpoint = Checkpoint(tiny(NAME))
    joined, single = load_language(checkpoint, torch.float32), load_language(checkpoint, None, single=True)
    compute_in_float32(single)
    assert not [name for name, _ in single.named_parameters() if ".experts." in name]
    embeds = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    wanted, found = (model(inputs_embeds=embeds, use_cache=False).logits for model in (joined, single))
    assert float((found - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("tokens", [1, 5])
def test_all_experts_give_the_sum_of_those_that_are_taken(tokens):
    """The form that is traced, against the one that is computed with."""
    torch.manual_seed(0)
    experts = Experts(4, 8, 16).requires_grad_(False)
    for name in MATRICES:
        getattr(experts, name).normal_()
    x, numbers = torch.randn(tokens, 8), torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    shares = torch.rand(tokens, 2)
    assert torch.allclose(experts(x, numbers, shares), experts._all(x, numbers, shares).squeeze(1), atol=1e-5)
