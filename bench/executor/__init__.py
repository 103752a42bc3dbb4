"""Compiled kernels, executed on the CPU: `python -m bench.executor` (README.md says what is modelled)."""
