"""python -m runtime {chat,info} FOLDER: one question answered as it is written, or what a model folder holds."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import InternVLError, PromptError
from runtime.folder import CONFIG_FILE, PART_FILES, PARTS, bytes_of, check_folder

DEFAULT_NEW_TOKENS = 256


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m runtime", description="Ask a model folder that python -m convert wrote.")
    commands = p.add_subparsers(dest="command", required=True)
    chat = commands.add_parser("chat", help="answer one question, about pictures or not")
    chat.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")
    chat.add_argument("question", metavar="QUESTION", help="what to ask; <image> marks where a picture stands")
    chat.add_argument("--image", metavar="FILE", type=Path, action="append", default=[], help="picture; may be given several times")
    chat.add_argument("--max-tiles", type=int, metavar="N", help="tiles a picture at most (default: the model's, often 12)")
    chat.add_argument("--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help="(default: %(default)s)")
    chat.add_argument("--device", default="CPU", help="OpenVINO device, like CPU, GPU or AUTO (default: %(default)s)")
    info = commands.add_parser("info", help="what a model folder holds")
    info.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")
    return p


def chat(folder: Path, question: str, image: list[Path], max_tiles: int | None, max_new_tokens: int, device: str) -> None:
    """Stream the answer to standard output, then a line of statistics to standard error."""
    from dataclasses import replace

    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerFast, TextStreamer

    from runtime.image import Tiling, cut_tiles, open_picture
    from runtime.model import OVInternVLChatModel
    from runtime.prompt import IMAGE_MARK

    if not question.strip():
        raise PromptError("the question is empty: write one")
    if max_new_tokens < 1:
        raise PromptError(f"max new tokens {max_new_tokens} is not positive")
    model = OVInternVLChatModel(folder, device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tiling = Tiling.of(model.config)
    if max_tiles is not None:
        if max_tiles < 1:
            raise PromptError(f"max tiles {max_tiles} is not positive")
        tiling = replace(tiling, max_tiles=max_tiles, min_tiles=min(tiling.min_tiles, max_tiles))
    started = time.monotonic()
    cut = [cut_tiles(open_picture(path), tiling) for path in image]
    pixels = torch.from_numpy(np.concatenate(cut)) if cut else None
    if cut and IMAGE_MARK not in question:
        question = f"{IMAGE_MARK}\n" * len(cut) + question

    class Timed(TextStreamer):
        first: float | None = None
        tokens = -1  # the first put is the prompt's

        def put(self, value: torch.Tensor) -> None:
            self.tokens += 1
            if self.tokens == 1:
                self.first = time.monotonic()
            super().put(value)

    streamer = Timed(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": streamer}
    model.chat(tokenizer, pixels, question, options, num_patches_list=[len(tiles) for tiles in cut])
    first = (streamer.first or time.monotonic()) - started
    later = time.monotonic() - started - first
    speed = f"{(streamer.tokens - 1) / later:.1f} tokens/s after it" if streamer.tokens > 1 else "no further ones"
    print(f"{sum(map(len, cut))} tiles, first token after {first:.2f} s, {speed}", file=sys.stderr)


def info(folder: Path) -> None:
    """Print what a model folder holds."""
    from runtime.config import InternVLConfig, read_config

    check_folder(folder)
    config = InternVLConfig.from_dict(read_config(folder / CONFIG_FILE))
    tiles = f"{config.min_tiles} to {config.max_tiles}" if config.dynamic_image_size else "1"
    rows = {
        "folder": folder,
        "language model": f"{config.language_architecture}, {config.language.get('num_hidden_layers')} layers",
        "vision model": f"InternViT, {config.vision.num_hidden_layers} layers of {config.vision.hidden_size}",
        "template": config.template,
        "tiles": f"{tiles} of {config.tile_size} pixels, {config.tokens_per_tile} tokens each",
        **{part: f"{bytes_of(folder, part) / 1e6:.1f} MB  {PART_FILES[part]}" for part in PARTS},
    }
    for name, value in rows.items():
        print(f"{name:<16} {value}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    try:
        command = options.pop("command")
        chat(**options) if command == "chat" else info(**options)
    except InternVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def chat_main() -> int:
    """`internvl-chat ...` is `python -m runtime chat ...`."""
    return main(["chat", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
