"""The tokenizer of a model folder: transformers' files, the OpenVINO tokenizer and detokenizer, the faithful chat template.

Reads the tokenizer files of a checkpoint without running its Python; knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openvino as ov
import transformers
from tokenizers import AddedToken, Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from convert.reference.language import language_kind
from runtime.answer.prompt import CONTEXT_TOKEN, IMAGE_END, IMAGE_START, Template, template_of
from runtime.errors import TokenizerError
from runtime.folder.config import InternVLConfig, read_config
from runtime.folder.files import DETOKENIZER_FILE, GENERATION_CONFIG_FILE, TOKENIZER_FILE, save_model

MAX_NEW_TOKENS = 1024  # the model cards' setting; without one, GenAI and OVMS generate until the context is full
# transformers' own defaults, spelled out: optimum-intel 2.2 forgets to fill them in for InternVL on transformers 5
OPTIMUM_NEEDS = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}

# The tokens with which InternLM2's published tokenizer_config.json overrides pieces of tokenizer.model
INTERNLM2_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
    92544: "<img>",
    92545: "</img>",
    92546: "<IMG_CONTEXT>",
    92547: "<quad>",
    92548: "</quad>",
    92549: "<ref>",
    92550: "</ref>",
    92551: "<box>",
    92552: "</box>",
}


def load_tokenizer(folder: Path, config: InternVLConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, give it the model's own chat template and check the special tokens of prompts.

    Raises TokenizerError if the files are missing or unreadable, a special token of the prompts is not one id, or an id has no
    row in the embedding table.
    """
    try:
        with _without_warnings():
            tokenizer = _read_files(folder, config)
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError, json ValueError
        raise TokenizerError(f"the tokenizer files of {folder} cannot be read ({error}): fetch them again") from error
    template = template_of(config)
    rows = config.language["vocab_size"]
    for token in (IMAGE_START, CONTEXT_TOKEN, IMAGE_END, template.stop_token):
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise TokenizerError(
                f"the tokenizer of {folder} encodes {token} as {len(ids)} ids {ids[:8]}, expected one id of its own: "
                "its added tokens are missing; fetch its files again"
            )
        if ids[0] >= rows:
            raise TokenizerError(
                f"the tokenizer of {folder} gives {token} the id {ids[0]}, but the embedding table has {rows} rows"
            )
    tokenizer.chat_template = chat_template(template, bos=tokenizer.bos_token if adds_bos(tokenizer) else None)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    return tokenizer


def _read_files(folder: Path, config: InternVLConfig) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if (folder / "tokenizer.model").exists():
        return (
            _internlm2(folder)
            if language_kind(config).packed_attention
            else LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
        )
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return Qwen2Tokenizer.from_pretrained(folder)
    raise TokenizerError(
        f"{folder} has no tokenizer: expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt; fetch them again"
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """transformers 5.5 takes any tokenizer with an older config.json for Mistral's and warns that it is wrong."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _internlm2(folder: Path) -> PreTrainedTokenizerBase:
    """SentencePiece pieces as they are: no leading space, byte fallback, <s> in front of every text."""
    settings: dict[str, Any] = {"add_bos_token": True}
    config_file = folder / "tokenizer_config.json"
    if not (config_file.exists() and read_config(config_file).get("added_tokens_decoder")):
        settings |= {
            "added_tokens_decoder": {i: AddedToken(t, special=True, normalized=False) for i, t in INTERNLM2_TOKENS.items()},
            **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
        }
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **settings)
    # transformers adds the overridden pieces ([UNUSED_TOKEN_141] ...) again, past the end of the embedding table
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    end = max(INTERNLM2_TOKENS) + 1
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < end]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding puts the begin-of-sequence token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id


def context_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the context token."""
    return tokenizer.encode(CONTEXT_TOKEN, add_special_tokens=False)[0]


def chat_template(template: Template, *, bos: str | None) -> str:
    """The conversation template as Jinja; its prompts equal upstream's to the letter.

    `bos` comes first, because chat prompts are tokenised without special tokens, whereas upstream's chat() adds it.
    """

    def block(start: str, message: str) -> str:
        return f"{{{{ {_quote(start)} + {message} + {_quote(template.sep)} }}}}"

    return "".join(
        [
            f"{{{{ {_quote(bos)} }}}}" if bos else "",
            "{% if messages[0]['role'] == 'system' %}",
            block(template.system, "messages[0]['content']"),
            "{% else %}",
            block(template.system, _quote(template.system_message)),
            "{% endif %}",
            "{% for message in messages %}{% if message['role'] == 'user' %}",
            block(template.user, "message['content']"),
            "{% elif message['role'] == 'assistant' %}",
            block(template.assistant + template.lead, "message['content']"),
            "{% endif %}{% endfor %}",
            f"{{% if add_generation_prompt %}}{{{{ {_quote(template.assistant)} }}}}{{% endif %}}",
        ]
    )


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write transformers' files, then the OpenVINO tokenizer and detokenizer with the chat template in their rt_info.

    Raises TokenizerError if the OpenVINO tokenizer gives other ids for a prompt: GenAI would answer a different prompt.
    """
    from openvino_tokenizers import convert_tokenizer

    tokenizer.save_pretrained(folder)
    encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    save_model(encoder, folder / TOKENIZER_FILE)
    save_model(decoder, folder / DETOKENIZER_FILE)
    probe = probe_prompt(tokenizer)
    expected = tokenizer.encode(probe)
    found = ov.compile_model(encoder, "CPU")([probe])["input_ids"][0].tolist()
    if found != expected:
        raise TokenizerError(f"the OpenVINO tokenizer gives {found[:12]}... where transformers gives {expected[:12]}...")


def probe_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """A rendered prompt with a picture of two context tokens, with words, digits, Chinese and an emoji, without bos."""
    return prompt_of(tokenizer, f"{IMAGE_START}{CONTEXT_TOKEN * 2}{IMAGE_END}\nWhat's here, in 12 words? 你好 🙂")


def prompt_of(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The prompt of a first question, as text to encode with special tokens."""
    turn = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def end_tokens(tokenizer: PreTrainedTokenizerBase, config: InternVLConfig, checkpoint: Path) -> set[int]:
    """The ids that end an answer."""
    return {*generation_config(tokenizer, config, checkpoint)["eos_token_id"]}


def generation_config(tokenizer: PreTrainedTokenizerBase, config: InternVLConfig, checkpoint: Path) -> dict[str, Any]:
    """generation_config.json of the model folder: the checkpoint's own, with the template's stop token among its end tokens.

    Phi-3's tokenizer does not list `<|end|>` as an end token, so other engines would run past the answer.
    """
    file = checkpoint / GENERATION_CONFIG_FILE
    own = read_config(file) if file.exists() else {}
    stop = tokenizer.convert_tokens_to_ids(template_of(config).stop_token)
    listed = own.get("eos_token_id")
    ends = [stop, *(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id]
    return {
        "max_new_tokens": MAX_NEW_TOKENS,
        **OPTIMUM_NEEDS,
        **{key: value for key, value in own.items() if key != "max_length"},
        "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
        "pad_token_id": stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **({} if tokenizer.bos_token_id is None else {"bos_token_id": tokenizer.bos_token_id}),
    }
