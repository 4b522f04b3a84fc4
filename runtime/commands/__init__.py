"""The commands of python -m runtime, a file each: arguments, one call, what is printed."""
