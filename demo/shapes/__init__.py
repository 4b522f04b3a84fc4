"""A small InternVL that sees: drawn scenes, the training on them, the shipped checkpoint, and its exam."""
