"""Ground truth on disk, scores and pictures: BDD100K's files and rules, without its toolkit.

    python evaluate.py --ckpt runs/disjoint_normal/finetune.pt --data data/bdd100k     # a table
    python evaluate.py --ckpt                        # the newest checkpoint under runs/, its own data
    python evaluate.py --ckpt X --json scores.json --show pictures --count 8

    BDD100K        reader of the official layout; any kind of label may be absent, wholly or per image
    LabelWriter    writes predictions in the same layout (Scalabel JSON, PNG masks)
    DetectionAP    COCO box AP (bit-identical to pycocotools), on BDD100K's inclusive boxes
    MeanIoU        BDD100K's mIoU from a streaming confusion matrix, drivable's two conventions included
    evaluate       scores a model on a data set; `draw` shows what it sees

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
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
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
RENAMED = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian", "van": "car"}
IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}  # become crowd regions
MASK_FOLDERS = {"semantic": "labels/sem_seg/masks", "drivable": "labels/drivable/masks"}
IGNORE = 255
SAMPLE = Path(__file__).resolve().parent / "tests" / "roads"

SEMANTIC_COLOURS = np.array(  # BDD100K's palette, by trainId
    [[128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156], [190, 153, 153], [153, 153, 153],
     [250, 170, 30], [220, 220, 0], [107, 142, 35], [152, 251, 152], [70, 130, 180], [220, 20, 60],
     [255, 0, 0], [0, 0, 142], [0, 0, 70], [0, 60, 100], [0, 80, 100], [0, 0, 230], [119, 11, 32]], np.uint8)
DRIVABLE_COLOURS = np.array([[0, 114, 178], [230, 159, 0]], np.uint8)     # Okabe-Ito: safe for colour-blind eyes
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


def find_data(given: str | None = None) -> Path:
    """The data folder: the one given, else $BDD100K, else data/bdd100k, else the sample in tests/roads."""
    if given is not None:
        return Path(given)
    places = [Path(p) for p in (os.environ.get("BDD100K"), "data/bdd100k") if p]
    return next((p for p in places if p.is_dir()), SAMPLE)


def read_json(path: Path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{path} is not valid JSON ({broken}): fetch or write it anew.") from None


def read_scalabel(path: Path, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Boxes of a Scalabel JSON file (a list of frames or {"frames": [...]}), renamed and validated.

    Returns flat arrays of N boxes over F frames: `names` [F] (stems), `frame` [N] (index into names),
    `boxes` [N, 4] float32 exclusive xyxy, `labels` [N] uint8, `crowd` [N] bool. A frame whose `labels`
    are missing or null is an image without objects. Raises InputError naming the frame and the label.
    """
    frames = read_json(path)
    frames = frames.get("frames") if isinstance(frames, dict) else frames
    if not isinstance(frames, list):
        raise InputError(f"{path} holds no list of frames: expected Scalabel JSON, [...] or {{'frames': [...]}}.")
    ids = {name: i for i, name in enumerate(classes)}
    names, frame, boxes, labels, crowd = [], [], [], [], []
    for i, entry in enumerate(frames):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError(f"{path}: frame {i} has no name: expected {{'name': 'IMAGE.jpg', 'labels': [...]}}.")
        if not isinstance(entry.get("labels") or [], list):
            raise InputError(f"{path}: frame {entry['name']} has labels {entry['labels']!r}: expected a list.")
        names.append(Path(entry["name"]).stem)
        for j, label in enumerate(entry.get("labels") or []):
            box, category, is_crowd = read_label(label, ids, f"{path}: frame {entry['name']}, label {j}")
            frame.append(i), boxes.append(box), labels.append(category), crowd.append(is_crowd)
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(f"{path}: frame {twice} occurs more than once: keep one of them.")
    return {"names": np.array(names, dtype=str), "frame": np.array(frame, np.int64),
            "boxes": np.array(boxes, np.float32).reshape(-1, 4), "labels": np.array(labels, np.uint8),
            "crowd": np.array(crowd, bool)}


def read_label(label: dict, ids: dict[str, int], where: str) -> tuple[tuple, int, bool]:
    """One Scalabel label -> (box, class id, crowd); `where` begins the message of what is wrong."""
    name = label.get("category") if isinstance(label, dict) else None
    category = IGNORED.get(name, RENAMED.get(name, name)) if isinstance(name, str) else None
    if category not in ids:
        raise InputError(f"{where} has category {name!r}: expected one of {', '.join(ids)}.")
    try:
        box = from_inclusive({key: float(label["box2d"][key]) for key in ("x1", "y1", "x2", "y2")})
        good = np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3] and max(map(abs, box)) < 1e6
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise InputError(f"{where} has box2d {label.get('box2d')}: expected finite x1 <= x2 and y1 <= y2 in pixels.")
    attributes = label.get("attributes") if isinstance(label.get("attributes"), dict) else {}
    crowd = name in IGNORED or bool(attributes.get("crowd")) or bool(attributes.get("ignored"))
    return box, ids[category], crowd


def open_picture(path: Path) -> Image.Image:
    """A decoded picture; raises InputError naming the file when it is missing, broken or cut off."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as broken:
        raise InputError(f"{path} cannot be read as an image ({broken}): fetch it anew.") from None


def read_image(path: Path) -> Tensor:
    """uint8 RGB [3, H, W] of a JPEG or PNG."""
    return torch.from_numpy(np.array(open_picture(path).convert("RGB"))).permute(2, 0, 1)


def read_mask(path: Path, num_classes: int) -> np.ndarray:
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


class BDD100K:
    """One split of a data set in BDD100K's official layout.

    root: holds images/100k/{split} and images/10k/{split} (jpg or png; a stem found in both counts once).
    labels: the folder that holds labels/det_20/det_{split}.json, labels/sem_seg/masks/{split} and
        labels/drivable/masks/{split}, by default root. Each may be missing, as may any image in it.
    Images are numbered in the order of their stems. Labels live in flat arrays, not in Python objects,
    so that worker processes share them.
    """

    classes = CLASSES

    def __init__(self, root: str | Path, split: str = "val", labels: str | Path | None = None):
        self.root, self.split, self.labels = Path(root), split, Path(labels or root)
        if not self.root.is_dir():
            raise InputError(f"no data folder {root}: expected BDD100K's layout, images/100k/{split} and labels/.")
        found = {}
        for folder in (self.root / "images" / kind / split for kind in ("100k", "10k")):
            for file in os.scandir(folder) if folder.is_dir() else ():
                stem, suffix = os.path.splitext(file.name)
                if suffix.lower() in (".jpg", ".jpeg", ".png"):
                    found.setdefault(stem, str(Path(file.path).relative_to(self.root)))
        if not found:
            raise InputError(f"no images in {self.root}: expected images/100k/{split}/*.jpg or images/10k/{split}/*.jpg.")
        self.stems = np.array(sorted(found))
        self.files = np.array([found[stem] for stem in self.stems])
        self.labelled = {task: self.has_mask(task) for task in MASK_FOLDERS} | {"detection": self.read_boxes()}

    def __len__(self) -> int:
        return len(self.stems)

    def mask_path(self, task: str, stem: str) -> Path:
        return self.labels / MASK_FOLDERS[task] / self.split / f"{stem}.png"

    def has_mask(self, task: str) -> np.ndarray:
        folder = self.labels / MASK_FOLDERS[task] / self.split
        stems = [f.name[:-4] for f in os.scandir(folder) if f.name.endswith(".png")] if folder.is_dir() else []
        return np.isin(self.stems, stems)

    def read_boxes(self) -> np.ndarray:
        """Fills `boxes`, `box_labels`, `crowd` and `offsets` (image i has boxes offsets[i]:offsets[i + 1]);
        returns which images have an entry. Entries without an image are left out."""
        path = self.labels / "labels" / "det_20" / f"det_{self.split}.json"
        if path.is_file():
            read = read_scalabel(path, self.classes["detection"])
        else:
            read = {"names": np.array([], str), "frame": np.array([], np.int64), "crowd": np.zeros(0, bool),
                    "boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.uint8)}
        index = {stem: i for i, stem in enumerate(self.stems)}
        image_of = np.array([index.get(name, -1) for name in read["names"]], np.int64)
        image = image_of[read["frame"]]
        order = np.argsort(image, kind="stable")[np.count_nonzero(image < 0):]
        self.boxes, self.box_labels, self.crowd = (read[key][order] for key in ("boxes", "labels", "crowd"))
        self.offsets = np.searchsorted(image[order], np.arange(len(self) + 1))
        return np.isin(np.arange(len(self)), image_of)

    def image(self, i: int) -> Tensor:
        """uint8 RGB [3, H, W]."""
        return read_image(self.root / self.files[i])

    def target(self, i: int, tasks: Iterable[str] = CLASSES) -> dict[str, Tensor]:
        """Labels of image i for those of the tasks that it has: `boxes` [N, 4] float32, `labels` [N]
        int64, `crowd` [N] bool; `semantic`, `drivable` uint8 [H, W]."""
        target = {}
        for task in tasks:
            if not self.labelled[task][i]:
                continue
            if task == "detection":
                own = slice(self.offsets[i], self.offsets[i + 1])
                target |= {"boxes": torch.from_numpy(self.boxes[own].copy()),
                           "labels": torch.from_numpy(self.box_labels[own].astype(np.int64)),
                           "crowd": torch.from_numpy(self.crowd[own].copy())}
            else:
                path = self.mask_path(task, self.stems[i])
                target[task] = torch.from_numpy(read_mask(path, len(self.classes[task])))
        return target

    def sized_target(self, i: int, image: Tensor, tasks: Iterable[str] = CLASSES) -> dict[str, Tensor]:
        """The target of image i [3, H, W], whose masks must have the image's size."""
        target = self.target(i, tasks)
        for task in MASK_FOLDERS.keys() & target.keys():
            if target[task].shape != image.shape[1:]:
                (h, w), (image_h, image_w) = target[task].shape, image.shape[1:]
                raise InputError(f"{self.mask_path(task, self.stems[i])} is {w}x{h}, its image {self.files[i]} "
                                 f"{image_w}x{image_h}: masks must have the image's size.")
        return target

    def sample(self, i: int, tasks: Iterable[str] = CLASSES) -> tuple[Tensor, dict[str, Tensor]]:
        """Image i with its target."""
        image = self.image(i)
        return image, self.sized_target(i, image, tasks)


class LabelWriter:
    """Writes predictions as labels in BDD100K's layout: what `BDD100K(root, split, labels=folder)` reads
    back and the official toolkit scores. Masks are written at once, the boxes by `close`."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split, self.frames = Path(folder), split, []

    def add(self, name: str, prediction: dict[str, Tensor], classes: Sequence[str] = CLASSES["detection"]) -> None:
        """name: the image's file name. prediction: any of `boxes` with `labels` and `scores`, `semantic`,
        `drivable`, as `HMPL.predict` returns them."""
        stem = Path(name).stem
        for task in MASK_FOLDERS.keys() & prediction.keys():
            path = self.folder / MASK_FOLDERS[task] / self.split / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(prediction[task].cpu().numpy()).save(path, compress_level=1)
        if "boxes" in prediction:
            seen = (prediction["boxes"][:, 2:] - prediction["boxes"][:, :2]).amin(1) > 1e-3   # not outside the image
            boxes, scores, labels = (prediction[key][seen].tolist() for key in ("boxes", "scores", "labels"))
            self.frames.append({"name": Path(name).name, "labels": [
                {"id": str(i), "category": classes[label], "score": score, "box2d": to_inclusive(box)}
                for i, (box, score, label) in enumerate(zip(boxes, scores, labels))]})

    def close(self) -> None:
        """Writes the boxes; the file appears whole or not at all."""
        if self.frames:
            path = self.folder / "labels" / "det_20" / f"det_{self.split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".part").write_text(json.dumps(self.frames))
            os.replace(path.with_suffix(".part"), path)


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


class DetectionAP:
    """Streaming COCO box AP: `update` image by image, `compute` once.

    classes: names in id order. At most 100 detections of each class and image are kept, as arrays.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes, self.num_images = tuple(classes), 0
        self.truths, self.detections = [], []

    def update(self, target: dict, prediction: dict) -> None:
        """One image. target: `boxes` [N, 4] (xyxy, exclusive ends), `labels` [N], optional `crowd` [N]
        and `area` [N]. prediction: `boxes`, `scores`, `labels`. Arrays, tensors or lists."""
        def flat(boxes, labels):
            boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
            box = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
            labels = np.asarray(labels, np.int64).reshape(-1)
            return {"image": np.full(len(box), self.num_images), "label": labels, "box": box}

        gt = flat(target["boxes"], target["labels"])
        gt["area"] = np.asarray(target.get("area", gt["box"][:, 2] * gt["box"][:, 3]), np.float64)
        gt["crowd"] = np.asarray(target.get("crowd", np.zeros(len(gt["box"]))), bool)
        dt = flat(prediction["boxes"], prediction["labels"]) | {"score": np.asarray(prediction["scores"], np.float64)}
        best = np.lexsort((-dt["score"], dt["label"]))
        best = np.sort(best[ranks(dt["label"][best]) < MAX_DETECTIONS[-1]])
        self.truths.append(gt)
        self.detections.append({key: value[best] for key, value in dt.items()})
        self.num_images += 1

    def compute(self) -> dict:
        """Fractions: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl (COCO's twelve) and
        `per_class` AP; None where there is no ground truth. Also `precision` and `recall` themselves."""
        if not self.num_images:
            raise InputError("no images were given to score.")
        gt, dt = ({key: np.concatenate([x[key] for x in parts]) for key in parts[0]}
                  for parts in (self.truths, self.detections))
        precision, recall = coco_ap(gt, dt, self.num_images, len(self.classes))

        def mean(values):
            values = values[values > -1]
            return float(values.mean()) if values.size else None
        scores = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
        scores |= {f"AP{size}": mean(precision[..., a]) for a, size in enumerate("sml", start=1)}
        scores |= {f"AR{limit}": mean(recall[..., 0, m]) for m, limit in enumerate(MAX_DETECTIONS)}
        scores |= {f"AR{size}": mean(recall[..., a, -1]) for a, size in enumerate("sml", start=1)}
        scores["per_class"] = {name: mean(precision[:, :, k, 0]) for k, name in enumerate(self.classes)}
        return scores | {"precision": precision, "recall": recall}


# --------------------------------------------------------------------------------- segmentation

class MeanIoU:
    """Streaming mean IoU by BDD100K's rule: pixels whose truth is 255 do not count, predictions outside
    the classes are misses, the mean is over the classes that occur in the ground truth.

    background: a class whose pixels the official drivable score leaves out altogether (by truth), so that
        false alarms on background cost nothing; the mean over all classes is then given beside it.
    """

    def __init__(self, classes: Sequence[str], background: int | None = None):
        self.classes, self.background = tuple(classes), background
        self.confusion = np.zeros((len(classes), len(classes) + 1), np.int64)     # truth x (prediction, other)

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Two uint8 arrays of one shape."""
        n = len(self.classes)
        pairs = np.minimum(truth, n).astype(np.uint16) * (n + 1) + np.minimum(prediction, n)
        self.confusion += np.bincount(pairs.ravel(), minlength=(n + 1) ** 2).reshape(n + 1, n + 1)[:n]

    def compute(self) -> dict:
        """Fractions: `mIoU`, `per_class` (None where a class has no ground truth), with a background
        class also `mIoU_3class`."""
        everything = iou_scores(self.confusion)
        counted = [k for k in range(len(self.classes)) if k != self.background]
        official = iou_scores(self.confusion[counted], counted)

        def mean(ious):
            ious = [iou for iou in ious if iou is not None]
            return float(np.mean(ious)) if ious else None
        scores = {"mIoU": mean(official), "per_class": dict(zip((self.classes[k] for k in counted), official))}
        return scores | ({"mIoU_3class": mean(everything)} if self.background is not None else {})


def iou_scores(confusion: np.ndarray, rows: Sequence[int] | None = None) -> list[float | None]:
    """IoU of the classes that the confusion matrix's rows stand for (by default class i is row i)."""
    rows = range(len(confusion)) if rows is None else rows
    scores = []
    for row, k in zip(confusion, rows):
        union = row.sum() + confusion[:, k].sum() - row[k]
        scores.append(float(row[k] / union) if row.sum() else None)
    return scores


# ----------------------------------------------------------------------------- scoring a model

def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py: tensors and plain types, nothing that runs code."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}: train one with train.py, or name another with --ckpt.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)   # reads what is used
        for key in ("model_config", "model", "config", "stage", "step", "steps", "notes", "scores"):
            checkpoint[key]
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


def predictions(model, data: BDD100K, rows: Sequence[int], *, batch: int, workers: int = 0,
                amp: torch.dtype | None = None, confidence: float = 0., desc: str = "predict"):
    """Yields (i, image, prediction) for the rows of the data set, predictions on the CPU."""
    device = next(model.parameters()).device
    loader = torch.utils.data.DataLoader(ImagesOf(data, rows), batch_size=batch, num_workers=workers,
                                         collate_fn=list, pin_memory=device.type == "cuda")
    with torch.inference_mode(), tqdm(total=len(rows), desc=desc, unit="img", leave=False, mininterval=0.5) as bar:
        for items in loader:
            with torch.autocast(device.type, amp, enabled=amp is not None):
                results = model.predict([image for _, image in items], confidence=confidence)
            for (i, image), result in zip(items, results):
                yield i, image, {key: value.cpu() for key, value in result.items()}
            bar.update(len(items))


class ImagesOf(torch.utils.data.Dataset):
    """The rows of a data set as (row, image)."""

    def __init__(self, data: BDD100K, rows: Sequence[int]):
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        return int(self.rows[n]), self.data.image(self.rows[n])


def evaluate(model, data: BDD100K, *, batch: int = 4, workers: int = 0, amp: torch.dtype | None = None,
             keep: Callable | None = None) -> dict:
    """Scores a model on the images that are labelled for any of its tasks, streaming.

    keep: called with (row, image, target, prediction) of every image. Returns, in percent,
    {"detection": {"AP", ..., "per_class"}, "semantic": {"mIoU", "per_class"}, "drivable": {"mIoU",
    "mIoU_3class", "per_class"}, "images"}, with those tasks that model and data share.
    """
    for task, names in model.classes.items():
        if tuple(names) != tuple(data.classes[task]):
            raise InputError(f"the model's {task} classes are {', '.join(names)}; the data's are "
                             f"{', '.join(data.classes[task])}: use data of the same class list.")
    tasks = [task for task in model.classes if data.labelled[task].any()]
    if not tasks:
        raise InputError(f"{data.labels} has no {data.split} labels for {', '.join(model.classes)}.")
    meters = {task: DetectionAP(data.classes[task]) if task == "detection" else
              MeanIoU(data.classes[task], background=2 if task == "drivable" else None) for task in tasks}
    rows = np.flatnonzero(np.any([data.labelled[task] for task in tasks], axis=0))
    for i, image, prediction in predictions(model, data, rows, batch=batch, workers=workers, amp=amp, desc="evaluate"):
        target = data.sized_target(i, image, tasks)
        for task in tasks:
            if task == "detection" and "boxes" in target:
                meters[task].update(target, prediction)
            elif task in target:
                meters[task].update(target[task].numpy(), prediction[task].numpy())
        if keep:
            keep(i, image, target, prediction)
    kept = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU", "mIoU_3class", "per_class")
    scores = {task: {key: percent(value) for key, value in meter.compute().items() if key in kept}
              for task, meter in meters.items()}
    return scores | {"images": len(rows)}


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
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- pictures

def draw(image: Tensor, result: dict, width: int = 640, min_score: float = 0.3) -> Image.Image:
    """One row of three panels for an image [3, H, W]: boxes with names, semantic map, drivable overlay.
    result: a prediction or a target; panels of tasks it lacks show the image alone."""
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    size = (width, round(width * photo.height / photo.width))
    photo = photo.resize(size, Image.Resampling.BICUBIC)
    panels = [draw_boxes(photo.copy(), result, width / image.shape[2], min_score) if "boxes" in result else photo]
    for task, colours, alpha in (("semantic", SEMANTIC_COLOURS, 0.65), ("drivable", DRIVABLE_COLOURS, 0.55)):
        panels.append(overlay(photo, result[task].numpy(), colours, alpha) if task in result else photo)
    row = Image.new("RGB", (3 * width + 8, size[1]), "white")
    for i, panel in enumerate(panels):
        row.paste(panel, (i * (width + 4), 0))
    return row


def overlay(photo: Image.Image, ids: np.ndarray, colours: np.ndarray, alpha: float) -> Image.Image:
    """Colours over the photo where ids have one."""
    known = ids < len(colours)
    paint = np.zeros((*ids.shape, 4), np.uint8)
    paint[known, :3], paint[known, 3] = colours[ids[known]], round(255 * alpha)
    layer = Image.fromarray(paint, "RGBA").resize(photo.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(photo.convert("RGBA"), layer).convert("RGB")


def draw_boxes(photo: Image.Image, result: dict, scale: float, min_score: float) -> Image.Image:
    """Boxes with name and score, best last, so that it is on top."""
    pen, font = ImageDraw.Draw(photo), ImageFont.load_default(size=max(11, photo.width // 50))
    boxes, labels = (result["boxes"] * scale).tolist(), result["labels"].tolist()
    scores = result["scores"].tolist() if "scores" in result else [None] * len(boxes)
    for box, label, score in sorted(zip(boxes, labels, scores), key=lambda item: item[2] or 0):
        if score is not None and score < min_score:
            continue
        colour, text = BOX_COLOURS[label], CLASSES["detection"][label] + ("" if score is None else f" {score:.2f}")
        box = [min(max(v, 0), limit - 1) for v, limit in zip(box, (*photo.size, *photo.size))]
        pen.rectangle(box, outline=colour, width=max(2, photo.width // 320))
        left, top, right, bottom = pen.textbbox((box[0], box[1]), text, font=font, anchor="lb")
        dy = max(0, -top)
        pen.rectangle((left - 1, top + dy - 1, right + 1, bottom + dy + 1), fill=colour)
        pen.text((box[0], box[1] + dy), text, fill="black", font=font, anchor="lb")
    return photo


# --------------------------------------------------------------------------------- command line

def newest_checkpoint() -> Path:
    found = sorted(Path("runs").rglob("*.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("no checkpoint under runs/: train one with train.py, or name one with --ckpt FILE.")
    return found[-1]


def batch_size(device: torch.device) -> int:
    return 8 if device.type == "cuda" else 4


def amp_type(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type that --amp stands for on a device; None = float32."""
    if name == "auto":
        own = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "no" if device.type != "cuda" else "bf16" if own else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[name]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Scores a checkpoint: box AP, mIoU (SS), mIoU (DA), in percent.")
    p.add_argument("--ckpt", nargs="?", metavar="FILE", help="checkpoint to score; without a name the newest under runs/")
    p.add_argument("--data", metavar="DIR", help="data in BDD100K's layout; default: what the checkpoint was trained on")
    p.add_argument("--split", default="val", help="which images to score (default val)")
    p.add_argument("--json", metavar="FILE", help="write the scores as JSON")
    p.add_argument("--show", metavar="DIR", help="draw pictures there: prediction above ground truth")
    p.add_argument("--count", type=int, default=8, help="how many pictures --show draws (default 8)")
    p.add_argument("--batch", type=int, help="images at a time; default 8 on a GPU, else 4")
    p.add_argument("--workers", type=int, help="processes that read images; default 8 on a GPU, else 0")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> dict:
    path = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    checkpoint = load_checkpoint(path)
    trained_on = checkpoint["config"]["data"]
    root = Path(args.data or trained_on)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    data, model = BDD100K(root, args.split), build_model(checkpoint).to(device)
    print(f"{path}: stage {checkpoint['stage']}, step {checkpoint['step']} of {checkpoint['steps']}; "
          f"data {root}, {args.split}")
    for note in checkpoint["notes"]:
        print(f"NOTE: {note}")
    pictures = Pictures(args.show, args.count, data) if args.show else None
    scores = evaluate(model, data, batch=args.batch or batch_size(device), keep=pictures,
                      workers=args.workers if args.workers is not None else 8 * gpu,
                      amp=amp_type(checkpoint["config"]["amp"], device))
    scores |= {"checkpoint": str(path), "notes": checkpoint["notes"]}
    print(table(scores))
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=1))
    return scores


class Pictures:
    """Draws the first images of an evaluation into a folder, prediction above ground truth."""

    def __init__(self, folder: str, count: int, data: BDD100K):
        self.folder, self.left, self.data = Path(folder), count, data
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, i: int, image: Tensor, target: dict, prediction: dict) -> None:
        if self.left > 0:
            self.left -= 1
            rows = [draw(image, prediction), draw(image, target)]
            sheet = Image.new("RGB", (rows[0].width, 2 * rows[0].height + 4), "white")
            sheet.paste(rows[0], (0, 0)), sheet.paste(rows[1], (0, rows[0].height + 4))
            sheet.save(self.folder / f"{self.data.stems[i]}.png")


def sentence(error: Exception) -> str:
    """An error's message, also of one that a worker process raised and wrapped in its traceback."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^[\w.]*InputError: ", "", lines[-1]) if lines[0].startswith("Caught ") else str(error)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        run(parse_args(argv))
    except (InputError, OSError) as error:
        sys.exit(f"evaluate.py: {sentence(error)}")


if __name__ == "__main__":
    main()
