"""Sections: parts of a long measurement, each a process with its own limit. What one finished is on disk, and the next call goes on."""
