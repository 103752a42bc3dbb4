"""Layers of a frozen Vision Transformer, made of the operations: by the dispatcher, in C++ on the CPU, and passes through the latter recorded."""
