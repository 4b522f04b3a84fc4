"""A Gradio page over an opened model: one chat box for questions and pictures, answers streamed, a stop that stops.

Knows the page; prompts, tiles and generation are the runtime's. Pictures of earlier turns stay in the conversation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from runtime.chat import ChatModel
from runtime.errors import InternVLError
from runtime.image import Tiling, cut_tiles, open_picture
from runtime.prompt import IMAGE_MARK, Turn

DEFAULT_NEW_TOKENS = 512
MOST_TILES = 12
TITLE = "InternVL on OpenVINO"


class _Stop(StoppingCriteria):
    """Ends the decoding of an answer that nobody waits for any more."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set())


def parts_of(content: Any) -> tuple[str, list[Path]]:
    """Text and picture files of one message as Gradio keeps it: a string, or a list of text and file parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
    files = [Path(part["file"]["path"]) for part in parts if isinstance(part, dict) and part.get("file")]
    return "\n".join(text for text in texts if text), files


def marked(text: str, pictures: list[Path]) -> str:
    """The text with a mark for each of its pictures, in front unless the user placed them."""
    return text if IMAGE_MARK in text else f"{IMAGE_MARK}\n" * len(pictures) + text


def turns_of(history: list[dict[str, Any]]) -> tuple[list[Turn], list[Path]]:
    """Gradio's messages -> (question, answer) turns with picture marks, and the pictures of all of them in order."""
    turns: list[Turn] = []
    pictures: list[Path] = []
    asked: list[str] = []
    for message in history:
        text, files = parts_of(message["content"])
        if message["role"] == "user":
            asked.append(marked(text, files))
            pictures += files
        else:
            turns.append(("\n".join(asked), text))
            asked = []
    return turns, pictures


def make_demo(model: ChatModel, tokenizer: PreTrainedTokenizerBase) -> gr.ChatInterface:
    """The page as Gradio blocks, to launch; one answer is generated at a time, others wait their turn."""
    busy = threading.Lock()
    most = min(MOST_TILES, Tiling.of(model.config).max_tiles)

    def answer(message: dict[str, Any], history: list[dict[str, Any]], max_tiles: float, max_new_tokens: float) -> Iterator[str]:
        try:
            turns, pictures = turns_of(history)
            files = [Path(file) for file in message["files"]]
            tiling = Tiling(model.config.tile_size, 1, int(max_tiles), model.config.use_thumbnail)
            cut = [cut_tiles(open_picture(path), tiling) for path in [*pictures, *files]]
            pixels = torch.from_numpy(np.concatenate(cut)) if cut else None
            question = marked(message["text"], files)
        except InternVLError as error:
            raise gr.Error(str(error), print_exception=False) from None
        streamer, stop = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), _Stop()
        failed: list[Exception] = []

        def generate() -> None:
            options = {"max_new_tokens": int(max_new_tokens), "do_sample": False, "streamer": streamer}
            options["stopping_criteria"] = StoppingCriteriaList([stop])
            try:
                model.chat(tokenizer, pixels, question, options, history=turns, num_patches_list=[len(tiles) for tiles in cut])
            except Exception as error:  # carried to the page, where it is raised again
                failed.append(error)
                streamer.end()

        with busy:
            thread = threading.Thread(target=generate, daemon=True)
            thread.start()
            try:
                text = ""
                for piece in streamer:
                    text += piece
                    yield text
            finally:  # also when the stop button or a closed page ends this generator
                stop.asked.set()
                thread.join()
        if failed and isinstance(failed[0], InternVLError):
            raise gr.Error(str(failed[0]), print_exception=False)
        if failed:
            raise failed[0]

    return gr.ChatInterface(
        answer,
        multimodal=True,
        title=TITLE,
        textbox=gr.MultimodalTextbox(file_count="multiple", file_types=["image"], placeholder="Ask, with or without pictures"),
        additional_inputs=[
            gr.Slider(1, MOST_TILES, value=most, step=1, label="Tiles a picture at most"),
            gr.Slider(1, 4096, value=DEFAULT_NEW_TOKENS, step=1, label="New tokens at most"),
        ],
        analytics_enabled=False,
    )
