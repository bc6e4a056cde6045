"""Ground truth on disk, scores and pictures: BDD100K's files and rules, without its toolkit.

    python evaluate.py --ckpt                    # the newest checkpoint under runs/, its own data
    python evaluate.py --ckpt X --json scores.json --save predictions --show pictures --count 8
    python evaluate.py --ckpt X --images 'photos/*.jpg' --show pictures         # no labels needed
    python evaluate.py --gt instances.json --dt results.json     # files: COCO, Scalabel, PNG masks
    python evaluate.py --check DIR                                      # what is wrong in a folder
    torchrun --nproc_per_node=8 evaluate.py --ckpt X                             # the same numbers

`BDD100K` and `NuImages` read data sets, `LabelWriter` writes predictions, `DetectionAP` and
`MeanIoU` score them; `evaluate` scores a model, `score_files` files, `draw` shows what it sees.
In memory boxes are xyxy with x2 and y2 exclusive, so that width = x2 - x1; BDD100K's files hold
inclusive pixels, width = x2 - x1 + 1 (`read_label` and `LabelWriter.frame` convert).

>>> ap = DetectionAP(["car", "bus"])
>>> ap.update({"boxes": [[10, 10, 50, 40]], "labels": [0]},
...           {"boxes": [[15, 10, 50, 40]], "scores": [0.9], "labels": [0]})
>>> scores = ap.compute()                                  # fractions; None: no such object
>>> round(scores["AP"], 3), scores["per_class"]["bus"]
(0.8, None)
>>> iou = MeanIoU(["direct", "alternative", "background"], background=2)
>>> iou.update(np.uint8([[0, 0, 1, 2]]), np.uint8([[0, 1, 1, 0]]))    # ground truth, prediction
>>> iou.compute()["mIoU"], iou.compute()["mIoU_3class"]    # the official rule, all classes
(0.5, 0.27777777777777773)
"""
import argparse
import base64
import contextlib
import datetime
import glob
import itertools
import json
import os
import re
import signal
import sys
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

CLASSES = {
    "detection": ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
                  "traffic light", "traffic sign"),
    "semantic": ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
                 "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
                 "bus", "train", "motorcycle", "bicycle"),
    "drivable": ("direct", "alternative", "background"),
}
RENAMED = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian",
           "van": "car"}
CROWDS = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
NUIMAGES = {  # what follows the last dot in nuImages' categories: the semantic class
    "animal": "animal", "driveable_surface": "driveable surface", "adult": "adult",
    "child": "child", "construction_worker": "construction worker",
    "personal_mobility": "personal mobility", "police_officer": "police officer",
    "stroller": "stroller", "wheelchair": "wheelchair", "barrier": "barrier", "debris": "debris",
    "pushable_pullable": "pushable object", "trafficcone": "traffic cone",
    "bicycle_rack": "bicycle rack", "bicycle": "bicycle", "bendy": "bendy bus",
    "rigid": "rigid bus", "car": "car", "construction": "construction vehicle",
    "ego": "ego vehicle", "ambulance": "ambulance", "police": "police car",
    "motorcycle": "motorcycle", "trailer": "trailer", "truck": "truck"}
NUIMAGES_RENAMED = {  # semantic classes whose detection class has another name
    "adult": "pedestrian", "child": "pedestrian", "construction worker": "pedestrian",
    "police officer": "pedestrian", "bendy bus": "bus", "rigid bus": "bus"}
MASK_FOLDERS = {"semantic": "labels/sem_seg/masks", "drivable": "labels/drivable/masks"}
VOIDS = frozenset(  # categories of Cityscapes' and BDD100K's masks that are no class
    "banner, billboard, bridge, caravan, dynamic, ego vehicle, garage, ground, guard rail, "
    "lane divider, license plate, out of roi, parking, parking sign, pole group, polegroup, "
    "rail track, rectification border, static, street light, traffic cone, traffic device, "
    "traffic sign frame, trailer, tunnel, unlabeled".split(", "))
IGNORE = 255
MAX_PIXELS = 5 * 10 ** 7    # of an image or mask; more is no photo but an attack or a mistake
SUFFIXES = (".jpg", ".jpeg", ".png")
SAMPLE = Path(__file__).resolve().parent / "tests" / "roads"


class InputError(ValueError):
    """Files that cannot be used; the message names the file and the entry and says what to do."""

    field = ""              # of the entry, where one is wrong


def require(good, message: str) -> None:
    if not good:
        raise InputError(message)


def entry_error(where: str, field: str, value, expected: str) -> InputError:
    error = InputError(f"{where} has {field} {value!r:.200}: expected {expected}.")
    error.field = field
    return error


# --------------------------------------------------------------------------- files and processes

def read_json(path: Path, **options):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f, **options)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{path} is not valid JSON ({broken}): fetch or write it anew.") from None


def is_whole(value) -> bool:
    return type(value) is int                   # not True or False


def is_text(value) -> bool:
    return isinstance(value, str)


def is_number(value, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> bool:
    return type(value) in (int, float) and low <= value <= high     # False for NaN


def column(path: Path, rows: list, key: str, good: Callable, expected: str, default=None) -> list:
    """What the entries of a JSON list have under a key; raises InputError where it is not good."""
    values = [row.get(key, default) if isinstance(row, dict) else None for row in rows]
    for n, value in enumerate(values):
        if not good(value):
            raise entry_error(f"{path}: entry {n}", key, value, expected)
    return values


def refuse_twice(path: Path, what: str, values: Iterable) -> None:
    for value, count in Counter(values).items():
        require(count == 1, f"{path}: {what} {value} occurs more than once: keep one of them.")


def open_picture(path: Path) -> Image.Image:
    """A decoded picture; raises InputError when it is missing, broken, cut off or too large."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height}, expected at most {MAX_PIXELS} pixels")
            picture.load()
            return picture
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as broken:
        raise InputError(f"{path} cannot be read as an image ({broken}): fetch it anew.") from None


def read_image(path: Path, upright: bool = False) -> Tensor:
    """uint8 RGB [3, H, W] of a JPEG or PNG; upright: turned as the camera was held."""
    picture = open_picture(path)
    picture = ImageOps.exif_transpose(picture) if upright else picture
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def read_mask(path: Path, num_classes: int = IGNORE) -> np.ndarray:
    """uint8 [H, W] of class ids below num_classes, or 255, from an 8-bit single-channel PNG."""
    picture = open_picture(path)
    require(picture.mode == "L", f"{path} is a picture of mode {picture.mode}, not class ids: "
            "expected an 8-bit single-channel PNG from labels/*/masks (not from colormaps).")
    mask = np.array(picture)
    unknown = mask[mask >= num_classes].min(initial=IGNORE)
    require(unknown == IGNORE, f"{path} holds id {unknown}: expected 0 to {num_classes - 1}, or "
            "255 for ignored.")
    return mask


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator:
    """A file to write bytes to, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        yield f
    os.replace(part, path)


def write_mask(path: Path, mask: np.ndarray) -> None:
    with written_whole(path) as f:
        Image.fromarray(mask).save(f, "PNG", compress_level=1)


def write_json(path: Path, value, **style) -> None:
    with written_whole(path) as f:
        f.write(json.dumps(value, **style).encode())


def write_rows(path: Path, rows: Iterable) -> None:
    """A JSON list, one line for each row, never all of them in memory."""
    with written_whole(path) as f:
        start = "["
        for row in rows:
            f.write((start + json.dumps(row)).encode())
            start = ",\n"
        f.write(b"[]" if start == "[" else b"]\n")


def rank_and_world() -> tuple[int, int]:
    distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def from_all_ranks(value) -> list:
    """The value that each process has, in the order of their ranks."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def leave_signals(worker: int) -> None:
    """Worker processes leave SIGINT and SIGTERM to the process that reads from them, and end ten
    seconds after SIGTERM if it has not told them to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


# --------------------------------------------------------------------------------- ground truth

def find_data(given: str | None = None, dataset: str = "bdd100k") -> Path:
    """The data folder: the one given, else $BDD100K, else data/bdd100k, else the sample in
    tests/roads; for nuImages $NUIMAGES, else data/nuimages."""
    if given is not None:
        return Path(given)
    for place in (os.environ.get(dataset.upper()), f"data/{dataset}"):
        if place and Path(place).is_dir():
            return Path(place)
    require(dataset == "bdd100k", f"no {dataset} data: give its folder with --data, or put it in "
            f"data/{dataset}.")
    return SAMPLE


def read_classes(root: Path) -> dict[str, tuple[str, ...]]:
    """The class names by task of a data folder: those in its classes.json, which names some of the
    tasks, else BDD100K's."""
    path = root / "classes.json"
    if not path.is_file():
        return CLASSES
    content = read_json(path)
    require(isinstance(content, dict) and content and content.keys() <= CLASSES.keys(),
            f"{path} holds {content!r:.200}: expected lists of class names under some of "
            f"{', '.join(CLASSES)}.")
    classes = {}
    for task in [task for task in CLASSES if task in content]:      # in the order of CLASSES
        names = content[task]
        good = isinstance(names, list) and names and all(is_text(name) and name for name in names)
        if not good or len(set(names)) < len(names) or len(names) >= IGNORE:
            raise entry_error(f"{path}", task, names, f"1 to {IGNORE - 1} different names")
        classes[task] = tuple(names)
    return classes


def background_of(task: str, classes: Sequence[str]) -> int | None:
    """The drivable class whose pixels the official score leaves out: the last, if it is called
    background."""
    last = len(classes) - 1
    return last if task == "drivable" and classes[last] == "background" else None


def read_frames(path: Path, content) -> dict[str, dict]:
    """The frames of a Scalabel JSON file's content (a list or {"frames": [...]}) by image stem."""
    frames = content.get("frames") if isinstance(content, dict) else content
    require(isinstance(frames, list), f"{path} holds no list of frames: expected Scalabel JSON, "
            "[...] or {'frames': [...]}.")
    names = column(path, frames, "name", is_text, "IMAGE.jpg, as in Scalabel JSON")
    column(path, frames, "labels", lambda labels: isinstance(labels, list | None), "a list")
    stems = [Path(name).stem for name in names]
    refuse_twice(path, "frame", stems)
    return dict(zip(stems, frames))


def class_of(name, ids: dict[str, int], predicted: bool, where: str) -> tuple[int, bool]:
    """The class id of a box's category (-1: a predicted one that is no class), and whether it is a
    crowd. BDD100K's older names count where they are no classes themselves."""
    known, crowd = name, False
    if is_text(name) and name not in ids:
        known = CROWDS.get(name, RENAMED.get(name, name))
        crowd = name in CROWDS
    if not is_text(known) or known not in ids and not (predicted and known):
        raise entry_error(where, "category", name, f"one of {', '.join(ids)}")
    return ids.get(known, -1), crowd


def read_label(label: dict, ids: dict[str, int], predicted: bool, where: str) -> tuple:
    """One Scalabel label -> (box, class id, crowd, score); `where` begins an error's message."""
    category = label.get("category") if isinstance(label, dict) else None
    class_id, crowd = class_of(category, ids, predicted, where)
    box2d, attributes = (label.get(key) if isinstance(label.get(key), dict) else {}
                         for key in ("box2d", "attributes"))
    x1, y1, x2, y2 = box = [box2d.get(key) for key in ("x1", "y1", "x2", "y2")]
    if not (all(is_number(v, -1e6, 1e6) for v in box) and x1 < x2 + 1 and y1 < y2 + 1):
        raise entry_error(where, "box2d", label.get("box2d"), "finite x1 <= x2, y1 <= y2 in pixels")
    score = label.get("score") if predicted else 0.
    for key in ("crowd", "ignored"):
        if not isinstance(attributes.get(key), bool | int | None):
            raise entry_error(where, key, attributes[key], "true or false")
        crowd = crowd or bool(attributes.get(key))
    if not is_number(score, 0, 1):
        raise entry_error(where, "score", score, "a number from 0 to 1")
    return (x1, y1, x2 + 1, y2 + 1), class_id, crowd, score


def read_scalabel(path: Path, content, classes: Sequence[str], predicted: bool = False,
                  refused: Callable[[InputError], None] | None = None) -> dict[str, np.ndarray]:
    """Boxes of a Scalabel JSON file's content, renamed and validated, as flat arrays of N boxes
    over F frames: `names` [F] (stems), `frame` [N] (index into names), `boxes` [N, 4] float64
    exclusive xyxy, `labels` [N] (-1: no class, if predicted), `crowd` [N] bool, `score` [N]. A
    frame without `labels` is an image without objects. refused: called with each error in a label,
    where none is raised."""
    frames, ids, rows = read_frames(path, content), {name: k for k, name in enumerate(classes)}, []
    for i, frame in enumerate(frames.values()):
        for j, label in enumerate(frame.get("labels") or []):
            try:
                where = f"{path}: frame {frame['name']}, label {j}"
                rows.append((i, *read_label(label, ids, predicted, where)))
            except InputError as error:
                if not refused:
                    raise
                refused(error)
    frame, boxes, labels, crowd, score = zip(*rows) if rows else [()] * 5
    return {"names": np.array(list(frames), str), "frame": np.array(frame, np.int64),
            "boxes": np.array(boxes, np.float64).reshape(-1, 4),
            "labels": np.array(labels, np.int16), "crowd": np.array(crowd, bool),
            "score": np.array(score, np.float64)}


def read_boxes(path: Path, classes: Sequence[str],
               refused: Callable[[InputError], None] | None = None) -> dict[str, np.ndarray]:
    """`read_scalabel` of a file, which may also hold COCO's instances: images are told by their
    file_name, categories by name; the first error ends their reading, refused or not."""
    content = read_json(path)
    if not (isinstance(content, dict) and "annotations" in content):
        return read_scalabel(path, content, classes, refused=refused)
    try:
        return read_coco_boxes(path, content, classes)
    except InputError as error:
        if not refused:
            raise
        refused(error)
        return read_scalabel(path, [], classes)


def read_coco_boxes(path: Path, content: dict, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """What `read_scalabel` gives, of COCO's instances."""
    images, names, truth = read_instances(path, content, area=0.)
    files = column(path, content["images"], "file_name", is_text, "IMAGE.jpg")
    stem_of = {row["id"]: Path(file).stem for row, file in zip(content["images"], files)}
    stems = [stem_of[image] for image in images]
    refuse_twice(path, "image", stems)
    ids, labels, crowds = {name: k for k, name in enumerate(classes)}, [], []
    for n, category in enumerate(truth["label"].tolist()):
        label, crowd = class_of(names[category], ids, False, f"{path}: entry {n}")
        labels.append(label)
        crowds.append(crowd)
    x, y, width, height = truth["box"].T
    boxes = np.stack([x, y, x + width, y + height], axis=1)
    for n in np.flatnonzero(np.abs(boxes).max(axis=1, initial=0) > 1e6):
        raise entry_error(f"{path}: entry {n}", "bbox", truth["box"][n].tolist(), "pixels")
    return {"names": np.array(stems, str), "frame": truth["image"], "boxes": boxes,
            "labels": np.array(labels, np.int16), "score": np.zeros(len(boxes)),
            "crowd": truth["crowd"] | np.array(crowds, bool)}


def read_cached(path: Path, classes: Sequence[str], cache: Path) -> dict[str, np.ndarray]:
    """`read_boxes` of a file. cache: a folder for what was read, which serves as long as the
    file has the same size and time; a second instead of fifteen for 69,863 images."""
    stat = path.stat()
    place = str(path.resolve())
    key = f"{place} {stat.st_size} {stat.st_mtime_ns} {json.dumps(classes)}"
    kept = cache / f"{path.stem}_{zlib.crc32(place.encode()):08x}.npz"
    try:
        with np.load(kept) as arrays:
            if arrays["key"] == key:
                return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass                                                        # not there, or damaged
    arrays = read_boxes(path, classes)
    if rank_and_world()[0] == 0:
        with written_whole(kept) as f:
            np.savez(f, key=key, **arrays)
    return arrays


class LabelledImages:
    """One split of a data set: what the two readers share.

    Images are numbered in the order of their `stems`; `files` are their paths below `root`.
    `labelled[task]` tells which have labels. Boxes live in flat arrays, which worker processes
    share: `boxes` [N, 4] float64, `box_labels` [N] and `crowd` [N], of image i those in
    `box_slice(i)`. A reader has `mask(task, i)`, uint8 class ids [H, W] with 255 = ignored, and
    `mask_name(task, i)`, where that comes from.
    """

    classes: dict[str, tuple[str, ...]]
    size: tuple[int, int]                                           # of the images, width, height
    without_image = {}                                              # stems of labels, by task

    def __len__(self) -> int:
        return len(self.stems)

    def keep_boxes(self, image, boxes, labels, crowd) -> None:
        """Stores boxes by their image; those of image -1 are left out."""
        order = np.argsort(image, kind="stable")[np.count_nonzero(image < 0):]
        self.boxes, self.box_labels, self.crowd = boxes[order], labels[order], crowd[order]
        self.offsets = np.searchsorted(image[order], np.arange(len(self) + 1))

    def box_slice(self, i: int) -> slice:
        return slice(self.offsets[i], self.offsets[i + 1])

    def image(self, i: int) -> Tensor:
        """uint8 RGB [3, H, W]."""
        return read_image(self.root / self.files[i])

    def target(self, i: int, tasks: Iterable[str] | None = None,
               size: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Labels of image i for those of the tasks (default: all) that it has: `boxes` [N, 4]
        float32, `labels` [N] int64, `crowd` [N] bool; `semantic`, `drivable` uint8 [H, W].
        size: the image's (H, W), which masks must have."""
        target = {}
        for task in self.classes if tasks is None else tasks:
            if self.labelled[task][i] and task == "detection":
                rows = self.box_slice(i)
                target["boxes"] = torch.from_numpy(self.boxes[rows].astype(np.float32))
                target["labels"] = torch.from_numpy(self.box_labels[rows].astype(np.int64))
                target["crowd"] = torch.from_numpy(self.crowd[rows].copy())
            elif self.labelled[task][i]:
                mask = self.mask(task, i)
                (h, w), (height, width) = mask.shape, size or mask.shape
                require((h, w) == (height, width), f"{self.mask_name(task, i)} is {w}x{h}, its "
                        f"image {self.files[i]} {width}x{height}: give masks of the image's size.")
                target[task] = torch.from_numpy(mask)
        return target

    def sample(self, i: int, tasks: Iterable[str] | None = None) -> tuple[Tensor, dict]:
        """Image i with its target."""
        image = self.image(i)
        return image, self.target(i, tasks, image.shape[1:])


class BDD100K(LabelledImages):
    """One split of a data set in BDD100K's official layout, with its classes or those that a
    classes.json in root names (`read_classes`), and boxes as Scalabel's or COCO's JSON.

    root: holds images/100k/{split} and images/10k/{split} (jpg or png; a stem in both counts once).
    labels: the folder that holds labels/det_20/det_{split}.json, labels/sem_seg/masks/{split} and
        labels/drivable/masks/{split}, by default root. Each may be missing, as may any image in it.
    cache: a folder where the boxes are kept once read (`read_cached`).
    refused: called with each error in the boxes, where it shall not be raised.
    """

    classes, size = CLASSES, (1280, 720)

    def __init__(self, root: str | Path, split: str = "val", labels: str | Path | None = None,
                 cache: Path | None = None, refused: Callable[[InputError], None] | None = None):
        self.root, self.split, self.labels = Path(root), split, Path(labels or root)
        require(self.root.is_dir(), f"no data folder {root}: expected BDD100K's layout, "
                f"images/100k/{split} and labels/.")
        self.classes = read_classes(self.root)
        files = {}                                                  # by stem
        for folder in (f"images/10k/{split}", f"images/100k/{split}"):
            for name in glob.glob("*", root_dir=self.root / folder):
                if Path(name).suffix.lower() in SUFFIXES:
                    files[Path(name).stem] = f"{folder}/{name}"
        require(files, f"no images in {root}: expected images/100k/{split}/*.jpg or "
                f"images/10k/{split}/*.jpg.")
        self.stems, self.files = map(np.array, zip(*sorted(files.items())))

        path, names = self.labels / f"labels/det_20/det_{split}.json", self.classes.get("detection")
        read = read_scalabel(path, [], ())                          # no frames
        if names and path.is_file():
            read = (read_cached(path, names, cache) if cache
                    else read_boxes(path, names, refused=refused))
        stems = {"detection": read["names"].tolist()}
        for task, folder in MASK_FOLDERS.items():
            masks = glob.glob("*.png", root_dir=self.labels / folder / split)
            stems[task] = [name.removesuffix(".png") for name in masks]
        stems = {task: stems[task] for task in self.classes}
        self.labelled = {task: np.isin(self.stems, names) for task, names in stems.items()}
        self.without_image = {task: set(names) - files.keys() for task, names in stems.items()}
        image = positions(read["names"].tolist(), self.stems.tolist())[read["frame"]]
        self.keep_boxes(image, read["boxes"], read["labels"], read["crowd"])

    def mask(self, task: str, i: int) -> np.ndarray:
        return read_mask(self.mask_name(task, i), len(self.classes[task]))

    def mask_name(self, task: str, i: int) -> Path:
        return self.labels / MASK_FOLDERS[task] / self.split / f"{self.stems[i]}.png"


class NuImages(LabelledImages):
    """The keyframes of one split of nuImages: tables in root/v1.0-{split}, images in root/samples.

    Ten detection classes (those of mmdetection3d's converter; annotations without a mask are left
    out) and, as semantic classes, all 25 annotated categories: surfaces painted first, then objects
    in the order of their tokens, as in nuImages' devkit; pixels that nobody annotated are ignored.
    """

    classes = {"detection": ("car", "truck", "trailer", "bus", "construction vehicle", "bicycle",
                             "motorcycle", "pedestrian", "traffic cone", "barrier"),
               "semantic": tuple(NUIMAGES.values())}
    size = 1600, 900

    def __init__(self, root: str | Path, split: str = "val"):
        self.root, self.split, self.labels = Path(root), split, Path(root) / f"v1.0-{split}"
        require(self.labels.is_dir(), f"no folder {self.labels}: expected nuImages' tables there "
                f"and its images in {root}/samples.")
        path = self.labels / "sample_data.json"
        rows = self.table("sample_data", token=str, filename=str, is_key_frame=bool, height=int,
                          width=int)
        frames = sorted((Path(name).stem, name, token, shape)
                        for token, name, is_key_frame, *shape in rows if is_key_frame)
        require(frames, f"{path} lists no keyframes: fetch it anew.")
        for _, name, _, (height, width) in frames:
            inside = name.startswith("samples/") and ".." not in Path(name).parts
            sized = min(height, width) > 0 and height * width <= MAX_PIXELS
            require(inside and sized and "\0" not in name,
                    f"{path} names {name!r} of {width}x{height} pixels: expected "
                    f"samples/CAMERA/NAME.jpg, nothing outside the data, at most {MAX_PIXELS}.")
        stems, files, tokens, shapes = zip(*frames)
        self.stems, self.files, self.shapes = np.array(stems), np.array(files), np.array(shapes)
        self.keep_annotations({token: i for i, token in enumerate(tokens)})

    def table(self, name: str, /, **types: type) -> Iterator[tuple]:
        """The columns of an official table, row by row; each value must be of its column's type."""
        def wanted(row: dict) -> dict:                              # the rest would fill memory
            return {key: row[key] for key in types if key in row} or row

        path, expected = self.labels / f"{name}.json", "nuImages' official table"
        rows = read_json(path, object_hook=wanted)
        rows = rows if isinstance(rows, list) else [rows]
        return zip(*(column(path, rows, key, lambda value: isinstance(value, types[key]), expected)
                     for key in types))

    def keep_annotations(self, image_of: dict[str, int]) -> None:
        """Keeps the boxes, and each image's run-length masks, in the order of painting, as JSON in
        one array of bytes, which processes share."""
        names, annotations, boxes, masks = self.classes, [], [], [[] for _ in self.stems]
        if any((self.labels / f"{name}_ann.json").exists() for name in ("surface", "object")):
            types = dict(sample_data_token=str, category_token=str, mask=dict | None)
            objects = self.table("object_ann", token=str, **types, bbox=list)
            annotations += [("", *row, None) for row in self.table("surface_ann", **types)]
            annotations += sorted(objects, key=lambda row: row[0])
        categories = dict(self.table("category", token=str, name=str))
        for _, frame, token, mask, box in annotations:
            where = f"{self.labels}: an annotation of {frame}"
            category = categories.get(token, token)
            semantic = NUIMAGES.get(category.split(".")[-1])
            if semantic is None:
                raise entry_error(where, "category", category, f"one of {', '.join(NUIMAGES)}")
            if mask is None or frame not in image_of:
                continue
            i, counts = image_of[frame], mask.get("counts")
            shape, name = self.shapes[i].tolist(), NUIMAGES_RENAMED.get(semantic, semantic)
            if mask.get("size") != shape or not is_text(counts):
                raise entry_error(where, "mask", mask, f"the image's size, {shape}, and base64")
            masks[i].append((names["semantic"].index(semantic), counts))
            if name not in names["detection"] or box is None:
                continue
            if len(box) != 4 or not all(is_number(value, -1e6, 1e6) for value in box):
                raise entry_error(where, "bbox", box, "[xmin, ymin, xmax, ymax] in pixels")
            if box[0] < box[2] and box[1] < box[3]:
                boxes.append((i, names["detection"].index(name), *box))
        image, labels, *corners = np.array(boxes, np.float64).reshape(-1, 6).T
        self.keep_boxes(image.astype(np.int64), np.stack(corners, 1), labels.astype(np.int16),
                        np.zeros(len(boxes), bool))
        self.labelled = {task: np.full(len(self), any(masks)) for task in names}
        codes = [json.dumps(rows).encode() for rows in masks]
        self.mask_codes = np.frombuffer(b"".join(codes), np.uint8)
        self.mask_ends = np.cumsum([0, *map(len, codes)])

    def image(self, i: int) -> Tensor:
        path, samples = self.root / self.files[i], (self.root / "samples").resolve()
        require(samples in path.resolve().parents, f"{path} is a link to {path.resolve()}, outside "
                f"of {samples}: put the image itself there.")
        return read_image(path)

    def mask(self, task: str, i: int) -> np.ndarray:
        shape, (start, end) = self.shapes[i].tolist(), self.mask_ends[i:i + 2]
        mask = np.full(shape, IGNORE, np.uint8)
        for k, code in json.loads(self.mask_codes[start:end].tobytes()):
            try:
                counts = base64.b64decode(code, validate=True).decode("ascii")
                mask[rle_decode({"size": shape, "counts": counts})] = k
            except (ValueError, IndexError) as broken:
                raise InputError(f"{self.mask_name(task, i)} cannot be read ({broken}): fetch the "
                                 "tables anew.") from None
        return mask

    def mask_name(self, task: str, i: int) -> str:
        return f"{self.labels}: the mask of {self.files[i]}"


DATASETS = {"bdd100k": BDD100K, "nuimages": NuImages}


def read_items(data, tasks: Iterable[str], strict: bool, rows: Iterable[int]) -> list[tuple]:
    """(i, image, target, problems) of each row: unless strict, an image that cannot be read is
    None, such labels are left out, and problems are the reasons by "image" or task."""
    items = []
    for i in rows:
        image, target, problems = None, {}, {}
        for part in ("image", *tasks):
            try:
                if part == "image":
                    image = data.image(i)
                elif image is not None:
                    target |= data.target(i, [part], image.shape[1:])
            except (InputError, OSError) as error:
                if strict:
                    raise
                problems[part] = str(error)
        items.append((i, image, target, problems))
    return items


# ----------------------------------------------------------------------------- checking a folder

def check_data(root: str | Path, dataset: str = "bdd100k", workers: int = 0) -> bool:
    """Reads all images and labels of a data folder as a run does, prints what is there and what is
    wrong, and returns whether a run could use all of it."""
    require(Path(root).is_dir(), f"no data folder {root}: name an existing one.")
    findings = defaultdict(list)                                    # kind of finding: examples
    stems = defaultdict(set)
    options = {}
    if dataset == "bdd100k":
        def refused(error: InputError) -> None:
            findings[f"BAD  label with a wrong {error.field}"].append(str(error))
        options["refused"] = refused
    for split in ("train", "val"):
        try:
            data = DATASETS[dataset](root, split, **options)
            stems[split] = set(data.stems.tolist())
            check_split(data, findings, workers)
        except (InputError, OSError) as error:
            findings[f"BAD  {split}"].append(str(error))
    both = sorted(stems["train"] & stems["val"])
    findings["note image of train and val, left out of training"] += both
    for kind, examples in sorted(findings.items()):
        if examples:
            print(f"  {kind}: {len(examples)}, such as {min(examples)}")
    usable = not any(kind.startswith("BAD") for kind in findings)
    print("a run can use all of this" if usable else "what is BAD ends a run or costs it samples")
    return usable


def check_split(data: LabelledImages, findings: dict[str, list], workers: int) -> None:
    """Adds to the findings, prints numbers, sizes and the classes' shares."""
    for task, names in data.without_image.items():
        findings[f"note {task} labels without an image"] += names
    sizes, counts = Counter(), {task: np.zeros(IGNORE + 1, np.int64) for task in data.classes}
    loader = DataLoader(range(len(data)), batch_size=None, num_workers=workers,
                        collate_fn=partial(check_image, data), worker_init_fn=leave_signals)
    for size, ids, problems in tqdm(loader, desc=f"check {data.split}", unit="img", leave=False):
        sizes[size] += 1
        for task, count in ids.items():
            counts[task] += count
        for kind, example in problems.items():
            findings[kind].append(example)
    print(f"{data.root}, {data.split}: {len(data)} images,",
          ", ".join(f"{size} {n}" for size, n in sizes.most_common(5)))
    for task, names in data.classes.items():
        total, unit = counts[task][:len(names)], "boxes" if task == "detection" else "pixels"
        shares = ", ".join(f"{name} {n / max(1, total.sum()):.2%}" for name, n in zip(names, total))
        print(f"  {task}: {np.count_nonzero(data.labelled[task])} images, {total.sum()} {unit}: "
              f"{shares}")


def check_image(data: LabelledImages, i: int) -> tuple[str, dict[str, np.ndarray], dict[str, str]]:
    """An image's size, the number of each class id in its labels, an example by kind of finding."""
    (_, image, target, problems), = read_items(data, data.classes, False, [i])
    problems, ids = {f"BAD  {part}": reason for part, reason in problems.items()}, {}
    size = "unreadable" if image is None else f"{image.shape[2]}x{image.shape[1]}"
    for task in data.classes:
        labels = target.get("labels" if task == "detection" else task)
        if labels is not None:
            ids[task] = np.bincount(labels.ravel(), minlength=IGNORE + 1)
    if "boxes" in target:
        x, y = target["boxes"].view(-1, 2).T
        if ((x < 0) | (x > image.shape[2]) | (y < 0) | (y > image.shape[1])).any():
            problems["note boxes beyond the image, which are clipped"] = data.files[i]
    return size, ids, problems


# --------------------------------------------------------------------------- writing predictions

class LabelWriter:
    """Writes predictions in BDD100K's layout, which `BDD100K(root, split, labels=folder)` reads and
    the official toolkit scores: masks by threads while the caller goes on, the boxes by `close`."""

    def __init__(self, folder: str | Path, split: str, classes: dict = CLASSES):
        self.folder, self.split, self.classes, self.boxes = Path(folder), split, classes, []
        self.threads, self.unwritten = ThreadPoolExecutor(4), []

    def add(self, name: str, prediction: dict[str, Tensor]) -> None:
        """name: the image's file name. prediction: any of `boxes` with `labels` and `scores`,
        `semantic`, `drivable`, as `predictions` yields them."""
        for task in MASK_FOLDERS.keys() & prediction.keys():
            path = self.folder / MASK_FOLDERS[task] / self.split / f"{Path(name).stem}.png"
            mask = prediction[task].cpu().numpy()
            self.unwritten.append(self.threads.submit(write_mask, path, mask))
        while len(self.unwritten) > 64:
            self.unwritten.pop(0).result()                          # raises what went wrong
        if "boxes" in prediction:
            arrays = [prediction[key].cpu().numpy() for key in ("boxes", "scores", "labels")]
            self.boxes.append((Path(name).name, *arrays))

    def close(self) -> None:
        """Called by all processes; the first writes the boxes of all, sorted by image."""
        while self.unwritten:
            self.unwritten.pop(0).result()
        boxes = [entry for boxes in from_all_ranks(self.boxes) for entry in boxes]
        if boxes and rank_and_world()[0] == 0:
            write_rows(self.folder / f"labels/det_20/det_{self.split}.json",
                       (self.frame(*entry) for entry in sorted(boxes, key=lambda entry: entry[0])))

    def frame(self, name: str, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> dict:
        """A Scalabel frame."""
        rows = []
        for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
            rows.append({"id": str(len(rows)), "category": self.classes["detection"][label],
                         "score": score, "box2d": {"x1": x1, "y1": y1, "x2": x2 - 1, "y2": y2 - 1}})
        return {"name": name, "labels": rows}


def write_coco(folder: Path, data: LabelledImages, meter: "DetectionAP") -> None:
    """What an evaluation has scored as COCO's ground truth and results: image ids from 1 in the
    order of the names, category ids from 1."""
    def rows(boxes: dict[str, np.ndarray], **columns: np.ndarray) -> Iterator[dict]:
        order = np.argsort(boxes["image"], kind="stable")
        columns = {"image_id": boxes["image"] + 1, "category_id": boxes["label"] + 1,
                   "bbox": boxes["box"]} | columns
        for values in zip(*(values[order].tolist() for values in columns.values())):
            yield dict(zip(columns, values))

    gt, dt = meter.arrays()
    truth = enumerate(rows(gt, area=gt["area"], iscrowd=gt["crowd"].astype(int)), start=1)
    write_json(folder / f"gt_{data.split}.json", {
        "images": [{"id": i + 1, "file_name": Path(data.files[i]).name}
                   for i in sorted(meter.images)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(meter.classes, start=1)],
        "annotations": [{"id": n} | row for n, row in truth]})
    write_rows(folder / f"dt_{data.split}.json", rows(dt, score=dt["score"]))


# ------------------------------------------------------------------------- files against files

def score_files(gt: Path, dt: Path, task: str | None = None, classes: dict = CLASSES) -> dict:
    """Scores predictions against ground truth, files or folders whose format is recognised: COCO
    JSON, Scalabel JSON with boxes or run-length masks, PNG masks. Returns what `evaluate` returns,
    with `dropped` counts; for COCO files also `coco`, pycocotools' twelve numbers."""
    for path, what in ((gt, "ground truth"), (dt, "predictions")):
        require(path.exists(), f"no file or folder {path}: expected {what}.")
    truth, predicted = (None if path.is_dir() else read_json(path) for path in (gt, dt))
    task = task or guess_task(gt, truth, classes)
    require(task in classes, f"{gt} is for the task {task}, but there are only classes for "
            f"{', '.join(classes)}: name them in classes.json.")
    if task != "detection":
        return score_masks(task, read_masks(gt, truth, task, classes[task], len(classes[task])),
                           read_masks(dt, predicted, task, classes[task]), classes[task], gt, dt)
    coco = isinstance(truth, dict) and "annotations" in truth
    read = read_coco if coco else partial(read_scalabel_pair, classes[task])
    images, names, truth, predicted = read(gt, dt, truth, predicted)
    image, label = predicted["image"], predicted["label"]
    known = (image >= 0) & (label >= 0)
    require(known.any() or not len(known), f"none of the {len(known)} detections in {dt} is of an "
            f"image and category of {gt}: give predictions for these images.")
    dropped = {"detections of unknown images": int(np.sum(image < 0)),
               "detections of unknown categories": int(np.sum((image >= 0) & (label < 0)))}
    predicted = {key: values[known] for key, values in predicted.items()}
    scores = ap_scores(*coco_ap(truth, predicted, len(images), len(names)), names)
    report = {"detection": percent(scores), "images": len(images), "dropped": dropped}
    if coco:
        report["coco"] = [-1. if scores[key] is None else scores[key] for key in SUMMARY]
    return report


def guess_task(path: Path, content, classes: dict) -> str:
    """The task that a file or folder of ground truth is for: masks' by their classes or path."""
    if isinstance(content, dict) and "annotations" in content:
        return "detection"
    frames = {} if path.is_dir() else read_frames(path, content)
    labels = [label for frame in frames.values() for label in frame.get("labels") or []]
    names = [label.get("category") for label in labels
             if isinstance(label, dict) and label.get("rle")]
    if not names and not path.is_dir():
        return "detection"
    tasks = [task for task, folder in MASK_FOLDERS.items()
             if Path(folder).parts[1] in path.as_posix()
             or any(name in classes.get(task, ()) for name in names)]
    require(len(tasks) == 1, f"{path} holds masks of a task that cannot be told from it: add "
            "--task semantic or --task drivable.")
    return tasks[0]


def read_coco(gt: Path, dt: Path, instances: dict, results: list) -> tuple:
    """COCO's instances and results -> image ids, class names, ground truth and predictions as
    `coco_ap` takes them; predicted ids that are unknown: -1."""
    images, names, truth = read_instances(gt, instances)
    require(isinstance(results, list), f"{dt} holds no list of results: expected COCO's format for "
            "ground truth and predictions.")
    categories = sorted(row["id"] for row in instances["categories"])
    predicted = coco_boxes(dt, results, images, categories)
    score = column(dt, results, "score", partial(is_number, low=0, high=1), "a score from 0 to 1")
    return images, names, truth, predicted | {"score": np.array(score, np.float64)}


def read_instances(path: Path, content: dict,
                   area: float | None = None) -> tuple[list, list, dict]:
    """COCO's instances -> image ids, class names (both in the order of their ids) and the ground
    truth as `coco_ap` takes it. area: of annotations that have none; None: they must."""
    for key in ("images", "categories", "annotations"):
        require(isinstance(content.get(key), list), f"{path} holds no list of {key}: expected "
                "COCO's format for ground truth and predictions.")
    images, categories, rows = (content[key] for key in ("images", "categories", "annotations"))
    ids = column(path, categories, "id", is_whole, "a whole number")
    names = column(path, categories, "name", is_text, "a text")
    images = column(path, images, "id", is_whole, "a whole number")
    for key, values in (("id", images), ("id", ids), ("name", names)):
        refuse_twice(path, key, values)
    images, classes = sorted(images), dict(sorted(zip(ids, names)))
    truth = coco_boxes(path, rows, images, list(classes))
    for key, index in (("image_id", truth["image"]), ("category_id", truth["label"])):
        for n in np.flatnonzero(index < 0):
            raise entry_error(f"{path}: entry {n}", key, rows[n][key], "one that the file lists")
    area = column(path, rows, "area", partial(is_number, low=0), "a finite number from 0 on", area)
    crowd = column(path, rows, "iscrowd", is_number, "a finite number", default=0)
    truth |= {"area": np.array(area, np.float64), "crowd": np.array(crowd, np.float64) > 0}
    return images, list(classes.values()), truth


def coco_boxes(path: Path, rows: list, images: list, categories: list) -> dict[str, np.ndarray]:
    """Annotations or results: where image and category are among these (-1: nowhere), and boxes."""
    image = column(path, rows, "image_id", is_whole, "a whole number")
    label = column(path, rows, "category_id", is_whole, "a whole number")
    box = column(path, rows, "bbox", is_coco_box, "4 finite numbers, no negative size")
    return {"image": positions(image, images), "label": positions(label, categories),
            "box": np.array(box, np.float64).reshape(-1, 4)}


def is_coco_box(value) -> bool:
    return (isinstance(value, list) and len(value) == 4 and all(map(is_number, value))
            and min(value[2:]) >= 0)


def read_scalabel_pair(classes: Sequence[str], gt: Path, dt: Path, truth, predicted) -> tuple:
    """What `read_coco` gives, of Scalabel JSON files' contents."""
    def boxes(read: dict) -> dict[str, np.ndarray]:
        image, box = positions(read["names"].tolist(), images)[read["frame"]], xywh(read["boxes"])
        return {"image": image, "label": read["labels"].astype(np.int64), "box": box,
                "area": box[:, 2] * box[:, 3], "crowd": read["crowd"], "score": read["score"]}

    truth = read_scalabel(gt, truth, classes)
    predicted = read_scalabel(dt, predicted, classes, predicted=True)
    images = sorted(truth["names"].tolist())
    return images, classes, boxes(truth), boxes(predicted)


def positions(names: Sequence, among: Sequence) -> np.ndarray:
    """Where each name is among others, -1 = nowhere."""
    index = {name: i for i, name in enumerate(among)}
    return np.array([index.get(name, -1) for name in names], np.int64)


def xywh(boxes: np.ndarray) -> np.ndarray:
    """x1, y1, x2, y2 -> x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def read_masks(path: Path, content, task: str, classes: Sequence[str], limit: int = IGNORE) -> dict:
    """For each image's stem what reads its mask: from a folder of PNGs of ids below limit, or
    Scalabel JSON with run-length masks, which gives a mask of no size for a frame without any. As
    in Scalabel's evaluation, categories that are no class (VOIDS) are not painted."""
    def paint(frame: dict) -> np.ndarray:
        background = background_of(task, classes)
        mask = np.full((), IGNORE if background is None else background, np.uint8)
        for j, label in enumerate(frame.get("labels") or []):
            category = label.get("category") if isinstance(label, dict) else None
            if is_text(category) and category in VOIDS and category not in classes:
                continue
            try:
                k, inside = classes.index(label["category"]), rle_decode(label["rle"])
                mask = mask if mask.ndim else np.full(inside.shape, mask)
                mask[inside] = k
            except (KeyError, TypeError, ValueError, IndexError) as broken:
                raise InputError(f"{path}: frame {frame['name']}, label {j} is no run-length mask "
                                 f"of a {task} class ({broken!r}).") from None
        return mask

    if path.is_dir():
        files = sorted(path.glob("*.png"))
        masks = {file.stem: partial(read_mask, file, limit) for file in files}
    else:
        masks = {stem: partial(paint, frame) for stem, frame in read_frames(path, content).items()}
    require(masks, f"{path} holds no masks: expected PNGs of class ids, or Scalabel JSON with "
            "run-length masks.")
    return masks


def score_masks(task: str, truth: dict[str, Callable], predicted: dict[str, Callable],
                classes: Sequence[str], gt: Path, dt: Path) -> dict:
    """`score_files` for what `read_masks` gives. Images without prediction are all missed."""
    meter, missed = meter_of(task, classes), truth.keys() - predicted.keys()
    require(len(missed) < len(truth), f"none of the masks in {dt} is of an image in {gt}: "
            "give predictions for these images.")
    for stem, read in tqdm(truth.items(), desc=f"score {task}", unit="img", leave=False):
        mask = read()
        guess = np.full((), IGNORE, np.uint8) if stem in missed else predicted[stem]()
        mask = mask if mask.ndim else np.full_like(guess, mask)
        guess = guess if guess.ndim else np.full_like(mask, guess)
        require(mask.shape == guess.shape, f"the mask of {stem} has height and width {guess.shape} "
                f"in {dt}, but {mask.shape} in {gt}: give masks of the images' size.")
        if mask.ndim:                                       # else neither tells a size
            meter.update(mask, guess)
    dropped = {"masks of unknown images": len(predicted.keys() - truth.keys()),
               "images without prediction, counted as all missed": len(missed)}
    return {task: percent(meter.compute()), "images": len(truth), "dropped": dropped}


def rle_decode(rle: dict) -> np.ndarray:
    """bool [H, W] of COCO's run-length code {"size": [H, W], "counts": str or list}: lengths of
    runs of 0 and 1 in turn, column by column; the string packs them in 5-bit groups, from the
    fourth on as differences to the one before last. ValueError: the runs do not fill the mask."""
    (height, width), counts = rle["size"], rle["counts"]
    if not (is_whole(height) and is_whole(width) and min(height, width) > 0
            and height * width <= MAX_PIXELS):
        raise ValueError(f"a mask of {width!r:.20} x {height!r:.20}")
    if isinstance(counts, str):
        lengths, value, shift = [], 0, 0
        for code in counts.encode("ascii"):
            value |= (code - 48 & 31) << shift
            shift += 5
            if code - 48 & 32 and shift < 60:
                continue
            value -= (code - 48 & 16 > 0) << shift          # sign
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
        counts = lengths
    if sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"runs that do not fill a mask of {width}x{height}")
    ones = np.arange(len(counts)) % 2 > 0
    return np.repeat(ones, counts).reshape(width, height).T


# ------------------------------------------------------------------------------------ detection

THRESHOLDS = np.linspace(0.5, 0.95, 10)           # IoU
RECALLS = np.linspace(0, 1, 101)
AREAS = np.array([[0, 1e10], [0, 32 ** 2], [32 ** 2, 96 ** 2], [96 ** 2, 1e10]])
MAX_DETECTIONS = (1, 10, 100)                     # per image and class
AREA_NAMES = ("all", "small", "medium", "large")
SUMMARY = {  # COCO's twelve numbers: of what, at which IoU, area and number of detections
    "AP": ("Precision", "0.50:0.95", "all", 100), "AP50": ("Precision", "0.50", "all", 100),
    "AP75": ("Precision", "0.75", "all", 100), "APs": ("Precision", "0.50:0.95", "small", 100),
    "APm": ("Precision", "0.50:0.95", "medium", 100),
    "APl": ("Precision", "0.50:0.95", "large", 100), "AR1": ("Recall", "0.50:0.95", "all", 1),
    "AR10": ("Recall", "0.50:0.95", "all", 10), "AR100": ("Recall", "0.50:0.95", "all", 100),
    "ARs": ("Recall", "0.50:0.95", "small", 100), "ARm": ("Recall", "0.50:0.95", "medium", 100),
    "ARl": ("Recall", "0.50:0.95", "large", 100),
}

# What becomes of a box at all areas and thresholds is one 64-bit word:
# bit 16 a + t stands for AREAS[a], THRESHOLDS[t].
AREA_BITS = np.uint64(2 ** len(THRESHOLDS) - 1) << np.arange(0, 64, 16, dtype=np.uint64)
UP_TO = np.array([sum((1 << t) - 1 << 16 * a for a in range(4))
                  for t in range(len(THRESHOLDS) + 1)], np.uint64)


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of each run of equal values."""
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][:len(values)])
    return first, np.diff(np.r_[first, len(values)])


def ranks(values: np.ndarray) -> np.ndarray:
    """Position of each element within its run of equal values."""
    first, length = runs(values)
    return np.arange(len(values)) - np.repeat(first, length)


def outside_areas(area: np.ndarray) -> np.ndarray:
    """Words with the bits of the ranges, ends included, that boxes of these areas are not in."""
    return np.bitwise_or.reduce([((area < low) | (area > high)) * bits
                                 for bits, (low, high) in zip(AREA_BITS, AREAS)])


def candidate_pairs(dt: dict, gt: dict, chunk: int = 1 << 16) -> tuple[np.ndarray, ...]:
    """Detection index, ground-truth index and IoU of all pairs in a group with IoU >= 0.5, made in
    chunks that stay in the processor's cache; with crowds the union is the detection's area.

    dt, gt: `group` (sorted), `x1`, `y1`, `x2`, `y2`, `wh` (width x height) [N]; gt also `crowd`.
    """
    start, length = runs(dt["group"])
    low, high = (np.searchsorted(gt["group"], dt["group"][start], side)
                 for side in ("left", "right"))
    first, count = np.repeat(low, length), np.repeat(high - low, length)
    total = np.cumsum(count)
    pairs, start = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))], 0
    while start < len(count):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + chunk, "right")))
        n = count[start:stop]
        d = np.repeat(np.arange(start, stop), n)
        g = np.arange(len(d)) + np.repeat(first[start:stop] - (np.cumsum(n) - n), n)
        w = np.minimum(dt["x2"][d], gt["x2"][g]) - np.maximum(dt["x1"][d], gt["x1"][g])
        keep = np.flatnonzero(w > 0)
        d, g, w = d[keep], g[keep], w[keep]
        h = np.minimum(dt["y2"][d], gt["y2"][g]) - np.maximum(dt["y1"][d], gt["y1"][g])
        keep = np.flatnonzero(h > 0)
        d, g, inter = d[keep], g[keep], w[keep] * h[keep]
        iou = inter / np.where(gt["crowd"][g], dt["wh"][d], dt["wh"][d] + gt["wh"][g] - inter)
        keep = np.flatnonzero(iou >= THRESHOLDS[0])
        pairs.append((d[keep], g[keep], iou[keep]))
        start = stop
    return tuple(np.concatenate(arrays) for arrays in zip(*pairs))


def match_boxes(dt: dict, gt: dict) -> tuple[np.ndarray, np.ndarray]:
    """COCO's greedy matching of all groups, areas and thresholds at once.

    dt is sorted by group and falling score; gt also has `outside`, the words of where it is
    ignored. Returns two words for each detection: where it is matched, and where to ignored truth.
    Round r takes the r-th detection of every group. It takes the ground truth with the largest IoU,
    of equals the last in the file, that is still free, and an ignored one only where it finds none.
    """
    matched, ignored = np.zeros((2, len(dt["group"])), np.uint64)
    d, g, iou = candidate_pairs(dt, gt)
    best_first = np.lexsort((-g, -iou, d))
    d, g, iou = d[best_first], g[best_first], iou[best_first]
    start, length = runs(d)
    rank, choice = np.repeat(ranks(dt["group"][d[start]]), length), ranks(d)
    order = np.lexsort((choice, rank))
    d, g, iou, rank, choice = (x[order] for x in (d, g, iou, rank, choice))
    reached = UP_TO[np.searchsorted(np.minimum(THRESHOLDS, 1 - 1e-10), iou, "right")]  # as COCO's
    outside, inside = gt["outside"][g], ~gt["outside"][g]
    taken = np.zeros(len(gt["group"]), np.uint64)
    takes = np.where(gt["crowd"], np.uint64(0), UP_TO[-1])          # crowds stay free
    for first, count in zip(*runs(rank)):
        choices = [slice(first + a, first + a + n)
                   for a, n in zip(*runs(choice[first:first + count]))]
        for where in (inside, outside):
            for c in choices:                                       # each box at most once
                i, j = d[c], g[c]
                new = reached[c] & where[c] & ~taken[j] & ~matched[i]
                matched[i] |= new
                taken[j] |= new & takes[j]
                if where is outside:
                    ignored[i] |= new
    return matched, ignored


def precision_recall(dt: dict, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision [T, R, K, A] (100 detections) and recall [T, K, A, M]; -1 where a class has no
    ground truth. dt: `label`, `rank` in its image and class, `matched` and `ignored`, by class and
    falling score. positives [A, K]: ground truth that counts."""
    num_classes = positives.shape[1]
    precision = np.full((len(THRESHOLDS), len(RECALLS), num_classes, len(AREAS)), -1.)
    recall = np.full((len(THRESHOLDS), num_classes, len(AREAS), len(MAX_DETECTIONS)), -1.)
    bounds = np.searchsorted(dt["label"], np.arange(num_classes + 1))
    for k in range(num_classes):
        matched, ignored, rank = (dt[key][bounds[k]:bounds[k + 1]]
                                  for key in ("matched", "ignored", "rank"))
        some = np.flatnonzero(matched)   # the others count alike at all thresholds: cumsum below
        for a in np.flatnonzero(positives[:, k]):
            others = np.cumsum((matched == 0) & (ignored & AREA_BITS[a] == 0))[some]
            bits = np.arange(16 * a, 16 * a + len(THRESHOLDS), dtype=np.uint64)
            bits = (np.uint64(1) << bits)[:, None]
            counts = ignored[some] & bits == 0                      # [T, N]
            hits = counts & (matched[some] & bits > 0)
            detections = np.cumsum(counts, axis=1) + others
            tp = np.arange(1., np.count_nonzero(hits, axis=1).max(initial=0) + 1)
            needed = np.searchsorted(tp / positives[a, k], RECALLS, side="left")  # hits, by recall
            for t, hit in enumerate(map(np.flatnonzero, hits)):
                # precision peaks and recall steps only at hits: the curve needs no other point
                curve = tp[:len(hit)] / (detections[t, hit] + np.spacing(1))
                curve = np.maximum.accumulate(curve[::-1])[::-1]
                precision[t, :, k, a] = np.append(curve, 0.)[np.minimum(needed, len(hit))]
                within = [np.count_nonzero(rank[some[hit]] < limit) for limit in MAX_DETECTIONS]
                recall[t, k, a] = np.array(within) / positives[a, k]
    return precision, recall


def coco_ap(gt: dict, dt: dict, num_images: int, num_classes: int) -> tuple:
    """COCO's box evaluation on flat arrays: identical to pycocotools' `evaluate` and `accumulate`,
    but for an annotation with id 0, which never matches there.

    gt, dt: `image` and `label` [N] integers, `box` [N, 4] float64 x, y, width, height; gt: `area`
    [N], `crowd` [N] bool; dt: `score` [N]. Returns precision [T, R, K, A] and recall [T, K, A, M].
    """
    def stable(values, limit):          # numpy sorts 16-bit integers by radix, several times faster
        dtype = np.uint16 if limit <= 1 << 16 else np.int64
        return np.argsort(values.astype(dtype), kind="stable")

    def grouped(x, order):                                          # order is by image and class
        x1, y1, w, h = x["box"][order].T.copy()
        image, label = x["image"][order].astype(np.int64), x["label"][order]
        return {"group": image * num_classes + label, "label": label,
                "x1": x1, "y1": y1, "x2": x1 + w, "y2": y1 + h, "wh": w * h}

    order = np.lexsort((gt["label"], gt["image"]))
    area, crowd, gt = gt["area"][order], gt["crowd"][order], grouped(gt, order)
    gt |= {"crowd": crowd, "outside": outside_areas(area) | crowd * UP_TO[-1]}
    positives = np.stack([
        np.bincount(gt["label"][gt["outside"] & bits == 0], minlength=num_classes)
        for bits in AREA_BITS])

    by_score = stable(dt["image"], num_images)                      # equal scores rank by image
    by_score = by_score[np.argsort(-dt["score"][by_score], kind="stable")]
    by_class = by_score[stable(dt["label"][by_score], num_classes)]
    by_image = stable(dt["image"][by_class], num_images)
    dt = grouped(dt, by_class[by_image])
    dt["rank"] = ranks(dt["group"])
    kept = dt["rank"] < MAX_DETECTIONS[-1]
    dt = {key: value[kept] for key, value in dt.items()}
    dt["matched"], dt["ignored"] = match_boxes(dt, gt)
    dt["ignored"] |= outside_areas(dt["wh"]) & ~dt["matched"]
    place = np.full(len(by_class), -1)
    place[by_image[kept]] = np.arange(np.count_nonzero(kept))
    back = place[place >= 0]                                        # by class and score again
    keys = "label", "rank", "matched", "ignored"
    return precision_recall({key: dt[key][back] for key in keys}, positives)


def ap_scores(precision: np.ndarray, recall: np.ndarray, classes: Sequence[str]) -> dict:
    """SUMMARY's twelve numbers and `per_class` AP, fractions; None without any ground truth."""
    def mean(values):
        values = values[values > -1]
        return float(values.mean()) if values.size else None

    scores = {}
    thresholds = {"0.50:0.95": slice(None), "0.50": 0, "0.75": 5}
    for key, (kind, iou, area, limit) in SUMMARY.items():
        a, m, t = AREA_NAMES.index(area), MAX_DETECTIONS.index(limit), thresholds[iou]
        scores[key] = mean(precision[t, ..., a] if kind == "Precision" else recall[t, ..., a, m])
    scores["per_class"] = {name: mean(precision[:, :, k, 0]) for k, name in enumerate(classes)}
    return scores | {"rule": "COCO box AP, at most 100 detections of a class in an image"}


class DetectionAP:
    """Streaming COCO box AP of classes, by id: `update` image by image, `compute` once."""

    def __init__(self, classes: Sequence[str]):
        self.classes, self.images = tuple(classes), set()
        self.truths, self.detections = [], []

    def update(self, target: dict, prediction: dict, image: int | None = None) -> None:
        """One image. target: `boxes` [N, 4] (xyxy, exclusive ends), `labels` [N], optional `crowd`
        [N] and `area` [N]. prediction: `boxes`, `scores`, `labels`. Arrays, tensors or lists.
        image: its number, by default one after the other; equal scores rank in their order."""
        image = len(self.images) if image is None else image
        require(image not in self.images, f"image {image} was given twice: each has its number.")
        gt, dt = self.flat(target, image), self.flat(prediction, image)
        n, m, (width, height) = len(gt["label"]), len(dt["label"]), gt["box"][:, 2:].T
        gt["area"] = np.asarray(target.get("area", width * height), np.float64)
        gt["crowd"] = np.asarray(target.get("crowd", np.zeros(n)), bool)
        dt["score"] = np.asarray(prediction["scores"], np.float64)
        require(gt["area"].shape == gt["crowd"].shape == (n,) and dt["score"].shape == (m,)
                and np.isfinite(gt["area"]).all() and not np.isnan(dt["score"]).any(),
                f"image {image}: expected a finite area and a crowd flag for its {n} boxes, a "
                f"score, not NaN, for its {m} detections.")
        best = np.lexsort((-dt["score"], dt["label"]))
        best = np.sort(best[ranks(dt["label"][best]) < MAX_DETECTIONS[-1]])
        self.truths.append(gt)
        self.detections.append({key: values[best] for key, values in dt.items()})
        self.images.add(image)

    def flat(self, result: dict, image: int) -> dict[str, np.ndarray]:
        """An image's boxes as `coco_ap` takes them."""
        boxes = np.asarray(result["boxes"], np.float64)
        labels = np.asarray(result["labels"], np.int64).reshape(-1)
        boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
        require(boxes.shape == (len(labels), 4) and np.isfinite(boxes).all()
                and (boxes[:, 2:] >= boxes[:, :2]).all()
                and ((labels >= 0) & (labels < len(self.classes))).all(),
                f"image {image}: expected finite boxes [N, 4] with x1 <= x2 and y1 <= y2, and N "
                f"labels below {len(self.classes)}.")
        return {"image": np.full(len(boxes), image), "label": labels, "box": xywh(boxes)}

    def merge(self, other: "DetectionAP") -> None:
        """Takes over the images of another process, which must have numbers of their own."""
        for image in self.images & other.images:
            raise InputError(f"image {image} is in both meters: give `update` the images' numbers.")
        self.truths += other.truths
        self.detections += other.detections
        self.images |= other.images

    def arrays(self) -> tuple[dict, dict]:
        """All ground truth and detections, as `coco_ap` takes them."""
        return tuple({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
                     for parts in (self.truths, self.detections))

    def compute(self) -> dict:
        """Fractions: SUMMARY's twelve, COCO's, and `per_class` AP; None where there is no ground
        truth. Also `precision` and `recall` themselves."""
        require(self.truths, "no images were given to score.")
        precision, recall = coco_ap(*self.arrays(), max(self.images) + 1, len(self.classes))
        scores = ap_scores(precision, recall, self.classes)
        return scores | {"precision": precision, "recall": recall}


# --------------------------------------------------------------------------------- segmentation

class MeanIoU:
    """Streaming mean IoU by BDD100K's rule: pixels whose truth is 255, or any id outside the
    classes, do not count, predictions outside the classes are misses, the mean is over the classes
    in the ground truth. background: a class whose pixels (by truth) the official drivable score
    leaves out altogether; the mean over all classes is then given beside it."""

    def __init__(self, classes: Sequence[str], background: int | None = None):
        self.classes, self.background, n = tuple(classes), background, len(classes)
        require(n < IGNORE, f"{n} classes were given: maps of uint8 ids have room for "
                f"{IGNORE - 1}.")
        self.confusion = np.zeros((n, n + 1), np.int64)             # truth x (prediction, other)

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Two uint8 arrays of one shape."""
        require(truth.shape == prediction.shape and truth.dtype == prediction.dtype == np.uint8,
                f"truth {truth.dtype} {truth.shape} and prediction {prediction.dtype} "
                f"{prediction.shape} were given: expected uint8 maps of one shape.")
        self.confusion += pair_counts(truth, prediction, len(self.classes))

    def merge(self, other: "MeanIoU") -> None:
        """Takes over what another process has counted."""
        self.confusion += other.confusion

    def compute(self) -> dict:
        """Fractions: `mIoU`, `per_class` (None where a class has no ground truth), with a
        background class also `mIoU_3class`; as the toolkit defines them `mAcc` (mean over classes
        of hits / predicted pixels), `fIoU` (IoU weighted by the classes' pixels) and `pAcc` (hits /
        pixels); `rule` says in words what was averaged."""
        def mean(values):
            return float(values.mean()) if values.size else None

        counted = [k for k in range(len(self.classes)) if k != self.background]
        pixels, hits, ious, accuracies = iou_parts(self.confusion, counted)
        present, total = pixels > 0, pixels.sum()
        scores = {
            "mIoU": mean(ious[present]),
            "per_class": {self.classes[k]: iou if pixels[n] else None
                          for n, (k, iou) in enumerate(zip(counted, ious.tolist()))},
            "mAcc": mean(accuracies[present]),
            "fIoU": float(sum(ious * (pixels / total))) if total else None,
            "pAcc": float(hits.sum() / total) if total else None,
            "rule": "BDD100K: mean over the classes in the ground truth",
        }
        if self.background is not None:
            pixels, _, ious, _ = iou_parts(self.confusion, range(len(self.classes)))
            scores["mIoU_3class"] = mean(ious[pixels > 0])
            scores["rule"] += (f", pixels of {self.classes[self.background]} left out; 3-class: "
                               "none left out")
        return scores


def iou_parts(confusion: np.ndarray, counted: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Pixels, hits, IoU, and hits / predicted pixels of the classes that count (by truth)."""
    confusion = confusion[counted]
    pixels, predicted = confusion.sum(1), confusion[:, counted].sum(0)
    hits = confusion[range(len(counted)), counted]
    ious = hits / np.maximum(pixels + predicted - hits, 1)
    return pixels, hits, ious, hits / np.maximum(predicted, 1)


def pair_counts(truth: np.ndarray, prediction: np.ndarray, n: int) -> np.ndarray:
    """How many pixels have each pair of ids: int64 [n, n + 1], truth by prediction, which is n for
    all ids from n on. Counts runs of equal pairs instead of pixels, several times as fast on maps,
    whose classes are areas."""
    truth, prediction = truth.ravel(), prediction.ravel()
    ends = np.flatnonzero((truth[1:] != truth[:-1]) | (prediction[1:] != prediction[:-1]))
    last = np.append(ends, len(truth) - 1)[:len(truth)]     # of each run; none in an empty map
    pairs = np.minimum(truth[last], n).astype(np.intp) * (n + 1) + np.minimum(prediction[last], n)
    lengths = np.diff(last, prepend=-1)
    counts = np.bincount(pairs, weights=lengths, minlength=(n + 1) ** 2)    # exact in float64
    return counts.astype(np.int64).reshape(n + 1, n + 1)[:n]


def meter_of(task: str, classes: Sequence[str] | None = None) -> DetectionAP | MeanIoU:
    """What scores a task by BDD100K's rules."""
    classes = CLASSES[task] if classes is None else classes
    if task == "detection":
        return DetectionAP(classes)
    return MeanIoU(classes, background_of(task, classes))


# ------------------------------------------------------------------------------ scoring a model

def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py: tensors and plain types, nothing that runs code."""
    require(Path(path).is_file(), f"no checkpoint {path}: train one with train.py, or name another "
            "with --ckpt.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key in ("model_config", "model", "config", "stage", "step", "steps", "notes", "scores"):
            checkpoint[key]
        checkpoint["model_config"]["classes"], checkpoint["config"]["data"]
        checkpoint["model"].get("text_features")
    except Exception as refused:  # torch raises many kinds, all meaning: not a checkpoint of ours
        reason = re.split(r"\. |\n", str(refused))[0]
        raise InputError(f"{path} is not a checkpoint of train.py ({reason}): name a .pt file of a "
                         "run folder.") from refused
    return checkpoint


def build_model(checkpoint: dict) -> torch.nn.Module:
    """The checkpoint's model, ready to predict, with nothing that learns: it holds its text
    embeddings, so needs no CLIP."""
    from hmpl import HMPL

    config, state = dict(checkpoint["model_config"]), checkpoint["model"]
    text = state.get("text_features")
    try:
        model = HMPL(**config, text=None if text is None else torch.zeros_like(text))
        model.load_state_dict({key: value for key, value in state.items()
                               if not key.startswith("text.")})
    except (TypeError, ValueError, RuntimeError) as misfit:
        reason = re.split(r"\. |\n", str(misfit))[0]
        raise InputError("the checkpoint holds another network than this code builds "
                         f"({reason}): use the code that wrote it, or train anew.") from misfit
    return model.eval().requires_grad_(False)


class Exported(torch.nn.Module):
    """A model whose call is `predict_batch`."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.model.predict_batch(images)


def export_model(model: torch.nn.Module, path: Path, shape: Sequence[int]) -> None:
    """Writes the `predict_batch` of a model on the CPU, for images [B, 3, H, W] of one shape (H, W)
    in float32, as a file that torch.export.load reads without this code. Boxes without area, which
    `predictions` leaves out, are still in its results."""
    images = torch.zeros(2, 3, *shape, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(Exported(model), (images,), dynamic_shapes=batch)
    with warnings.catch_warnings(), written_whole(path) as file:
        warnings.simplefilter("ignore")                     # that channels_last is not contiguous
        torch.export.save(program, file)


def predictions(predict: Callable, data, rows: Sequence[int], device: torch.device, *, batch: int,
                workers: int = 0, tasks: Sequence[str] = (), amp: torch.dtype | None = None,
                desc: str = "predict", skip: Callable | None = None) -> Iterator[tuple]:
    """Yields (i, image, target, prediction) for the rows of a data set (anything with `image(i)`).

    predict: makes the predictions (dicts) of rows and images; they come on the CPU, without boxes
    that have no area, since they lie outside the image. tasks: whose labels the target holds.
    skip: called with row and reason for each image and label that cannot be read, where that is no
    error; they are then left out.
    """
    gpu = device.type == "cuda"
    loader = DataLoader([int(i) for i in rows], batch_size=batch, num_workers=workers,
                        collate_fn=partial(read_items, data, tasks, not skip), pin_memory=gpu,
                        worker_init_fn=leave_signals)
    bar = tqdm(total=len(rows), desc=desc, unit="img", leave=False, mininterval=0.5,
               disable=rank_and_world()[0] > 0)
    waiting = [], [], None          # a GPU makes a batch's predictions while the caller uses these
    with bar:
        for rows_read in itertools.chain(loader, [[]]):             # none: brings the last results
            bar.update(len(rows_read))
            items, results, event = [], [], None
            for i, image, target, problems in rows_read:
                for reason in problems.values():
                    skip(i, reason)
                if image is not None:
                    items.append((i, image, target))
            if items:
                indices, images, _ = map(list, zip(*items))
                with (torch.inference_mode(),
                      torch.autocast(device.type, amp, enabled=amp is not None)):
                    results = predict(indices, images)
                    results = [{key: value.to("cpu", non_blocking=True)
                                for key, value in result.items()} for result in results]
                event = torch.cuda.current_stream(device).record_event() if gpu else None
            waiting, (items, results, event) = (items, results, event), waiting
            if event:
                event.synchronize()
            for item, result in zip(items, results):
                if "boxes" in result:
                    solid = (result["boxes"][:, 2:] - result["boxes"][:, :2]).amin(1) > 1e-3
                    result |= {key: result[key][solid] for key in ("boxes", "scores", "labels")}
                yield *item, result


def model_predictions(model, data, rows: Sequence[int], **options) -> Iterator[tuple]:
    """This process's share of the `predictions` of a model."""
    rank, world = rank_and_world()
    return predictions(lambda _, images: model.predict(images), data, rows[rank::world],
                       next(model.parameters()).device, **options)


def evaluate(model, data: LabelledImages, *, keep: Callable | None = None,
             save: str | Path | None = None, batch: int = 4, **options) -> dict:
    """Scores a model on the images that are labelled for any of its tasks, streaming; in a
    distributed run each process takes every world-th image and all get the same scores.

    keep: called with (row, image, target, prediction) of every image of this process. save: folder
    for the predictions in BDD100K's layout, also of images without labels, and in coco/ in COCO's.
    options: of `predictions`. Returns, in percent, for each task that model and data share what
    its meter computes, and the number of "images" that were scored.
    """
    for task, names in model.classes.items():
        known = data.classes.get(task, ())
        require(tuple(names) == tuple(known), f"the model's {task} classes are {', '.join(names)}; "
                f"the data's are {', '.join(known) or 'none'}: use data of the same class list.")
    tasks = [task for task in model.classes if data.labelled[task].any()]
    require(tasks or save, f"{data.labels} has no {data.split} labels for "
            f"{', '.join(model.classes)}.")
    meters = {task: meter_of(task, data.classes[task]) for task in tasks}
    labelled = np.flatnonzero(sum((data.labelled[task] for task in tasks), np.zeros(len(data))))
    rows = np.arange(len(data)) if save else labelled
    scored, failed = 0, None
    writer = LabelWriter(save, data.split, data.classes) if save else None
    try:
        for i, image, target, prediction in model_predictions(
                model, data, rows, batch=batch, tasks=tasks, desc="evaluate", **options):
            exact = {"boxes": data.boxes[data.box_slice(i)]} if "boxes" in target else {}  # float64
            update_meters(meters, target | exact, prediction, i)
            scored += bool(target)
            if writer:
                writer.add(data.files[i], prediction)
            if keep:
                keep(i, image, target, prediction)
    except (InputError, OSError) as error:
        failed = sentence(error)                            # told to the others, which wait below
    (meters, scored, failed), *others = from_all_ranks((meters, scored, failed))
    for other, other_scored, other_failed in others:
        scored += other_scored
        failed = failed or other_failed
        for task in tasks:
            meters[task].merge(other[task])
    require(not failed, failed)
    if writer:
        writer.close()
        if rank_and_world()[0] == 0 and "detection" in meters:
            write_coco(Path(save) / "coco", data, meters["detection"])
    scores = {task: percent(meter.compute()) for task, meter in meters.items()}
    return scores | {"images": scored}


def update_meters(meters: dict, target: dict, prediction: dict, image: int | None = None) -> None:
    """Adds an image to the meters of those tasks that it is labelled for."""
    for task, meter in meters.items():
        if task == "detection" and "boxes" in target:
            meter.update(target, prediction, image)
        elif task in target:
            meter.update(target[task].numpy(), prediction[task].numpy())


def percent(value):
    """Scores as they are printed and written: fractions times 100, without whole curves."""
    if isinstance(value, dict):
        return {key: percent(v) for key, v in value.items() if not isinstance(v, np.ndarray)}
    return 100 * value if isinstance(value, float) else value


COLUMNS = {"mAP": ("detection", "AP"), "AP50": ("detection", "AP50"),
           "AP75": ("detection", "AP75"), "mIoU (SS)": ("semantic", "mIoU"),
           "mIoU (DA)": ("drivable", "mIoU"), "DA 3-cl.": ("drivable", "mIoU_3class")}


def table(scores: dict, name: str = "") -> str:
    """The paper's columns, then one row for each class; "-" where there is no ground truth."""
    def cell(value):
        return f"{'-' if value is None else format(value, '.1f'):>9}"

    numbers = [scores.get(task, {}).get(key) for task, key in COLUMNS.values()]
    lines = [f"{name or 'in percent':<24}" + " ".join(f"{column:>9}" for column in COLUMNS),
             f"{str(scores['images']) + ' images':<24}" + " ".join(map(cell, numbers))]
    for task in (task for task in CLASSES if task in scores):
        lines.append(f"  {task} ({'AP' if task == 'detection' else 'IoU'})")
        cells = [f"    {key:<14}{cell(value)}" for key, value in scores[task]["per_class"].items()]
        for i in range(0, len(cells), 3):
            lines.append("".join(f"{text:<32}" for text in cells[i:i + 3]).rstrip())
        lines.append(f"  {scores[task]['rule']}")
    return "\n".join(lines)


def coco_table(numbers: Sequence[float]) -> str:
    """The twelve lines that pycocotools prints."""
    return "\n".join(
        f" {'Average ' + kind:<18} ({key[:2]}) @[ IoU={iou:<9} | area={area:>6s} | "
        f"maxDets={limit:>3d} ] = {number:0.3f}"
        for (key, (kind, iou, area, limit)), number in zip(SUMMARY.items(), numbers))


# ------------------------------------------------------------------------------------- pictures

MIN_SCORE = 0.3             # of a box to be drawn
OPACITY = 0.6               # of masks over the image
PALETTES = {                # semantic: BDD100K's and six more; the others suit colour-blind eyes
    "detection": "e69f00 d55e00 56b4e9 0072b2 009e73 999999 cc79a7 b2df8a f0e442 ffffff",
    "semantic": "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 "
                "dc143c ff0000 00008e 000046 003c64 005064 0000e6 770b20 ffaa96 783cc8 00c8c8 "
                "c8ff78 5a3214 f0f0f0",
    "drivable": "0072b2 e69f00 009e73 cc79a7 f0e442 56b4e9 d55e00"}
COLOURS = {task: np.frombuffer(bytes.fromhex(palette), np.uint8).reshape(-1, 3)
           for task, palette in PALETTES.items()}


def colour_of(task: str, k: int) -> tuple[int, int, int]:
    return tuple(COLOURS[task][k % len(COLOURS[task])].tolist())


def paint(photo: Image.Image, task: str, result: dict, names: Sequence[str], scale: float,
          font) -> tuple[Image.Image, set[int]]:
    """A photo with a prediction's or target's boxes, the best on top, or mask, and the ids of the
    classes that are shown. scale: from the image's pixels to the photo's."""
    pixels, shown = np.array(photo), set()
    if task in result:
        ids = Image.fromarray(result[task].numpy()).resize(photo.size, Image.Resampling.NEAREST)
        ids = np.asarray(ids)
        known = (ids < len(names)) & (ids != background_of(task, names))
        colours = COLOURS[task][ids[known] % len(COLOURS[task])]
        pixels[known] = (1 - OPACITY) * pixels[known] + OPACITY * colours
        shown.update(np.unique(ids[known]).tolist())
    photo = Image.fromarray(pixels)
    if task != "detection" or "boxes" not in result:
        return photo, shown
    pen, labels = ImageDraw.Draw(photo), result["labels"].tolist()
    boxes, scores = result["boxes"] * scale, result.get("scores", torch.ones(len(labels)))
    for i in scores.argsort(stable=True).tolist():
        if scores[i] >= MIN_SCORE:
            colour, (x1, y1, x2, y2) = colour_of(task, labels[i]), boxes[i].tolist()
            text = names[labels[i]] + (f" {scores[i]:.2f}" if "scores" in result else "")
            place = max(0, min(x1, photo.width - font.getlength(text))), max(0, y1 - font.size)
            pen.rectangle((x1, y1, x2, y2), outline=colour, width=2)
            pen.rectangle(pen.textbbox(place, text, font), fill=colour)
            pen.text(place, text, "black", font)
            shown.add(labels[i])
    return photo, shown


def draw(image: Tensor, prediction: dict, truth: dict | None = None, title: str = "",
         width: int = 640, classes: dict = CLASSES) -> Image.Image:
    """A sheet for an image [3, H, W]: three panels `width` wide with the predicted boxes, semantic
    map and drivable area, below them those of the ground truth, and a legend."""
    font, scale = ImageFont.load_default(size=width / 45), width / image.shape[2]
    photo, line = Image.fromarray(image.permute(1, 2, 0).numpy()), round(width / 30)
    photo = photo.resize((width, max(1, round(scale * photo.height))), Image.Resampling.BICUBIC)
    rows = {f"prediction {title}": prediction} | ({"ground truth": truth} if truth else {})
    bottom = len(rows) * (photo.height + line)
    most = max(len(names) for names in classes.values())            # swatches, three in a line
    sheet = Image.new("RGB", (3 * width + 8, bottom + (most + 2) // 3 * line), "white")
    pen, shown, end = ImageDraw.Draw(sheet), {task: set() for task in COLOURS}, bottom
    for y, (name, result) in zip(range(0, bottom, photo.height + line), rows.items()):
        pen.text((6, y + line / 2), name, "black", font, anchor="lm")
        for n, task in enumerate(COLOURS):
            panel, ids = paint(photo, task, result, classes.get(task, ()), scale, font)
            sheet.paste(panel, (n * (width + 4), y + line))
            shown[task] |= ids
    for n, (task, ids) in enumerate(shown.items()):                 # a legend, three in a line
        for m, k in enumerate(sorted(ids)):
            x, y = n * (width + 4) + 6 + m % 3 * width // 3, bottom + m // 3 * line
            pen.rectangle((x, y + line // 5, x + line * 2 // 3, y + line * 4 // 5),
                          colour_of(task, k), "black")
            pen.text((x + line, y + line / 2), classes[task][k], "black", font, anchor="lm")
            end = max(end, y + line)
    return sheet.crop((0, 0, sheet.width, end))


class Pictures:
    """Keeps the images of an evaluation that were predicted worst and draws them, worst first."""

    def __init__(self, folder: str | Path, count: int, data: LabelledImages):
        self.folder, self.count, self.data, self.worst = Path(folder), count, data, []

    def __call__(self, i: int, image: Tensor, target: dict, prediction: dict) -> None:
        """The score is the mean over the tasks in the target: AP50 or mIoU of this image alone."""
        meters = {task: meter_of(task, names) for task, names in self.data.classes.items()
                  if ("boxes" if task == "detection" else task) in target}
        update_meters(meters, target, prediction)
        values = [meter.compute()["AP50" if task == "detection" else "mIoU"]
                  for task, meter in meters.items()]
        values = [value for value in values if value is not None]
        score = sum(values) / len(values) if values else 1.
        self.worst.append((score, i, image, target, prediction))
        self.worst.sort(key=lambda entry: entry[:2])
        del self.worst[self.count:]

    def close(self) -> None:
        """Called by all processes; each draws its own of the worst."""
        shares = from_all_ranks([entry[:2] for entry in self.worst])
        order = sorted(itertools.chain(*shares))[:self.count]
        self.folder.mkdir(parents=True, exist_ok=True)
        for score, i, image, target, prediction in self.worst:
            if (score, i) in order:
                stem, place = self.data.stems[i], order.index((score, i)) + 1
                title, classes = f"{stem}, score {100 * score:.0f}", self.data.classes
                sheet = draw(image, prediction, target, title, classes=classes)
                sheet.save(self.folder / f"{place:03d}_{stem}.png")


class ImageFiles:
    """Images that a path names: a file, a folder of them, or a pattern such as 'photos/*.jpg'."""

    def __init__(self, path: str):
        files = [path] if Path(path).exists() else glob.glob(path)
        if Path(path).is_dir():
            files = Path(path).iterdir()
        self.files = sorted(file for file in map(Path, files) if file.suffix.lower() in SUFFIXES)
        require(self.files, f"no jpg or png images at {path}: give a file, a folder or a quoted "
                "pattern.")

    def image(self, i: int) -> Tensor:
        return read_image(self.files[i], upright=True)


def draw_images(model, data: ImageFiles, folder: Path, count: int | None = None,
                **options) -> int:
    """Draws what the model sees in images; returns how many. options: of `predictions`."""
    files = data.files[:count]
    names = [folder / f"{n:03d}_{file.stem}.png" for n, file in enumerate(files, start=1)]
    overwritten = {name.resolve() for name in names} & {file.resolve() for file in data.files}
    require(not overwritten, f"{folder} holds the images themselves: draw into another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for i, image, _, prediction in model_predictions(model, data, range(len(files)), desc="draw",
                                                     **options):
        draw(image, prediction, title=files[i].stem, classes=model.classes).save(names[i])
    return len(files)


# --------------------------------------------------------------------------------- command line

def batch_size(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 4


def num_workers(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 0


def this_device() -> torch.device:
    """The device of this process, which joins the others if torchrun started several."""
    gpu, device = torch.cuda.is_available(), torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")       # TF32, as convolutions have by default
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=6))
    return device


def amp_type(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type that --amp stands for on a device; None = float32. auto: bf16 where
    the hardware has it, else fp16 on a GPU and float32 on a CPU."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()        # older torch: none
        name = "bf16" if capabilities.get("avx512_bf16") else "no"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Scores a checkpoint (--ckpt) or files of predictions "
                                "(--gt, --dt): box AP, mIoU (SS), mIoU (DA), in percent. Or checks "
                                "a folder of data (--check).")
    mode, add = p.add_mutually_exclusive_group(), p.add_argument
    mode.add_argument("--ckpt", nargs="?", metavar="FILE",
                      help="checkpoint to score; without a name the newest under runs/")
    mode.add_argument("--gt", metavar="PATH", type=Path, help="score files instead: the ground "
                      "truth, COCO or Scalabel JSON, or a folder of PNG masks")
    mode.add_argument("--check", nargs="?", const="", metavar="DIR", help="only read all data "
                      "there and print what is wrong; default: the folder that train.py takes")
    add("--dt", metavar="PATH", type=Path,
        help="the predictions: COCO results, Scalabel JSON, a folder of PNG masks")
    add("--task", choices=CLASSES, help="of --gt and --dt, where it cannot be told")
    add("--dataset", choices=DATASETS, default="bdd100k", help="of --check")
    add("--data", metavar="DIR", help="data to score on, default: what the model was trained on; "
        "with --gt: whose classes.json counts")
    add("--split", default="val", help="which images to score (default val)")
    add("--json", metavar="FILE", help="write the scores as JSON")
    add("--save", metavar="DIR", help="write the predictions there, also of images without labels: "
        "Scalabel JSON and PNG masks in BDD100K's layout, coco/ with files for COCO tools")
    add("--show", metavar="DIR", help="draw pictures there, the prediction above the ground truth, "
        "worst first")
    add("--count", type=whole(1), help="of these; default 8, with --images all")
    add("--images", metavar="PATH", help="draw these with --show, without scoring: a file, a "
        "folder or a quoted pattern")
    add("--export", metavar="FILE", help="write the model instead, as torch.export does, for "
        "images of the size of --images, default: the data's")
    add("--batch", type=whole(1), help="images at a time; default 8 on a GPU, else 4")
    add("--workers", type=whole(0), help="processes that read images; default 8 on a GPU, else 0")
    args = p.parse_args(argv)
    if (args.gt is None) != (args.dt is None):
        p.error("--gt and --dt go together: ground truth and predictions.")
    if args.gt and (args.save or args.show or args.images or args.export):
        p.error("--gt and --dt score files: --save, --show, --images and --export need a "
                "checkpoint instead.")
    if args.export and (args.json or args.save or args.show):
        p.error("--export only writes the model: leave out --json, --save and --show.")
    if args.images and not (args.show or args.export):
        p.error("--images needs --show DIR: where to draw.")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).name):
        p.error(f"--json {args.json} is a folder: name a file.")
    return args


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number from `least` on."""
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} was given, expected a whole number from "
                                             f"{least} on.")
        return int(text)
    return read


def run_checkpoint(args: argparse.Namespace) -> dict:
    """Scores a checkpoint, or only draws what it sees in --images. Started by torchrun, all
    processes share the work."""
    path = args.ckpt or max(Path("runs").rglob("*.pt"), key=os.path.getmtime, default=None)
    require(path, "no checkpoint under runs/: train one with train.py, or name one with --ckpt "
            "FILE.")
    checkpoint = load_checkpoint(path)
    config, device = checkpoint["config"], this_device()
    model = build_model(checkpoint).to(device)
    reader = partial(DATASETS[config.get("dataset", "bdd100k")], Path(args.data or config["data"]))
    if args.export:
        require("detection" not in model.classes or checkpoint["model_config"]["heads"] != "conv",
                f"--export was given, but {path} has Faster R-CNN's head, whose NMS torch.export "
                "does not write for any number of images: export one of --heads transformer.")
        images = ImageFiles(args.images) if args.images else reader(args.split)
        if rank_and_world()[0] == 0:
            export_model(model.cpu(), Path(args.export), images.image(0).shape[1:])
        return {}
    options = dict(batch=args.batch or batch_size(device), amp=amp_type(config["amp"], device),
                   workers=num_workers(device) if args.workers is None else args.workers)
    if args.images:
        images = ImageFiles(args.images)
        return {"images": draw_images(model, images, Path(args.show), args.count, **options)}
    data, first = reader(args.split), rank_and_world()[0] == 0
    if first:
        print(f"{path}: stage {checkpoint['stage']}, step {checkpoint['step']} of "
              f"{checkpoint['steps']}; data {data.root}, {args.split}",
              *(f"NOTE: {note}" for note in checkpoint["notes"]), sep="\n")
    pictures = Pictures(args.show, args.count or 8, data) if args.show else None
    scores = evaluate(model, data, keep=pictures, save=args.save, **options)
    if pictures:
        pictures.close()
    if first:
        print(table(scores))
    return scores | {"checkpoint": str(path), "notes": checkpoint["notes"]}


def sentence(error: Exception) -> str:
    """An error's message, also of one that a worker process wrapped in its traceback."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught "):
        return re.sub(r"^[\w.]*InputError: ", "", lines[-1])
    return str(error)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.check is not None:
            root = find_data(args.check or args.data, args.dataset)
            workers = min(8, os.cpu_count()) if args.workers is None else args.workers
            require(check_data(root, args.dataset, workers), "the data needs mending, see above.")
            return
        if args.gt:
            classes = read_classes(Path(args.data)) if args.data else CLASSES
            scores = score_files(args.gt, args.dt, args.task, classes)
            print(coco_table(scores["coco"]) if "coco" in scores else table(scores, args.dt.name))
            for what, count in scores["dropped"].items():
                if count:
                    print(f"NOTE: {count} {what}")
        else:
            scores = run_checkpoint(args)
        if args.json and rank_and_world()[0] == 0:
            write_json(Path(args.json), scores, indent=1)
    except (InputError, OSError) as error:
        sys.exit(f"evaluate.py: {sentence(error)}")
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
