"""A study runs what is missing, pairs its arms, and chooses beta without the test images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from camdistill.data.modules import ShapesData
from camdistill.errors import UserError
from camdistill.experiments.ranking.ranking_arms import NONE, Arm, ArmTrainer, Run, arms_of
from camdistill.experiments.ranking.ranking_config import RankingStudy, Tuning
from camdistill.experiments.ranking.ranking_records import StudentRecord
from camdistill.experiments.ranking.ranking_run import (
    LEDGER,
    RankingRuns,
    prepare_arm_trainer,
    run_ranking,
)
from camdistill.experiments.ranking.student_controls import CONTROLS
from camdistill.experiments.ranking.student_task import Recipe
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec
from camdistill.networks.weights import save_safetensors
from camdistill.store.array_files import lock_cache
from camdistill.store.run_log import RunLog

SPEC = {"channels": [4, 6], "strides": [2, 2]}
SPEC_OF = NetworkSpec("shallow_cnn", args=SPEC)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> RankingStudy:
    folder = tmp_path_factory.mktemp("study")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ShallowCNN(6, (4, 6), (2, 2))
        with torch.no_grad():
            network.linear.weight *= 30
    save_safetensors(folder / "teacher.safetensors", network.state_dict(), {})
    return RankingStudy(
        teacher=NetworkSpec("shallow_cnn", str(folder / "teacher.safetensors"), SPEC),  # type: ignore[arg-type]
        data=ShapesData(train=60, val=20, test=30, classes=6),
        methods=["grad_cam@stage2", "mask:parts"],
        students={"tiny": NetworkSpec("shallow_cnn", args=SPEC)},  # type: ignore[dict-item]
        n=[16, 24],
        seeds=[0, 1],
        controls_n=[24],
        shares=[0.5],
        tuning=Tuning([1.0, 10.0], 16, [7]),
        recipe=Recipe(steps=2, batch_size=8),
        folder=folder / "out",
    )


@pytest.fixture(scope="module")
def whole(study: RankingStudy) -> RankingRuns:
    return run_ranking(study)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that are really made."""
    made: list[Run] = []
    call = ArmTrainer.__call__

    def counted(self: ArmTrainer, runs: list[Run]) -> list[StudentRecord]:
        made.extend(runs)
        return call(self, runs)

    monkeypatch.setattr(ArmTrainer, "__call__", counted)
    return made


def test_every_arm_runs_at_its_n_with_every_seed(whole: RankingRuns) -> None:
    controls = [arm for arm in whole.arms if arm.control or arm.share]
    # 3 need no method, 8 and a mixture are of the first method
    assert len(controls) == 12
    keys = {(n, arm, seed) for _, n, arm, seed in whole.records}
    methods = ["none", "grad_cam@stage2", "mask:parts"]
    wanted = {(n, name, seed) for n in (16, 24) for name in methods for seed in (0, 1)}
    wanted |= {(24, arm.name, seed) for arm in controls for seed in (0, 1)}
    assert keys == wanted
    assert all(len(one.scores()) == 30 for one in whole.records.values())
    assert all(one.test == one.scores().mean() for one in whole.records.values())


def test_controls_are_those_that_can_be_made() -> None:
    arms = arms_of(["a", "mask:x"], CONTROLS, ["a", "mask:x"], [0.5], {"a"})
    names = [arm.name for arm in arms]
    assert names[:4] == ["none", "random", "center", "edges"]
    assert "a randomized" in names
    assert "mask:x randomized" not in names
    assert {"a mixed 0.5", "mask:x mixed 0.5", "a", "mask:x"} <= set(names)
    assert len(set(names)) == len(names) == 4 + 8 + 7 + 2 + 2


def test_beta_is_the_best_on_validation_images_of_other_seeds(
    study: RankingStudy, whole: RankingRuns
) -> None:
    records = RunLog(study.folder / LEDGER, StudentRecord).records.values()
    for (family, name), beta in whole.betas.items():
        tried = [one for one in records if (one.arm, one.seed, one.family) == (name, 7, family)]
        if name == "none":
            assert beta == 0
            assert not tried
            continue
        assert sorted(one.beta for one in tried) == [1, 10]
        best = max(one.val for one in tried)
        assert beta == min(one.beta for one in tried if one.val == best)
        own = [one for one in whole.records.values() if one.arm == name]
        assert {one.beta for one in own} == {beta}


def test_finished_runs_of_other_settings_are_counted(
    study: RankingStudy, whole: RankingRuns
) -> None:
    counts: list[int] = []
    run_ranking(study, on_unused=counts.append)
    assert counts == []
    found = run_ranking(replace(study, seeds=[0]), on_unused=counts.append)
    assert counts == [len(whole.records) - len(found.records)]


def test_a_killed_study_goes_on_and_equals_the_one_that_was_not(
    study: RankingStudy,
    whole: RankingRuns,
    ran: list[Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again = replace(study, folder=tmp_path / "again")
    add, count = RunLog.add, [0]

    def killed(self: RunLog, records: list[StudentRecord]) -> None:
        count[0] += 1
        if count[0] == 20:
            raise KeyboardInterrupt
        add(self, records)

    monkeypatch.setattr(RunLog, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run_ranking(again)
    monkeypatch.setattr(RunLog, "add", add)
    first = len(ran)
    assert first == 20
    path = again.folder / LEDGER
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    found = run_ranking(again)
    total = len(RunLog(path, StudentRecord).records)
    assert len(ran) - first == total - 19
    assert found.betas == whole.betas
    plain = {key: replace(one, seconds=0.0) for key, one in found.records.items()}
    assert plain == {key: replace(one, seconds=0.0) for key, one in whole.records.items()}


def test_nothing_runs_twice_and_widening_runs_what_is_new(
    study: RankingStudy, whole: RankingRuns, ran: list[Run]
) -> None:
    progress: list[tuple[str, int, int]] = []
    assert (
        run_ranking(study, on_progress=lambda *what: progress.append(what)).records == whole.records
    )
    assert ran == []
    total = progress[-1][2]
    assert progress[-1] == ("students", total, total)
    run_ranking(replace(study, seeds=[0, 1, 2]))
    assert {run.seed for run in ran} == {2}
    assert len(ran) == len(whole.records) // 2
    ran.clear()
    run_ranking(replace(study, recipe=replace(study.recipe, steps=3), methods=study.methods[:1]))
    assert len(ran) == len({(run.n, run.arm, run.beta, run.seed) for run in ran}) > 20


def test_another_n_runs_what_is_new_and_fewer_run_nothing(
    study: RankingStudy, ran: list[Run], tmp_path: Path
) -> None:
    narrow = replace(
        study, folder=tmp_path, n=[16], controls=["mean", "randomized"], controls_n=[], seeds=[0]
    )
    first = run_ranking(narrow)
    made = len(ran)
    ran.clear()
    wide = run_ranking(replace(narrow, n=[16, 40]))
    assert {run.n for run in ran} == {40}
    assert len(ran) == len(first.records)
    assert {key: one for key, one in wide.records.items() if key[1] == 16} == first.records
    ran.clear()
    assert run_ranking(replace(narrow, n=[40])).records.items() <= wide.records.items()
    assert run_ranking(narrow).records == first.records
    assert ran == []
    # one that was never narrower has another pool, and the same numbers but for rounding, and for
    # the random teacher's normalizations, which are set by up to 512 images of the pool
    fresh = run_ranking(replace(narrow, n=[16, 40], folder=tmp_path / "fresh"))
    assert len(ran) == made + len(first.records)
    for key, one in fresh.records.items():
        if "randomized" not in key[2]:
            assert wide.records[key].kl == pytest.approx(one.kl, rel=1e-2)


def test_families_and_methods_of_two_names_are_one_run(
    study: RankingStudy, ran: list[Run], tmp_path: Path
) -> None:
    short = replace(
        study, folder=tmp_path, n=[16], controls=[], controls_n=[], shares=[], seeds=[0],
        methods=["grad_cam@stage2", "grad_cam"], tuning=Tuning([1.0], 16, [7]),
    )  # fmt: skip
    first = run_ranking(short).records
    assert len(ran) == 2
    other = run_ranking(replace(short, students={"a": SPEC_OF, "b": SPEC_OF})).records
    assert len(ran) == 2
    assert set(other) == {(family, *key[1:]) for family in "ab" for key in first}
    assert all(one.family == key[0] for key, one in other.items())


def test_wrong_layers_and_students_are_told_before_the_teacher_is_asked(
    study: RankingStudy, tmp_path: Path
) -> None:
    wrong = replace(study, folder=tmp_path, methods=["mask:parts", "grad_cam@stage9"])
    with pytest.raises(UserError, match="no layer 'stage9'"):
        prepare_arm_trainer(wrong, "cpu")
    with pytest.raises(UserError, match="don't end in global average pooling"):
        prepare_arm_trainer(
            replace(study, folder=tmp_path, students={"v": NetworkSpec("vgg11")}), "cpu"
        )
    assert list(tmp_path.iterdir()) == []


def test_stacks_give_the_numbers_of_single_runs(
    study: RankingStudy, whole: RankingRuns, tmp_path: Path
) -> None:
    short = replace(study, folder=tmp_path, controls=["random", "shuffled"], seeds=[0])
    found = run_ranking(short, stack=5)
    for key, one in found.records.items():
        assert whole.records[key].kl == pytest.approx(one.kl, rel=1e-3)
        assert np.mean(whole.records[key].scores() == one.scores()) > 0.9


def test_gates_are_told_before_the_other_methods_run(
    study: RankingStudy, ran: list[Run], tmp_path: Path
) -> None:
    seen: list[tuple[int, set[str]]] = []

    def note(early: RankingRuns) -> None:
        seen.append((len(ran), {run.arm.name for run in ran}))
        assert {arm.name for arm in early.arms} == seen[0][1]

    run_ranking(replace(study, folder=tmp_path, n=[16], controls_n=[], seeds=[0]), on_gates=note)
    ((early, names),) = seen
    assert early < len(ran)
    assert {"none", "random", "grad_cam@stage2", "grad_cam@stage2 randomized"} <= names
    assert "mask:parts" not in names


def test_maps_of_arms_are_what_their_names_say(study: RankingStudy, whole: RankingRuns) -> None:
    classroom = whole.arm_trainer
    own = classroom.maps(Arm("grad_cam@stage2"), "tiny", 16)
    assert own is not None
    assert own.shape == (16, 2, 8, 8)
    assert (own >= 0).all()
    mean = classroom.maps(Arm("grad_cam@stage2", "mean"), "tiny", 16)
    assert mean is not None
    # of these 16 images alone, and of each orientation by itself
    torch.testing.assert_close(mean[5], own.mean(0))
    drawn = classroom.maps(Arm("grad_cam@stage2", "randomized"), "tiny", 16)
    assert drawn is not None
    assert not torch.allclose(drawn, own)
    assert classroom.maps(NONE, "tiny", 16) is None
    larger = classroom.maps(Arm("grad_cam@stage2"), "tiny", 24)
    assert larger is not None
    assert torch.equal(larger[:16], own), "a larger n contains the smaller one"


def test_keys_tell_apart_what_gives_other_numbers(study: RankingStudy, whole: RankingRuns) -> None:
    room = whole.arm_trainer
    run = Run("tiny", 16, Arm("mask:parts"), 1.0, 0)
    others = [
        replace(run, n=24),
        replace(run, beta=2.0),
        replace(run, seed=1),
        replace(run, arm=Arm("grad_cam@stage2")),
        replace(run, arm=Arm("mask:parts", "shuffled")),
        replace(run, arm=Arm("mask:parts", "mean")),
        replace(run, arm=Arm("mask:parts", share=0.5)),
        replace(run, arm=Arm("mask:parts", share=0.25)),
        replace(run, arm=Arm(control="random")),
        replace(run, arm=Arm(control="center")),
    ]
    keys = {room.key(one) for one in (run, *others)}
    keys |= {
        replace(room, recipe=Recipe(steps=3, batch_size=8)).key(run),
        replace(room, control_seed=1).key(replace(run, arm=Arm(control="random"))),
    }
    assert len(keys) == 13
    # seeds of controls concern controls alone
    assert replace(room, control_seed=1).key(run) == room.key(run)
    assert json.loads((study.folder / LEDGER).read_text().splitlines()[0])["family"] == "tiny"


def test_one_process_at_a_time_works_in_a_folder(study: RankingStudy, tmp_path: Path) -> None:
    with (
        lock_cache(tmp_path / "study"),
        pytest.raises(UserError, match=r"another process works in .*; wait for it"),
    ):
        run_ranking(replace(study, folder=tmp_path))


@pytest.mark.slow
def test_processes_give_the_numbers_of_this_one(
    study: RankingStudy, whole: RankingRuns, tmp_path: Path
) -> None:
    short = replace(study, folder=tmp_path, n=[24], tuning=Tuning([1.0], 16, [7]), controls=[])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = run_ranking(short)
    finally:
        torch.set_num_threads(before)
    (tmp_path / LEDGER).unlink()
    apart = run_ranking(short, workers=2)
    assert {key: replace(one, seconds=0.0) for key, one in apart.records.items()} == {
        key: replace(one, seconds=0.0) for key, one in here.records.items()
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": []}, r"methods is \[\]; give at least one"),
        ({"seeds": [0, 0]}, "each once"),
        ({"n": [4]}, "8 images or more"),
        ({"seeds": [7]}, "seed 7 is in both seeds and tuning.seeds"),
        ({"controls_of": ["grad_cam@stage3"]}, "nearest: 'grad_cam@stage2'"),
        ({"controls_n": [17]}, "17, which is not among"),
        ({"shares": [1.0]}, "between 0 and 1"),
        ({"shares": [0.5, 0.5]}, r"shares is \[0.5, 0.5\]; give each once"),
        ({"controls": ["mean", "mean"]}, "controls is .*; give each once"),
        ({"students": {"t": NetworkSpec("shallow_cnn", "w.pt")}}, "students start untrained"),
    ],
    ids=str,
)
def test_wrong_questions_are_told(
    study: RankingStudy, change: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        replace(study, **change)  # type: ignore[arg-type]


def test_wrong_betas_and_too_few_images_are_told(study: RankingStudy) -> None:
    for betas in ([], [0.0], [1.0, 1.0], [float("nan")], [float("inf")]):
        with pytest.raises(UserError, match=r"tuning\.betas"):
            Tuning(betas)
    with pytest.raises(UserError, match=r"tuning\.seeds is empty"):
        Tuning([1.0, 2.0], None, [])
    with pytest.raises(UserError, match=r"tuning\.seeds is \[7, 7\]; give each once"):
        Tuning([1.0, 2.0], None, [7, 7])
    for n in (-5, 0, 7):
        with pytest.raises(UserError, match=rf"tuning\.n is {n}; students need 8"):
            Tuning([1.0, 2.0], n)
    with pytest.raises(UserError, match=r"tuning\.n is 600, but there are 60 training images"):
        prepare_arm_trainer(replace(study, tuning=Tuning([1.0, 2.0], 600)), "cpu")
    with pytest.raises(UserError, match="n is 600, but there are 60 training images"):
        prepare_arm_trainer(replace(study, n=[600], controls_n=[]), "cpu")
