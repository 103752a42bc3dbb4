"""Times candidate tiles on a GPU and writes its tile table: `python -m bench.tune`."""
