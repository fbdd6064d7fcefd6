"""Photographs for `keypoints.py`, `faces.py` and `yolo.py`: yours where you name a folder, and the two in scikit-learn.

For `keypoints.py` also views of them, and the points in views that match; for `faces.py` squares that might be faces.
"""

import os
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

WIDTH, HEIGHT = 224, 160  # of a view
POINTS = 256  # that are matched, of a view
MARGIN = 100  # pixels that a photograph is continued by at its edges, mirrored


def photographs() -> tuple[list[Path], list[Path]]:
    """For training and for tests: every fourth is one for tests. EDGE_COMPRESS_PHOTOS names your folder (of *.jpg)."""
    found = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    if folder := os.environ.get("EDGE_COMPRESS_PHOTOS"):
        found += sorted(Path(folder).rglob("*.jpg"))
    return [path for k, path in enumerate(found) if k % 4], found[::4]


def square(photo: Image.Image, left: float, top: float, side: float, size: int) -> Tensor:
    """A square of a photograph as (3, size, size) in [0, 1]; one that reaches beyond the edge is moved."""
    left, top = min(left, photo.width - side), min(top, photo.height - side)
    found = photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return to_tensor(found)


@lru_cache(maxsize=64)
def _grey(path: Path) -> Image.Image:
    return Image.fromarray(np.pad(np.asarray(Image.open(path).convert("L")), MARGIN, "reflect"))


class Views(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Grey views (1, 160, 224) in [0, 1] of photographs, in pairs: views 2k and 2k + 1 show about the same.

    The target of a view is its number, and the homography from the first to the second of its pair.
    """

    def __init__(self, paths: list[Path], pairs: int, seed: int) -> None:
        self._paths, self._pairs, self._seed = paths, pairs, seed

    def __len__(self) -> int:
        return 2 * self._pairs

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        pair, second = divmod(i, 2)
        photo = _grey(self._paths[pair % len(self._paths)])
        random = np.random.default_rng((self._seed, pair))
        scale = random.uniform(0.5, 0.9) * min(1.3, (photo.width - 2 * MARGIN) / WIDTH, (photo.height - 2 * MARGIN) / HEIGHT)
        centre = random.uniform(0.4, 0.6, 2) * photo.size
        views = [_homography(random, scale, centre) for _ in range(2)]
        numbers = views[second].flatten()[:8]  # the ninth is 1
        view = photo.transform((WIDTH, HEIGHT), Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BICUBIC)
        between = torch.from_numpy(np.linalg.inv(views[1]) @ views[0]).float()
        return to_tensor(view), {"view": torch.tensor(i), "homography": between}


def _homography(random: np.random.Generator, scale: float, centre: np.ndarray) -> np.ndarray:
    """From the pixels of a view to those of a photograph: turned by up to 20 degrees, moved, scaled and tilted a bit."""
    angle, size = np.deg2rad(random.uniform(-20, 20)), scale * random.uniform(0.8, 1.25)
    c, s, tilt = size * np.cos(angle), size * np.sin(angle), random.uniform(-4e-4, 4e-4, 2)
    x, y = centre + random.uniform(-20, 20, 2) * scale
    middle = np.array([[1, 0, -WIDTH / 2], [0, 1, -HEIGHT / 2], [0, 0, 1]])
    found = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]) @ np.array([[c, -s, 0], [s, c, 0], [*tilt, 1]]) @ middle
    return found / found[2, 2]


Points = tuple[Tensor, Tensor]  # places (256, 2) in pixels, and descriptors (256, 64)


def points(described: Tensor, logits: Tensor, reliable: Tensor) -> list[Points]:
    """The best points of each of some views, from XFeat's outputs."""
    score = F.pixel_shuffle(logits.softmax(1)[:, :64], 8) * F.interpolate(reliable, scale_factor=8, mode="bilinear")
    peaks = score * (score == F.max_pool2d(score, 5, 1, 2))
    best = peaks.flatten(1).topk(POINTS).indices
    places = torch.stack((best % WIDTH, best // WIDTH), 2) + 0.5
    grid = places / torch.tensor((WIDTH, HEIGHT)) * 2 - 1
    found = F.grid_sample(F.normalize(described), grid[:, None], "bicubic", align_corners=False)[:, :, 0]
    return list(zip(places, F.normalize(found).transpose(1, 2), strict=True))


def errors(first: Points, second: Points, homography: Tensor) -> Tensor:
    """How far off, in pixels, the matches of two views are; two points match that are each other's most similar."""
    similar = first[1] @ second[1].T
    there, back = similar.argmax(1), similar.argmax(0)
    mutual = back[there] == torch.arange(len(there))
    ahead = F.pad(first[0], (0, 1), value=1.0) @ homography.T
    return (ahead[:, :2] / ahead[:, 2:] - second[0][there]).norm(dim=1)[mutual]


class Proposals(Dataset[tuple[Tensor, Tensor]]):
    """Twelve squares (3, 48, 48) of each photograph: what P-Net holds likeliest to be faces, 4 of each of 3 sizes.

    The target of a square is the probability of a face by O-Net. `mirrored`: each square also the other way round, for training.
    """

    def __init__(self, paths: list[Path], pnet: nn.Module, onet: nn.Module, *, mirrored: bool = False) -> None:
        self._paths, self._pnet, self._onet, self._of = paths, pnet, onet, cache(self._proposed)
        self._mirrored = mirrored

    def __len__(self) -> int:
        return (12 + 12 * self._mirrored) * len(self._paths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        photo, k = divmod(i, 12 + 12 * self._mirrored)
        return self._of(self._paths[photo])[k]

    @torch.no_grad()
    def _proposed(self, path: Path) -> list[tuple[Tensor, Tensor]]:
        photo, found = Image.open(path).convert("RGB"), []
        for share in (0.12, 0.25, 0.5):
            scale = 12 / (share * min(photo.size))  # P-Net looks at squares of 12 pixels, every second
            small = photo.resize([round(scale * length) for length in photo.size], Image.Resampling.BILINEAR)
            chances = self._pnet((255 * to_tensor(small)[None] - 127.5) / 128)[1][0, 1]
            for best in chances.flatten().topk(4).indices.tolist():
                top, left = divmod(best, chances.shape[1])
                found.append((255 * square(photo, 2 * left / scale, 2 * top / scale, 12 / scale, 48) - 127.5) / 128)
        found += [one.flip(2) for one in found] if self._mirrored else []
        return list(zip(found, self._onet(torch.stack(found))[2][:, 1], strict=True))
