"""Trains every arm with every seed from one config, and resumes where it was stopped."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pytorch_lightning.utilities import rank_zero_only

from camdistill.data.modules import ImageData
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.errors import UserError, check_folder_name, check_number, nearest
from camdistill.experiments.training.config_errors import read_config
from camdistill.experiments.training.lightning_cli import Experiment, read_table
from camdistill.experiments.training.trainer_options import STUDY_RUN_OPTIONS, check_run_of_study
from camdistill.measure.fidelity import SAME_MAP, FidelityTable, intervals
from camdistill.measure.intervals import FloatArray, Interval, paired_interval, seed_interval
from camdistill.networks.teachers import Teacher
from camdistill.report.results import Cell, read_results, write_results
from camdistill.store.digest import sha256_of

MEASURES = ("accuracy", "agreement", "pearson", "spearman", "cosine", "skill", "runner_up")
RESULTS = "results.json"
# Names that a study's results have for other rows, and its folder for other files
RESERVED = ("mean_map", "same_map", RESULTS, "table.txt", "table.png")
# Options of a run that the study itself gives
STUDY_OPTIONS = {
    "seed_everything": "its seeds: --seeds",
    "run": "its folder: --out",
    "config": "its config: --base",
    "ckpt_path": "from where it goes on",
}


@dataclass(frozen=True)
class TrainingStudy:
    """Several ways to train (arms), each with the same seeds, from one config.

    The first arm is the one that the others are controls of.

    Args:
        config: What all arms have in common.
        arms: Command-line overrides by arm, such as `{"kd": {"model.beta": 0}}`.
        seeds: Paired: each arm starts from the same student and sees the same views.
        folder: Where runs and results go.
        overrides: Options of all arms, as on the command line: `--trainer.max_epochs=1`.
    """

    config: Path
    arms: Mapping[str, Mapping[str, object]]
    seeds: Sequence[int]
    folder: Path
    overrides: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        if not self.arms:
            raise UserError(
                "the study has no arms; give at least one: `arms: {kd: {model.beta: 0}}`"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds are {list(self.seeds)}; give at least one, each once")
        check_number("a seed", min(self.seeds), "[0, inf)", "seeds are 0 or more")
        main, *_ = self.arms
        for arm, options in self.arms.items():
            _check_arm(arm, options, main=arm == main)
        override_values = dict(word.lstrip("-").partition("=")[::2] for word in self.overrides)
        _check_options("overrides", list(override_values))
        check_run_of_study(_trainer_options(override_values), "overrides")
        if not self.config.is_file():
            raise UserError(
                f"no config {self.config}; "
                + nearest(str(self.config), map(str, self.config.parent.glob("*.yaml")))
            )
        if "arms" in read_config(self.config):
            raise UserError(
                f"{self.config} is a config of a study, which has arms: give it after -c; base is "
                "the config of a training, such as configs/shapes.yaml"
            )

    @property
    def config_sha256(self) -> str:
        """Of the config's content, which may change under its name."""
        return hashlib.sha256(self.config.read_bytes()).hexdigest()

    def arguments(self, arm: str, seed: int) -> list[str]:
        """The command line of one run, without the subcommand."""
        arm_options = [f"--{name}={_option_text(value)}" for name, value in self.arms[arm].items()]
        run = f"{self.folder}/{arm}/seed_{seed}"
        common = ["--config", str(self.config), *self.overrides]
        return [*common, *arm_options, f"--seed_everything={seed}", f"--run={run}"]


def _check_arm(arm: str, options: Mapping[str, object], *, main: bool) -> None:
    """Refuses an arm that would lie elsewhere, or be taken for something else."""
    if not isinstance(arm, str):  # YAML reads 5, true and null as something else
        raise UserError(f"arm {arm} is no text in YAML; give it in quotes, and as a name: 'arm_1'")
    check_folder_name("arm", arm)
    if arm in RESERVED and not (main and arm == "student"):  # the main arm is the student's row
        raise UserError(f"arm '{arm}' has the name of what a study writes itself; give another")
    if arm in STUDY_OPTIONS or arm.partition(".")[0] in ("model", "data", "trainer"):
        raise UserError(
            f"arm '{arm}' has the name of an option; name the arm too: {{NAME: {{{arm}: VALUE}}}}"
        )
    _check_options(f"arm '{arm}'", list(options))
    check_run_of_study(_trainer_options(options), f"arm '{arm}'")


def _trainer_options(options: Mapping[str, object]) -> dict[str, object]:
    """The trainer's options by name, text as the values that it stands for."""
    return {
        name.removeprefix("trainer."): yaml.safe_load(value) if isinstance(value, str) else value
        for name, value in options.items()
        if name in {f"trainer.{option}" for option in STUDY_RUN_OPTIONS}
    }


def _check_options(what: str, options: Sequence[str]) -> None:
    """Refuses options that the study gives itself: its own would replace them."""
    for option in options:
        if option in STUDY_OPTIONS:
            raise UserError(
                f"{what} sets {option}, but the study chooses {STUDY_OPTIONS[option]}; leave it out"
            )


def run_study(
    study: TrainingStudy, *, on_run: Callable[[str, int, int, int], None] | None = None
) -> dict[str, Any]:
    """Trains and tests what is missing, and returns the results of everything.

    Killed and started again, it goes on from the last checkpoint of the run that was cut off.

    Args:
        study: What to run.
        on_run: Told the arm, the seed, and how many runs are done of how many, before each.
    """
    path = study.folder / RESULTS
    runs = _load_finished_runs(path, study)
    jobs = [(arm, seed) for seed in study.seeds for arm in study.arms]
    for number, (arm, seed) in enumerate(jobs):
        if str(seed) in runs.setdefault(arm, {}):
            continue
        if on_run is not None:
            on_run(arm, seed, number, len(jobs))
        experiment = Experiment(study.arguments(arm, seed), run=False, resume=True)
        try:
            _check_experiment(study, experiment)
        except BaseException:
            experiment.release()
            raise
        results = experiment.fit_and_test()
        runs[arm][str(seed)] = {
            "arguments": study.arguments(arm, seed),
            "config_sha256": study.config_sha256,
            "teacher": _teacher_identity(experiment.model.teacher),
            "folder": str(experiment.folder),
            **{name: results[name] for name in ("n", "student", "controls", "seconds")},
        }
        _write(path, {"runs": runs, "seeds": list(study.seeds)})
    results = {**summarize_study(study, runs), "runs": runs, "seeds": list(study.seeds)}
    _write(path, results)
    return results


def _check_experiment(study: TrainingStudy, experiment: Experiment) -> None:
    """Refuses what is no student's training, or what could not be tested after it."""
    if not isinstance(experiment.model, DistilledExplainer):
        raise UserError(
            f"{study.config} trains a {type(experiment.model).__name__}; a study compares "
            "students: give a config of a DistilledExplainer, or train it with `camdistill fit`"
        )
    if isinstance(experiment.datamodule, ImageData):
        experiment.datamodule.check_test_set()


def summarize_study(
    study: TrainingStudy, runs: Mapping[str, Mapping[str, Mapping[str, object]]]
) -> dict[str, object]:
    """Means with intervals: over seeds where there are several, else over the test images."""
    tables = {
        arm: [read_table(Path(str(runs[arm][str(seed)]["folder"]))) for seed in study.seeds]
        for arm in study.arms
    }
    main, *others = study.arms
    controls = {other: mean_intervals(tables[other], "student") for other in others}
    controls["mean_map"] = mean_intervals(tables[main], "controls.mean_map")
    gain_over = {other: gain_intervals(tables[main], tables[other], "student") for other in others}
    gain_over["mean_map"] = gain_intervals(tables[main], tables[main], "controls.mean_map")
    if same_map := mean_intervals(tables[main], SAME_MAP):
        controls["same_map"] = same_map
        gain_over["same_map"] = gain_intervals(tables[main], tables[main], SAME_MAP)
    return {
        "n": len(tables[main][0]),
        "student": mean_intervals(tables[main], "student"),
        "controls": controls,
        "gain_over": gain_over,
    }


def mean_intervals(tables: Sequence[FidelityTable], prefix: str) -> dict[str, Interval]:
    """A student's (or control's) means by measure, with 95 % intervals.

    Several tables are several seeds: Student's t over their means. One is bootstrapped over images.
    """
    by_seed = [intervals(table) for table in tables]
    interval_by_measure = {}
    for name in MEASURES:
        values = [
            seed_intervals[f"{prefix}.{name}"]
            for seed_intervals in by_seed
            if f"{prefix}.{name}" in seed_intervals
        ]
        if len(values) == len(tables):
            several = len(values) > 1
            interval_by_measure[name] = (
                seed_interval([value.mean for value in values]) if several else values[0]
            )
    return interval_by_measure


def gain_intervals(
    tables: Sequence[FidelityTable], others: Sequence[FidelityTable], prefix: str
) -> dict[str, Interval]:
    """What the main arm has over another, paired by seed where there are several, else by image."""
    interval_by_measure = {}
    for name in MEASURES:
        pairs = [
            (_image_values(table, f"student.{name}"), _image_values(other, f"{prefix}.{name}"))
            for table, other in zip(tables, others, strict=True)
        ]
        complete = [
            (main_values, base_values)
            for main_values, base_values in pairs
            if main_values is not None and base_values is not None
        ]
        if len(complete) < len(pairs):
            continue
        if len(complete) == 1:
            interval_by_measure[name] = paired_interval(*complete[0])
        else:
            interval_by_measure[name] = seed_interval(
                [
                    float(np.nanmean(main_values - base_values))
                    for main_values, base_values in complete
                ]
            )
    return interval_by_measure


def result_rows(results: Mapping[str, Any]) -> dict[str, dict[str, Cell]]:
    """The table of a run that was tested: a row a network or control, a column a measure."""
    rows = {name: results[name] for name in ("student", "network") if name in results}
    rows |= results.get("controls", {})
    intervals_by_name = results.get("intervals", {})
    return mark_definitions(
        {
            name: {
                measure: intervals_by_name.get(
                    f"{'' if name in results else 'controls.'}{name}.{measure}", value
                )
                for measure in MEASURES
                if (value := row.get(measure)) is not None
            }
            for name, row in rows.items()
        }
    )


def mark_definitions(rows: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, Cell]]:
    """The same table, saying that the mean map's skill is the zero of skill, not measured."""
    marked_rows = {name: dict(row) for name, row in rows.items()}
    if "skill" in marked_rows.get("mean_map", {}):
        marked_rows["mean_map"]["skill"] = "0 by definition"
    return marked_rows


def _image_values(table: FidelityTable, key: str) -> FloatArray | None:
    """Values by image; a map's measure without a layer is that of the main pair."""
    prefix, _, name = key.rpartition(".")
    return table.columns.get(key, table.columns.get(f"{prefix}.layers.{table.layers[-1]}.{name}"))


def _load_finished_runs(
    path: Path, study: TrainingStudy
) -> dict[str, dict[str, dict[str, object]]]:
    """Finished runs of this study; a run with other arguments is not one of them."""
    if not path.is_file():
        return {}
    runs_by_arm = read_results(path).get("runs", {})
    assert isinstance(runs_by_arm, dict)
    finished = {
        arm: {
            seed: run
            for seed, run in runs.items()
            if run["arguments"] == study.arguments(arm, int(seed))
            and run.get("config_sha256") == study.config_sha256
        }
        for arm, runs in runs_by_arm.items()
        if arm in study.arms
    }
    for arm, runs in finished.items():
        for seed, run in runs.items():
            _check_same_teacher(f"{arm}, seed {seed}", run.get("teacher", {}))
    return finished


def _teacher_identity(teacher: Teacher) -> dict[str, str | None]:
    file = None if teacher.spec is None else teacher.spec.weights
    return {"weights": file, "sha256": teacher.sha256}


def _check_same_teacher(run: str, teacher: Mapping[str, str | None]) -> None:
    """Refuse a finished run whose teacher's file holds other weights now."""
    file = Path(teacher.get("weights") or "")
    if file.is_file() and teacher["sha256"] not in (None, sha256_of(file)):
        raise UserError(
            f"the study's finished run ({run}) had a teacher whose file has changed since, {file}: "
            "give another --out, so that students of two teachers don't share a table"
        )


@rank_zero_only
def _write(path: Path, results: Mapping[str, object]) -> None:
    write_results(path, results)


def _option_text(value: object) -> str:
    """A value as the command line takes it."""
    return json.dumps(value) if isinstance(value, list | dict | None) else str(value)
