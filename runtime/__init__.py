"""Answer questions about pictures and video from a model folder. The names below load what they need when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from runtime.errors import InternVLError as InternVLError
    from runtime.image import load_image as load_image
    from runtime.model import OVInternVLChatModel as OVInternVLChatModel
    from runtime.serve.offline import GenerationConfig as GenerationConfig
    from runtime.serve.offline import pipeline as pipeline
    from runtime.video import load_video as load_video

_HOME = {
    **{"OVInternVLChatModel": "model", "load_image": "image", "load_video": "video", "InternVLError": "errors"},
    **dict.fromkeys(("pipeline", "GenerationConfig"), "serve.offline"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"runtime.{_HOME[name]}"), name)
