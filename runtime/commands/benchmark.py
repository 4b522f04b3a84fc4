"""python -m runtime benchmark FOLDER: measure first token, time per token, second turn, memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from runtime.commands.options import add_flash, add_placement
from runtime.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_placement(parser)
    add_flash(parser)
    parser.add_argument("--image", metavar="FILE", type=Path, help="picture to ask about (default: a random one of 1000 x 750)")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles of the picture (default: the model's, often 12)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measured runs (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, metavar="N", help="unmeasured runs before them (default: %(default)s)")


def run(**options: Any) -> None:
    """Print each run, the medians, and a last line of JSON."""
    import platform

    import openvino as ov

    from runtime.measure.benchmark import benchmark as measure

    if options["warm_up"] < 0 or options["repeats"] < 1:
        raise OptionError(f"{options['repeats']} repeats after {options['warm_up']} runs of warm-up: at least one is measured")
    print(f"openvino {ov.__version__}, {ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}, Python {platform.python_version()}")
    found = measure(**options, report=lambda line: print(line, flush=True))
    for name, value in found.items():
        print(f"{name:<22} {value:.3f}" if isinstance(value, float) else f"{name:<22} {value}")
    print(json.dumps(found | {"device": options["device"], "precision": options["precision"]}))
