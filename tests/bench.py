"""python -m tests.bench: what a conversion at full size takes, in wall time and peak memory.

Makes a random checkpoint of a published shape once and keeps it; converts it in processes of their own, several times. With
--beside COMMAND, another converter is run between ours, so that both see the same machine; {checkpoint} and {output} in it are
filled in. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.checkpoints import CONFIGS, make_checkpoint

CACHE = Path(tempfile.gettempdir()) / "internvl-openvino-bench"


def measure(command: list[str], output: Path) -> dict[str, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="InternVL2-1B", help="shape (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="folder with the model's real tokenizer (default: a tiny one)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--beside", metavar="COMMAND", help="another converter to run between ours")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave our model folder there")
    options = parser.parse_args()
    checkpoint, output = CACHE / options.model, CACHE / "output"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint, options.model, tokenizer=options.tokenizer)
    ours = [sys.executable, "-m", "convert", str(checkpoint), str(output), "--no-verify"]
    commands = {"ours": ours}
    if options.beside:
        commands["beside"] = shlex.split(options.beside.format(checkpoint=checkpoint, output=output))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(options.repeats):
        for name, command in commands.items():
            runs[name].append(measure(command, output))
            print(f"{name:<8} {runs[name][-1]['seconds']:6.1f} s  {runs[name][-1]['peak_gb']:.2f} GB", flush=True)
    shutil.rmtree(output, ignore_errors=True)
    if options.keep:
        measure([str(options.keep) if part == str(output) else part for part in ours], options.keep)
    medians = {name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    for name, median in medians.items():
        print(f"{name:<8} median {median['seconds']:.1f} s, peak {median['peak_gb']:.2f} GB")
    print(json.dumps({"model": options.model, "machine": platform.processor() or platform.machine(), "medians": medians}))


if __name__ == "__main__":
    main()
