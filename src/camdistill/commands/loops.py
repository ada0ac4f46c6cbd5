"""`fit`, `validate`, `test` and `predict`: Lightning's loops, and what to do next."""

import io
import shlex
import zipfile
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from camdistill.commands.command_parser import LOOP_OPTIONS, check_config_of
from camdistill.commands.help import loop_help
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.errors import UserError
from camdistill.experiments.training.arms_and_seeds import result_rows
from camdistill.experiments.training.checkpoint_io import LAST
from camdistill.experiments.training.config_errors import (
    config_files,
    raise_user_errors,
    read_config,
)
from camdistill.experiments.training.earlier_results import PREDICTIONS
from camdistill.experiments.training.lightning_cli import Experiment
from camdistill.experiments.training.option_checks import check_words
from camdistill.report.results import text_table
from camdistill.report.tensorboard import tensorboard_command
from camdistill.store.atomic_files import read_arrays, write_atomically

# What a validation measures: the last words of its tags, as the test's table calls them.
_VALIDATION_NAMES = {
    "accuracy_val": "accuracy",
    "accuracy_student": "accuracy",
    "agreement": "agreement",
    "pearson": "pearson",
    "skill": "skill",
    "loss_val": "loss",
}


class _ReportingExperiment(Experiment):
    """An experiment that says where its results are."""

    def after_fit(self) -> None:
        """Keeps the small checkpoint and names the next steps."""
        if not self.trainer.is_global_zero:
            return
        if batches := _batches_of_trial(self.trainer):
            print(f"\nThis was a trial run (fast_dev_run) of {batches}; nothing of it is kept")
            return
        path = self.save_network()
        last = self.folder / LAST
        status = "Trained" if self.trainer.global_step else "Nothing was trained (0 steps)"
        last_note = f" and {last} (whole, to go on from)" if last.is_file() else ""
        print(f"\n{status}: {path} (small, for use){last_note}")
        if measures := _validation_measures(self.trainer.callback_metrics):
            print(f"\n{text_table({'last validation': measures})}\n")
        test_checkpoint = last if last.is_file() else path
        config_quoted, full_quoted, small_quoted = (
            shlex.quote(str(file)) for file in (self.folder / "config.yaml", test_checkpoint, path)
        )
        if (self.folder / "config.yaml").is_file():
            print(f"  test it:     camdistill test -c {config_quoted} --ckpt_path {full_quoted}")
        if isinstance(self.model, DistilledExplainer):
            print(f"  look at it:  camdistill explain --checkpoint {small_quoted} --images FOLDER")
        events = any(self.folder.glob("events.out.tfevents.*"))
        if events:
            print(f"  its curves:  camdistill report --run {shlex.quote(str(self.folder))}")
        print(f"  {tensorboard_command(self.folder.parent)}")

    def save_network(self) -> Path:
        """Writes what was trained, and says what was removed because it was of an earlier one."""
        path = super().save_network()
        if self.removed_files:
            removed_names = ", ".join(self.removed_files)
            print(
                f"\nRemoved from {self.folder}, as it was of the earlier {path.stem}: "
                f"{removed_names}"
            )
        return path

    def after_validate(self) -> None:
        """Prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        metrics = self.trainer.callback_metrics.items()
        row = {name.rpartition("/")[2]: float(value) for name, value in metrics}
        print(f"\n{text_table({str(self.folder): row}, corner='validation images')}")

    def predict(self, **options: Any) -> None:
        """Writes names, logits and raw maps of the test images, in their order."""
        if self.trainer.world_size > 1:
            raise UserError("predict writes one file, in one process: --trainer.devices 1")
        options["return_predictions"] = True
        parts: dict[str, list[np.ndarray]] = {}
        for batch in self.trainer.predict(**options) or []:
            for name, values in _arrays_by_name(batch).items():
                parts.setdefault(name, []).append(values)
        arrays = {name: np.concatenate(values) for name, values in parts.items()}
        count = len(next(iter(arrays.values()), []))
        test_set = getattr(self.datamodule, "test_set", None)
        if test_set is not None:
            arrays["names"] = np.array(test_set.names[:count], dtype=np.str_)
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        path = self.folder / PREDICTIONS
        part = _describe_part(self.trainer.num_predict_batches, self.trainer.predict_dataloaders)
        trial = _batches_of_trial(self.trainer)
        if trial or (part and count < (earlier_count := _count_predictions(path))):
            reason = (
                "it was a trial run" if trial else f"{path} is of {earlier_count} images and stays"
            )
            print(f"\nPredictions of {count} images ({part or 'all'}) are not written: {reason}")
            return
        write_atomically(path, content.getvalue())
        print(f"\n{', '.join(arrays)} of {count} images: {path}")

    def after_test(self) -> None:
        """Writes and prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        part = _describe_part(self.trainer.num_test_batches, self.trainer.test_dataloaders)
        results = self.model.results() if part else self.write_results()
        table = text_table(result_rows(results), corner=f"{results['n']} test images")
        print(f"\n{table}")
        if part:
            print(f"\nResults are not written: these are of {part} alone")
            return
        print(f"\nResults: {self.folder / 'results.json'}")


def _batches_of_trial(trainer: object) -> str:
    """How many batches a trial run has; none where a run is no trial."""
    count = int(getattr(trainer, "fast_dev_run", 0))
    return f"{count} batch{'es' if count > 1 else ''}" if count else ""


def _describe_part(counts: Sequence[int | float], loaders: object) -> str:
    """Which part of its batches a loop took, as words; none where it took all.

    Args:
        counts: Counts of batches that it took, by loader.
        loaders: Lightning's: one, or several.
    """
    all_loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    total = sum(len(loader) for loader in all_loaders if isinstance(loader, Sized))
    done_count = int(sum(counts))
    return f"{done_count} of {total} batches" if done_count < total else ""


def _count_predictions(path: Path) -> int:
    """Of how many images a file of predictions is; 0 where there is none that can be read."""
    try:
        return max((len(array) for array in read_arrays(path).values()), default=0)
    except (UserError, OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
        return 0


def _validation_measures(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The measures of the last validation, by name, in the order of the test's table."""
    value_by_tag = {tag.rpartition("/")[2]: float(value) for tag, value in metrics.items()}
    return {
        name: value_by_tag[tag] for tag, name in _VALIDATION_NAMES.items() if tag in value_by_tag
    }


def _arrays_by_name(values: object, name: str = "") -> dict[str, np.ndarray]:
    """What a step predicts, by name: `student_maps_by_layer/stage5`; nothing where it is None.

    Numbers with a fraction become float32. A bare tensor is called `logits`.
    """
    if values is None:
        return {}
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        return {name or "logits": np.atleast_1d(tensor.numpy())}
    if isinstance(values, tuple) and hasattr(values, "_asdict"):
        values = values._asdict()
    elif isinstance(values, list | tuple):
        values = {str(index): value for index, value in enumerate(values)}
    if not isinstance(values, Mapping):
        return {name or "values": np.atleast_1d(np.asarray(values))}
    arrays: dict[str, np.ndarray] = {}
    for key, value in values.items():
        arrays |= _arrays_by_name(value, f"{name}/{key}" if name else str(key))
    return arrays


def run(arguments: Sequence[str]) -> None:
    """Runs one of Lightning's loops from a command line that begins with its name."""
    if {"-h", "--help"} & set(arguments):
        print(loop_help(arguments))
        return
    check_words(arguments)
    if {"base", "arms"} & {key for path in config_files(arguments) for key in read_config(path)}:
        check_config_of(arguments[0], LOOP_OPTIONS, arguments)
    with raise_user_errors():
        _ReportingExperiment(list(arguments))
