"""The accuracy of answers: the metrics of visual question answering, by their published definitions.

Knows texts, and boxes through runtime/answer/boxes.py; no models. Sources, whose numbers are in the tests:
exact, contains  no source: case and the amount of white space do not count
relaxed          ChartQA, arXiv:2203.10244 section 5.1, with google-research/pix2struct@main pix2struct/metrics.py
anls             DocVQA, arXiv:1907.00490 equation 1, threshold 0.5, with its evaluation script, where 0.5 itself counts
vqa              https://visualqa.org/evaluation.html with GT-Vision-Lab/VQA@07aecec PythonEvaluationTools/vqaEvaluation/vqaEval.py
bleu             of the corpus, ACL P02-1040 (Papineni 2002), tokens and smoothing of mjpost/sacrebleu's defaults (13a, exp)
refcoco          intersection over union (IoU) of the first box, right if at least 0.5
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.answer.boxes import Box, find_boxes, intersection_over_union
from runtime.errors import OptionError
from runtime.job.answers import read_answers, text_of
from runtime.job.requests import TABLES, record_batches

WITHIN = 0.05  # relative error of a right number
LEAST_SIMILAR = 0.5
AGREEING, FEWEST_ANSWERS = 3, 4  # people whose agreement makes an answer right; people needed to leave one out
NGRAMS = 4
RIGHT_FROM = 0.5  # IoU
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
ARTICLES = {"a", "an", "the"}
ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll "
    "ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's "
    "someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas "
    "wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're "
    "why's won't would've wouldn't y'all you'd you'll you're you've"
)
SEVERAL_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've "
    "they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at"
)
CONTRACTIONS = {  # contraction without one of its apostrophes -> contraction
    word[:at] + word[at + 1 :]: word
    for word in (ONE_APOSTROPHE + " " + SEVERAL_APOSTROPHES).split()
    for at in range(len(word))
    if word[at] == "'"
}


@dataclass(frozen=True)
class Truth:
    """The ground truth of a row: answers, or one box in pixels of a picture of `size` (width, height)."""

    answers: tuple[str, ...] = ()
    box: Box | None = None
    size: tuple[int, int] | None = None


def exact(answer: str, truth: Truth) -> float:
    """Whether the answer is one of the right ones."""
    return float(_plain(answer) in map(_plain, truth.answers))


def contains(answer: str, truth: Truth) -> float:
    """Whether the answer contains one of the right ones."""
    return float(any(_plain(right) in _plain(answer) for right in truth.answers))


def relaxed(answer: str, truth: Truth) -> float:
    """Whether a number is within 5 % of a right one; other answers must be the same."""
    return float(any(_is_near(answer.strip(), right.strip()) for right in truth.answers))


def anls(answer: str, truth: Truth) -> float:
    """Similarity to the nearest right answer, 1 - edits / length; 0 if below 0.5."""
    best = 0.0
    for right in truth.answers:
        one, other = (" ".join(text.strip().lower().split()) for text in (answer, right))
        longest = max(len(answer), len(right))
        best = max(best, 1 - edits(one, other) / longest if longest else 1.0)
    return best if best >= LEAST_SIMILAR else 0.0


def vqa(answer: str, truth: Truth) -> float:
    """VQA accuracy: min(1, people who gave the answer / 3), averaged over leaving each person out."""
    given = [normal_answer(right) for right in truth.answers]
    agreeing = sum(right == normal_answer(answer) for right in given)
    scores = [min(1.0, (agreeing - (right == normal_answer(answer))) / AGREEING) for right in given]
    return sum(scores) / len(scores)


def refcoco(answer: str, truth: Truth) -> float:
    """IoU of the first box with the right one; 0 without a box."""
    assert truth.box is not None
    found = find_boxes(answer, truth.size or ())
    return intersection_over_union(found[0], truth.box) if found else 0.0


METRICS: dict[str, Callable[[str, Truth], float] | None] = {
    "exact": exact,
    "relaxed": relaxed,
    "anls": anls,
    "vqa": vqa,
    "bleu": None,  # of all answers together
    "contains": contains,
    "refcoco": refcoco,
}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _is_near(answer: str, right: str) -> bool:
    number, wanted = _number(answer), _number(right)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= WITHIN
    return answer.lower() == right.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def edits(one: str, other: str) -> int:
    """Levenshtein distance: letters inserted, deleted or replaced."""
    row = [*range(len(other) + 1)]
    for count, letter in enumerate(one, 1):
        before, row[0] = row[0], count
        for at, another in enumerate(other, 1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (letter != another))
    return row[-1]


def normal_answer(text: str) -> str:
    """A text as VQA compares it: lower case, no articles, digits for number words, apostrophes restored, little punctuation."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    between_digits, made = re.search(r"\d,\d", text), text
    for mark in PUNCTUATION:
        gone = mark + " " in text or " " + mark in text or between_digits
        made = made.replace(mark, "" if gone else " ")
    made = re.sub(r"\.(?!\d)", "", made)
    words = (NUMBERS.get(word, word) for word in made.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def bleu(answers: Sequence[str], truths: Sequence[Truth]) -> float:
    """BLEU of a corpus, 0 to 1: n-grams up to 4, the reference nearest in length for the brevity penalty.

    If an order has no match, 1/2 match counts; in the next such order 1/4, and so on.
    """
    right, counts = [0] * NGRAMS, [0] * NGRAMS
    length = wanted = 0
    for answer, truth in zip(answers, truths, strict=True):
        words, references = words_of(answer), [words_of(text) for text in truth.answers]
        length += len(words)
        wanted += min((len(each) for each in references), key=lambda size: (abs(size - len(words)), size))
        for order in range(1, NGRAMS + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in references:
                most |= _runs(reference, order)
            own = _runs(words, order)
            right[order - 1] += sum((own & most).values())
            counts[order - 1] += sum(own.values())
    if not right[0]:
        return 0.0
    total, smaller = 0.0, 1.0
    for found, count in zip(right, counts, strict=True):
        if not count:
            return 0.0
        smaller = smaller if found else smaller / 2
        total += math.log((found or smaller) / count) / NGRAMS
    return math.exp(total + (min(0.0, 1 - wanted / length)))


def _runs(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1))


def words_of(text: str) -> list[str]:
    """The tokens of mteval-v13a.pl, with case."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for mark, letter in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(mark, letter)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


# ---- files


@dataclass(frozen=True)
class Scored:
    """The score of a file of answers."""

    metric: str
    texts: dict[str, str | None]  # of the rows with a ground truth; None if there is no answer
    values: dict[str, float] = field(repr=False)  # per row; empty for bleu
    score: float = 0.0
    strangers: int = 0  # answers without a ground truth
    mean_iou: float | None = None

    @property
    def missing(self) -> int:
        """Rows without an answer, which count as wrong."""
        return sum(text is None for text in self.texts.values())

    def summary(self) -> dict[str, Any]:
        """The figures of the score."""
        told = {"metric": self.metric, "score": self.score, "rows": len(self.texts), "without_an_answer": self.missing}
        return told | ({} if self.mean_iou is None else {"mean_iou": self.mean_iou}) | {"without_a_truth": self.strangers}


def score(file: Path, truths: Mapping[str, Truth], metric: str) -> Scored:
    """Score a file of answers. Raises OptionError if none of them has a ground truth."""
    texts: dict[str, str | None] = dict.fromkeys(truths)
    strangers = 0
    for line in read_answers(file):
        if line["custom_id"] in texts:
            texts[line["custom_id"]] = text_of(line)
        else:
            strangers += 1
    if strangers and all(text is None for text in texts.values()):
        raise OptionError(f"{file} has no answer to any row of the truth: its ids differ, like {line['custom_id']!r}")
    measure = METRICS[metric]
    if measure is None:
        value = bleu([text or "" for text in texts.values()], [*truths.values()])
        return Scored(metric, texts, {}, value, strangers)
    values = {name: 0.0 if text is None else measure(text, truths[name]) for name, text in texts.items()}
    mean = sum(values.values()) / len(values)
    if metric != "refcoco":
        return Scored(metric, texts, values, mean, strangers)
    right = sum(value >= RIGHT_FROM for value in values.values()) / len(values)
    return Scored(metric, texts, values, right, strangers, mean)


def read_truth(file: Path, metric: str) -> dict[str, Truth]:
    """The ground truth by id, from JSON lines or a table with id and answer or answers; for refcoco with box and size.

    A .json file may be one object that maps an id to its answer or answers. Raises OptionError.
    """
    found: dict[str, Truth] = {}
    for number, row in enumerate(_rows(file), 1):
        name = next((row[key] for key in ("id", "custom_id", "question_id") if row.get(key) is not None), number)
        try:
            truth = _truth(row, metric)
        except (ValueError, TypeError, KeyError) as error:
            raise OptionError(f"{file}, id {name}: {error}") from None
        if str(name) in found:
            raise OptionError(f"{file} has the id {name} twice: give every row its own")
        found[str(name)] = truth
    if not found:
        raise OptionError(f"{file} has no rows: give JSON lines with id and answer")
    return found


def _truth(row: Mapping[str, Any], metric: str) -> Truth:
    if metric == "refcoco":
        x1, y1, x2, y2 = (float(edge) for edge in row.get("box") or row.get("bbox") or ())
        width, height = (int(side) for side in row.get("size") or (row["width"], row["height"]))
        return Truth(box=Box("", x1, y1, x2, y2), size=(width, height))
    given = row.get("answers") if row.get("answers") is not None else row.get("answer")
    several = given if isinstance(given, list) else [given]
    answers = tuple(str(one["answer"] if isinstance(one, Mapping) else one) for one in several if one is not None)
    if not answers:
        raise ValueError("there is no answer")
    if metric == "vqa" and len(answers) < FEWEST_ANSWERS:
        raise ValueError(f"{len(answers)} answers: VQA accuracy needs at least {FEWEST_ANSWERS}, ten as published")
    return Truth(answers)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        if file.suffix.lower() in TABLES:
            for batch in record_batches(file):
                yield from batch.to_pylist()
            return
        text = file.read_text(encoding="utf-8")
        if file.suffix.lower() == ".json":
            whole = json.loads(text)
            yield from (
                [{"id": name, "answers": right if isinstance(right, list) else [right]} for name, right in whole.items()]
                if isinstance(whole, dict)
                else whole
            )
            return
        for line in text.splitlines():
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a line is not an object")
                yield row
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} cannot be read as ground truth ({getattr(error, 'strerror', None) or error})") from None
