import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from camdistill.measure.faithfulness import (
    faithfulness_correlation,
    infidelity,
    occlusion_correlation,
    sensitivity_n,
)
from camdistill.perturb.bank import Bank, BankPlan, build_bank
from camdistill.perturb.imputers import baseline

from .conftest import Linear, Sees, contest

METRICS = (faithfulness_correlation, sensitivity_n, infidelity, occlusion_correlation)
PLAN = BankPlan(8, {0.25: 40, 0.5: 20}, (1, 2))


@pytest.fixture
def answers(linear: Linear, images: Tensor, generator: torch.Generator) -> Bank:
    return build_bank(linear, images, baseline(images, "gray"), generator, plan=PLAN)


def exact(linear: Linear, images: Tensor, answers: Bank) -> Tensor:
    """What each pixel adds to a linear score, against gray."""
    return ((images - 0.5) * linear.weight.detach()[answers.classes]).sum(1)


def test_the_exact_map_of_a_linear_network_is_perfect(
    linear: Linear, images: Tensor, answers: Bank
) -> None:
    maps = exact(linear, images, answers)
    for metric in METRICS:
        best = 0.0 if metric is infidelity else 1.0
        torch.testing.assert_close(metric(maps, answers), torch.full((5,), best).double())
        torch.testing.assert_close(metric(7 * maps, answers), torch.full((5,), best).double())


def test_values_equal_scipy_and_numpy(answers: Bank, generator: torch.Generator) -> None:
    maps = torch.randn(5, 16, 16, generator=generator, dtype=torch.float64)
    for score in ("logit", "probability"):
        found = {metric: metric(maps, answers, score=score).numpy() for metric in METRICS}
        for image in range(5):

            def told(probe, image: int = image, score: str = score):  # type: ignore[no-untyped-def]
                cells = probe.cells[image if len(probe.cells) > 1 else 0]
                holes = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).numpy()
                sums = np.array([maps[image].numpy()[hole].sum() for hole in holes])
                return sums, getattr(probe, f"{score}_drops")[image].numpy()

            pearson = [scipy.stats.pearsonr(*told(probe))[0] for probe in answers.subsets.values()]
            assert found[faithfulness_correlation][image] == pytest.approx(pearson[0])
            assert found[sensitivity_n][image] == pytest.approx(np.mean(pearson))
            rank = scipy.stats.spearmanr(*told(answers.occluders[1]))[0]
            assert found[occlusion_correlation][image] == pytest.approx(rank)
            sums, drops = (
                np.concatenate(both)
                for both in zip(*map(told, answers.occluders.values()), strict=True)
            )
            beta = max((sums * drops).mean() / (sums**2).mean(), 0)
            expected = ((beta * sums - drops) ** 2).mean() / (drops**2).mean()
            assert found[infidelity][image] == pytest.approx(expected)


def test_infidelity_equals_captums_normalized_one(
    linear: Linear, images: Tensor, answers: Bank
) -> None:
    captum = pytest.importorskip("captum.metrics")
    exactly = exact(linear, images, answers)
    noise = torch.randn(exactly.shape, generator=torch.Generator().manual_seed(4)).double()
    maps = exactly + 0.3 * exactly.std() * noise
    cells = torch.cat([probe.cells[0] for probe in answers.occluders.values()])
    holes = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    images.requires_grad_(False)

    def removals(inputs: Tensor) -> tuple[Tensor, Tensor]:
        # captum repeats each image as often as there are removals
        here = holes.repeat(len(inputs) // len(holes), 1, 1, 1)
        return here[:, [0, 0, 0]].double() / 3, torch.where(here, 0.5, inputs)

    found = captum.infidelity(
        linear,
        removals,
        images,
        maps[:, None].expand(-1, 3, -1, -1),
        target=answers.classes,
        n_perturb_samples=len(holes),
        normalize=True,
    )
    drops = torch.cat([probe.logit_drops for probe in answers.occluders.values()], 1)
    torch.testing.assert_close(infidelity(maps, answers), found / drops.square().mean(1))


def test_faithfulness_correlation_agrees_with_quantus_on_single_pixels() -> None:
    quantus = pytest.importorskip("quantus")
    generator = torch.Generator().manual_seed(2)
    network = Linear(torch.randn(3, 1, 8, 8, generator=generator)).eval()
    images = torch.rand(4, 1, 8, 8, generator=generator)
    maps = torch.randn(4, 8, 8, generator=generator)
    classes = network(images).argmax(1).detach()
    metric = quantus.FaithfulnessCorrelation(
        nr_runs=1500,
        subset_size=16,
        perturb_baseline=0.5,
        abs=False,
        normalise=False,
        return_aggregate=False,
        disable_warnings=True,
    )
    theirs = metric(network, images.numpy(), classes.numpy(), maps.numpy()[:, None], softmax=False)
    answers = build_bank(
        network, images, baseline(images, "gray"), generator, plan=BankPlan(8, {0.25: 1500}, ())
    )
    # both draw 1500 subsets: a correlation's standard error is below 0.026
    np.testing.assert_allclose(faithfulness_correlation(maps, answers), theirs, atol=0.1)


def test_an_inverted_map_is_not_as_good_as_the_map(
    linear: Linear, images: Tensor, answers: Bank
) -> None:
    # captum's normalized infidelity fits a beta of either sign and gives both maps the same
    maps = -exact(linear, images, answers)
    torch.testing.assert_close(infidelity(maps, answers), torch.ones(5).double())
    torch.testing.assert_close(faithfulness_correlation(maps, answers), -torch.ones(5).double())


def test_scale_changes_nothing(answers: Bank, generator: torch.Generator) -> None:
    # Yeh's raw infidelity of a map times 10 is up to 10^4 as large
    maps = torch.randn(5, 16, 16, generator=generator, dtype=torch.float64)
    for metric in METRICS:
        torch.testing.assert_close(metric(1e6 * maps, answers), metric(maps, answers))
        torch.testing.assert_close(metric(1e-30 * maps, answers), metric(maps, answers))


def test_oracle_is_best_and_constant_never(bright: Tensor, generator: torch.Generator) -> None:
    answers = build_bank(Sees(), bright, baseline(bright, "gray"), generator)
    maps = contest(generator, len(bright))
    for metric in METRICS:
        sign = -1 if metric is infidelity else 1
        means = {name: sign * metric(one, answers).mean().item() for name, one in maps.items()}
        assert max(means, key=means.__getitem__) == "oracle", (metric.__name__, means)
        assert means["oracle"] > means["random"] + 0.3


def test_maps_that_say_nothing_are_worth_nothing(answers: Bank) -> None:
    for value in (0.0, 0.7):
        blank = torch.full((5, 16, 16), value)
        assert torch.equal(faithfulness_correlation(blank, answers), torch.zeros(5))
        assert torch.equal(occlusion_correlation(blank, answers), torch.zeros(5))
    assert torch.equal(infidelity(torch.zeros(5, 16, 16), answers), torch.ones(5))


def test_further_explainers_cost_no_forward(linear: Linear, images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    answers = build_bank(linear, images, baseline(images, "gray"), generator, plan=PLAN)
    asked = linear.asked
    assert asked == 5 * (PLAN.forwards + 1)
    for _ in range(6):
        maps = torch.randn(5, 16, 16, generator=generator)
        for metric in METRICS:
            metric(maps, answers)
        occlusion_correlation(maps, answers, side=2)
    assert linear.asked == asked


def test_broken_and_small_maps_are_refused(answers: Bank) -> None:
    maps = torch.zeros(5, 16, 16)
    maps[3, 0, 0] = torch.nan
    for metric in METRICS:
        with pytest.raises(ValueError, match="1 of 5 maps have NaN"):
            metric(maps, answers)
        with pytest.raises(ValueError, match=r"16x16: `explain\.maps\.upsample` them"):
            metric(torch.zeros(5, 4, 4), answers)
