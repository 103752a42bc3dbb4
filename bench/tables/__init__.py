"""Rows of result files as tables and plots."""
