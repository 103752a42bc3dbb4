"""`python -m smi` is the command `smi`."""

from .cli import main

main()
