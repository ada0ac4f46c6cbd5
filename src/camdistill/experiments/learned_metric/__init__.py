"""A metric of maps, learned from rankings."""
