"""`pool`: several evaluations in one table, their seeds or networks beside the images."""

from pathlib import Path

from camdistill.report.results import write_atomically, write_results
from camdistill.report.tensorboard import how_to_look
from camdistill.studies.evaluation_report import charts, write_cards
from camdistill.studies.evaluation_tables import told
from camdistill.studies.pool import read_pool


def pool(
    runs: list[Path] = [],  # noqa: B006  (never changed; jsonargparse shows it)
    seed: int = 0,
    out: Path = Path("runs/pool"),
) -> dict[str, object]:
    """Puts finished evaluations of the same explainers and images into one table.

    They may differ in the seed of their random choices, or in the network that is explained:
    students of several seeds. Intervals are over images and over these; with `--meta` evaluations
    the metrics' own test is told as a mean with the lowest and the highest.

    Args:
        runs: Folders of `camdistill evaluate`, two or more.
        seed: Of the resampling where a row has one seed.
        out: Folder for the results.
    """
    found, settings = read_pool(runs)
    meta = all(one.rungs for one in found.runs)
    results, table, text = told(found, seed, meta=meta)
    write_cards(charts(found, table), text, out)
    told_apart = [{name: one[name] for name in one if name != "images"} for one in settings]
    write_results(out / "results.json", {**results, "runs": runs, "settings": told_apart})
    write_atomically(out / "table.txt", text.encode())
    print(text)
    print(f"{out / 'results.json'} and charts beside it")
    print(how_to_look(out))
    return results
