"""python -m tests.bench_batch FOLDER [PROOF ...]: jobs of many questions, killed, counted, timed beside other ways.

killed      20,000 rows over 5,000 drawn pictures, killed with kill -9 five times at random; then every row in a conversation
bookkeeping 100,000 rows answered by a stand-in: what the file of answers costs a row, and whether memory grows
speed       the job, a loop over conversation.ask and the server with 16 clients, the same rows, by turns in one run
genai       the job and openvino_genai's ContinuousBatchingPipeline, the same requests of one tile, by turns (--one-tile: a 1B)
ray         two local nodes of one core each, one node, and the job without Ray on one core

Ends with a line of JSON a proof. Needs no network; pictures are drawn to --work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from demo.shapes.scenes import make_scene
from tests.bench_serve import Load
from tests.bench_serve import ask as stream_answer

QUESTIONS = ["Describe the picture.", "Which shape is purple?", "How many shapes are there?", "What colour is the star?"]
CLIENTS = 16


def draw(folder: Path, count: int, per: int = len(QUESTIONS)) -> Path:
    """Drawn scenes and requests about them, unless they are there."""
    requests = folder / f"requests-{count}-{per}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = folder / f"{number}.png"
        if not file.exists():
            make_scene(3, "test", number, kind="grid", language="en").canvases[0].picture.convert("RGB").save(file)
    rows = [
        {"id": f"{number}-{asked}", "image": f"{number}.png", "question": QUESTIONS[asked]}
        for number in range(count)
        for asked in range(per)
    ]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return requests


def job(folder: Path, requests: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "runtime", "batch", str(folder), str(requests), str(out), *more]


def forget(out: Path) -> None:
    for file in (out, Path(f"{out}.job")):
        file.unlink(missing_ok=True)


def answers_of(out: Path) -> dict[str, str]:
    """Id -> text; an id that comes twice is an error."""
    found: dict[str, str] = {}
    with open(out) as file:
        for line in map(json.loads, file):
            assert line["custom_id"] not in found, line["custom_id"]
            assert line["error"] is None, line
            found[line["custom_id"]] = line["response"]["body"]["choices"][0]["message"]["content"]
    return found


def killed(folder: Path, work: Path, pictures: int, kills: int) -> dict[str, Any]:
    """Every id once, and how many answers differ from a conversation's, and a conversation's from its own a second time."""
    requests, out, dice = draw(work / "pictures", pictures), work / "killed.jsonl", random.Random(0)
    forget(out)
    rows, ended_at = pictures * len(QUESTIONS), []
    wanted = sorted(dice.uniform(0.02, 0.95) for _ in range(kills))
    started = time.perf_counter()
    for share in [*wanted, 2.0]:
        process = subprocess.Popen(job(folder, requests, out), stdout=subprocess.PIPE)
        while process.poll() is None and (not out.exists() or lines_of(out) < share * rows):
            time.sleep(dice.uniform(0.05, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            ended_at.append(lines_of(out))
        process.communicate()
    seconds = time.perf_counter() - started
    found = answers_of(out)
    read = [json.loads(line) for line in requests.read_text().splitlines()]
    assert {*found} == {row["id"] for row in read}
    print(f"{rows} rows, killed after {ended_at}: every id once", flush=True)
    model = open_model(folder)
    differ = []
    for row in read:
        text = model.start_conversation().ask(row["question"], images=[requests.parent / row["image"]], do_sample=False)
        if text != found[row["id"]]:
            differ.append((row["id"], text, found[row["id"]]))
    again = 0
    for name, text, _ in differ:  # is it a tie to a conversation too?
        row = next(row for row in read if row["id"] == name)
        model.forget()
        again += model.start_conversation().ask(row["question"], images=[requests.parent / row["image"]], do_sample=False) != text
    print(differ[:10], flush=True)
    return {
        "rows": rows,
        "pictures": pictures,
        "killed_after": ended_at,
        "seconds": seconds,
        "differ": len(differ),
        "of_them_a_conversation_answers_otherwise_again": again,
    }


def lines_of(out: Path) -> int:
    with open(out, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def open_model(folder: Path) -> Any:
    from runtime.answer.model import OpenedModel

    model = OpenedModel(folder)
    model.wait_until_packed()
    for _ in range(5):  # until single tokens are compiled apart, as in any longer loop
        model.start_conversation().ask("Hello", max_new_tokens=2)
    return model


def bookkeeping(work: Path, rows: int) -> dict[str, Any]:
    """In a process of its own; memory after 10,000 rows and at its most from there on, of a first run and of one that goes on."""
    requests, out = work / "many.jsonl", work / "many-answers.jsonl"
    with open(requests, "w") as file:
        for number in range(rows):
            file.write(
                json.dumps({"id": f"row-{number:09}", "image": f"{number // 4}.png", "question": QUESTIONS[number % 4]}) + "\n"
            )
    forget(out)
    found = {}
    for name in ("first", "goes on"):
        if name == "goes on":  # half of it is there
            kept = out.read_bytes()[: out.stat().st_size // 2]
            out.write_bytes(kept)
        done = subprocess.run([sys.executable, "-c", STAND_IN, str(requests), str(out)], capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        assert len(answers_of(out)) == rows
    return {"rows": rows, **found}


STAND_IN = """
import json, sys, time
from pathlib import Path
import psutil
from runtime.job.answers import Answer, AnswerFile
from runtime.job.requests import Requests
from runtime.job.run import run_job

requests, out = map(Path, sys.argv[1:])
process, seen, inside = psutil.Process(), [], [0.0]

def answer(rows):
    before = time.perf_counter()
    for number, row in enumerate(rows):
        now = time.perf_counter()
        inside[0] += now - before
        text = "A red star on the left, a blue circle on the right of it. " * 3
        made = Answer(row.number, row.id, text, "stop", 300, 40, 1, {"role": "assistant", "content": text})
        if number % 1000 == 0:
            seen.append(process.memory_info().rss / 1e6)
        before = time.perf_counter()
        yield made
    inside[0] += time.perf_counter() - before

started = time.perf_counter()
file = AnswerFile(out, {"model": "stand-in"}, "stand-in", "0")
with file:
    begun = time.perf_counter()
    done = run_job(Requests(requests), file, answer, report=lambda progress: None)
rest = seen[min(10, len(seen) - 1):]
print(json.dumps({
    "rows": done.answered, "before": done.before, "read_what_is_there_seconds": begun - started,
    "ms_a_row": 1000 * inside[0] / max(1, done.answered), "memory_mb": rest[0], "grows_mb": max(rest) - rest[0],
}))
"""


def speed(folder: Path, work: Path, pictures: int, turns: int, per: int) -> dict[str, Any]:
    """Rows a second, shortest and median of the turns after a first one. Opening a model is no part of any of them."""
    from runtime.job.run import batch

    requests = draw(work / "pictures", pictures, per)
    base = requests.parent
    rows = [json.loads(line) for line in requests.read_text().splitlines()]
    rows = [row | {"image": str(base / row["image"])} for row in rows]
    model = open_model(folder)
    bodies = [body_of(row) for row in rows]

    def looped() -> None:
        for row in rows:
            model.start_conversation().ask(row["question"], images=[row["image"]], do_sample=False)

    def batched() -> None:
        assert not any(answer.error for answer in batch(model, rows))

    command = [sys.executable, "-m", "runtime", "serve", str(folder), "--port", "0", "--cache-size", "1"]
    command += ["--allowed-local-media-path", str(base)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        host, port = server.stdout.readline().split(" at http://")[1].split("/v1")[0].split(":")

        def served() -> None:
            asyncio.run(clients(host, int(port), bodies))

        try:
            model.forget()
            return by_turns({"job": batched, "loop": looped, "server": served}, turns, len(rows), model.forget)
        finally:
            server.terminate()


def body_of(row: dict[str, Any]) -> bytes:
    content = [{"type": "image_url", "image_url": {"url": row["image"]}}, {"type": "text", "text": row["question"]}]
    asked = {"messages": [{"role": "user", "content": content}], "stream": True, "temperature": 0}
    return json.dumps(asked).encode()


async def clients(host: str, port: int, bodies: list[bytes]) -> None:
    load, waiting = Load(CLIENTS, 0), iter(bodies)

    async def one() -> None:
        for body in waiting:
            await stream_answer(host, port, load, body, leave=False)

    await asyncio.gather(*(one() for _ in range(CLIENTS)))
    assert load.answers == len(bodies), load.failed[:3]


def by_turns(runs: dict[str, Callable[[], None]], turns: int, rows: int, between: Callable[[], None]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            between()
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            print(turn, name, f"{time.perf_counter() - started:.2f} s", flush=True)
    fastest = {name: rows / min(each) for name, each in seconds.items()}
    middle = {name: rows / statistics.median(each) for name, each in seconds.items()}
    first = next(iter(runs))
    ratios = {name: [fastest[first] / fastest[name], middle[first] / middle[name]] for name in runs if name != first}
    return {"rows": rows, "rows_a_second_fastest": fastest, "rows_a_second_median": middle, f"{first}_to": ratios}


def genai(folder: Path, pictures: int, per: int, tokens: int, turns: int) -> dict[str, Any]:
    """Pictures of 448 x 448 pixels, one tile; every turn has new ones. Exactly so many tokens an answer, no guesses, greedy."""
    import openvino as ov
    import openvino_genai

    from runtime.job.run import batch

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    theirs = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU")
    config = openvino_genai.GenerationConfig()
    config.do_sample, config.max_new_tokens, config.ignore_eos = False, tokens, True
    model, numbers = open_model(folder), iter(range(1000))

    def fresh() -> Iterator[tuple[Image.Image, str]]:
        noise = np.random.default_rng(next(numbers))
        for _ in range(pictures):
            picture = Image.fromarray(noise.integers(0, 256, (24, 24, 3), np.uint8)).resize((448, 448))
            yield from ((picture, question) for question in QUESTIONS[:per])

    def ours() -> None:
        rows = [{"image": picture, "question": question} for picture, question in fresh()]
        with exactly(model):
            found = [*batch(model, rows, max_new_tokens=tokens)]
        assert {answer.completion_tokens for answer in found} == {tokens}, found[0]

    def peer() -> None:
        rows = [*fresh()]
        images = [[ov.Tensor(np.asarray(picture)[None])] for picture, _ in rows]
        theirs.generate([question for _, question in rows], images=images, generation_config=[config] * len(rows))

    return by_turns({"job": ours, "openvino_genai": peer}, turns, pictures * per, model.forget)


class exactly:
    """Answers of exactly so many tokens, as ignore_eos makes them in a body: by the folder's defaults, for rows of any form."""

    def __init__(self, model: Any):
        self._model, self._own = model, dict(model.generation_defaults)

    def __enter__(self) -> None:
        self._model.generation_defaults = self._own | {"ignore_eos": True}

    def __exit__(self, *_: object) -> None:
        self._model.generation_defaults = self._own


def on_ray(folder: Path, work: Path, pictures: int) -> dict[str, Any]:
    """Rows a second over the second half of the rows, when every actor has begun; starting is told apart."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    import ray
    from ray.cluster_utils import Cluster

    requests, found = draw(work / "pictures", pictures), {}
    core = ["taskset", "-c", "0"]
    for name, nodes in (("one core without Ray", 0), ("one node", 1), ("two nodes", 2)):
        out = work / "ray.jsonl"
        forget(out)
        cluster = None
        more: list[str] = []
        if nodes:
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
            for _ in range(nodes - 1):
                cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
            more = ["--ray", cluster.address]
        started, seen = time.perf_counter(), []
        process = subprocess.Popen((core if not nodes else []) + job(folder, requests, out, *more), stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.05)
            if out.exists() and (count := lines_of(out)) and (not seen or seen[-1][1] != count):
                seen.append((time.perf_counter() - started, count))
        assert process.returncode == 0
        assert len(answers_of(out)) == pictures * len(QUESTIONS)
        low, high = next(each for each in seen if each[1] >= seen[-1][1] // 2), seen[-1]
        found[name] = {
            "whole_seconds": time.perf_counter() - started,
            "until_first_answer": seen[0][0],
            "rows_a_second": (high[1] - low[1]) / (high[0] - low[0]),
        }
        print(name, found[name], flush=True)
        if cluster is not None:
            cluster.shutdown()
            ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the built-in model, converted")
    parser.add_argument("proofs", metavar="PROOF", nargs="*", default=["killed", "bookkeeping", "speed"])
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path("build/batch"), help="(default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=5000, help="of killed (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=100_000, help="of bookkeeping (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--some", type=int, default=100, help="pictures of speed, genai and ray (default: %(default)s)")
    parser.add_argument("--per", type=int, default=4, help="questions a picture of speed and genai, 1 to 4 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer of genai (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="of speed and genai (default: %(default)s)")
    parser.add_argument("--one-tile", metavar="FOLDER", type=Path, help="what genai opens (default: FOLDER)")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    proofs: dict[str, Callable[[], dict[str, Any]]] = {
        "killed": lambda: killed(options.folder, options.work, options.pictures, options.kills),
        "bookkeeping": lambda: bookkeeping(options.work, options.rows),
        "speed": lambda: speed(options.folder, options.work, options.some, options.turns, options.per),
        "genai": lambda: genai(options.one_tile or options.folder, options.some, options.per, options.tokens, options.turns),
        "ray": lambda: on_ray(options.folder, options.work, options.some),
    }
    for name in options.proofs:
        print(json.dumps({"proof": name, "cpu": psutil.cpu_count(), **proofs[name]()}), flush=True)


if __name__ == "__main__":
    main()
