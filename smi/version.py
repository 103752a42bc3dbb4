"""The version, stated once more in pyproject.toml for the build; a test compares the two."""

__version__ = "0.1.0"
