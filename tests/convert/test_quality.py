"""python -m pytest tests/convert/test_quality.py

The ruler: what a folder's answers lose, against a direct computation with transformers, and what is kept of the reference.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from convert import ConvertOptions, convert, verify
from convert.__main__ import main as command
from convert.answers import TOKENS, Kept, fingerprint, prompts_of
from convert.checkpoint import Checkpoint
from convert.exact import LanguagePart
from convert.quality import Measured
from convert.questions import (
    CALIBRATION,
    CHOOSING,
    MODULES,
    OF_CHOSEN,
    OF_PICTURES,
    OF_SEEN,
    PROOF,
    packed,
    questions_of_proof,
)
from convert.reference.model import InternVLChatModel
from convert.tokenizer import load_tokenizer
from runtime.__main__ import main as runtime
from runtime.errors import OptionError
from runtime.folder.files import QUALITY_FILE
from tests.bench_quality import QUESTIONS as JUDGING
from tests.bench_quality import TEXTS

INT4 = {"weight_format": "int4", "recipe": "fast", "group_size": 32}


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """A tiny checkpoint, its folder, what the reference said and the report."""
    place = tmp_path_factory.mktemp("quality")
    source = tiny("tiny-qwen2")
    made = convert(str(source), place / "out", ConvertOptions(**INT4, reference_cache=str(place / "cache")))
    return source, place / "out", place / "cache", made.report.quality


def test_the_figures_are_those_of_a_direct_computation(measured):
    """Kullback-Leibler by torch's own function, logits of the whole of transformers' model, answers read from the cache."""
    source, folder, cache, quality = measured
    checkpoint = Checkpoint(source)
    reference = InternVLChatModel.from_checkpoint(checkpoint)
    tokenizer, part = load_tokenizer(source, checkpoint.config), LanguagePart(folder)
    prompts = prompts_of(questions_of_proof(checkpoint.config.tile_size), tokenizer, checkpoint.config.tokens_per_tile)
    lost, agreed, greedy, firsts = [], [], [], []
    for prompt in prompts:
        kept = Kept(cache, fingerprint(checkpoint), name=source.name).answer(prompt.key)
        features = None if prompt.tile is None else reference.encode_tiles(prompt.tile)
        embeds = reference.merge(kept.ids[None], features)
        wanted = reference.logits(torch.from_numpy(embeds))[0, len(prompt.ids) - 1 : -1]
        found = torch.from_numpy(part.logits(embeds, np.ones((1, len(kept.ids)), np.int64))[0, len(prompt.ids) - 1 : -1])
        lost.append(F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1))
        agreed.append(wanted.argmax(-1) == found.argmax(-1))
        greedy.append(wanted.argmax(-1) == torch.from_numpy(kept.ids[len(prompt.ids) :]))
        firsts.append(next((n + 1 for n, same in enumerate(agreed[-1].tolist()) if not same), float("inf")))
    language = quality.parts["language"]
    assert language.kl == pytest.approx(float(torch.cat(lost).mean()), abs=1e-4)
    assert language.same == pytest.approx(float(torch.cat(agreed).float().mean()), abs=1e-4)
    assert language.first == sorted(firsts)[(len(firsts) - 1) // 2]
    assert language.tokens == len(torch.cat(lost)) <= TOKENS * len(prompts)
    assert torch.cat(greedy).float().mean() > 0.95  # written in 16 bits where the processor is quicker in them


def test_it_is_written_into_the_folder_and_info_shows_it(measured, capsys):
    _, folder, _, quality = measured
    told = json.loads((folder / QUALITY_FILE).read_text())
    assert told["parts"]["all"]["kl"] == quality.parts["all"].kl > 0
    assert set(told["parts"]) == {"language", "vision", "text_embeddings", "all"}
    assert runtime(["info", str(folder)]) in (None, 0)
    out = capsys.readouterr().out
    assert f"quality          KL {quality.parts['all'].kl:.5f}, same token" in out
    assert "quality by part  language KL" in out


def test_a_second_folder_is_compared_without_computing_the_reference(measured, tmp_path, monkeypatch):
    source, _, cache, quality = measured
    monkeypatch.setattr(verify, "load_language", None)
    monkeypatch.setattr(verify, "load_vision", None)
    made = convert(str(source), tmp_path / "out", ConvertOptions(**INT4, reference_cache=str(cache)))
    assert made.report.quality.to_dict() == quality.to_dict()


def test_a_cache_of_another_checkpoint_is_refused(measured, tiny, tmp_path):
    _, _, cache, _ = measured
    with pytest.raises(OptionError, match="keeps the answers of another checkpoint"):
        convert(str(tiny("tiny-phi3")), tmp_path / "out", ConvertOptions(weight_format="int8", reference_cache=str(cache)))
    assert not (tmp_path / "out").exists()


def test_empty_answers_are_told_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "end_tokens", lambda tokenizer, *_: set(range(len(tokenizer))))
    report = convert(str(tiny("tiny-qwen2")), tmp_path / "out", ConvertOptions(weight_format="int8")).report
    assert report.quality.lines() == ["answers: all 11 of the reference are empty, nothing to compare"]
    runtime(["info", str(tmp_path / "out")])
    assert "quality          the checkpoint's answers are empty" in capsys.readouterr().out


def test_the_median_of_the_first_other_token_counts_answers_without_one():
    measured = Measured()
    one = torch.eye(4).log_softmax(-1)  # the likeliest tokens are 0, 1, 2, 3
    for other in (None, 2, None):
        found = one.clone()
        if other is not None:
            found[other] = one[0]
        measured.add(one, found)
    assert (measured.first, measured.tokens, measured.agreed) == (None, 12, 11)
    measured.add(one, one.flip(0))
    assert measured.first == 3


def test_calibration_and_proof_have_nothing_in_common():
    asked = [*CALIBRATION, *OF_SEEN, *CHOOSING, *OF_CHOSEN, *PROOF, *OF_PICTURES, *JUDGING]
    assert len({*asked}) == len(asked)
    assert not {*MODULES} & {file.stem for file, _ in TEXTS}


def test_a_cache_without_a_proof_is_refused():
    with pytest.raises(OptionError, match="leave out --no-verify"):
        ConvertOptions(verify=False, reference_cache=str(Path("cache")))


def test_compare_gives_the_figures_of_the_proof(measured, capsys, tmp_path):
    source, folder, cache, quality = measured
    other = convert(str(source), tmp_path / "int8", ConvertOptions(weight_format="int8", verify=False)).folder
    arguments = ["compare", str(folder), str(other), "--reference", str(source), "--reference-cache", str(cache)]
    capsys.readouterr()
    assert command([*arguments, "--json", "--speed", "--plot", str(tmp_path / "plot.png")]) == 0
    ours, exact = map(json.loads, capsys.readouterr().out.splitlines())
    assert ours["parts"]["all"] == pytest.approx(quality.parts["all"].to_dict(), abs=1e-6)
    assert exact["parts"]["all"]["kl"] < 0.2 * ours["parts"]["all"]["kl"]
    assert ours["bytes"] < exact["bytes"]
    assert ours["token_seconds"] > 0
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert command(["compare", str(other), str(folder)]) == 0  # the first one's answers, which it gives itself
    _, first, second, last = capsys.readouterr().out.splitlines()
    assert first.split()[1:5] == [f"{exact['bytes'] / 1e6:.1f}", "MB", "0.00000", "100.0%"]
    assert float(second.split()[3]) == pytest.approx(ours["parts"]["all"]["kl"], rel=0.3)
    assert last == "11 of 11 questions, 352 tokens"


def test_folders_of_different_checkpoints_are_refused(measured, tiny, tmp_path, capsys):
    _, folder, _, _ = measured
    for name in ("tiny-qwen3", "tiny-phi3"):
        other = convert(str(tiny(name)), tmp_path / name, ConvertOptions(weight_format="int8", verify=False)).folder
        assert command(["compare", str(folder), str(other)]) == 2
        assert "are of different checkpoints" in capsys.readouterr().err.splitlines()[-1]
    assert command(["compare", str(folder)]) == 2
    assert "error: there is one folder" in capsys.readouterr().err


def test_short_texts_share_a_row():
    texts = [torch.full((length, 2), float(length)) for length in (3, 9, 5, 6, 1)]
    made = packed(texts, [torch.ones(len(text), dtype=torch.int64) for text in texts])
    assert made.mask.sum() == made.visual.sum() == 24
    assert made.embeds.shape == (3, 9, 2)
    assert [made.embeds[row, :, 0].tolist() for row in range(3)] == [
        [9.0] * 9,
        [6.0] * 6 + [3.0] * 3,
        [5.0] * 5 + [1.0] + [0.0] * 3,
    ]


def test_compare_without_a_library_of_the_converter_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "convert.compare", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert command(["compare", "a", "b"]) == 2
    assert capsys.readouterr().err == "error: tqdm is not installed: pip install 'internvl-openvino[convert]'\n"
