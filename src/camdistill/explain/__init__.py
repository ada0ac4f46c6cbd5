"""An image and a network in, maps out."""
