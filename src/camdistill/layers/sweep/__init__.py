"""One pass over a data set that accumulates statistics of every layer."""
