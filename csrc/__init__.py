"""C++ for the CPU and CUDA C++, and how both are compiled. Installed as smi.csrc."""
