"""Adapts a network's weights to a metric of its own maps."""
