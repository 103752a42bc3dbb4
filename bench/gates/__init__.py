"""What the regression gates compare: exact numbers, ratios, GPU times, compiled kernels."""
