"""What training shows when: the share of each kind of scene by the level reached, 0 at the start, 1 at full difficulty.

Numbers alone: knows nothing of what the kinds draw.
"""

from __future__ import annotations

# Share of each kind of scene in training.
KINDS = {
    **{"grid": 0.30, "row": 0.10, "text": 0.26, "chart": 0.10, "small_text": 0.09, "compare": 0.08, "motion": 0.07},
    **{"page": 0.25, "forms": 0.4, "find": 1.0},
}

LATER = 5.3  # level from which these shares change: rows and charts are learnt, tasks of two steps are not
LATER_KINDS = {"grid": 0.25, "row": 0.05, "chart": 0.04, "compare": 0.35, "motion": 0.3, "page": 0.2, "forms": 0.2}

LAST = 5.77  # level from which clips and print, the last to be learnt, have these shares, and every clip holds two shapes
LAST_KINDS = LATER_KINDS | {"text": 0.45, "small_text": 0.12, "compare": 0.15, "motion": 0.5, "page": 0.25, "forms": 0.15}

COUNTING = 7.73  # level from which scenes of many alike shapes are frequent, and questions count the most frequent kind
COUNTING_KINDS = LAST_KINDS | {"grid": 0.45, "forms": 0.3, "motion": 0.35, "page": 0.2, "small_text": 0.15}

FINDING = 9.6  # level from which half of the scenes ask for boxes; earlier tasks go on, so that they are not forgotten
FINDING_KINDS = COUNTING_KINDS | {"page": 0.05, "forms": 0.1, "find": 1.8}

CHANGES = ((FINDING, FINDING_KINDS), (COUNTING, COUNTING_KINDS), (LAST, LAST_KINDS), (LATER, LATER_KINDS))

STARTS = {
    "row": 0.1,
    "chart": 0.2,
    "small_text": 0.4,
    "compare": 0.3,
    "motion": 0.4,
    "page": 0.85,
    "forms": 3.25,
    "find": 9.6,
}  # level from which a kind is drawn

SURE = 1.4  # level from which few printed words are real ones, so that guessing from the first letter does not pay

DRILL = 4.4  # level from which scenes of shapes carry exercises


def kind_shares(level: float) -> dict[str, float]:
    """Share of each kind of scene that is drawn at this level."""
    shares = KINDS | next((kinds for start, kinds in CHANGES if level >= start), {})
    return {name: shares[name] for name in KINDS if level >= STARTS.get(name, 0)}
