"""Layers: maps of earlier ones are worse, and jump where the grid changes (row 22)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from camdistill.claims.claim import (
    ClaimMeasurement,
    ClaimResult,
    ClaimSetup,
    draw_batch,
    gain,
    mean,
)
from camdistill.claims.localization_maps import BATCH, top_classes
from camdistill.errors import UserError
from camdistill.explain.compare import spearman
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import relu, resize, upsample
from camdistill.measure.faithfulness import faithfulness_correlation
from camdistill.measure.localization import relevance_rank_accuracy
from camdistill.networks.capture import unwrap
from camdistill.networks.cifar_resnet import BasicBlock
from camdistill.perturb.bank import BankPlan, build_bank
from camdistill.perturb.imputers import baseline
from camdistill.perturb.ranks import ranks
from camdistill.types import Images, Labels, Maps, PerImage

MEASURES = ("faithfulness correlation", "rank accuracy, object")


def run_depth(setup: ClaimSetup) -> ClaimResult:
    """Row 22: Grad-CAM at every block of the residual network."""
    network = unwrap(setup.teacher)
    blocks = [name for name, part in network.named_modules() if isinstance(part, BasicBlock)]
    if len(blocks) == len(_stage_ends(blocks)):
        raise UserError(
            f"the teacher is a {type(network).__name__}, and this row goes through the blocks of a "
            "CIFAR ResNet of depth 14 or more: name one with --teacher, such as "
            "checkpoints/shapes-resnet20.safetensors"
        )
    batch = draw_batch(setup)
    classes = top_classes(setup.teacher, batch.images)
    maps = _maps_by_block(setup.teacher, batch.images, classes, blocks)
    masks = batch.masks["object"]
    size = (batch.images.shape[2], batch.images.shape[3])
    correlations = _faithfulness_by_block(setup, batch.images, classes, maps)
    rank_accuracies = {
        name: relevance_rank_accuracy(
            ranks(upsample(relu(block_maps), size), setup.generator("ties")), masks
        )
        for name, block_maps in maps.items()
    }
    similarities = {}
    for (first, block_maps), (second, next_maps) in pairwise(maps.items()):
        grid = (next_maps.shape[-2], next_maps.shape[-1])
        similarities[first, second] = spearman(resize(block_maps, grid), next_maps)
    return judge_depth(
        setup, {MEASURES[0]: correlations, MEASURES[1]: rank_accuracies}, similarities
    )


def _maps_by_block(
    network: nn.Module, images: Images, classes: Labels, blocks: Sequence[str]
) -> dict[str, Maps]:
    parts = [
        grad_cam(network, part_images, blocks, part_classes)
        for part_images, part_classes in zip(
            torch.split(images, BATCH), torch.split(classes, BATCH), strict=True
        )
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in blocks}


def _faithfulness_by_block(
    setup: ClaimSetup, images: Images, classes: Labels, maps: dict[str, Maps]
) -> dict[str, PerImage]:
    """Faithfulness correlation of all blocks' maps, from one bank."""
    parts_by_block: dict[str, list[PerImage]] = {name: [] for name in maps}
    size = (images.shape[2], images.shape[3])
    generator = setup.generator("subsets")
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        answer_bank = build_bank(
            setup.teacher,
            images[part],
            baseline(images[part], "gray"),
            generator,
            classes=classes[part],
            plan=BankPlan(occluders=()),
        )
        for name, block_maps in maps.items():
            parts_by_block[name].append(
                faithfulness_correlation(upsample(block_maps[part], size), answer_bank)
            )
    return {name: torch.cat(parts) for name, parts in parts_by_block.items()}


def judge_depth(
    setup: ClaimSetup,
    scores_by_measure: dict[str, dict[str, PerImage]],
    similarities: dict[tuple[str, str], PerImage],
) -> ClaimResult:
    """Row 22 of each measure by block, first to last, and of the similarity of neighbors."""
    ours: list[ClaimMeasurement] = []
    stage_gains: list[ClaimMeasurement] = []
    for measure, table in scores_by_measure.items():
        ours += [mean(name, entry, setup, measure) for name, entry in table.items()]
        ends = _stage_ends(list(table))
        stage_gains += [
            gain(f"{later} - {earlier}", table[later], table[earlier], setup, f"{measure}, more")
            for earlier, later in pairwise(ends)
        ]
    within, across = (
        torch.stack(
            [entry for pair, entry in similarities.items() if _is_same_stage(*pair) is same]
        ).mean(0)
        for same in (True, False)
    )
    jump = gain("within - across", within, across, setup, "neighbors' rank correlation, more")
    return ClaimResult(
        number="22",
        claim="Maps become worse towards earlier layers, most where the grid changes",
        paper="figures (footnote 3 and appendix)",
        ours=(
            *ours,
            *stage_gains,
            mean("within a stage", within, setup, "neighbors' rank correlation"),
            mean("across stages", across, setup, "neighbors' rank correlation"),
            jump,
        ),
        criterion="the last block of each stage is better than that of the stage before, by both "
        "measures, and neighboring blocks' maps agree more within a stage than across: all "
        "paired intervals above 0",
        passed=all(entry.above_zero for entry in (*stage_gains, jump)),
        note="neighbors are compared on the later one's grid",
    )


def _stage(block: str) -> str:
    return block.partition(".")[0]


def _is_same_stage(block: str, other: str) -> bool:
    return _stage(block) == _stage(other)


def _stage_ends(blocks: Sequence[str]) -> list[str]:
    """The last block of each stage."""
    return list({_stage(block): block for block in blocks}.values())
