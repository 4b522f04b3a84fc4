"""python -m pytest tests/runtime/measure/test_tune.py

Settings of a machine: found by measuring, kept in the folder, taken where they fit and nowhere else; the tiles that a time allows.
"""

import json
import shutil
import time
from pathlib import Path

import openvino as ov
import pytest

from runtime import OVInternVLChatModel
from runtime.__main__ import main
from runtime.errors import DeviceError, ModelFolderError, OptionError
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.settings import keep, machine, reset, settings_of, tiles_within
from runtime.measure import tune
from runtime.parts import device
from runtime.parts.device import Placement

ROOT = Path(__file__).parents[3]
PICTURE = ROOT / "demo" / "examples" / "shapes.png"
SECONDS = {"tile": 0.1, "prompt_token": 0.001, "token": 0.01}


@pytest.fixture(autouse=True)
def one_compilation(monkeypatch):
    """On every machine the default is one compilation of the language part; what AMX has of its own is test_device.py's."""
    monkeypatch.setattr(device, "PROCESSOR_CLASSES", device.PROCESSOR_CLASSES[1:])


@pytest.fixture
def folder(shapes, tmp_path):
    """A model folder of its own."""
    return shutil.copytree(shapes, tmp_path / "shapes")


def kept(folder: Path, **changes) -> dict:
    """Settings that say one thread a part, as if they had been found here."""
    core = ov.Core()
    found = {"machine": machine(core, "CPU"), "parts": {part: {"INFERENCE_NUM_THREADS": 1} for part in ("vision", "language")}}
    found |= {"seconds": SECONDS} | changes
    keep(folder, "CPU", found)
    return found


def threads(folder: Path, **options) -> list[int]:
    """Of the vision and the language part."""
    model = OVInternVLChatModel(folder, **options)
    return [part._compiled.get_property("INFERENCE_NUM_THREADS") for part in (model._vision, model.language_part)]


def test_what_was_found_is_used(folder):
    assert threads(folder, tuned=False) != [1, 1], "this test needs two cores"
    kept(folder)
    assert threads(folder) == [1, 1]


def test_the_callers_own_properties_win(folder):
    kept(folder)
    assert threads(folder, ov_config={"INFERENCE_NUM_THREADS": 2}) == [2, 2]
    assert threads(folder, part_config={"vision": {"INFERENCE_NUM_THREADS": 2}}) == [2, 1]


@pytest.mark.parametrize("changes", [{"processor": "another one"}, {"able": "FP32"}, {"openvino": "2020.1"}])
def test_another_machine_takes_nothing(folder, changes):
    kept(folder, machine=machine(ov.Core(), "CPU") | changes)
    assert settings_of(folder, ov.Core(), "CPU") is None
    assert threads(folder) != [1, 1]


def test_precision_accuracy_takes_nothing(folder):
    kept(folder)
    assert threads(folder, precision="accuracy") != [1, 1]


def test_devices_are_kept_apart_and_forgotten_together(folder):
    found = kept(folder)
    keep(folder, "GPU", {"parts": {}})
    assert settings_of(folder, ov.Core(), "CPU") == found
    assert settings_of(folder, ov.Core(), "CPU.7") is None
    assert reset(folder)
    assert not reset(folder)
    assert settings_of(folder, ov.Core(), "CPU") is None


def test_a_broken_file_is_told(folder):
    (folder / "tuned.json").write_text("{")
    with pytest.raises(OptionError, match="--reset removes it"):
        OVInternVLChatModel(folder)
    assert main(["tune", str(folder), "--reset"]) == 0
    OVInternVLChatModel(folder)


def plans(*found):
    """In place of `candidates`: these for both parts, none for single tokens."""
    return lambda core, device, stage: iter(() if stage == "decode" else found)


def test_it_measures_the_parts_and_says_what_was_refused(folder, monkeypatch):
    monkeypatch.setattr(tune, "LEAST_SECONDS", 0.3)
    threads = {"SCHEDULING_CORE_TYPE": "ANY_CORE", "INFERENCE_NUM_THREADS": 2}
    found = ("one thread", {"INFERENCE_NUM_THREADS": 1}), ("nonsense", {"NO_SUCH_PROPERTY": 1}), ("the same", threads)
    monkeypatch.setattr(tune, "candidates", plans(*found))
    monkeypatch.setattr(tune._Trial, "threads", property(lambda trial: 2, lambda trial, found: None), raising=False)
    heard: list[tuple] = []
    found = tune.tune(folder, report=lambda *told: heard.append(told))
    assert found == settings_of(folder, ov.Core(), "CPU")
    assert [trial["candidate"] for trial in found["tried"]] == ["one thread", "nonsense", "the same"] * 2
    assert all("NO_SUCH_PROPERTY" in trial["refused"] for trial in found["tried"][1::3])
    assert all(trial["refused"] == "the default's threads" for trial in found["tried"][2::3])
    assert all(found["seconds"][name] > 0 for name in ("tile", "prompt_token", "token"))
    assert 0 <= found["agreement"] <= 1
    assert [told[1] for told in heard] == list(range(heard[-1][2]))
    assert found["parts"].keys() == {"vision", "language"}
    assert found["decode"] is None


def test_a_gain_must_show_twice(folder, monkeypatch):
    """A candidate that is slow only when it is looked at again does not stay."""
    gains = iter([0.5, 0.0, 0.5, 0.4])  # vision: found and lost; language: found and found again
    monkeypatch.setattr(tune, "candidates", plans(("one thread", {"INFERENCE_NUM_THREADS": 1})))
    monkeypatch.setattr(tune, "_beside", lambda one, other, stage, config: (next(gains), one(), other()))
    monkeypatch.setattr(tune, "_accuracy", lambda folder, device: None)
    found = tune.tune(folder)
    assert found["parts"] == {"vision": {}, "language": {"INFERENCE_NUM_THREADS": 1}}
    assert found["gain"] == {"vision": 0.0, "language": 0.4}
    assert found["agreement"] == 1, "threads change no token of this model"


@pytest.mark.parametrize(("times", "stays"), [((1.0, 0.8), True), ((1.0, 0.95), False), ((1.0, 1.3), False)])
def test_single_tokens_get_weights_of_their_own_where_that_is_worth_it(folder, monkeypatch, times, stays):
    """What it costs is told on the questions of the built-in model."""
    monkeypatch.setattr(tune, "RULER_QUESTIONS", 50)
    offered = "int8 weights", {"rows": True}
    monkeypatch.setattr(tune, "candidates", lambda core, device, stage: iter([offered] if stage == "decode" else []))
    seconds = {False: times[0], True: times[1]}
    monkeypatch.setattr(
        tune, "_language_seconds", lambda language, _: SECONDS | {"token": seconds["decode" in language._cache_options]}
    )
    found = tune.tune(folder)
    files = {"tuned_decode.xml", "tuned_decode.bin"}
    assert {file.name for file in folder.iterdir() if "tuned_decode" in file.name} == (files if stays else set())
    assert ("decode" in OVInternVLChatModel(folder).language_part._cache_options) == stays
    if not stays:
        assert (found["decode"], found["accuracy"]) == (None, None)
        return
    assert found["gain"]["decode"] == pytest.approx(0.2)
    assert found["decode"] == {
        "file": "tuned_decode.xml",
        "properties": {},
        "bytes": (folder / "tuned_decode.bin").stat().st_size,
    }
    assert found["accuracy"]["default"] > 0.8
    assert abs(found["accuracy"]["default"] - found["accuracy"]["tuned"]) <= 0.021
    assert found["agreement"] > 0.25, "of answers about noise"


def test_another_model_has_no_ruler(tiny, converted):
    assert tune._accuracy(converted(tiny("tiny-qwen2"), weight_format="fp32"), "CPU") is None


def test_what_is_worth_a_try_is_known_to_this_device(folder):
    core = ov.Core()
    model = core.read_model(folder / "openvino_vision_embeddings_model.xml")
    offered = dict(tune.candidates(core, "CPU", "vision"))
    assert len(offered) >= 4
    for properties in offered.values():
        core.compile_model(model, "CPU", properties)
    assert {"rows": True} in dict(tune.candidates(core, "CPU", "decode")).values()


def test_two_compilations_are_offered_where_there_is_bf16():
    class Core:
        available_devices = ("CPU",)

        def get_property(self, device, name):
            return ["FP32", "INT8", "BF16"]

    offered = [more for _, more in tune.candidates(Core(), "CPU", "decode")]
    assert {"INFERENCE_PRECISION_HINT": "f32"} in offered
    assert not [*tune.candidates(Core(), "HETERO:CPU", "decode")]


def test_single_tokens_may_use_the_parts_own_file(folder, monkeypatch):
    """As where a processor computes prompts in bfloat16: nothing is written beside the part."""
    offered = "computed in f32", {"INFERENCE_PRECISION_HINT": "f32"}
    monkeypatch.setattr(tune, "candidates", lambda core, device, stage: iter([offered] if stage == "decode" else []))
    monkeypatch.setattr(tune, "_beside", lambda one, other, stage, config: (0.3, one(), other()))
    monkeypatch.setattr(tune, "_accuracy", lambda folder, device: None)
    found = tune.tune(folder)
    assert found["decode"]["file"] == "openvino_language_model.xml"
    assert not [*folder.glob("*tuned_decode*")]
    model = OVInternVLChatModel(folder)
    assert "decode" in model.language_part._cache_options
    assert model.start_conversation().ask("Which shape is purple?", images=[PICTURE]) == "circle"
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert found["agreement"] == 1, "float32 beside float32"


def test_another_device_leaves_the_processors_part_alone(folder):
    for suffix in (".xml", ".bin"):
        shutil.copy((folder / "openvino_language_model.xml").with_suffix(suffix), folder / f"tuned_decode{suffix}")
    gpu = Placement("language", "GPU", {})
    config = InternVLConfig.from_dict(read_config(folder / "config.json"))
    assert tune._tune_decode(folder, ov.Core(), gpu, None, config, pytest.fail, pytest.fail) is None
    assert (folder / "tuned_decode.xml").exists()


@pytest.mark.parametrize("device", ["AUTO", "HETERO:CPU"])
def test_devices_made_of_others_are_not_tuned(folder, device):
    with pytest.raises(DeviceError, match=f"{device} combines devices: tune one of them, like CPU"):
        tune.tune(folder, device)


@pytest.mark.parametrize(
    ("gains", "found"), [((0.0, 0.0), ("CPU", "CPU")), ((0.0, 0.3), ("CPU", "GPU")), ((0.2, 0.3), ("GPU", "GPU"))]
)
def test_auto_is_what_won_of_each_part(folder, monkeypatch, gains, found):
    """HETERO stands in for a GPU that is timed: which one wins is said here."""
    gain = dict(zip(("language", "vision"), gains, strict=True))
    monkeypatch.setattr(tune, "candidates", lambda core, device, stage: iter(()))
    monkeypatch.setattr(tune, "_beside", lambda one, other, stage, config: (gain[stage], one(), other()))
    placed = tune.place_parts
    monkeypatch.setattr(
        tune,
        "place_parts",
        lambda core, folder, name, **more: placed(core, folder, "HETERO:CPU" if name == "GPU" else name, **more),
    )
    real = ov.Core

    class Laptop:
        available_devices = ("CPU", "GPU")

        def __init__(self):
            self._core = real()

        def __getattr__(self, name):
            return getattr(self._core, name)

        def get_property(self, device, name):
            return self._core.get_property("CPU", name)

    monkeypatch.setattr(tune.ov, "Core", Laptop)
    tuned = tune.tune(folder, "auto")
    assert (tuned["device"], tuned["vision_device"]) == found
    assert [trial["candidate"] for trial in tuned["tried"]] == ["on GPU", "on GPU"]
    assert settings_of(folder, Laptop(), "auto") == tuned


def test_auto_is_taken_by_the_commands(folder, capsys, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda core, device, stage: iter(()))
    assert main(["tune", str(folder), "--device", "auto"]) == 0
    out = capsys.readouterr().out
    if len(ov.Core().available_devices) == 1:
        assert "auto: language on CPU, vision on CPU" in out
    assert json.loads(out.splitlines()[-1]).keys() == {"device", "vision_device", "seconds", "gain"}
    assert main(["chat", str(folder), "Which shape is purple?", "--image", str(PICTURE), "--device", "auto"]) == 0
    said = capsys.readouterr()
    assert said.out == "circle\n"
    assert "device auto: language on" in said.err
    assert "the fastest that tune measured" in said.err


def test_a_folder_that_cannot_be_written_is_told(folder, monkeypatch):
    monkeypatch.setattr(tune.os, "access", lambda path, mode: False)
    with pytest.raises(ModelFolderError, match="cannot be written"):
        tune.tune(folder)


@pytest.mark.parametrize(("seconds", "tiles"), [(0.01, 1), (0.35, 2), (1.0, 7), (1.4, 11), (100, 12)])
def test_tiles_that_fit_into_a_time(folder, seconds, tiles):
    """A tile takes 0.1 s and 16 tokens of 1 ms, and there is a thumbnail."""
    config = InternVLConfig.from_dict(read_config(folder / "config.json") | {"max_dynamic_patch": 12})
    assert (config.use_thumbnail, config.tokens_per_tile) == (True, 16)
    assert tiles_within({"seconds": SECONDS}, seconds, config) == tiles


def test_a_time_that_is_none_is_told(folder):
    with pytest.raises(OptionError, match="positive number of seconds"):
        tiles_within({"seconds": SECONDS}, 0, InternVLConfig.from_dict(read_config(folder / "config.json")))


def test_the_command_line(folder, capsys, monkeypatch):
    ask = ["chat", str(folder), "Which shape is purple?", "--image", str(PICTURE), "--max-tiles", "auto"]
    assert main(ask) == OptionError.exit_code
    assert f"run  python -m runtime tune {folder}  first" in capsys.readouterr().err
    monkeypatch.setattr(tune, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(tune, "RULER", "no_such_package.exam")  # right answers are counted in another test
    started = time.process_time()
    assert main(["tune", str(folder)]) == 0
    assert time.process_time() - started < 120
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert any(line.startswith("vision    threads on performance cores") for line in out)
    assert any(line.startswith("decode    int8 weights, a scale a row") for line in out)
    assert any(line.startswith("decode: ") for line in out)
    assert found["parts"] == settings_of(folder, ov.Core(), "CPU")["parts"]
    assert main([*ask, "--first-token", "0.000001"]) == 0
    told = capsys.readouterr()
    assert told.out == "circle\n"
    assert "up to 1 tiles a picture" in told.err
    assert main(["tune", str(folder), "--reset"]) == 0
    assert "the defaults apply again" in capsys.readouterr().out
    assert main(["tune", str(folder), "--reset"]) == 0
    assert "there are no tuned settings" in capsys.readouterr().out


def test_what_cannot_be_tuned(tmp_path, folder):
    with pytest.raises(ModelFolderError, match="does not exist"):
        tune.tune(tmp_path / "none")
    with pytest.raises(DeviceError, match="there is no device NPU9 here"):
        tune.tune(folder, "NPU9")
