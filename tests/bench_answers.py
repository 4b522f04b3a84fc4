"""python -m tests.bench_answers FOLDER --image PICTURE: answers beside openvino_genai.VLMPipeline, taking turns.

Each run is a process of its own. Both get the same folder, picture, question and number of tokens. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.memory import peak_bytes

QUESTION, SECOND_QUESTION, SECOND_TOKENS = "Describe this picture.", "What colour is it?", 4


def ours(folder: Path, image: Path, tokens: int) -> dict[str, float]:
    """Our conversation: two turns, then the same picture in a new one. The peak is taken before that, as the peer ends there."""
    from runtime.model import OVInternVLChatModel

    started = time.perf_counter()
    model = OVInternVLChatModel(folder)
    load = time.perf_counter() - started
    conversation = model.start_conversation()
    found = []
    for question, images, count in ((QUESTION, [image], tokens), (SECOND_QUESTION, [], SECOND_TOKENS)):
        conversation.ask(question, images=images, max_new_tokens=count, do_sample=False)
        found.append(conversation.statistics)
    peak = peak_bytes()
    other = model.start_conversation()
    other.ask(SECOND_QUESTION, images=[image], max_new_tokens=SECOND_TOKENS, do_sample=False)
    first, second = found
    return {
        "load_seconds": load,
        "first_token_seconds": first.first_token_seconds,
        "token_seconds": first.token_seconds,
        "second_turn_seconds": second.first_token_seconds,
        "same_picture_seconds": other.statistics.first_token_seconds,
        "peak_gb": peak / 1e9,
        "prompt_tokens": first.prompt_tokens,
        "second_prompt_tokens": second.prompt_tokens - second.reused_tokens,
    }


def peer(folder: Path, image: Path, tokens: int) -> dict[str, float]:
    """openvino_genai's chat with its default backend, from a cold process as ours."""
    import numpy as np
    import openvino as ov
    import openvino_genai
    from PIL import Image

    started = time.perf_counter()
    pipeline = openvino_genai.VLMPipeline(folder, "CPU")
    load = time.perf_counter() - started
    picture = ov.Tensor(np.asarray(Image.open(image).convert("RGB"))[None])
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    pipeline.start_chat()
    config.max_new_tokens = tokens
    first = pipeline.generate(QUESTION, images=[picture], generation_config=config).perf_metrics
    config.max_new_tokens = SECOND_TOKENS
    second = pipeline.generate(SECOND_QUESTION, generation_config=config).perf_metrics
    return {
        "load_seconds": load,
        "first_token_seconds": first.get_ttft().mean / 1000,
        "token_seconds": first.get_tpot().mean / 1000,
        "second_turn_seconds": second.get_ttft().mean / 1000,
        "peak_gb": peak_bytes() / 1e9,
        "prompt_tokens": first.get_num_input_tokens(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")
    parser.add_argument("--image", metavar="PICTURE", type=Path, required=True, help="picture to ask about")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=32, help="of the first answer (default: %(default)s)")
    parser.add_argument("--repeats", metavar="N", type=int, default=2, help="runs of each (default: %(default)s)")
    parser.add_argument("--one", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure = {"ours": ours, "peer": peer}[options.one]
        print(json.dumps(measure(options.folder, options.image, options.max_new_tokens)))
        return
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(options.repeats):
        for name, found in runs.items():
            command = [sys.executable, "-W", "ignore", "-m", "tests.bench_answers", str(options.folder), "--one", name]
            command += ["--image", str(options.image), "--max-new-tokens", str(options.max_new_tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, json.dumps(found[-1]), flush=True)
    medians = {name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    for key, value in medians["peer"].items():
        mine = medians["ours"][key]
        print(f"{key:<22} ours {mine:9.3f}   peer {value:9.3f}   ratio {mine / value:.2f}")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
