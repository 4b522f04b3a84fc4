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
NEVER = {
    "runtime": {"nncf", "optimum", "gradio", "timm", "torchvision", "einops"},
    "convert": {"gradio", "timm", "torchvision"},
    "demo": {"nncf", "optimum", "openvino"},
}
ONE_HOME = {"nncf": "convert/compress.py", "optimum": "convert/trace.py", "openvino_tokenizers": "convert/tokenizer.py"}
FILES = [file for package in MAY_IMPORT for file in sorted((ROOT / package).rglob("*.py"))]


def imported(file: Path) -> set[str]:
    """First names of all modules a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide the layers"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_go_down(file):
    package = file.relative_to(ROOT).parts[0]
    names = imported(file)
    assert names & OURS <= MAY_IMPORT[package]
    assert not names & NEVER[package]
    for library, home in ONE_HOME.items():
        assert library not in names or file == ROOT / home


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_opens_with_its_job(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), "a file's first lines state its job and its border"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_importing_a_package_loads_nothing_heavy(package):
    heavy = "{'torch', 'openvino', 'transformers', 'nncf', 'optimum', 'gradio'}"
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
