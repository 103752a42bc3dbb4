"""What images are worth downstream, the papers' tables: `python -m bench.evidence`."""
