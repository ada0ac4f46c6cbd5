"""What is transferred: quantities, pairs of layers, and targets live and cached."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.data.views import Augment, View, draw_view, identity_view, view_images, view_maps
from camdistill.distill.losses import attention_distance, class_map_distance, map_distance
from camdistill.distill.targets import cached_targets, live_targets
from camdistill.distill.teacher_cache import TeacherCache
from camdistill.distill.teacher_maps_plan import Quantity
from camdistill.distill.transfer import (
    LayerPair,
    Transfer,
    name_pairs,
    quantity_maps,
    transfer_distance,
)
from camdistill.errors import UserError
from camdistill.networks.students import ShallowCNN
from camdistill.networks.teachers import NetworkSpec, Preprocessed, Teacher

LAYERS = ["layer2", "layer3"]
QUANTITIES: tuple[Quantity, ...] = ("grad_cam", "attention", "class_maps")


@pytest.fixture
def teacher(teacher_file: Path) -> Teacher:
    return Teacher(NetworkSpec("resnet20", str(teacher_file), {"classes": 8}))


@pytest.fixture
def images(shapes) -> ImageSet:  # type: ignore[no-untyped-def]
    data = shapes()
    data.setup("fit")
    return data.train_set


def student() -> Preprocessed:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Preprocessed(ShallowCNN(8, [6, 8, 10], [1, 2, 2])).eval()


def cache_of(teacher: Teacher, images: ImageSet, root: Path) -> TeacherCache:
    return TeacherCache.open_or_build(teacher, images, LAYERS, root=root, quantities=QUANTITIES)


def pixels_of(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    batch = images.batch(np.arange(count))
    return batch.pixels, batch.ids


def by_hand(network: Preprocessed, images: Tensor, layer: str, classes: Tensor) -> Tensor:
    """Equations 1 and 2 of the Grad-CAM paper with a hook and a backward for each class."""
    kept: list[Tensor] = []
    handle = network.network.get_submodule(layer).register_forward_hook(
        lambda _, __, output: kept.append(output)
    )
    logits = network(images.requires_grad_())
    handle.remove()
    found = []
    for column in range(classes.shape[1]):
        score = logits.gather(1, classes[:, column : column + 1]).sum()
        (gradient,) = torch.autograd.grad(score, kept[0], retain_graph=True)
        found.append((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).detach())
    return torch.stack(found, 1)


def test_quantities_are_the_papers(teacher: Teacher, images: ImageSet) -> None:
    given = pixels_of(images, 6)[0].float() / 255
    every = torch.arange(8).expand(6, 8)
    logits, class_maps = quantity_maps(teacher, given, LAYERS, None, quantity="class_maps", p=2.0)
    for layer in LAYERS:
        expected = by_hand(teacher, given.clone(), layer, every)
        torch.testing.assert_close(class_maps[layer], expected, rtol=1e-3, atol=1e-6)
    top = logits.argmax(1, keepdim=True)
    _, cams = quantity_maps(teacher, given, LAYERS, None, quantity="grad_cam", p=2.0)
    for layer in LAYERS:
        expected = by_hand(teacher, given.clone(), layer, top)[:, 0]
        torch.testing.assert_close(cams[layer], expected, rtol=1e-3, atol=1e-6)
    _, attention = quantity_maps(teacher, given, ["layer3"], None, quantity="attention", p=3.0)
    hidden = teacher.network.layer3(
        teacher.network.layer2(
            teacher.network.layer1(
                torch.relu(teacher.network.bn1(teacher.network.conv1(teacher.normalize(given))))
            )
        )
    )
    torch.testing.assert_close(
        attention["layer3"], (hidden.abs() ** 3).sum(1), rtol=1e-4, atol=1e-5
    )


def test_none_names_the_last_spatial_layers(teacher: Teacher) -> None:
    pairs = [LayerPair("stage1", "layer1", 0.5), LayerPair()]
    named = name_pairs(pairs, student(), teacher, torch.zeros(1, 3, 32, 32))
    assert named == [("stage1", "layer1", 0.5), ("stage3", "layer3", 1.0)]


def test_a_students_layer_is_matched_once(teacher: Teacher) -> None:
    pairs = [LayerPair("stage3", "layer1"), LayerPair(None, "layer3")]
    with pytest.raises(UserError, match="'stage3'; match each layer once"):
        name_pairs(pairs, student(), teacher, torch.zeros(1, 3, 32, 32))


def test_distance_is_the_weighted_sum_over_pairs(generator: torch.Generator) -> None:
    own = {name: torch.rand(4, 6, 6, generator=generator) for name in ("a", "b")}
    told = {name: torch.rand(4, 5, 5, generator=generator) for name in ("x", "y")}
    pairs = [("a", "x", 0.25), ("b", "y", 2.0)]
    for kind in ("pearson", "cosine", "l2", "l1"):
        found = transfer_distance(Transfer(distance=kind), pairs, own, told)
        expected = 0.25 * map_distance(own["a"], told["x"], kind)
        expected = expected + 2 * map_distance(own["b"], told["y"], kind)
        torch.testing.assert_close(found, expected)
    for form in ("paper", "code"):
        found = transfer_distance(Transfer("attention", form=form), pairs, own, told)
        expected = 0.25 * attention_distance(own["a"], told["x"], form=form)
        expected = expected + 2 * attention_distance(own["b"], told["y"], form=form)
        torch.testing.assert_close(found, expected)
    own = {name: torch.rand(4, 3, 6, 6, generator=generator) for name in ("a", "b")}
    told = {name: torch.rand(4, 3, 4, 4, generator=generator) for name in ("x", "y")}
    found = transfer_distance(Transfer("class_maps", pool=3), pairs, own, told)
    expected = 0.25 * class_map_distance(own["a"], told["x"], pool=3)
    expected = expected + 2 * class_map_distance(own["b"], told["y"], pool=3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_cached_targets_equal_live_ones_without_augmentation(
    teacher: Teacher, images: ImageSet, quantity: Quantity, tmp_path: Path
) -> None:
    pixels, ids = pixels_of(images, 20)
    cached = cached_targets(
        cache_of(teacher, images, tmp_path), ids, identity_view(20), LAYERS, quantity=quantity
    )
    live = live_targets(teacher, pixels.float() / 255, LAYERS, quantity=quantity, p=2.0)
    torch.testing.assert_close(cached.logits, live.logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(cached.classes, live.classes)
    for layer in LAYERS:
        told, asked = cached.maps_by_layer[layer], live.maps_by_layer[layer]
        assert told.shape == asked.shape
        scale = asked.abs().amax((-2, -1), keepdim=True)  # float16 of each map's largest value
        assert ((told - asked).abs() <= 2e-3 * scale + 1e-7).float().mean() > 0.99
        assert not told.requires_grad
        assert not asked.requires_grad


@pytest.mark.parametrize("mirrored", [False, True])
def test_maps_of_several_classes_are_cached_live_and_by_hand_the_same(
    teacher: Teacher, images: ImageSet, mirrored: bool, tmp_path: Path
) -> None:
    pixels, ids = pixels_of(images, 20)
    cache = TeacherCache.open_or_build(teacher, images, LAYERS, root=tmp_path, classes=3)
    view = identity_view(20)._replace(flip=torch.full((20,), mirrored))
    cached = cached_targets(cache, ids, view, LAYERS, quantity="grad_cam")
    given = (pixels.flip(-1) if mirrored else pixels).float() / 255
    live = live_targets(teacher, given, LAYERS, quantity="grad_cam", classes=3, p=2.0)
    assert torch.equal(cached.classes, live.classes)
    assert torch.equal(live.classes, live.logits.topk(3, 1).indices)
    for layer in LAYERS:
        expected = by_hand(teacher, given.clone(), layer, live.classes)
        torch.testing.assert_close(live.maps_by_layer[layer], expected, rtol=1e-3, atol=1e-6)
        scale = expected.abs().amax((1, 2, 3), keepdim=True)
        assert (
            (cached.maps_by_layer[layer] - expected).abs() <= 2e-3 * scale
        ).float().mean() > 0.99
        mean = expected[:, 0].clamp(min=0).mean(0)
        assert cache.mean_map_by_layer[layer].shape == mean.shape
    single = TeacherCache.open_or_build(teacher, images, LAYERS, root=tmp_path)
    assert single.folder != cache.folder
    for layer in LAYERS:
        torch.testing.assert_close(
            single.mean_map_by_layer[layer], cache.mean_map_by_layer[layer], rtol=2e-3, atol=1e-6
        )


def test_more_classes_than_there_are_is_all_of_them(
    teacher: Teacher, images: ImageSet, tmp_path: Path
) -> None:
    cache = TeacherCache.open_or_build(teacher, images, ["layer3"], root=tmp_path, classes=50)
    assert cache.plan.classes == 8
    _, maps = cache.lookup(pixels_of(images, 4)[1], torch.zeros(4, dtype=torch.bool))
    assert maps["layer3"].shape == (4, 8, 8, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": 0}, "transfer.classes is 0; give 1"),
        ({"classes": 2, "quantity": "attention"}, "attention has none to choose"),
    ],
)
def test_classes_that_cannot_be_transferred_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Transfer(**options)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_cached_targets_of_mirrored_images_are_of_the_mirrored_images(
    teacher: Teacher, images: ImageSet, quantity: Quantity, tmp_path: Path
) -> None:
    pixels, ids = pixels_of(images, 20)
    view = draw_view(Augment(flip=True), ids, (32, 32), seed=0, epoch=1)
    assert 0 < int(view.flip.sum()) < 20
    cache = cache_of(teacher, images, tmp_path)
    cached = cached_targets(cache, ids, view, LAYERS, quantity=quantity)
    moved = view_images(pixels, view).float() / 255
    live = live_targets(teacher, moved, LAYERS, quantity=quantity, p=2.0)
    torch.testing.assert_close(cached.logits, live.logits, rtol=1e-3, atol=1e-3)
    for layer in LAYERS:
        scale = live.maps_by_layer[layer].abs().amax((-2, -1), keepdim=True)
        error = (cached.maps_by_layer[layer] - live.maps_by_layer[layer]).abs()
        assert (error <= 2e-3 * scale + 1e-7).float().mean() > 0.99


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("augment", [Augment("pad", padding=8), Augment("resized", flip=True)])
def test_cached_maps_move_with_the_image_class_by_class(
    teacher: Teacher, images: ImageSet, quantity: Quantity, augment: Augment, tmp_path: Path
) -> None:
    _, ids = pixels_of(images, 12)
    view = draw_view(augment, ids, (32, 32), seed=0, epoch=0)
    cache = cache_of(teacher, images, tmp_path)
    found = cached_targets(cache, ids, view, LAYERS, quantity=quantity).maps_by_layer["layer3"]
    still = cache.lookup(ids, view.flip, quantity)[1]["layer3"]
    one = View(view.flip[:1], view.box[:1])
    if quantity != "class_maps":
        assert found.shape == (12, 8, 8)
        torch.testing.assert_close(found, view_maps(still, view, flipped=True))
        torch.testing.assert_close(found[:1], view_maps(still[:1], one, flipped=True))
        return
    assert found.shape == (12, 8, 8, 8)
    for label in range(8):
        torch.testing.assert_close(
            found[:, label], view_maps(still[:, label].contiguous(), view, flipped=True)
        )


def test_targets_without_layers_have_no_maps(
    teacher: Teacher, images: ImageSet, tmp_path: Path
) -> None:
    pixels, ids = pixels_of(images, 4)
    live = live_targets(teacher, pixels.float() / 255, [], quantity="grad_cam", p=2.0)
    cache = cache_of(teacher, images, tmp_path)
    told = cached_targets(cache, ids, identity_view(4), [], quantity="grad_cam")
    assert live.maps_by_layer == told.maps_by_layer == {}


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        (lambda: Transfer(p=0.5), "at least 1"),
        (lambda: Transfer(pairs=[]), "leave it out"),
        (lambda: Transfer(pool=0), "at least 1"),
        (lambda: LayerPair(weight=-1.0), "0 or more"),
    ],
)
def test_mistakes_are_told(wrong, cure: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=cure):
        wrong()
