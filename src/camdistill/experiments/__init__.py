"""Experiments of many runs, a package each."""
