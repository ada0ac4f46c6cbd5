"""`fit`, `validate`, `test` and `predict`: Lightning's loops, and what to do next."""

import io
import shlex
import zipfile
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from camdistill.commands.command_parser import OF_LOOPS, demand_config_of
from camdistill.commands.help import loop_help
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.errors import UserError
from camdistill.experiments.training.arms_and_seeds import result_rows
from camdistill.experiments.training.checkpoint_io import LAST
from camdistill.experiments.training.config_errors import config_files, read_config, translated
from camdistill.experiments.training.earlier_results import PREDICTIONS
from camdistill.experiments.training.lightning_cli import Experiment
from camdistill.experiments.training.option_checks import check_words
from camdistill.report.results import text_table
from camdistill.report.tensorboard import how_to_look
from camdistill.store.atomic_files import read_arrays, write_atomically

# What a validation measures: the last words of its tags, as the test's table calls them.
_VALIDATED = {
    "accuracy_val": "accuracy",
    "accuracy_student": "accuracy",
    "agreement": "agreement",
    "pearson": "pearson",
    "skill": "skill",
    "loss_val": "loss",
}


class _Told(Experiment):
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
        told = "Trained" if self.trainer.global_step else "Nothing was trained (0 steps)"
        whole_too = f" and {last} (whole, to go on from)" if last.is_file() else ""
        print(f"\n{told}: {path} (small, for use){whole_too}")
        if measured := _measured(self.trainer.callback_metrics):
            print(f"\n{text_table({'last validation': measured})}\n")
        tested = last if last.is_file() else path
        config, whole, small = (
            shlex.quote(str(one)) for one in (self.folder / "config.yaml", tested, path)
        )
        if (self.folder / "config.yaml").is_file():
            print(f"  test it:     camdistill test -c {config} --ckpt_path {whole}")
        if isinstance(self.model, DistilledExplainer):
            print(f"  look at it:  camdistill explain --checkpoint {small} --images FOLDER")
        events = any(self.folder.glob("events.out.tfevents.*"))
        if events:
            print(f"  its curves:  camdistill report --run {shlex.quote(str(self.folder))}")
        print(f"  {how_to_look(self.folder.parent)}")

    def save_network(self) -> Path:
        """Writes what was trained, and says what was removed because it was of an earlier one."""
        path = super().save_network()
        if self.removed:
            gone = ", ".join(self.removed)
            print(f"\nRemoved from {self.folder}, as it was of the earlier {path.stem}: {gone}")
        return path

    def after_validate(self) -> None:
        """Prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        found = self.trainer.callback_metrics.items()
        row = {name.rpartition("/")[2]: float(value) for name, value in found}
        print(f"\n{text_table({str(self.folder): row}, corner='validation images')}")

    def predict(self, **options: Any) -> None:
        """Writes names, logits and raw maps of the test images, in their order."""
        if self.trainer.world_size > 1:
            raise UserError("predict writes one file, in one process: --trainer.devices 1")
        options["return_predictions"] = True
        parts: dict[str, list[np.ndarray]] = {}
        for batch in self.trainer.predict(**options) or []:
            for name, values in _arrays(batch).items():
                parts.setdefault(name, []).append(values)
        arrays = {name: np.concatenate(values) for name, values in parts.items()}
        count = len(next(iter(arrays.values()), []))
        test_set = getattr(self.datamodule, "test_set", None)
        if test_set is not None:
            arrays["names"] = np.array(test_set.names[:count], dtype=np.str_)
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        path = self.folder / PREDICTIONS
        part = _partly(self.trainer.num_predict_batches, self.trainer.predict_dataloaders)
        trial = _batches_of_trial(self.trainer)
        if trial or (part and count < (kept := _kept_predictions(path))):
            why = "it was a trial run" if trial else f"{path} is of {kept} images and stays"
            print(f"\nPredictions of {count} images ({part or 'all'}) are not written: {why}")
            return
        write_atomically(path, content.getvalue())
        print(f"\n{', '.join(arrays)} of {count} images: {path}")

    def after_test(self) -> None:
        """Writes and prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        part = _partly(self.trainer.num_test_batches, self.trainer.test_dataloaders)
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


def _partly(counts: Sequence[int | float], loaders: object) -> str:
    """Which part of its batches a loop took, as words; none where it took all.

    Args:
        counts: Of batches that it took, by loader.
        loaders: Lightning's: one, or several.
    """
    several = loaders if isinstance(loaders, list | tuple) else [loaders]
    whole = sum(len(one) for one in several if isinstance(one, Sized))
    taken = int(sum(counts))
    return f"{taken} of {whole} batches" if taken < whole else ""


def _kept_predictions(path: Path) -> int:
    """Of how many images a file of predictions is; 0 where there is none that can be read."""
    try:
        return max((len(one) for one in read_arrays(path).values()), default=0)
    except (UserError, OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
        return 0


def _measured(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The measures of the last validation, by name, in the order of the test's table."""
    found = {tag.rpartition("/")[2]: float(value) for tag, value in metrics.items()}
    return {name: found[tag] for tag, name in _VALIDATED.items() if tag in found}


def _arrays(values: object, name: str = "") -> dict[str, np.ndarray]:
    """What a step predicts, by name: `student_maps_by_layer/stage5`; nothing where it is None.

    Numbers with a fraction become float32. A bare tensor is called `logits`.
    """
    if values is None:
        return {}
    if isinstance(values, Tensor):
        whole = values.detach().cpu()
        whole = whole.float() if whole.is_floating_point() else whole
        return {name or "logits": np.atleast_1d(whole.numpy())}
    if isinstance(values, tuple) and hasattr(values, "_asdict"):
        values = values._asdict()
    elif isinstance(values, list | tuple):
        values = {str(place): value for place, value in enumerate(values)}
    if not isinstance(values, Mapping):
        return {name or "values": np.atleast_1d(np.asarray(values))}
    found: dict[str, np.ndarray] = {}
    for key, value in values.items():
        found |= _arrays(value, f"{name}/{key}" if name else str(key))
    return found


def run(arguments: Sequence[str]) -> None:
    """Runs one of Lightning's loops from a command line that begins with its name."""
    if {"-h", "--help"} & set(arguments):
        print(loop_help(arguments))
        return
    check_words(arguments)
    if {"base", "arms"} & {key for path in config_files(arguments) for key in read_config(path)}:
        demand_config_of(arguments[0], OF_LOOPS, arguments)
    with translated():
        _Told(list(arguments))
