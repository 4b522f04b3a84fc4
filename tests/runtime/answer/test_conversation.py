"""python -m pytest tests/runtime/answer/test_conversation.py

Conversations: the same text as the reference that computes every prompt anew, and nothing computed twice.
"""

import gc
import shutil
import threading
import time
from itertools import zip_longest

import numpy as np
import openvino as ov
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, StoppingCriteria

import runtime.parts.kv_cache
from convert.checkpoint import Checkpoint
from convert.reference.model import InternVLChatModel
from runtime import OVInternVLChatModel
from runtime.answer.decode import Decoding, Token
from runtime.answer.features import FeatureCache, TileFeatures, encode_pictures, keys_of
from runtime.answer.prompt import get_template, render
from runtime.answer.stream import Statistics, TextStream, stream_text
from runtime.answer.turn import Question, Turn
from runtime.errors import NumericsError, OptionError, PictureError, PromptError
from runtime.folder.files import PART_FILES
from runtime.folder.settings import keep, machine
from runtime.media.tiles import PictureTiles, Tiling
from runtime.parts.kv_cache import prompt_spans
from runtime.parts.part import equal_spans
from tests.conftest import shared

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
OPTIONS = {"max_new_tokens": 12}


def picture(seed: int, width: int = 112, height: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tiny, converted):
    return converted(tiny("tiny-qwen2"), weight_format="fp32")


@pytest.fixture(scope="module")
def reference(tiny):
    return InternVLChatModel.from_checkpoint(Checkpoint(tiny("tiny-qwen2")))


@pytest.fixture(scope="module", params=["CPU", "twice", "HETERO:CPU"], ids=["pages", "pages, single tokens apart", "state"])
def model(request, folder, tmp_path_factory):
    """On a plain CPU the KV cache is pages of our own, elsewhere it is OpenVINO's state.

    Over the pages, the language part may be compiled twice: for prompts and for single tokens.
    """
    if request.param != "twice":
        return OVInternVLChatModel(folder, request.param, ov_config=EXACT)
    own = shutil.copytree(folder, tmp_path_factory.mktemp("twice") / "model")
    second = {"file": PART_FILES["language"], "properties": {}}
    keep(own, "CPU", {"machine": machine(ov.Core(), "CPU"), "parts": {}, "decode": second})
    made = OVInternVLChatModel(own, ov_config=EXACT)
    assert "decode" in made.language_part._cache_options
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


TALK = [
    ("What is it?", [picture(1)]),
    ("And this?", [picture(2, 56, 112), picture(3, 56, 56)]),
    ("Why?", []),
    ("<image> is how much larger than the first?", [picture(4, 200, 60)]),
]


def test_a_conversation_says_what_the_reference_says(reference, model):
    ours, theirs = model.start_conversation(), reference.start_conversation()
    for question, images in TALK:
        answer = ours.ask(question, images=images, **OPTIONS)
        assert answer == theirs.ask(question, images=images, **OPTIONS)
        assert ours.statistics.prompt_tokens == theirs.statistics.prompt_tokens
    assert ours.statistics.reused_tokens > 0.7 * ours.statistics.prompt_tokens
    assert theirs.statistics.reused_tokens == 0
    assert [turn.question for turn in ours.turns] == [turn.question for turn in theirs.turns]
    assert ours.turns[1].question == "Image-1: <image>\nImage-2: <image>\nAnd this?"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_reference_talks_on_cuda_as_on_the_processor(tiny, reference):
    cuda = InternVLChatModel.from_checkpoint(Checkpoint(tiny("tiny-qwen2")), device="cuda")
    ours, theirs = cuda.start_conversation(), reference.start_conversation()
    for question, images in TALK:
        assert ours.ask(question, images=images, **OPTIONS) == theirs.ask(question, images=images, **OPTIONS)


@pytest.mark.parametrize("edit", ["last", "middle", "picture", "all"])
def test_an_edited_history_gives_the_text_of_a_new_one(reference, model, edit):
    """What is common with the KV cache stays, what is not is masked out: the answers do not tell the difference."""
    ours, theirs = model.start_conversation(), reference.start_conversation()
    for conversation in (ours, theirs):
        for question, images in TALK[:3]:
            conversation.ask(question, images=images, **OPTIONS)
        if edit == "last":
            del conversation.turns[-1]
        elif edit == "middle":
            conversation.turns[1].answer = "A house."
        elif edit == "picture":
            conversation.turns[1].pictures[0] = PictureTiles.of_picture(picture(9, 56, 112), Tiling.of(model.config))
        else:
            conversation.reset()
    for question in ("And now?", "Really?"):
        assert ours.ask(question, **OPTIONS) == theirs.ask(question, **OPTIONS)
    if edit != "all":
        assert ours.statistics.reused_tokens > 0.5 * ours.statistics.prompt_tokens


def test_a_state_is_shortened_by_edits_that_leave_many_slots_dead(folder, reference):
    """What an edited prompt still begins with is kept, however little of the state it is."""
    model = OVInternVLChatModel(folder, "HETERO:CPU", ov_config=EXACT)
    ours, theirs = model.start_conversation(system="S"), reference.start_conversation(system="S")
    for conversation in (ours, theirs):
        conversation.ask("What?", images=[picture(1, 200, 150)], **OPTIONS)
        conversation.reset()
    assert ours.ask("Hello?", **OPTIONS) == theirs.ask("Hello?", **OPTIONS)
    assert 0 < ours.statistics.reused_tokens < 20
    assert len(ours._cache) == ours._cache._slots  # no dead ones


def test_pages_are_used_again(folder):
    """A conversation that is started over again and again takes no more pages than its longest turn."""
    conversation = OVInternVLChatModel(folder, ov_config=EXACT).start_conversation()
    for seed in range(5):
        conversation.reset()
        conversation.ask("What?", images=picture(seed, 200, 150), max_new_tokens=40)
        pages = conversation._cache._pages
    assert conversation._cache._pages == pages
    tables, uses = conversation._cache._tables, conversation._cache._uses
    assert sum(uses) == len(tables[0])
    assert sorted(conversation._cache._free + tables[0]) == list(range(pages))


@pytest.mark.parametrize("device", ["CPU", "HETERO:CPU"], ids=["pages", "state"])
def test_beams_over_many_pages_are_the_references(folder, reference, device):
    """Long enough that beams share full pages, part, and copy the one they write into."""
    model = OVInternVLChatModel(folder, device, ov_config=EXACT)
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "num_beams": 4}
    answers = [each.start_conversation().ask("What?", images=picture(3), **options) for each in (model, reference)]
    assert answers[0] == answers[1]


def test_interleaved_conversations_do_not_disturb_each_other(reference, model):
    alone = []
    for seed in (1, 2):
        conversation = reference.start_conversation(system=f"You are number {seed}.")
        alone.append([conversation.ask("What?", images=picture(seed), **OPTIONS), conversation.ask("Why?", **OPTIONS)])
    first, second = (model.start_conversation(system=f"You are number {seed}.") for seed in (1, 2))
    found = [[first.ask("What?", images=picture(1), **OPTIONS)], [second.ask("What?", images=picture(2), **OPTIONS)]]
    found[0].append(first.ask("Why?", **OPTIONS))
    found[1].append(second.ask("Why?", **OPTIONS))
    assert found == alone


def test_conversations_run_at_the_same_time(reference, model):
    """Two threads, piece by piece; each must read its own answer."""
    wanted = [reference.start_conversation().ask("What?", images=picture(seed), max_new_tokens=40) for seed in range(3)]
    found = [""] * 3

    def run(seed):
        found[seed] = model.start_conversation().ask("What?", images=picture(seed), max_new_tokens=40)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


@pytest.mark.parametrize("device", ["CPU", "HETERO:CPU"], ids=["pages", "state"])
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
def test_stateless_calls_reuse_the_common_prefix_and_answer_the_same(folder, reference, tokenizer, reuse, device):
    model = OVInternVLChatModel(folder, device, ov_config=EXACT, reuse_kv=reuse)
    fed = []
    feed = runtime.parts.kv_cache.KVCache.feed
    options = {"max_new_tokens": 8, "do_sample": False}
    pixels = torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    history = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runtime.parts.kv_cache.KVCache,
            "feed",
            lambda self, embeds, *rest: fed.append(embeds.shape[1]) or feed(self, embeds, *rest),
        )
        for question, given in (("What is <image>?", [3]), ("And <image>?", [3, 2]), ("Why?", [3, 2])):
            arguments = (tokenizer, pixels[: sum(given)], question, options)
            fed.clear()
            answer = model.chat(*arguments, history=history or [], return_history=True, num_patches_list=given)
            prefill = fed[0]
            wanted = reference.chat(*arguments, history=history or [], return_history=True, num_patches_list=given)
            assert answer == wanted
            history = answer[1]
        whole = len(tokenizer(render(model.conv_template, model.system_message, history[:-1], "Why?"))["input_ids"])
        assert (prefill < whole / 2) == reuse
        edited = [(history[0][0], "Nothing."), *history[1:]]
        arguments = (tokenizer, pixels, "Sure?", options)
        fed.clear()
        answer = model.chat(*arguments, history=edited, num_patches_list=[3, 2])
        assert answer == reference.chat(*arguments, history=edited, num_patches_list=[3, 2])


@pytest.fixture
def pages(folder, monkeypatch):
    """A model on a plain CPU, whose prompts are short here."""
    monkeypatch.setattr(runtime.parts.kv_cache, "LEAST_ADOPTED", 16)
    return OVInternVLChatModel(folder, ov_config=EXACT)


@pytest.mark.parametrize("device", ["CPU", "HETERO:CPU"], ids=["pages", "state"])
@pytest.mark.parametrize("gone", [False, True], ids=["while the other is there", "after it has gone"])
def test_a_picture_that_another_conversation_knows_is_not_computed_again(folder, monkeypatch, reference, gone, device):
    monkeypatch.setattr(runtime.parts.kv_cache, "LEAST_ADOPTED", 16)
    pages = OVInternVLChatModel(folder, device, ov_config=EXACT)
    first = pages.start_conversation()
    first.ask("What is it?", images=[picture(1)], **OPTIONS)
    told = first.turns[0].answer
    if gone:
        del first
        gc.collect()
    second = pages.start_conversation()
    answer = second.ask("How large is it?", images=[picture(1)], **OPTIONS)
    assert answer == reference.start_conversation().ask("How large is it?", images=[picture(1)], **OPTIONS)
    page = getattr(second._cache, "_page", 1)  # a state is copied to the token
    common = second.statistics.prompt_tokens - len(pages.tokenizer.encode("How large is it?")) - 20
    assert second.statistics.reused_tokens % page == 0
    assert second.statistics.reused_tokens > common - page
    assert second.statistics.encoded_tiles == 0
    if not gone:  # what is shared was copied: both go on for themselves
        theirs = reference.start_conversation()
        theirs.turns = [Turn(turn.question, turn.answer, turn.pictures) for turn in first.turns]
        assert first.ask("Why?", **OPTIONS) == theirs.ask("Why?", **OPTIONS)
        assert first.turns[0].answer == told
        assert first.statistics.reused_tokens > first.statistics.prompt_tokens - 40


@pytest.mark.parametrize("device", ["CPU", "HETERO:CPU"], ids=["pages", "state"])
def test_conversations_of_equal_length_by_turns_do_not_mix(folder, reference, device):
    """Their runs have the same shapes, which a GPU plugin takes for one and the same conversation."""
    model = OVInternVLChatModel(folder, device, ov_config=EXACT, reuse_kv=False)
    for most in (1, 2, 5):
        found = []
        for each in (model, reference):
            talks = [each.start_conversation() for _ in range(3)]
            options = {"max_new_tokens": most, "do_sample": False}
            found.append([talk.ask(word, **options) for word in ("Why?", "Who?") for talk in talks])
            streams = [talk.stream(word, **OPTIONS) for talk, word in zip(talks, ("abc", "abd", "abe"), strict=True)]
            found[-1] += ["".join(pieces) for pieces in zip(*zip_longest(*streams, fillvalue=""), strict=True)]
        assert found[0] == found[1]


def test_a_cache_that_is_at_work_is_left_alone(pages):
    first = pages.start_conversation()
    first.ask("What is it?", images=[picture(1)], **OPTIONS)
    with first._cache.busy:
        second = pages.start_conversation()
        second.ask("What is it?", images=[picture(1)], **OPTIONS)
        assert second.statistics.reused_tokens == 0
    third = pages.start_conversation()
    third.ask("What is it?", images=[picture(1)], **OPTIONS)
    assert third.statistics.reused_tokens > 0
    assert third.turns[0].answer == second.turns[0].answer == first.turns[0].answer


def test_a_cache_is_asked_only_when_it_is_whole(pages, monkeypatch):
    """A conversation begins in one thread while another one asks."""
    first = pages.start_conversation()
    first.ask("What is it?", images=[picture(1)], **OPTIONS)
    grow, seen = runtime.parts.paged_cache.PagedCache._grow, []

    def look(cache, count):
        seen.append(cache in first._cache._siblings)
        grow(cache, count)

    monkeypatch.setattr(runtime.parts.paged_cache.PagedCache, "_grow", look)
    second = pages.new_cache()
    assert seen == [False]
    assert second in first._cache._siblings


def test_nothing_is_taken_over_where_reuse_is_off(folder, monkeypatch):
    monkeypatch.setattr(runtime.parts.kv_cache, "LEAST_ADOPTED", 16)
    model = OVInternVLChatModel(folder, ov_config=EXACT, reuse_kv=False)
    for _ in range(2):
        conversation = model.start_conversation()
        conversation.ask("What is it?", images=[picture(1)], **OPTIONS)
        assert conversation.statistics.reused_tokens == 0


def test_few_common_tokens_are_not_worth_a_copy(folder, monkeypatch):
    monkeypatch.setattr(runtime.parts.kv_cache, "LEAST_ADOPTED", 1000)
    model = OVInternVLChatModel(folder, ov_config=EXACT)
    model.start_conversation().ask("What?", **OPTIONS)
    conversation = model.start_conversation()
    conversation.ask("Why?", **OPTIONS)
    assert conversation.statistics.reused_tokens == 0


def test_what_is_kept_can_be_forgotten(pages):
    for _ in range(2):
        pages.forget()
        conversation = pages.start_conversation()
        conversation.ask("What is it?", images=[picture(1)], **OPTIONS)
        assert (conversation.statistics.reused_tokens, conversation.statistics.encoded_tiles) == (0, 3)
        del conversation
        gc.collect()


def test_a_picture_goes_through_the_vision_part_once(model):
    model.forget()
    model.start_conversation().ask("What?", images=[picture(5)], max_new_tokens=2)
    again = model.start_conversation()
    again.ask("Something else?", images=[picture(5), picture(5)], max_new_tokens=2)
    assert again.statistics.tiles == 6
    assert again.statistics.encoded_tiles == 0
    again.ask("With other tiles?", images=[picture(5)], max_tiles=1, max_new_tokens=2)
    assert (again.statistics.tiles, again.statistics.encoded_tiles) == (1, 0)  # it was the thumbnail
    again.ask("Another one?", images=[picture(6)], max_new_tokens=2)
    assert again.statistics.encoded_tiles == again.statistics.tiles == 3


def test_equal_tiles_go_through_the_vision_part_once(model, reference):
    """A scanned page: white, with print in two of its tiles; then a still camera's frames, in which one corner changes."""
    page = np.full((224, 168, 3), 255, np.uint8)
    page[10:40, 10:40] = page[180:200, 120:150] = 0
    for each in (model, reference):
        each.forget()
        talk = each.start_conversation()
        talk.ask("What?", images=[page], **OPTIONS)
        tiles = talk.statistics.tiles
        assert tiles == 13
        assert talk.statistics.encoded_tiles == 4  # two with print, a white one, the thumbnail
    talk, other = model.start_conversation(), reference.start_conversation()
    frames = [page.copy() for _ in range(4)]
    frames[3][:20, :20] = 100
    answers = [each.ask("What?", images=frames, **OPTIONS) for each in (talk, other)]
    assert answers[0] == answers[1]
    assert talk.statistics.tiles == 4 * tiles
    assert talk.statistics.encoded_tiles == 2  # the corner and the thumbnail it is seen in


def test_odd_pictures_are_answered_or_refused_and_the_conversation_goes_on(model):
    """All 49 in one conversation: each is a turn, or one line."""
    conversation = model.start_conversation()
    refused = 0
    for number, path in enumerate(sorted(shared("data/odd-pictures").iterdir())):
        try:
            conversation.ask("What?", images=[path], max_tiles=1, max_new_tokens=1)
        except PictureError:
            refused += 1
        assert len(conversation.turns) <= number + 1 - refused
    assert refused == 9
    assert conversation.ask("And?", **OPTIONS)


def test_the_feature_cache_drops_the_oldest_first_and_holds_its_bound():
    calls = []

    def encode(batch):
        calls.append(len(batch))
        return [TileFeatures(np.zeros((4, 8), np.float32)) for _ in batch]

    cache = FeatureCache(2 * 4 * 8 * 4)  # two tiles
    a, b, c = (PictureTiles.of_picture(picture(seed, 56, 56), Tiling(56)) for seed in range(3))
    for wanted, encoded in ((a, 1), (b, 1), (a, 0), (c, 1), (a, 0), (b, 1)):
        assert encode_pictures([wanted], encode, 4, cache)[1] == encoded
        assert cache.bytes <= cache.limit
    large = PictureTiles.of_picture(picture(7, 224, 224), Tiling(56))
    features, _ = encode_pictures([large, a], encode, 4, cache)
    assert features.keys() == {*large.tile_keys, *a.tile_keys}
    assert calls[-3:] == [3, 3, 4]


def test_keys_tell_pictures_apart_and_rows_of_one():
    ids = np.array([1, 5, 5, 5, 5, 2])
    first, second = (PictureTiles.of_picture(picture(seed, 56, 56), Tiling(56)) for seed in (1, 2))
    keys = keys_of(ids, 5, [first, second], [2, 2], 2)
    assert list(keys[[0, 5]]) == [1, 2]
    assert (keys[1:5] < 0).all()
    assert len(set(keys)) == 6
    assert list(keys_of(ids, 5, [first, first], [2, 2], 2)[1:3]) == list(keys[1:3])


def test_a_long_prompt_is_prefilled_in_pieces(model, reference, monkeypatch):
    monkeypatch.setattr(runtime.parts.kv_cache, "PREFILL_AT_ONCE", 7)
    model.forget()
    stages = []
    conversation = model.start_conversation()
    answer = conversation.ask("What?", images=picture(1), progress=lambda *stage: stages.append(stage), **OPTIONS)
    assert answer == reference.start_conversation().ask("What?", images=picture(1), **OPTIONS)
    prompt = conversation.statistics.prompt_tokens
    fed = [stage for stage in stages if stage[0] == "prefill"]
    assert fed == [("prefill", start, prompt) for start in range(0, prompt, 7)]
    assert ("tiles", 0, 3) in stages


@pytest.mark.parametrize(
    ("total", "widths"),
    [
        (0, []),
        (1, [1]),
        (255, [255]),
        (256, [256]),
        (300, [256, 44]),
        (1024, [1024]),
        (1030, [1024, 6]),
        (1844, [1024, 768, 52]),
        (3380, [1024, 1024, 1024, 256, 52]),
    ],
)
def test_a_prompt_is_cut_into_even_widths(total, widths):
    spans = prompt_spans(total, 1024)
    assert [end - start for start, end in spans] == widths
    assert [n for start, end in spans for n in range(start, end)] == list(range(total))


@pytest.mark.parametrize(("total", "most"), [(1, 4), (4, 4), (5, 4), (13, 4), (3380, 2048), (0, 4)])
def test_a_long_run_is_cut_into_equal_spans(total, most):
    spans = equal_spans(total, most)
    assert [n for start, end in spans for n in range(start, end)] == list(range(total))
    sizes = [end - start for start, end in spans]
    assert len(sizes) == -(-total // most)
    assert not sizes or max(sizes) <= most
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_pieces_join_to_the_answer_and_statistics_count(model):
    conversation = model.start_conversation()
    pieces = list(conversation.stream("What?", images=[picture(1)], **OPTIONS))
    assert len(pieces) > 3
    assert "".join(pieces) == conversation.turns[-1].answer == "".join(pieces).strip()
    statistics = conversation.statistics
    assert statistics.new_tokens == 12
    assert statistics.finish_reason == "length"
    assert 0 < statistics.token_seconds < statistics.first_token_seconds
    assert statistics.tokens_per_second == pytest.approx(1 / statistics.token_seconds)
    assert "3 tiles" in str(statistics)
    assert set(statistics.as_dict()) >= {"tiles", "prompt_tokens", "reused_tokens", "tokens_per_second"}


def test_an_answer_is_cancelled_from_another_thread_and_the_conversation_goes_on(model, reference):
    conversation = model.start_conversation()
    pieces = []
    for piece in conversation.stream("What?", images=[picture(1)], max_new_tokens=2000):
        pieces.append(piece)
        if len(pieces) == 5:
            threading.Thread(target=conversation.cancel).start()
    assert conversation.statistics.finish_reason == "cancelled"
    assert conversation.statistics.new_tokens < 1500
    said = conversation.turns[-1].answer
    assert said == "".join(pieces)
    other = reference.start_conversation()
    other.turns = list(conversation.turns)
    assert conversation.ask("Why?", **OPTIONS) == other.ask("Why?", **OPTIONS)
    assert conversation.statistics.reused_tokens > 0


def test_an_answer_is_cancelled_before_its_first_word(model):
    conversation = model.start_conversation()
    model.forget()

    def progress(stage, done, total):
        conversation.cancel()

    assert conversation.ask("What?", images=[picture(11)], progress=progress, **OPTIONS) == ""
    assert conversation.statistics.finish_reason == "cancelled"
    assert conversation.turns == []
    assert conversation.ask("What?", **OPTIONS)


def test_a_reader_that_leaves_ends_the_answer(model):
    model.wait_until_packed()  # in a thread
    conversation = model.start_conversation()
    before = threading.active_count()
    for _ in conversation.stream("What?", max_new_tokens=2000):
        break
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before
    assert conversation.statistics.finish_reason == "cancelled"
    assert conversation.ask("And?", **OPTIONS)


def test_one_conversation_answers_once_at_a_time(model):
    conversation = model.start_conversation()
    stream = conversation.stream("What?", max_new_tokens=50)
    next(stream)
    with pytest.raises(PromptError, match="is answering already"):
        conversation.ask("And?", **OPTIONS)
    stream.close()


def test_sampling_beams_and_processors_are_the_same_on_both_backends(model, reference):
    """Same seed, same options: the draws of the two backends agree, because their logits do."""
    for options in (
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 7},
        {"do_sample": True, "min_p": 0.1, "seed": 7},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"num_beams": 3},
        {"min_new_tokens": 5},
    ):
        answers = [
            each.start_conversation().ask("What?", images=picture(2), max_new_tokens=10, **options) for each in (model, reference)
        ]
        assert answers[0] == answers[1], options


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 0.0, "early_stopping": True},
        {"num_beams": 2, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 18},
    ],
    ids=str,
)
def test_what_a_conversation_writes_is_what_transformers_writes(model, reference, options):
    """Our decoding over our caches, and transformers' generate over its own."""
    conversation = model.start_conversation()
    conversation.ask("What is it?", images=picture(2), max_new_tokens=20, **options)
    turn = conversation.turns[0]
    prompt = reference.prompt_of(reference.system_message, [Turn(turn.question, "", turn.pictures)])
    tiles = torch.from_numpy(np.stack([turn.pictures[0].normalised(n) for n in range(turn.pictures[0].count)]))
    wanted = reference.generate(
        tiles, torch.from_numpy(prompt.ids)[None], max_new_tokens=20, do_sample=False, eos_token_id=reference.stop_id, **options
    )
    assert [token for token in wanted[0].tolist() if token != reference.stop_id] == turn.tokens


def test_several_questions_are_answered_at_once_as_one_by_one(model, reference):
    questions = [Question("Which is larger?", images=[picture(1), picture(2, 56, 56)]), "Hello?", Question("What?", picture(3))]
    alone = []
    for each in questions:
        text, images = (each, []) if isinstance(each, str) else (each.text, each.images)
        alone.append(reference.start_conversation().ask(text, images=images, **OPTIONS))
    assert model.ask_batch(questions, **OPTIONS) == alone
    assert reference.ask_batch(questions, **OPTIONS) == alone
    assert model.ask_batch([]) == []


def test_several_answers_to_a_question_are_drawn_apart_and_repeatable(model):
    options = {"num_return_sequences": 3, "temperature": 1.5, "max_new_tokens": 12}
    found = model.ask_batch(["What?", "Why?"], seed=3, **options)
    assert len(found) == len(set(found)) == 6
    assert model.ask_batch(["What?", "Why?"], seed=3, **options) == found
    assert model.ask_batch(["What?", "Why?"], seed=4, **options) != found
    beams = model.ask_batch(["What?"], num_beams=4, num_return_sequences=2, max_new_tokens=12)
    assert beams[0] == model.start_conversation().ask("What?", num_beams=4, max_new_tokens=12)
    assert len(set(beams)) == 2


def test_an_answer_ends_before_a_stop_string(model):
    whole = model.start_conversation().ask("What?", images=picture(2), max_new_tokens=30)
    word = whole[len(whole) // 2 :][:4]
    conversation = model.start_conversation()
    assert conversation.ask("What?", images=picture(2), max_new_tokens=30, stop_strings=[word]) == (
        whole[: whole.index(word)].rstrip()
    )
    assert conversation.statistics.finish_reason == "stop"


def test_a_callers_own_stopping_criterion_is_heard(model, reference, tokenizer):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 3)

    ids = tokenizer("Hello there", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 10, "do_sample": False, "stopping_criteria": [AfterThree()]}
    found = model.generate(input_ids=ids, **options)
    assert found.shape[1] == 3
    assert torch.equal(found, reference.generate(input_ids=ids, **options))


def test_generate_returns_dictionaries_with_scores(model, reference, tokenizer):
    ids = tokenizer("Hello there", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    ours, theirs = model.generate(input_ids=ids, **options), reference.generate(input_ids=ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_batches_take_several_pictures_a_question_and_none(model, reference, tokenizer):
    options = {"max_new_tokens": 8, "do_sample": False}
    pixels = torch.randn(6, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    questions, counts = ["Which is larger?", "Hello?", "<image> and\n<image>: same?", "What?"], [[1, 2], [], [1, 1], 1]
    batch = model.batch_chat(tokenizer, pixels, questions, options, num_patches_list=counts)
    assert batch == reference.batch_chat(tokenizer, pixels, questions, options, num_patches_list=counts)
    alone = [
        model.chat(tokenizer, pixels[:3], f"Image-1: <image>\nImage-2: <image>\n{questions[0]}", options, num_patches_list=[1, 2]),
        model.chat(tokenizer, None, questions[1], options),
        model.chat(tokenizer, pixels[3:5], questions[2], options, num_patches_list=[1, 1]),
        model.chat(tokenizer, pixels[5:], questions[3], options),
    ]
    assert batch == alone
    assert model.batch_chat(tokenizer, None, ["Hello?", "Who?"], options)[0] == alone[1]


def test_ids_are_those_of_the_prompt_written_out(golden):
    """Context tokens are repeated after tokenising: the same ids as tokenising thousands of them, whatever the tokenizer."""
    model = InternVLChatModel.from_checkpoint(Checkpoint(golden.folder))
    pictures = [PictureTiles.of_picture(picture(seed, 56 * seed, 56), Tiling.of(model.config)) for seed in (1, 2, 3)]
    for history, question in (
        ([], "<image>\nWhat? <image>And <image>"),
        ([("<image> <image>\n你好", "Ja."), ("a", "b")], "  <image>  why?  \n"),
    ):
        wanted = model.tokenizer.encode(model.prompt_text("S", history, question, pictures))
        left = iter(pictures)
        turns = [
            Turn(asked, answer, [next(left) for _ in range(asked.count("<image>"))]) for asked, answer in [*history, (question, "")]
        ]
        assert model.prompt_of("S", turns).ids.tolist() == wanted
        for turn in turns[:-1]:  # tokens as the tokenizer would write them change nothing
            turn.tokens = answer_ids(model, turn.answer)
        assert model.prompt_of("S", turns).ids.tolist() == wanted


def answer_ids(model, answer):
    """The tokens of an answer where it stands in a prompt."""
    t = model.conv_template
    before, whole = (model.tokenizer.encode(text) for text in (t.assistant, t.assistant + answer + t.sep))
    after = model.tokenizer.encode(t.sep, add_special_tokens=False)
    return whole[len(before) : len(whole) - len(after)]


def test_an_answer_keeps_the_tokens_it_was_written_with(golden):
    """A model may write what its tokenizer would not: the next turn goes on from that, until the answer is edited."""
    model = InternVLChatModel.from_checkpoint(Checkpoint(golden.folder))
    usual = answer_ids(model, "other")
    spelled = [token for letter in "other" for token in model.tokenizer.encode(letter, add_special_tokens=False)]
    assert len(usual) < len(spelled) == 5
    before = len(model.prompt_of("S", [Turn("What?", "", [])]).ids)

    def inner(turn):
        ids = model.prompt_of("S", [turn, Turn("Why?", "", [])]).ids.tolist()
        return ids[before : ids.index(model.stop_id, before)]

    turn = Turn("What?", "other", [], spelled)
    assert inner(turn) == spelled
    turn.answer = "others"
    assert inner(turn) == answer_ids(model, "others")
    turn.answer, turn.tokens = "other", []
    assert inner(turn) == usual


def test_a_second_turn_computes_only_what_was_asked(model, tokenizer):
    conversation = model.start_conversation()
    conversation.ask("What?", images=[picture(31)], **OPTIONS)
    first, said = conversation.statistics, conversation.turns[0]
    assert tokenizer.decode(said.tokens) == said.answer  # else this seed shows nothing
    conversation.ask("Why?", **OPTIONS)
    assert conversation.statistics.reused_tokens == first.prompt_tokens + len(said.tokens) - 1  # the last one was never fed


def test_mistakes_are_told_before_any_work(model, tokenizer):
    conversation = model.start_conversation()
    for call, kind, message in (
        (lambda: conversation.stream(" "), PromptError, "the question is empty"),
        (lambda: conversation.stream("What?", max_new_tokens=0), OptionError, "max new tokens 0 is not positive"),
        (lambda: conversation.stream("What?", images=picture(1), max_tiles=0), OptionError, "max tiles 0 is not positive"),
        (lambda: conversation.stream("<image> <image>?", images=picture(1)), PromptError, "has 2 <image> marks for 1 pictures"),
        (lambda: model.chat(tokenizer, None, "", {"max_new_tokens": 3}), PromptError, "the question is empty"),
        (lambda: model.chat(tokenizer, None, "a", {"max_new_tokens": 0}), OptionError, "max new tokens 0 is not"),
        (lambda: model.batch_chat(tokenizer, None, ["a", ""], {}), PromptError, "the question is empty"),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_a_prompt_longer_than_the_context_names_what_takes_it(folder, monkeypatch):
    model = OVInternVLChatModel(folder, ov_config=EXACT)
    model.config.language["max_position_embeddings"] = 60
    with pytest.raises(
        PromptError, match=r"has \d+ tokens, 52 of them for 13 tiles; the model reads 60: lower the tiles .*--max-tiles"
    ):
        model.start_conversation().stream("What?", images=picture(1, 400, 300))


def test_logits_that_are_no_numbers_are_told(folder, monkeypatch):
    model = OVInternVLChatModel(folder, ov_config=EXACT)
    conversation = model.start_conversation()
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_tiles", lambda tiles: np.full((len(tiles), 4, 64), np.nan, np.float32))
        with pytest.raises(NumericsError, match=r"vision part gave NaN.*--precision accuracy"):
            conversation.ask("What?", images=picture(21), **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(model, "embed_tokens", lambda ids: np.full((*ids.shape, 64), np.nan, np.float32))
        with pytest.raises(NumericsError, match=r"language part gave NaN.*--precision accuracy"):
            conversation.ask("What?", **OPTIONS)
    assert conversation.turns == []
    assert conversation.ask("What?", **OPTIONS)  # and it goes on


def test_characters_of_several_tokens_come_whole(model):
    """Byte-level tokens of one Chinese character must not be shown in halves."""
    said = "你好世界 and more  "
    ids = model.tokenizer.encode(said, add_special_tokens=False)
    text, statistics, kept = TextStream(model.tokenizer, get_template("Hermes-2")), Statistics(), []
    tokens = lambda progress: (Token(i) for i in ids)  # noqa: E731
    running = {"cancelled": threading.Event(), "cancel": lambda: None}
    pieces = list(stream_text(tokens, text, Decoding(), statistics, kept, **running))
    assert "".join(pieces) == said.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert statistics.new_tokens == len(ids)
    assert kept == ids


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.stream("What?", image="a.png"), "there is no option image: did you mean images"),
        (lambda c: c.stream("What?", temprature=1), "there is no option temprature: did you mean temperature"),
        (lambda c: c.stream("What?", stopping_criteria=[]), "there is no option stopping_criteria"),
        (lambda c: c.stream("What?", temperature="warm"), "temperature 'warm' is not 0"),
        (lambda c: c.stream("What?", temperature=-1), "temperature -1 is not 0"),
        (lambda c: c.stream("What?", top_p=2), "top p 2 is not above 0 and at most 1"),
        (lambda c: c.stream("What?", top_k=True), "top k True is not 0"),
        (lambda c: c.stream("What?", repetition_penalty=0), "repetition penalty 0 is not positive"),
        (lambda c: c.stream("What?", seed=-1), "seed -1 is not 0 or more"),
        (lambda c: c.stream("What?", stop_strings=[1]), "stop strings .* is not a list of texts"),
        (lambda c: c.stream("What?", num_return_sequences=2), "a turn has one answer"),
        (lambda c: c.stream("What?", num_beams=2, temperature=1), "num_beams takes the likeliest"),
        (lambda c: c.stream("half \ud800"), r"half of a character, the lone surrogate U\+D800 at position 5"),
        (lambda c: c.stream(5), "a text is a str, this is a int"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(model, call, message):
    with pytest.raises((OptionError, PromptError), match=message) as raised:
        call(model.start_conversation())
    assert "\n" not in str(raised.value)


def test_a_surrogate_is_told_wherever_a_text_comes_from(model, tokenizer):
    for call in (
        lambda: model.start_conversation("\ud800").stream("What?"),
        lambda: model.ask_batch(["\udcff"]),
        lambda: model.chat(tokenizer, None, "\ud800", {"max_new_tokens": 1}),
        lambda: model.chat(tokenizer, None, "Hi", {"max_new_tokens": 1}, history=[("a", "\ud800")]),
        lambda: model.batch_chat(tokenizer, None, ["\ud800"], {"max_new_tokens": 1}),
        lambda: model.tokenizer.encode("\ud800"),
    ):
        with pytest.raises(PromptError, match="lone surrogate U"):
            call()


@pytest.mark.parametrize("prefix", ["<think>\n</think>\n", "It is", "你好"])
def test_an_answer_goes_on_from_a_prefix(model, reference, prefix):
    """As if the model had written it: the tokens are those after the prompt with the prefix behind it."""
    conversation = model.start_conversation()
    answer = conversation.ask("What is it?", images=picture(2), answer_prefix=prefix, **OPTIONS)
    turn = conversation.turns[0]
    assert turn.answer.startswith(prefix)
    assert turn.answer.endswith(answer)
    text = reference.prompt_text(reference.system_message, [], turn.question, turn.pictures) + prefix
    ids = reference.tokenizer.encode(text)
    tiles = torch.from_numpy(np.stack([turn.pictures[0].normalised(n) for n in range(turn.pictures[0].count)]))
    options = {"do_sample": False, "eos_token_id": reference.stop_id, **OPTIONS}
    wanted = [
        token for token in reference.generate(tiles, torch.tensor([ids]), **options)[0].tolist() if token != reference.stop_id
    ]
    own = reference.tokenizer.encode(prefix, add_special_tokens=False)
    assert turn.tokens == own + wanted
    whole = reference.tokenizer.decode(turn.tokens)
    conversation.ask("Why?", **OPTIONS)
    if whole == turn.answer:  # else this seed shows nothing
        assert conversation.statistics.reused_tokens == len(ids) + len(wanted) - 1


def test_a_prefix_alone_is_no_answer_and_half_a_character_no_prefix(model):
    conversation = model.start_conversation()
    model.forget()

    def progress(stage, done, total):
        conversation.cancel()

    assert conversation.ask("What?", images=[picture(12)], answer_prefix="It is", progress=progress, **OPTIONS) == ""
    assert conversation.turns == []
    with pytest.raises(PromptError, match="lone surrogate"):
        conversation.ask("What?", answer_prefix="\ud800", **OPTIONS)
