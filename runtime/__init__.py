"""Model folder -> answers: the format of a model folder and everything needed to use one."""

__version__ = "0.1.0"
