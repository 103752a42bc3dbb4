"""Operations of a frozen Vision Transformer, each with its versions. Imported as smi.kernels."""
