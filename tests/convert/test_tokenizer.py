"""python -m pytest tests/convert/test_tokenizer.py

Prompts equal the original's, ids equal independent tokenisers', and the OpenVINO tokenizer gives the same.
"""

import json
import shutil

import numpy as np
import openvino as ov
import openvino_tokenizers  # noqa: F401 - registers the operations of the tokenizer models
import pytest
import sentencepiece
import transformers

from convert.tokenizer import INTERNLM2_TOKENS, adds_bos, generation_config, load_tokenizer, save_tokenizer
from runtime.answer.prompt import TEMPLATES, get_template
from runtime.errors import TokenizerError, UnsupportedModelError
from runtime.folder.config import InternVLConfig
from runtime.folder.files import DETOKENIZER_FILE, TOKENIZER_FILE
from tests.checkpoints import CONFIGS, tiny_tokenizer
from tests.conftest import DATA, shared

STRINGS = [
    *["Hello world", "  two  spaces ", " leading", "tabs\tand\nnewlines\n\n", "3.14159 100,000", "a" * 50],
    *["你好，世界。书生·浦语", "日本語テキスト", "한국어", "русский текст", "naïve café ﬁ ①", "ＡＢＣ ａｂｃ"],  # noqa: RUF001
    *["emoji 🙂👩‍👩‍👧", "for(int i=0;i<10;++i){}", "\u200b\xa0ﷺ", "<|im_start|>user\n<img><IMG_CONTEXT></img>\nhi<|im_end|>"],
]
PROMPTS = [case for case in json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))["cases"] if case["kind"] != "batch"]


def config(name: str, **changes) -> InternVLConfig:
    return InternVLConfig.from_dict(CONFIGS[name] | changes)


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: f"{c['template']}-{c['kind']}")
def test_saved_chat_template_renders_the_original_prompt(case, tmp_path):
    """The picture marks of the original are already expanded in its prompts: expand ours the same way."""
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, config("tiny-qwen2", template=case["template"]))
    arguments = case["arguments"]
    turns = [
        (text, role) for pair in arguments.get("history") or [] for text, role in zip(pair, ("user", "assistant"), strict=True)
    ]
    question = arguments["question"]
    if case["tiles"] and not arguments.get("history") and "<image>" not in question:
        question = "<image>\n" + question
    messages = [{"role": role, "content": text} for text, role in [*turns, (question, "user")]]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for tiles in arguments.get("num_patches_list") or ([case["tiles"]] if case["tiles"] else []):
        context = "<IMG_CONTEXT>" * (case["tokens_per_tile"] * tiles)
        rendered = rendered.replace("<image>", f"<img>{context}</img>", 1)
    assert rendered == case["prompt"]
    assert get_template(case["template"]).stop_token == case["stop_token"]


def test_chat_template_takes_a_system_message(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, config("tiny-qwen2"))
    messages = [
        {"role": "system", "content": "It's brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nIt's brief.<|im_end|><|im_start|>user\nhi<|im_end|><|im_start|>assistant\nho<|im_end|>"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_stop_token_is_among_the_end_tokens(name, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, config("tiny-qwen2", template=name))
    ends = generation_config(tokenizer, config("tiny-qwen2", template=name), tmp_path)["eos_token_id"]
    assert ends[0] == tokenizer.convert_tokens_to_ids(get_template(name).stop_token)


def test_unknown_template_names_the_known_ones():
    with pytest.raises(UnsupportedModelError, match="'vicuna' is not known; known are Hermes-2, internlm2-chat"):
        get_template("vicuna")


@pytest.fixture(params=["published", "bare"])
def internlm2(request, tmp_path):
    """The real InternLM2 tokenizer, with the published tokenizer_config.json or with no more than tokenizer.model."""
    shutil.copy(shared("data/tokenizers/internlm2/tokenizer.model"), tmp_path)
    if request.param == "published":
        token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        settings = {
            "added_tokens_decoder": {str(i): {"content": text, **token} for i, text in INTERNLM2_TOKENS.items()},
            "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
            **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
            "tokenizer_class": "InternLM2Tokenizer",
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_internlm2_ids_are_sentencepieces_with_bos_in_front(internlm2, tmp_path):
    pieces = sentencepiece.SentencePieceProcessor(str(internlm2 / "tokenizer.model"))
    tokenizer = load_tokenizer(internlm2, config("InternVL2-2B"))
    for text in STRINGS[:-1]:
        assert tokenizer.encode(text) == [1, *pieces.encode(text)], text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.encode(STRINGS[-1]) == [1, 92543, 1008, 364, 92544, 92546, 92545, 364, 6176, 92542]
    assert max(tokenizer.get_vocab().values()) == 92552, "no id past the embedding table"
    assert tokenizer.pad_token_id == 2


def test_internlm2_ids_survive_saving_and_the_openvino_tokenizer(internlm2, tmp_path):
    original = load_tokenizer(internlm2, config("InternVL2-2B"))
    output = tmp_path / "saved"
    output.mkdir()
    save_tokenizer(original, output)
    assert_same_ids(original, output, STRINGS)
    prompt = original.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt.startswith("<s><|im_start|>system\n"), "chat prompts are tokenised without special tokens, so bos is in the text"


def test_internvl2_1b_ids_are_the_published_ones(tmp_path):
    folder = shared("data/tokenizers/internvl2-1b")
    tokenizer = load_tokenizer(folder, config("InternVL2-1B"))
    names = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(151646, 151655))
    assert not adds_bos(tokenizer)
    cases = shared("data/tokenizers/cases/ggml-vocab-qwen2.gguf.inp")
    texts = cases.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = cases.with_suffix(".out").read_text().split("\n")
    for text, line in zip(texts, ids, strict=False):
        assert tokenizer.encode(text) == [int(i) for i in line.split()], text
    save_tokenizer(tokenizer, tmp_path)
    assert_same_ids(tokenizer, tmp_path, [*STRINGS, *(text for text in texts if text)])


def assert_same_ids(original, folder, texts):
    """The saved files, read by transformers, and the OpenVINO pair give the ids and the text of `original`."""
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(folder)  # as our own commands read it
    encoder = ov.compile_model(folder / TOKENIZER_FILE, "CPU")
    decoder = ov.compile_model(folder / DETOKENIZER_FILE, "CPU")
    for text in texts:
        ids = original.encode(text)
        assert saved.encode(text) == plain.encode(text) == ids, text
        assert encoder([text])["input_ids"][0].tolist() == ids, text
        assert decoder(np.array([ids]))["string_output"][0] == original.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("leading_space", [True, False])
def test_llama_tokenizer_model_gives_sentencepieces(leading_space, tmp_path):
    """Phi-3 and Yi ship a SentencePiece model; sentencepiece itself is the oracle, on a model trained here."""
    sentence = "the quick brown fox jumps over the lazy dog while pictures of cats and dogs are shown in several tiles"
    words = sentence.split()
    (tmp_path / "text").write_text("\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=leading_space,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    names = ["<img>", "</img>", "<IMG_CONTEXT>", "<|end|>"]
    added = {str(pieces.get_piece_size() + i): {"content": t, "special": True, "normalized": False} for i, t in enumerate(names)}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "added_tokens_decoder": added}
    settings |= {
        "add_prefix_space": leading_space,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    language = CONFIGS["tiny-phi3"]["llm_config"] | {"vocab_size": 400}
    tokenizer = load_tokenizer(tmp_path, config("tiny-phi3", llm_config=language))
    for text in ["the quick brown fox", "two cats, 3 dogs", "你好 🙂", "dogs\nand cats"]:
        assert tokenizer.encode(text) == [1, *pieces.encode(text)], text


def test_missing_tokenizer_names_the_files(tmp_path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer: expected tokenizer.json, tokenizer.model, or vocab.json"):
        load_tokenizer(tmp_path, config("tiny-qwen2"))


def test_unreadable_tokenizer_is_one_clear_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path, config("tiny-qwen2"))


def test_context_token_that_is_not_one_id_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        file.write_text(file.read_text(encoding="utf-8").replace("<IMG_CONTEXT>", "<OTHER>"), encoding="utf-8")
    with pytest.raises(TokenizerError, match="encodes <IMG_CONTEXT> as 13 ids"):
        load_tokenizer(tmp_path, config("tiny-qwen2"))


def test_id_past_the_embedding_table_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    language = CONFIGS["tiny-qwen2"]["llm_config"] | {"vocab_size": 4}
    with pytest.raises(TokenizerError, match="gives <IMG_CONTEXT> the id 5, but the embedding table has 4 rows"):
        load_tokenizer(tmp_path, config("tiny-qwen2", llm_config=language))
