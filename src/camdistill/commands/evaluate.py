"""`evaluate`: how good explanations are, measured without labels, with the controls beside them."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from camdistill.commands.explainer_specs import parse_explainers, select_networks
from camdistill.commands.image_sources import load_image_source
from camdistill.commands.networks import image_side, load_networks
from camdistill.commands.progress import progress_bar, resolve_device
from camdistill.data.datasets import ImageSet
from camdistill.distill.training import as_images, match_channels
from camdistill.errors import UserError
from camdistill.experiments.evaluation.evaluation_report import write_pictures
from camdistill.experiments.evaluation.evaluation_run import (
    EvaluatedExplainer,
    Evaluation,
    EvaluationSubject,
)
from camdistill.experiments.evaluation.evaluation_run import evaluate_explainers as run
from camdistill.experiments.evaluation.evaluation_tables import summarize_pool
from camdistill.experiments.evaluation.meta_evaluation import REFERENCES
from camdistill.experiments.evaluation.pooling import EvaluationPool, map_makers
from camdistill.measure.metrics import (
    DEFAULT,
    DEFAULT_WITH_MASKS,
    FILE,
    OF_WEIGHTS,
    check_metrics,
    metric_of,
)
from camdistill.networks.capture import check_forward
from camdistill.networks.heads import head_size
from camdistill.networks.weights import weights_digest
from camdistill.report.results import write_results
from camdistill.report.tensorboard import tensorboard_command
from camdistill.store.atomic_files import write_atomically
from camdistill.store.digest import sha256_of

MEASUREMENT_VERSION = 3  # goes up when the same settings would give other values


def evaluate(
    checkpoint: Path | None = None,
    teacher: str | None = None,
    weights: str | None = None,
    images: list[Path] = [],  # noqa: B006  (never changed; jsonargparse shows it)
    data: str | None = None,
    explainers: list[str] = [],  # noqa: B006
    of: Literal["teacher", "student"] = "teacher",
    layer: str | None = None,
    metrics: list[str] = [],  # noqa: B006
    meta: bool = False,
    count: int = 256,
    size: int | None = None,
    batch: int = 64,
    seed: int = 0,
    device: Literal["cpu", "cuda"] | None = None,
    out: Path = Path("runs/evaluate"),
    trust: list[str] = [],  # noqa: B006
) -> dict[str, object]:
    """Measures explanations of a network's own top class: no labels are needed.

    Every table has its controls: maps that know nothing, and must lose. Values are means over
    images with 95 % bootstrap intervals. A run that was killed goes on with the same command.

    Args:
        checkpoint: A student (or classifier) of ours: .safetensors or .ckpt.
        teacher: A network alone, by name or class path: resnet50, resnet56, package.module.Network.
        weights: Weights of that network: a file, or DEFAULT for torchvision's. With a checkpoint:
            where the teacher's file is now.
        images: Image files or folders.
        data: In place of images: shapes, cifar10, cifar100, or an image folder; its test images.
        explainers: What is compared: methods by name, with a layer if wanted (grad_cam, occlusion,
            layer_cam@layer2), student (its Grad-CAM for the teacher's class; or teacher), the
            student (or the adapted explainer) in another FILE.safetensors, package.module.function
            of (network, images, classes), FILE.npz with an array `maps` of one map an image.
            NAME=... names one; several of one name are its seeds, one row of the table. All are
            compared with the first. Default: grad_cam, and the student beside its teacher.
        of: Network whose decisions are explained: teacher or student.
        layer: Layer of the network that is explained. Default: the checkpoint's, or the last layer.
        metrics: Their names, or FILE.safetensors of a learned one; probabilities are the softmax,
            of a single logit the sigmoid. Default: what docs/metrics.md ranks by, deletion,
            sparsity and the gates; where there are masks, localization.
        meta: Put the metrics themselves to the test: ladder, controls, halves, references.
        count: At most so many images, spread evenly.
        size: Side in pixels that images are scaled and cut to. Default: the training images'.
        batch: Images at once.
        seed: Seed of the metrics' random choices; methods that draw (rise, smooth_grad) have their
            own.
        device: cpu or cuda. Default: a GPU where there is one.
        out: Folder for the results.
        trust: Packages besides camdistill, torch, torchvision and timm that a checkpoint's class
            paths may come from.
    """
    start_time = time.perf_counter()
    if batch < 1:
        raise UserError(f"batch is {batch}; give 1 or more images")
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more")
    selection = load_networks(checkpoint, teacher, weights, trust)
    networks = select_networks(selection, of, layer)
    networks.explained.to(resolve_device(device))
    source = load_image_source(
        images, data, count=count, size=image_side(size, networks.size), carving=selection.carving
    )
    image_set = source.images.subset(np.sort(source.order))
    first = as_images(image_set.batch([0]).pixels)
    check_forward(selection.by_name, match_channels(first, networks.channels), settled=True)
    subject = EvaluationSubject(networks.explained, image_set, source.shapes, networks.channels)
    compared_explainers = parse_explainers(explainers, networks, subject, trust)
    chosen_metrics = _select_metrics(
        metrics, subject, meta, has_live=any(explainer.explain for explainer in compared_explainers)
    )
    other_classes = head_size(networks.explained.network) > 1
    omitted = {} if metrics else _metrics_to_omit(compared_explainers, other_classes=other_classes)
    chosen_metrics = tuple(name for name in chosen_metrics if name not in omitted)
    _check_weight_metrics(metrics, compared_explainers)
    settings = {
        "measured_as": MEASUREMENT_VERSION,
        "checkpoint": networks.sha256,
        "network": weights_digest(networks.explained),
        "explainers": [
            {"name": explainer.name, "kind": explainer.kind, "digest": explainer.digest}
            for explainer in compared_explainers
        ],
        "metrics": [_identify_metric(name) for name in chosen_metrics],
        "images": [
            _fingerprint(image_set),
            image_set.ids.tolist(),
            *_annotation_fingerprint(image_set),
        ],
        **{"of": of, "layer": networks.layer, "batch": batch, "seed": seed, "meta": meta},
    }
    evaluation = Evaluation(
        subject, compared_explainers, chosen_metrics, seed, batch, meta, settings
    )
    with progress_bar() as progress:
        task = progress.add_task("evaluate", total=None)

        def on_batch(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        values = run(evaluation, out, on_batch)
    pool = EvaluationPool((values,), (map_makers(values, settings),))
    results, table, text = summarize_pool(pool, seed, meta=meta)
    write_pictures(evaluation, pool, table, text, out)
    write_results(
        out / "results.json",
        {**results, "command": {"of": of, "layer": networks.layer, "batch": batch, "seed": seed}},
        seconds=time.perf_counter() - start_time,
        sha256=networks.sha256,
    )
    write_atomically(out / "table.txt", text.encode())
    print(text)
    for name, reason in omitted.items():
        print(f"{name} is left out: {reason}.")
    print(f"{out / 'results.json'}, values.npz and pictures beside it")
    print(tensorboard_command(out))
    return results


def _metrics_to_omit(
    explainers: Sequence[EvaluatedExplainer], *, other_classes: bool
) -> dict[str, str]:
    """Metrics of the default that say nothing here, and why."""
    reasons = {}
    if not other_classes:
        reasons["random_logit"] = "the network has a single logit, so no other class"
    live_explainers = [explainer for explainer in explainers if explainer.explain is not None]
    if live_explainers and all(explainer.apart for explainer in live_explainers):
        reasons["randomization"] = (
            "it would be 0 by construction, as all maps are another network's"
        )
    return reasons


def _check_weight_metrics(metrics: Sequence[str], explainers: Sequence[EvaluatedExplainer]) -> None:
    """Refuse a named metric that would be the same whatever was learned."""
    weight_metrics = [name for name in metrics if name in OF_WEIGHTS]
    if weight_metrics and all(
        explainer.apart or explainer.explain is None for explainer in explainers
    ):
        raise UserError(
            f"metric '{weight_metrics[0]}' redraws the weights of the explained network, and all "
            "of these "
            f"maps are another network's, so it would be {OF_WEIGHTS[weight_metrics[0]]} by "
            "construction: "
            "leave it out, or compare a method too"
        )


def _identify_metric(metric: str) -> str:
    """A learned metric's file may change under its name."""
    return f"{metric} {sha256_of(Path(metric))}" if metric.endswith(FILE) else metric


def _annotation_fingerprint(images: ImageSet) -> list[str]:
    """What says where objects are, where that can change without the images."""
    return [images.annotation_digest] if images.annotation_digest else []


def _fingerprint(images: ImageSet) -> str:
    """Of files on the command line nobody has taken one yet."""
    if images.fingerprint:
        return images.fingerprint
    return hashlib.sha256(images.pixels[np.arange(len(images))].tobytes()).hexdigest()


def _select_metrics(
    names: Sequence[str], subject: EvaluationSubject, meta: bool, *, has_live: bool
) -> tuple[str, ...]:
    """The metrics; what can't be measured of these images and explainers is refused."""
    check_metrics(names)
    gates = [name for name in (names or DEFAULT) if metric_of(name).use == "gate" or name == "adcc"]
    if names and gates and not has_live:
        raise UserError(
            f"metric '{gates[0]}' asks for more maps, and all of these are stored: leave it out, "
            "or compare a method or a network too"
        )
    if "deletion_rerendered" in names and subject.shapes is None:
        raise UserError(
            "metric 'deletion_rerendered' draws images again without their objects, which Shapes "
            "alone can: leave it out, or give --data shapes"
        )
    selected = [name for name in (names or DEFAULT) if has_live or name not in gates]
    if not names and subject.has_locations:
        selected += DEFAULT_WITH_MASKS
    masked = [name for name in selected if metric_of(name).use == "mask"]
    if masked and not subject.has_locations:
        raise UserError(
            f"metric '{masked[0]}' needs masks, and these images have none: leave it out, or put a "
            "masks/ folder or a boxes.csv beside the images"
        )
    if meta and subject.shapes is not None:
        selected += [name for name in REFERENCES if name not in selected]
    return tuple(dict.fromkeys(selected))
