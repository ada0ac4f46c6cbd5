"""A network with a single logit answers yes or no: everything that is asked of it is a sigmoid."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camdistill.distill.losses import cross_entropy, soft_targets_kl
from camdistill.distill.objectives import insertion_deletion
from camdistill.errors import UserError
from camdistill.explain.attribution import gradient
from camdistill.explain.contrast import contrast
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.perturbation import occlusion, rise, score_cam
from camdistill.measure.masking import masking_scores
from camdistill.measure.removal import deletion, insertion
from camdistill.measure.scores import agreement, correct, divergence
from camdistill.perturb.bank import BankPlan, build_bank
from camdistill.perturb.batched_forward import score_changes
from camdistill.perturb.imputers import baseline
from camdistill.perturb.probability import log_probabilities, predict_labels, probabilities
from camdistill.perturb.ranks import ranks


def network(*, pooled: bool = True, classes: int = 1) -> nn.Sequential:
    """A head that is average pooling and a linear layer, or one that is not."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tail: list[nn.Module] = [nn.Flatten(), nn.Linear(6, classes)]
        if not pooled:
            tail = [nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, classes)]
        layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), *tail]
        return nn.Sequential(*layers).eval().double()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.rand(3, 3, 12, 12, generator=generator, dtype=torch.float64)


def by_autograd(model: nn.Sequential, images: Tensor) -> Tensor:
    """Grad-CAM of torch.sigmoid of the logit, written out."""
    activations = model[1](model[0](images)).detach().requires_grad_()
    score = torch.sigmoid(model[2:](activations)[:, 0]).sum()
    (gradient,) = torch.autograd.grad(score, activations)
    return (gradient.mean((2, 3), keepdim=True) * activations).sum(1).detach()


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("grad", ["none", "full"])
def test_map_of_one_logits_probability_is_that_of_its_sigmoid(
    pooled: bool, grad: str, images: Tensor
) -> None:
    model = network(pooled=pooled)
    maps = grad_cam(model, images, ["1"], 0, score="probability", grad=grad)["1"]
    expected = by_autograd(model, images)
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(maps.detach().double(), expected, rtol=1e-10, atol=1e-14)


def test_every_method_explains_the_sigmoid(images: Tensor, generator: torch.Generator) -> None:
    """Each equals itself for a callable score that is the sigmoid."""
    model = network()

    def sigmoid(logits: Tensor) -> Tensor:
        return torch.sigmoid(logits[:, 0])

    def ask(method: object, **options: object) -> list[Tensor]:
        both = [{"score": "probability", "classes": 0}, {"score": sigmoid}]
        found = []
        for asked in both:
            maps = method(model, images, **asked, **options)  # type: ignore[operator]
            found.append(maps["1"] if isinstance(maps, dict) else maps)
        return found

    for method, options in (
        (gradient, {}),
        (occlusion, {"patch": 4}),
        (rise, {"masks": 20}),
        (score_cam, {"layers": ["1"]}),
    ):
        ours, expected = ask(method, **options)
        assert float(expected.std()) > 0, method
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12)


def test_removal_metrics_watch_the_sigmoid(images: Tensor) -> None:
    model, classes = network(), torch.zeros(3, dtype=torch.long)
    maps = torch.arange(144, dtype=torch.float64).view(1, 12, 12).expand(3, -1, -1)
    order, gray = ranks(maps, torch.Generator().manual_seed(0)), baseline(images, "gray")
    for curve in (
        deletion(model, images, classes, order, gray),
        insertion(model, images, classes, order, gray),
    ):
        assert float(curve.probabilities.std(1).min()) > 0
    removed = maps[:1, None] >= 72
    changed = torch.where(removed, gray, images)
    with torch.no_grad():
        expected = torch.sigmoid(model(changed))
    found = score_changes(model, images, classes, removed, gray)
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-12, atol=0)
    kept = build_bank(model, images, gray, torch.Generator().manual_seed(0), plan=BankPlan())
    torch.testing.assert_close(kept.probabilities, torch.sigmoid(kept.logits))
    assert float(next(iter(kept.subsets.values())).probability_drops.abs().max()) > 1e-4
    drop = masking_scores(model, images, classes, maps).average_drop
    with torch.no_grad():
        p, q = torch.sigmoid(model(images)), torch.sigmoid(model(images * maps[:, None] / 143))
    torch.testing.assert_close(drop, ((p - q).clamp(min=0) / p)[:, 0], rtol=1e-10, atol=1e-12)


def test_a_refined_map_is_scored_by_the_sigmoid(images: Tensor) -> None:
    model, classes = network(), torch.zeros(3, dtype=torch.long)
    maps = torch.rand(3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shown = baseline(images, "gray")
    found = insertion_deletion(model, images, classes, maps, shown, deletion=0.0).detach()
    assert (-found < 0.999).all()
    assert float(found.std()) > 0


def test_networks_of_one_logit_agree_by_its_sign() -> None:
    first = torch.tensor([[2.0], [-3.0], [0.5], [-1.0]])
    second = torch.tensor([[1.0], [4.0], [-0.5], [-2.0]])
    assert agreement(first, second).tolist() == [1, 0, 0, 1]
    assert correct(first, torch.tensor([1, 1, 0, -1]))[:3].tolist() == [1, 0, 0]
    assert predict_labels(torch.tensor([[0.0], [1e-9]])).tolist() == [0, 1]


def test_losses_of_one_logit_are_the_binary_ones(generator: torch.Generator) -> None:
    own, its = torch.randn(2, 7, 1, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, -1])
    expected = nn.functional.binary_cross_entropy_with_logits(
        own[:6, 0], labels[:6].double(), reduction="none"
    )
    found = cross_entropy(own, labels)
    torch.testing.assert_close(found[:6], expected)
    assert float(found[6]) == 0
    q, p = (1 / (1 + np.exp(-values[:, 0].numpy() / 2)) for values in (own, its))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(soft_targets_kl(own, its, 2.0).numpy(), 4 * kl, atol=1e-12)
    q, p = (1 / (1 + np.exp(-values[:, 0].numpy())) for values in (own, its))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(divergence(own, its).numpy(), kl, atol=1e-6)


def test_several_logits_stay_a_softmax(generator: torch.Generator) -> None:
    logits = torch.randn(4, 3, generator=generator)
    assert torch.equal(probabilities(logits), logits.softmax(1))
    assert torch.equal(log_probabilities(logits), logits.log_softmax(1))
    assert torch.equal(predict_labels(logits), logits.argmax(1))
    far = torch.tensor([[-200.0]])
    assert float(log_probabilities(far)) == -200.0


def test_one_logit_has_nothing_to_contrast_with(images: Tensor) -> None:
    with pytest.raises(UserError, match="single logit"):
        contrast(network(), images, ["1"])
