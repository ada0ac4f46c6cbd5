"""Classify and explain images with an exported explainer; needs onnxruntime, numpy and pillow.

    camdistill export --checkpoint checkpoints/shapes-student.safetensors --out runs/export
    python docs/examples/onnx_explainer.py runs/export/explainer.onnx photo.jpg --out explained

For every image: the most probable classes, and a picture of it with the evidence for the first one.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

# Viridis at six places, dark to bright.
COLORS = np.array(
    [(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)]
)


def prepared(path: Path, size: int) -> Image.Image:
    """An upright RGB image, its shorter side scaled to a size and its middle cut out."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    width, height = image.size
    scale = size / min(width, height)
    scaled = (size, int(scale * height)) if width <= height else (int(scale * width), size)
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax of several logits; the sigmoid of a single one."""
    if logits.shape[-1] == 1:
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def overlay(image: Image.Image, raw: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """An image under its map: evidence for the class alone, from none (dark) to most (bright)."""
    evidence = np.maximum(raw, 0)
    evidence = evidence / max(float(evidence.max()), np.finfo(np.float32).tiny)
    grown = Image.fromarray(evidence.astype(np.float32)).resize(
        image.size, Image.Resampling.BILINEAR
    )
    places = np.linspace(0, 1, len(COLORS))
    values = np.clip(np.asarray(grown), 0, 1)
    colors = np.stack([np.interp(values, places, COLORS[:, rgb]) for rgb in range(3)], -1)
    mixed = (1 - opacity) * np.asarray(image) + opacity * colors
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def main() -> None:
    """Explains the images of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("explainer", type=Path, help="explainer.onnx")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("explained"))
    given = parser.parse_args()
    session = onnxruntime.InferenceSession(given.explainer, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    names = json.loads(told["classes"])
    images = [prepared(path, int(told["size"])) for path in given.images]
    batch = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    logits, maps = session.run(["logits", "maps"], {"images": batch.transpose(0, 3, 1, 2)})
    given.out.mkdir(parents=True, exist_ok=True)
    for number, (path, probability) in enumerate(
        zip(given.images, probabilities(logits), strict=True)
    ):
        best = np.argsort(-probability)[:3]
        said = [f"{names[c] if names else c} {probability[c]:.3f}" for c in best]
        written = given.out / f"{number:03d}_{path.stem}.png"
        overlay(images[number], maps[number, best[0]]).save(written)
        print(f"{path}: {', '.join(said)} -> {written}")


if __name__ == "__main__":
    main()
