"""python -m tests.bench: conversion and answers at full size, beside openvino_genai and optimum-intel, in one run.

Makes a random checkpoint of a published shape once and keeps it; converts it; then every peer answers in a process of its own,
taking turns at each figure, so that all see the same machine. Beside them stand the machine's own ceilings. Prints a Markdown
table, writes the figures as JSON and, with --plot, the ratios as bars. With --beside COMMAND another converter runs between
ours; {checkpoint} and {output} in it are filled in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.checkpoints import CONFIGS, make_checkpoint

CACHE = Path(tempfile.gettempdir()) / "internvl-openvino-bench"
SIZES = {1: (448, 448), 7: (1200, 800), 13: (1000, 750)}  # pictures that are cut into so many tiles
NEW_TOKENS, BATCH_TOKENS = 32, 32
LONG_REPEATS, LONG_SECONDS = 2, 30  # a figure that takes longer is measured so often, or a slow machine needs hours
LONG_WORDS = 4000  # two tokens each: about 8,000
RECIPE = ["--vision-weight-format", "int8", "--recipe", "fast"]
TUNED = "tuned"  # ours, after `python -m runtime tune`; opening and the batch are left out to save time
Runs = dict[str, dict[str, list[dict[str, float]]]]  # of a figure, of a peer


def timed(command: list[str], output: Path) -> dict[str, float]:
    """Run once; wall seconds and peak resident memory in GB of the process, imports included."""
    shutil.rmtree(output, ignore_errors=True)
    # a child of its own: a peak is kept for the largest child of a process
    code = (
        "import json, resource, subprocess, sys; "
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(json.dumps([code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    code_, kilobytes = json.loads(done.stdout)
    if code_:
        raise SystemExit(f"{shlex.join(command)} ended with {code_}:\n{done.stderr[-2000:]}")
    return {"seconds": seconds, "peak_gb": kilobytes * 1024 / 1e9}


class Peer:
    """A process of tests.bench_peers."""

    def __init__(self, name: str, folder: Path, cache: Path | None = None):
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench_peers", name, str(folder), *([str(cache)] if cache else [])]
        started = time.monotonic()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.load = self._read()
        self.load["start"] = time.monotonic() - started

    def do(self, task: str, **arguments: Any) -> dict[str, float]:
        """Have something done; returns its figures."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{shlex.join(map(str, self._process.args))} ended early")  # type: ignore[arg-type]


def ceilings() -> dict[str, float]:
    """What this machine can do at best, in a process of its own: bytes read and operations a second."""
    code = """
import json, time, torch
def seconds(run):
    run()
    times = []
    for _ in range(5):
        started = time.perf_counter(); run(); times.append(time.perf_counter() - started)
    return min(times)
def rate(kind, multiply):
    n = 256  # as large as takes a moment: without instructions for a type it is hundreds of times slower
    while True:
        a = torch.ones(n, n, dtype=kind)
        took = seconds(lambda: multiply(a, a))
        if n == 2048 or took > 0.05:
            return 2 * n**3 / took
        n *= 2
big = torch.ones(1 << 28)
found = {"read_bytes": big.nbytes / seconds(lambda: big.sum())}
found["f32"], found["bf16"] = rate(torch.float32, torch.matmul), rate(torch.bfloat16, torch.matmul)
found["int8"] = rate(torch.int8, torch._int_mm)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def floors(checkpoint: Path, folder: Path, found: dict[str, float]) -> dict[str, float]:
    """The least that a tile, a prompt token and a written token can take under these ceilings, in seconds."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision, language = config["vision_config"], config["llm_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    layer = 2 * patches * (4 * width * width + 2 * width * inner) + 4 * patches * patches * width
    rate = max(found["f32"], found["bf16"])
    d, heads, groups = language["hidden_size"], language["num_attention_heads"], language["num_key_value_heads"]
    weights = language["num_hidden_layers"] * (2 * d * d + 2 * d * d * groups // heads + 3 * d * language["intermediate_size"])
    kv = 2 * language["num_hidden_layers"] * groups * (d // heads)  # bytes a token at 8 bits
    read = (folder / "openvino_language_model.bin").stat().st_size
    return {
        "tile": vision["num_hidden_layers"] * layer / rate,
        "prompt_token": 2 * weights / rate,
        **{
            f"token_{name}": (read + kv * tokens) / found["read_bytes"]
            for name, tokens in (("0.3k", 300), ("3.4k", 3400), ("8k", 8000))
        },
    }


def picture(folder: Path, tiles: int, number: int) -> Path:
    """A smooth random picture that is cut into so many tiles; another one for each number, for peers may know the last."""
    width, height = SIZES[tiles]
    file = folder / f"{tiles}-{number}.png"
    pixels = np.random.default_rng([tiles, number]).integers(0, 255, (height // 50, width // 50, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file)
    return file


def answers(folders: dict[str, Path], work: Path, repeats: int) -> Runs:
    """All figures of all peers, by the folder of each."""
    runs: Runs = {}

    def note(figure: str, name: str, found: dict[str, float]) -> None:
        runs.setdefault(figure, {}).setdefault(name, []).append(found)
        print(figure, name, json.dumps({key: round(value, 4) for key, value in found.items()}), flush=True)

    in_float32 = "BENCH_PROPERTIES" in os.environ
    for number in range(0 if in_float32 else repeats):
        for name, folder in folders.items():
            if name == TUNED:
                continue
            note("load", name, fresh(name, folder))
            if number == 0:
                fresh(name, folder, work / f"cache-{name}")  # which fills it
            note("load cached", name, fresh(name, folder, work / f"cache-{name}"))
    for tiles, tokens in () if in_float32 else ((1, 16), (13, 128)):
        for number in range(repeats):
            for name in ("ours", "genai"):
                if name in folders:
                    note(f"command {tiles}", name, command(name, folders[name], picture(work, tiles, number), tokens))
    peers = {name: Peer(name, folder) for name, folder in folders.items()}
    for peer in peers.values():
        peer.do("first", image=str(picture(work, 1, repeats)), tokens=4)  # what is done once
    for tiles in SIZES:
        for number in range(repeats):
            image = str(picture(work, tiles, number))
            for name, peer in peers.items():
                if enough(runs, f"{tiles} tiles", name, number, "first_token"):
                    continue
                note(f"{tiles} tiles", name, peer.do("first", image=image, tokens=NEW_TOKENS))
                if name in ("ours", "genai"):
                    note(f"{tiles} tiles again", name, peer.do("first", image=image, tokens=4, again=True))
    for name, peer in peers.items():
        note("peak", name, peer.do("peak"))
    if "ours" in peers:
        for number in range(repeats):
            note("scanned page", "ours", peers["ours"].do("first", image=str(page(work, number)), tokens=1))
            still = [str(picture(work, 1, 100 + number))] * 8
            moving = [str(picture(work, 1, 200 + 8 * number + frame)) for frame in range(8)]
            note("still frames", "ours", peers["ours"].do("frames", images=still))
            note("moving frames", "ours", peers["ours"].do("frames", images=moving))
    if "optimum" in peers:
        peers.pop("optimum").close()
    long = "red ball " * LONG_WORDS
    for figure, text, image in (("chat 3.4k", "Describe this picture.", str(picture(work, 13, 0))), ("chat 8k", long, None)):
        for peer in peers.values():
            peer.do("begin", text=text, image=image, tokens=4)
        for number in range(repeats):
            for name, peer in peers.items():
                note(figure, name, peer.do("turn", text=f"What is {number}?", image=None, tokens=NEW_TOKENS))
    for number in range(repeats):
        for name, peer in peers.items():
            if name != TUNED and not enough(runs, "batch of 8", name, number, "seconds"):
                note("batch of 8", name, peer.do("batch", image=str(picture(work, 1, number)), tokens=BATCH_TOKENS))
    for peer in peers.values():
        peer.close()
    return runs


def page(folder: Path, number: int) -> Path:
    """A scanned page of 13 tiles: white, with print in two of them."""
    file = folder / f"page-{number}.png"
    sheet = Image.new("RGB", (448 * 4, 448 * 3), "white")
    for column in (0, 2):
        print_ = picture(folder, 1, 300 + 2 * number + column // 2)
        with Image.open(print_) as ink:
            sheet.paste(ink.convert("1").convert("RGB").resize((400, 400)), (448 * column + 20, 448 + 20))
    sheet.save(file)
    return file


def enough(runs: Runs, figure: str, name: str, number: int, key: str) -> bool:
    """Whether a figure that takes long has been measured often enough."""
    return number >= LONG_REPEATS and runs[figure][name][0][key] > LONG_SECONDS


def fresh(name: str, folder: Path, cache: Path | None = None) -> dict[str, float]:
    """How long a new process takes to import what it needs and to open the folder."""
    peer = Peer(name, folder, cache)
    peer.close()
    return peer.load


def command(name: str, folder: Path, image: Path, tokens: int) -> dict[str, float]:
    """One question from a terminal: seconds from the start of the process to its first letter and to its end, and its peak."""
    question = "Describe this picture."
    script = [str(Path(__file__).with_name("bench_script.py")), str(folder), question, str(image), str(tokens)]
    ours = ["-m", "runtime", "chat", str(folder), question, "--image", str(image), "--max-new-tokens", str(tokens)]
    ours += ["--prompt-lookup", "0"]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *(script if name == "genai" else ours)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    letter = time.monotonic() - started
    process.stdout.read()
    _, code, used = os.wait4(process.pid, 0)
    if code:
        raise SystemExit(f"{shlex.join(map(str, process.args))} ended with {code}")  # type: ignore[arg-type]
    return {"letter": letter, "whole": time.monotonic() - started, "peak_gb": used.ru_maxrss * 1024 / 1e9}


def medians(runs: Runs) -> dict[str, dict[str, dict[str, float]]]:
    """Of each figure, peer and key."""
    return {
        figure: {name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in peers.items()}
        for figure, peers in runs.items()
    }


def rows(found: dict[str, Any]) -> list[tuple[str, dict[str, float], float | None, str]]:
    """(figure, value of each peer, floor, unit); for throughput more is better."""
    m, low = found["medians"], found["floors"]
    made: list[tuple[str, dict[str, float], float | None, str]] = []

    def add(title: str, figure: str, key: str, floor: float | None = None, unit: str = "s") -> None:
        values = {name: peer[key] for name, peer in m.get(figure, {}).items() if key in peer}
        if values:
            made.append((title, values, floor, unit))

    add("opening the folder", "load", "open")
    add("opening with compiled models kept", "load cached", "open")
    add("start of a process to an open folder", "load", "start")
    for tiles in (1, 13):
        add(f"start of a command to its first letter, {tiles} tiles", f"command {tiles}", "letter")
        add(f"peak memory of that command, {tiles} tiles", f"command {tiles}", "peak_gb", None, "GB")
    add("that command as a whole, 13 tiles and 128 tokens", "command 13", "whole")
    for tiles in SIZES:
        floor = tiles * low["tile"]
        prompt = m[f"{tiles} tiles"]["ours"]["prompt_tokens"] * low["prompt_token"]
        add(f"first token, {tiles} tiles", f"{tiles} tiles", "first_token", floor + prompt)
        add(f"of it vision, {tiles} tiles", f"{tiles} tiles", "vision", floor)
        add(f"of it prefill, {tiles} tiles", f"{tiles} tiles", "prefill", prompt)
    add("time a token, 0.3k context", "1 tiles", "token", low["token_0.3k"], "ms")
    add("time a token, 3.4k context", "chat 3.4k", "token", low["token_3.4k"], "ms")
    add("time a token, 8k context", "chat 8k", "token", low["token_8k"], "ms")
    add("next turn, first token, 3.4k", "chat 3.4k", "first_token")
    add("next turn, first token, 8k", "chat 8k", "first_token")
    add("same picture, another question, 13 tiles", "13 tiles again", "first_token")
    add("eight prompts of one tile at once", "batch of 8", "tokens_a_second", None, "tokens/s")
    add("peak resident memory", "peak", "peak_gb", None, "GB")
    if "scanned page" in m:
        add("a scanned page, print in 2 of 12 tiles, first token", "scanned page", "first_token")
        add("eight frames of a still camera, first token", "still frames", "first_token")
        add("eight different frames, first token", "moving frames", "first_token")
    return made


def ratio(values: dict[str, float], unit: str) -> float | None:
    """Ours to openvino_genai's."""
    return values["ours"] / values["genai"] if "genai" in values else None


def table(found: dict[str, Any]) -> list[str]:
    """Markdown."""
    names = found["peers"]
    lines = ["| | " + " | ".join(names) + " | ours to genai | ours to the floor |", "|" + " --- |" * (len(names) + 3)]
    for title, values, floor, unit in rows(found):
        scale = 1000 if unit == "ms" else 1
        cells = [f"{values[name] * scale:.{1 if unit == 'ms' else 2}f} {unit}" if name in values else "" for name in names]
        share = ratio(values, unit)
        ends = [f"{share:.2f}" if share else "", f"{values['ours'] / floor:.1f}" if floor else ""]
        lines.append("| " + " | ".join([title, *cells, *ends]) + " |")
    return lines


def plot(found: dict[str, Any], file: Path) -> None:
    """The ratios as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(title, share, unit) for title, values, _, unit in rows(found) if (share := ratio(values, unit))]
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(bars) + 1))
    shares = [1 / share if unit == "tokens/s" else share for _, share, unit in bars]
    axes.barh([title for title, *_ in bars], shares, color=["#2a7" if share <= 1.05 else "#c55" for share in shares])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("ours to openvino_genai's: below 1 is faster or smaller")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="InternVL2-1B", help="shape (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="folder with the model's real tokenizer (default: a tiny one)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each figure (default: %(default)s)")
    parser.add_argument("--conversions", type=int, default=3, help="runs of each converter (default: %(default)s)")
    parser.add_argument("--beside", metavar="COMMAND", help="another converter to run between ours")
    parser.add_argument(
        "--tuned-with", metavar="FLAGS", default="", help="flags of convert for the tuned folder, like those of w8a8"
    )
    parser.add_argument(
        "--other", metavar="FOLDER", type=Path, help="what the peers open, from optimum-cli (default: its recipe, converted by us)"
    )
    parser.add_argument("--peers", default=f"ours,{TUNED},genai,optimum", help="whose answers are timed (default: %(default)s)")
    parser.add_argument(
        "--float32",
        action="store_true",
        help="ours and openvino_genai compute in float32, as laptops without bfloat16 do (with ONEDNN_MAX_CPU_ISA=AVX2_VNNI); "
        "starts of processes are left out",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, default=Path("build/bench.json"), help="(default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="bars of the ratios")
    options = parser.parse_args()
    if options.float32:
        os.environ["BENCH_PROPERTIES"] = json.dumps({"INFERENCE_PRECISION_HINT": "f32"})
    checkpoint, folder = CACHE / options.model, CACHE / f"{options.model}-int4"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint, options.model, tokenizer=options.tokenizer)
    commands = {"ours": [sys.executable, "-m", "convert", str(checkpoint), str(folder), "--no-verify"]}
    other = CACHE / "beside"
    if options.beside:
        commands["beside"] = shlex.split(options.beside.format(checkpoint=checkpoint, output=other))
    conversions: Runs = {"conversion": {name: [] for name in commands}}
    for _ in range(options.conversions):
        for name, command in commands.items():
            conversions["conversion"][name].append(timed(command, folder if name == "ours" else other))
            print("conversion", name, json.dumps(conversions["conversion"][name][-1]), flush=True)
    found: dict[str, Any] = {"model": options.model, "machine": machine(), "peers": options.peers.split(",")}
    found["ceilings"] = ceilings()
    found["floors"] = floors(checkpoint, folder, found["ceilings"])
    recipe = options.other
    if recipe is None:  # as optimum-cli has it: the vision part in int8, the language part in int4
        recipe = folder.with_name(f"{folder.name}-recipe")
        timed([*(str(recipe) if part == str(folder) else part for part in commands["ours"]), *RECIPE], recipe)
    folders = {name: folder if name in ("ours", TUNED) else recipe for name in found["peers"]}
    if TUNED in folders:
        folders[TUNED] = tuned_folder(commands["ours"], folder, shlex.split(options.tuned_with))
    with tempfile.TemporaryDirectory() as work:
        runs = answers(folders, Path(work), options.repeats)
    runs |= conversions if options.conversions else {}
    found |= {"runs": runs, "medians": medians(runs)}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["machine"]), json.dumps({name: f"{value:.3g}" for name, value in found["ceilings"].items()}))
    for name, median in found["medians"].get("conversion", {}).items():
        print(f"conversion, {name}: {median['seconds']:.1f} s, peak {median['peak_gb']:.2f} GB")
    print(*table(found), sep="\n")
    if options.plot:
        plot(found, options.plot)


def tuned_folder(convert: list[str], folder: Path, flags: list[str]) -> Path:
    """The model folder, or with flags one of its own, with the settings that are best here."""
    copy = folder.with_name(f"{folder.name}-{TUNED}")
    shutil.rmtree(copy, ignore_errors=True)
    if flags:
        print(
            "conversion",
            TUNED,
            json.dumps(timed([*(str(copy) if part == str(folder) else part for part in convert), *flags], copy)),
        )
    else:
        shutil.copytree(folder, copy)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "runtime", "tune", str(copy)], capture_output=True, text=True, check=True
    )
    print(done.stdout, flush=True)
    return copy


def machine() -> dict[str, str]:
    """What it ran on."""
    from importlib.metadata import version

    import openvino as ov

    names = ("openvino", "openvino-genai", "optimum-intel", "nncf", "torch", "transformers")
    return {
        "processor": str(ov.Core().get_property("CPU", "FULL_DEVICE_NAME")),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
