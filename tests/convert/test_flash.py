"""python -m pytest tests/convert/test_flash.py

InternVL3.5-Flash against the original's numbers: the router's, which tiles it leaves with few context tokens, what follows from it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import ConvertOptions, convert
from convert.checkpoint import Checkpoint
from convert.exact import EXACT
from convert.reference.model import InternVLChatModel, expected_shapes, is_tied
from runtime import GenerationConfig, OVInternVLChatModel, pipeline
from runtime.answer.chat_core import Prompt
from runtime.answer.flash import choose_few, quantile
from runtime.errors import CheckpointError, ModelFolderError
from runtime.folder.config import FlashConfig, InternVLConfig
from runtime.folder.files import PART_FILES
from runtime.media.tiles import PictureTiles
from tests.conftest import DATA, Golden
from tests.convert.test_golden import NEW_TOKENS, PARTS, REFERENCE, difference

SET = DATA / "golden" / "flash"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(SET, load_file(SET / "golden.safetensors"), json.loads((SET / "golden.json").read_text()))


@pytest.fixture(scope="module")
def tiles(golden) -> torch.Tensor:
    return golden["pixel_blocks"].repeat_interleave(32, 2).repeat_interleave(32, 3).float() / 64


@pytest.fixture
def folder(converted) -> Path:
    return converted(SET, weight_format="fp32")


@pytest.fixture(params=["reference", "folder"])
def model(request, converted):
    if request.param == "reference":
        return InternVLChatModel.from_checkpoint(Checkpoint(SET))
    return OVInternVLChatModel(converted(SET, weight_format="fp32"), precision="accuracy")


def bound(model) -> float:
    return REFERENCE if isinstance(model, InternVLChatModel) else PARTS


def prompt_of(golden, tiles: torch.Tensor) -> Prompt:
    """The golden prompt, as it is before the router."""
    counts = golden["tiles_per_picture"].tolist()
    pictures = [PictureTiles.of_tiles(part.numpy()) for part in tiles.split(counts)]
    return Prompt(golden["input_ids"][0].numpy(), pictures)


def test_the_router_chooses_as_the_original(golden, tiles, model):
    rows, few, suffice = model.route_tiles(tiles.numpy())
    assert difference(suffice, golden["router_probability"][:, 0]) < bound(model)
    assert difference(few[:, ::8], golden["features_64"]) < bound(model)
    assert difference(rows[:, ::32], golden["features_256"]) < bound(model)
    routed = model.route(prompt_of(golden, tiles))
    assert routed.few.tolist() == golden["compressed"].bool().tolist()
    assert routed.ids.tolist() == golden["new_input_ids"][0].tolist()
    assert model.route(routed) is routed


def test_logits_and_tokens_are_the_originals(golden, tiles, model):
    routed, count = model.route(prompt_of(golden, tiles)), golden["logits_last"].shape[1]
    embeds = model.embeddings_of(routed)
    cache = model.new_cache()
    for end in range(embeds.shape[1] - count, embeds.shape[1]):
        cache.keep(np.zeros(0, np.int64))
        found = cache.feed(embeds[:, : end + 1], np.ones((1, end + 1), np.int64), None)
        assert difference(found[:, -1], golden["logits_last"][:, end - embeds.shape[1] + count]) < PARTS
    wanted = golden["greedy_ids"]
    found = model.generate(tiles, golden["input_ids"], max_new_tokens=wanted.shape[1], **NEW_TOKENS)
    assert torch.equal(found, wanted)


def test_rows_of_a_batch_choose_each_for_itself(golden, tiles, model):
    """Alone or beside another prompt, a prompt has the same answer; the original has no batches."""
    ids, context = golden["input_ids"], golden.context_id
    counts = golden["tiles_per_picture"].tolist()
    starts = (ids[0] == context).nonzero().flatten()
    second = starts[counts[0] * 256] - 1  # the second picture's start token
    short = torch.cat([torch.zeros(1, int(second), dtype=torch.int64), ids[:, second:]], 1)
    mask = torch.ones(2, ids.shape[1], dtype=torch.int64)
    mask[1, : int(second)] = 0
    both = torch.cat([tiles, tiles[counts[0] :]])
    found = model.generate(both, torch.cat([ids, short]), mask, max_new_tokens=8, **NEW_TOKENS)
    alone = model.generate(tiles[counts[0] :], ids[:, second:], max_new_tokens=8, **NEW_TOKENS)
    assert torch.equal(found[0], golden["greedy_ids"][0, :8])
    assert torch.equal(found[1], alone[0])


def test_without_the_router_it_is_the_plain_model(golden, tiles, folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(SET, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"flash_mode": False}))
    checkpoint = Checkpoint(plain)
    assert any("tensors of the router, which flash_mode" in note for note in checkpoint.notes)
    checkpoint.check(expected_shapes(checkpoint.config, tied=is_tied(checkpoint)))
    reference = InternVLChatModel.from_checkpoint(checkpoint)
    wanted = reference.generate(tiles, golden["input_ids"], max_new_tokens=8, **NEW_TOKENS)
    model = OVInternVLChatModel(folder, precision="accuracy", flash=False)
    assert torch.equal(model.generate(tiles, golden["input_ids"], max_new_tokens=8, **NEW_TOKENS), wanted)
    assert model.route(prompt_of(golden, tiles)).few is None


def test_others_find_one_output_and_a_router_they_need_not_know(golden, tiles, folder):
    """openvino_genai and optimum-intel read the only output of a vision part: to them it is the plain model."""
    vision = ov.Core().compile_model(folder / PART_FILES["vision"], "CPU", EXACT)
    assert [port.get_any_name() for port in vision.outputs] == ["last_hidden_state"]
    assert difference(vision(tiles.numpy())[0][:, ::32], golden["features_256"]) < PARTS


def test_openvino_genai_answers_as_the_plain_model(folder, tmp_path):
    genai = pytest.importorskip("openvino_genai")
    picture = np.random.default_rng(0).integers(0, 256, (448, 448, 3), np.uint8)
    pipe = genai.VLMPipeline(str(folder), "CPU", **EXACT)
    config = genai.GenerationConfig(max_new_tokens=6, ignore_eos=True, do_sample=False)
    theirs = pipe.generate("What is this?", images=[ov.Tensor(picture[None])], generation_config=config)
    model = OVInternVLChatModel(folder, precision="accuracy", flash=False)
    conversation = model.start_conversation()
    ours = conversation.ask("What is this?", images=[picture], max_new_tokens=6, ignore_eos=True, do_sample=False)
    assert theirs.texts[0].strip() == ours.strip()


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_the_router_itself_is_not_compressed(converted, weight_format):
    options = {"weight_format": weight_format, "group_size": 32} if weight_format == "int4" else {"weight_format": weight_format}
    model = ov.Core().read_model(converted(SET, verify=False, **options) / PART_FILES["router"])
    stored = {
        node.get_friendly_name(): node.get_output_element_type(0) for node in model.get_ops() if "Constant" in node.get_type_name()
    }
    kinds = {name: str(kind.get_type_name()) for name, kind in stored.items() if kind.get_type_name() in ("u8", "i8", "u4", "i4")}
    assert len([name for name in kinds if "zero_point" not in name]) == 3, kinds
    assert all("mlp2" in name for name in kinds), kinds


def test_a_later_turn_forgets_what_an_earlier_tile_is_no_more(golden, tiles, folder):
    """Another picture moves the limit: where an earlier tile's choice changes, its keys do, and no KV cache is taken for it."""
    model = OVInternVLChatModel(folder, precision="accuracy")
    whole, counts = prompt_of(golden, tiles), golden["tiles_per_picture"].tolist()
    at = int((golden["input_ids"][0] == golden.context_id).nonzero()[counts[0] * 256]) - 1
    first = model.route(Prompt(whole.ids[:at], whole.pictures[:1]))
    both = model.route(whole)
    changed = np.flatnonzero(first.few != both.few[: counts[0]])
    assert len(changed), "the golden set has a tile whose choice depends on the second picture"
    keys, later = model.keys(first), model.keys(both)
    begin = int(np.flatnonzero(golden["input_ids"][0].numpy() == golden.context_id)[0])
    common = int((np.cumprod(keys[: len(first.ids)] == later[: len(first.ids)])).sum())
    kept = np.where(first.few[: changed[0]], 64, 256).sum()
    assert common == begin + kept
    wanted = model.generate(tiles, golden["input_ids"], max_new_tokens=8, **NEW_TOKENS)
    assert wanted.tolist() == golden["greedy_ids"][:, :8].tolist(), "after the first picture alone was asked about"


def test_the_router_is_asked_once_about_a_tile_and_counts_are_those_of_the_model(folder):
    model = OVInternVLChatModel(folder, precision="accuracy", feature_cache_bytes=0)
    pictures = [np.random.default_rng(n).integers(0, 256, (448, 900, 3), np.uint8) for n in range(2)]
    conversation = model.start_conversation()
    conversation.ask("What?", images=pictures[:1], max_new_tokens=8)
    first = conversation.statistics
    assert (first.tiles, first.encoded_tiles) == (3, 3)
    assert conversation.turns
    conversation.ask("And?", max_new_tokens=8)
    again = conversation.statistics
    assert again.encoded_tiles == 0, "its numbers are kept, its rows are in the KV cache"
    assert again.reused_tokens >= first.prompt_tokens
    answers = model.ask_batch(["What?"], max_new_tokens=2)
    assert len(answers) == 1
    plain = OVInternVLChatModel(folder, precision="accuracy", flash=False).start_conversation()
    plain.ask("What?", images=pictures[:1], max_new_tokens=2)
    cut = plain.statistics.prompt_tokens - first.prompt_tokens
    assert cut in (192, 384), "one or two of three tiles are left with 64 tokens"


@pytest.mark.parametrize("engine", ["native", "genai"])
def test_many_prompts_at_once_count_the_tokens_that_are_left(folder, engine):
    if engine == "genai":
        pytest.importorskip("openvino_genai")
    picture = np.random.default_rng(0).integers(0, 256, (448, 900, 3), np.uint8)
    conversation = OVInternVLChatModel(folder).start_conversation()
    conversation.ask("What?", images=[picture], max_new_tokens=2)
    with pipeline(folder, engine=engine, cache_size=1) as pipe:
        found = pipe(("What?", picture), GenerationConfig(max_new_tokens=2))
    assert found.input_token_len == conversation.statistics.prompt_tokens < 3 * 256


def test_the_quantile_is_torchs():
    dice = np.random.default_rng(0)
    for count in [1, 2, 3, 5, 6, 11, 13, 40]:
        for share in [0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0, *dice.random(20)]:
            values = dice.random(count, dtype=np.float32)
            limit = torch.quantile(torch.from_numpy(values), float(share))
            assert abs(quantile(values, float(share)) - limit.item()) < 1e-7  # between two tiles, where nobody is
            if float(share * (count - 1)).is_integer():
                assert quantile(values, float(share)) == limit.item()
            few = choose_few(values, FlashConfig(float(share), 0.5))
            assert few.tolist() == ((values > limit.item()) & (values >= 0.5)).tolist()
    assert choose_few(np.zeros(0, np.float32), FlashConfig(0.5, 0.5)).tolist() == []


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"flash_relative_threshold": None}, "flash_relative_threshold is missing"),
        ({"flash_absolute_threshold": 1.5}, "flash_absolute_threshold is 1.5"),
        ({"flash_relative_threshold": "high"}, "flash_relative_threshold is 'high'"),
        ({"flash_relative_threshold": True}, "flash_relative_threshold is True"),
        ({"flash_absolute_threshold": float("nan")}, "flash_absolute_threshold is nan"),
        ({"force_image_size": 56}, "flash_mode joins 4 x 4 patches"),
    ],
)
def test_what_config_says_of_the_router_is_checked(keys, told):
    raw = {key: value for key, value in (json.loads((SET / "config.json").read_text()) | keys).items() if value is not None}
    if "force_image_size" in keys:
        raw["force_image_size"] = 14 * 6
    with pytest.raises(CheckpointError, match=told):
        InternVLConfig.from_dict(raw)


def test_a_router_that_is_not_there_is_told(folder, tmp_path):
    lacking = tmp_path / "lacking"
    shutil.copytree(SET, lacking)
    tensors = load_file(SET / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("gating.")}, lacking / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: gating\."):
        convert(str(lacking), tmp_path / "out", ConvertOptions(weight_format="fp32"))
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / PART_FILES["router"]).unlink()
    with pytest.raises(ModelFolderError, match="--no-flash"):
        OVInternVLChatModel(copied)
