"""The version, the tools and the pages around the code agree with each other."""

import tomllib
from pathlib import Path

import yaml

import camdistill

ROOT = Path(__file__).parents[1]


def test_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert "version" not in project
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == camdistill.__version__
    assert f"\n## {camdistill.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_pre_commit_formats_with_the_ruff_that_the_tests_use() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revision = next(hook["rev"] for hook in hooks if hook["repo"].endswith("ruff-pre-commit"))
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ruff=={revision.removeprefix('v')}" in pinned


def test_workflows_run_every_python_that_the_project_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yaml").read_text())
    pythons = workflow["jobs"]["quick"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={pythons[0]}"


def test_readme_is_for_the_first_ten_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
