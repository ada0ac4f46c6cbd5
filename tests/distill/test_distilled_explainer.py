"""The distillation step against its own formula, and what it must never see or keep."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, Trainer
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from torch import Tensor

from camdistill import tags
from camdistill.data.modules import ShapesData
from camdistill.data.views import Augment, draw_view, view_images, view_maps
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.distill.optimization import Optimization
from camdistill.distill.transfer import LayerPair, Transfer
from camdistill.errors import UserError
from camdistill.explain.gradcam import explain_images
from camdistill.measure.fidelity import flatten
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.callbacks import MapGrids
from camdistill.report.tensorboard import TensorBoardLogger, read_scalars

Explainer = Callable[..., DistilledExplainer]
Data = Callable[..., ShapesData]
Trainers = Callable[..., Trainer]

THREE = [LayerPair("stage2", "layer1"), LayerPair("stage3", "layer2", 0.5), LayerPair()]


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def written_out(
    logits: Tensor,
    told: Tensor,
    labels: Tensor,
    pairs: list[tuple[Tensor, Tensor, float]],
    *,
    ce: float,
    kd: float,
    beta: float,
    temperature: float,
) -> float:
    """ce CE + kd T^2 KL(teacher || student) + beta sum_l w_l (1 - r_l), in numpy, over a batch."""
    own, teacher = logits.double().numpy(), told.double().numpy()
    rows = np.arange(len(own))
    loss = ce * -np.log(softmax(own)[rows, labels.numpy()]).mean()
    p, q = softmax(teacher / temperature), softmax(own / temperature)
    loss += kd * temperature**2 * (p * np.log(p / q)).sum(1).mean()
    for student_maps, teacher_maps, weight in pairs:
        found = []
        for mine, its in zip(student_maps, teacher_maps, strict=True):
            a, b = (np.maximum(m.double().numpy(), 0).ravel() for m in (mine, its))
            if b.max() == b.min():
                found.append(0.0)
            elif a.max() == a.min():
                found.append(1.0)
            else:
                found.append(1 - np.corrcoef(a, b)[0, 1])
        loss += beta * weight * np.mean(found)
    return float(loss)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("grad", ["full", "activations"])
def test_loss_of_a_step_is_the_sum_written_out(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, recorder, cached: bool, grad: str
) -> None:
    pairs = [LayerPair("stage3", "layer2", 0.5), LayerPair()]  # 8 x 8 against 16 x 16: resized
    transfer = Transfer(pairs=pairs, grad=grad)  # type: ignore[arg-type]
    module = explainer(ce=0.3, kd=0.7, beta=5.0, temperature=3.0, cached=cached, transfer=transfer)
    trainer_of(recorder, limit_train_batches=3, limit_val_batches=0).fit(module, shapes())
    assert len(recorder.losses) == 3
    for before, batch, loss in zip(
        recorder.befores, recorder.batches, recorder.losses, strict=True
    ):
        view = draw_view(module.augment, batch.ids, (32, 32), seed=0, epoch=0)
        images = view_images(batch.pixels, view).float() / 255
        if cached:  # the answers about whole images, mirrored; maps are cropped
            whole = (
                view_images(
                    batch.pixels,
                    view._replace(box=view.box * 0 + torch.tensor([0.0, 0.0, 1.0, 1.0])),
                ).float()
                / 255
            )
            told = explain_images(module.teacher, whole, ["layer2", "layer3"])
            maps = {n: view_maps(m, view, flipped=True) for n, m in told.maps.items()}
        else:
            told = explain_images(module.teacher, images, ["layer2", "layer3"])
            maps = told.maps
        assert len(set(told.classes.tolist())) > 1
        before.student.train()
        own = explain_images(
            before.student, images, ["stage3", "stage4"], told.classes, grad="full"
        )
        expected = written_out(
            own.logits.detach(),
            told.logits,
            batch.labels,
            [
                (_resized(own.maps["stage3"].detach(), maps["layer2"]), maps["layer2"], 0.5),
                (own.maps["stage4"].detach(), maps["layer3"], 1.0),
            ],
            ce=0.3,
            kd=0.7,
            beta=5.0,
            temperature=3.0,
        )
        assert loss == pytest.approx(expected, rel=2e-3 if cached else 1e-4)


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    """Bilinear, half-pixel centers, of ReLU maps."""
    return torch.nn.functional.interpolate(
        maps.relu()[:, None], like.shape[-2:], mode="bilinear", align_corners=False
    )[:, 0]


def test_without_beta_no_map_is_asked_for(
    explainer: Explainer,
    shapes: Data,
    trainer_of: Trainers,
    recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = explainer(beta=0.0, cached=False)
    trainer = trainer_of(recorder, limit_train_batches=2, limit_val_batches=0)

    def only_logits(network: object, images: Tensor, layers: list[str], *rest: object, **options):  # type: ignore[no-untyped-def]
        assert layers == []
        return explain_images(network, images, layers, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("camdistill.distill.transfer.explain_images", only_logits)
    monkeypatch.setattr(module, "_name_pairs", lambda images: None)
    module.mean_map_by_layer = {"layer3": torch.ones(8, 8)}
    trainer.fit(module, shapes())
    assert len(recorder.losses) == 2


def test_a_term_without_a_weight_is_neither_computed_nor_logged(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    trainer = trainer_of(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(explainer(kd=0.0, beta=0.0, ce=1.0, cached=False), shapes())
    assert tags.LOSS_CE in trainer.logged_metrics
    assert not {tags.LOSS_KD, tags.LOSS_MAPS, tags.BETA} & set(trainer.logged_metrics)


class Relabeled(ShapesData):
    """Shapes whose labels are changed: missing, or of other classes than the teacher's."""

    def __init__(self, change: Callable[[np.ndarray], np.ndarray], names: tuple[str, ...]) -> None:
        super().__init__(train=48, val=16, test=16, batch_size=16)
        self.change, self.names = change, names

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for split in ("train_set", "val_set", "test_set"):
            images = getattr(self, split)
            if images is not None and images.classes != self.names:
                changed = dataclasses.replace(
                    images, labels=self.change(images.labels), classes=self.names
                )
                setattr(self, split, changed)


@pytest.mark.parametrize("cached", [False, True])
def test_without_ce_labels_change_nothing(
    explainer: Explainer, trainer_of: Trainers, cached: bool, tmp_path: Path
) -> None:
    weights, results = [], []
    for change, names in (
        (lambda labels: labels, tuple("abcdefgh")),
        (lambda labels: np.full_like(labels, -1), ()),
        (lambda labels: labels + 40, tuple(f"class {n}" for n in range(48))),
    ):
        module = explainer(ce=0.0, kd=1.0, beta=3.0, cached=cached)
        trainer = trainer_of()
        data = Relabeled(change, names)
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        weights.append(module.student.state_dict())
        results.append(module.results())
    for other in weights[1:]:
        for name, weight in weights[0].items():
            assert torch.equal(weight, other[name]), name
    assert results[0]["student"]["accuracy"] is not None
    for found in results[1:]:
        assert found["student"]["accuracy"] is None
        assert found["student"]["agreement"] == results[0]["student"]["agreement"]
        assert found["student"]["skill"] == results[0]["student"]["skill"]


def test_missing_or_foreign_labels_with_ce_are_told(
    explainer: Explainer, trainer_of: Trainers
) -> None:
    with pytest.raises(UserError, match=r"no labels, but ce is 0\.1; --model\.ce 0"):
        trainer_of().fit(explainer(), Relabeled(lambda labels: labels * 0 - 1, ()))
    with pytest.raises(UserError, match="3 classes, the teacher 8"):
        trainer_of().fit(explainer(), Relabeled(lambda labels: labels % 3, ("a", "b", "c")))


class Watch(Callback):
    """Looks at the teacher before and after each step."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        teacher = pl_module.teacher
        assert not teacher.training
        assert all(not module.training for module in teacher.network.modules())
        assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())
        self.seen += 1


@pytest.mark.parametrize("cached", [False, True])
def test_teacher_is_never_trained_and_never_kept(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, cached: bool, tmp_path: Path
) -> None:
    module, watch = explainer(cached=cached, transfer=Transfer(pairs=THREE), ema=0.9), Watch()
    before = {name: value.clone() for name, value in module.teacher.network.state_dict().items()}
    trainer = trainer_of(watch)
    trainer.fit(module, shapes())
    assert watch.seen == 4
    for name, value in module.teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(name.startswith("student.network.") for name in module.state_dict())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(name.startswith("student.network.") for name in found["state_dict"])
    held = sum(t.numel() for t in _tensors(found))
    student = sum(value.numel() for value in module.student.state_dict().values())
    teacher = sum(value.numel() for value in before.values())
    assert held < 3 * student + 10_000 < teacher  # weights, momentum, and the generator's 5 kB
    assert json.loads(found["camdistill"])["teacher_sha256"] == module.teacher.sha256


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    return (
        [t for part in inside for t in _tensors(part)]
        if isinstance(value, dict | list | tuple)
        else []
    )


@pytest.mark.parametrize("quantity", ["grad_cam", "attention", "class_maps"])
@pytest.mark.parametrize("cached", [False, True])
def test_three_pairs_give_every_weight_a_finite_gradient(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, recorder, quantity: str, cached: bool
) -> None:
    module = explainer(
        ce=0.0,
        kd=0.0,
        beta=1.0,
        cached=cached,
        transfer=Transfer(quantity, pairs=THREE),  # type: ignore[arg-type]
    )
    trainer_of(recorder, limit_train_batches=2).fit(module, shapes())
    for gradients in recorder.gradients:
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
        moved = {name for name, gradient in gradients.items() if bool((gradient != 0).any())}
        assert {f"student.network.stage{n}.conv.weight" for n in (1, 2, 3)} <= moved
        if quantity != "attention":
            assert "student.network.linear.weight" in moved  # full: through alpha too
    assert module.table is not None
    assert module.table.layers == ("stage2", "stage3", "stage4")


def test_gradient_of_a_step_is_that_of_the_loss_written_in_torch(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, recorder
) -> None:
    module = explainer(
        ce=1.0,
        kd=0.5,
        beta=2.0,
        temperature=2.0,
        cached=False,
        augment=Augment(),
        transfer=Transfer(distance="cosine"),
    )
    trainer_of(recorder, limit_train_batches=1, limit_val_batches=0).fit(module, shapes())
    student, batch = recorder.befores[0].student.train(), recorder.batches[0]
    images = batch.pixels.float() / 255
    told = explain_images(module.teacher, images, ["layer3"])
    hidden = student.normalize(images)
    for stage in range(1, 5):
        hidden = student.network.get_submodule(f"stage{stage}")(hidden)
    head = student.network.linear
    logits = head(hidden.mean((2, 3)))
    maps = torch.einsum("bk,bkhw->bhw", head.weight[told.classes], hidden) / hidden[0, 0].numel()
    cosine = torch.nn.functional.cosine_similarity(
        maps.relu().flatten(1), told.maps["layer3"].relu().flatten(1)
    )
    soft = (torch.log_softmax(logits / 2, 1), torch.softmax(told.logits / 2, 1))
    loss = (
        torch.nn.functional.cross_entropy(logits, batch.labels)
        + 0.5 * 4 * torch.nn.functional.kl_div(*soft, reduction="batchmean")
        + 2 * (1 - cosine).mean()
    )
    loss.backward()
    assert recorder.losses[0] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, parameter in student.named_parameters():
        found = recorder.gradients[0][f"student.{name}"]
        largest = parameter.grad.abs().max()
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=float(1e-4 * largest))


@pytest.mark.parametrize("schedule", ["linear", "warmup"])
def test_beta_follows_its_schedule(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, schedule: str, tmp_path: Path
) -> None:
    module = explainer(beta=8.0, cached=False, transfer=Transfer(schedule=schedule))  # type: ignore[arg-type]
    logger = TensorBoardLogger(tmp_path, version="run")
    trainer_of(logger=logger, max_epochs=3, log_every_n_steps=1).fit(module, shapes())
    found = dict(read_scalars(tmp_path / "run")[tags.BETA])
    steps = 12
    for step in range(steps):
        done = step / steps
        expected = 8 * (1 - done) if schedule == "linear" else 8 * min(done / 0.1, 1)
        assert found[step] == pytest.approx(expected)


def test_scalars_are_logged_under_their_tags(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    module = explainer(transfer=Transfer(pairs=THREE))
    logger = TensorBoardLogger(tmp_path, version="run")
    trainer = trainer_of(logger=logger, max_epochs=2, log_every_n_steps=1)
    data = shapes()
    trainer.fit(module, data)
    found = read_scalars(tmp_path / "run")
    each_step = {tags.LOSS_TRAIN, tags.LOSS_CE, tags.LOSS_KD, tags.LOSS_MAPS}
    each_step |= {tags.BETA, tags.LEARNING_RATE}
    names = ("pearson", "spearman", "cosine", "skill")
    each_epoch = {tags.ACCURACY_STUDENT, tags.AGREEMENT}
    each_epoch |= {getattr(tags, name.upper()) for name in names}
    for layer in ("stage2", "stage3", "stage4"):
        each_epoch |= {getattr(tags, name)(layer) for name in names}
    assert set(found) == each_step | each_epoch
    assert all([step for step, _ in found[tag]] == list(range(8)) for tag in each_step)
    assert all([step for step, _ in found[tag]] == [3, 7] for tag in each_epoch)
    for step, rate in found[tags.LEARNING_RATE]:
        assert rate == pytest.approx(0.05 * module.optimization.lr_factor(step / 8))
    for step in range(8):
        terms = {tag: dict(found[tag])[step] for tag in each_step}
        total = 0.1 * terms[tags.LOSS_CE] + 0.9 * terms[tags.LOSS_KD]
        total += 20 * terms[tags.LOSS_MAPS]
        assert terms[tags.LOSS_TRAIN] == pytest.approx(total, rel=1e-5)
    last = module.table
    assert last is not None
    assert found[tags.AGREEMENT][-1][1] == pytest.approx(
        float(last.columns["student.agreement"].mean())
    )
    assert found[tags.PEARSON] == found[tags.pearson("stage4")]
    logger.finalize("success")
    test_logger = TensorBoardLogger(tmp_path, version="test")
    trainer_of(logger=test_logger).test(module, data, verbose=False)
    tested = read_scalars(tmp_path / "test")
    assert set(tested) == {tags.on_test(tag) for tag in {*each_epoch, tags.RUNNER_UP}}
    assert tested[tags.on_test(tags.SKILL)][0][1] == pytest.approx(
        module.results()["student"]["skill"]  # type: ignore[index]
    )


def test_results_have_the_designs_keys_and_equal_numpy(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    module, data, trainer = explainer(), shapes(), trainer_of()
    with pytest.raises(UserError, match="nothing was tested"):
        module.results()
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    results = module.results()
    keys = set(flatten(results))
    measures = ("pearson", "spearman", "cosine", "skill")
    assert {"n", "student.accuracy", "student.agreement"} <= keys
    assert {f"student.{measure}" for measure in measures} <= keys
    assert {f"student.layers.stage4.{measure}" for measure in measures} <= keys
    assert {"controls.mean_map.pearson", "controls.mean_map.cosine"} <= keys
    assert results["sha256"] == {"teacher": module.teacher.sha256}
    assert results["n"] == 20
    module.eval()
    batch = data.test_set.batch(np.arange(20))  # type: ignore[union-attr]
    images = batch.pixels.float() / 255
    with torch.no_grad():
        told, own = module.teacher(images).argmax(1), module.student(images).argmax(1)
    student = results["student"]
    assert student["agreement"] == pytest.approx(float((told == own).float().mean()))  # type: ignore[index]
    assert student["accuracy"] == pytest.approx(float((batch.labels == own).float().mean()))  # type: ignore[index]
    teacher_maps = explain_images(module.teacher, images, ["layer3"]).maps["layer3"].relu()
    own_maps = explain_images(module.student, images, ["stage4"], told).maps["stage4"].relu()
    train = data.train_set.batch(np.arange(64)).pixels.float() / 255  # type: ignore[union-attr]
    mean = explain_images(module.teacher, train, ["layer3"]).maps["layer3"].relu().mean(0).numpy()
    cosines, base = [], []
    for mine, its in zip(own_maps.numpy(), teacher_maps.numpy(), strict=True):
        if its.max() > its.min():
            scale = np.linalg.norm(mine) * np.linalg.norm(its)
            cosines.append((mine * its).sum() / scale if scale and mine.max() > mine.min() else 0)
            base.append((mean * its).sum() / np.linalg.norm(mean) / np.linalg.norm(its))
    assert student["cosine"] == pytest.approx(np.mean(cosines), abs=1e-4)  # type: ignore[index]
    skill = 1 - (1 - np.mean(cosines)) / (1 - np.mean(base))
    assert student["skill"] == pytest.approx(skill, abs=2e-3)  # type: ignore[index]


def test_test_is_float32_whatever_the_training_was(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    data, tables = shapes(), []
    module = explainer()
    trainer = trainer_of(precision="bf16-mixed")
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    tables.append(module.table)
    trainer_of(precision="32-true").test(module, data, verbose=False)
    tables.append(module.table)
    for name, column in tables[0].columns.items():
        np.testing.assert_array_equal(column, tables[1].columns[name], err_msg=name)
    module.eval()
    images = data.test_set.batch(np.arange(20)).pixels.float() / 255  # type: ignore[union-attr]
    with torch.no_grad():
        exact, told = module.student(images), module.teacher(images)
    divergence = (told.softmax(1) * (told.log_softmax(1) - exact.log_softmax(1))).sum(1)
    np.testing.assert_allclose(tables[0].columns["student.kl"], divergence, rtol=1e-3, atol=1e-5)


def test_validation_with_cache_equals_validation_with_the_live_teacher(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    tables = []
    for cached in (True, False):
        module = explainer(cached=cached, optimization=Optimization(lr=1e-12), seed=3)
        trainer_of().fit(module, shapes())
        tables.append(module.table)
    for name in ("student.agreement", "student.layers.stage4.pearson", "student.kl"):
        np.testing.assert_allclose(
            tables[0].columns[name], tables[1].columns[name], rtol=1e-2, atol=5e-3, err_msg=name
        )


def test_a_layer_without_maps_is_told_before_anything_is_spent(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    module = explainer(transfer=Transfer(pairs=[LayerPair("stage9")]))
    with pytest.raises(UserError, match="stage9"):
        trainer_of().fit(module, shapes())
    assert module.pairs == []
    assert module.student.training


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"beta": -1.0}, "beta is -1.0"),
        ({"ce": 0.0, "kd": 0.0, "beta": 0.0}, "nothing to learn"),
        ({"temperature": 0.0}, "above 0"),
        ({"ema": 1.0}, r"in \(0, 1\)"),
    ],
)
def test_mistakes_are_told(explainer: Explainer, options: dict[str, float], cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        explainer(**options)


def test_explained_images_are_those_of_compare(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    module, data = explainer(), shapes()
    trainer_of().fit(module, data)
    module.eval()
    batch = data.val_set.batch(np.arange(5))  # type: ignore[union-attr]
    found, compared = module.explain_images(batch), module.compare(batch.pixels.float() / 255)
    torch.testing.assert_close(found.images01, batch.pixels.float() / 255)
    assert torch.equal(found.teacher_classes, compared.teacher_logits.argmax(1))
    assert torch.equal(found.student_classes, compared.student_logits.argmax(1))
    torch.testing.assert_close(
        found.student_maps_by_layer["stage4"], compared.student_maps_by_layer["stage4"]
    )
    top = explain_images(module.student, found.images01, ["stage4"], found.teacher_classes)
    torch.testing.assert_close(found.student_maps_by_layer["stage4"], top.maps["stage4"])
    assert not math.isnan(float(found.teacher_maps_by_layer["layer3"].sum()))


def test_one_layer_of_the_teacher_may_be_matched_twice(
    explainer: Explainer, shapes: Data, trainer_of: Trainers, tmp_path: Path
) -> None:
    pairs = [LayerPair("stage3", "layer3"), LayerPair("stage4", "layer3")]
    logger = TensorBoardLogger(tmp_path, version="run")
    module = explainer(transfer=Transfer(pairs=pairs))
    trainer_of(MapGrids(images=2), logger=logger, limit_train_batches=1).fit(module, shapes())
    assert module.table is not None
    assert module.table.layers == ("stage3", "stage4")
    found = EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    assert {tags.grid("stage3"), tags.grid("stage4")} <= set(found.Tags()["tensors"])


def test_names_of_other_classes_are_not_the_networks(
    explainer: Explainer, trainer_of: Trainers, tmp_path: Path
) -> None:
    for names, expected in ((tuple("abcdefgh"), list("abcdefgh")), (("cat", "dog"), [])):
        module = explainer(ce=0.0, cached=False)
        trainer = trainer_of(limit_train_batches=1, limit_val_batches=0)
        trainer.fit(module, Relabeled(lambda labels: labels % 2, names))
        assert module.experiment()["class_names"] == expected


def test_default_student_takes_the_teachers_classes_and_normalization(teacher_file: Path) -> None:
    spec = NetworkSpec("resnet20", str(teacher_file), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    module = DistilledExplainer(spec)
    assert module.student.network.linear.out_features == 8  # type: ignore[union-attr]
    torch.testing.assert_close(module.student.mean, module.teacher.mean)
    torch.testing.assert_close(module.student.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))
