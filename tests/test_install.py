"""python -m pytest tests/test_install.py

What a plain `pip install` brings: no torch, few megabytes, and everything that the commands use. The wheel is built here; what it
depends on is copied from this environment, by the same metadata that pip reads, so that nothing is fetched.
"""

import importlib.metadata as metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MOST_BYTES = 450e6
NAME = "internvl-openvino"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy, so that nothing is left beside the sources."""
    source = tmp_path_factory.mktemp("source")
    names = ["convert", "runtime", "demo", "pyproject.toml", "README.md", "LICENSE"]
    for name in names:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build_wheel(sources, tmp_path_factory.mktemp("wheel"))


def build_wheel(source: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True, timeout=300)
    return next(target.glob("*.whl"))


def needed(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """All distributions that these requirements bring, without extras that nobody asks for."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(Requirement(one), frozenset()) for one in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name not in found:
            found[name] = metadata.distribution(name)
            waiting += [(Requirement(one), frozenset(requirement.extras)) for one in found[name].requires or []]
    return found


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel and what it needs."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    own = metadata.Distribution.at(next(site.glob("internvl_openvino-*.dist-info")))
    for distribution in needed(own.requires or []).values():
        for file in distribution.files or []:
            source, target = Path(distribution.locate_file(file)), site / file
            if ".." not in file.parts and source.is_file() and source.suffix != ".pyc":
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
    return folder / "bin" / "python"


def run(python: Path, *arguments, cwd: Path, code: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_wheel_is_whole(wheel):
    """Every file of the packages that git knows is in it."""
    tracked = subprocess.run(["git", "ls-files", "convert", "runtime", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    if not tracked:
        pytest.skip("this is no checkout of the repository")
    with zipfile.ZipFile(wheel) as files:
        assert set(tracked.splitlines()) <= set(files.namelist())


def test_what_would_be_published_is_sound(sources, wheel, tmp_path):
    """The archive of the sources gives the same wheel, and both have a description that an index can show."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("internvl_openvino-*.tar.gz")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(archive), str(wheel)], check=True, timeout=120)
    again = build_wheel(archive, tmp_path / "again")
    with zipfile.ZipFile(wheel) as files, zipfile.ZipFile(again) as others:
        assert {file.filename: file.CRC for file in files.filelist} == {file.filename: file.CRC for file in others.filelist}


@pytest.mark.skipif(os.name == "nt", reason="an environment looks otherwise there")
def test_a_plain_installation_answers_in_few_megabytes(bare, shapes, tmp_path):
    site = next(bare.parents[1].glob("lib/python*/site-packages"))
    assert sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) < MOST_BYTES
    for name in ("torch", "transformers", "nncf", "optimum", "gradio", "fastapi"):
        assert not (site / name).exists()
    folder = shutil.copytree(shapes, tmp_path / "copied")
    picture = site / "demo" / "examples" / "shapes.png"
    said = run(bare, "-m", "runtime", "chat", folder, "Which shape is purple?", "--image", picture, cwd=tmp_path)
    assert said.splitlines()[0] == "circle"
    assert "InternViT" in run(bare, "-m", "runtime", "info", folder, cwd=tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="an environment looks otherwise there")
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["-m", "runtime", "serve", "FOLDER"], "serve"),
        (["-m", "demo", "FOLDER"], "demo"),
        (["-m", "convert", "somewhere"], "convert"),
        (["-m", "demo"], "convert"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_command_whose_extra_is_missing_names_it(bare, shapes, tmp_path, arguments, extra):
    arguments = [str(shapes) if each == "FOLDER" else each for each in arguments]
    said = run(bare, *arguments, cwd=tmp_path, code=2)
    assert f"is not installed: pip install 'internvl-openvino[{extra}]'" in said
    assert "Traceback" not in said


@pytest.mark.skipif(os.name == "nt", reason="an environment looks otherwise there")
@pytest.mark.parametrize(
    ("call", "extra"),
    [
        ("model.chat(model.tokenizer, None, 'Hi', {})", "torch"),
        ("model.batch_chat(model.tokenizer, None, ['Hi'], {})", "torch"),
        ("model.generate()", "torch"),
        ("model.extract_feature(None)", "torch"),
        ("runtime.load_image('a.png')", "torch"),
        ("runtime.load_video('a.mp4')", "torch"),
        ("runtime.pipeline", "serve"),
    ],
)
def test_a_call_whose_extra_is_missing_names_it(bare, shapes, tmp_path, call, extra):
    code = f"""
import runtime
model = runtime.OVInternVLChatModel({str(shapes)!r})
assert model.start_conversation().ask("Hello?")
try:
    {call}
except runtime.InternVLError as error:
    print(error)
"""
    said = run(bare, "-c", code, cwd=tmp_path)
    assert f"is not installed: pip install 'internvl-openvino[{extra}]'" in said
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="an environment looks otherwise there")
def test_pictures_are_embedded_without_any_extra_and_words_name_theirs(bare, converted, tmp_path):
    folder = converted(ROOT / "demo" / "contrast" / "checkpoint", weight_format="int8", verify=False)
    pictures = ROOT / "demo" / "examples"
    said = run(bare, "-m", "runtime", "embed", folder, pictures, "--out", tmp_path / "index.npz", cwd=tmp_path)
    assert f"{len([*pictures.glob('*.png')])} pictures, 128 numbers each" in said
    assert "shapes.png" in run(bare, "-m", "runtime", "search", "index.npz", "--image", pictures / "shapes.png", cwd=tmp_path)
    said = run(bare, "-m", "runtime", "search", "index.npz", "a red star", cwd=tmp_path, code=2)
    assert "sentencepiece is not installed: pip install 'internvl-openvino[search]'" in said
    assert "Traceback" not in said
