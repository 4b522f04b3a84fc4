"""python -m pytest tests/runtime/commands/test_without_torch.py

No command that answers imports torch or transformers, from its start to its end: each runs in a process of its own.
"""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import data_url

ROOT = Path(__file__).parents[3]
PICTURE = ROOT / "demo" / "examples" / "shapes.png"
WATCH = """
import atexit, runpy, sys
atexit.register(lambda: print("loaded", sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr))
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
NOTHING = "loaded []"
HEAVY = ("libtorch", "/torch/lib/")


def watched(*arguments) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", WATCH, *map(str, arguments)]


def run(*arguments, text: str | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run(watched(*arguments), cwd=ROOT, input=text, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "Which shape is purple?", "--image", PICTURE],
        ["chat", "Which shape is purple?", "--image", PICTURE, "--temperature", "0.5", "--seed", "1", "--json"],
        ["info"],
        ["benchmark", "--repeats", "1", "--warm-up", "0", "--max-new-tokens", "4"],
        ["tune", "--reset"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments[::3])),
)
def test_commands_answer_without(shapes, arguments):
    command, *rest = arguments
    done = run("runtime", command, shapes, *rest)
    assert NOTHING in done.stderr
    assert command != "chat" or "circle" in done.stdout


def test_a_conversation_in_the_terminal(shapes):
    done = run("runtime", "chat", shapes, "--image", PICTURE, text="Which shape is purple?\nHow many shapes are there?\n")
    assert NOTHING in done.stderr
    assert "circle" in done.stdout


def test_tune(tiny, converted, tmp_path):
    import shutil

    folder = shutil.copytree(converted(tiny("tiny-qwen2"), weight_format="int8"), tmp_path / "model")
    assert NOTHING in run("runtime", "tune", folder).stderr


@pytest.mark.parametrize("engine", ["genai", "native"])
def test_a_pipeline(shapes, engine):
    code = (
        "import sys; from runtime import pipeline; "
        f"pipe = pipeline({str(shapes)!r}, engine={engine!r}, cache_size=1); "
        f"print(pipe(('Which shape is purple?', {str(PICTURE)!r})).text); pipe.close(); "
        "print('loaded', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["circle", NOTHING], done.stderr


@contextmanager
def serving(*arguments):
    """A server on a free port in a process of its own, its address, and what it says when it is interrupted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        watched(*arguments, "--port", port), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    try:
        yield f"http://127.0.0.1:{port}", process, said
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()


def eventually(ask, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.mark.parametrize("engine", ["genai", "native"])
def test_the_server_and_its_worker(shapes, engine):
    pytest.importorskip("fastapi")
    content = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}, {"type": "text", "text": "Which shape is purple?"}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    with serving("runtime", "serve", shapes, "--engine", engine, "--cache-size", "1") as (address, process, said):
        request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"content-type": "application/json"})
        answer = json.loads(eventually(lambda: urllib.request.urlopen(request, timeout=60).read()))
        assert answer["choices"][0]["message"]["content"] == "circle"
        if sys.platform == "linux":
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(children) == (engine == "genai")
            for number in children:
                mapped = Path(f"/proc/{number}/maps").read_text()
                assert not any(name in mapped for name in HEAVY)
    assert NOTHING in said[1], said


def test_the_page(shapes):
    pytest.importorskip("gradio")
    with serving("demo", shapes) as (address, _, said):
        page = eventually(lambda: urllib.request.urlopen(address, timeout=10).read())
        assert b"gradio" in page
    assert NOTHING in said[1], said
