"""Many images asked in forwards of bounded size."""

import pytest
import torch

from camdistill.networks.students import ShallowCNN
from camdistill.perturb.batched_forward import forward_in_chunks


def test_parts_have_the_answers_and_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """By images and by weights, in float64, with a last part that is smaller."""
    monkeypatch.setattr("camdistill.perturb.batched_forward._PIXELS_ON_CPU", 4 * 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ShallowCNN(3, (4, 5), (1, 2)).eval().double()
        images = torch.rand(10, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    sizes = []

    def ask(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        assert part.is_contiguous(memory_format=torch.channels_last)
        return network(part)  # type: ignore[no-any-return]

    found, expected = forward_in_chunks(ask, images), network(images)
    assert sizes == [4, 4, 2]
    torch.testing.assert_close(found, expected)
    inputs = [images, *network.parameters()]
    weight = torch.linspace(-1, 1, 30, dtype=torch.float64).view(10, 3)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
