"""evaluate.py: scores against pycocotools and the toolkit's golden cases, files read, written and refused."""
import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluate import BDD100K, CLASSES, DetectionAP, InputError, LabelWriter, MeanIoU


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


def pycocotools_ap(images, classes, truths, detections):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco.COCO()
        gt.dataset = {"images": [{"id": i + 1} for i in range(images)], "categories": [{"id": k} for k in range(classes)],
                      "annotations": [{"id": n + 1, "image_id": i + 1, "category_id": int(k), "bbox": list(b), "area": float(a),
                                       "iscrowd": int(c)} for n, (i, k, b, a, c) in enumerate(truths)]}
        gt.createIndex()
        dt = gt.loadRes([{"image_id": i + 1, "category_id": int(k), "bbox": list(b), "score": float(s)} for i, k, b, s in detections])
        judge = COCOeval(gt, dt, "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_ap_equals_pycocotools_exactly(seed):
    for seed in range(seed, seed + 20):
        images, classes, truths, detections = random_problem(seed)
        if not detections:
            continue
        judge = pycocotools_ap(images, classes, truths, detections)
        meter = DetectionAP([str(k) for k in range(classes)])
        for image in range(images):
            gt, dt = [t for t in truths if t[0] == image], [d for d in detections if d[0] == image]
            xyxy = lambda rows: [[*b[:2], *(b[:2] + b[2:])] for _, _, b, *_ in rows]                      # noqa: E731
            meter.update({"boxes": xyxy(gt), "labels": [t[1] for t in gt], "area": [t[3] for t in gt], "crowd": [t[4] for t in gt]},
                         {"boxes": xyxy(dt), "labels": [d[1] for d in dt], "scores": [d[3] for d in dt]})
        scores = meter.compute()
        assert np.array_equal(scores["precision"], judge.eval["precision"][..., 2])
        assert np.array_equal(scores["recall"], judge.eval["recall"])
        ours = [scores[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")]
        assert [-1 if score is None else score for score in ours] == list(judge.stats)


def test_ap_without_detections_or_truth():
    meter = DetectionAP(["car", "bus"])
    meter.update({"boxes": [[0, 0, 9, 9]], "labels": [0]}, {"boxes": [], "labels": [], "scores": []})
    scores = meter.compute()
    assert scores["AP"] == scores["AR100"] == 0 and scores["per_class"] == {"car": 0, "bus": None}
    meter = DetectionAP(["car"])
    meter.update({"boxes": [], "labels": []}, {"boxes": [[0, 0, 9, 9]], "labels": [0], "scores": [1]})
    assert meter.compute()["AP"] is None


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
    assert 100 * meter.compute()["mIoU"] == pytest.approx(61.73469387755102, abs=1e-12)


def test_miou_counts_classes_of_the_truth_and_skips_ignored_pixels():
    meter = MeanIoU(["a", "b", "c"])
    meter.update(np.uint8([0, 0, 1, 255, 255]), np.uint8([0, 2, 255, 1, 0]))
    assert meter.compute() == {"mIoU": 0.25, "per_class": {"a": 0.5, "b": 0., "c": None}}


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
    scores = evaluate.evaluate(Oracle(data), data, batch=2, keep=lambda i, *rest: drawn.append(i))
    assert scores["detection"]["AP"] == pytest.approx(100) and scores["detection"]["per_class"]["bus"] is None   # ignored
    assert scores["semantic"]["mIoU"] == scores["drivable"]["mIoU"] == scores["drivable"]["mIoU_3class"] == 100
    assert scores["images"] == 2 and drawn == [0, 1]                               # `c` has no labels
    assert "100.0" in evaluate.table(scores) and json.loads(json.dumps(scores)) == scores


def test_pictures_show_boxes_where_they_are():
    image = torch.full((3, 90, 160), 100, dtype=torch.uint8)
    result = {"boxes": torch.tensor([[40., 30, 80, 60]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.8]),
              "semantic": torch.full((90, 160), 255, dtype=torch.uint8), "drivable": torch.zeros(90, 160, dtype=torch.uint8)}
    sheet = np.asarray(evaluate.draw(image, result, width=320))
    assert sheet.shape == (180, 3 * 320 + 8, 3)
    assert tuple(sheet[90, 80]) == (0x56, 0xb4, 0xe9) and tuple(sheet[90, 120]) == (100, 100, 100)    # edge, inside
    assert tuple(sheet[90, 324 + 100]) == (100, 100, 100)                          # ignored: nothing painted
    assert sheet[90, 648 + 100, 2] > 140                                           # direct: blue
