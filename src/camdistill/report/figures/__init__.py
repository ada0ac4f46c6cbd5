"""Figures: arrays in, pictures out. Only these modules import matplotlib."""
