"""python -m pytest tests/runtime/commands/test_endings.py

A program that ends, ends quietly: scripts that just end, readers that go away, ports that are taken; and the most natural first try
of a newcomer is told what to do.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.__main__ import free_port
from demo.__main__ import main as demo
from runtime.__main__ import main
from runtime.errors import OptionError

ROOT = Path(__file__).parents[3]
PICTURE = ROOT / "demo" / "examples" / "shapes.png"
SCRIPT = """
from runtime import pipeline
pipe = pipeline({folder!r}, cache_size=1)
print(pipe(("Which shape is purple?", {picture!r})).text, pipe.engine._process.pid, flush=True)
"""
ENDS = {
    "it just ends": ("", 0),
    "an exception": ("raise SystemError('of the script')", 1),
    "sys.exit": ("import sys; sys.exit(3)", 3),
    "in the middle of an answer": (
        "from runtime import GenerationConfig\n"
        "answer = pipe.stream_infer('Hello', GenerationConfig(max_new_tokens=3000, ignore_eos=True)); next(answer)",
        0,
    ),
    "in a thread": ("import threading; t = threading.Thread(target=lambda: pipe('Hello')); t.start(); t.join()", 0),
    "closed": ("pipe.close()", 0),
    "with another name for it": ("other = pipe; del pipe", 0),
}


def gone(pid: int, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def python(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the worker in /proc")
@pytest.mark.parametrize("end", ENDS)
def test_a_script_that_ends_says_its_answer_and_nothing_else(shapes, end):
    pytest.importorskip("openvino_genai")
    more, code = ENDS[end]
    process = python(SCRIPT.format(folder=str(shapes), picture=str(PICTURE)) + more)
    out, err = process.communicate(timeout=120)
    answer, pid = out.split()[:2]
    assert (answer, process.returncode) == ("circle", code)
    assert err == "" or end == "an exception"
    assert err.count("Traceback") == (end == "an exception")
    assert "Broken" not in err
    assert gone(int(pid)), "no worker is left behind"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the worker in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_script_that_is_ended_leaves_no_worker(shapes, how):
    pytest.importorskip("openvino_genai")
    code = SCRIPT.format(folder=str(shapes), picture=str(PICTURE)) + "import time; time.sleep(60)"
    process = python(code, start_new_session=True)
    pid = int(process.stdout.readline().split()[1])
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert "BrokenPipe" not in err
    assert gone(pid)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize(
    "command",
    [
        "runtime chat {folder} 'Describe the picture.' --image demo/examples/shapes.png",
        "runtime info {folder}",
        "runtime benchmark {folder} --repeats 2 --warm-up 0 --max-new-tokens 2",
        "runtime --help",
        "convert --help",
        "demo --help",
        "demo.shapes draw {output}",
    ],
)
def test_a_reader_that_goes_away_ends_a_command_quietly(shapes, tmp_path, command):
    line = command.format(folder=shapes, output=tmp_path / "a.png")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -W ignore -m {line} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_the_page_takes_the_next_free_port_or_tells_that_one_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"cannot listen on 127.0.0.1 port {port} .*: give another --port"):
            free_port("127.0.0.1", port)
        assert demo(["somewhere", "--port", str(port)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert free_port("127.0.0.1", port) == port
    first = free_port("127.0.0.1", None)
    with socket.create_server(("127.0.0.1", first)):
        assert free_port("127.0.0.1", None) > first
    with pytest.raises(OptionError, match="cannot listen on no-such-host"):
        free_port("no-such-host", 7860)


@pytest.mark.parametrize("command", [["chat"], ["serve"], ["info"], ["benchmark"], ["tune"]], ids="".join)
def test_a_hub_id_in_the_place_of_a_folder_is_told_with_both_commands(command, capsys):
    assert main([*command, "OpenGVLab/InternVL2-1B"]) == 2
    said = capsys.readouterr().err
    assert "OpenGVLab/InternVL2-1B is a PyTorch checkpoint on the hub: convert it first with" in said
    assert "python -m convert OpenGVLab/InternVL2-1B" in said
    assert "python -m runtime chat InternVL2-1B-int4" in said
    assert said.count("\n") == 1


def test_the_page_and_python_say_the_same_of_a_hub_id(capsys):
    pytest.importorskip("torch", reason="from_pretrained needs the extra [torch]")
    from runtime import InternVLError, OVInternVLChatModel

    assert demo(["OpenGVLab/InternVL2-1B"]) == 2
    assert "is a PyTorch checkpoint on the hub" in capsys.readouterr().err
    with pytest.raises(InternVLError, match="is a PyTorch checkpoint on the hub"):
        OVInternVLChatModel.from_pretrained("OpenGVLab/InternVL2-1B")


def test_a_folder_that_is_not_there_is_no_checkpoint(tmp_path, capsys):
    assert main(["chat", str(tmp_path / "InternVL2-1B-int4")]) == 2
    assert "does not exist: give a model folder" in capsys.readouterr().err
