"""The statistics of a sweep, one module for each."""
