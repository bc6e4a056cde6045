"""evaluate.py: scores against pycocotools and the toolkit's golden cases, files good and bad."""
import base64
import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import evaluate
from evaluate import BDD100K, CLASSES, DetectionAP, InputError, LabelWriter, MeanIoU, NuImages

# ------------------------------------------------------------------------------------ detection

def random_problem(seed):
    """COCO's instances and results with boxes on a coarse grid, so that scores, IoUs and areas tie;
    crowds; areas that are not the box's."""
    rng = np.random.default_rng(seed)
    images, classes, grid = rng.integers(1, 6), rng.integers(1, 4), rng.choice([1, 4, 16])
    annotations, results = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 12)):
            box = rng.integers(0, 120 // grid, 4) * float(grid) + [0, 0, 1, 1]
            if rng.random() < 0.3:
                box[2:] = rng.choice([32., 96., 16.])
            area = box[2] * box[3] if rng.random() < 0.6 else rng.choice([1024., 9216., 1023.9999])
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "area": float(area),
                "category_id": int(rng.integers(classes)), "bbox": box.tolist(),
                "iscrowd": int(rng.random() < 0.2)})
        for _ in range(rng.integers(0, 40 if rng.random() < 0.95 else 400)):
            box = rng.integers(0, 120, 4) + 1.
            if annotations and rng.random() < 0.7:
                near = annotations[rng.integers(len(annotations))]["bbox"]
                box = near + rng.integers(-2, 3, 4) * (grid / 4 if rng.random() < 0.5 else 0)
                box[2:] = np.maximum(box[2:], 1)
            results.append({"image_id": image, "category_id": int(rng.integers(classes)),
                            "bbox": box.tolist(), "score": int(rng.integers(0, 10)) / 10})
    return {"images": [{"id": image} for image in range(1, images + 1)], "annotations": annotations,
            "categories": [{"id": k, "name": f"class {k}"} for k in range(classes)]}, results


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


def test_ap_equals_pycocotools_exactly():
    def of_image(entries, image, **columns):
        entries = [entry for entry in entries if entry["image_id"] == image["id"]]
        boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return {"boxes": boxes} | {name: [entry[key] for entry in entries]
                                   for name, key in columns.items()}

    for instances, results in map(random_problem, range(200)):
        if not results:
            continue
        judge, _ = pycocotools_ap(instances, results)
        meter = DetectionAP([category["name"] for category in instances["categories"]])
        for image in instances["images"]:
            meter.update(of_image(instances["annotations"], image, labels="category_id",
                                  area="area", crowd="iscrowd"),
                         of_image(results, image, labels="category_id", scores="score"))
        scores = meter.compute()
        assert np.array_equal(scores["precision"], judge.eval["precision"][..., 2])
        assert np.array_equal(scores["recall"], judge.eval["recall"])
        ours = [scores[key] for key in evaluate.SUMMARY]
        assert [-1 if score is None else score for score in ours] == list(judge.stats)


def test_ap_of_one_image_and_meters_that_refuse_bad_input():
    one, box = DetectionAP(["car"]), {"boxes": [[0, 0, 9, 9]], "labels": [0]}
    guess, none = box | {"scores": [1]}, {"boxes": [], "labels": [], "scores": []}
    for target, prediction, ap in ((box, none, 0), (none, guess, None), (box, guess, 1)):
        meter = DetectionAP(["car", "bus"])
        meter.update(target, prediction)
        assert meter.compute()["AP"] == (ap if ap is None else pytest.approx(ap))
        assert meter.compute()["per_class"]["bus"] is None
    one.update(box, guess)
    for target, prediction in ((box | {"crowd": [0, 1]}, guess), (box, guess | {"scores": []}),
                               (box | {"area": [np.nan]}, guess), (box | {"boxes": [[0]]}, guess),
                               (box, guess | {"labels": [1]}),
                               (box, guess | {"boxes": [[9, 0, 0, 9]]})):
        with pytest.raises(InputError, match="image 1: expected"):
            one.update(target, prediction)
    with pytest.raises(InputError, match="image 0 is in both meters"):
        one.merge(one)


# --------------------------------------------------------------------------------- segmentation

def test_miou_is_the_bdd100k_toolkits():
    truth, prediction = np.zeros((2, 10, 10), np.uint8)
    truth[0, :6], prediction[0, :2], prediction[5, 5] = 1, 1, 1
    meter = MeanIoU(["a", "b"])
    for guess, golden in (
            (prediction, {"mIoU": 61.73469387755102, "mAcc": 81.27147766323024,
                          "fIoU": 90.91836734693878, "pAcc": 95.0}),
            (np.full_like(truth, 255), {"mIoU": 31.911057692307693, "fIoU": 46.45432692307692,
                                        "pAcc": 47.5})):          # nothing was predicted
        meter.update(truth, guess)
        scores = meter.compute()
        assert {key: 100 * scores[key] for key in golden} == pytest.approx(golden, abs=1e-12)
    assert meter.confusion.tolist() == [[93, 1, 94], [4, 2, 6]]
    meter = MeanIoU(["a", "b", "c"])                              # ignored pixels, a class without
    meter.update(np.uint8([0, 0, 1, 255, 255]), np.uint8([0, 2, 255, 1, 0]))
    scores = meter.compute()
    assert scores["mIoU"] == 0.25 and scores["per_class"] == {"a": 0.5, "b": 0., "c": None}
    meter = MeanIoU(CLASSES["drivable"], background=2)            # whose pixels are left out
    meter.update(np.uint8([0, 0, 1, 1, 2, 2, 2, 255]), np.uint8([0, 2, 1, 0, 2, 0, 1, 0]))
    scores = meter.compute()
    assert scores["per_class"] == {"direct": 1 / 3, "alternative": 1 / 2}
    assert [scores["mIoU"], scores["mIoU_all"]] == pytest.approx([5 / 12, 5 / 18])


def test_confusion_is_that_of_counting_every_pixel():
    rng = np.random.default_rng(0)
    for shape, n in (((7, 9), 3), ((40, 50), 19), ((1, 1), 3), ((0, 5), 3)):
        truth, prediction = rng.choice([0, 1, 2, n - 1, n, 255], (2, *shape)).astype(np.uint8)
        counted = np.zeros((n, n + 1), np.int64)
        for t, p in zip(truth.ravel(), prediction.ravel()):
            if t < n:
                counted[t, min(p, n)] += 1
        assert np.array_equal(evaluate.pair_counts(truth, prediction, n), counted)


# ------------------------------------------------------------------------------------ the files

@pytest.fixture
def root(tmp_path):
    """Three val images: `a` has all labels, `b` boxes only, `c` (a png of the 10k) nothing."""
    make_data(tmp_path / "data")
    return tmp_path / "data"


def make_data(root, split="val", a="a", b="b"):
    for file in ("100k/{}/{}.jpg", "100k/{}/{b}.jpg", "10k/{}/{}.jpg", "10k/{}/c.png"):
        path = root / "images" / file.format(split, a, b=b)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), "grey").save(path)
    for task, value in (("semantic", 13), ("drivable", 2)):
        folder = root / evaluate.mask_folder(task) / split
        folder.mkdir(parents=True)
        Image.new("L", (32, 24), value).save(folder / f"{a}.png")
    labels = [label("car", 2, 3, 9, 8) | {"score": "any"}, label("bike", 0, 0, 0, 0),
              label("other vehicle", 1, 1, 5, 5), label("bus", 1, 1, 5, 5, ignored=True)]
    write_boxes(root, [frame(f"{a}.jpg", *labels), {"name": f"{b}.jpg", "labels": None}], split)


def frame(name, *labels):
    return {"name": name, "labels": list(labels)}


def label(category, x1, y1, x2, y2, **attributes):
    box = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return {"category": category, "box2d": box, "attributes": attributes}


def write_boxes(root, frames, split="val"):
    evaluate.write_json(root / "labels" / "det_20" / f"det_{split}.json", frames)


def test_reader_knows_the_layout(root):
    data = BDD100K(root, "val")
    assert data.stems.tolist() == ["a", "b", "c"]
    assert {task: has.tolist() for task, has in data.labelled.items()} == {
        "semantic": [True, False, False], "drivable": [True, False, False],
        "detection": [True, True, False]}
    image, target = data.sample(0)
    assert image.shape == (3, 24, 32) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[2, 3, 10, 9], [0, 0, 1, 1], [1, 1, 6, 6], [1, 1, 6, 6]]
    assert target["labels"].tolist() == [2, 7, 2, 4]                # car, bicycle, car, bus
    assert target["crowd"].tolist() == [False, False, True, True]
    assert target["semantic"].unique().tolist() == [13] and target["drivable"].shape == (24, 32)
    empty = {key: len(value) for key, value in data.sample(1)[1].items()}
    assert empty == {"boxes": 0, "labels": 0, "crowd": 0} and data.sample(2)[1] == {}
    write_boxes(root, {"frames": [frame("elsewhere.jpg", label("car", 0, 0, 3, 3)),
                                  frame("b.jpg", label("car", 1, 1, 2, 2))]})
    data = BDD100K(root, "val")
    assert data.labelled["detection"].tolist() == [False, True, False]
    assert data.target(1)["boxes"].tolist() == [[1, 1, 3, 3]]
    photo, tag = Image.fromarray(np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)), Image.Exif()
    tag[0x0112] = 6                                                 # turn right to show
    photo.save(root / "images/10k/val/c.png", exif=tag)
    assert np.array_equal(data.image(2)[0], np.rot90(np.asarray(photo), -1))


@pytest.mark.parametrize("file, picture, message", [
    ("sem_seg", Image.new("RGB", (32, 24)), "PNG of mode RGB, not class ids.*colormaps"),
    ("sem_seg", Image.new("I;16", (32, 24), 1000), "holds id 1000: expected 0 to 18, or 255"),
    ("image", Image.new("I;16", (32, 24), 1000), "a.png has more than 8 bits a pixel"),
    ("sem_seg", Image.new("L", (32, 24), 19), "holds id 19: expected 0 to 18, or 255"),
    ("drivable", Image.new("L", (32, 24), 3), "holds id 3: expected 0 to 2"),
    ("drivable", Image.new("L", (32, 20)), "drivable mask of .*a.jpg is 32x20, the image 32x24"),
    ("drivable", Image.new("L", (10001, 5000)), "expected at most 50000000 pixels"),
    ("drivable", None, "a.png cannot be read as an image"),
    ("image", None, "a.jpg cannot be read as an image"),
])
def test_bad_pictures_are_refused(root, file, picture, message):
    path = root / ("images/100k/val/a.jpg" if file == "image" else f"labels/{file}/masks/val/a.png")
    if picture and file == "image":
        path.unlink()
        picture.save(path.with_suffix(".png"))
    elif picture:
        picture.save(path)
    else:
        path.write_bytes(path.read_bytes()[:50])                    # cut off
    with pytest.raises(InputError, match=message):
        BDD100K(root, "val").sample(0)


def test_a_folder_may_have_classes_of_its_own_and_cocos_boxes(root):
    (root / "classes.json").write_text('{"detection": ["cone", "person"], "semantic": ["a", "b"]}')
    Image.new("L", (32, 24), 1).save(root / "labels/sem_seg/masks/val/a.png")
    instances = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "x/a.jpg"}],
        "categories": [{"id": 9, "name": "cone"}, {"id": 2, "name": "person"}],
        "annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]},
                        {"image_id": 3, "category_id": 9, "bbox": [5, 5, 6, 7], "iscrowd": 1}]}
    write_boxes(root, instances)
    data = BDD100K(root, "val")
    a, b = data.target(0), data.target(1)
    assert a["boxes"].tolist() == [[5, 5, 11, 12]] and a["crowd"].tolist() == [True]
    assert b["boxes"].tolist() == [[1, 2, 4, 6]] and b["labels"].tolist() == [1]
    assert "drivable" not in a and a["semantic"].unique().tolist() == [1]
    write_boxes(root, [frame("a.jpg", label("person", 1, 1, 2, 2), label("cone", 1, 1, 2, 2))])
    assert BDD100K(root, "val").target(0)["labels"].tolist() == [1, 0]
    write_boxes(root, instances | {"categories": [{"id": 9, "name": "y"}, {"id": 2, "name": "x"}]})
    with pytest.raises(InputError, match="entry 0 has category 'x': expected one of cone, person"):
        BDD100K(root, "val")
    for text, message in [
            ("[]", "expected a list of class names for each task"),
            ('{"my task": ["a"]}', "has a task 'my task', which is reserved or has other char"),
            ('{"boxes": ["a"]}', "rename it"), ('{"train": ["a"]}', "rename it"),
            ('{"semantic": ["a", "a"]}', "1 to 254 different names"), ("{", "not valid JSON"),
            ('{"detection": [1]}', "has detection"), ('{"drivable": []}', "has drivable")]:
        (root / "classes.json").write_text(text)
        with pytest.raises(InputError, match=message):
            BDD100K(root, "val")


def test_a_folder_is_checked(root, capsys):
    make_data(root, "train", "x", "y")
    assert evaluate.check_data(root)
    printed = capsys.readouterr().out
    for line in ("a run can use all of this", "detection: 2 labelled images", "car: 2 boxes"):
        assert line in printed and "BAD" not in printed
    write_boxes(root, [frame("gone.jpg")])
    Image.new("L", (32, 24), 9).save(root / "labels/drivable/masks/val/a.png")
    for stem in ("a", "nowhere"):                                   # a second bad mask of a
        Image.new("L", (3, 3)).save(root / f"labels/sem_seg/masks/val/{stem}.png")
    (root / "images/10k/val/c.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="evaluate.py: bad files were found, see above."):
        evaluate.main(["--check", str(root), "--workers", "0"])
    printed = capsys.readouterr().out
    assert printed.count("c.png cannot be read") == 1
    for line in ("a.jpg is 3x3, the image", "holds id 9", "c.png cannot be read as an image",
                 "1 of 1 detection labels for val have no image of the same name, such as gone"):
        assert re.search(f"BAD  .*{re.escape(line)}", printed), (line, printed)
    note = "1 of 2 semantic labels for val have no image of the same name, such as nowhere"
    assert re.search(f"NOTE: .*{note}", printed)
    write_boxes(root, [frame("a.jpg", label("lamp", 1, 2, 3, 4))], "train")
    assert not evaluate.check_data(root)
    assert re.search("BAD  .*det_train.json: frame a.jpg, label 0 has category 'lamp'",
                     capsys.readouterr().out)
    for folder, dataset, message in ((root / "labels", "bdd100k", "no images in"),
                                     (root / "nowhere", "bdd100k", "no data folder"),
                                     (root, "nuimages", "expected nuImages' tables there")):
        assert not evaluate.check_data(folder, dataset)
        assert re.search(f"BAD  .*{message}", capsys.readouterr().out)


def test_what_is_written_is_read_back(root, tmp_path):
    boxes = {"boxes": torch.tensor([[1.25, 2, 7, 9.5], [0, 0, 32, 24]]),
             "scores": torch.tensor([0.9, 0.1]), "labels": torch.tensor([2, 8])}
    masks = {task: torch.full((24, 32), 1, dtype=torch.uint8) for task in ("semantic", "drivable")}
    writer = LabelWriter(tmp_path / "out", "val")
    writer.add("b.jpg", {key: value[:0] for key, value in boxes.items()})
    writer.add("a.jpg", boxes | masks)
    writer.close()
    target = BDD100K(root, "val", labels=tmp_path / "out").target(0)
    assert all(torch.equal(target[key], (boxes | masks)[key]) for key in target if key != "crowd")
    frames = json.loads((tmp_path / "out/labels/det_20/det_val.json").read_text())
    assert frames[0]["labels"][1]["box2d"] == {"x1": 0, "y1": 0, "x2": 31, "y2": 23}    # inclusive
    assert frames[1]["labels"] == []


# --------------------------------------------------------------------------------------- nuImages

SHAPE = 36, 64
KINDS_OF = ["animal", "vehicle.bus.bendy", "human.pedestrian.adult", "flat.driveable_surface",
            "vehicle.ego"]


def rle_of(x1, y1, x2, y2):
    """A rectangle's run-length code, as nuImages has it."""
    inside = np.zeros(SHAPE, np.uint8, order="F")
    inside[y1:y2, x1:x2] = 1
    code = pytest.importorskip("pycocotools.mask").encode(inside)
    return {"size": code["size"], "counts": base64.b64encode(code["counts"]).decode()}


def write_nuimages(root, split="val", **changes):
    """Official tables: keyframes a and b, a sweep; changes: other tables."""
    def frame(token, key=True):
        name = f"{'samples' if key else 'sweeps'}/CAM_FRONT/n003__CAM_FRONT__{token}.jpg"
        return {"token": token, "sample_token": "s", "is_key_frame": key, "height": SHAPE[0],
                "width": SHAPE[1], "filename": name, "prev": "", "next": ""}

    def thing(token, kind, rectangle, bbox=None, frame="a"):
        return {"token": token, "category_token": f"c{kind}", "sample_data_token": frame,
                "bbox": bbox, "mask": rectangle and rle_of(*rectangle)}

    tables = {
        "category": [{"token": f"c{i}", "name": name, "description": ""}
                     for i, name in enumerate(KINDS_OF)],
        "sample_data": [frame("b"), frame("sweep", False), frame("a")],
        "object_ann": [thing("2", 2, (10, 10, 30, 30), [10, 10, 30, 31]),
                       thing("1", 1, (5, 5, 20, 20), [5, 5, 20, 20]),
                       thing("3", 0, (0, 0, 4, 4), [0, 0, 4, 4]),
                       thing("4", 1, None, [40, 0, 50, 9]),
                       thing("5", 1, (1, 1, 9, 9), [1, 1, 9, 9], "sweep")],
        "surface_ann": [thing("9", 3, (0, 8, 64, 36)), thing("8", 4, (0, 30, 64, 36)),
                        thing("7", 3, None)],
    } | changes
    for name, entries in tables.items():
        evaluate.write_json(root / f"v1.0-{split}" / f"{name}.json", entries)
    (root / "samples/CAM_FRONT").mkdir(parents=True, exist_ok=True)
    for token in "ab":
        path = root / "samples/CAM_FRONT" / f"n003__CAM_FRONT__{token}.jpg"
        Image.new("RGB", SHAPE[::-1], (90, 120, 60)).save(path)


def test_nuimages_tables(tmp_path):
    write_nuimages(tmp_path / "data")
    image = tmp_path / "data/samples/CAM_FRONT/n003__CAM_FRONT__a.jpg"
    image.rename(tmp_path / "object")                               # as git-annex and DVC do
    image.symlink_to(tmp_path / "object")
    data, names, kinds = NuImages(tmp_path / "data"), *NuImages.classes.values()
    assert len(set(kinds)) == 25 and len(names) == 10
    assert data.stems.tolist() == ["n003__CAM_FRONT__a", "n003__CAM_FRONT__b"]
    image, target = data.sample(0)
    assert image.shape == (3, *SHAPE) and not target["crowd"].any()
    boxes = {names[k]: box for k, box in zip(target["labels"], target["boxes"].tolist())}
    # no animal, none without a mask, none of a sweep; objects over surfaces by their tokens
    assert boxes == {"bus": [5, 5, 20, 20], "pedestrian": [10, 10, 30, 31]}
    painted = {(1, 1): "animal", (60, 1): None, (60, 20): "driveable surface",
               (60, 33): "ego vehicle", (6, 6): "bendy bus", (12, 12): "adult",
               (25, 32): "ego vehicle"}
    for (x, y), kind in painted.items():
        assert target["semantic"][y, x] == (kinds.index(kind) if kind else 255), (x, y)
    empty = data.target(1)
    assert len(empty["boxes"]) == 0 and (empty["semantic"] == 255).all()


def annotation(shape, counts, bbox=None):
    return [{"sample_data_token": "a", "category_token": "c1", "token": "1", "bbox": bbox,
             "mask": {"size": shape, "counts": counts}}]


@pytest.mark.parametrize("changes, message", [
    ({"category": [{"token": f"c{i}", "name": "lamp"} for i in range(5)]}, "has category 'lamp'"),
    ({"category": [{"token": f"c{i}", "name": "animal"} for i in range(4)]}, "has category 'c4'"),
    ({"sample_data": [{"token": "a"}]}, "entry 0 has filename None"),
    ({"sample_data": {}}, "entry 0 has token None"),
    ({"sample_data": [{"token": "a", "filename": "../../secret.jpg", "is_key_frame": True,
                       "height": 36, "width": 64}]}, "outside the data"),
    ({"object_ann": annotation([36, 64], "eA==", bbox=[1, 2, 3])}, "bbox [1, 2, 3]"),
    ({"surface_ann": annotation([900, 1600], "eA==")}, "expected the image's"),
    ({"surface_ann": annotation([36, 64], "###")}, "CAM_FRONT__a.jpg cannot be read"),
    ({"surface_ann": annotation([36, 64], "eA==")}, "CAM_FRONT__a.jpg cannot be read"),
])
def test_bad_nuimages_files_are_refused(tmp_path, changes, message):
    write_nuimages(tmp_path, **changes)
    with pytest.raises(InputError, match=re.escape(message)):
        NuImages(tmp_path).sample(0)


# ------------------------------------------------------------------------------ models' scores

class Oracle(torch.nn.Module):
    """Predicts image by image: the labels themselves."""
    classes = CLASSES

    def __init__(self, data=None):
        super().__init__()
        self.data, self.done, self.weight = data, 0, torch.nn.Parameter(torch.zeros(1))

    def predict(self, images, confidence=0.):
        return [self.guess(image) for image in images]

    def guess(self, image):
        blank = torch.zeros(image.shape[1:], dtype=torch.uint8)
        result = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long),
                  "semantic": blank, "drivable": blank} | self.data.target(self.done)
        self.done += 1
        return result | {"scores": torch.ones(len(result["boxes"]))}


class Guesser(Oracle):
    """Predicts boxes and maps that depend on the image alone."""
    def guess(self, image):
        h, w = image.shape[1:]
        seeded = torch.Generator().manual_seed(int(image.sum()))
        corner = torch.rand(150, 2, generator=seeded) * torch.tensor([w - 4., h - 4.])
        scores = (torch.rand(150, generator=seeded) * 20).round() / 20          # many ties
        far = corner + torch.rand(150, 1, generator=seeded) * 60 + 5
        return {"boxes": torch.cat([corner, far], 1), "scores": scores.sort(descending=True).values,
                "labels": torch.randint(1, 4, (150,), generator=seeded),
                "semantic": (image[0] // 20).to(torch.uint8),
                "drivable": (torch.arange(h) < h // 2).to(torch.uint8)[:, None].repeat(1, w)}


def test_the_labels_themselves_score_a_hundred(root):
    mask = root / evaluate.mask_folder("drivable") / "val/a.png"
    Image.fromarray(np.uint8([[0], [1], [2]]).repeat(8, 0).repeat(32, 1)).save(mask)
    data, kept = BDD100K(root, "val"), []
    scores = evaluate.evaluate(Oracle(data), data, batch=2,
                               on_result=lambda i, *rest: kept.append(i))
    assert scores["detection"]["AP"] == pytest.approx(100)
    assert scores["detection"]["per_class"]["bus"] is None          # ignored
    assert scores["semantic"]["mIoU"] == scores["drivable"]["mIoU"] == 100
    assert scores["images"] == 2 and kept == [0, 1]                 # `c` has no labels
    assert "100.0" in evaluate.table(scores) and json.loads(json.dumps(scores)) == scores
    mask.write_bytes(b"nothing")                                    # no score over fewer images
    with pytest.raises(InputError, match="a.png cannot be read as an image"):
        evaluate.evaluate(Guesser(), data)


@pytest.fixture(scope="module")
def roads(tmp_path_factory):
    """Eight validation images of the sample."""
    root = tmp_path_factory.mktemp("roads") / "data"
    shutil.copytree(evaluate.SAMPLE, root, ignore=lambda _, names: ["train", *sorted(names)[8:]])
    return BDD100K(root, "val")


# ------------------------------------------------------------------------- files against files

BOX = {"image_id": 1, "category_id": 0, "bbox": [1, 1, 5, 5], "score": 0.5}
CAR = label("car", 0, 0, 9, 9)


def score(tmp_path, gt, dt, *options):
    """Runs evaluate.py on two files, given as content or path; returns its output and JSON."""
    paths = {"gt": gt, "dt": dt, "json": tmp_path / "scores.json"}
    for name, content in paths.items():
        if not isinstance(content, Path):
            paths[name] = tmp_path / f"{name}.json"
            paths[name].write_text(content if isinstance(content, str) else json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.main([*(f"--{name}={path}" for name, path in paths.items()), *options])
    return printed.getvalue(), json.loads(paths["json"].read_text())


def test_coco_files_are_scored_and_printed_as_pycocotools_does(tmp_path):
    for seed in (1, 4, 9):
        instances, results = random_problem(seed)
        judge, expected = pycocotools_ap(instances, results)
        printed, scores = score(tmp_path, instances, results)
        assert printed == expected and scores["coco"] == list(judge.stats)
    more = [results[0] | {"image_id": 99}, results[0] | {"category_id": 99}]
    printed, again = score(tmp_path, instances, results + more)
    assert again["coco"] == scores["coco"] and printed.count("NOTE: 1 detections of unknown") == 2
    assert score(tmp_path, instances, [])[1]["coco"][0] == 0        # pycocotools crashes
    large, other = 2 ** 53, 2 ** 53 + 1                             # ids equal as floats
    gt = {"images": [{"id": large}, {"id": other}], "categories": [{"id": 0, "name": "car"}],
          "annotations": [BOX | {"image_id": large, "area": 25}]}
    assert score(tmp_path, gt, [BOX | {"image_id": other}])[1]["coco"][0] == 0


def test_scalabel_files_follow_the_official_toolkit(tmp_path):
    car, van = label("car", 10, 10, 29, 29), label("van", 50, 50, 79, 79)
    truth = [frame("b.jpg", car, label("other vehicle", 50, 50, 79, 79)), frame("a.jpg")]
    guess = {"frames": [frame("b.jpg", car | {"score": 0.9}, van | {"score": 0.95},  # a crowd's
                              label("zebra", 0, 0, 5, 5) | {"score": 0.5}),
                        frame("c.jpg", car | {"score": 0.5})]}
    printed, scores = score(tmp_path, truth, guess)
    assert scores["detection"]["AP"] == pytest.approx(100) and scores["images"] == 2
    assert list(scores["dropped"].values()) == [1, 1] and printed.count("NOTE: 1 ") == 2


def test_masks_are_matched_by_stem_and_missing_ones_are_missed(tmp_path):
    for folder, names in (("truth", "ab"), ("guess", "ac")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(np.uint8([[0, 0, 1, 255]])).save(tmp_path / folder / f"{name}.png")
    printed, scores = score(tmp_path, tmp_path / "truth", tmp_path / "guess", "--task", "semantic")
    ious = scores["semantic"]["per_class"]
    assert ious["road"] == ious["sidewalk"] == 50
    assert list(scores["dropped"].values()) == [1, 1]
    assert "BDD100K: mean over" in printed and "all missed" in printed
    Image.new("L", (5, 1)).save(tmp_path / "guess/a.png")
    for options, message in (([], "PNG masks add --task semantic, drivable or another"),
                             (["--task", "drivable"], r"mask of a .*(1, 5).* in .*, but .*(1, 4)")):
        with pytest.raises(SystemExit, match=message):
            score(tmp_path, tmp_path / "truth", tmp_path / "guess", *options)


def test_what_is_saved_scores_as_the_model_did(tmp_path, roads):
    saved = tmp_path / "saved"
    scores = evaluate.evaluate(Guesser(), roads, save=saved)
    assert scores["detection"]["AP50"] > 0 and scores["semantic"]["mIoU"] > 0.5
    file = "labels/det_20/det_val.json"
    boxes = score(tmp_path, roads.root / file, saved / file)[1]
    assert boxes["images"] == 150                                   # of which 8 have predictions
    for task in ("semantic", "drivable"):
        folder = f"{evaluate.mask_folder(task)}/val"
        again = score(tmp_path, roads.root / folder, saved / folder, "--task", task)[1]
        assert again[task] == scores[task]
    again = score(tmp_path, saved / "coco/gt_val.json", saved / "coco/dt_val.json")[1]
    assert again["detection"] == scores["detection"]
    gt = [f for f in json.loads((roads.root / file).read_text()) if f["name"][:-4] in roads.stems]
    assert score(tmp_path, gt, saved / file)[1]["detection"] == scores["detection"]


@pytest.mark.parametrize("gt, dt, message", [
    ({}, [BOX | {"bbox": [1, 1, float("nan"), 5]}], "dt.json: entry 0 has bbox [1, 1, nan, 5]: "),
    ({}, [BOX, BOX | {"bbox": [1, 1, float("inf"), 5]}], "dt.json: entry 1 has bbox"),
    ({}, [BOX | {"bbox": [1, 1, -5, 5]}], "-5, 5]: expected 4 finite numbers, no negative size"),
    ({}, [BOX | {"bbox": [1, 1, 10 ** 400, 5]}], "entry 0 has bbox"),
    ({}, [BOX, BOX | {"score": 1.5}], "dt.json: entry 1 has score 1.5: expected a score from 0"),
    ({}, [BOX | {"image_id": 1.5}], "dt.json: entry 0 has image_id 1.5: expected a whole number"),
    ({}, [BOX | {"image_id": 2}], "none of the 1 detections in "),
    ({}, {"frames": []}, "dt.json holds no list of results: expected COCO's, [{"),
    ([frame("a.jpg")], [BOX], "dt.json: entry 0 has name None: expected IMAGE.jpg, as in Scalabel"),
    ({}, "", "dt.json is not valid JSON"),
    ({"images": 5}, [BOX], "gt.json holds no list of images"),
    ({"images": [{"id": 1}, {"id": 1}]}, [BOX], "gt.json: id 1 occurs more than once"),
    ({"categories": [{"id": k, "name": "car"} for k in (0, 1)]}, [], "name car occurs more"),
    ({"annotations": [BOX | {"area": -1}]}, [BOX], "entry 0 has area -1: expected a finite"),
    ({"annotations": [BOX | {"area": 1, "image_id": 7}]}, [], "gt.json: entry 0 has image_id 7: "),
    (5, [], "holds no list of frames"),
    ([{"labels": []}], [], "entry 0 has name None: expected"),
    ([frame("a.jpg", label("zebra", 0, 0, 1, 1))], [],
     "frame a.jpg, label 0 has category 'zebra': expected one of pedestrian"),
    ([frame("a.jpg", label("car", 0, 0, float("nan"), 1))], [], "expected finite x1 <= x2"),
    ([frame("a.jpg", CAR, {"category": "lane", "poly2d": []}, label("car", 3, 0, 1, 1))], [],
     "frame a.jpg, label 2 has box2d"),
    ([frame("a.jpg") | {"labels": {}}], [], "entry 0 has labels {}: expected a list"),
    ([frame("a.jpg", label("car", 0, 0, 9, 9, crowd="false"))], [], "label 0 has crowd 'false'"),
    ([frame("a.jpg")], [frame("a.jpg", CAR)], "dt.json: frame a.jpg, label 0 has score None"),
    ([frame("a.jpg")], [frame("a.jpg", CAR | {"score": 2})], "label 0 has score 2"),
    ([frame("a.jpg")], [frame("a.jpg"), frame("a.jpg")], "image a occurs more than once"),
])
def test_bad_files_are_refused_by_entry(tmp_path, gt, dt, message):
    if isinstance(gt, dict):
        gt = {"images": [{"id": 1}], "categories": [{"id": 0, "name": "car"}],
              "annotations": []} | gt
    with pytest.raises(SystemExit, match=re.escape(message)):
        score(tmp_path, gt, dt)


# ------------------------------------------------------------------- many processes and pictures

def one_of_many(rank, world, data, out):
    dist.init_process_group("gloo", f"file://{out}/meet", rank=rank, world_size=world)
    scores = evaluate.evaluate(Guesser(), BDD100K(data, "val"), save=out)
    (out / f"{rank}.json").write_text(json.dumps(scores))
    dist.destroy_process_group()


def test_processes_share_the_images_and_get_the_same_scores(tmp_path, roads):
    many, one = tmp_path / "many", tmp_path / "one"
    many.mkdir()
    torch.multiprocessing.spawn(one_of_many, (3, roads.root, many), 3)
    scores = evaluate.evaluate(Guesser(), roads, save=one)
    assert [json.loads((many / f"{rank}.json").read_text()) for rank in range(3)] == [scores] * 3
    for file in ("labels/det_20/det_val.json", "coco/gt_val.json", "coco/dt_val.json"):
        assert (many / file).read_text() == (one / file).read_text()


def test_any_images_are_drawn_and_never_overwritten(tmp_path):
    inside, out = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    for name in ("a.png", "a.jpg", "b[1].png"):
        Image.new("RGB", (40, 30), "grey").save(inside / name)
    for path, count in ((inside / "*.png", 2), (inside / "b[1].png", 1), (inside, 3)):
        images = evaluate.ImageFiles(str(path))
        assert evaluate.draw_images(Guesser(), images, out, None, batch=2) == count
    assert {"001_a.png", "002_a.png", "003_b[1].png"} < {file.name for file in out.iterdir()}
    for name in ("0.png", "001_0.png"):
        shutil.copy(inside / "a.png", out / name)
    with pytest.raises(InputError, match="holds the images themselves"):
        evaluate.draw_images(Guesser(), evaluate.ImageFiles(str(out)), out, None, batch=2)


def test_the_worst_pictures_come_first(tmp_path, roads):
    class Mostly(Oracle):
        """Right but for images 3 and 5, and 5 is worse."""
        def guess(self, image):
            i, result = self.done, super().guess(image)
            wrong = {3: ["drivable"], 5: ["drivable", "semantic"]}.get(i, [])
            return result | {task: torch.full_like(result[task], 2) for task in wrong}

    pictures = evaluate.Pictures(tmp_path, 2, roads)
    evaluate.evaluate(Mostly(roads), roads, on_result=pictures)
    pictures.close()
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == [f"001_{roads.stems[5]}.png", f"002_{roads.stems[3]}.png"]


def test_pictures_show_boxes_where_they_are():
    image = torch.full((3, 90, 160), 100, dtype=torch.uint8)
    result = {"boxes": torch.tensor([[40., 30, 80, 60]]), "labels": torch.tensor([2]),
              "scores": torch.tensor([0.8]),
              "semantic": torch.full((90, 160), 255, dtype=torch.uint8),
              "drivable": torch.zeros(90, 160, dtype=torch.uint8)}
    sheet = evaluate.draw(image, result, result, "a title", width=300)
    assert sheet.width == 3 * 300 + 8 and sheet.height > 2 * 169
    panel = np.asarray(sheet)[10:]                                  # below the title
    car = 0x56, 0xb4, 0xe9
    assert (panel[84, 74:77] == car).all(1).any()                   # the left edge
    assert (panel[84, 110] == 100).all()                            # inside
    assert (panel[84, 304 + 100] == 100).all()                      # ignored: nothing painted
    assert panel[84, 608 + 100, 2] > 140                            # direct: blue
    assert (np.asarray(sheet)[2 * 179:, :300] == car).all(2).any()              # the legend
