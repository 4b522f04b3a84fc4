"""The smallest int4 of a language part that loses at most so much, searched for one checkpoint (--max-loss).

One pass of recipe.py for each size of quantisation groups gives every matrix in four bits. A trial computes with those, or with 8
bits for some kinds of matrices in a third of the depth, and measures the answers to the questions of choosing as the proof does:
what was tried is what is written. Trials are kept in a journal, so that a search goes on where it was interrupted. Knows nothing
of OpenVINO.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.answers import Answer, Kept, fingerprint, hidden_states, prompts_of
from convert.checkpoint import Checkpoint
from convert.compress import eight_bits, four_bits
from convert.exact import Part
from convert.four_bits import EightBits, FourBits
from convert.options import SEARCHED, ConvertOptions, Recipe
from convert.quality import Measured
from convert.questions import CALIBRATION_TOKENS, OF_PICTURE_TOKENS, calibration_texts, questions_of_choosing
from convert.recipe import HEAD, SINGULAR, Texts, matrices_of, round_by_inputs
from convert.reference.model import ROWS_AT_ONCE, load_language
from convert.scratch import Scratch
from convert.verify import ask_reference, reference_steps
from convert.weight_files import some
from runtime import __version__
from runtime.errors import CheckpointError, OptionError

THIRDS = ("early", "middle", "late")
TOGETHER = {"k_proj": "k/v_proj", "v_proj": "k/v_proj"}  # small and of one kind: one trial for both
FOUR, EIGHT, OF_GROUP, OF_ROW = 0.5, 1.0, 2.5, 3.0  # bytes a weight; of a group's and of a row's scale and zero point


@dataclass(frozen=True)
class Tried:
    """A trial: the size of groups, what is in 8 bits besides the head (like "late o_proj"), bytes of weights, and the loss."""

    group: int
    in_8_bits: tuple[str, ...]
    bytes: int
    kl: float
    same: float

    def __str__(self) -> str:
        return f"{_told(self.group, self.in_8_bits)}: {self.bytes / 1e6:.1f} MB, KL {self.kl:.5f}, same token {self.same:.1%}"


def _told(group: int, in_8_bits: Sequence[str]) -> str:
    """Like "groups of 64, 8 bits: k_proj, late o_proj"; a kind alone is the whole depth."""
    kinds: dict[str, list[str]] = {}
    for unit in in_8_bits:
        third, kind = unit.split()
        kinds.setdefault(kind, []).append(third)
    names = [kind if len(thirds) == len(THIRDS) else f"{'+'.join(thirds)} {kind}" for kind, thirds in sorted(kinds.items())]
    return f"groups of {group}" + (f", 8 bits: {', '.join(names)}" if names else "")


class Journal:
    """The trials of one checkpoint and one setting, in a small JSON file that is whole after each."""

    def __init__(self, file: Path, settings: dict[str, Any]):
        """Trials of other settings are forgotten, in one line. Raises OptionError for a file that is no journal."""
        self.file, self._settings = file, settings
        self.tried: list[Tried] = []
        if not file.exists():
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                self.tried = [Tried(**one | {"in_8_bits": tuple(one["in_8_bits"])}) for one in found["tried"]]
            else:
                print(f"search: {file.name} is of another checkpoint or of other settings, it is begun anew", flush=True)
        except (ValueError, KeyError, TypeError):
            raise OptionError(f"{file} is not the journal of a search: move it away, or choose another output folder") from None

    def find(self, group: int, in_8_bits: tuple[str, ...]) -> Tried | None:
        return next((one for one in self.tried if (one.group, one.in_8_bits) == (group, in_8_bits)), None)

    def add(self, one: Tried) -> None:
        self.tried.append(one)
        beside = self.file.with_name(self.file.name + ".part")
        told = {"settings": self._settings, "tried": [asdict(one) for one in self.tried]}
        beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.file)


class _OutOfTime(Exception):
    """The next trial would end after the search's time."""


def adapted(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, work: Path, scratch: Scratch, options: ConvertOptions, journal: Path
) -> tuple[PreTrainedModel, dict[str, FourBits], Recipe, dict[str, Any]]:
    """The decoder, its matrices in four bits by name, the recipe that was found, and what quality.json says of the search.

    `work` holds the vision part. Raises CheckpointError if the answers to the questions of choosing are empty.
    """
    assert options.max_loss is not None
    started = time.monotonic()
    prompts = prompts_of(questions_of_choosing(checkpoint.config.tile_size), tokenizer, checkpoint.config.tokens_per_tile)
    own = fingerprint(checkpoint)
    settings = {
        "checkpoint": own,
        "questions": hashlib.sha256("".join(prompt.key for prompt in prompts).encode()).hexdigest(),
        "vision": [options.vision_weight_format, options.dataset],
        "version": __version__,
    }
    log = Journal(journal, settings)
    known = f", after {len(log.tried)} trials of an earlier search" if log.tried else ""
    print(
        f"language: searching the smallest int4 that loses at most {options.max_loss:g}, for {options.minutes:g} minutes; "
        f"trials are kept in {journal.name}{known}",
        flush=True,
    )
    with TemporaryDirectory(dir=work, prefix="reference-") as beside:
        kept = Kept(Path(options.reference_cache or beside), own, name=checkpoint.name)
        with tqdm(total=reference_steps(len(prompts)), desc="Answers to choose by", disable=None, leave=False) as bar:
            ask_reference(checkpoint, tokenizer, prompts, kept, scratch, bar)
        answers = [kept.answer(prompt.key) for prompt in prompts]
        trials = _Trials(checkpoint, tokenizer, Part(work, "vision"), scratch, answers)
        search = _Search(trials, log, options.max_loss, started + 60 * options.minutes)
        found = search.run()
    took = (time.monotonic() - started) / 60
    more = "; the time is over, a search with more --minutes goes on from there" if search.ended_early else ""
    print(f"{_result(found, trials, options.max_loss)}; {len(log.tried)} trials, {took:.1f} minutes{more}", flush=True)
    model, fours = trials.quantised(found.group)
    model.model.rotary_emb = trials.rope
    told = {"max_loss": options.max_loss, **asdict(found), "trials": len(log.tried), "minutes": round(took, 1)}
    return model, fours, trials.recipe(found), told


def _result(found: Tried, trials: _Trials, most: float) -> str:
    if found.kl <= most:
        return f"language: the smallest found that loses at most {most:g} is {found}"
    all_in_8 = trials.bytes(found.group, trials.units) / 1e6
    return f"language: none found that loses at most {most:g}, int8 takes {all_in_8:.1f} MB; the best found is written: {found}"


class _Search:
    """Greedy: units go to 8 bits by what that brings for each byte, and the shortest beginning of that order suffices.

    Measured is what each kind brings in all layers, and each third of the layers with all kinds; the product orders the units.
    Small groups come first, which lose least: what is found early is within the loss, and the rest of the time makes it smaller.
    """

    def __init__(self, trials: _Trials, journal: Journal, most: float, end: float):
        self._trials, self._journal, self._most, self._end = trials, journal, most, end
        self._passed, self._took = 0.0, 0.0  # seconds of the last pass and of the last trial
        self._here: list[Tried] = []  # of this run
        self.ended_early = False

    def run(self) -> Tried:
        """The smallest trial that loses at most `most`, or, where time or the checkpoint allow none, the one that loses least."""
        order: list[str] | None = None
        try:
            for group in sorted(self._trials.groups):
                if order is None and self._measure(group, ()).kl > self._most:
                    order = self._order(group)
                if order is not None:
                    self._bisect(group, [order[:count] for count in range(len(order) + 1)])
        except _OutOfTime:
            self.ended_early = True
        while (found := self._smallest or min(self._journal.tried, key=lambda one: one.kl)) not in self._here:
            self._journal.tried.remove(found)  # of an earlier run: promised is what the codes of this one lose
            self._try(found.group, found.in_8_bits)
        return found

    @property
    def _smallest(self) -> Tried | None:
        return min((one for one in self._journal.tried if one.kl <= self._most), key=lambda one: one.bytes, default=None)

    def _order(self, group: int) -> list[str]:
        """The units by what they bring for each byte, the most first."""
        plain, brings = self._measure(group, ()), dict[str, float]()
        for name in dict.fromkeys(name for side in zip(*map(str.split, self._trials.units), strict=True) for name in side):
            units = [unit for unit in self._trials.units if name in unit.split()]
            brings[name] = max(plain.kl - self._measure(group, units).kl, 0.0)

        def for_a_byte(unit: str) -> float:
            third, kind = unit.split()
            return brings[third] * brings[kind] / (self._trials.bytes(group, [unit]) - plain.bytes)

        return sorted(self._trials.units, key=for_a_byte, reverse=True)

    def _bisect(self, group: int, rising: list[list[str]]) -> None:
        """Try some of a rising series of units, up to the shortest that is within the loss and smaller than what already is."""
        best = self._smallest
        low, high = 0, sum(best is None or self._trials.bytes(group, units) < best.bytes for units in rising) - 1
        if high < 0 or self._measure(group, rising[high]).kl > self._most:
            return
        while low < high:
            middle = (low + high) // 2
            if self._measure(group, rising[middle]).kl <= self._most:
                high = middle
            else:
                low = middle + 1

    def _measure(self, group: int, units: Sequence[str]) -> Tried:
        in_8_bits = tuple(sorted(units))
        known = self._journal.find(group, in_8_bits)
        if known is not None:
            return known
        needed = self._took + (self._passed if group != self._trials.group else 0.0)
        if self._journal.tried and time.monotonic() + needed > self._end:
            raise _OutOfTime
        return self._try(group, in_8_bits)

    def _try(self, group: int, in_8_bits: tuple[str, ...]) -> Tried:
        started = time.monotonic()
        if group != self._trials.group:
            self._trials.quantised(group)
            self._passed = time.monotonic() - started
            started = time.monotonic()
        lost = self._trials.lost(group, in_8_bits)
        self._took = time.monotonic() - started
        one = Tried(group, in_8_bits, self._trials.bytes(group, in_8_bits), lost.kl, lost.same)
        self._journal.add(one)
        self._here.append(one)
        print(f"tried {one}", flush=True)
        return one


class _Trials:
    """The language part of a checkpoint: its matrices by size of groups, and what the answers lose with some in 8 bits."""

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, vision: Part, scratch: Scratch, answers: Sequence[Answer]
    ):
        self._checkpoint, self._tokenizer, self._vision, self._scratch = checkpoint, tokenizer, vision, scratch
        self._answers = [one for one in answers if len(one.log_probs)]
        if not self._answers:
            raise CheckpointError("the checkpoint's answers are empty: there is no loss to search by, leave out --max-loss")
        model = self._load()
        self.rope = copy.deepcopy(model.model.rotary_emb)  # some models change it in a forward
        matrices = matrices_of(model)
        self._shapes = {name: tuple(module.weight.shape) for name, module in matrices.items()}
        self._depth, self._head_shape = len(model.model.layers), tuple(model.lm_head.weight.shape)
        self.units = tuple(dict.fromkeys(self._unit(name) for name in matrices))
        self.groups = [group for group in SEARCHED if all(shape[1] % group == 0 for shape in self._shapes.values())]
        self.group: int | None = None  # of the matrices that are there
        self._model: PreTrainedModel = model
        self._found: dict[str, FourBits] = {}
        self._eights: dict[str, EightBits] = {}
        self._texts: Texts | None = None

    def _load(self) -> PreTrainedModel:
        return load_language(self._checkpoint, None, head_only=True, empty=self._scratch.empty)

    def _unit(self, name: str) -> str:
        kind = name.rpartition(".")[2]
        return f"{THIRDS[3 * int(name.split('.')[1]) // self._depth]} {TOGETHER.get(kind, kind)}"

    def recipe(self, one: Tried) -> Recipe:
        spared = [re.escape(name) for name in self._shapes if self._unit(name) in one.in_8_bits]
        return Recipe(one.group, rf"^(?:{'|'.join(spared)})$" if spared else r"^$")

    def bytes(self, group: int, in_8_bits: Sequence[str]) -> int:
        """Size of the matrices with their scales and zero points, the head in 8 bits."""
        rows, columns = self._head_shape
        total = rows * (columns * EIGHT + OF_ROW)
        for name, (rows, columns) in self._shapes.items():
            four = columns * FOUR + columns / group * OF_GROUP
            total += rows * (columns * EIGHT + OF_ROW if self._unit(name) in in_8_bits else four)
        return int(total)

    def quantised(self, group: int) -> tuple[PreTrainedModel, dict[str, FourBits]]:
        """The decoder and its matrices in four bits, by the pass for this size of groups; only the last one's are kept."""
        if self.group == group:
            return self._model, self._found
        self.group, self._model, self._found, self._eights = None, self._load(), {}, {}
        steps = len(self._shapes) + (CALIBRATION_TOKENS + OF_PICTURE_TOKENS if self._texts is None else 0)
        with tqdm(total=steps, desc=f"int4 in groups of {group}", disable=None, leave=False) as bar:
            if self._texts is None:
                self._texts = calibration_texts(self._checkpoint, self._model, self._tokenizer, self._vision, bar.update)
            self._found, rounded = round_by_inputs(
                self._model, self._texts, Recipe(group), self._scratch.empty, bar.update, both=True
            )
        if rounded:
            print(SINGULAR + some(rounded), flush=True)
        for name, module in matrices_of(self._model).items():
            if name not in self._found:  # of a visual expert that got no token
                self._found[name] = four_bits(module.weight, group)
        self._eights[HEAD] = self._eight(self._model.lm_head.weight)
        self.group = group
        return self._model, self._found

    def _eight(self, matrix: Tensor) -> EightBits:
        made = eight_bits(matrix)
        return replace(made, codes=self._scratch.empty(made.codes.shape, dtype=torch.uint8).copy_(made.codes))

    @torch.no_grad()
    def lost(self, group: int, in_8_bits: Sequence[str]) -> Measured:
        """What the answers lose, computed in float32."""
        model, _ = self.quantised(group)
        measured = Measured()
        rows: list[Tensor] = []
        batches = [[one for one in self._answers if bool(one.visual.any()) == pictured] for pictured in (False, True)]
        with _computing(matrices_of(model), partial(self._matrix, in_8_bits)):
            for batch in filter(None, batches):
                inputs = [
                    [torch.from_numpy(kind) for kind in kinds] for kinds in zip(*((o.embeds, o.visual) for o in batch), strict=True)
                ]
                embeds, visual = (pad_sequence(some, batch_first=True) for some in inputs)
                mask = pad_sequence([torch.ones(len(one.ids), dtype=torch.int64) for one in batch], batch_first=True)
                states = hidden_states(model, embeds, mask, visual)
                rows += [states[n, o.prompt_tokens - 1 :][: len(o.log_probs)].clone() for n, o in enumerate(batch)]
        head, bias = self._eights[HEAD], model.lm_head.bias
        joined, height = torch.cat(rows), len(head.codes)
        logits = torch.cat([F.linear(joined, head.rows(at, at + ROWS_AT_ONCE)) for at in range(0, height, ROWS_AT_ONCE)], dim=-1)
        if bias is not None:
            logits += bias
        read = [one for batch in batches for one in batch]
        for one, found in zip(read, logits.split([len(states) for states in rows]), strict=True):
            measured.add(torch.from_numpy(one.log_probs).float(), found.log_softmax(-1))
        return measured

    def _matrix(self, in_8_bits: Sequence[str], name: str, module: nn.Linear) -> Tensor:
        if self._unit(name) not in in_8_bits:
            return self._found[name].unpack(torch.empty(self._shapes[name]))
        if name not in self._eights:
            self._eights[name] = self._eight(module.weight)
        return self._eights[name].rows(0, len(module.weight))


class _Replaced(nn.Linear):
    """A linear layer that computes in float32 with a matrix made at each call."""

    made: Callable[[nn.Linear], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.made(self), self.bias)


@contextmanager
def _computing(matrices: dict[str, nn.Linear], made: Callable[[str, nn.Linear], Tensor]) -> Iterator[None]:
    """Inside, these layers compute with the matrices that `made` returns."""
    try:
        for name, module in matrices.items():
            module.__class__ = _Replaced
            module.made = partial(made, name)  # type: ignore[assignment]
        yield
    finally:
        for module in matrices.values():
            module.__class__ = nn.Linear
            del module.made
