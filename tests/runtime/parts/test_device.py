"""python -m pytest tests/runtime/parts/test_device.py

Which device and which properties a part gets. There is no GPU where this is tested: a stand-in lists devices, and only the choice
is checked, not what a GPU computes.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset

from runtime import OVInternVLChatModel
from runtime.errors import DeviceError, ModelFolderError, OptionError
from runtime.folder.files import PARTS
from runtime.parts.device import Placement, check_device, place_parts, processor_class
from runtime.parts.part import ACTIVATION_GROUP, activation_groups, compile_part, read_part

FOLDER = Path("somewhere")


@dataclass
class StandIn:
    """A machine with these devices."""

    available_devices: list[str] = field(default_factory=lambda: ["CPU", "GPU.0", "GPU.1", "NPU"])
    able: tuple[str, ...] = ("FP32", "INT8", "BIN")
    gpu_able: tuple[str, ...] = ("FP16",)
    gpu_type: str = "Type.INTEGRATED"

    def get_property(self, device: str, name: str) -> list[str] | str:
        if name == "OPTIMIZATION_CAPABILITIES":
            return [*(self.able if device == "CPU" else self.gpu_able)]
        return {"FULL_DEVICE_NAME": f"some {device}", "DEVICE_TYPE": self.gpu_type}[name]


LAPTOP = StandIn(["CPU", "GPU"])


@pytest.mark.parametrize(
    "device", ["CPU", "GPU", "GPU.0", "GPU.1", "NPU", "AUTO", "AUTO:GPU,CPU", "AUTO:-NPU", "HETERO:GPU.1,CPU", "MULTI:GPU.0(2),CPU"]
)
def test_devices_that_are_there_are_taken(device):
    check_device(StandIn(), device)


@pytest.mark.parametrize(
    ("device", "named"),
    [("TPU", "TPU"), ("GPU.2", "GPU.2"), ("HETERO:GPU,FPGA", "FPGA"), ("cpu", "cpu"), ("", ""), ("AUTO:NPU9", "NPU9")],
)
def test_devices_that_are_not_there_are_told_with_those_that_are(device, named):
    with pytest.raises(DeviceError, match=f"there is no device {named} here; there are CPU, GPU.0, GPU.1, NPU"):
        check_device(StandIn(), device)


def test_the_only_gpu_has_a_number_too():
    check_device(LAPTOP, "GPU.0")


def test_a_processor_gets_latency_and_nothing_else():
    for placement in place_parts(LAPTOP, FOLDER, "CPU").values():
        assert placement.device == "CPU"
        assert placement.properties == {"PERFORMANCE_HINT": "LATENCY"}


AMX = StandIn(["CPU", "GPU"], ("BF16", "WINOGRAD", "FP32", "FP16", "INT8"))


def test_single_tokens_are_compiled_apart_where_the_class_of_the_processor_wants_it():
    placed = place_parts(AMX, FOLDER, "CPU")
    assert placed["later"] == Placement("language", "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})
    assert "INFERENCE_PRECISION_HINT" not in placed["language"].properties


@pytest.mark.parametrize(
    "given",
    [
        {"device": "GPU"},
        {"precision": "accuracy"},
        {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
        {"part_config": {"language": {"KV_CACHE_PRECISION": "f16"}}},
        {"tuned": lambda device: {"parts": {"language": {"INFERENCE_PRECISION_HINT": "f32"}}, "decode": None}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_who_says_how_exact_it_is_to_be_gets_one_compilation(given):
    assert "later" not in place_parts(AMX, FOLDER, **{"device": "CPU"} | given)


def test_a_processor_that_nobody_measured_gets_the_defaults_of_openvino():
    unknown = StandIn(["CPU"], ("FP32",))
    assert processor_class(unknown) is None
    assert place_parts(unknown, FOLDER, "CPU").keys() == {*PARTS}
    assert activation_groups(unknown, product(ov.Type.u4, 7, 128), Placement("language", "CPU", {})) == {}
    assert [processor_class(each).name for each in (AMX, LAPTOP)] == ["AMX", "AVX2 to AVX-512 VNNI"]


def product(kind: ov.Type, *row: int) -> ov.Model:
    """x (1, K) by weights whose rows are stored like that: (K,), or (groups, K / groups)."""
    given = opset.parameter([1, math.prod(row)], np.float32)
    stored = opset.multiply(opset.convert(opset.constant(np.ones((16, *row)), dtype=kind), np.float32), np.float32(0.1))
    weights = opset.reshape(stored, [16, -1], special_zero=False)
    return ov.Model([opset.matmul(given, weights, transpose_a=False, transpose_b=True)], [given])


@pytest.mark.parametrize(
    ("kind", "row", "properties", "group"),
    [
        (ov.Type.u4, (7, 128), {}, 128),
        (ov.Type.i4, (2, 256), {}, 128),
        (ov.Type.u4, (4, 64), {}, 64),
        (ov.Type.u4, (4, 32), {}, None),
        (ov.Type.u8, (896,), {}, 128),
        (ov.Type.i8, (192,), {}, 64),
        (ov.Type.i8, (160,), {}, None),
        (ov.Type.f16, (896,), {}, None),
        (ov.Type.u4, (7, 128), {ACTIVATION_GROUP: 32}, 32),
        (ov.Type.u4, (7, 128), {"EXECUTION_MODE_HINT": "ACCURACY"}, 0),
    ],
)
def test_activations_are_quantised_in_the_groups_of_the_weights(kind, row, properties, group):
    model = product(kind, *row)
    found = compile_part(ov.Core(), Path(), model, Placement("vision", "CPU", properties)).get_property(ACTIVATION_GROUP)
    assert found == (ov.Core().get_property("CPU", ACTIVATION_GROUP) if group is None else group)


def test_other_devices_group_activations_as_they_like():
    class Core:
        def compile_model(self, model, device, properties):
            return properties

    assert compile_part(Core(), Path(), product(ov.Type.u4, 7, 128), Placement("vision", "GPU", {"NUM_STREAMS": 1})) == {
        "NUM_STREAMS": 1
    }


def test_a_gpu_keeps_what_it_compiled_and_leaves_the_embedding_table_to_the_processor():
    placed = place_parts(LAPTOP, FOLDER, "GPU")
    assert {part: placement.device for part, placement in placed.items()} == {
        "text_embeddings": "CPU",
        "vision": "GPU",
        "language": "GPU",
    }
    assert placed["language"].properties["CACHE_DIR"] == str(FOLDER / "model_cache")
    assert "CACHE_DIR" not in placed["text_embeddings"].properties
    assert "INFERENCE_PRECISION_HINT" not in placed["vision"].properties


@pytest.mark.parametrize("device", ["GPU", "AUTO", "HETERO:GPU,CPU"])
def test_a_wide_vision_transformer_computes_in_float32_on_a_gpu(device):
    placed = place_parts(LAPTOP, FOLDER, device, wide_vision=True)
    assert placed["vision"].properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert "INFERENCE_PRECISION_HINT" not in placed["language"].properties
    assert "INFERENCE_PRECISION_HINT" not in place_parts(StandIn(["CPU"]), FOLDER, "CPU", wide_vision=True)["vision"].properties


def test_parts_go_to_devices_of_their_own_and_callers_properties_win():
    placed = place_parts(
        LAPTOP,
        FOLDER,
        "CPU",
        vision_device="GPU",
        cache_dir="kept",
        ov_config={"NUM_STREAMS": 1, "PERFORMANCE_HINT": "THROUGHPUT"},
        part_config={"language": {"NUM_STREAMS": 2}},
    )
    assert [placed[part].device for part in ("vision", "language")] == ["GPU", "CPU"]
    assert placed["vision"].properties == {"PERFORMANCE_HINT": "THROUGHPUT", "CACHE_DIR": "kept", "NUM_STREAMS": 1}
    assert placed["language"].properties["NUM_STREAMS"] == 2


@pytest.mark.parametrize(("device", "kept"), [("CPU", "f32"), ("GPU", "f16"), ("AUTO:GPU,CPU", "f16")])
def test_accuracy_executes_in_full_precision_with_an_unquantised_cache(device, kept):
    placed = place_parts(LAPTOP, FOLDER, device, precision="accuracy")
    assert all(placed[part].properties["EXECUTION_MODE_HINT"] == "ACCURACY" for part in placed)
    assert placed["language"].properties["KV_CACHE_PRECISION"] == kept
    assert "KV_CACHE_PRECISION" not in placed["vision"].properties


def test_unknown_precisions_and_parts_are_told():
    with pytest.raises(OptionError, match="precision 'best' is not known; known are default, accuracy"):
        place_parts(LAPTOP, FOLDER, "CPU", precision="best")
    with pytest.raises(OptionError, match="part_config names audio; the parts are text_embeddings, vision, language"):
        place_parts(LAPTOP, FOLDER, "CPU", part_config={"audio": {}})


def test_the_saved_language_part_tells_a_gpu_to_scale_down(tiny, converted):
    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    model = ov.Core().read_model(folder / "openvino_language_model.xml")
    assert float(model.get_rt_info(["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]).value) == 8.0


def test_accuracy_is_closer_to_the_reference_than_the_default(tiny, converted):
    """Here the default stores the KV cache in 16 bits."""
    torch = pytest.importorskip("torch")
    from convert.checkpoint import Checkpoint
    from convert.reference.model import InternVLChatModel

    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    reference = InternVLChatModel.from_checkpoint(Checkpoint(tiny("tiny-qwen2")))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids = torch.tensor([reference.tokenizer.encode("Hello there, what is this about?")])
    wanted = reference.generate(input_ids=ids, **options)
    off = {}
    for precision in ("default", "accuracy"):
        found = OVInternVLChatModel(folder, precision=precision).generate(input_ids=ids, **options)
        same = [i for i in range(6) if np.array_equal(found.sequences[0, :i], wanted.sequences[0, :i])]
        off[precision] = max(float((found.logits[i] - wanted.logits[i]).abs().max()) for i in same)
    assert off["accuracy"] < 2e-4
    assert off["accuracy"] <= off["default"]


def test_a_device_of_its_own_and_a_model_cache_are_used(tiny, converted, tmp_path):
    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    model = OVInternVLChatModel.from_pretrained(
        folder, "CPU", vision_device="AUTO:CPU", cache_dir=tmp_path / "kept", torch_dtype="bfloat16", trust_remote_code=True
    ).eval()
    assert model.start_conversation().ask("What?", images=np.zeros((56, 56, 3), np.uint8), max_new_tokens=3) is not None
    assert any((tmp_path / "kept").iterdir())


def test_a_property_that_a_device_does_not_know_is_told(tiny, converted):
    with pytest.raises(DeviceError, match=r"CPU cannot run the text_embeddings part \(.*NO_SUCH_THING"):
        OVInternVLChatModel(converted(tiny("tiny-qwen2"), weight_format="fp32"), ov_config={"NO_SUCH_THING": 1})


def test_a_broken_part_is_told(tiny, converted, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(converted(tiny("tiny-qwen2"), weight_format="fp32"), folder)
    xml = folder / "openvino_language_model.xml"
    text = xml.read_text()
    for content in (text[: len(text) // 2], text.replace('opset1"', 'opset999"')):
        xml.write_text(content)
        with pytest.raises(ModelFolderError, match=r"openvino_language_model\.xml cannot be read .*convert the checkpoint again"):
            OVInternVLChatModel(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_model_is_told(tiny, converted, part):
    folder = converted(tiny("tiny-qwen2"), weight_format="fp32")
    with pytest.raises(ModelFolderError, match=r"has embeddings of width 64, config\.json says 96: the folder mixes two models"):
        read_part(ov.Core(), folder, Placement(part, "CPU", {}), 96)
    assert read_part(ov.Core(), folder, Placement(part, "CPU", {}), 64)
