"""python -m pytest tests/runtime/serve/test_safety.py

What somebody sends who means harm, to a server in a process of its own: it is refused, the others are not held up by it, and
nothing of it is kept.
"""

import base64
import functools
import gzip
import http.server
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")

from runtime import OVInternVLChatModel
from runtime.serve import _listen, make_server
from runtime.serve.app import build_app
from runtime.serve.connections import MOST_HEAD, Connection
from runtime.serve.engine import GenaiEngine
from runtime.serve.reception import Limits, Rules
from tests.conftest import data_url
from tests.runtime.serve.server import ROOT, Server, eventually, started
from tests.runtime.serve.test_hostile import as_url, png

PICTURE = ROOT / "demo" / "examples" / "shapes.png"
SHAPES = data_url(PICTURE)
CHAT = "/v1/chat/completions"
HELD_UP = 1.0  # seconds longer than usual that anybody else may wait
NAMES = """
import itertools, socket
look_up, looks = socket.getaddrinfo, itertools.count()

def getaddrinfo(host, *rest, **more):
    if host == "inside.test":
        host = "127.0.0.2"
    if host == "turning.test":  # another address at each look
        host = "127.0.0.2" if next(looks) % 2 else "127.0.0.1"
    return look_up(host, *rest, **more)

socket.getaddrinfo = getaddrinfo
"""


def question(*urls: str, text: str = "Which shape is purple?") -> dict:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}], "max_tokens": 8}


def ask(server: Server, body: dict) -> httpx.Response:
    return httpx.post(server.address + CHAT, json=body, timeout=120)


def refused(server: Server, body: dict, message: str) -> None:
    answer = ask(server, body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


# ---- what is fetched


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A folder of Python's in which some names have the addresses of this machine, since a test has no name server of its own."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "sitecustomize.py").write_text(NAMES)
    return folder


@contextmanager
def web(address: str, port: int = 0):
    """A web server that gives the picture, or sends elsewhere: its port, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            where = self.path.partition("?to=")[2]
            self.send_response(302 if where else 200)
            if where:
                self.send_header("Location", where)
            self.end_headers()
            if not where:
                self.wfile.write(PICTURE.read_bytes())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer((address, port), Handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield files.server_port, asked
        files.shutdown()


@pytest.fixture(scope="module")
def fetching(shapes, names, tmp_path_factory):
    """A server that may fetch from some names, and from 127.0.0.1, which stands for the open internet here."""
    allowed = ("--allowed-media-domains", "127.0.0.1,inside.test,turning.test")
    with started(shapes, tmp_path_factory.mktemp("fetching"), *allowed, environment={"PYTHONPATH": str(names)}) as server:
        yield server


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("http://127.0.0.2:{port}/secret", "are not fetched from 127.0.0.2"),
        ("http://10.0.0.1/secret", "are not fetched from 10.0.0.1"),
        ("http://[::1]:{port}/secret", "are not fetched from ::1"),
        ("http://169.254.169.254/latest", "are not fetched from 169.254.169.254"),
        ("http://2130706434:{port}/secret", "are not fetched from 2130706434"),
        ("http://inside.test:{port}/secret", "inside.test: it is at 127.0.0.2, which is no public address"),
        ("file:///etc/passwd", "cannot be fetched"),
        ("http://127.0.0.1@127.0.0.2:{port}/secret", "are not fetched from 127.0.0.2"),
    ],
)
def test_an_allowed_domain_does_not_lead_inside(fetching, where, message):
    with web("127.0.0.1") as (port, _), web("127.0.0.2", port) as (_, secrets):
        assert ask(fetching, question(f"http://127.0.0.1:{port}/?to=http://127.0.0.1:{port}/moved")).status_code == 200
        refused(fetching, question(f"http://127.0.0.1:{port}/?to={where.format(port=port)}"), message)
    assert not secrets


def test_a_name_that_means_this_machine_is_refused(fetching):
    with web("127.0.0.2") as (port, secrets):
        refused(fetching, question(f"http://inside.test:{port}/secret"), "which is no public address")
        video = {"type": "video_url", "video_url": {"url": f"http://inside.test:{port}/secret"}}
        refused(fetching, {"messages": [{"role": "user", "content": [video]}]}, "which is no public address")
    assert not secrets


def test_a_name_that_changes_its_address_is_looked_up_once(fetching):
    """Public when it is looked at, private when it is connected to: what is connected to was looked at."""
    with web("127.0.0.1") as (port, asked), web("127.0.0.2", port) as (_, secrets):
        for turn in range(4):
            answer = ask(fetching, question(f"http://turning.test:{port}/{turn}"))
            if turn % 2 == 0:
                assert answer.json()["choices"][0]["message"]["content"]
            else:
                assert "it is at 127.0.0.2, which is no public address" in answer.json()["error"]["message"]
    assert (asked, secrets) == (["/0", "/2"], [])


def test_hosts_that_do_not_answer_hold_up_nobody_else(fetching):
    """More of them than there are threads for other requests."""
    usual, over = max(seconds_of(fetching) for _ in range(10)), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            over.wait(30)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        body = question(f"http://127.0.0.1:{files.server_port}/")
        waiting = [threading.Thread(target=ask, args=(fetching, body)) for _ in range(16)]
        with others_are_answered(fetching, usual):
            for each in waiting:
                each.start()
            time.sleep(4)
        over.set()
        for each in waiting:
            each.join(30)
        files.shutdown()


# ---- what is sent


@pytest.fixture(scope="module")
def server(shapes, tmp_path_factory):
    with started(shapes, tmp_path_factory.mktemp("server")) as server:
        for _ in range(10):
            ask(server, question(SHAPES))
        yield server


@pytest.fixture(scope="module")
def usual(server):
    """How long a plain request takes that nothing disturbs: the longest of some."""
    return max(seconds_of(server) for _ in range(20))


def seconds_of(server: Server) -> float:
    begun = time.perf_counter()
    answer = ask(server, question(SHAPES))
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - begun


@contextmanager
def others_are_answered(server: Server, usual: float, least: int = 3):
    """Somebody else asks all the time, and never waits for more than a second longer than usual."""
    over, took = threading.Event(), list[float]()

    def plain() -> None:
        while not over.is_set() or len(took) < least:
            took.append(seconds_of(server))
            time.sleep(0.01)

    thread = threading.Thread(target=plain)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)
    assert len(took) >= least
    assert max(took) < usual + HELD_UP, f"{max(took):.2f} s, usually {usual:.2f}, in the middle {statistics.median(took):.2f}"


def leaves_no_memory(server: Server, attack: Callable[[], None]) -> None:
    """The first time may make what is needed once."""
    attack()
    time.sleep(0.5)
    before = server.memory
    for _ in range(3):
        attack()
    assert eventually(lambda: server.memory < 1.05 * before), f"{server.memory / before:.3f} of the memory after the first time"


def test_a_picture_that_says_it_is_huge(server, usual):
    body = question(*[as_url(png(60_000, 60_000))] * 4)
    with others_are_answered(server, usual):
        leaves_no_memory(server, lambda: refused(server, body, "has more than 89 million pixels: scale it down first"))


def test_a_compressed_body_is_not_opened(server, usual):
    bomb = gzip.compress(b" " * (256 << 20), 9)
    assert len(bomb) < 1 << 20

    def attack() -> None:
        with httpx.Client(base_url=server.address, timeout=60) as client:
            answer = client.post(CHAT, content=bomb, headers={"content-encoding": "gzip", "content-type": "application/json"})
            assert answer.status_code == 415
            assert "is compressed: send it as it is" in answer.json()["error"]["message"]
            assert client.post(CHAT, content=bomb, headers={"content-type": "application/json"}).status_code == 400

    with others_are_answered(server, usual):
        leaves_no_memory(server, attack)


def test_a_large_body_that_is_refused_does_not_end_its_connection(server):
    """It is answered before it has come."""
    for _ in range(5):
        with httpx.Client(base_url=server.address, timeout=60) as client:
            refused = client.post(CHAT, content=b" " * (8 << 20), headers={"content-encoding": "br"})
            assert refused.status_code == 415
            assert client.get("/health").status_code == 200


def deep(text: str, levels: int = 10_000) -> list[str]:
    lists, objects = "[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels
    return [text.replace("HERE", each) for each in (lists, objects)]


@pytest.mark.parametrize(
    "text",
    [
        "HERE",
        '{"messages": HERE}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": HERE}',
        '{"messages": [{"role": "user", "content": "a"}], "unknown": HERE}',
        '{"messages": [{"role": "user", "content": "a"}], "response_format": '
        '{"type": "json_schema", "json_schema": {"name": "a", "schema": {"a": HERE}}}}',
    ],
    ids=["alone", "messages", "tools", "unknown", "schema"],
)
def test_json_of_ten_thousand_levels(server, usual, text):
    def attack() -> None:
        for body in deep(text):
            answer = httpx.post(server.address + CHAT, content=body, headers={"content-type": "application/json"}, timeout=60)
            assert answer.status_code == 400, answer.text
            assert "\n" not in answer.json()["error"]["message"]

    with others_are_answered(server, usual):
        leaves_no_memory(server, attack)


def slow_schema(number: int) -> dict:
    """It takes openvino_genai a minute and more for a small vocabulary, and some for a real one."""
    patterns = {
        f"p{letter}{number}": {"type": "string", "pattern": f"^({letter}{{1,999}}){{1,999}}$"} for letter in "abcdefghijklmnopqrst"
    }
    longer = {
        f"q{letter}": {"type": "string", "pattern": f"^(({letter}|x){{1,999}}){{1,999}}$"} for letter in "abcdefghijklmnopqrst"
    }
    return {"type": "object", "properties": patterns | longer, "required": [*patterns, *longer]}


def test_a_schema_that_takes_minutes_is_refused_after_a_second(server, usual):
    def attack() -> None:
        attack.number += 1
        wish = {"type": "json_schema", "json_schema": {"name": "a", "schema": slow_schema(attack.number)}}
        refused(server, question() | {"response_format": wish}, "takes longer than 1 s to prepare: simplify it")

    attack.number = 0
    with others_are_answered(server, usual):
        leaves_no_memory(server, attack)
    wish = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["circle", "star"]}}}
    for _ in range(2):
        answer = ask(server, question(SHAPES) | {"response_format": wish})
        assert json.loads(answer.json()["choices"][0]["message"]["content"]) in ("circle", "star"), "others' schemas are followed"


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """10 hours at 10 frames a second, of which only the first can be decoded by itself: 16 MB."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"g": "600", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        dice = np.random.default_rng(0)
        picture = dice.integers(0, 255, (240, 320, 3), np.uint8)
        packets = [packet for _ in range(4) for packet in stream.encode(av.VideoFrame.from_ndarray(picture))]
        packets += stream.encode(None)
        for packet in packets[:2]:
            container.mux(packet)
        last = packets[1]
        step = last.pts - packets[0].pts
        for number in range(2, 360_000):
            copy = av.Packet(bytes(last))
            copy.stream, copy.time_base = stream, last.time_base
            copy.pts = copy.dts = packets[0].pts + step * number
            container.mux(copy)
    assert path.stat().st_size < 40 << 20
    return path


def test_frames_of_a_video_of_ten_hours(server, usual, long_video):
    """They are given, or refused after some seconds: never at the cost of others."""
    url = "data:video/mp4;base64," + base64.b64encode(long_video.read_bytes()).decode()
    video = {"type": "video_url", "video_url": {"url": url, "num_segments": 64}}
    body = {"messages": [{"role": "user", "content": [video, {"type": "text", "text": "What moves?"}]}], "max_tokens": 4}
    begun = time.monotonic()
    with others_are_answered(server, usual):
        answer = ask(server, body)
    assert answer.status_code == 200 or "takes longer than 20 s to read" in answer.json()["error"]["message"], answer.text
    assert time.monotonic() - begun < 40


# ---- how it is sent


@contextmanager
def connections(server: Server, count: int, data: bytes = b""):
    """So many that have sent this, and say nothing more."""
    with ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30)) for _ in range(count)]
        for one in made:
            one.sendall(data)
        yield made


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [b"", HEAD, HEAD + b"Content-Length: 100000\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"],
    ids=["nothing", "half a head", "a longer length than body", "half a chunk"],
)
def test_five_hundred_connections_that_say_nothing(server, usual, data):
    def attack() -> None:
        with connections(server, 500, data):
            seconds_of(server)

    with others_are_answered(server, usual):
        leaves_no_memory(server, attack)
    assert eventually(lambda: server.process.num_fds() < 100)


def test_a_shorter_length_than_body(server, usual):
    body = json.dumps(question(SHAPES)).encode()

    def attack() -> None:
        with connections(server, 20, HEAD + b"Content-Length: 10\r\n\r\n" + body) as made:
            for one in made:
                assert one.recv(1 << 16).startswith(b"HTTP/1.1 400")

    with others_are_answered(server, usual):
        leaves_no_memory(server, attack)


def test_a_client_that_sends_a_byte_a_second(server, usual):
    with others_are_answered(server, usual), connections(server, 20) as heads, connections(server, 20, HEAD) as bodies:
        for one in bodies:
            one.sendall(b"Content-Length: 1000\r\n\r\n")
        for number in range(4):
            for one in heads:
                one.sendall(HEAD[number : number + 1])
            for one in bodies:
                one.sendall(b" ")
            time.sleep(1)


def test_clients_that_read_nothing(server, usual):
    """A long streamed answer for each."""
    body = json.dumps(question() | {"stream": True, "ignore_eos": True, "max_tokens": 2000, "n": 2}).encode()
    with others_are_answered(server, usual), connections(server, 4, HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body):
        time.sleep(3)
    assert eventually(lambda: b"internvl_active_requests 0.0" in httpx.get(f"{server.address}/metrics").content)


# ---- the ends of waiting, which are shorter here


@pytest.fixture
def patient(shapes, monkeypatch):
    """A server that waits for a head and a body for half a second, in a thread of this process."""
    monkeypatch.setattr(Connection, "head_seconds", 0.5)
    engine = GenaiEngine(OVInternVLChatModel(shapes, language=False), 1)
    server = make_server(build_app(engine, Rules("shapes", limits=Limits(body_seconds=0.5))), stop_seconds=1)
    listening = _listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=functools.partial(server.run, [listening]), daemon=True)
    thread.start()
    assert eventually(lambda: server.started, 30)
    yield port
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def hung_up(port: int, *pieces: bytes, pause: float = 0.1) -> tuple[bytes, float]:
    """What was answered until the server hung up, and when it did."""
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
        one.settimeout(10)
        for piece in pieces:
            try:
                one.sendall(piece)
            except OSError:
                break
            time.sleep(pause)
        found = bytearray()
        try:
            while data := one.recv(1 << 16):
                found += data
        except ConnectionResetError:
            pass
    return bytes(found), time.monotonic() - begun


def test_who_says_nothing_is_hung_up_on(patient):
    whole = json.dumps(question(text="Hi")).encode()
    request = HEAD + f"Content-Length: {len(whole)}\r\n\r\n".encode() + whole
    for pieces in ((), (HEAD[:5],), [HEAD[place : place + 1] for place in range(20)], (b"\r\n",) * 10):
        said, seconds = hung_up(patient, *pieces)
        assert not said
        assert seconds < 3
    said, seconds = hung_up(patient, request, HEAD[:9])
    assert said.startswith(b"HTTP/1.1 200")
    assert seconds < 5, "the second request of a connection waits no longer"


def test_a_body_that_does_not_come_is_told(patient):
    for head in (b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        said, seconds = hung_up(patient, HEAD + head, *[b"1\r\n \r\n"] * 3)
        assert said.startswith(b"HTTP/1.1 408")
        assert b"the body took longer than 0.5 s" in said
        assert seconds < 5


def test_a_head_without_end_is_hung_up_on(patient):
    said, _ = hung_up(patient, HEAD, *[b"x-more: " + b"a" * 8000 + b"\r\n"] * (2 * MOST_HEAD // 8000), pause=0)
    assert not said
