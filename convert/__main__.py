"""python -m convert SOURCE [OUTPUT]: arguments, one call, one summary table."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from convert import convert
from convert.options import BACKUP_PRECISIONS, DEFAULT, FAST, FORMATS, GROUP, RECIPES, VISION_FORMATS, ConvertOptions
from convert.serving import OVMS
from runtime import __version__
from runtime.errors import InternVLError, not_installed
from runtime.terminal import CommandParser, ending_quietly

EXIT_INTERRUPTED = 2
COMPARE = "compare"


def parser() -> argparse.ArgumentParser:
    default = ConvertOptions()
    p = CommandParser(
        prog="python -m convert",
        description="Convert an InternVL checkpoint to an OpenVINO model folder and verify it against the PyTorch path.",
        epilog=f"What folders of one checkpoint lose, side by side:  python -m convert {COMPARE} --help",
    )
    p.add_argument("--version", action="version", version=__version__)
    p.add_argument("source", metavar="SOURCE", help="checkpoint: a hub id like OpenGVLab/InternVL2-1B, or a local folder")
    p.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="model folder to write (default: the source's name and weight format)"
    )
    weights = p.add_argument_group("weights (names as in optimum-cli)")
    weights.add_argument(
        "--weight-format",
        choices=FORMATS,
        default=default.weight_format,
        help="of the language part; with int4, text embeddings are int8, vision follows its own flag (default: %(default)s)",
    )
    weights.add_argument(
        "--vision-weight-format",
        choices=VISION_FORMATS,
        default=default.vision_weight_format,
        help="of the vision part; w8a8 computes in 8 bits too; auto: with int4, w8a8 if test pictures prove it, else int8 (always "
        "for an InternViT-6B of a chat model); with other formats, that format (default: %(default)s)",
    )
    weights.add_argument(
        "--text-embeddings-weight-format", choices=FORMATS, help="of the text embeddings (default: follows --weight-format)"
    )
    weights.add_argument(
        "--recipe",
        choices=(*RECIPES, FAST),
        help="of int4 in the language part: default, small (smallest) and exact (loses least, slower) are calibrated on the "
        f"checkpoint's own answers; fast only rounds (default: {DEFAULT})",
    )
    weights.add_argument(
        "--max-loss",
        type=float,
        metavar="KL",
        help="search the smallest int4 of the language part that loses at most this (mean KL of the next token) on questions of "
        "the search, instead of a recipe; goes on after an interruption (default: no search)",
    )
    weights.add_argument(
        "--minutes",
        type=float,
        default=default.minutes,
        metavar="M",
        help="how long --max-loss may search; the conversion's own time is added (default: %(default)g)",
    )
    weights.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="quantisation group of int4: weights that share a scale; -1 is one scale a row (default: "
        f"{RECIPES[DEFAULT].group}, small, fast and vision {GROUP}, exact {RECIPES['exact'].group})",
    )
    weights.add_argument(
        "--ratio",
        type=float,
        default=default.ratio,
        metavar="R",
        help="share of int4 layers; the rest has the backup precision (default: %(default)s)",
    )
    weights.add_argument("--sym", action="store_true", help="symmetric weights without zero points (default: asymmetric)")
    weights.add_argument(
        "--backup-precision",
        choices=BACKUP_PRECISIONS,
        default=default.backup_precision,
        help="of the head and of the layers that --ratio leaves out (default: %(default)s)",
    )
    weights.add_argument(
        "--awq", action="store_true", help="activation-aware scaling of int4; without --dataset it uses the weights alone"
    )
    weights.add_argument("--scale-estimation", action="store_true", help="fit int4 scales to activations; needs --dataset")
    weights.add_argument(
        "--dataset",
        metavar="FOLDER",
        help="pictures to calibrate on, besides the built-in ones for w8a8; every fourth is held out for the proof; NAME.txt "
        "next to NAME.jpg is the question (default: none)",
    )
    weights.add_argument(
        "--num-samples",
        type=int,
        default=default.num_samples,
        metavar="N",
        help="maximum number of pictures (default: %(default)s)",
    )
    own = p.add_argument_group("fine-tuned models")
    own.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter of PEFT to merge into the weights")
    own.add_argument("--template", metavar="NAME", help="conversation template (default: named in config.json)")
    own.add_argument("--system-message", metavar="TEXT", help="system message (default: the one the model was trained with)")
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=default.verify,
        help="compare every part with the PyTorch path; exit with 1 if the drift exceeds the weight format's bound (default: on)",
    )
    p.add_argument(
        "--reference-cache",
        metavar="FOLDER",
        help="folder for the PyTorch path's answers; later conversions of this checkpoint reuse them (default: none)",
    )
    p.add_argument(
        "--serving",
        choices=(OVMS,),
        help="write the model folder into OUTPUT, a model repository of OpenVINO Model Server (default: models)",
    )
    p.add_argument("--force", action="store_true", help="replace OUTPUT once the new folder is complete")
    hub = p.add_argument_group("hub")
    hub.add_argument("--revision", help="branch, tag or commit (default: main)")
    hub.add_argument("--token", help="access token (default: the stored login)")
    hub.add_argument("--cache-dir", metavar="FOLDER", help="where downloads are kept (default: the hub's cache)")
    return p


def _compare(arguments: Sequence[str]) -> int:
    """python -m convert compare, imported here so that other commands do not load its libraries."""
    try:
        from convert.compare import main as compare

        return compare(arguments)
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error, 'convert')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


@ending_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [COMPARE]:
        return _compare(given[1:])
    options = vars(parser().parse_args(given))
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # a stopped conversion cleans up like an interrupted one
        signal.signal(number, interrupt)
    try:
        summary = convert(options.pop("source"), options.pop("output"), ConvertOptions(**options))
    except BrokenPipeError:
        raise
    except BaseException as error:
        if interrupted.is_set():  # checked first: OpenVINO's C++ turns an interrupt into some other error
            again = "start again" if options["max_loss"] is None else "go on with the search"
            print(f"error: interrupted, no folder was written; run the same command to {again}", file=sys.stderr)
            return EXIT_INTERRUPTED
        if isinstance(error, ModuleNotFoundError):
            error = not_installed(error, "convert")
        if isinstance(error, InternVLError):
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        raise
    print(*summary.lines(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
