"""python -m pytest tests/runtime/serve/test_restart.py

What becomes of the answers, and of the server, when the process that writes them is killed: with the real process and a real
SIGKILL.
"""

import json
import threading

import httpx
import psutil
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'internvl-openvino[serve]'")
pytest.importorskip("openvino_genai", reason="openvino_genai is not installed")

from tests.bench_serve import gauge
from tests.conftest import data_url
from tests.runtime.serve.server import ROOT, Server, eventually, started

SHAPES = data_url(ROOT / "demo" / "examples" / "shapes.png")
ENDED = "the worker process ended: ask again"
LONG = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "max_tokens": 3000}
SHORT = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": SHAPES}}, {"type": "text", "text": "Which is purple?"}],
        }
    ]
}


@pytest.fixture
def server(shapes, tmp_path):
    with started(shapes, tmp_path) as server:
        yield server


def ask(server: Server, **changes) -> httpx.Response:
    return httpx.post(f"{server.address}/v1/chat/completions", json=SHORT | changes, timeout=60)


def kill_worker(server: Server) -> None:
    worker = server.worker
    assert worker is not None
    worker.kill()
    psutil.wait_procs([worker], timeout=10)


def test_a_killed_process_costs_one_error_an_answer_and_the_next_request_is_answered(server):
    wanted = ask(server).json()["choices"][0]["message"]["content"]
    first = server.worker
    found: dict[int, httpx.Response] = {}
    bodies = [LONG | {"stream": number % 2 == 0} for number in range(6)]

    def hold(number: int) -> None:
        found[number] = httpx.post(f"{server.address}/v1/chat/completions", json=bodies[number], timeout=60)

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    assert eventually(lambda: gauge(server.address, "internvl_active_requests") == len(bodies))
    assert eventually(lambda: gauge(server.address, "internvl_waiting_requests") == 0), "all are in the middle"
    kill_worker(server)
    assert ask(server).json()["choices"][0]["message"]["content"] == wanted, "at once, while the other process starts"
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "nobody waits for ever"
    for number, body in enumerate(bodies):
        if body["stream"]:
            *_, error, done = [line for line in found[number].text.splitlines() if line]
            assert json.loads(error.removeprefix("data: "))["error"]["message"] == ENDED
            assert done == "data: [DONE]"
            assert found[number].text.count('"error"') == 1
        else:
            assert (found[number].status_code, found[number].json()["error"]["message"]) == (503, ENDED)
            assert found[number].headers["retry-after"] == "1"
    assert server.worker != first
    assert gauge(server.address, "internvl_active_requests") == 0
    assert httpx.get(f"{server.address}/health").status_code == 200, "once is an accident"
    assert "Traceback" not in server.errors.read_text()


def test_twice_in_a_minute_is_unwell(server):
    assert ask(server).status_code == 200
    files = server.process.num_fds()
    kill_worker(server)
    assert ask(server).status_code == 200
    assert httpx.get(f"{server.address}/health").status_code == 200
    kill_worker(server)
    assert eventually(lambda: httpx.get(f"{server.address}/health").status_code == 503)
    assert ask(server).status_code == 200, "it answers all the same"
    assert httpx.get(f"{server.address}/health").status_code == 503, "for a minute"
    assert eventually(lambda: server.process.num_fds() <= files), "pipes of ended processes are closed"
    assert len([each for each in server.process.children() if each.status() != psutil.STATUS_ZOMBIE]) == 1


def test_a_process_that_does_not_start_again_is_given_up(shapes, tmp_path):
    """Its folder is gone meanwhile: some tries, and then every request is told at once."""
    import shutil

    folder = tmp_path / "shapes"
    shutil.copytree(shapes, folder)
    with started(folder, tmp_path) as server:
        (folder / "openvino_language_model.xml").unlink()
        kill_worker(server)
        assert eventually(lambda: "does not start any more" in server.errors.read_text(), 60)
        assert httpx.get(f"{server.address}/health").status_code == 503
        assert (ask(server).status_code, ask(server).json()["error"]["message"]) == (503, ENDED)
        assert server.worker is None


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_a_process_that_is_killed_as_it_starts_is_started_again(server, seconds):
    kill_worker(server)
    assert eventually(lambda: server.worker is not None)
    threading.Event().wait(seconds)
    kill_worker(server)
    assert ask(server).status_code == 200
