import numpy as np
import pytest
import torch
from torch import Tensor

from camdistill.measure.removal import Curve, deletion, insertion, road
from camdistill.perturb.imputers import BASELINES, baseline, noisy_linear
from camdistill.perturb.ranks import ranks

from .conftest import Linear, Sees, contest


def test_curves_equal_removal_pixel_by_pixel(
    linear: Linear, images: Tensor, generator: torch.Generator
) -> None:
    classes = torch.tensor([0, 1, 2, 0, 1])
    maps = torch.randn(5, 16, 16, generator=generator)
    order, shown = ranks(maps, generator), baseline(images, "blur")
    levels = (0.0, 0.25, 0.6, 1.0)
    gone = deletion(linear, images, classes, order, shown, levels)
    come = insertion(linear, images, classes, order, shown, levels)
    for image in range(5):
        places = np.argsort(-maps[image].numpy().ravel())
        for level, count in enumerate((0, 64, 154, 256)):
            for curve, first, then in ((gone, images, shown), (come, shown, images)):
                changed = first[image].numpy().reshape(3, -1).copy()
                changed[:, places[:count]] = then[image].numpy().reshape(3, -1)[:, places[:count]]
                logits = linear(torch.from_numpy(changed).view(1, 3, 16, 16)).softmax(1)
                expected = logits[0, classes[image]].item()
                assert curve.probabilities[image, level].item() == pytest.approx(expected)


def test_area_is_the_trapezoids() -> None:
    curve = Curve((0.0, 0.5, 0.6, 1.0), torch.tensor([[1.0, 0.5, 0.25, 0.0], [0.3, 0.3, 0.3, 0.3]]))
    torch.testing.assert_close(curve.area(), torch.tensor([0.375 + 0.0375 + 0.05, 0.3]))
    torch.testing.assert_close(curve.mean(), torch.tensor([0.4375, 0.3]))


# pytorch-grad-cam asks NumPy to wrap a tensor in the way of NumPy 1
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_road_equals_pytorch_grad_cams_where_no_two_pixels_are_equal() -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.road")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    generator = torch.Generator().manual_seed(5)
    # of 121 pixels every tenth percentile is a pixel's own value, so both take the same ones
    images = torch.rand(3, 3, 11, 11, generator=generator)
    network = Linear(torch.randn(4, 3, 11, 11, generator=generator) / 10)
    maps = torch.rand(3, 11, 11, generator=generator)
    classes = torch.tensor([1, 3, 0])
    order = ranks(maps, generator)
    fractions = [(121 - 12 * step) / 121 for step in range(1, 10)]
    found = road(network, images, classes, order, generator, fractions=fractions, noise=0)
    begin = theirs.NoisyLinearImputer.__init__
    with pytest.MonkeyPatch.context() as patch:
        # the noise of theirs is no option of the metric
        patch.setattr(begin, "__defaults__", (0, *begin.__defaults__[1:]))
        expected = theirs.ROADCombined()(
            images,
            maps.numpy(),
            [targets.ClassifierOutputSoftmaxTarget(number) for number in classes.tolist()],
            network,
        )
    np.testing.assert_allclose(found.combine().detach().numpy(), expected, atol=2e-4)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_road_takes_its_share_of_a_rectified_map_where_pytorch_grad_cam_takes_all() -> None:
    # Defect of pytorch-grad-cam (1.5.5): it keeps `mask < percentile`; of a map that is 0 in 94 %
    # of its pixels each percentile up to 90 is 0, nothing is kept, and MoRF removes the whole image
    # at every level.
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.road")
    maps = torch.zeros(1, 16, 16)
    maps[0, 4:8, 4:8] = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    removed: list[int] = []

    class Watching:
        def __call__(self, image: Tensor, kept: Tensor) -> Tensor:
            removed.append(int((kept == 0).sum()))
            return image

    for percentile in (10, 50, 90):
        theirs.RemoveMostRelevantFirst(percentile, Watching())(torch.rand(3, 16, 16), maps[0])
    assert removed == [256, 256, 256]
    ours: list[int] = []

    def watching(images: Tensor, holes: Tensor) -> Tensor:
        ours.extend(holes.flatten(1).sum(1).tolist())
        return images

    order = ranks(maps, torch.Generator().manual_seed(1))
    images = torch.rand(1, 3, 16, 16)
    deletion(Sees(), images, torch.zeros(1).long(), order, watching, (0.1, 0.5, 0.9))
    assert ours == [26, 128, 230]


def test_road_is_removal_with_linear_imputation(
    linear: Linear, images: Tensor, generator: torch.Generator
) -> None:
    order = ranks(torch.randn(5, 16, 16, generator=generator), generator)
    classes = torch.zeros(5).long()
    found = road(linear, images, classes, order, generator, fractions=(0.3, 0.8), noise=0)
    for level, count in enumerate((77, 205)):
        for curve, removed in ((found.morf, order < count), (found.lerf, order >= 256 - count)):
            filled = noisy_linear(images, removed, noise=0)
            expected = linear(filled).softmax(1)[:, 0]
            torch.testing.assert_close(curve.probabilities[:, level], expected)
    combined = (found.lerf.mean() - found.morf.mean()) / 2
    torch.testing.assert_close(found.combine(), combined)


def test_oracle_is_best_and_constant_never(bright: Tensor) -> None:
    generator = torch.Generator().manual_seed(8)
    classes, maps = torch.zeros(6).long(), contest(generator, 6)
    orders = {name: ranks(one, generator) for name, one in maps.items()}
    tables = {}
    for kind in BASELINES:
        shown = baseline(bright, kind)
        for way, sign in ((deletion, -1), (insertion, 1)):
            tables[kind, way.__name__] = {
                name: sign * way(Sees(), bright, classes, order, shown).area().mean().item()
                for name, order in orders.items()
            }
    roads = {
        name: road(Sees(), bright, classes, order, generator) for name, order in orders.items()
    }
    tables["road", "morf"] = {name: -one.morf.mean().mean().item() for name, one in roads.items()}
    tables["road", "lerf"] = {name: one.lerf.mean().mean().item() for name, one in roads.items()}
    tables["road", "all"] = {name: one.combine().mean().item() for name, one in roads.items()}
    for key, table in tables.items():
        assert max(table, key=table.__getitem__) == "oracle", (key, table)
        assert table["constant"] < table["oracle"] - 0.05, (key, table)


def test_ties_move_a_score_no_further_than_its_noise(bright: Tensor) -> None:
    # The constant map is all ties: its order is as good as a random map's, whatever the seed.
    classes, shown = torch.zeros(6).long(), baseline(bright, "blur")
    areas = {"constant": [], "random": []}
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        for name in areas:
            order = ranks(contest(generator, 6)[name], generator)
            areas[name].append(insertion(Sees(), bright, classes, order, shown).area().mean())
    constant, random = (torch.stack(areas[name]) for name in ("constant", "random"))
    spread = torch.cat([constant, random]).std()
    assert (constant.mean() - random.mean()).abs() < spread
    assert constant.std() < 3 * random.std()
