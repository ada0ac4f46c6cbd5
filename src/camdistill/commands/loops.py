"""`fit`, `validate`, `test` and `predict`: Lightning's loops, and what to do next."""

from collections.abc import Sequence

from camdistill.commands.help import loop_help
from camdistill.distill.module import DistilledExplainer
from camdistill.report.results import text_table
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
        print(f"\nTrained: {path} (small, for use) and {last} (whole, to go on from)")
        print(f"  test it:     camdistill test -c {self.folder}/config.yaml --ckpt_path {last}")
        if isinstance(self.model, DistilledExplainer):
            print(f"  look at it:  camdistill explain --checkpoint {path} --images FOLDER")
        print(f"  TensorBoard: tensorboard --logdir {self.folder.parent}")

    def after_validate(self) -> None:
        """Prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        found = self.trainer.callback_metrics.items()
        row = {name.rpartition("/")[2]: float(value) for name, value in found}
        print(f"\n{text_table({str(self.folder): row}, corner='validation images')}")

    def after_test(self) -> None:
        """Writes and prints what was measured."""
        if not self.trainer.is_global_zero:
            return
        results = self.write_results()
        table = text_table(result_rows(results), corner=f"{results['n']} test images")
        print(f"\n{table}")
        print(f"\nResults: {self.folder / 'results.json'}")


def run(arguments: Sequence[str]) -> None:
    """Runs one of Lightning's loops from a command line that begins with its name."""
    if {"-h", "--help"} & set(arguments):
        print(loop_help(arguments))
        return
    with translated():
        _Told(list(arguments))
