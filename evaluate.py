"""Ground truth on disk, scores and pictures: BDD100K's files and rules, without its toolkit.

    python evaluate.py --ckpt X                     # a checkpoint, by default the newest in runs/
    python evaluate.py --ckpt X --images 'photos/*.jpg' --show pictures         # no labels needed
    python evaluate.py --gt instances.json --dt results.json     # files: COCO, Scalabel, PNG masks
    python evaluate.py --check DIR                                    # lists a folder's bad files

`BDD100K` and `NuImages` read data sets, `LabelWriter` writes predictions, `DetectionAP` and
`MeanIoU` score them; `evaluate` scores a model, `score_files` scores prediction files. In memory
boxes are xyxy with exclusive ends (width = x2 - x1); BDD100K's files hold inclusive ends.

>>> ap = DetectionAP(["car", "bus"])
>>> ap.update({"boxes": [[10, 10, 50, 40]], "labels": [0]},
...           {"boxes": [[15, 10, 50, 40]], "scores": [0.9], "labels": [0]})
>>> scores = ap.compute()                                  # fractions; None: no such object
>>> round(scores["AP"], 3), scores["per_class"]["bus"]
(0.8, None)
>>> iou = MeanIoU(["direct", "alternative", "background"], background=2)
>>> iou.update(np.uint8([[0, 0, 1, 2]]), np.uint8([[0, 1, 1, 0]]))    # ground truth, prediction
>>> iou.compute()["mIoU"], iou.compute()["mIoU_all"]       # without background; with background
(0.5, 0.27777777777777773)
"""
import argparse
import base64
import contextlib
import datetime
import glob
import io
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
LANE = ("crosswalk", "double other", "double white", "double yellow", "road curb", "single other",
        "single white", "single yellow", "background")
BDD_CLASSES = CLASSES | {"lane": LANE}              # lane: only if it is asked for
RESERVED = {"boxes", "labels", "scores", "crowd", "images", "dropped", "coco", "checkpoint",
            "notes", "memory", "SS", "DA", "det_20", "sem_seg",
            *dir(torch.nn.ModuleDict())}            # no names of tasks
RENAMED = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian",
           "van": "car"}
CROWDS = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}  # crowd boxes
NUIMAGES = {  # last part of a nuImages category's name -> semantic class
    "animal": "animal", "driveable_surface": "driveable surface", "adult": "adult",
    "child": "child", "construction_worker": "construction worker",
    "personal_mobility": "personal mobility", "police_officer": "police officer",
    "stroller": "stroller", "wheelchair": "wheelchair", "barrier": "barrier", "debris": "debris",
    "pushable_pullable": "pushable object", "trafficcone": "traffic cone",
    "bicycle_rack": "bicycle rack", "bicycle": "bicycle", "bendy": "bendy bus",
    "rigid": "rigid bus", "car": "car", "construction": "construction vehicle",
    "ego": "ego vehicle", "ambulance": "ambulance", "police": "police car",
    "motorcycle": "motorcycle", "trailer": "trailer", "truck": "truck"}
NUIMAGES_RENAMED = {  # semantic class -> detection class, if its name differs
    "adult": "pedestrian", "child": "pedestrian", "construction worker": "pedestrian",
    "police officer": "pedestrian", "bendy bus": "bus", "rigid bus": "bus"}
OLD_MASKS = {"semantic": "seg/labels", "drivable": "drivable_maps/labels"}    # the 2018 release's
COLUMNS = {  # of the printed table: task and key of the score
    "mAP": ("detection", "AP"), "AP50": ("detection", "AP50"), "AP75": ("detection", "AP75"),
    "mIoU (SS)": ("semantic", "mIoU"), "mIoU (DA)": ("drivable", "mIoU"),
    "DA 3-cl.": ("drivable", "mIoU_all"), "lane F1 2px": ("lane", "F1 2px"),
    "lane/not IoU": ("lane", "binary IoU"), "lane/not recall": ("lane", "binary recall")}
BOX_KEYS = {"boxes", "labels", "scores", "crowd"}   # of targets and predictions; others are tasks
IGNORE = 255
UNSURE_LANE = 127           # lane byte of pixels without a pseudo label; toolkit: background
MAX_PIXELS = 5 * 10 ** 7    # larger images and masks are refused: decompression bombs
MAX_COORDINATE = 1e6        # of a label's box, in pixels
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
BATCH = {"cuda": 8, "cpu": 4}           # images at a time in prediction, by type of device
WORKERS = {"cuda": 8, "cpu": 0}         # processes that read images
SAMPLE = Path(__file__).resolve().parent / "tests" / "roads"


class InputError(ValueError):
    """Files that cannot be used; the message names the file and the entry and says what to do."""


def require(good, message: str) -> None:
    if not good:
        raise InputError(message)


def entry_error(where: str, field: str, value, expected: str) -> InputError:
    return InputError(f"{where} has {field} {value!r:.200}: expected {expected}.")


def kind_of(task: str) -> str:
    """Returns "boxes" for detection, "mask" for every other task."""
    return "boxes" if task == "detection" else "mask"


def mask_folder(task: str) -> str:
    return f"labels/{'sem_seg' if task == 'semantic' else task}/masks"


def is_lane(task: str, classes: Sequence[str]) -> bool:
    """Whether a task is BDD100K's lane marking, with bytes for ids and a score of its own."""
    return task == "lane" and tuple(classes) == LANE


# ---------------------------------------------------------------------- files and processes

def pictures_in(root: Path, folder: str, masks: bool = False) -> dict[str, str]:
    """Returns the images or masks in root/folder, if it exists: {stem: path below root}."""
    if not (root / folder).is_dir():
        return {}
    pictures = {}
    for name in sorted(os.listdir(root / folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in ((".png",) if masks else SUFFIXES) and not name.startswith("."):
            if masks:
                stem = re.sub("_(train|drivable)_id$", "", stem)    # of the 2018 release
            require(stem not in pictures, f"{root / pictures.get(stem, '')} and {name} have the "
                    "same stem: keep one of them.")
            pictures[stem] = f"{folder}/{name}"
    return pictures


def open_picture(path: Path) -> Image.Image:
    """Decodes a picture and turns it as its EXIF tag says, as viewers and annotation tools do;
    raises InputError if it is missing, broken, cut off or too large."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.size}, expected at most {MAX_PIXELS} pixels")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as broken:
        raise InputError(f"{path} cannot be read as an image ({broken}): fetch it anew.") from None


def read_image(path: Path) -> Tensor:
    """uint8 RGB [3, H, W] of a JPEG, PNG or WebP."""
    picture = open_picture(path)                    # modes I, I;16 and F have 16 or 32 bits
    require(picture.mode[0] not in "IF", f"{path} has more than 8 bits a pixel (mode {picture.mode}"
            "): scale its values to 0 to 255 and save it with 8 bits.")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def read_mask(path: Path, num_classes: int = IGNORE, lane: bool = False) -> np.ndarray:
    """uint8 [H, W] of class ids below num_classes, or 255, from a single-channel or palette PNG. Of
    a palette the index is the id. lane: decodes BDD100K's lane bytes, `--dsbccc` from the highest
    bit: direction, style, background, category."""
    picture = open_picture(path)
    require(picture.format == "PNG" and (picture.mode in ("1", "L", "P") or picture.mode[0] == "I"),
            f"{path} is a {picture.format} of mode {picture.mode}, not class ids: "
            "expected an 8-bit single-channel PNG from labels/*/masks (not from colormaps).")
    mask = np.array(picture)
    with open(path, "rb") as file:
        bits = file.read(25)[24]                                # PNG's header: its bit depth
    if picture.mode == "L" and bits < 8:
        mask //= 255 // (2 ** bits - 1)                         # Pillow scales ids to 0..255
    if path.stem.endswith("_drivable_id"):              # of 2018: background, direct, alternative
        mask = np.where(mask < 3, (mask + 2) % 3, mask)
    if lane:
        background = (mask < 256) & (mask & 8 > 0)
        ids = np.where(background, 8, mask - (mask & 0b111000))   # other bits: unknown ids
        mask = np.where(mask == UNSURE_LANE, IGNORE, ids)
    for unknown in mask[(mask >= num_classes) & (mask != IGNORE)]:
        raise InputError(f"{path} holds id {unknown}: expected 0 to {num_classes - 1}, or 255.")
    return mask.astype(np.uint8)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator:
    """Opens a file to write bytes to, which replaces `path` only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as f:
            yield f
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                        # RuntimeError: torch.save's
        raise OSError(f"cannot write {path} ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def write_picture(path: Path, picture: Image.Image) -> None:
    with atomic_write(path) as f:
        picture.save(f, "PNG", compress_level=1)


def write_json(path: Path, value, **style) -> None:
    with atomic_write(path) as f:
        f.write(json.dumps(value, **style).encode())


def write_entries(path: Path, entries: Iterable) -> None:
    """Writes a JSON list, one entry per line, without holding all entries in memory."""
    with atomic_write(path) as f:
        f.write(b"[")
        for n, entry in enumerate(entries):
            f.write(((",\n" if n else "") + json.dumps(entry)).encode())
        f.write(b"]\n")


def rank_and_world() -> tuple[int, int]:
    distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def from_all_ranks(value) -> list:
    """Gathers a value from every process, in the order of their ranks."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def delay_signals(worker: int) -> None:
    """Makes a DataLoader worker ignore SIGINT and outlive SIGTERM by ten seconds, so that the main
    process can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))      # SIGALRM ends the worker


# --------------------------------------------------------------------------- boxes from JSON

def read_json(path: Path, **options):
    try:
        with open(path, encoding="utf-8-sig") as f:             # skips a byte order mark
            return json.load(f, **options)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{path} is not valid JSON ({broken}): fetch or write it anew.") from None


def as_numbers(values: list) -> np.ndarray:
    """Converts JSON values to float64 [N]; NaN replaces all that are no finite numbers."""
    return np.array([v if type(v) in (int, float) and abs(v) <= sys.float_info.max else math.nan
                     for v in values], np.float64)


def as_boxes(values: list) -> np.ndarray:
    """Converts JSON values to float64 [N, 4]; NaN replaces all that are no finite numbers."""
    lists = [v if type(v) is list and len(v) == 4 else [None] * 4 for v in values]
    return as_numbers(list(itertools.chain.from_iterable(lists))).reshape(-1, 4)


class Entries:
    """A list of JSON objects, read and checked by columns. Errors name the first bad entry.
    where(n): the beginning of the message for entry n."""

    def __init__(self, path: Path, entries: list, where: Callable[[int], str] | None = None):
        self.entries = [entry if type(entry) is dict else {} for entry in entries]
        self.where = where or (lambda n: f"{path}: entry {n}")

    def check(self, good: np.ndarray, key: str, expected: str) -> None:
        """Raises InputError for the first entry that is not good [N] and names its value of key."""
        for n in np.flatnonzero(~good):
            raise entry_error(self.where(n), key, self.entries[n].get(key), expected)

    def column(self, key: str, types: Sequence[type], expected: str) -> list:
        """Returns the values under a key, all of one of the types (True is no int)."""
        values = [entry.get(key) for entry in self.entries]
        self.check(np.array([type(v) in types for v in values], bool), key, expected)
        return values

    def numbers(self, key: str, expected: str, most: float = math.inf) -> np.ndarray:
        """Returns the finite numbers under a key, float64 [N] from 0 to most."""
        numbers = as_numbers([entry.get(key) for entry in self.entries])
        self.check((numbers >= 0) & (numbers <= most), key, expected)
        return numbers

    def flags(self, key: str) -> np.ndarray:
        """Returns the flags under a key, bool [N]; False if there is none."""
        return np.array(self.column(key, [bool, int, float, type(None)], "true or false"), bool)


def require_unique(path: Path, key: str, values: list) -> None:
    for value, count in Counter(values).items():
        require(count == 1, f"{path}: {key} {value} occurs more than once: keep one of them.")


def positions(names: Sequence, among: Sequence) -> np.ndarray:
    """Index of each name among others; -1 if it is not there."""
    index = {name: i for i, name in enumerate(among)}
    return np.array([index.get(name, -1) for name in names], np.int64)


def stems_of(path: Path, files: list[str]) -> list[str]:
    stems = [Path(file.replace("\\", "/")).stem for file in files]          # of Windows, too
    require_unique(path, "image", stems)
    return stems


def read_boxes(path: Path, content, classes: Sequence[str], predicted: bool = False) -> dict:
    """Reads the boxes of Scalabel's frames or COCO's instances. Returns `stems`, a list of the
    images' stems, and for each box `image` [N] (index into stems), `boxes` [N, 4] float64 xyxy,
    `label` and `crowd` [N]. With BDD100K's own classes, older names are renamed and CROWDS become
    crowds. predicted: adds `score` [N]; unknown categories have label -1."""
    coco = isinstance(content, dict) and "annotations" in content
    read = read_instances_by_name if coco else read_frames
    files, objects, table = read(path, content)
    stems = stems_of(path, files)
    names = objects.column("category", [str], f"one of {', '.join(classes)}")
    renamed = RENAMED | CROWDS if tuple(classes) == CLASSES["detection"] else {}
    label = positions([renamed.get(name, name) for name in names], classes)
    if predicted:
        table["score"] = objects.numbers("score", "a score from 0 to 1", most=1)
    else:
        objects.check(label >= 0, "category", f"one of {', '.join(classes)}")
    table["crowd"] |= np.array([name in CROWDS and name in renamed for name in names], bool)
    return table | {"stems": stems, "label": label}


def read_label_lists(path: Path, content) -> tuple[list[str], list[list]]:
    """Reads Scalabel JSON, [...] or {"frames": [...]}: file names and each file's labels."""
    frames = content.get("frames") if isinstance(content, dict) else content
    require(isinstance(frames, list), f"{path} holds no list of frames: expected Scalabel JSON.")
    frames = Entries(path, frames)
    files = frames.column("name", [str], "IMAGE.jpg, as in Scalabel JSON")
    return files, [labels or [] for labels in frames.column("labels", [list, type(None)], "a list")]


def read_frames(path: Path, content) -> tuple[list[str], Entries, dict]:
    """Reads the boxes in Scalabel JSON: file names, labels, and the labels' `image`, `boxes`,
    `crowd`. Labels without `box2d`, such as polygons of lanes, are left out."""
    files, lists = read_label_lists(path, content)
    boxed = [(i, n, label) for i, labels in enumerate(lists) for n, label in enumerate(labels)
             if type(label) is not dict or label.get("box2d") is not None]
    image = np.array([i for i, _, _ in boxed], np.int64)

    def where(entry: int) -> str:
        i, n, _ = boxed[entry]
        return f"{path}: frame {files[i]}, label {n}"

    labels = Entries(path, [label for _, _, label in boxed], where)
    expected = "finite x1 <= x2, y1 <= y2 in pixels"
    corners = labels.column("box2d", [dict], expected)
    boxes = as_boxes([[box.get(key) for key in ("x1", "y1", "x2", "y2")] for box in corners])
    boxes[:, 2:] += 1                                               # inclusive -> exclusive ends
    good = (np.abs(boxes) <= MAX_COORDINATE).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1)
    labels.check(good, "box2d", expected)
    attributes = Entries(path, [label.get("attributes") for label in labels.entries], where)
    crowd = attributes.flags("crowd") | attributes.flags("ignored")
    return files, labels, {"image": image, "boxes": boxes, "crowd": crowd}


def read_instances_by_name(path: Path, content: dict) -> tuple[list[str], Entries, dict]:
    """Reads COCO's instances as `read_frames` reads Scalabel's frames; areas are not needed."""
    images, class_of, annotations, truth = read_instances(path, content)
    files = Entries(path, content["images"]).column("file_name", [str], "IMAGE.jpg")
    file_of = {entry["id"]: file for entry, file in zip(content["images"], files)}
    boxes = np.hstack([truth["box"][:, :2], truth["box"][:, :2] + truth["box"][:, 2:]])
    annotations.check((np.abs(boxes) <= MAX_COORDINATE).all(1), "bbox", "pixels")
    named = [{"category": class_of[entry["category_id"]]} for entry in annotations.entries]
    table = {"image": truth["image"], "boxes": boxes, "crowd": truth["crowd"]}
    return [file_of[image] for image in images], Entries(path, named), table


def read_instances(path: Path, content: dict) -> tuple[list[int], dict[int, str], Entries, dict]:
    """Reads COCO's instances: image ids and {class id: name}, both sorted, annotations, and the
    ground truth as `coco_ap` takes it, except for areas."""
    for key in ("images", "categories", "annotations"):
        require(isinstance(content.get(key), list), f"{path} holds no list of {key}: expected "
                "COCO's format for ground truth and predictions.")
    categories, annotations = (Entries(path, content[key]) for key in ("categories", "annotations"))
    images = Entries(path, content["images"])
    kind = str if images.entries and type(images.entries[0].get("id")) is str else int
    images = images.column("id", [kind], "a whole number, or a text in all images")
    ids = categories.column("id", [int], "a whole number")
    names = categories.column("name", [str], "a text")
    for key, values in (("id", images), ("id", ids), ("name", names)):
        require_unique(path, key, values)
    images, class_of = sorted(images), dict(sorted(zip(ids, names)))
    truth = coco_boxes(annotations, images, list(class_of))
    annotations.check(truth["image"] >= 0, "image_id", "one that the file lists")
    annotations.check(truth["label"] >= 0, "category_id", "one that the file lists")
    truth["crowd"] = annotations.flags("iscrowd")
    return images, class_of, annotations, truth


def coco_boxes(entries: Entries, images: list, categories: list) -> dict[str, np.ndarray]:
    """Annotations or results as arrays: `image` and `label` [N], indices among these ids (-1: none
    of them), `box` [N, 4] x, y, width, height."""
    image = entries.column("image_id", [int, str], "a whole number, or a text")
    label = entries.column("category_id", [int], "a whole number")
    boxes = as_boxes([entry.get("bbox") for entry in entries.entries])
    good = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= 0).all(1)
    entries.check(good, "bbox", "4 finite numbers, no negative size")
    return {"image": positions(image, images), "label": positions(label, categories), "box": boxes}


# -------------------------------------------------------------------- lane marking from polygons

def read_lanes(path: Path, content, of_2018: bool) -> dict[str, bytes]:
    """Reads the lane markings in Scalabel JSON. Their category is a class of `lane`; in the 2018
    release, which holds other tasks too, it is "lane" and the class is attribute laneType. Returns
    for each stem, as JSON, (class id, points) in the order of drawing."""
    files, lists = read_label_lists(path, content)
    key, lanes = "laneType" if of_2018 else "category", {}
    for file, stem, labels in zip(files, stems_of(path, files), lists):
        markings = []
        for n, label in enumerate(Entries(path, labels).entries):
            if of_2018 and label.get("category") != "lane":
                continue
            where, lines = f"{path}: frame {file}, label {n}", label.get("poly2d")
            attributes = label.get("attributes") if of_2018 else label
            name = attributes.get(key) if isinstance(attributes, dict) else None
            if name not in LANE[:-1]:
                raise entry_error(where, key, name, f"one of {', '.join(LANE[:-1])}")
            try:
                markings += [(LANE.index(name), polyline(line)) for line in lines]
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
                raise entry_error(where, "poly2d", lines, "lines of 2 or more finite vertices "
                                  "[x, y] with as many types, L or C") from None
        lanes[stem] = json.dumps(markings).encode()
    return lanes


def polyline(line: dict) -> list[list[float]]:
    """Returns the points along a line of `poly2d`: three vertices CCC are the control points and
    the end of a cubic Bézier curve."""
    types, vertices = line["types"], np.array(line["vertices"], np.float64)
    if not re.fullmatch("[LC]{2,}", types) or vertices.shape != (len(types), 2) or (
            not np.abs(vertices).max() <= MAX_COORDINATE):
        raise ValueError
    points, t = [vertices[:1]], np.linspace(0, 1, 17)[1:, None]
    bezier = np.hstack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t ** 2, t ** 3])
    for segment in re.finditer("CCC|.", types[1:]):
        ends = vertices[segment.start():segment.end() + 1]  # with the vertex before, [2 or 4, 2]
        points.append(bezier @ ends if segment[0] == "CCC" else ends[1:])
    points += [vertices[:1]] if line.get("closed") else []
    return np.concatenate(points).round(2).tolist()


# -------------------------------------------------------------------------------- data sets

def find_data(given: str | None = None, dataset: str = "bdd100k") -> Path:
    """The data folder: the given one, else $BDD100K or $NUIMAGES, data/, or the sample."""
    for place in (os.environ.get(dataset.upper()), f"data/{dataset}"):
        if given is None and place and Path(place).is_dir():
            given = place
    require(given is not None or dataset == "bdd100k",
            f"no {dataset} data: give its folder with --data, or put it in data/{dataset}.")
    return SAMPLE if given is None else Path(given)


def read_classes(root: Path, tasks: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
    """Reads a data folder's class names by task from its classes.json. Without that file they are
    BDD100K's, for the paper's tasks and those of `tasks`."""
    path = root / "classes.json"
    if not path.is_file():
        return BDD_CLASSES if "lane" in tasks else CLASSES
    content = read_json(path)
    require(isinstance(content, dict) and content,
            f"{path} holds {content!r:.200}: expected a list of class names for each task.")
    for task, names in content.items():
        require(re.fullmatch(r"\w+", task, re.ASCII) and task not in RESERVED,
                f"{path} has a task {task!r}, which is reserved or has other characters than "
                "letters, digits and _: rename it.")
        good = isinstance(names, list) and all(type(name) is str and name for name in names)
        distinct = {" ".join(name.lower().split()) for name in names} if good else ()
        if not good or len(distinct) < len(names) or not 0 < len(names) < IGNORE:
            raise entry_error(f"{path}", task, names, f"1 to {IGNORE - 1} different names")
    return {task: tuple(content[task]) for task in [*CLASSES, *content] if task in content}


def background_of(classes: Sequence[str]) -> int | None:
    """The class that a task's score leaves out: the last, if called background."""
    return len(classes) - 1 if classes[-1] == "background" else None


class LabelledImages:
    """One split of a data set: the parts that all readers share. Images are numbered in the order
    of their `stems`; `files` are their paths below `root`. `labelled[task]` flags those with
    labels. Boxes live in flat arrays, which worker processes share: `boxes` [N, 4] float64,
    `box_labels` [N] and `crowd` [N]; those of image i are at `box_slice(i)`. Readers implement
    `mask(task, i)`: uint8 class ids [H, W], 255 = ignored."""
    classes: dict[str, tuple[str, ...]]
    size: tuple[int, int]                                           # of the images, width, height
    without_image = {}                              # task: stems of labels whose image is missing

    def __len__(self) -> int:
        return len(self.files)

    def keep_boxes(self, image, boxes, labels, crowd) -> None:
        """Stores boxes by their image; drops those of image -1."""
        order = np.argsort(image, kind="stable")
        order = order[image[order] >= 0]
        self.boxes, self.crowd = boxes[order], crowd[order]
        self.box_labels = labels[order].astype(np.int16)
        self.offsets = np.searchsorted(image[order], np.arange(len(self) + 1))  # each image's first

    def box_slice(self, i: int) -> slice:
        return slice(self.offsets[i], self.offsets[i + 1])

    def image(self, i: int) -> Tensor:
        return read_image(self.root / self.files[i])

    def target(self, i: int, tasks: Iterable[str] | None = None,
               size: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Reads the labels of image i for the given tasks (default: all) that it is labelled for:
        `boxes` [N, 4] float32, `labels` [N] int64, `crowd` [N] bool; by mask task uint8 [H, W].
        size: the image's (H, W), which masks must have."""
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
                require((h, w) == (height, width), f"{self.labels}: the {task} mask of "
                        f"{self.files[i]} is {w}x{h}, the image {width}x{height}: make them equal.")
                target[task] = torch.from_numpy(mask)
        return target

    def sample(self, i: int, tasks: Iterable[str] | None = None) -> tuple[Tensor, dict]:
        image = self.image(i)
        return image, self.target(i, tasks, image.shape[1:])


class BDD100K(LabelledImages):
    """One split of a data set in BDD100K's official layout, with the classes of `read_classes`.
    root: holds images/100k/{split} and images/10k/{split}; a stem in both counts once.
    labels: the folder, by default root, of labels/det_20/det_{split}.json (Scalabel or COCO),
        labels/sem_seg/masks/{split} and labels/TASK/masks/{split}. Any label may be missing.
    tasks: asks for BDD100K's `lane` beside the paper's tasks. Its masks hold the official bytes; if
        there are none, labels/lane/polygons/lane_{split}.json is drawn.
    The 2018 release is read as it is: seg/, drivable_maps/, bdd100k_labels_images_*.json."""
    classes, size = CLASSES, (1280, 720)

    def __init__(self, root: str | Path, split: str = "val", labels: str | Path | None = None,
                 tasks: Iterable[str] = ()):
        self.root, self.split, self.labels = Path(root), split, Path(labels or root)
        require(self.root.is_dir(), f"no data folder {root}: expected BDD100K's layout there.")
        self.classes = read_classes(self.root, tasks)
        files = {}                                                  # by stem
        for folder in (f"seg/images/{split}", f"images/10k/{split}", f"images/100k/{split}"):
            files |= pictures_in(self.root, folder)
        advice = " (move a part of train there, images and labels)" if split == "val" else ""
        require(files, f"no images in {root}: expected images/100k/{split} or images/10k/{split}"
                f"{advice}.")
        self.stems, self.files = map(np.array, zip(*sorted(files.items())))
        path = self.labels / f"labels/det_20/det_{split}.json"
        old = self.labels / f"labels/bdd100k_labels_images_{split}.json"
        path = old if old.is_file() and not path.is_file() else path
        has_boxes = "detection" in self.classes and path.is_file()
        table = read_boxes(path, read_json(path) if has_boxes else [],
                           self.classes.get("detection", ()))
        image = positions(table["stems"], self.stems.tolist())[table["image"]]
        self.keep_boxes(image, table["boxes"], table["label"], table["crowd"])
        self.labelled, self.without_image, self.places = {}, {}, {}
        self.masks, self.lanes = {}, {}         # task: each image's file; stem: markings to draw
        for task, names in self.classes.items():
            if kind_of(task) == "boxes":
                self.places[task], labels = f"labels/det_20/det_{split}.json", table["stems"]
            else:
                self.places[task] = f"{mask_folder(task)}/{split}/*.png"
                labels = pictures_in(self.labels, f"{OLD_MASKS.get(task)}/{split}", masks=True)
                labels |= pictures_in(self.labels, f"{mask_folder(task)}/{split}", masks=True)
                self.masks[task] = np.array([labels.get(stem, "") for stem in self.stems.tolist()])
            if is_lane(task, names) and not labels:
                polygons = f"labels/lane/polygons/lane_{split}.json"
                self.places[task] += f" or {polygons}"
                lanes = self.labels / polygons if (self.labels / polygons).is_file() else old
                if lanes.is_file():
                    self.lanes = labels = read_lanes(lanes, read_json(lanes), lanes == old)
            self.labelled[task] = np.isin(self.stems, list(labels))
            self.without_image[task] = sorted(set(labels) - files.keys())

    def mask(self, task: str, i: int) -> np.ndarray:
        names, file = self.classes[task], self.masks[task][i]
        if file:
            return read_mask(self.labels / file, len(names), is_lane(task, names))
        mask = Image.new("L", self.size, len(LANE) - 1)         # polygons are of this size
        for k, points in json.loads(self.lanes[self.stems[i]]):
            line = [tuple(point) for point in points]
            ImageDraw.Draw(mask).line(line, fill=k, width=3)    # as wide as in the official masks
        return np.array(mask)


class NuImages(LabelledImages):
    """The keyframes of one split of nuImages: tables in root/v1.0-{split}, images in root/samples.

    The detection classes are those of mmdetection3d's converter. The semantic classes are all
    annotated categories: surfaces are painted first, then objects in the order of their tokens, as
    in nuImages' devkit; other pixels are ignored. Annotations without a mask are left out."""
    classes = {"detection": ("car", "truck", "trailer", "bus", "construction vehicle", "bicycle",
                             "motorcycle", "pedestrian", "traffic cone", "barrier"),
               "semantic": tuple(NUIMAGES.values())}
    size = 1600, 900
    places = {"detection": "object_ann.json", "semantic": "surface_ann.json"}

    def __init__(self, root: str | Path, split: str = "val", tasks: Iterable[str] = ()):
        self.root, self.split, self.labels = Path(root), split, Path(root) / f"v1.0-{split}"
        require(self.labels.is_dir(), f"no folder {self.labels}: expected nuImages' tables there.")
        table = self.table("sample_data", token=[str], filename=[str], is_key_frame=[bool],
                           height=[int], width=[int])
        frames = [entry for entry in table.entries if entry["is_key_frame"]]
        require(frames, f"{self.labels}/sample_data.json lists no keyframes: fetch it anew.")
        frames.sort(key=lambda frame: (Path(frame["filename"]).stem, frame["filename"]))
        for frame in frames:
            name, height, width = (frame[key] for key in ("filename", "height", "width"))
            inside = name.startswith("samples/") and ".." not in Path(name).parts
            sized = min(height, width) > 0 and height * width <= MAX_PIXELS
            require(inside and sized and "\0" not in name,
                    f"{self.labels} names {name!r} of {width}x{height} pixels: expected "
                    f"samples/CAMERA/NAME.jpg, nothing outside the data, at most {MAX_PIXELS}.")
        self.files = np.array([frame["filename"] for frame in frames])
        self.stems = np.array([Path(file).stem for file in self.files])
        self.shapes = np.array([(frame["height"], frame["width"]) for frame in frames])
        self.keep_annotations({frame["token"]: i for i, frame in enumerate(frames)})

    def table(self, name: str, /, **types: Sequence[type]) -> Entries:
        """Reads these columns of an official table; values must be of one of the column's types."""
        def wanted(entry: dict) -> dict:                    # other columns would fill the memory
            return {key: entry[key] for key in types if key in entry} or entry

        path = self.labels / f"{name}.json"
        content = read_json(path, object_hook=wanted)
        entries = Entries(path, content if isinstance(content, list) else [content])
        for key, allowed in types.items():
            entries.column(key, allowed, "nuImages' official table")
        return entries

    def annotations(self) -> list[dict]:
        """Reads all annotations, in the order of painting; only objects have a `bbox`."""
        if not any(self.labels.glob("*_ann.json")):
            return []
        types = dict(sample_data_token=[str], category_token=[str], mask=[dict, type(None)])
        surfaces = self.table("surface_ann", **types)
        objects = self.table("object_ann", token=[str], **types, bbox=[list])
        boxes = as_boxes([entry["bbox"] for entry in objects.entries])
        objects.check((np.abs(boxes) <= MAX_COORDINATE).all(1), "bbox",
                      "[xmin, ymin, xmax, ymax] in pixels")
        return surfaces.entries + sorted(objects.entries, key=lambda entry: entry["token"])

    def keep_annotations(self, image_of: dict[str, int]) -> None:
        """Stores boxes, and each image's run-length masks in the order of painting. The masks are
        JSON in one array of bytes, which worker processes share. image_of: frame token -> image."""
        boxes, masks = [], [[] for _ in self.files]
        semantic, detection = self.classes["semantic"], self.classes["detection"]
        categories = self.table("category", token=[str], name=[str])
        names = {entry["token"]: entry["name"] for entry in categories.entries}
        for entry in self.annotations():
            frame, mask = entry["sample_data_token"], entry.get("mask")
            if mask is None or frame not in image_of:
                continue
            i, where = image_of[frame], f"{self.labels}: an annotation of {frame}"
            category = names.get(entry["category_token"], entry["category_token"])
            name = NUIMAGES.get(category.split(".")[-1])
            if name is None:
                raise entry_error(where, "category", category, f"one of {', '.join(NUIMAGES)}")
            shape, counts = self.shapes[i].tolist(), mask.get("counts")
            if mask.get("size") != shape or type(counts) is not str:
                raise entry_error(where, "mask", mask, f"the image's size, {shape}, and base64")
            masks[i].append((semantic.index(name), counts))
            name = NUIMAGES_RENAMED.get(name, name)
            x1, y1, x2, y2 = entry.get("bbox", [0, 0, 0, 0])        # surfaces have none
            if name in detection and x1 < x2 and y1 < y2:
                boxes.append((i, detection.index(name), x1, y1, x2, y2))
        table = np.array(boxes, np.float64).reshape(-1, 6)
        self.keep_boxes(table[:, 0].astype(np.int64), table[:, 2:], table[:, 1],
                        np.zeros(len(table), bool))
        self.labelled = dict.fromkeys(self.classes, np.full(len(self), any(masks)))  # all or none
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
                raise InputError(f"{self.labels}: a mask of {self.files[i]} cannot be read "
                                 f"({broken}): fetch the tables anew.") from None
        return mask


def rle_decode(counts: str, height: int, width: int) -> np.ndarray:
    """Decodes COCO's run-length code to a mask, bool [height, width]; raises ValueError if the runs
    do not fill it. The code holds lengths of runs of 0 and 1 in turn, column by column, in 5-bit
    groups; from the fourth on each is the difference from the length two runs before."""
    lengths, value, shift = [], 0, 0
    for code in counts.encode("ascii"):
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32 and shift < 60:            # more groups follow; from 60 bits on it is broken
            continue
        if bits & 16:                                               # negative
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value, shift = 0, 0
    if sum(lengths) != height * width or min(lengths) < 0:
        raise ValueError(f"runs that do not fill a mask of {width}x{height}")
    ones = np.arange(len(lengths)) % 2 > 0
    return np.repeat(ones, lengths).reshape(width, height).T


class ImageFiles(LabelledImages):
    """The images at a path, without labels: a file, a folder, or a pattern such as 'a/*.jpg'."""
    classes, root = {}, Path()

    def __init__(self, path: str):
        pattern = f"{glob.escape(path)}/*" if Path(path).is_dir() else path     # not hidden ones
        files = [path] if Path(path).is_file() else glob.glob(pattern)
        self.files = sorted(file for file in map(Path, files) if file.suffix.lower() in SUFFIXES)
        require(self.files, f"no pictures at {path}: give a file, a folder or a quoted pattern.")


DATASETS = {"bdd100k": BDD100K, "nuimages": NuImages}


def read_items(data: LabelledImages, tasks: Sequence[str], strict: bool,
               indices: Iterable[int]) -> list[tuple]:
    """Reads (i, image, target) of images; strict=False skips unreadable files with a NOTE."""
    items = []
    for i in indices:
        try:
            items.append((i, *data.sample(i, tasks)))
        except (InputError, OSError) as error:
            if strict:
                raise
            tqdm.write(f"NOTE: {data.files[i]} is skipped: {error}", file=sys.stderr)
    return items


def check_image(data: LabelledImages, i: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """Returns the errors in an image and its labels, and each mask's number of pixels by id."""
    errors, pixels = [], {}
    for task in data.classes:
        try:
            _, target = data.sample(i, [task])
            if task in target:
                pixels[task] = np.bincount(target[task].flatten(), minlength=IGNORE + 1)
        except (InputError, OSError) as error:
            errors.append(str(error))
    return list(dict.fromkeys(errors)), pixels                      # without duplicates


def usable_tasks(train: LabelledImages, val: LabelledImages, asked=()) -> tuple[list, list, list]:
    """Returns three lists: the tasks that a run learns (those asked for, or all with labels), notes
    on the labels, and errors, each of which ends a run. train.py and --check follow these rules."""
    trainable, notes, errors = {}, [], []                   # trainable: flags of images by task
    for task in asked or train.classes:
        for data, use in ((train, "learned"), (val, "scored")):
            count, spare = data.labelled[task].sum(), data.without_image.get(task)
            labels = f"{task} labels for {data.split}"
            if spare:
                messages = notes if count else errors
                messages.append(
                    f"{data.labels}: {len(spare)} of {len(spare) + count} {labels} have no image "
                    f"of the same name, such as {spare[0]}.")
            elif not count:
                messages = errors if asked and data is train else notes
                messages.append(f"{data.labels} has no {labels}, expected {data.places[task]}: "
                                f"{task} cannot be {use}.")
        usable = train.labelled[task] & ~np.isin(train.stems, val.stems)
        if usable.any():
            trainable[task] = usable
        elif train.labelled[task].any():
            errors.append(f"{train.labels}: all images with {task} labels for train are in val "
                          "too: keep each image in one of them.")
    # Each task can have an image of its own if all groups of tasks have as many (Hall's theorem).
    groups = (group for n in range(2, len(trainable) + 1)
              for group in itertools.combinations(trainable.values(), n))
    if any(np.any(group, axis=0).sum() < len(group) for group in groups):
        notes.append("too few images for disjoint sets: only --setting full can use them.")
    if not trainable and not errors:
        errors = notes                                      # they say what is missing
    return list(trainable), notes, errors


def check_data(root: str | Path, dataset: str = "bdd100k", workers: int = 0) -> bool:
    """Reads all images and labels of a data folder as a run does. Prints the numbers of images,
    labels and boxes, then each error; returns whether there is none."""
    bad, notes, splits = [], [], {}
    labels = Path(root, "labels")
    has_lane = (labels / "lane").is_dir() or any(labels.glob("bdd100k_labels_images_*.json"))
    lane = ["lane"] if has_lane else []
    for split in ("train", "val"):
        try:
            data = splits[split] = DATASETS[dataset](root, split, tasks=lane)
        except (InputError, OSError) as error:
            bad.append(str(error))
            continue
        loader = DataLoader(range(len(data)), batch_size=None, num_workers=workers,
                            collate_fn=partial(check_image, data), worker_init_fn=delay_signals)
        pixels = Counter()                                          # task: pixels by id
        for errors, counts in tqdm(loader, desc=f"check {split}", leave=False):
            bad += errors
            pixels.update(counts)                                   # adds the arrays
        print(f"{data.root}, {split}: {len(data)} images")
        for task in data.classes:
            print(f"  {task}: {np.count_nonzero(data.labelled[task])} labelled images")
        for task, counts in pixels.items():
            shares, names = counts / counts.sum(), data.classes[task]
            missing = [name for name, share in zip(names, shares) if not share]
            print(f"  {task}: {shares[IGNORE]:.1%} of the pixels are ignored (255); classes without"
                  f" an example: {', '.join(missing) or 'none'}")
            if names == CLASSES["drivable"] and shares[0] > 0.5:
                notes.append(f"{split}: {shares[0]:.0%} of drivable pixels are direct: if these are"
                             " the 2018 release's ids, name the files STEM_drivable_id.png")
        for k, name in enumerate(data.classes.get("detection", ())):
            print(f"    {name}: {np.count_nonzero(data.box_labels == k)} boxes")
    if len(splits) == 2:
        _, more, errors = usable_tasks(**splits)
        notes, bad = notes + more, bad + errors
    print(*(f"NOTE: {note}" for note in notes), *(f"BAD  {error}" for error in bad),
          "files marked BAD cannot be used" if bad else "a run can use all of this", sep="\n")
    return not bad


# --------------------------------------------------------------------------- writing predictions

class LabelWriter:
    """Writes predictions in BDD100K's layout, which `BDD100K(root, split, labels=folder)` reads and
    the official toolkit scores. Threads write the masks meanwhile; `close` writes the boxes."""

    def __init__(self, folder: str | Path, split: str, classes: dict = BDD_CLASSES):
        self.folder, self.split, self.classes, self.boxes = Path(folder), split, classes, []
        self.threads, self.unwritten = ThreadPoolExecutor(4), []

    def add(self, name: str, prediction: dict[str, Tensor]) -> None:
        """prediction: `boxes` with `labels` and `scores`, uint8 maps by task, or some of these."""
        for task in prediction.keys() - BOX_KEYS:
            path = self.folder / mask_folder(task) / self.split / f"{Path(name).stem}.png"
            mask = prediction[task].cpu().numpy()
            if is_lane(task, self.classes.get(task, ())):       # style and direction: 0
                mask = np.where(mask == 8, 255, np.where(mask == IGNORE, UNSURE_LANE, mask))
            picture = Image.fromarray(mask.astype(np.uint8))
            self.unwritten.append(self.threads.submit(write_picture, path, picture))
        self.wait(at_most=64)
        if "boxes" in prediction:
            arrays = [prediction[key].cpu().numpy() for key in ("boxes", "scores", "labels")]
            self.boxes.append((Path(name).name, *arrays))

    def wait(self, at_most: int = 0) -> None:
        """Waits until at most so many masks are unwritten; raises the error of one that failed."""
        while len(self.unwritten) > at_most:
            self.unwritten.pop(0).result()

    def close(self) -> None:
        """Called by all processes; the first writes the boxes of all, sorted by file name."""
        self.wait()
        boxes = sorted(itertools.chain(*from_all_ranks(self.boxes)), key=lambda entry: entry[0])
        if boxes and rank_and_world()[0] == 0:
            write_entries(self.folder / f"labels/det_20/det_{self.split}.json",
                          (self.frame(*entry) for entry in boxes))

    def frame(self, name: str, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> dict:
        entries = []
        for (x1, y1, x2, y2), score, k in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
            entries.append({"id": str(len(entries)), "category": self.classes["detection"][k],
                            "score": score,
                            "box2d": {"x1": x1, "y1": y1, "x2": x2 - 1, "y2": y2 - 1}})
        return {"name": name, "labels": entries}


def write_coco(folder: Path, data: LabelledImages, meter: "DetectionAP") -> None:
    """Writes an evaluation's boxes as COCO files; image and category ids count from 1."""
    def entries(boxes: dict[str, np.ndarray], **columns: np.ndarray) -> Iterator[dict]:
        columns = {"image_id": boxes["image"] + 1, "category_id": boxes["label"] + 1,
                   "bbox": boxes["box"]} | columns
        for values in zip(*(values.tolist() for values in columns.values())):
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

def score_files(gt: Path, dt: Path, task: str = "detection", classes: dict = BDD_CLASSES) -> dict:
    """Scores predictions against ground truth: COCO or Scalabel JSON, or folders of PNG masks.
    Returns `evaluate`'s scores, `dropped` (what was left out, with counts), and for COCO files
    `coco`, pycocotools' twelve numbers."""
    for path, content in ((gt, "ground truth"), (dt, "predictions")):
        require(path.exists(), f"no file or folder {path}: expected {content}.")
    require(task in classes, f"--task {task} was given, but there are only classes for "
            f"{', '.join(classes)}: name its classes in classes.json.")
    if kind_of(task) == "mask":
        return score_masks(task, gt, dt, classes[task])
    require(gt.is_file() and dt.is_file(), f"{gt} and {dt} should both be JSON files: for folders "
            "of PNG masks add --task semantic, drivable or another mask task.")
    return score_boxes(gt, dt, classes[task])


def score_boxes(gt: Path, dt: Path, classes: Sequence[str]) -> dict:
    """`score_files` for JSON files of boxes. classes: for Scalabel; COCO files contain theirs."""
    gt_content, dt_content = read_json(gt), read_json(dt)
    coco = isinstance(gt_content, dict) and "annotations" in gt_content
    if coco:
        require(isinstance(dt_content, list), f"{dt} holds no list of results: expected COCO's, "
                '[{"image_id": 1, "category_id": 3, "bbox": [x, y, w, h], "score": 0.9}, ...]; if '
                "it holds annotations with scores, save that list alone.")
        results = Entries(dt, dt_content)
        images, class_of, annotations, truth = read_instances(gt, gt_content)
        without_area = [entry for entry in annotations.entries if "area" not in entry]
        for entry in without_area:
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
        truth["area"] = annotations.numbers("area", "a finite number from 0 on")
        classes = list(class_of.values())
        predicted = coco_boxes(results, images, list(class_of))
        predicted["score"] = results.numbers("score", "a score from 0 to 1", most=1)
    else:
        truth = read_boxes(gt, gt_content, classes)
        predicted = read_boxes(dt, dt_content, classes, predicted=True)
        images = sorted(truth["stems"])
        for table in (truth, predicted):
            table["image"] = positions(table.pop("stems"), images)[table["image"]]
            boxes = table.pop("boxes")
            table["box"] = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
        truth["area"] = truth["box"][:, 2] * truth["box"][:, 3]
    image, label = predicted["image"], predicted["label"]
    known = (image >= 0) & (label >= 0)
    require(known.any() or not len(known), f"none of the {len(known)} detections in {dt} is of an "
            f"image and category of {gt}: give predictions for these images.")
    dropped = {"detections of unknown images": int(np.sum(image < 0)),
               "detections of unknown categories": int(np.sum((image >= 0) & (label < 0)))}
    predicted = {key: values[known] for key, values in predicted.items()}
    scores = ap_scores(*coco_ap(truth, predicted, len(images), len(classes)), classes)
    report = {"detection": percent(scores), "images": len(images), "dropped": dropped}
    if coco:
        dropped["annotations without area: width times height is taken"] = len(without_area)
        report["coco"] = [-1. if scores[key] is None else scores[key] for key in SUMMARY]
    return report


def score_masks(task: str, gt: Path, dt: Path, classes: Sequence[str]) -> dict:
    """`score_files` for folders of PNG masks. Images without a prediction count as all missed; of
    lanes, as no marking, where the official toolkit reads crosswalk everywhere."""
    truth, predicted = (pictures_in(folder, ".", masks=True) for folder in (gt, dt))
    for folder, files in ((gt, truth), (dt, predicted)):
        require(files, f"{folder} holds no masks: expected a folder of PNGs of class ids.")
    meter, missed = meter_of(task, classes), truth.keys() - predicted.keys()
    lane = is_lane(task, classes)
    require(len(missed) < len(truth), f"none of the masks in {dt} is of an image in {gt}: "
            "give predictions for these images.")
    for stem, file in tqdm(truth.items(), desc=f"score {task}", unit="img", leave=False):
        mask = read_mask(gt / file, len(classes), lane)
        guess = np.full_like(mask, IGNORE)
        if stem not in missed:
            guess = read_mask(dt / predicted[stem], lane=lane)
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

# A 64-bit word of a box has one bit for each area and threshold: bit 16 a + t stands for AREAS[a]
# and THRESHOLDS[t]. AREA_BITS[a]: the bits of an area. UP_TO[t]: those of the first t thresholds,
# in all areas.
AREA_BITS = np.uint64(2 ** len(THRESHOLDS) - 1) << np.arange(0, 64, 16, dtype=np.uint64)
UP_TO = np.array([sum(((1 << t) - 1) << (16 * a) for a in range(4))
                  for t in range(len(THRESHOLDS) + 1)], np.uint64)


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of each run of equal values."""
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]][:len(values)])    # none of none
    return first, np.diff(np.r_[first, len(values)])


def ranks(values: np.ndarray) -> np.ndarray:
    """Position of each element within its run of equal values."""
    first, length = runs(values)
    return np.arange(len(values)) - np.repeat(first, length)


def ignored_areas(area: np.ndarray) -> np.ndarray:
    """For each box, the bits of the area ranges (ends included) in which its area does not lie:
    COCO ignores it there."""
    return np.bitwise_or.reduce([((area < low) | (area > high)) * bits
                                 for bits, (low, high) in zip(AREA_BITS, AREAS)])


def candidate_pairs(dt: dict, gt: dict, chunk: int = 1 << 16) -> tuple[np.ndarray, ...]:
    """Finds all pairs of a group with IoU >= 0.5: detection index, ground-truth index, IoU. For a
    crowd, the union is the detection's area. Chunks of pairs fit the processor's cache.

    dt, gt: `group` (sorted), `x1`, `y1`, `x2`, `y2`, `wh` (width x height) [N]; gt also `crowd`."""
    start, length = runs(dt["group"])
    low, high = (np.searchsorted(gt["group"], dt["group"][start], side)
                 for side in ("left", "right"))
    first, count = np.repeat(low, length), np.repeat(high - low, length)
    before = np.cumsum(np.r_[0, count])                             # pairs of earlier detections
    pairs, start = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))], 0
    while start < len(count):
        stop = max(start + 1, int(np.searchsorted(before, before[start] + chunk, "right")) - 1)
        n = count[start:stop]
        d = np.repeat(np.arange(start, stop), n)        # g: all n truths from the first, for each d
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
    ignored. Returns two words for each detection: where it is matched, and where its match is
    ignored.
    Round r matches the r-th detection of every group. It takes the free ground truth with the
    largest IoU, the last in the file if several are equal; an ignored one only if no other is left.
    """
    matched, ignored = np.zeros((2, len(dt["group"])), np.uint64)
    d, g, iou = candidate_pairs(dt, gt)
    best_first = np.lexsort((-g, -iou, d))
    d, g, iou = d[best_first], g[best_first], iou[best_first]
    start, length = runs(d)
    # rank: of the detection in its group; choice: 0 is its best ground truth, 1 the next.
    rank, choice = np.repeat(ranks(dt["group"][d[start]]), length), ranks(d)
    order = np.lexsort((choice, rank))
    d, g, iou, rank, choice = (x[order] for x in (d, g, iou, rank, choice))
    reached = UP_TO[np.searchsorted(np.minimum(THRESHOLDS, 1 - 1e-10), iou, "right")]  # as COCO's
    to_ignored, to_counted = gt["ignored"][g], ~gt["ignored"][g]
    taken = np.zeros(len(gt["group"]), np.uint64)
    takes = np.where(gt["crowd"], np.uint64(0), UP_TO[-1])          # crowds stay free
    for first, count in zip(*runs(rank)):                           # a round
        choices = [slice(first + a, first + a + n)
                   for a, n in zip(*runs(choice[first:first + count]))]
        for allowed, is_ignored in ((to_counted, False), (to_ignored, True)):
            for c in choices:                                       # holds each box at most once
                i, j = d[c], g[c]
                new = reached[c] & allowed[c] & ~taken[j] & ~matched[i]
                matched[i] |= new
                taken[j] |= new & takes[j]
                if is_ignored:
                    ignored[i] |= new
    return matched, ignored


def precision_recall(dt: dict, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision [T, R, K, A] (100 detections) and recall [T, K, A, M] for T thresholds, R recalls,
    K classes, A areas and M limits; -1 for a class without ground truth. dt: `label`, `rank` in its
    image and class, `matched` and `ignored`, sorted by class and descending score. positives
    [A, K]: number of ground-truth boxes not ignored."""
    num_classes = positives.shape[1]
    precision = np.full((len(THRESHOLDS), len(RECALLS), num_classes, len(AREAS)), -1.)
    recall = np.full((len(THRESHOLDS), num_classes, len(AREAS), len(MAX_DETECTIONS)), -1.)
    bounds = np.searchsorted(dt["label"], np.arange(num_classes + 1))
    for k in range(num_classes):
        matched, ignored, rank = (dt[key][bounds[k]:bounds[k + 1]]
                                  for key in ("matched", "ignored", "rank"))
        some = np.flatnonzero(matched)   # the others are false positives at all thresholds
        for a in np.flatnonzero(positives[:, k]):
            others = np.cumsum((matched == 0) & ((ignored & AREA_BITS[a]) == 0))[some]
            bits = (AREA_BITS[a] & np.diff(UP_TO))[:, None]         # [T, 1]: of each threshold
            counts = (ignored[some] & bits) == 0                    # [T, N]
            hits = counts & ((matched[some] & bits) > 0)
            detections = np.cumsum(counts, axis=1) + others
            tp = np.arange(1., np.count_nonzero(hits, axis=1).max(initial=0) + 1)
            needed = np.searchsorted(tp / positives[a, k], RECALLS, side="left")  # hits for each
            for t, hit in enumerate(map(np.flatnonzero, hits)):
                # precision peaks and recall steps only at hits: the curve needs no other point
                curve = tp[:len(hit)] / (detections[t, hit] + np.spacing(1))
                curve = np.maximum.accumulate(curve[::-1])[::-1]
                curve = np.append(curve, 0.)                        # beyond the last recall
                precision[t, :, k, a] = curve[np.minimum(needed, len(hit))]
                within = [np.count_nonzero(rank[some[hit]] < limit) for limit in MAX_DETECTIONS]
                recall[t, k, a] = np.array(within) / positives[a, k]
    return precision, recall


def coco_ap(gt: dict, dt: dict, num_images: int, num_classes: int) -> tuple:
    """COCO's box evaluation on flat arrays, identical to pycocotools' `evaluate` and `accumulate`,
    with two exceptions: there an annotation with id 0 never matches, and of annotations with the
    same id only the last counts.

    gt, dt: `image` and `label` [N] integers, `box` [N, 4] float64 x, y, width, height; gt: `area`
    [N], `crowd` [N] bool; dt: `score` [N]. Returns the arrays of `precision_recall`."""
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
    by_class_again = np.argsort(by_image[kept])                     # undoes by_image
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
    """Streaming COCO box AP: `update` image by image, `compute` once. classes: names by id."""

    def __init__(self, classes: Sequence[str]):
        self.classes, self.images = tuple(classes), {}      # image: (ground truth, detections)

    def update(self, target: dict, prediction: dict, image: int | None = None) -> None:
        """Adds one image. target: `boxes` [N, 4] (xyxy, exclusive ends), `labels` [N], optional
        `crowd` [N] and `area` [N]. prediction: `boxes`, `scores`, `labels`. All are arrays, tensors
        or lists. image: its number, by default the next; equal scores rank in this order."""
        image = len(self.images) if image is None else image
        require(image not in self.images, f"image {image} was given twice: each has its number.")
        gt, dt = self.flat(target, image), self.flat(prediction, image)
        n, m = len(gt["label"]), len(dt["label"])
        width, height = gt["box"][:, 2:].T
        gt["area"] = np.asarray(target.get("area", width * height), np.float64)
        gt["crowd"] = np.asarray(target.get("crowd", np.zeros(n)), bool)
        dt["score"] = np.asarray(prediction["scores"], np.float64)
        require(gt["area"].shape == gt["crowd"].shape == (n,) and dt["score"].shape == (m,)
                and np.isfinite(gt["area"]).all() and not np.isnan(dt["score"]).any(),
                f"image {image}: expected a finite area and a crowd flag for its {n} boxes, a "
                f"score, not NaN, for its {m} detections.")
        best = np.lexsort((-dt["score"], dt["label"]))  # keeps 100 of a class, in the given order
        best = np.sort(best[ranks(dt["label"][best]) < MAX_DETECTIONS[-1]])
        self.images[image] = gt, {key: values[best] for key, values in dt.items()}

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
        boxes = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])      # x, y, width, height
        return {"image": np.full(len(boxes), image), "label": labels, "box": boxes}

    def merge(self, other: "DetectionAP") -> None:
        for image in self.images.keys() & other.images.keys():
            raise InputError(f"image {image} is in both meters: give `update` the images' numbers.")
        self.images |= other.images

    def arrays(self) -> tuple[dict, dict]:
        """All ground truth and detections, as `coco_ap` takes them, sorted by image."""
        def joined(tables: Sequence[dict]) -> dict:
            return {key: np.concatenate([table[key] for table in tables]) for key in tables[0]}

        gt, dt = zip(*(self.images[image] for image in sorted(self.images)))
        return joined(gt), joined(dt)

    def compute(self) -> dict:
        """Returns COCO's twelve numbers (SUMMARY) and `per_class` AP as fractions, None without
        ground truth, and the arrays `precision` and `recall`."""
        require(self.images, "no images were given to score.")
        precision, recall = coco_ap(*self.arrays(), max(self.images) + 1, len(self.classes))
        scores = ap_scores(precision, recall, self.classes)
        return scores | {"precision": precision, "recall": recall}


# --------------------------------------------------------------------------------- segmentation

class MeanIoU:
    """Streaming mean IoU by BDD100K's rule, over the classes in the ground truth. Pixels without a
    true class (255) do not count; those without a predicted class are misses. background: pixels of
    this true class are left out of the score; `compute` adds the mean over all classes."""

    def __init__(self, classes: Sequence[str], background: int | None = None):
        self.classes, self.background, n = tuple(classes), background, len(classes)
        require(n < IGNORE, f"{n} classes were given: uint8 ids have room for {IGNORE - 1}.")
        self.confusion = np.zeros((n, n + 1), np.int64)             # truth x (prediction, other)

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Adds one image: two uint8 arrays of one shape."""
        require(truth.shape == prediction.shape and truth.dtype == prediction.dtype == np.uint8,
                f"truth {truth.dtype} {truth.shape} and prediction {prediction.dtype} "
                f"{prediction.shape} were given: expected uint8 maps of one shape.")
        self.confusion += pair_counts(truth, prediction, len(self.classes))

    def merge(self, other: "MeanIoU") -> None:
        self.confusion += other.confusion

    def compute(self) -> dict:
        """Returns fractions: `mIoU`; `per_class` (None without ground truth); with a background
        class `mIoU_all`; `rule` in words; and, as the toolkit defines them, `mAcc` (mean over
        classes of hits / predicted pixels), `fIoU` (IoU weighted by the classes' pixels) and `pAcc`
        (hits / pixels)."""
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
            scores["mIoU_all"] = mean(ious[pixels > 0])
            scores["rule"] += (f", pixels of {self.classes[self.background]} left out; in "
                               f"{len(self.classes)}-class scores none")
        return scores


def iou_parts(confusion: np.ndarray, counted: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Pixels, hits, IoU, and hits / predicted pixels of the counted classes (by truth)."""
    confusion = confusion[counted]
    pixels, predicted = confusion.sum(1), confusion[:, counted].sum(0)
    hits = confusion[range(len(counted)), counted]                  # the diagonal
    ious = hits / np.maximum(pixels + predicted - hits, 1)
    return pixels, hits, ious, hits / np.maximum(predicted, 1)


def pair_counts(truth: np.ndarray, prediction: np.ndarray, n: int) -> np.ndarray:
    """Counts the pixels of each pair of ids: int64 [n, n + 1], truth by prediction; predicted ids
    from n on count as n. It counts runs of equal pairs instead of pixels, which is several times as
    fast, since most pixels equal their neighbour."""
    truth, prediction = truth.ravel(), prediction.ravel()
    ends = np.flatnonzero((truth[1:] != truth[:-1]) | (prediction[1:] != prediction[:-1]))
    last = np.append(ends, len(truth) - 1)[:len(truth)]     # of each run; none in an empty map
    pairs = np.minimum(truth[last], n).astype(np.intp) * (n + 1) + np.minimum(prediction[last], n)
    lengths = np.diff(last, prepend=-1)
    counts = np.bincount(pairs, weights=lengths, minlength=(n + 1) ** 2)    # exact in float64
    return counts.astype(np.int64).reshape(n + 1, n + 1)[:n]


# --------------------------------------------------------------------------------- lane marking

LANE_RADII = (1, 2, 5)                                              # pixels
LANE_BITS = np.zeros(256, np.uint8)                                 # background and 255: no bit
LANE_BITS[:8] = 1 << np.arange(8)


def grow(bits: np.ndarray) -> Iterator[np.ndarray]:
    """For each of LANE_RADII yields a map whose pixels have the bits of all pixels within that
    Euclidean distance. bits: uint8 [H, W]; eight classes are dilated at once."""
    wide = [bits]                               # [w]: the bits of up to w pixels left and right
    for w in range(1, max(LANE_RADII) + 1):
        wider = wide[-1].copy()
        wider[:, w:] |= bits[:, :-w]
        wider[:, :-w] |= bits[:, w:]
        wide.append(wider)
    for radius in LANE_RADII:
        near = wide[radius].copy()
        for dy in range(1, radius + 1):
            row = wide[math.isqrt(radius ** 2 - dy ** 2)]
            near[dy:] |= row[:-dy]
            near[:-dy] |= row[dy:]
        yield near


class LaneF1:
    """Streaming F1 of lane marking by BDD100K's rule: for each image and category, the share of
    predicted pixels within a radius of the truth (precision) and the mirror (recall); F1 is 1 if
    both are empty, 0 if one is. A category's score is the mean over images. Also counts all
    markings as one class, lane or not, by pixels of all images, as most lane detectors do."""

    def __init__(self, classes: Sequence[str]):
        self.classes, self.images = tuple(classes[:-1]), 0          # without background
        self.sums = np.zeros((len(LANE_RADII), len(self.classes)))  # of the images' F1
        self.binary = np.zeros(3, np.int64)                         # pixels: both, true, predicted

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Adds one image: two uint8 maps of class ids and one shape; 255 counts as background."""
        def count(ids: np.ndarray, where: np.ndarray) -> np.ndarray:
            return np.bincount(ids[where], minlength=8)

        true_bits, predicted_bits = LANE_BITS[truth], LANE_BITS[prediction]
        true, predicted = true_bits > 0, predicted_bits > 0
        num_true, num_predicted = count(truth, true), count(prediction, predicted)
        for sums, near_true, near_predicted in zip(self.sums, grow(true_bits),
                                                   grow(predicted_bits)):
            hits = count(prediction, (predicted_bits & near_true) > 0)
            precision = hits / np.maximum(num_predicted, 1)
            recall = count(truth, (true_bits & near_predicted) > 0) / np.maximum(num_true, 1)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
            sums += np.where(num_true + num_predicted == 0, 1, f1)
        self.images += 1
        self.binary += [np.count_nonzero(x) for x in (true & predicted, true, predicted)]

    def merge(self, other: "LaneF1") -> None:
        self.images += other.images
        self.sums += other.sums
        self.binary += other.binary

    def compute(self) -> dict:
        """Returns fractions: for each radius `F1 1px` and so on, the mean over categories, and
        `per_class 1px`; `per_class` is that of 2 pixels. `binary IoU` and `binary recall`."""
        scores = {}
        for radius, sums in zip(LANE_RADII, self.sums / max(self.images, 1)):
            scores[f"F1 {radius}px"] = float(sums.mean())
            scores[f"per_class {radius}px"] = dict(zip(self.classes, sums.tolist()))
        both, true, predicted = self.binary.tolist()
        return scores | {
            "per_class": scores["per_class 2px"],
            "binary IoU": both / max(true + predicted - both, 1),
            "binary recall": both / max(true, 1),
            "rule": "BDD100K: mean over images of F1 within 2 pixels, 100 for a class that neither "
                    "has; lane/not: all pixels, lanes of any class"}


def meter_of(task: str, classes: Sequence[str]) -> DetectionAP | MeanIoU | LaneF1:
    """The meter that scores a task by BDD100K's rules."""
    if kind_of(task) == "boxes":
        return DetectionAP(classes)
    if is_lane(task, classes):
        return LaneF1(classes)
    return MeanIoU(classes, background_of(classes))


# ------------------------------------------------------------------------------ scoring a model

def export_model(model: torch.nn.Module, path: Path, shape: Sequence[int]) -> None:
    """Writes a CPU model's `predict_batch`, for images [B, 3, *shape], as a file that
    torch.export.load reads without this code. Its results may hold empty boxes."""
    images = torch.zeros(2, 3, *shape, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        model.forward = model.predict_batch                 # torch.export traces forward
        program = torch.export.export(model, (images,), dynamic_shapes=batch)
    with warnings.catch_warnings(), io.BytesIO() as buffer:
        warnings.simplefilter("ignore")                     # that channels_last is not contiguous
        torch.export.save(program, buffer)                  # saving to a full disk would abort
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())


def predictions(predict: Callable, data: LabelledImages, batches: Sequence[Sequence[int]],
                device: torch.device, *, workers: int = 0, tasks: Sequence[str] = (),
                amp: torch.dtype | None = None, desc: str = "predict",
                strict: bool = True) -> Iterator[list[tuple]]:
    """Yields for each batch of indices the list of its (i, image, target, prediction). A GPU works
    on the next batch while the caller uses this one. predict: takes indices and images, returns one
    prediction (a dict) each; they are yielded on the CPU, without empty boxes, which lie outside
    the image. tasks, strict: as in `read_items`."""
    gpu = device.type == "cuda"
    loader = DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=gpu,
                        collate_fn=partial(read_items, data, tasks, strict),
                        worker_init_fn=delay_signals)

    def queued() -> Iterator[tuple]:
        """Queues each batch on the device; yields its items, its results and, on a GPU, the event
        after which the results are on the CPU."""
        for items in tqdm(loader, desc=desc, unit="batch", leave=False, mininterval=0.5,
                          disable=rank_and_world()[0] > 0):
            indices, images = [i for i, *_ in items], [image for _, image, _ in items]
            with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
                results = predict(indices, images) if items else []
                results = [{key: value.to("cpu", non_blocking=True) for key, value in one.items()}
                           for one in results]
            yield items, results, torch.cuda.current_stream(device).record_event() if gpu else None

    # each batch is used after the next one has been queued
    for (items, results, copied), _ in itertools.pairwise(itertools.chain(queued(), [None])):
        if copied:
            copied.synchronize()
        for result in results:
            if "boxes" in result:
                solid = (result["boxes"][:, 2:] - result["boxes"][:, :2]).amin(1) > 1e-3
                result |= {key: result[key][solid] for key in ("boxes", "scores", "labels")}
        yield [(*item, result) for item, result in zip(items, results)]


def model_predictions(model, data: LabelledImages, indices: Sequence[int], *, batch: int,
                      **options) -> Iterator[tuple]:
    """Yields (i, image, target, prediction) of this process's share of the images, every world-th
    one of `world` processes. options: of `predictions`."""
    rank, world = rank_and_world()
    mine = [int(i) for i in indices[rank::world]]
    batches = [mine[n:n + batch] for n in range(0, len(mine), batch)]
    device = next(model.parameters()).device
    for items in predictions(lambda _, images: model.predict(images), data, batches, device,
                             **options):
        yield from items


def evaluate(model, data: LabelledImages, *, on_result: Callable | None = None,
             save: str | Path | None = None, batch: int = 4, **options) -> dict:
    """Scores a model on the images that are labelled for any of its tasks: returns each task's
    scores in percent and the number of "images". Distributed processes share the images and return
    the same. on_result: called with each (i, image, target, prediction) of this process. save:
    folder for all images' predictions in BDD100K's layout, and COCO's in coco/. options: of
    `predictions`."""
    for task, names in model.classes.items():
        known = data.classes.get(task, ())
        require(tuple(names) == tuple(known), f"the model's {task} classes are {', '.join(names)}; "
                f"the data's are {', '.join(known) or 'none'}: use data of the same class list.")
    tasks = [task for task in model.classes if data.labelled[task].any()]
    require(tasks or save, f"{data.labels} has no {data.split} labels for the model's tasks.")
    meters = {task: meter_of(task, data.classes[task]) for task in tasks}
    labelled = np.flatnonzero(np.any([data.labelled[task] for task in model.classes], axis=0))
    writer = LabelWriter(save, data.split, data.classes) if save else None
    indices = range(len(data)) if save else labelled
    for i, image, target, prediction in model_predictions(model, data, indices, batch=batch,
                                                          tasks=tasks, **options):
        exact = {"boxes": data.boxes[data.box_slice(i)]} if "boxes" in target else {}  # float64
        update_meters(meters, target | exact, prediction, i)
        if writer:
            writer.add(data.files[i], prediction)
        if on_result:
            on_result(i, image, target, prediction)
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


def columns_of(scores: dict) -> dict[str, tuple[str, str]]:
    """The columns of a table of these scores: their part of COLUMNS, then further tasks' mIoU."""
    further = {f"mIoU ({task})": (task, "mIoU") for task in scores if task not in CLASSES}
    return {name: (task, key) for name, (task, key) in (COLUMNS | further).items()
            if isinstance(scores.get(task), dict) and key in scores[task]}


def table(scores: dict, name: str = "") -> str:
    """Formats scores as text: `columns_of`, then every class; "-" without ground truth."""
    def cell(value, width: int = 9) -> str:
        return f"{'-' if value is None else format(value, '.1f'):>{width}}"

    columns = columns_of(scores)
    numbers = [cell(scores[task][key], max(9, len(column)))
               for column, (task, key) in columns.items()]
    lines = [f"{name or 'in percent':<24}" + " ".join(f"{column:>9}" for column in columns),
             f"{str(scores['images']) + ' images':<24}" + " ".join(numbers)]
    for task in dict.fromkeys(task for task, _ in columns.values()):
        unit = "AP" if kind_of(task) == "boxes" else "IoU" if "mIoU" in scores[task] else "F1 2px"
        lines.append(f"  {task} ({unit})")
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
    "drivable": "0072b2 e69f00 009e73 cc79a7 f0e442 56b4e9 d55e00",
    "lane": "cc79a7 d55e00 56b4e9 f0e442 009e73 999999 ffffff e69f00 000000"}


def colours_of(task: str) -> np.ndarray:
    """A task's colours, uint8 [256, 3] by id: its palette repeated; of further tasks semantic's."""
    palette = PALETTES.get(task, PALETTES["semantic"])
    return np.resize(np.frombuffer(bytes.fromhex(palette), np.uint8), (256, 3))


def paint_mask(photo: Image.Image, mask: Tensor, task: str, names: Sequence[str]) -> None:
    ids = np.asarray(Image.fromarray(mask.numpy()).resize(photo.size, Image.Resampling.NEAREST))
    known = (ids < len(names)) & (ids != background_of(names))
    opacity = Image.fromarray(np.uint8(255 * OPACITY * known))
    photo.paste(Image.fromarray(colours_of(task)[ids]), mask=opacity)


def paint_boxes(photo: Image.Image, result: dict, scale: float, names: Sequence[str], font) -> None:
    """Paints boxes on a photo, the best on top. scale: from the image's pixels to the photo's."""
    pen, boxes, labels = ImageDraw.Draw(photo), result["boxes"] * scale, result["labels"].tolist()
    scores = result.get("scores", torch.ones(len(labels)))
    for i in scores.argsort(stable=True).tolist():
        if scores[i] >= MIN_SCORE:
            colour = tuple(colours_of("detection")[labels[i]])
            x1, y1, x2, y2 = boxes[i].tolist()
            text = names[labels[i]] + (f" {scores[i]:.2f}" if "scores" in result else "")
            place = max(0, min(x1, photo.width - font.getlength(text))), max(0, y1 - font.size)
            pen.rectangle((x1, y1, x2, y2), outline=colour, width=2)
            pen.rectangle(pen.textbbox(place, text, font), fill=colour)
            pen.text(place, text, "black", font)


def draw(image: Tensor, prediction: dict, truth: dict | None = None, title: str = "",
         width: int = 640, classes: dict = BDD_CLASSES) -> Image.Image:
    """Draws a sheet for an image [3, H, W]: for each task of prediction or truth a panel, `width`
    wide, with the predicted boxes or map, below it the ground truth's, and the classes' colours."""
    font, line = ImageFont.load_default(size=width / 45), round(width / 30)
    h, w = image.shape[1:]
    scale = min(width / w, 2 * width / h)                           # at most twice as high as wide
    size = [max(1, round(scale * n)) for n in (w, h)]
    photo = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    strips = {f"prediction {title}": prediction} | ({"ground truth": truth} if truth else {})
    shown = {task: names for task, names in classes.items() if any(
        ("boxes" if kind_of(task) == "boxes" else task) in result for result in strips.values())}
    classes = shown or classes
    height = line + photo.height                                    # of a strip
    bottom = len(strips) * height
    most = max(len(names) for names in classes.values())            # colours, three in a line
    sheet_width = len(classes) * (width + 4) - 4
    sheet = Image.new("RGB", (sheet_width, bottom + (most + 2) // 3 * line), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (name, result) in enumerate(strips.items()):
        pen.text((6, n * height + line / 2), name, "black", font, anchor="lm")
        for m, task in enumerate(classes):
            panel = photo.copy()
            if kind_of(task) == "boxes" and "boxes" in result:
                paint_boxes(panel, result, scale, classes[task], font)
            elif task in result:
                paint_mask(panel, result[task], task, classes[task])
            sheet.paste(panel, (m * (width + 4), n * height + line))
    for m, task in enumerate(classes):
        for k, name in enumerate(classes[task]):
            x, y = m * (width + 4) + 6 + k % 3 * width // 3, bottom + k // 3 * line
            pen.rectangle((x, y + line // 5, x + line * 2 // 3, y + line * 4 // 5),
                          tuple(colours_of(task)[k]), "black")
            pen.text((x + line, y + line / 2), name, "black", font, anchor="lm")
    return sheet


class Pictures:
    """Keeps the worst predicted images of an evaluation and draws them, worst first."""

    def __init__(self, folder: str | Path, count: int, data: LabelledImages):
        self.folder, self.count, self.data, self.worst = Path(folder), count, data, []

    def __call__(self, i: int, image: Tensor, target: dict, prediction: dict) -> None:
        """Scores one image: the mean over the target's tasks of its AP50, mIoU or lane F1."""
        meters = {task: meter_of(task, names) for task, names in self.data.classes.items()
                  if ("boxes" if kind_of(task) == "boxes" else task) in target}
        update_meters(meters, target, prediction)
        scores = [meter.compute() for meter in meters.values()]
        values = [one[key] for one in scores for key in ("AP50", "mIoU", "F1 2px")
                  if one.get(key) is not None]
        score = sum(values) / len(values) if values else 1.
        self.worst.append((score, i, image, target, prediction))
        self.worst.sort(key=lambda entry: entry[:2])
        del self.worst[self.count:]

    def close(self) -> None:
        """Called by all processes; each draws its share of the worst."""
        shares = from_all_ranks([entry[:2] for entry in self.worst])
        order = sorted(itertools.chain(*shares))[:self.count]
        for score, i, image, target, prediction in self.worst:
            if (score, i) in order:
                stem, place = self.data.stems[i], order.index((score, i)) + 1
                sheet = draw(image, prediction, target, f"{stem}, score {100 * score:.0f}",
                             classes=self.data.classes)
                write_picture(self.folder / f"{place:03d}_{stem}.png", sheet)


def draw_images(model, data: ImageFiles, folder: Path, count: int | None, **options) -> int:
    """Draws predictions for `count` images (default: all); skips unreadable ones. Returns the
    number of drawn images."""
    files = data.files[:count]
    names = [folder / f"{n:03d}_{file.stem}.png" for n, file in enumerate(files, start=1)]
    overwritten = {name.resolve() for name in names} & {file.resolve() for file in data.files}
    require(not overwritten, f"{folder} holds the images themselves: draw into another folder.")
    drawn = 0
    for i, image, _, prediction in model_predictions(model, data, range(len(files)), strict=False,
                                                     **options):
        write_picture(names[i], draw(image, prediction, title=files[i].stem, classes=model.classes))
        drawn += 1
    return sum(from_all_ranks(drawn))


def draw_curves(log: Path, tasks: Iterable[str]) -> None:
    """Draws a training log as curves.png beside it: a strip for the learning rate, each task's loss
    and each validation score, with its last value."""
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    curves = {"learning rate": [line.get("lr") for line in lines]}
    for task in tasks:
        curves[f"{task} loss"] = [sum(value for key, value in line.items()
                                      if key.rpartition("_")[0] == task) or None for line in lines]
    validated = {task: scores for line in lines for task, scores in line.get("val", {}).items()}
    for name, (task, key) in columns_of(validated).items():
        curves[name] = [line.get("val", {}).get(task, {}).get(key) for line in lines]
    sheet, step = Image.new("RGB", (1000, 100 * len(curves)), "white"), 1000 / len(lines)
    pen = ImageDraw.Draw(sheet)
    for n, (name, values) in enumerate(curves.items(), start=1):
        points = [(i, y) for i, y in enumerate(values) if y is not None and 0 <= y < math.inf]
        top = 1.1 * np.percentile([y for _, y in points] or [1.], 95) or 1.
        bottom = 100 * n
        places = [(step * (i + 0.5), bottom - 100 * min(y / top, 1)) for i, y in points]
        pen.line((0, bottom, 999, bottom), "#cccccc")
        pen.text((5, bottom - 95), f"{name} {points[-1][1]:.4g}" if points else name, "black")
        pen.line(places, "#0072b2", width=2)
        for x, y in places if len(places) < 100 else ():
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), "#0072b2")
    stages = [line["stage"] for line in lines]
    for stage in dict.fromkeys(stages):
        x = step * stages.index(stage)
        pen.line((x, 0, x, sheet.height), "#cccccc")
        pen.text((x + 5, 18), stage, "#999999")
    write_picture(log.with_name("curves.png"), sheet)


# --------------------------------------------------------------------------------- command line

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
    """The autocast type of an --amp option (None: float32); auto: bf16 if the device has it."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()        # older torch: none
        name = "bf16" if capabilities.get("avx512_bf16") else "no"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: whole numbers from `least` on."""
    def read(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} on.")
    return read


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Scores a checkpoint or files; or checks data.")
    mode, add = p.add_mutually_exclusive_group(), p.add_argument
    mode.add_argument("--ckpt", nargs="?", metavar="FILE", help="checkpoint (newest in runs/)")
    mode.add_argument("--gt", metavar="PATH", type=Path, help="ground truth that --dt is scored by")
    mode.add_argument("--check", nargs="?", const="", metavar="DIR", help="list bad files of data")
    add("--dt", metavar="PATH", type=Path, help="predictions; both: COCO, Scalabel or PNG masks")
    add("--task", default="detection", help="of --gt and --dt (%(default)s)")
    add("--dataset", choices=DATASETS, default="bdd100k", help="of --check (%(default)s)")
    add("--data", metavar="DIR", help="default: the model's; with --gt: has the classes.json")
    add("--split", default="val", help="which images to score (%(default)s)")
    add("--json", metavar="FILE", help="write the scores as JSON")
    add("--save", metavar="DIR", help="write all predictions in BDD100K's layout, COCO's in coco/")
    add("--show", metavar="DIR", help="draw the worst images there, ground truth below")
    add("--count", type=at_least(1), help="of images to draw (8; with --images all)")
    add("--images", metavar="PATH", help="only draw these: a file, a folder or a quoted pattern")
    add("--export", metavar="FILE", help="only write the model, for images of --images' size")
    add("--batch", type=at_least(1), help="images at a time (GPU: 8, CPU: 4)")
    add("--workers", type=at_least(0), help="processes that read images (GPU: 8, CPU: 0)")
    args = p.parse_args(argv)
    if (args.gt is None) != (args.dt is None):
        p.error("--gt and --dt go together: ground truth and predictions.")
    if args.gt and (args.save or args.show or args.images or args.export):
        p.error("--save, --show, --images and --export need a checkpoint instead of --gt and --dt.")
    if args.export and (args.json or args.save or args.show):
        p.error("--export only writes the model: leave out --json, --save and --show.")
    if args.images and not (args.show or args.export):
        p.error("--images needs --show DIR: where to draw.")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).name):
        p.error(f"--json {args.json} is a folder: name a file.")
    return args


def run_checkpoint(args: argparse.Namespace) -> dict:
    """Scores a checkpoint, exports it, or draws its predictions, shared by torchrun's processes."""
    import hmpl
    path = args.ckpt or max(Path("runs").rglob("*.pt"), key=os.path.getmtime, default=None)
    require(path, "no checkpoint in runs/: train one with train.py, or name one with --ckpt FILE.")
    device = this_device()
    try:
        checkpoint, model = hmpl.load_checkpoint(path), hmpl.load_model(path, device)
    except hmpl.WeightsError as error:
        raise InputError(str(error)) from error
    config, first = checkpoint["config"], rank_and_world()[0] == 0
    data = (ImageFiles(args.images) if args.images else
            DATASETS[config["dataset"]](args.data or config["data"], args.split,
                                        tasks=model.classes))
    if args.export:
        require("detection" not in model.classes or checkpoint["model_config"]["heads"] != "conv",
                f"{path} has Faster R-CNN's head, whose NMS cannot be exported with a variable "
                "batch size: export a model of --heads transformer.")
        if first:
            export_model(model.cpu(), Path(args.export), data.image(0).shape[1:])
        return {}
    workers = WORKERS[device.type] if args.workers is None else args.workers
    options = dict(batch=args.batch or BATCH[device.type], workers=workers,
                   amp=amp_type(config["amp"], device))
    if args.images:
        return {"images": draw_images(model, data, Path(args.show), args.count, **options)}
    if first:
        print(f"{path}: stage {checkpoint['stage']}, step {checkpoint['step']} of "
              f"{checkpoint['steps']}; data {data.root}, {args.split}",
              *(f"NOTE: {note}" for note in checkpoint["notes"]), sep="\n")
    pictures = Pictures(args.show, args.count or 8, data) if args.show else None
    scores = evaluate(model, data, on_result=pictures, save=args.save, **options)
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


def escape_unprintable() -> None:
    """Makes the terminal show names outside of its encoding as escapes, where it would fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):                # notebooks have other streams
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> None:
    escape_unprintable()
    args = parse_args(argv)
    try:
        if args.check is not None:
            root = find_data(args.check or args.data, args.dataset)
            workers = min(8, os.cpu_count()) if args.workers is None else args.workers
            require(check_data(root, args.dataset, workers), "bad files were found, see above.")
            return
        if args.gt:
            classes = read_classes(Path(args.data), [args.task]) if args.data else BDD_CLASSES
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
