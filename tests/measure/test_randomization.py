import copy

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import upsample
from camdistill.measure.randomization import (
    efficient_randomization,
    random_logit,
    smooth_randomization,
)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    return made.double().eval()


def cam(asked: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    (maps,) = grad_cam(asked, images, ["4"], classes).values()
    return upsample(maps, (16, 16))


def edge(asked: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Looks at the image and never at the network."""
    return images.mean(1).diff(dim=2, prepend=images.mean(1)[..., :1]).abs()


def test_network_is_left_alone_and_layers_come_from_the_input_on(images: Tensor) -> None:
    asked, classes = network(), torch.tensor([0, 1, 2, 3, 0])
    before = copy.deepcopy(asked.state_dict())
    found = smooth_randomization(
        cam, asked, images, classes, torch.Generator().manual_seed(1), samples=3
    )
    assert list(found) == ["0", "1", "3", "7"]
    assert all(torch.equal(before[name], one) for name, one in asked.state_dict().items())
    again = smooth_randomization(
        cam, asked, images, classes, torch.Generator().manual_seed(1), samples=3
    )
    assert all(torch.equal(found[layer], again[layer]) for layer in found)


def test_trained_networks_own_map_is_not_in_the_mean(images: Tensor) -> None:
    # Quantus 0.6's MPRT averages the correlation of the trained network with itself, 1, into the
    # score: 0.188 reported where it is 0.053. Here every value is of a changed network.
    seen: list[nn.Module] = []

    def noting(asked: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        seen.append(copy.deepcopy(asked))
        return cam(asked, images, classes)

    asked = network()
    classes = torch.zeros(5).long()
    generator = torch.Generator().manual_seed(0)
    found = smooth_randomization(noting, asked, images, classes, generator, samples=1, noise=0.0)
    assert len(seen) == 1 + len(found)
    trained = cam(asked, images, classes).flatten(1).numpy()
    for changed, (_, values) in zip(seen[1:], found.items(), strict=True):
        other = cam(changed, images, classes).flatten(1).numpy()
        expected = [scipy.stats.spearmanr(a, b)[0] for a, b in zip(trained, other, strict=True)]
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)


def test_a_map_of_the_image_alone_fails_all_three(images: Tensor) -> None:
    asked, classes = network(), torch.zeros(5).long()
    generator = torch.Generator().manual_seed(0)
    found = smooth_randomization(edge, asked, images, classes, generator, samples=2)
    for values in found.values():
        torch.testing.assert_close(values, torch.ones(5).double())
    rise = efficient_randomization(edge, asked, images, classes, generator)
    torch.testing.assert_close(rise, torch.zeros(5).double())
    logits = asked(images).detach()
    same = random_logit(edge, asked, images, classes, logits, generator)
    torch.testing.assert_close(same, torch.ones(5).double())


def test_grad_cam_depends_on_weights_and_class(images: Tensor) -> None:
    asked, classes = network(), torch.zeros(5).long()
    generator = torch.Generator().manual_seed(0)
    found = smooth_randomization(cam, asked, images, classes, generator, samples=2)
    assert list(found.values())[-1].abs().mean() < 0.6
    logits = asked(images).detach()
    assert random_logit(cam, asked, images, classes, logits, generator).mean() < 0.9


def test_random_logit_never_draws_the_class_itself(images: Tensor) -> None:
    asked: list[Tensor] = []

    def noting(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        asked.append(classes)
        return cam(network, images, classes)

    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        classes = torch.arange(5) % 4
        random_logit(noting, network(), images, classes, torch.zeros(5, 4), generator)
    own, others = torch.cat(asked[::2]), torch.cat(asked[1::2])
    assert (own != others).all()
    assert set(others.tolist()) == {0, 1, 2, 3}


def test_entropy_is_that_of_a_histogram(images: Tensor) -> None:
    trained, randomized = images.mean(1), images.mean(1) ** 6
    maps = iter([trained, randomized])
    generator = torch.Generator().manual_seed(0)
    found = efficient_randomization(
        lambda *_: next(maps), network(), images, torch.zeros(5).long(), generator
    )
    for image in range(5):
        entropies = []
        for values in (trained[image].numpy(), randomized[image].numpy()):
            counts, _ = np.histogram(values, bins=100)
            entropies.append(scipy.stats.entropy(counts))
        expected = entropies[1] / entropies[0] - 1
        assert found[image].item() == pytest.approx(expected, rel=1e-6)


def test_network_of_one_class_has_no_other_to_draw(images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.zeros(5, dtype=torch.long)
    with pytest.raises(UserError, match="leave it out of --metrics"):
        random_logit(cam, network(), images, one, torch.zeros(5, 1), generator)
