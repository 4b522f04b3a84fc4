"""python -m pytest tests/runtime/commands/test_commands.py

python -m runtime as a person and a program meet it: streamed answers, a chat of several turns, JSON, a benchmark, one-line errors.
"""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
from convert.__main__ import main as convert_main
from convert.__main__ import parser as convert_parser
from runtime import OVInternVLChatModel
from runtime.__main__ import main
from runtime.commands.chat import talk

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tiny, converted):
    return converted(tiny("tiny-qwen2"), weight_format="fp32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 112, 3), np.uint8)).save(path)
    return path


def test_json_is_one_object_with_the_answer_and_what_it_took(folder, wide, capsys):
    assert main(["chat", str(folder), "What is it?", "--image", str(wide), "--max-new-tokens", "5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    answer = OVInternVLChatModel(folder).start_conversation().ask("What is it?", images=[wide], max_new_tokens=5)
    assert said["answer"] == answer
    assert said["tiles"] == said["encoded_tiles"] == 3
    assert said["new_tokens"] == 5
    assert said["finish_reason"] == "length"
    assert said["reused_tokens"] == 0
    assert said["first_token_seconds"] > 0


def test_options_may_stand_before_the_question(folder, wide, capsys):
    said = []
    for order in (["What is it?", "--image", str(wide)], ["--image", str(wide), "What is it?"]):
        assert main(["chat", str(folder), *order, "--max-new-tokens", "5"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    assert vars(convert_parser().parse_args(["a", "--weight-format", "int8", "b"]))["output"] == "b"


def test_the_help_of_chat_fits_a_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 40


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["chat", "F", "What", "is", "it?"],
            "unexpected argument 'is': put a text of several words in quotes (python -m runtime chat",
        ),
        (["chat", "F", "--imgae=x"], "there is no option --imgae: did you mean --image? (python -m runtime chat --help lists"),
        (["serve", "F", "-q"], "there is no option -q (python -m runtime serve"),
        (["chat"], "the following arguments are required: FOLDER (python -m runtime chat"),
        ([], "the following arguments are required: COMMAND (python -m runtime --help"),
        (["chta"], "argument COMMAND: invalid choice: 'chta' (choose from "),
    ],
)
def test_a_command_that_is_wrongly_typed_is_one_line(capsys, command, message):
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_the_version_is_told(capsys):
    for command in (main, convert_main):
        with pytest.raises(SystemExit) as end:
            command(["--version"])
        assert end.value.code == 0
        assert capsys.readouterr().out == f"{runtime.__version__}\n"


def test_draws_are_repeatable(folder, capsys):
    command = ["chat", str(folder), "Hello", "--max-new-tokens", "12", "--temperature", "1.2", "--top-k", "40", "--top-p", "0.95"]
    said = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed, "--repetition-penalty", "1.1"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0 is not 0 (the likeliest token) or more"),
        (["--top-p", "0.5"], "--top-p and --top-k need sampling"),
        (["--temperature", "1", "--top-p", "2"], "top p 2.0 is not above 0 and at most 1"),
        (["--temperature", "1", "--top-k", "-1"], "top k -1 is not 0 (all) or positive"),
        (["--repetition-penalty", "0"], "repetition penalty 0.0 is not positive"),
        (["--video", "gone.mp4"], "gone.mp4 does not exist"),
        (["--vision-device", "NPU9"], "there is no device NPU9 here"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(folder, capsys, options, message):
    assert main(["chat", str(folder), "Hello", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"error: {message}")


def test_json_needs_a_question(folder, capsys):
    assert main(["chat", str(folder), "--json"]) == 2
    assert "error: --json answers one question" in capsys.readouterr().err


def test_a_benchmark_ends_with_a_line_of_json(folder, wide, capsys):
    options = ["--image", str(wide), "--max-new-tokens", "4", "--repeats", "2", "--warm-up", "1", "--max-tiles", "2"]
    assert main(["benchmark", str(folder), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["tiles"] == 3
    assert found["new_tokens"] == 4
    assert found["repeats"] == 2
    assert all(found[name] > 0 for name in ("first_token_seconds", "token_seconds", "second_turn_seconds", "same_picture_seconds"))
    assert found["peak_gb"] > 0.1
    assert sum(line.startswith(("warm-up", "run")) for line in lines) == 3
    assert main(["benchmark", str(folder), "--repeats", "0"]) == 2


def test_a_chat_of_several_turns(folder, wide, capsys):
    """Pictures wait for the next question only, mistakes do not end the chat, and turns follow each other."""
    lines = iter(
        [
            "",
            "/image gone.png",
            "/image",
            f"/image '{wide}'",
            "What is it?",
            "Why?",
            "/nonsense",
            "/reset",
            "Hello?",
            "/quit",
            "never",
        ]
    )
    conversation = OVInternVLChatModel(folder).start_conversation()
    asked = {"images": [], "video": None, "max_tiles": None, "max_new_tokens": 4, "do_sample": False}
    seen = []

    def read(_):
        seen.append([(turn.question, len(turn.pictures)) for turn in conversation.turns])
        return next(lines)

    talk(conversation, asked, read)
    assert next(lines) == "never"
    assert seen[6] == [("<image>\nWhat is it?", 1), ("Why?", 0)]
    assert seen[-1] == [("Hello?", 0)]
    err = capsys.readouterr().err
    assert "error: gone.png does not exist" in err
    assert "error: /image needs a file" in err
    assert "/nonsense is not a command" in err
    assert err.count("prompt tokens") == 3


def test_seconds_and_frames_of_a_video(folder, video, capsys):
    command = ["chat", str(folder), "What moves?", "--video", str(video), "--max-new-tokens", "3"]
    for more, frames in (
        ([], 8),
        (["--frames", "16"], 16),
        (["--frames", "3", "--seconds", "2-5"], 3),
        (["--seconds", "0.5-1.25"], 8),
    ):
        assert main([*command, *more]) == 0
        assert f"{frames} tiles, " in capsys.readouterr().err
    assert main([*command, "--seconds", "20-30"]) == 2
    assert "seconds 20 to 30 hold no frame: the video is 6.0 s long" in capsys.readouterr().err
    for wrong in ("5", "5-2", "a-b", "-1-2"):
        with pytest.raises(SystemExit):
            main([*command, f"--seconds={wrong}"])
        assert "is not a range of seconds, like 2-5" in capsys.readouterr().err


def test_an_answer_prefix_from_the_terminal(folder, capsys):
    assert main(["chat", str(folder), "Hello?", "--answer-prefix", "It\\n is", "--max-new-tokens", "3", "--json"]) == 0
    with_prefix = json.loads(capsys.readouterr().out)
    assert main(["chat", str(folder), "Hello?", "--max-new-tokens", "3", "--json"]) == 0
    assert with_prefix["prompt_tokens"] > json.loads(capsys.readouterr().out)["prompt_tokens"]


def test_a_chat_ends_with_the_input(folder):
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "chat", str(folder), "--max-new-tokens", "3"],
        cwd=ROOT,
        input="Hello\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stderr.count("prompt tokens") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_chat(folder):
    """On a real terminal: an endless answer is stopped, the next question is answered, Ctrl-D leaves."""
    ours, theirs = pty.openpty()
    code = """
import sys
from runtime.commands.chat import talk
import runtime
from convert.__main__ import main as convert_main
from convert.__main__ import parser as convert_parser
from runtime import OVInternVLChatModel
asked = {"images": [], "video": None, "max_tiles": None, "min_new_tokens": 30000, "max_new_tokens": 30000}
talk(OVInternVLChatModel(sys.argv[1]).start_conversation(), asked)
"""
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    seen = ""

    def wait_for(text: str, behind: int = 0) -> None:
        """Wait until a text is seen, and so many characters behind it."""
        nonlocal seen
        deadline = time.monotonic() + 90
        while (place := seen.find(text)) < 0 or len(seen) < place + len(text) + behind:
            assert time.monotonic() < deadline, seen[-2000:]
            time.sleep(0.05)
            try:
                seen += os.read(ours, 1 << 16).decode(errors="replace")
            except BlockingIOError:
                continue

    try:
        wait_for("> ")
        os.write(ours, b"Hello\n")
        wait_for("Hello\r\n", behind=20)  # in the middle of the answer
        process.send_signal(signal.SIGINT)
        wait_for("(stopped)")
        os.write(ours, b"/reset\n")
        wait_for("the conversation is empty")
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "Traceback" not in seen


# ---- boxes


CAR = "<ref>a car</ref><box>[[250, 0, 750, 500]]</box>"


@pytest.fixture
def boxed(folder, wide, tmp_path, monkeypatch):
    """A chat whose answers begin with a box; the tiny model goes on with what comes to its mind."""
    monkeypatch.chdir(tmp_path)
    return ["chat", str(folder), "Where?", "--image", str(wide), "--answer-prefix", CAR, "--max-new-tokens", "2"]


def test_boxes_are_drawn_and_told(boxed, capsys, wide, tmp_path):
    assert main([*boxed, "--boxes", "out.png"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[-2].split() == ["label", "picture", "x1", "y1", "x2", "y2"]
    assert lines[-1].split() == ["a", "car", "1", "28.0", "0.0", "84.0", "28.0"]
    assert captured.err.splitlines()[-1] == "boxes of picture 1: out.png"
    before, after = (np.asarray(Image.open(file), np.int16) for file in (wide, tmp_path / "out.png"))
    assert before.shape == after.shape
    assert np.abs(before - after)[25:31].max() > 100, "its lower edge"


def test_json_has_the_boxes(boxed, capsys, tmp_path):
    assert main([*boxed, "--json", "--boxes", "out.jpg"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["boxes"] == [{"label": "a car", "x1": 28.0, "y1": 0.0, "x2": 84.0, "y2": 28.0, "picture": 0}]
    assert Image.open(tmp_path / "out.jpg").size == (112, 56)


def test_each_picture_with_boxes_is_written(boxed, capsys, tmp_path, wide):
    prefix = f"Image-1: {CAR} Image-2: {CAR}"
    assert main([*boxed, "--image", str(wide), "--answer-prefix", prefix, "--boxes", "out.png"]) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == ["boxes of picture 1: out.png", "boxes of picture 2: out-2.png"]
    assert (tmp_path / "out-2.png").exists()


def test_every_answer_of_a_conversation_is_drawn(boxed, folder, capsys, tmp_path, wide):
    from runtime.commands.chat import Drawing

    model = OVInternVLChatModel(folder)
    lines = iter(["Where?", "/reset", f"/image {wide}", "Where?", "And now?"])

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    drawing = Drawing(tmp_path / "out.png", config=model.config)
    asked = {"images": [str(wide)], "video": None, "answer_prefix": CAR, "max_new_tokens": 2}
    talk(model.start_conversation(), asked, read, drawing)
    assert capsys.readouterr().err.count("boxes of picture 1:") == 3
    assert len(drawing.questions) == 2


def test_an_answer_without_boxes_is_told(folder, wide, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["chat", str(folder), "Hello", "--image", str(wide), "--max-new-tokens", "2", "--boxes", "out.png"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "the answer has no boxes: out.png is not written"
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--boxes", "gone/out.png"], "--boxes gone/out.png: the folder gone does not exist: create it first"),
        (["--boxes", "out"], "--boxes out: no file extension is not a picture format: name a file like boxes.png"),
        (["--boxes", "out.txt"], "--boxes out.txt: .txt is not a picture format: name a file like boxes.png"),
        (["--boxes", "taken.png"], "--boxes taken.png cannot be written: name another file"),
        (["--locate", " "], "a label to locate is empty: give words, like 'the red car'"),
        (["--locate", "<box>"], "the label '<box>' has the mark <box>: give the words alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_with_boxes_are_one_line(boxed, capsys, options, message, tmp_path):
    (tmp_path / "taken.png").mkdir()
    assert main([*boxed, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert not captured.out, "before a model answers"


def test_boxes_and_locate_need_a_picture(folder, capsys):
    assert main(["chat", str(folder), "Where?", "--boxes", "out.png"]) == 2
    assert capsys.readouterr().err == "error: --boxes draws into a picture: give one with --image or --video\n"
    assert main(["chat", str(folder), "--locate", "a car"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no picture to locate anything in: give one")


def test_a_file_that_turns_out_not_to_be_writable_is_one_line(boxed, capsys, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main([*boxed, "--boxes", "out.png"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --boxes out.png cannot be written (No space left on device)"


def test_locate_asks_the_published_question(folder, wide, capsys):
    ask, about = ["chat", str(folder)], ["--image", str(wide), "--max-new-tokens", "3"]
    assert main([*ask, *about, "--locate", "the car"]) == 0
    located = capsys.readouterr().out
    question = "Please provide the bounding box coordinate of the region this sentence describes: <ref>the car</ref>"
    assert main([*ask, question, *about]) == 0
    assert capsys.readouterr().out == located
