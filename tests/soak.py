"""python -m tests.soak [FOLDER] --minutes N: the server for a long time under clients of every kind, and what it keeps of them.

Starts `python -m runtime serve` in a process of its own. Eight clients ask about pictures of many sizes, nearly all of them
new; a tenth of the requests are left midway, a tenth are broken. A warm-up comes first, until memory grows no more: the blocks
of the KV cache and the cache of features are filled in turn. Then memory must stay flat within 5 %, and at rest threads, open
files and KV blocks must be what they were. Prints a table, ends with a line of JSON, and with an error where something was lost
or grew.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import psutil
from PIL import Image

from demo.shapes.scenes import make_scene
from tests.bench_serve import gauge
from tests.runtime.serve.test_hostile import KINDS, wrong_completion

CLIENTS, LEAVING, BROKEN = 8, 0.1, 0.1  # at once, and which shares of the requests are of what kind
FLAT = 0.05  # of the memory after the warm-up
SETTLED, SETTLE_SECONDS, LONGEST_WARM_UP = 0.002, 30.0, 900.0  # growth within so many seconds that is none
LOOK_SECONDS, ROWS = 5.0, 12  # between looks at the memory; of the table
SIDES, LONGEST = (16, 3000), 6  # of a picture in pixels, and how much longer one side is than the other
SCENES, SCHEMAS = 32, 5
FORMATS = ("PNG", "JPEG", "WEBP")
QUESTIONS = (
    "Describe the picture.",
    "How many shapes are there?",
    "Which shape is purple?",
    "What does the text say?",
    "red " * 300,
)


@dataclass(frozen=True)
class Held:
    """What the server's processes hold at one moment."""

    server: float  # MB resident
    worker: float
    threads: int
    files: int

    @property
    def memory(self) -> float:
        """MB of both."""
        return self.server + self.worker

    @classmethod
    def of(cls, process: psutil.Process) -> Held:
        """Of a server and of the process in which it answers."""
        others = process.children(recursive=True)
        family = [process, *others]
        return cls(
            process.memory_info().rss / 1e6,
            sum(other.memory_info().rss for other in others) / 1e6,
            sum(each.num_threads() for each in family),
            sum(each.num_fds() for each in family),
        )


class Clients:
    """Ask without end, each again as soon as it is answered; count what came of it."""

    def __init__(self, address: str):
        self.address, self.counts, self.failed = address, Counter[str](), list[str]()
        self._scenes = [make_scene(3, "test", number, language="en").canvases[0].picture.convert("RGB") for number in range(SCENES)]

    def run(self, seconds: float, look: Any) -> None:
        """For so long, and until the last answer is there; `look` is called every few seconds."""
        asyncio.run(self._all(time.monotonic() + seconds, look))

    async def _all(self, end: float, look: Any) -> None:
        async def watch() -> None:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                look()

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(self._one(end, random.Random(f"{number} {end}")) for number in range(CLIENTS)))
        watching.cancel()

    async def _one(self, end: float, dice: random.Random) -> None:
        async with httpx.AsyncClient(base_url=self.address, timeout=120, headers={"content-type": "application/json"}) as client:
            while time.monotonic() < end:
                kind = dice.random()
                try:
                    if kind < BROKEN:
                        outcome = await self._broken(client, dice)
                    elif kind < BROKEN + LEAVING:
                        outcome = await self._leave(client, dice)
                    else:
                        outcome = await self._ask(client, dice)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    outcome, said = "failed", repr(error)
                    self.failed.append(said)
                self.counts[outcome] += 1

    async def _ask(self, client: httpx.AsyncClient, dice: random.Random) -> str:
        body = self._body(dice)
        answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return self._fail(f"{answer.status_code} {answer.text[:200]}")
        if body["stream"]:
            whole = '"finish_reason": "' in answer.text and answer.text.endswith("data: [DONE]\n\n")
        else:
            whole = all(choice["finish_reason"] for choice in answer.json()["choices"])
        return "answered" if whole else self._fail(f"half of an answer: {answer.text[-200:]}")

    async def _leave(self, client: httpx.AsyncClient, dice: random.Random) -> str:
        body = self._body(dice) | {"ignore_eos": True, "max_tokens": 500, "stream": dice.random() < 0.7}
        body.pop("response_format", None)
        try:
            async with asyncio.timeout(None if body["stream"] else dice.uniform(0.01, 0.3)):
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    if answer.status_code != 200:
                        return self._fail(f"{answer.status_code} {(await answer.aread())[:200]!r}")
                    stay, seen = dice.randrange(1, 30), 0
                    async for _ in answer.aiter_lines():
                        seen += 1
                        if seen >= stay:
                            return "left"
        except TimeoutError:
            return "left"
        return "answered"  # it was over before

    async def _broken(self, client: httpx.AsyncClient, dice: random.Random) -> str:
        make = dice.choice(KINDS)
        route = "/v1/completions" if make is wrong_completion else "/v1/chat/completions"
        answer = await client.post(route, content=make(dice))
        return "refused" if 400 <= answer.status_code < 500 else self._fail(f"{make.__name__}: {answer.status_code}")

    def _fail(self, said: str) -> str:
        self.failed.append(said)
        return "failed"

    def _body(self, dice: random.Random) -> dict[str, Any]:
        """A request that is to be answered."""
        pictures = [
            {"type": "image_url", "image_url": {"url": self._picture(dice)}} for _ in range(dice.choice([0, 1, 1, 1, 1, 1, 2, 3]))
        ]
        content = [*pictures, {"type": "text", "text": dice.choice(QUESTIONS)}]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "stream": dice.random() < 0.5}
        body["max_tokens"], body["n"] = dice.randrange(1, 64), dice.choice([1, 1, 1, 1, 2])
        if dice.random() < 0.05:
            names = [f"field{dice.randrange(SCHEMAS)}" for _ in range(2)]
            schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}, "required": names}
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        return body

    def _picture(self, dice: random.Random) -> str:
        """A drawn scene in a size of its own, with some pixels of its own, as a data URL."""
        side = int(SIDES[0] * (SIDES[1] / SIDES[0]) ** dice.random())
        other = max(SIDES[0], int(side / dice.uniform(1, LONGEST) ** dice.random()))
        size = (side, other) if dice.random() < 0.5 else (other, side)
        picture = dice.choice(self._scenes).resize(size, Image.Resampling.NEAREST)
        for _ in range(8):
            picture.putpixel((dice.randrange(size[0]), dice.randrange(size[1])), tuple(dice.randbytes(3)))
        file, kind = io.BytesIO(), dice.choice(FORMATS)
        picture.save(file, kind, **({"compress_level": 1} if kind == "PNG" else {"method": 0} if kind == "WEBP" else {}))
        return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def warm_up(clients: Clients, process: psutil.Process) -> float:
    """Ask until the memory under load grows no more; returns how many seconds that took."""
    started, before = time.monotonic(), 0.0
    while time.monotonic() - started < LONGEST_WARM_UP:
        seen: list[float] = []
        clients.run(SETTLE_SECONDS, lambda seen=seen: seen.append(Held.of(process).memory))
        now = fmean(seen[len(seen) // 2 :])
        print(f"warm-up: {time.monotonic() - started:.0f} s, {now:.0f} MB", flush=True)
        if now < (1 + SETTLED) * before:
            break
        before = max(now, before)
    return time.monotonic() - started


def at_rest(process: psutil.Process, address: str) -> tuple[Held, float]:
    """What is held when everybody has left, and the share of the KV cache that is in use then."""
    for _ in range(100):
        if gauge(address, "internvl_active_requests") == 0 == gauge(address, "internvl_kv_cache_used_ratio"):
            break
        time.sleep(0.1)
    time.sleep(LOOK_SECONDS)
    return Held.of(process), gauge(address, "internvl_kv_cache_used_ratio")


def faults(found: dict[str, Any]) -> list[str]:
    """What must not be, a line each."""
    rest, end, rows = found["at_rest_before"], found["at_rest_after"], found["rows"]
    said = [f"{found['counts'].get('failed', 0)} requests failed, the first with {found['failed'][0]}"] if found["failed"] else []
    pairs = {"at rest": (rest["memory"], end["memory"]), "under load": (rows[0]["memory"], rows[-1]["memory"])}
    said += [
        f"memory {when} grew from {first:.0f} to {last:.0f} MB"
        for when, (first, last) in pairs.items()
        if last > (1 + FLAT) * first
    ]
    said += [f"{what} grew from {rest[what]} to {end[what]}" for what in ("threads", "files") if end[what] > rest[what]]
    return said + ([f"{found['kv_cache_after']:.1%} of the KV cache stayed in use"] if found["kv_cache_after"] else [])


def soak(folder: Path, minutes: float) -> dict[str, Any]:
    """Run it all; what was found, in figures."""
    command = [sys.executable, "-m", "runtime", "serve", str(folder), "--port", "0", "--cache-size", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split(" at ")[1].split("/v1")[0]
            process, clients = psutil.Process(server.pid), Clients(address)
            found: dict[str, Any] = {"minutes": minutes, "clients": CLIENTS, "memory_at_start": Held.of(process).memory}
            found["warm_up_seconds"] = warm_up(clients, process)
            rest = at_rest(process, address)[0]
            print("minute  requests  answered  left  refused  failed  memory MB  server  worker  threads  files", flush=True)
            clients.counts.clear()
            rows = []
            for number in range(ROWS):
                seen: list[Held] = []
                clients.run(60 * minutes / ROWS, lambda seen=seen: seen.append(Held.of(process)))
                rows.append(_row(minutes * (number + 1) / ROWS, clients, seen or [Held.of(process)]))
                print(_line(rows[-1]), flush=True)
            end, share = at_rest(process, address)
        finally:
            server.terminate()
    more = {"counts": dict(clients.counts), "failed": clients.failed[:20], "rows": rows, "kv_cache_after": share}
    at = {"at_rest_before": vars(rest) | {"memory": rest.memory}, "at_rest_after": vars(end) | {"memory": end.memory}}
    found |= more | at
    return found | {"faults": faults(found)}


def _row(minute: float, clients: Clients, seen: Sequence[Held]) -> dict[str, Any]:
    means = {what: fmean(getattr(each, what) for each in seen) for what in ("memory", "server", "worker")}
    most = {what: max(getattr(each, what) for each in seen) for what in ("threads", "files")}
    kinds = {kind: clients.counts[kind] for kind in ("answered", "left", "refused", "failed")}
    return {"minute": minute, "requests": clients.counts.total(), **kinds, **means, **most}


def _line(row: dict[str, Any]) -> str:
    counts = (
        ("requests", 10),
        ("answered", 10),
        ("left", 6),
        ("refused", 9),
        ("failed", 8),
        ("memory", 11),
        ("server", 8),
        ("worker", 8),
    )
    cells = [f"{row['minute']:6.1f}", *(f"{row[name]:{width}.0f}" for name, width in counts)]
    return "".join([*cells, f"{row['threads']:9}", f"{row['files']:7}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, nargs="?", default=Path("build/shapes-int4"), help="(default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=60, metavar="N", help="after the warm-up (default: %(default)g)")
    options = parser.parse_args()
    found = soak(options.folder, options.minutes)
    rest, end = found["at_rest_before"], found["at_rest_after"]
    for what in ("memory", "server", "worker", "threads", "files"):
        print(
            f"at rest, {what}: {rest[what]:.0f} after the warm-up, {end[what]:.0f} at the end ({end[what] / rest[what] - 1:+.1%})"
        )
    print(json.dumps(found))
    if found["faults"]:
        raise SystemExit("error: " + "; ".join(found["faults"]))


if __name__ == "__main__":
    main()
