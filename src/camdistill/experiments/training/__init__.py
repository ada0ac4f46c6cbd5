"""Trains from a config: Lightning's command line, run folders, arms and seeds."""
