"""The sides of every comparison: ours, eager (research code), compiled (the best of stock PyTorch), and plain operations."""
