"""python -m runtime tune FOLDER: find the fastest settings of this machine and keep them in the folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from runtime.commands.options import add_folder, show_line
from runtime.folder.files import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--device", default="CPU", help="OpenVINO device, like CPU or GPU, or auto for all (default: %(default)s)")
    parser.add_argument("--reset", action="store_true", help="delete the kept settings of all devices")


def run(folder: Path, device: str, reset: bool) -> None:
    """Measure, keep and print the settings; or delete them."""
    from runtime.folder.settings import BEST
    from runtime.folder.settings import reset as forget

    check_folder(folder)
    if reset:
        print("deleted: the defaults apply again" if forget(folder) else "there are no tuned settings")
        return
    from runtime.measure.tune import tune as find

    found = find(folder, device, show_trial)
    show_line("")
    for trial in found["tried"]:
        said = f"{trial['gain']:+.0%}" if "gain" in trial else f"refused ({trial['refused']})"
        print(f"{trial['stage']:<10}{trial['candidate']:<42}{said}")
    seconds = found["seconds"]
    times = (
        f"a tile {seconds['tile']:.3f} s, a prompt token {1000 * seconds['prompt_token']:.2f} ms, "
        f"a new token {1000 * seconds['token']:.1f} ms"
    )
    if device == BEST:
        print(f"auto: language on {found['device']}, vision on {found['vision_device']}\n{times}")
        print(json.dumps({name: found[name] for name in ("device", "vision_device", "seconds", "gain")}))
        return
    for part, properties in found["parts"].items():
        chosen = ", ".join(f"{name}={value}" for name, value in properties.items()) or "the default"
        print(f"{part}: {chosen}" + (f", {found['gain'][part]:.0%} less time" if properties else ""))
    second = found["decode"]
    if second:
        told = ", ".join(f"{name}={value}" for name, value in second["properties"].items())
        print(
            f"decode: its own copy of the weights, {second['file']}{', ' if told else ''}{told}: "
            f"{found['gain']['decode']:.0%} less time, {second['bytes'] / 1e9:.2f} GB more memory"
        )
    else:
        print("decode: the default, with the weights of the prefill")
    print(f"{times}; {found['agreement']:.0%} of the greedy tokens equal the default's")
    if found["accuracy"]:
        right = found["accuracy"]
        print(f"right answers of the built-in model: {right['tuned']:.1%}, with the defaults {right['default']:.1%}")
    print(json.dumps({name: found[name] for name in ("parts", "decode", "seconds", "gain", "agreement", "accuracy")}))


def show_trial(what: str, done: int, total: int) -> None:
    """Show the candidate that is being timed."""
    show_line(f"{done} of {total}: {what} ")
