"""The commands of python -m runtime, one file each: arguments, one call, the printed result."""
