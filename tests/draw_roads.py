"""Draw a small driving data set in exactly BDD100K's layout, enough to train with on a laptop.

    python tests/draw_roads.py [--out tests/roads] [--train 800] [--val 150] [--seed 0]

    roads/images/100k/{train,val}/NAME.jpg
    roads/labels/det_20/det_{train,val}.json              inclusive pixel boxes in ten categories
    roads/labels/sem_seg/masks/{train,val}/NAME.png       train ids 0 to 18, 255 unlabelled
    roads/labels/drivable/masks/{train,val}/NAME.png      0 direct, 1 alternative, 2 background
    roads/labels/lane/masks/{train,val}/NAME.png          BDD100K's lane bytes, 255 background

A scene is a street in metres: x to the right of our lane's middle, y up, z ahead. It depends on
(seed, split, index) alone. A canvas paints every primitive, the far ones first, into colour, light
and surface index at once, so picture and labels cannot disagree.

Our lane is direct. The other lanes of our direction are alternative, and so are the oncoming lanes
unless a divider keeps us from them. Parking lanes, shoulders, crossing streets and whatever hides
the road are background.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

WIDTH, HEIGHT = 320, 180
SCALE = 3  # samples per pixel and axis; odd, so that the middle sample is the pixel's centre
NEAR, FAR, REACH = 1.5, 400.0, 110.0  # metres ahead: nearest and farthest, end of the drivable area
MIN_PIXELS, MIN_VISIBLE = 12, 0.25  # an object that shows less gets no box
EMPTY_EVERY = 100  # one scene in so many is a road without a single object
SPLITS, MASKS = ("train", "val"), ("sem_seg", "drivable", "lane")
DIRECT, ALTERNATIVE, BACKGROUND = 0, 1, 2
CROSSWALK, DOUBLE_YELLOW, CURB, SINGLE_WHITE, SINGLE_YELLOW = 0, 3, 4, 6, 7  # bytes of lanes
DASHED, VERTICAL, NO_LANE = 16, 32, 255

CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
           "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
           "motorcycle", "bicycle")
CATEGORIES = ("pedestrian", "traffic light", "traffic sign", *CLASSES[12:])
TRAIN_ID = {name: i for i, name in enumerate(CLASSES)} | {"pedestrian": 11, "unlabelled": 255}
GRAIN = {"road": 5, "sidewalk": 5, "wall": 6, "vegetation": 13, "terrain": 11, "sky": 0.8}  # else 3

WHITE, SILVER, STEEL, BLACK = (238, 238, 235), (172, 174, 178), (112, 116, 120), (24, 24, 27)
GLASS, TAIL, HEAD = (46, 58, 70), (205, 26, 24), (250, 246, 226)
AMBER, WARM = (230, 174, 58), (255, 206, 128)
PAINTS = ((232, 233, 235), (178, 182, 188), (106, 110, 118), (44, 46, 52), (34, 66, 138),
          (168, 30, 34), (34, 84, 62), (196, 176, 138), (236, 182, 32), (92, 150, 190),
          (122, 44, 52), (216, 104, 38))
CLOTHES = ((40, 48, 78), (90, 90, 96), (34, 34, 38), (60, 110, 90), (150, 40, 48), (226, 226, 222))
SKINS = ((236, 196, 164), (206, 152, 112), (120, 78, 54))
HAIRS = ((40, 30, 26), (96, 66, 44), (150, 118, 76))
FACADES = ((184, 108, 84), (198, 180, 150), (150, 140, 132), (212, 200, 182), (118, 124, 136),
           (170, 132, 96))
LEAVES = ((72, 120, 50), (92, 134, 56), (56, 104, 60), (112, 136, 62), (170, 122, 48))
SIGNS = (  # corners, turn, stretch, border, face, symbol
    (24, 0, 1, (200, 28, 36), WHITE, BLACK), (8, math.pi / 8, 1, WHITE, (196, 24, 34), WHITE),
    (4, 0, 1, BLACK, (246, 196, 30), BLACK), (3, math.pi / 2, 1, (206, 30, 38), WHITE, BLACK),
    (4, math.pi / 4, 1, WHITE, (28, 82, 178), WHITE), (24, 0, 1, WHITE, (26, 84, 180), WHITE))
CARS = (  # length, width, height, belt line, bonnet, boot: saloon, hatchback, off-roader, van
    (4.6, 1.84, 1.46, 0.92, 1.1, 0.75), (4.0, 1.78, 1.52, 0.95, 0.85, 0.12),
    (4.7, 1.94, 1.78, 1.08, 1.05, 0.12), (5.0, 1.98, 2.05, 1.12, 0.65, 0.05))
LENGTHS = {"car": 4.6, "truck": 8.2, "bus": 11.0, "train": 22.0, "motorcycle": 2.1, "bicycle": 1.8}
DRIVEN = {"car": 70, "truck": 9, "bus": 8, "motorcycle": 7, "bicycle": 7}  # odds, as below
PARKED = {"car": 82, "truck": 3, "motorcycle": 7, "bicycle": 8}
FRONTAGE = {"city street": {"building": 8, "wall": 1, "fence": 1.2, "vegetation": 0.8},
            "residential": {"open": 3, "wall": 2, "fence": 3, "vegetation": 3},
            "highway": {"open": 4, "wall": 3, "fence": 3, "vegetation": 1.5}}
REAR, RIGHT, FRONT, LEFT = 0, 2, 4, 6  # flat quads of a shell's band; a corner follows each

Colour = Sequence[float]
Point = tuple[float, float, float]
Spot = tuple[float, float]  # column and row on the canvas, in samples
Quad = Sequence[Point]  # low left, low right, high right, high left, seen from outside
Span = tuple[float, float]
Rng = np.random.Generator
Things = Iterator["Thing"]
Scene = tuple[str, np.ndarray, dict[str, np.ndarray], dict]


def mix(one: Colour, two: Colour, share: float) -> Colour:
    return [a + (b - a) * share for a, b in zip(one, two)]


def scaled(colour: Colour, factor: float) -> Colour:
    return [channel * factor for channel in colour]


def ink(colour: Iterable[float]) -> tuple[int, ...]:
    return tuple([min(max(int(channel), 0), 255) for channel in colour])


@cache
def circle(count: int) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def pick(rng: Rng, options: Iterable, odds: Iterable[float] | None = None):
    options, odds = list(options), None if odds is None else np.array(list(odds), float)
    return options[rng.choice(len(options), p=None if odds is None else odds / odds.sum())]


def smooth_noise(rng: Rng, rows: int, columns: int, octaves: int) -> np.ndarray:
    """Noise of several sizes [H,W], about -2 to 2; the coarsest has `rows` x `columns` cells."""
    total = np.zeros((HEIGHT, WIDTH), np.float32)
    for octave in range(octaves):
        cells = rng.standard_normal((rows << octave, columns << octave)).astype(np.float32)
        layer = Image.fromarray(cells).resize((WIDTH, HEIGHT), Image.BICUBIC)
        total += np.asarray(layer) / 2**octave
    return total


# ---------------------------------------------------------------- camera, air, canvas


@dataclass(frozen=True)
class Camera:
    horizon: float  # row of the vanishing point
    vanishing: float  # its column
    bend: float  # how the road drifts sideways: metres per squared metre ahead
    height: float
    focal: float = 270.0

    def project(self, point: Point) -> Spot:
        x, y, z = point
        z = max(z, NEAR)
        column = self.vanishing + self.focal * (x / z + self.bend * z)
        row = self.horizon + self.focal * (self.height - y) / z
        return column * SCALE - 0.5, row * SCALE - 0.5


@dataclass(frozen=True)
class Air:
    weather: str
    time: str
    zenith: Colour
    haze: Colour  # of the sky above the horizon, and of whatever is far away
    ambient: Colour
    clouds: float
    visibility: float  # metres at which haze has taken two thirds of the contrast
    dark: float  # 0 by day to 1 at night
    sun: Point
    lamps: bool

    def seen(self, colour: Colour, point: Point) -> tuple[int, ...]:
        """A colour as the camera sees it: lit by the sky and our head lamps, veiled by haze."""
        x, y, z = point
        beam = self.dark and 0.75 * math.exp(-z / 20 - (x / (2.5 + z / 5)) ** 2 - max(y - 1, 0))
        clear = math.exp(-z / self.visibility)
        return ink([channel * (light + beam) * clear + haze * (1 - clear)
                    for channel, light, haze in zip(colour, self.ambient, self.haze)])


class Pose(NamedTuple):
    """Where a thing stands and how it is turned: yaw 0 heads away from us, pi towards us."""

    x: float
    z: float
    yaw: float = 0.0
    y: float = 0.0


class Thing(NamedTuple):
    """Something upright, of a class or a detection category."""

    name: str
    pose: Pose
    paint: Callable[[Canvas], None]


class Canvas:
    """Colour, light and surface index: each primitive is painted into all three. Points are in
    metres, in the frame of the thing that is being painted."""

    def __init__(self, rng: Rng, camera: Camera, air: Air):
        self.rng, self.camera, self.air, self.pose = rng, camera, air, Pose(0, 0)
        self.colour, self.light, self.index = images = [
            Image.new(mode, (WIDTH * SCALE, HEIGHT * SCALE)) for mode in ("RGB", "RGB", "I")]
        self.pens = [ImageDraw.Draw(image) for image in images]
        self.glaze = ImageDraw.Draw(self.colour, "RGBA")
        self.surfaces = [("sky", BACKGROUND)]  # class and drivability by index
        self.areas = {}  # pixels an object covered before nearer ones hid some, by index
        self.lanes = []  # byte and line on the canvas of each lane marking, in order of drawing

    def begin(self, name: str, drivable: int = BACKGROUND) -> None:
        """What is painted from now on belongs to a new surface."""
        self.surfaces.append((name, drivable))

    def put(self, thing: Thing) -> None:
        self.begin(thing.name)
        self.pose = thing.pose
        thing.paint(self)
        if thing.name in CATEGORIES:
            index = len(self.surfaces) - 1
            self.areas[index] = int(np.count_nonzero(self.samples() == index))

    def samples(self) -> np.ndarray:
        """The surface index at every pixel's centre."""
        return np.asarray(self.index)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]

    def _locate(self, points: Iterable[Point]) -> tuple[list[Point], list[Spot], Point]:
        """Points in the street and on the canvas, and the middle between two opposite ones."""
        x0, z0, yaw, y0 = self.pose
        cos, sin = math.cos(yaw), math.sin(yaw)
        placed = [(x0 + x * cos + z * sin, y0 + y, z0 - x * sin + z * cos) for x, y, z in points]
        middle = tuple([(a + b) / 2 for a, b in zip(placed[0], placed[len(placed) // 2])])
        return placed, [*map(self.camera.project, placed)], middle

    def _paint(self, shape: str, outline: Sequence, colour: Colour, where: Point,
               glow: float = 0.0, **options) -> None:
        light = scaled(colour, glow * math.exp(-where[2] / self.air.visibility))
        fills = (self.air.seen(colour, where), ink(light), len(self.surfaces) - 1)
        for pen, fill in zip(self.pens, fills):
            getattr(pen, shape)(outline, fill=fill, **options)

    def fill(self, points: Iterable[Point], colour: Colour, glow: float = 0.0) -> None:
        """A polygon; `glow` is the share of its colour that it gives off as light of its own."""
        _, outline, middle = self._locate(points)
        self._paint("polygon", outline, colour, middle, glow)

    def tint(self, points: Iterable[Point], colour: Colour, opacity: float) -> None:
        """Colour alone, for what lies on a surface without being one: markings and shadows."""
        _, outline, middle = self._locate(points)
        self.glaze.polygon(outline, fill=(*self.air.seen(colour, middle), int(255 * opacity)))

    def strip(self, left: float, right: float, reach: Span, colour: Colour,
              opacity: float = 0.0) -> None:
        """Ground or, if opacity is given, a marking on it, in pieces that follow bend and haze."""
        near, stop = reach
        while near < stop:
            far = min(stop, near * 1.25)
            corners = ((left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far))
            if opacity:
                self.tint(corners, colour, opacity)
            else:
                self.fill(corners, colour)
            near = far

    def lane(self, byte: int, *corners: Spot) -> None:
        """Labels a marking along corners (x, z) on the ground, in pieces that follow the bend."""
        points = []
        for (x, near), (right, far) in zip(corners, corners[1:]):
            for share in np.linspace(0, 1, 12) ** 2:
                points.append((x + (right - x) * share, 0, near + (far - near) * share))
        self.lanes.append((byte, [*map(self.camera.project, points)]))

    def lane_mask(self, visible: np.ndarray) -> np.ndarray:
        """Lane bytes [H,W], drawn 3 pixels wide at 1280 x 720, only where the ground is visible."""
        mask = Image.new("L", (WIDTH, HEIGHT), NO_LANE)
        pen, width = ImageDraw.Draw(mask), max(1, round(3 * WIDTH / 1280))
        for byte, points in self.lanes:
            pen.line([((u + 0.5) / SCALE - 0.5, (v + 0.5) / SCALE - 0.5) for u, v in points],
                     fill=byte, width=width)
        return np.where(visible, np.asarray(mask), NO_LANE).astype(np.uint8)

    def shadow(self, half_width: float, half_length: float) -> None:
        for growth, opacity in ((1.35, 0.14), (1.2, 0.2), (1.05, 0.35)):
            oval = [(half_width * growth * x, 0, half_length * growth * z) for x, z in circle(20)]
            self.tint(oval, BLACK, opacity)

    def ball(self, centre: Point, radius: float, colour: Colour, glow: float = 0.0) -> None:
        _, [(u, v)], middle = self._locate([centre])
        size = max(1.0, radius * self.camera.focal * SCALE / max(middle[2], NEAR))
        self._paint("ellipse", (u - size, v - size, u + size, v + size), colour, middle, glow)

    def bars(self, bars: Iterable[tuple]) -> None:
        """Lines with round ends (start, end, radius, colour), the far ones first."""
        located = [(self._locate(ends), ends, radius, colour) for *ends, radius, colour in bars]
        located.sort(key=lambda bar: -bar[0][2][2])  # distance of the middle
        for (_, outline, middle), ends, radius, colour in located:
            width = max(2, round(2 * radius * self.camera.focal * SCALE / max(middle[2], NEAR)))
            self._paint("line", outline, colour, middle, width=width)
            for end in ends if width > 3 else ():
                self.ball(end, radius, colour)

    def facet(self, points: Iterable[Point], colour: Colour, glow: float = 0.0) -> None:
        """A polygon of a closed shell: shaded by its slope, left out if it faces away from us."""
        placed, outline, middle = self._locate(points)
        edges = zip(outline, outline[1:] + outline[:1])
        if sum([a[0] * b[1] - b[0] * a[1] for a, b in edges]) < 0:
            ax, ay, az = [b - a for a, b in zip(placed[0], placed[-1])]
            bx, by, bz = [b - a for a, b in zip(placed[0], placed[1])]
            normal = (ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx)
            slope = sum([n * s for n, s in zip(normal, self.air.sun)])
            slope /= math.hypot(*normal) + 1e-9
            self._paint("polygon", outline, scaled(colour, 0.78 + 0.3 * slope), middle, glow)

    def patch(self, quad: Quad, u: Span, v: Span, colour: Colour, glow: float = 0.0) -> None:
        """A rectangle on a quad: u runs along its lower edge and v up from there, both 0 to 1."""
        corners = ((u[0], v[0]), (u[1], v[0]), (u[1], v[1]), (u[0], v[1]))
        points = [[(a * (1 - s) + b * s) * (1 - t) + (d * (1 - s) + c * s) * t
                   for a, b, c, d in zip(*quad)] for s, t in corners]
        self.facet(points, colour, glow)

    def shell(self, rings: Iterable[tuple], colours: Sequence[Colour]) -> list[list[Quad]]:
        """A closed shell through rings (height, rear, front, half width, corner cut), with a colour
        for each band and one for the lid. Gives its bands of eight quads, to patch details on."""
        loops = [[(cut - half, y, rear), (half - cut, y, rear), (half, y, rear + cut),
                  (half, y, front - cut), (half - cut, y, front), (cut - half, y, front),
                  (-half, y, front - cut), (-half, y, rear + cut)]
                 for y, rear, front, half, cut in rings]
        bands = [[(low[i - 1], low[i], high[i], high[i - 1]) for i in (1, 2, 3, 4, 5, 6, 7, 0)]
                 for low, high in zip(loops, loops[1:])]
        for band, colour in zip(bands, colours):
            for quad in band:
                self.facet(quad, colour)
        self.facet(loops[-1], colours[-1])
        return bands


# ---------------------------------------------------------------- vehicles and people


def paint_wheels(canvas: Canvas, half: float, axles: Sequence[float], radius: float) -> None:
    """The wheels' outer faces, and the treads below the end that is turned towards us."""
    away = math.cos(canvas.pose.yaw) > 0
    near = axles[0] - radius if away else axles[-1] + radius
    for x in (-half, half):
        left, right = sorted((x, x * (1 - 0.25 / half)), reverse=not away)
        tread = ((left, 0, near), (right, 0, near), (right, 0.25, near), (left, 0.25, near))
        canvas.facet(tread, BLACK)
        for z in axles:
            for size, colour in ((radius, BLACK), (0.58 * radius, SILVER), (0.2 * radius, STEEL)):
                canvas.facet([(1.02 * x, radius + size * up, z + math.copysign(size, x) * along)
                              for along, up in circle(14)], colour)


def paint_lamps(canvas: Canvas, band: list[Quad], width: float, v: Span, braking: bool) -> None:
    """Lamps at both ends of a band's rear and front and around its corners, and licence plates."""
    lit = canvas.air.lamps
    tail = 0.85 if braking else 0.5 * lit
    for side, colour, glow in ((REAR, TAIL, tail), (FRONT, HEAD, 0.95 * lit)):
        canvas.patch(band[side], (0, width), v, colour, glow)
        canvas.patch(band[side], (1 - width, 1), v, colour, glow)
        canvas.patch(band[side + 1], (0, 1), v, colour, glow)
        canvas.patch(band[side - 1], (0, 1), v, colour, glow)
        canvas.patch(band[side], (0.35, 0.65), (0.06, 0.36), WHITE, 0.1 * lit)


def paint_panes(canvas: Canvas, band: list[Quad], count: int, ends: Span) -> None:
    """Windows: a row along either side, and one at the rear and front, from these lower edges."""
    gleam = mix(GLASS, canvas.air.haze, 0.25)
    for side in (RIGHT, LEFT):
        for i in range(count):
            canvas.patch(band[side], ((i + 0.07) / count, (i + 0.93) / count), (0.12, 0.9), GLASS)
    for side, low in zip((REAR, FRONT), ends):
        canvas.patch(band[side], (0.04, 0.96), (low, 0.94), GLASS)
        canvas.patch(band[side], (0.08, 0.92), (0.62, 0.9), gleam)


def paint_car(canvas: Canvas, paint: Colour, shape: Sequence[float], braking: bool) -> None:
    length, width, height, belt, bonnet, boot = shape
    rear, front, half = -length / 2, length / 2, width / 2
    canvas.shadow(half, front)
    bands = canvas.shell((
        (0.2, rear + 0.1, front - 0.1, half - 0.06, 0.2), (0.45, rear, front, half, 0.22),
        (belt - 0.12, rear + 0.03, front - 0.06, half, 0.26),
        (belt, rear + 0.12, front - 0.3, half - 0.07, 0.3),
        (belt, rear + boot, front - bonnet, half - 0.09, 0.14),
        (height - 0.1, rear + boot + 0.38, front - bonnet - 0.75, half - 0.24, 0.12),
        (height, rear + boot + 0.6, front - bonnet - 1.0, half - 0.36, 0.12),
    ), (scaled(paint, 0.35), *[paint] * 6))
    canvas.patch(bands[1][FRONT], (0.26, 0.74), (0.42, 0.85), BLACK)
    paint_lamps(canvas, bands[1], 0.2, (0.45, 0.95), braking)
    paint_panes(canvas, bands[4], 2, (0.08, 0.08))
    paint_wheels(canvas, half, (rear + 0.85, front - 0.88), 0.33)


def paint_truck(canvas: Canvas, paint: Colour) -> None:
    """A cab in front of a white box, in one shell."""
    canvas.shadow(1.25, 4.1)
    rings = ((0.45, -4, 4, 1.1, 0.1), (0.95, -4, 4, 1.1, 0.1), (0.95, -4.1, 4.1, 1.25, 0.06),
             (2.4, -4.1, 4, 1.25, 0.06), (3.5, -4.1, 3, 1.25, 0.06))
    frame, _, low, high = canvas.shell(rings, (BLACK, BLACK, WHITE, WHITE, WHITE))
    for u in (0.0, 0.245, 0.49, 0.735, 0.98):
        for band in (low, high):
            canvas.patch(band[REAR], (u, u + 0.02), (0, 1), STEEL)
    for side, door, window in ((FRONT, (-0.1, 1.1), (0.02, 0.98)), (RIGHT, (0.78, 1), (0.84, 0.97)),
                               (LEFT, (0, 0.22), (0.03, 0.16))):
        canvas.patch(low[side], door, (-0.3, 1), paint)
        canvas.patch(low[side], window, (0.35, 0.95), GLASS)
    paint_lamps(canvas, frame, 0.16, (0.4, 0.9), braking=False)
    paint_wheels(canvas, 1.2, (-2.9, -1.8, 3.0), 0.48)


def paint_coach(canvas: Canvas, paint: Colour, tram: bool) -> None:
    """A bus; or a tram, which is longer, tapers, hides its wheels and reaches for a wire."""
    front, nose, low, panes = (11.0, 0.45, 0.12, 9) if tram else (5.5, 0.2, 0.3, 6)
    canvas.shadow(1.25, front)
    skirt, glass, cornice = canvas.shell((
        (low, -front, front, 1.25, nose), (1.25, -front, front, 1.27, nose),
        (2.6, nose - 0.2 - front, front - nose + 0.2, 1.27, nose),
        (3.1, nose - front, front - nose, 1.15, nose),
    ), (paint, WHITE if tram else mix(paint, WHITE, 0.55), SILVER if tram else paint, WHITE))
    paint_panes(canvas, glass, panes, (0.25, 0.0))
    paint_lamps(canvas, skirt, 0.16, (0.45, 0.7), braking=False)
    for side in (REAR, FRONT):
        canvas.patch(cornice[side], (0.2, 0.8), (0.15, 0.75), AMBER, 0.3)
    if tram:
        canvas.bars([((x, 3.1, 0), (x, 4.5, 0.6), 0.04, BLACK) for x in (-0.5, 0.5)])
    else:
        paint_wheels(canvas, 1.27, (2.6 - front, front - 2.4), 0.48)


def paint_two_wheeler(canvas: Canvas, paint: Colour, motor: bool) -> None:
    reach, radius, thick = (0.71, 0.31, 0.075) if motor else (0.53, 0.34, 0.032)
    back, fore, crank = (0, radius, -reach), (0, radius, reach), (0, 0.34, -0.03)
    saddle, head, grip = (0, 0.9, -0.25), (0, 0.84, 0.36), (0, 1, 0.4)
    tubes = ((back, crank), (crank, saddle), (saddle, back), (crank, head), (saddle, head),
             (fore, head), (head, grip))
    bars = [(*ends, thick, paint) for ends in tubes]
    bars += [((-0.3, 1, 0.4), (0.3, 1, 0.4), 0.03, BLACK),
             ((0, 0.94, -0.4), (0, 0.94, -0.15), 0.05, BLACK)]
    for hub in (-reach, reach):
        rim = [(0, radius + radius * up, hub + radius * along) for along, up in circle(14)]
        bars += [(rim[i - 1], rim[i], thick, BLACK) for i in range(14)]
    if motor:
        bars += [((0, 0.46, -0.15), (0, 0.5, 0.25), 0.2, STEEL),
                 ((0, 0.8, 0), (0, 0.82, 0.3), 0.17, paint),
                 ((0, 0.72, -0.85), (0, 0.8, -0.2), 0.12, BLACK)]
    canvas.shadow(0.25, reach + radius)
    canvas.bars(bars)
    away = math.cos(canvas.pose.yaw) > 0
    lamp, colour = ((0, 0.68, -1.1 * reach), TAIL) if away else ((0, 0.9, 0.5), HEAD)
    canvas.ball(lamp, 0.08, colour, 0.9 * canvas.air.lamps)


def paint_person(canvas: Canvas, saddle: float | None = None) -> None:
    """Someone on foot, or astride a saddle of the given height."""
    rng, riding = canvas.rng, saddle is not None
    coat, trousers, skin = pick(rng, CLOTHES), pick(rng, CLOTHES[:4]), pick(rng, SKINS)
    tall, stride = rng.uniform(1.5, 1.9), rng.uniform(-1, 1)
    hat, sleeve = pick(rng, PAINTS if riding else HAIRS), scaled(coat, 0.85)
    hip, neck, lean = (saddle, saddle + 0.48, 0.1) if riding else (0.52 * tall, 0.79 * tall, 0.0)
    bars = [((0, hip, -2.2 * lean), (0, neck, lean), 0.165, coat),
            ((-0.14, neck, lean), (0.14, neck, lean), 0.08, coat),
            ((0, neck + 0.2, lean + 0.05), (0, neck + 0.21, lean + 0.05), 0.115, skin),
            ((0, neck + 0.26, lean), (0, neck + 0.28, lean), 0.115, hat)]
    for s in (-1, 1):
        swing = s * stride
        if riding:
            knee, foot = (s * 0.14, 0.7 * hip - s * 0.12, 0.2), (s * 0.13, 0.3 - s * 0.12, 0.05)
            elbow, hand = (s * 0.26, neck - 0.22, 0.2), (s * 0.26, 1.0, 0.42)
        else:
            knee, foot = (s * 0.1, 0.28 * tall, 0.2 * swing), (s * 0.1, 0.04, 0.42 * swing)
            elbow = (s * 0.25, 0.65 * tall, -0.1 * swing)
            hand = (s * 0.26, 0.5 * tall, -0.25 * swing)
        bars += [((s * 0.09, hip, -2.2 * lean), knee, 0.095, trousers),
                 (knee, foot, 0.075, trousers), (foot, (*foot[:2], foot[2] + 0.12), 0.055, BLACK),
                 ((s * 0.21, neck, lean), elbow, 0.065, sleeve), (elbow, hand, 0.05, sleeve)]
    canvas.shadow(0.28, 0.28)
    canvas.bars(bars)


def vehicle(rng: Rng, name: str, pose: Pose, ridden: bool = True, braking: bool = False) -> Things:
    car = partial(paint_car, shape=pick(rng, CARS, (4, 3, 3, 1)), braking=braking)
    painters = {"car": car, "truck": paint_truck,
                "bus": partial(paint_coach, tram=False), "train": partial(paint_coach, tram=True),
                "bicycle": partial(paint_two_wheeler, motor=False),
                "motorcycle": partial(paint_two_wheeler, motor=True)}
    yield Thing(name, pose, partial(painters[name], paint=pick(rng, PAINTS)))
    if ridden and name in ("motorcycle", "bicycle"):
        saddle = 0.8 if name == "motorcycle" else 0.98
        yield Thing("rider", pose, partial(paint_person, saddle=saddle))


# ---------------------------------------------------------------- street and sky


@dataclass(frozen=True)
class Street:
    scene: str
    lane: float  # width of one
    lanes: list[float]  # middles of those in our direction, from the left; ours is the one at 0
    oncoming: list[float]  # middles of the others, from the inside
    inner: float  # where our lanes begin
    outer: float  # where the oncoming ones begin: at the same place unless a divider is between
    parking: float  # width of the parking lane or shoulder on either side
    edges: dict[int, float]  # distance to the road's edge on the left (-1) and on the right (1)
    sidewalk: float  # its width, 0 where there is none
    crossing: Span | None  # the near and the far side of a crossing street
    stopped: bool  # our direction waits for the crossing street
    rails: bool

    @property
    def stretches(self) -> list[Span]:
        """Where the street runs between its roadsides."""
        if not self.crossing:
            return [(NEAR, FAR)]
        return [(NEAR, self.crossing[0]), (self.crossing[1], FAR)]

    def free(self, start: float, stop: float) -> bool:
        """Whether something that long would stand clear of the crossing street."""
        return not self.crossing or stop < self.crossing[0] - 1 or start > self.crossing[1] + 1


def plan_street(rng: Rng) -> Street:
    scene = pick(rng, FRONTAGE, (5, 3, 2.4))
    city, highway = scene == "city street", scene == "highway"
    ahead, against = (int(rng.integers(2, 5)), int(rng.integers(2, 4))) if highway else (1, 1)
    if city:
        ahead, against = pick(rng, (1, 2, 3), (4, 4, 2)), pick(rng, (0, 1, 2), (1, 4, 3))
    lane, parking = rng.uniform(3.2, 3.6), 1.6 if highway else 2.3 if rng.random() < 0.6 else 0.3
    inner = -(rng.integers(ahead) + 0.5) * lane
    outer = inner - rng.uniform(1.2, 2.5) * (highway or (city and rng.random() < 0.25))
    near, crossed = rng.uniform(14, 42), rng.random() < (0.55 if city else 0 if highway else 0.3)
    return Street(
        scene, lane, [inner + (i + 0.5) * lane for i in range(ahead)],
        [outer - (i + 0.5) * lane for i in range(against)], inner, outer, parking,
        edges={-1: against * lane + parking - outer, 1: inner + ahead * lane + parking},
        sidewalk=0.0 if highway else rng.uniform(2.8, 4.2) if city else rng.uniform(1.8, 2.4),
        crossing=(near, near + 11) if crossed else None, stopped=crossed and rng.random() < 0.5,
        rails=city and rng.random() < 0.3)


def plan_air(rng: Rng) -> Air:
    times = {"daytime": ((74, 138, 214), (200, 222, 238), (1.06, 1.04, 1.0), 0.0),
             "dawn/dusk": ((72, 82, 140), (250, 178, 122), (0.84, 0.7, 0.66), 0.35),
             "night": ((10, 14, 34), (44, 42, 58), (0.31, 0.32, 0.39), 1.0)}
    weathers = {"clear": (0, 0.1, 900), "partly cloudy": (0.1, 0.85, 800),
                "overcast": (0.8, 0.5, 420), "rainy": (0.85, 0.45, 190), "foggy": (0.92, 0, 60)}
    time, weather = pick(rng, times, (58, 15, 27)), pick(rng, weathers, (36, 22, 18, 16, 8))
    zenith, haze, ambient, dark = times[time]
    grey, clouds, visibility = weathers[weather]
    veil = [0.31 * sum(mix(zenith, haze, 0.75))] * 3
    sun = np.array((rng.uniform(-0.8, 0.8), 0.8, rng.uniform(-0.9, 0.3)))
    return Air(weather, time, zenith=mix(zenith, veil, grey), haze=mix(haze, veil, grey),
               ambient=scaled(ambient, 1 - 0.13 * grey), clouds=clouds, visibility=visibility,
               dark=dark, sun=tuple(sun / np.linalg.norm(sun)),
               lamps=dark > 0 or weather in ("rainy", "foggy"))


def paint_sky(canvas: Canvas) -> None:
    rng, air, horizon = canvas.rng, canvas.air, canvas.camera.horizon
    rows, columns = np.mgrid[:HEIGHT, :WIDTH][..., None]
    fall = np.clip(rows / horizon, 0, 1) ** 1.2
    sky = np.array(air.zenith) * (1 - fall) + np.array(air.haze) * fall
    cover = np.clip(smooth_noise(rng, 5, 3, 5) * 0.7 + air.clouds - 0.55, 0, 1)
    cover = cover[..., None] * (1 - 0.5 * fall)
    sky += (np.array(mix(scaled(air.haze, 1.1), WHITE, 0.5 * (1 - air.dark))) - sky) * cover
    if air.weather in ("clear", "partly cloudy"):
        height = horizon * (0.8 if air.time == "dawn/dusk" else rng.uniform(0.1, 0.4))
        away = np.hypot(columns - rng.uniform(0, WIDTH), rows - height)
        halo = 0.8 * np.exp(-away / 9) + 0.35 * np.exp(-away / 60) + np.clip(6 - away, 0, 1)
        bright = 0.4 if air.dark == 1 else 1.0
        sky += (np.array((255, 236, 200)) - sky) * np.clip(halo, 0, 1) * bright
    picture = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))
    canvas.colour.paste(picture.resize(canvas.colour.size, Image.BICUBIC))


def paint_ground(canvas: Canvas, street: Street) -> None:
    rng, divided = canvas.rng, street.outer < street.inner
    wet = 0.75 if canvas.air.weather == "rainy" else 1
    asphalt = scaled((92, 93, 97), rng.uniform(0.85, 1.2) * wet)
    soil = pick(rng, ((104, 132, 70), (122, 128, 76), (146, 128, 92)))
    canvas.begin("terrain")
    canvas.strip(-600, 600, (NEAR, FAR), soil)
    if street.sidewalk:
        paint_sidewalks(canvas, street, scaled((176, 170, 162), rng.uniform(0.85, 1.08)))
    canvas.begin("road")
    if street.crossing:
        canvas.strip(-90, 90, street.crossing, asphalt)
    canvas.strip(-street.edges[-1], street.edges[1], (NEAR, FAR), asphalt)
    for x in street.lanes + ([] if divided else street.oncoming):
        canvas.begin("road", DIRECT if abs(x) < 1e-6 else ALTERNATIVE)
        canvas.strip(x - street.lane / 2, x + street.lane / 2, (NEAR, REACH), asphalt)
    for reach in street.stretches if divided else ():
        canvas.begin("terrain")
        canvas.strip(street.outer + 0.3, street.inner - 0.3, reach, soil)
    paint_markings(canvas, street)


def paint_sidewalks(canvas: Canvas, street: Street, pavement: Colour) -> None:
    """Slabs behind a pale kerb on both sides, and along the crossing street."""
    canvas.begin("sidewalk")
    if street.crossing:
        near, far = street.crossing
        canvas.strip(-90, 90, (near - street.sidewalk, far + street.sidewalk), pavement)
    for start, stop in street.stretches:
        for side, edge in street.edges.items():
            edge, kerb, back = (side * (edge + width) for width in (0, 0.22, street.sidewalk))
            canvas.strip(edge, back, (start, stop), pavement)
            canvas.strip(edge, kerb, (start, stop), scaled(pavement, 1.15))
            for z in np.arange(max(4, start), min(stop, 40), 1.6):
                canvas.strip(kerb, back, (z, z + 0.07), BLACK, 0.22)
            canvas.lane(CURB, (edge, start), (edge, min(stop, REACH)))


def paint_markings(canvas: Canvas, street: Street) -> None:
    def line(x: float, width: float, reach: Span, colour: Colour, opacity: float = 0.85) -> None:
        canvas.strip(x - width / 2, x + width / 2, reach, colour, opacity)

    for x in street.lanes + street.oncoming:
        for track in (-0.8, 0.8):
            line(x + track, 0.55, (NEAR, 90), BLACK, 0.1)
    half = street.lane / 2
    dashed = [x + half for x in street.lanes[:-1]] + [x - half for x in street.oncoming[:-1]]
    solid = [(side * (edge - street.parking), WHITE) for side, edge in street.edges.items()]
    solid += [(street.inner - 0.14, AMBER), (street.outer + 0.14, AMBER)] if street.oncoming else []
    double = street.oncoming and street.inner == street.outer
    for start, stop in street.stretches:
        end = min(stop, REACH)
        for x in dashed:
            for z in np.arange(start + canvas.rng.uniform(0, 3), min(stop, 130), 9.0):
                line(x, 0.15, (z, min(z + 3.5, stop)), WHITE)
            canvas.lane(SINGLE_WHITE | DASHED, (x, start), (x, end))
        for x, colour in solid:
            line(x, 0.12, (start, stop), colour)
            byte = SINGLE_WHITE if colour is WHITE else SINGLE_YELLOW
            canvas.lane(DOUBLE_YELLOW if double and colour is AMBER else byte, (x, start), (x, end))
    for x in street.lanes[:1] + street.oncoming[:1] if street.rails else ():
        for rail in (x - 0.72, x + 0.72):
            line(rail, 0.16, (NEAR, FAR), scaled(STEEL, 0.6))
            line(rail, 0.06, (NEAR, FAR), scaled(STEEL, 1.8))
    for near, far in [street.crossing] if street.crossing else ():
        right = street.edges[1] - street.parking
        canvas.strip(street.inner, right, (near - 5.2, near - 4.8), WHITE, 0.9)
        canvas.lane(SINGLE_WHITE | VERTICAL, (street.inner, near - 5), (right, near - 5))
        for x in np.arange(0.5 - street.edges[-1], street.edges[1] - 0.5, 1.0):
            line(x, 0.5, (near - 3.6, near - 0.8), WHITE)
            line(x, 0.5, (far + 0.8, far + 3.6), WHITE)
        west, east = 0.25 - street.edges[-1], street.edges[1] - 0.25
        for low, high in ((near - 3.6, near - 0.8), (far + 0.8, far + 3.6)):
            canvas.lane(CROSSWALK | VERTICAL, (west, low), (east, low), (east, high), (west, high),
                        (west, low))


# ---------------------------------------------------------------- beside the street


def paint_windows(canvas: Canvas, quad: Quad, columns: int, rows: int, chance: float,
                  v: Span) -> None:
    """A grid of windows that fills the share v of a wall's height; some are lit when it is dark."""
    for row in range(rows):
        low, high = (v[0] + (v[1] - v[0]) * (row + share) / rows for share in (0.2, 0.8))
        for column in range(columns):
            lit = canvas.rng.random() < chance * canvas.air.dark
            shade = canvas.rng.uniform(0.05, 0.4)
            colour = scaled(WARM, 0.65 + shade) if lit else mix(GLASS, canvas.air.haze, shade)
            left, right = (column + 0.22) / columns, (column + 0.78) / columns
            canvas.patch(quad, (left, right), (low, high), colour, 0.6 * lit)


def paint_building(canvas: Canvas, half: float, length: float, height: float) -> None:
    """A town house: floors over shops, under a cornice. A low one is a home under a hipped roof."""
    wall, accent, house = pick(canvas.rng, FACADES), pick(canvas.rng, PAINTS), height < 6
    base, tiles = (0.01, pick(canvas.rng, FACADES[::2])) if house else (3.4, scaled(wall, 1.2))
    eaves = (-0.2, length + 0.2, half + 0.25, 0)
    ridge = (height + half * 0.7, half * 0.8, length - half * 0.8, 0.05, 0)
    rings = [(y, 0, length, half, 0) for y in (0, base, height)]
    rings += [(height, *eaves), ridge if house else (height + 0.7, *eaves)]
    shops, floors, _, _ = canvas.shell(rings, (scaled(wall, 0.8), wall, tiles, tiles, tiles))
    for side, width in ((REAR, 2 * half), (LEFT if canvas.pose.x > 0 else RIGHT, length)):
        pitch = 3 + canvas.pose.z / 40  # far away, fewer and larger ones look the same
        columns, rows = int(width / pitch), round((height - base) / pitch)
        paint_windows(canvas, floors[side], columns, rows, 0.45, (0.02, 0.98))
        if not house:
            paint_windows(canvas, shops[side], int(width / 3.5), 1, 0.8, (-0.1, 0.8))
            canvas.patch(shops[side], (0.04, 0.96), (0.74, 0.92), accent)


def paint_leaves(canvas: Canvas, height: float, reach: float, length: float = 0.0) -> None:
    """A tree's crown of the given reach, at a height on its trunk; with a length, a hedge."""
    rng, (right, up, _) = canvas.rng, scaled(canvas.air.sun, reach)
    leaves = scaled(pick(rng, LEAVES, (4, 3, 3, 2, 1)), rng.uniform(0.85, 1.15))
    count = int((12 + 3 * length) * np.clip(40 / canvas.pose.z, 0.3, 1))
    canvas.bars([((0, 0, 0), (0, height, 0), 0.03 * height, (86, 66, 50))])
    layers = ((0.62, 1, 0.46, 0), (0.88, 0.85, 0.31, 0.1), (1.05, 0.75, 0.22, 0.2),
              (1.25, 0.6, 0.13, 0.3))
    for shade, spread, size, lift in layers:
        spots = rng.uniform((0, 0, 0, 0.8), (length, 2 * math.pi, 1, 1.2), (count, 4)).tolist()
        for z, turn, share, vary in sorted(spots, reverse=True):
            away = spread * reach * math.sqrt(share)
            x, y = away * math.cos(turn) + lift * right, away * math.sin(turn) + lift * up
            colour = scaled(leaves, shade * (0.6 + 0.4 * vary))
            canvas.ball((x, height + y, z), reach * size * vary, colour)


def paint_barrier(canvas: Canvas, length: float, height: float, colour: Colour, pales: int) -> None:
    """A wall in long slabs, or a fence of many pales."""
    rings = ((0, 0, length, 0.15, 0), (0.9 * height, 0, length, 0.1, 0),
             (height, 0, length, 0.12, 0))
    sides, _ = canvas.shell(rings, (colour, scaled(colour, 1.15), scaled(colour, 1.15)))
    for side in (REAR, LEFT if canvas.pose.x > 0 else RIGHT):
        for i in range(pales):
            canvas.patch(sides[side], (i / pales, (i + 0.45) / pales), (0, 1), scaled(colour, 0.8))


def paint_pole(canvas: Canvas, joints: Sequence, radius: float = 0.08, lamp: bool = False) -> None:
    canvas.bars([(*ends, radius, STEEL) for ends in zip(joints, joints[1:])])
    if lamp:
        canvas.ball(joints[-1], 0.25, WARM, 1.0 if canvas.air.dark else 0.0)


def paint_signal(canvas: Canvas, red: bool) -> None:
    canvas.shell([(y, -0.15, 0.15, 0.25, 0.03) for y in (-0.62, 0.62)], (BLACK, BLACK))
    lamps = ((0.4, (255, 46, 36), red), (0, (255, 190, 40), False), (-0.4, (40, 236, 130), not red))
    for y, colour, lit in lamps:
        canvas.ball((0, y, -0.17), 0.165, colour if lit else scaled(colour, 0.3), float(lit))


def paint_sign(canvas: Canvas, radius: float, design: tuple) -> None:
    corners, turn, stretch, border, face, symbol = design
    cos, sin = math.cos(turn), math.sin(turn)
    plate = [(x * cos - y * sin, x * sin + y * cos) for x, y in circle(corners)]
    bar = ((-0.4, -0.13), (0.4, -0.13), (0.4, 0.13), (-0.4, 0.13))
    for outline, size, colour in ((plate, 1, border), (plate, 0.84, face), (bar, 1, symbol)):
        points = [(x * radius * size * stretch, y * radius * size, 0) for x, y in outline]
        canvas.fill(points, colour, 0.25 * canvas.air.dark)


def barrier(name: str, pose: Pose, length: float, height: float, colour: Colour | None) -> Thing:
    if name == "vegetation":
        paint = partial(paint_leaves, height=height / 2, reach=height / 2, length=length)
    else:
        pales = int(length * 2 if name == "fence" else length / 3)
        paint = partial(paint_barrier, length=length, height=height, colour=colour, pales=pales)
    return Thing(name, pose, paint)


def tree(rng: Rng, x: float, z: float, low: float, high: float) -> Thing:
    height = rng.uniform(low, high)
    paint = partial(paint_leaves, height=0.68 * height, reach=0.27 * height)
    return Thing("vegetation", Pose(x, z), paint)


def posted(name: str, pose: Pose, paint: Callable[[Canvas], None]) -> Things:
    """A light or a sign at its height, and the pole it is fixed to."""
    joints = ((0, 0, 0.2), (0, pose.y + 0.5, 0.2))
    yield Thing("pole", Pose(pose.x, pose.z + 0.1), partial(paint_pole, joints=joints))
    yield Thing(name, pose, paint)


def backdrop(rng: Rng, street: Street) -> Things:
    """What closes the view: a skyline, or woods."""
    for x in np.arange(-170, 171, 12.0):
        if street.scene != "city street":
            yield tree(rng, x, 210, 14, 24)
        elif rng.random() < 0.75:
            yield Thing("building", Pose(x, 200 + rng.uniform(0, 20)), partial(
                paint_building, half=rng.uniform(6, 11), length=12, height=rng.uniform(12, 48)))


def frontage(rng: Rng, street: Street, side: int) -> Things:
    """Buildings, walls, fences and gardens behind the sidewalk, plot after plot."""
    z, odds, highway = 4.0, FRONTAGE[street.scene], street.scene == "highway"
    x = side * (street.edges[side] + street.sidewalk + (2 if highway else 0.4))
    colours = {"fence": pick(rng, ((206, 202, 194), (150, 116, 82), (92, 98, 104))),
               "wall": (168, 150, 138)}
    while z < 125:
        length, kind, half = rng.uniform(9, 18), pick(rng, odds, odds.values()), rng.uniform(6, 9)
        if not street.free(z, z + length):
            z += 2
            continue
        if kind == "building":
            size = {"half": half, "length": length, "height": rng.uniform(9, 24)}
            yield Thing(kind, Pose(x + side * half, z), partial(paint_building, **size))
        elif kind != "open":
            height = 3.2 if highway and kind == "wall" else 1.4
            yield barrier(kind, Pose(x, z), length, height, colours.get(kind))
        for _ in range(rng.integers(1, 4) if kind != "building" else 0):
            yield tree(rng, x + side * rng.uniform(3, 14), z + rng.uniform(0, length), 5, 10)
        if street.scene == "residential":
            size = {"half": 4.5, "length": length - 2, "height": rng.uniform(3.2, 5.6)}
            yield Thing("building", Pose(x + side * 9, z + 1), partial(paint_building, **size))
        z += length + rng.uniform(0, 1.5)


def kerbside(rng: Rng, street: Street, side: int) -> Things:
    """Lamp posts, street trees and signs."""
    x, joints = side * (street.edges[side] + 0.6), ((0, 0, 0), (0, 7.5, 0), (-side * 2.2, 7.5, 0))
    for z in np.arange(rng.uniform(8, 20), 120, 24):
        if street.free(z, z):
            yield Thing("pole", Pose(x, z), partial(paint_pole, joints=joints, lamp=True))
    for z in np.arange(rng.uniform(8, 18), 100, rng.uniform(10, 40)) if street.sidewalk else ():
        if street.free(z - 3, z + 3):
            yield tree(rng, x + side * 0.5, z, 4, 7)
    for z in np.arange(rng.uniform(8, 80), 50, rng.uniform(20, 40)):
        if street.free(z, z):
            paint = partial(paint_sign, radius=rng.uniform(0.45, 0.65), design=pick(rng, SIGNS))
            yield from posted("traffic sign", Pose(x, z, y=rng.uniform(2.2, 2.7)), paint)


def overhead(rng: Rng, street: Street) -> Things:
    """A highway's gantry with direction signs, or the traffic lights before and over a crossing."""
    right = street.edges[1] + 0.7
    if street.scene == "highway" and rng.random() < 0.6:
        z, left = rng.uniform(22, 50), street.inner - 1 - right
        design = (4, math.pi / 4, 1.5, WHITE, (22, 104, 70), WHITE)
        panel = partial(paint_sign, radius=1.45, design=design)
        joints = ((left, 0, 0.2), (left, 6.4, 0.2), (0, 6.4, 0.2), (0, 0, 0.2))
        yield Thing("pole", Pose(right, z), partial(paint_pole, joints=joints, radius=0.16))
        for lane in street.lanes[-2:]:
            yield Thing("traffic sign", Pose(lane, z, y=6.4), panel)
    if street.crossing and (street.scene == "city street" or rng.random() < 0.5):
        (near, far), paint = street.crossing, partial(paint_signal, red=street.stopped)
        for side, edge in street.edges.items():
            yield from posted("traffic light", Pose(side * (edge + 0.7), near - 5, y=3.2), paint)
        joints = ((0, 0, 0.3), (0, 6, 0.3), (street.lanes[0] - right, 6, 0.3))
        yield Thing("pole", Pose(right, far + 1), partial(paint_pole, joints=joints, radius=0.1))
        for lane in street.lanes:
            yield Thing("traffic light", Pose(lane, far + 1, y=5.4), paint)


def median(rng: Rng, street: Street) -> Things:
    """What stands on the divider."""
    kind = pick(rng, ("wall", "fence", "vegetation"))
    for z in np.arange(4, 140, 8.0) if street.outer < street.inner else ():
        if street.free(z, z + 8):
            yield barrier(kind, Pose((street.inner + street.outer) / 2, z), 8, 0.9, (165, 165, 164))


# ---------------------------------------------------------------- traffic


def queue(rng: Rng, x: float, yaw: float, reach: Span, gap: Span, odds: dict, **details) -> Things:
    """Vehicles one behind the other."""
    z, stop = reach
    while True:
        name = pick(rng, odds, odds.values())
        if z + LENGTHS[name] > stop:
            return
        pose = Pose(x + rng.normal(0, 0.15), z + LENGTHS[name] / 2, yaw + rng.normal(0, 0.02))
        yield from vehicle(rng, name, pose, **details)
        z += LENGTHS[name] + rng.uniform(*gap)


def traffic(rng: Rng, street: Street) -> Things:
    """The lanes of both directions; those who wait at a crossing keep out of it."""
    busy = rng.uniform(0.4, 1.2)
    gap = (7 / busy, 48 / busy)
    before, beyond = (street.crossing[0] - 5, street.crossing[1] + 3) if street.stopped else (44, 0)
    for lanes, yaw in ((street.lanes, 0.0), (street.oncoming, math.pi)):
        for x in lanes:
            start = rng.uniform(6 if abs(x) < 1 else 3.5, 22)
            reach = (max(start, beyond), 50) if yaw else (start, before)
            if street.rails and x == lanes[0] and abs(x) > 1 and rng.random() < 0.7:
                yield from vehicle(rng, "train", Pose(x, reach[0] + LENGTHS["train"] / 2, yaw))
            else:
                yield from queue(rng, x, yaw, reach, gap, DRIVEN, braking=street.stopped)


def parked(rng: Rng, street: Street) -> Things:
    for side, edge in street.edges.items() if street.parking > 2 else ():
        yaw = math.pi if side < 0 and street.oncoming else 0.0
        for start, stop in street.stretches:
            reach = (start + rng.uniform(4, 12), min(stop - 6, 40))
            yield from queue(rng, side * (edge - 1.1), yaw, reach, (0.8, 28), PARKED, ridden=False)


def cross_traffic(rng: Rng, street: Street) -> Things:
    """On the move while we wait, else waiting on both sides."""
    for side in (-1, 1) if street.crossing else ():
        x = rng.uniform(-9, 3) if street.stopped else street.edges[side] + rng.uniform(4, 7)
        for _ in range(rng.integers(0, 3)):
            name = pick(rng, DRIVEN, DRIVEN.values())
            middle = (side * (x + LENGTHS[name] / 2), street.crossing[0] + 5.5 + side * 2.2)
            yield from vehicle(rng, name, Pose(*middle, -side * math.pi / 2))
            x += LENGTHS[name] + rng.uniform(1.5, 6)


def walkers(rng: Rng, street: Street) -> Things:
    """People on the sidewalks, and on the crosswalk while we wait."""
    usual = 2.2 if street.scene == "city street" else 1.4
    for _ in range(rng.poisson(usual) if street.sidewalk else 0):
        z, side = rng.uniform(7, 30), pick(rng, (-1, 1))
        if street.free(z, z):
            x = side * (street.edges[side] + rng.uniform(0.7, street.sidewalk))
            yaw = rng.integers(2) * math.pi + rng.normal(0, 0.3)
            yield Thing("pedestrian", Pose(x, z, yaw), paint_person)
    for _ in range(rng.poisson(1.8) if street.stopped else 0):
        x = rng.uniform(-street.edges[-1], street.edges[1])
        z = street.crossing[0] - rng.uniform(1.2, 3.2)
        yield Thing("pedestrian", Pose(x, z, pick(rng, (-1, 1)) * math.pi / 2), paint_person)


def paint_bonnet(canvas: Canvas) -> None:
    """Our own car at the lower edge, which belongs to no class."""
    camera, paint, metre = canvas.camera, pick(canvas.rng, PAINTS), NEAR / canvas.camera.focal
    for rise, shade in ((15, 0.4), (13.5, 0.75), (11.5, 0.6), (8, 0.5)):
        canvas.fill([((WIDTH / 2 * (1 + 1.15 * u) - camera.vanishing) * metre,
                      camera.height - (HEIGHT - rise * (1 - u * u) - camera.horizon) * metre, NEAR)
                     for u in np.linspace(-1, 1, 24)], scaled(paint, shade))


# ---------------------------------------------------------------- picture, labels, files


def blurred(image: Image.Image, radius: float) -> np.ndarray:
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32)


def develop(canvas: Canvas, semantic: np.ndarray) -> np.ndarray:
    """The photograph of a painted canvas: the glow of lamps, rain, grain and grading."""
    rng, dark, rainy = canvas.rng, canvas.air.dark, canvas.air.weather == "rainy"
    picture, lamps = np.asarray(canvas.colour.reduce(SCALE), np.float32), canvas.light.reduce(SCALE)
    picture = picture * (1 + blurred(lamps, 16) / 60 * dark) + np.asarray(lamps, np.float32)
    picture += blurred(lamps, 2.5) * (0.35 + 0.5 * dark) + blurred(lamps, 9) * (0.2 + 0.7 * dark)
    strength = np.zeros(256)
    strength[: len(CLASSES)] = [GRAIN.get(name, 3) for name in CLASSES]
    grain = rng.standard_normal(semantic.shape) * 0.5
    grain += smooth_noise(rng, HEIGHT // 4, WIDTH // 4, 2) * 0.7
    picture *= 1 + (grain * strength[semantic] / 190)[..., None]
    if rainy:
        picture = add_rain(rng, picture, semantic == TRAIN_ID["road"])
    rows, columns = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    picture *= 1 - 0.1 * (rows**2 + columns**2)[..., None]
    grey = picture.mean(-1, keepdims=True)
    picture = grey + (picture - grey) * (0.85 if rainy else 1.1)
    return np.clip(picture, 0, 255).round().astype(np.uint8)


def add_rain(rng: Rng, picture: np.ndarray, road: np.ndarray) -> np.ndarray:
    """Reflections drawn down over the wet road, and streaks in the air."""
    smear = picture.copy()
    for row in range(1, HEIGHT):
        smear[row] = 0.93 * smear[row - 1] + 0.07 * picture[row]
    picture = np.where(road[..., None], 0.55 * picture + 0.6 * smear, picture)
    streaks, slant = Image.new("L", (WIDTH * SCALE, HEIGHT * SCALE)), rng.uniform(-0.25, 0.25)
    for x, y, size in rng.uniform((0, 0, 12), (WIDTH * SCALE, HEIGHT * SCALE, 40), (260, 3)):
        ImageDraw.Draw(streaks).line((x, y, x + slant * size, y + size), fill=70)
    return picture + np.asarray(streaks.reduce(SCALE), np.float32)[..., None]


def boxes(canvas: Canvas, ids: np.ndarray) -> list[dict]:
    """Labels of the objects that show, from their visible pixels."""
    labels = []
    for index, area in canvas.areas.items():
        rows, columns = np.nonzero(ids == index)
        if len(rows) < max(MIN_PIXELS, MIN_VISIBLE * area):
            continue
        x1, y1, x2, y2 = map(int, (columns.min(), rows.min(), columns.max(), rows.max()))
        truncated = x1 == 0 or y1 == 0 or x2 == WIDTH - 1 or y2 == HEIGHT - 1
        labels.append({"id": str(len(labels)), "category": canvas.surfaces[index][0],
                       "attributes": {"occluded": len(rows) < 0.9 * area, "truncated": truncated},
                       "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}})
    return labels


def draw_scene(split: str, index: int, seed: int = 0) -> Scene:
    """A scene's name, image [H,W,3], masks [H,W] by folder, and detection frame."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    stem = f"{rng.bytes(4).hex()}-{rng.bytes(4).hex()}"
    street, air = plan_street(rng), plan_air(rng)
    camera = Camera(horizon=HEIGHT * rng.uniform(0.4, 0.5),
                    vanishing=WIDTH * rng.uniform(0.42, 0.58),
                    bend=rng.normal(0, 1 / 2500), height=rng.uniform(1.3, 1.65))
    canvas = Canvas(rng, camera, air)
    paint_sky(canvas)
    paint_ground(canvas, street)
    ground = len(canvas.surfaces)
    things = [Thing("unlabelled", Pose(0, 0), paint_bonnet)] if rng.random() < 0.35 else []
    for group in (backdrop, median, overhead, traffic, parked, cross_traffic, walkers):
        things += group(rng, street)
    for side in (-1, 1):
        things += [*frontage(rng, street, side), *kerbside(rng, street, side)]
    if index % EMPTY_EVERY == EMPTY_EVERY // 2:
        things = [thing for thing in things if thing.name not in CATEGORIES]
    # Along a line of sight z and |x| both grow, so nothing is hidden by what has a larger sum. What
    # is long is long in z: the weight on |x| keeps it in order with what stands beside it.
    for thing in sorted(things, key=lambda thing: -thing.pose.z - 8 * abs(thing.pose.x)):
        canvas.put(thing)
    ids = canvas.samples()
    names, drivable = zip(*canvas.surfaces)
    semantic = np.array([TRAIN_ID[name] for name in names], np.uint8)[ids]
    frame = {"name": f"{stem}.jpg",
             "attributes": {"weather": air.weather, "timeofday": air.time, "scene": street.scene},
             "labels": boxes(canvas, ids) or None}
    masks = {"sem_seg": semantic, "drivable": np.array(drivable, np.uint8)[ids],
             "lane": canvas.lane_mask(visible=ids < ground)}
    return stem, develop(canvas, semantic), masks, frame


def write_scene(root: Path, split: str, index: int, seed: int) -> dict:
    """Draws one scene into the folders; gives its detection frame."""
    stem, image, masks, frame = draw_scene(split, index, seed)
    Image.fromarray(image).save(root / "images/100k" / split / f"{stem}.jpg", quality=85)
    for kind, mask in masks.items():
        Image.fromarray(mask).save(root / "labels" / kind / "masks" / split / f"{stem}.png")
    return frame


def write(root: Path | str, train: int = 800, val: int = 150, seed: int = 0) -> None:
    """Draws a data set with all cores. Until it is whole its folder is called ROOT.part."""
    root = Path(root)
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    scenes = [("train", index) for index in range(train)] + [("val", index) for index in range(val)]
    for split in SPLITS:
        for folder in ("images/100k", *(f"labels/{kind}/masks" for kind in MASKS)):
            (part / folder / split).mkdir(parents=True)
    (part / "labels/det_20").mkdir()
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(write_scene, repeat(part), *zip(*scenes), repeat(seed), chunksize=8)
        frames = list(tqdm(drawn, "drawing roads", len(scenes), unit="scene"))
    for split in SPLITS:
        labels = [frame for frame, scene in zip(frames, scenes) if scene[0] == split]
        text = json.dumps(labels, separators=(",", ":"))
        (part / f"labels/det_20/det_{split}.json").write_text(text)
    part.replace(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "roads")
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--val", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already: delete it, or give another --out.")
    write(options.out, options.train, options.val, options.seed)
