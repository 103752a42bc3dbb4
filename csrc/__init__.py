"""CUDA C++ sources, and how they are built. Installed as smi.csrc."""
