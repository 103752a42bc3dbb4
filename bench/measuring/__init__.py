"""Measurements: operations, steps and whole runs, memory; rows appended to result files."""
