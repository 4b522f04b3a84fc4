"""python -m pytest tests/runtime/job/test_score.py

Scores are those of the published definitions: numbers of their papers, pages and scripts on small cases, and of sacrebleu.
"""

import json
import random

import pytest

import runtime.__main__
from runtime.answer.boxes import Box
from runtime.commands.score import METRICS as CHOICES
from runtime.job.score import METRICS, Truth, anls, bleu, contains, edits, exact, normal_answer, refcoco, relaxed, vqa, words_of


def test_exact_and_contained():
    assert exact(" A Red  star", Truth(("blue", "a red star"))) == 1
    assert exact("red", Truth(("a red star",))) == 0
    assert contains("It is a RED star.", Truth(("red star",))) == 1
    assert contains("red", Truth(("red star",))) == 0


@pytest.mark.parametrize(
    ("answer", "right", "holds"),
    [
        ("102", "100", 1),
        ("105", "100", 1),
        ("106", "100", 0),
        ("-95", "-100", 1),
        ("12%", "0.12", 1),  # the script divides
        ("45%", "45", 0),
        ("1,234", "1234", 0),  # and knows no thousands
        ("0", "0", 1),
        ("1", "0", 0),
        ("Yes", "yes", 1),
        ("no", "yes", 0),
        ("82.39 billion", "82.39", 0),
    ],
)
def test_relaxed_accuracy_is_that_of_its_script(answer, right, holds):
    assert relaxed(answer, Truth((right,))) == holds


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("Hello", ["hello"], 1),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),  # half is enough for the script
        ("abcd", ["axyz"], 0),
        ("42 %", ["42%", "forty"], 0.75),
        ("a  b", ["a b"], 1),
    ],
)
def test_anls_is_that_of_its_script(answer, right, score):
    assert anls(answer, Truth(tuple(right))) == pytest.approx(score)


def test_edits_are_those_of_the_definition():
    """Against the recursion of the definition itself."""

    def counted(one, other):
        if not one or not other:
            return len(one) + len(other)
        changed = counted(one[1:], other[1:]) + (one[0] != other[0])
        return min(counted(one[1:], other) + 1, counted(one, other[1:]) + 1, changed)

    dice = random.Random(0)
    for _ in range(60):
        one, other = ("".join(dice.choices("abc", k=dice.randrange(6))) for _ in range(2))
        assert edits(one, other) == counted(one, other)


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_person_out(agreeing, score):
    """The numbers that its authors tell for ten answers."""
    assert vqa("yes", Truth(("yes",) * agreeing + ("no",) * (10 - agreeing))) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two Dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # the table lacks one apostrophe at a time
        ("100,978", "100978"),
        ("$1.50", "$1.50"),
        ("girl's", "girl's"),
        ("10:30", "10:30"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("None", "0"),
        ("well-known\nman", "well known man"),
    ],
)
def test_vqa_compares_normal_texts(text, normal):
    assert normal_answer(text) == normal


SAID = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
RIGHT = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_is_that_of_the_papers_example():
    """As sacrebleu's own documentation tells it."""
    assert 100 * bleu(SAID, [Truth(tuple(right)) for right in RIGHT]) == pytest.approx(48.530827009929865)


def test_bleu_is_that_of_sacrebleu():
    """Random corpora with punctuation, of all lengths, with a miss of some orders."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install 'internvl-openvino[test]'")
    dice = random.Random(1)
    words = ["the", "cat", "sat,", "on", "3.5", "mats.", "well-known", "1-2", '"so"', "&amp;", "Ünder", "(it)"]

    def text():
        return " ".join(dice.choices(words, k=dice.randrange(1, 12)))

    for _ in range(40):
        said, right = [text() for _ in range(3)], [[text(), text()] for _ in range(3)]
        wanted = sacrebleu.corpus_bleu(said, [*map(list, zip(*right, strict=True))]).score
        assert 100 * bleu(said, [Truth(tuple(each)) for each in right]) == pytest.approx(wanted, abs=1e-9)
        assert words_of(said[0]) == sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a()(said[0]).split()


def test_boxes_are_compared_in_pixels():
    truth = Truth(box=Box("", 100, 50, 300, 150), size=(1000, 500))
    assert refcoco("<ref>it</ref><box>[[100, 100, 300, 300]]</box>", truth) == 1
    assert refcoco("[[200, 100, 400, 300]]", truth) == pytest.approx(1 / 3)
    assert refcoco("nowhere", truth) == 0


def line(name, text):
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    response = None if text is None else {"status_code": 200, "body": body}
    return json.dumps({"id": "", "custom_id": name, "response": response, "error": None if text else {"message": "gone"}})


@pytest.fixture
def files(tmp_path):
    """Two files of answers, one row failed; the truth."""
    (tmp_path / "one.jsonl").write_text("\n".join([line("a", "red"), line("b", "4"), line("c", None), line("z", "?"), ""]))
    (tmp_path / "two.jsonl").write_text("\n".join([line("a", "red"), line("b", "5"), line("c", "yes"), ""]))
    rows = [{"id": "a", "answer": "red"}, {"id": "b", "answers": [{"answer": 4}, "four"]}, {"id": "c", "answer": "yes"}]
    (tmp_path / "truth.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"id": "d", "answer": "no"}])))
    return tmp_path


def score(*arguments) -> int:
    return runtime.__main__.main(["score", *map(str, arguments)])


def test_two_files_are_put_beside_each_other(files, capsys):
    one, two, truth = files / "one.jsonl", files / "two.jsonl", files / "truth.jsonl"
    assert score(one, "--truth", truth, "--metric", "exact") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: told[name] for name in ("score", "rows", "without_an_answer", "without_a_truth")} == {
        "score": 0.5,
        "rows": 4,
        "without_an_answer": 2,
        "without_a_truth": 1,
    }
    assert score(one, "--truth", truth, "--metric", "exact", "--beside", two) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].startswith("2 rows differ: 1 better, 1 worse")
    assert {row.split()[0] for row in shown[3:5]} == {"b", "c"}
    assert "(none)" in "".join(shown)
    told = json.loads(shown[-1])
    assert [each["score"] for each in told["scores"]] == [0.5, 0.5]
    assert score(one, "--truth", truth, "--metric", "bleu", "--beside", two) == 0


def test_a_truth_may_be_a_table_or_one_object(files):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'internvl-openvino[tables]'")
    from pyarrow import parquet

    from runtime.job.score import read_truth

    parquet.write_table(arrow.table({"id": [1, 2], "answers": [["a", "b"], ["c"]]}), files / "truth.parquet")
    (files / "truth.json").write_text('{"1": ["a", "b"], "2": "c"}')
    wanted = {"1": Truth(("a", "b")), "2": Truth(("c",))}
    assert read_truth(files / "truth.parquet", "exact") == read_truth(files / "truth.json", "exact") == wanted
    (files / "boxes.json").write_text('[{"id": 1, "box": [1, 2, 3, 4], "size": [10, 20]}]')
    assert read_truth(files / "boxes.json", "refcoco") == {"1": Truth(box=Box("", 1, 2, 3, 4), size=(10, 20))}


@pytest.mark.parametrize(
    ("truth", "metric", "told"),
    [
        ('{"id": "a"}', "exact", "id a: there is no answer"),
        ('{"id": "a", "answer": "x"}', "vqa", "VQA accuracy needs at least 4, ten as published"),
        ('{"id": "a", "answer": "x"}', "refcoco", "id a"),
        ('{"id": "a", "answer": "x"}\n{"id": "a", "answer": "y"}', "exact", "the id a twice"),
        ('{"id": "q", "answer": "x"}', "exact", "its ids differ"),
        ("[1]", "exact", "a line is not an object"),
        ("", "exact", "has no rows"),
        ("no", "exact", "cannot be read as ground truth"),
    ],
)
def test_what_cannot_be_judged_is_one_line(files, capsys, truth, metric, told):
    (files / "bad.jsonl").write_text(truth)
    assert score(files / "two.jsonl", "--truth", files / "bad.jsonl", "--metric", metric) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1


def test_the_command_offers_every_metric():
    """It has names of its own, since --help loads no metrics."""
    assert sorted(CHOICES) == sorted(METRICS)
