"""PTX on the CPU with numpy: a parser, memory, a block's state, the instructions, a launch."""
