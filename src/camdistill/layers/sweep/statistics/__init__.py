"""The statistics of a sweep, a module each."""
