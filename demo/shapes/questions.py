"""What is asked about a scene: a dialogue of training, or one question of an exam.

Question `index` of a seed is always the same. Knows nothing of models or tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo.shapes.find_scenes import FRAMES
from demo.shapes.maker import Turn
from demo.shapes.scenes import Scene, make_scene

TOLD = ("describe", "exercise", "find_several")  # turns that contain the answers of others
LATE = 2.335  # level from which a description mostly comes last: answers after it can be copied without looking

# Kinds of scene that a task of the exam is asked on.
TASKS = {
    **{"shape": ("grid",), "colour": ("grid",), "count": ("grid",), "position": ("grid",), "nth": ("row",)},
    **{"word": ("text",), "number": ("text",), "chart": ("chart",), "describe": ("grid",), "small_text": ("small_text",)},
    **{"compare": ("compare",), "motion": ("motion",), "follow_up": ("grid", "text")},
    "chinese": ("grid", "grid", "row", "text", "chart", "compare", "motion"),
}


def dialogue(scene: Scene, rng: random.Random, most: int, level: float) -> list[Turn]:
    """Up to about `most` turns of a scene in random order, follow-ups after what they refer to; no question twice."""
    groups = list(scene.groups)
    most = min(most, 3) if scene.kind == "find" else most  # each has a long question
    rng.shuffle(groups)
    if rng.random() < 0.7:  # a description says more of the picture than any other answer
        groups.sort(key=lambda group: group[0].task not in TOLD)
    chosen: dict[str, Turn] = {}
    picked: list[list[Turn]] = []
    for group in groups:
        if len(chosen) >= most:
            break
        if not any(turn.question in chosen for turn in group):
            chosen |= {turn.question: turn for turn in group}
            picked.append(group)
    rng.shuffle(picked)
    if level >= LATE and rng.random() < 0.8:
        picked.sort(key=lambda group: group[0].task in TOLD)
    return [turn for group in picked for turn in group]


@dataclass(frozen=True)
class Question:
    """One question of the exam: the last turn counts, turns before it are asked first."""

    task: str
    scene: Scene
    turns: list[Turn]


def make_question(seed: int, split: str, index: int) -> Question:
    """Question number `index`; tasks take turns."""
    task = list(TASKS)[index % len(TASKS)]
    for attempt in range(1000):
        rng = random.Random(f"exam/{seed}/{split}/{index}/{attempt}")
        language = "zh" if task == "chinese" else "en"
        scene = make_scene(seed, split, f"exam/{index}/{attempt}", kind=rng.choice(TASKS[task]), language=language)
        if task == "follow_up":
            asked = [group for group in scene.groups if group[-1].task == "follow_up"]
        elif task == "chinese":
            asked = [group[:1] for group in scene.groups if group[0].task not in ("describe", "where_in")]
        else:
            asked = [group[:1] for group in scene.groups if group[0].task == task]
        if asked:
            return Question(task, scene, rng.choice(asked))
    raise AssertionError(f"no scene of {task} has a question")


def make_place_question(seed: int, split: str, index: int) -> tuple[Question, tuple[int, int]]:
    """Question number `index` for one box, and the size of its picture; sizes take turns, small and large things too."""
    size, task = FRAMES[index % len(FRAMES)], ("find_small", "find_large")[index // len(FRAMES) % 2]
    for attempt in range(1000):
        scene = make_scene(seed, split, f"places/{index}/{attempt}", kind="find", language="en", size=size)
        asked = [group for group in scene.groups if group[0].task == task]
        if asked:
            return Question(task, scene, random.Random(f"places/{seed}/{split}/{index}").choice(asked)), size
    raise AssertionError(f"no scene has a {task} thing")
