"""python -m demo.contrast {evaluate,train,draw}: the arguments, one call, one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import InternVLError, not_installed
from runtime.terminal import CommandParser, ending_quietly

CHECKPOINT = Path(__file__).parent / "checkpoint"


def parser() -> argparse.ArgumentParser:
    p = CommandParser(prog="python -m demo.contrast", description="A small InternVL-C and -G that knows drawn scenes.")
    verbs = p.add_subparsers(dest="verb", required=True)

    v = verbs.add_parser("evaluate", help="recall and captions on unseen scenes; the last line is JSON")
    v.add_argument(
        "source", metavar="FOLDER_OR_CHECKPOINT", type=Path, nargs="?", default=CHECKPOINT, help="(default: the shipped one)"
    )
    v.add_argument("--scenes", type=int, default=500, metavar="N", help="(default: %(default)s)")
    v.add_argument("--seed", type=int, default=1, help="of the scenes (default: %(default)s)")
    v.add_argument("--split", choices=["test", "held_out"], default="test", help="(default: %(default)s)")

    v = verbs.add_parser("train", help="train, or resume an interrupted run")
    v.add_argument("run", metavar="RUN", type=Path, help="folder of the run: its state and its log")
    v.add_argument("output", metavar="CHECKPOINT", type=Path, help="checkpoint to write")
    v.add_argument("--steps", type=int, help="steps of the optimisers")
    v.add_argument("--batch", type=int, help="scenes a step")
    v.add_argument("--rate", type=float, help="highest learning rate")

    v = verbs.add_parser("draw", help="draw test scenes into a folder, with their descriptions as a .tsv file of pairs")
    v.add_argument("output", metavar="FOLDER", type=Path)
    v.add_argument("--scenes", type=int, default=60, metavar="N", help="(default: %(default)s)")
    v.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    return p


@ending_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    try:
        {"evaluate": _evaluate, "train": _train, "draw": _draw}[options.pop("verb")](**options)
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error, 'convert,demo')}", file=sys.stderr)
        return 2
    except InternVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _evaluate(source: Path, **asked: int | str) -> None:
    from demo.contrast.evaluate import evaluate, open_source

    result = evaluate(open_source(source), **asked)  # type: ignore[arg-type]
    for name, value in result.items():
        print(f"{name:<36}{value:.1%}" if isinstance(value, float) else f"{name:<36}{value}")
    print(json.dumps({"source": str(source), **asked, **result}))


def _train(run: Path, output: Path, **changes: float | None) -> None:
    from demo.contrast.train import TrainOptions, train

    train(run, output, TrainOptions(**{name: value for name, value in changes.items() if value is not None}))  # type: ignore[arg-type]


def _draw(output: Path, scenes: int, seed: int) -> None:
    from demo.contrast.scenes import unseen

    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(unseen(seed, scenes)):
        scene.picture.save(output / f"{number:03}.png")
        lines += [f"{number:03}.png\t{text}\n" for text in scene.texts.values()]
    (output / "pairs.tsv").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
