"""One turn of a conversation: a question and its answer.

Opens the pictures and video of a question, cuts them into tiles and inserts their marks. Knows no tokens and no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from PIL import Image

from runtime.answer.prompt import IMAGE_MARK, check_question, frame_marks, picture_marks, typed
from runtime.errors import PromptError
from runtime.folder.config import InternVLConfig
from runtime.folder.tokenizer import Typed
from runtime.media.document import open_pictures
from runtime.media.picture import Source
from runtime.media.tiles import PictureTiles, Tiling
from runtime.media.video import DEFAULT_SEGMENTS, Bound, read_frames
from runtime.progress import Progress

MARK_NAME = re.compile(r"(Image-\d+|Frame\d+): ?$", re.IGNORECASE)  # the name before a mark


@dataclass(frozen=True)
class Question:
    """A question with its pictures and video.

    `images` are what runtime.media.document.open_pictures takes, PDFs page by page, cut into at most `max_tiles` tiles each (plus a
    thumbnail). They replace the `<image>` marks of the text, or come before the text. `num_segments` frames of `video`, within its
    seconds `bound`, come first, one tile each. `allow_urls` off refuses web addresses. `answer_prefix` begins the answer, as
    if the model had written it. `locate` names things ("the red car") whose boxes are asked for, after the text if there is one.
    """

    text: str = ""
    images: Source | Sequence[Source] = ()
    video: str | Path | None = None
    max_tiles: int | None = None
    num_segments: int = DEFAULT_SEGMENTS
    bound: Bound | None = None
    allow_urls: bool = True
    answer_prefix: str = ""
    locate: str | Sequence[str] = ()

    def pictures(self, config: InternVLConfig, progress: Progress | None = None) -> tuple[list[Image.Image], list[Image.Image]]:
        """The frames of the video and the pictures, as given, upright.

        `progress` reports the frames. Raises PictureError, VideoError, OptionError.
        """
        tiling = Tiling.of(config).at_most(self.max_tiles)
        frames = [] if self.video is None else read_frames(self.video, self.num_segments, self.bound, progress)
        several = self.images if isinstance(self.images, list | tuple) else [self.images]
        opened = [open_pictures(one, tiling, allow_urls=self.allow_urls) for one in several]  # type: ignore[arg-type]
        return frames, [picture for each in opened for picture in each]

    def open(self, config: InternVLConfig, progress: Progress | None = None) -> Turn:
        """The turn without its answer: the pictures opened and cut, and a mark in the question for each.

        ChatCore.open_turn writes `locate` into the text. `progress` reports the frames. Raises PictureError, VideoError,
        PromptError, OptionError.
        """
        check_question(self.text)
        return self.about(*self.cut(config, progress))

    def cut(self, config: InternVLConfig, progress: Progress | None = None) -> tuple[list[PictureTiles], list[PictureTiles]]:
        """The frames and the pictures, opened and cut into tiles. Raises PictureError, VideoError, OptionError."""
        tiling = Tiling.of(config).at_most(self.max_tiles)
        frames, pictures = self.pictures(config, progress)
        shown = [PictureTiles.of_picture(frame, tiling.at_most(1)) for frame in frames]
        return shown, [PictureTiles.of_picture(picture, tiling) for picture in pictures]

    def about(self, frames: list[PictureTiles], pictures: list[PictureTiles]) -> Turn:
        """The turn about frames and pictures that are cut. Raises PromptError."""
        marks = picture_marks(len(pictures)) if pictures and IMAGE_MARK not in self.text else ""
        pieces = typed(frame_marks(len(frames)), marks=True) + typed(marks + self.text, marks=bool(pictures))
        return Turn.of(pieces, self.answer_prefix, [*frames, *pictures])


@dataclass
class Turn:
    """One turn: the question with its picture marks, the answer, and the pictures of the marks in order.

    In the turn being asked, `answer` is the answer prefix. `tokens` are the generated tokens of the answer; they are ignored once
    the answer is edited. `marks` are the parts of the question that are not typed, with their positions: all else is plain text.
    Without `marks`, or once the question is edited, its `<image>` marks are these, if there are pictures. An `unasked` turn has no
    question.
    """

    question: str
    answer: str
    pictures: list[PictureTiles]
    tokens: list[int] = field(default_factory=list)
    marks: tuple[tuple[int, str], ...] | None = None
    unasked: bool = False

    @classmethod
    def of(cls, pieces: Sequence[str], answer: str, pictures: list[PictureTiles]) -> Turn:
        """The turn of a question in pieces; untyped pieces are marks. Raises PromptError when marks and pictures do not match."""
        places = accumulate(map(len, pieces), initial=0)
        marks = tuple((at, str(piece)) for at, piece in zip(places, pieces, strict=False) if not isinstance(piece, Typed))
        made = cls("".join(pieces), answer, pictures, marks=marks, unasked=not pieces)
        made.pieces()
        return made

    def pieces(self) -> list[str]:
        """The question in pieces, with typed text as Typed. Raises PromptError when marks and pictures do not match."""
        pieces = typed(self.question, marks=bool(self.pictures))
        if self.marks is not None and all(self.question.startswith(mark, at) for at, mark in self.marks):
            pieces, before = [], 0
            for at, mark in self.marks:
                pieces += [Typed(self.question[before:at]), mark]
                before = at + len(mark)
            pieces.append(Typed(self.question[before:]))
        count = sum(piece == IMAGE_MARK and not isinstance(piece, Typed) for piece in pieces)
        if count != len(self.pictures):
            raise PromptError(
                f"the question has {count} {IMAGE_MARK} marks for {len(self.pictures)} pictures: write one mark a picture, or none"
            )
        return [] if self.unasked else pieces


def picture_names(turns: Sequence[Turn]) -> tuple[dict[str, int], str]:
    """The names of all pictures of a conversation, in lower case, with their index; and the last question without its marks.

    A name comes before a mark ("Image-2: <image>"), and means the last picture with it. All pictures except frames are also
    numbered, for those without a name.
    """
    names: dict[str, int] = {}
    shown: list[int] = []
    asked, count = "", 0
    for turn in turns:
        asked, before = "", ""
        for piece in turn.pieces():
            if isinstance(piece, Typed):
                before = piece
                asked += piece
                continue
            if named := MARK_NAME.search(before):
                names[named[1].lower()] = count
                asked = asked[: len(asked) - len(named[0])]
            if named is None or not named[1].startswith("Frame"):
                shown.append(count)
            count += 1
    return {f"image-{number}": index for number, index in enumerate(shown, 1)} | names, asked
