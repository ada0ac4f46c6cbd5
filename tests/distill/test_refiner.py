"""The training step of a refinement: what it keeps, what it changes, and that controls are fair."""

import copy
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor

from camdistill.data.modules import ShapesData
from camdistill.data.views import Augment, draw_view, identity_view
from camdistill.distill.checkpoints import load, restore, write_checkpoint
from camdistill.distill.differentiable_maps import eval_mode, explain_with_graph, forward_constant
from camdistill.distill.objectives import energy_outside, insertion_deletion
from camdistill.distill.optimization import Optimization
from camdistill.distill.refinement_targets import Objective, Refinement, ViewBatch
from camdistill.distill.refiner import Refiner
from camdistill.distill.training import as_images
from camdistill.errors import UserError
from camdistill.explain.gradcam import grad_cam
from camdistill.explain.maps import upsample
from camdistill.explain.variants import hires_cam
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Preprocessed, Teacher
from camdistill.networks.weights import save_safetensors
from camdistill.perturb.imputers import baseline

ARGS = {"channels": [4, 6], "strides": [2, 2]}
KINDS = ("insertion_deletion", "faithfulness", "consistency", "energy")


def network(seed: int = 0) -> Preprocessed:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inner = ShallowCNN(8, (4, 6), (2, 2))
    return Preprocessed(inner).eval()


@pytest.fixture
def spec(tmp_path: Path) -> NetworkSpec:
    path = tmp_path / "start.safetensors"
    save_safetensors(path, network().network.state_dict(), {})
    return NetworkSpec("shallow_cnn", str(path), ARGS)


def shapes(**options: object) -> ShapesData:
    sizes = {"train": 32, "val": 16, "test": 16, "batch_size": 16}
    return ShapesData(**(sizes | options))  # type: ignore[arg-type]


def fitted(
    module: Refiner,
    data: ShapesData | None = None,
    precision: str = "32-true",
    epochs: int = 1,
) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        precision=precision,  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=data or shapes())
    return trainer


def seen_by(net: Preprocessed, objective: Objective, count: int = 4) -> ViewBatch:
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with eval_mode(net):
        _, classes, maps = explain_with_graph(net, images, objective.cam, objective.layer)
    masks = torch.zeros(count, 16, 16, dtype=torch.bool)
    masks[:, 4:9, 2:12] = True
    return ViewBatch(images, torch.arange(count), identity_view(count), classes, maps, masks)


# What is kept


def test_a_weight_of_zero_is_cross_entropy_alone_bit_for_bit(spec: NetworkSpec) -> None:
    alone = Refiner(spec, arm="ce")
    without = Refiner(spec, Objective(weight=0.0))
    for module in (alone, without):
        fitted(module)
    for name, value in alone.network.state_dict().items():
        assert torch.equal(value, without.network.state_dict()[name])


def test_without_labels_a_network_that_agrees_with_itself_stays(spec: NetworkSpec) -> None:
    module = Refiner(
        spec, arm="ce", keep="start", optimization=Optimization("sgd", 1e-2, weight_decay=0.0)
    )
    trainer = fitted(module)
    before = load_state(spec)
    for name, value in module.network.network.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-4, rtol=0)
    assert float(trainer.callback_metrics["1_overview/agreement_start"]) == 1.0


def load_state(spec: NetworkSpec) -> dict[str, Tensor]:
    return network().network.state_dict()


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_of_batch_normalization_stay_where_frozen(
    spec: NetworkSpec, frozen: bool
) -> None:
    module = Refiner(spec, arm="ce", frozen_statistics=frozen)
    fitted(module)
    before = load_state(spec)["stage1.bn.running_mean"]
    after = module.network.network.state_dict()["stage1.bn.running_mean"]
    assert torch.equal(before, after) == frozen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arm", ["objective", "random", "shuffled"])
def test_every_arm_of_every_objective_moves_the_weights_to_numbers(
    spec: NetworkSpec, kind: str, arm: str
) -> None:
    objective = Objective(kind=kind, subsets=4, shares=(0.5,))  # type: ignore[arg-type]
    module = Refiner(spec, objective, arm=arm)  # type: ignore[arg-type]
    fitted(module)
    before, after = load_state(spec), module.network.network.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(bool(torch.isfinite(value.double()).all()) for value in after.values())


def test_bfloat16_gives_the_loss_of_float32_to_its_precision(spec: NetworkSpec) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = fitted(Refiner(spec, Objective(shares=(0.3, 0.7))), precision=precision)
        found.append(float(trainer.callback_metrics["1_overview/loss_objective"]))
    assert found[1] == pytest.approx(found[0], rel=0.05, abs=0.02)


def test_a_refined_network_is_a_checkpoint_that_loads(spec: NetworkSpec, tmp_path: Path) -> None:
    module = Refiner(spec, Objective(kind="energy"))
    fitted(module)
    write_checkpoint(module, tmp_path / "refined.safetensors")
    images = torch.rand(2, 3, 32, 32)
    found = load(tmp_path / "refined.safetensors")
    torch.testing.assert_close(found(images), module.network.eval()(images))
    assert found.settings["objective"]["kind"] == "energy"
    again = Refiner(spec, Objective(kind="energy"))
    restore(again, tmp_path / "refined.safetensors")
    torch.testing.assert_close(again.network.eval()(images), found(images))


def test_the_start_is_asked_about_validation_images_once(
    spec: NetworkSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Asked(Teacher):
        def forward(self, images: Tensor) -> Tensor:
            asked.append(len(images))
            return super().forward(images)

    module = Refiner(spec, arm="ce", optimization=Optimization("adamw", 3e-2))
    monkeypatch.setattr("camdistill.distill.refiner.Teacher", Asked)
    trainer = fitted(module, epochs=3)
    assert asked == [16]
    told = float(trainer.callback_metrics["1_overview/agreement_start"])
    data = shapes()
    data.setup("fit")
    assert data.val_set is not None
    images = as_images(data.val_set.batch(torch.arange(16).numpy()).pixels)
    with torch.no_grad():
        same = module.network.eval()(images).argmax(1) == network()(images).argmax(1)
    assert told == pytest.approx(float(same.float().mean()))
    assert told < 1


def test_it_tests_accuracy_and_agreement_with_its_start(spec: NetworkSpec) -> None:
    module = Refiner(spec, arm="ce", optimization=Optimization("adamw", 1e-9))
    trainer = fitted(module)
    with pytest.raises(UserError, match="nothing was tested"):
        module.results()
    trainer.test(module, datamodule=shapes(), verbose=False)
    results = module.results()
    assert results["n"] == 16
    assert results["network"]["agreement"] == 1.0  # type: ignore[index]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_it_tests_in_float32_what_makes_tensors_of_its_own(
    precision: str, spec: NetworkSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, made = Refiner(spec), set()
    forward = ShallowCNN.forward

    def looked(self: ShallowCNN, images: Tensor) -> Tensor:
        made.add(torch.ones(1).dtype)
        return forward(self, images)

    monkeypatch.setattr(ShallowCNN, "forward", looked)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        precision=precision,  # type: ignore[arg-type]
    )
    trainer.test(module, datamodule=shapes(), verbose=False)
    assert made == {torch.float32}


# Maps


def test_hires_cam_with_a_graph_equals_hires_cam() -> None:
    net, images = network(), torch.rand(3, 3, 16, 16)
    wanted = Objective(cam="hires_cam", layer="stage1")
    _, classes, maps = explain_with_graph(net, images, wanted.cam, wanted.layer)
    (expected,) = hires_cam(net, images, ["stage1"], classes).values()
    torch.testing.assert_close(maps.detach(), expected)
    assert maps.requires_grad


def test_hires_cam_of_the_last_layer_before_pooling_is_grad_cam() -> None:
    net, images = network(), torch.rand(3, 3, 16, 16)
    _, _, maps = explain_with_graph(net, images, "hires_cam")
    _, _, expected = explain_with_graph(net, images)
    torch.testing.assert_close(maps, expected)


def test_constant_answers_have_the_networks_logits_and_a_gradient_to_images_alone() -> None:
    net, images = network(), torch.rand(2, 3, 16, 16, requires_grad=True)
    logits = forward_constant(net, images)
    torch.testing.assert_close(logits, net(images))
    weights = list(net.parameters())
    found = torch.autograd.grad(logits.sum(), [images, *weights], allow_unused=True)
    assert found[0] is not None
    assert all(gradient is None for gradient in found[1:])


def test_networks_are_explained_in_eval_mode_and_put_back_after_an_exception() -> None:
    net = network().train()

    def fail() -> None:
        with eval_mode(net):
            assert not net.network.training
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert all(module.training for module in net.modules())


# Controls


def test_the_detached_arm_has_the_objectives_value_and_no_gradient_through_the_map() -> None:
    net, objective = network(), Objective()
    seen = seen_by(net, objective)
    own, detached = (
        Refinement(objective, arm, 0).loss(net, seen, 0)  # type: ignore[arg-type]
        for arm in ("objective", "detached")
    )
    torch.testing.assert_close(own, detached)
    critic = copy.deepcopy(net)
    by_hand = insertion_deletion(
        critic, seen.images, seen.classes, upsample(seen.maps.detach(), (16, 16)),
        baseline(seen.images, "blur"),
    )  # fmt: skip
    expected = torch.autograd.grad(by_hand.sum(), list(critic.parameters()))
    found = torch.autograd.grad(detached.sum(), list(net.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_constant_answers_leave_the_detached_arm_nothing_so_that_it_is_left_out() -> None:
    assert "detached" in Objective().arms
    assert "detached" not in Objective(answers="constant").arms
    assert "detached" not in Objective(kind="energy").arms


def test_constant_answers_and_a_random_map_leave_no_gradient_so_that_it_is_no_control() -> None:
    net, objective = network(), Objective(answers="constant")
    found = Refinement(objective, "random", 0).loss(net, seen_by(net, objective), 0)
    assert not found.requires_grad
    assert "random" not in objective.arms
    assert "random" in Objective(kind="energy", answers="constant").arms


def test_the_shuffled_arm_is_the_objective_of_another_images_map() -> None:
    net, objective = network(), Objective(kind="energy")
    seen = seen_by(net, objective)
    found = Refinement(objective, "shuffled", 0).loss(net, seen, 0)
    masks = seen.masks
    assert masks is not None
    expected = energy_outside(upsample(seen.maps, (16, 16)), masks[[3, 0, 1, 2]])
    torch.testing.assert_close(found, expected)


def test_random_targets_are_an_images_own_and_move_with_it() -> None:
    control = Refinement(Objective(), "random", 3)
    seen = seen_by(network(), Objective())
    plain = control._random_maps(seen)
    turned = seen._replace(view=seen.view._replace(flip=torch.ones(4, dtype=torch.bool)))
    torch.testing.assert_close(control._random_maps(turned), plain.flip(-1))
    other = seen._replace(ids=seen.ids.flip(0))
    torch.testing.assert_close(control._random_maps(other), plain.flip(0))
    assert not torch.equal(Refinement(Objective(), "random", 4)._random_maps(seen), plain)


def test_random_masks_are_as_large_as_the_objects() -> None:
    objective = Objective(kind="energy")
    control = Refinement(objective, "random", 0)
    seen = seen_by(network(), objective)
    seen = seen._replace(maps=torch.ones_like(seen.maps, requires_grad=True))
    inside = 1 - control.loss(network(), seen, 0)  # a constant map has the mask's share inside
    torch.testing.assert_close(inside, torch.full((4,), 50 / 256))


def test_masks_are_seen_under_the_view_of_their_images(spec: NetworkSpec) -> None:
    data = shapes()
    data.setup("fit")
    module = Refiner(spec, Objective(kind="energy"))
    module.network = network()
    module._check_data(data)
    assert data.train_set is not None
    assert data.train_set.masks is not None
    batch = data.train_set.batch([5, 2, 9])
    view = draw_view(Augment(flip=True), batch.ids, (32, 32), seed=1, epoch=0)
    assert view.flip.any()
    assert not view.flip.all()
    found = module._view_masks(batch, view)
    assert found is not None
    for place, row in enumerate([5, 2, 9]):
        expected = torch.from_numpy(data.train_set.masks[row] > 0)
        expected = expected.flip(-1) if view.flip[place] else expected
        assert torch.equal(found[place], expected)


def test_fidelity_is_the_distance_to_the_teachers_map(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_safetensors(path, network(5).network.state_dict(), {})
    teacher = NetworkSpec("shallow_cnn", str(path), ARGS)
    objective = Objective(kind="fidelity", teacher=teacher)
    net = network()
    seen = seen_by(net, objective)
    found = Refinement(objective, "objective", 0).loss(net, seen, 0)
    (target,) = grad_cam(network(5), seen.images, None, seen.classes).values()
    for place in range(4):
        pair = torch.stack(
            [seen.maps[place].detach().relu().flatten(), target[place].relu().flatten()]
        )
        if pair[1].std() > 0 and pair[0].std() > 0:
            expected = 1 - torch.corrcoef(pair)[0, 1]
            torch.testing.assert_close(found[place].detach(), expected, atol=1e-5, rtol=1e-4)


# Mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight": -1.0}, "weight is -1"),
        ({"deletion": -0.5}, "deletion is -0.5"),
        ({"shares": (0.0, 0.5)}, "between 0 and 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"subsets": 2}, "at least 3 subsets"),
        ({"kind": "fidelity"}, "no objective.teacher"),
    ],
)
def test_an_objective_that_means_nothing_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Objective(**options)  # type: ignore[arg-type]


def test_networks_without_weights_and_other_classes_are_refused(spec: NetworkSpec) -> None:
    with pytest.raises(UserError, match="has no weights"):
        fitted(Refiner(NetworkSpec("shallow_cnn", args=ARGS)))
    with pytest.raises(UserError, match="6 classes, the network 8"):
        fitted(Refiner(spec, arm="ce"), shapes(classes=6))
