"""What the tests of the engine share: networks, a plain reference, what must not change."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from camdistill.explain.engine import alphas
from camdistill.explain.engine.graph import ScoreGraph
from camdistill.explain.engine.recording import LayerRecord
from camdistill.explain.gradcam import explain_images
from camdistill.networks.capture import unwrap
from camdistill.networks.students import ShallowCNN


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with random weights and random batch statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.3, 0.3)
    return network


def student() -> nn.Module:
    return seeded(lambda: ShallowCNN(4, channels=(6, 8, 10), strides=(1, 2, 1)))


def out_of_place(network: nn.Module) -> nn.Module:
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return twin


def same(values: Tensor) -> Tensor:
    return values


def reference(
    network: nn.Module,
    images: Tensor,
    layers: list[str],
    classes: Tensor | None = None,
    score: Callable[[Tensor], Tensor] = same,
    create_graph: bool = False,
    cells: Callable[[Tensor], Tensor] = same,
) -> dict[str, Tensor]:
    """Plain autograd at a layer's last call; a copy goes on, for functional in-place ReLUs."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> Tensor:
        outputs[name] = output
        return output.clone()

    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: keep(name, output)
        )
        for name in layers
    ]
    logits = network(images)
    for handle in handles:
        handle.remove()
    classes = logits.argmax(1) if classes is None else classes
    total = score(logits).gather(1, classes[:, None]).sum()
    found = {}
    for name in layers:
        (gradient,) = torch.autograd.grad(
            total, outputs[name], retain_graph=True, create_graph=create_graph
        )
        gradient = cells(gradient)
        if gradient.dtype in (torch.bfloat16, torch.float16):
            gradient = gradient.float()
        weighted = gradient.mean((2, 3), keepdim=True) * cells(outputs[name])
        found[name] = weighted.sum(1) if create_graph else weighted.sum(1).detach()
    return found


def head_of(network: nn.Module, images: Tensor, layer: str, **asked: Any) -> str | None:
    """The name of the head that makes a layer closed in a forward."""
    head = explain_images(network, images, [layer], **asked).heads[layer]
    names = {part: name for name, part in unwrap(network).named_modules()}
    return None if head is None else names[head]


def pooled_layers(network: nn.Module, images: Tensor, layers: list[str], **asked: Any) -> list[str]:
    """The layers of a forward whose gradient is asked at their spatial mean."""
    place, pooled = alphas._place, []

    def noting(layer: LayerRecord, behind: ScoreGraph) -> GradientEdge:
        edge = place(layer, behind)
        probe = None if layer.probe is None else get_gradient_edge(layer.probe)
        if probe is not None and edge.node is not probe.node:
            pooled.append(layer.activations)
        return edge

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alphas, "_place", noting)
        found = explain_images(network, images, layers, **asked).activations
    return [
        name
        for name, values in found.items()
        if any(values.data_ptr() == one.data_ptr() for one in pooled)
    ]


def close(ours: Tensor, true: Tensor, bound: float = 1e-12) -> None:
    assert ours.shape == true.shape
    assert (ours - true).abs().max() <= bound * true.abs().max()


def state_of(network: nn.Module) -> tuple[object, ...]:
    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    return tensors, modes, flags, torch.get_rng_state(), torch.is_grad_enabled()


def untouched(network: nn.Module, before: tuple[object, ...]) -> None:
    tensors, modes, flags, random, recording = before
    assert all(torch.equal(tensors[name], v) for name, v in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled() == recording
    assert all(p.grad is None for p in network.parameters())
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not module._forward_pre_hooks
