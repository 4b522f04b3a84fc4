"""python -m pytest tests/convert/test_reference.py

Pieces of the PyTorch path against implementations that share no code with it.
"""

import pytest
import timm
import torch
from torch.nn import functional as F

from convert.checkpoint import Checkpoint
from convert.reference.language import LANGUAGE_MODELS, language_config
from convert.reference.model import load_vision
from convert.reference.vision import VisionTransformer, pixel_shuffle
from runtime.folder.config import InternVLConfig, VisionConfig
from tests.checkpoints import CONFIGS, VIT_300M


def test_vision_transformer_equals_timms():
    """timm's own vit_intern300m_patch14_448, at full width and two layers, with our weights under its names."""
    config = VisionConfig(
        **{k: v for k, v in VIT_300M.items() if k in VisionConfig.__dataclass_fields__} | {"num_hidden_layers": 2}
    )
    torch.manual_seed(0)
    ours = VisionTransformer(config, config.image_size // config.patch_size).eval()
    for layer in ours.encoder.layers:
        torch.nn.init.normal_(layer.ls1, std=0.2)
        torch.nn.init.normal_(layer.ls2, std=0.2)
    theirs = timm.create_model("vit_intern300m_patch14_448", depth=2, num_classes=0).eval()
    renames = [
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("embeddings.position_embedding", "pos_embed"),
        ("encoder.layers", "blocks"),
        (".ls1", ".ls1.gamma"),
        (".ls2", ".ls2.gamma"),
    ]
    state = {}
    for name, tensor in ours.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        state[name] = tensor
    missing, extra = theirs.load_state_dict(state, strict=False)
    assert not extra
    assert all("norm" in name for name in missing), missing  # timm's final norm, which InternVL does not have
    theirs.norm = theirs.fc_norm = torch.nn.Identity()
    tiles = torch.randn(2, 3, 448, 448)
    with torch.inference_mode():
        assert torch.allclose(ours(tiles, 2), theirs.forward_features(tiles), atol=2e-5)


def test_pixel_shuffle_joins_squares_row_by_row_and_v1_column_by_column():
    """Token numbers written into a 4 x 4 grid of patches, two channels each."""
    grid = torch.stack([torch.arange(16), torch.arange(16) + 100], dim=-1)[None]
    squares = {
        (0, 0): [0, 100, 1, 101, 4, 104, 5, 105],
        (0, 1): [2, 102, 3, 103, 6, 106, 7, 107],
        (1, 0): [8, 108, 9, 109, 12, 112, 13, 113],
        (1, 1): [10, 110, 11, 111, 14, 114, 15, 115],
    }
    rows = [squares[r, c] for r in (0, 1) for c in (0, 1)]
    columns = [squares[r, c] for c in (0, 1) for r in (0, 1)]
    assert pixel_shuffle(grid, 4, 2, "v2").tolist() == [rows]
    assert pixel_shuffle(grid, 4, 2, "v1").tolist() == [columns]


def test_position_table_of_another_size_is_resized_once(tiny):
    """force_image_size 56 over a table for 84 pixels: bicubic as upstream does it, the class row as it is."""
    checkpoint = Checkpoint(tiny("tiny-resized"))
    stored = checkpoint.tensors(["vision_model.embeddings.position_embedding"])[
        "vision_model.embeddings.position_embedding"
    ].float()
    part = load_vision(checkpoint)
    found = part.vision_model.embeddings.position_embedding
    grid = stored[:, 1:].reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 16, -1)
    assert torch.equal(found[:, :1], stored[:, :1])
    assert torch.allclose(found[:, 1:], expected)
    assert part(torch.zeros(1, 3, 56, 56)).shape == (1, 4, 64)


@pytest.mark.parametrize(("layer", "run"), [(-1, 3), (-2, 2), (-4, 0), (3, 3), (0, 0), (1, 1)])
def test_select_layer_counts_hidden_states_with_the_embeddings_first(tiny, layer, run):
    config = CONFIGS["tiny-qwen2"] | {"select_layer": layer}
    checkpoint = Checkpoint(tiny("tiny-qwen2"))
    checkpoint.config = InternVLConfig.from_dict(config)
    assert load_vision(checkpoint).layers_run == run


def test_generation_defaults_and_attention_kind_of_the_file_are_left_out():
    """The published llm_config says flash_attention_2 and max_length 20."""
    built = language_config(InternVLConfig.from_dict(CONFIGS["InternVL2-1B"]))
    assert built._attn_implementation == "sdpa"
    assert "max_length" not in built.to_diff_dict()


def test_phi3_keeps_its_long_rope_under_the_current_name():
    config = InternVLConfig.from_dict(CONFIGS["InternVL2-4B"])
    built = language_config(config)
    assert built.rope_parameters["rope_type"] == "longrope"
    assert built.rope_parameters["long_factor"] == CONFIGS["InternVL2-4B"]["llm_config"]["rope_scaling"]["long_factor"]
    assert built.sliding_window is None, "a window longer than the context is none"


def test_every_kind_has_a_tiny_checkpoint():
    made = {config["llm_config"]["architectures"][0] for name, config in CONFIGS.items() if name.startswith("tiny-")}
    assert made == set(LANGUAGE_MODELS)
