"""The options of a conversion: one dataclass, checked in one place. Knows no models and no files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from runtime.errors import OptionError

FORMATS = ("fp32", "fp16", "int8", "int4")
W8A8 = "w8a8"  # of the vision part: weights and activations in 8 bits
AUTO = "auto"  # of the vision part, with int4: w8a8 if held-out pictures prove it, else int8
VISION_FORMATS = (AUTO, *FORMATS, W8A8)
BACKUP_PRECISIONS = ("none", "int8_sym", "int8_asym")
GROUP = 128  # of int4 by rounding


@dataclass(frozen=True)
class Recipe:
    """int4 of a language part: the size of a quantisation group, and the names of the matrices that are int8.

    Errors of the later layers cost answers the most: `late_in_8_bits` are names from a third of the depth on. The head is int8,
    or, with `exchanged`, in four bits, and the bytes that this saves make the last layers int8.
    """

    group: int
    in_8_bits: str = r"^$"
    late_in_8_bits: str = r"^$"
    exchanged: bool = False
    last_in_8_bits: int = 0  # layers; of a checkpoint, see recipe.exchange

    def spares(self, name: str, depth: int) -> bool:
        """Whether the matrix `layers.N...` of a decoder of `depth` layers is int8."""
        layer = int(name.split(".")[1])
        late = 3 * layer >= depth and re.search(self.late_in_8_bits, name)
        return bool(layer >= depth - self.last_in_8_bits or late or re.search(self.in_8_bits, name))


RECIPES = {  # docs/quality.md lists what was tried
    "default": Recipe(64, r"\.[kv]_proj$", r"\.o_proj$"),
    "small": Recipe(128),
    "exact": Recipe(32, r"\.[kv]_proj$", r"\.o_proj$", exchanged=True),
}
DEFAULT, FAST = "default", "fast"  # fast: rounding to the nearest, without calibration
SEARCHED = (128, 64, 32)  # quantisation groups that a search tries
NNCFS = ("sym", "ratio", "backup_precision", "awq", "scale_estimation")  # options of NNCF's own algorithms


def check_packed(options: ConvertOptions, recipe: str, with_lora: list[str]) -> None:
    """Raise OptionError for options that a checkpoint packed by `recipe`, with LoRA beside some matrices, does not allow."""
    wish, plain = options.weight_format, ConvertOptions()
    if wish == "fp32":
        raise OptionError(
            f"the checkpoint is packed ({recipe}): --weight-format int4 keeps its numbers, int8 and fp16 unpack them, "
            f"{wish} adds nothing"
        )
    if wish == "int4" and with_lora:
        raise OptionError(
            f"the checkpoint is packed ({recipe}), and training left LoRA beside {len(with_lora)} packed matrices, like "
            f"{with_lora[0]}: int4 keeps their numbers and cannot merge it; --weight-format int8 or fp16 unpacks and merges"
        )
    own = ("group_size", "ratio", "sym", "awq", "scale_estimation")
    given = ["--" + name.replace("_", "-") for name in own if getattr(options, name) != getattr(plain, name)]
    if wish == "int4" and (given or options.adapter):
        what = ", ".join([*given, *(["--adapter"] if options.adapter else [])])
        raise OptionError(
            f"the checkpoint is packed ({recipe}), int4 keeps its numbers: leave out {what}, or unpack with --weight-format int8"
        )


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. NNCF's options have optimum-cli's names and meanings."""

    weight_format: str = "int4"  # of the language part; `formats` derives the other parts' from it
    vision_weight_format: str = AUTO
    text_embeddings_weight_format: str | None = None
    recipe: str | None = None  # of int4 in the language part: RECIPES, or fast; None is default
    max_loss: float | None = None  # mean KL a token; the smallest recipe of the language part within it is searched
    minutes: float = 30.0  # of that search
    group_size: int | None = None  # int4 weights that share a scale; -1 is one scale a row; None is the recipe's
    ratio: float = 1.0  # share of int4 layers; the rest has the backup precision
    sym: bool = False  # symmetric: no zero points
    backup_precision: str = "int8_asym"  # of int4's embedding table, head and layers left out by ratio
    awq: bool = False  # activation-aware scaling; without a dataset it uses the weights alone
    scale_estimation: bool = False  # fit scales to activations; needs a dataset
    dataset: str | None = None  # folder of pictures to calibrate on; PICTURE.txt next to PICTURE.jpg is its question
    num_samples: int = 32  # maximum number of pictures of the dataset
    template: str | None = None  # conversation template; None: named in config.json
    system_message: str | None = None  # None: the one the model was trained with
    adapter: str | None = None  # folder of a LoRA adapter to merge
    verify: bool = True  # compare the parts with the PyTorch path before the folder appears
    reference_cache: str | None = None  # folder that keeps the PyTorch path's answers for later conversions of this checkpoint
    serving: str | None = None  # ovms: the output is a repository for OpenVINO Model Server, which contains the model folder
    force: bool = False  # replace an existing model folder
    revision: str | None = None  # of a hub repository: branch, tag or commit
    token: str | None = None  # hub access token; None uses the stored login
    cache_dir: str | None = None  # hub cache folder; None is the hub's default

    def __post_init__(self) -> None:
        for name in ("weight_format", "vision_weight_format", "text_embeddings_weight_format"):
            value = getattr(self, name)
            known = VISION_FORMATS if name == "vision_weight_format" else FORMATS
            if value is not None and value not in known:
                raise OptionError(f"{name} {value!r} is not known; known are {', '.join(known)}")
        known_recipes = (*RECIPES, FAST)
        if self.recipe not in (None, *known_recipes):
            raise OptionError(f"recipe {self.recipe!r} is not known; known are {', '.join(known_recipes)}")
        self._check_search()
        if self.recipe in ("small", "exact") and self._asks_nncf:
            raise OptionError(f"recipe {self.recipe} cannot use {', '.join(self._asks_nncf)}: leave one out")
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise OptionError(f"group size {self.group_size} is neither positive nor -1 (one scale a row)")
        if not 0 <= self.ratio <= 1:
            raise OptionError(f"ratio {self.ratio} is not between 0 and 1")
        if self.backup_precision not in BACKUP_PRECISIONS:
            raise OptionError(f"backup precision {self.backup_precision!r} is not known; known are {', '.join(BACKUP_PRECISIONS)}")
        if self.scale_estimation and not self.dataset:
            raise OptionError("scale estimation needs activations: give a folder of pictures with --dataset")
        may_see = self.vision_weight_format == W8A8 or (self.vision_weight_format == AUTO and self.weight_format == "int4")
        if self.dataset and not (self.calibrates_language or may_see):
            raise OptionError(
                "the dataset is not used: leave it out; only w8a8, --awq, --scale-estimation and a --ratio below 1 calibrate on it"
            )
        if self.reference_cache and not self.verify and self.max_loss is None:
            raise OptionError("the reference cache is not used without the proof: leave out --no-verify")
        if self.num_samples < 1:
            raise OptionError(f"num samples {self.num_samples} is not positive")
        if self.weight_format != "int4" and (self.awq or self.scale_estimation or self.ratio != 1):
            raise OptionError(f"awq, scale estimation and ratio are for weight format int4, not {self.weight_format}")

    def _check_search(self) -> None:
        if self.max_loss is None:
            if self.minutes != type(self).minutes:
                raise OptionError("the minutes are those of a search: give the loss with --max-loss, or leave them out")
            return
        if self.weight_format != "int4":
            raise OptionError(f"max loss is for weight format int4, not {self.weight_format}: leave one out")
        own = [*(["--recipe"] if self.recipe else []), *(["--group-size"] if self.group_size is not None else []), *self._asks_nncf]
        if own:
            raise OptionError(f"max loss searches the recipe: leave out {', '.join(own)}")
        if not self.max_loss > 0:
            raise OptionError(f"max loss {self.max_loss} is not above 0: give a mean KL a token, like 0.01")
        if not self.minutes > 0:
            raise OptionError(f"minutes {self.minutes:g} is not above 0: give the time that the search may take, like 30")

    @property
    def _asks_nncf(self) -> list[str]:
        return ["--" + name.replace("_", "-") for name in NNCFS if getattr(self, name) != getattr(type(self), name)]

    @property
    def by_inputs(self) -> Recipe | None:
        """The recipe that calibrates int4 of the language part on the matrices' inputs; None where NNCF compresses it."""
        if self.weight_format != "int4" or self.recipe == FAST or self._asks_nncf:
            return None
        if self.max_loss is not None:
            return Recipe(SEARCHED[-1])  # the least that every matrix must allow; the search finds the rest
        recipe = RECIPES[self.recipe or DEFAULT]
        return recipe if self.group_size is None else replace(recipe, group=self.group_size)

    @property
    def nncf_group(self) -> int:
        """The size of a quantisation group where NNCF rounds to int4."""
        return GROUP if self.group_size is None else self.group_size

    @property
    def calibrates_language(self) -> bool:
        """Whether NNCF compresses the language part with activations."""
        return self.dataset is not None and not self.looks_once

    @property
    def looks_once(self) -> bool:
        """Whether compressing a matrix needs only the matrix itself."""
        return not (self.awq or self.scale_estimation or self.ratio < 1)

    def formats(self, parts: Iterable[str], *, vision_is_6b: bool) -> dict[str, str]:
        """The weight format of each part; `AUTO` for a vision part whose w8a8 is to be proven.

        An InternViT-6B of a chat model is int8: finding the ranges of its activations takes minutes. A router part's format is
        that of its projector.
        """
        small = {"int4": "int8"}.get(self.weight_format, self.weight_format)
        vision = AUTO if self.weight_format == "int4" and not vision_is_6b else small
        chosen = {
            "text_embeddings": self.text_embeddings_weight_format or small,
            "vision": vision if self.vision_weight_format == AUTO else self.vision_weight_format,
            "router": small,
            "language": self.weight_format,
        }
        return {part: chosen[part] for part in parts}
