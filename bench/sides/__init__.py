"""What is compared: `ours`, `eager`, a step as research code writes it, and `compiled`, the best that stock PyTorch gives.

All three compute the published step (augmented forward on the active patches, cross-entropy and total variation, pixel gradient, Adam, clip) from the
same start; tests/bench/sides/test_baselines.py shows that losses and pixels agree. The two baselines differ in how:

| | eager | compiled |
| --- | --- | --- |
| weights | float32, requiring grad: backward computes their gradients | frozen, bfloat16 where GEMMs are faster in it |
| patch embedding | convolution of the whole rolled and flipped image, then a gather of tokens | a gather of the active patches' pixels, one GEMM |
| attention | q k^T, softmax, v, each matrix saved in a list | scaled_dot_product_attention, no matrix saved |
| total variation, Adam, clip | autograd and torch.optim.Adam on whole images | one compiled function of whole images |
| host | `.item()` at every step | nothing: on CUDA one captured graph, the augmentation read from a device table |
"""
