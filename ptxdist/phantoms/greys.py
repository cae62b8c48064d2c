"""Grey levels of a phantom, a drawn chest radiograph.

Owns: soft tissue, bones, vessels, look-alikes, noise, and the effect of a pneumothorax on them.

Soft parts are drawn at 512 pixels and enlarged; pneumothorax, pleural line and noise are drawn at 1024. Positions come
from `anatomy`, in its units.
"""

from __future__ import annotations

import cv2
import numpy as np

from ptxdist.phantoms.anatomy import ANGLES, DRAW_PX, SIZE_PX, Chest, Floats, Image, Points, fill, fixed, points, spline

_TRUNK = points(
    "0.10,-0.5 0.105,0 0.20,0.055 0.40,0.085 0.52,0.15 0.60,0.32 0.57,0.47 0.485,0.55 0.455,0.68 0.465,0.9 0.5,1.5"
)
_SPINE = points("-0.07,-0.5 -0.06,0.1 -0.075,0.4 -0.08,1.5 0.08,1.5 0.075,0.4 0.06,0.1 0.07,-0.5")
_HEART = points(
    "0,0.36 0.085,0.37 0.12,0.46 0.17,0.56 0.215,0.68 0.2,0.8 0,0.9 -0.12,0.8 -0.115,0.66 -0.08,0.52 -0.07,0.4"
)
_BELLY = points(
    "-0.8,0.66 -0.46,0.7 -0.41,0.755 -0.35,0.755 -0.28,0.735 -0.19,0.73 0,0.8 0.24,0.79 0.3,0.76 0.36,0.77 "
    "0.41,0.765 0.46,0.7 0.8,0.66 0.8,1.6 -0.8,1.6"
)
_BLADE = points("0.44,0.12 0.35,0.15 0.355,0.26 0.385,0.38 0.41,0.43 0.47,0.27")


def draw_image(rng: np.random.Generator, chest: Chest, union: Image) -> Image:
    """The radiograph uint8 (1024, 1024), air dark, with a pneumothorax where `union` uint8 (1024, 1024) is 1."""
    air = np.maximum.reduce([fill(lung.outline(ANGLES) / 2, DRAW_PX, 255) for lung in chest.lungs])
    closed = cv2.resize(union * np.uint8(255), (DRAW_PX, DRAW_PX), interpolation=cv2.INTER_AREA)
    lungs = np.maximum(air, closed)
    picture = _soft_tissue(rng, chest, lungs)
    picture += _bones(rng, chest, lungs)
    picture += _vessels(rng, chest) * _blur(lungs, 1.6) * (1 - _blur(closed, 1.0))
    dark, span, gamma = (0, 230, 1.25) if chest.view == "PA" else (12, 185, 1.0)
    grey = rng.normal(span, 16) * np.clip(picture, 0, 1.1) ** np.float32(rng.normal(gamma, 0.08))
    grey += _distractors(rng, chest) + np.float32(dark + rng.uniform(0, 18))
    image: Floats = cv2.resize(grey.astype(np.float32), (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_CUBIC)
    if union.any():
        _collapse(rng, image, union, air)
    noise = np.frombuffer(rng.bytes(SIZE_PX * SIZE_PX), np.uint8).reshape(SIZE_PX, SIZE_PX)
    grain = cv2.GaussianBlur(noise.astype(np.float32) - 127.5, (3, 3), 0.7)  # blurred uniform bytes are nearly normal
    image += grain * np.sqrt(np.clip(image, 20, 255)) * np.float32(rng.uniform(0.0026, 0.0044))
    return np.clip(image, 0, 255).astype(np.uint8)


def _soft_tissue(rng: np.random.Generator, chest: Chest, lungs: Image) -> Floats:
    """Trunk, mediastinum, heart, abdomen and the dark lung fields, about 0..1; float32 (512, 512)."""
    trunk = _TRUNK * rng.normal(1, 0.025, 2) + rng.normal(0, 0.008, (len(_TRUNK), 2))
    solid = fill(np.vstack((spline(chest.place(trunk)), spline(chest.place(trunk, -1))[::-1])), DRAW_PX, 255)
    body = _blur(solid, 2.5) * (0.5 + 0.5 * _wide(solid, 24))
    heart = _HEART * (rng.normal(1.0 if chest.view == "PA" else 1.12, 0.06), 1)
    middle = np.maximum(
        0.30 * _wide(fill(spline(chest.place(_SPINE)), DRAW_PX, 255), 9),
        0.27 * _blur(fill(spline(chest.place(heart), closed=True), DRAW_PX, 255), 5),
    )
    knob, trachea, breasts, gas = (np.zeros_like(solid) for _ in range(4))
    cv2.circle(knob, _px(chest.place([(0.05, rng.normal(0.28, 0.015))])[0]), int(rng.integers(16, 26)), 255, -1)
    _line(knob, chest.place([(0.045, 0.28), (0.055, 0.8)]), 170, 20)
    _line(trachea, spline(chest.place([(0.0, -0.2), (-0.004, 0.15), (-0.006, 0.30)])), 255, 17)
    if rng.random() < 0.4:
        for side in (-1, 1):
            spot = _px(chest.place([(0.29, 0.70)], side)[0])
            cv2.ellipse(breasts, spot, (int(rng.integers(65, 90)), int(rng.integers(45, 75))), 0, 0, 360, 255, -1)
    for x, y in rng.uniform((0.05, 0.82), (0.35, 0.98), (rng.integers(0, 4), 2)):
        axes = rng.integers(6, 24, 2).tolist()
        cv2.ellipse(
            gas, _px(chest.place([(x, y)])[0]), axes, rng.uniform(0, 90), 0, 360, int(rng.integers(90, 255)), -1
        )
    belly = rng.uniform(0.24, 0.36) * _wide(fill(spline(chest.place(_BELLY)), DRAW_PX, 255), 6)
    dense = np.maximum(middle + 0.04 * _blur(knob, 4) - 0.13 * _wide(trachea, 5), belly)
    field = _blur(lungs, 1.6)
    rim = np.clip(_wide(lungs, 7) - field, 0, 1)
    depth = _wide(lungs, 36)  # the lung is thickest, so darkest, away from its edges
    most = rng.uniform(0.48, 0.66) if chest.view == "PA" else rng.uniform(0.40, 0.60)
    aeration = field * (most + 0.16 * (depth - 0.5)) * (1 - 0.3 * middle)
    soft = (0.56 + dense) * (1 - aeration) + 0.24 * rim + 0.03 * _blur(breasts, 4) - 0.14 * _blur(gas, 3)
    knots = rng.uniform(-1, 1, (4, 4)).astype(np.float32)
    exposure = cv2.resize(knots, (DRAW_PX, DRAW_PX), interpolation=cv2.INTER_CUBIC)  # smooth, about -1..1
    return np.asarray(soft * body * (1 + 0.10 * exposure + 0.015 * _grain(rng, 64, 1.5)), np.float32)


def _bones(rng: np.random.Generator, chest: Chest, lungs: Image) -> Floats:
    """What ribs, clavicles, shoulder blades and vertebrae add to the picture; float32 (512, 512)."""
    back, front, girdle = (np.zeros((DRAW_PX, DRAW_PX), np.uint8) for _ in range(3))
    t = np.linspace(0, 1, 24)
    first, step, slope = rng.normal((0.085, 0.075, 0.085), (0.008, 0.003, 0.015))
    for side in (-1, 1):
        for i in range(10):
            y = first + step * i
            wall = 0.14 + 0.29 * min(1.0, max(y - 0.02, 0.0) / 0.45) ** 0.6
            arch = np.column_stack((0.04 + (wall - 0.04) * t, y - 0.05 * np.sin(np.pi * t**0.8) + slope * t**2.5))
            _bone(back, chest.place(arch, side), int(rng.integers(10, 14)), 100)
            if 0 < i < 7:
                drop = y + 0.05 + (0.11 - 0.006 * i) * (1 - t**1.7)
                _bone(front, chest.place(np.column_stack((0.12 + (wall - 0.12) * t, drop)), side), 14, 80)
        lift = rng.normal(0, 0.012)
        clavicle = [(0.035, 0.185), (0.09, 0.165), (0.20, 0.14 + lift), (0.32, 0.125 + lift), (0.45, 0.115 + 2 * lift)]
        _bone(girdle, spline(chest.place(clavicle, side)), 12, 130)
        blade = chest.place(np.add(_BLADE, (rng.uniform(-0.01, 0.06), 0)), side)
        cv2.fillPoly(girdle, [fixed(spline(blade, closed=True))], 50, cv2.LINE_AA, 4)
        _line(girdle, spline(blade[1:5]), 100, 2)
        cv2.circle(girdle, _px(chest.place([(0.50, 0.17)], side)[0]), 24, 80, -1, cv2.LINE_AA)
        _line(girdle, chest.place([(0.51, 0.17), (0.57, 0.5)], side), 75, 22)
    for y in np.arange(0.02, 1.0, 0.05):
        _line(girdle, chest.place([(-0.045, y), (0.045, y + 0.004)]), 30, 3)
    cage = np.clip(_wide(lungs, 5) * 1.8, 0, 1)
    bones = cage * (_blur(back, 0.8) * 0.75 + _blur(front, 1.0) * 0.5) + _blur(girdle, 1.2) * 0.8
    return np.asarray(bones * np.float32(rng.uniform(0.16, 0.27)), np.float32)


def _bone(canvas: Image, path: Points, width_px: int, value: int) -> None:
    """A band with brighter edges, like a bone with its cortex."""
    _line(canvas, path, value, width_px)
    for shift in (-0.5, 0.5):
        _line(canvas, np.add(path, (0, shift * width_px)), value * 1.7, 1)


def _vessels(rng: np.random.Generator, chest: Chest) -> Floats:
    """Branching vessels from each hilum and fine lung markings up to the chest wall; float32 (512, 512)."""
    canvas, glow = np.zeros((DRAW_PX, DRAW_PX), np.uint8), np.zeros((DRAW_PX, DRAW_PX), np.uint8)
    t = np.linspace(0, 1, 12)[:, None]
    for lung in chest.lungs:
        hilum = chest.place([(0.10, rng.normal(0.43, 0.02))], lung.side)[0]
        starts = hilum + rng.normal(0, (6, 18), (34, 2))
        ends = lung.outline(rng.uniform(-np.pi, np.pi, 34), rng.uniform(0.5, 1.0, 34)) / 2
        reach = ends - starts
        bends = starts + reach * 0.5 + rng.normal(0, 0.12, (34, 2)) * np.hypot(*reach.T)[:, None]
        tips = rng.normal(0, 0.25, (34, 3, 2)) * np.hypot(*reach.T)[:, None, None] + 0.3 * reach[:, None]
        for start, bend, end, values, twigs in zip(starts, bends, ends, rng.uniform(0.5, 1.1, 34), tips, strict=True):
            path = start * (1 - t) ** 2 + 2 * bend * t * (1 - t) + end * t**2
            for first, last, value, width in ((0, 4, 150, 3), (3, 7, 115, 2), (6, 12, 80, 1)):
                _line(canvas, path[first:last], value * values, width)
            for root, twig in zip(path[4:10:2], twigs, strict=True):
                _line(canvas, np.vstack((root, root + twig * (0.6, 0.9), root + twig)), 75 * values, 1)
        cv2.ellipse(glow, _px(hilum), (15, 36), 0, 0, 360, 255, -1)
    marks = 1.2 + 0.5 * _grain(rng, 256, 0.8) + 0.5 * _grain(rng, 128, 1.2)
    texture = 0.30 * _blur(canvas, 0.9) + 0.10 * _wide(glow, 9) + np.float32(0.028) * marks
    return np.asarray(texture * np.float32(rng.uniform(0.8, 1.2)), np.float32)


def _grain(rng: np.random.Generator, size_px: int, sigma_px: float) -> Floats:
    """Band-limited noise of unit variance, float32 (512, 512): drawn at `size_px`, then enlarged."""
    raw = rng.standard_normal((size_px, size_px), dtype=np.float32)
    band = cv2.GaussianBlur(raw, (0, 0), sigma_px) - cv2.GaussianBlur(raw, (0, 0), 2.5 * sigma_px)
    enlarged: Floats = cv2.resize(band / band.std(), (DRAW_PX, DRAW_PX), interpolation=cv2.INTER_CUBIC)
    return enlarged


def _distractors(rng: np.random.Generator, chest: Chest) -> Floats:
    """Look-alikes of a pneumothorax, and objects on the patient; grey levels to add, float32 (512, 512).

    A skin fold (a line and a soft step with lung markings beyond it), a dark apex, a side marker, tubes, electrodes.
    They are as likely with a pneumothorax as without.
    """
    added = np.zeros((DRAW_PX, DRAW_PX), np.float32)
    bright = np.zeros((DRAW_PX, DRAW_PX), np.uint8)
    if rng.random() < 0.3:
        lung = chest.lungs[rng.integers(2)]
        angles = np.radians(rng.uniform(20, 90)) + np.linspace(-0.5, 0.5, 20) * rng.uniform(0.6, 1.2)
        fold = lung.outline(angles, rng.uniform(0.66, 0.88) + rng.normal(0, 0.04) * np.linspace(-1, 1, 20)) / 2
        step = fill(np.vstack((fold, lung.outline(angles[::-1], 0.62) / 2)), DRAW_PX, 255)
        added += (_blur(step, 1.2) - _wide(step, 9)) * np.float32(rng.uniform(8, 18))
        _line(bright, fold, rng.uniform(8, 18), 1)
    if rng.random() < 0.3:
        lung = chest.lungs[rng.integers(2)]
        apex = fill(lung.outline(np.linspace(-0.6, 0.7, 40), 0.97) / 2, DRAW_PX, 255)
        added -= _wide(apex, 6) * np.float32(rng.uniform(8, 24))
    for _ in range(rng.choice(3, p=(0.65, 0.22, 0.13))):
        side = int(rng.choice((-1, 1)))
        tube = rng.normal([(0.50, 0.85), (0.38, 0.66), (0.27, 0.50), (0.18, 0.30), (0.15, 0.2)], 0.035)
        _line(bright, spline(chest.place(tube, side)), rng.uniform(25, 60), int(rng.integers(1, 3)))
    if rng.random() < 0.2:
        for x, y in rng.uniform((-0.4, 0.15), (0.4, 0.85), (3, 2)):
            spot = chest.place([(x, y)])
            cv2.circle(bright, _px(spot[0]), 5, 60, 2, cv2.LINE_AA)
            _line(bright, spline(np.vstack((spot, spot + rng.normal(0, 60, 2), spot + rng.normal(0, 160, 2)))), 30, 1)
    letter, x = ("L", 460) if rng.random() < 0.8 else ("R", 20)
    corner = (int(x + rng.integers(-8, 12)), int(rng.integers(20, 120)))
    cv2.putText(bright, letter, corner, cv2.FONT_HERSHEY_SIMPLEX, rng.uniform(0.4, 0.8), 190, 2, cv2.LINE_AA)
    return added + bright


def _collapse(rng: np.random.Generator, image: Floats, union: Image, air: Image) -> None:
    """Darken `image` (1024, 1024) inside `union` and draw the thin bright pleural line along its inner edge."""
    x, y, width, height = cv2.boundingRect(union)
    part = np.s_[max(y - 16, 0) : y + height + 16, max(x - 16, 0) : x + width + 16]
    inner = union[part] * np.uint8(255)
    reach = 2 * int(rng.integers(3, 6)) - 1
    line = cv2.dilate(inner, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))) - inner
    wall = cv2.resize(air, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_LINEAR)[part].astype(np.float32) / 255
    image[part] += _blur(line, 1.0) * wall * np.float32(rng.uniform(20, 40))
    image[part] -= _blur(inner, 1.5) * np.float32(rng.uniform(26, 38))


def _line(canvas: Image, path: Points, value: float, width_px: int) -> None:
    cv2.polylines(canvas, [fixed(path)], False, int(value), width_px, cv2.LINE_AA, 4)


def _px(point: Points) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))


def _blur(image: Image, sigma_px: float) -> Floats:
    """Gaussian blur of uint8 0..255 as float32 0..1 (blurring bytes is several times faster)."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma_px) * np.float32(1 / 255), np.float32)


def _wide(image: Image, sigma_px: float) -> Floats:
    """As `_blur` for wide blurs of (512, 512) images, computed at 128 px."""
    small = cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA).astype(np.float32)
    blurred = cv2.GaussianBlur(small, (0, 0), sigma_px / 4)
    wide: Floats = cv2.resize(blurred, (DRAW_PX, DRAW_PX), interpolation=cv2.INTER_LINEAR) * np.float32(1 / 255)
    return wide
