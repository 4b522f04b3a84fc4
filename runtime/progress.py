"""How long work is followed and ended: the callable that hears of it, and the exception that stops it.

Every room may report; none knows who listens.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # stage, done, total; stages are frames, tiles and prefill


class Cancelled(Exception):
    """Raised inside a running answer that is not wanted any more; never reaches the caller."""
