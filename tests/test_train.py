"""train.py: splits, samples, schedule; runs that end, resume, agree and refuse bad input."""
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import hmpl
import train
from evaluate import BDD100K, CLASSES, InputError
from test_evaluate import write_nuimages

ROOT = Path(__file__).resolve().parent.parent
MASK_FOLDERS = "labels/sem_seg/masks", "labels/drivable/masks"
QUICK = ["--size", "64x64", "--steps", "3", "--batch", "2",
         "--pretrained", "none", "--clip", "none", "--workers", "0"]
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}              # where all runs of a seed give the same bits


def run(*args, cwd=ROOT, **env):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True,
                          text=True, timeout=600, env={**os.environ, **env})


def succeeds(*args, **options):
    ended = run(*args, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    return ended


def options(data, out, *more):
    return ["--data", str(data), "--profile", "tiny", "--out", str(out), *QUICK, *map(str, more)]


def trained(data, out, *more, **env):
    return succeeds("train.py", *options(data, out, *more), **env)


def refused(*args, message):
    ended = run(*args)
    assert ended.returncode in (1, 2) and "Traceback" not in ended.stderr, ended.stderr
    assert message in ended.stderr.strip().splitlines()[-1], ended.stderr


def two_processes(port, script, *args, **env):
    """On the CPU: most machines have fewer than two GPUs."""
    return run("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
               script, *args, **ON_CPU, **env)


def opened(data, out, *more):
    return train.start(train.parse_args(options(data, out, *more)))


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Twelve training and three validation images of the sample."""
    root = tmp_path_factory.mktemp("few")
    for split, count in (("train", 12), ("val", 3)):
        stems = BDD100K(evaluate.SAMPLE, split).stems[:count].tolist()
        for folder in ("images/100k", *MASK_FOLDERS):
            (root / folder / split).mkdir(parents=True)
            for file in (evaluate.SAMPLE / folder / split).iterdir():
                if file.stem in stems:
                    (root / folder / split / file.name).symlink_to(file)
        boxes = f"labels/det_20/det_{split}.json"
        frames = json.loads((evaluate.SAMPLE / boxes).read_text())
        evaluate.write_json(root / boxes, [f for f in frames if Path(f["name"]).stem in stems])
    return root


# -------------------------------------------------------------------------- split and samples

def labelled(count, **tasks):
    """A data set of `count` stems, those from one number to another labelled for each task."""
    n, tasks = np.arange(count), tasks | {task: tasks.get(task, (0, 0)) for task in CLASSES}
    return SimpleNamespace(
        classes=CLASSES, labels="somewhere", split="train", stems=np.array([f"s{i}" for i in n]),
        labelled={task: (n >= first) & (n < end) for task, (first, end) in tasks.items()},
        places=dict.fromkeys(CLASSES, "a place"), without_image={})


@pytest.mark.parametrize("n, semantic, detection, drivable, expected", [
    (370, (0, 370), (0, 370), (0, 370), (70, 100, 200)),
    # As in BDD100K: 7,000 semantic images, 3,000 of them among the 70,000 with the other labels.
    (74000, (0, 7000), (4137, 74000), (4000, 74000), (7000, 10000, 20000)),
    # Semantic labels are few and only where all others are too: the others must leave them alone.
    (200, (0, 14), (0, 120), (0, 200), (14, 20, 40)),
])
def test_split_is_the_papers_or_as_large_as_disjoint_sets_can_be(
        n, semantic, detection, drivable, expected):
    data = labelled(n, semantic=semantic, detection=detection, drivable=drivable)
    split = train.make_split(data, [], "disjoint_normal", 0)
    assert tuple(len(split[task]) for task in data.labelled) == expected
    assert len(set().union(*split.values())) == sum(expected)                # disjoint
    assert split == train.make_split(data, [], "disjoint_normal", 0)
    assert split != train.make_split(data, [], "disjoint_normal", 1)
    alone = train.make_split(data, [], "disjoint_normal", 0, ["semantic"])
    assert alone == {"semantic": split["semantic"]}


def test_other_settings_and_labels_that_a_split_needs():
    data = labelled(370, semantic=(0, 370), detection=(0, 370), drivable=(0, 370))
    balance = train.make_split(data, data.stems[:70], "disjoint_balance", 0)
    assert all(len(stems) == 100 for stems in balance.values())
    assert len(set().union(*balance.values())) == 300
    assert not set(data.stems[:70]) & set().union(*balance.values())         # for validation
    assert all(len(stems) == 370 for stems in train.make_split(data, [], "full", 0).values())
    split = train.make_split(data, [], "full", 0, ["semantic", "detection"])
    assert set(split) == {"semantic", "detection"}
    data.labelled["lane"], data.classes = data.labelled["semantic"], evaluate.BDD_CLASSES
    split = train.make_split(data, [], "disjoint_normal", 0)
    numbers = {task: len(stems) for task, stems in split.items()}            # of lane as semantic
    assert numbers == {"drivable": 168, "detection": 84, "semantic": 58, "lane": 58}
    assert len(set().union(*split.values())) == 168 + 84 + 2 * 58


def test_the_check_tells_of_images_that_are_too_few_for_disjoint_sets():
    """For all ways in which three images can have labels."""
    refusals = 0
    for codes in itertools.combinations_with_replacement(range(8), 3):
        data = labelled(3)
        data.labelled = {task: np.array([bool(code >> k & 1) for code in codes])
                         for k, task in enumerate(CLASSES)}
        tasks, notes, errors = evaluate.usable_tasks(data, labelled(0))
        assert tasks == [task for task in CLASSES if data.labelled[task].any()]
        refused = not tasks
        if tasks:
            try:
                train.make_split(data, [], "disjoint_normal", 0, tasks)
            except InputError:
                refused = True
        told = any("too few images for disjoint sets" in note for note in notes)
        assert refused == (told or bool(errors))
        refusals += told
    assert 0 < refusals < 60


def test_ground_truth_by_the_split_and_pseudo_labels_for_the_rest(few, tmp_path):
    data = BDD100K(few, "train")
    split = {"drivable": data.stems[:6].tolist(), "detection": data.stems[6:9].tolist(),
             "semantic": data.stems[9:].tolist()}
    samples = train.Samples(data, split, list(CLASSES))
    assert sorted(map(len, samples.groups())) == [3, 3, 6]                   # tasks take turns
    keys = [set(samples[n, (320, 180), False][1]) for n in (0, 6, 9)]
    assert keys == [{"drivable"}, {"boxes", "labels", "crowd"}, {"semantic"}]
    writer, mask = evaluate.LabelWriter(tmp_path, "train"), torch.ones(180, 320, dtype=torch.uint8)
    for file in data.files:
        writer.add(file, {
            "boxes": torch.tensor([[1., 2, 3, 4]]), "scores": torch.ones(1),
            "labels": torch.tensor([0]), "semantic": 7 * mask, "drivable": mask})
    writer.close()
    pseudo = BDD100K(few, "train", labels=tmp_path)
    filled = train.Samples(data, split, list(CLASSES), pseudo)
    assert len(filled.groups()) == 1
    image, target, *_ = filled[0, (320, 180), False]
    assert torch.equal(target["drivable"], data.target(0)["drivable"])
    assert target["semantic"].unique().tolist() == [7]
    assert target["boxes"].tolist() == [[1, 2, 3, 4]] and image.shape == (3, 180, 320)


def test_flip_and_resize_move_image_and_labels_together():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 30:50] = 200
    boxes = torch.tensor([[30., 10, 50, 20], [58, 0, 70, 5], [60, 0, 70, 5]])
    target = {"boxes": boxes, "labels": torch.tensor([3, 4, 5]),
              "crowd": torch.tensor([False, True, False]),
              "semantic": (image[0] > 0).to(torch.uint8)}
    image, target = train.augment(image, target, (120, 80), flip=True)
    assert target["boxes"].tolist() == [[20, 20, 60, 40], [0, 0, 4, 10]]
    assert target["labels"].tolist() == [3, 4]
    assert (image[0, 24:36, 24:56] == 200).all() and image[0, :, 64:].max() == 0
    assert target["semantic"].sum() == 20 * 40 and (target["semantic"][20:40, 20:60] == 1).all()
    line = torch.eye(60, dtype=torch.uint8)[:40]                   # of a further task: stays whole
    target = train.augment(torch.zeros(3, 40, 60, dtype=torch.uint8), {"lane": line}, (15, 10),
                           flip=True)[1]
    assert torch.equal(target["lane"], line.flip(1))


def test_order_is_a_pure_function_of_the_seed_and_shares_out_over_processes():
    def order(start=0, groups=(np.arange(10),), **more):
        return list(train.batch_keys(groups, 4, start, 6, 7, [(64, 64), (96, 64)], **more))

    turns = [{n for n, *_ in batch} for batch in order(groups=[np.arange(2), np.arange(2, 10)])]
    assert turns[::2] == [{0, 1}] * 3 and turns[1] | turns[3] == set(range(2, 10))
    everything = order()
    assert order(start=3) == everything[3:]
    first = sorted(n for batch in everything[:5] for n, _, _ in batch)
    assert first == sorted(list(range(10)) * 2)                              # two epochs
    assert all(len({size for _, size, _ in batch}) == 1 for batch in everything)
    assert len({batch[0][1] for batch in everything}) == 2
    ranks = [order(rank=r, world=2, accum=2) for r in range(2)]
    assert len(ranks[0]) == 12 and all(len(batch) == 1 for batch in ranks[0])
    for step in range(6):
        parts = [part for r in ranks for part in r[2 * step:2 * step + 2]]
        assert {key for part in parts for key in part} == set(everything[step])


def test_learning_rate_warms_up_and_decays():
    factors = [train.lr_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1 and 0 < factors[-1] < 0.03
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert train.lr_factor(0, 1, 1000) == 1              # no warm-up longer than a quarter


def test_all_stages_end_and_evaluate_repeats_the_scores(few, tmp_path):
    out = tmp_path / "run"
    ended = trained(few, out)
    for line in ("plan: dataset bdd100k, setting disjoint_normal", "RANDOM backbone weights",
                 "drivable 6, detection 3, semantic 2", "parameters learn"):
        assert line in ended.stdout
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.pt")} == {
        "teachers/drivable.pt", "teachers/detection.pt", "teachers/semantic.pt", "adapt.pt",
        "finetune.pt"}
    logged = {"step", "lr", "detection_class", "semantic_dice", "images_per_s", "norm"}
    assert logged <= set(read_log(out)[-2])
    split = json.loads((out / "split.json").read_text())
    pseudo = {path.stem for path in (out / "pseudo/labels/drivable/masks/train").iterdir()}
    assert pseudo == set(split["detection"]) | set(split["semantic"])
    scored = succeeds("evaluate.py", "--ckpt", out / "finetune.pt", "--json",
                      tmp_path / "scores.json", "--show", tmp_path / "show", "--count", "1")
    final = ended.stdout.split("finetune ")[-1].splitlines()[1:]             # the table's rows
    assert final[0].split() and all(line in scored.stdout for line in final)
    scores = json.loads((tmp_path / "scores.json").read_text())
    saved = load(out / "finetune.pt")
    assert all(scores[task] == saved["scores"][task] for task in CLASSES)
    assert not {"optimizer", "scaler", "rng"} & saved.keys()                 # it is finished
    assert "RANDOM backbone" in scores["notes"][0]
    assert len(list((tmp_path / "show").iterdir())) == 1
    pictures = {path.name for path in (out / "pictures").iterdir()}
    assert len(pictures) == 15 and sum("_adapt" in name for name in pictures) == 3
    assert (np.asarray(Image.open(out / "curves.png")) == (0, 114, 178)).all(2).sum() > 1000
    assert trained(few, out).stdout.count("done") == 6                       # nothing is run twice


def test_frozen_means_frozen_through_the_adapt_stage(few, tmp_path):
    trained(few, tmp_path, "--stage", "adapt")
    adapt = load(tmp_path / "adapt.pt")["model"]
    again = opened(few, tmp_path)
    born = train.new_model(again, train.stages_of(again)["adapt"][0]).state_dict()
    for task, prefixes in (("semantic", "heads.semantic."),
                           ("drivable", ("backbone.", "adapter.", "heads.drivable."))):
        teacher = load(tmp_path / f"teachers/{task}.pt")["model"]
        assert all(torch.equal(value, teacher[name]) for name, value in born.items()
                   if name.startswith(prefixes))
    same = {name: torch.equal(value, adapt[name]) for name, value in born.items()}
    learn = [name for name in same if name.startswith(("adapter.", "lv_adapter.", "text.contexts"))]
    assert all(same[name] for name in same if name.startswith("backbone."))
    assert not any(same[name] for name in learn if name.endswith("weight"))
    assert not any(name.startswith("text.tower") for name in adapt)          # it is in its file


def test_the_queries_read_p5_if_it_is_8_cells_wide(few, tmp_path):
    for size, level in (("255x144", 4), ("256x144", 5)):
        stage = train.Stage("teacher semantic", ["semantic"], 1, tmp_path / "x.pt", [])
        config = train.model_config(opened(few, tmp_path, "--size", size), stage)
        assert config["maskformer"]["memory_level"] == level


def test_only_models_that_learn_lanes_from_ground_truth_weigh_background(few, tmp_path):
    begun = opened(few, tmp_path)
    begun.train.classes = evaluate.BDD_CLASSES
    begun.split["lane"] = ["a", "b"]
    for name, pseudo, weights in (("teacher lane", 3, {"lane": 0.2}), ("adapt", 3, None),
                                  ("finetune", 2, {"lane": 0.2}), ("teacher semantic", 3, None)):
        begun.to_label["lane"] = np.arange(pseudo)
        tasks = name.split()[1:] or ["semantic", "lane"]
        stage = train.Stage(name, tasks, 1, tmp_path / "x.pt", [])
        assert train.model_config(begun, stage)["background_weights"] == weights


def steps(few, out, count, monkeypatch, stop=None):
    """Trains a tiny joint model on the CPU for `count` steps; raises at step `stop`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    begun = opened(few, out, "--accum", "2")
    stage = train.Stage("finetune", list(CLASSES), count, out / "x.pt", [])
    samples = train.Samples(begun.train, begun.split, list(CLASSES))
    advance = train.Training.advance

    def stopping(training, *args):
        if training.step + 1 == stop:
            raise KeyboardInterrupt
        return advance(training, *args)

    with monkeypatch.context() as m:
        m.setitem(train.hmpl.PROFILES["tiny"], "dropout", 0.1)               # as in paper
        m.setattr(train.Training, "advance", stopping)
        m.setattr(train, "SAVE_SECONDS", -1)                                 # saves at every step
        return train.train(begun, stage, train.new_model(begun, stage), samples).state_dict()


def test_resumed_training_is_bit_identical(few, tmp_path, monkeypatch):
    path = tmp_path / "parts/x.pt"
    whole = steps(few, tmp_path / "whole", 6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        steps(few, tmp_path / "parts", 6, monkeypatch, stop=4)
    assert load(path)["step"] == 3
    assert equal(whole, steps(few, tmp_path / "parts", 6, monkeypatch))
    a, b = load(path), load(tmp_path / "whole/x.pt")
    assert a["scores"] == b["scores"] and a["step"] == b["step"] == 6
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(hmpl.WeightsError, match="x.pt cannot be read .* delete it"):
        steps(few, tmp_path / "parts", 6, monkeypatch)


KILLABLE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.SAVE_SECONDS, train.LOG_STEPS = -1, 1                      # writes all the time
train.hmpl.PROFILES["tiny"]["dropout"] = 0.1
advance = train.Training.advance
def dying(self, *args):
    if os.environ.get("KILL_AT") == str(self.step + 1) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self, *args)
train.Training.advance = dying
train.main()
"""


@pytest.mark.parametrize("codes", [(-9, -9), (143, 130)])        # SIGKILL; SIGTERM, SIGINT
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(few, tmp_path, codes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = "-uc", KILLABLE, "--setting", "disjoint_normal"
    moments = np.random.default_rng(0).uniform(0.1, 4, 2)        # seconds after the first output
    for code, moment in zip(codes, moments):
        process = subprocess.Popen(
            [sys.executable, *args, *options(few, parts, "--steps", "6")], cwd=ROOT, text=True,
            env=os.environ | ON_CPU, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(moment)
        process.send_signal(-code if code < 0 else code - 128)
        error = process.communicate(timeout=300)[1]
        assert process.returncode == code, error
        assert code < 0 or "the same command resumes the run." in error
    for out in (whole, parts):
        succeeds(*args, *options(few, out, "--steps", "6"), **ON_CPU)
    assert equal(*(load(out / "finetune.pt")["model"] for out in (whole, parts)))
    logs = [read_log(out) for out in (whole, parts)]
    for line in logs[0] + logs[1]:
        line.pop("images_per_s", None)                                       # the machine's
    assert logs[0] == logs[1]
    assert len({(out / "pseudo/report.json").read_text() for out in (whole, parts)}) == 1
    left = {file.suffix for file in parts.rglob("*") if file.is_file()}
    assert left <= {".pt", ".json", ".jsonl", ".png", ".part", ""}           # lock has no suffix


@pytest.mark.parametrize("heads", ["transformer", "conv"])
def test_interrupted_pseudo_labels_end_the_same(few, tmp_path, capsys, monkeypatch, heads):
    """An image that cannot be read has none; batches of another size would round other scores."""
    data, pseudo = tmp_path / "data", tmp_path / "run/pseudo"
    shutil.copytree(few, data)
    begun = opened(data, tmp_path / "run", "--steps", "1", "--heads", heads)
    teachers = train.stages_of(begun)["teachers"]
    for teacher in teachers:
        train.run_stage(begun, teacher)
    unread = begun.split["drivable"][0]
    (data / f"images/100k/train/{unread}.jpg").write_bytes(b"no JPEG")

    def files():
        train.run_pseudo(begun, teachers)
        return {path.relative_to(pseudo): path.read_bytes()
                for path in pseudo.rglob("*") if path.is_file()}

    whole = files()
    assert f"{unread}.jpg is skipped: " in capsys.readouterr().err
    assert len(whole) > 12 and {path.suffix for path in whole} == {".json", ".png"}
    labels, stems = train.pseudo_labels(begun), set().union(*begun.split.values())
    for task, assigned in begun.split.items():
        missing = stems - set(assigned) - set(labels.stems[labels.labelled[task]])
        assert missing == {unread} - set(assigned)
    for module, name, stop in [
            (evaluate.LabelWriter, "add", 3), (evaluate, "write_json", 2),
            (evaluate.LabelWriter, "close", 1), (evaluate, "write_json", 4)]:
        shutil.rmtree(pseudo)
        real, calls = getattr(module, name), itertools.count(1)

        def call(*args, **more):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real(*args, **more)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(module, name, call)
            train.run_pseudo(begun, teachers)
        assert files() == whole


def test_what_a_result_came_from_is_kept_and_must_stay(few, tmp_path):
    """A validation image may be unreadable and then be deleted; they may lack a task's labels."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(few, data)
    shutil.rmtree(data / "labels/drivable/masks/val")
    args = options(data, out, "--stage", "teachers")
    image = next((data / "images/100k/val").iterdir())
    image.write_bytes(b"no JPEG")
    refused("train.py", *args, message=f"{image.name} cannot be read as an image")
    image.unlink()
    assert "resumes at step 2" in succeeds("train.py", *args).stdout
    assert load(out / "teachers/semantic.pt")["scores"]["images"] == 2
    saved = load(out / "teachers/drivable.pt")
    config = saved["config"]
    assert saved["scores"] == {"images": 0} and config["seed"] == 0
    assert config == evaluate.read_json(out / "config.json") | {"scales": config["scales"]}
    assert config["origin"]["command"].startswith("train.py --data")
    assert config["origin"]["torch"] == torch.__version__
    refused("train.py", *args, "--seed", "5", message="seed 0 -> 5")
    saved["model_config"]["classes"]["drivable"] = ("mine", "yours", "background")
    torch.save(saved, tmp_path / "other.pt")
    refused("evaluate.py", "--ckpt", tmp_path / "other.pt",
            message="drivable classes are mine, yours, background; the data's are direct")
    shutil.copy(tmp_path / "other.pt", out / "teachers/drivable.pt")
    refused("train.py", *args, message="was written for another network (classes differ)")
    shutil.rmtree(out / "teachers")
    trained(data, out, "--stage", "teachers")
    boxes = data / "labels/det_20/det_train.json"
    evaluate.write_json(boxes, json.loads(boxes.read_text())[1:])
    refused("train.py", *args, message=f"images {config['images']} -> ")


def test_two_runs_never_share_a_folder(few, tmp_path):
    """The second is refused while the first lives, even if that is killed afterwards."""
    held = f"import train; train.lock_folder(train.Path({str(tmp_path)!r})); print(1); input()"
    first = subprocess.Popen([sys.executable, "-u", "-c", held], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    first.stdout.readline()
    args = options(few, tmp_path, "--labels", "own", "--stage", "adapt")
    refused("train.py", *args, message=f"{tmp_path} is in use by process {first.pid} on ")
    first.kill()
    first.wait()
    succeeds("train.py", *args)


def test_a_step_beyond_fp16_is_skipped_and_the_scale_grows_again(few, tmp_path):
    begun = opened(few, tmp_path, "--amp", "fp16", "--setting", "full", "--steps", "9")
    stage = train.stages_of(begun)["adapt"][0]
    t = train.Training(begun, stage, train.new_model(begun, stage))
    t.scaler.load_state_dict(t.scaler.state_dict() | {"scale": 2. ** 100, "growth_interval": 1})
    samples = train.Samples(begun.train, begun.split, stage.tasks)
    batch = train.collate([samples[n, (64, 64), False] for n in range(2)])
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    t.advance(iter([batch]))
    assert t.skipped == 1 and t.scaler.get_scale() == 2. ** 99
    assert all(torch.equal(p, before[name]) for name, p in t.model.named_parameters())
    t.scaler.load_state_dict(t.scaler.state_dict() | {"scale": 1.})
    t.advance(iter([batch]))
    assert t.skipped == 1 and t.scaler.get_scale() == 2
    assert any(not torch.equal(p, before[name]) for name, p in t.model.named_parameters())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The file size limit stands in for the disk's end."""
    path, limits = tmp_path / "x.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    train.write_checkpoint(path, {"model": {"w": torch.ones(10)}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*x.pt .* the last .* is unharmed"):
            train.write_checkpoint(path, {"model": {"w": torch.ones(1 << 18)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(path)["model"]["w"].shape == (10,) and len(list(tmp_path.iterdir())) == 1


FULL_DISK = """
import evaluate, pathlib, resource, torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1 << 18))
    def predict_batch(self, images):
        return images * self.w.sum()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, -1))
try:
    evaluate.export_model(Model(), pathlib.Path("x.pt2"), (8, 8))
except OSError as error:
    print(error)
"""


def test_an_export_to_a_full_disk_is_one_sentence(tmp_path):
    ended = succeeds("-c", FULL_DISK, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert re.fullmatch(r"cannot write x.pt2 \(.*File too large\)\n", ended.stdout)
    assert not list(tmp_path.iterdir())


def test_two_processes_with_other_labels_have_the_gradients_of_one():
    ended = two_processes(29611, "tests/two_ranks.py")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "RESULT True True True" in ended.stdout and ended.stdout.count("SAME True True") == 5


JOINT = {"adapt.pt", "finetune.pt"}


@pytest.mark.parametrize("more, files", [
    (["--tasks", "semantic", "--adapter", "pre_scalar+lv"], JOINT),
    (["--labels", "own", "--scheme", "pretrain-finetune", "--adapter", "post"], {"finetune.pt"}),
    (["--setting", "full", "--stage", "all", "--heads", "conv"], JOINT),
])
def test_other_experiments_run_the_stages_they_need(few, tmp_path, more, files):
    out = tmp_path / "run"
    ended = trained(few, out, *more)
    assert {file.name for file in out.rglob("*.pt")} == files and not (out / "pseudo").exists()
    saved = load(out / "finetune.pt")
    assert saved["steps"] == (3 if "pretrain-finetune" in more else 2)
    assert set(saved["scores"]) - {"images"} == set(saved["model_config"]["classes"])
    assert ("text_features" in saved["model"]) == ("post" not in more)
    scored = succeeds("evaluate.py", "--ckpt", out / "finetune.pt")
    assert scored.stdout.splitlines()[-6:] == ended.stdout.splitlines()[-6:]


def test_thresholds_say_what_becomes_a_pseudo_label(few, tmp_path):
    every, none, third = (tmp_path / name for name in ("every", "none", "third"))
    for out, least, kept in ((every, 0, 1), (none, 1, 0)):
        ended = trained(few, out, "--stage", "pseudo", "--heads", "conv", "--threshold",
                        f"detection={least},semantic={least},drivable={least}")
        assert ended.stdout.count(f"kept_boxes {kept},") == 1
        assert ended.stdout.count(f"kept_pixels {kept},") == 2
    assert ended.stdout.count(", mIoU ") == 2 and ended.stdout.count(", AP50 ") == 1
    trained(few, third, "--seed", "7", "--labels-of", every)                 # with its labels
    assert {file.name for file in third.rglob("*.pt")} == JOINT
    assert (third / "split.json").read_text() == (every / "split.json").read_text()
    refused("train.py", *options(few, tmp_path / "x", "--setting", "full", "--labels-of", every),
            message="begun with other options (setting disjoint_normal -> full): name a run of")
    refused("train.py", *options(few, tmp_path / "x", "--labels-of", third), message="no finished")


def test_two_processes_train_save_and_label_once(few, tmp_path):
    """The labels are those that one process makes with as many threads."""
    ended = two_processes(29612, "train.py", *options(few, tmp_path, "--stage", "adapt"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert load(tmp_path / "adapt.pt")["step"] == 1 and ended.stdout.count("plan: ") == 1
    (tmp_path / "pseudo").rename(tmp_path / "two")
    trained(few, tmp_path, "--stage", "pseudo", **ON_CPU, OMP_NUM_THREADS="1")   # as torchrun's
    made = [{file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}
            for folder in (tmp_path / "pseudo", tmp_path / "two")]
    assert made[0] == made[1] and len(made[0]) > 12


def test_two_processes_resume_bit_identically(few, tmp_path):
    """One of them is killed at its fifth step; its share of dropout and samples comes back too."""
    (tmp_path / "killable.py").write_text(KILLABLE)

    def two(out, **env):
        args = options(few, tmp_path / out, "--setting", "full", "--scheme", "pretrain-finetune",
                       "--steps", "7")
        return two_processes(29615, tmp_path / "killable.py", *args, **env)

    assert two("whole").returncode == 0
    assert "Signal 9 (SIGKILL)" in two("parts", KILL_AT="5").stderr
    saved = load(tmp_path / "parts/finetune.pt")
    assert saved["step"] == 4 and len(saved["rng"]) == 2
    assert "resumes at step 4" in two("parts").stdout
    whole, parts = (load(tmp_path / out / "finetune.pt") for out in ("whole", "parts"))
    assert equal(whole["model"], parts["model"])
    assert parts["scores"] == whole["scores"]


TORCH_ALONE = """
import sys, torch
predict = torch.export.load("model.pt2").module()
images = torch.load("images.pt")
with torch.no_grad():
    torch.save([predict(images), predict(images[:1])], "predicted.pt")
assert not {"hmpl", "torchvision", "evaluate"} & set(sys.modules)
"""


def score_masks(root, saved, task):
    folder = f"labels/{task}/masks/val"
    return evaluate.score_files(root / folder, saved / folder, task,
                                evaluate.read_classes(root))[task]


def test_own_tasks_are_learned_scored_drawn_and_exported(tmp_path):
    """Two kinds of boxes and two mask tasks with names of their own; none of the paper's masks."""
    classes = {"detection": ["cyclist", "road sign"], "ground": [f"stuff {k}" for k in range(11)],
               "ground_2": ["smooth", "rough", "background"]}
    root, out, rng = tmp_path / "camvid", tmp_path / "run", np.random.default_rng(0)
    evaluate.write_json(root / "classes.json", classes)
    for split, count in (("train", 8), ("val", 2)):
        frames = []
        for n in range(count):
            name = f"{split}{n}.png"
            picture = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
            evaluate.write_picture(root / f"images/100k/{split}" / name, picture)
            for task in ("ground", "ground_2"):
                ids = rng.integers(0, len(classes[task]), (48, 4), np.uint8)
                evaluate.write_picture(root / f"labels/{task}/masks/{split}" / name,
                                       Image.fromarray(np.repeat(ids, 16, 1)))
            box = {"x1": 5, "y1": 5, "x2": 24, "y2": 14}
            frames.append({"name": name, "labels": [
                {"category": classes["detection"][n % 2], "box2d": box}]})
        evaluate.write_json(root / f"labels/det_20/det_{split}.json", frames)
    trained(root, out, "--stage", "adapt")
    ended = trained(root, out)
    assert "detection 3, ground 2, ground_2 2" in ended.stdout and "drivable" not in ended.stdout
    assert "mIoU (ground)" in ended.stdout and "mIoU (ground_2)" in ended.stdout
    scores = load(out / "finetune.pt")["scores"]
    assert set(scores["ground"]["per_class"]) == set(classes["ground"])
    assert set(scores["ground_2"]["per_class"]) == {"smooth", "rough"}       # without background
    scored = succeeds("evaluate.py", "--ckpt", out / "finetune.pt", "--show", tmp_path / "show",
                      "--save", tmp_path / "saved", "--json", tmp_path / "scores.json")
    assert "road sign" in scored.stdout
    again = score_masks(root, tmp_path / "saved", "ground_2")
    assert again == evaluate.read_json(tmp_path / "scores.json")["ground_2"] == scores["ground_2"]
    assert "BAD" not in succeeds("evaluate.py", "--check", root).stdout
    ended = two_processes(29617, "train.py", *options(root, tmp_path / "two"),
                          "--labels", "own", "--scheme", "pretrain-finetune")
    assert ended.returncode == 0 and "mIoU (ground_2)" in ended.stdout, ended.stderr[-3000:]
    assert len(list((tmp_path / "show").iterdir())) == 2
    model = hmpl.load_model(out / "finetune.pt")
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 48, 64), np.uint8))
    torch.save(images, tmp_path / "images.pt")
    succeeds("evaluate.py", "--ckpt", out / "finetune.pt", "--export", tmp_path / "model.pt2")
    succeeds("-c", TORCH_ALONE, cwd=tmp_path, OMP_NUM_THREADS=str(torch.get_num_threads()))
    for part, predicted in zip((images, images[:1]), load(tmp_path / "predicted.pt")):
        for i, expected in enumerate(model.predict(list(part))):
            assert all(torch.equal(predicted[key][i], value) for key, value in expected.items())
    trained(root, tmp_path / "conv", "--heads", "conv", "--labels", "own")
    refused("evaluate.py", "--ckpt", tmp_path / "conv/finetune.pt", "--export", tmp_path / "x.pt2",
            message="export a model of --heads transformer")
    refused("evaluate.py", "--ckpt", tmp_path / "model.pt2", message="cannot be read as a")


def test_nuimages_is_learned_and_scored(tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    for split in ("train", "val"):
        write_nuimages(data, split)
    args = options(data, out, "--dataset", "nuimages")
    refused("train.py", *args, message="all images with detection labels for train are in val too")
    table = data / "v1.0-val/sample_data.json"
    table.write_text(table.read_text().replace("n003", "n004"))
    for file in (data / "samples/CAM_FRONT").glob("n003*"):
        shutil.copy(file, file.with_name(file.name.replace("n003", "n004")))
    ended = succeeds("train.py", *args)
    assert "detection 2, semantic 2" in ended.stdout
    scored = succeeds("evaluate.py", "--ckpt", out / "finetune.pt", "--save", tmp_path / "saved")
    assert scored.stdout.splitlines()[-9:] == ended.stdout.splitlines()[-9:]
    assert len(list((tmp_path / "saved").rglob("*.png"))) == 2
    assert set(load(out / "finetune.pt")["scores"]) == {"detection", "semantic", "images"}


def test_runs_are_printed_side_by_side(tmp_path):
    def finished(name, seed, adapter, iou):
        scores = None if iou is None else {"semantic": {"mIoU": iou}, "images": 3}
        config = {"seed": seed, "adapter": adapter, "data": name, "origin": {"command": name}}
        train.write_checkpoint(tmp_path / name / "finetune.pt", {
            "stage": "finetune", "step": 9, "steps": 9, "notes": [], "scores": scores,
            "config": config, "model_config": {"classes": {}}, "model": {"w": torch.zeros(1)}})
        return tmp_path / name

    paths = [finished("a", 0, "lv", 10.), finished("b", 1, "lv", 14.), finished("c", 0, "fpn", 9.)]
    rows = [line.split(" | ") for line in run("tests/table.py", *paths).stdout.splitlines()[2:]]
    assert [row[:2] + [row[2].strip(" |")] for row in rows] == [
        ["| adapter lv", "2", "12.0 ± 2.8"], ["| adapter fpn", "1", "9.0"]]
    refused("tests/table.py", finished("d", 0, "lv", None), message="no stage that is finished")


def test_bad_input_is_one_sentence_and_nothing_is_lost(few, tmp_path, capsys):
    out, safe = tmp_path / "run", tmp_path / "x.safetensors"
    safe.touch()
    for data, more, message in [
            (few, ["--pretrained", safe], f"torch.save(safetensors.torch.load_file('{safe}'), "),
            (few, ["--clip", safe], f"safetensors such as {safe} are not read"),
            (tmp_path / "nowhere", [], "no data folder"),
            (few, ["--size", "axb"], "expected WIDTHxHEIGHT"),
            (few, ["--pretrained", tmp_path / "no.pth"], "is neither a file nor one of none"),
            (few, ["--contexts", "80"], "the tower reads at most 77"),
            (few, ["--clip", __file__, "--prompts", "engineered"], "is neither a state dict nor"),
            (few, ["--tasks", "cars"], "has detection, semantic, drivable: name some"),
            (few, ["--tasks", "detection", "--threshold", "semantic=0.5"], "tasks are detection"),
            (few, ["--scheme", "pretrain-finetune", "--stage", "adapt"],
             "there are only teachers, pseudo, finetune"),
            (few, ["--dataset", "nuimages", "--setting", "disjoint_normal"], "use --setting full"),
            (few, ["--threshold", "detection=2"], "expected TASK=NUMBER"),
            (few, ["--adapter", "pre+post"], "invalid choice"),
            (few, ["--lr", "0"], "between 0 and inf")]:
        with pytest.raises(SystemExit) as ended:
            train.main(options(data, out, *more))
        assert message in f"{ended.value} {capsys.readouterr().err}"
    refused("evaluate.py", "--ckpt", tmp_path / "no.pt", message="no checkpoint")
    assert {file.name for file in out.iterdir()} == {"lock"}
    shutil.rmtree(out)
    trained(few, out, "--dry-run")
    assert not out.exists()


def planned(data, out, capsys, *more):
    """The NOTEs on labels and the line of images in the plan of a run."""
    train.main(options(data, out, "--dry-run", *more))
    lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith("NOTE") and "RANDOM" not in line]
    return notes, next(line for line in lines if "images with ground truth" in line)


def checked(data, capsys):
    """The NOTEs, what is BAD, and the conclusion of --check."""
    good = evaluate.check_data(data)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("a run can use") == good
    return [[line for line in lines if line.startswith(start)] for start in ("NOTE", "BAD")]


def test_the_plan_and_the_check_tell_of_labels_that_serve_nothing(few, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(few, data)
    assert planned(data, out, capsys)[0] == [] and checked(data, capsys) == [[], []]
    shutil.rmtree(data / "labels/sem_seg")                                   # no such task
    (data / "labels/det_20/det_val.json").unlink()
    masks = sorted((data / "labels/drivable/masks/train").iterdir())
    for n, mask in enumerate(masks[:5]):
        mask.rename(mask.with_name(f"export-{n}.png"))
    notes, images = planned(data, out, capsys)
    assert notes == [
        f"NOTE: {data} has no detection labels for val, expected labels/det_20/det_val.json: "
        "detection cannot be scored.",
        *(f"NOTE: {data} has no semantic labels for {split}, expected labels/sem_seg/masks/{split}"
          f"/*.png: semantic cannot be {use}."
          for split, use in (("train", "learned"), ("val", "scored"))),
        f"NOTE: {data}: 5 of 12 drivable labels for train have no image of the same name, such as "
        "export-0."]
    assert "drivable 7, detection 3; 10 in all" in images
    assert checked(data, capsys) == [notes, []]
    assert planned(data, out, capsys, "--tasks", "detection")[0] == notes[:1]


def other_names(data):
    for mask in (data / "labels/drivable/masks/train").iterdir():
        mask.rename(mask.with_name(f"export-{mask.name}"))


def the_same_images(data):
    shutil.rmtree(data / "images/100k/val")
    shutil.copytree(data / "images/100k/train", data / "images/100k/val")
    shutil.copytree(data / "labels/drivable/masks/train", data / "labels/drivable/masks/val",
                    dirs_exist_ok=True)


@pytest.mark.parametrize("change, more, message", [
    (other_names, [], "12 of 12 drivable labels for train have no image of the same name, such as "
     "export-"),
    (the_same_images, ["--tasks", "drivable"],
     "all images with drivable labels for train are in val too"),
    (lambda data: shutil.rmtree(data / "labels"), [],
     "has no detection labels for train, expected labels/det_20/det_train.json: detection cannot"),
    (lambda data: shutil.rmtree(data / "images/100k/val"), [],
     "expected images/100k/val or images/10k/val (move a part of train there, images and labels)"),
])
def test_what_ends_a_run_is_bad_in_the_check(few, tmp_path, capsys, change, more, message):
    data = tmp_path / "data"
    shutil.copytree(few, data)
    change(data)
    with pytest.raises(SystemExit) as ended:
        train.main(options(data, tmp_path / "run", *more))
    assert message in str(ended.value)
    assert any(message in line for line in checked(data, capsys)[1])


def test_a_task_that_was_asked_for_needs_labels(few, tmp_path):
    shutil.copytree(few, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/labels/drivable/masks/train")
    message = ("data has no drivable labels for train, expected labels/drivable/masks/train/"
               "[*].png: drivable cannot be learned.")
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "data", tmp_path, "--tasks", "detection,drivable")


def test_a_run_knows_its_data(few, tmp_path, monkeypatch):
    """Resumed without --data it reads what it was begun with, and never draws a sample instead."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(few, data)
    trained(data, out, "--setting", "full", "--scheme", "pretrain-finetune", "--steps", "1")
    again = options(data, out, "--setting", "full", "--scheme", "pretrain-finetune", "--steps", "1")
    assert train.start(train.parse_args(again[2:])).train.root == data
    assert train.start(train.parse_args(again)).train.root == data
    monkeypatch.setattr(evaluate, "SAMPLE", tmp_path / "not drawn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BDD100K", raising=False)
    data.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=f"{out} was begun with {data}, which is gone: give its"):
        train.start(train.parse_args(again[2:]))
    monkeypatch.setenv("BDD100K", str(tmp_path / "moved"))
    assert train.start(train.parse_args(again[2:])).train.root == tmp_path / "moved"


def test_thin_pictures_stay_one_pixel_high():
    data = SimpleNamespace(image=lambda i: torch.zeros(3, 8, 4000))
    assert train.network_size(data, "tiny") == (128, 1)


def test_an_unreadable_sample_is_replaced_by_the_next(few, tmp_path, capsys):
    shutil.copytree(few, tmp_path / "data")
    data = BDD100K(tmp_path / "data", "train")
    samples = train.Samples(data, {"drivable": data.stems.tolist()}, ["drivable"])
    key = (64, 64), False
    for mask in sorted((data.root / "labels/drivable/masks/train").iterdir())[10:]:
        mask.write_bytes(b"no PNG")
    image, target, file = samples[(10, *key)]
    assert file == data.files[0] and torch.equal(image, samples[(0, *key)][0])
    notes = capsys.readouterr().err.splitlines()
    assert [f"replaces {data.files[n]}: " in note for n, note in zip((10, 11), notes)] == [True] * 2
    assert all(note.startswith("NOTE") and "cannot be read as an image" in note for note in notes)


def test_systems_without_file_locks_run_too(tmp_path):
    """As on Windows."""
    succeeds("-c", "import sys; sys.modules.update(fcntl=None, resource=None); import train; "
             "train.lock_folder(train.Path('run'))", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (tmp_path / "run/lock").exists()


def test_losses_that_stay_infinite_end_the_run_by_name(few, tmp_path, monkeypatch):
    monkeypatch.setattr(train.hmpl.HMPL, "forward", lambda self, images, targets: {
        "semantic_dice": math.inf * sum(p.sum() for p in self.parameters() if p.requires_grad)})
    message = "semantic_dice not finite for 10 steps up to 10, with images/100k/train/.*jpg"
    with pytest.raises(InputError, match=message):
        steps(few, tmp_path, 30, monkeypatch)


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 1), (2, 0)])
def test_broken_training_files_soon_stop_all_processes(few, tmp_path, processes, workers):
    root = tmp_path / "data"
    shutil.copytree(few, root)
    for file in (root / "labels/sem_seg/masks/train").iterdir():             # the first teacher's
        Image.new("RGB", (320, 180)).save(file)
    args = options(root, tmp_path / "run", "--steps", "4000", "--workers", workers)
    ended = two_processes(29614, "train.py", *args) if processes == 2 else run("train.py", *args)
    message = f"train.py: 10 images in a row cannot be used, the last because {root}/labels/sem"
    assert ended.returncode and message in ended.stderr, ended.stderr[-3000:]
    assert processes == 2 or "Traceback" not in ended.stderr


@pytest.mark.parametrize("heads", ["transformer", "conv"])
def test_nearly_nothing_to_learn_from_is_no_error(few, tmp_path, heads):
    """Three images and one to validate: no boxes, masks of which all is ignored, batches of one."""
    root, nothing = tmp_path / "data", np.full((180, 320), 255, np.uint8)
    shutil.copytree(few, root)
    for split, count in (("train", 3), ("val", 1)):
        images = sorted((root / "images/100k" / split).iterdir())
        for file in images[count:]:
            file.unlink()
        for folder in MASK_FOLDERS:
            for mask in (root / folder / split).iterdir():
                evaluate.write_picture(mask, Image.fromarray(nothing))
        evaluate.write_json(root / f"labels/det_20/det_{split}.json",
                            [{"name": file.name, "labels": None} for file in images])
    ended = trained(root, tmp_path / "run", "--heads", heads, "--batch", "1",
                    "--threshold", "detection=1,semantic=1")
    assert "NOTE: no detection pseudo label is left" in ended.stdout
    assert "--threshold detection=0.05" in ended.stdout
    lines = [line for line in read_log(tmp_path / "run") if "norm" in line]
    numbers = [value for line in lines for value in line.values()]
    assert all(math.isfinite(value) for value in numbers if isinstance(value, float))


def test_boxes_without_area_are_no_predictions(few, tmp_path):
    """A proposal that drifts off the image is clamped to a line: neither scored nor written."""
    def drifted(indices, images):
        boxes = torch.tensor([[0., 5, 0, 10], [319.99, 5, 320, 10], [4, 4, 4.01, 9]])
        labels = torch.tensor([1, 2, 3])
        return [{"boxes": boxes, "scores": torch.ones(3), "labels": labels} for _ in images]

    data, writer = BDD100K(few, "train"), evaluate.LabelWriter(tmp_path, "train")
    items, = evaluate.predictions(drifted, data, [[0]], torch.device("cpu"))
    for i, _, _, prediction in items:
        writer.add(data.files[i], prediction)
    writer.close()
    written = BDD100K(few, "train", labels=tmp_path).target(0, ["detection"])
    assert written["labels"].tolist() == [2, 3]
