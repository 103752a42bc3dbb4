"""Data-free inversion of Vision Transformers."""
