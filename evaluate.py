"""Ground truth on disk, scores and pictures: BDD100K's files and rules, without its toolkit.

    python evaluate.py --ckpt X                     # a checkpoint, by default the newest in runs/
    python evaluate.py --ckpt X --images 'photos/*.jpg' --show pictures         # no labels needed
    python evaluate.py --gt instances.json --dt results.json     # files: COCO, Scalabel, PNG masks
    python evaluate.py --check DIR                                    # lists a folder's bad files

`BDD100K` and `NuImages` read data sets, `LabelWriter` writes predictions, `DetectionAP` and
`MeanIoU` score them. `evaluate` scores a model, `score_files` scores files, `draw` draws
predictions. In memory boxes are xyxy with x2 and y2 exclusive: width = x2 - x1. BDD100K's files
hold inclusive pixels, width = x2 - x1 + 1; `read_scalabel` and `LabelWriter.frame` convert.

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
import math
import os
import re
import signal
import sys
import warnings
from collections import Counter
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
NUIMAGES = {  # last part of nuImages' category names -> semantic class
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
IGNORE = 255
MAX_PIXELS = 5 * 10 ** 7    # of an image or mask: more is no photo but an attack or a mistake
MAX_COORDINATE = 1e6        # of a label's box, in pixels
MAX_FLOAT = sys.float_info.max
SUFFIXES = (".jpg", ".jpeg", ".png")
SAMPLE = Path(__file__).resolve().parent / "tests" / "roads"


class InputError(ValueError):
    """Files that cannot be used; the message names the file and the entry and says what to do."""


def require(good, message: str) -> None:
    if not good:
        raise InputError(message)


def entry_error(where: str, field: str, value, expected: str) -> InputError:
    return InputError(f"{where} has {field} {value!r:.200}: expected {expected}.")


def kind_of(task: str) -> str:
    """"boxes" for detection, "mask" for every other task."""
    return "boxes" if task == "detection" else "mask"


# ------------------------------------------------------------------------------ reading JSON

def read_json(path: Path, **options):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f, **options)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{path} is not valid JSON ({broken}): fetch or write it anew.") from None


def as_numbers(values: list) -> np.ndarray:
    """float64 [N] of JSON values; NaN replaces what is no finite int or float (True is none)."""
    return np.array([v if type(v) in (int, float) and -MAX_FLOAT <= v <= MAX_FLOAT else math.nan
                     for v in values], np.float64)


def as_boxes(values: list) -> np.ndarray:
    """float64 [N, 4] of JSON values; NaN replaces what is no list of four finite numbers."""
    lists = [v if type(v) is list and len(v) == 4 else [None] * 4 for v in values]
    return as_numbers(list(itertools.chain.from_iterable(lists))).reshape(-1, 4)


def require_all(good: np.ndarray, where: Callable[[int], str], field: str, values: Sequence,
                expected: str) -> None:
    """Raises InputError for the first of N values that is not good [N]. where: turns its index into
    the beginning of the message."""
    for n in np.flatnonzero(~good):
        raise entry_error(where(n), field, values[n], expected)


def column(path: Path, entries: list, key: str, types: Sequence[type], expected: str) -> list:
    """The values under a key of a JSON list's entries; raises InputError for one of another type
    (bool is not int)."""
    values = [entry.get(key) if type(entry) is dict else None for entry in entries]
    if not set(map(type, values)) <= set(types):
        good = np.array([type(value) in types for value in values])
        require_all(good, partial("{}: entry {}".format, path), key, values, expected)
    return values


def refuse_twice(path: Path, what: str, values: Iterable) -> None:
    for value, count in Counter(values).items():
        require(count == 1, f"{path}: {what} {value} occurs more than once: keep one of them.")


def positions(names: Sequence, among: Sequence) -> np.ndarray:
    """Index of each name among others; -1 if it is not there."""
    index = {name: i for i, name in enumerate(among)}
    return np.array([index.get(name, -1) for name in names], np.int64)


# ---------------------------------------------------------------------- files and processes

def open_picture(path: Path, upright: bool = False) -> Image.Image:
    """A decoded JPEG or PNG; raises InputError if it is missing, broken, cut off or too large.
    upright: turns it as its EXIF orientation tag says, as viewers and annotation tools do."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height}, expected at most {MAX_PIXELS} pixels")
            picture.load()
            if upright:
                ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as broken:
        raise InputError(f"{path} cannot be read as an image ({broken}): fetch it anew.") from None


def read_image(path: Path) -> Tensor:
    """uint8 RGB [3, H, W] of a JPEG or PNG, turned upright."""
    picture = open_picture(path, upright=True)
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


def write_entries(path: Path, entries: Iterable) -> None:
    """Writes a JSON list, one entry a line, without holding all entries in memory."""
    with written_whole(path) as f:
        start = "["
        for entry in entries:
            f.write((start + json.dumps(entry)).encode())
            start = ",\n"
        f.write(b"[]" if start == "[" else b"]\n")


def rank_and_world() -> tuple[int, int]:
    distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def from_all_ranks(value) -> list:
    """Gathers a value from every process, in the order of their ranks."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def leave_signals(worker: int) -> None:
    """Makes a DataLoader worker ignore SIGINT, and end only ten seconds after SIGTERM: the main
    process still needs its samples to finish a step, and ends it then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


# --------------------------------------------------------------------------- boxes from JSON

def read_boxes(path: Path, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """The `box_table` of a label file: Scalabel's frames, or COCO's instances, whose images are told
    by file_name and whose classes by name. No file: no frames."""
    content = read_json(path) if path.is_file() else []
    if not (isinstance(content, dict) and "annotations" in content):
        return read_scalabel(path, content, classes)
    images, names, truth = read_instances(path, content, area=0)
    files = column(path, content["images"], "file_name", [str], "IMAGE.jpg")
    file_of = {entry["id"]: file for entry, file in zip(content["images"], files)}
    x, y, width, height = truth["box"].T
    boxes = np.stack([x, y, x + width, y + height], axis=1)
    where = partial("{}: entry {}".format, path)
    good = (np.abs(boxes) <= MAX_COORDINATE).all(1)
    require_all(good, where, "bbox", truth["box"].tolist(), "pixels")
    categories = [names[k] for k in truth["label"].tolist()]
    return box_table(path, where, [file_of[image] for image in images], truth["image"], boxes,
                     categories, truth["crowd"], classes)


def read_scalabel(path: Path, content, classes: Sequence[str],
                  predicted: bool = False) -> dict[str, np.ndarray]:
    """The `box_table` of Scalabel JSON, [...] or {"frames": [...]}; a frame without `labels` is an
    image without objects. predicted: labels need a score, and unknown categories are no error."""
    frames = content.get("frames") if isinstance(content, dict) else content
    require(isinstance(frames, list), f"{path} holds no list of frames: expected Scalabel JSON, "
            "[...] or {'frames': [...]}.")
    files = column(path, frames, "name", [str], "IMAGE.jpg, as in Scalabel JSON")
    lists = [labels or [] for labels in
             column(path, frames, "labels", [list, type(None)], "a list")]
    counts = np.array(list(map(len, lists)), np.int64)
    image, first = np.repeat(np.arange(len(frames)), counts), np.cumsum(counts) - counts
    labels = [label if type(label) is dict else {} for label in itertools.chain(*lists)]

    def where(n: int) -> str:
        return f"{path}: frame {files[image[n]]}, label {n - first[image[n]]}"

    boxes2d, attributes = ([label.get(key) for label in labels] for key in ("box2d", "attributes"))
    boxes = as_boxes([[box.get(key) for key in ("x1", "y1", "x2", "y2")]
                      if type(box) is dict else None for box in boxes2d])
    boxes[:, 2:] += 1                                               # inclusive -> exclusive ends
    good = (np.abs(boxes) <= MAX_COORDINATE).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1)
    require_all(good, where, "box2d", boxes2d, "finite x1 <= x2, y1 <= y2 in pixels")
    crowd = np.zeros(len(labels), bool)
    for key in ("crowd", "ignored"):
        flags = [value.get(key) if type(value) is dict else None for value in attributes]
        good = np.array([type(flag) in (bool, int, type(None)) for flag in flags], bool)
        require_all(good, where, key, flags, "true or false")
        crowd |= np.array(list(map(bool, flags)), bool)
    categories = [label.get("category") for label in labels]
    table = box_table(path, where, files, image, boxes, categories, crowd, classes, predicted)
    if predicted:
        table["scores"] = read_scores(labels, where)
    return table


def box_table(path: Path, where: Callable[[int], str], files: list[str], image: np.ndarray,
              boxes: np.ndarray, categories: list, crowd: np.ndarray, classes: Sequence[str],
              predicted: bool = False) -> dict[str, np.ndarray]:
    """Flat arrays of N boxes in F images: `stems` [F], `image` [N] (index into stems), `boxes`
    [N, 4] float64 xyxy, `labels` [N] (-1: a predicted category that is no class), `crowd` [N].
    BDD100K's older category names are renamed unless they are classes themselves; `other vehicle`
    and its like become crowds."""
    stems = [Path(file).stem for file in files]
    refuse_twice(path, "image", stems)
    ids = {name: k for k, name in enumerate(classes)}
    known = {name: ids.get(new, -1) for name, new in (RENAMED | CROWDS).items()} | ids
    texts = [name if type(name) is str else "" for name in categories]
    labels = np.array([known.get(name, -1) for name in texts], np.int16)
    good = (labels >= 0) | np.array([predicted and name != "" for name in texts], bool)
    require_all(good, where, "category", categories, f"one of {', '.join(classes)}")
    crowd = crowd | np.array([name in CROWDS and name not in ids for name in texts], bool)
    return {"stems": np.array(stems, str), "image": image, "boxes": boxes, "labels": labels,
            "crowd": crowd}


def read_scores(entries: list, where: Callable[[int], str]) -> np.ndarray:
    values = [entry.get("score") for entry in entries]
    scores = as_numbers(values)
    require_all((scores >= 0) & (scores <= 1), where, "score", values, "a score from 0 to 1")
    return scores


def read_instances(path: Path, content: dict,
                   area: float | None = None) -> tuple[list, list, dict]:
    """Reads COCO's instances: image ids and class names, both in the order of their ids, and the
    ground truth as `coco_ap` takes it. area: default for annotations without one; None makes it
    required."""
    for key in ("images", "categories", "annotations"):
        require(isinstance(content.get(key), list), f"{path} holds no list of {key}: expected "
                "COCO's format for ground truth and predictions.")
    images = column(path, content["images"], "id", [int], "a whole number")
    ids = column(path, content["categories"], "id", [int], "a whole number")
    names = column(path, content["categories"], "name", [str], "a text")
    for key, values in (("id", images), ("id", ids), ("name", names)):
        refuse_twice(path, key, values)
    images, class_of = sorted(images), dict(sorted(zip(ids, names)))
    entries, where = content["annotations"], partial("{}: entry {}".format, path)
    truth = coco_boxes(path, entries, images, list(class_of))
    for key, index in (("image_id", truth["image"]), ("category_id", truth["label"])):
        values = [entry[key] for entry in entries]
        require_all(index >= 0, where, key, values, "one that the file lists")
    for key, default in (("area", area), ("iscrowd", 0)):
        values = [entry.get(key, default) for entry in entries]
        truth[key] = as_numbers(values)
        require_all(truth[key] >= 0, where, key, values, "a finite number from 0 on")
    truth["crowd"] = truth.pop("iscrowd") > 0
    return images, list(class_of.values()), truth


def coco_boxes(path: Path, entries: list, images: list, categories: list) -> dict[str, np.ndarray]:
    """Annotations or results as arrays: `image` and `label` [N], indices among these ids (-1: none
    of them), `box` [N, 4] x, y, width, height."""
    image = column(path, entries, "image_id", [int], "a whole number")
    label = column(path, entries, "category_id", [int], "a whole number")
    values, where = [entry.get("bbox") for entry in entries], partial("{}: entry {}".format, path)
    boxes = as_boxes(values)
    good = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= 0).all(1)
    require_all(good, where, "bbox", values, "4 finite numbers, no negative size")
    return {"image": positions(image, images), "label": positions(label, categories), "box": boxes}


# -------------------------------------------------------------------------------- data sets

def find_data(given: str | None = None, dataset: str = "bdd100k") -> Path:
    """The data folder: the given one, else $BDD100K, else data/bdd100k, else the sample in
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
    """The class names by task of a data folder: from its classes.json, which names some of the
    tasks, else BDD100K's."""
    path = root / "classes.json"
    if not path.is_file():
        return CLASSES
    content = read_json(path)
    require(isinstance(content, dict) and content and content.keys() <= CLASSES.keys(),
            f"{path} holds {content!r:.200}: expected lists of class names under some of "
            f"{', '.join(CLASSES)}.")
    for task, names in content.items():
        good = isinstance(names, list) and names and all(type(name) is str for name in names)
        if not good or "" in names or len(set(names)) < len(names) or len(names) >= IGNORE:
            raise entry_error(f"{path}", task, names, f"1 to {IGNORE - 1} different names")
    return {task: tuple(content[task]) for task in CLASSES if task in content}


def background_of(task: str, classes: Sequence[str]) -> int | None:
    """The drivable class whose pixels the official score leaves out: the last, if it is called
    background."""
    last = len(classes) - 1
    return last if task == "drivable" and classes[last] == "background" else None


class LabelledImages:
    """One split of a data set: what both readers share.

    Images are numbered in the order of their `stems`; `files` are their paths below `root`.
    `labelled[task]` [images] tells which have labels. Boxes live in flat arrays, which worker
    processes share: `boxes` [N, 4] float64, `box_labels` [N] and `crowd` [N]; those of image i are
    at `box_slice(i)`. A reader implements `mask(task, i)`, uint8 class ids [H, W] with 255 =
    ignored, and `mask_name(task, i)`, the name of its source for messages.
    """

    classes: dict[str, tuple[str, ...]]
    size: tuple[int, int]                                           # of the images, width, height
    without_image = {}                                              # task: stems of spare labels

    def __len__(self) -> int:
        return len(self.stems)

    def keep_boxes(self, image, boxes, labels, crowd) -> None:
        """Stores boxes by their image; drops those of image -1."""
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
        """Reads the labels of image i for the given tasks (default: all) that it is labelled for:
        `boxes` [N, 4] float32, `labels` [N] int64, `crowd` [N] bool; `semantic`, `drivable` uint8
        [H, W]. size: the image's (H, W), which masks must have."""
        target = {}
        for task in self.classes if tasks is None else tasks:
            if self.labelled[task][i] and kind_of(task) == "boxes":
                boxes = self.box_slice(i)
                target["boxes"] = torch.from_numpy(self.boxes[boxes].astype(np.float32))
                target["labels"] = torch.from_numpy(self.box_labels[boxes].astype(np.int64))
                target["crowd"] = torch.from_numpy(self.crowd[boxes].copy())
            elif self.labelled[task][i]:
                mask = self.mask(task, i)
                (h, w), (height, width) = mask.shape, size or mask.shape
                require((h, w) == (height, width), f"{self.mask_name(task, i)} is {w}x{h}, its "
                        f"image {self.files[i]} {width}x{height}: give masks of the image's size.")
                target[task] = torch.from_numpy(mask)
        return target

    def sample(self, i: int, tasks: Iterable[str] | None = None) -> tuple[Tensor, dict]:
        """Image i and its target."""
        image = self.image(i)
        return image, self.target(i, tasks, image.shape[1:])


class BDD100K(LabelledImages):
    """One split of a data set in BDD100K's official layout, with BDD100K's classes or those of a
    classes.json in root (`read_classes`), and boxes from Scalabel's or COCO's JSON.

    root: holds images/100k/{split} and images/10k/{split} (jpg or png; a stem in both counts once).
    labels: the folder that holds labels/det_20/det_{split}.json, labels/sem_seg/masks/{split} and
        labels/drivable/masks/{split}, by default root. Each may be missing, as may any image in it.
    """

    classes, size = CLASSES, (1280, 720)

    def __init__(self, root: str | Path, split: str = "val", labels: str | Path | None = None):
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

        self.labelled, self.without_image = {}, {}
        self.keep_boxes(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
        for task, names in self.classes.items():
            if kind_of(task) == "boxes":
                table = read_boxes(self.labels / f"labels/det_20/det_{split}.json", names)
                stems = table["stems"].tolist()
                image = positions(stems, self.stems.tolist())[table["image"]]
                self.keep_boxes(image, table["boxes"], table["labels"], table["crowd"])
            else:
                masks = glob.glob("*.png", root_dir=self.labels / MASK_FOLDERS[task] / split)
                stems = [name.removesuffix(".png") for name in masks]
            self.labelled[task] = np.isin(self.stems, stems)
            self.without_image[task] = sorted(set(stems) - files.keys())

    def mask(self, task: str, i: int) -> np.ndarray:
        return read_mask(self.mask_name(task, i), len(self.classes[task]))

    def mask_name(self, task: str, i: int) -> Path:
        return self.labels / MASK_FOLDERS[task] / self.split / f"{self.stems[i]}.png"


class NuImages(LabelledImages):
    """The keyframes of one split of nuImages: tables in root/v1.0-{split}, images in root/samples.

    Ten detection classes (those of mmdetection3d's converter; annotations without a mask are left
    out) and, as semantic classes, all 25 annotated categories: surfaces painted first, then objects
    in the order of their tokens, as in nuImages' devkit; other pixels are ignored.
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
        entries = self.table("sample_data", token=[str], filename=[str], is_key_frame=[bool],
                             height=[int], width=[int])
        frames = sorted((Path(name).stem, name, token, shape)
                        for token, name, is_key_frame, *shape in entries if is_key_frame)
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

    def table(self, name: str, /, **types: Sequence[type]) -> Iterator[tuple]:
        """Yields the entries of an official table as tuples of these columns, whose values must be
        of one of the column's types."""
        def wanted(entry: dict) -> dict:                    # other columns would fill the memory
            return {key: entry[key] for key in types if key in entry} or entry

        path, expected = self.labels / f"{name}.json", "nuImages' official table"
        entries = read_json(path, object_hook=wanted)
        entries = entries if isinstance(entries, list) else [entries]
        return zip(*(column(path, entries, key, allowed, expected)
                     for key, allowed in types.items()))

    def annotations(self) -> list[tuple]:
        """Frame token, category token, mask and box of all annotations, in the order of painting;
        surfaces have no box."""
        if not any((self.labels / f"{name}_ann.json").exists() for name in ("surface", "object")):
            return []
        types = dict(sample_data_token=[str], category_token=[str], mask=[dict, type(None)])
        surfaces = [(*entry, None) for entry in self.table("surface_ann", **types)]
        objects = self.table("object_ann", token=[str], **types, bbox=[list])
        return surfaces + [entry for _, *entry in sorted(objects, key=lambda entry: entry[0])]

    def keep_annotations(self, image_of: dict[str, int]) -> None:
        """Stores boxes, and each image's run-length masks in the order of painting. The masks are
        JSON in one array of bytes, which worker processes share. image_of: frame token -> image."""
        names, boxes, masks = self.classes, [], [[] for _ in self.stems]
        categories = dict(self.table("category", token=[str], name=[str]))
        for frame, token, mask, box in self.annotations():
            where = f"{self.labels}: an annotation of {frame}"
            category = categories.get(token, token)
            semantic = NUIMAGES.get(category.split(".")[-1])
            if semantic is None:
                raise entry_error(where, "category", category, f"one of {', '.join(NUIMAGES)}")
            if mask is None or frame not in image_of:
                continue
            i, counts = image_of[frame], mask.get("counts")
            shape, name = self.shapes[i].tolist(), NUIMAGES_RENAMED.get(semantic, semantic)
            if mask.get("size") != shape or type(counts) is not str:
                raise entry_error(where, "mask", mask, f"the image's size, {shape}, and base64")
            masks[i].append((names["semantic"].index(semantic), counts))
            if name not in names["detection"] or box is None:
                continue
            if not (np.abs(as_boxes([box])) <= MAX_COORDINATE).all():
                raise entry_error(where, "bbox", box, "[xmin, ymin, xmax, ymax] in pixels")
            if box[0] < box[2] and box[1] < box[3]:
                boxes.append((i, names["detection"].index(name), *box))
        image, labels, *corners = np.array(boxes, np.float64).reshape(-1, 6).T
        self.keep_boxes(image.astype(np.int64), np.stack(corners, 1), labels.astype(np.int16),
                        np.zeros(len(boxes), bool))
        self.labelled = {task: np.full(len(self), any(masks)) for task in names}
        codes = [json.dumps(image_masks).encode() for image_masks in masks]
        self.mask_codes = np.frombuffer(b"".join(codes), np.uint8)
        self.mask_ends = np.cumsum([0, *map(len, codes)])

    def mask(self, task: str, i: int) -> np.ndarray:
        shape, (start, end) = self.shapes[i].tolist(), self.mask_ends[i:i + 2]
        mask = np.full(shape, IGNORE, np.uint8)
        for k, code in json.loads(self.mask_codes[start:end].tobytes()):
            try:
                counts = base64.b64decode(code, validate=True).decode("ascii")
                mask[rle_decode(counts, *shape)] = k
            except (ValueError, IndexError) as broken:
                raise InputError(f"{self.mask_name(task, i)} cannot be read ({broken}): fetch the "
                                 "tables anew.") from None
        return mask

    def mask_name(self, task: str, i: int) -> str:
        return f"{self.labels}: the mask of {self.files[i]}"


def rle_decode(counts: str, height: int, width: int) -> np.ndarray:
    """Decodes COCO's run-length code to a mask, bool [height, width]. The code holds the lengths of
    runs of 0 and 1 in turn, column by column, packed in 5-bit groups; from the fourth on they are
    differences to the length before the last. Raises ValueError if the runs do not fill the mask."""
    lengths, value, shift = [], 0, 0
    for code in counts.encode("ascii"):
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32 and shift < 60:                                # more groups follow
            continue
        if bits & 16:                                               # negative
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value, shift = 0, 0
    if sum(lengths) != height * width or min(lengths) < 0:
        raise ValueError(f"runs that do not fill a mask of {width}x{height}")
    ones = np.arange(len(lengths)) % 2 > 0
    return np.repeat(ones, lengths).reshape(width, height).T


DATASETS = {"bdd100k": BDD100K, "nuimages": NuImages}


def read_items(data, tasks: Sequence[str], strict: bool, indices: Iterable[int]) -> list[tuple]:
    """Reads (i, image, target) of some images. With strict=False, an image that cannot be read, or
    whose labels cannot, is skipped with a NOTE."""
    items = []
    for i in indices:
        try:
            image = data.image(i)
            items.append((i, image, data.target(i, tasks, image.shape[1:]) if tasks else {}))
        except (InputError, OSError) as error:
            if strict:
                raise
            tqdm.write(f"NOTE: {data.files[i]} is skipped: {error}", file=sys.stderr)
    return items


# ----------------------------------------------------------------------------- checking a folder

def check_data(root: str | Path, dataset: str = "bdd100k", workers: int = 0) -> bool:
    """Reads all images and labels of a data folder as a run does. Prints the numbers of images,
    labels and objects, then each file that cannot be used; returns whether there is none."""
    require(Path(root).is_dir(), f"no data folder {root}: name an existing one.")
    bad = []
    for split in ("train", "val"):
        try:
            data = DATASETS[dataset](root, split)
        except (InputError, OSError) as error:
            bad.append(str(error))
            continue
        counts = {task: np.zeros(IGNORE + 1, np.int64) for task in data.classes}
        loader = DataLoader(range(len(data)), batch_size=None, num_workers=workers,
                            collate_fn=partial(check_image, data), worker_init_fn=leave_signals)
        for errors, ids in tqdm(loader, desc=f"check {split}", unit="img", leave=False):
            bad += errors
            for task, count in ids.items():
                counts[task] += count
        print(f"{data.root}, {split}: {len(data)} images")
        for task, names in data.classes.items():
            images, spare = np.count_nonzero(data.labelled[task]), data.without_image.get(task)
            numbers = ", ".join(f"{name} {n}" for name, n in zip(names, counts[task]))
            print(f"  {task}: {images} labelled images; {kind_of(task)} by class: {numbers}")
            if spare:
                print(f"  NOTE: {len(spare)} {task} labels have no image, such as {spare[0]}")
            if spare and not images:
                bad.append(f"{data.labels}: none of the {split} labels for {task} has an image.")
    print(*(f"BAD  {error}" for error in bad),
          "files marked BAD cannot be used" if bad else "a run can use all of this", sep="\n")
    return not bad


def check_image(data: LabelledImages, i: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """The errors of an image and its labels, and for each task how often each class id occurs."""
    errors, ids = [], {}
    try:
        size = data.image(i).shape[1:]
    except (InputError, OSError) as error:
        return [str(error)], ids
    for task in data.classes:
        try:
            target = data.target(i, [task], size)
            labels = target.get("labels" if kind_of(task) == "boxes" else task)
            if labels is not None:
                ids[task] = np.bincount(labels.ravel(), minlength=IGNORE + 1)
        except (InputError, OSError) as error:
            errors.append(str(error))
    return errors, ids


# --------------------------------------------------------------------------- writing predictions

class LabelWriter:
    """Writes predictions in BDD100K's layout, which `BDD100K(root, split, labels=folder)` reads and
    the official toolkit scores. Threads write the masks meanwhile; `close` writes the boxes."""

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
        self.wait(at_most=64)
        if "boxes" in prediction:
            arrays = [prediction[key].cpu().numpy() for key in ("boxes", "scores", "labels")]
            self.boxes.append((Path(name).name, *arrays))

    def wait(self, at_most: int = 0) -> None:
        """Returns when at most so many masks are still to be written; raises what went wrong."""
        while len(self.unwritten) > at_most:
            self.unwritten.pop(0).result()

    def close(self) -> None:
        """Called by all processes; the first writes the boxes of all, sorted by file name."""
        self.wait()
        boxes = [entry for boxes in from_all_ranks(self.boxes) for entry in boxes]
        if boxes and rank_and_world()[0] == 0:
            boxes.sort(key=lambda entry: entry[0])
            write_entries(self.folder / f"labels/det_20/det_{self.split}.json",
                          (self.frame(*entry) for entry in boxes))

    def frame(self, name: str, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> dict:
        """A Scalabel frame."""
        entries = []
        for (x1, y1, x2, y2), score, k in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
            entries.append({"id": str(len(entries)), "category": self.classes["detection"][k],
                            "score": score,
                            "box2d": {"x1": x1, "y1": y1, "x2": x2 - 1, "y2": y2 - 1}})
        return {"name": name, "labels": entries}


def write_coco(folder: Path, data: LabelledImages, meter: "DetectionAP") -> None:
    """Writes an evaluation's ground truth and detections as COCO files: image ids from 1 in the
    order of the names, category ids from 1."""
    def entries(boxes: dict[str, np.ndarray], **columns: np.ndarray) -> Iterator[dict]:
        order = np.argsort(boxes["image"], kind="stable")
        columns = {"image_id": boxes["image"] + 1, "category_id": boxes["label"] + 1,
                   "bbox": boxes["box"]} | columns
        for values in zip(*(values[order].tolist() for values in columns.values())):
            yield dict(zip(columns, values))

    gt, dt = meter.arrays()
    truth = enumerate(entries(gt, area=gt["area"], iscrowd=gt["crowd"].astype(int)), start=1)
    write_json(folder / f"gt_{data.split}.json", {
        "images": [{"id": i + 1, "file_name": Path(data.files[i]).name}
                   for i in sorted(meter.images)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(meter.classes, start=1)],
        "annotations": [{"id": n} | entry for n, entry in truth]})
    write_entries(folder / f"dt_{data.split}.json", entries(dt, score=dt["score"]))


# ------------------------------------------------------------------------- files against files

def score_files(gt: Path, dt: Path, task: str = "detection", classes: dict = CLASSES) -> dict:
    """Scores predictions against ground truth: COCO or Scalabel JSON files, for mask tasks folders
    of PNGs. Returns what `evaluate` returns, with `dropped` counts; for COCO files also `coco`,
    pycocotools' twelve numbers."""
    for path, what in ((gt, "ground truth"), (dt, "predictions")):
        require(path.exists(), f"no file or folder {path}: expected {what}.")
    require(task in classes, f"--task {task} was given, but there are only classes for "
            f"{', '.join(classes)}: name its classes in classes.json.")
    if kind_of(task) == "mask":
        return score_masks(task, gt, dt, classes[task])
    require(gt.is_file() and dt.is_file(), f"{gt} and {dt} should both be JSON files: for folders of "
            "PNG masks add --task semantic or --task drivable.")
    truth, predicted = read_json(gt), read_json(dt)
    coco = isinstance(truth, dict) and "annotations" in truth
    read = read_coco_pair if coco else partial(read_scalabel_pair, classes[task])
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


def read_coco_pair(gt: Path, dt: Path, truth: dict, predicted: list) -> tuple:
    """Reads COCO's instances and results: image ids, class names, ground truth and predictions as
    `coco_ap` takes them. Unknown ids of predictions become -1."""
    images, names, boxes = read_instances(gt, truth)
    require(isinstance(predicted, list), f"{dt} holds no list of results: expected COCO's format "
            "for ground truth and predictions.")
    categories = sorted(entry["id"] for entry in truth["categories"])
    guesses = coco_boxes(dt, predicted, images, categories)
    guesses["score"] = read_scores(predicted, partial("{}: entry {}".format, dt))
    return images, names, boxes, guesses


def read_scalabel_pair(classes: Sequence[str], gt: Path, dt: Path, truth, predicted) -> tuple:
    """`read_coco_pair` for Scalabel JSON."""
    truth = read_scalabel(gt, truth, classes)
    predicted = read_scalabel(dt, predicted, classes, predicted=True)
    images = sorted(truth["stems"].tolist())
    for table in (truth, predicted):
        table["image"] = positions(table["stems"].tolist(), images)[table["image"]]
        table["label"], table["box"] = table["labels"].astype(np.int64), xywh(table["boxes"])
    truth["area"] = truth["box"][:, 2] * truth["box"][:, 3]
    predicted = {key: predicted[key] for key in ("image", "label", "box", "scores")}
    return images, classes, truth, predicted | {"score": predicted.pop("scores")}


def xywh(boxes: np.ndarray) -> np.ndarray:
    """x1, y1, x2, y2 -> x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def score_masks(task: str, gt: Path, dt: Path, classes: Sequence[str]) -> dict:
    """`score_files` for folders of PNG masks. An image without a prediction counts as all missed;
    a predicted id beyond the classes is a miss."""
    for folder in (gt, dt):
        require(any(folder.glob("*.png")), f"{folder} holds no masks: expected a folder of PNGs of "
                "class ids.")
    truth, predicted = ({file.stem: file for file in sorted(folder.glob("*.png"))}
                        for folder in (gt, dt))
    meter, missed = meter_of(task, classes), truth.keys() - predicted.keys()
    require(len(missed) < len(truth), f"none of the masks in {dt} is of an image in {gt}: "
            "give predictions for these images.")
    for stem, file in tqdm(truth.items(), desc=f"score {task}", unit="img", leave=False):
        mask = read_mask(file, len(classes))
        guess = np.full_like(mask, IGNORE) if stem in missed else read_mask(predicted[stem])
        require(mask.shape == guess.shape, f"the mask of {stem} has height and width {guess.shape} "
                f"in {dt}, but {mask.shape} in {gt}: give masks of the images' size.")
        meter.update(mask, guess)
    dropped = {"masks of unknown images": len(predicted.keys() - truth.keys()),
               "images without prediction, counted as all missed": len(missed)}
    return {task: percent(meter.compute()), "images": len(truth), "dropped": dropped}


# ------------------------------------------------------------------------------------ detection

THRESHOLDS = np.linspace(0.5, 0.95, 10)           # IoU
RECALLS = np.linspace(0, 1, 101)
AREAS = np.array([[0, 1e10], [0, 32 ** 2], [32 ** 2, 96 ** 2], [96 ** 2, 1e10]])
MAX_DETECTIONS = (1, 10, 100)                     # per image and class
AREA_NAMES = ("all", "small", "medium", "large")
SUMMARY = {  # COCO's twelve numbers: kind, IoU thresholds, area range, number of detections
    "AP": ("Precision", "0.50:0.95", "all", 100), "AP50": ("Precision", "0.50", "all", 100),
    "AP75": ("Precision", "0.75", "all", 100), "APs": ("Precision", "0.50:0.95", "small", 100),
    "APm": ("Precision", "0.50:0.95", "medium", 100),
    "APl": ("Precision", "0.50:0.95", "large", 100), "AR1": ("Recall", "0.50:0.95", "all", 1),
    "AR10": ("Recall", "0.50:0.95", "all", 10), "AR100": ("Recall", "0.50:0.95", "all", 100),
    "ARs": ("Recall", "0.50:0.95", "small", 100), "ARm": ("Recall", "0.50:0.95", "medium", 100),
    "ARl": ("Recall", "0.50:0.95", "large", 100),
}

# A 64-bit word holds one flag of a box for all areas and thresholds: bit 16 a + t stands for
# AREAS[a] and THRESHOLDS[t].
AREA_BITS = np.uint64(2 ** len(THRESHOLDS) - 1) << np.arange(0, 64, 16, dtype=np.uint64)
UP_TO = np.array([sum(((1 << t) - 1) << (16 * a) for a in range(4))     # the first t thresholds
                  for t in range(len(THRESHOLDS) + 1)], np.uint64)


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of each run of equal values."""
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][:len(values)])
    return first, np.diff(np.r_[first, len(values)])


def ranks(values: np.ndarray) -> np.ndarray:
    """Position of each element within its run of equal values."""
    first, length = runs(values)
    return np.arange(len(values)) - np.repeat(first, length)


def ignored_areas(area: np.ndarray) -> np.ndarray:
    """Words that flag the area ranges (ends included) that do not hold boxes of these areas: COCO
    ignores such boxes there."""
    return np.bitwise_or.reduce([((area < low) | (area > high)) * bits
                                 for bits, (low, high) in zip(AREA_BITS, AREAS)])


def candidate_pairs(dt: dict, gt: dict, chunk: int = 1 << 16) -> tuple[np.ndarray, ...]:
    """Finds all pairs of a group with IoU >= 0.5: detection index, ground-truth index, IoU. Works in
    chunks that fit the processor's cache. For a crowd, the union is the detection's area.

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

    dt is sorted by group and descending score; gt also has `ignored`, words that flag where it is
    ignored. Returns two words for each detection: where it is matched, and where to ignored truth.
    Round r matches the r-th detection of every group. It takes the free ground truth with the
    largest IoU, the last in the file if several are equal; an ignored one only if no other is left.
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
    to_ignored, to_counted = gt["ignored"][g], ~gt["ignored"][g]
    taken = np.zeros(len(gt["group"]), np.uint64)
    takes = np.where(gt["crowd"], np.uint64(0), UP_TO[-1])          # crowds stay free
    for first, count in zip(*runs(rank)):
        choices = [slice(first + a, first + a + n)
                   for a, n in zip(*runs(choice[first:first + count]))]
        for allowed in (to_counted, to_ignored):
            for c in choices:                                       # each box at most once
                i, j = d[c], g[c]
                new = reached[c] & allowed[c] & ~taken[j] & ~matched[i]
                matched[i] |= new
                taken[j] |= new & takes[j]
                if allowed is to_ignored:
                    ignored[i] |= new
    return matched, ignored


def precision_recall(dt: dict, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision [T, R, K, A] (100 detections) and recall [T, K, A, M]; -1 for classes without ground
    truth. dt: `label`, `rank` in its image and class, `matched` and `ignored`, sorted by class and
    descending score. positives [A, K]: number of ground-truth boxes that are not ignored."""
    num_classes = positives.shape[1]
    precision = np.full((len(THRESHOLDS), len(RECALLS), num_classes, len(AREAS)), -1.)
    recall = np.full((len(THRESHOLDS), num_classes, len(AREAS), len(MAX_DETECTIONS)), -1.)
    bounds = np.searchsorted(dt["label"], np.arange(num_classes + 1))
    for k in range(num_classes):
        matched, ignored, rank = (dt[key][bounds[k]:bounds[k + 1]]
                                  for key in ("matched", "ignored", "rank"))
        some = np.flatnonzero(matched)   # the others count alike at all thresholds: cumsum below
        for a in np.flatnonzero(positives[:, k]):
            others = np.cumsum((matched == 0) & ((ignored & AREA_BITS[a]) == 0))[some]
            bits = np.arange(16 * a, 16 * a + len(THRESHOLDS), dtype=np.uint64)
            bits = (np.uint64(1) << bits)[:, None]
            counts = (ignored[some] & bits) == 0                    # [T, N]
            hits = counts & ((matched[some] & bits) > 0)
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
    """COCO's box evaluation on flat arrays, identical to pycocotools' `evaluate` and `accumulate`
    except for an annotation with id 0, which never matches there.

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
    gt |= {"crowd": crowd, "ignored": ignored_areas(area) | (crowd * UP_TO[-1])}
    positives = np.stack([
        np.bincount(gt["label"][(gt["ignored"] & bits) == 0], minlength=num_classes)
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
    dt["ignored"] |= ignored_areas(dt["wh"]) & ~dt["matched"]
    by_class_again = np.argsort(by_image[kept])
    keys = "label", "rank", "matched", "ignored"
    return precision_recall({key: dt[key][by_class_again] for key in keys}, positives)


def ap_scores(precision: np.ndarray, recall: np.ndarray, classes: Sequence[str]) -> dict:
    """SUMMARY's twelve numbers and `per_class` AP as fractions; None without ground truth."""
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
    """Streaming COCO box AP: `update` image by image, `compute` once. classes: names in id order."""

    def __init__(self, classes: Sequence[str]):
        self.classes, self.images = tuple(classes), set()
        self.truths, self.detections = [], []

    def update(self, target: dict, prediction: dict, image: int | None = None) -> None:
        """Adds one image. target: `boxes` [N, 4] (xyxy, exclusive ends), `labels` [N], optional
        `crowd` [N] and `area` [N]. prediction: `boxes`, `scores`, `labels`. All are arrays, tensors
        or lists. image: its number, by default the next; equal scores rank in this order."""
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
        """One image's boxes as `coco_ap` takes them."""
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
        """Adds the images of another process, whose numbers must differ from ours."""
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
        """Returns COCO's twelve numbers (SUMMARY) and `per_class` AP as fractions, None without
        ground truth, and the arrays `precision` and `recall`."""
        require(self.truths, "no images were given to score.")
        precision, recall = coco_ap(*self.arrays(), max(self.images) + 1, len(self.classes))
        scores = ap_scores(precision, recall, self.classes)
        return scores | {"precision": precision, "recall": recall}


# --------------------------------------------------------------------------------- segmentation

class MeanIoU:
    """Streaming mean IoU by BDD100K's rule. Pixels whose truth is 255 or another id beyond the
    classes do not count; predicted ids beyond the classes are misses; the mean is over the classes
    in the ground truth. background: a class whose pixels (by truth) the official drivable score
    leaves out; `compute` then also gives the mean over all classes."""

    def __init__(self, classes: Sequence[str], background: int | None = None):
        self.classes, self.background, n = tuple(classes), background, len(classes)
        require(n < IGNORE, f"{n} classes were given: maps of uint8 ids have room for "
                f"{IGNORE - 1}.")
        self.confusion = np.zeros((n, n + 1), np.int64)             # truth x (prediction, other)

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Adds one image: two uint8 arrays of one shape."""
        require(truth.shape == prediction.shape and truth.dtype == prediction.dtype == np.uint8,
                f"truth {truth.dtype} {truth.shape} and prediction {prediction.dtype} "
                f"{prediction.shape} were given: expected uint8 maps of one shape.")
        self.confusion += pair_counts(truth, prediction, len(self.classes))

    def merge(self, other: "MeanIoU") -> None:
        """Adds the counts of another process."""
        self.confusion += other.confusion

    def compute(self) -> dict:
        """Returns fractions: `mIoU`, `per_class` (None without ground truth), `mIoU_3class` if there
        is a background class. `mAcc`, `fIoU` and `pAcc` are the toolkit's: mean over classes of
        hits / predicted pixels, IoU weighted by the classes' pixels, hits / pixels. `rule` states
        the average in words."""
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
    """Pixels, hits, IoU, and hits / predicted pixels of the counted classes (by truth)."""
    confusion = confusion[counted]
    pixels, predicted = confusion.sum(1), confusion[:, counted].sum(0)
    hits = confusion[range(len(counted)), counted]
    ious = hits / np.maximum(pixels + predicted - hits, 1)
    return pixels, hits, ious, hits / np.maximum(predicted, 1)


def pair_counts(truth: np.ndarray, prediction: np.ndarray, n: int) -> np.ndarray:
    """Counts the pixels of each pair of ids: int64 [n, n + 1], truth by prediction; predicted ids
    from n on count as n. It counts runs of equal pairs instead of pixels, which is several times as
    fast on maps, whose classes are areas."""
    truth, prediction = truth.ravel(), prediction.ravel()
    ends = np.flatnonzero((truth[1:] != truth[:-1]) | (prediction[1:] != prediction[:-1]))
    last = np.append(ends, len(truth) - 1)[:len(truth)]     # of each run; none in an empty map
    pairs = np.minimum(truth[last], n).astype(np.intp) * (n + 1) + np.minimum(prediction[last], n)
    lengths = np.diff(last, prepend=-1)
    counts = np.bincount(pairs, weights=lengths, minlength=(n + 1) ** 2)    # exact in float64
    return counts.astype(np.int64).reshape(n + 1, n + 1)[:n]


def meter_of(task: str, classes: Sequence[str] | None = None) -> DetectionAP | MeanIoU:
    """The meter that scores a task by BDD100K's rules."""
    classes = CLASSES[task] if classes is None else classes
    if kind_of(task) == "boxes":
        return DetectionAP(classes)
    return MeanIoU(classes, background_of(task, classes))


# ------------------------------------------------------------------------------ scoring a model

def export_model(model: torch.nn.Module, path: Path, shape: Sequence[int]) -> None:
    """Writes a CPU model's `predict_batch` in float32 as a file that torch.export.load reads without
    this code, for images [B, 3, H, W] of one shape (H, W). Its results still hold boxes without
    area, which `predictions` drops."""
    images = torch.zeros(2, 3, *shape, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        model.forward = model.predict_batch                 # what torch.export traces
        program = torch.export.export(model, (images,), dynamic_shapes=batch)
    with warnings.catch_warnings(), written_whole(path) as file:
        warnings.simplefilter("ignore")                     # that channels_last is not contiguous
        torch.export.save(program, file)


def predictions(predict: Callable, data, batches: Sequence[Sequence[int]], device: torch.device, *,
                workers: int = 0, tasks: Sequence[str] = (), amp: torch.dtype | None = None,
                desc: str = "predict", strict: bool = True) -> Iterator[list[tuple]]:
    """Yields for each batch of indices the list of its (i, image, target, prediction).

    predict: takes indices and images, returns one prediction (a dict) each; they are yielded on the
    CPU, without boxes of no area, which lie outside the image. data: anything with `image(i)`.
    tasks: the targets hold these labels. strict: of `read_items`.
    """
    gpu = device.type == "cuda"
    loader = DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=gpu,
                        collate_fn=partial(read_items, data, tasks, strict),
                        worker_init_fn=leave_signals)

    def start(items: list[tuple]) -> tuple:
        """Queues a batch on the device: its items, results and, on a GPU, the end of the copies."""
        indices, images = [i for i, *_ in items], [image for _, image, _ in items]
        with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
            results = [{key: value.to("cpu", non_blocking=True) for key, value in result.items()}
                       for result in (predict(indices, images) if items else [])]
        return items, results, torch.cuda.current_stream(device).record_event() if gpu else None

    def finish(items: list[tuple], results: list[dict], event) -> list[tuple]:
        if event:
            event.synchronize()
        for result in results:
            if "boxes" in result:
                solid = (result["boxes"][:, 2:] - result["boxes"][:, :2]).amin(1) > 1e-3
                result |= {key: result[key][solid] for key in ("boxes", "scores", "labels")}
        return [(*item, result) for item, result in zip(items, results)]

    with tqdm(total=sum(map(len, batches)), desc=desc, unit="img", leave=False, mininterval=0.5,
              disable=rank_and_world()[0] > 0) as bar:
        queued = None               # a GPU predicts this batch while the caller uses the one before
        for items in loader:
            bar.update(len(items))
            ready, queued = queued, start(items)
            if ready:
                yield finish(*ready)
        if queued:
            yield finish(*queued)


def model_predictions(model, data, indices: Sequence[int], batch: int,
                      **options) -> Iterator[tuple]:
    """Yields (i, image, target, prediction) of this process's share of the images, every world-th.
    options: of `predictions`."""
    rank, world = rank_and_world()
    mine = [int(i) for i in indices[rank::world]]
    batches = [mine[n:n + batch] for n in range(0, len(mine), batch)]
    device = next(model.parameters()).device
    return itertools.chain.from_iterable(predictions(
        lambda _, images: model.predict(images), data, batches, device, **options))


def evaluate(model, data: LabelledImages, *, keep: Callable | None = None,
             save: str | Path | None = None, batch: int = 4, **options) -> dict:
    """Scores a model on the images that are labelled for any of its tasks. In a distributed run the
    processes share the images and all get the same scores.

    keep: called with (i, image, target, prediction) of every image of this process. save: folder
    for the predictions, also those of unlabelled images, in BDD100K's layout, and in coco/ COCO's.
    options: of `predictions`. Returns, in percent, what each task's meter computes, for the tasks
    that model and data share, and the number of scored "images".
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
    indices = np.arange(len(data)) if save else labelled
    writer = LabelWriter(save, data.split, data.classes) if save else None
    for i, image, target, prediction in model_predictions(
            model, data, indices, batch, tasks=tasks, desc="evaluate", **options):
        exact = {"boxes": data.boxes[data.box_slice(i)]} if "boxes" in target else {}  # float64
        update_meters(meters, target | exact, prediction, i)
        if writer:
            writer.add(data.files[i], prediction)
        if keep:
            keep(i, image, target, prediction)
    meters, *others = from_all_ranks(meters)
    for other in others:
        for task in tasks:
            meters[task].merge(other[task])
    if writer:
        writer.close()
        if rank_and_world()[0] == 0 and "detection" in meters:
            write_coco(Path(save) / "coco", data, meters["detection"])
    scores = {task: percent(meter.compute()) for task, meter in meters.items()}
    return scores | {"images": len(labelled)}


def update_meters(meters: dict, target: dict, prediction: dict, image: int | None = None) -> None:
    """Adds an image to the meters of the tasks that it is labelled for."""
    for task, meter in meters.items():
        if kind_of(task) == "boxes" and "boxes" in target:
            meter.update(target, prediction, image)
        elif task in target:
            meter.update(target[task].numpy(), prediction[task].numpy())


def percent(value):
    """Scores to print and write: fractions times 100, without the arrays of curves."""
    if isinstance(value, dict):
        return {key: percent(v) for key, v in value.items() if not isinstance(v, np.ndarray)}
    return 100 * value if isinstance(value, float) else value


COLUMNS = {"mAP": ("detection", "AP"), "AP50": ("detection", "AP50"),
           "AP75": ("detection", "AP75"), "mIoU (SS)": ("semantic", "mIoU"),
           "mIoU (DA)": ("drivable", "mIoU"), "DA 3-cl.": ("drivable", "mIoU_3class")}


def table(scores: dict, name: str = "") -> str:
    """The paper's columns, then every class; "-" without ground truth."""
    def cell(value):
        return f"{'-' if value is None else format(value, '.1f'):>9}"

    numbers = [scores.get(task, {}).get(key) for task, key in COLUMNS.values()]
    lines = [f"{name or 'in percent':<24}" + " ".join(f"{column:>9}" for column in COLUMNS),
             f"{str(scores['images']) + ' images':<24}" + " ".join(map(cell, numbers))]
    for task in (task for task in CLASSES if task in scores):
        lines.append(f"  {task} ({'AP' if kind_of(task) == 'boxes' else 'IoU'})")
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
    """Paints one task of a prediction or target on a photo: a mask, or boxes, the best on top. Also
    returns the ids of the classes shown. scale: from the image's pixels to the photo's."""
    pixels, shown = np.array(photo), set()
    if task in result:
        ids = Image.fromarray(result[task].numpy()).resize(photo.size, Image.Resampling.NEAREST)
        ids = np.asarray(ids)
        known = (ids < len(names)) & (ids != background_of(task, names))
        colours = COLOURS[task][ids[known] % len(COLOURS[task])]
        pixels[known] = (1 - OPACITY) * pixels[known] + OPACITY * colours
        shown.update(np.unique(ids[known]).tolist())
    photo = Image.fromarray(pixels)
    if kind_of(task) == "mask" or "boxes" not in result:
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
    """Draws a sheet for an image [3, H, W]: three panels `width` wide with predicted boxes, semantic
    map and drivable area, below them the ground truth's, and a legend."""
    font, scale = ImageFont.load_default(size=width / 45), width / image.shape[2]
    photo, line = Image.fromarray(image.permute(1, 2, 0).numpy()), round(width / 30)
    photo = photo.resize((width, max(1, round(scale * photo.height))), Image.Resampling.BICUBIC)
    strips = {f"prediction {title}": prediction} | ({"ground truth": truth} if truth else {})
    bottom = len(strips) * (photo.height + line)
    most = max(len(names) for names in classes.values())            # swatches, three in a line
    sheet = Image.new("RGB", (3 * width + 8, bottom + (most + 2) // 3 * line), "white")
    pen, shown, end = ImageDraw.Draw(sheet), {task: set() for task in COLOURS}, bottom
    for y, (name, result) in zip(range(0, bottom, photo.height + line), strips.items()):
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
    """Keeps the worst predicted images of an evaluation and draws them, worst first."""

    def __init__(self, folder: str | Path, count: int, data: LabelledImages):
        self.folder, self.count, self.data, self.worst = Path(folder), count, data, []

    def __call__(self, i: int, image: Tensor, target: dict, prediction: dict) -> None:
        """Scores one image: the mean over the target's tasks of this image's AP50 or mIoU."""
        meters = {task: meter_of(task, names) for task, names in self.data.classes.items()
                  if ("boxes" if kind_of(task) == "boxes" else task) in target}
        update_meters(meters, target, prediction)
        values = [meter.compute()["AP50" if kind_of(task) == "boxes" else "mIoU"]
                  for task, meter in meters.items()]
        values = [value for value in values if value is not None]
        score = sum(values) / len(values) if values else 1.
        self.worst.append((score, i, image, target, prediction))
        self.worst.sort(key=lambda entry: entry[:2])
        del self.worst[self.count:]

    def close(self) -> None:
        """Called by all processes; each draws those of the worst that it holds."""
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
    """The images at a path: a file, a folder, or a pattern such as 'photos/*.jpg'."""

    def __init__(self, path: str):
        files = [path] if Path(path).exists() else glob.glob(path)
        if Path(path).is_dir():
            files = Path(path).iterdir()
        self.files = sorted(file for file in map(Path, files) if file.suffix.lower() in SUFFIXES)
        require(self.files, f"no jpg or png images at {path}: give a file, a folder or a quoted "
                "pattern.")

    def image(self, i: int) -> Tensor:
        return read_image(self.files[i])


def draw_images(model, data: ImageFiles, folder: Path, batch: int, count: int | None = None,
                **options) -> int:
    """Draws a model's predictions for images; returns their number. options: of `predictions`."""
    files = data.files[:count]
    names = [folder / f"{n:03d}_{file.stem}.png" for n, file in enumerate(files, start=1)]
    overwritten = {name.resolve() for name in names} & {file.resolve() for file in data.files}
    require(not overwritten, f"{folder} holds the images themselves: draw into another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for i, image, _, prediction in model_predictions(model, data, range(len(files)), batch,
                                                     desc="draw", **options):
        draw(image, prediction, title=files[i].stem, classes=model.classes).save(names[i])
    return len(files)


CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#999999", "#000000")


def draw_curves(log: Path) -> None:
    """Draws a training log as curves.png beside it, over its lines: losses by task, learning rate
    and validation scores, from 0 to 1.1 times the 95th percentile. Names show the last values."""
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    losses, rates, scores = {}, {}, {}                              # name: points
    for x, line in enumerate(lines):
        if "lr" in line:
            rates.setdefault("learning rate", []).append((x, line["lr"]))
        for task in CLASSES:
            loss = sum(value for key, value in line.items() if key.startswith(f"{task}_"))
            if 0 < loss < math.inf:
                losses.setdefault(f"{task} loss", []).append((x, loss))
        for column, (task, key) in COLUMNS.items():
            score = line.get("val", {}).get(task, {}).get(key)
            if score is not None:
                scores.setdefault(column, []).append((x, score))
    sheet = Image.new("RGB", (1000, 660), "white")
    pen, starts = ImageDraw.Draw(sheet), {}
    for x, line in enumerate(lines):
        starts.setdefault(line["stage"], 1000 * x / len(lines))
    for bottom, curves in ((210, losses), (430, rates), (650, scores)):
        for stage, x in starts.items():
            pen.line((x, bottom - 200, x, bottom), "#cccccc")
            pen.text((x + 3, bottom - 12), stage, "#999999")
        values = [y for points in curves.values() for _, y in points]
        top = 1.1 * np.percentile(values or [1.], 95) or 1.
        for k, (name, points) in enumerate(curves.items()):
            places = [(1000 * (x + 0.5) / len(lines), bottom - 200 * min(y / top, 1))
                      for x, y in points]
            pen.text((5 + 160 * k, bottom - 198), f"{name} {points[-1][1]:.4g}", CURVE_COLOURS[k])
            pen.line(places, CURVE_COLOURS[k], width=2)
            for x, y in places if curves is scores else ():
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), CURVE_COLOURS[k])
        pen.rectangle((0, bottom - 200, 999, bottom), outline="black")
    sheet.save(log.with_name("curves.png"))


# --------------------------------------------------------------------------------- command line

BATCH = {"cuda": 8, "cpu": 4}           # images at a time in prediction, by type of device
WORKERS = {"cuda": 8, "cpu": 0}         # processes that read images


def this_device() -> torch.device:
    """Chooses this process's device; if torchrun started several processes, joins them."""
    gpu, device = torch.cuda.is_available(), torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")       # TF32, as convolutions have by default
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=6))
    return device


def amp_type(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type that --amp means on a device; None = float32. auto: bf16 if the hardware
    has it, else fp16 on a GPU and float32 on a CPU."""
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
                      "there and list the bad files; default: the folder that train.py takes")
    add("--dt", metavar="PATH", type=Path,
        help="the predictions: COCO results, Scalabel JSON, a folder of PNG masks")
    add("--task", choices=CLASSES, default="detection",
        help="of --gt and --dt: detection (default) for JSON, the others for folders of PNG masks")
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
    """An argument type: whole numbers from `least` on."""
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} was given, expected a whole number from "
                                             f"{least} on.")
        return int(text)
    return read


def run_checkpoint(args: argparse.Namespace) -> dict:
    """Scores a checkpoint, exports it, or draws its predictions for --images. Processes started by
    torchrun share the work."""
    import hmpl

    path = args.ckpt or max(Path("runs").rglob("*.pt"), key=os.path.getmtime, default=None)
    require(path, "no checkpoint under runs/: train one with train.py, or name one with --ckpt "
            "FILE.")
    device = this_device()
    try:
        checkpoint, model = hmpl.load_checkpoint(path), hmpl.load_model(path, device)
    except hmpl.WeightsError as error:
        raise InputError(str(error)) from error
    config = checkpoint["config"]
    reader = partial(DATASETS[config.get("dataset", "bdd100k")], Path(args.data or config["data"]))
    if args.export:
        require("detection" not in model.classes or checkpoint["model_config"]["heads"] != "conv",
                f"--export was given, but {path} has Faster R-CNN's head, whose NMS torch.export "
                "does not write for any number of images: export one of --heads transformer.")
        images = ImageFiles(args.images) if args.images else reader(args.split)
        if rank_and_world()[0] == 0:
            export_model(model.cpu(), Path(args.export), images.image(0).shape[1:])
        return {}
    workers = WORKERS[device.type] if args.workers is None else args.workers
    options = dict(batch=args.batch or BATCH[device.type], workers=workers,
                   amp=amp_type(config["amp"], device))
    if args.images:
        images = ImageFiles(args.images)
        return {"images": draw_images(model, images, Path(args.show), count=args.count, **options)}
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
    """An error's message, taken out of the traceback if a worker process raised it."""
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
            require(check_data(root, args.dataset, workers), "bad files were found, see above.")
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
