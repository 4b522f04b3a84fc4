"""The quality of a model folder as convert measured it, as lines to print.

Reads quality.json; knows nothing of the measurement.
"""

from __future__ import annotations

import json
from pathlib import Path

from runtime.folder.files import QUALITY_FILE

WHOLE = "all"  # the key of all parts together


def read_quality(folder: Path) -> dict[str, str]:
    """The lines by name; {} where nothing was measured."""
    file = folder / QUALITY_FILE
    if not file.exists():
        return {}
    told = json.loads(file.read_text(encoding="utf-8"))
    parts = {part: f"KL {found['kl']:.5f}, same token {found['same']:.1%}" for part, found in told["parts"].items()}
    whole = parts.pop(WHOLE, "the checkpoint's answers are empty")
    first = told["parts"].get(WHOLE, {}).get("first")
    if first is not None:
        whole += f", first other (median) {first}"
    rows = {"quality": f"{whole}; {told['tokens']} tokens of {told['questions']} answers"}
    if "search" in told:
        found = told["search"]
        rows["searched"] = f"language KL {found['kl']:.5f} of at most {found['max_loss']:g}, on the answers that it chose by"
    return rows | ({"quality by part": "; ".join(f"{part} {line}" for part, line in parts.items())} if parts else {})
