"""python -m pytest tests/convert/test_max_loss.py

--max-loss: the smallest recipe under a loss, what is written loses what was promised, an interrupted search goes on.
"""

import itertools
import json
import signal
from collections import Counter

import numpy as np
import pytest
import torch

from convert import ConvertOptions, convert, questions, search
from convert.__main__ import EXIT_INTERRUPTED
from convert.__main__ import main as command
from convert.answers import Kept, fingerprint, prompts_of
from convert.checkpoint import Checkpoint
from convert.exact import LanguagePart
from convert.quality import Measured
from convert.questions import questions_of_choosing
from convert.search import Journal, Tried
from convert.tokenizer import load_tokenizer
from runtime.__main__ import main as runtime
from runtime.errors import CheckpointError, OptionError
from runtime.folder.files import PART_FILES

MOST = 0.004  # between what int4 in groups of 64 loses on the tiny checkpoint, 0.0126, and int8, 0.0001


@pytest.fixture(scope="module", autouse=True)
def few():
    """Few questions and passages: a tiny checkpoint says nothing anyway."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CALIBRATION", "MODULES", "PACKAGES", "CHOOSING", "PROOF"):
            patch.setattr(questions, name, getattr(questions, name)[:4])
        yield


@pytest.fixture(scope="module")
def searched(tiny, tmp_path_factory):
    """A search that is interrupted after three trials, then goes on: what it printed and measured, and the folder."""
    place = tmp_path_factory.mktemp("search")
    source, output, measured = tiny("tiny-qwen2"), place / "out", []
    arguments = [str(source), str(output), "--max-loss", str(MOST), "--vision-weight-format", "int8"]
    arguments += ["--reference-cache", str(place / "cache")]
    lost = search._Trials.lost

    def counted(self, group, in_8_bits):
        if len(measured) == 3 and not (place / "interrupted").exists():
            (place / "interrupted").touch()
            signal.raise_signal(signal.SIGINT)
        measured.append((group, in_8_bits))
        return lost(self, group, in_8_bits)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search._Trials, "lost", counted)
        assert command(arguments) == EXIT_INTERRUPTED
        left = [path.name for path in place.iterdir()]
        assert command(arguments) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return source, output, place / "cache", measured, left


def test_nothing_is_measured_twice_after_an_interruption(searched):
    _, output, _, measured, left = searched
    assert sorted(left) == ["cache", "interrupted", "out.tried.json"], "the journal stays, a folder or a piece of one does not"
    told = json.loads(output.with_name("out.tried.json").read_text())["tried"]
    assert [(one["group"], tuple(one["in_8_bits"])) for one in told] == measured
    assert set(Counter(measured).values()) == {1}


def test_the_written_folder_loses_what_was_promised(searched):
    """Measured by OpenVINO in float32 on the answers that chose; the size is the file's, but for norms and biases."""
    source, output, cache, _, _ = searched
    promised = json.loads((output / "quality.json").read_text())["search"]
    checkpoint = Checkpoint(source)
    tokenizer, part, found = load_tokenizer(source, checkpoint.config), LanguagePart(output), Measured()
    kept = Kept(cache, fingerprint(checkpoint), name=source.name)
    for prompt in prompts_of(questions_of_choosing(checkpoint.config.tile_size), tokenizer, checkpoint.config.tokens_per_tile):
        one = kept.answer(prompt.key)
        logits = part.logits(one.embeds[None], np.ones((1, len(one.ids)), np.int64))[0, one.prompt_tokens - 1 : -1]
        found.add(torch.from_numpy(one.log_probs).float(), torch.from_numpy(logits).log_softmax(-1))
    assert found.kl == pytest.approx(promised["kl"], rel=0.01)
    assert promised["kl"] <= MOST == promised["max_loss"]
    size = (output / PART_FILES["language"]).with_suffix(".bin").stat().st_size
    assert promised["bytes"] < size < 1.1 * promised["bytes"]


def test_the_smallest_trial_under_the_loss_is_taken_and_info_shows_it(searched, capsys):
    _, output, _, _, _ = searched
    promised = json.loads((output / "quality.json").read_text())["search"]
    tried = json.loads(output.with_name("out.tried.json").read_text())["tried"]
    assert promised["bytes"] == min(one["bytes"] for one in tried if one["kl"] <= MOST)
    assert {one["group"] for one in tried} == {64, 32}  # 128 does not divide a matrix 64 wide
    runtime(["info", str(output)])
    assert f"searched         language KL {promised['kl']:.5f} of at most {MOST}" in capsys.readouterr().out


def test_a_loss_that_cannot_be_reached_in_the_time_writes_the_best_and_says_so(searched, tmp_path, capsys):
    """The journal of the other search is taken up; there is no time for another trial."""
    source, output, cache, _, _ = searched
    journal = tmp_path / "out.tried.json"
    journal.write_text(output.with_name("out.tried.json").read_text())
    given = json.loads(journal.read_text())["tried"]
    options = {"vision_weight_format": "int8", "reference_cache": str(cache), "verify": False}
    made = convert(str(source), tmp_path / "out", ConvertOptions(max_loss=1e-6, minutes=0.0001, **options))
    best = min(given, key=lambda one: one["kl"])
    assert made.search["kl"] == best["kl"]
    out = capsys.readouterr().out
    assert f"trials are kept in out.tried.json, after {len(given)} trials of an earlier search" in out
    (line,) = [line for line in out.splitlines() if line.startswith("language: none")]
    assert line.startswith("language: none found that loses at most 1e-06, int8 takes 0.1 MB; the best found is written: groups of")
    assert line.endswith("the time is over, a search with more --minutes goes on from there")


class Additive:
    """Trials whose losses add up, so that the best is found by trying all."""

    groups, group, units = [128, 64], None, tuple(f"early {kind}" for kind in "abcdef")
    weights, costs = dict(zip(units, (8, 4, 2, 4, 8, 1), strict=True)), dict(zip(units, (1, 4, 1, 2, 2, 0.3), strict=True))

    def quantised(self, group):
        self.group = group

    def bytes(self, group, in_8_bits):
        return sum(n * (2 if unit in in_8_bits else 1 + 3.2 / group) for unit, n in self.weights.items())

    def lost(self, group, in_8_bits):
        found = Measured()
        found.tokens, found.divergence = 1, sum(n * group / 128 for unit, n in self.costs.items() if unit not in in_8_bits)
        return found


@pytest.mark.parametrize("most", [0.1, 2, 4, 5, 8, 20])
def test_a_greedy_search_is_near_the_best_of_all_and_within_the_loss(tmp_path, most):
    trials = Additive()
    found = search._Search(trials, Journal(tmp_path / "j.json", {}), most, float("inf")).run()
    every = [(g, some) for g in trials.groups for n in range(7) for some in itertools.combinations(trials.units, n)]
    best = min(trials.bytes(*one) for one in every if trials.lost(*one).kl <= most)
    assert found.kl <= most
    assert best <= found.bytes <= 1.15 * best


def test_a_journal_of_another_checkpoint_is_begun_anew_and_another_file_is_told(tmp_path, capsys):
    file = tmp_path / "j.json"
    one = Tried(64, ("early a",), 10, 0.1, 0.9)
    Journal(file, {"checkpoint": "a"}).add(one)
    assert Journal(file, {"checkpoint": "a"}).find(64, ("early a",)) == one
    assert Journal(file, {"checkpoint": "b"}).tried == []
    assert capsys.readouterr().out == "search: j.json is of another checkpoint or of other settings, it is begun anew\n"
    file.write_text("[1, 2]")
    with pytest.raises(OptionError, match="is not the journal of a search: move it away, or choose another output folder"):
        Journal(file, {})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"weight_format": "int8", "max_loss": 0.1}, "max loss is for weight format int4, not int8: leave one out"),
        ({"max_loss": 0.0}, "max loss 0.0 is not above 0: give a mean KL a token, like 0.01"),
        ({"max_loss": float("nan")}, "max loss nan is not above 0"),
        ({"max_loss": 0.1, "minutes": 0}, "minutes 0 is not above 0: give the time that the search may take, like 30"),
        ({"max_loss": 0.1, "recipe": "default"}, "max loss searches the recipe: leave out --recipe"),
        ({"max_loss": 0.1, "group_size": 64, "awq": True}, "max loss searches the recipe: leave out --group-size, --awq"),
        ({"minutes": 5}, "the minutes are those of a search: give the loss with --max-loss, or leave them out"),
    ],
)
def test_options_that_a_search_cannot_use_are_one_line(options, line):
    with pytest.raises(OptionError) as told:
        ConvertOptions(**options)
    assert str(told.value).startswith(line)


def test_experts_and_empty_answers_have_nothing_to_search(tiny, tmp_path):
    with pytest.raises(OptionError, match="has experts, which are rounded one by one: --max-loss has nothing to search"):
        convert(str(tiny("tiny-qwen3-moe")), tmp_path / "out", ConvertOptions(max_loss=0.1))
    with pytest.raises(CheckpointError, match="answers are empty: there is no loss to search by, leave out --max-loss"):
        search._Trials(None, None, None, None, [])
