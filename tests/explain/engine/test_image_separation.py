"""Images stay apart where the graph shows it, and nothing that mixes them is taken for such."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cam_oracles import close, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from camdistill.errors import UserError
from camdistill.explain.engine import image_separation
from camdistill.explain.engine.graph import ScoreGraph, operation
from camdistill.explain.engine.image_separation import keeps_images_apart
from camdistill.explain.gradcam import grad_cam
from camdistill.networks.cifar_resnet import CifarResNet

BATCH = 4
Step = Callable[[Tensor], Tensor]


def images() -> Tensor:
    """A batch whose other sizes are multiples of the batch's too, so that axes can be confused."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 8, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)


def scores_of(values: Tensor) -> Tensor:
    """[B, 3]."""
    generator = torch.Generator().manual_seed(1)
    rows = values.reshape(BATCH, -1)
    return rows @ torch.randn(rows.shape[1], 3, generator=generator, dtype=torch.float64)


def is_shown(scores: Tensor, source: Tensor) -> bool:
    return keeps_images_apart(ScoreGraph(scores), [get_gradient_edge(source)], BATCH)


def is_apart(scores: Tensor, source: Tensor) -> bool:
    """By one backward an image: no other image's gradient differs from 0."""
    for image in range(BATCH):
        (gradient,) = torch.autograd.grad(scores[image].sum(), source, retain_graph=True)
        gradient[image] = 0
        if gradient.count_nonzero():
            return False
    return True


def attention(values: Tensor, leading: bool) -> Tensor:
    """Of the cells; with the tokens' axis first if not `leading`."""
    tokens = values.flatten(2).transpose(1, 2)
    if leading:
        return F.scaled_dot_product_attention(tokens, tokens, tokens)
    tokens = tokens.transpose(0, 1)
    rows = (tokens.reshape(-1, 8) @ torch.eye(8, dtype=values.dtype)).view(tokens.shape)
    heads = rows.reshape(16, BATCH * 2, 4).transpose(0, 1)
    weights = (heads @ heads.mT).softmax(-1)
    return (weights @ heads).transpose(0, 1).reshape(16, BATCH, 8).transpose(0, 1)


KNOWN: dict[str, Step] = {
    "elementwise": lambda x: (x.exp() * 2 + x.sigmoid() / (1 + x.abs())).clamp(0, 3) ** 2,
    "gate of pooled": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "broadcast constant": lambda x: x * torch.arange(4.0).double() + torch.ones(8, 1, 1).double(),
    "convolution": lambda x: F.conv2d(x, torch.ones(5, 8, 3, 3).double()),
    "pools": lambda x: F.max_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 2) + F.avg_pool2d(x, 2),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(8).double(), torch.ones(8).double()),
    "group norm": lambda x: F.group_norm(x, 2),
    "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)),
    "softmax": lambda x: x.softmax(1) + x.log_softmax(-1),
    "linear of tokens": lambda x: F.linear(x.flatten(2), torch.ones(5, 16).double()),
    "added matrix product": lambda x: torch.addmm(
        x.mean((2, 3)), x[:, :, 0, 0], torch.ones(8, 8).double()
    ),
    "norm": lambda x: F.normalize(x, dim=1) + x.amax((2, 3), keepdim=True),
    "moments": lambda x: x.var((1, 2)) + x.std(-1).mean(1) + x.logsumexp((1, 3)),
    "cat and split": lambda x: torch.cat([*x.split(3, 1)[::-1], *x.split([1, 7], 1)], 1),
    "unbind": lambda x: x.unbind(2)[0] * x.unbind(1)[2][:, None, 1],
    "stack": lambda x: torch.stack([x, x.flip(1)], 0)[1] + torch.stack([x, x], -1)[..., 0],
    "roll": lambda x: x.roll((1, -1), (2, 3)),
    "shuffle": lambda x: x.view(BATCH, 2, 4, 4, 4).transpose(1, 2).flatten(1, 2),
    "windows": lambda x: (
        x.view(BATCH, 8, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8, 2, 2)
    ),
    "attention": partial(attention, leading=True),
    "attention, tokens first": partial(attention, leading=False),
    "queries of three": lambda x: x.flatten(1).view(BATCH, 4, 2, 16).permute(2, 0, 1, 3)[1],
    "pad and resize": lambda x: F.interpolate(F.pad(x, (1, 2, 0, 1)), (5, 5), mode="bilinear"),
    "gather": lambda x: x.gather(1, torch.zeros(BATCH, 3, 4, 4).long()),
    "transposed product": lambda x: (torch.ones(5, 8).double() @ x[:, :, 0, 0].T).T,
    "detached": lambda x: x * x.detach().mean(0),
}
MIXED: dict[str, Step] = {
    "batch mean": lambda x: x - x.mean(0),
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "batch softmax": lambda x: x.softmax(0),
    "roll of images": lambda x: x.roll(1, 0),
    "roll without an axis": lambda x: x.roll(1),
    "flip of images": lambda x: x.flip(0),
    "permuted images": lambda x: x[torch.tensor([1, 0, 3, 2])],
    "other view": lambda x: x.transpose(0, 1).reshape(BATCH, -1),
    "swapped axes": lambda x: x[:, :BATCH].transpose(0, 1),
    "product of images": lambda x: x[:, :, 0, 0] @ x[:, :, 1, 1].T,
    "attention of images": lambda x: F.scaled_dot_product_attention(*[x.flatten(1)[None]] * 3),
    "pairs": lambda x: x[:, None, :4, 0, 0] - x[None, :, :4, 0, 0],
    "layer norm of all": lambda x: F.layer_norm(x, x.shape),
    "norm of all": lambda x: x / x.norm(),
    "shifted by padding": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)),
    "cumulative": lambda x: x.cumsum(0),
    "weights of images": lambda x: F.conv2d(x, x[:, :, :3, :3]),
    "broadcast sum": lambda x: torch.baddbmm(x[:, :BATCH, 0, 0], x[:, :4, :, 0], x[:, :4, :, 1].mT),
    "as strided": lambda x: x.as_strided((BATCH, 8), (1, 4)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_images_are_shown_to_stay_apart(name: str) -> None:
    source = images()
    scores = scores_of(KNOWN[name](source.tanh()))
    assert is_apart(scores, source)
    assert is_shown(scores, source)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_images_are_never_taken_for_apart(name: str) -> None:
    source = images()
    scores = scores_of(MIXED[name](source.tanh()))
    assert not is_apart(scores, source)
    assert not is_shown(scores, source)


D = torch.float64
# [batch, 8, 4, 4] to something with a row an image, by operations that the tables name.
OPERATIONS: dict[str, Step] = {
    "smooth": lambda x: x.cos() + x.sin() + x.erf() + x.tanh() + F.gelu(x) + F.silu(x) + F.mish(x),
    "piecewise": lambda x: x.relu() + F.elu(x) + F.hardswish(x) + F.hardsigmoid(x) + F.hardtanh(x),
    "clipped": lambda x: F.leaky_relu(x) + x.clamp_min(0.1) + x.clamp_max(0.2) + (1 - x),
    "threshold": lambda x: F.threshold(x, 0.1, 0) + F.softplus(x) + F.logsigmoid(x) + x.exp(),
    "roots": lambda x: (x * x + 1).sqrt() + (x * x + 1).rsqrt() + (x * x + 1).log() - x.neg(),
    "fractions": lambda x: (x * x + 1).reciprocal() + (x * x).log1p() + x.abs() ** 1.5,
    "prelu": lambda x: F.prelu(x, torch.linspace(0.1, 0.8, 8, dtype=D)),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3) + torch.lerp(x, x * 2, x.sigmoid()),
    "where": lambda x: torch.where(x > 0.1, x.sin(), x * x),
    "masked fill": lambda x: x.masked_fill(x < 0, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.5),
    "extrema of two": lambda x: torch.maximum(x, x.flip(2)) + torch.minimum(x, x.flip(3)),
    "expand": lambda x: x[:, :, :1, :1].expand(-1, -1, 4, 4) + x.repeat(1, 2, 1, 1)[:, 4:12],
    "precision": lambda x: x.float().double(),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 2),
    "pools": lambda x: F.adaptive_avg_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.max_pool2d(x, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "reflection pad": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "replication pad": lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "constant pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "upsample": lambda x: F.interpolate(x, (5, 6), mode="bicubic") + F.interpolate(x, (5, 6)),
    "bilinear": lambda x: F.interpolate(x, (5, 6), mode="bilinear"),
    "group norm": lambda x: F.group_norm(x, 2),
    "layer norm": lambda x: F.layer_norm(x, (4, 4)),
    "grid sampler": lambda x: F.grid_sample(x, x[:, :2].movedim(1, 3).tanh(), align_corners=False),
    "topk": lambda x: x.topk(3, 1).values + x.topk(4, -1).values[:, :3],
    "sort and gather": lambda x: x.gather(1, x.argsort(1)),
    "index select": lambda x: x.index_select(1, torch.tensor([0, 3, 3])),
    "cumulative": lambda x: x.cumsum(1) + x.roll(1, 2) + x.softmax(1) + x.log_softmax(3),
    "splits": lambda x: torch.cat([*x.split(3, 1), *x.split([1, 7], 1), *x.chunk(2, 1)], 1),
    "reductions": lambda x: x.amax(1) + x.amin(1) + x.logsumexp(1) + x.sum(1) + x.mean(1),
    "moments": lambda x: x.std(1) + x.var(1) + x.norm(dim=1) + x.max(1).values + x.min(1).values,
    "views": lambda x: x.unsqueeze(2).squeeze(2).transpose(1, 3).permute(0, 3, 1, 2).clone(),
    "stack": lambda x: torch.stack([*x.unbind(1)], 3),
    "batched products": lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2]) + x[:, 3] @ x[:, 4],
    "products": lambda x: torch.addmm(x[:, 0, 0], x[:, :, 0, 0] @ torch.ones(8, 4, dtype=D), EYE),
    "transposed product": lambda x: (torch.ones(5, 8, dtype=D) @ x[:, :, 0, 0].t()).t(),
    "linear": lambda x: F.linear(x, torch.linspace(-1, 1, 12, dtype=D).view(3, 4)),
    "alias": lambda x: torch.ops.aten.alias(x),
    "pool in channels_last": lambda x: F.adaptive_avg_pool2d(
        x.contiguous(memory_format=torch.channels_last), 1
    ),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, (EYE > 0)[None, None]),
}
EYE = torch.eye(4, dtype=D)
# The same operations, across the images.
MIXING: dict[str, Step] = {
    "prelu": lambda x: F.prelu(x, x.mean((0, 2, 3))),
    "lerp": lambda x: torch.lerp(x, x.flip(0), 0.3),
    "weight of lerp": lambda x: torch.lerp(x, x.sin(), x.mean(0).sigmoid()),
    "where": lambda x: torch.where(x > 0.1, x, x.flip(0)),
    "addcmul": lambda x: torch.addcmul(x, x.roll(1, 0), x),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "pooled images": lambda x: x + F.adaptive_max_pool2d(x.movedim(0, 3), (4, 1)).movedim(3, 0),
    "pixel shuffle": lambda x: F.pixel_shuffle(x.transpose(0, 1), 2).reshape(len(x), -1),
    "reflection pad": lambda x: F.pad(x.movedim(0, 3), (1, 0, 0, 0), mode="reflect")[
        ..., :-1
    ].movedim(3, 0),
    "replication pad": lambda x: F.pad(x.movedim(0, 3), (1, 0, 0, 0), mode="replicate")[
        ..., :-1
    ].movedim(3, 0),
    "constant pad": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)),
    "upsample": lambda x: F.interpolate(x.movedim(0, 3), (4, len(x) + 1))[..., :-1].movedim(3, 0),
    "grid sampler": lambda x: F.grid_sample(
        x,
        x[:, :2].mean(0, True).movedim(1, 3).tanh().expand(len(x), -1, -1, -1),
        align_corners=False,
    ),
    "topk": lambda x: x.topk(len(x), 0).values,
    "gather": lambda x: x.gather(0, x.argsort(0)),
    "index select": lambda x: x.index_select(0, torch.arange(len(x) - 1, -1, -1)),
    "cumulative": lambda x: x.cumsum(0),
    "splits": lambda x: torch.cat([*x.split(1)][::-1]),
    "chunks": lambda x: torch.cat([*x.unbind(0)][::-1]).view_as(x),
    "stack": lambda x: torch.stack([*x.unbind(0)][::-1]),
    "largest": lambda x: x - x.amax(0) - x.max(0).values,
    "moments": lambda x: x / x.std(0) + x.var(0) + x.logsumexp(0),
    "group norm": lambda x: F.group_norm(x.transpose(0, 1), 1).transpose(0, 1),
    "batched products": lambda x: (
        (x[:, 0].transpose(0, 2) @ x[:, 1].transpose(0, 2).mT)[..., :1].mT + x[:, :1, :1, 0].sum(0)
    ),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 2)] * 3).transpose(0, 2),
    "repeat": lambda x: x.repeat(2, 1, 1, 1)[1 : len(x) + 1],
    "expand": lambda x: x[:1].expand_as(x) + x,
}
# What runs on a GPU, or on a CPU of another kind.
ELSEWHERE = {
    "CudnnBatchNorm",
    "MiopenBatchNorm",
    "MkldnnAdaptiveAvgPool2D",
    "ReshapeAlias",
    "Linear",
}
ELSEWHERE |= {"NativeDropout"}  # in train mode
ELSEWHERE |= {f"ScaledDotProduct{kind}Attention" for kind in ("Efficient", "Flash", "Cudnn")}


class Through(nn.Module):
    """A convolution whose output goes through an operation to three logits an image."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        rows = self.step(self.conv(values)).reshape(len(values), -1)
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(rows.shape[1], 3, generator=generator, dtype=D)
        return torch.cat([rows.tanh(), rows], 1) @ weights.repeat(2, 1)


PIXELS = torch.randn(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=D)
CLASSES = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]])


@pytest.mark.parametrize("name", OPERATIONS)
def test_maps_through_an_operation_are_those_of_each_image_alone(name: str) -> None:
    network = seeded(lambda: Through(OPERATIONS[name])).double().eval()
    together = grad_cam(network, PIXELS, ["conv"], CLASSES)["conv"]
    for image in range(BATCH):
        one = slice(image, image + 1)
        close(together[one], grad_cam(network, PIXELS[one], ["conv"], CLASSES[one])["conv"], 1e-10)


@pytest.mark.parametrize("name", MIXING)
def test_an_operation_across_images_is_refused(name: str) -> None:
    source = images()
    scores = scores_of(MIXING[name](source.tanh()))
    assert not is_apart(scores, source)
    assert not is_shown(scores, source)
    network = seeded(lambda: Through(MIXING[name])).double().eval()
    with pytest.raises(UserError, match="give one image at a time"):
        grad_cam(network, PIXELS, ["conv"], CLASSES)


@pytest.mark.parametrize(
    "name", ["views", "stack", "splits", "reductions", "layer norm", "constant pad", "topk"]
)
def test_where_torch_calls_what_it_keeps_otherwise_it_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a ValueError of unpacking, or an IndexError."""

    class Renamed(image_separation._Step):
        def read_argument(self, name: str) -> object:
            return None

        def axes(self, name: str, count: int) -> list[int]:
            return []

    monkeypatch.setattr(image_separation, "_Step", Renamed)
    source = images()
    assert not is_shown(scores_of((OPERATIONS | KNOWN)[name](source.tanh())), source)
    test_maps_through_an_operation_are_those_of_each_image_alone(name)


def test_every_rule_is_met_by_an_operation_here() -> None:
    met = set()
    for step in (*OPERATIONS.values(), *KNOWN.values()):
        nodes = ScoreGraph(scores_of(step(images().tanh())))._users_and_nodes[1]
        met |= {operation(node) for node in nodes}
    ours = {"Scaled", "Tap"}
    names = {f"{name}Backward" for name in ELSEWHERE | ours}
    assert set(image_separation._RULES) - met - names == set()


SAME_SHAPE: dict[str, Step] = {
    name: step
    for name, step in (KNOWN | MIXED).items()
    if name in ("elementwise", "gate of pooled", "batch norm", "group norm", "softmax", "roll")
    or name in ("batch mean", "batch softmax", "roll of images", "flip of images", "cumulative")
}
SAME_SHAPE |= {
    "rows": lambda x: x.reshape(8, BATCH, 4, 4).flatten(0, 1).view(BATCH, 8, 4, 4),
    "columns": lambda x: x.transpose(0, 1).contiguous().view(BATCH, 8, 4, 4),
    "back": lambda x: x.view(8, BATCH, 4, 4).transpose(0, 1).contiguous(),
    "axes": lambda x: x.permute(2, 3, 1, 0).reshape(BATCH, 8, 4, 4),
}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(SAME_SHAPE)), min_size=1, max_size=5))
def test_what_is_shown_is_true_of_any_chain(names: list[str]) -> None:
    source = images()
    values = source.tanh()
    for name in names:
        values = SAME_SHAPE[name](values)
    scores = scores_of(values)
    assert is_apart(scores, source) or not is_shown(scores, source)


class Mean(torch.autograd.Function):
    """A user's function that is called like torch's own operation, and mixes images."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.flip(0)


def test_a_users_function_is_not_known_by_its_name() -> None:
    functions = [Mean, type("Relu", (Mean,), {}), type("View", (Mean,), {})]
    for function in functions:
        source = images()
        scores = scores_of(function.apply(source.tanh()))
        assert not is_apart(scores, source)
        assert not is_shown(scores, source)


@pytest.mark.parametrize(
    "name",
    [
        "cifar",
        "resnet18",
        "densenet121",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "googlenet",
        "convnext_tiny",
        "regnet_y_400mf",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "swin_t",
        "vit",
    ],
)
def test_usual_networks_are_shown_to_keep_images_apart(name: str) -> None:
    def build() -> nn.Module:
        if name == "cifar":
            return CifarResNet(8, 3)
        if name == "vit":
            return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
        extra = {"init_weights": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, num_classes=3, **extra)

    network = seeded(build).eval()
    pixels = torch.rand(BATCH, 3, 32, 32, requires_grad=True)
    assert is_shown(network(pixels), pixels)
