"""The fuzzer: random models, settings and damaged files, and whether the package computes them, or refuses them in one sentence."""
