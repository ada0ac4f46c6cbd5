"""A map that names the class leaks; one that doesn't is at chance."""

import torch

from camdistill.experiments.ranking.leakage import leak


def test_maps_that_name_the_class_leak_and_noise_does_not(generator: torch.Generator) -> None:
    classes = torch.randint(0, 4, (400,), generator=generator)
    noise = torch.rand(400, 8, 8, generator=generator)
    named = 0.5 * noise
    named[torch.arange(400), 2 * classes, 3] += 1.0
    told, blind = leak(named, classes), leak(noise, classes)
    assert told.accuracy.low > 0.95
    assert blind.accuracy.low < 0.3
    assert abs(blind.accuracy.mean - 0.25) < 0.15
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    frequent = int(classes[order[:300]].bincount().argmax())
    assert told.chance == float((classes[order[300:]] == frequent).double().mean())
    assert leak(noise, classes) == blind
