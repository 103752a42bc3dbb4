"""Layers of a frozen Vision Transformer made of the operations: by the dispatcher, in C++, and the recorded pass."""
