"""The same job on the nodes of a Ray cluster: Ray Data reads, distributes, waits and retries.

Each actor opens the model folder and answers rows on its own cores. Folder, requests and pictures have the same paths on every
node, as on a mounted volume; pictures may instead be web addresses, or bytes in a table. Knows rows and answers.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

from runtime.errors import InternVLError, OptionError, not_installed
from runtime.job import ask
from runtime.job.answers import Answer
from runtime.job.requests import Requests, Row

COLUMN = "pickled"
ROWS_A_BLOCK = ask.WINDOW  # rows that an actor gets at once; if its node dies, another actor gets them
TOLD_AT_ONCE, TOLD_BYTES = 16, 1 << 12  # answers and bytes after which an actor returns a block
EXTRA = "; it spreads a job over machines"


def library() -> Any:
    """Ray Data. Raises OptionError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise not_installed(error, "ray", EXTRA) from None
    return ray


def connect(address: str) -> Any:
    """Connect to the cluster at an address, `auto` for this machine's. Raises OptionError if there is none."""
    ray = library()
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            line = str(error).strip().splitlines()[0]
            raise OptionError(f"there is no Ray cluster at {address} ({line}): start one with  ray start --head") from None
    return ray


def answers(
    address: str, open_model: Any, asking: Any, cache_bytes: int, requests: Requests, rows: Iterator[Row]
) -> Iterator[Answer]:
    """The answers to those of the requests that are among `rows`, in the order in which they finish.

    `open_model` is called in every actor, with OpenVINO's properties. Raises OptionError if there is no cluster, and the
    InternVLError of an actor that cannot start.
    """
    ray = connect(address)
    left = Left()
    for row in rows:
        if row.error:
            yield Answer(row.number, row.id, error=row.error, code="RequestError")
        else:
            left.add(row.number)
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cores = [count for count in cores if count]
    if not cores:
        raise OptionError("the Ray cluster has no CPUs: add a node with  ray start --address ADDRESS")
    share = min(cores)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would print its plans
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    context.execution_options.preserve_order = False
    context.target_max_block_size = TOLD_BYTES  # otherwise answers arrive only when an actor has finished all its rows
    asked = ray.data.read_datasource(_source(requests, left), num_cpus=0, override_num_blocks=1)
    found = asked.map_batches(
        _answering(),
        fn_constructor_args=(partial(open_model, ov_config={"INFERENCE_NUM_THREADS": share}), asking, cache_bytes),
        batch_size=ROWS_A_BLOCK,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=sum(count // share for count in cores)),
        num_cpus=share,
    )
    try:
        for batch in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(pickle.loads, batch[COLUMN].to_pylist())
    except InternVLError as error:
        raise type(error)(str(error)) from None


class Left:
    """A set of row numbers, one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, number: int) -> None:
        """Add a number."""
        if number // 8 >= len(self._bits):
            self._bits.extend(bytes(max(1024, number // 8 + 1 - len(self._bits))))
        self._bits[number // 8] |= 1 << number % 8

    def __contains__(self, number: int) -> bool:
        return number // 8 < len(self._bits) and bool(self._bits[number // 8] >> number % 8 & 1)


def _block(values: list[Any]) -> Any:
    import pyarrow as arrow

    return arrow.table({COLUMN: arrow.array([pickle.dumps(value) for value in values], arrow.large_binary())})


def _blocks(requests: Requests, left: Left) -> Iterator[Any]:
    """Blocks of the rows that are left; the same every time, since Ray runs a lost task again."""
    some: list[Row] = []
    for row in requests:
        if row.number in left:
            some.append(row)
            if len(some) == ROWS_A_BLOCK:
                yield _block(some)
                some = []
    if some:
        yield _block(some)


def _source(requests: Requests, left: Left) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Source(Datasource):
        """The rows that are left, read by one task as a stream."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(partial(_blocks, requests, left), about)]

    return Source()


def _answering() -> type:
    class Answering:
        """An actor: the model, opened once."""

        def __init__(self, open_model: Any, asking: Any, cache_bytes: int):
            self._asking, self._cache_bytes, self._model = asking, cache_bytes, open_model()

        def __call__(self, batch: Any) -> Iterator[Any]:
            rows = [pickle.loads(each) for each in batch[COLUMN].to_pylist()]
            told: list[Answer] = []
            for answer in ask.answers(self._model, self._asking, self._cache_bytes, rows):
                told.append(answer)
                if len(told) == TOLD_AT_ONCE:
                    yield _block(told)
                    told = []
            yield _block(told)

    return Answering
