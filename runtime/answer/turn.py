"""One turn of a dialogue: what is asked, and what became of it.

A question with its pictures and video is opened, cut into tiles and given its marks here. Knows no tokens and no model.
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

MARK_NAME = re.compile(r"(Image-\d+|Frame\d+): ?$", re.IGNORECASE)  # before a mark


@dataclass(frozen=True)
class Question:
    """A question and what it is about.

    `images` are what runtime.media.document.open_pictures takes, PDFs page by page, cut into at most `max_tiles` tiles each (and
    a thumbnail). They stand at the `<image>` marks of the text, or before it. Of `video`, `num_segments` frames of its seconds
    `bound` stand before that, one tile each. `allow_urls` off refuses web addresses. `answer_prefix` is what the answer begins
    with, given to the model as if it had written it. The boxes of the things in `locate` ("the red car") are asked for, behind the
    text if there is one.
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
        """The frames of the video and the pictures, as they were given, upright.

        `progress` hears of the frames. Raises PictureError, VideoError, OptionError.
        """
        tiling = Tiling.of(config).at_most(self.max_tiles)
        frames = [] if self.video is None else read_frames(self.video, self.num_segments, self.bound, progress)
        several = self.images if isinstance(self.images, list | tuple) else [self.images]
        opened = [open_pictures(one, tiling, allow_urls=self.allow_urls) for one in several]  # type: ignore[arg-type]
        return frames, [picture for each in opened for picture in each]

    def open(self, config: InternVLConfig, progress: Progress | None = None) -> Turn:
        """The turn without its answer: the pictures opened and cut, and a mark in the question for each.

        `locate` is written into the text by ChatCore.open_turn. `progress` hears of the frames. Raises PictureError, VideoError,
        PromptError, OptionError.
        """
        check_question(self.text)
        return self.about(*self.cut(config, progress))

    def cut(self, config: InternVLConfig, progress: Progress | None = None) -> tuple[list[PictureTiles], list[PictureTiles]]:
        """The frames and the pictures, opened and cut. Raises PictureError, VideoError, OptionError."""
        tiling = Tiling.of(config).at_most(self.max_tiles)
        frames, pictures = self.pictures(config, progress)
        shown = [PictureTiles.of_picture(frame, tiling.at_most(1)) for frame in frames]
        return shown, [PictureTiles.of_picture(picture, tiling) for picture in pictures]

    def about(self, frames: list[PictureTiles], pictures: list[PictureTiles]) -> Turn:
        """The turn about what was cut. Raises PromptError."""
        marks = picture_marks(len(pictures)) if pictures and IMAGE_MARK not in self.text else ""
        pieces = typed(frame_marks(len(frames)), marks=True) + typed(marks + self.text, marks=bool(pictures))
        return Turn.of(pieces, self.answer_prefix, [*frames, *pictures])


@dataclass
class Turn:
    """One turn: the question with its picture marks, the answer, and the pictures of the marks in order.

    An answer of the turn that is asked is the prefix of the one that comes.
    `tokens` are those that the model wrote as the answer; where the answer is edited they count no more. `marks` are the parts of
    the question that are ours, with their places: all else is text, whatever it looks like. Without them, or where the question
    was edited, these are its `<image>` marks, if there are pictures. A turn that is `unasked` has an answer alone.
    """

    question: str
    answer: str
    pictures: list[PictureTiles]
    tokens: list[int] = field(default_factory=list)
    marks: tuple[tuple[int, str], ...] | None = None
    unasked: bool = False

    @classmethod
    def of(cls, pieces: Sequence[str], answer: str, pictures: list[PictureTiles]) -> Turn:
        """The turn of a question in pieces; what is not Typed is ours. Raises PromptError when marks and pictures do not fit."""
        places = accumulate(map(len, pieces), initial=0)
        marks = tuple((at, str(piece)) for at, piece in zip(places, pieces, strict=False) if not isinstance(piece, Typed))
        made = cls("".join(pieces), answer, pictures, marks=marks, unasked=not pieces)
        made.pieces()
        return made

    def pieces(self) -> list[str]:
        """The question, in which what somebody wrote is Typed. Raises PromptError when marks and pictures do not fit."""
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
    """The names of all pictures of a dialogue, in lower case, with their index; and the last question without its marks.

    A name stands before a mark ("Image-2: <image>"); the last picture that has it is meant. Pictures that are no frames are
    numbered through for those that have no name of their own.
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
