"""The conversation templates of the family, as a table.

One row per template name: the text around each message, and the system message the model was trained with.
Strings are data of OpenGVLab/InternVL@2410d1d internvl_chat/internvl/conversation.py:238-392, those of GPT-OSS of
internvl_chat_gpt_oss/internvl/model/internvl_chat/conversation.py there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.errors import OptionError, PromptError, UnsupportedModelError
from runtime.folder.config import InternVLConfig
from runtime.folder.tokenizer import Typed, check_text

IMAGE_START, IMAGE_END, CONTEXT_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
IMAGE_MARK = "<image>"  # the mark of a picture in a question

_SYSTEM_2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_SYSTEM_2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


THINKING_MESSAGE = """You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and reason through the problem step-by-step. Enclose this entire thinking process within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the answer from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer should be standalone and not reference the thinking section."""  # noqa: E501  the published text, internvl_chat_gpt_oss/internvl/train/internvl_chat_mpo.py:58 there
THINKERS = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM")  # InternVL3.5's language models
THINKING_TOKENS = 4096  # default max_new_tokens of an answer that thinks

_SYSTEM_OSS = """You are InternVL, a large language model trained by Shanghai AI Laboratory.
Knowledge cutoff: 2024-06
Current date: 2025-08-06

Reasoning: low

# Valid channels: final. Channel must be included for every message."""


@dataclass(frozen=True)
class Template:
    """The text before each role's message, and the separator after every message.

    `lead` is what the model generates before an answer: part of the history, but not shown as part of the answer. `stop` is the
    token that ends an answer, where that is not the separator without its newline.
    """

    system: str
    user: str
    assistant: str
    sep: str
    system_message: str
    lead: str = ""
    stop: str = ""

    @property
    def stop_token(self) -> str:
        """The token that ends an answer."""
        return self.stop or self.sep.strip()


def _chatml(sep: str, system_message: str) -> Template:
    return Template("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", sep, system_message)


TEMPLATES: dict[str, Template] = {
    "Hermes-2": _chatml("<|im_end|>", _SYSTEM_2),
    "internlm2-chat": _chatml("<|im_end|>", _SYSTEM_2),
    "phi3-chat": Template("<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>", _SYSTEM_2),
    "internvl2_5": _chatml("<|im_end|>\n", _SYSTEM_2_5),
    "internvl3_5_gpt_oss": Template(
        *("<|start|>system<|message|>", "<|start|>user<|message|>", "<|start|>assistant", "<|end|>", _SYSTEM_OSS),
        lead="<|channel|>final<|message|>",
        stop="<|return|>",
    ),
}


OLD_SYSTEM_MESSAGES = {  # of models named V1-2 and V1-5, trained before the templates got their present ones
    "Hermes-2": "Answer the questions.",
    "internlm2-chat": "You are an AI assistant whose name is InternLM (书生·浦语).",
    "phi3-chat": "You are an AI assistant whose name is Phi-3.",
}


def old_system_message(name: str, template: str) -> str | None:
    """The system message of (Mini-)InternVL-Chat-V1-2 and -V1-5, recognised by name; None for all others.

    Source: InternLM/lmdeploy@v0.6.4 lmdeploy/model.py, and OpenGVLab/InternVL's conversation.py when they were published.
    """
    return OLD_SYSTEM_MESSAGES.get(template) if re.search("InternVL-Chat-.*V1-[25]", name) else None


def get_template(name: str) -> Template:
    """Return the template of config.json's `template`; raises UnsupportedModelError naming the known ones."""
    if name not in TEMPLATES:
        raise UnsupportedModelError(
            f"config.json: template {name!r} is not known; known are {', '.join(TEMPLATES)}: --template NAME picks one"
        )
    return TEMPLATES[name]


def template_of(config: InternVLConfig) -> Template:
    """The template of a model, with the system message of its config.json if there is one."""
    template = get_template(config.template)
    return template if config.system_message is None else replace(template, system_message=config.system_message)


def thinking_system(config: InternVLConfig, system: str | None) -> str:
    """The system message that makes InternVL3.5 think before it answers, followed by `system`. Raises OptionError."""
    if config.language_architecture not in THINKERS:
        raise OptionError(f"this model ({config.language_architecture}) has no thinking mode: InternVL3.5's models have one")
    return THINKING_MESSAGE if system is None else f"{THINKING_MESSAGE}\n\n{system}"


def check_question(question: str) -> None:
    """Raise PromptError for a question that is empty or not text."""
    check_text(question)
    if not question.strip():
        raise PromptError("the question is empty: write one")


def render(
    template: Template, system_message: str, history: Sequence[tuple[str, str]], question: str, answer_prefix: str = ""
) -> str:
    """The pieces of `render_pieces`, joined."""
    return "".join(render_pieces(template, system_message, [([asked], said) for asked, said in history], [question], answer_prefix))


def render_pieces(
    template: Template,
    system_message: str,
    history: Sequence[tuple[Sequence[str], str]],
    question: Sequence[str],
    answer_prefix: str = "",
) -> list[str]:
    """The prompt that asks `question` after `history`, up to the answer, or including its prefix.

    A question is a list of pieces; an empty one is omitted: the assistant speaks first. Typed pieces stay Typed. An empty answer in
    the history leaves its turn open, as upstream's template does.
    """

    def written(answer: str) -> list[str]:
        return [template.lead, type(answer)(answer.removeprefix(template.lead))]  # upstream's histories contain the lead

    def asked(pieces: Sequence[str]) -> list[str]:
        return [template.user, *pieces, template.sep] if pieces else []

    parts = [template.system, system_message, template.sep]
    for pieces, said in history:
        parts += [*asked(pieces), template.assistant]
        if said:
            parts += [*written(said), template.sep]
    return [*parts, *asked(question), template.assistant, *(written(answer_prefix) if answer_prefix else [])]


def typed(text: str, *, marks: bool) -> list[str]:
    """Typed text in pieces; with `marks`, its `<image>` marks are separate untyped pieces, which stand for pictures."""
    pieces = text.split(IMAGE_MARK) if marks else [text]
    return [piece for each in pieces for piece in (IMAGE_MARK, Typed(each))][1:]


def expand_marks(
    prompt: str,
    tiles: Sequence[int],
    tokens_per_tile: int,
    start: str = IMAGE_START,
    end: str = IMAGE_END,
    context: str = CONTEXT_TOKEN,
) -> str:
    """Replace the picture marks of a prompt, in order, by the context tokens of each picture's tiles.

    Raises PromptError when there are more or fewer marks than pictures.
    """
    if prompt.count(IMAGE_MARK) != len(tiles):
        raise PromptError(
            f"the prompt has {prompt.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(tiles)} pictures: write one mark a picture, "
            "earlier turns included, and give all their tiles"
        )
    for count in tiles:
        prompt = prompt.replace(IMAGE_MARK, start + context * (tokens_per_tile * count) + end, 1)
    return prompt


def frame_marks(frames: int) -> str:
    """The lines before a question about a video, one per frame."""
    return "".join(f"Frame{number}: {IMAGE_MARK}\n" for number in range(1, frames + 1))


def picture_marks(pictures: int, before: int = 0) -> str:
    """The lines for pictures without marks in the question, numbered if several, after `before` earlier pictures."""
    if pictures == 1:
        return f"{IMAGE_MARK}\n"
    return "".join(f"Image-{number}: {IMAGE_MARK}\n" for number in range(before + 1, before + pictures + 1))
