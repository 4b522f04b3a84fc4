"""python -m pytest tests/runtime/parts/test_rows.py

Matrices of a language part written anew as rows of int8, and answers whose single tokens are computed from them.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset

from demo.shapes.evaluate import EvaluateOptions, evaluate
from runtime import OVInternVLChatModel
from runtime.errors import DeviceError
from runtime.folder.files import DECODE_FILE, PART_FILES, TUNED_FILE, save_model
from runtime.folder.settings import keep, machine, reset
from runtime.parts import device, language_part, paged_cache
from runtime.parts.paged_cache import FEW
from runtime.parts.rows import to_int8_rows

ROOT = Path(__file__).parents[3]
PICTURE = ROOT / "demo" / "examples" / "shapes.png"
ROWS, WIDTH, GROUP = 24, 64, 16
QUESTIONS = ("Describe the picture.", "Which shape is purple?", "How many shapes are there?")


def compressed(kind: ov.Type, *, groups: bool, asymmetric: bool) -> tuple[ov.Model, np.ndarray]:
    """x (1, K) by a matrix (N, K) as NNCF stores it, and the matrix in float32."""
    rng = np.random.default_rng(0)
    shape = (ROWS, WIDTH // GROUP, GROUP) if groups else (ROWS, WIDTH)
    low, high = {ov.Type.u4: (0, 16), ov.Type.i4: (-8, 8), ov.Type.u8: (0, 256), ov.Type.i8: (-128, 128)}[kind]
    integers = rng.integers(low, high, shape)
    points = rng.integers(low, high, (*shape[:-1], 1))
    scales = rng.uniform(0.001, 0.02, (*shape[:-1], 1)).astype(np.float16)
    exact = (integers - points * asymmetric) * scales.astype(np.float32)
    given = opset.parameter([-1, WIDTH], np.float32)
    stored = opset.convert(opset.constant(integers, dtype=kind), np.float16)
    if asymmetric:
        stored = opset.subtract(stored, opset.convert(opset.constant(points, dtype=kind), np.float16))
    stored = opset.multiply(stored, opset.constant(scales))
    if groups:
        stored = opset.reshape(stored, [ROWS, WIDTH], special_zero=False)
    result = opset.matmul(given, opset.convert(stored, np.float32), transpose_a=False, transpose_b=True)
    return ov.Model([result], [given]), exact.reshape(ROWS, WIDTH)


def run(model: ov.Model, given: np.ndarray) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
    return compiled(given)[0]


@pytest.mark.parametrize("groups", [True, False], ids=["groups", "rows"])
@pytest.mark.parametrize("asymmetric", [True, False], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("kind", [ov.Type.u4, ov.Type.i4, ov.Type.u8, ov.Type.i8], ids=["u4", "i4", "u8", "i8"])
def test_a_weight_changes_by_half_a_step_of_its_row(kind, asymmetric, groups):
    model, exact = compressed(kind, groups=groups, asymmetric=asymmetric)
    eye = np.eye(WIDTH, dtype=np.float32)
    np.testing.assert_allclose(run(model, eye).T, exact, rtol=1e-3, atol=1e-6)
    assert to_int8_rows(model) == 1
    found = run(model, eye).T
    step = np.abs(exact).max(1, keepdims=True) / 127
    assert (np.abs(found - exact) <= 0.51 * step + 1e-3 * np.abs(exact)).all()  # scales are float16
    assert np.abs(found - exact).max() > 0, "the test is too easy"
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant" and op.get_element_type() == ov.Type.i8]
    assert [[*op.get_output_shape(0)] for op in constants] == [[ROWS, WIDTH]]


def test_small_rows_keep_their_steps():
    """Their scales are below what float16 holds with all of its digits."""
    model, _ = compressed(ov.Type.i8, groups=False, asymmetric=False)
    small = opset.constant(np.full((ROWS, 1), 3e-6, np.float16))
    multiply = next(op for op in model.get_ops() if op.get_type_name() == "Multiply")
    multiply.input(1).replace_source_output(small.output(0))
    model.validate_nodes_and_infer_types()
    eye = np.eye(WIDTH, dtype=np.float32)
    before = run(model, eye)
    assert to_int8_rows(model) == 1
    assert np.abs(run(model, eye) - before).max() <= 0.55 * np.abs(before).max() / 127


def test_rows_of_nothing_stay_nothing():
    model, _ = compressed(ov.Type.i8, groups=False, asymmetric=False)
    constant = next(op for op in model.get_ops() if op.get_type_name() == "Constant" and op.get_element_type() == ov.Type.i8)
    constant.output(0).replace(opset.constant(np.zeros((ROWS, WIDTH)), dtype=ov.Type.i8).output(0))
    assert to_int8_rows(model) == 1
    assert (run(model, np.ones((1, WIDTH), np.float32)) == 0).all()


def test_other_matrices_stay_as_they_are():
    """Plain ones, ones that are computed, stacks of experts."""
    given = opset.parameter([1, WIDTH], np.float32)
    plain = opset.matmul(given, opset.constant(np.ones((ROWS, WIDTH), np.float32)), transpose_a=False, transpose_b=True)
    other = opset.matmul(plain, opset.convert(opset.multiply(plain, plain), np.float32), transpose_a=False, transpose_b=True)
    stack = opset.multiply(opset.convert(opset.constant(np.ones((2, ROWS, WIDTH), np.int8)), np.float32), np.float32(2))
    experts = opset.matmul(opset.unsqueeze(given, 0), stack, transpose_a=False, transpose_b=True)
    assert to_int8_rows(ov.Model([other, experts], [given])) == 0


@pytest.fixture(scope="module")
def folders(converted, tmp_path_factory) -> tuple[Path, Path]:
    """The built-in model in int4, and the same with int8 weights of a scale a row in decode."""
    plain = converted(ROOT / "demo" / "shapes" / "checkpoint", weight_format="int4", verify=False)
    twice = shutil.copytree(plain, tmp_path_factory.mktemp("rows") / "shapes")
    model = ov.Core().read_model(plain / PART_FILES["language"])
    assert to_int8_rows(model) == 4 * 7 + 1, "all of four layers, and the head"
    save_model(model, twice / DECODE_FILE)
    second = {"file": DECODE_FILE, "properties": {}}
    keep(twice, "CPU", {"machine": machine(ov.Core(), "CPU"), "parts": {}, "decode": second})
    return plain, twice


def test_answers_cost_less_than_a_point(folders):
    """Of the built-in model: the first token is by the same weights as before, the others are not."""
    right = []
    for folder in folders:
        model = OVInternVLChatModel(folder)
        right.append(evaluate(model, EvaluateOptions(limit=100))["right"])
    assert abs(right[0] - right[1]) <= 2
    assert right[1] > 88


def test_guesses_are_checked_by_the_weights_of_single_tokens(folders):
    """Or an answer with lookup would be another one."""
    model = OVInternVLChatModel(folders[1])
    for question in QUESTIONS:
        answers = []
        for guesses in (0, 4):
            talk = model.start_conversation()
            talk.ask(question, images=[PICTURE], do_sample=False)
            answers.append(talk.ask("Describe the picture.", do_sample=False, prompt_lookup_num_tokens=guesses))
        assert answers[0] == answers[1]


def test_it_is_used_where_it_was_found_and_nowhere_else(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "PROCESSOR_CLASSES", device.PROCESSOR_CLASSES[1:])  # of which none wants two by itself

    def twice(folder: Path, *given, **options) -> bool:
        return "decode" in OVInternVLChatModel(folder, *given, **options).language_part._cache_options

    plain, both = folders
    assert twice(both)
    assert not twice(plain)
    assert not twice(both, tuned=False)
    assert not twice(both, precision="accuracy")
    assert not twice(both, "HETERO:CPU")
    own = shutil.copytree(both, tmp_path / "shapes")
    assert reset(own)
    assert not [*own.glob(f"{Path(DECODE_FILE).stem}*"), *own.glob(TUNED_FILE)]
    assert not twice(own)


@pytest.mark.parametrize("quiet", [True, False])
def test_what_the_class_of_a_processor_wants_comes_after_some_answers(shapes, monkeypatch, quiet):
    """In a quiet moment, or before the next answer if there is none; the answers stay right."""
    wants = replace(device.PROCESSOR_CLASSES[-1], tokens={"INFERENCE_PRECISION_HINT": "f32"}, needs=frozenset())
    monkeypatch.setattr(device, "PROCESSOR_CLASSES", (wants,))
    monkeypatch.setattr(language_part, "IDLE_SECONDS", 0.1 if quiet else 60)
    model = OVInternVLChatModel(shapes)
    part = model.language_part
    talk = model.start_conversation()
    for _ in range(language_part.ANSWERS_BEFORE):
        assert part._second is None
        assert talk.ask("Which shape is purple?", images=[PICTURE]) == "circle"
    deadline = time.monotonic() + 30
    while quiet and part._second is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (part._second is not None) == quiet
    assert talk.ask("Which shape is purple?", images=[PICTURE]) == "circle"  # over the pages that were there before
    assert part._second is not None
    assert talk._cache._decode is not talk._cache._prefill
    for count, by_prefill in ((FEW, False), (FEW + 1, True)):
        cache = part.new_cache()
        cache.feed(np.zeros((1, count, part._width), np.float32), np.ones((1, count), np.int64), np.arange(-count, 0))
        assert ("_prefill" in vars(cache)) == by_prefill, "a few tokens are read like decoded ones"
    talk.ask("Which shape is purple?", images=[PICTURE], temperature=1.0, seed=1)
    assert talk._cache._decode is talk._cache._prefill, "a seed repeats what it gave before"
    assert model.start_conversation().ask("Which shape is purple?", images=[PICTURE]) == "circle"


@pytest.mark.parametrize("pages", ["u4", "u8", "f16", "bf16"])
def test_pages_of_any_precision_grow_and_are_copied(shapes, monkeypatch, pages):
    """The oracle is a cache that has room from the start, and a conversation that copies nothing."""
    if pages == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    config = {"KEY_CACHE_PRECISION": pages, "VALUE_CACHE_PRECISION": pages}
    answers = []
    for first_pages in (64, 1):
        monkeypatch.setattr(paged_cache, "FIRST_PAGES", first_pages)
        model = OVInternVLChatModel(shapes, ov_config=config)
        for _ in range(2):  # the second one copies the pages of the first
            answers.append(model.start_conversation().ask("Describe the picture.", images=[PICTURE]))
    assert len({*answers}) == 1
    assert len(answers[0].split()) > 5


def test_decode_is_not_compiled_apart_where_memory_is_short(shapes, monkeypatch):
    wants = replace(device.PROCESSOR_CLASSES[-1], tokens={"INFERENCE_PRECISION_HINT": "f32"}, needs=frozenset())
    monkeypatch.setattr(device, "PROCESSOR_CLASSES", (wants,))
    size = (shapes / PART_FILES["language"]).with_suffix(".bin").stat().st_size
    for available, made in ((2 * size - 1, False), (2 * size, True)):
        monkeypatch.setattr(language_part.memory, "of_machine", lambda available=available: (10 * available, available))
        part = OVInternVLChatModel(shapes).language_part
        part.take_second()
        assert (part._second is not None) == made


def test_a_part_with_other_pages_is_told(tiny, converted, tmp_path):
    """Another model's of the same width."""
    own = shutil.copytree(converted(tiny("tiny-qwen2"), weight_format="fp32"), tmp_path / "model")
    other = converted(tiny("tiny-qwen3"), weight_format="fp32") / PART_FILES["language"]
    for suffix in (".xml", ".bin"):
        shutil.copy(other.with_suffix(suffix), (own / DECODE_FILE).with_suffix(suffix))
    second = {"file": DECODE_FILE, "properties": {}}
    keep(own, "CPU", {"machine": machine(ov.Core(), "CPU"), "parts": {}, "decode": second})
    with pytest.raises(DeviceError, match="needs another page layout: delete it with python -m runtime tune FOLDER --reset"):
        OVInternVLChatModel(own)
