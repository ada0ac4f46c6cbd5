"""Writes TensorBoard events: scalars with descriptions, pictures, text and the front page.

Summaries are new-style (a tensor and the plugin's metadata): TensorBoard's default loader shows a
card's description only for these.
"""

import io
import json
import math
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

import numpy as np
import yaml
from jaxtyping import Float, Shaped, UInt8
from lightning_fabric.loggers.logger import rank_zero_experiment
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger as LightningTensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.histogram.metadata import create_summary_metadata as histogram_metadata
from tensorboard.plugins.image.metadata import create_summary_metadata as image_metadata
from tensorboard.plugins.scalar.metadata import create_summary_metadata as scalar_metadata
from tensorboard.plugins.text.metadata import create_summary_metadata as text_metadata
from tensorboard.util.tensor_util import make_ndarray, make_tensor_proto
from torch import Tensor
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from camdistill import tags
from camdistill.store.atomic_files import expand_home

Picture = UInt8[np.ndarray, "height width 3"]
MAX_STEP = 2**62


class _LateWriter(SummaryWriter):
    """Opens its file with the first event: Lightning asks for a writer before checks are done."""

    def __init__(self, log_dir: str, **options: object) -> None:
        self._constructed = False
        super().__init__(log_dir, **options)
        self._constructed = True

    def _get_file_writer(self) -> FileWriter | None:
        return super()._get_file_writer() if self._constructed else None  # type: ignore[no-untyped-call]


class TensorBoardLogger(LightningTensorBoardLogger):
    """Lightning's logger, with descriptions, pictures and text, and without its noise.

    It writes no `hp_metric`, no `epoch` card and no empty hparams.yaml, names the metrics of the
    HParams table without writing placeholder points, and writes nothing on other ranks than 0.

    Args:
        save_dir: Folder of all runs.
        name: Folder of the experiment below it; empty for none.
        version: Folder of the run; 3 becomes `version_3`. None takes the next free number: give one
            where a resumed run shall go on in the same folder.
        sub_dir: Folder below the run, for events with another x axis or of another stage.
        hparam_metrics: Tags that HParams shows beside the settings.
        flush_secs: Events reach the disk at least this often, in seconds.
        filename_suffix: Ends the name of the file of events.
    """

    def __init__(
        self,
        save_dir: str | Path = "runs",
        name: str = "",
        version: str | int | None = None,
        *,
        sub_dir: str | None = None,
        hparam_metrics: Sequence[str] = tags.STUDENT_CARDS,
        flush_secs: int = 30,
        filename_suffix: str = "",
    ) -> None:
        super().__init__(
            os.path.expandvars(expand_home(save_dir)),
            name=name,
            version=version,
            default_hp_metric=False,
            sub_dir=sub_dir,
            flush_secs=flush_secs,
            filename_suffix=filename_suffix,
        )
        self._hparam_metrics = tuple(hparam_metrics)
        self._written_tags: set[str] = set()

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """What writes the events of this process."""
        if self._experiment is None:
            self._experiment = _LateWriter(self.log_dir, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def open_file(self) -> None:
        """Opens the file of events, which the first event does otherwise."""
        self.experiment._get_file_writer()
        self.experiment.flush()

    @property
    def written_tags(self) -> frozenset[str]:
        """Tags written so far."""
        return frozenset(self._written_tags)

    @property
    def run(self) -> str:
        """The run's name in TensorBoard: its folder below `save_dir`."""
        return Path(self.log_dir).relative_to(self.save_dir).as_posix()

    def sub_logger(self, folder: str) -> "TensorBoardLogger":
        """A run of its own in a folder below this one: of another network, in the same charts."""
        below = str(Path(self.sub_dir or "", folder))
        return TensorBoardLogger(
            self.save_dir, self.name, self.version, sub_dir=below, hparam_metrics=()
        )

    @rank_zero_only
    def log_metrics(
        self, metrics: Mapping[str, float | int | Tensor], step: int | None = None
    ) -> None:
        """Writes scalars, once each; the card's description goes with a tag's first value."""
        for tag, value in metrics.items():
            if tag != "epoch":
                number = float(value.item() if isinstance(value, Tensor) else value)
                content = make_tensor_proto(np.float32(number))
                self._write(tag, content, scalar_metadata(None, tags.describe_card(tag)), step)

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, object] | Namespace,
        metrics: dict[str, object] | None = None,
        step: int | None = None,
    ) -> None:
        """Writes the HParams table's row; its metrics are whatever the tags' last values are."""
        plain = {
            name: _to_yaml(value)
            for name, value in (params if isinstance(params, dict) else vars(params)).items()
            if not name.startswith("_")
        }
        super().log_hyperparams(plain)
        rows = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in _flatten(plain).items()
        }
        metric_names = dict.fromkeys((*self._hparam_metrics, *(metrics or {})), 0.0)
        writer = self.experiment._get_file_writer()
        assert writer is not None
        for summary in hparams_summaries(rows, metric_names):  # type: ignore[no-untyped-call]
            writer.add_summary(summary, step)
        if metrics:
            self.log_metrics({tag: float(str(value)) for tag, value in metrics.items()}, step)

    @rank_zero_only
    def save(self) -> None:
        """Writes what is pending, and hparams.yaml of a run that has settings."""
        self.experiment.flush()
        if self.hparams:
            super().save()

    @rank_zero_only
    def log_picture(self, tag: str, picture: Picture, step: int) -> None:
        """Writes one RGB picture, as PNG without loss.

        TensorBoard keeps 10 steps of a tag, the last for sure and the first not: write at most 10.
        """
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        height, width, _ = picture.shape
        sizes = [str(width).encode(), str(height).encode()]
        proto = make_tensor_proto(np.array([*sizes, content.getvalue()], dtype=object))
        self._write(tag, proto, image_metadata(None, tags.describe_card(tag)), step)
        self.experiment.flush()

    @rank_zero_only
    def log_histogram(
        self,
        tag: str,
        edges: Float[np.ndarray, "bins_and_one"],
        counts: Shaped[np.ndarray, "bins"],
        step: int,
    ) -> None:
        """Writes counts between edges; empty bins at both ends are left out.

        TensorBoard draws 30 equal bins over the range of all steps, whatever is written: give edges
        on the axis that shall be seen (powers of ten), and few empty decades. A value that is not
        finite would blank the card at every step, so such bins are dropped.
        """
        limits = np.stack([edges[:-1], edges[1:], counts], axis=1).astype(np.float64)
        finite_bins = limits[np.isfinite(limits).all(1)]
        used = np.flatnonzero(finite_bins[:, 2])
        finite_bins = finite_bins[used[0] : used[-1] + 1] if len(used) else np.zeros((1, 3))
        self._write(
            tag,
            make_tensor_proto(finite_bins),
            histogram_metadata(None, tags.describe_card(tag)),
            step,
        )

    @rank_zero_only
    def log_layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Writes the Custom Scalars tab: charts of several tags, by category and by name."""
        layout = {
            category: {
                name: ["Multiline", [f"{re.escape(tag)}$" for tag in chart_tags]]
                for name, chart_tags in tags_by_chart.items()
            }
            for category, tags_by_chart in charts.items()
        }
        writer = self.experiment._get_file_writer()
        assert writer is not None
        writer.add_summary(custom_scalars(layout))  # type: ignore[no-untyped-call]

    @rank_zero_only
    def log_text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Writes a Markdown page."""
        proto = make_tensor_proto(np.array([markdown.encode()], dtype=object))
        self._write(tag, proto, text_metadata(None, tags.describe_card(tag)), step)
        self.experiment.flush()

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Hides what an earlier, killed process logged at `step` and after; or lines zig-zag."""
        writer = self.experiment._get_file_writer()
        assert writer is not None
        # A run's first start hides nothing: SummaryWriter's `purge_step` alone fails at the first
        # resume. So one start that hides nothing comes before.
        for start in (MAX_STEP, step):
            log = SessionLog(status=SessionLog.START)
            writer.add_event(Event(step=start, session_log=log), start)

    def _write(self, tag: str, tensor: object, metadata: SummaryMetadata, step: int | None) -> None:
        writer = self.experiment._get_file_writer()
        assert writer is not None
        # Readers take a tag's metadata from its first event in the file, as TensorFlow writes it.
        first = None if tag in self._written_tags else metadata
        self._written_tags.add(tag)
        summary = Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=first)])
        writer.add_summary(summary, step)


def tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    """The trainer's loggers that take pictures and text; none on other ranks than 0."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def scalar_step(trainer: Trainer) -> int:
    """The step at which Lightning writes its scalars at the end of an epoch.

    Lightning counts a step when its batch is done, its loggers a moment later: `global_step` is 4
    where the scalars of a 4-batch epoch stand at 3.
    """
    return max(trainer.global_step - 1, 0)


def picture_due(trainer: Trainer, validations: int, limit: int) -> int:
    """Number of the picture that belongs at this validation: 1 at first, `limit` at the run's end.

    Args:
        trainer: Trainer of the run.
        validations: How many there were, this one among them.
        limit: Pictures of a tag in a run; TensorBoard shows 10.
    """
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:  # trained until stopped: after 1, 2, 4, 8, ... validations
        return min(validations.bit_length(), limit)
    return 1 + min(trainer.global_step * (limit - 1) // int(steps), limit - 1)


def is_reporting(trainer: Trainer) -> bool:
    """Whether a callback that draws has somewhere to draw now: training, after the sanity check."""
    return (
        not trainer.sanity_checking
        and trainer.state.fn == "fit"
        and bool(tensorboard_loggers(trainer))
    )


def tensorboard_command(folder: Path) -> str:
    """The line that ends a command: what to type to see its report."""
    return f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}"


def front_page_url(
    *,
    scalars: Sequence[str] = tags.STUDENT_CARDS,
    pictures: Sequence[tuple[str, str]] = (),
    histograms: Sequence[tuple[str, str]] = (),
    curves_last: bool = False,
    base: str = "http://localhost:6006",
) -> str:
    """A link to TensorBoard with the cards that matter pinned on top, unsmoothed.

    Args:
        scalars: Tags of charts; they show all runs.
        pictures: Tags of pictures, each with its run: the run's folder below --logdir, "." for that
            itself.
        histograms: Tags of histograms, likewise.
        curves_last: Whether charts come after the rest. TensorBoard cuts the ends off a curve of
            few points ("ignore outliers"), so that a picture of it is read first.
        base: Where TensorBoard listens.
    """
    curves: list[dict[str, str | int]] = [{"plugin": "scalars", "tag": tag} for tag in scalars]
    cards: list[dict[str, str | int]] = [
        # Without the experiment's name TensorBoard ignores the card.
        {"plugin": "images", "tag": tag, "runId": f"defaultExperimentId/{run}", "sample": 0}
        for tag, run in pictures
    ]
    cards += [
        {"plugin": "histograms", "tag": tag, "runId": f"defaultExperimentId/{run}"}
        for tag, run in histograms
    ]
    cards = [*cards, *curves] if curves_last else [*curves, *cards]
    pinned = json.dumps(cards, separators=(",", ":"))
    query = urlencode({"smoothing": 0, "pinnedCards": pinned}, quote_via=quote)
    return f"{base.rstrip('/')}/?{query}#timeseries"


def settings_page(settings: Mapping[str, object]) -> str:
    """Settings as YAML, without what frameworks add for themselves."""
    plain = {name: _to_yaml(value) for name, value in settings.items() if not name.startswith("_")}
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def read_tags(folder: Path) -> dict[str, str]:
    """A run's tags, each with the plugin that shows it: "scalars", "images", "text" and so on."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 1})
    events.Reload()
    return {
        tag: str(events.SummaryMetadata(tag).plugin_data.plugin_name)
        for tag in events.Tags()["tensors"]
    }


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads a run's scalars back: (step, value) by tag, as TensorBoard shows them."""
    # TensorBoard's other accumulator leaves a resumed run's hidden values in.
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [
            (event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


def _to_yaml(value: object) -> object:
    """Settings as YAML can hold them without naming a Python class."""
    if isinstance(value, Mapping):
        return {str(name): _to_yaml(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_yaml(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted name."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
