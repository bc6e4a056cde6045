"""The project as a whole: files that travel alone, the sample, and that the network can learn."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import draw_roads
import evaluate
import hmpl
import prompts
import train
from evaluate import BDD100K, CLASSES

ROOT = Path(__file__).resolve().parent.parent
ROADS = ROOT / "tests" / "roads"


@pytest.mark.parametrize("name", ["hmpl.py", "prompts.py", "evaluate.py"])
def test_each_module_works_copied_alone(name, tmp_path):
    shutil.copy(ROOT / name, tmp_path)
    code = (f"import doctest, {name[:-3]} as m; r = doctest.testmod(m); "
            "assert r.attempted > 3 and not r.failed")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env,
                           capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_readme_names_the_versions_that_are_required():
    lines = (ROOT / "requirements.txt").read_text().split()
    least = dict(line.split(">=") for line in lines)                         # all have a bound
    assert len(least) == 8
    assert f"Python 3.10 and torch {least['torch']} or newer" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("split, index", [("train", 0), ("train", 117), ("val", 59)])
def test_sample_is_what_the_script_draws(split, index):
    stem, image, masks, frame = draw_roads.draw_scene(split, index)
    frames = json.loads((ROADS / f"labels/det_20/det_{split}.json").read_text())
    assert frames[index] == frame
    for folder, mask in masks.items():
        written = Image.open(ROADS / f"labels/{folder}/masks/{split}/{stem}.png")
        assert np.array_equal(np.array(written), mask)
    stored = np.array(Image.open(ROADS / f"images/100k/{split}/{stem}.jpg"), np.float32)
    assert np.abs(stored - image).mean() < 4                                 # but for the JPEG


def test_sample_shows_every_class_that_can_be_drawn():
    for split, count in (("train", 800), ("val", 150)):
        data = BDD100K(ROADS, split, tasks=["lane"])
        assert len(data) == count and all(has.all() for has in data.labelled.values())
        assert (np.bincount(data.box_labels, minlength=10) > 0).all()
        assert (np.diff(data.offsets) == 0).any()
        classes = [np.unique(data.mask("semantic", i)).tolist() for i in range(count)]
        assert set().union(*classes) >= set(range(19))


def test_four_images_are_learned_by_heart():
    """The tiny profile with LV-Adapter and learned prompts: nearly perfect on what it has seen."""
    data, size = BDD100K(ROADS, "train"), (128, 72)
    samples = [coarse(*train.augment(*data.sample(i), size, flip=False)) for i in range(4)]
    images, targets = train.collate(samples)
    torch.manual_seed(0)
    tower = prompts.TextTower(width=64, layers=2, embed_dim=64)
    text = prompts.TaskPrompts(tower, prompts.Tokenizer(prompts.BYTES), CLASSES)
    model = hmpl.HMPL(CLASSES, **hmpl.PROFILES["tiny"], text=text)
    optimizer = torch.optim.AdamW(train.parameter_groups(model.train(), 1e-3, {}, 1e-4), fused=True)
    for step in range(160):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * train.lr_factor(step, 160, 10)
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
    meters = {task: evaluate.meter_of(task, names) for task, names in CLASSES.items()}
    for target, prediction in zip(targets, model.eval().predict(images)):
        evaluate.update_meters(meters, target, prediction)
    scores = {task: meter.compute()["AP50" if task == "detection" else "mIoU"]
              for task, meter in meters.items()}
    assert min(scores.values()) > 0.9, scores


def coarse(image, target):
    """Masks in blocks of 4 x 4 pixels, as masks at stride 4 can be, and boxes of 6 or more."""
    for task in ("semantic", "drivable"):
        target[task] = target[task][2::4, 2::4].repeat_interleave(4, 0).repeat_interleave(4, 1)
    large = (target["boxes"][:, 2:] - target["boxes"][:, :2]).amin(1) >= 6
    return image, target | {key: target[key][large] for key in ("boxes", "labels", "crowd")}
