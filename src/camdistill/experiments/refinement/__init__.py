"""A network's weights adapted to a metric of its own maps."""
