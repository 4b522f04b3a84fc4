"""python -m pytest tests/test_docs.py

What the documents say is so: commands parse, code runs, help is the real help, files and links exist, the book builds.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import convert.__main__
import convert.compare
import demo.__main__
import demo.contrast.__main__
import runtime.__main__
from tests import family, options_page
from tests.checkpoints import CONFIGS

ROOT = Path(__file__).parents[1]
BUILT_IN = ROOT / "demo" / "shapes" / "checkpoint"
DOCS = ROOT / "docs"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITH_PYTHON = {  # how many blocks each has
    "README.md": 1,
    **{f"docs/{name}.md": 4 if name == "python" else 1 for name in ("convert", "python", "boxes", "batch", "search")},
}
MOST_LINES = {"README.md": 150, "ARCHITECTURE.md": 120}


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)


def commands(starting: str) -> list[str]:
    lines = [
        re.split(r"\s#", line)[0].strip()
        for document in DOCUMENTS
        for block in code_blocks(document.read_text(encoding="utf-8"))
        for line in block.splitlines()
    ]
    return sorted({line for line in lines if line.startswith(starting)})


COMMANDS = {
    "convert": convert.__main__.parser,
    convert.__main__.COMPARE: convert.compare.parser,  # of convert
    "runtime": runtime.__main__.parser,
    "demo": demo.__main__.parser,
    "demo.contrast": demo.contrast.__main__.parser,
}


@pytest.mark.parametrize("command", [command for name in COMMANDS for command in commands(f"python -m {name} ")])
def test_commands_parse(command):
    name, *arguments = shlex.split(command)[2:]
    if "--help" in arguments:
        return
    if arguments[:1] == [convert.__main__.COMPARE]:
        name, *arguments = arguments
    COMMANDS[name]().parse_args(arguments)


def test_the_answer_on_the_first_screen_is_the_real_one(converted, capsys):
    """What the first command prints, as the README has it; times and speeds are of its run."""
    shown = next(block.splitlines() for block in code_blocks(README) if "first token after" in block)
    recipe = re.search(r"^quickstart:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    _, question, *rest = shlex.split(recipe.split("runtime chat ")[1])
    folder = converted(BUILT_IN, weight_format="int4")
    capsys.readouterr()
    assert runtime.__main__.main(["chat", str(folder), question, rest[0], str(ROOT / rest[1])]) == 0
    said = "".join(capsys.readouterr()).splitlines()
    assert [*map(without_times, said)] == [*map(without_times, shown)]


def test_what_search_prints_is_the_real_thing(converted, capsys, tmp_path, monkeypatch):
    """The example of docs/search.md; scores are those of a processor, up to two digits."""
    page = (DOCS / "search.md").read_text(encoding="utf-8")
    shown = next(block.splitlines() for block in code_blocks(page) if re.match(r"0\.\d{4}  demo/examples", block))
    folder = converted(ROOT / "demo" / "contrast" / "checkpoint", weight_format="int8", verify=False)
    words, count = re.search(r'python -m runtime search build/examples.npz "(.*)" --top (\d)', page).groups()
    monkeypatch.chdir(ROOT)
    assert runtime.__main__.main(["embed", str(folder), "demo/examples", "--out", str(tmp_path / "examples.npz")]) == 0
    capsys.readouterr()
    assert runtime.__main__.main(["search", str(tmp_path / "examples.npz"), words, "--top", count]) == 0
    for said, wanted in zip(capsys.readouterr().out.splitlines(), shown, strict=True):
        assert said.split()[1] == wanted.split()[1]
        assert float(said.split()[0]) == pytest.approx(float(wanted.split()[0]), abs=0.02)


def without_times(line: str) -> str:
    return re.sub(r"\d+\.\d+", "0.0", line)


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_of_a_page_runs(document, converted, video, tmp_path):
    """From its first line to its last one, with the built-in models in the place of the real ones."""
    shutil.copytree(converted(BUILT_IN, weight_format="int4"), tmp_path / "InternVL2-1B-int4")
    contrast = converted(ROOT / "demo" / "contrast" / "checkpoint", weight_format="int8", verify=False)
    shutil.copytree(contrast, tmp_path / "InternVL-14B-224px-int4")
    Image.open(ROOT / "demo" / "examples" / "shapes.png").save(tmp_path / "photo.jpg")
    shutil.copy(video, tmp_path / "clip.mp4")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == WITH_PYTHON[document]
    code = "\n".join(blocks).replace("OpenGVLab/InternVL2-1B", str(BUILT_IN))
    code = code.replace("max_num=12", "input_size=112")  # its tiles are smaller
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_all_python_of_the_documents_is_run():
    assert {str(path.relative_to(ROOT)) for path in DOCUMENTS if "```python" in path.read_text(encoding="utf-8")} == {*WITH_PYTHON}


@pytest.mark.parametrize("command", commands("make "))
def test_make_targets_exist(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_options_are_the_real_help():
    assert (DOCS / "options.md").read_text(encoding="utf-8") == options_page.page(), (
        "python -m tests.options_page > docs/options.md"
    )


@pytest.mark.parametrize("document", MOST_LINES)
def test_what_one_reads_first_is_short(document):
    assert len((ROOT / document).read_text(encoding="utf-8").splitlines()) <= MOST_LINES[document]


def test_the_book_builds(tmp_path):
    """Strictly: no page is left out, no link or anchor leads nowhere; and no page asks the web for anything."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.findall(r'(?:src|<link[^>]* href)="(?:https?:)?//[^"]*', page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("package", ["convert", "runtime", "demo"])
def test_help_answers_at_once(package):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", package, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert not re.search(r"\| +(torch|openvino|transformers)$", done.stderr, flags=re.MULTILINE)


def test_the_family_in_the_book_is_the_computed_one():
    assert "\n".join(family.rows()) in (DOCS / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("InternVL2-1B", (136.3, 315.5, 324.8)),
        ("InternVL2-2B", (189.8, None, 976.9)),
        ("InternVL2-4B", (98.5, None, 1984.7)),
        ("InternVL2-8B", (379.4, None, 4009.4)),
    ],
)
def test_computed_sizes_are_those_of_the_files(name, measured):
    """What conversions of random weights of these shapes wrote, in megabytes: text embeddings, vision, language."""
    for found, size in zip(measured, family.int4_bytes(CONFIGS[name]).values(), strict=True):
        assert found is None or size / 1e6 == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target
        assert DOCS not in document.parents or DOCS in (document.parent / target).resolve().parents, "not in the book"


def test_what_github_reads_is_what_it_expects():
    """A form with a wrong key, or a workflow with a step that does nothing, is only told there."""
    forms = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    assert forms
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        assert all(field["attributes"] and field["type"] in ("markdown", "textarea", "input", "dropdown") for field in form["body"])
    for job in yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"].values():
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    for hook in hooks:
        assert hook["entry"].split()[0].startswith(".venv/bin/")


def test_every_test_file_has_its_oracle():
    page = (DOCS / "tests.md").read_text(encoding="utf-8")
    assert [file.name for file in (ROOT / "tests").rglob("test_*.py") if f"{file.stem}`" not in page] == []


def test_notebooks_are_kept_without_outputs():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert 20 <= len(cells) <= 30
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_file_map_is_the_tree():
    """Every Python file of the packages stands in docs/tree.md, and nothing else does."""
    block = next(block for block in code_blocks((DOCS / "tree.md").read_text(encoding="utf-8")) if block.startswith("convert/"))
    listed, folders = set(), []
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            listed.add("".join(folders) + name)
    tree = {str(p.relative_to(ROOT)) for package in ("convert", "runtime", "demo") for p in (ROOT / package).rglob("*.py")}
    tree = {path for path in tree if not path.endswith("/__init__.py") or path.count("/") == 1}
    assert listed == tree
