"""A part without state: the text embeddings, the vision part, a router.

One input, one or more outputs, called with NumPy arrays; knows nothing of what they mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov

from runtime.parts.attention import open_attention
from runtime.parts.device import Placement, processor_class, widened
from runtime.parts.part import compile_part, compile_wider, infer, leaving_file, read_part, threads_of


class StatelessPart:
    """One part without state, with one input; several threads may call it.

    `more` names inner tensors that become further outputs, after its own.
    """

    def __init__(self, folder: Path, core: ov.Core, placement: Placement, width: int, more: Sequence[str] = ()):
        def read() -> ov.Model:
            model = read_part(core, folder, placement, width)
            if more:
                model.add_outputs([*more])
            return model

        self._read = read
        model = self._read()
        if placement.device == "CPU":
            in_float32 = placement.accurate or placement.properties.get("INFERENCE_PRECISION_HINT") == "f32"
            known = None if in_float32 else processor_class(core)
            model = open_attention(model, 1 if known is None else known.tile_multiple)
        self._use(compile_part(core, folder, model, placement))
        wider = widened(core, placement)
        self._wider = None if wider is None else lambda: compile_wider(core, folder, self._read(), wider)
        self._lock = threading.Lock()
        self._packing: Callable[[], AbstractContextManager[None]] = partial(leaving_file, folder, placement)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.run(values, [0])[0]

    def run(self, values: np.ndarray, outputs: Sequence[int]) -> list[np.ndarray]:
        """The outputs of these numbers."""
        with self._lock:
            with self._packing():
                infer(self._request, {self._input: values})
            self._packing = nullcontext
            found = self._outputs(outputs)
            if self._wider is not None and not all(np.isfinite(each).all() for each in found):
                self._use(self._wider())
                self._wider = None
                infer(self._request, {self._input: values})
                found = self._outputs(outputs)
            return found

    def _outputs(self, numbers: Sequence[int]) -> list[np.ndarray]:
        return [self._request.get_output_tensor(number).data.copy() for number in numbers]

    def _use(self, compiled: ov.CompiledModel) -> None:
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self._input = compiled.input().get_any_name()

    @property
    def threads(self) -> int:
        """Number of threads it computes with."""
        return threads_of(self._compiled)

    def release(self) -> None:
        """Release the memory of intermediate results until the next call."""
        with self._lock:
            self._compiled.release_memory()
