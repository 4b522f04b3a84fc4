"""A small InternVL that really sees: drawn scenes, the training on them, the shipped checkpoint, and its exam."""
