"""python -m pytest tests/runtime/contrast/test_contrast.py

Opened folders of InternVL-C and -G and of InternViT against the original's numbers, transformers and torchvision.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

from convert import ConvertOptions, convert
from runtime import OVInternViT, OVInternVL
from runtime.errors import ModelFolderError, OptionError, PromptError, TokenizerError
from runtime.media.fit import middle, squeezed
from tests.conftest import DATA
from tests.convert.test_contrastive import flat_internvit

GOLDEN = DATA / "golden" / "internvl-14b"
EXACTLY = {"max_new_tokens": 12, "min_new_tokens": 12}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def model(converted):
    return OVInternVL(converted(GOLDEN, weight_format="fp32"), precision="accuracy")


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=2e-4, rtol=0)


def test_embeddings_are_the_originals(golden, model):
    close(model.encode_image(golden["pixel_values"], "InternVL-C"), golden["image_embeds_C"])
    close(model.encode_image(golden["pixel_values"], "InternVL-G"), golden["image_embeds_G"])
    close(model.encode_text(golden["text_ids"]), golden["text_embeds"])
    tokens = model._vision().run(golden["pixel_values"].numpy(), [0])[0]
    close(tokens, golden["vision_last_hidden_state"])
    close(model.run_queries(tokens), golden["query_last_hidden_state"])


@pytest.mark.parametrize("mode", ["C", "G"])
def test_logits_of_both_modes_are_the_originals(golden, model, mode):
    per_image, per_text = model(image=golden["pixel_values"], text=golden["text_ids"], mode=f"InternVL-{mode}")
    close(per_image, golden[f"logits_per_image_{mode}"])
    close(per_text, golden[f"logits_per_text_{mode}"])


@pytest.mark.parametrize(("beams", "name"), [(1, "greedy_ids"), (3, "beam3_ids")])
def test_captions_are_the_originals(golden, model, beams, name):
    options = {"num_beams": beams} | EXACTLY
    mask = torch.ones_like(golden["prompt_ids"])
    found = model.generate(pixel_values=golden["pixel_values"], input_ids=golden["prompt_ids"], attention_mask=mask, **options)
    assert found.tolist() == golden[name].tolist()


def test_all_beams_are_the_originals(golden, model):
    found = model.generate(golden["pixel_values"], golden["prompt_ids"], num_beams=3, num_return_sequences=3, **EXACTLY)
    assert found.reshape(3, 3, -1).tolist() == golden["beam3_all_ids"].tolist()


def test_padding_of_a_prompt_is_not_read(golden, model):
    prompt = golden["prompt_ids"]
    padded = torch.cat([torch.zeros_like(prompt[:, :2]), prompt], dim=1)
    found = model.generate(golden["pixel_values"], padded, (padded != 0).long(), **EXACTLY)
    assert found.tolist() == golden["greedy_ids"].tolist()


def test_greedy_captions_side_by_side_are_those_of_each_alone(golden, model):
    pixels, ids = golden["pixel_values"].numpy(), golden["prompt_ids"][0].tolist()
    together = model.write_captions(pixels, ids, {"num_beams": 1, "max_new_tokens": 12})
    assert together == [model.write_captions(pixels[n : n + 1], ids, {"num_beams": 1, "max_new_tokens": 12})[0] for n in range(3)]


def test_texts_of_other_lengths_beside_one_do_not_change_it(golden, model):
    ids = [[token for token in row if token] for row in golden["text_ids"].tolist()]
    for number, row in enumerate(ids):
        close(model.encode_ids([row])[0], golden["text_embeds"][number])


def test_unknown_modes_and_prompts_that_differ_are_told(golden, model):
    with pytest.raises(OptionError, match="known are InternVL-C and InternVL-G"):
        model(golden["pixel_values"], golden["text_ids"], "InternVL-X")
    with pytest.raises(PromptError, match="3 pictures and 2 prompts: give one for each picture"):
        model.generate(golden["pixel_values"], golden["prompt_ids"][:2])
    with pytest.raises(PromptError, match="no tokens"):
        model.encode_ids([[]])


def test_words_need_the_tokenizer(model):
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.model: words cannot be read"):
        model.encode_texts("a red panda")


def test_a_folder_of_another_kind_is_told(model, shapes):
    from runtime import OVInternVLChatModel

    with pytest.raises(ModelFolderError, match="holds a chat model"):
        OVInternVL(shapes)
    with pytest.raises(ModelFolderError, match="holds InternVL-C and -G"):
        OVInternVLChatModel(model.folder)
    with pytest.raises(ModelFolderError, match="holds InternVL-C and -G"):
        OVInternViT(model.folder)


def test_pictures_are_squeezed_or_cropped_as_torchvision_does():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (67, 101, 3), np.uint8))
    bicubic = transforms.InterpolationMode.BICUBIC
    whole = transforms.Resize((56, 56), bicubic)(picture)
    crop = transforms.CenterCrop(56)(transforms.Resize(56, bicubic)(picture))
    assert np.array_equal(squeezed(picture, 56), np.asarray(whole))
    assert np.array_equal(middle(picture, 56), np.asarray(crop))
    tall = picture.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(middle(tall, 56), np.asarray(transforms.CenterCrop(56)(transforms.Resize(56, bicubic)(tall))))


@pytest.fixture(scope="module")
def internvit(tmp_path_factory):
    root = tmp_path_factory.mktemp("internvit")
    return convert(str(flat_internvit(root)), root / "made", ConvertOptions(weight_format="fp32")).folder


def test_internvit_gives_upstreams_outputs(golden, internvit):
    model = OVInternViT(internvit, precision="accuracy")
    found = model(golden["pixel_values"])
    close(found.last_hidden_state, golden["vision_last_hidden_state"])
    close(found.pooler_output, golden["vision_last_hidden_state"][:, 0])
    assert found.hidden_states is None
    states = model(golden["pixel_values"], output_hidden_states=True).hidden_states
    assert len(states) == 4
    close(states[-1], golden["vision_last_hidden_state"])
    assert not np.allclose(states[1], states[2], atol=1e-3)


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_layers_keep_their_names_when_weights_are_compressed(golden, internvit, tmp_path, weight_format):
    """int4 asks for w8a8 where pictures prove it; this one is an InternViT-6B by its norms, and so int8."""
    options = ConvertOptions(weight_format=weight_format, group_size=16, verify=False)
    made = convert(str(flat_internvit(tmp_path)), tmp_path / "made", options).folder
    exact = OVInternViT(internvit)(golden["pixel_values"], output_hidden_states=True).hidden_states
    found = OVInternViT(made)(golden["pixel_values"], output_hidden_states=True).hidden_states
    for ours, other in zip(found, exact, strict=True):
        assert torch.nn.functional.cosine_similarity(ours.flatten(), other.flatten(), dim=0) > 0.999


def test_internvit_300m_is_w8a8_beside_int4_where_pictures_prove_it(tmp_path):
    """The trained vision transformer of demo/shapes, as a repository of its own."""
    folder = tmp_path / "InternViT"
    folder.mkdir()
    trained = DATA.parents[1] / "demo" / "shapes" / "checkpoint"
    (folder / "config.json").write_text(json.dumps(json.loads((trained / "config.json").read_text())["vision_config"]))
    tensors = {n: t for n, t in load_file(trained / "model.safetensors").items() if n.startswith("vision_model.")}
    save_file({name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    made = {name: tmp_path / name for name in ("int4", "fp32")}
    proofs = {name: convert(str(folder), output, ConvertOptions(weight_format=name)).proof for name, output in made.items()}
    assert proofs["int4"].startswith("w8a8: cosine")
    picture = [DATA.parents[1] / "demo" / "examples" / "shapes.png"]
    states = [OVInternViT(output)(picture, output_hidden_states=True).hidden_states for output in made.values()]
    for ours, exact in zip(*states, strict=True):
        assert (ours * exact).sum() / np.sqrt((ours**2).sum() * (exact**2).sum()) > 0.99


def test_internvit_agrees_with_transformers_own(tmp_path):
    """transformers' InternVL vision tower, with layer norms and biased projections, as the 300M has them: an oracle of its own."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    theirs = InternVLVisionModel(
        InternVLVisionConfig(**sizes, image_size=[56, 56], patch_size=[14, 14], attention_bias=True, attn_implementation="eager")
    ).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name or "lambda" in name else 0.0, 0.1)
    theirs.layernorm = torch.nn.Identity()  # InternViT has none
    renamed = {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "encoder.layer.": "encoder.layers.",
        "attention.projection_layer": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
    }
    stored, joined = {}, {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        part = next((part for part in ("q_proj", "k_proj", "v_proj") if part in name), None)
        if part is None:
            stored[name] = tensor
        else:
            joined.setdefault(name.replace(f"attention.{part}", "attn.qkv"), {})[part] = tensor
    stored |= {name: torch.cat([parts[f"{each}_proj"] for each in "qkv"]) for name, parts in joined.items()}
    folder = tmp_path / "InternViT"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    config = {"model_type": "intern_vit_6b", **sizes, "image_size": 56, "patch_size": 14, "norm_type": "layer_norm"}
    (folder / "config.json").write_text(json.dumps(config | {"qkv_bias": True, "qk_normalization": False}))
    made = convert(str(folder), tmp_path / "made", ConvertOptions(weight_format="fp32")).folder
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True)
    found = OVInternViT(made, precision="accuracy")(pixels, output_hidden_states=True)
    close(found.last_hidden_state, expected.last_hidden_state)
    for ours, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(ours, other)


def test_pictures_are_compared_without_torch(internvit, model):
    code = f"""
import sys
import numpy as np
from runtime import OVInternVL, OVInternViT
picture = np.zeros((60, 80, 3), np.uint8)
assert OVInternViT({str(internvit)!r})([picture, picture]).pooler_output.shape == (2, 64)
model = OVInternVL({str(model.folder)!r})
assert model.encode_images([picture], "InternVL-G").shape == (1, 32)
print({{"torch", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr
