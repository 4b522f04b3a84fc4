"""JSON schemas and functions as openvino_genai's structured output, tested before the answer begins.

openvino_genai compiles a schema in the step that samples the first token: one that it refuses ends all requests in the batch, and
a slow one delays them all. So each schema is tested first on a stand-in, a model of one matrix with the folder's tokenizer, in a
process of its own, which can be killed. Knows no requests.
"""

from __future__ import annotations

import json
import pickle
import re
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.answer.decode import Decoding
from runtime.answer.grammar import check_bounds, check_calls
from runtime.answer.reading import THOUGHT_END, THOUGHT_START
from runtime.answer.tools import CALL_END, CALL_START, CALL_TAIL, call_head
from runtime.errors import OptionError
from runtime.serve.process import Process, pipes, send

MOST_SECONDS = 1.0  # to compile a schema; all answers wait for it
MOST_KEPT = 256  # schemas that are remembered, and tested by one process: openvino_genai frees none


def structured_output(schema: str | None, calls: Mapping[str, Any] | None, *, thoughts: bool) -> Any:
    """openvino_genai's structured output for an answer that follows a schema, or has calls (a CallRule as a dictionary).

    None for a free answer.
    """
    from openvino_genai import StructuredOutputConfig as Structure

    if schema is not None and not thoughts:
        return Structure(json_schema=schema)
    if schema is not None:
        answer: Any = Structure.JSONSchema(schema)
    elif calls is not None:
        tags = [
            Structure.Tag(CALL_START + call_head(name), Structure.JSONSchema(given), CALL_TAIL + CALL_END)
            for name, given in calls["functions"]
        ]
        answer = Structure.TriggeredTags([CALL_START], tags, calls["required"], not calls["several"])
        if calls["required"] and calls["several"]:
            answer = Structure.TagsWithSeparator(tags, "\n", True)
    else:
        return None
    if thoughts:
        answer = Structure.Tag(THOUGHT_START, Structure.AnyText(), THOUGHT_END + "\n\n") + answer
    return Structure(structural_tags_config=answer)


@dataclass(frozen=True)
class Asked:
    """The arguments of `structured_output`."""

    schema: str | None
    calls: dict[str, Any] | None
    thoughts: bool


class SchemaCheck:
    """Tests schemas: the first one starts the process (some seconds), and those that can be followed are remembered."""

    def __init__(self, folder: Path, vocabulary: int):
        self._setup = str(folder), vocabulary
        self._process: Process | None = None
        self._tried = 0
        self._known: dict[str, None] = {}
        self._lock = threading.Lock()
        self._listener = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tried")

    def __call__(self, decoding: Decoding) -> None:
        """Raise OptionError unless openvino_genai can follow the JSON schema or the functions' schemas of this decoding."""
        if decoding.json_schema is not None:
            check_bounds(decoding.json_schema)
        elif decoding.calls is not None:
            check_calls(decoding.calls)
        asked = Asked(decoding.json_schema, None if decoding.calls is None else asdict(decoding.calls), decoding.thoughts)
        key = json.dumps(astuple(asked))
        with self._lock:
            if key in self._known:
                return
            process = self._ready()
            process.send(asked)
            try:
                answer = self._listener.submit(process.receive).result(MOST_SECONDS)
            except TimeoutError:
                self._end()
                raise OptionError(f"the JSON schema takes longer than {MOST_SECONDS:g} s to prepare: simplify it") from None
            if answer is None:
                self._end()
                raise OptionError("the JSON schema cannot be followed (its compilation crashed)")
            if answer:
                raise OptionError(f"the JSON schema cannot be followed ({answer})")
            self._known[key] = None
            if len(self._known) > MOST_KEPT:
                del self._known[next(iter(self._known))]

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()
        self._listener.shutdown()

    def _ready(self) -> Process:
        if self._tried >= MOST_KEPT:
            self._end()
        if self._process is None:
            self._process, self._tried = Process(__name__, self._setup), 0
            if self._process.receive() != "ready":
                self._end()
                raise RuntimeError("the process that compiles JSON schemas does not start")
        self._tried += 1
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class StandIn:
    """A pipeline that generates one token; all logits are equal."""

    def __init__(self, folder: Path, vocabulary: int):
        self._folder, self._vocabulary = folder, vocabulary
        self._pipeline = self._stand_in()

    def reason(self, asked: Asked) -> str:
        """Why openvino_genai cannot follow this; empty if it can."""
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = 1
        config.structured_output_config = structured_output(asked.schema, asked.calls, thoughts=asked.thoughts)
        try:
            self._pipeline.generate(_one_token(), config)
        except RuntimeError as error:
            lines = str(error).strip().splitlines() or ["no reason given"]
            return re.sub(r"^.*\.(cc|cpp|h|hpp):\d+:?\s*", "", lines[-1]) or "no reason given"
        return ""

    def _stand_in(self) -> Any:
        import openvino as ov
        import openvino_genai
        from openvino import opset13 as op

        def given(name: str, rank: int, kind: ov.Type) -> Any:
            made = op.parameter([-1] * rank, kind, name=name)
            made.output(0).set_names({name})
            return made

        ids, mask = given("input_ids", 2, ov.Type.i64), given("attention_mask", 2, ov.Type.i64)
        beams = given("beam_idx", 1, ov.Type.i32)
        wide = op.unsqueeze(op.convert(ids, "f32"), op.constant(np.array(2)))
        logits = op.matmul(wide, op.constant(np.zeros((1, self._vocabulary), np.float32)), False, False)
        for unused in (mask, beams):  # openvino_genai sets these inputs, and an input without a reader is dropped
            total = op.reduce_sum(op.convert(unused, "f32"), op.constant(np.arange(len(unused.partial_shape))))
            logits = op.add(logits, op.multiply(total, op.constant(np.float32(0))))
        logits.output(0).set_names({"logits"})
        with tempfile.TemporaryDirectory() as folder:
            ov.save_model(ov.Model([op.result(logits)], [ids, mask, beams]), Path(folder) / "openvino_model.xml")
            tokenizer = openvino_genai.Tokenizer(str(self._folder))
            return openvino_genai.LLMPipeline(folder, tokenizer, "CPU", ATTENTION_BACKEND="SDPA")


def _one_token() -> Any:
    import openvino as ov
    import openvino_genai

    return openvino_genai.TokenizedInputs(ov.Tensor(np.array([[1]])), ov.Tensor(np.array([[1]])))


def main() -> None:
    """Test schemas until standard input ends or nobody reads the answers."""
    given, out = pipes()
    with suppress(EOFError, OSError):
        folder, vocabulary = pickle.load(given)
        stand_in = StandIn(Path(folder), vocabulary)
        stand_in.reason(Asked("{}", None, False))  # warm-up
        send("ready", out)
        while True:
            send(stand_in.reason(pickle.load(given)), out)


if __name__ == "__main__":
    main()
