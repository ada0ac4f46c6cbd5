"""Every config that ships is one that the command line takes, down to each arm of a study."""

from pathlib import Path

import pytest
import yaml

from camdistill.commands.adapt import adapt
from camdistill.commands.command_parser import call
from camdistill.commands.learn import learn
from camdistill.commands.rank import rank
from camdistill.commands.refine import refine
from camdistill.commands.study import study
from camdistill.experiments.adaptation.adaptation_rounds import Adaptation
from camdistill.experiments.ranking.map_sources import parse_source
from camdistill.experiments.ranking.ranking_config import RankingStudy as Plan
from camdistill.experiments.refinement.refinement_config import RefinementPlan as Refinement
from camdistill.experiments.training.arms_and_seeds import TrainingStudy
from camdistill.experiments.training.lightning_cli import Experiment

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OF_STUDIES = [path for path in CONFIGS if "arms" in yaml.safe_load(path.read_text())]
OF_ADAPTATIONS = [path for path in CONFIGS if "adaptation" in yaml.safe_load(path.read_text())]
OF_METRICS = [path for path in CONFIGS if "studies" in yaml.safe_load(path.read_text())]
OF_RANKINGS = [
    path
    for path in CONFIGS
    if "methods" in yaml.safe_load(path.read_text()) and path not in OF_ADAPTATIONS
]
OF_REFINEMENTS = [path for path in CONFIGS if "objective" in yaml.safe_load(path.read_text())]
OF_OTHERS = [*OF_STUDIES, *OF_RANKINGS, *OF_ADAPTATIONS, *OF_METRICS, *OF_REFINEMENTS]
OF_RUNS = [path for path in CONFIGS if path not in OF_OTHERS]


@pytest.fixture(autouse=True)
def _parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stops before networks and data are made: their files aren't here."""
    monkeypatch.setattr(Experiment, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(Experiment, "_run_subcommand", lambda self, name: None)
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: path.stem)
def test_config_of_a_run_parses(path: Path) -> None:
    Experiment(["fit", "-c", str(path)])


@pytest.mark.parametrize("path", OF_STUDIES, ids=lambda path: path.stem)
def test_config_of_a_study_parses_with_every_arm(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrainingStudy] = []

    def note(whole: TrainingStudy, **_: object) -> dict[str, object]:
        asked.append(whole)
        raise InterruptedError

    monkeypatch.setattr("camdistill.commands.study.run_study", note)
    with pytest.raises(InterruptedError):
        call(study, ["study", "-c", str(path)])
    (whole,) = asked
    for arm in whole.arms:
        Experiment(whole.arguments(arm, whole.seeds[0]), run=False)


@pytest.mark.parametrize("path", OF_RANKINGS, ids=lambda path: path.stem)
def test_config_of_a_ranking_parses_and_names_what_there_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Plan] = []

    def note(plan: Plan, **_: object) -> None:
        asked.append(plan)
        raise InterruptedError

    monkeypatch.setattr("camdistill.commands.rank.run_ranking", note)
    with pytest.raises(InterruptedError):
        call(rank, ["rank", "-c", str(path)])
    (plan,) = asked
    for method in plan.methods:
        parse_source(method, plan.data)


@pytest.mark.parametrize("path", OF_REFINEMENTS, ids=lambda path: path.stem)
def test_config_of_a_refinement_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Refinement] = []

    def note(plan: Refinement, **_: object) -> None:
        asked.append(plan)
        raise InterruptedError

    monkeypatch.setattr("camdistill.commands.refine.run_refinement", note)
    with pytest.raises(InterruptedError):
        call(refine, ["refine", "-c", str(path)])
    (plan,) = asked
    assert plan.main_arm in plan.objectives_by_arm
    assert len(plan.starts) > 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_how_to_run_it(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("Command: " in line for line in comments), f"{path} names no command"


@pytest.mark.parametrize("path", OF_ADAPTATIONS, ids=lambda path: path.stem)
def test_config_of_an_adaptation_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Plan, Adaptation]] = []

    def note(plan: Plan, how: Adaptation, **_: object) -> None:
        asked.append((plan, how))
        raise InterruptedError

    monkeypatch.setattr("camdistill.commands.adapt.adapt_study", note)
    with pytest.raises(InterruptedError):
        call(adapt, ["adapt", "-c", str(path)])
    ((plan, how),) = asked
    how.check_fresh_seeds(plan)
    assert how.layers


@pytest.mark.parametrize("path", OF_METRICS, ids=lambda path: path.stem)
def test_config_of_a_learned_metric_parses_and_names_what_there_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Plan] = []

    def note(plan: Plan, **_: object) -> None:
        asked.append(plan)
        raise InterruptedError

    monkeypatch.setattr("camdistill.commands.learn.run_ranking", note)
    with pytest.raises(InterruptedError):
        call(learn, ["learn", "-c", str(path), "--out", str(tmp_path)])
    (plan,) = asked
    for name in plan.methods:
        parse_source(name, plan.data)
