"""python -m pytest tests/convert/test_hub.py

The hub path against a stand-in server on 127.0.0.1: what is asked for, what resumes, what is said when it fails.
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.checkpoints import CONFIGS, make_checkpoint

REPO, COMMIT = "OpenGVLab/InternVL2-1B", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of a model hub as a download uses: repository info, file heads, files with ranges, two kinds of refusal."""

    def __init__(self, files: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.asked: list[tuple[str, str, str | None, str | None]] = []  # method, path, range, authorization
        self.break_off = False  # send half of what was asked of the weights, then close the connection


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool):
        self.server.asked.append((self.command, self.path, self.headers["Range"], self.headers["Authorization"]))
        if "/secret/" in self.path or ("/gated/" in self.path and not self.headers["Authorization"]):
            missing = "/secret/" in self.path
            return self.refuse(401 if not missing else 404, "RepoNotFound" if missing else "GatedRepo")
        if self.path.startswith("/api/models/"):
            if "/revision/" in self.path and not self.path.endswith(("/main", COMMIT)):
                return self.refuse(404, "RevisionNotFound")
            names = [{"rfilename": file.name} for file in sorted(self.server.files.iterdir())]
            return self.send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": names}).encode(), {}, body=body)
        file = self.server.files / self.path.rsplit("/", 1)[-1]
        if not file.is_file():  # the client asks for more than the repository's files
            return self.refuse(404, "EntryNotFound")
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.headers["Range"]:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(content[start:], headers, body=body, status=206 if self.headers["Range"] else 200)

    def send(self, content: bytes, headers: dict[str, str], *, body: bool, status: int = 200):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if self.server.break_off and self.path.endswith(".safetensors"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(content)

    def refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    # 30 MB: the client writes what it gets in pieces of 10 MB, and a smaller file would have nothing to resume
    language = CONFIGS["tiny-qwen2"]["llm_config"] | {"vocab_size": 120_000}
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "hub", "tiny-qwen2", llm_config=language)


@contextmanager
def serving(files: Path) -> Iterator[Hub]:
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(files):
    with serving(files) as server:
        yield server


def process(hub_address: str, tmp_path: Path, *command: str) -> subprocess.CompletedProcess:
    """Python in a process of its own: the hub's address is read from the environment when its client is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub_address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2]
    )


def run(hub_address: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return process(hub_address, tmp_path, "-m", "convert", *arguments, "--no-verify", "--weight-format", "int8")


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def assert_one_clear_line(said: str, code: int, message: str, output: Path):
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert message in errors[0]
    assert "Traceback" not in said
    assert code == 2
    assert not output.exists()


def test_a_hub_id_is_fetched_without_its_python_and_converted(hub, tmp_path):
    output = tmp_path / "out"
    done = run(address(hub), tmp_path, REPO, str(output), "--cache-dir", str(tmp_path / "cache"), "--token", "hf_example")
    assert done.returncode == 0, done.stderr
    fetched = {path.rsplit("/", 1)[-1] for method, path, *_ in hub.asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not [name for name in fetched if name.endswith(".py")]
    assert {authorization for _, path, _, authorization in hub.asked if REPO in path} == {"Bearer hf_example"}
    assert (tmp_path / "cache").exists()
    assert (output / "openvino_language_model.xml").exists()


def test_a_broken_off_download_is_told_and_resumes(hub, tmp_path):
    output = tmp_path / "out"
    hub.break_off = True
    done = run(address(hub), tmp_path, REPO, str(output))
    assert_one_clear_line(done.stderr, done.returncode, f"fetching {REPO} broke off", output)
    assert "run the same command again, it resumes" in done.stderr
    hub.break_off = False
    hub.asked.clear()
    done = run(address(hub), tmp_path, REPO, str(output))
    assert done.returncode == 0, done.stderr
    ranges = [range_ for method, path, range_, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert [r for r in ranges if r and int(r.removeprefix("bytes=").split("-")[0]) > 0], ranges
    assert not [path for method, path, *_ in hub.asked if method == "GET" and path.endswith("tokenizer.json")], "fetched again"


REFUSED = {  # arguments: what is said
    ("secret/model",): "secret/model is not on the hub, or is private",
    ("gated/model",): "gated/model is gated: accept its terms",
    (REPO, "--revision", "v9"): f"{REPO} has no revision 'v9'",
}
EACH = """
import json, sys
from convert.__main__ import main as convert
for output, *arguments in json.loads(sys.argv[1]):
    code = convert([arguments[0], output, *arguments[1:]])
    print(f"ended with {code}", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def refused(files, tmp_path_factory) -> dict[tuple[str, ...], tuple[str, int, Path]]:
    """What the command says of each, and its code: one process for all, which spends nearly all of its time on imports."""
    folder = tmp_path_factory.mktemp("refused")
    outputs = [folder / str(number) for number in range(len(REFUSED))]
    asked = [[str(output), *arguments] for output, arguments in zip(outputs, REFUSED, strict=True)]
    with serving(files) as server:
        done = process(address(server), folder, "-c", EACH, json.dumps(asked))
    said = re.findall(r"(.*?)^ended with (\d+)$", done.stderr, flags=re.DOTALL | re.MULTILINE)
    assert len(said) == len(REFUSED), done.stderr
    return {arguments: (text, int(code), output) for arguments, (text, code), output in zip(REFUSED, said, outputs, strict=True)}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_the_hub_refuses_is_told(refused, arguments):
    said, code, output = refused[arguments]
    assert_one_clear_line(said, code, REFUSED[arguments], output)


def test_no_network_is_told(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = run(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path, REPO, str(tmp_path / "out"))
    assert_one_clear_line(done.stderr, done.returncode, "cannot be reached: check the network and try again", tmp_path / "out")
