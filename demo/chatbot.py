"""A Gradio page over an opened model: one chat box for questions, pictures and videos; answers stream and can be stopped.

Knows the page; prompts, tiles and generation are the runtime's. Each browser tab has its own conversation, whose turns are
those on the page, so that undo, retry and edit work.
"""

from __future__ import annotations

import contextvars
import mimetypes
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from demo.places import STYLE, SWITCH, show_boxes
from demo.tiles import caption, draw_tiles
from runtime.answer.boxes import Box
from runtime.answer.chat_model import ChatModel
from runtime.answer.conversation import Conversation
from runtime.answer.model import OpenedModel
from runtime.answer.stream import Statistics
from runtime.answer.turn import Question, Turn
from runtime.errors import InternVLError, PromptError

TITLE = "InternVL on OpenVINO"
DEFAULT_NEW_TOKENS = 512
MOST_TILES = 12
MOST_FILES = 16  # a question
EXAMPLES = Path(__file__).parent / "examples"
QUESTIONS = [  # with their pictures; the built-in model answers them correctly
    ("Which shape is purple?", "shapes.png"),
    ("How high is the red bar?", "chart.png"),
    ("Read the text on the right.", "print.png"),
    ("Which picture has more shapes?", "pair-1.png", "pair-2.png"),
]
PLACEHOLDER = "Ask; add, drop or paste pictures, or a video"
STAGES = {"frames": "Reading frames", "tiles": "Looking at tiles", "prefill": "Reading the prompt"}
History = list[dict[str, Any]]  # Gradio's messages


def whole(text: str) -> str:
    """A text with lone surrogates, as broken pages send them, replaced: they cannot be shown."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parts_of(content: Any) -> tuple[str, list[str]]:
    """Text and files of one message as Gradio keeps it: a string, or a list of texts, files (from API clients a path alone) and
    components."""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
    held = [part.get("file") or part for part in parts if isinstance(part, dict)]
    files = [str(file["path"]) for file in held if file.get("path")]
    return "\n".join(text for text in texts if text), files


def turns_of(history: History) -> tuple[list[tuple[str, list[str], str]], list[str]]:
    """Gradio's messages -> (question, files, answer) a turn, and the files that wait for their question.

    Unanswered questions are left out. Messages with a title are the page's own: statistics and errors.
    """
    turns = []
    asked: tuple[str, list[str]] = ("", [])
    for message in history:
        text, files = parts_of(message["content"])
        if message["role"] == "user":
            asked = ("\n".join(filter(None, [asked[0], text])), [*asked[1], *files])
        else:
            if asked[0] and text and not (message.get("metadata") or {}).get("title"):
                turns.append((*asked, text))
            asked = ("", [])
    return turns, asked[1]


def sorted_files(files: list[str]) -> dict[str, Any]:
    """Uploaded files as the arguments of Conversation.stream. Raises PromptError for more than one video or too many files."""
    videos = [file for file in files if (mimetypes.guess_type(file)[0] or "").startswith("video/")]
    if len(videos) > 1:
        raise PromptError(f"{len(videos)} videos: give one a question")
    if len(files) > MOST_FILES:
        raise PromptError(f"{len(files)} files: give at most {MOST_FILES} a question")
    return {"images": [Path(file) for file in files if file not in videos], "video": videos[0] if videos else None}


def told(statistics: Statistics) -> str:
    """The line under an answer."""
    tiles = [f"{statistics.tiles} tile" + "s" * (statistics.tiles > 1)] if statistics.tiles else []
    reused = [f"{statistics.reused_tokens} reused"] if statistics.reused_tokens else []
    speed = [f"{statistics.tokens_per_second:.1f} tokens/s"] if statistics.tokens_per_second else []
    stopped = {"cancelled": ["stopped"], "length": ["cut at the token limit"]}.get(statistics.finish_reason, [])
    first = f"first token after {statistics.first_token_seconds:.2f} s"
    return " · ".join([*tiles, f"{statistics.prompt_tokens} prompt tokens", *reused, first, *speed, *stopped])


@dataclass
class Tab:
    """One browser tab: its conversation, and the question and files of each turn."""

    conversation: Conversation
    system: str
    asked: list[tuple[str, list[str]]] = field(default_factory=list)

    def show(self, shown: list[tuple[str, list[str], str]], model: ChatModel, most_tiles: int) -> None:
        """Set the conversation's turns to those on the page; turns that it already has are not opened again."""
        known = self.conversation.turns
        turns: list[Turn] = []
        for n, (text, files, said) in enumerate(shown):
            if n < len(known) and self.asked[n : n + 1] == [(text, files)]:
                turn = known[n]
            else:
                turn = Question(text, **sorted_files(files), max_tiles=most_tiles, allow_urls=False).open(model.config)
            turns.append(turn if turn.answer == said else replace(turn, answer=said))
        self.conversation.turns = turns
        self.asked = [(text, files) for text, files, _ in shown]

    def boxes(self, model: ChatModel, most_tiles: int) -> list[tuple[Image.Image, list[Box]]]:
        """The pictures that have boxes of the last answer, and the boxes; only these pictures are opened again."""
        found = self.conversation.boxes
        drawn, first = [], 0
        for turn, (text, files) in zip(self.conversation.turns, self.asked, strict=True):
            own = range(first, first + len(turn.pictures))
            first = own.stop
            if any(box.picture in own for box in found):
                question = Question(text, **sorted_files(files), max_tiles=most_tiles, allow_urls=False)
                frames, pictures = question.pictures(model.config)
                for index, picture in zip(own, [*frames, *pictures], strict=True):
                    boxes = [box for box in found if box.picture == index]
                    drawn += [(picture, boxes)] if boxes else []
        return drawn


class Chatbot:
    """The opened model, and the conversation of every tab."""

    def __init__(self, model: ChatModel):
        self.model = model
        self._tabs: dict[str, Tab] = {}
        # HTML as a part of a message: a component itself would reach Gradio's clients as its repr.
        props = gr.HTML(render=False).get_config()
        self._html = {"type": "component", "component": "html", "constructor_args": {}, "props": props}

    def tab(self, name: str, system: str) -> Tab:
        """The tab of this name; another system message or device starts a new conversation."""
        if name not in self._tabs or self._tabs[name].system != system:
            self._tabs[name] = Tab(self.model.start_conversation(system), system)
        return self._tabs[name]

    def answer(
        self,
        message: dict[str, Any] | str,
        history: History,
        max_tiles: float,
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        system: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio finds it by this
    ) -> Iterator[tuple[Any, Any]]:
        """Yield the answer so far; at the end also its statistics, boxes and tiles."""
        options: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p}
        if repetition_penalty != 1:
            options |= {"repetition_penalty": repetition_penalty}
        here = contextvars.copy_context()  # tells Gradio whose progress it is; the runtime reports from a thread of its own

        def report(stage: str, done: int, total: int) -> None:
            here.run(progress, (done, total), desc=STAGES[stage])

        shown, files = turns_of(history)
        given = {"text": message, "files": []} if isinstance(message, str) else message  # a string when a turn is edited
        files += [file["path"] if isinstance(file, dict) else file for file in given["files"]]  # dicts when it is retried
        question, text = whole(given["text"] or "Describe it."), ""
        try:
            tab = self.tab(request.session_hash or "", whole(system))
            tab.show(shown, self.model, int(max_tiles))
            conversation = tab.conversation
            pieces = conversation.stream(
                question, **sorted_files(files), max_tiles=int(max_tiles), allow_urls=False, progress=report, **options
            )
            with closing(pieces):  # type: ignore[type-var]  # also when the stop button or a closed page ends this generator
                for piece in pieces:
                    text += piece
                    yield text, gr.skip()
        except InternVLError as error:
            yield gr.ChatMessage(str(error), metadata={"title": "Not answered"}), gr.skip()
            return
        if not text:  # the model ended without text
            yield gr.ChatMessage("The model gave no answer.", metadata={"title": "Not answered"}), gr.skip()
            return
        assert conversation.statistics is not None
        line = gr.ChatMessage("", metadata={"title": told(conversation.statistics), "status": "done"})
        tab.asked.append((question, files))
        pictures = [{**self._html, "value": show_boxes(*one)} for one in tab.boxes(self.model, int(max_tiles))]
        seen = [(draw_tiles(picture), caption(picture)) for picture in conversation.turns[-1].pictures]
        yield [gr.ChatMessage([text, *pictures] if pictures else text), line], seen or gr.skip()

    def open_on(self, device: str) -> str:
        """Open the folder again on another device; conversations go on from what the page shows. -> The device in use."""
        assert isinstance(self.model, OpenedModel)
        try:
            self.model = OpenedModel(self.model.folder, device)
            self._tabs.clear()
        except InternVLError as error:
            gr.Warning(str(error))
        return self.model.ov_device

    def leave(self, request: gr.Request) -> None:
        """A tab was closed."""
        self._tabs.pop(request.session_hash or "", None)


class ChatInterface(gr.ChatInterface):
    """Gradio's, with question and pictures in separate messages: its page cannot edit a message that has both (gradio 6.31)."""

    def _message_as_message_dict(self, message: Any, role: Any) -> list[Any]:
        if isinstance(message, str):
            message = whole(message)
        elif isinstance(message, dict) and isinstance(message.get("text"), str):
            message = {**message, "text": whole(message["text"])}
        found = super()._message_as_message_dict(message, role)
        if role != "user" or not isinstance(found[0]["content"], list):
            return found
        return [{**found[0], "content": [part]} for part in found[0]["content"]]


def make_demo(model: ChatModel, tokenizer: Any = None) -> gr.Blocks:
    """The page, ready to launch. `tokenizer` is ignored: the tutorial passes one, and the model's own is used."""
    bot = Chatbot(model)
    most = min(MOST_TILES, model.config.max_tiles if model.config.dynamic_image_size else 1)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True) as page:
        with gr.Row():
            left = gr.Column(scale=3, min_width=320)
            right = gr.Column(scale=1, min_width=280)
        with right:  # made first, because the chat needs its settings
            gr.HTML(STYLE)
            gr.Markdown("What the model saw last")  # above the pictures: the gallery's own label would cover them
            seen = gr.Gallery(show_label=False, columns=1, object_fit="contain", height=320, interactive=False)
            gr.Checkbox(True, label="Boxes in the chat", elem_id=SWITCH, interactive=True)
            tiles = gr.Slider(1, MOST_TILES, value=most, step=1, label="Tiles a picture")
            tokens = gr.Slider(1, 4096, value=DEFAULT_NEW_TOKENS, step=1, label="New tokens")
            with gr.Accordion("Sampling, system message, device", open=False):
                temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: always the likeliest token")
                top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p")
                penalty = gr.Slider(1, 2, value=1, step=0.01, label="Repetition penalty")
                system = gr.Textbox(model.system_message, label="System message", lines=2)
                if isinstance(model, OpenedModel):
                    names = [*model.ov_devices, "AUTO"]
                    device = gr.Dropdown(names, value=model.ov_device, label="Device", allow_custom_value=True)
                    device.input(bot.open_on, device, device)
            with gr.Accordion("Webcam", open=False):
                webcam = gr.Image(sources=["webcam"], type="filepath", show_label=False)
        with left:
            textbox = gr.MultimodalTextbox(
                file_count="multiple",
                file_types=["image", "video", ".pdf", ".heic", ".heif"],
                placeholder=PLACEHOLDER,
                show_label=False,
                autofocus=True,
                stop_btn=True,
            )
            ChatInterface(
                bot.answer,
                multimodal=True,
                title=TITLE,
                chatbot=gr.Chatbot(height="70vh", show_label=False, buttons=["copy"], group_consecutive_messages=False),
                textbox=textbox,
                editable=True,
                examples=[[{"text": text, "files": [str(EXAMPLES / name) for name in names]}] for text, *names in QUESTIONS],
                additional_inputs=[tiles, tokens, temperature, top_p, penalty, system],
                additional_outputs=[seen],
                analytics_enabled=False,
                concurrency_limit=1,  # one answer at a time has all cores; the others wait in line
                show_progress="full",
                api_name="answer",
            )
        webcam.input(lambda box, file: box if file is None else {**box, "files": [*box["files"], file]}, [textbox, webcam], textbox)
        page.unload(bot.leave)
    return page
