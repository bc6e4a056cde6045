"""Broken and hostile files: each gives a sample, a score or one sentence, soon, in little memory.

    python tests/test_fuzz.py 1800 [SEED]              # as long as you like: seconds, seed
"""
import base64
import json
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import hmpl  # noqa: E402
import prompts  # noqa: E402
import train  # noqa: E402

CLEAN = (evaluate.InputError, hmpl.WeightsError, prompts.TextError, OSError)
SECONDS, MEGABYTES = 20, 1024                      # for each case; memory beyond that of the start
NUMBERS = [b"1e999", b"-1", b"1e30", b"NaN", b"9" * 5000, b"0", b"null", b"true", b'"x"', b"[]",
           b"{}", b"[" * 10000, b"4294967296", b'"' + b"A" * 100 + b'"', b"1e-320", b"2147483648"]


def make_files(root):
    """A folder with one of every kind of file that is read; returns what reads each of them."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, ending in (("images/100k", "jpg"), ("labels/sem_seg/masks", "png"),
                             ("labels/drivable/masks", "png")):
            (root / kind / split).mkdir(parents=True)
            data = rng.integers(0, 3, (24, 32, 3) if ending == "jpg" else (24, 32), dtype=np.uint8)
            Image.fromarray(data).save(root / kind / split / f"{split}.{ending}")
    shutil.copytree(root / "labels/drivable/masks/val", root / "drivable")
    boxes = [{"name": "val.jpg", "labels": [
        {"category": "car", "score": 0.5, "attributes": {"crowd": False}, "id": "1",
         "box2d": {"x1": 1.5, "y1": 2, "x2": 9, "y2": 12}}]}]
    (root / "labels/det_20").mkdir()
    (root / "labels/det_20/det_val.json").write_text(json.dumps(boxes))
    (root / "coco_gt.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "val.jpg"}], "categories": [{"id": 3, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 8, 9], "area": 72,
                         "iscrowd": 0}]}))
    (root / "coco_dt.json").write_text(json.dumps(
        [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 8, 9.5], "score": 0.5}]))
    rle = {"size": [24, 32], "counts": "0Ph0"}                                   # all 768 pixels
    frames = [{"name": "val.jpg", "labels": [{"category": "road", "rle": rle}]}]
    (root / "rle.json").write_text(json.dumps(frames))
    tables = {"category": [{"token": "c", "name": "vehicle.car", "description": ""}],
              "sample_data": [{"token": "f", "is_key_frame": True, "filename": "samples/val.jpg",
                               "height": 24, "width": 32}],
              "object_ann": [{
                  "token": "o", "sample_data_token": "f", "category_token": "c",
                  "bbox": [1, 2, 9, 12],
                  "mask": {"size": [24, 32], "counts": base64.b64encode(b"0Ph0").decode()}}],
              "surface_ann": []}
    (root / "v1.0-val").mkdir()
    (root / "samples").mkdir()
    Image.new("RGB", (32, 24)).save(root / "samples/val.jpg")
    for name, rows in tables.items():
        (root / f"v1.0-val/{name}.json").write_text(json.dumps(rows))
    small = dict(depth=18, width=32, feedforward=32, maskformer={"queries": 4, "layers": 1})
    model = hmpl.HMPL({"drivable": evaluate.CLASSES["drivable"]}, **small)
    train.save(root / "x.pt", {
        "stage": "adapt", "step": 1, "steps": 1, "notes": [], "scores": None,
        "config": {"data": str(root), "amp": "no"},
        "model_config": {"classes": dict(model.classes), **small}, "model": model.state_dict()})
    torch.save(model.body.state_dict(), root / "body.pth")
    torch.save(prompts.TextTower(width=64, layers=1, embed_dim=8).state_dict(), root / "tower.pt")

    def read_all(data):
        for i in range(len(data)):
            data.sample(i)

    def val():
        read_all(evaluate.BDD100K(root, "val"))

    def nuimages():
        read_all(evaluate.NuImages(root, "val"))

    def score(gt, dt, task=None):
        return lambda: evaluate.score_files(root / gt, root / dt, task)
    return {
        "labels/det_20/det_val.json": val, "labels/sem_seg/masks/val/val.png": val,
        "images/100k/val/val.jpg": val,
        "labels/drivable/masks/val/val.png": score("drivable", "labels/drivable/masks/val"),
        "coco_gt.json": score("coco_gt.json", "coco_dt.json"),
        "coco_dt.json": score("coco_gt.json", "coco_dt.json"),
        "rle.json": score("rle.json", "labels/sem_seg/masks/val", "semantic"),
        **{f"v1.0-val/{name}.json": nuimages for name in tables},
        "x.pt": lambda: evaluate.build_model(evaluate.load_checkpoint(root / "x.pt")),
        "body.pth": lambda: hmpl.load_body(hmpl.ResNetBody(18), root / "body.pth"),
        "tower.pt": lambda: prompts.load_text_tower(root / "tower.pt"),
    }


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random changes: bytes flipped, parts cut out, doubled or moved, JSON values changed."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice([1, 4, 64, 10 ** 6]))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[min(a, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[a:b]
        elif kind == 2:
            data[a:a] = data[a:b]
        elif kind == 3:
            del data[a:]
        elif kind == 4:
            data[a:b] = bytes(rng.randrange(256) for _ in range(min(b - a, 64)))
        else:                                                       # a number or string of JSON
            starts = [i for i in range(max(0, a - 200), min(len(data), a + 200))
                      if data[i:i + 1] in b'":,[']
            i = rng.choice(starts) + 1 if starts else a
            end = next((j for j in range(i, min(i + 200, len(data))) if data[j:j + 1] in b",]}"), i)
            data[i:end] = rng.choice(NUMBERS)
    return bytes(data)


def fuzz(root: Path, seconds: float, seed: int) -> dict:
    """Mutates one file after the other until the time is over; returns counts, the worst time and
    memory."""
    readers, rng, end = make_files(root), random.Random(seed), time.monotonic() + seconds
    whole = {name: (root / name).read_bytes() for name in readers}
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = {"cases": 0, "errors": 0, "seconds": 0., "megabytes": 0}
    for name, read in readers.items():
        assert not read_clean(read, name), name                                  # unharmed
    while time.monotonic() < end:
        name = rng.choice(list(readers))
        data = mutate(whole[name], rng)
        (root / name).write_bytes(data)
        signal.alarm(SECONDS)
        began = time.monotonic()
        try:
            seen["errors"] += read_clean(readers[name], name)
        except BaseException:
            (root.parent / "worst").write_bytes(data)
            print(f"seed {seed}, case {seen['cases']}: {name}, kept as {root.parent / 'worst'}")
            raise
        signal.alarm(0)
        (root / name).write_bytes(whole[name])
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10
        seen = {"cases": seen["cases"] + 1, "errors": seen["errors"], "megabytes": memory,
                "seconds": max(seen["seconds"], time.monotonic() - began)}
        assert memory < MEGABYTES, (name, memory)
    return seen


def read_clean(read, name: str) -> bool:
    """Reads; True if it was refused in one clean sentence."""
    try:
        read()
    except CLEAN as error:
        assert str(error).strip(), name
        return True
    return False


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused(tmp_path):
    seen = fuzz(tmp_path / "files", seconds=30, seed=0)
    assert seen["cases"] > 100 and 0 < seen["errors"] < seen["cases"], seen


def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path):
    Image.new("L", (10001, 5000)).save(tmp_path / "huge.png")
    with pytest.raises(evaluate.InputError, match="expected at most"):
        evaluate.read_mask(tmp_path / "huge.png")


if __name__ == "__main__":
    import tempfile
    import warnings
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(fuzz(Path(folder) / "files", float(sys.argv[1]), seed))
