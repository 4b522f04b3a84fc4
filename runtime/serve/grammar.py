"""Whether openvino_genai can write answers after a JSON schema, found out before the answer begins.

It compiles a schema in the step that draws the first token, for all requests at once, and all end if it does not take it.
So a schema is tried first on a stand-in, a model of one matrix with the folder's tokenizer. Knows no requests.
"""

from __future__ import annotations

import re
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from runtime.answer.grammar import check_bounds
from runtime.errors import OptionError


class SchemaCheck:
    """Tries schemas; makes its stand-in when the first one comes (a quarter of a second)."""

    def __init__(self, folder: Path, vocabulary: int):
        self._folder, self._vocabulary = folder, vocabulary
        self._pipeline: Any = None
        self._lock = threading.Lock()

    def __call__(self, schema: str) -> None:
        """Raise OptionError unless answers can be written after this JSON schema."""
        import openvino_genai

        check_bounds(schema)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = 1
        config.structured_output_config = openvino_genai.StructuredOutputConfig(json_schema=schema)
        with self._lock:
            if self._pipeline is None:
                self._pipeline = self._stand_in()
            try:
                self._pipeline.generate(_one_token(), config)
            except RuntimeError as error:
                lines = str(error).strip().splitlines() or ["no reason given"]
                reason = re.sub(r"^.*\.(cc|cpp|h|hpp):\d+:?\s*", "", lines[-1])
                raise OptionError(f"the JSON schema cannot be followed ({reason})") from None

    def _stand_in(self) -> Any:
        """A pipeline that draws one token out of the vocabulary, all alike."""
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
        for unused in (mask, beams):  # openvino_genai sets them, and what nothing reads is not there
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
