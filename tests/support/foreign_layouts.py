"""Latents as other programs write them, small, with images that they could be of."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

SIDE = 64
"""Of the images in pixels."""

LATENT = (4, 8, 8)
CLASSES, EACH = 2, 6
COUNT = CLASSES * EACH


def draw(count: int = COUNT, seed: int = 0, channels: int = LATENT[0]) -> np.ndarray:
    """Return normal numbers float32 ``[count, channels, 8, 8]``."""
    return np.random.default_rng(seed).normal(size=(count, channels, *LATENT[1:])).astype(np.float32)


def image_keys() -> list[str]:
    """Return the paths of images in folders of classes, sorted."""
    return [f"class{label}/{number}.png" for label in range(CLASSES) for number in range(EACH)]


def write_images(folder: Path, keys: list[str] | None = None) -> Path:
    """Write PNG files of noise under these paths."""
    generator = np.random.default_rng(1)
    for key in keys or image_keys():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / key)
    return folder


def write_repa(root: Path) -> np.ndarray:
    """Write REPA's tree with images, and return its moments ``[N, 8, 8, 8]``."""
    moments = np.concatenate([draw(), np.abs(draw(seed=2)) + np.float32(0.1)], axis=1)
    names = [f"00000/img-mean-std-{number:08d}.npy" for number in range(COUNT)]
    keys = [f"00000/img{number:08d}.png" for number in range(COUNT)]
    write_images(root / "images", keys)
    (root / "vae-sd" / "00000").mkdir(parents=True)
    for name, each in zip(names, moments, strict=True):
        np.save(root / "vae-sd" / name, each)
    for folder, own in (("images", keys), ("vae-sd", names)):
        labels = [[name, number // EACH] for number, name in enumerate(own)]
        (root / folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return moments


def zip_folder(folder: Path, file: Path) -> None:
    """Pack a folder's files, stored."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())


def write_mar(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write MAR's files, and return mean and log variance of both views, ``[N, 8, 8, 8]`` each."""
    moments, mirrored = draw(channels=8), draw(seed=3, channels=8)
    moments[0, 4:] = -40  # below what is used of a log variance
    for key, *views in zip(image_keys(), moments, mirrored, strict=True):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        np.savez(root / f"{key}.npz", moments=views[0], moments_flip=views[1])
    return moments, mirrored


def write_fast_dit(root: Path) -> np.ndarray:
    """Write fast-DiT's files, and return the latents as they were scaled, ``[N, 4, 8, 8]``."""
    scaled = draw()
    for kind in ("features", "labels"):
        (root / f"imagenet256_{kind}").mkdir(parents=True)
    for number, each in enumerate(scaled):
        np.save(root / "imagenet256_features" / f"{number}.npy", each[None])
        np.save(root / "imagenet256_labels" / f"{number}.npy", np.array([number // EACH]))
    return scaled


def write_lightningdit(
    root: Path,
    *,
    world: int = 1,
    shard_rows: int = 2,
    dtype: torch.dtype = torch.float32,
    statistics: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Write LightningDiT's files of some processes, and return the latents of both views in image order."""
    root.mkdir(parents=True, exist_ok=True)
    latents, mirrored = draw(), draw(seed=4)
    labels = np.arange(COUNT) // EACH
    padded = -(-COUNT // world) * world
    order = np.arange(padded) % COUNT
    for rank in range(world):
        mine = order[rank::world]
        for shard, first in enumerate(range(0, len(mine), shard_rows)):
            rows = mine[first : first + shard_rows]
            content = {
                "latents": torch.from_numpy(latents[rows]).to(dtype),
                "latents_flip": torch.from_numpy(mirrored[rows]).to(dtype),
                "labels": torch.from_numpy(labels[rows]),
            }
            save_file(content, root / f"latents_rank{rank:02d}_shard{shard:03d}.safetensors")
    if statistics:
        mean = torch.linspace(-0.5, 0.5, LATENT[0]).view(1, -1, 1, 1)
        torch.save({"mean": mean, "std": mean.abs() + 1}, root / "latents_stats.pt")
    return latents, mirrored
