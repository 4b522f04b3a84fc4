"""The exception tree: every mistake a user can make, each as one clear line.

A command prints the message of an `InternVLError` and exits with its `exit_code`; anything else is a bug and keeps its traceback.
"""


class InternVLError(Exception):
    """Base of all expected errors; the message says what was found, what would be right and what to do."""

    exit_code = 2


class OptionError(InternVLError):
    """An option, or a combination of options, cannot be used."""


class CheckpointError(InternVLError):
    """The checkpoint cannot be found, fetched or read, or its files contradict its configuration."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is readable but of a kind this project does not convert."""


class TokenizerError(CheckpointError):
    """The tokenizer files are missing or lack what the prompts need."""


class ModelFolderError(InternVLError):
    """A model folder is missing, incomplete, or cannot be written."""


class PictureError(InternVLError):
    """A picture cannot be found or read."""


class VideoError(InternVLError):
    """A video cannot be found or read."""


class PromptError(InternVLError):
    """A question and its pictures do not fit together, or do not fit the model."""


class DeviceError(InternVLError):
    """A device does not exist, or refuses its work."""


class NumericsError(InternVLError):
    """A part gave values that are not numbers."""


class DriftError(InternVLError):
    """The converted parts differ from the reference by more than their weight format allows."""

    exit_code = 1


def not_installed(error: ModuleNotFoundError, extra: str, instead: str = "") -> OptionError:
    """The error for a missing library that an extra of this package installs; a missing module of ours is a bug and is raised."""
    if (error.name or "").partition(".")[0] in ("runtime", "convert", "demo"):
        raise error
    return OptionError(f"{error.name} is not installed: pip install 'internvl-openvino[{extra}]'{instead}")
