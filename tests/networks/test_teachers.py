"""Networks by name with their weights, and the teacher that nobody trains or saves."""

import copy
import json
import re
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor, nn

from camdistill import load
from camdistill.errors import UserError
from camdistill.networks import torchvision_models
from camdistill.networks.heads import find_head, swap_head
from camdistill.networks.teachers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NetworkSpec,
    Preprocessed,
    Teacher,
    build,
    build_preprocessed,
    network_names,
    normalization,
)
from camdistill.networks.training_facts import LAYOUT, dump_experiment
from camdistill.networks.weights import read_weights, save_safetensors

SMALL = {"channels": [4, 6], "strides": [1, 2]}


def saved(path: Path, network: nn.Module, metadata: dict[str, str] | None = None) -> str:
    save_safetensors(path, network.state_dict(), metadata)
    return str(path)


def refused(spec: NetworkSpec, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        build(spec, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet110", "wrn_16_1", "wrn_40_2", "shallow_cnn", "resnet18"]
)
def test_network_by_name_has_as_many_logits_as_asked(name: str) -> None:
    network = build(NetworkSpec(name), classes=7).eval()
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("densenet121", 32),
        ("mobilenet_v3_small", 32),
        ("squeezenet1_1", 32),
        ("vit_b_32", 224),
        ("googlenet", 64),
        ("convnext_tiny", 32),
        ("shufflenet_v2_x0_5", 32),
        ("swin_t", 64),
        ("regnet_y_400mf", 32),
    ],
)
def test_new_head_keeps_the_rest_of_any_network(name: str, size: int) -> None:
    torch.manual_seed(0)
    network = build(NetworkSpec(name)).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    head = find_head(network)[0]
    swap_head(network, 7)
    after = network.state_dict()
    changed = {
        key for key in after if not torch.equal(before[key].flatten()[:7], after[key].flatten()[:7])
    }
    assert set(after) == set(before)
    assert changed <= {f"{head}.weight", f"{head}.bias"}
    assert network(torch.rand(1, 3, size, size)).shape == (1, 7)


def test_a_new_head_changes_only_an_attribute_that_held_the_number_of_classes() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    network.classes, network.num_classes = 5, 3  # 5 is something else's
    swap_head(network, 7)
    assert (network.classes, network.num_classes) == (5, 7)


def test_every_torchvision_name_is_known_and_has_resnets_first() -> None:
    names = network_names()
    assert set(torchvision.models.list_models(module=torchvision.models)) < set(names)
    assert names.index("resnet18") < names.index("alexnet")
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (NetworkSpec("resnet19"), "no network 'resnet19'; nearest: 'resnet18'"),
        (NetworkSpec("shallow_cn"), "nearest: 'shallow_cnn'"),
        (NetworkSpec("resnet20", args={"clases": 3}), "no argument 'clases'.*nearest: 'classes'"),
        (NetworkSpec("resnet20", args={"depth": 56}), "no argument 'depth' in resnet20"),
        (NetworkSpec("resnet18", args={"widt_per_group": 3}), "nearest: 'width_per_group'"),
        (NetworkSpec("resnet18", args={"weights": "x"}), "give it as `weights`"),
        (NetworkSpec("resnet18", args={"num_classes": "ten"}), "can't build resnet18 with num_cl"),
        (NetworkSpec("resnet18", "IMAGENET1K_V7"), "nearest: 'IMAGENET1K_V1'"),
        (NetworkSpec("resnet50", "DEFAULTT"), "nearest: 'DEFAULT'"),
        (NetworkSpec("resnet20", "DEFAULT"), "only torchvision's networks have weights by name"),
    ],
)
def test_wrong_spec_is_one_line_with_a_cure(spec: NetworkSpec, said: str) -> None:
    assert re.search(said, refused(spec))


def test_spec_is_read_from_yaml_as_written() -> None:
    parser = ArgumentParser()
    parser.add_argument("--network", type=NetworkSpec)
    args = {"channels": [4, 6], "strides": [1, 2], "residual": True, "kernel_size": 3}
    given = {"name": "shallow_cnn", "args": args, "std": [1.0, 2, 3]}
    read = parser.parse_object({"network": given})
    spec = parser.instantiate(read).network
    assert spec == NetworkSpec("shallow_cnn", None, args, std=(1.0, 2.0, 3.0))
    assert [type(value) for value in spec.args.values()] == [list, list, bool, int]
    assert build(spec, classes=3).stage1.conv.kernel_size == (3, 3)


def test_impossible_normalization_is_refused() -> None:
    with pytest.raises(UserError, match="std above 0"):
        NetworkSpec("resnet20", std=(0.0, 1.0, 1.0))


def test_number_of_classes_comes_from_the_weights(tmp_path: Path) -> None:
    weights = saved(tmp_path / "w", build(NetworkSpec("shallow_cnn", args=SMALL), classes=7))
    network = build(NetworkSpec("shallow_cnn", weights, SMALL))
    assert network.linear.out_features == 7
    assert Teacher(NetworkSpec("shallow_cnn", weights, SMALL)).classes == 7


def test_weights_for_other_classes_are_refused_or_get_a_new_head(tmp_path: Path) -> None:
    first = build(NetworkSpec("shallow_cnn", args=SMALL), classes=7)
    spec = NetworkSpec("shallow_cnn", saved(tmp_path / "w", first), SMALL)
    message = refused(spec, classes=8)
    assert "is for 7 classes, not 8" in message
    assert "replace_head" in message
    network = build(spec, classes=8, replace_head=True)
    assert network.linear.weight.shape == (8, 6)
    for name, value in first.state_dict().items():
        if not name.startswith("linear"):
            assert torch.equal(value, network.state_dict()[name])
    same = build(spec, classes=7, replace_head=True)
    assert torch.equal(same.linear.weight, first.linear.weight)


def test_weights_of_another_network_name_the_one_they_fit(tmp_path: Path) -> None:
    weights = saved(tmp_path / "w", build(NetworkSpec("resnet32"), classes=4))
    message = refused(NetworkSpec("resnet20", weights))
    assert "doesn't fit resnet20" in message
    assert "it fits 'resnet32'" in message
    assert "doesn't fit resnet18" in refused(NetworkSpec("resnet18", weights))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, so that no test sees the machine's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize(
    "error",
    [
        URLError("Name or service not known"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError("timed out"),
        RuntimeError('invalid hash value (expected "f37072fd", got "00")'),
    ],
)
def test_no_internet_for_weights_says_where_to_put_the_file(
    error: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("torch.hub.urlopen", offline)
    message = refused(NetworkSpec("resnet18", "DEFAULT"))
    assert "can't download resnet18's weights" in message
    assert str(cache / "resnet18-f37072fd.pth") in message
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert list(cache.iterdir()) == []


def test_named_weights_are_taken_from_the_cache(cache: Path) -> None:
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    peer = torchvision.models.resnet18(weights=None).eval()
    torch.save(peer.state_dict(), cache / "resnet18-f37072fd.pth")
    for name in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        teacher = Teacher(NetworkSpec("resnet18", name))
        images = torch.rand(2, 3, 48, 48)
        mean, std = (torch.tensor(t).view(3, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            assert torch.equal(teacher(images), peer((images - mean) / std))
        assert teacher.sha256 == read_weights(cache / "resnet18-f37072fd.pth").sha256
    tuned = build(NetworkSpec("resnet18", "DEFAULT"), classes=5, replace_head=True)
    assert tuned.fc.out_features == 5
    assert torch.equal(tuned.layer4[1].conv2.weight, peer.layer4[1].conv2.weight)
    path = cache / "resnet18-f37072fd.pth"
    path.write_bytes(path.read_bytes()[:1_000_000])
    assert "truncated or damaged" in refused(NetworkSpec("resnet18", "DEFAULT"))


def test_named_weights_bring_their_own_normalization() -> None:
    spec = NetworkSpec("efficientnet_v2_l", "IMAGENET1K_V1")
    assert normalization(spec) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    own = NetworkSpec("efficientnet_v2_l", "IMAGENET1K_V1", mean=(0.1, 0.2, 0.3))
    assert normalization(own) == ((0.1, 0.2, 0.3), IMAGENET_STD)


def test_files_metadata_brings_its_normalization(tmp_path: Path) -> None:
    spec = NetworkSpec("shallow_cnn", args=SMALL, mean=(0.25, 0.5, 0.75), std=(0.5, 1.0, 2.0))
    first = build_preprocessed(spec, classes=3)
    weights = saved(tmp_path / "w", first.network, first.metadata())
    for second in (
        build_preprocessed(NetworkSpec("shallow_cnn", weights, SMALL)),
        Teacher(NetworkSpec("shallow_cnn", weights, SMALL)),
    ):
        images = torch.rand(2, 3, 8, 8)
        assert torch.equal(first.eval()(images), second.eval()(images))
    save_safetensors(weights, first.network.state_dict(), {"mean": "x", "std": json.dumps([1])})
    with pytest.raises(UserError, match="not three numbers"):
        Teacher(NetworkSpec("shallow_cnn", weights, SMALL))


def test_preprocessed_normalizes_as_torchvision_does() -> None:
    peer = torchvision.transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    images = torch.rand(2, 3, 8, 8)
    wrapped = Preprocessed(nn.Identity())
    assert torch.equal(wrapped.normalize(images), peer(images))
    assert wrapped.normalize(images.bfloat16()).dtype == torch.bfloat16
    assert set(wrapped.state_dict()) == set()


class Holder(pl.LightningModule):
    """A module that trains a student beside a teacher."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = build_preprocessed(NetworkSpec("shallow_cnn", args=SMALL), classes=3)
        self.teacher = Teacher.from_network(
            build(NetworkSpec("shallow_cnn", args=SMALL), classes=3)
        )
        self.seen: list[bool] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen.append(self.teacher.network.training or self.teacher.training)
        return (self.student(batch[0]) - self.teacher(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.1)


def test_teacher_is_in_nobodys_checkpoint() -> None:
    holder = Holder()
    state = holder.state_dict()
    assert {name.split(".")[0] for name in state} == {"student"}
    other = Holder()
    assert other.load_state_dict(state, strict=True) == ([], [])
    assert holder.teacher.state_dict() == {}


def test_teacher_is_never_trained_whatever_its_holder_does() -> None:
    holder = Holder()
    before = copy.deepcopy(holder.teacher.network.state_dict())
    holder.train()
    holder.requires_grad_(True)
    holder.apply(lambda module: module.reset_parameters() if hasattr(module, "weight") else None)
    holder.teacher.train(True)
    assert not any(module.training for module in holder.teacher.modules())
    assert not any(module.training for module in holder.teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in holder.teacher.network.parameters())
    assert len(list(holder.parameters())) == len(list(holder.student.parameters()))
    holder.teacher(torch.rand(4, 3, 8, 8))
    after = holder.teacher.network.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_teacher_goes_where_its_holder_goes() -> None:
    holder = Holder().to(torch.float64)
    assert holder.teacher.network.linear.weight.dtype == torch.float64
    assert holder.teacher(torch.rand(1, 3, 8, 8).double()).dtype == torch.float64
    holder.to(memory_format=torch.channels_last)
    weight = holder.teacher.network.stage2.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert holder.to("meta").teacher.network.linear.weight.is_meta
    assert holder.teacher.mean.is_meta


def test_copied_teacher_is_a_teacher_of_its_own() -> None:
    teacher = Holder().teacher
    other = copy.deepcopy(teacher).train()
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(teacher(images), other(images))
    assert other.network is not teacher.network
    assert not other.network.training
    assert other.classes == 3


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
def test_lightning_trains_the_student_alone_and_saves_it_alone(tmp_path: Path) -> None:
    holder = Holder()
    before = copy.deepcopy(holder.teacher.network.state_dict())
    data = torch.utils.data.TensorDataset(torch.rand(8, 3, 8, 8))
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(holder, torch.utils.data.DataLoader(data, 4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not any(holder.seen)
    after = holder.teacher.network.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    network = build(NetworkSpec("shallow_cnn", str(tmp_path / "last.ckpt"), SMALL))
    assert torch.equal(network.linear.weight, holder.student.network.linear.weight)


def correct(teacher: Teacher, folder: Path) -> int:
    """Right answers of a teacher on an image folder, read with PIL alone."""
    right = 0
    for label, name in enumerate(sorted(entry.name for entry in folder.iterdir())):
        files = sorted((folder / name).iterdir())
        for start in range(0, len(files), 250):
            batch = np.stack(
                [np.asarray(Image.open(f).convert("RGB")) for f in files[start:][:250]]
            )
            images = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
            with torch.inference_mode():
                right += int((teacher(images).argmax(1) == label).sum())
    return right


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "published"),
    [
        ("resnet20", "resnet20-12fca82f.th", 9173),
        ("resnet56", "resnet56-4bfd9763.th", 9339),
    ],
)
def test_pretrained_teachers_have_their_published_error(
    name: str, file: str, published: int, images_folder: Path
) -> None:
    path = images_folder.parent / "teachers" / file
    if not path.exists():
        pytest.skip(f"no pretrained teacher at {path}")
    teacher = Teacher(NetworkSpec(name, str(path)))
    assert teacher.sha256 is not None
    assert teacher.sha256.startswith(path.stem.rpartition("-")[2])
    assert correct(teacher, images_folder / "cifar10" / "test") == published


def test_a_file_with_an_experiment_that_can_t_be_read_is_told(tmp_path: Path) -> None:
    network = build(NetworkSpec("shallow_cnn", args=SMALL), classes=3)
    of_text = dump_experiment({"network": {"name": "shallow_cnn"}, "size": ["x", 2]})
    for text in ("{", of_text, "[1]", "3"):
        weights = saved(tmp_path / "w", network, {"camdistill": text})
        with pytest.raises(UserError, match="can't be read"):
            Teacher(NetworkSpec("shallow_cnn", weights, SMALL))


def test_named_weights_say_their_size_and_classes() -> None:
    """All were run at 224 pixels."""
    facts = torchvision_models.weight_facts("efficientnet_b3", "IMAGENET1K_V1")
    assert facts.size == (300, 300)
    assert facts.class_names[281] == "tabby"


@pytest.mark.parametrize("layout", [None, "0.1", "9.9"])
def test_a_file_of_another_layout_is_refused_by_its_version(
    layout: str | None, tmp_path: Path
) -> None:
    network = build_preprocessed(NetworkSpec("shallow_cnn", args=SMALL), classes=3)
    experiment = {"network": {"name": "shallow_cnn", "args": SMALL}, "classes": 3}
    text = json.dumps(experiment if layout is None else {"layout": layout, **experiment})
    weights = saved(tmp_path / "w", network, {"camdistill": text})
    says = rf"w.* was written by camdistill {layout or '0.1'}, this one reads {LAYOUT}; train again"
    with pytest.raises(UserError, match=says):
        build_preprocessed(NetworkSpec("shallow_cnn", str(weights), args=SMALL), classes=3)
    with pytest.raises(UserError, match=says):
        load(weights)
