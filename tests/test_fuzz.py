"""Broken and hostile files: each gives a sample, a score or one sentence, soon, in little memory.

    FUZZ_SECONDS=1800 FUZZ_SEED=1 pytest tests/test_fuzz.py            # as long as you like
"""
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from PIL import Image

import evaluate
import hmpl
import prompts
import train
from test_evaluate import make_data, write_nuimages

CLEAN = (evaluate.InputError, hmpl.WeightsError, prompts.TextError, OSError)
SECONDS, MEGABYTES = 20, 1024                      # for each case; memory beyond that of the start
NUMBERS = [b"1e999", b"-1", b"1e30", b"NaN", b"9" * 5000, b"0", b"null", b"true", b'"x"', b"[]",
           b"{}", b"[" * 10000, b"4294967296", b'"' + b"A" * 100 + b'"', b"1e-320", b"2147483648"]


def make_files(root):
    """A folder with one of every kind of file that is read; returns what reads each of them."""
    make_data(root)
    tag = Image.Exif()
    tag[0x0112] = 3                                             # an orientation
    Image.new("RGB", (32, 24), "grey").save(root / "images/100k/val/a.jpg", exif=tag)
    write_nuimages(root)
    shutil.copytree(root / "images", root / "own/images")
    shutil.copytree(root / "labels/drivable/masks/val", root / "drivable")
    box = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 8, 9]}
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}],
            "categories": [{"id": 3, "name": "car"}],
            "annotations": [box | {"id": 1, "area": 72, "iscrowd": 0}]}
    for name, content in {
            "coco_gt": coco, "coco_dt": [box | {"score": 0.5}],
            "own/labels/det_20/det_val": coco, "own/classes": {"detection": ["car", "x"]}}.items():
        (root / f"{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.json").write_text(json.dumps(content))
    old, texts = root / "old", {"id": "0001", "file_name": "C:\\a.jpg"}         # the 2018 release
    for name, mode in (("images/100k/val/a.webp", "RGB"), ("seg/labels/val/a_train_id.png", "I;16"),
                       ("drivable_maps/labels/val/a_drivable_id.png", "P")):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (32, 24)).save(old / name)
    (old / "labels").mkdir()
    (old / "labels/bdd100k_labels_images_val.json").write_text("\ufeff" + json.dumps([
        {"name": "a.jpg", "labels": [{"category": "lane", "poly2d": []}, {
            "category": "motor", "box2d": {"x1": 1, "y1": 2, "x2": 8, "y2": 9}}]}]))
    box |= {"image_id": "0001"}
    for name, content in (("texts_gt", coco | {"images": [texts], "annotations": [box]}),
                          ("texts_dt", [box | {"score": 0.5}])):
        (root / f"{name}.json").write_text(json.dumps(content))
    small = dict(depth=18, width=32, feedforward=32, maskformer={"queries": 4, "layers": 1})
    model = hmpl.HMPL({"drivable": evaluate.CLASSES["drivable"]}, **small)
    train.write_checkpoint(root / "x.pt", {
        "stage": "adapt", "step": 1, "steps": 1, "notes": [], "scores": None,
        "config": {"data": str(root), "amp": "no"},
        "model_config": {"classes": dict(model.classes), **small}, "model": model.state_dict()})
    torch.save(model.backbone.state_dict(), root / "backbone.pth")
    torch.save(prompts.TextTower(width=64, layers=1, embed_dim=8).state_dict(), root / "tower.pt")

    def read_all(reader, root=root):
        data = reader(root)
        for i in range(len(data)):
            data.sample(i)

    def score(gt, dt, task="detection"):
        return lambda: evaluate.score_files(root / gt, root / dt, task)

    coco_files, text_files = (tuple(f"{name}_{x}.json" for x in ("gt", "dt"))
                              for name in ("coco", "texts"))
    own = partial(read_all, evaluate.BDD100K, root / "own")
    old_release = partial(read_all, evaluate.BDD100K, old)
    official, nuimages = partial(read_all, evaluate.BDD100K), partial(read_all, evaluate.NuImages)
    return {
        "labels/det_20/det_val.json": official, "labels/sem_seg/masks/val/a.png": official,
        "images/100k/val/a.jpg": official, "own/classes.json": own,
        "own/labels/det_20/det_val.json": own,
        "drivable/a.png": score("drivable", "labels/drivable/masks/val", "drivable"),
        **dict.fromkeys(coco_files, score(*coco_files)),
        **dict.fromkeys(text_files, score(*text_files)),
        **{str(file.relative_to(root)): old_release for file in old.rglob("*.*")},
        **{f"v1.0-val/{name}.json": nuimages
           for name in ("category", "sample_data", "object_ann", "surface_ann")},
        "x.pt": lambda: hmpl.load_model(root / "x.pt"),
        "backbone.pth": lambda: hmpl.load_backbone(hmpl.ResNetBackbone(18), root / "backbone.pth"),
        "tower.pt": lambda: prompts.load_text_tower(root / "tower.pt"),
    }


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random changes: bits flipped, parts cut out, doubled, replaced, JSON values changed."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        a = rng.randrange(len(data) + 1)
        b = a + rng.choice([1, 4, 64, 10 ** 6])
        value = re.compile(rb'[":,\[]([^,\]}]{1,200})').search(data, a)
        if value and rng.random() < 0.4:
            data[value.start(1):value.end(1)] = rng.choice(NUMBERS)
        elif rng.random() < 0.3:
            data[a:a + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[a:a + 1])
        else:
            data[a:b] = rng.choice([b"", data[a:b] * 2, rng.randbytes(len(data[a:b][:64]))])
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused(tmp_path):
    """One file after the other, until the time is over."""
    root, seed = tmp_path / "files", int(os.environ.get("FUZZ_SEED", 0))
    readers, rng, cases, errors = make_files(root), random.Random(seed), 0, 0
    whole = {name: (root / name).read_bytes() for name in readers}
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in readers.values():
        read()                                                                   # unharmed
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", 10))
    while time.monotonic() < end:
        name, cases = rng.choice(list(readers)), cases + 1
        data = mutate(whole[name], rng)
        (root / name).write_bytes(data)
        signal.alarm(SECONDS)
        try:
            readers[name]()
        except CLEAN as error:
            errors += 1
            assert str(error).strip(), name
        except BaseException as error:
            raise AssertionError(f"seed {seed}, case {cases}: {name} of {data[:2000]}") from error
        signal.alarm(0)
        (root / name).write_bytes(whole[name])
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10
        assert memory < MEGABYTES, (name, memory)
    assert cases > 100 and 0 < errors < cases, (cases, errors)
