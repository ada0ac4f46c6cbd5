"""Small random movements of images, which make optimized images robust."""

import math

import torch
import torch.nn.functional as F

from camdistill.types import Images


def move_images(images: Images, generator: torch.Generator) -> Images:
    """Every image moved, scaled and turned a little, at the size it had.

    The amounts are those of images of 128 pixels, in proportion: a network for 32 pixels gets
    images whose objects keep their size.
    """
    count, _, height, width = images.shape
    side = min(height, width)
    padding = max(round(12 * min(side, 128) / 128), 1)
    images = F.pad(images, (padding,) * 4, value=0.5)
    for jitter in (max(round(side / 16), 1), max(round(side / 32), 1)):
        rows, columns = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
        images = images.roll((rows, columns), (2, 3))
    scales = 0.9 + 0.02 * torch.randint(0, 11, (count,), generator=generator)
    # 6 of 26 aren't turned at all, as most of what networks see is upright.
    turns = torch.randint(-10, 16, (count,), generator=generator)
    angles = torch.where(turns > 10, 0, turns) * (math.pi / 180)
    cos, sin = angles.cos() / scales, angles.sin() / scales
    zeros = torch.zeros(count)
    ratio = images.shape[2] / images.shape[3]
    matrix = torch.stack(
        [
            torch.stack([cos, -sin * ratio, zeros], 1),
            torch.stack([sin / ratio, cos, zeros], 1),
        ],
        1,
    ).to(images)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    turned = F.grid_sample(images - 0.5, grid, mode="bilinear", align_corners=False) + 0.5
    return turned[:, :, padding : padding + height, padding : padding + width]
