"""A module of ours around a network, known by its type and never by its attributes."""

from torch import nn


class Wrapper(nn.Module):
    """A module that changes what a network is given; layer names leave it out.

    Attributes:
        network: The network inside.
    """

    network: nn.Module
