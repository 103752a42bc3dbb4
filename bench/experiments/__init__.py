"""Single questions measured once: int8 models, agreement of engines, attention on the CPU."""
