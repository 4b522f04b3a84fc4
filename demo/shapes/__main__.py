"""python -m demo.shapes {evaluate,train,places,export,draw}: the arguments, one call, one table."""

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
    p = CommandParser(prog="python -m demo.shapes", description="A small InternVL that sees drawn scenes.")
    verbs = p.add_subparsers(dest="verb", required=True)

    v = verbs.add_parser("evaluate", help="accuracy a task on unseen scenes; the last line is JSON")
    v.add_argument(
        "source", metavar="FOLDER_OR_CHECKPOINT", type=Path, nargs="?", default=CHECKPOINT, help="(default: the shipped one)"
    )
    v.add_argument("--limit", type=int, default=1000, metavar="N", help="questions (default: %(default)s)")
    v.add_argument("--seed", type=int, default=1, help="of the questions (default: %(default)s)")
    v.add_argument("--split", choices=["test", "held_out"], default="test", help="(default: %(default)s)")
    v.add_argument("--max-tiles", type=int, metavar="N", help="tiles a picture at most (default: as trained)")
    v.add_argument("--noise", action="store_true", help="show noise instead of the pictures")
    v.add_argument("--places", action="store_true", help="ask for boxes instead; right from an intersection over union of 0.5")
    v.add_argument("--device", default="CPU", help="OpenVINO device, or CPU or CUDA for a checkpoint (default: %(default)s)")
    v.add_argument("--mistakes", type=int, default=0, metavar="N", help="print the first N wrong answers")

    v = verbs.add_parser("train", help="train from scratch, or resume an interrupted run")
    v.add_argument("run", metavar="RUN", type=Path, help="folder of the run: its state and its log")
    v.add_argument("output", metavar="CHECKPOINT", type=Path, help="checkpoint to write at the end")
    v.add_argument("--samples", type=int, help="scenes to train on")
    v.add_argument("--start", metavar="CHECKPOINT", help="start from its weights, not from random ones")
    v.add_argument("--first", type=int, metavar="N", help="scenes that it has seen; training goes on after them")
    v.add_argument("--seed", type=int, help="of scenes and starting values")
    v.add_argument("--preset", choices=["cpu", "gpu"], help="sizes of the model")
    v.add_argument("--batch", type=int, help="scenes a step")
    v.add_argument("--micro", type=int, help="scenes at once; on a GPU as many as --batch")
    v.add_argument("--rate", type=float, help="highest learning rate")
    v.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    v.add_argument("--minutes", type=float, default=1e9, help="stop after that long, to resume later")

    v = verbs.add_parser("places", help="teach a checkpoint to answer with boxes, one stage a call; resumes an interrupted one")
    v.add_argument("run", metavar="RUN", type=Path, help="folder of the stages: their states and logs")
    v.add_argument("stage", choices=["vision", "language", "joint", "mend"], help="joint starts from both, mend from joint")
    v.add_argument("--steps", type=int, metavar="N", help="of the stage (default: the recipe's)")
    v.add_argument("--start", default=str(CHECKPOINT), metavar="CHECKPOINT", help="what is taught (default: the shipped one)")
    v.add_argument("--output", metavar="CHECKPOINT", type=Path, help="checkpoint to write at the end of joint or mend")
    v.add_argument("--seed", type=int, help="of scenes")
    v.add_argument("--rate", type=float, help="highest learning rate")
    v.add_argument("--minutes", type=float, default=1e9, help="stop after that long, to resume later")

    v = verbs.add_parser("export", help="write the averaged weights of a run as they are now")
    v.add_argument("run", metavar="RUN", type=Path)
    v.add_argument("output", metavar="CHECKPOINT", type=Path)

    v = verbs.add_parser("draw", help="draw a test scene and print its questions and answers")
    v.add_argument("output", metavar="PICTURE", type=Path, help="png to write; a number is added for each further picture")
    v.add_argument("--kind", help="kind of scene, like grid, row, text, chart, small_text, compare or motion (default: random)")
    v.add_argument("--seed", type=int, default=1)
    v.add_argument("--index", type=int, default=0)
    return p


@ending_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    try:
        {"evaluate": _evaluate, "train": _train, "places": _places, "export": _export, "draw": _draw}[options.pop("verb")](
            **options
        )
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error, 'convert,demo')}", file=sys.stderr)
        return 2
    except InternVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _evaluate(source: Path, device: str, mistakes: int, places: bool = False, **asked: object) -> None:
    from demo.shapes.evaluate import EvaluateOptions, evaluate, evaluate_places, open_model, table

    options = EvaluateOptions(**asked)  # type: ignore[arg-type]
    result = (evaluate_places if places else evaluate)(open_model(source, device), options)
    wrong = result.pop("mistakes")
    for mistake in wrong[:mistakes]:
        print("{index}: {question} {expected!r}, answered {given!r}".format(**mistake))
    print(table(result))
    print(json.dumps({"source": str(source), **asked, **result}))


def _train(run: Path, output: Path, device: str, minutes: float, **changes: object) -> None:
    from demo.shapes.train import TrainOptions, train

    chosen = {name: value for name, value in changes.items() if value is not None}
    done = train(run, output, TrainOptions(**chosen), device=device, minutes=minutes)  # type: ignore[arg-type]
    if done.step == done.options.steps:
        _evaluate(output, "CPU", 0, limit=1000)


def _places(run: Path, output: Path | None, minutes: float, **changes: object) -> None:
    from demo.shapes.place_samples import PlaceOptions
    from demo.shapes.places import teach_places

    chosen = {name: value for name, value in changes.items() if value is not None}
    teach_places(run, output, PlaceOptions.of(**chosen), minutes=minutes)  # type: ignore[arg-type]


def _export(run: Path, output: Path) -> None:
    from demo.shapes.train import open_run

    open_run(run).export(output)


def _draw(output: Path, kind: str | None, seed: int, index: int) -> None:
    from demo.shapes.scenes import make_scene

    scene = make_scene(seed, "test", index, kind=kind)
    for n, canvas in enumerate(scene.canvases):
        canvas.picture.save(output.with_stem(f"{output.stem}-{n + 1}") if n else output)
    for group in scene.groups:
        print(" / ".join(f"{turn.question} {turn.answer}" for turn in group))


if __name__ == "__main__":
    sys.exit(main())
