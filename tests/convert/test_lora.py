"""python -m pytest tests/convert/test_lora.py

Fine-tuned models: LoRA that training left unmerged in a checkpoint, and adapters of PEFT of every kind. peft itself is the oracle:
what its merge_and_unload gives, we give. The golden set `lora`, of upstream's own training, is among the golden tests.
"""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from convert import ConvertOptions, convert
from convert.checkpoint import Checkpoint
from convert.lora import Update
from convert.reference.model import InternVLChatModel, expected_shapes, is_tied
from convert.weight_files import WEIGHTS_FILE
from runtime.errors import CheckpointError
from runtime.folder.files import PART_FILES, PARTS
from tests.checkpoints import make_checkpoint
from tests.conftest import DATA

peft = pytest.importorskip("peft", reason="peft is not installed: it is the oracle of these tests")

LANGUAGE = {  # what is adapted, as in upstream's wrap_llm_lora
    "tiny-qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "tiny-qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "tiny-llama": ["q_proj", "v_proj", "down_proj"],
    "tiny-phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
VISION = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


class Published(nn.Module):
    """The reference's modules under the published names."""

    def __init__(self, reference: InternVLChatModel):
        super().__init__()
        self.language_model, self.mlp1 = reference.language, reference.vision.mlp1
        self.vision_model = reference.vision.vision_model


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """What training does to the parts that are trained: peft begins with a B of zeros."""
    generator = torch.Generator().manual_seed(seed)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert trained
    with torch.no_grad():
        for tensor in trained:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = {}

    def make(name: str):
        if name not in made:
            folder = make_checkpoint(tmp_path_factory.mktemp("base") / name, name, dtype="float32")
            made[name] = folder
        return made[name]

    return make


def published(folder) -> Published:
    return Published(InternVLChatModel.from_checkpoint(Checkpoint(folder)))


def check(checkpoint: Checkpoint, wanted: dict[str, torch.Tensor]) -> int:
    """All tensors equal those of the oracle; how many are not those of the files."""
    checkpoint.check(expected_shapes(checkpoint.config, tied=is_tied(checkpoint)))
    found = checkpoint.tensors(checkpoint.shapes)
    for name, tensor in found.items():
        if name in wanted:
            assert (tensor.float() - wanted[name].float()).abs().max() < 1e-6, name
    assert set(found) <= set(wanted) | {"vision_model.embeddings.position_embedding"}
    return sum(checkpoint.copies(name) for name in found)


@pytest.mark.parametrize("layout", ["peft", "before 0.7"])
@pytest.mark.parametrize("parts", [("language",), ("vision",), ("language", "vision")], ids="+".join)
@pytest.mark.parametrize("name", LANGUAGE)
def test_lora_that_training_left_unmerged_is_merged_as_peft_does(base, tmp_path, name, parts, layout):
    """The state of a model whose parts were wrapped by PEFT, as upstream's training saves it; alpha is twice the rank."""
    model, config = published(base(name)), json.loads((base(name) / "config.json").read_text())
    for part, key, rank, targets in (
        ("language", "use_llm_lora", 4, LANGUAGE[name]),
        ("vision", "use_backbone_lora", 8, VISION),
    ):
        if part in parts:
            inner = getattr(model, f"{part}_model")
            wrapped = peft.get_peft_model(inner, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
            setattr(model, f"{part}_model", shake(wrapped))
            config[key] = rank
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if layout == "before 0.7":
        state = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
    folder = shutil.copytree(base(name), tmp_path / "trained")
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    (folder / "config.json").write_text(json.dumps(config))
    for part in parts:
        setattr(model, f"{part}_model", getattr(model, f"{part}_model").merge_and_unload())
    checkpoint = Checkpoint(folder)
    assert check(checkpoint, model.state_dict()) > 3
    told = {"language": "language rank 4", "vision": "vision rank 8"}
    assert checkpoint.notes == ["merged LoRA: " + ", ".join(told[part] for part in parts)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"down_proj": 5}},
        {"alpha_pattern": {r"layers\.1\.mlp\..*": 3}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["mlp1"]},
        {"modules_to_save": ["mlp1"], "use_dora": True, "bias": "all", "rank_pattern": {"o_proj": 3}},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-phi3"])
@pytest.mark.parametrize("stored", ["safetensors", "bin"])
def test_adapters_are_merged_as_peft_does(base, tmp_path, name, settings, stored):
    targets = [*LANGUAGE[name], "mlp.fc1", "attn.proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings)
    model = shake(peft.get_peft_model(published(base(name)), config))
    model.save_pretrained(tmp_path, safe_serialization=stored == "safetensors")
    assert (tmp_path / f"adapter_model.{stored}").exists()
    wanted = copy.deepcopy(model).merge_and_unload().state_dict()
    assert check(Checkpoint(base(name), adapter=tmp_path), wanted) > 3


def test_a_fine_tuned_checkpoint_converts_and_says_so(tmp_path, capsys):
    """The proof runs against the merged reference; the folder's config.json asks for no LoRA any more."""
    output = convert(str(DATA / "golden" / "lora"), tmp_path / "out", ConvertOptions(weight_format="fp32")).folder
    assert "merged LoRA: language rank 4, vision rank 8" in capsys.readouterr().out.splitlines()
    config = json.loads((output / "config.json").read_text())
    assert not config["use_llm_lora"]
    assert not config["use_backbone_lora"]
    assert not [*output.glob("scratch-*")]


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("name", ["packed", "tiny-qwen2", "tiny-phi3"])
def test_merging_a_matrix_when_it_is_compressed_writes_the_same_bytes(base, tmp_path, monkeypatch, name, weight_format):
    """Beside merging all of a part before: packed attention, DoRA, and every matrix of both parts."""
    adapter = None
    if name == "packed":
        source = DATA / "golden" / "lora"
    else:
        source, adapter = base(name), str(tmp_path / "adapter")
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*LANGUAGE[name], *VISION], use_dora=True)
        shake(peft.get_peft_model(published(source), settings)).save_pretrained(adapter)
    options = ConvertOptions(weight_format=weight_format, recipe="fast", group_size=-1, adapter=adapter, verify=False)
    merged = []
    update = Update.merge
    monkeypatch.setattr(Update, "merge", lambda self, weight, out: merged.append(weight is out) or update(self, weight, out))
    later = convert(str(source), tmp_path / "later", options).folder
    assert len(merged) > 10
    monkeypatch.setattr("convert.pipeline._merges_later", lambda weight_format, checkpoint, options: False)
    before = convert(str(source), tmp_path / "before", options).folder
    for file in (PART_FILES[part] for part in PARTS):
        weights = file.replace(".xml", ".bin")
        assert (later / weights).read_bytes() == (before / weights).read_bytes(), file


@pytest.fixture
def trained(tmp_path):
    return shutil.copytree(DATA / "golden" / "lora", tmp_path / "trained")


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


PLACE = "language_model.base_model.model.model.layers.0.attention.wo"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop(f"{PLACE}.lora_B.default.weight"),
            r"1 adapted matrices have a lora_A without lora_B.*save the checkpoint again",
        ),
        (
            lambda t: t.pop(f"{PLACE}.lora_A.default.weight"),
            r"1 adapted matrices have a lora_A without lora_B.*save the checkpoint again",
        ),
        (
            lambda t: t.update({f"{PLACE}.lora_B.default.weight": torch.zeros(60, 4)}),
            r"the LoRA of language_model.*attention.wo.weight \[64, 64\] does not fit it: A is \[4, 64\], B \[60, 4\]",
        ),
        (lambda t: t.update({f"{PLACE}.lora_A.default.weight": torch.zeros(5, 64)}), r"use_llm_lora is 4, the LoRA .* rank 4, 5"),
        (
            lambda t: t.pop(f"{PLACE}.base_layer.weight"),
            r"lora_A.default.weight but not language_model.model.*save the checkpoint again",
        ),
    ],
    ids=["no B", "no A", "B of another shape", "another rank", "no matrix"],
)
def test_lora_that_does_not_fit_is_one_line(trained, edit, message):
    change(trained, edit)
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint(trained)
    assert "\n" not in str(raised.value)


def test_a_rank_that_the_tensors_contradict_is_told(trained):
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"use_backbone_lora": 16}))
    with pytest.raises(CheckpointError, match=r"use_backbone_lora is 16, the LoRA of the vision model has rank 8"):
        Checkpoint(trained)


def test_a_model_that_was_merged_before_is_taken_as_it_is(base, tmp_path):
    folder = shutil.copytree(base("tiny-qwen2"), tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_llm_lora": 16}))
    checkpoint = Checkpoint(folder)
    checkpoint.check(expected_shapes(checkpoint.config, tied=False))
    assert checkpoint.notes == [
        "config.json: use_llm_lora is 16, and there is no LoRA beside the language model: it was merged before"
    ]


def test_two_adapters_of_one_base_share_nothing(base, tmp_path):
    folders = []
    for seed in (1, 2):
        model = shake(peft.get_peft_model(published(base("tiny-qwen2")), peft.LoraConfig(target_modules=["q_proj"])), seed)
        model.save_pretrained(tmp_path / f"adapter-{seed}")
        options = ConvertOptions(weight_format="fp32", adapter=str(tmp_path / f"adapter-{seed}"), verify=False)
        folders.append(convert(str(base("tiny-qwen2")), tmp_path / f"out-{seed}", options).folder)
    first, second = ((folder / "openvino_language_model.bin").read_bytes() for folder in folders)
    assert first != second
    assert not any(file.is_symlink() or file.stat().st_nlink > 1 for folder in folders for file in folder.iterdir())
