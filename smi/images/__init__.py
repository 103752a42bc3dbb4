"""Sparse images: the result type, its storage, export, and the ways to feed it to a model."""
