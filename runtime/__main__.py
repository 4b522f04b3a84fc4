"""python -m runtime {chat,benchmark,serve,tune,info} FOLDER: ask a model folder, measure, serve, tune it, or see what it holds."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.device import PRECISIONS
from runtime.errors import InternVLError, OptionError
from runtime.folder import CONFIG_FILE, PART_FILES, PARTS, bytes_of, check_folder

if TYPE_CHECKING:
    from runtime.chat import Conversation

DEFAULT_NEW_TOKENS = 256
AUTO = "auto"
COMMANDS = """/image FILE    a picture for the next question; may be said several times
/video FILE    a video for the next question
/reset         forget the conversation
/quit          leave (as Ctrl-D does); Ctrl-C stops an answer"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m runtime", description="Ask a model folder that python -m convert wrote.")
    commands = p.add_subparsers(dest="command", required=True)

    placed = argparse.ArgumentParser(add_help=False)
    placed.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")
    where = placed.add_argument_group("where it runs")
    where.add_argument("--device", default="CPU", help="OpenVINO device, like CPU, GPU or AUTO (default: %(default)s)")
    where.add_argument("--vision-device", metavar="DEVICE", help="another device for the vision part (default: --device)")
    where.add_argument(
        "--precision", choices=PRECISIONS, default="default", help="accuracy: slower, closest to PyTorch (default: %(default)s)"
    )
    where.add_argument("--cache-dir", metavar="DIR", type=Path, help="keep compiled models there (default: on a GPU, in FOLDER)")

    chat = commands.add_parser("chat", parents=[placed], help="answer one question, or chat when there is none")
    chat.add_argument("question", metavar="QUESTION", nargs="?", help="what to ask; <image> marks where a picture stands")
    chat.add_argument("--image", metavar="FILE", action="append", default=[], help="picture or its URL; may be given several times")
    chat.add_argument("--video", metavar="FILE", help="video, of which 8 frames are shown to the model")
    chat.add_argument(
        "--max-tiles", type=tiles_or_auto, metavar="N", help="tiles a picture at most, or auto (default: the model's, often 12)"
    )
    chat.add_argument(
        "--first-token", type=float, default=5, metavar="SECONDS", help="with --max-tiles auto, after tune (default: %(default)g)"
    )
    chat.add_argument("--system", metavar="TEXT", help="system message (default: the model's)")
    chat.add_argument("--json", action="store_true", help="print the answer and its statistics as one JSON object")
    writing = chat.add_argument_group("how it writes")
    writing.add_argument("--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help="(default: %(default)s)")
    writing.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)")
    writing.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P (default: all)")
    writing.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: 50)")
    writing.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids what was said (default: 1)")
    writing.add_argument(
        "--prompt-lookup",
        type=int,
        default=0,
        metavar="N",
        help="guess up to N tokens from what was said before: faster where it repeats; greedy, CPU",
    )
    writing.add_argument("--seed", type=int, metavar="N", help="make draws repeatable")

    bench = commands.add_parser("benchmark", parents=[placed], help="measure first token, speed and memory")
    bench.add_argument("--image", metavar="FILE", type=Path, help="picture to ask about (default: a random one of 1000 x 750)")
    bench.add_argument("--max-tiles", type=int, metavar="N", help="tiles at most (default: the model's, often 12)")
    bench.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="tokens of each answer (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="measured runs (default: %(default)s)")
    bench.add_argument("--warm-up", type=int, default=1, metavar="N", help="runs before them (default: %(default)s)")

    serve = commands.add_parser("serve", parents=[placed], help="an OpenAI-compatible server over the folder")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    serve.add_argument("--port", type=int, default=23333, help="(default: %(default)s)")
    serve.add_argument("--api-key", metavar="KEY", help="clients must send it (default: $INTERNVL_API_KEY, else none is asked for)")
    serve.add_argument("--model-name", metavar="NAME", help="under which clients ask for it (default: the folder's name)")
    serve.add_argument(
        "--engine",
        choices=("genai", "native"),
        default="genai",
        help="genai: many requests at once; native: one after the other (default: %(default)s)",
    )
    allowed = serve.add_argument_group("what it takes")
    allowed.add_argument("--cache-size", type=int, default=2, metavar="GB", help="KV cache of all requests (default: %(default)s)")
    allowed.add_argument(
        "--max-requests", type=int, default=64, metavar="N", help="at once, waiting ones too (default: %(default)s)"
    )
    allowed.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="of one answer (default: %(default)g)")
    allowed.add_argument("--max-body", type=int, default=64, metavar="MB", help="of one request (default: %(default)s)")
    allowed.add_argument(
        "--allowed-media-domains", metavar="HOSTS", default="", help="fetch pictures from these, comma between (default: none)"
    )
    allowed.add_argument("--allowed-local-media-path", metavar="FOLDER", type=Path, help="read media there (default: nowhere)")

    tune = commands.add_parser("tune", help="find the fastest settings of this machine and keep them in the folder")
    tune.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")
    tune.add_argument("--device", default="CPU", help="OpenVINO device, like CPU or GPU (default: %(default)s)")
    tune.add_argument("--reset", action="store_true", help="forget what was found, for all devices")

    info = commands.add_parser("info", help="what a model folder holds")
    info.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")
    return p


def tiles_or_auto(text: str) -> int | str:
    """The value of --max-tiles."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


def show_progress(stage: str, done: int, total: int) -> None:
    """One line on a terminal that says what is being read; nothing where there is none."""
    if sys.stderr.isatty():
        print(f"\r\x1b[Kreading {stage}: {done} of {total} ", end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def writing_options(
    temperature: float, top_p: float | None, top_k: int | None, repetition_penalty: float | None, prompt_lookup: int, **_: Any
) -> dict[str, Any]:
    """The command line's sampling options as transformers' generate options. Raises OptionError."""
    if temperature < 0:
        raise OptionError(f"temperature {temperature:g} is negative: 0 takes the likeliest token, 1 draws as the model was trained")
    if top_p is not None and not 0 < top_p <= 1:
        raise OptionError(f"top p {top_p:g} is not between 0 and 1")
    if top_k is not None and top_k < 1:
        raise OptionError(f"top k {top_k} is not positive")
    if repetition_penalty is not None and repetition_penalty <= 0:
        raise OptionError(f"repetition penalty {repetition_penalty:g} is not positive")
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        options |= {name: value for name, value in given.items() if value is not None}
    elif top_p is not None or top_k is not None:
        raise OptionError("--top-p and --top-k choose among draws: give a --temperature above 0 too")
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    if prompt_lookup < 0:
        raise OptionError(f"prompt lookup {prompt_lookup} is negative")
    if prompt_lookup:
        options["prompt_lookup_num_tokens"] = prompt_lookup
    return options


def say(conversation: Conversation, question: str, **options: Any) -> None:
    """Write the answer to standard output as it comes, then its statistics to standard error."""
    begun = False
    try:
        for piece in conversation.stream(question, progress=show_progress, **options):
            if not begun:
                clear_progress()
            begun = True
            print(piece, end="", flush=True)
    finally:
        if not begun:
            clear_progress()
    print(flush=True)
    print(conversation.statistics, file=sys.stderr)


def chat(question: str | None, image: list[str], video: str | None, max_tiles: int | str | None, **options: Any) -> None:
    """One question and its answer, or a conversation when there is no question."""
    writing = {**writing_options(**options), "max_new_tokens": options["max_new_tokens"]}
    if question is not None and not question.strip():
        raise OptionError("the question is empty: write one, or leave it out to chat")
    if question is None and options["json"]:
        raise OptionError("--json answers one question: give it")
    if max_tiles == AUTO:
        max_tiles = affordable_tiles(**options)
    conversation = open_model(**options).start_conversation(options["system"])
    if options["seed"] is not None:
        import torch

        torch.manual_seed(options["seed"])
    asked = {"images": image, "video": video, "max_tiles": max_tiles, **writing}
    if question is None:
        talk(conversation, asked)
    elif options["json"]:
        answer = conversation.ask(question, **asked)
        assert conversation.statistics is not None
        print(json.dumps({"answer": answer, **conversation.statistics.as_dict()}, ensure_ascii=False))
    else:
        say(conversation, question, **asked)


def affordable_tiles(folder: Path, device: str, vision_device: str | None, first_token: float, **_: Any) -> int:
    """The tile limit of a time to the first token, by what tune measured. Raises OptionError where it did not."""
    import openvino as ov

    from runtime.config import InternVLConfig, read_config
    from runtime.settings import settings_of, tiles_within

    check_folder(folder)
    found = settings_of(folder, ov.Core(), device)
    if found is None or vision_device not in (None, device):
        raise OptionError(f"--max-tiles auto needs to know how fast {device} is: run  python -m runtime tune {folder}  first")
    tiles = tiles_within(found, first_token, InternVLConfig.from_dict(read_config(folder / CONFIG_FILE)))
    print(f"up to {tiles} tiles a picture, for a first token within {first_token:g} s", file=sys.stderr)
    return tiles


def talk(conversation: Conversation, asked: dict[str, Any], read: Callable[[str], str] = input) -> None:
    """Questions and commands from the terminal until it is enough. A mistake is told and the conversation goes on."""
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
                images, video = [], None
                print("the conversation is empty", file=sys.stderr)
            elif command in ("/image", "/video"):
                if not rest:
                    raise OptionError(f"{command} needs a file: {command} FILE")
                if not rest.startswith(("http://", "https://", "data:")) and not Path(rest).is_file():
                    raise OptionError(f"{rest} is not there")
                images, video = ([*images, rest], video) if command == "/image" else (images, rest)
                waiting = len(images) + (video is not None)
                print(f"{waiting} for the next question", file=sys.stderr)
            elif command.startswith("/") and "/" not in command[1:]:
                print(f"{command} is not a command:\n{COMMANDS}", file=sys.stderr)
            elif line:
                turns = len(conversation.turns)
                try:
                    say(conversation, line, **{**asked, "images": images, "video": video})
                except KeyboardInterrupt:
                    print("\n(stopped)", file=sys.stderr)
                if len(conversation.turns) > turns:
                    images, video = [], None
        except InternVLError as error:
            print(f"error: {error}", file=sys.stderr)


def open_model(folder: Path, device: str, vision_device: str | None, precision: str, cache_dir: Path | None, **_: Any) -> Any:
    """The model of the command line's options."""
    from runtime.model import OVInternVLChatModel

    return OVInternVLChatModel(folder, device, vision_device=vision_device, precision=precision, cache_dir=cache_dir)


def benchmark(**options: Any) -> None:
    """Print each run, the medians, and a last line of JSON."""
    import platform

    import openvino as ov

    from runtime.benchmark import benchmark as measure

    if options["warm_up"] < 0 or options["repeats"] < 1:
        raise OptionError(f"{options['repeats']} repeats after {options['warm_up']} runs of warm-up: at least one is measured")
    print(f"openvino {ov.__version__}, {ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}, Python {platform.python_version()}")
    found = measure(**options, report=lambda line: print(line, flush=True))
    for name, value in found.items():
        print(f"{name:<22} {value:.3f}" if isinstance(value, float) else f"{name:<22} {value}")
    print(json.dumps(found | {"device": options["device"], "precision": options["precision"]}))


def serve(**options: Any) -> None:
    """Answer over HTTP until it is stopped. Raises OptionError."""
    try:
        from runtime.serve import run
    except ModuleNotFoundError as error:
        raise OptionError(f"{error.name} is not installed: pip install 'internvl-openvino[serve]'") from None
    run(**options)


def tune(folder: Path, device: str, reset: bool) -> None:
    """Measure, keep, and say what it brings; or forget it."""
    from runtime.settings import reset as forget

    check_folder(folder)
    if reset:
        print("forgotten: the defaults are back" if forget(folder) else "nothing was tuned here")
        return
    from runtime.tune import tune as find

    found = find(folder, device, show_trial)
    clear_progress()
    for trial in found["tried"]:
        said = f"{trial['gain']:+.0%}" if "gain" in trial else f"refused ({trial['refused']})"
        print(f"{trial['stage']:<10}{trial['candidate']:<42}{said}")
    for part, properties in found["parts"].items():
        chosen = ", ".join(f"{name}={value}" for name, value in properties.items()) or "the default"
        print(f"{part}: {chosen}" + (f", {found['gain'][part]:.0%} less time" if properties else ""))
    second = found["decode"]
    if second:
        told = ", ".join(f"{name}={value}" for name, value in second["properties"].items())
        print(
            f"decode: single tokens have weights of their own, {second['file']}{', ' if told else ''}{told}: "
            f"{found['gain']['decode']:.0%} less time, {second['bytes'] / 1e9:.2f} GB more memory"
        )
    else:
        print("decode: the default, by the same weights as the prompt")
    seconds = found["seconds"]
    print(
        f"a tile {seconds['tile']:.3f} s, a prompt token {1000 * seconds['prompt_token']:.2f} ms, "
        f"a new token {1000 * seconds['token']:.1f} ms; {found['agreement']:.0%} of the greedy tokens are the default's"
    )
    if found["accuracy"]:
        right = found["accuracy"]
        print(f"right answers of the built-in model: {right['tuned']:.1%}, with the defaults {right['default']:.1%}")
    print(json.dumps({name: found[name] for name in ("parts", "decode", "seconds", "gain", "agreement", "accuracy")}))


def show_trial(what: str, done: int, total: int) -> None:
    """One line on a terminal that says what is being tried."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done} of {total}: {what} ", end="", file=sys.stderr, flush=True)


def info(folder: Path) -> None:
    """Print what a model folder holds."""
    from runtime.config import InternVLConfig, read_config

    check_folder(folder)
    config = InternVLConfig.from_dict(read_config(folder / CONFIG_FILE))
    tiles = f"{config.min_tiles} to {config.max_tiles}" if config.dynamic_image_size else "1"
    rows = {
        "folder": folder,
        "language model": f"{config.language_architecture}, {config.language.get('num_hidden_layers')} layers",
        "vision model": f"InternViT, {config.vision.num_hidden_layers} layers of {config.vision.hidden_size}",
        "template": config.template,
        "context": f"{config.context_length} tokens",
        "tiles": f"{tiles} of {config.tile_size} pixels, {config.tokens_per_tile} tokens each",
        **{part: f"{bytes_of(folder, part) / 1e6:.1f} MB  {PART_FILES[part]}" for part in PARTS},
    }
    for name, value in rows.items():
        print(f"{name:<16} {value}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd tags of pictures that are read all the same
    try:
        commands: dict[str, Callable[..., None]] = {
            "chat": chat,
            "benchmark": benchmark,
            "serve": serve,
            "tune": tune,
            "info": info,
        }
        commands[options.pop("command")](**options)
    except InternVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def chat_main() -> int:
    """`internvl-chat ...` is `python -m runtime chat ...`."""
    return main(["chat", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
