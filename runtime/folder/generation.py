"""generation_config.json: the decoding options that a model is published with, by transformers' names.

Reads the file; runtime/answer/decode.py checks the values.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from runtime.errors import ModelFolderError

APPLIED = {  # by runtime.answer.decode
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "prompt_lookup_num_tokens",
    "eos_token_id",
}
NEUTRAL = {  # have no effect on tokens here, or are transformers' bookkeeping
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "max_length",
    "use_cache",
    "cache_implementation",
    "num_return_sequences",
    "transformers_version",
    "trust_remote_code",
    "return_dict_in_generate",
    "chat_format",
    "max_window_size",
    "user_token_id",
    "assistant_token_id",
}
logger = logging.getLogger(__name__)


def read_generation_config(file: Path) -> dict[str, Any]:
    """The values that are applied here; {} without a file. One warning names those that are not. Raises ModelFolderError."""
    if not file.exists():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{file} is not JSON ({error}): correct it, or convert the checkpoint again") from None
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{file} holds a {type(raw).__name__}, expected a JSON object: convert the checkpoint again")
    other = [
        name
        for name, value in raw.items()
        if name not in APPLIED | NEUTRAL and not name.startswith(("_", "output_")) and value not in (None, False, 0, 1, 1.0, [])
    ]
    if other:
        logger.warning("%s: %s is ignored", file, ", ".join(sorted(other)))
    return {name: value for name, value in raw.items() if name in APPLIED and value is not None}
