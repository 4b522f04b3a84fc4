"""A Gradio page over an opened model: one chat box for questions, pictures and videos, answers streamed, a stop that stops.

Knows the page; prompts, tiles and generation are the runtime's. Each browser tab has a conversation of its own, whose turns are
those that the page shows, so that undo, retry and edit work.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from runtime.chat import ChatModel
from runtime.conversation import Conversation, Exchange
from runtime.errors import InternVLError

DEFAULT_NEW_TOKENS = 512
MOST_TILES = 12
TITLE = "InternVL on OpenVINO"


def parts_of(content: Any) -> tuple[str, list[str]]:
    """Text and files of one message as Gradio keeps it: a string, or a list of text and file parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
    files = [str(part["file"]["path"]) for part in parts if isinstance(part, dict) and part.get("file")]
    return "\n".join(text for text in texts if text), files


def turns_of(history: list[dict[str, Any]]) -> list[tuple[str, list[str], str]]:
    """Gradio's messages -> (question, files, answer) a turn; what was asked and never answered is left out."""
    turns = []
    asked: tuple[str, list[str]] = ("", [])
    for message in history:
        text, files = parts_of(message["content"])
        if message["role"] == "user":
            # a picture and its text may come as two messages
            asked = ("\n".join(filter(None, [asked[0], text])), [*asked[1], *files])
        else:
            if asked[0] and text:
                turns.append((*asked, text))
            asked = ("", [])
    return turns


def sorted_files(files: list[str]) -> dict[str, Any]:
    """Uploaded files as the arguments of Conversation.stream. Raises gr.Error for more than one video."""
    videos = [file for file in files if (mimetypes.guess_type(file)[0] or "").startswith("video/")]
    if len(videos) > 1:
        raise gr.Error("One video a question, please.", print_exception=False)
    return {"images": [Path(file) for file in files if file not in videos], "video": videos[0] if videos else None}


def make_demo(model: ChatModel) -> gr.ChatInterface:
    """The page as Gradio blocks, to launch."""
    tabs: dict[str, Conversation] = {}
    most = min(MOST_TILES, model.config.max_tiles if model.config.dynamic_image_size else 1)

    def answer(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        max_tiles: float,
        max_new_tokens: float,
        request: gr.Request,
    ) -> Iterator[str]:
        tab = request.session_hash or ""
        if tab not in tabs:
            tabs[tab] = model.start_conversation()
        conversation = tabs[tab]
        given: dict[str, Any] = {"max_tiles": int(max_tiles), "allow_urls": False}
        try:
            shown = [(model.prepare(text, **sorted_files(files), **given), said) for text, files, said in turns_of(history)]
            own = [turn.tokens for turn in conversation.turns] + [[]] * len(shown)
            conversation.turns = [Exchange(turn.question, said, turn.pictures, own[n]) for n, (turn, said) in enumerate(shown)]
            options = {"max_new_tokens": int(max_new_tokens), "do_sample": False}
            pieces = conversation.stream(message["text"], **sorted_files(message["files"]), **given, **options)
            text = ""
            with closing(pieces):  # also when the stop button or a closed page ends this generator
                for piece in pieces:
                    text += piece
                    yield text
        except InternVLError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def leave(request: gr.Request) -> None:
        tabs.pop(request.session_hash or "", None)

    page = gr.ChatInterface(
        answer,
        multimodal=True,
        title=TITLE,
        textbox=gr.MultimodalTextbox(
            file_count="multiple", file_types=["image", "video"], placeholder="Ask, with or without pictures or a video"
        ),
        additional_inputs=[
            gr.Slider(1, MOST_TILES, value=most, step=1, label="Tiles a picture at most"),
            gr.Slider(1, 4096, value=DEFAULT_NEW_TOKENS, step=1, label="New tokens at most"),
        ],
        analytics_enabled=False,
    )
    with page:
        page.unload(leave)
    return page
