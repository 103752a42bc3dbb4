"""`python -m smi` is the command `smi`."""

from .cli.main import main

main()
