"""Decoding: how the next token is chosen, and the loops that choose one after the other over a KV cache.

Knows logits, token ids and how to embed them; no text, prompts or pictures. Options have transformers' names, and its logits
processors are the oracle of the tests. Penalties count generated tokens, not the prompt, as in generate(inputs_embeds=...).
Processors: huggingface/transformers@v5.5.4 src/transformers/generation/logits_process.py; beams: generation/utils.py there.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from runtime.answer.tools import CallRule
from runtime.errors import OptionError

DEFAULT_TOP_K = 50  # transformers' default for sampling
SMALLEST_TEMPERATURE = 1e-3  # below it sampling is greedy
LIKELY = 1024  # tokens within which top-p usually ends: sorting a whole vocabulary takes 10 ms
LOOKUP_SIZES = (3, 2)
NO_LOOKUP = "prompt_lookup_num_tokens is for one greedy answer: leave out sampling, beams, penalties and several answers"
ONE = np.ones((1, 1), np.int64)

Embed = Callable[[np.ndarray], np.ndarray]  # token ids (B, T) -> embeddings (B, T, D)


class Cache(Protocol):
    """What decoding needs of a KV cache, as runtime/parts/kv_cache.py implements it."""

    @property
    def free_guesses(self) -> int: ...
    @property
    def ids(self) -> np.ndarray: ...
    @property
    def room_for_drafts(self) -> int: ...
    def feed(self, embeds: np.ndarray, mask: np.ndarray, keys: np.ndarray | None) -> np.ndarray: ...
    def check_draft(self, embeds: np.ndarray, keys: np.ndarray) -> np.ndarray: ...
    def drop(self, count: int) -> None: ...
    def reorder(self, rows: list[int]) -> None: ...


class Rule(Protocol):
    """Which tokens may come next, as runtime/answer/grammar.py implements it."""

    @property
    def ended(self) -> bool: ...
    def allow(self, scores: np.ndarray) -> None: ...
    def take(self, token: int) -> None: ...


@dataclass(frozen=True)
class Decoding:
    """Decoding options of an answer. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # OpenAI's: once per distinct generated token
    frequency_penalty: float = 0.0  # OpenAI's: per occurrence of a generated token
    no_repeat_ngram_size: int = 0
    seed: int | None = None  # makes sampling repeatable
    stop_strings: tuple[str, ...] = ()  # an answer ends before the first of them; applied by the text stream
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # go on after a token that ends an answer
    skip_special_tokens: bool = True  # applied by the text stream
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0  # for beam search: above 0 favours longer answers
    early_stopping: bool = False  # end when num_beams answers are finished
    prompt_lookup_num_tokens: int | None = None  # draft tokens at most; None: as many as are free on this CPU
    logprobs: bool = False  # of the tokens, from the unprocessed logits
    top_logprobs: int = 0  # number of likeliest tokens to return with each
    json_schema: str | None = None  # that the answer must fit
    calls: CallRule | None = None  # functions that the answer may call
    thoughts: bool = False  # the answer begins with a thought; schema and calls apply after it

    def __post_init__(self) -> None:
        stops = self.stop_strings
        object.__setattr__(
            self, "stop_strings", (stops,) if isinstance(stops, str) else tuple(stops) if isinstance(stops, list) else stops
        )
        for field, (kinds, holds, what) in _RULES.items():
            value = getattr(self, field)
            if value is None and field in ("seed", "json_schema", "calls", "prompt_lookup_num_tokens"):
                continue
            if isinstance(value, bool) != (kinds is bool) or not isinstance(value, kinds) or not holds(value):
                raise OptionError(
                    f"{field.replace('_', ' ')} {value if isinstance(value, int | float) else repr(value)} is not {what}"
                )
        object.__setattr__(self, "temperature", self.temperature if self.temperature >= SMALLEST_TEMPERATURE else 0.0)
        if self.prompt_lookup_num_tokens and not self.is_plain:
            raise OptionError(NO_LOOKUP)
        if self.num_beams > 1 and (
            self.temperature or self.logprobs or self.json_schema or self.calls or self.num_return_sequences > self.num_beams
        ):
            raise OptionError(
                "num_beams takes the likeliest answers: leave out sampling, logprobs and schemas, and ask for no more answers"
            )

    @property
    def is_plain(self) -> bool:
        """Whether this is greedy decoding of one row with unprocessed logits, the most common case."""
        return not (self.temperature or self.is_processed or self.num_return_sequences > 1 or self.num_beams > 1)

    @property
    def is_processed(self) -> bool:
        """Whether logits are processed before a token is chosen."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
            or self.min_new_tokens
            or self.json_schema
            or self.calls
        )

    @classmethod
    def of(cls, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> Decoding:
        """Merge the values of generation_config.json and a caller's options, by transformers' names: options win.

        A temperature above 0 turns sampling on, unless do_sample is given and off. Raises OptionError for unknown or invalid ones.
        """
        known = {field.name for field in fields(cls)} | {"do_sample", "eos_token_id", "schema"}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise OptionError(f"there is no option {name}" + (f": did you mean {close[0]}?" if close else ""))
        given = {name: value for name, value in options.items() if value is not None}
        values = {name: value for name, value in defaults.items() if name in known and value is not None} | given
        if "schema" in values:
            schema = values.pop("schema")
            values["json_schema"] = schema if isinstance(schema, str) else json.dumps(schema)
        if "eos_token_id" in values:
            ends = values.pop("eos_token_id")
            values["eos_token_ids"] = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
        draws = values.pop("do_sample", False)
        if not isinstance(draws, bool):
            raise OptionError(f"do sample {draws!r} is not true or false")
        if "do_sample" not in given and "temperature" in given:
            draws = True
        if draws:
            values = {"temperature": 1.0, "top_k": DEFAULT_TOP_K, **values}
        made = cls(**values)
        return made if draws else cls(**values | {"temperature": 0.0})


def _all_text(value: Any) -> bool:
    return all(isinstance(each, str) for each in value)


_Rule = tuple[Any, Callable[[Any], bool], str]
_RULES: dict[str, _Rule] = {  # field -> its types, whether a value is valid, what would be right
    "max_new_tokens": (int, lambda v: v >= 1, "positive"),
    "min_new_tokens": (int, lambda v: v >= 0, "0 or more"),
    "temperature": (int | float, lambda v: 0 <= v < math.inf, "0 (the likeliest token) or more"),
    "top_k": (int, lambda v: v >= 0, "0 (all) or positive"),
    "top_p": (int | float, lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "min_p": (int | float, lambda v: 0 <= v <= 1, "between 0 and 1"),
    "repetition_penalty": (int | float, lambda v: 0 < v < math.inf, "positive"),
    "presence_penalty": (int | float, lambda v: -2 <= v <= 2, "between -2 and 2"),
    "frequency_penalty": (int | float, lambda v: -2 <= v <= 2, "between -2 and 2"),
    "no_repeat_ngram_size": (int, lambda v: v >= 0, "0 (off) or positive"),
    "seed": (int, lambda v: v >= 0, "0 or more"),
    "stop_strings": (tuple, _all_text, "a list of texts"),
    "eos_token_ids": (tuple, lambda v: all(type(i) is int and i >= 0 for i in v), "a token id or a list of them"),
    "ignore_eos": (bool, lambda v: True, "true or false"),
    "skip_special_tokens": (bool, lambda v: True, "true or false"),
    "num_return_sequences": (int, lambda v: v >= 1, "positive"),
    "num_beams": (int, lambda v: v >= 1, "positive"),
    "length_penalty": (int | float, lambda v: -math.inf < v < math.inf, "a number"),
    "early_stopping": (bool, lambda v: True, "true or false"),
    "prompt_lookup_num_tokens": (int, lambda v: v >= 0, "0 (off) or positive"),
    "logprobs": (bool, lambda v: True, "true or false"),
    "top_logprobs": (int, lambda v: v >= 0, "0 or more"),
    "json_schema": (str, lambda v: True, "a JSON schema as text"),
    "calls": (CallRule, lambda v: True, "functions that may be called"),
    "thoughts": (bool, lambda v: True, "true or false"),
}


@dataclass(frozen=True, slots=True)
class Token:
    """A chosen token; if requested, its log probability, and the likeliest tokens with theirs."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one row, one after the other, and stores them."""

    def __init__(self, decoding: Decoding, number: int = 0, rule: Rule | None = None):
        self._decoding, self._rule = decoding, rule
        self._draws = np.random.default_rng(None if decoding.seed is None else decoding.seed + number)
        self.ids: list[int] = []
        self._counts: Counter[int] = Counter()

    @property
    def ended(self) -> bool:
        """Whether the row is finished."""
        at_end = bool(self.ids) and self.ids[-1] in self._decoding.eos_token_ids and not self._decoding.ignore_eos
        return at_end or len(self.ids) >= self._decoding.max_new_tokens or (self._rule is not None and self._rule.ended)

    def choose(self, logits: np.ndarray) -> Token:
        """The next token after these logits (V,)."""
        d = self._decoding
        scores = self.processed(logits) if d.is_processed else logits
        if d.temperature:
            ids, chances = distribution(scores, d)
            found = int(ids[self._race(ids, chances, len(scores))])
        else:
            found = int(scores.argmax())
        self.ids.append(found)
        self._counts[found] += 1
        if self._rule is not None:
            self._rule.take(found)
        return Token(found, *logprobs_of(logits, found, d.top_logprobs)) if d.logprobs else Token(found)

    def _race(self, ids: np.ndarray, chances: np.ndarray, vocabulary: int) -> int:
        """Sample an index: each token draws an exponential waiting time, divided by its probability, and the shortest wins.

        As torch.multinomial samples. Rounding of the logits hardly ever changes the winner, so a seed repeats an answer even where
        part of the prompt is cached; sampling by cumulative probabilities would change with the rounding of any of them.
        """
        times = -np.log1p(-self._draws.random(vocabulary)[ids])
        return int((times / chances).argmin())

    def processed(self, logits: np.ndarray) -> np.ndarray:
        """Logits (V,) after penalties, with forbidden tokens at -inf."""
        d, scores = self._decoding, logits.astype(np.float32)  # a copy
        written = np.fromiter(self._counts, np.int64, len(self._counts))
        if len(written):
            some = scores[written]
            if d.repetition_penalty != 1:
                some = np.where(some < 0, some * d.repetition_penalty, some / d.repetition_penalty)
            times = np.fromiter(self._counts.values(), np.float32, len(written))
            scores[written] = some - d.presence_penalty - d.frequency_penalty * times
        if d.no_repeat_ngram_size:
            scores[_ending_a_repeat(self.ids, d.no_repeat_ngram_size)] = -np.inf
        if len(self.ids) < d.min_new_tokens:
            scores[list(d.eos_token_ids)] = -np.inf
        if self._rule is not None:
            self._rule.allow(scores)
        return scores


def distribution(scores: np.ndarray, d: Decoding) -> tuple[np.ndarray, np.ndarray]:
    """Processed logits (V,) -> the token ids to sample from and their probabilities: temperature, top-k, top-p, min-p."""
    scores = (scores / np.float32(d.temperature)).astype(np.float64)  # divided as transformers does
    ids = np.flatnonzero(scores > -np.inf)
    if d.top_k and d.top_k < len(ids):
        least = np.partition(scores[ids], -d.top_k)[-d.top_k]  # ties all stay
        ids = ids[scores[ids] >= least]
    chances = _softmax(scores[ids])
    if d.top_p < 1:
        if len(ids) > 4 * LIKELY:
            likely = np.argpartition(chances, -LIKELY)[-LIKELY:]
            if chances[likely].sum() > d.top_p:  # top-p ends among these
                ids, chances = ids[likely], chances[likely]
        order = np.argsort(-chances, kind="stable")
        before = np.cumsum(chances[order]) - chances[order]
        kept = order[: max(1, int((before < d.top_p).sum()))]
        ids, chances = ids[kept], chances[kept] / chances[kept].sum()
    if d.min_p:
        kept = np.flatnonzero(chances >= d.min_p * chances.max())
        ids, chances = ids[kept], chances[kept] / chances[kept].sum()
    return ids, chances


def logprobs_of(logits: np.ndarray, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log probability of a token under logits (V,), and the `top` likeliest tokens with theirs, likeliest first."""
    total = float(_log_of_sum(logits)[0])
    best = np.argpartition(logits, -top)[-top:] if top else np.zeros(0, np.int64)
    ordered = best[np.argsort(-logits[best], kind="stable")]
    return float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in ordered)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _log_of_sum(logits: np.ndarray) -> np.ndarray:
    """Logits (..., V) -> their log-sum-exp (..., 1); logits minus it are log probabilities."""
    most = logits.max(-1, keepdims=True)
    return most + np.log(np.exp(logits - most, dtype=np.float64).sum(-1, keepdims=True))


def _ending_a_repeat(ids: list[int], size: int) -> list[int]:
    """The tokens that would complete an n-gram of `size` tokens that occurs already."""
    begun = ids[len(ids) - size + 1 :] if size > 1 else []
    return [ids[at + size - 1] for at in range(len(ids) - size + 1) if ids[at : at + size - 1] == begun]


def write(cache: Cache, logits: np.ndarray, embed: Embed, decoding: Decoding, rule: Rule | None = None) -> Iterator[Token]:
    """The tokens of one answer, from the logits (1, 1, V) of its prompt on, with the token that ends it.

    `rule` restricts the tokens where an answer must fit a schema or may call functions.
    """
    sampler = Sampler(decoding, rule=rule)
    guesses = decoding.prompt_lookup_num_tokens
    if guesses is None and decoding.is_plain:
        guesses = cache.free_guesses
    if guesses:
        for last in _greedy(cache, logits, embed, guesses):
            yield sampler.choose(last)
            if sampler.ended:
                return
    while True:
        token = sampler.choose(logits[0, -1])
        yield token
        if sampler.ended:
            return
        ids = np.array([[token.id]])
        logits = cache.feed(embed(ids), ONE, ids[0])


def _greedy(cache: Cache, logits: np.ndarray, embed: Embed, most: int) -> Iterator[np.ndarray]:
    """The logits (V,) for each token of greedy decoding, without end.

    A decode step checks up to `most` draft tokens as well; only accepted ones are yielded, so the answer does not change.
    """
    last = logits[0, -1]
    while True:
        yield last
        token = np.array([last.argmax()])
        room = min(most, cache.room_for_drafts - 1)
        draft = look_up(np.append(cache.ids, token), room) if room > 0 else token[:0]
        if not len(draft):
            last = cache.feed(embed(token[None]), ONE, token)[0, -1]
            continue
        fed = np.append(token, draft)
        after = cache.check_draft(embed(fed[None]), fed)  # (1 + draft tokens, V)
        right = int(np.cumprod(after[:-1].argmax(1) == draft).sum())
        cache.drop(len(draft) - right)
        after = after[: right + 1].copy()
        yield from after[:-1]
        last = after[-1]


def look_up(ids: np.ndarray, most: int) -> np.ndarray:
    """What followed an earlier occurrence of the last tokens of `ids` (T,): at most `most` draft tokens, or none.

    Three tokens are matched, then two, the latest occurrence first. Prompt lookup decoding: A. Saxena 2023,
    github.com/apoorvumang/prompt-lookup-decoding@main README.md
    """
    for size in LOOKUP_SIZES:
        if len(ids) <= size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        found = np.flatnonzero((windows == ids[-size:]).all(1))
        if len(found):
            follows = ids[found[-1] + size :][:most]
            known = np.flatnonzero(follows < 0)  # context tokens are never generated
            return follows[: known[0]] if len(known) else follows
    return ids[:0]


def write_rows(
    cache: Cache, logits: np.ndarray, embed: Embed, decoding: Decoding, rules: Sequence[Rule | None] | None = None
) -> list[list[Token]]:
    """One answer for each row of logits (R, 1, V), as a batch, each with its own rule; finished rows leave the cache."""
    samplers = [Sampler(decoding, number, rule) for number, rule in enumerate(rules or [None] * len(logits))]
    answers: list[list[Token]] = [[] for _ in samplers]
    rows = [*range(len(logits))]
    while True:
        for place, row in enumerate(rows):
            answers[row].append(samplers[row].choose(logits[place, -1]))
        going = [place for place, row in enumerate(rows) if not samplers[row].ended]
        if not going:
            return answers
        if len(going) < len(rows):
            cache.reorder(going)
            rows = [rows[place] for place in going]
        ids = np.array([[answers[row][-1].id] for row in rows])
        logits = cache.feed(embed(ids), np.ones_like(ids), None)


def write_beams(cache: Cache, logits: np.ndarray, embed: Embed, decoding: Decoding) -> list[list[Token]]:
    """The likeliest answers by beam search, best first, from the logits (1, 1, V) of one prompt."""
    d, beams = decoding, decoding.num_beams
    enough = min(max(2, 1 + len(d.eos_token_ids)) * beams, logits.shape[-1])  # so enough beams go on if the best ones all end
    running, scores = [Sampler(d)], np.zeros((1, 1))
    finished: list[tuple[float, list[int]]] = []
    cache_rows = [0]
    for length in range(1, d.max_new_tokens + 1):
        logits = logits[cache_rows, -1].astype(np.float32)
        own = (logits - _log_of_sum(logits)).astype(np.float32)
        if d.is_processed:
            own = np.stack([beam.processed(row) for beam, row in zip(running, own, strict=True)])
        total = (own + scores).ravel()
        best = np.argpartition(-total, enough - 1)[:enough]
        best = best[np.argsort(-total[best], kind="stable")]
        going: list[tuple[int, list[int]]] = []
        kept: list[float] = []
        for rank, place in enumerate(best):
            beam, token = divmod(int(place), own.shape[1])
            ids = [*running[beam].ids, token]
            if (token in d.eos_token_ids and not d.ignore_eos) or length == d.max_new_tokens:
                if rank < beams:  # the others only fill up the running beams
                    finished.append((float(total[place]) / length**d.length_penalty, ids))
            elif len(going) < beams:
                going.append((beam, ids))
                kept.append(float(total[place]))
        finished = sorted(finished, key=lambda one: -one[0])[:beams]
        full = len(finished) == beams
        if not going or (full and (d.early_stopping or kept[0] / length**d.length_penalty <= finished[-1][0])):
            break
        running, scores = [_beam(d, ids) for _, ids in going], np.array(kept)[:, None]
        cache.reorder([beam for beam, _ in going])
        cache_rows = [*range(len(going))]
        step = np.array([[ids[-1]] for _, ids in going])
        logits = cache.feed(embed(step), np.ones_like(step), None)
    return [[Token(i) for i in ids] for _, ids in finished[: d.num_return_sequences]]


def _beam(decoding: Decoding, ids: list[int]) -> Sampler:
    made = Sampler(decoding)
    made.ids, made._counts = ids, Counter(ids)
    return made
