"""The engine's step on a GPU that is not there: its launches recorded on fake CUDA tensors, its time modelled kernel by kernel."""
