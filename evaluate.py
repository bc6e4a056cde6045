"""Ground truth on disk, scores and pictures: BDD100K's files and rules, without its toolkit.

    python evaluate.py --ckpt runs/disjoint_normal/finetune.pt --data data/bdd100k     # a table
    python evaluate.py --ckpt                        # the newest checkpoint under runs/, its own data
    python evaluate.py --ckpt X --json scores.json --save predictions --show pictures --count 8
    python evaluate.py --ckpt X --images 'photos/*.jpg' --show pictures               # no labels needed
    python evaluate.py --gt instances.json --dt results.json                          # files: COCO, Scalabel, PNGs
    torchrun --nproc_per_node=8 evaluate.py --ckpt X                                   # the same numbers

    BDD100K        reader of the official layout; any kind of label may be absent, wholly or per image
    NuImages       reader of the official tables: detection and semantic labels of the keyframes
    LabelWriter    writes predictions in the same layout (Scalabel JSON, PNG masks)
    DetectionAP    COCO box AP (bit-identical to pycocotools), on BDD100K's inclusive boxes; `coco_ap` from arrays
    MeanIoU        BDD100K's mIoU from a streaming confusion matrix, drivable's two conventions included
    score_files    scores files against files; `evaluate` a model on a data set; `draw` shows what it sees

In memory boxes are xyxy with x2 and y2 exclusive, so that width = x2 - x1; BDD100K's files hold inclusive
pixel coordinates, width = x2 - x1 + 1 (`from_inclusive`, `to_inclusive`: the only two places).

Example:

>>> ap = DetectionAP(["car", "bus"])
>>> ap.update({"boxes": [[10, 10, 50, 40]], "labels": [0]},
...           {"boxes": [[15, 10, 50, 40]], "scores": [0.9], "labels": [0]})
>>> scores = ap.compute()                                              # fractions; None: no such object
>>> round(scores["AP"], 3), scores["per_class"]["bus"]
(0.8, None)
>>> iou = MeanIoU(["direct", "alternative", "background"], background=2)
>>> iou.update(np.uint8([[0, 0, 1, 2]]), np.uint8([[0, 1, 1, 0]]))     # ground truth, prediction
>>> iou.compute()["mIoU"], iou.compute()["mIoU_3class"]                # the official rule, all classes
(0.5, 0.27777777777777773)
"""
import argparse
import base64
import datetime
import glob
import heapq
import json
import os
import re
import signal
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

CLASSES = {
    "detection": ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
                  "traffic light", "traffic sign"),
    "semantic": ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
                 "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
                 "motorcycle", "bicycle"),
    "drivable": ("direct", "alternative", "background"),
}
NUIMAGES = {  # nuImages' categories: the semantic class of each, and its detection class where it has one
    "animal": ("animal", None), "flat.driveable_surface": ("driveable surface", None),
    "human.pedestrian.adult": ("adult", "pedestrian"), "human.pedestrian.child": ("child", "pedestrian"),
    "human.pedestrian.construction_worker": ("construction worker", "pedestrian"),
    "human.pedestrian.personal_mobility": ("personal mobility", None),
    "human.pedestrian.police_officer": ("police officer", "pedestrian"),
    "human.pedestrian.stroller": ("stroller", None), "human.pedestrian.wheelchair": ("wheelchair", None),
    "movable_object.barrier": ("barrier", "barrier"), "movable_object.debris": ("debris", None),
    "movable_object.pushable_pullable": ("pushable object", None),
    "movable_object.trafficcone": ("traffic cone", "traffic cone"),
    "static_object.bicycle_rack": ("bicycle rack", None), "vehicle.bicycle": ("bicycle", "bicycle"),
    "vehicle.bus.bendy": ("bendy bus", "bus"), "vehicle.bus.rigid": ("rigid bus", "bus"), "vehicle.car": ("car", "car"),
    "vehicle.construction": ("construction vehicle", "construction vehicle"), "vehicle.ego": ("ego vehicle", None),
    "vehicle.emergency.ambulance": ("ambulance", None), "vehicle.emergency.police": ("police car", None),
    "vehicle.motorcycle": ("motorcycle", "motorcycle"), "vehicle.trailer": ("trailer", "trailer"),
    "vehicle.truck": ("truck", "truck"),
}
RENAMED = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian", "van": "car"}
IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}  # become crowd regions
MASK_FOLDERS = {"semantic": "labels/sem_seg/masks", "drivable": "labels/drivable/masks"}
IGNORE = 255
MAX_PIXELS = 5 * 10 ** 7                          # of an image or mask; more is no photo but an attack or a mistake
SAMPLE = Path(__file__).resolve().parent / "tests" / "roads"

SEMANTIC_COLOURS = np.array(  # BDD100K's palette, by trainId, and six more
    [[128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156], [190, 153, 153], [153, 153, 153],
     [250, 170, 30], [220, 220, 0], [107, 142, 35], [152, 251, 152], [70, 130, 180], [220, 20, 60],
     [255, 0, 0], [0, 0, 142], [0, 0, 70], [0, 60, 100], [0, 80, 100], [0, 0, 230], [119, 11, 32],
     [255, 170, 150], [120, 60, 200], [0, 200, 200], [200, 255, 120], [90, 50, 20], [240, 240, 240]], np.uint8)
DRIVABLE_COLOURS = np.array([[0, 114, 178], [230, 159, 0]], np.uint8)     # Okabe-Ito: safe for colour-blind eyes
MIN_SCORE = 0.3                                   # of a box to be drawn
BOX_COLOURS = ("#e69f00", "#d55e00", "#56b4e9", "#0072b2", "#009e73", "#999999", "#cc79a7", "#b2df8a",
               "#f0e442", "#ffffff")


class InputError(ValueError):
    """Files that cannot be used; the message names the file and the entry and says what to do."""


# --------------------------------------------------------------------------------- ground truth

def from_inclusive(box2d: dict) -> tuple[float, float, float, float]:
    """BDD100K's box2d, whose last pixel belongs to the box, -> x1, y1, x2, y2 with exclusive ends."""
    return box2d["x1"], box2d["y1"], box2d["x2"] + 1, box2d["y2"] + 1


def to_inclusive(box: Sequence[float]) -> dict:
    return {"x1": box[0], "y1": box[1], "x2": box[2] - 1, "y2": box[3] - 1}


def find_data(given: str | None = None, dataset: str = "bdd100k") -> Path:
    """The data folder: the one given, else $BDD100K, else data/bdd100k, else the sample in tests/roads; for nuImages
    $NUIMAGES, else data/nuimages."""
    if given is not None:
        return Path(given)
    places = [Path(p) for p in (os.environ.get(dataset.upper()), f"data/{dataset}") if p]
    found = next((p for p in places if p.is_dir()), SAMPLE if dataset == "bdd100k" else None)
    if found is None:
        raise InputError(f"no {dataset} data: give its folder with --data, or put it in {places[-1]}.")
    return found


def read_json(path: Path, **how):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f, **how)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{path} is not valid JSON ({broken}): fetch or write it anew.") from None


def read_frames(path: Path, frames) -> list[dict]:
    """The frames of a Scalabel JSON file's content (a list or {"frames": [...]}), each with a name of its own and a list
    of labels."""
    frames = frames.get("frames") if isinstance(frames, dict) else frames
    if not isinstance(frames, list):
        raise InputError(f"{path} holds no list of frames: expected Scalabel JSON, [...] or {{'frames': [...]}}.")
    names = set()
    for i, entry in enumerate(frames):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError(f"{path}: frame {i} has no name: expected {{'name': 'IMAGE.jpg', 'labels': [...]}}.")
        if not isinstance(entry.get("labels"), list | None):
            raise InputError(f"{path}: frame {entry['name']} has labels {entry['labels']!r:.200}: expected a list.")
        if Path(entry["name"]).stem in names:
            raise InputError(f"{path}: frame {Path(entry['name']).stem} occurs more than once: keep one of them, names "
                             "without folder and ending must differ.")
        names.add(Path(entry["name"]).stem)
    return frames


def read_scalabel(path: Path, classes: Sequence[str], content, predicted: bool = False) -> dict[str, np.ndarray]:
    """Boxes of a Scalabel JSON file's content, renamed and validated.

    Returns flat arrays of N boxes over F frames: `names` [F] (stems), `frame` [N] (index into names),
    `boxes` [N, 4] float64 exclusive xyxy, `labels` [N] uint8, `crowd` [N] bool. A frame whose `labels`
    are missing or null is an image without objects. Raises InputError naming the frame and the label.
    predicted: the labels need a score in [0, 1] (`scores` [N]); other categories have label -1.
    """
    frames = read_frames(path, content)
    ids, rows = {name: i for i, name in enumerate(classes)}, []
    for i, entry in enumerate(frames):
        for j, label in enumerate(entry.get("labels") or []):
            rows.append((i, *read_label(label, ids, predicted, f"{path}: frame {entry['name']}, label {j}")))
    frame, boxes, labels, crowd, scores = zip(*rows) if rows else ((), (), (), (), ())
    return {"names": np.array([Path(entry["name"]).stem for entry in frames], dtype=str),
            "frame": np.array(frame, np.int64), "boxes": np.array(boxes, np.float64).reshape(-1, 4),
            "labels": np.array(labels, np.int16 if predicted else np.uint8), "crowd": np.array(crowd, bool),
            **({"scores": np.array(scores, np.float64)} if predicted else {})}


def read_scalabel_file(path: Path, classes: Sequence[str], cache: Path | None = None) -> dict[str, np.ndarray]:
    """`read_scalabel` of a file. cache: a folder for what was read, which serves as long as the file has the same size and
    time: of BDD100K's 69,863 training images a second instead of a quarter of a minute."""
    if cache is None:
        return read_scalabel(path, classes, read_json(path))
    about, place = path.stat(), str(path.resolve())
    key = f"{place} {about.st_size} {about.st_mtime_ns} {list(classes)}"
    kept = cache / f"{path.stem}_{zlib.crc32(place.encode()):08x}.npz"
    try:
        with np.load(kept) as arrays:
            if arrays["key"] == key:
                return {name: arrays[name] for name in ("names", "frame", "boxes", "labels", "crowd")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):             # not there, or damaged
        pass
    read = read_scalabel(path, classes, read_json(path))
    if rank_and_world()[0] == 0:
        cache.mkdir(parents=True, exist_ok=True)
        with open(kept.with_suffix(".part"), "wb") as f:
            np.savez(f, key=key, **read)
        os.replace(kept.with_suffix(".part"), kept)
    return read


def read_label(label: dict, ids: dict[str, int], predicted: bool, where: str) -> tuple[tuple, int, bool, float]:
    """One Scalabel label -> (box, class id, crowd, score); `where` begins the message of what is wrong."""
    name = label.get("category") if isinstance(label, dict) else None
    category = IGNORED.get(name, RENAMED.get(name, name)) if isinstance(name, str) else None
    if category not in ids and not (predicted and category):
        raise InputError(f"{where} has category {name!r}: expected one of {', '.join(ids)}.")
    try:
        corners = {key: label["box2d"][key] for key in ("x1", "y1", "x2", "y2")}
        good = all(type(value) in (int, float) and abs(value) < 1e6 for value in corners.values())         # False for NaN
        box = from_inclusive(corners)
        good = good and box[0] < box[2] and box[1] < box[3]
    except (KeyError, TypeError):
        good = False
    if not good:
        raise InputError(f"{where} has box2d {label.get('box2d')!r:.200}: expected finite x1 <= x2 and y1 <= y2 in pixels.")
    attributes = label.get("attributes") if isinstance(label.get("attributes"), dict) else {}
    marks = [attributes.get("crowd"), attributes.get("ignored")]
    if not all(isinstance(mark, bool | int | None) for mark in marks):
        raise InputError(f"{where} has crowd {marks[0]!r:.200}, ignored {marks[1]!r:.200}: expected true or false.")
    crowd, score = name in IGNORED or any(marks), label.get("score")
    if predicted and not (type(score) in (int, float) and 0 <= score <= 1):
        raise InputError(f"{where} has score {score!r:.200}: expected a number from 0 to 1.")
    return box, ids.get(category, -1), crowd, score or 0.


def open_picture(path: Path) -> Image.Image:
    """A decoded picture; raises InputError naming the file when it is missing, broken or cut off."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height}, expected at most {MAX_PIXELS} pixels")
            picture.load()
            return picture
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as broken:
        raise InputError(f"{path} cannot be read as an image ({broken}): fetch it anew.") from None


def read_image(path: Path) -> Tensor:
    """uint8 RGB [3, H, W] of a JPEG or PNG."""
    return torch.from_numpy(np.array(open_picture(path).convert("RGB"))).permute(2, 0, 1)


def read_mask(path: Path, num_classes: int = IGNORE) -> np.ndarray:
    """uint8 [H, W] of class ids below num_classes, or 255, from an 8-bit single-channel PNG."""
    picture = open_picture(path)
    if picture.mode != "L":
        raise InputError(f"{path} is a picture of mode {picture.mode}, not class ids: expected an 8-bit single-channel "
                         "PNG from labels/*/masks (not from colormaps).")
    mask = np.array(picture)
    wrong = mask[(mask >= num_classes) & (mask != IGNORE)]
    if len(wrong):
        raise InputError(f"{path} holds id {wrong.min()}: expected 0 to {num_classes - 1}, or 255 for ignored.")
    return mask


class LabelledImages:
    """One split of a data set: what the two readers share.

    Images are numbered in the order of their `stems`; `files` are their paths below `root`. `labelled[task]` tells which
    have labels. Boxes live in flat arrays, not in Python objects, so that worker processes share them: image i has those
    from offsets[i] to offsets[i + 1] of `boxes` [N, 4] float64, `box_labels` [N] and `crowd` [N].
    """

    classes: dict[str, tuple[str, ...]]
    size: tuple[int, int]                     # of the images, width and height

    def __len__(self) -> int:
        return len(self.stems)

    def keep_boxes(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> None:
        """Stores boxes by their image; those of image -1 are left out."""
        order = np.argsort(image, kind="stable")[np.count_nonzero(image < 0):]
        self.boxes, self.box_labels, self.crowd = boxes[order], labels[order], crowd[order]
        self.offsets = np.searchsorted(image[order], np.arange(len(self) + 1))

    def mask(self, task: str, i: int) -> np.ndarray:
        """uint8 class ids [H, W] of image i, 255 = ignored."""
        raise NotImplementedError

    def mask_name(self, task: str, i: int) -> str:
        """Where the mask comes from, for messages."""
        raise NotImplementedError

    def image(self, i: int) -> Tensor:
        """uint8 RGB [3, H, W]."""
        return read_image(self.root / self.files[i])

    def target(self, i: int, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Labels of image i for those of the tasks (default: all) that it has: `boxes` [N, 4] float32, `labels` [N]
        int64, `crowd` [N] bool; `semantic`, `drivable` uint8 [H, W]."""
        target = {}
        for task in self.classes if tasks is None else tasks:
            if not self.labelled[task][i]:
                continue
            if task == "detection":
                own = slice(self.offsets[i], self.offsets[i + 1])
                target |= {"boxes": torch.from_numpy(self.boxes[own].astype(np.float32)),
                           "labels": torch.from_numpy(self.box_labels[own].astype(np.int64)),
                           "crowd": torch.from_numpy(self.crowd[own].copy())}
            else:
                target[task] = torch.from_numpy(self.mask(task, i))
        return target

    def sized_target(self, i: int, image: Tensor, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The target of image i [3, H, W], whose masks must have the image's size."""
        target = self.target(i, tasks)
        for task in MASK_FOLDERS.keys() & target.keys():
            if target[task].shape != image.shape[1:]:
                (h, w), (image_h, image_w) = target[task].shape, image.shape[1:]
                raise InputError(f"{self.mask_name(task, i)} is {w}x{h}, its image {self.files[i]} "
                                 f"{image_w}x{image_h}: masks must have the image's size.")
        return target

    def sample(self, i: int, tasks: Iterable[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Image i with its target."""
        image = self.image(i)
        return image, self.sized_target(i, image, tasks)


class BDD100K(LabelledImages):
    """One split of a data set in BDD100K's official layout.

    root: holds images/100k/{split} and images/10k/{split} (jpg or png; a stem found in both counts once).
    labels: the folder that holds labels/det_20/det_{split}.json, labels/sem_seg/masks/{split} and
        labels/drivable/masks/{split}, by default root. Each may be missing, as may any image in it.
    cache: a folder where the boxes are kept once read (`read_scalabel_file`).
    """

    classes, size = CLASSES, (1280, 720)

    def __init__(self, root: str | Path, split: str = "val", labels: str | Path | None = None, cache: Path | None = None):
        self.root, self.split, self.labels, self.cache = Path(root), split, Path(labels or root), cache
        if not self.root.is_dir():
            raise InputError(f"no data folder {root}: expected BDD100K's layout, images/100k/{split} and labels/.")
        found = self.find_images("10k") | self.find_images("100k")
        if not found:
            raise InputError(f"no images in {self.root}: expected images/100k/{split}/*.jpg or images/10k/{split}/*.jpg.")
        self.stems = np.array(sorted(found))
        self.files = np.array([found[stem] for stem in self.stems])
        self.labelled = {task: self.has_mask(task) for task in MASK_FOLDERS} | {"detection": self.read_boxes()}

    def find_images(self, kind: str) -> dict[str, str]:
        """Files below root by stem, of images/100k or images/10k."""
        folder = self.root / "images" / kind / self.split
        files = [os.path.splitext(file.name) for file in os.scandir(folder)] if folder.is_dir() else []
        return {stem: f"images/{kind}/{self.split}/{stem}{suffix}" for stem, suffix in files
                if suffix.lower() in (".jpg", ".jpeg", ".png")}

    def mask(self, task: str, i: int) -> np.ndarray:
        return read_mask(self.mask_name(task, i), len(self.classes[task]))

    def mask_name(self, task: str, i: int) -> Path:
        return self.labels / MASK_FOLDERS[task] / self.split / f"{self.stems[i]}.png"

    def has_mask(self, task: str) -> np.ndarray:
        folder = self.labels / MASK_FOLDERS[task] / self.split
        stems = [f.name[:-4] for f in os.scandir(folder) if f.name.endswith(".png")] if folder.is_dir() else []
        return np.isin(self.stems, stems)

    def read_boxes(self) -> np.ndarray:
        """Keeps the boxes; returns which images have an entry. Entries without an image are left out."""
        path = self.labels / "labels" / "det_20" / f"det_{self.split}.json"
        classes = self.classes["detection"]
        read = read_scalabel_file(path, classes, self.cache) if path.is_file() else read_scalabel(path, classes, [])
        index = {stem: i for i, stem in enumerate(self.stems)}
        image_of = np.array([index.get(name, -1) for name in read["names"]], np.int64)
        self.keep_boxes(image_of[read["frame"]], read["boxes"], read["labels"], read["crowd"])
        return np.isin(np.arange(len(self)), image_of)


class NuImages(LabelledImages):
    """The keyframes of one split of nuImages: tables in root/v1.0-{split}, images in root/samples.

    Ten detection classes (those of mmdetection3d's converter; annotations without a mask are left out) and, as semantic
    classes, all 25 annotated categories: surfaces painted first, then objects in the order of their tokens, as in
    nuImages' devkit; pixels that nobody annotated are ignored.
    """

    classes = {"detection": ("car", "truck", "trailer", "bus", "construction vehicle", "bicycle", "motorcycle", "pedestrian",
                             "traffic cone", "barrier"),
               "semantic": tuple(semantic for semantic, _ in NUIMAGES.values())}
    size = 1600, 900

    def __init__(self, root: str | Path, split: str = "val"):
        self.root, self.split = Path(root), split
        self.labels = self.root / f"v1.0-{split}"
        if not self.labels.is_dir():
            raise InputError(f"no folder {self.labels}: expected nuImages' tables there and its images in {root}/samples.")
        frames = sorted((Path(name).stem, name, token, height, width) for token, name, keyframe, height, width in self.table(
            "sample_data", token=str, filename=str, is_key_frame=bool, height=int, width=int) if keyframe)
        if not frames:
            raise InputError(f"{self.labels / 'sample_data.json'} lists no keyframes: fetch it anew.")
        self.stems, self.files = (np.array(column) for column in list(zip(*frames))[:2])
        for _, name, _, height, width in frames:
            if not name.startswith("samples/") or ".." in Path(name).parts or "\0" in name:
                raise InputError(f"{self.labels / 'sample_data.json'} names the file {name!r}: expected "
                                 "samples/CAMERA/NAME.jpg and nothing outside the data.")
            if min(height, width) < 1 or height * width > MAX_PIXELS:
                raise InputError(f"{self.labels / 'sample_data.json'}: {name} is {width}x{height}: expected pixels, at most "
                                 f"{MAX_PIXELS}.")
        self.shapes = np.array([frame[3:] for frame in frames])
        self.read_annotations({frame[2]: i for i, frame in enumerate(frames)})
        annotated = np.full(len(self), len(self.mask_ends) > 0)
        self.labelled = {"detection": annotated, "semantic": annotated}

    def table(self, name: str, /, **columns: type) -> Iterator[tuple]:
        """The columns of an official table, row by row; each value must be of its column's type."""
        path = self.labels / f"{name}.json"
        rows = read_json(path, object_hook=lambda row: {key: row[key] for key in columns if key in row} or row)
        for n, row in enumerate(rows if isinstance(rows, list) else [rows]):
            for key, kind in columns.items():
                if not (isinstance(row, dict) and key in row and isinstance(row[key], kind)):
                    value = row.get(key) if isinstance(row, dict) else row
                    raise InputError(f"{path}: entry {n} has {key} {value!r:.100}: expected nuImages' official table.")
            yield tuple(row[key] for key in columns)

    def read_annotations(self, image_of: dict[str, int]) -> None:
        """Keeps boxes, and run-length masks as one array of bytes in the order in which they are painted."""
        category, names = dict(self.table("category", token=str, name=str)), list(NUIMAGES)
        columns = dict(sample_data_token=str, category_token=str, mask=dict | None)
        annotated = any((self.labels / f"{name}_ann.json").exists() for name in ("surface", "object"))      # test is not
        surfaces = [(*row, None) for row in self.table("surface_ann", **columns)] if annotated else []
        objects = sorted(self.table("object_ann", token=str, **columns, bbox=list)
                         if annotated else [], key=lambda row: row[0])
        boxes, masks = [], []
        for frame, kind, mask, box in surfaces + [row[1:] for row in objects]:
            where = f"{self.labels}: an annotation of {frame}"
            if category.get(kind) not in NUIMAGES:
                raise InputError(f"{where} has category {category.get(kind, kind)!r}: expected one of "
                                 f"{', '.join(NUIMAGES)}.")
            if mask is None or frame not in image_of:
                continue
            i, thing = image_of[frame], NUIMAGES[category[kind]][1]
            if mask.get("size") != self.shapes[i].tolist() or not isinstance(mask.get("counts"), str):
                raise InputError(f"{where} has a mask of size {mask.get('size')!r:.50}: expected the image's, "
                                 f"{self.shapes[i].tolist()}, and base64 counts.")
            masks.append((i, names.index(category[kind]), mask["counts"].encode()))
            if thing and box is not None:
                if len(box) != 4 or not all(type(v) in (int, float) and abs(v) < 1e6 for v in box):
                    raise InputError(f"{where} has bbox {box!r:.100}: expected [xmin, ymin, xmax, ymax] in pixels.")
                if box[0] < box[2] and box[1] < box[3]:
                    boxes.append((i, box, self.classes["detection"].index(thing)))
        image, corners, labels = zip(*boxes) if boxes else ((), (), ())
        self.keep_boxes(np.array(image, np.int64), np.array(corners, np.float64).reshape(-1, 4), np.array(labels, np.uint8),
                        np.zeros(len(boxes), bool))
        masks.sort(key=lambda row: row[0])                                       # stable: the order of painting stays
        image, classes, codes = zip(*masks) if masks else ((), (), ())
        self.mask_classes, self.mask_codes = np.array(classes, np.uint8), np.frombuffer(b"".join(codes), np.uint8)
        self.mask_ends = np.cumsum([len(code) for code in codes])
        self.mask_offsets = np.searchsorted(np.array(image, np.int64), np.arange(len(self) + 1))

    def image(self, i: int) -> Tensor:
        path, samples = (self.root / self.files[i]).resolve(), (self.root / "samples").resolve()
        if samples not in path.parents:
            raise InputError(f"{self.root / self.files[i]} is a link to {path}, outside of {samples}: put the image itself "
                             "there.")
        return read_image(path)

    def mask(self, task: str, i: int) -> np.ndarray:
        height, width = self.shapes[i].tolist()
        mask = np.full((height, width), IGNORE, np.uint8)
        for j in range(*self.mask_offsets[i:i + 2]):
            code = self.mask_codes[self.mask_ends[j - 1] if j else 0:self.mask_ends[j]].tobytes()
            try:
                counts = base64.b64decode(code, validate=True).decode("ascii")
                mask[rle_decode({"size": [height, width], "counts": counts})] = self.mask_classes[j]
            except (ValueError, IndexError) as broken:
                raise InputError(f"{self.mask_name(task, i)} cannot be read ({broken}): fetch the tables anew.") from None
        return mask

    def mask_name(self, task: str, i: int) -> str:
        return f"{self.labels}: the mask of {self.files[i]}"


DATASETS = {"bdd100k": BDD100K, "nuimages": NuImages}


# ------------------------------------------------------------------------------ checking a folder

class Findings:
    """What a check finds, each kind once, with how often and its first example; `bad`: what would end a run."""

    def __init__(self):
        self.bad, self.notes = {}, {}

    def add(self, kind: str, example: str, bad: bool = True) -> None:
        kinds = self.bad if bad else self.notes
        count, first = kinds.get(kind, (0, example))
        kinds[kind] = count + 1, first

    def lines(self) -> list[str]:
        return [f"  {mark} {count} x {kind}, such as {first}" for mark, kinds in (("BAD ", self.bad), ("note", self.notes))
                for kind, (count, first) in kinds.items()]


def check_data(root: str | Path, dataset: str = "bdd100k", workers: int = 0) -> bool:
    """Walks a data folder and prints what is in it and what is wrong; returns whether a run could use all of it. Every image
    and mask is decoded. Of BDD100K the images may be missing: then the labels alone are checked."""
    if not Path(root).is_dir():
        raise InputError(f"no data folder {root}: give an existing one with --data.")
    good, stems = True, {}
    for split in ("train", "val"):
        findings = Findings()
        print(f"{root}, {split}")
        try:
            data = CheckedBDD100K(root, split, findings) if dataset == "bdd100k" else DATASETS[dataset](root, split)
            check_files(data, findings, workers)
            stems[split] = set(data.stems.tolist())
        except (InputError, OSError) as error:
            findings.add("not usable", str(error))
        print(*findings.lines(), sep="\n")
        good = good and not findings.bad
    both = stems.get("train", set()) & stems.get("val", set())
    print(f"{len(both)} images are in train and val" + (f", such as {min(both)}; training leaves them out" if both else ""))
    print("a run can use all of this" if good else "what is BAD ends a run or costs it samples")
    return good


class CheckedBDD100K(BDD100K):
    """The reader, which notes what is wrong with the boxes and leaves it out, where the reader would end."""

    def __init__(self, root: str | Path, split: str, findings: Findings):
        self.findings = findings
        self.root, self.split, self.labels = Path(root), split, Path(root)
        large, small = self.find_images("100k"), self.find_images("10k")
        files = small | large
        self.without_images = not files
        masks = {task: [file.stem for file in (self.labels / folder / split).glob("*.png")]
                 for task, folder in MASK_FOLDERS.items()}
        for stem in sorted(set().union(*masks.values())) if self.without_images else ():
            files[stem] = f"{stem}.jpg"
        self.stems, self.files = np.array(sorted(files), str), np.array([files[stem] for stem in sorted(files)], str)
        self.labelled = {task: self.has_mask(task) for task in MASK_FOLDERS} | {"detection": self.read_boxes()}
        has = ", ".join(f"{task} {np.count_nonzero(own)}" for task, own in self.labelled.items())
        print(f"  images: {len(large)} in 100k, {len(small)} in 10k, {len(large.keys() & small.keys())} in both; "
              f"labelled: {has}")
        if self.without_images:
            findings.add("no images", f"{root}/images/100k/{split}/*.jpg; the labels alone are checked")
        for task, own in masks.items():
            for stem in set(own) - files.keys():
                findings.add(f"{task} mask without an image", f"{stem}.png", bad=False)
        for kind, own, task in (("100k", large, "detection"), ("100k", large, "drivable"), ("10k", small, "semantic")):
            for stem in own.keys() - set(self.stems[self.labelled[task]].tolist()) if self.labelled[task].any() else ():
                findings.add(f"image of {kind} without {task} labels", own[stem], bad=False)

    def read_boxes(self) -> np.ndarray:
        path = self.labels / "labels" / "det_20" / f"det_{self.split}.json"
        ids, index = {name: i for i, name in enumerate(CLASSES["detection"])}, {stem: i for i, stem in enumerate(self.stems)}
        rows, entries = [], np.zeros(len(self), bool)
        for frame in read_frames(path, read_json(path)) if path.is_file() else ():
            image = index.get(Path(frame["name"]).stem, -1)
            if image >= 0:
                entries[image] = True
            elif not self.without_images:
                self.findings.add("entry without an image", frame["name"], bad=False)
            for j, label in enumerate(frame.get("labels") or []):
                where = f"{path}: frame {frame['name']}, label {j}"
                try:
                    rows.append((image, *read_label(label, ids, False, where)[:3]))
                except InputError as wrong:                                       # "WHERE has category 'lamp': ..."
                    self.findings.add(f"label with a wrong {str(wrong).removeprefix(where).split()[1]}", str(wrong))
        image, boxes, labels, crowd = zip(*rows) if rows else ((), (), (), ())
        self.all_labels = np.bincount(np.array(labels, np.int64), minlength=len(ids))
        self.keep_boxes(np.array(image, np.int64), np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.uint8),
                        np.array(crowd, bool))
        return entries


class FilesOf(torch.utils.data.Dataset):
    """What every image of a data set and its masks are: (row, size, {task: (pixels of each id, size)}); in place of what
    cannot be read, the reason."""

    def __init__(self, data: LabelledImages):
        self.data, self.images = data, not getattr(data, "without_images", False)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[int, tuple | str | None, dict]:
        data, masks = self.data, {}
        image = tried(data.image, i) if self.images else None
        size = tuple(image.shape[1:]) if isinstance(image, Tensor) else image
        for task, own in data.labelled.items():
            if task != "detection" and own[i]:
                mask = tried(data.mask, task, i)
                masks[task] = mask if isinstance(mask, str) else (np.bincount(mask.ravel(), minlength=256), mask.shape)
        return i, size, masks


def tried(read: Callable, *args):
    """What a reader gives, or why it cannot."""
    try:
        return read(*args)
    except (InputError, OSError) as error:
        return str(error)


def check_files(data: LabelledImages, findings: Findings, workers: int) -> None:
    """Decodes all images and masks; prints sizes and the classes' histograms."""
    sizes, pixels = {}, {task: np.zeros(256, np.int64) for task in data.labelled if task != "detection"}
    loader = torch.utils.data.DataLoader(FilesOf(data), batch_size=None, num_workers=workers, collate_fn=tuple,
                                         worker_init_fn=leave_signals)
    for i, size, masks in tqdm(loader, desc=f"check {data.split}", unit="img", leave=False):
        if isinstance(size, str):
            findings.add("unreadable image", size)
        elif size:
            sizes[size] = sizes.get(size, 0) + 1
            x1, y1, x2, y2 = data.boxes[data.offsets[i]:data.offsets[i + 1]].T
            for n in np.flatnonzero((x1 < 0) | (y1 < 0) | (x2 > size[1]) | (y2 > size[0])):
                findings.add("box beyond the image, which is clipped", f"{data.files[i]}, box {n}", bad=False)
        for task, found in masks.items():
            if isinstance(found, str):
                findings.add(f"wrong {task} mask", found)
                continue
            pixels[task] += found[0]
            if isinstance(size, tuple) and found[1] != size:
                findings.add(f"{task} mask of another size than its image", str(data.mask_name(task, i)))
    print("  sizes: " + ", ".join(f"{w}x{h} {n}" for (h, w), n in sorted(sizes.items(), key=lambda item: -item[1])[:5]))
    boxes = getattr(data, "all_labels", np.bincount(data.box_labels, minlength=len(data.classes["detection"])))
    rows = [("detection", boxes)] + [(task, counts[:len(data.classes[task])]) for task, counts in pixels.items()]
    for task, counts in rows:
        unit = "boxes" if task == "detection" else "pixels"
        shares = ", ".join(f"{name} {n / max(1, counts.sum()):.2%}" for name, n in zip(data.classes[task], counts))
        print(f"  {task}, {counts.sum()} {unit}: {shares}")


class LabelWriter:
    """Writes predictions as labels in BDD100K's layout: what `BDD100K(root, split, labels=folder)` reads
    back and the official toolkit scores. Masks are written by threads while the caller goes on, the boxes by `close`."""

    def __init__(self, folder: str | Path, split: str, classes: dict[str, Sequence[str]] = CLASSES):
        self.folder, self.split, self.classes, self.boxes = Path(folder), split, classes, []
        self.threads, self.unwritten = ThreadPoolExecutor(4), deque()

    def add(self, name: str, prediction: dict[str, Tensor]) -> None:
        """name: the image's file name. prediction: any of `boxes` with `labels` and `scores`, `semantic`,
        `drivable`, as `predictions` yields them."""
        for task in MASK_FOLDERS.keys() & prediction.keys():
            mask = prediction[task].cpu().numpy()
            self.unwritten.append(self.threads.submit(write_mask, self.mask_path(task, name), mask))
        self.flush(64)
        if "boxes" in prediction:
            self.boxes.append((Path(name).name, *(prediction[key].cpu().numpy() for key in ("boxes", "scores", "labels"))))

    def flush(self, leave: int = 0) -> None:
        """Waits until no more than so many masks are unwritten; raises what went wrong in writing."""
        while len(self.unwritten) > leave:
            self.unwritten.popleft().result()

    def mask_path(self, task: str, name: str) -> Path:
        return self.folder / MASK_FOLDERS[task] / self.split / f"{Path(name).stem}.png"

    def close(self) -> list[tuple]:
        """Called by all processes; writes the boxes of all and returns them: of each image its name, boxes [N, 4],
        scores and labels, sorted by name."""
        self.flush()
        self.boxes = [entry for part in from_all_ranks(self.boxes) for entry in part]
        if rank_and_world()[0] == 0:
            self.write()
        return self.boxes

    def write(self) -> None:
        """Writes the boxes of this process alone; the file appears whole or not at all."""
        self.boxes.sort(key=lambda entry: entry[0])
        if self.boxes:
            write_rows(self.folder / "labels" / "det_20" / f"det_{self.split}.json", map(self.frame, self.boxes))

    def frame(self, entry: tuple) -> dict:
        name, *columns = entry
        return {"name": name, "labels": [
            {"id": str(i), "category": self.classes["detection"][label], "score": score, "box2d": to_inclusive(box)}
            for i, (box, score, label) in enumerate(zip(*(column.tolist() for column in columns)))]}


def write_mask(path: Path, mask: np.ndarray) -> None:
    """A PNG of class ids, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    Image.fromarray(mask).save(part, "PNG", compress_level=1)
    os.replace(part, path)


def write_rows(path: Path, rows: Iterable) -> None:
    """A JSON list, one line for each row, never all of them in memory; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".part"), "w") as f:
        start = "["
        for row in rows:
            f.write(start + json.dumps(row))
            start = ",\n"
        f.write("[]" if start == "[" else "]\n")
    os.replace(path.with_suffix(".part"), path)


def write_json(path: Path, value, **style) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(value, **style))
    os.replace(path.with_suffix(".part"), path)


def rank_and_world() -> tuple[int, int]:
    on = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if on else (0, 1)


def from_all_ranks(value) -> list:
    """The value that each process has, in the order of their ranks."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------ files of others

def read_coco(path: Path, content: dict) -> dict:
    """COCO's instances: `names` (image ids, sorted), `classes`, `category_ids`, and flat arrays of the
    annotations: `image` and `label` (indices into these), `box` x, y, width, height, `area`, `crowd`."""
    if not all(isinstance(content.get(key), list) for key in ("images", "categories", "annotations")):
        raise InputError(f"{path}: expected COCO's lists of images, categories and annotations.")
    names, rows = sorted(identities(path, content["images"], "id")), content["annotations"]
    classes_of = dict(zip(identities(path, content["categories"], "id"),
                          identities(path, content["categories"], "name", (str,))))
    category_ids, classes = sorted(classes_of), [classes_of[i] for i in sorted(classes_of)]
    truth = {"names": names, "classes": classes, "category_ids": category_ids}
    boxes = coco_boxes(path, rows, truth)
    for what in ("image", "label"):
        require(boxes[what] >= 0, path, rows, "image_id and category_id that the file lists")
    area = column(path, rows, "area")
    require(area >= 0, path, rows, "area from 0 on")
    return truth | boxes | {"area": area, "crowd": column(path, rows, "iscrowd", default=0) > 0}


def coco_boxes(path: Path, rows: list, truth: dict) -> dict[str, np.ndarray]:
    """`image`, `label`, `box` of COCO's annotations or results; images and categories that truth lacks are -1."""
    box = column(path, rows, "bbox", size=4)
    require((box[:, 2:] >= 0).all(1), path, rows, "bbox x, y, width, height with no negative size")
    image, label = (identities(path, rows, key, unique=False) for key in ("image_id", "category_id"))
    return {"image": positions(image, truth["names"]), "label": positions(label, truth["category_ids"]), "box": box}


def identities(path: Path, entries: list, key: str, types: tuple = (int,), unique: bool = True) -> list:
    """What the entries are called by, each its own."""
    try:
        values = [entry[key] for entry in entries]
    except (KeyError, TypeError):
        n = next(n for n, entry in enumerate(entries) if not isinstance(entry, dict) or key not in entry)
        raise InputError(f"{path}: entry {n} has no {key}: {entries[n]!r:.200}.") from None
    for n, value in enumerate(values):
        if type(value) not in types:
            raise InputError(f"{path}: entry {n} has {key} {value!r:.200}, expected "
                             f"{'a whole number' if int in types else 'a text'}.")
    if unique and len(set(values)) < len(values):
        seen = set()
        twice = next(value for value in values if value in seen or seen.add(value))
        raise InputError(f"{path}: {key} {twice!r} occurs more than once.")
    return values


def column(path: Path, rows: list, key: str, size: int | None = None, default: float | None = None) -> np.ndarray:
    """The finite number, or `size` numbers, that each entry has: float64 [N] or [N, size]."""
    def read(rows):
        values = np.array([row[key] if default is None else row.get(key, default) for row in rows])
        if values.dtype.kind not in "iuf" or values.shape != ((len(rows), size) if size else (len(rows),)) or \
                not np.isfinite(values).all():
            raise ValueError
        return values.astype(np.float64)

    try:
        return read(rows) if rows else np.zeros((0, size) if size else 0)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        for n, row in enumerate(rows):
            try:
                read([row])
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
                raise InputError(f"{path}: entry {n} has no good {key}, expected {size or 'a'} finite "
                                 f"number{'s' * bool(size)}: {row!r:.200}.") from None
        raise


def require(good: np.ndarray, path: Path, rows: list, expected: str) -> None:
    if not good.all():
        n = int(np.flatnonzero(~good)[0])
        raise InputError(f"{path}: entry {n} cannot be used, expected {expected}: {rows[n]!r:.200}.")


def read_detections(gt: Path, dt: Path, truth, found) -> tuple[dict, dict, dict]:
    """Ground truth and detections as `coco_ap` takes them, from the contents of COCO or Scalabel JSON files, and how
    many detections were left out because the truth lacks their image or category."""
    coco = isinstance(truth, dict) and "annotations" in truth
    results = isinstance(found, list) and all(isinstance(row, dict) and "image_id" in row for row in found[:1])
    if coco != results and found != []:
        raise InputError(f"{gt} and {dt} are of different formats: give COCO instances with COCO results, or Scalabel JSON "
                         "for both.")
    if coco:
        truth, rows = read_coco(gt, truth), found
        found = coco_boxes(dt, rows, truth) | {"score": column(dt, rows, "score")}
        require((found["score"] >= 0) & (found["score"] <= 1), dt, rows, "a score from 0 to 1")
    else:
        classes = CLASSES["detection"]
        truth, found = read_scalabel(gt, classes, truth), read_scalabel(dt, classes, found, predicted=True)
        names = sorted(truth["names"])
        truth, found = ({"image": positions(x["names"], names)[x["frame"]], "label": x["labels"].astype(np.int64),
                         "box": np.concatenate([x["boxes"][:, :2], x["boxes"][:, 2:] - x["boxes"][:, :2]], axis=1),
                         "crowd": x["crowd"], "score": x.get("scores")} for x in (truth, found))
        truth |= {"area": truth["box"][:, 2] * truth["box"][:, 3], "names": names, "classes": classes}
    dropped = {"detections of unknown images": int((found["image"] < 0).sum()),
               "detections of unknown categories": int((found["label"][found["image"] >= 0] < 0).sum())}
    known = (found["image"] >= 0) & (found["label"] >= 0)
    if len(known) and not known.any():
        raise InputError(f"none of the {len(known)} detections in {dt} is of an image and category of {gt}: give "
                         "predictions for these images.")
    return truth, {key: found[key][known] for key in ("image", "label", "box", "score")}, dropped


def positions(names: Sequence[str], among: Sequence[str]) -> np.ndarray:
    """Where each name is among others, -1 = nowhere."""
    index = {name: i for i, name in enumerate(among)}
    return np.array([index.get(name, -1) for name in names], np.int64)


def rle_decode(rle: dict) -> np.ndarray:
    """bool [H, W] of COCO's run-length code {"size": [H, W], "counts": str or list}: lengths of runs of 0 and 1 in
    turn, column by column; the string packs them in 5-bit groups, from the fourth on as differences to the one
    before last. Raises ValueError when the runs do not fill the mask."""
    (height, width), counts = rle["size"], rle["counts"]
    if not (type(height) is type(width) is int and min(height, width) > 0 and height * width <= MAX_PIXELS):
        raise ValueError(f"a mask of {width!r:.20} x {height!r:.20}")
    if isinstance(counts, str):
        lengths, value, shift = [], 0, 0
        for code in counts.encode("ascii"):
            value |= (code - 48 & 31) << shift
            shift += 5
            if code - 48 & 32 and shift < 60:
                continue
            value -= (code - 48 & 16 > 0) << shift                                # sign
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
        counts = lengths
    if sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"runs that do not fill a mask of {width}x{height}")
    ones = np.arange(len(counts)) % 2 > 0
    return np.repeat(ones, counts).reshape(width, height).T


def masks_of(path: Path, task: str, truth: bool, content=None) -> dict[str, Callable[[], np.ndarray]]:
    """For each image's stem what reads its mask: from a folder of PNGs, or Scalabel JSON with run-length masks."""
    if path.is_dir():
        files = sorted(path.glob("*.png"))
        limit = len(CLASSES[task]) if truth else IGNORE          # predictions outside the classes are misses
        return {file.stem: partial(read_mask, file, limit) for file in files}
    return {Path(frame["name"]).stem: partial(paint_labels, frame, task, path) for frame in read_frames(path, content)}


def paint_labels(frame: dict, task: str, path: Path) -> np.ndarray | None:
    """uint8 [H, W]: a frame's run-length masks one over the other, elsewhere `unpainted`; None without any."""
    mask = None
    for j, label in enumerate(frame.get("labels") or []):
        try:
            k, part = CLASSES[task].index(label["category"]), rle_decode(label["rle"])
            mask = np.full(part.shape, unpainted(task), np.uint8) if mask is None else mask
            mask[part] = k
        except (KeyError, TypeError, ValueError, IndexError) as wrong:
            raise InputError(f"{path}: frame {frame['name']}, label {j} is no run-length mask of a {task} class "
                             f"({wrong!r}).") from None
    return mask


def unpainted(task: str) -> int:
    return CLASSES["drivable"].index("background") if task == "drivable" else IGNORE


def score_files(gt: Path, dt: Path, task: str | None = None) -> dict:
    """Scores predictions against ground truth, files or folders whose format is recognised: COCO JSON, Scalabel JSON
    with boxes or run-length masks, PNG masks. Returns what `evaluate` returns, with `dropped` counts; for COCO files
    also `coco`, pycocotools' twelve numbers."""
    for path in (gt, dt):
        if not path.exists():
            raise InputError(f"no file or folder {path}: expected {'ground truth' if path == gt else 'predictions'}.")
    truth, found = (None if path.is_dir() else read_json(path) for path in (gt, dt))
    task = task or guess_task(gt, truth)
    if task != "detection":
        return score_masks(gt, dt, task, truth, found)
    if gt.is_dir() or dt.is_dir():
        raise InputError(f"{gt if gt.is_dir() else dt} is a folder: boxes are read from JSON files.")
    truth, found, dropped = read_detections(gt, dt, truth, found)
    scores = ap_scores(*coco_ap(truth, found, len(truth["names"]), len(truth["classes"])), truth["classes"])
    familiar = {"coco": [-1. if scores[key] is None else scores[key] for key in SUMMARY]} if "category_ids" in truth else {}
    return {"detection": reported(scores), "images": len(truth["names"]), "dropped": dropped} | familiar


def score_masks(gt: Path, dt: Path, task: str, truth, found) -> dict:
    """`score_files` for semantic or drivable masks; truth and found are the files' contents, None for folders."""
    meter = meter_of(task)
    truth, found = masks_of(gt, task, True, truth), masks_of(dt, task, False, found)
    for path, masks in ((gt, truth), (dt, found)):
        if not masks:
            raise InputError(f"{path} holds no masks: expected PNGs of class ids, or Scalabel JSON with run-length masks.")
    if not truth.keys() & found.keys():
        raise InputError(f"none of the masks in {dt} is of an image in {gt}: give predictions for these images.")
    for stem, read in tqdm(truth.items(), desc=f"score {task}", unit="img", leave=False):
        mask, guess = read(), found[stem]() if stem in found else None
        if mask is None and guess is None:
            continue                                                              # nothing is known of this image
        mask = np.full_like(guess, unpainted(task)) if mask is None else mask
        if guess is None:                                                         # all missed, or a frame without labels
            guess = np.full_like(mask, unpainted(task) if stem in found else IGNORE)
        if mask.shape != guess.shape:
            (h, w), (found_h, found_w) = mask.shape, guess.shape
            raise InputError(f"the mask of {stem} is {found_w}x{found_h} in {dt}, but {w}x{h} in {gt}: give masks of the "
                             "images' size.")
        meter.update(mask, guess)
    dropped = {"masks of unknown images": len(found.keys() - truth.keys()),
               "images without prediction, counted as all missed": len(truth.keys() - found.keys())}
    return {task: reported(meter.compute()), "images": len(truth), "dropped": dropped}


def guess_task(path: Path, content) -> str:
    """The task that a file or folder of ground truth is for."""
    if isinstance(content, dict) and "annotations" in content:
        return "detection"
    frames = [] if path.is_dir() else read_frames(path, content)
    labels = [label for frame in frames for label in frame.get("labels") or [] if isinstance(label, dict)]
    if not path.is_dir() and not any(label.get("rle") for label in labels):
        return "detection"
    names = {label.get("category") for label in labels if isinstance(label.get("category"), str)}
    tasks = {"semantic": "sem_seg" in path.as_posix() or "road" in names,
             "drivable": "drivable" in path.as_posix() or bool(names & {"direct", "alternative"})}
    if sum(tasks.values()) != 1:
        raise InputError(f"{path} holds masks of a task that cannot be told from it: add --task semantic or --task "
                         "drivable.")
    return max(tasks, key=tasks.get)


# ------------------------------------------------------------------------------------ detection

THRESHOLDS = np.linspace(0.5, 0.95, 10)           # IoU
RECALLS = np.linspace(0, 1, 101)
AREAS = np.array([[0, 1e10], [0, 32 ** 2], [32 ** 2, 96 ** 2], [96 ** 2, 1e10]])  # all, small, medium, large
MAX_DETECTIONS = (1, 10, 100)                     # per image and class

# What becomes of a box at all areas and thresholds is one 64-bit word: bit 16 a + t stands for AREAS[a], THRESHOLDS[t].
AREA_BITS = np.uint64(2 ** len(THRESHOLDS) - 1) << np.arange(0, 64, 16, dtype=np.uint64)
UP_TO = np.array([sum((1 << t) - 1 << 16 * a for a in range(4)) for t in range(len(THRESHOLDS) + 1)], np.uint64)


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of each run of equal values."""
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][:len(values)])
    return first, np.diff(np.r_[first, len(values)])


def ranks(values: np.ndarray) -> np.ndarray:
    """Position of each element within its run of equal values."""
    first, length = runs(values)
    return np.arange(len(values)) - np.repeat(first, length)


def outside_areas(area: np.ndarray) -> np.ndarray:
    """Words with the bits of the area ranges that boxes of these areas are not in; both ends belong to a range."""
    return np.bitwise_or.reduce([((area < low) | (area > high)) * bits for bits, (low, high) in zip(AREA_BITS, AREAS)])


def candidate_pairs(dt: dict, gt: dict, chunk: int = 1 << 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detection index, ground-truth index and IoU of all pairs in one group with IoU >= 0.5.

    dt, gt: `group` (sorted), `x1`, `y1`, `x2`, `y2` and `wh` (width x height) [N]; gt also `crowd`, whose union
    is the detection's own area. Pairs are made in chunks that stay in the processor's cache.
    """
    start, length = runs(dt["group"])
    low, high = (np.searchsorted(gt["group"], dt["group"][start], side) for side in ("left", "right"))
    first, count = np.repeat(low, length), np.repeat(high - low, length)
    total = np.cumsum(count)
    found, start = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))], 0
    while start < len(count):
        stop = max(start + 1, int(np.searchsorted(total, (total[start - 1] if start else 0) + chunk, "right")))
        n = count[start:stop]
        d = np.repeat(np.arange(start, stop), n)
        g = np.arange(len(d)) + np.repeat(first[start:stop] - (np.cumsum(n) - n), n)
        for near, far in (("x1", "x2"), ("y1", "y2")):
            overlap = np.minimum(dt[far][d], gt[far][g]) - np.maximum(dt[near][d], gt[near][g])
            keep = np.flatnonzero(overlap > 0)
            d, g, overlap = d[keep], g[keep], overlap[keep]
            inter = overlap if near == "x1" else inter[keep] * overlap
        iou = inter / np.where(gt["crowd"][g], dt["wh"][d], dt["wh"][d] + gt["wh"][g] - inter)
        keep = np.flatnonzero(iou >= THRESHOLDS[0])
        found.append((d[keep], g[keep], iou[keep]))
        start = stop
    return tuple(np.concatenate(parts) for parts in zip(*found))


def match_boxes(dt: dict, gt: dict) -> tuple[np.ndarray, np.ndarray]:
    """COCO's greedy matching of all groups, areas and thresholds at once.

    dt is sorted by group and falling score; gt also has `crowd` and `outside`, the words of where it is ignored.
    Returns two words for each detection: where it is matched, and where to ignored ground truth.

    A Python loop runs over ranks, not detections: round r takes the r-th detection of every group. A detection
    takes the ground truth with the largest IoU, of equals the last in the file, that is still free; only where
    it finds none may it take an ignored one, so each round goes through the candidates twice.
    """
    matched, ignored = np.zeros((2, len(dt["group"])), np.uint64)
    d, g, iou = candidate_pairs(dt, gt)
    best_first = np.lexsort((-g, -iou, d))
    d, g, iou = d[best_first], g[best_first], iou[best_first]
    start, length = runs(d)
    rank, choice = np.repeat(ranks(dt["group"][d[start]]), length), ranks(d)
    order = np.lexsort((choice, rank))
    d, g, iou, rank, choice = (x[order] for x in (d, g, iou, rank, choice))
    reached = UP_TO[np.searchsorted(np.minimum(THRESHOLDS, 1 - 1e-10), iou, "right")]
    outside, inside = gt["outside"][g], ~gt["outside"][g]
    taken, takes = np.zeros(len(gt["group"]), np.uint64), np.where(gt["crowd"], np.uint64(0), UP_TO[-1])
    for first, count in zip(*runs(rank)):
        choices = [slice(first + a, first + a + n) for a, n in zip(*runs(choice[first:first + count]))]
        for where in (inside, outside):
            for own in choices:                                        # each detection and box at most once
                i, j = d[own], g[own]
                new = reached[own] & where[own] & ~taken[j] & ~matched[i]
                matched[i] |= new
                taken[j] |= new & takes[j]
                if where is outside:
                    ignored[i] |= new
    return matched, ignored


def precision_recall(dt: dict, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accumulates matches into precision [T, R, K, A] (100 detections) and recall [T, K, A, M]; -1 where
    a class has no ground truth.

    dt: `label`, `rank` in its image and class, `matched` and `ignored`, by class and falling score.
    positives [A, K]: ground truth that counts.
    """
    num_classes = positives.shape[1]
    precision = np.full((len(THRESHOLDS), len(RECALLS), num_classes, len(AREAS)), -1.)
    recall = np.full((len(THRESHOLDS), num_classes, len(AREAS), len(MAX_DETECTIONS)), -1.)
    bounds = np.searchsorted(dt["label"], np.arange(num_classes + 1))
    for k in range(num_classes):
        matched, ignored, rank = (dt[key][bounds[k]:bounds[k + 1]] for key in ("matched", "ignored", "rank"))
        some = np.flatnonzero(matched)             # the others count alike at all thresholds: only their number matters
        for a in np.flatnonzero(positives[:, k]):
            others = np.cumsum((matched == 0) & (ignored & AREA_BITS[a] == 0))[some]
            bits = np.uint64(1) << np.arange(16 * a, 16 * a + len(THRESHOLDS), dtype=np.uint64)[:, None]
            counts = ignored[some] & bits == 0                                              # [T, N]
            hits = counts & (matched[some] & bits > 0)
            seen = np.cumsum(counts, axis=1) + others
            tp = np.arange(1., np.count_nonzero(hits, axis=1).max(initial=0) + 1)
            step = np.searchsorted(tp / positives[a, k], RECALLS, side="left")              # hits that each recall needs
            for t, own in enumerate(map(np.flatnonzero, hits)):
                # precision peaks and recall steps only at hits: the curve needs no other point
                curve = tp[:len(own)] / (seen[t, own] + np.spacing(1))
                curve = np.maximum.accumulate(curve[::-1])[::-1]
                precision[t, :, k, a] = np.append(curve, 0.)[np.minimum(step, len(own))]
                within = [np.count_nonzero(rank[some[own]] < limit) for limit in MAX_DETECTIONS]
                recall[t, k, a] = np.array(within) / positives[a, k]
    return precision, recall


def coco_ap(gt: dict[str, np.ndarray], dt: dict[str, np.ndarray], num_images: int, num_classes: int):
    """COCO's box evaluation on flat arrays: identical to pycocotools' `evaluate` and `accumulate`.

    gt, dt: `image` and `label` [N] integers, `box` [N, 4] float64 x, y, width, height; gt: `area` [N],
    `crowd` [N] bool; dt: `score` [N]. Returns precision [T, R, K, A] and recall [T, K, A, M].
    Oddities of the original that are not reproduced: an annotation with id 0 never matches, AP is -1 when
    the largest number of detections is not 100, and an empty list of detections is an error.
    """
    def stable(values, limit):                         # numpy sorts 16-bit integers by radix, several times as fast
        return np.argsort(values.astype(np.uint16 if limit <= 1 << 16 else np.int64), kind="stable")

    def grouped(x, order, *keys):                                      # order is by image and class
        x1, y1, w, h = x["box"][order].T.copy()
        image, label = x["image"][order].astype(np.int64), x["label"][order]
        return {"group": image * num_classes + label, "label": label, "x1": x1, "y1": y1, "x2": x1 + w, "y2": y1 + h,
                "wh": w * h} | {key: x[key][order] for key in keys}

    gt = grouped(gt, np.lexsort((gt["label"], gt["image"])), "area", "crowd")
    gt["outside"] = outside_areas(gt["area"]) | gt["crowd"] * UP_TO[-1]
    positives = np.stack([np.bincount(gt["label"][gt["outside"] & bits == 0], minlength=num_classes) for bits in AREA_BITS])

    by_score = stable(dt["image"], num_images)                         # equal scores rank by image
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
    back = place[place >= 0]                                           # by class and falling score again
    return precision_recall({key: dt[key][back] for key in ("label", "rank", "matched", "ignored")}, positives)


SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")      # COCO's order


def ap_scores(precision: np.ndarray, recall: np.ndarray, classes: Sequence[str]) -> dict:
    """SUMMARY's twelve numbers and `per_class` AP, fractions; None where there is no ground truth."""
    def mean(values):
        values = values[values > -1]
        return float(values.mean()) if values.size else None
    scores = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    scores |= {f"AP{size}": mean(precision[..., a]) for a, size in enumerate("sml", start=1)}
    scores |= {f"AR{limit}": mean(recall[..., 0, m]) for m, limit in enumerate(MAX_DETECTIONS)}
    scores |= {f"AR{size}": mean(recall[..., a, -1]) for a, size in enumerate("sml", start=1)}
    return scores | {"per_class": {name: mean(precision[:, :, k, 0]) for k, name in enumerate(classes)},
                     "rule": "COCO box AP, at most 100 detections of a class in an image"}


class DetectionAP:
    """Streaming COCO box AP: `update` image by image, `compute` once.

    classes: names in id order. At most 100 detections of each class and image are kept, as arrays.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes, self.images = tuple(classes), set()
        self.truths, self.detections = [], []

    def update(self, target: dict, prediction: dict, image: int | None = None) -> None:
        """One image. target: `boxes` [N, 4] (xyxy, exclusive ends), `labels` [N], optional `crowd` [N]
        and `area` [N]. prediction: `boxes`, `scores`, `labels`. Arrays, tensors or lists.
        image: its number, by default one after the other; detections of equal score rank in their order."""
        image = len(self.images) if image is None else image
        if image in self.images:
            raise InputError(f"image {image} was given twice: each has a number of its own.")

        def flat(boxes, labels):
            boxes, labels = np.asarray(boxes, np.float64), np.asarray(labels, np.int64).reshape(-1)
            boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
            if not (boxes.shape == (len(labels), 4) and np.isfinite(boxes).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
                    and ((labels >= 0) & (labels < len(self.classes))).all()):
                raise InputError(f"image {image}: expected finite boxes [N, 4] with x1 <= x2 and y1 <= y2, and N labels "
                                 f"below {len(self.classes)}.")
            box = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
            return {"image": np.full(len(box), image), "label": labels, "box": box}

        gt = flat(target["boxes"], target["labels"])
        gt["area"] = np.asarray(target.get("area", gt["box"][:, 2] * gt["box"][:, 3]), np.float64)
        gt["crowd"] = np.asarray(target.get("crowd", np.zeros(len(gt["box"]))), bool)
        dt = flat(prediction["boxes"], prediction["labels"]) | {"score": np.asarray(prediction["scores"], np.float64)}
        if dt["score"].shape != (len(dt["box"]),) or np.isnan(dt["score"]).any():
            raise InputError(f"image {image}: expected a score, not NaN, for each of the {len(dt['box'])} detections.")
        if not (gt["area"].shape == gt["crowd"].shape == (len(gt["box"]),) and np.isfinite(gt["area"]).all()):
            raise InputError(f"image {image}: expected a finite area and a crowd flag for each of {len(gt['box'])} boxes.")
        best = np.lexsort((-dt["score"], dt["label"]))
        best = np.sort(best[ranks(dt["label"][best]) < MAX_DETECTIONS[-1]])
        self.truths.append(gt)
        self.detections.append({key: value[best] for key, value in dt.items()})
        self.images.add(image)

    def merge(self, other: "DetectionAP") -> None:
        """Takes over the images of another process, which must have numbers of their own."""
        if self.images & other.images:
            raise InputError(f"image {min(self.images & other.images)} is in both meters: give `update` the images' "
                             "numbers.")
        self.truths += other.truths
        self.detections += other.detections
        self.images |= other.images

    def arrays(self) -> tuple[dict, dict]:
        """All ground truth and detections, as `coco_ap` takes them."""
        return tuple({key: np.concatenate([x[key] for x in parts]) for key in parts[0]}
                     for parts in (self.truths, self.detections))

    def compute(self) -> dict:
        """Fractions: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl (COCO's twelve) and
        `per_class` AP; None where there is no ground truth. Also `precision` and `recall` themselves."""
        if not self.truths:
            raise InputError("no images were given to score.")
        precision, recall = coco_ap(*self.arrays(), max(self.images) + 1, len(self.classes))
        return ap_scores(precision, recall, self.classes) | {"precision": precision, "recall": recall}


# --------------------------------------------------------------------------------- segmentation

class MeanIoU:
    """Streaming mean IoU by BDD100K's rule: pixels whose truth is 255, or any id outside the classes, do not count,
    predictions outside the classes are misses, the mean is over the classes that occur in the ground truth.

    background: a class whose pixels the official drivable score leaves out altogether (by truth), so that
        false alarms on background cost nothing; the mean over all classes is then given beside it.
    """

    def __init__(self, classes: Sequence[str], background: int | None = None):
        self.classes, self.background = tuple(classes), background
        if len(self.classes) >= IGNORE:
            raise InputError(f"{len(self.classes)} classes were given: maps of uint8 ids have room for {IGNORE - 1}.")
        self.confusion = np.zeros((len(classes), len(classes) + 1), np.int64)     # truth x (prediction, other)

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Two uint8 arrays of one shape."""
        if truth.shape != prediction.shape or truth.dtype != np.uint8 or prediction.dtype != np.uint8:
            raise InputError(f"truth {truth.dtype} {truth.shape} and prediction {prediction.dtype} {prediction.shape} were "
                             "given, expected two uint8 maps of one shape.")
        self.confusion += pair_counts(truth, prediction, len(self.classes))

    def merge(self, other: "MeanIoU") -> None:
        """Takes over what another process has seen."""
        self.confusion += other.confusion

    def compute(self) -> dict:
        """Fractions: `mIoU`, `per_class` (None where a class has no ground truth), with a background class also
        `mIoU_3class`; as the toolkit defines them `mAcc` (mean over classes of hits / predicted pixels), `fIoU` (IoU
        weighted by the classes' pixels) and `pAcc` (hits / pixels); `rule` says in words what was averaged."""
        counted = [k for k in range(len(self.classes)) if k != self.background]
        ious, accuracies, weights, pixel_accuracy = iou_scores(self.confusion[counted], counted)

        def mean(values):
            values = [value for value in values if value is not None]
            return float(np.mean(values)) if values else None
        scores = {"mIoU": mean(ious), "per_class": dict(zip((self.classes[k] for k in counted), ious)),
                  "mAcc": mean(accuracies), "fIoU": None if pixel_accuracy is None else
                  float(sum(iou * w for iou, w in zip(ious, weights) if iou is not None)), "pAcc": pixel_accuracy,
                  "rule": "BDD100K: mean over the classes in the ground truth"}
        if self.background is not None:
            scores["mIoU_3class"] = mean(iou_scores(self.confusion)[0])
            scores["rule"] += f", pixels of {self.classes[self.background]} left out; 3-class: none left out"
        return scores


def pair_counts(truth: np.ndarray, prediction: np.ndarray, n: int) -> np.ndarray:
    """How many pixels have each pair of ids: int64 [n, n + 1], truth by prediction, which is n for all ids from n on.
    Counts runs of equal pairs instead of pixels, several times as fast on maps, whose classes are areas."""
    truth, prediction = truth.ravel(), prediction.ravel()
    last = np.append(np.flatnonzero((truth[1:] != truth[:-1]) | (prediction[1:] != prediction[:-1])), len(truth) - 1)
    last = last[:len(truth)]                                                      # of each run; none in an empty map
    pairs = np.minimum(truth[last], n).astype(np.intp) * (n + 1) + np.minimum(prediction[last], n)
    counts = np.bincount(pairs, weights=np.diff(last, prepend=-1), minlength=(n + 1) ** 2)      # exact in float64
    return counts.astype(np.int64).reshape(n + 1, n + 1)[:n]


def iou_scores(confusion: np.ndarray, rows: Sequence[int] | None = None) -> tuple[list, list, np.ndarray, float | None]:
    """IoU and accuracy of each class (None where it has no ground truth), the classes' shares of all pixels, and the
    share of pixels that are right. rows: the classes that the confusion matrix's rows stand for, by default all."""
    rows = list(range(len(confusion)) if rows is None else rows)
    truth, predicted, hits = confusion.sum(1), confusion[:, rows].sum(0), confusion[range(len(rows)), rows]
    seen = truth > 0
    ious = hits / np.maximum(truth + predicted - hits, 1)
    accuracies = hits / np.maximum(predicted, 1)
    total = truth.sum()
    return (*([float(v) if s else None for v, s in zip(values, seen)] for values in (ious, accuracies)),
            truth / max(total, 1), float(hits.sum() / total) if total else None)


def meter_of(task: str, classes: Sequence[str] | None = None) -> DetectionAP | MeanIoU:
    """What scores a task by BDD100K's rules."""
    classes = CLASSES[task] if classes is None else classes
    return DetectionAP(classes) if task == "detection" else MeanIoU(classes, background=2 if task == "drivable" else None)


# ----------------------------------------------------------------------------- scoring a model

def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py: tensors and plain types, nothing that runs code."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}: train one with train.py, or name another with --ckpt.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)   # reads what is used
        for key in ("model_config", "model", "config", "stage", "step", "steps", "notes", "scores"):
            checkpoint[key]
        checkpoint["model_config"]["classes"], checkpoint["config"]["data"], checkpoint["model"].get("text_features")
    except Exception as refused:  # torch raises many kinds, all meaning: not a checkpoint of ours
        raise InputError(f"{path} is not a checkpoint of train.py ({str(refused).splitlines()[0]}).") from refused
    return checkpoint


def build_model(checkpoint: dict) -> torch.nn.Module:
    """The checkpoint's model, ready to predict: its text embeddings are in it, so no CLIP is needed."""
    from hmpl import HMPL

    config, state = dict(checkpoint["model_config"]), checkpoint["model"]
    text = state.get("text_features")
    try:
        model = HMPL(**config, text=None if text is None else torch.zeros_like(text))
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith("text.")})
    except (TypeError, ValueError, RuntimeError) as misfit:
        raise InputError(f"the checkpoint holds another network than this code builds ({str(misfit).splitlines()[0]}): "
                         "use the code that wrote it, or train anew.") from misfit
    return model.eval()


def predictions(predict: Callable[[list[int], list[Tensor]], list[dict]], data, rows: Sequence[int], device: torch.device,
                *, batch: int, workers: int = 0, tasks: Sequence[str] = (), amp: torch.dtype | None = None,
                desc: str = "predict", skip: Callable[[int, str], None] | None = None):
    """Yields (i, image, target, prediction) for the rows of a data set (anything with `image(i)`).

    predict: makes the predictions of rows and their images, such as `lambda rows, images: model.predict(images)`; they
    come on the CPU, without boxes that have no area, since they lie outside the image. tasks: those of which the target
    holds labels. skip: called with row and reason for each image that cannot be read, where that is no error; labels that
    cannot be read are then left out. A GPU makes the next batch's predictions while the caller uses these.
    """
    loader = torch.utils.data.DataLoader(ItemsOf(data, rows, tasks, bool(skip)), batch_size=batch, num_workers=workers,
                                         collate_fn=list, pin_memory=device.type == "cuda", worker_init_fn=leave_signals)

    def fetched(items, results, ready):
        if ready:
            ready.synchronize()
        for item, result in zip(items, results):
            if "boxes" in result:
                seen = (result["boxes"][:, 2:] - result["boxes"][:, :2]).amin(1) > 1e-3
                result |= {key: result[key][seen] for key in ("boxes", "scores", "labels")}
            yield *item, result

    last = [], [], None
    with torch.inference_mode(), tqdm(total=len(rows), desc=desc, unit="img", leave=False, mininterval=0.5,
                                      disable=rank_and_world()[0] > 0) as bar:
        for items in loader:
            bar.update(len(items))
            for i, why, _ in (item for item in items if isinstance(item[1], str)):
                skip(i, why)
            items = [item for item in items if not isinstance(item[1], str)]
            if items:
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    results = predict([i for i, _, _ in items], [image for _, image, _ in items])
                results = [{key: value.to("cpu", non_blocking=True) for key, value in result.items()} for result in results]
                ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
                yield from fetched(*last)
                last = items, results, ready
        yield from fetched(*last)


class ItemsOf(torch.utils.data.Dataset):
    """The rows of a data set as (row, image, target); lenient: the reason in place of an image that cannot be read, and
    nothing in place of a task's labels that cannot be."""

    def __init__(self, data, rows: Sequence[int], tasks: Sequence[str] = (), lenient: bool = False):
        self.data, self.rows, self.tasks, self.lenient = data, rows, tasks, lenient

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> tuple[int, Tensor | str, dict]:
        i, data = int(self.rows[n]), self.data
        image = tried(data.image, i) if self.lenient else data.image(i)
        if not self.tasks or isinstance(image, str):
            return i, image, {}
        if not self.lenient:
            return i, image, data.sized_target(i, image, self.tasks)
        parts = [tried(data.sized_target, i, image, [task]) for task in self.tasks]
        return i, image, {key: value for part in parts if not isinstance(part, str) for key, value in part.items()}


def leave_signals(worker: int) -> None:
    """Worker processes leave SIGINT and SIGTERM, which their whole group may get, to the process that reads from them, and
    end ten seconds after SIGTERM if it has not told them to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def evaluate(model, data: LabelledImages, *, batch: int = 4, workers: int = 0, amp: torch.dtype | None = None,
             keep: Sequence[Callable] = (), unlabelled: bool = False) -> dict:
    """Scores a model on the images that are labelled for any of its tasks, streaming; in a distributed run each
    process takes every world-th image and all get the same scores.

    keep: each called with (row, image, target, prediction) of every image of this process. unlabelled: images
    without labels are predicted too, for `keep`. Returns, in percent,
    {"detection": {"AP", ..., "per_class"}, "semantic": {"mIoU", "per_class"}, "drivable": {"mIoU",
    "mIoU_3class", "per_class"}, "images"}, with those tasks that model and data share.
    """
    for task, names in model.classes.items():
        known = data.classes.get(task, ())
        if tuple(names) != tuple(known):
            raise InputError(f"the model's {task} classes are {', '.join(names)}; the data's are "
                             f"{', '.join(known) or 'none'}: use data of the same class list.")
    tasks = [task for task in model.classes if data.labelled[task].any()]
    if not tasks and not unlabelled:
        raise InputError(f"{data.labels} has no {data.split} labels for {', '.join(model.classes)}.")
    meters = {task: meter_of(task, data.classes[task]) for task in tasks}
    labelled = np.flatnonzero(np.any([data.labelled[task] for task in tasks], axis=0)) if tasks else []
    rows = np.arange(len(data)) if unlabelled else labelled
    rank, world = rank_and_world()
    failed = None
    try:
        for i, image, target, prediction in predictions(
                lambda _, images: model.predict(images), data, rows[rank::world], next(model.parameters()).device, batch=batch,
                workers=workers, tasks=tasks, amp=amp, desc="evaluate"):
            exact = {"boxes": data.boxes[data.offsets[i]:data.offsets[i + 1]]} if "boxes" in target else {}   # float64
            update_meters(meters, target | exact, prediction, i)
            for use in keep:
                use(i, image, target, prediction)
    except (InputError, OSError) as error:
        if world == 1:
            raise
        failed = sentence(error)                                                  # the others must not wait in vain
    (meters, failed), *others = from_all_ranks((meters, failed))
    for other, other_failed in others:
        failed = failed or other_failed
        for task in tasks:
            meters[task].merge(other[task])
    if failed:
        raise InputError(failed)
    return {task: reported(meter.compute()) for task, meter in meters.items()} | {"images": len(labelled)}


def update_meters(meters: dict, target: dict, prediction: dict, image: int | None = None) -> None:
    """Adds an image to the meters of those tasks that it is labelled for."""
    for task, meter in meters.items():
        if task == "detection" and "boxes" in target:
            meter.update(target, prediction, image)
        elif task in target:
            meter.update(target[task].numpy(), prediction[task].numpy())


def reported(scores: dict) -> dict:
    """What is printed and written of a task's scores, in percent."""
    return {key: value if key == "rule" else percent(value) for key, value in scores.items()
            if key not in ("precision", "recall")}


def percent(value):
    if isinstance(value, dict):
        return {key: percent(v) for key, v in value.items()}
    return None if value is None else 100 * value


def table(scores: dict, name: str = "") -> str:
    """The paper's columns, then one row for each class; "-" where there is no ground truth or no task."""
    def cell(value):
        return f"{'-' if value is None else format(value, '.1f'):>9}"
    get = lambda task, key: scores.get(task, {}).get(key)                               # noqa: E731
    columns = {"mAP": get("detection", "AP"), "AP50": get("detection", "AP50"), "AP75": get("detection", "AP75"),
               "mIoU (SS)": get("semantic", "mIoU"), "mIoU (DA)": get("drivable", "mIoU"),
               "DA 3-cl.": get("drivable", "mIoU_3class")}
    lines = [f"{name or 'in percent':<24}" + " ".join(f"{key:>9}" for key in columns),
             f"{str(scores['images']) + ' images':<24}" + " ".join(cell(value) for value in columns.values())]
    for task in ("detection", "semantic", "drivable"):
        if task in scores:
            lines.append(f"  {task} ({'AP' if task == 'detection' else 'IoU'})")
            rows = [f"    {key:<14}{cell(value)}" for key, value in scores[task]["per_class"].items()]
            lines += ["".join(f"{r:<32}" for r in rows[i:i + 3]).rstrip() for i in range(0, len(rows), 3)]
            lines.append(f"  {scores[task]['rule']}")
    return "\n".join(lines)


def coco_table(numbers: Sequence[float]) -> str:
    """The twelve lines that pycocotools prints."""
    rows = [("Precision", "AP", iou, area, 100) for iou, area in (("0.50:0.95", "all"), ("0.50", "all"), ("0.75", "all"),
            ("0.50:0.95", "small"), ("0.50:0.95", "medium"), ("0.50:0.95", "large"))]
    rows += [("Recall", "AR", "0.50:0.95", "all", limit) for limit in MAX_DETECTIONS]
    rows += [("Recall", "AR", "0.50:0.95", area, 100) for area in ("small", "medium", "large")]
    return "\n".join(f" {'Average ' + what:<18} ({short}) @[ IoU={iou:<9} | area={area:>6s} | maxDets={limit:>3d} ] = "
                     f"{number:0.3f}" for (what, short, iou, area, limit), number in zip(rows, numbers))


# ------------------------------------------------------------------------------------- pictures

def draw(image: Tensor, prediction: dict, truth: dict | None = None, title: str = "", width: int = 640,
         classes: dict[str, Sequence[str]] = CLASSES) -> Image.Image:
    """A sheet for an image [3, H, W]: a row of three panels `width` wide with the prediction (boxes with names and
    scores, semantic map, drivable overlay), below it one with the ground truth, and a legend of what occurs in them."""
    font = font_for(width)
    line = round(1.5 * font.size)
    results = [prediction] + [truth] * bool(truth)
    rows = [panels(image, result, width, classes) for result in results]
    legends = [legend(names, colours, width, font) for names, colours in legend_of(results, classes)]
    foot = max((part.height for part in legends), default=0)
    sheet = Image.new("RGB", (rows[0].width, sum(row.height + line + 4 for row in rows) + foot), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for row, name in zip(rows, (f"prediction {title}", "ground truth")):
        pen.text((6, y + line / 2), name, fill="black", font=font, anchor="lm")
        sheet.paste(row, (0, y + line))
        y += row.height + line + 4
    for i, part in enumerate(legends):
        sheet.paste(part, (i * (width + 4), y))
    return sheet


def font_for(width: int):
    """Readable on a panel of this width."""
    return ImageFont.load_default(size=max(12, width // 40))


def panels(image: Tensor, result: dict, width: int = 640, classes: dict[str, Sequence[str]] = CLASSES) -> Image.Image:
    """One row of three panels for an image [3, H, W]: boxes with names, semantic map, drivable overlay.
    result: a prediction or a target; panels of tasks it lacks show the image alone."""
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    size = (width, max(1, round(width * photo.height / photo.width)))
    photo = photo.resize(size, Image.Resampling.BICUBIC)
    parts = [draw_boxes(photo.copy(), result, width / image.shape[2], classes["detection"]) if "boxes" in result else photo]
    for task, colours, alpha in (("semantic", SEMANTIC_COLOURS, 0.65), ("drivable", DRIVABLE_COLOURS, 0.55)):
        parts.append(overlay(photo, result[task].numpy(), colours, alpha) if task in result else photo)
    row = Image.new("RGB", (3 * width + 8, size[1]), "white")
    for i, part in enumerate(parts):
        row.paste(part, (i * (width + 4), 0))
    return row


def legend_of(results: Sequence[dict], classes: dict[str, Sequence[str]] = CLASSES) -> list[tuple[list, list]]:
    """Names and colours of the classes that are seen in the results, for each of the three panels."""
    boxes = [result["labels"][result["scores"] >= MIN_SCORE] if "scores" in result else result["labels"]
             for result in results if "labels" in result]
    shown = {"detection": boxes, **{task: [result[task] for result in results if task in result] for task in MASK_FOLDERS}}
    colours = {"detection": BOX_COLOURS, "semantic": SEMANTIC_COLOURS.tolist(), "drivable": DRIVABLE_COLOURS.tolist()}
    ids = {task: sorted({k for ids in parts for k in ids.unique().tolist() if k < len(colours[task])})
           for task, parts in shown.items()}
    return [([classes[task][k] for k in ids[task]], [colours[task][k] for k in ids[task]]) for task in ids]


def legend(names: Sequence[str], colours: Sequence, width: int, font) -> Image.Image:
    """Swatches with names, in as many lines as they need."""
    step, x, y, places = round(1.5 * font.size), 6, 0, []
    for name in names:
        extent = step + font.getlength(name) + font.size
        if x > 6 and x + extent > width:
            x, y = 6, y + step
        places.append((x, y))
        x += extent
    picture = Image.new("RGB", (width, y + step if names else 0), "white")
    pen = ImageDraw.Draw(picture)
    for name, colour, (x, y) in zip(names, colours, places):
        pen.rectangle((x, y + step * 0.2, x + step * 0.7, y + step * 0.8), outline="black",
                      fill=colour if isinstance(colour, str) else tuple(colour))
        pen.text((x + step, y + step / 2), name, fill="black", font=font, anchor="lm")
    return picture


def overlay(photo: Image.Image, ids: np.ndarray, colours: np.ndarray, alpha: float) -> Image.Image:
    """Colours over the photo where ids have one."""
    known = ids < len(colours)
    paint = np.zeros((*ids.shape, 4), np.uint8)
    paint[known, :3], paint[known, 3] = colours[ids[known]], round(255 * alpha)
    layer = Image.fromarray(paint, "RGBA").resize(photo.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(photo.convert("RGBA"), layer).convert("RGB")


def draw_boxes(photo: Image.Image, result: dict, scale: float, classes: Sequence[str]) -> Image.Image:
    """Boxes, the best on top, with name and score where there is room beside the names of better ones."""
    pen, font, placed = ImageDraw.Draw(photo), font_for(round(0.8 * photo.width)), []
    width, height, edge = *photo.size, max(2, photo.width // 320)
    scores = result["scores"] if "scores" in result else torch.ones(len(result["boxes"]))
    order = [i for i in scores.argsort(stable=True).tolist() if scores[i] >= MIN_SCORE]
    boxes = [[min(max(v, 0), limit - 1) for v, limit in zip(box, (width, height) * 2)]
             for box in (result["boxes"] * scale).tolist()]
    for i in order:
        pen.rectangle(boxes[i], outline=BOX_COLOURS[result["labels"][i]], width=edge)
    for i in reversed(order):
        text = classes[result["labels"][i]] + (f" {scores[i]:.2f}" if "scores" in result else "")
        w, h = font.getlength(text) + 4, 1.2 * font.size
        x = min(boxes[i][0], width - w)
        for y in (boxes[i][1] - h, boxes[i][3], boxes[i][1] + edge):              # above, below, inside
            clear = all(x + w <= left or right <= x or y + h <= top or bottom <= y for left, top, right, bottom in placed)
            if clear and 0 <= y <= height - h:
                placed.append((x, y, x + w, y + h))
                pen.rectangle(placed[-1], fill=BOX_COLOURS[result["labels"][i]])
                pen.text((x + 2, y + h / 2), text, fill="black", font=font, anchor="lm")
                break
    return photo


# --------------------------------------------------------------------------------- command line

def newest_checkpoint() -> Path:
    found = sorted(Path("runs").rglob("*.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("no checkpoint under runs/: train one with train.py, or name one with --ckpt FILE.")
    return found[-1]


def batch_size(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 4


def num_workers(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 0


def this_device() -> torch.device:
    """The device of this process, which joins the others if torchrun started several."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=6))
    return device


def amp_type(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type that --amp stands for on a device; None = float32."""
    if name == "auto":
        own = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "no" if device.type != "cuda" else "bf16" if own else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[name]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Scores a checkpoint (--ckpt) or files of predictions (--gt, --dt): box AP, "
                                "mIoU (SS), mIoU (DA), in percent.")
    p.add_argument("--ckpt", nargs="?", metavar="FILE", help="checkpoint to score; without a name the newest under runs/")
    p.add_argument("--data", metavar="DIR", help="data in the layout of the checkpoint's data set; default: what it was "
                   "trained on")
    p.add_argument("--split", default="val", help="which images to score (default val)")
    p.add_argument("--gt", metavar="PATH", type=Path, help="score files instead: the ground truth, COCO or Scalabel "
                   "JSON, or a folder of PNG masks")
    p.add_argument("--dt", metavar="PATH", type=Path, help="the predictions: COCO results, Scalabel JSON, a folder of PNGs")
    p.add_argument("--task", choices=CLASSES, help="of --gt and --dt, where it cannot be told from them")
    p.add_argument("--json", metavar="FILE", help="write the scores as JSON")
    p.add_argument("--save", metavar="DIR", help="write the predictions there: Scalabel JSON and PNG masks in BDD100K's "
                   "layout, coco/ with ground truth and results for COCO tools; also of images without labels, such as "
                   "those of --split test")
    p.add_argument("--show", metavar="DIR", help="draw pictures there, prediction above ground truth, worst first")
    p.add_argument("--count", type=whole(1), help="how many pictures --show draws; default 8, with --images all")
    p.add_argument("--images", metavar="PATH", help="draw these with --show: a file, a folder or a quoted pattern; no "
                   "labels are needed, nothing is scored")
    p.add_argument("--batch", type=whole(1), help="images at a time; default 8 on a GPU, else 4")
    p.add_argument("--workers", type=whole(0), help="processes that read images; default 8 on a GPU, else 0")
    args = p.parse_args(argv)
    if (args.gt is None) != (args.dt is None):
        p.error("--gt and --dt go together: ground truth and predictions.")
    if args.gt and (args.ckpt or args.save or args.show or args.images):
        p.error("--gt and --dt score files: --ckpt, --save, --show and --images need a checkpoint instead.")
    if args.images and not args.show:
        p.error("--images needs --show DIR: where to draw.")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).name):
        p.error(f"--json {args.json} is a folder: name a file.")
    return args


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number from `least` on."""
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} was given, expected a whole number from {least} on.")
        return int(text)
    return read


def run(args: argparse.Namespace) -> dict:
    if args.gt:
        scores = score_files(args.gt, args.dt, args.task)
        print(coco_table(scores["coco"]) if "coco" in scores else table(scores, args.dt.name))
        for what, n in scores["dropped"].items():
            if n:
                print(f"NOTE: {n} {what}")
    else:
        scores = run_checkpoint(args)
    if args.json and rank_and_world()[0] == 0:
        write_json(Path(args.json), scores, indent=1)
    return scores


def run_checkpoint(args: argparse.Namespace) -> dict:
    """Scores a checkpoint, or only draws what it sees in --images. Started by torchrun, all processes share the work."""
    path = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    checkpoint = load_checkpoint(path)
    device = this_device()
    first = rank_and_world()[0] == 0
    model = build_model(checkpoint).to(device)
    how = dict(batch=args.batch or batch_size(device), amp=amp_type(checkpoint["config"]["amp"], device),
               workers=args.workers if args.workers is not None else num_workers(device))
    if args.images:
        return {"images": show_images(model, args, how)}
    root = Path(args.data or checkpoint["config"]["data"])
    data = DATASETS[checkpoint["config"].get("dataset", "bdd100k")](root, args.split)
    if first:
        print(f"{path}: stage {checkpoint['stage']}, step {checkpoint['step']} of {checkpoint['steps']}; "
              f"data {root}, {args.split}", *(f"NOTE: {note}" for note in checkpoint["notes"]), sep="\n")
    pictures = Pictures(args.show, args.count or 8, data) if args.show else None
    saved = Saved(args.save, data) if args.save else None
    scores = evaluate(model, data, keep=[keep for keep in (pictures, saved) if keep],
                      unlabelled=bool(saved), **how)
    for keep in (saved, pictures):
        if keep:
            keep.close()
    scores |= {"checkpoint": str(path), "notes": checkpoint["notes"]}
    if first:
        print(table(scores))
    return scores


class Saved:
    """Writes the predictions of an evaluation: BDD100K's layout, and coco/ with the same boxes in COCO's form, next to
    the ground truth in COCO's form (image ids from 1 in the order of the names, category ids from 1)."""

    def __init__(self, folder: str, data: LabelledImages):
        self.folder, self.data, self.writer = Path(folder), data, LabelWriter(folder, data.split, data.classes)

    def __call__(self, i: int, image: Tensor, target: dict, prediction: dict) -> None:
        self.writer.add(self.data.files[i], prediction)

    def close(self) -> None:
        """Called by all processes."""
        data, boxes = self.data, self.writer.close()
        labelled = np.flatnonzero(data.labelled["detection"])
        if rank_and_world()[0] or not boxes or not len(labelled):
            return

        def rows(image, boxes, labels):
            for (x1, y1, x2, y2), label in zip(boxes.astype(np.float64).tolist(), labels.tolist()):
                yield {"image_id": int(image) + 1, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        truth = [row | {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": int(crowd)} for i in labelled
                 for own in [slice(data.offsets[i], data.offsets[i + 1])]
                 for row, crowd in zip(rows(i, data.boxes[own], data.box_labels[own]), data.crowd[own])]
        write_json(self.folder / "coco" / f"gt_{data.split}.json", {
            "images": [{"id": int(i) + 1, "file_name": Path(data.files[i]).name} for i in labelled],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(data.classes["detection"])],
            "annotations": [{"id": n} | row for n, row in enumerate(truth, start=1)]})
        index = {Path(data.files[i]).name: i for i in labelled}
        write_rows(self.folder / "coco" / f"dt_{data.split}.json", (
            row | {"score": score} for name, found, scores, labels in boxes if name in index
            for row, score in zip(rows(index[name], found, labels), scores.tolist())))


class Pictures:
    """Keeps the images of an evaluation that were predicted worst and draws them, the worst first."""

    def __init__(self, folder: str, count: int, data: LabelledImages):
        self.folder, self.count, self.data, self.worst = Path(folder), count, data, []

    def __call__(self, i: int, image: Tensor, target: dict, prediction: dict) -> None:
        heapq.heappush(self.worst, (-image_score(self.data, target, prediction), int(i), image, target, prediction))
        if len(self.worst) > self.count:
            heapq.heappop(self.worst)                                             # the best of them

    def close(self) -> None:
        """Called by all processes; each draws its own of the worst."""
        shares = from_all_ranks([(score, i) for score, i, *_ in self.worst])
        order = sorted((pair for share in shares for pair in share), reverse=True)[:self.count]
        self.folder.mkdir(parents=True, exist_ok=True)
        for score, i, image, target, prediction in self.worst:
            if (score, i) in order:
                name = f"{order.index((score, i)) + 1:03d}_{self.data.stems[i]}.png"
                title = f"{self.data.stems[i]}, score {-100 * score:.0f}"
                draw(image, prediction, target, title, classes=self.data.classes).save(self.folder / name)


def image_score(data: LabelledImages, target: dict, prediction: dict) -> float:
    """Mean over the tasks in the target: AP50 and mIoU of this image alone."""
    meters = {task: meter_of(task, data.classes[task]) for task in data.classes
              if ("boxes" if task == "detection" else task) in target}
    update_meters(meters, target, prediction)
    values = [meter.compute()["AP50" if task == "detection" else "mIoU"] for task, meter in meters.items()]
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else 1.


class ImageFiles:
    """Images that a path names: a file, a folder of them, or a pattern such as 'photos/*.jpg'."""

    def __init__(self, path: str):
        files = Path(path).iterdir() if Path(path).is_dir() else [Path(path)] if Path(path).is_file() else \
            map(Path, glob.glob(path))
        self.files = sorted(file for file in files if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not self.files:
            raise InputError(f"no jpg or png images at {path}: give a file, a folder or a quoted pattern.")

    def image(self, i: int) -> Tensor:
        """uint8 RGB [3, H, W], turned as the camera was held."""
        photo = ImageOps.exif_transpose(open_picture(self.files[i])).convert("RGB")
        return torch.from_numpy(np.array(photo)).permute(2, 0, 1)


def show_images(model, args: argparse.Namespace, how: dict) -> int:
    """Draws what the model sees in --images; returns how many."""
    data = ImageFiles(args.images)
    rank, world = rank_and_world()
    Path(args.show).mkdir(parents=True, exist_ok=True)
    rows = range(len(data.files))[:args.count]
    names = [Path(args.show) / f"{i + 1:03d}_{file.stem}.png" for i, file in enumerate(data.files)]
    if {name.resolve() for name in names} & {file.resolve() for file in data.files}:
        raise InputError(f"{args.show} holds the images themselves: draw into another folder.")
    for i, image, _, prediction in predictions(lambda _, images: model.predict(images), data, rows[rank::world],
                                               next(model.parameters()).device, desc="draw", **how):
        draw(image, prediction, title=data.files[i].stem, classes=model.classes).save(names[i])
    return len(rows)


def sentence(error: Exception) -> str:
    """An error's message, also of one that a worker process raised and wrapped in its traceback."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^[\w.]*InputError: ", "", lines[-1]) if lines and lines[0].startswith("Caught ") else str(error)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        run(parse_args(argv))
    except (InputError, OSError) as error:
        sys.exit(f"evaluate.py: {sentence(error)}")
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
