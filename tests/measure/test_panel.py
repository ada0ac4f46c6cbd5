import pytest
import torch
from torch import Tensor, nn

from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import upsample
from camdistill.measure.faithfulness import faithfulness_correlation
from camdistill.measure.metrics import DEFAULT, DEFAULT_WITH_MASKS, METRICS, check_metrics
from camdistill.measure.panel import measure, prepare_batch
from camdistill.measure.removal import insertion
from camdistill.perturb.ranks import ranks

ALL = tuple(METRICS)


class Counting(nn.Module):
    """A small network that counts the images it is asked."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.head = nn.Linear(6, 4)
        self.asked = 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return self.head(self.conv(images).relu().mean((2, 3)))


def cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return upsample(grad_cam(network, images, ["conv"], classes)["conv"], (16, 16))


@pytest.fixture
def network() -> Counting:
    return Counting().eval()


@pytest.fixture
def pictures(generator: torch.Generator) -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=generator)


@pytest.fixture
def masks() -> Tensor:
    masks = torch.zeros(4, 16, 16, dtype=torch.bool)
    masks[:, 3:9, 4:11] = True
    return masks


def test_every_metric_of_the_table_is_measured(
    network: Counting, pictures: Tensor, masks: Tensor
) -> None:
    asked = prepare_batch(network, pictures, ALL, "0", masks=masks, rerendered=pictures.flip(0))
    found = measure(asked, cam(network, pictures, asked.classes), ALL, cam)
    assert tuple(found.values) == ALL
    assert all(values.shape == (4,) for values in found.values.values())
    assert not any(values.isnan().any() for values in found.values.values())
    assert {"insertion_blur", "deletion_gray"} <= set(found.curves)


def test_values_are_those_of_the_metrics_themselves(network: Counting, pictures: Tensor) -> None:
    asked = prepare_batch(network, pictures, DEFAULT, "7")
    maps = cam(network, pictures, network(pictures).argmax(1))
    found = measure(asked, maps, DEFAULT, cam)
    assert asked.bank is not None
    expected = faithfulness_correlation(maps, asked.bank)
    torch.testing.assert_close(found.values["faithfulness_correlation"], expected)
    order = ranks(maps, asked.generator("ties"))
    curve = insertion(network, pictures, asked.classes, order, asked.replacements["blur"])
    torch.testing.assert_close(found.values["insertion_blur"], curve.area())


def test_what_is_missing_is_left_out(network: Counting, pictures: Tensor) -> None:
    asked = prepare_batch(network, pictures, ALL, "0")
    found = measure(asked, torch.rand(4, 16, 16), ALL)
    gates = {name for name, metric in METRICS.items() if metric.use in ("gate", "mask")}
    assert set(ALL) - set(found.values) == gates | {"adcc", "deletion_rerendered"}


def test_a_second_explainer_costs_no_forward_by_the_bank(
    network: Counting, pictures: Tensor, generator: torch.Generator
) -> None:
    names = tuple(name for name, metric in METRICS.items() if metric.family == "bank")
    asked = prepare_batch(network, pictures, names, "0")
    before = network.asked
    for _ in range(5):
        measure(asked, torch.rand(4, 16, 16, generator=generator), names)
    assert network.asked == before


def test_all_explainers_meet_the_same_chances(network: Counting, pictures: Tensor) -> None:
    names = tuple(name for name, metric in METRICS.items() if metric.use != "mask")
    first, again, other = (
        prepare_batch(network, pictures, names, seed) for seed in ("1", "1", "2")
    )
    flat = torch.zeros(4, 16, 16)  # all ties
    values = [measure(asked, flat, ("road", "insertion_blur")).values for asked in (first, first)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    same = measure(again, flat, ("road",)).values["road"]
    assert torch.equal(values[0]["road"], same)
    assert not torch.equal(same, measure(other, flat, ("road",)).values["road"])


def test_a_broken_map_is_a_failure_by_every_metric_and_touches_no_other(
    network: Counting, pictures: Tensor, masks: Tensor
) -> None:
    names = (*DEFAULT, *DEFAULT_WITH_MASKS)
    asked = prepare_batch(network, pictures, names, "0", masks=masks)
    maps = cam(network, pictures, asked.classes)
    broken = maps.clone()
    broken[2, 5, 5] = torch.nan
    whole, found = (measure(asked, one, names, cam) for one in (maps, broken))
    kept = [0, 1, 3]
    for name, values in found.values.items():
        assert values.isnan().tolist() == [False, False, True, False], name
        torch.testing.assert_close(values[kept], whole.values[name][kept])
    assert found.curves
    for name, curve in found.curves.items():
        assert curve.isnan().all(1).tolist() == [False, False, True, False], name
        torch.testing.assert_close(curve[kept], whole.curves[name][kept])


def test_maps_that_break_while_a_gate_asks_are_failures_of_that_gate(
    network: Counting, pictures: Tensor
) -> None:
    names = ("gini", "max_sensitivity", "random_logit")
    asked = prepare_batch(network, pictures, names, "0")
    maps = cam(network, pictures, asked.classes)
    calls = []

    def breaking(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        found = cam(network, images, classes)
        calls.append(1)
        if len(calls) == 4:  # a nearby image of the third picture
            found[2, 0, 0] = torch.inf
        return found

    found = measure(asked, maps, names, breaking).values
    assert found["max_sensitivity"].isnan().tolist() == [False, False, True, False]
    assert not found["gini"].isnan().any()
    assert not found["random_logit"].isnan().any()


def test_unknown_metrics_are_told_with_the_nearest() -> None:
    check_metrics(ALL)
    with pytest.raises(ValueError, match="no metric 'insertion_blurr'; nearest: 'insertion_blur'"):
        check_metrics(["insertion_blurr"])
