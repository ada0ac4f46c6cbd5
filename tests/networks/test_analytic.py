import numpy as np
import torch
from torch import nn

from camdistill.data.shapes import Shapes
from camdistill.networks.analytic import ColorReader
from camdistill.networks.teachers import NetworkSpec, build

SHAPES = Shapes("test", 200, shortcut=1.0, classes=10)


def test_it_is_right_on_every_image_and_its_logit_is_the_patchs_share() -> None:
    network = ColorReader(SHAPES.patch_colors, gain=1000.0)
    rendered = SHAPES.render(np.arange(200))
    logits = network(torch.from_numpy(rendered.pixels) / 255)
    labels = torch.from_numpy(rendered.labels)
    share = torch.from_numpy(rendered.masks["shortcut"].mean((1, 2)))
    expected = 1000 * share[:, None] * nn.functional.one_hot(labels, 10)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-3)


def test_one_level_beside_a_color_is_no_match() -> None:
    network = ColorReader(["e61919", "19e619"])
    near = torch.tensor([230.0, 26.0, 25.0])[:, None, None].expand(1, 3, 4, 4) / 255
    assert (network(near) == 0).all()
    there = torch.tensor([25.0, 230.0, 25.0])[:, None, None].expand(1, 3, 4, 4) / 255
    torch.testing.assert_close(network(there), torch.tensor([[0.0, 1000.0]]), rtol=1e-4, atol=0)


def test_a_config_can_name_it() -> None:
    colors = list(SHAPES.patch_colors)
    spec = NetworkSpec("camdistill.networks.analytic.ColorReader", args={"colors": colors})
    assert build(spec).linear.out_features == 10
