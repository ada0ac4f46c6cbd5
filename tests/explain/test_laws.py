"""What holds for Grad-CAM whatever the network and the images."""

import pytest
import torch
from cam_oracles import close, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camdistill.explain.gradcam import explain_images, grad_cam
from camdistill.networks.students import ShallowCNN

seeds = st.integers(0, 10_000)
numbers = st.floats(-3, 3).filter(lambda value: abs(value) > 0.01)
few = settings(max_examples=15, deadline=None)


def network_of(seed: int, head: str = "linear") -> nn.Module:
    """Two stages and a head that is closed, reads only the mean, or neither."""

    def build() -> nn.Module:
        trunk = ShallowCNN(4, (5, 6), (1, 2))
        heads: dict[str, list[nn.Module]] = {
            "linear": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)],
            "pooled": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7), nn.GELU()],
            "spatial": [nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)],
        }
        if head == "pooled":
            heads[head].append(nn.Linear(7, 4))
        network = nn.Sequential(trunk.stage1, trunk.stage2, *heads[head])
        network.eval()(torch.zeros(1, 3, 10, 8))
        return network

    return seeded(build, seed).double().eval()


def images_of(seed: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 10, 8, generator=generator, dtype=torch.float64)


heads = st.sampled_from(["linear", "pooled", "spatial"])
LAYERS = ["0", "1"]


@few
@given(seeds, heads, numbers, numbers)
def test_maps_are_linear_in_the_score(seed: int, head: str, first: float, second: float) -> None:
    network, images = network_of(seed, head), images_of(seed)
    several = grad_cam(network, images, LAYERS, torch.tensor([[1, 3]]).expand(3, 2))
    mixed = grad_cam(network, images, LAYERS, score=lambda y: first * y[:, 1] + second * y[:, 3])
    for layer in LAYERS:
        close(mixed[layer], first * several[layer][:, 0] + second * several[layer][:, 1], 1e-10)


@few
@given(seeds, heads, st.permutations(range(3)))
def test_maps_follow_a_permutation_of_the_batch(seed: int, head: str, order: list[int]) -> None:
    network, images = network_of(seed, head), images_of(seed)
    classes = torch.tensor([0, 2, 3])
    straight = grad_cam(network, images, LAYERS, classes)
    moved = grad_cam(network, images[order], LAYERS, classes[order])
    for layer in LAYERS:
        close(moved[layer], straight[layer][order], 1e-11)


@few
@given(seeds, heads, st.permutations(range(5)))
def test_the_order_of_units_does_not_matter(seed: int, head: str, order: list[int]) -> None:
    network, twin, images = network_of(seed, head), network_of(seed, head), images_of(seed)
    with torch.no_grad():
        twin[0].conv.weight.copy_(network[0].conv.weight[order])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(twin[0].bn, name).copy_(getattr(network[0].bn, name)[order])
        twin[1].conv.weight.copy_(network[1].conv.weight[:, order])
    ours, theirs = (grad_cam(one, images, LAYERS, 2) for one in (network, twin))
    for layer in LAYERS:
        close(theirs[layer], ours[layer], 1e-11)


@few
@given(seeds, st.booleans())
def test_all_of_a_logit_but_its_bias_is_in_the_map_of_a_pooled_linear_head(
    seed: int, fresh: bool
) -> None:
    network, images = network_of(seed), images_of(seed)
    if not fresh:
        grad_cam(network, images, ["1"])
    found = explain_images(network, images, ["1"], torch.arange(4).expand(3, 4))
    close(found.maps["1"].sum((2, 3)), found.logits - network[4].bias.detach(), 1e-11)


@few
@given(seeds, heads, st.integers(0, 2))
def test_an_image_alone_has_the_map_it_has_among_others(seed: int, head: str, place: int) -> None:
    network, images = network_of(seed, head), images_of(seed)
    classes = torch.tensor([[0, 2], [2, 1], [3, 3]])
    whole = grad_cam(network, images, LAYERS, classes)
    one = slice(place, place + 1)
    alone = grad_cam(network, images[one], LAYERS, classes[one])
    for layer in LAYERS:
        close(alone[layer], whole[layer][one], 1e-11)


@settings(max_examples=6, deadline=None)
@given(seeds, heads)
def test_gradients_of_maps_are_their_slopes(seed: int, head: str) -> None:
    network, images = network_of(seed, head), images_of(seed, 2)
    for stage in network[:2]:
        stage.relu = nn.Softplus()  # smooth, so that differences converge
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        maps = grad_cam(network, images, LAYERS, torch.tensor([0, 3]), grad="full")
        return sum((maps[layer] * 10).square().mean() for layer in LAYERS)

    grad_cam(network, images, LAYERS)
    network.zero_grad()
    loss().backward()
    directions = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in network.parameters()
    ]
    slope = sum(
        (p.grad * d).sum()
        for p, d in zip(network.parameters(), directions, strict=True)
        if p.grad is not None
    )
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, direction in zip(network.parameters(), directions, strict=True):
                parameter += step * direction
        values.append(loss().item())
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)
