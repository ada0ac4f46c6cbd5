"""What people see: TensorBoard in a real browser, judged by the ink on the page."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from camdistill import tags
from camdistill.report.analysis_run import AnalysisRun
from camdistill.report.layer_report import report_url
from camdistill.report.tensorboard import TensorBoardLogger

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium or google-chrome on PATH: nothing is rendered"
    ),
]
SIZE = 1600, 2000
# Virtual time, without which only the page's shell is drawn; and SVG, as headless browsers draw
# no WebGL lines.
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=15000"),
]


def _artifacts(tmp_path: Path) -> Path:
    """Screenshots are kept where CAMDISTILL_ARTIFACTS says."""
    folder = Path(os.environ.get("CAMDISTILL_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _shot(url: str, path: Path) -> np.ndarray:
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", f"--screenshot={path}", url]
        subprocess.run(command, capture_output=True, timeout=120, check=True)
    return np.asarray(Image.open(path).convert("RGB"))


def _ink(picture: np.ndarray) -> float:
    """Share of the cards' place that is neither white nor pale gray: no bars, no settings."""
    return float((picture[180:, 340:1340].min(-1) < 200).mean())


def _rendered(url: str, path: Path, least: float) -> np.ndarray:
    """A screenshot with enough ink; a blank one is taken again, up to three times."""
    for _ in range(3):
        picture = _shot(url, path)
        if _ink(picture) >= least:
            break
    return picture


def _svg(url: str) -> str:
    return url.replace("/?", "/?darkMode=false&forceSVG=true&", 1)


def test_front_page_shows_curves_pictures_and_histograms(
    opened: AnalysisRun, served, tmp_path: Path
) -> None:
    folder = opened.report.folder
    with served(folder, "true") as base:
        path = _artifacts(tmp_path) / "front_page.png"
        picture = _rendered(_svg(report_url(folder, base)), path, 0.02)
    assert _ink(picture) > 0.02
    # The profiles' own colors: the picture of `1_overview/profiles` is pinned near the top.
    for color in ([59, 82, 139], [225, 98, 47]):
        near = (np.abs(picture.astype(int) - color).max(-1) < 20).sum()
        assert near > 100, color


@pytest.mark.parametrize(
    ("tab", "query", "least"),
    [
        ("timeseries", f"tagFilter={quote('^4_activations/ridge')}", 0.02),
        ("histograms", f"tagFilter={quote(tags.RIDGE)}", 0.005),
        ("images", "", 0.005),
        ("custom_scalars", "", 0.005),
        ("text", "", 0.005),
    ],
)
def test_tab_is_drawn(
    opened: AnalysisRun, served, tmp_path: Path, tab: str, query: str, least: float
) -> None:
    with served(opened.report.folder, "true") as base:
        url = _svg(f"{base}/?{query}#{tab}")
        picture = _rendered(url, _artifacts(tmp_path) / f"{tab}.png", least)
    assert _ink(picture) >= least


def test_hparams_are_drawn(served, tmp_path: Path) -> None:
    for beta in range(1, 11):
        logger = TensorBoardLogger(tmp_path / "runs", version=f"beta{beta}")
        logger.log_hyperparams({"beta": float(beta), "lr": 0.1})
        logger.log_metrics(dict.fromkeys(tags.STUDENT_CARDS, beta / 16), 10)
        logger.finalize("success")
    with served(tmp_path / "runs", "true") as base:
        url = _svg(f"{base}/?#hparams")
        picture = _rendered(url, _artifacts(tmp_path) / "hparams.png", 0.003)
    assert _ink(picture) >= 0.003


def test_page_without_cards_has_less_ink_than_any_page_here(
    opened: AnalysisRun, served, tmp_path: Path
) -> None:
    with served(opened.report.folder, "true") as base:
        url = _svg(f"{base}/?tagFilter=nothing_has_this_name#timeseries")
        picture = _shot(url, tmp_path / "empty.png")
    assert _ink(picture) < 0.002
