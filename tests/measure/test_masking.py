import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camdistill.measure.masking import adcc, masking_scores

from .conftest import OBJECT, Linear, Sees, contest


def test_values_equal_numpy(linear: Linear, images: Tensor, generator: torch.Generator) -> None:
    classes = torch.tensor([0, 1, 2, 1, 0])
    maps = torch.randn(5, 16, 16, generator=generator, dtype=torch.float64)

    def probability(changed: np.ndarray, number: int) -> float:  # type: ignore[type-arg]
        logits = (linear.weight.detach().numpy() * changed).sum((1, 2, 3))
        return float(np.exp(logits)[number] / np.exp(logits).sum())

    def other(network: nn.Module, given: Tensor, classes: Tensor) -> Tensor:
        return given.mean(1) + maps

    found = masking_scores(linear, images, classes, maps)
    harmonic = adcc(linear, images, classes, maps, other)
    for image, number in enumerate(classes.tolist()):
        one = maps[image].numpy()
        share = (one - one.min()) / (one.max() - one.min())
        picture = images[image].numpy()
        p, q, d = (
            probability(x, number) for x in (picture, picture * share, picture * (1 - share))
        )
        drop = max(0, p - q) / p
        assert found.average_drop[image].item() == pytest.approx(drop)
        assert found.increase[image].item() == (q > p)
        assert found.average_gain[image].item() == pytest.approx(max(0, q - p) / (1 - p))
        assert found.drop_in_deletion[image].item() == pytest.approx((p - d) / p)
        again = (picture * share).mean(0) + one
        coherency = (1 + np.corrcoef(one.ravel(), again.ravel())[0, 1]) / 2
        expected = 3 / (1 / coherency + 1 / (1 - share.mean()) + 1 / (1 - drop))
        assert harmonic[image].item() == pytest.approx(expected)


def test_average_drop_is_a_share_of_the_probability() -> None:
    # pytorch-grad-cam's DropInConfidence is max(0, p - q), not divided by p as in the paper; with
    # p = 0.5 and q = 0.25 it gives 0.25 where half of the confidence is lost.
    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            p = images.mean((1, 2, 3))
            return torch.stack([p, 1 - p], 1).log()

    peer = pytest.importorskip("pytorch_grad_cam.metrics.cam_mult_image")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    images, maps = torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    found = masking_scores(Mean(), images, torch.zeros(1).long(), maps)
    assert found.average_drop.item() == pytest.approx(0.5)
    target = [targets.ClassifierOutputSoftmaxTarget(0)]
    assert peer.DropInConfidence()(images, maps.numpy(), target, Mean()) == pytest.approx(0.25)


def test_a_map_of_nearly_all_ones_fools_them_all(bright: Tensor) -> None:
    # Why the module warns: it looks nowhere, and has no drop (Poppi et al. 2021).
    fake = torch.ones(6, 16, 16)
    fake[:, -1, -1] = 0
    classes = torch.zeros(6).long()
    oracle = masking_scores(Sees(), bright, classes, OBJECT.float().expand(6, -1, -1))
    assert masking_scores(Sees(), bright, classes, fake).average_drop.max() == 0
    assert oracle.average_drop.max() == 0


def test_constant_maps_are_never_best(bright: Tensor, generator: torch.Generator) -> None:
    classes, maps = torch.zeros(6).long(), contest(generator, 6)
    tables = {name: masking_scores(Sees(), bright, classes, one) for name, one in maps.items()}
    for metric, sign in (("average_drop", -1), ("drop_in_deletion", 1)):
        means = {name: sign * getattr(one, metric).mean() for name, one in tables.items()}
        assert means["constant"] < max(means.values()), metric
        assert means["oracle"] == max(means.values()), metric
    again = adcc(
        Sees(), bright, classes, torch.ones(6, 16, 16), lambda n, x, c: torch.ones(6, 16, 16)
    )
    assert (again < 0.6).all()


def test_broken_maps_are_refused(bright: Tensor) -> None:
    maps = torch.full((6, 16, 16), torch.nan)
    with pytest.raises(ValueError, match="6 of 6 maps have NaN"):
        masking_scores(Sees(), bright, torch.zeros(6).long(), maps)
