"""Answer questions about pictures and video from a model folder. The names below import what they need on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from runtime.answer.boxes import Box as Box
    from runtime.answer.boxes import find_boxes as find_boxes
    from runtime.answer.drawing import draw_boxes as draw_boxes
    from runtime.answer.turn import Question as Question
    from runtime.errors import InternVLError as InternVLError
    from runtime.job.run import batch as batch
    from runtime.serve.offline import GenerationConfig as GenerationConfig
    from runtime.serve.offline import pipeline as pipeline
    from runtime.upstream.contrastive import OVInternViT as OVInternViT
    from runtime.upstream.contrastive import OVInternVL as OVInternVL
    from runtime.upstream.load import load_image as load_image
    from runtime.upstream.load import load_video as load_video
    from runtime.upstream.model import OVInternVLChatModel as OVInternVLChatModel

_HOME = {
    "OVInternVLChatModel": "upstream.model",
    "OVInternVL": "upstream.contrastive",
    "OVInternViT": "upstream.contrastive",
    "load_image": "upstream.load",
    "load_video": "upstream.load",
    "Question": "answer.turn",
    "Box": "answer.boxes",
    "find_boxes": "answer.boxes",
    "draw_boxes": "answer.drawing",
    "InternVLError": "errors",
    "pipeline": "serve.offline",
    "batch": "job.run",
    "GenerationConfig": "serve.offline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"runtime.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        from runtime.errors import not_installed

        raise not_installed(error, "serve" if _HOME[name].startswith("serve") else "torch") from None
