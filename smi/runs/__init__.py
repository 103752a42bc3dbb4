"""The folder of a run: what was asked, one shard per batch, checkpoints within a batch, and leases by which several processes share it."""
