"""python -m pytest tests/test_layers.py

The dependency rule of ARCHITECTURE.md: who may import whom, and that an import does nothing heavy.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"convert", "runtime", "demo"}
MAY_IMPORT = {"runtime": {"runtime"}, "convert": {"convert", "runtime"}, "demo": {"demo", "runtime", "convert"}}
FLOORS = [  # of runtime, bottom up; rooms of one floor do not know each other
    {"runtime", "runtime.errors", "runtime.progress", "runtime.terminal"},
    {"runtime.folder"},
    {"runtime.media", "runtime.parts"},
    {"runtime.answer"},
    {"runtime.contrast"},
    {"runtime.upstream", "runtime.serve", "runtime.measure"},
    {"runtime.job"},
    {"runtime.commands"},
    {"runtime.__main__"},
]
NEVER = {
    "runtime": {"nncf", "optimum", "gradio", "timm", "torchvision", "einops"},
    "convert": {"gradio", "timm", "torchvision"},
    "demo": {"nncf", "optimum", "openvino"},
}
ONE_HOME = {
    "nncf": "convert/compress.py",
    "optimum": "convert/trace.py",
    "openvino_tokenizers": "convert/tokenizer.py",
    "av": "runtime/media/video.py",
}
FILES = [file for package in MAY_IMPORT for file in sorted((ROOT / package).rglob("*.py"))]


def modules(file: Path) -> set[str]:
    """All modules that a file imports, inside functions and for types too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide the layers"
            assert node.module
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if file_of(name)} or {node.module}
    return names


def file_of(module: str) -> Path | None:
    """The file of one of our modules."""
    path = ROOT.joinpath(*module.split("."))
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.exists()), None)


def imported(file: Path) -> set[str]:
    """First names of all modules a file imports."""
    return {name.split(".")[0] for name in modules(file)}


def floor_of(module: str) -> int:
    room = ".".join(module.split(".")[:2])
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_go_down(file):
    package = file.relative_to(ROOT).parts[0]
    names = imported(file)
    assert names & OURS <= MAY_IMPORT[package]
    assert not names & NEVER[package]
    for library, home in ONE_HOME.items():
        assert library not in names or file == ROOT / home


@pytest.mark.parametrize("file", [file for file in FILES if file.is_relative_to(ROOT / "runtime")], ids=module_of)
def test_rooms_know_only_the_floors_below(file):
    own = module_of(file)
    if own == "runtime":
        return  # the names for others, each loaded when it is used
    for module in modules(file):
        if module.split(".")[0] == "runtime" and module.split(".")[:2] != own.split(".")[:2]:
            assert floor_of(module) < floor_of(own), f"{own} imports {module}"
    if own.split(".")[1] != "upstream":
        assert not imported(file) & {"torch", "transformers"}


def test_there_is_no_circle():
    graph = {module_of(file): {name for name in modules(file) if file_of(name) and name != module_of(file)} for file in FILES}
    graph["runtime"] = set()
    order: list[str] = []

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " imports ".join([*above[above.index(module) :], module])
        if module not in order:
            for other in sorted(graph.get(module, ())):
                visit(other, (*above, module))
            order.append(module)

    for module in graph:
        visit(module, ())
    assert len(order) >= len(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_opens_with_its_job(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), "a file's first lines state its job and its border"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_importing_a_package_loads_nothing_heavy(package):
    heavy = "{'torch', 'openvino', 'transformers', 'nncf', 'optimum', 'gradio'}"
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
