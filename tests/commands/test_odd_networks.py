"""Networks that give no logits or can't be explained: one line, and its cure works."""

import http.client
import re
from pathlib import Path

import odd_networks
import pytest
import torch
import yaml

from camdistill import grad_cam
from camdistill.cli import main
from camdistill.errors import UserError
from camdistill.explain.attribution import gradient
from camdistill.explain.methods import find_method
from camdistill.explain.variants import hires_cam
from camdistill.networks.teachers import NetworkSpec, Teacher
from mistakes import mistaken_line

ODD = {
    "GivesDict": r"gives one dict of 'features' \[2, 6, 16, 16\], 'logits' \[2, 6\] for 2 images",
    "GivesTuple": r"gives one tuple of NoneType, \[2, 6\] for 2 images, not logits",
    "GivesNumbers": r"gives a tensor \[2\] for 2 images, not logits \[images, classes\]: name a",
    "GivesScoreMaps": r"gives one dict of 'out' \[2, 6, 16, 16\] for 2 images, not logits",
    "GivesTokens": r"gives a tensor \[2, 256, 6\] for 2 images, not logits",
    "GivesClasses": r"gives a tensor \[2\] of int64 for 2 images, not logits .*: name a network",
    "GivesOneRow": r"gives a tensor \[1, 6\] for 2 images, not logits",
    "GivesNoNumbers": r"gives logits that are not numbers \(nan\); give other weights",
    "GivesNothing": r"gives None for 2 images, not logits",
    "TakesTwo": r"can't run .*argument: 'others'\); give a network whose forward takes images",
    "Fails": r"forward fails on an image of 3x16x16 \(KeyError: 'nothing'\); mend Fails",
    "GivesSparse": r"gives a sparse tensor \[2, 6\] for 2 images, not logits .*\.to_dense\(\)$",
    "StopsIterating": r"forward fails on an image of 3x16x16 \(StopIteration: .*\); mend Stops",
    "RunsOutOfMemory": r"^camdistill: out of memory; give fewer or smaller images",
    "RunsOutOfMemoryOnCpu": r"^camdistill: out of memory; give fewer or smaller images",
    "CannotBeBuilt": r"can't build odd_networks\.CannotBeBuilt with .*: no file of means",
    "Doubles": r"'conv\.weight' is float64, and images are float32: build .* network\.float\(\)",
    "OnMeta": r"'conv\.weight' is on the meta device, which holds no numbers: build the network on",
    "Lazy": r"layers without weights yet \('block\.0' is lazy\): run the network on an image once",
    "Reentrant": r"reentrant checkpoints .* at .*: call checkpoint with use_reentrant=False",
    "scripted": r"scripted is a program of TorchScript, .*: give the torch\.nn\.Module",
    "traced": r"traced is a program of TorchScript, .*: give the torch\.nn\.Module",
    "exported": r"exported is a program of torch\.export, .*: give the torch\.nn\.Module",
    "PartlyScripted": r"layer 'block' is a program of TorchScript.*: ask for a layer outside it",
    "quantized": r"quantized layers \('fc'\), .*: give the network of floats",
    "AlwaysFetches": r"AlwaysFetches downloads something.*: put its file into '.*checkpoints'",
}
COMMANDS = (
    "explain --data images --count 2",
    "evaluate --data images --count 2 --explainers grad_cam --metrics deletion_mean",
    "analyze --data images --count 2 --cards 0 --steps 0 --layers 'block*'",
)
NO_TRACES = pytest.mark.filterwarnings(
    "ignore:.*(torch.jit|torch.ao|quantize|is deprecated|inputs have requires_grad).*"
)


@pytest.fixture
def folder(offline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(offline_folder)
    return offline_folder


@NO_TRACES
@pytest.mark.parametrize("name", ODD)
def test_odd_network_is_told_in_one_line(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but four of these were tracebacks."""
    for command in COMMANDS:
        line = mistaken_line(f"{command} --size 16 --teacher odd_networks.{name}", folder, capsys)
        assert re.search(ODD[name], line), line


@NO_TRACES
@pytest.mark.parametrize("name", ["GivesDict", "GivesScoreMaps", "Reentrant", "Lazy", "quantized"])
@pytest.mark.parametrize("role", ["teacher", "student", "network"])
def test_odd_network_is_told_before_it_trains_or_teaches(
    name: str, role: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((folder / "tiny.yaml").read_text())
    if role == "network":
        if name == "Reentrant":  # it may be trained: nothing is explained
            return
        config["model"] = {"class_path": "camdistill.distill.classifier.Classifier"}
        config["model"]["init_args"] = {}
    config["model"]["init_args"][role] = {"name": f"odd_networks.{name}"}
    (folder / "odd.yaml").write_text(yaml.safe_dump(config))
    line = mistaken_line("fit -c odd.yaml", folder, capsys)
    assert re.search(ODD[name], line), line


@pytest.mark.parametrize(
    "name",
    ["GivesDict", "GivesTuple", "GivesNumbers", "GivesScoreMaps", "GivesTokens", "GivesSparse"],
)
def test_the_class_that_the_line_asks_for_is_explained(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "explain --data images --count 2 --size 16"
    line = mistaken_line(f"{command} --teacher odd_networks.{name}", folder, capsys)
    (folder / "mended.py").write_text(
        f"import odd_networks, torch\n"
        f"class {name}(torch.nn.Module):\n"
        f"    def __init__(self):\n"
        f"        super().__init__()\n"
        f"        self.network = odd_networks.{name}()\n"
        f"    def forward(self, images):\n"
        f"        return {line.partition('returns ')[2]}\n"
    )
    __import__("sys").modules.pop("mended", None)
    assert main([*command.split(), "--teacher", f"mended.{name}"]) == 0


@NO_TRACES
def test_what_the_lines_ask_for_is_explained(folder: Path) -> None:
    names = ("Plain", "NotReentrant", "lazy_run_once", "Fetches")
    for name in names:
        command = "explain --data images --count 1 --size 16 --teacher odd_networks."
        assert main(f"{command}{name} --out {name}".split()) == 0
    command = "explain --data images --count 1 --size 16 --teacher odd_networks.PartlyScripted"
    assert main([*command.split(), "--layers", "conv"]) == 0
    # It was refused: the second convolution reads four channels.
    command = "explain --data images --count 1 --size 16 --teacher odd_networks.GrayScripted"
    assert main([*command.split(), "--layers", "block"]) == 0


@NO_TRACES
@pytest.mark.parametrize("name", ["scripted", "traced", "exported", "quantized", "Lazy"])
@pytest.mark.parametrize("grad", ["none", "full"])
def test_grad_cam_refuses_what_has_no_layers_gradients_or_weights(name: str, grad: str) -> None:
    """A quantized head gave a map of zeros at block.0."""
    network = getattr(odd_networks, name)()
    if name != "exported":
        network.eval()
    with pytest.raises(UserError, match=r"give the|run the network"):
        grad_cam(network, torch.rand(2, 3, 16, 16), ["block.0"], 1, grad=grad)


def test_answers_by_chance_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were explained, or were said to mix the images of a batch."""
    for command in COMMANDS[:2]:
        command = f"{command} --size 16 --teacher odd_networks.AnswersByChance"
        line = mistaken_line(command, folder, capsys)
        assert re.search("the teacher answers by chance: .* draws nothing in eval mode", line), line
    for method in ("occlusion", "score_cam"):
        with pytest.raises(UserError, match="AnswersByChance answers by chance"):
            find_method(method)(
                odd_networks.AnswersByChance().eval(), torch.rand(2, 3, 16, 16), ["block"], 1
            )


@pytest.mark.parametrize("grad", ["none", "full"])
def test_sparse_logits_are_told_and_explained_when_made_dense(
    grad: str, generator: torch.Generator
) -> None:
    """They were a NotImplementedError of argmax."""
    torch.manual_seed(0)
    plain, images = odd_networks.Plain().eval(), torch.rand(2, 3, 16, 16, generator=generator)
    expected = grad_cam(plain, images, ["block"], 1)["block"]
    network = odd_networks.GivesSparse().eval()
    network.load_state_dict(plain.state_dict())
    for classes in (None, 1):
        with pytest.raises(UserError, match=r"gives a sparse tensor \[2, 6\], not logits"):
            grad_cam(network, images, ["block"], classes, grad=grad)
    for options in (
        {"classes": 1, "logits": lambda output: output.to_dense()},
        {"score": lambda output: output.to_dense()[:, 1]},
    ):
        maps = grad_cam(network, images, ["block"], grad=grad, **options)["block"]
        torch.testing.assert_close(maps, expected)


@NO_TRACES
@pytest.mark.parametrize("grad", ["none", "full"])
@pytest.mark.parametrize("layer", ["conv", "block"])
def test_a_reentrant_checkpoint_is_told_and_the_other_kind_is_explained(
    layer: str, grad: str, generator: torch.Generator
) -> None:
    torch.manual_seed(0)
    plain, images = odd_networks.Plain().eval(), torch.rand(2, 3, 16, 16, generator=generator)
    expected = grad_cam(plain, images, [layer], 1)[layer]
    for kind in (odd_networks.Reentrant, odd_networks.NotReentrant):
        network = kind().eval()
        network.load_state_dict(plain.state_dict())
        if kind.reentrant:
            for ask in (
                lambda one: grad_cam(one, images, [layer], 1, grad=grad),
                lambda one: hires_cam(one, images, [layer], 1),
                lambda one: gradient(one, images, 1),
            ):
                with pytest.raises(UserError, match="call checkpoint with use_reentrant=False"):
                    ask(network)
        else:
            maps = grad_cam(network, images, [layer], 1, grad=grad)[layer]
            torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision.models.segmentation.lraspp_mobilenet_v3_large",
        "torchvision.models.detection.ssdlite320_mobilenet_v3_large",
        "odd_networks.Fetches",
    ],
)
def test_nothing_is_downloaded_that_nobody_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's segmentation and detection networks fetched a backbone."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def connect(*args: object) -> None:
        raise AssertionError("it connects")

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    assert Teacher(NetworkSpec(name)).sha256 is None
    asked = {"pretrained": True} if "Fetches" in name else {"weights": "DEFAULT"}
    with pytest.raises(UserError, match="it connects"):
        Teacher(NetworkSpec(name, args=asked))
