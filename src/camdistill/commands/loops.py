"""`fit`, `validate`, `test` and `predict`: Lightning's loops, and what to do next."""

import io
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from camdistill.commands.help import loop_help
from camdistill.distill.module import DistilledExplainer
from camdistill.errors import UserError
from camdistill.files import write_atomically
from camdistill.report.results import text_table
from camdistill.report.tensorboard import how_to_look
from camdistill.studies.checkpoint_files import LAST
from camdistill.studies.experiment import Experiment
from camdistill.studies.parsing import translated
from camdistill.studies.runs import result_rows


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
        tested = last if last.is_file() else path
        config, whole, small = (
            shlex.quote(str(one)) for one in (self.folder / "config.yaml", tested, path)
        )
        if (self.folder / "config.yaml").is_file():
            print(f"  test it:     camdistill test -c {config} --ckpt_path {whole}")
        if isinstance(self.model, DistilledExplainer):
            print(f"  look at it:  camdistill explain --checkpoint {small} --images FOLDER")
        print(f"  {how_to_look(self.folder.parent)}")

    def after_validate(self) -> None:
        """Prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        found = self.trainer.callback_metrics.items()
        row = {name.rpartition("/")[2]: float(value) for name, value in found}
        print(f"\n{text_table({str(self.folder): row}, corner='validation images')}")

    def predict(self, **options: Any) -> None:
        """Writes logits and raw maps of the test images, in their order."""
        parts = self.trainer.predict(**options) or []
        if self.trainer.world_size > 1:
            raise UserError("predict writes one file, in one process: --trainer.devices 1")
        arrays: dict[str, list[np.ndarray]] = {}
        for part in parts:
            for name, value in _flat(part._asdict() if hasattr(part, "_asdict") else part).items():
                arrays.setdefault(name, []).append(value)
        content = io.BytesIO()
        joined = {name: np.concatenate(values) for name, values in arrays.items()}
        np.savez_compressed(content, allow_pickle=False, **joined)
        path = self.folder / "predictions.npz"
        write_atomically(path, content.getvalue())
        print(f"\nLogits and maps of {len(next(iter(joined.values()), []))} images: {path}")

    def after_test(self) -> None:
        """Writes and prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        results = self.write_results()
        table = text_table(result_rows(results), corner=f"{results['n']} test images")
        print(f"\n{table}")
        print(f"\nResults: {self.folder / 'results.json'}")


def _flat(values: Any, name: str = "logits") -> dict[str, np.ndarray]:
    """Nested tensors by name: `student_maps_by_layer/stage5`."""
    if isinstance(values, Tensor):
        return {name: values.cpu().float().numpy()}
    found: dict[str, np.ndarray] = {}
    for key, value in values.items():
        found |= _flat(value, key if name == "logits" else f"{name}/{key}")
    return found


def run(arguments: Sequence[str]) -> None:
    """Runs one of Lightning's loops from a command line that begins with its name."""
    if {"-h", "--help"} & set(arguments):
        print(loop_help(arguments))
        return
    with translated():
        _Told(list(arguments))
