"""`fit`, `validate`, `test` and `predict`: Lightning's loops, and what to do next."""

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from camdistill.commands.help import loop_help
from camdistill.commands.parsing import OF_LOOPS, demand_config_of
from camdistill.distill.module import DistilledExplainer
from camdistill.errors import UserError
from camdistill.files import write_atomically
from camdistill.report.results import text_table
from camdistill.report.tensorboard import how_to_look
from camdistill.studies.checkpoint_files import LAST
from camdistill.studies.experiment import Experiment
from camdistill.studies.option_checks import check_words
from camdistill.studies.parsing import config_files, read_config, translated
from camdistill.studies.runs import result_rows

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
        path = self.folder / "predictions.npz"
        write_atomically(path, content.getvalue())
        print(f"\n{', '.join(arrays)} of {count} images: {path}")

    def after_test(self) -> None:
        """Writes and prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        results = self.write_results()
        table = text_table(result_rows(results), corner=f"{results['n']} test images")
        print(f"\n{table}")
        print(f"\nResults: {self.folder / 'results.json'}")


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
