"""`study`: arms times seeds, and the table that compares them."""

from pathlib import Path

from camdistill.experiments.training.arms_and_seeds import (
    TrainingStudy,
    mark_definitions,
    run_study,
)
from camdistill.report.figures.intervals import interval_chart
from camdistill.report.figures.pictures import save_png
from camdistill.report.results import text_table
from camdistill.report.tensorboard import tensorboard_command
from camdistill.store.atomic_files import write_atomically

# What an option of a run may be: a value, or a list as model.transfer.pairs is.
Setting = bool | int | float | str | list[dict[str, str | float]] | None


def study(
    base: Path,
    arms: dict[str, dict[str, Setting]],
    seeds: list[int] = [0, 1, 2],  # noqa: B006  (never changed; jsonargparse shows it)
    out: Path = Path("runs/study"),
    overrides: list[str] = [],  # noqa: B006
) -> dict[str, object]:
    """Trains several arms with several seeds and compares them, resuming where it was stopped.

    The first arm is the one that the others are compared with. Intervals are 95 %: Student's t over
    seeds, or a bootstrap over the test images where there is one seed.

    Args:
        base: Config of the training that all arms share.
        arms: Options that differ, by arm: {kd: {model.beta: 0}}.
        seeds: Seeds of the student's start, the order and the views; the same for every arm.
        out: Folder of the runs, `results.json`, `table.txt` and a chart.
        overrides: Further options for all arms, as on the command line: --trainer.max_epochs=1.
    """
    training_study = TrainingStudy(base, arms, seeds, out, overrides)
    results = run_study(training_study, on_run=_announce)
    rows = {"student": results["student"], **results["controls"]}
    over = "seeds" if len(seeds) > 1 else "test images"
    table = text_table(mark_definitions(rows), corner=f"n = {results['n']}")
    gains = text_table(results["gain_over"], corner="student minus")
    text = f"{table}\n\n{gains}\n\n95 % intervals over {over}; seeds {seeds}\n"
    write_atomically(out / "table.txt", text.encode())
    chart = save_png(out / "table.png", interval_chart(rows, title=f"95 % intervals over {over}"))
    print(f"\n{text}\nResults: {out / 'results.json'}   Chart: {chart}")
    print(tensorboard_command(out))
    return results


def _announce(arm: str, seed: int, done: int, count: int) -> None:
    print(f"\n[{done + 1} of {count}] {arm}, seed {seed}")
