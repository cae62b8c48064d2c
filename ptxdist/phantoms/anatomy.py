"""Shapes of a phantom: the position of the patient, the outlines of the lungs, the masks of a pneumothorax.

Owns: the shapes of the synthetic images and the masks that fit them. `greys` gives the shapes their grey levels.

Anatomy is in units of the image side: x is the distance from the midline, positive towards the lateral chest wall, and
y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

SIZE_PX = 1024
DRAW_PX = 512

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

ANGLES = np.linspace(-np.pi, np.pi, 720, endpoint=False)  # 0 is the apex, positive towards the chest wall


def points(text: str) -> Points:
    """Points float64 (n, 2) from the text `x,y x,y …`."""
    return np.array(text.replace(",", " ").split(), np.float64).reshape(-1, 2)


_WALL = "0.11,0.10 0.17,0.075 0.24,0.11 0.31,0.20 0.365,0.34 0.395,0.50 0.41,0.66 0.415,0.82 "
_RIGHT = points(_WALL + "0.36,0.765 0.28,0.725 0.19,0.72 0.12,0.765 0.095,0.62 0.085,0.42 0.075,0.22")
_LEFT = points(_WALL + "0.36,0.775 0.30,0.75 0.24,0.775 0.215,0.67 0.175,0.55 0.11,0.41 0.075,0.22")


@dataclass(frozen=True)
class Lung:
    """Outline in polar form: `centre_px` (2,), `radius_px` (720,) over ANGLES; `side` -1 is left in the image."""

    centre_px: Points
    radius_px: Points
    side: int

    def outline(self, angles: Points, share: Points | float = 1.0) -> Points:
        """Points (n, 2) in pixels at `share` of the radius; apex at angle 0, chest wall at positive angles."""
        radius = np.interp(angles, ANGLES, self.radius_px, period=2 * np.pi) * share
        return np.asarray(
            self.centre_px + np.column_stack((self.side * radius * np.sin(angles), -radius * np.cos(angles)))
        )


@dataclass(frozen=True)
class Chest:
    """Position of one patient before the detector: view (PA or AP), tilt, size and shift, and the two lungs."""

    view: str
    turn: Points
    scale: Points
    shift: Points
    lungs: tuple[Lung, ...] = ()

    def place(self, at: Sequence[tuple[float, float]] | Points, side: int = 1, size_px: int = DRAW_PX) -> Points:
        """Pixels (n, 2) of anatomy points (n, 2) on one side; side -1 is on the left of the image."""
        centred: Points = (np.asarray(at, np.float64) - (0, 0.47)) * (side, 1) * self.scale
        return np.asarray((centred @ self.turn.T + self.shift) * size_px)


def pose(rng: np.random.Generator, view: str) -> Chest:
    """A chest for one image, with random position, size, tilt and lung outlines; it is shorter in AP images."""
    tilt = np.radians(rng.normal(0, 2.0 if view == "PA" else 3.0))
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    scale = rng.normal((1.0, 1.0) if view == "PA" else (1.0, 0.84), 0.045)
    chest = Chest(view, turn, scale, rng.normal((0.5, 0.47), 0.02))
    lungs = []
    for side, shape in ((-1, _RIGHT), (1, _LEFT)):
        edge = shape * (1, rng.normal(1, 0.03)) + rng.normal(0, 0.006, (len(shape), 2))
        edge = spline(chest.place(edge, side, SIZE_PX), closed=True)
        centre = edge.mean(axis=0)
        offset = (edge - centre) * (side, -1)
        angles, radii = np.arctan2(*offset.T), np.hypot(*offset.T)
        order = np.argsort(angles)
        radius = np.interp(ANGLES, angles[order], radii[order], period=2 * np.pi)
        keep = np.exp(-0.5 * (np.arange(361) / 18) ** 2)  # smooth over about three degrees
        lungs.append(Lung(centre, np.fft.irfft(np.fft.rfft(radius) * keep, 720), side))
    return replace(chest, lungs=tuple(lungs))


# --- the masks --------------------------------------------------------------------------------------------------


def draw_masks(rng: np.random.Generator, chest: Chest) -> list[Image]:
    """Masks of one pneumothorax as uint8 (1024, 1024) of 0 and 1: one mask in three of four cases, else several.

    The area of their union is distributed as in the challenge's table: log-normal, median 8,600 pixels, 300 to 161,000.
    Several masks are parts of one crescent, some of them overlapping, or two crescents of one lung (apex and base).
    """
    lung = chest.lungs[rng.integers(2)]
    target_px = float(np.clip(rng.lognormal(9.06, 1.08), 300, 161_000))
    spots = (0.5, 0.38, 0.12) if target_px < 25_000 else (0.2, 0.8, 0.0)
    centre = np.radians(rng.choice((12, 60, 140), p=spots) + rng.normal(0, 14))
    kind, cut = rng.random(), rng.uniform(-0.3, 0.3)
    if kind < 0.06 and 3_000 < target_px < 40_000:
        apex, base = np.radians(rng.normal((10, 140), 8))
        return [
            *_crescent(rng, lung, apex, target_px * 0.7, [(-1, 1)]),
            *_crescent(rng, lung, base, target_px * 0.3, [(-1, 1)]),
        ]
    if kind < 0.13:
        return _crescent(rng, lung, centre, target_px, [(-1, cut + 0.15), (cut - 0.15, 1)])
    if kind < 0.20:
        return _crescent(rng, lung, centre, target_px, [(-1, cut), (cut, 1)])
    if kind < 0.25:
        return _crescent(rng, lung, centre, target_px, [(-1, cut - 0.1), (cut - 0.1, cut + 0.3), (cut + 0.3, 1)])
    return _crescent(rng, lung, centre, target_px, [(-1, 1)])


def _crescent(
    rng: np.random.Generator, lung: Lung, centre: float, target_px: float, parts: Sequence[tuple[float, float]]
) -> list[Image]:
    """The space between the chest wall and a lung that shrank by `depth * (1 - t²)`, cut into `parts` of t in [-1, 1].

    The area in polar form is quadratic in the depth, so the depth is solved from the wanted area; the crescent is
    lengthened until the depth is plausible. Parts overlap only where their ranges of t do.
    """
    half = 0.52 * (target_px / 8600) ** 0.45 * rng.lognormal(0, 0.2)
    t = np.linspace(-1, 1, 257)
    while True:
        half = min(half, 2.9)
        radii = np.interp(centre + half * t, ANGLES, lung.radius_px, period=2 * np.pi)
        linear, square = (float((radii**2 * (1 - t**2) ** power).mean() * 2 * half) for power in (1, 2))
        edge_px = 0.9 * 2 * half * float(radii.mean())  # filling includes the pixels on the outline
        root = linear**2 - 2 * square * max(target_px - edge_px, 0.3 * target_px)
        depth = (linear - np.sqrt(root)) / square if root > 0 else 1.0
        if depth < 0.16 + 0.22 * half or half >= 2.9:
            break
        half *= 1.15
    masks: list[Image] = []
    former = -2.0
    for start, end in parts:
        t = np.linspace(start, end, 160)
        angles = centre + half * t
        shrunk = lung.outline(angles, 1 - min(depth, 0.92) * (1 - t**2))
        mask = fill(np.vstack((lung.outline(angles), shrunk[::-1])), SIZE_PX)
        if start == former:
            mask[masks[-1] > 0] = 0  # both include the pixels on the cut
        masks.append(mask)
        former = end
    return masks


def fill(outline: Points, size_px: int, value: int = 1) -> Image:
    """A filled outline on uint8 (size_px, size_px); points in pixels, rounded to a sixteenth."""
    canvas = np.zeros((size_px, size_px), np.uint8)
    cv2.fillPoly(canvas, [fixed(outline)], value, cv2.LINE_8 if value == 1 else cv2.LINE_AA, 4)
    return canvas


def fixed(points: Points) -> npt.NDArray[np.int32]:
    """Points in sixteenths of a pixel, as cv2 draws them with shift 4."""
    return np.asarray(np.rint(points * 16), np.int32)


def spline(points: Points, closed: bool = False) -> Points:
    """Smooth curve (m, 2) through the points (n, 2), a Catmull-Rom spline; `closed` joins its ends."""
    ends = (points[-1:], points[:2]) if closed else (2 * points[:1] - points[1:2], 2 * points[-1:] - points[-2:-1])
    knots = np.vstack((ends[0], points, ends[1]))
    a, b, c, d = (knots[i : len(knots) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, 16, endpoint=False)[:, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.asarray(np.vstack((curve.reshape(-1, 2), points[:0] if closed else points[-1:])))
