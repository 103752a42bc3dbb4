"""Sparse images: the result type, its format on disk, export, and how models read it."""
