"""One pass over a data set, and what it accumulates for every layer."""
