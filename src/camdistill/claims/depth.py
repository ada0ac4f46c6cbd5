"""Layers: maps of earlier ones are worse, and jump where the grid changes (row 22)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from camdistill.claims.claim import Lab, Measured, Row, drawn, gain, mean
from camdistill.claims.localization_maps import BATCH, tops
from camdistill.errors import UserError
from camdistill.explain.compare import spearman
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import relu, resize, upsample
from camdistill.measure.faithfulness import faithfulness_correlation
from camdistill.measure.localization import relevance_rank_accuracy
from camdistill.networks.capture import bare
from camdistill.networks.cifar_resnet import BasicBlock
from camdistill.perturb.bank import Plan, bank
from camdistill.perturb.imputers import baseline
from camdistill.perturb.ranks import ranks
from camdistill.types import Images, Labels, Maps, PerImage

MEASURES = ("faithfulness correlation", "rank accuracy, object")


def worse_earlier(lab: Lab) -> Row:
    """Row 22: Grad-CAM at every block of the residual network."""
    network = bare(lab.teacher)
    blocks = [name for name, part in network.named_modules() if isinstance(part, BasicBlock)]
    if len(blocks) == len(_stage_ends(blocks)):
        raise UserError(
            f"the teacher is a {type(network).__name__}, and this row goes through the blocks of a "
            "CIFAR ResNet of depth 14 or more: name one with --teacher, such as "
            "checkpoints/shapes-resnet20.safetensors"
        )
    scene = drawn(lab)
    classes = tops(lab.teacher, scene.images)
    maps = _by_block(lab.teacher, scene.images, classes, blocks)
    masks = scene.masks["object"]
    size = (scene.images.shape[2], scene.images.shape[3])
    faithful = _faithfulness(lab, scene.images, classes, maps)
    sharp = {
        name: relevance_rank_accuracy(
            ranks(upsample(relu(one), size), lab.generator("ties")), masks
        )
        for name, one in maps.items()
    }
    steps = {}
    for (first, one), (second, other) in pairwise(maps.items()):
        grid = (other.shape[-2], other.shape[-1])
        steps[first, second] = spearman(resize(one, grid), other)
    return judged_depth(lab, {MEASURES[0]: faithful, MEASURES[1]: sharp}, steps)


def _by_block(
    network: nn.Module, images: Images, classes: Labels, blocks: Sequence[str]
) -> dict[str, Maps]:
    parts = [
        grad_cam(network, some, blocks, of)
        for some, of in zip(torch.split(images, BATCH), torch.split(classes, BATCH), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in blocks}


def _faithfulness(
    lab: Lab, images: Images, classes: Labels, maps: dict[str, Maps]
) -> dict[str, PerImage]:
    """Faithfulness correlation of all blocks' maps, from one bank."""
    found: dict[str, list[PerImage]] = {name: [] for name in maps}
    size = (images.shape[2], images.shape[3])
    generator = lab.generator("subsets")
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        asked = bank(
            lab.teacher,
            images[part],
            baseline(images[part], "grey"),
            generator,
            classes=classes[part],
            plan=Plan(occluders=()),
        )
        for name, one in maps.items():
            found[name].append(faithfulness_correlation(upsample(one[part], size), asked))
    return {name: torch.cat(parts) for name, parts in found.items()}


def judged_depth(
    lab: Lab,
    by_measure: dict[str, dict[str, PerImage]],
    steps: dict[tuple[str, str], PerImage],
) -> Row:
    """Row 22 of each measure by block, first to last, and of the similarity of neighbours."""
    ours: list[Measured] = []
    rises: list[Measured] = []
    for measure, table in by_measure.items():
        ours += [mean(name, one, lab, measure) for name, one in table.items()]
        ends = _stage_ends(list(table))
        rises += [
            gain(f"{later} - {earlier}", table[later], table[earlier], lab, f"{measure}, more")
            for earlier, later in pairwise(ends)
        ]
    within, across = (
        torch.stack([one for pair, one in steps.items() if _together(*pair) is same]).mean(0)
        for same in (True, False)
    )
    jump = gain("within - across", within, across, lab, "neighbours' rank correlation, more")
    return Row(
        number="22",
        claim="Maps become worse towards earlier layers, most where the grid changes",
        paper="figures (footnote 3 and appendix)",
        ours=(
            *ours,
            *rises,
            mean("within a stage", within, lab, "neighbours' rank correlation"),
            mean("across stages", across, lab, "neighbours' rank correlation"),
            jump,
        ),
        criterion="the last block of each stage is better than that of the stage before, by both "
        "measures, and neighbouring blocks' maps agree more within a stage than across: all "
        "paired intervals above 0",
        passed=all(one.above for one in (*rises, jump)),
        note="neighbours are compared on the later one's grid",
    )


def _stage(block: str) -> str:
    return block.partition(".")[0]


def _together(block: str, other: str) -> bool:
    return _stage(block) == _stage(other)


def _stage_ends(blocks: Sequence[str]) -> list[str]:
    """The last block of each stage."""
    return list({_stage(block): block for block in blocks}.values())
