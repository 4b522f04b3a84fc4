"""python -m runtime chat FOLDER [QUESTION]: one answer, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.answer.prompt import THINKING_TOKENS, check_question, thinking_system
from runtime.commands.options import add_flash, add_placement, check_thinking, open_model, show_line
from runtime.errors import InternVLError, OptionError
from runtime.folder.files import CONFIG_FILE, check_folder
from runtime.media.document import file_of
from runtime.media.picture import is_data_url, is_web_address

if TYPE_CHECKING:
    from runtime.answer.boxes import Box
    from runtime.answer.conversation import Conversation
    from runtime.answer.turn import Question
    from runtime.folder.config import InternVLConfig

DEFAULT_NEW_TOKENS, DEFAULT_FRAMES = 256, 8
AUTO = "auto"
COMMANDS = """/image FILE    a picture or PDF for the next question; may be repeated
/video FILE    a video for the next question
/reset         forget the conversation
/quit          leave (as Ctrl-D does); Ctrl-C stops an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s FOLDER [QUESTION] [OPTION ...]"  # argparse's own fills half of a screen
    add_placement(parser)
    add_flash(parser)
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="question; <image> marks the place of a picture")
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="picture, PDF (paper.pdf#page=2-4) or URL; repeatable",
    )
    parser.add_argument("--video", metavar="FILE", help="video; the model sees some of its frames")
    parser.add_argument("--max-tiles", type=tiles_or_auto, metavar="N", help="most tiles a picture, or auto (default: the model's)")
    parser.add_argument(
        "--first-token",
        type=float,
        default=5,
        metavar="S",
        help="seconds, for --max-tiles auto (default: %(default)g)",
    )
    parser.add_argument("--frames", type=int, default=DEFAULT_FRAMES, metavar="N", help="video frames (default: %(default)s)")
    parser.add_argument("--seconds", type=seconds, metavar="A-B", help="part of the video, like 2-5 (default: all)")
    parser.add_argument("--answer-prefix", metavar="TEXT", default="", help="text that answers begin with; \\n is a new line")
    parser.add_argument("--schema", metavar="FILE", type=Path, help="JSON schema that the answer follows")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the model's)")
    parser.add_argument("--thinking", action="store_true", help="think first, in <think> marks (InternVL3.5)")
    parser.add_argument(
        "--locate",
        metavar="THING",
        action="append",
        default=[],
        help='ask where it is, like "the red car"; repeatable',
    )
    parser.add_argument(
        "--boxes",
        metavar="OUT",
        type=Path,
        help="picture to write with the answer's boxes: boxes.png",
    )
    parser.add_argument("--json", action="store_true", help="print answer, boxes and statistics as one JSON object")
    writing = parser.add_argument_group("how it writes")
    most = f"tokens (default: {DEFAULT_NEW_TOKENS}, {THINKING_TOKENS} with --thinking)"
    writing.add_argument("--max-new-tokens", type=int, metavar="N", help=most)
    writing.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 decodes greedily (default: 0)")
    writing.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest, of sum P (default: all)")
    writing.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: 50)")
    writing.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids repetition (default: 1)")
    writing.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="up to N draft tokens from earlier text (default: auto)",
    )
    writing.add_argument("--seed", type=int, metavar="N", help="make sampling repeatable")


def seconds(text: str) -> tuple[float, float]:
    """The value of --seconds."""
    first, dash, last = text.partition("-")
    try:
        span = float(first), float(last)
        if not dash or not 0 <= span[0] < span[1] < math.inf:
            raise ValueError
        return span
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of seconds, like 2-5 or 0.5-2.25") from None


def tiles_or_auto(text: str) -> int | str:
    """The value of --max-tiles."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


def show_progress(stage: str, done: int, total: int) -> None:
    """Show what is being read."""
    show_line(f"reading {stage}: {done} of {total} ")


def writing_options(
    max_new_tokens: int | None,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    prompt_lookup: int | None,
    seed: int | None,
    thinking: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """The command line's decoding options, by transformers' names. Raises OptionError."""
    from runtime.answer.decode import Decoding

    given = {
        "max_new_tokens": (THINKING_TOKENS if thinking else DEFAULT_NEW_TOKENS) if max_new_tokens is None else max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "prompt_lookup_num_tokens": prompt_lookup,
        "seed": seed,
    }
    options = {name: value for name, value in given.items() if value is not None}
    decoding = Decoding.of({}, options)  # checked before a model is opened
    if not decoding.temperature and (top_p is not None or top_k is not None):
        raise OptionError("--top-p and --top-k need sampling: give a --temperature above 0 too")
    return options


def read_schema(file: Path) -> str:
    """A schema from its file. Raises OptionError."""
    from runtime.answer.grammar import check_bounds

    try:
        text = file.read_text(encoding="utf-8")
        check_bounds(text)
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--schema {file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except OptionError as error:
        raise OptionError(f"--schema {file}: {error}") from None


@dataclass
class Drawing:
    """The file that boxes are drawn into, and the questions so far, whose pictures the boxes are in."""

    file: Path
    questions: list[Question] = field(default_factory=list)
    config: InternVLConfig | None = None  # of the model, once it is open

    def __post_init__(self) -> None:
        """Raise OptionError for a file that cannot be written."""
        from PIL import Image

        folder, suffix = self.file.parent, self.file.suffix.lower()
        Image.init()
        if Image.EXTENSION.get(suffix) not in Image.SAVE:
            raise OptionError(
                f"--boxes {self.file}: {suffix or 'no file extension'} is not a picture format: name a file like boxes.png"
            )
        if not folder.is_dir():
            raise OptionError(f"--boxes {self.file}: the folder {folder} does not exist: create it first")
        if self.file.is_dir() or not os.access(self.file if self.file.exists() else folder, os.W_OK):
            raise OptionError(f"--boxes {self.file} cannot be written: name another file")

    def note(self, question: str, options: dict[str, Any]) -> None:
        """Remember a question that was answered."""
        from runtime.answer.conversation import question_of

        self.questions.append(question_of(question, options)[0])

    def write(self, boxes: Sequence[Box]) -> None:
        """Draw into every picture that has boxes; those after the first have their number in the file name. Raises OptionError."""
        from runtime.answer.drawing import draw_boxes

        if not boxes:
            print(f"the answer has no boxes: {self.file} is not written", file=sys.stderr)
            return
        assert self.config is not None
        pictures = [picture for question in self.questions for opened in question.pictures(self.config) for picture in opened]
        for number, index in enumerate(sorted({box.picture for box in boxes})):
            file = self.file.with_stem(f"{self.file.stem}-{index + 1}") if number else self.file
            try:
                draw_boxes(pictures[index], [box for box in boxes if box.picture == index]).save(file)
            except (OSError, ValueError) as error:
                raise OptionError(f"--boxes {file} cannot be written ({getattr(error, 'strerror', None) or error})") from None
            print(f"boxes of picture {index + 1}: {file}", file=sys.stderr)


def table(boxes: Sequence[Box]) -> str:
    """Boxes as lines: label, picture number from 1, edges in pixels."""
    labels = ["".join(letter for letter in box.label if letter.isprintable())[:40] for box in boxes]
    wide = max(map(len, ["label", *labels]))
    lines = [f"{'label':<{wide}} {'picture':>8} {'x1':>8} {'y1':>8} {'x2':>8} {'y2':>8}"]
    for label, box in zip(labels, boxes, strict=True):
        edges = " ".join(f"{edge:>8.1f}" for edge in (box.x1, box.y1, box.x2, box.y2))
        lines.append(f"{label:<{wide}} {box.picture + 1:>8} {edges}")
    return "\n".join(lines)


def say(conversation: Conversation, question: str, drawing: Drawing | None = None, **options: Any) -> None:
    """Write the answer to standard output as it comes, then its statistics to standard error.

    With a `drawing`, also print the table of boxes and write the picture.
    """
    begun, turns = False, len(conversation.turns)
    try:
        for piece in conversation.stream(question, progress=show_progress, **options):
            if not begun:
                show_line("")
            begun = True
            print(piece, end="", flush=True)
    finally:
        if not begun:
            show_line("")
        if drawing is not None and len(conversation.turns) > turns:
            drawing.note(question, options)
    print(flush=True)
    if drawing is not None and conversation.boxes:
        print(table(conversation.boxes), flush=True)
    print(conversation.statistics, file=sys.stderr)
    if drawing is not None:
        drawing.write(conversation.boxes)


def run(question: str | None, image: list[str], video: str | None, max_tiles: int | str | None, **options: Any) -> None:
    """One question and its answer, or a conversation when there is no question."""
    writing = writing_options(**options)
    if options["schema"] is not None:
        writing["schema"] = read_schema(options["schema"])
    if question is not None:
        check_question(question)
    if options["locate"]:
        from runtime.answer.boxes import locate_question

        locate_question(options["locate"])  # its errors are reported before a model is opened
        question = question or ""
    if question is None and options["json"]:
        raise OptionError("--json answers one question: give it")
    drawing = None if options["boxes"] is None else Drawing(options["boxes"])
    if drawing is not None and question is not None and not (image or video):
        raise OptionError("--boxes draws into a picture: give one with --image or --video")
    if options["thinking"]:
        check_thinking(options["folder"])
    if max_tiles == AUTO:
        max_tiles = affordable_tiles(**options)
    model, system = open_model(**options), options["system"]
    if drawing is not None:
        drawing.config = model.config
    conversation = model.start_conversation(thinking_system(model.config, system) if options["thinking"] else system)
    asked = {
        "images": image,
        "video": video,
        "max_tiles": max_tiles,
        "num_segments": options["frames"],
        "bound": options["seconds"],
        "answer_prefix": options["answer_prefix"].replace("\\n", "\n"),
        "locate": options["locate"],
        **writing,
    }
    if question is None:
        talk(conversation, asked, drawing=drawing)
    elif options["json"]:
        answer = conversation.ask(question, **asked)
        assert conversation.statistics is not None
        boxes = [asdict(box) for box in conversation.boxes]
        print(json.dumps({"answer": answer, "boxes": boxes, **conversation.statistics.as_dict()}, ensure_ascii=False))
        if drawing is not None:
            drawing.note(question, asked)
            drawing.write(conversation.boxes)
    else:
        say(conversation, question, drawing, **asked)


def affordable_tiles(folder: Path, device: str, vision_device: str | None, first_token: float, **_: Any) -> int:
    """The tile limit for a time to the first token, from what tune measured. Raises OptionError if it did not."""
    import openvino as ov

    from runtime.folder.config import InternVLConfig, read_config
    from runtime.folder.settings import settings_of, tiles_within

    check_folder(folder)
    found = settings_of(folder, ov.Core(), device)
    if found is None or vision_device not in (None, device):
        raise OptionError(f"--max-tiles auto needs to know how fast {device} is: run  python -m runtime tune {folder}  first")
    tiles = tiles_within(found, first_token, InternVLConfig.from_dict(read_config(folder / CONFIG_FILE)))
    print(f"up to {tiles} tiles a picture, for a first token within {first_token:g} s", file=sys.stderr)
    return tiles


def talk(
    conversation: Conversation, asked: dict[str, Any], read: Callable[[str], str] = input, drawing: Drawing | None = None
) -> None:
    """Read questions and commands from the terminal until /quit or Ctrl-D. An error is printed, and the conversation goes on."""
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # an incomplete character does not end the program
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history, where the system has it
    print(f"Ask, or:\n{COMMANDS}", file=sys.stderr)
    images, video = list(asked["images"]), asked["video"]
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves", file=sys.stderr)
            continue
        command, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")  # a file dropped on a terminal comes in quotes
        try:
            if command == "/quit":
                return
            if command == "/reset":
                conversation.reset()
                if drawing is not None:
                    drawing.questions.clear()
                images, video = [], None
                print("the conversation is empty", file=sys.stderr)
            elif command in ("/image", "/video"):
                if not rest:
                    raise OptionError(f"{command} needs a file: {command} FILE")
                if not (is_data_url(rest) or is_web_address(rest)) and not Path(file_of(rest)).is_file():
                    raise OptionError(f"{rest} does not exist")
                images, video = ([*images, rest], video) if command == "/image" else (images, rest)
                waiting = len(images) + (video is not None)
                print(f"{waiting} for the next question", file=sys.stderr)
            elif command.startswith("/") and "/" not in command[1:]:
                print(f"{command} is not a command:\n{COMMANDS}", file=sys.stderr)
            elif line:
                turns = len(conversation.turns)
                try:
                    say(conversation, line, drawing, **{**asked, "images": images, "video": video})
                except KeyboardInterrupt:
                    print("\n(stopped)", file=sys.stderr)
                if len(conversation.turns) > turns:
                    images, video = [], None
        except InternVLError as error:
            print(f"error: {error}", file=sys.stderr)
