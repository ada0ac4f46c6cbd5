import torch

from camdistill.layers.sweep.layer_sweep import sweep_layers
from camdistill.layers.sweep.statistics.similarity import Match
from camdistill.layers.sweep.sweep_plan import SweepOptions
from camdistill.layers.units.unit_pairs import clearest_pairs
from camdistill.networks.students import ShallowCNN
from camdistill.types import Batch


def _match(teacher: str, best: list[float], partner: list[int], values: list[float]) -> Match:
    count = len(best)
    return Match(
        teacher,
        "stage1",
        torch.arange(count),
        torch.tensor(best),
        torch.tensor(partner),
        torch.tensor(values),
        100,
    )


def test_layer_that_is_followed_best_on_average_gives_the_pairs() -> None:
    near = _match("near", [0.8, 0.7, float("nan")], [2, 0, 1], [0.8, 0.6, float("nan")])
    far = _match("far", [0.99, 0.1, 0.1], [0, 1, 2], [0.99, 0.1, 0.1])
    pairs = clearest_pairs([far, near], "stage1", 4)
    assert [(one.teacher, one.student) for one in pairs] == [
        (("near", 2), ("stage1", 0)),
        (("near", 0), ("stage1", 1)),
    ]
    assert [one.correlation for one in pairs] == [
        torch.tensor(0.8).item(),
        torch.tensor(0.6).item(),
    ]
    assert clearest_pairs([far, near], "stage1", 1) == pairs[:1]
    assert clearest_pairs([far, near], "stage1", 1, among=["far"])[0].teacher == ("far", 0)
    assert clearest_pairs([far, near], "stage2", 4) == ()


def test_units_without_a_partner_or_against_each_other_are_no_pair() -> None:
    alone = _match("near", [0.5, -0.2, 0.4], [0, 1, -1], [0.5, -0.2, float("nan")])
    assert [one.student[1] for one in clearest_pairs([alone], "stage1", 4)] == [0]


def test_permuted_copy_is_paired_unit_by_unit() -> None:
    torch.manual_seed(0)
    teacher, student = ShallowCNN(4, (6, 8), (1, 2)).eval(), ShallowCNN(4, (6, 8), (1, 2)).eval()
    student.load_state_dict(teacher.state_dict())
    order = torch.randperm(6)
    stage = student.stage1
    for part in (stage.conv.weight, stage.bn.weight, stage.bn.bias):
        part.data = part.data[order]
    for buffer in (stage.bn.running_mean, stage.bn.running_var):
        buffer.copy_(buffer[order])
    images = torch.rand(64, 3, 16, 16)
    batch = Batch(
        images,
        torch.zeros(64, dtype=torch.long),
        torch.arange(64),
        torch.ones(64, dtype=torch.bool),
    )
    found = sweep_layers(
        {"teacher": teacher, "student": student}, [batch], options=SweepOptions(top=1, cka=False)
    )
    pairs = clearest_pairs(found.matches, "stage1", 6, among=["stage1"])
    assert {one.student[1]: one.teacher[1] for one in pairs} == dict(enumerate(order.tolist()))
    assert all(one.correlation > 0.999 for one in pairs)
