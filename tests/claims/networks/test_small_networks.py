"""Little networks: fitted once for each setting, then read; a damaged file is made again."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from camdistill.claims.claim import ClaimSetup
from camdistill.claims.networks.small_networks import Batches, SmallNetworkRecipe, fit_or_load
from camdistill.distill.optimization import Optimization
from camdistill.networks.weights import weights_digest


def line(lab: ClaimSetup, asked: list[str], slope: float = 3.0) -> nn.Linear:
    """Least squares of y = slope x, whose solution is known."""

    def examples() -> tuple[Tensor, ...]:
        asked.append("examples")
        x = torch.randn(256, 1, generator=torch.Generator().manual_seed(0))
        return x, slope * x[:, 0]

    def loss(network: nn.Linear, examples: tuple[Tensor, ...]) -> Tensor:
        return (network(examples[0])[:, 0].float() - examples[1]).square()

    return fit_or_load(
        lab,
        "line",
        lambda: nn.Linear(1, 1),
        examples,
        loss,
        recipe=SmallNetworkRecipe(60, 64, Optimization("adamw", lr=0.1, weight_decay=0.0)),
        settings={"slope": slope},
    )


def test_fitted_once_and_read_after(lab: Callable[..., ClaimSetup]) -> None:
    asked: list[str] = []
    here = lab()
    first, second = line(here, asked), line(here, asked)
    assert asked == ["examples"]
    assert torch.equal(first.weight, second.weight)
    # bf16 products, so not to float32's rounding
    assert abs(float(first.weight) - 3) < 0.05
    assert not first.training
    assert not first.weight.requires_grad


def test_other_settings_are_another_network(lab: Callable[..., ClaimSetup]) -> None:
    asked: list[str] = []
    here = lab()
    line(here, asked)
    other = line(here, asked, slope=-1.0)
    assert asked == ["examples", "examples"]
    assert abs(float(other.weight) + 1) < 0.05


def test_a_damaged_file_is_made_again(lab: Callable[..., ClaimSetup]) -> None:
    asked: list[str] = []
    here = lab()
    line(here, asked)
    (file,) = here.folder.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    line(here, asked)
    assert asked == ["examples", "examples"]


def test_digest_is_of_the_weights() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert weights_digest(one) != weights_digest(two)
    two.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(two)


def test_batches_are_all_examples_in_rows_that_stay_together() -> None:
    rows = torch.arange(10)
    batches = Batches((rows, rows * 10), 5, seed=1)
    seen = [pair for batch in batches for pair in zip(*batch, strict=True)]
    assert len(batches) == 2
    assert sorted(int(one) for one, _ in seen) == list(range(10))
    assert all(int(ten) == 10 * int(one) for one, ten in seen)
