"""Experiments that need many runs, one package for each kind."""
