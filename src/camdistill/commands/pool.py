"""`pool`: several evaluations in one table, their seeds or networks beside the images."""

import time
from pathlib import Path

from camdistill.errors import UserError
from camdistill.experiments.evaluation.evaluation_report import draw_charts, write_cards
from camdistill.experiments.evaluation.evaluation_tables import summarize_pool
from camdistill.experiments.evaluation.evaluation_values import FILE
from camdistill.experiments.evaluation.pooling import read_pool
from camdistill.report.results import write_results
from camdistill.report.tensorboard import tensorboard_command
from camdistill.store.atomic_files import write_atomically
from camdistill.store.digest import sha256_of


def pool(
    runs: list[Path] = [],  # noqa: B006  (never changed; jsonargparse shows it)
    seed: int = 0,
    out: Path = Path("runs/pool"),
) -> dict[str, object]:
    """Puts finished evaluations of the same explainers and images into one table.

    They may differ in the networks (students of several seeds): these are then seeds of one row,
    with intervals over images and seeds. Where the seed of the random choices alone differs,
    values of the same map are averaged. With `--meta` evaluations the metrics' own test is told as
    a mean with the lowest and the highest.

    Args:
        runs: Folders of `camdistill evaluate`, two or more.
        seed: Seed of the resampling of images.
        out: Folder for the results.
    """
    start_time = time.perf_counter()
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more")
    if out.resolve() in [folder.resolve() for folder in runs]:
        raise UserError(
            f"--out '{out}' is one of the runs, and would be written over: name another"
        )
    pooled, settings = read_pool(runs)
    meta = all(entry.rungs for entry in pooled.runs)
    results, table, text = summarize_pool(pooled, seed, meta=meta)
    write_cards(draw_charts(pooled, table), text, out)
    run_settings = [{name: entry[name] for name in entry if name != "images"} for entry in settings]
    write_results(
        out / "results.json",
        {**results, "runs": runs, "settings": run_settings},
        seconds=time.perf_counter() - start_time,
        sha256={str(folder): sha256_of(folder / FILE) for folder in runs},
    )
    write_atomically(out / "table.txt", text.encode())
    print(text)
    print(f"{out / 'results.json'} and charts beside it")
    print(tensorboard_command(out))
    return results
