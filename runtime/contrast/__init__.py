"""Vectors instead of answers: InternVL-C and -G compare pictures and texts, InternViT gives features. On NumPy."""
