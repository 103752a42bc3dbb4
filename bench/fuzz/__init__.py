"""The fuzzer: random models, settings and damaged files, which the package is to compute or to refuse in one sentence. Nothing is fetched."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's library is imported
