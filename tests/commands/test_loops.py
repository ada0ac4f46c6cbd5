"""`test` of both kinds of checkpoint, `--help` and `--print_config`."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from camdistill.cli import main
from camdistill.commands.command_parser import call, join_list_words
from camdistill.commands.loops import _ReportingExperiment

RUN = Path("runs/tiny/version_0")
LAST = RUN / "checkpoints/last.ckpt"


def measured(checkpoint: str, results: Path) -> object:
    assert main(["test", "-c", "tiny.yaml", "--ckpt_path", checkpoint]) == 0
    return json.loads(results.read_text())["student"]


def test_both_kinds_of_checkpoint_test_alike(folder: Path) -> None:
    whole = measured("last", RUN / "results.json")
    (RUN / "results.json").unlink()
    assert measured(str(LAST), RUN / "results.json") == whole
    (RUN / "results.json").unlink()
    assert measured(str(RUN / "student.safetensors"), RUN / "results.json") == whole


def test_checkpoint_that_ships_gets_a_run_of_its_own(folder: Path) -> None:
    shipped = folder / "checkpoints" / "tiny.safetensors"
    shipped.parent.mkdir()
    shutil.copy(RUN / "student.safetensors", shipped)
    measured("checkpoints/tiny.safetensors", Path("runs/tiny/version_1/results.json"))
    assert not (folder / "results.json").exists()
    assert not (RUN / "results.json").exists()


def test_validation_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "-c", "tiny.yaml", "--ckpt_path", "last"]) == 0
    said = capsys.readouterr().out
    assert "agreement" in said
    assert str(RUN) in said


def test_training_goes_on_in_its_folder(folder: Path) -> None:
    more = ["fit", "-c", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert main(more) == 0
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    ("command", "shown", "most"),
    [
        ("fit --help", "--model.beta NUMBER", 126),
        ("fit -c tiny.yaml --help", "--data.root PATH", 126),
        ("test --help", "--ckpt_path FILE|last", 60),
        ("explain --help", "--images PATH ...", 40),
        ("study --help", "--seeds N ...", 30),
    ],
)
def test_help_is_short_and_explains(
    command: str, shown: str, most: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(shown in line for line in lines)
    assert len(lines) <= most
    assert all(len(line) <= 100 for line in lines)
    assert not any(word in " ".join(lines) for word in ("torch.nn", "Module", "<class", "typing."))


def test_every_option_of_explain_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    options = [line for line in lines if line.startswith("  --")]
    assert len(options) >= 12
    assert all(len(line.split(None, 2)[-1]) > 3 for line in options)


@pytest.mark.parametrize("command", ["fit -c tiny.yaml --model.beta 5", "explain --count 3"])
def test_print_config_is_a_config(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--print_config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["model"]["init_args"]["beta"] == 5 if "fit" in command else found["count"] == 3


def test_first_help_needs_no_torch() -> None:
    code = "import sys; from camdistill.cli import main; main(['--help']); print(*sys.modules)"
    start = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 5  # 0.1 s on an idle machine
    assert not {"torch", "pytorch_lightning", "numpy", "jsonargparse"} & set(said.stdout.split())
    assert "explain" in said.stdout


def test_lists_are_gathered_up_to_the_next_option() -> None:
    lists = {"images": Path, "seeds": int}
    words = ["--images", "a b.png", "c.png", "--count", "3", "--seeds", "1", "2", "--seeds=[4, 5]"]
    assert join_list_words(words, lists) == [
        '--images=["a b.png", "c.png"]',
        "--count",
        "3",
        "--seeds=[1, 2]",
        "--seeds=[4, 5]",
    ]


def test_a_file_whose_name_begins_with_a_bracket_is_a_word() -> None:
    words = ["--images", "[1] cat.png", "--images=[a.png, b.png]"]
    assert join_list_words(words, {"images": Path}) == [
        '--images=["[1] cat.png"]',
        "--images=[a.png, b.png]",
    ]


@pytest.mark.parametrize("from_file", [True, False])
def test_a_tilde_that_no_shell_replaced_is_the_home_folder(
    from_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(out: Path = Path("runs"), images: list[Path] = []) -> object:  # noqa: B006
        """Gives back what it was given."""
        return out, images

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    config = tmp_path / "probe.yaml"
    config.write_text("out: ~/oo\nimages: [~/a.png, ~b.png]\n")
    words = ["--out=~/oo", "--images", "~/a.png", "~b.png"]
    found = call(probe, ["probe", *(["-c", str(config)] if from_file else words)])
    home = tmp_path / "home"
    assert found == (home / "oo", [home / "a.png", Path("~b.png")])


def test_the_next_commands_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("my runs/it's/version_0")
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/last.ckpt"):
        (run / name).touch()
    fake = SimpleNamespace(
        trainer=SimpleNamespace(is_global_zero=True, global_step=1, callback_metrics={}),
        folder=run,
        model=None,
        save_network=lambda: run / "student.safetensors",
    )
    _ReportingExperiment.after_fit(fake)
    line = next(one for one in capsys.readouterr().out.splitlines() if "test it:" in one)
    words = shlex.split(line.partition("test it:")[2])
    assert words[:4] == ["camdistill", "test", "-c", str(run / "config.yaml")]
    assert words[4:] == ["--ckpt_path", str(run / "checkpoints/last.ckpt")]
