"""python -m pytest tests/convert/test_hub.py

The hub path against a stand-in server on 127.0.0.1: what is asked for, what resumes, what is said when it fails.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
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


@pytest.fixture
def hub(tmp_path):
    # 30 MB: the client writes what it gets in pieces of 10 MB, and a smaller file would have nothing to resume
    language = CONFIGS["tiny-qwen2"]["llm_config"] | {"vocab_size": 120_000}
    server = Hub(make_checkpoint(tmp_path / "hub", "tiny-qwen2", llm_config=language))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub_address: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """python -m convert in a process of its own: the hub's address is read from the environment when its client is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub_address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "convert", *arguments, "--no-verify", "--weight-format", "int8"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def assert_one_clear_line(done: subprocess.CompletedProcess, message: str, output: Path):
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr
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
    assert_one_clear_line(done, f"fetching {REPO} broke off", output)
    assert "run the same command again, it resumes" in done.stderr
    hub.break_off = False
    hub.asked.clear()
    done = run(address(hub), tmp_path, REPO, str(output))
    assert done.returncode == 0, done.stderr
    ranges = [range_ for method, path, range_, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert [r for r in ranges if r and int(r.removeprefix("bytes=").split("-")[0]) > 0], ranges
    assert not [path for method, path, *_ in hub.asked if method == "GET" and path.endswith("tokenizer.json")], "fetched again"


def test_a_missing_repository_is_told(hub, tmp_path):
    done = run(address(hub), tmp_path, "secret/model", str(tmp_path / "out"))
    assert_one_clear_line(done, "secret/model is not on the hub, or is private", tmp_path / "out")


def test_a_gated_repository_is_told(hub, tmp_path):
    done = run(address(hub), tmp_path, "gated/model", str(tmp_path / "out"))
    assert_one_clear_line(done, "gated/model is gated: accept its terms", tmp_path / "out")


def test_an_unknown_revision_is_told(hub, tmp_path):
    done = run(address(hub), tmp_path, REPO, str(tmp_path / "out"), "--revision", "v9")
    assert_one_clear_line(done, f"{REPO} has no revision 'v9'", tmp_path / "out")


def test_no_network_is_told(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = run(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path, REPO, str(tmp_path / "out"))
    assert_one_clear_line(done, "cannot be reached: check the network and try again", tmp_path / "out")
