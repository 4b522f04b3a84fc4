"""torch and transformers, imported on first use: converting installs them, answering does without."""

from __future__ import annotations

from typing import Any

from runtime.errors import not_installed


def import_torch(call: str) -> Any:
    """The torch module, for a call that takes or returns its tensors. Raises OptionError where it is not installed."""
    try:
        import torch
        import transformers  # noqa: F401  both or neither
    except ModuleNotFoundError as error:
        raise not_installed(error, "torch", f"; {call} works on torch tensors, start_conversation() answers without") from None
    return torch
