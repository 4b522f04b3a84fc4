"""python -m pytest tests/convert/test_weight_files.py

Weight files as people have them: torch's own, shards without an index, a stale one, buffers, padded vocabularies, leftovers.
"""

import json
import pickle
import shutil

import numpy as np
import openvino as ov
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import ConvertOptions, convert
from convert.checkpoint import Checkpoint
from convert.reference.model import expected_shapes, is_tied
from convert.weight_files import INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE, WEIGHTS_FILE
from runtime import OVInternVLChatModel
from runtime.errors import CheckpointError
from tests.checkpoints import make_checkpoint


def check(folder) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.check(expected_shapes(checkpoint.config, tied=is_tied(checkpoint)))
    return checkpoint


def same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.shapes == other.shapes
    ours, theirs = one.tensors(one.shapes), other.tensors(other.shapes)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def whole(tiny):
    return check(tiny("tiny-qwen2"))


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny("tiny-qwen2"), tmp_path / "checkpoint")


def split(tensors: dict, count: int) -> list[dict]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[place::count]} for place in range(count)]


@pytest.mark.parametrize("older", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("shards", [1, 3])
def test_torchs_own_files_hold_the_same_tensors(folder, whole, shards, older):
    parts = split(load_file(folder / WEIGHTS_FILE), shards)
    (folder / WEIGHTS_FILE).unlink()
    names = [PICKLE_FILE] if shards == 1 else [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name, _use_new_zipfile_serialization=not older)
    if shards > 1:
        listed = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (folder / PICKLE_INDEX_FILE).write_text(json.dumps({"weight_map": listed}))
    same(check(folder), whole)


def test_a_pickled_checkpoint_converts_to_the_same_bytes(folder, tiny, tmp_path):
    options = ConvertOptions(weight_format="int8", verify=False)
    wanted = convert(str(tiny("tiny-qwen2")), tmp_path / "safetensors", options).folder
    torch.save(load_file(folder / WEIGHTS_FILE), folder / PICKLE_FILE)
    (folder / WEIGHTS_FILE).unlink()
    found = convert(str(folder), tmp_path / "bin", options).folder
    for name in ("language", "vision_embeddings", "text_embeddings"):
        file = f"openvino_{name}_model.bin"
        assert (found / file).read_bytes() == (wanted / file).read_bytes()


def test_safetensors_win_over_pickles(folder, whole):
    (folder / PICKLE_FILE).write_bytes(b"never opened")
    same(check(folder), whole)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize("write", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_hostile_pickle_is_refused_and_not_run(folder, write):
    (folder / WEIGHTS_FILE).unlink()
    if write is None:
        torch.save({"a": torch.zeros(1), "bomb": Bomb()}, folder / PICKLE_FILE)
    else:
        (folder / PICKLE_FILE).write_bytes(write(Bomb()))
    with pytest.raises(CheckpointError, match="opening a pickle can run any code, so it is refused") as raised:
        Checkpoint(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole file of weights"),
        (b"PK\x03\x04" + bytes(100), "is not a whole file of weights|opening a pickle"),
        ([torch.zeros(1)], "is not a dictionary of tensors"),
        ({"epoch": 3, "state": {"a": torch.zeros(1)}}, "is not a dictionary of tensors"),
    ],
    ids=["empty", "cut", "a list", "a state of training"],
)
def test_a_file_that_holds_no_weights_is_told(folder, content, message):
    (folder / WEIGHTS_FILE).unlink()
    if isinstance(content, bytes):
        (folder / PICKLE_FILE).write_bytes(content)
    else:
        torch.save(content, folder / PICKLE_FILE)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_without_an_index_are_taken_when_they_are_complete(folder, whole, kind):
    parts = split(load_file(folder / WEIGHTS_FILE), 3)
    (folder / WEIGHTS_FILE).unlink()
    for number, part in enumerate(parts, 1):
        name = f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{number:05}-of-00003.{kind}"
        (save_file if kind == "safetensors" else torch.save)(part, folder / name)
    found = check(folder)
    same(found, whole)
    assert len(found.notes) == 1
    assert "3 numbered files are read" in found.notes[0]
    next(folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 weight files, number 2; fetch the checkpoint again"):
        Checkpoint(folder)


def test_shards_of_two_savings_are_told(folder):
    parts = split(load_file(folder / WEIGHTS_FILE), 2)
    (folder / WEIGHTS_FILE).unlink()
    save_file(parts[0], folder / "model-00001-of-00002.safetensors")
    save_file(parts[1], folder / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="has shards of 2 and of 3 files: remove the old ones"):
        Checkpoint(folder)


def test_a_whole_file_wins_over_a_stale_index(folder, whole):
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    found = check(folder)
    same(found, whole)
    assert found.notes == [f"{INDEX_FILE} lists other files: {WEIGHTS_FILE} is read"]


def test_an_index_of_one_file_is_no_stale_one(folder, whole):
    names = load_file(folder / WEIGHTS_FILE)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS_FILE)}))
    assert check(folder).notes == []


def test_buffers_of_older_versions_are_passed_over_by_name(folder, whole):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)
    save_file(tensors, folder / WEIGHTS_FILE)
    found = check(folder)
    same(found, whole)
    assert found.notes == ["ignored: 2 buffers that are computed, not trained"]
    tensors["language_model.model.layers.0.self_attn.other"] = torch.ones(8)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"1 unexpected: language_model.model.layers.0.self_attn.other"):
        check(folder)


TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def pad(folder, rows: int, value: float):
    tensors = load_file(folder / WEIGHTS_FILE)
    for name in TABLES:
        tensors[name] = torch.cat([tensors[name], torch.full((rows, tensors[name].shape[1]), value, dtype=tensors[name].dtype)])
    save_file(tensors, folder / WEIGHTS_FILE)
    return tensors


def test_rows_that_round_a_vocabulary_up_never_win(tmp_path, converted):
    """A head whose rows past the vocabulary are the largest of all; ours and openvino_genai's tokens are those without them."""
    plain = make_checkpoint(tmp_path / "plain", "tiny-qwen2")
    padded = shutil.copytree(plain, tmp_path / "padded")
    size = json.loads((plain / "config.json").read_text())["llm_config"]["vocab_size"]
    tensors = pad(padded, 64, 0.0)
    tensors[TABLES[1]][size:] = 50.0
    save_file(tensors, padded / WEIGHTS_FILE)
    found = check(padded)
    assert found.notes == [f"dropped: rows {size} to {size + 63} of the vocabulary, which belong to no token"]
    same(found, check(plain))
    folders = [converted(folder, weight_format="fp32") for folder in (plain, padded)]
    answers = [OVInternVLChatModel(folder).start_conversation().ask("What?", max_new_tokens=12) for folder in folders]
    assert answers[0] == answers[1]
    head = ov.Core().read_model(folders[1] / "openvino_language_model.xml").output("logits").partial_shape[-1]
    assert head.get_length() == size
    genai = pytest.importorskip("openvino_genai")
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample = 12, False
    image = ov.Tensor(np.zeros((1, 56, 56, 3), np.uint8))
    texts = [
        genai.VLMPipeline(folder, "CPU").generate("What?", images=[image], generation_config=config).texts for folder in folders
    ]
    assert texts[0] == texts[1]


def test_rows_of_tokens_that_were_added_are_kept(folder):
    """vocab_size was not raised when tokens were added; their ids are in the padding."""
    config = json.loads((folder / "config.json").read_text())
    size = config["llm_config"]["vocab_size"]
    pad(folder, 64, 0.5)
    token = {"content": "<mine>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append({"id": size + 2, **token})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    found = check(folder)
    assert found.config.language["vocab_size"] == size + 3
    assert found.tensors(TABLES)[TABLES[1]].shape[0] == size + 3


def test_many_rows_too_many_are_another_model(folder):
    pad(folder, 500, 0.0)
    with pytest.raises(CheckpointError, match="2 of another shape"):
        check(folder)


def test_leftovers_of_deepspeed_name_what_helps(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: tensor[:0].contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"holds \d+ tensors of size 0 .* run zero_to_fp32\.py, which lies beside them"):
        Checkpoint(folder)
    (folder / WEIGHTS_FILE).unlink()
    (folder / "global_step120").mkdir()
    with pytest.raises(CheckpointError, match=r"has no weights, but what DeepSpeed leaves .*zero_to_fp32\.py"):
        Checkpoint(folder)


def test_what_a_trainer_leaves_beside_is_not_looked_at(folder, whole):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "latest"):
        (folder / name).write_bytes(b"never opened")
    (folder / "global_step120").mkdir()
    same(check(folder), whole)
