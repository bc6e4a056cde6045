"""evaluate.py: scores against pycocotools and the toolkit's golden cases, files read, written and refused."""
import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluate import BDD100K, CLASSES, DetectionAP, InputError, LabelWriter, MeanIoU, NuImages

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------ detection

def random_problem(seed):
    """Images with boxes on a coarse grid, so that scores, IoUs and areas tie; crowds; foreign areas."""
    rng = np.random.default_rng(seed)
    images, classes, grid = rng.integers(1, 6), rng.integers(1, 4), rng.choice([1, 4, 16])
    truths, detections = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 12)):
            box = rng.integers(0, 120 // grid, 4) * float(grid) + [0, 0, 1, 1]
            if rng.random() < 0.3:
                box[2:] = rng.choice([32., 96., 16.])
            area = box[2] * box[3] if rng.random() < 0.6 else rng.choice([1024., 9216., 1023.9999])
            truths.append((image, rng.integers(classes), box, area, rng.random() < 0.2))
        for _ in range(rng.integers(0, 40 if rng.random() < 0.95 else 400)):
            box = rng.integers(0, 120, 4) + 1.
            if truths and rng.random() < 0.7:
                box = truths[rng.integers(len(truths))][2] + rng.integers(-2, 3, 4) * (grid / 4 if rng.random() < 0.5 else 0)
                box[2:] = np.maximum(box[2:], 1)
            detections.append((image, rng.integers(classes), box, rng.integers(0, 10) / 10))
    return images, classes, truths, detections


def coco_files(images, classes, truths, detections):
    """The problem as COCO's instances and results."""
    instances = {"images": [{"id": i + 1} for i in range(images)], "categories": [{"id": k, "name": f"class {k}"} for k in range(classes)],
                 "annotations": [{"id": n + 1, "image_id": int(i) + 1, "category_id": int(k), "bbox": list(map(float, b)), "area": float(a),
                                  "iscrowd": int(c)} for n, (i, k, b, a, c) in enumerate(truths)]}
    return instances, [{"image_id": int(i) + 1, "category_id": int(k), "bbox": list(map(float, b)), "score": float(s)}
                       for i, k, b, s in detections]


def pycocotools_ap(instances, results):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco.COCO()
        gt.dataset = instances
        gt.createIndex()
        judge = COCOeval(gt, gt.loadRes(results), "bbox")
        judge.evaluate(), judge.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        judge.summarize()
    return judge, printed.getvalue()


@pytest.mark.parametrize("seed", range(0, 200, 100))
def test_ap_equals_pycocotools_exactly(seed):
    for seed in range(seed, seed + 100):
        images, classes, truths, detections = random_problem(seed)
        if not detections:
            continue
        judge, _ = pycocotools_ap(*coco_files(images, classes, truths, detections))
        meter = DetectionAP([str(k) for k in range(classes)])
        for image in range(images):
            gt, dt = [t for t in truths if t[0] == image], [d for d in detections if d[0] == image]
            xyxy = lambda rows: [[*b[:2], *(b[:2] + b[2:])] for _, _, b, *_ in rows]                      # noqa: E731
            meter.update({"boxes": xyxy(gt), "labels": [t[1] for t in gt], "area": [t[3] for t in gt], "crowd": [t[4] for t in gt]},
                         {"boxes": xyxy(dt), "labels": [d[1] for d in dt], "scores": [d[3] for d in dt]})
        scores = meter.compute()
        assert np.array_equal(scores["precision"], judge.eval["precision"][..., 2])
        assert np.array_equal(scores["recall"], judge.eval["recall"])
        ours = [scores[key] for key in evaluate.SUMMARY]
        assert [-1 if score is None else score for score in ours] == list(judge.stats)


def test_ap_without_detections_or_truth():
    meter = DetectionAP(["car", "bus"])
    meter.update({"boxes": [[0, 0, 9, 9]], "labels": [0]}, {"boxes": [], "labels": [], "scores": []})
    scores = meter.compute()
    assert scores["AP"] == scores["AR100"] == 0 and scores["per_class"] == {"car": 0, "bus": None}
    meter = DetectionAP(["car"])
    meter.update({"boxes": [], "labels": []}, {"boxes": [[0, 0, 9, 9]], "labels": [0], "scores": [1]})
    assert meter.compute()["AP"] is None


def test_large_ids_are_told_apart(tmp_path):
    gt = {"images": [{"id": 2 ** 53}, {"id": 2 ** 53 + 1}], "categories": [{"id": 1, "name": "car"}],
          "annotations": [{"image_id": 2 ** 53, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81}]}
    assert score(tmp_path, gt, [{"image_id": 2 ** 53 + 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 1}])[1]["coco"][0] == 0


def test_meters_refuse_what_does_not_fit_together():
    one, box = DetectionAP(["car"]), {"boxes": [[0, 0, 9, 9]], "labels": [0]}
    one.update(box, box | {"scores": [1]})
    for target, prediction in ((box | {"crowd": [0, 1]}, box | {"scores": [1]}), (box | {"area": [float("nan")]}, box | {"scores": [1]}),
                               ({"boxes": [[0, 0, 9]], "labels": [0]}, box | {"scores": [1]}), (box, box | {"scores": []}),
                               (box, box | {"labels": [1], "scores": [1]}), (box, box | {"boxes": [[9, 0, 0, 9]], "scores": [1]})):
        with pytest.raises(InputError, match="image 1: expected"):
            one.update(target, prediction)
    other = DetectionAP(["car"])
    other.update(box, box | {"scores": [1]})
    with pytest.raises(InputError, match="image 0 is in both meters"):
        one.merge(other)


def test_torchmetrics_documented_pair():
    meter = DetectionAP(["x"])
    meter.update({"boxes": [[214, 41, 562, 285]], "labels": [0]}, {"boxes": [[258, 41, 606, 285]], "labels": [0], "scores": [0.536]})
    scores = meter.compute()
    assert (round(scores["AP"], 12), round(scores["AP50"], 12), scores["APs"]) == (0.6, 1, None)


# --------------------------------------------------------------------------------- segmentation

def test_miou_golden_cases_of_the_bdd100k_toolkit():
    truth, prediction = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    truth[0, :6], prediction[0, :2], prediction[5, 5] = 1, 1, 1
    meter = MeanIoU(["a", "b"])
    meter.update(truth, prediction)
    assert meter.confusion.tolist() == [[93, 1, 0], [4, 2, 0]]
    golden = {"mIoU": 61.73469387755102, "mAcc": 81.27147766323024, "fIoU": 90.91836734693878, "pAcc": 95.0}
    scores = meter.compute()
    assert {key: 100 * scores[key] for key in golden} == pytest.approx(golden, abs=1e-12)
    meter.update(truth, np.full_like(truth, 255))                                  # an image that nothing was predicted for
    golden = {"mIoU": 31.911057692307693, "fIoU": 46.45432692307692, "pAcc": 47.5}
    scores = meter.compute()
    assert {key: 100 * scores[key] for key in golden} == pytest.approx(golden, abs=1e-12)


def test_miou_counts_classes_of_the_truth_and_skips_ignored_pixels():
    meter = MeanIoU(["a", "b", "c"])
    meter.update(np.uint8([0, 0, 1, 255, 255]), np.uint8([0, 2, 255, 1, 0]))
    scores = meter.compute()
    assert scores["mIoU"] == 0.25 and scores["per_class"] == {"a": 0.5, "b": 0., "c": None}


def test_confusion_is_that_of_counting_every_pixel():
    rng = np.random.default_rng(0)
    for shape, n in (((7, 9), 3), ((40, 50), 19), ((1, 1), 3), ((0, 5), 3)):
        truth, prediction = rng.choice([0, 1, 2, n - 1, n, 255], (2, *shape)).astype(np.uint8)
        counted = np.zeros((n, n + 1), np.int64)
        for t, p in zip(truth.ravel(), prediction.ravel()):
            if t < n:
                counted[t, min(p, n)] += 1
        assert np.array_equal(evaluate.pair_counts(truth, prediction, n), counted)


def test_drivable_official_rule_leaves_background_truth_out():
    meter = MeanIoU(CLASSES["drivable"], background=2)
    meter.update(np.uint8([0, 0, 1, 1, 2, 2, 2, 255]), np.uint8([0, 2, 1, 0, 2, 0, 1, 0]))
    scores = meter.compute()
    assert scores["per_class"] == {"direct": 1 / 3, "alternative": 1 / 2}
    assert scores["mIoU"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores["mIoU_3class"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 4) / 3)


# ------------------------------------------------------------------------------------ the files

@pytest.fixture
def root(tmp_path):
    """Three val images: `a` has all labels, `b` boxes only, `c` nothing; `c` is a png among the 10k images."""
    make_data(tmp_path / "data")
    return tmp_path / "data"


def make_data(root, split="val"):
    for kind, name in (("100k", "a.jpg"), ("100k", "b.jpg"), ("10k", "a.jpg"), ("10k", "c.png")):
        (root / "images" / kind / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), "grey").save(root / "images" / kind / split / name)
    for task, value in (("semantic", 13), ("drivable", 2)):
        folder = root / evaluate.MASK_FOLDERS[task] / split
        folder.mkdir(parents=True)
        Image.new("L", (32, 24), value).save(folder / "a.png")
    write_boxes(root, [frame("a.jpg", label("car", 2, 3, 9, 8), label("bike", 0, 0, 0, 0), label("other vehicle", 1, 1, 5, 5),
                             label("bus", 1, 1, 5, 5, ignored=True)), {"name": "b.jpg", "labels": None}], split)


def frame(name, *labels):
    return {"name": name, "labels": list(labels)}


def label(category, x1, y1, x2, y2, **attributes):
    return {"category": category, "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}, "attributes": attributes}


def write_boxes(root, frames, split="val"):
    path = root / "labels" / "det_20" / f"det_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(frames if isinstance(frames, str) else json.dumps(frames))


def test_reader_knows_the_layout(root):
    data = BDD100K(root, "val")
    assert data.stems.tolist() == ["a", "b", "c"]
    assert {task: has.tolist() for task, has in data.labelled.items()} == {
        "semantic": [True, False, False], "drivable": [True, False, False], "detection": [True, True, False]}
    image, target = data.sample(0)
    assert image.shape == (3, 24, 32) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[2, 3, 10, 9], [0, 0, 1, 1], [1, 1, 6, 6], [1, 1, 6, 6]]   # ends exclusive
    assert [CLASSES["detection"][k] for k in target["labels"]] == ["car", "bicycle", "car", "bus"]
    assert target["crowd"].tolist() == [False, False, True, True]
    assert target["semantic"].unique().tolist() == [13] and target["drivable"].shape == (24, 32)
    assert {key: len(value) for key, value in data.sample(1)[1].items()} == {"boxes": 0, "labels": 0, "crowd": 0}
    assert data.sample(2)[1] == {}


def test_reader_takes_frames_in_a_dict_and_entries_without_image(root):
    write_boxes(root, {"frames": [frame("elsewhere.jpg", label("car", 0, 0, 3, 3)), frame("b.jpg", label("car", 1, 1, 2, 2))]})
    data = BDD100K(root, "val")
    assert data.labelled["detection"].tolist() == [False, True, False]
    assert data.target(1)["boxes"].tolist() == [[1, 1, 3, 3]]


def test_boxes_once_read_are_kept_until_the_file_changes(root, tmp_path, monkeypatch):
    path, cache = root / "labels/det_20/det_val.json", tmp_path / "cache"
    first = BDD100K(root, "val", cache=cache)
    with monkeypatch.context() as m:
        m.setattr(evaluate, "read_json", None)                                    # the file is not opened again
        again = BDD100K(root, "val", cache=cache)
    for name in ("boxes", "box_labels", "crowd", "offsets"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert len(again.boxes) and np.array_equal(first.labelled["detection"], again.labelled["detection"])
    next(cache.glob("*.npz")).write_bytes(b"damaged")
    assert np.array_equal(BDD100K(root, "val", cache=cache).boxes, first.boxes)
    path.write_text(json.dumps([]))
    assert not len(BDD100K(root, "val", cache=cache).boxes)


@pytest.mark.parametrize("frames, message", [
    ("[{", "det_val.json is not valid JSON"),
    ("{}", "holds no list of frames"),
    ([{"labels": []}], "frame 0 has no name"),
    ([frame("a.jpg"), frame("a.png")], "frame a occurs more than once"),
    ([frame("a.jpg", label("zebra", 0, 0, 1, 1))], "frame a.jpg, label 0 has category 'zebra': expected one of pedestrian"),
    ([frame("a.jpg", label("car", 5, 0, 1, 1))], "frame a.jpg, label 0 has box2d"),
    ([frame("a.jpg", label("car", 0, 0, float("nan"), 1))], "expected finite x1 <= x2"),
    ([frame("a.jpg", {"category": "car"})], "has box2d None"),
])
def test_bad_label_files_are_refused_by_entry(root, frames, message):
    write_boxes(root, frames)
    with pytest.raises(InputError, match=message.replace("[", "\\[")):
        BDD100K(root, "val")


@pytest.mark.parametrize("task, picture, message", [
    ("semantic", Image.new("RGB", (32, 24)), "mode RGB, not class ids.*colormaps"),
    ("semantic", Image.new("P", (32, 24)), "mode P, not class ids"),
    ("semantic", Image.new("L", (32, 24), 19), "holds id 19: expected 0 to 18, or 255"),
    ("drivable", Image.new("L", (32, 24), 3), "holds id 3: expected 0 to 2"),
    ("drivable", Image.new("L", (32, 20)), "a.png is 32x20, its image .*a.jpg 32x24"),
    ("drivable", b"\x89PNG nothing", "a.png cannot be read as an image"),
])
def test_bad_masks_are_refused(root, task, picture, message):
    path = root / evaluate.MASK_FOLDERS[task] / "val" / "a.png"
    path.write_bytes(picture) if isinstance(picture, bytes) else picture.save(path)
    with pytest.raises(InputError, match=message):
        BDD100K(root, "val").sample(0)


def test_truncated_jpeg_is_refused(root):
    path = root / "images" / "100k" / "val" / "b.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="b.jpg cannot be read as an image"):
        BDD100K(root, "val").sample(1)


# --------------------------------------------------------------------------------------- nuImages

SHAPE = 36, 64
KINDS_OF = ["animal", "vehicle.bus.bendy", "human.pedestrian.adult", "flat.driveable_surface", "vehicle.ego"]


def base64_rle(mask):
    code = mask_utils().encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": base64.b64encode(code["counts"]).decode()}


def mask_utils():
    return pytest.importorskip("pycocotools.mask")


def rectangle(x1, y1, x2, y2):
    mask = np.zeros(SHAPE, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def write_nuimages(root, split="val", **changes):
    """Official tables with every column: keyframes a and b, a sweep; changes: other tables."""
    def frame(token, key=True):
        name = f"{'samples' if key else 'sweeps'}/CAM_FRONT/n003__CAM_FRONT__{token}.jpg"
        return {"token": token, "sample_token": "s", "ego_pose_token": "e", "calibrated_sensor_token": "c", "timestamp": 15148,
                "fileformat": "jpg", "is_key_frame": key, "height": SHAPE[0], "width": SHAPE[1], "filename": name, "prev": "", "next": ""}

    def thing(token, frame, kind, mask, bbox):
        return {"token": token, "category_token": f"c{kind}", "bbox": bbox, "mask": mask and base64_rle(rectangle(*mask)),
                "attribute_tokens": [], "sample_data_token": frame}

    def surface(token, frame, kind, mask):
        return {"token": token, "category_token": f"c{kind}", "mask": mask and base64_rle(rectangle(*mask)), "sample_data_token": frame}
    tables = {
        "category": [{"token": f"c{i}", "name": name, "description": ""} for i, name in enumerate(KINDS_OF)],
        "sample_data": [frame("b"), frame("sweep", False), frame("a")],
        "object_ann": [thing("2", "a", 2, (10, 10, 30, 30), [10, 10, 30, 31]), thing("1", "a", 1, (5, 5, 20, 20), [5, 5, 20, 20]),
                       thing("3", "a", 0, (0, 0, 4, 4), [0, 0, 4, 4]), thing("4", "a", 1, None, [40, 0, 50, 9]),
                       thing("5", "sweep", 1, (1, 1, 9, 9), [1, 1, 9, 9])],
        "surface_ann": [surface("9", "a", 3, (0, 8, 64, 36)), surface("8", "a", 4, (0, 30, 64, 36)), surface("7", "a", 3, None)],
        "attribute": [], "calibrated_sensor": [], "ego_pose": [], "log": [], "sample": [], "sensor": [],
    } | changes
    (root / f"v1.0-{split}").mkdir(parents=True)
    for name, rows in tables.items():
        (root / f"v1.0-{split}" / f"{name}.json").write_text(json.dumps(rows))
    (root / "samples/CAM_FRONT").mkdir(parents=True, exist_ok=True)
    for token in "ab":
        Image.new("RGB", SHAPE[::-1], (90, 120, 60)).save(root / "samples/CAM_FRONT" / f"n003__CAM_FRONT__{token}.jpg")
    return tables


def test_nuimages_tables(tmp_path):
    write_nuimages(tmp_path)
    data = NuImages(tmp_path)
    assert len(NuImages.classes["semantic"]) == len(set(NuImages.classes["semantic"])) == 25 and len(NuImages.classes["detection"]) == 10
    assert data.stems.tolist() == ["n003__CAM_FRONT__a", "n003__CAM_FRONT__b"] and all(has.all() for has in data.labelled.values())
    image, target = data.sample(0)
    assert image.shape == (3, *SHAPE) and set(target) == {"boxes", "labels", "crowd", "semantic"}
    found = {NuImages.classes["detection"][k]: box for k, box in zip(target["labels"], target["boxes"].tolist())}
    assert found == {"bus": [5, 5, 20, 20], "pedestrian": [10, 10, 30, 31]}      # no animal, none without a mask, none of a sweep
    names, mask = NuImages.classes["semantic"], target["semantic"]
    seen = {(x, y): names[mask[y, x]] if mask[y, x] < 255 else None for x, y in [(1, 1), (60, 1), (60, 20), (60, 33), (6, 6), (12, 12), (25, 32)]}
    assert seen == {(1, 1): "animal", (60, 1): None, (60, 20): "driveable surface", (60, 33): "ego vehicle", (6, 6): "bendy bus",
                    (12, 12): "adult", (25, 32): "ego vehicle"}                 # objects over surfaces, in the order of their tokens
    empty = data.target(1)
    assert len(empty["boxes"]) == 0 and (empty["semantic"] == 255).all()


@pytest.mark.parametrize("changes, message", [
    ({"category": [{"token": "c0", "name": "lamp", "description": ""}]}, "has category"),
    ({"sample_data": [{"token": "a"}]}, "entry 0 has filename None"),
    ({"sample_data": {}}, "entry 0 has token None"),
    ({"object_ann": [{"token": "1", "sample_data_token": "a", "category_token": "c1", "bbox": [1, 2, 3], "mask": {"size": [36, 64], "counts": "eA=="}}]},
     "bbox [1, 2, 3]"),
    ({"surface_ann": [{"sample_data_token": "a", "category_token": "c3", "mask": {"size": [900, 1600], "counts": "eA=="}}]}, "expected the image's"),
])
def test_bad_nuimages_tables_are_refused(tmp_path, changes, message):
    write_nuimages(tmp_path, **changes)
    with pytest.raises(InputError, match=re.escape(message)):
        NuImages(tmp_path)


def test_bad_nuimages_masks_and_paths_are_refused(tmp_path):
    bad = [{"sample_data_token": "a", "category_token": "c3", "mask": {"size": [36, 64], "counts": counts}} for counts in ("###", "eA==")]
    for n, row in enumerate(bad):
        write_nuimages(tmp_path / str(n), surface_ann=[row])
        with pytest.raises(InputError, match="CAM_FRONT__a.jpg cannot be read"):
            NuImages(tmp_path / str(n)).target(0)
    tables = write_nuimages(tmp_path / "fine")
    tables["sample_data"][0]["filename"] = "../../secret.jpg"
    write_nuimages(tmp_path / "out", sample_data=tables["sample_data"])
    with pytest.raises(InputError, match="outside the data"):
        NuImages(tmp_path / "out")
    image = tmp_path / "fine/samples/CAM_FRONT/n003__CAM_FRONT__a.jpg"
    image.rename(tmp_path / "secret.jpg")
    image.symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(InputError, match="is a link to"):
        NuImages(tmp_path / "fine").image(0)
    with pytest.raises(InputError, match="expected nuImages' tables there"):
        NuImages(tmp_path / "fine", "train")


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_pycocotools(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((rng.integers(1, 200), rng.integers(1, 200))) < rng.choice([0, 0.01, 0.5, 0.99, 1])
    code = mask_utils().encode(np.asfortranarray(mask, np.uint8))
    assert np.array_equal(evaluate.rle_decode({"size": code["size"], "counts": code["counts"].decode()}), mask)
    uneven = np.kron(rng.random((9, 7)) < 0.5, np.ones((97, 61), bool))          # long runs and negative differences
    code = mask_utils().encode(np.asfortranarray(uneven, np.uint8))
    assert np.array_equal(evaluate.rle_decode({"size": code["size"], "counts": code["counts"].decode()}), uneven)


def test_a_folder_is_checked(root, capsys):
    make_data(root, "train")
    assert evaluate.check_data(root)
    said = capsys.readouterr().out
    assert "3 images are in train and val, such as a" in said and "a run can use all of this" in said and "BAD" not in said
    write_boxes(root, [frame("a.jpg", label("car", 1, 2, 3, 4), label("lamp", 1, 2, 3, 4), label("bus", 9, 2, 3, 4), label("car", 1, 2, 3000, 4)),
                       frame("gone.jpg")])
    for folder, value in zip(evaluate.MASK_FOLDERS.values(), (0, 200)):
        Image.new("L", (3, 3), value).save(root / folder / "val/a.png")
        Image.new("L", (3, 3)).save(root / folder / "val/nowhere.png")
    (root / "images/10k/val/c.png").write_bytes(b"no image")
    assert not evaluate.check_data(root)
    said = capsys.readouterr().out
    for line in ("BAD  1 x label with a wrong category", "BAD  1 x label with a wrong box2d", "note 1 x entry without an image, such as gone.jpg",
                 "BAD  1 x unreadable image", "BAD  1 x semantic mask of another size", "BAD  1 x wrong drivable mask", "note 1 x box beyond the image",
                 "note 1 x semantic mask without an image", "detection, 2 boxes: pedestrian 0.00%, rider 0.00%, car 100.00%"):
        assert line in said, (line, said)
    shutil.rmtree(root / "images")                                              # labels alone
    assert not evaluate.check_data(root)
    assert "detection, 2 boxes" in capsys.readouterr().out


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no data folder"):
        BDD100K(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no images in"):
        BDD100K(tmp_path)


def test_what_is_written_is_read_back(root, tmp_path):
    prediction = {"boxes": torch.tensor([[1.25, 2, 7, 9.5], [0, 0, 32, 24]]), "scores": torch.tensor([0.9, 0.1]),
                  "labels": torch.tensor([2, 8]), "semantic": torch.full((24, 32), 255, dtype=torch.uint8),
                  "drivable": torch.ones(24, 32, dtype=torch.uint8)}
    writer = LabelWriter(tmp_path / "out", "val")
    writer.add("a.jpg", prediction)
    writer.add("b.jpg", {key: prediction[key][:0] for key in ("boxes", "scores", "labels")})
    writer.close()
    target = BDD100K(root, "val", labels=tmp_path / "out").target(0)
    assert all(torch.equal(target[key], prediction[key]) for key in ("boxes", "labels", "semantic", "drivable"))
    frames = json.loads((tmp_path / "out/labels/det_20/det_val.json").read_text())
    assert frames[0]["labels"][1]["box2d"] == {"x1": 0, "y1": 0, "x2": 31, "y2": 23}        # inclusive
    assert frames[1]["labels"] == []


class Oracle(torch.nn.Module):
    """Predicts the labels themselves."""

    classes = CLASSES

    def __init__(self, data):
        super().__init__()
        self.data, self.seen, self.weight = data, 0, torch.nn.Parameter(torch.zeros(1))

    def predict(self, images, confidence=0.):
        results = []
        for image in images:
            result = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)} | self.data.target(self.seen)
            result["scores"] = torch.ones(len(result["boxes"]))
            results.append({task: torch.zeros(image.shape[1:], dtype=torch.uint8) for task in ("semantic", "drivable")} | result)
            self.seen += 1
        return results


def test_the_labels_themselves_score_a_hundred(root):
    folder = root / evaluate.MASK_FOLDERS["drivable"] / "val"
    Image.fromarray(np.repeat(np.uint8([[0], [1], [2]]), 8, 0).repeat(32, 1)).save(folder / "a.png")
    data, drawn = BDD100K(root, "val"), []
    scores = evaluate.evaluate(Oracle(data), data, batch=2, keep=[lambda i, *rest: drawn.append(i)])
    assert scores["detection"]["AP"] == pytest.approx(100) and scores["detection"]["per_class"]["bus"] is None   # ignored
    assert scores["semantic"]["mIoU"] == scores["drivable"]["mIoU"] == scores["drivable"]["mIoU_3class"] == 100
    assert scores["images"] == 2 and drawn == [0, 1]                               # `c` has no labels
    assert "100.0" in evaluate.table(scores) and json.loads(json.dumps(scores)) == scores


class Guesser(torch.nn.Module):
    """Predicts boxes and maps that depend on the image alone."""

    classes = CLASSES

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def predict(self, images, confidence=0.):
        return [self.guess(image) for image in images]

    def guess(self, image):
        h, w = image.shape[1:]
        seeded = torch.Generator().manual_seed(int(image.sum()))
        corner = torch.rand(150, 2, generator=seeded) * torch.tensor([w - 4., h - 4.])
        scores = (torch.rand(150, generator=seeded) * 20).round() / 20                       # many ties
        return {"boxes": torch.cat([corner, corner + torch.rand(150, 1, generator=seeded) * 60 + 5], 1), "scores": scores.sort(descending=True).values,
                "labels": torch.randint(1, 4, (150,), generator=seeded), "semantic": (image[0] // 20).to(torch.uint8),
                "drivable": (torch.arange(h) < h // 2).to(torch.uint8)[:, None].repeat(1, w)}


@pytest.fixture(scope="module")
def roads(tmp_path_factory):
    """Eight validation images of the sample."""
    root = tmp_path_factory.mktemp("roads")
    for kind in ("images/100k", *evaluate.MASK_FOLDERS.values()):
        (root / kind / "val").mkdir(parents=True)
        for file in sorted((evaluate.SAMPLE / kind / "val").iterdir())[:8]:
            shutil.copy(file, root / kind / "val")
    (root / "labels/det_20").mkdir()
    shutil.copy(evaluate.SAMPLE / "labels/det_20/det_val.json", root / "labels/det_20")
    return BDD100K(root, "val")


# ------------------------------------------------------------------------- files against files

def score(tmp_path, gt, dt, *options):
    """What evaluate.py prints and writes for two files, given as content or path."""
    paths = [content if hasattr(content, "is_dir") else tmp_path / f"{name}.json" for name, content in (("gt", gt), ("dt", dt))]
    for path, content in zip(paths, (gt, dt)):
        if path is not content:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.main(["--gt", str(paths[0]), "--dt", str(paths[1]), "--json", str(tmp_path / "scores.json"), *options])
    return printed.getvalue(), json.loads((tmp_path / "scores.json").read_text())


def test_coco_files_are_scored_and_printed_as_pycocotools_does(tmp_path):
    for seed in (1, 4, 9):
        files = coco_files(*random_problem(seed))
        judge, expected = pycocotools_ap(*files)
        printed, scores = score(tmp_path, *files)
        assert printed == expected and scores["coco"] == list(judge.stats)
    files[1].append(files[1][0] | {"image_id": 99}), files[1].append(files[1][0] | {"category_id": 99})
    printed, again = score(tmp_path, *files)
    assert again["coco"] == scores["coco"] and "NOTE: 1 detections of unknown images" in printed and "of unknown categories" in printed
    assert score(tmp_path, files[0], [])[1]["coco"][0] == 0                       # pycocotools crashes


def test_scalabel_files_follow_the_official_toolkit(tmp_path):
    car = label("car", 10, 10, 29, 29)
    truth = [frame("b.jpg", car, label("other vehicle", 50, 50, 79, 79)), frame("a.jpg")]
    guess = {"frames": [frame("b.jpg", car | {"score": 0.9}, label("van", 50, 50, 79, 79) | {"score": 0.95},    # ignored: no error
                              label("zebra", 0, 0, 5, 5) | {"score": 0.5}), frame("c.jpg", car | {"score": 0.5})]}
    printed, scores = score(tmp_path, truth, guess)
    assert scores["detection"]["AP"] == pytest.approx(100) and scores["images"] == 2
    assert scores["dropped"] == {"detections of unknown images": 1, "detections of unknown categories": 1} and "NOTE: 1" in printed
    instances = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "car"}],                # 20 pixels wide: inclusive
                 "annotations": [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400}]}
    assert score(tmp_path, instances, [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 1}])[1]["coco"][0] == pytest.approx(1)


def test_masks_are_matched_by_stem_and_missing_ones_are_missed(tmp_path):
    for folder, names in (("sem_seg", "ab"), ("found", "ac")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(np.uint8([[0, 0, 1, 255]])).save(tmp_path / folder / f"{name}.png")
    printed, scores = score(tmp_path, tmp_path / "sem_seg", tmp_path / "found")
    assert scores["semantic"]["per_class"]["road"] == scores["semantic"]["per_class"]["sidewalk"] == 50
    assert scores["dropped"] == {"masks of unknown images": 1, "images without prediction, counted as all missed": 1}
    assert "BDD100K: mean over" in printed and "all missed" in printed


def test_run_length_masks_are_the_pngs(tmp_path, roads):
    coder = pytest.importorskip("pycocotools.mask")
    for task in ("semantic", "drivable"):
        frames, folder = [], roads.labels / evaluate.MASK_FOLDERS[task] / roads.split
        for stem in roads.stems:
            mask = np.asarray(Image.open(folder / f"{stem}.png"))
            codes = {k: coder.encode(np.asfortranarray(mask == k)) for k in np.unique(mask) if k < (19 if task == "semantic" else 2)}
            for k, code in codes.items():
                assert np.array_equal(evaluate.rle_decode({"size": code["size"], "counts": code["counts"].decode()}), mask == k)
            frames.append(frame(f"{stem}.jpg", *({"category": CLASSES[task][k], "rle": code | {"counts": code["counts"].decode()}}
                                                 for k, code in codes.items())))
        scores = score(tmp_path, folder, frames)[1]
        assert scores[task]["mIoU"] == scores[task]["pAcc"] == 100 and scores == score(tmp_path, frames, folder)[1]


def test_what_is_saved_scores_as_the_model_did(tmp_path, roads):
    saved = evaluate.Saved(tmp_path / "saved", roads)
    scores = evaluate.evaluate(Guesser(), roads, keep=[saved])
    saved.close()
    assert scores["detection"]["AP50"] > 0 and scores["semantic"]["mIoU"] > 0.5
    boxes = score(tmp_path, roads.root / "labels/det_20/det_val.json", tmp_path / "saved/labels/det_20/det_val.json")[1]
    assert boxes["images"] == 150                                                 # of which eight have predictions
    for task, folder in evaluate.MASK_FOLDERS.items():
        assert score(tmp_path, roads.root / folder / "val", tmp_path / "saved" / folder / "val")[1][task] == scores[task]
    again = score(tmp_path, tmp_path / "saved/coco/gt_val.json", tmp_path / "saved/coco/dt_val.json")[1]
    assert again["detection"] == scores["detection"]
    (tmp_path / "gt.json").write_text(json.dumps([f for f in json.loads((roads.root / "labels/det_20/det_val.json").read_text())
                                                  if f["name"][:-4] in roads.stems]))
    assert score(tmp_path, tmp_path / "gt.json", tmp_path / "saved/labels/det_20/det_val.json")[1]["detection"] == scores["detection"]


BOX = {"image_id": 1, "category_id": 0, "bbox": [1, 1, 5, 5], "score": 0.5}


@pytest.mark.parametrize("gt, dt, message", [
    ({}, [BOX | {"bbox": [1, 1, float("nan"), 5]}], "dt.json: entry 0 has no good bbox, expected 4 finite numbers"),
    ({}, [BOX, BOX | {"bbox": [1, 1, float("inf"), 5]}], "dt.json: entry 1 has no good bbox"),
    ({}, [BOX | {"bbox": [1, 1, -5, 5]}], "dt.json: entry 0 cannot be used, expected bbox x, y, width, height with no negative"),
    ({}, [BOX | {"bbox": [1, 1, 5]}], "entry 0 has no good bbox"),
    ({}, [BOX, BOX | {"score": 1.5}], "dt.json: entry 1 cannot be used, expected a score from 0 to 1"),
    ({}, [BOX | {"score": float("nan")}], "entry 0 has no good score"),
    ({}, [BOX | {"score": None}], "entry 0 has no good score"),
    ({}, [BOX | {"score": True}], "entry 0 has no good score"),
    ({}, [BOX | {"image_id": 1.5}], "dt.json: entry 0 has image_id 1.5, expected a whole number"),
    ({}, [BOX | {"image_id": "1"}], "dt.json: entry 0 has image_id '1', expected a whole number"),
    ({}, [BOX | {"image_id": 2}], "none of the 1 detections in .*dt.json is of an image and category of"),
    ({}, [{}], "different formats"),
    ({}, [5], "different formats"),
    (5, [], "holds no list of frames"),
    ([frame("a.jpg") | {"labels": {}}], [], "frame a.jpg has labels"),
    ([frame("a.jpg", label("car", 0, 0, True, 9))], [], "label 0 has box2d"),
    ([frame("a.jpg", label("car", 0, 0, 9, 9, crowd="false"))], [], "label 0 has crowd 'false'"),
    ({"categories": [{"id": 0, "name": "car"}, {"id": 1, "name": "car"}]}, [], "gt.json: name 'car' occurs more than once"),
    ({}, {"annotations": []}, "different formats"),
    ({}, "", "dt.json is not valid JSON"),
    ({"images": [{"id": 1}, {"id": 1}]}, [BOX], "gt.json: id 1 occurs more than once"),
    ({"images": [{"name": "x"}]}, [BOX], "gt.json: entry 0 has no id"),
    ({"annotations": [BOX | {"area": -1}]}, [BOX], "gt.json: entry 0 cannot be used, expected area from 0"),
    ({"annotations": [BOX | {"area": 1, "image_id": 7}]}, [BOX], "gt.json: entry 0 cannot be used, expected image_id"),
    ([frame("a.jpg")], [frame("a.jpg", label("car", 0, 0, 9, 9))], "dt.json: frame a.jpg, label 0 has score None"),
    ([frame("a.jpg")], [frame("a.jpg", label("car", 0, 0, 9, 9) | {"score": 2})], "label 0 has score 2"),
    ([frame("a.jpg")], [frame("a.jpg", label("car", 0, 0, -9, 9) | {"score": 1})], "label 0 has box2d"),
    ([frame("a.jpg")], [frame("a.jpg"), frame("a.jpg")], "frame a occurs more than once"),
    ([frame("a.jpg", {"category": "road", "rle": {"counts": [3, 4], "size": [2, 2]}})], [frame("a.jpg")], "label 0 is no run-length mask"),
    ([frame("a.jpg", {"category": "road", "rle": {"counts": "`" * 99, "size": [2, 2]}})], [frame("a.jpg")], "label 0 is no run-length mask"),
])
def test_bad_files_are_refused_by_entry(tmp_path, gt, dt, message):
    if isinstance(gt, dict):
        gt = {"images": [{"id": 1}], "categories": [{"id": 0, "name": "car"}], "annotations": []} | gt
    with pytest.raises(SystemExit, match=message.replace("[", "\\[")):
        score(tmp_path, gt, dt)


@pytest.mark.parametrize("picture, message", [
    (Image.new("L", (5, 4)), "mask of a is 5x4 in .*drivable, but 4x4"),
    (Image.new("P", (4, 4)), "a.png is a picture of mode P"),
    (Image.new("I;16", (4, 4)), "a.png is a picture of mode I;16"),
    (b"", "a.png cannot be read as an image"),
])
def test_bad_predicted_masks_are_refused(tmp_path, picture, message):
    for folder in ("gt", "drivable"):
        (tmp_path / folder).mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "gt/a.png")
    path = tmp_path / "drivable/a.png"
    path.write_bytes(picture) if isinstance(picture, bytes) else picture.save(path)
    with pytest.raises(SystemExit, match=message):
        score(tmp_path, tmp_path / "gt", tmp_path / "drivable", "--task", "drivable")
    with pytest.raises(SystemExit, match="add --task semantic or --task drivable"):
        score(tmp_path, tmp_path / "gt", tmp_path / "drivable")


# ------------------------------------------------------------------- many processes and pictures

MANY = """
import json, sys, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
import evaluate
from test_evaluate import Guesser
dist.init_process_group("gloo")
data = evaluate.BDD100K({data!r}, "val")
saved = evaluate.Saved({out!r}, data)
scores = evaluate.evaluate(Guesser(), data, keep=[saved])
saved.close()
(saved.folder / f"{{dist.get_rank()}}.json").write_text(json.dumps(scores))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_images_and_get_the_same_scores(tmp_path, roads, world):
    (tmp_path / "many.py").write_text(MANY.format(root=str(ROOT), tests=str(ROOT / "tests"), data=str(roads.root), out=str(tmp_path / "many")))
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", f"--master_port={29620 + world}",
                            str(tmp_path / "many.py")], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    scores = [json.loads((tmp_path / f"many/{rank}.json").read_text()) for rank in range(world)]
    saved = evaluate.Saved(tmp_path / "one", roads)
    assert scores == [evaluate.evaluate(Guesser(), roads, keep=[saved])] * world
    saved.close()
    for file in ("labels/det_20/det_val.json", "coco/gt_val.json"):
        assert (tmp_path / "many" / file).read_text() == (tmp_path / "one" / file).read_text()
    order = lambda path: sorted(json.loads(path.read_text()), key=lambda d: d["image_id"])                        # noqa: E731
    assert order(tmp_path / "many/coco/dt_val.json") == order(tmp_path / "one/coco/dt_val.json")


def test_a_bad_file_ends_all_processes_with_its_sentence(tmp_path, roads):
    bad = tmp_path / "bad"
    shutil.copytree(roads.root, bad)
    (bad / evaluate.MASK_FOLDERS["semantic"] / "val" / f"{roads.stems[3]}.png").write_bytes(b"nothing")
    (tmp_path / "many.py").write_text(MANY.format(root=str(ROOT), tests=str(ROOT / "tests"), data=str(bad), out=str(tmp_path / "out")).replace(
        "scores = evaluate.evaluate", "try:\n    evaluate.evaluate(Guesser(), data)\nexcept evaluate.InputError as error:\n"
        "    sys.exit('SAID ' + str(error))\nscores = evaluate.evaluate"))
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29624",
                            str(tmp_path / "many.py")], capture_output=True, text=True, timeout=300)
    assert ended.stderr.count(f"SAID {bad}") == 2 and f"{roads.stems[3]}.png cannot be read as an image" in ended.stderr, ended.stderr


def test_any_images_are_drawn_and_never_overwritten(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg", "b[1].png"):
        Image.new("RGB", (40, 30), "grey").save(tmp_path / "in" / name)
    assert [file.name for file in evaluate.ImageFiles(str(tmp_path / "in")).files] == ["a.jpg", "a.png", "b[1].png"]
    assert len(evaluate.ImageFiles(str(tmp_path / "in/*.png")).files) == 2 and len(evaluate.ImageFiles(str(tmp_path / "in/b[1].png")).files) == 1
    args = evaluate.parse_args(["--ckpt", "x", "--images", str(tmp_path / "in"), "--show", str(tmp_path / "out")])
    assert evaluate.show_images(Guesser(), args, {"batch": 2}) == 3
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["001_a.png", "002_a.png", "003_b[1].png"]
    for name in ("0.png", "001_0.png"):
        shutil.copy(tmp_path / "in/a.png", tmp_path / "out" / name)
    args.images = args.show
    with pytest.raises(InputError, match="holds the images themselves"):
        evaluate.show_images(Guesser(), args, {"batch": 2})


def test_the_worst_pictures_come_first(tmp_path, roads):
    class Mostly(Oracle):
        """Right but for images 3 and 5, and 5 is worse."""
        def predict(self, images, confidence=0.):
            first, results = self.seen, super().predict(images)
            for i, result in enumerate(results, start=first):
                if i in (3, 5):
                    result["drivable"] = torch.full_like(result["drivable"], 2)
                if i == 5:
                    result["semantic"] = torch.full_like(result["semantic"], 18)
            return results
    pictures = evaluate.Pictures(tmp_path, 2, roads)
    evaluate.evaluate(Mostly(roads), roads, keep=[pictures])
    pictures.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"001_{roads.stems[5]}.png", f"002_{roads.stems[3]}.png"]


def test_pictures_show_boxes_where_they_are():
    image = torch.full((3, 90, 160), 100, dtype=torch.uint8)
    result = {"boxes": torch.tensor([[40., 30, 80, 60]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.8]),
              "semantic": torch.full((90, 160), 255, dtype=torch.uint8), "drivable": torch.zeros(90, 160, dtype=torch.uint8)}
    sheet = np.asarray(evaluate.panels(image, result, width=320))
    assert sheet.shape == (180, 3 * 320 + 8, 3)
    assert tuple(sheet[90, 80]) == (0x56, 0xb4, 0xe9) and tuple(sheet[90, 120]) == (100, 100, 100)    # edge, inside
    assert tuple(sheet[90, 324 + 100]) == (100, 100, 100)                          # ignored: nothing painted
    assert sheet[90, 648 + 100, 2] > 140                                           # direct: blue
