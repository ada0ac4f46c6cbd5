"""A learned metric as what a network's maps are refined towards."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from camdistill.data.views import identity_view
from camdistill.distill.differentiable_maps import explain_with_graph
from camdistill.distill.refinement_targets import Objective, Refinement, RefinementArm, ViewBatch
from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import upsample
from camdistill.measure.learned import OF_NETWORK, PLANES, LearnedMetric, image_context, load_metric
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import Preprocessed
from camdistill.networks.weights import save_safetensors


def network() -> Preprocessed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Preprocessed(ShallowCNN(5, (4, 6), (2, 1))).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("metric") / "metric.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LearnedMetric(members=2, units=4).save(path)
    return str(path)


def seen_by(net: Preprocessed, dtype: torch.dtype = torch.float32) -> ViewBatch:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, classes, maps = explain_with_graph(net, images)
    return ViewBatch(images, torch.arange(4), identity_view(4), classes, maps)


def loss_of(
    file: str, arm: RefinementArm, net: Preprocessed, seen: ViewBatch, step: int = 0
) -> Tensor:
    return Refinement(Objective(kind="learned", file=file), arm, 5).loss(net, seen, step)


def test_its_gradient_is_the_finite_difference_with_features_held_constant(file: str) -> None:
    """Along a random direction in all weights, in float64; the scorer is read from its file."""
    net = network().double()
    seen = seen_by(net, torch.float64)
    metric, known = load_metric(file).double(), image_context(net, seen.images, seen.classes)
    weights = list(net.parameters())
    drawn = torch.Generator().manual_seed(7)
    way = [torch.randn(one.shape, generator=drawn, dtype=one.dtype) for one in weights]

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for weight, one in zip(weights, way, strict=True):
                weight += step * one
            (maps,) = grad_cam(net, seen.images, None, seen.classes).values()
            score = metric(upsample(maps, (16, 16)), known)
            for weight, one in zip(weights, way, strict=True):
                weight -= step * one
        return score.sum()

    found = torch.autograd.grad(
        loss_of(file, "objective", net, seen).sum(), weights, allow_unused=True
    )
    slope = sum(
        (one * other).sum() for one, other in zip(found, way, strict=True) if one is not None
    )
    expected = -(moved(1e-6) - moved(-1e-6)) / 2e-6
    assert abs(float(expected)) > 1e-3
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-8)


def test_its_loss_is_the_score_that_evaluate_tells_negated(file: str) -> None:
    net = network()
    seen = seen_by(net)
    known = image_context(net, seen.images, seen.classes)
    expected = -load_metric(file)(upsample(seen.maps.detach(), (16, 16)), known)
    torch.testing.assert_close(loss_of(file, "objective", net, seen).detach(), expected)


def test_the_shuffled_arm_is_told_another_images_features(file: str) -> None:
    net = network()
    seen = seen_by(net)
    known = image_context(net, seen.images, seen.classes)[[3, 0, 1, 2]]
    expected = -load_metric(file)(upsample(seen.maps.detach(), (16, 16)), known)
    torch.testing.assert_close(loss_of(file, "shuffled", net, seen).detach(), expected)


def test_the_random_arm_is_told_chance_in_place_of_the_network(file: str) -> None:
    """The same chance for an image at every step, moved with it; light and contrast stay."""
    net = network()
    seen = seen_by(net)
    control = Refinement(Objective(kind="learned", file=file), "random", 5)
    known = image_context(net, seen.images, seen.classes)
    found = control._random_context(known, seen)
    assert torch.equal(found[:, OF_NETWORK:], known[:, OF_NETWORK:])
    assert PLANES[OF_NETWORK:] == ("light", "contrast", "radius")
    planes = found[:, :OF_NETWORK]
    torch.testing.assert_close(planes.mean((2, 3)), torch.zeros(4, OF_NETWORK), atol=1e-5, rtol=0)
    torch.testing.assert_close(planes.square().mean((2, 3)), torch.ones(4, OF_NETWORK))
    assert torch.corrcoef(planes[0].flatten(1)).fill_diagonal_(0).abs().max() < 0.9
    turned = seen._replace(view=seen.view._replace(flip=torch.ones(4, dtype=torch.bool)))
    torch.testing.assert_close(
        control._random_context(known, turned)[:, :OF_NETWORK], planes.flip(-1)
    )
    own, later = (loss_of(file, "random", net, seen, step) for step in (0, 9))
    assert torch.equal(own, later)
    assert not torch.allclose(own, loss_of(file, "objective", net, seen))
    gradients = torch.autograd.grad(own.sum(), list(net.parameters()), allow_unused=True)
    assert any(one is not None and one.count_nonzero() for one in gradients)


def test_with_a_constant_map_nothing_is_left_so_that_arm_is_left_out(file: str) -> None:
    assert "detached" not in Objective(kind="learned", file=file).arms


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "learned"}, "learned with no objective.file; a learned objective"),
        ({"kind": "energy", "file": "m.safetensors"}, "energy with a file 'm.safetensors'"),
    ],
)
def test_a_file_and_the_learned_kind_go_together(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Objective(**options)  # type: ignore[arg-type]


def test_a_file_that_holds_no_metric_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_safetensors(path, network().network.state_dict(), {})
    wanted = Objective(kind="learned", file=str(path))
    with pytest.raises(UserError, match="holds no metric; give a file that `camdistill learn`"):
        Refinement(wanted, "objective", 0)
    assert Refinement(wanted, "ce", 0).metric is None
