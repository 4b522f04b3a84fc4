"""python -m tests.bench_serve FOLDER: the server under load, from its start to what it keeps when everybody has left.

Starts `python -m runtime serve` in a process of its own and asks it from this one: the first answer, then some clients at once for
some seconds each, streaming answers to questions about drawn pictures; then a tenth of the clients leave in the middle. Before,
what openvino_genai takes for the first answer without a server. Ends with a line of JSON, and with an error where a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from demo.shapes.scenes import make_scene

PICTURES, QUESTION = 64, "Describe the picture."
LEAVING = 0.1  # share of the requests whose client goes away


@dataclass
class Load:
    """What some clients saw."""

    clients: int
    seconds: float
    answers: int = 0
    left: int = 0
    tokens: int = 0
    failed: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first text of each answer

    def row(self) -> dict[str, Any]:
        """In figures."""
        ordered = sorted(self.first)
        return {
            "clients": self.clients,
            "answers": self.answers,
            "left": self.left,
            "failed": len(self.failed),
            "answers_a_second": self.answers / self.seconds,
            "tokens_a_second": self.tokens / self.seconds,
            "first_token_median": statistics.median(ordered),
            "first_token_p95": ordered[int(len(ordered) * 0.95)],
        }


def picture(number: int) -> str:
    """A drawn scene as a data URL."""
    file = io.BytesIO()
    make_scene(3, "test", number, kind="grid", language="en").canvases[0].picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


async def ask(host: str, port: int, load: Load, body: bytes, *, leave: bool) -> None:
    """One streamed answer over a connection of its own, read line by line: a full client would take the server's processor time."""
    started, said, ended = time.perf_counter(), 0, False
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        status = (await reader.readline()).split()[1:2]
        async for line in reader:
            if status != [b"200"]:
                load.failed.append(f"{status} {line.decode()}")
                return
            if line == b"data: [DONE]\n":
                ended = True
            elif line.startswith(b'data: {"error"'):
                load.failed.append(line.decode())
                return
            elif line.startswith(b"data: ") and b'"content": "' in line and b'"content": ""' not in line:
                if not said:
                    load.first.append(time.perf_counter() - started)
                said += 1
                if leave and said == 3:
                    load.left += 1
                    return
            elif line.startswith(b"data: ") and b'"usage"' in line:
                load.tokens += json.loads(line[6:])["usage"]["completion_tokens"]
    finally:
        writer.close()
    if ended:
        load.answers += 1
    else:
        load.failed.append("the stream broke off")


def question(number: int) -> bytes:
    """The body of a request about a drawn picture."""
    content = [{"type": "image_url", "image_url": {"url": picture(number)}}, {"type": "text", "text": QUESTION}]
    asked = {"messages": [{"role": "user", "content": content}], "stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


async def run_clients(address: str, clients: int, seconds: float, leaving: float = 0.0) -> Load:
    """`clients` at once, each asking again as soon as it is answered, for `seconds`."""
    load, bodies, dice = Load(clients, seconds), [question(number) for number in range(PICTURES)], random.Random(clients)
    host, port = address.removeprefix("http://").split(":")
    started = time.perf_counter()

    async def one() -> None:
        while time.perf_counter() - started < seconds:
            try:
                await ask(host, int(port), load, dice.choice(bodies), leave=dice.random() < leaving)
            except OSError as error:
                load.failed.append(repr(error))

    await asyncio.gather(*(one() for _ in range(clients)))
    load.seconds = time.perf_counter() - started  # answers that were begun in time are waited for
    return load


def settle(process: psutil.Process, address: str) -> None:
    """Ask until the memory grows no more: the blocks of the KV cache are used in turn, and take memory when they first are."""
    for _ in range(6):
        before = held(process)[0]
        asyncio.run(run_clients(address, 16, 10))
        if held(process)[0] < 1.005 * before:
            return


def held(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes and threads of the server and its processes."""
    family = [process, *process.children(recursive=True)]
    return sum(each.memory_info().rss for each in family), sum(each.num_threads() for each in family)


def gauge(address: str, name: str) -> float:
    """One value of /metrics."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def offline(folder: Path) -> dict[str, float]:
    """openvino_genai's VLMPipeline in a process of its own: until its first answer, and its memory."""
    code = (
        "import base64, io, json, resource, sys, time\n"
        "started = time.perf_counter()\n"
        "import numpy as np, openvino as ov, openvino_genai\n"
        "from PIL import Image\n"
        "pipeline = openvino_genai.VLMPipeline(sys.argv[1], 'CPU')\n"
        "pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sys.stdin.read().split(',')[1]))).convert('RGB'))\n"
        "config = openvino_genai.GenerationConfig()\n"
        "config.max_new_tokens, config.do_sample = 256, False\n"
        f"pipeline.generate({QUESTION!r}, images=[ov.Tensor(pixels[None])], generation_config=config)\n"
        "print(json.dumps([time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], input=picture(0), capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return {"first_answer_seconds": seconds, "peak_mb": megabytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="at once (default: 1 4 16 64)")
    parser.add_argument("--seconds", type=float, default=60, help="of each load (default: %(default)g)")
    parser.add_argument("--engine", choices=("genai", "native"), default="genai", help="(default: %(default)s)")
    options = parser.parse_args()
    found: dict[str, Any] = {"engine": options.engine, "genai_offline": offline(options.folder)}
    command = [sys.executable, "-m", "runtime", "serve", str(options.folder), "--port", "0", "--engine", options.engine]
    command += ["--cache-size", "1"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split(" at ")[1].split("/v1")[0]
            process = psutil.Process(server.pid)
            one = asyncio.run(run_clients(address, 1, 0.01))
            found["first_answer_seconds"] = time.perf_counter() - started
            found["memory_mb"] = held(process)[0] / 1e6
            assert one.answers == 1, one.failed
            asyncio.run(run_clients(address, 16, 5))  # what threads and pools need once
            found["loads"] = []
            failed = []
            for clients in options.clients:
                load = asyncio.run(run_clients(address, clients, options.seconds))
                found["loads"].append(load.row())
                failed += load.failed
                print(json.dumps(found["loads"][-1]), flush=True)
            settle(process, address)
            before = held(process)
            load = asyncio.run(run_clients(address, 16, options.seconds, LEAVING))
            failed += load.failed
            time.sleep(2)
            after = held(process)
            found["leaving"] = load.row() | {
                "memory_mb_before": before[0] / 1e6,
                "memory_mb_after": after[0] / 1e6,
                "threads_before": before[1],
                "threads_after": after[1],
                "active_after": gauge(address, "internvl_active_requests"),
            }
            if options.engine == "genai":
                found["leaving"]["kv_cache_after"] = gauge(address, "internvl_kv_cache_used_ratio")
        finally:
            server.terminate()
    print(json.dumps(found, indent=2))
    print(json.dumps(found))
    if failed:
        raise SystemExit(f"{len(failed)} requests failed, the first with {failed[0]}")


if __name__ == "__main__":
    main()
