"""Little networks: trained once for each setting, whole or not at all."""

from collections.abc import Callable

import pytest
import torch

from camdistill.claims.claim import ClaimSetup
from camdistill.claims.networks.claim_training import train_or_load
from camdistill.data.modules import ShapesData
from camdistill.data.views import Augment
from camdistill.distill.classifier import Classifier
from camdistill.networks.teachers import NetworkSpec

SPEC = NetworkSpec("shallow_cnn", args={"channels": [6, 8], "strides": [2, 2]})


def module(seed: int = 0) -> Classifier:
    return Classifier(SPEC, augment=Augment(crop="pad", padding=3), seed=seed)


def data() -> ShapesData:
    return ShapesData(train=64, val=8, test=8, batch_size=32)


def test_network_is_trained_once_for_each_setting(lab: Callable[..., ClaimSetup]) -> None:
    place, told = lab(), []
    place = ClaimSetup(**{**vars(place), "announce": told.append})
    first = train_or_load(place, "small", module(), data(), epochs=1)
    again = train_or_load(place, "small", module(), data(), epochs=1)
    other = train_or_load(place, "small", module(seed=1), data(), epochs=1)
    longer = train_or_load(place, "small", module(), data(), epochs=2)
    assert told == ["training small"] * 3
    assert len(list(place.folder.glob("small-*.safetensors"))) == 3
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))
    assert not torch.equal(first(images), longer(images))
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_interrupted_training_leaves_no_network(
    lab: Callable[..., ClaimSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "on_train_epoch_end", interrupt)
    place = lab()
    with pytest.raises(KeyboardInterrupt):
        train_or_load(place, "small", module(), data(), epochs=1)
    assert not list(place.folder.rglob("*"))
