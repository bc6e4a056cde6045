"""Files as people have them: the 2018 release, annotation tools' exports, odd pictures, names."""
import io
import json
import os
import re
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluate import BDD100K, CLASSES, InputError
from test_evaluate import BOX, Guesser, frame, label, make_data, score, write_boxes


@pytest.fixture
def root(tmp_path):
    make_data(tmp_path / "data")
    return tmp_path / "data"


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.mark.parametrize("name", ["bdd100k_labels_images_val", "det_20/det_val"])
def test_the_release_of_2018_is_read_as_it_is(tmp_path, name):
    """Boxes among polygons, masks by other names and in other places, drivable ids from 0 =
    background to 2 = alternative, segmentation images of their own."""
    grey, ids = Image.new("RGB", (4, 2), "grey"), np.uint8([[0, 1, 2, 255], [1, 1, 2, 0]])
    save(grey, tmp_path / "images/100k/val/a.jpg")
    save(grey, tmp_path / "seg/images/val/b.jpg")
    save(Image.fromarray(ids), tmp_path / "drivable_maps/labels/val/a_drivable_id.png")
    save(Image.fromarray(ids), tmp_path / "seg/labels/val/b_train_id.png")
    polygons = [{"category": category, "poly2d": [{"vertices": [[0, 0], [1, 1]]}]}
                for category in ("drivable area", "lane")]
    labels = [polygons[0], label("motor", 1, 0, 2, 1), polygons[1], label("person", 0, 0, 0, 0)]
    evaluate.write_json(tmp_path / f"labels/{name}.json", [frame("a.jpg", *labels)])
    data = BDD100K(tmp_path, "val")
    assert data.files.tolist() == ["images/100k/val/a.jpg", "seg/images/val/b.jpg"]
    assert [data.labelled[task].tolist() for task in CLASSES] == [[True, False], [False, True],
                                                                  [True, False]]
    a, b = data.target(0), data.target(1)
    assert a["labels"].tolist() == [6, 0] and a["boxes"].tolist() == [[1, 0, 3, 2], [0, 0, 1, 1]]
    assert a["drivable"].tolist() == [[2, 0, 1, 255], [0, 0, 1, 2]]
    assert np.array_equal(b["semantic"], ids)
    labels[0]["box2d"] = label("", 0, 0, 1, 1)["box2d"]
    evaluate.write_json(tmp_path / f"labels/{name}.json", [frame("a.jpg", *labels)])
    with pytest.raises(InputError, match="label 0 has category 'drivable area': expected one of"):
        BDD100K(tmp_path, "val")


def png_of_bits(ids, bits):
    """A grey PNG of 1, 2, 4, 8 or 16 bits, as Pillow itself cannot write the small ones."""
    rows = b""
    for row in ids:
        packed = np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:])
        rows += b"\0" + (row.astype(">u2") if bits == 16 else packed).tobytes()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks)


def test_masks_of_any_bits_and_palettes_hold_the_ids_that_are_stored(tmp_path):
    for bits in (1, 2, 4, 8, 16):
        ids = np.arange(64, dtype=np.uint8).reshape(8, 8) % min(2 ** bits, 19)
        (tmp_path / "x.png").write_bytes(png_of_bits(ids, bits))
        assert np.array_equal(evaluate.read_mask(tmp_path / "x.png", 19), ids), bits
    Image.fromarray(ids).save(tmp_path / "x.png", "JPEG")              # which changes ids
    with pytest.raises(InputError, match="x.png is a JPEG of mode L, not class ids"):
        evaluate.read_mask(tmp_path / "x.png", 19)
    palette = Image.fromarray(ids, "P")
    palette.putpalette(range(0, 240))
    for options in ({}, {"bits": 8}):
        palette.save(tmp_path / "p.png", **options)
        assert np.array_equal(evaluate.read_mask(tmp_path / "p.png", 19), ids)


def test_names_of_files_as_other_systems_write_them(root):
    """Suffixes in capitals, hidden files, Windows' folders, WebP; a stem twice is refused."""
    for task in ("sem_seg", "drivable"):
        mask = root / f"labels/{task}/masks/val/a.png"
        mask.rename(mask.with_suffix(".PNG"))
        shutil.copy(mask.with_suffix(".PNG"), mask.with_name("._a.png"))
    (root / "images/100k/val/._a.jpg").write_bytes(b"AppleDouble")
    Image.new("RGB", (32, 24)).save(root / "images/100k/val/w.WEBP")
    write_boxes(root, [frame(name, label("car", 0, 0, 3, 3)) for name in
                       ("C:\\data\\a.jpg", "val\\b.jpg", "x/w.webp")])
    data = BDD100K(root, "val")
    assert data.stems.tolist() == ["a", "b", "c", "w"]
    assert data.labelled["detection"].tolist() == [True, True, False, True]
    assert data.sample(3)[0].shape == (3, 24, 32) and data.target(0)["semantic"].max() == 13
    folder = root / "labels/drivable/masks/val"
    assert evaluate.score_files(folder, folder, "drivable")["images"] == 1
    assert len(evaluate.ImageFiles(str(root / "images/100k/val")).files) == 3
    Image.new("RGB", (32, 24)).save(root / "images/100k/val/a.png")
    with pytest.raises(InputError, match="100k/val/a.jpg and a.png have the same stem"):
        BDD100K(root, "val")


def test_coco_files_as_tools_export_them(tmp_path):
    """A byte order mark, flags as booleans, no areas, ids that are texts."""
    gt = {"images": [{"id": "0001"}], "categories": [{"id": 0, "name": "car"}], "annotations": [
        {"image_id": "0001", "category_id": 0, "bbox": [0, 0, 10, 10], "iscrowd": False},
        {"image_id": "0001", "category_id": 0, "bbox": [20, 20, 9, 9], "iscrowd": True}]}
    dt = [{"image_id": "0001", "category_id": 0, "bbox": [0, 0, 10, 10], "score": 0.9},
          {"image_id": "0001", "category_id": 0, "bbox": [21, 21, 5, 5], "score": 0.8}]
    for name, content in (("gt", gt), ("dt", dt)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8-sig")
    scores = evaluate.score_files(tmp_path / "gt.json", tmp_path / "dt.json")
    assert scores["detection"]["AP"] == scores["detection"]["APs"] == pytest.approx(100)
    assert scores["dropped"]["annotations without area: width times height is taken"] == 2
    for images, annotations, predicted, message in [
            ([{"id": "1"}, {"id": 2}], [], [], "has id 2: expected"),
            ([{"id": "1"}], [], [BOX], "none of the 1 detections"),
            ([{"id": 1}], [], {"annotations": [BOX]}, "save that list alone")]:
        wrong = gt | {"images": images, "annotations": annotations}
        with pytest.raises(SystemExit, match=re.escape(message)):
            score(tmp_path, wrong, predicted)


def test_own_classes_are_not_renamed_and_must_differ(root):
    (root / "classes.json").write_text('{"detection": ["car", "truck"]}')
    for name in ("van", "caravan", "trailer"):
        write_boxes(root, [frame("a.jpg", label(name, 0, 0, 3, 3))])
        with pytest.raises(InputError, match=f"category '{name}': expected one of car, truck"):
            BDD100K(root, "val")
    for names in (["Car", "car"], ["traffic  light", "traffic light "]):
        (root / "classes.json").write_text(json.dumps({"detection": names}))
        with pytest.raises(InputError, match="1 to 254 different names"):
            BDD100K(root, "val")


def test_the_check_tells_what_masks_hold(root, capsys):
    """Two classes saved as 0 and 255; ids of the 2018 release under today's names."""
    make_data(root, "train", "t", "u")
    ids = np.zeros((24, 32), np.uint8)
    ids[:, :8] = 255
    Image.fromarray(ids).save(root / "labels/sem_seg/masks/val/a.png")
    Image.fromarray(ids // 255).save(root / "labels/drivable/masks/val/a.png")
    assert evaluate.check_data(root)
    printed = capsys.readouterr().out
    assert "semantic: 25.0% of the pixels are ignored (255); classes without an example: sidew" in (
        printed)
    assert "NOTE: val: 75% of drivable pixels are direct: if these are the 2018" in printed
    assert printed.count("the 2018 release") == 1


class FullDisk(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    images = evaluate.ImageFiles(str(tmp_path / "a.png"))
    monkeypatch.setattr("builtins.open", lambda path, mode="r", real=open, **options:
                        FullDisk() if str(path).endswith(".part") else real(path, mode, **options))
    with pytest.raises(OSError, match="cannot write .*out/001_a.png .*No space left"):
        evaluate.draw_images(Guesser(), images, tmp_path / "out", None, batch=1)
    with pytest.raises(OSError, match="cannot write .*a.png .*No space left"):
        evaluate.write_picture(tmp_path / "masks/a.png", Image.new("L", (3, 3)))


def test_pictures_of_a_folder_that_cannot_be_read_cost_themselves_alone(tmp_path, capsys):
    Image.new("RGB", (3, 400), "grey").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    images = evaluate.ImageFiles(str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/002_b.png").touch()                               # of an earlier call
    assert evaluate.draw_images(Guesser(), images, tmp_path / "out", None, batch=2) == 1
    assert "b.png is skipped" in capsys.readouterr().err
    for h, w in ((4000, 30), (2, 3000)):
        mask = torch.zeros(h, w, dtype=torch.uint8)
        sheet = evaluate.draw(mask.expand(3, h, w), {"drivable": mask})
        assert sheet.width == 640 and sheet.height < 1400


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_a_terminal_cannot_show(root, capsys, monkeypatch):
    make_data(root, "train")
    bad = os.fsencode(root / "images/100k/val") + b"/\xff.jpg"
    with open(bad, "wb") as file:
        file.write(b"no image")
    (root / "classes.json").write_text(json.dumps({"detection": ["car", "自行车"]}))
    for split in ("train", "val"):
        write_boxes(root, [frame("a.jpg", label("car", 0, 0, 3, 3))], split)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit, match="bad files were found"):
        evaluate.main(["--check", str(root), "--workers", "0"])
    terminal.flush()
    printed = terminal.buffer.getvalue().decode()
    assert "\\udcff.jpg cannot be read" in printed and "\\u81ea" in printed
