"""train.py: splits, samples, schedule; runs that end, resume, agree over processes and refuse bad input."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from evaluate import BDD100K, CLASSES, InputError, NuImages
from test_evaluate import write_nuimages

ROOT = Path(__file__).resolve().parent.parent
ROADS = ROOT / "tests" / "roads"
QUICK = ["--size", "64x64", "--steps", "3", "--batch", "2", "--pretrained", "none", "--clip", "none"]


def run(*args, **env):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, **env})


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Twelve training and three validation images of the sample."""
    root = tmp_path_factory.mktemp("few")
    for split, count in (("train", 12), ("val", 3)):
        stems = BDD100K(ROADS, split).stems[:count].tolist()
        for folder, ending in [("images/100k", "jpg"), *((f, "png") for f in evaluate.MASK_FOLDERS.values())]:
            (root / folder / split).mkdir(parents=True)
            for stem in stems:
                (root / folder / split / f"{stem}.{ending}").symlink_to(ROADS / folder / split / f"{stem}.{ending}")
        frames = json.loads((ROADS / f"labels/det_20/det_{split}.json").read_text())
        path = root / f"labels/det_20/det_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([f for f in frames if Path(f["name"]).stem in stems]))
    return root


# ------------------------------------------------------------------------------------ the split

class Labelled:
    """A data set of stems of which some are labelled for some tasks."""

    classes = CLASSES

    def __init__(self, **has):
        self.stems = np.array([f"s{i}" for i in range(len(has["semantic"]))])
        self.labelled, self.labels, self.split = {task: np.array(h, bool) for task, h in has.items()}, "somewhere", "train"

    def __len__(self):
        return len(self.stems)


def test_small_data_keeps_the_papers_proportions():
    data = Labelled(semantic=[1] * 370, detection=[1] * 370, drivable=[1] * 370)
    split = train.make_split(data, [], "disjoint_normal", 0)
    assert {task: len(stems) for task, stems in split.items()} == {"drivable": 200, "detection": 100, "semantic": 70}
    assert len(set().union(*split.values())) == 370
    assert split == train.make_split(data, [], "disjoint_normal", 0) != train.make_split(data, [], "disjoint_normal", 1)
    balance = train.make_split(data, data.stems[:70], "disjoint_balance", 0)
    assert {len(stems) for stems in balance.values()} == {100} and not set(data.stems[:70]) & set().union(*balance.values())
    assert all(len(stems) == 370 for stems in train.make_split(data, [], "full", 0).values())
    assert train.make_split(data, [], "disjoint_normal", 0, ["semantic"]) == {"semantic": split["semantic"]}


def test_bdd100k_gives_the_papers_numbers():
    """As in BDD100K: 7,000 semantic images, 3,000 of them among the 70,000 that have the other labels."""
    n = 74000
    data = Labelled(semantic=np.arange(n) < 7000, detection=np.arange(n) >= 4137, drivable=np.arange(n) >= 4000)
    split = train.make_split(data, [], "disjoint_normal", 0)
    assert {task: len(stems) for task, stems in split.items()} == {"drivable": 20000, "detection": 10000, "semantic": 7000}
    assert len(set().union(*split.values())) == 37000


def test_split_is_as_large_as_disjoint_sets_can_be():
    """Semantic labels are few and only where all others are too: the others must leave them alone."""
    data = Labelled(semantic=np.arange(200) < 14, detection=np.arange(200) < 120, drivable=np.ones(200))
    split = train.make_split(data, [], "disjoint_normal", 0)
    assert {task: len(stems) for task, stems in split.items()} == {"semantic": 14, "detection": 20, "drivable": 40}
    assert len(set().union(*split.values())) == 74


def test_split_without_labels_for_a_task_is_refused():
    with pytest.raises(InputError, match="no drivable labels"):
        train.make_split(Labelled(semantic=[1], detection=[1], drivable=[0]), [], "full", 0)
    assert set(train.make_split(Labelled(semantic=[1], detection=[1], drivable=[0]), [], "full", 0, ["semantic", "detection"])) == {
        "semantic", "detection"}


# -------------------------------------------------------------------------------------- samples

def test_truth_where_the_split_grants_it_else_pseudo_labels(few, tmp_path):
    data = BDD100K(few, "train")
    split = {"drivable": data.stems[:6].tolist(), "detection": data.stems[6:9].tolist(), "semantic": data.stems[9:].tolist()}
    samples = train.Samples(data, split, list(CLASSES))
    keys = [set(samples[n, (320, 180), False][1]) for n in (0, 6, 9)]
    assert keys == [{"drivable"}, {"boxes", "labels", "crowd"}, {"semantic"}]
    writer = evaluate.LabelWriter(tmp_path, "train")
    guess = {"boxes": torch.tensor([[1., 2, 3, 4]]), "scores": torch.tensor([1.]), "labels": torch.tensor([0]),
             "semantic": torch.full((180, 320), 7, dtype=torch.uint8), "drivable": torch.full((180, 320), 1, dtype=torch.uint8)}
    for file in data.files:
        writer.add(file, guess)
    writer.close()
    filled = train.Samples(data, split, list(CLASSES), BDD100K(few, "train", labels=tmp_path))
    image, target, *_ = filled[0, (320, 180), False]
    assert torch.equal(target["drivable"], data.target(0)["drivable"]) and target["semantic"].unique().tolist() == [7]
    assert target["boxes"].tolist() == [[1, 2, 3, 4]] and image.shape == (3, 180, 320)


def test_flip_and_resize_move_image_and_labels_together():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 30:50] = 200
    target = {"boxes": torch.tensor([[30., 10, 50, 20], [58, 0, 70, 5], [60, 0, 70, 5]]), "labels": torch.tensor([3, 4, 5]),
              "crowd": torch.tensor([False, True, False]), "semantic": (image[0] > 0).to(torch.uint8)}
    image, target = train.augment(image, target, (120, 80), flip=True)
    assert target["boxes"].tolist() == [[20, 20, 60, 40], [0, 0, 4, 10]] and target["labels"].tolist() == [3, 4]
    assert (image[0, 24:36, 24:56] == 200).all() and image[0, :, 64:].max() == 0
    assert target["semantic"].sum() == 20 * 40 and (target["semantic"][20:40, 20:60] == 1).all()


def test_order_is_a_pure_function_of_the_seed_and_shares_out_over_processes():
    make = lambda start=0, **more: list(train.Order([np.arange(10)], np.zeros(6, int), 4, start, 7, [(64, 64), (96, 64)], **more))            # noqa: E731
    everything = make()
    assert make(start=3) == everything[3:]
    assert sorted(n for batch in everything[:5] for n, _, _ in batch[:4]) == sorted(list(range(10)) * 2)      # two epochs
    assert all(len({size for _, size, _ in batch}) == 1 for batch in everything) and len({b[0][1] for b in everything}) == 2
    ranks = [make(rank=r, world=2, accum=2) for r in range(2)]
    assert len(ranks[0]) == 12 and all(len(batch) == 1 for batch in ranks[0])
    for step in range(6):
        assert {key for r in ranks for part in r[2 * step:2 * step + 2] for key in part} == set(everything[step])


def test_tasks_take_turns():
    class Few:
        rows, own = np.arange(2, 12), {"semantic": np.arange(20) < 4, "drivable": np.arange(20) >= 4}

        def __len__(self):
            return 10
    groups, turns = train.take_turns(Few(), "round-robin", 6, 0)
    assert [group.tolist() for group in groups] == [[0, 1], [2, 3, 4, 5, 6, 7, 8, 9]] and turns.tolist() == [0, 1, 0, 1, 0, 1]
    order = lambda start: [[n for n, *_ in batch] for batch in train.Order(groups, turns, 4, start, 7, [(64, 64)])]      # noqa: E731
    assert all(set(batch) == {0, 1} for batch in order(0)[::2]) and sorted(sum(order(0)[1:4:2], [])) == list(range(2, 10))
    assert order(3) == order(0)[3:]
    _, turns = train.take_turns(Few(), "weighted", 5000, 0)
    assert turns.mean() == pytest.approx(0.8, abs=0.02)
    groups, turns = train.take_turns(Few(), "mixed", 5, 0)
    assert groups[0].tolist() == list(range(10)) and not turns.any()


def test_learning_rate_warms_up_and_decays():
    rates = [train.learning_rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1 and 0 < rates[-1] < 0.03
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert train.learning_rate(0, 1, 1000) == 1                             # no warm-up longer than a quarter


# ----------------------------------------------------------------------------------------- runs

def test_all_stages_end_and_evaluate_repeats_the_scores(few, tmp_path):
    out = tmp_path / "run"
    ended = run("train.py", "--data", str(few), "--profile", "tiny", "--stage", "finetune", "--out", str(out), *QUICK)
    assert ended.returncode == 0, ended.stderr
    for line in ("plan: bdd100k, setting disjoint_normal", "drivable 6, detection 3, semantic 2", "RANDOM body weights", "LV-Adapter", "CLIP text tower"):
        assert line in ended.stdout
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.pt")} == {
        "teachers/drivable.pt", "teachers/detection.pt", "teachers/semantic.pt", "adapt.pt", "finetune.pt"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"step", "lr", "detection_class", "semantic_dice", "images_per_s", "memory_mb", "norm"} <= set(log[-2])
    split = json.loads((out / "split.json").read_text())
    pseudo = {p.stem for p in (out / "pseudo/labels/drivable/masks/train").iterdir()}
    assert pseudo == set(split["detection"]) | set(split["semantic"])
    scored = run("evaluate.py", "--ckpt", str(out / "finetune.pt"), "--json", str(tmp_path / "scores.json"), "--show", str(tmp_path / "show"), "--count", "1")
    assert scored.returncode == 0, scored.stderr
    final = ended.stdout.split("finetune ")[-1].splitlines()[1:]            # the table's rows
    assert final[0].split() and all(line in scored.stdout for line in final)
    scores = json.loads((tmp_path / "scores.json").read_text())
    saved = torch.load(out / "finetune.pt", weights_only=True)
    assert {task: scores[task] for task in CLASSES} == {task: saved["scores"][task] for task in CLASSES} and "RANDOM body" in scores["notes"][0]
    assert len(list((tmp_path / "show").iterdir())) == 1
    again = run("train.py", "--data", str(few), "--profile", "tiny", "--stage", "finetune", "--out", str(out), *QUICK)
    assert again.returncode == 0 and again.stdout.count("done") == 6        # nothing is run twice


def test_frozen_means_frozen_through_the_adapt_stage(few, tmp_path):
    ended = run("train.py", "--data", str(few), "--profile", "tiny", "--stage", "adapt", "--out", str(tmp_path), *QUICK)
    assert ended.returncode == 0, ended.stderr
    adapt = torch.load(tmp_path / "adapt.pt", weights_only=True)
    opened = train.start(train.parse_args(["--data", str(few), "--profile", "tiny", "--out", str(tmp_path), *QUICK]))
    born = train.new_model(opened, list(CLASSES), language=True, teachers=train.taken_over(opened))
    for task, prefixes in {"semantic": "heads.semantic.", "drivable": ("body.", "adapter.", "heads.drivable.")}.items():
        teacher = torch.load(tmp_path / f"teachers/{task}.pt", weights_only=True)["model"]
        assert all(torch.equal(value, teacher[name]) for name, value in born.state_dict().items() if name.startswith(prefixes))
    same = {name: torch.equal(value, adapt["model"][name]) for name, value in born.state_dict().items()}
    assert all(same[name] for name in same if name.startswith("body."))
    assert not any(name.startswith("text.tower") for name in adapt["model"])     # the tower comes from its file or seed
    assert not any(value for name, value in same.items() if name.startswith(("adapter.", "lv_adapter.", "text.contexts")) and name.endswith("weight"))


@pytest.mark.parametrize("size, level", [("255x144", 4), ("256x144", 5)])
def test_the_queries_read_p5_where_it_is_8_cells_wide(few, tmp_path, size, level):
    opened = train.start(train.parse_args(["--data", str(few), "--profile", "tiny", "--out", str(tmp_path), *QUICK, "--size", size]))
    assert train.new_model(opened, ["semantic"]).heads["semantic"].memory_level == level


def steps(few, out, count, monkeypatch, stop=None, **changes):
    """Trains a tiny joint model for `count` steps in this process; raises at step `stop`."""
    args = ["--data", str(few), "--profile", "tiny", "--out", str(out), *QUICK, "--accum", "2", "--ema", "0.9", "--uncertainty"]
    monkeypatch.setitem(train.hmpl.PROFILES["tiny"], "dropout", 0.1)        # as in the paper profile
    opened = train.start(train.parse_args(args))
    evaluate.write_json(out / "config.json", opened.config)
    evaluate.write_json(out / "split.json", opened.split)
    model = train.new_model(opened, list(CLASSES), language=True)
    real = train.one_step

    def counting(*a):
        counting.done += 1
        if counting.done == stop:
            raise KeyboardInterrupt
        return real(*a)
    counting.done = 0
    monkeypatch.setattr(train, "one_step", counting)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)                          # a checkpoint at every step
    try:
        return train.train(opened, model, train.Samples(opened.train, opened.split, list(CLASSES)), "adapt", count, opened.path("adapt"))
    finally:
        monkeypatch.setattr(train, "one_step", real)


def test_resumed_training_is_bit_identical(few, tmp_path, monkeypatch):
    whole = steps(few, tmp_path / "whole", 10, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        steps(few, tmp_path / "parts", 10, monkeypatch, stop=6)
    parts = steps(few, tmp_path / "parts", 10, monkeypatch)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    a, b = (torch.load(tmp_path / name / "adapt.pt", weights_only=True) for name in ("whole", "parts"))
    assert a["scores"] == b["scores"] and a["step"] == b["step"] == 10


KILLABLE = """
import sys
sys.path.insert(0, {root!r})
import train
train.SAVE_SECONDS, train.LOG_STEPS, train.CHUNK = 0, 1, 2       # writes all the time
train.main({args!r})
"""


def killed(folder, out, data, moments, steps=6, number=signal.SIGKILL):
    """Runs all stages, ended by a signal at each of the moments (seconds after the first output) and started again;
    returns how often it was really ended, the weights and the log."""
    args = ["--data", str(data), "--profile", "tiny", "--out", str(out), "--setting", "disjoint_normal", "--stage", "all", *QUICK,
            "--steps", str(steps), "--ema", "0.5"]
    script, count = folder / "killable.py", 0
    script.write_text(KILLABLE.format(root=str(ROOT), args=args))
    for moment in [*moments, None]:
        process = subprocess.Popen([sys.executable, "-u", str(script)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if moment is not None:
            process.stdout.readline()
            time.sleep(moment)
            process.send_signal(number)
        said, error = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), error
        ended = process.returncode != 0 or "the same command goes on" in said
        count += ended
        if not ended:
            break
    assert not ended, said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("images_per_s", None), line.pop("memory_mb", None)              # these are the machine's
    return count, torch.load(out / "finetune.pt", weights_only=True)["model"], log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(few, tmp_path, number):
    moments = np.random.default_rng(0).uniform(0.1, 4, 2).tolist()
    _, expected, log = killed(tmp_path, tmp_path / "whole", few, [])
    count, weights, again = killed(tmp_path, tmp_path / "parts", few, moments, number=number)
    assert count == 2 and all(torch.equal(value, weights[key]) for key, value in expected.items()) and again == log
    left = {file.suffix for file in (tmp_path / "parts").rglob("*") if file.is_file() and file.parent.name != "cache"}
    assert left <= {".pt", ".json", ".jsonl", ".png", ".part"}
    assert (tmp_path / "parts/pseudo/report.json").read_text() == (tmp_path / "whole/pseudo/report.json").read_text()


@pytest.mark.parametrize("heads", ["transformer", "conv"])
def test_pseudo_labels_broken_off_anywhere_end_the_same(few, tmp_path, monkeypatch, heads):
    """One image cannot be read; batches of another size would round other scores."""
    opened = train.start(train.parse_args(["--data", str(few), "--profile", "tiny", "--heads", heads, "--out", str(tmp_path / "run"), *QUICK]))
    opened.config["steps"], real, pseudo = 1, BDD100K.image, tmp_path / "run/pseudo"
    train.run_teachers(opened)

    def image(self, i):
        if self.stems[i] == opened.split["drivable"][0]:
            raise InputError("it is broken.")
        return real(self, i)
    monkeypatch.setattr(BDD100K, "image", image)
    monkeypatch.setattr(train, "BAD_SHARE", 0.2)
    monkeypatch.setattr(train, "CHUNK", 2)
    add = evaluate.LabelWriter.add

    def made(stop):
        def broken_off(self, name, prediction):
            if stop and "boxes" not in prediction:                                # not when the boxes are written at the end
                broken_off.count += 1
                if broken_off.count > stop:
                    self.flush()                                                  # its threads would end with the process
                    raise KeyboardInterrupt
            add(self, name, prediction)
        broken_off.count = 0
        with monkeypatch.context() as m:
            m.setattr(evaluate.LabelWriter, "add", broken_off)
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    train.run_pseudo(opened)
                stop = None
            train.run_pseudo(opened)
        files = {path.relative_to(pseudo): path.read_bytes() for path in pseudo.rglob("*") if path.is_file()}
        shutil.rmtree(pseudo)
        return files
    whole = made(None)
    assert len(whole) > 12 and not any(path.suffix == ".npz" for path in whole)
    for stop in (1, 3, 6, 9):
        assert made(stop) == whole


def test_a_damaged_checkpoint_gives_way_to_the_one_before(few, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        steps(few, tmp_path, 4, monkeypatch, stop=4)
    assert torch.load(tmp_path / "adapt.old", weights_only=True)["step"] == 2
    (tmp_path / "adapt.pt").write_bytes((tmp_path / "adapt.pt").read_bytes()[:1000])
    ended = steps(few, tmp_path, 4, monkeypatch)
    whole = steps(few, tmp_path / "whole", 4, monkeypatch)
    assert all(torch.equal(value, ended.state_dict()[key]) for key, value in whole.state_dict().items())
    assert not (tmp_path / "adapt.old").exists()


def test_what_a_result_came_from_is_kept(few, tmp_path):
    args = ["train.py", "--data", str(few), "--profile", "tiny", "--setting", "full", "--out", str(tmp_path), "--stage", "adapt", *QUICK]
    assert run(*args).returncode == 0
    config = torch.load(tmp_path / "adapt.pt", weights_only=True)["config"]
    assert config == json.loads((tmp_path / "config.json").read_text()) | {"scales": config["scales"]}
    assert config["origin"]["command"].startswith("train.py --data") and config["origin"]["torch"] == torch.__version__ and config["seed"] == 0
    boxes = json.loads((few / "labels/det_20/det_val.json").read_text())
    path = few / "labels/det_20/det_val.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(boxes[1:]))
        refused(*args, message="images " + config["images"] + " -> ")
    finally:
        path.write_text(before)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The file size limit stands in for the disk's end."""
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path)!r}) / "x.pt"
train.save(path, {{"model": {{"w": torch.ones(10)}}}})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    train.save(path, {{"model": {{"w": torch.ones(1 << 18)}}}})
except OSError as error:
    print(error)
"""
    ended = run("-c", code)
    assert "x.pt" in ended.stdout and "3 MB are needed and the last checkpoint is unharmed" in ended.stdout, ended.stderr
    assert torch.load(tmp_path / "x.pt", weights_only=True)["model"]["w"].shape == (10,) and len(list(tmp_path.iterdir())) == 1


TWO_RANKS = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
from test_hmpl import make_model, random_images, random_target
dist.init_process_group("gloo")
rank = dist.get_rank()
images, (a, b) = random_images((64, 96), (64, 96)), [random_target(64, 96, seed, boxes=5) for seed in (0, 1)]
targets = [{{key: a[key] for key in ("boxes", "labels", "crowd")}}, {{key: b[key] for key in ("semantic", "drivable")}}]
model = make_model().eval()                      # eval: BatchNorm would see one image instead of two
model.text_features = model.text_features.detach()
parallel = torch.nn.parallel.DistributedDataParallel(model, static_graph=True)
for step in range(2):
    model.zero_grad()
    total = sum(parallel(images[rank:rank + 1], targets[rank:rank + 1]).values())
    total.backward()
total = total.detach()
dist.all_reduce(total)
dist.destroy_process_group()
alone = make_model().eval()
joint = sum(alone(images, targets).values())
joint.backward()
if rank == 0:
    grads = [(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters()) if q.grad is not None]
    whole = torch.stack([q.norm() for _, q in grads]).norm()
    worst = max(((p - q).norm() / (q.norm() + 1e-5 * whole)).item() for p, q in grads)   # some are zero but for rounding
    print("RESULT", abs(total.item() / 2 / joint.item() - 1), worst, len(grads))
"""


def test_two_processes_with_disjoint_tasks_equal_one(tmp_path):
    """Each rank has labels for other tasks: losses and gradients average to those of the joint batch."""
    (tmp_path / "two.py").write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    ended = run("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611", str(tmp_path / "two.py"))
    assert ended.returncode == 0, ended.stderr
    loss, gradient, count = map(float, ended.stdout.split("RESULT")[1].split())
    assert loss < 1e-5 and gradient < 1e-3 and count > 100


COMING_AND_GOING = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
from test_hmpl import make_model, random_images, random_target
dist.init_process_group("gloo")
rank = dist.get_rank()
model = make_model(heads="conv", uncertainty=True, pixel_text=True)
parallel = torch.nn.parallel.DistributedDataParallel(model, static_graph=True)
target = random_target(64, 96, rank)
boxes, masks = {{key: target[key] for key in ("boxes", "labels", "crowd")}}, {{key: target[key] for key in ("semantic", "drivable")}}
for targets in ([boxes, masks], [masks, boxes], [{{}}, target], [target, {{}}], [{{}}, {{}}]):
    model.zero_grad()
    sum(parallel(random_images((64, 96), seed=rank), [targets[rank]]).values()).backward()
    total = torch.stack([p.grad.double().sum() for p in model.parameters() if p.requires_grad]).sum()
    other = [torch.zeros_like(total) for _ in range(2)]
    dist.all_gather(other, total)
    if rank == 0:
        print("SAME", bool(other[0] == other[1]), bool(total.isfinite()))
del parallel                                        # its hooks hold the process group
dist.barrier()
dist.destroy_process_group()
"""


def test_labels_that_come_and_go_never_stop_two_processes(tmp_path):
    """Convolutional heads, whose losses are made inside: every rank has the same graph whatever its images are labelled for."""
    (tmp_path / "two.py").write_text(COMING_AND_GOING.format(root=str(ROOT), tests=str(ROOT / "tests")))
    ended = run("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29613", str(tmp_path / "two.py"))
    assert ended.returncode == 0 and ended.stdout.count("SAME True True") == 5, ended.stdout + ended.stderr


@pytest.mark.parametrize("options, files", [
    (["--tasks", "semantic", "--adapter", "pre_scalar+lv"], {"adapt.pt", "finetune.pt"}),
    (["--labels", "own", "--sampler", "round-robin", "--scheme", "pretrain-finetune", "--adapter", "post"], {"finetune.pt"}),
    (["--setting", "full", "--stage", "all", "--heads", "conv", "--early-language"], {"adapt.pt", "finetune.pt"}),
    (["--setting", "full", "--pixel-text", "--shared-pixel-decoder", "--uncertainty", "--ema", "0.9"], {"adapt.pt", "finetune.pt"}),
])
def test_other_experiments_run_the_stages_they_need(few, tmp_path, options, files):
    ended = run("train.py", "--data", str(few), "--profile", "tiny", "--out", str(tmp_path / "run"), *QUICK, *options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {file.name for file in (tmp_path / "run").rglob("*.pt")} == files and not (tmp_path / "run/pseudo").exists()
    saved = torch.load(tmp_path / "run/finetune.pt", weights_only=True)
    assert saved["steps"] == (3 if "pretrain-finetune" in options else 2) and set(saved["scores"]) - {"images"} == set(saved["model_config"]["classes"])
    assert ("text_features" in saved["model"]) == ("post" not in options)
    scored = run("evaluate.py", "--ckpt", str(tmp_path / "run/finetune.pt"))
    assert scored.returncode == 0 and scored.stdout.splitlines()[-6:] == ended.stdout.splitlines()[-6:], scored.stderr


def test_thresholds_say_what_becomes_a_pseudo_label(few, tmp_path):
    args = ["train.py", "--data", str(few), "--profile", "tiny", "--stage", "pseudo", "--heads", "conv", *QUICK]
    ended = run(*args, "--out", str(tmp_path / "all"), "--threshold", "detection=0,semantic=0,drivable=0")
    assert ended.returncode == 0 and ended.stdout.count("100% of") == 3, ended.stdout + ended.stderr
    ended = run(*args, "--out", str(tmp_path / "none"), "--threshold", "detection=1,semantic=1,drivable=1")
    assert ended.returncode == 0 and ended.stdout.count(" 0% of") == 3 and ended.stdout.count("where there is ground truth") == 3, ended.stdout
    report = json.loads((tmp_path / "none/pseudo/report.json").read_text())
    assert report["detection"]["boxes_per_image"] == report["semantic"]["kept_pixels"] == 0
    args = ["train.py", "--data", str(few), "--profile", "tiny", "--out", str(tmp_path / "third"), "--seed", "7", *QUICK]
    ended = run(*args, "--labels-of", str(tmp_path / "all"))              # another experiment with the same labels
    assert ended.returncode == 0 and {file.name for file in (tmp_path / "third").rglob("*.pt")} == {"adapt.pt", "finetune.pt"}, ended.stderr
    assert (tmp_path / "third/split.json").read_text() == (tmp_path / "all/split.json").read_text()
    refused(*args[:-6], "--setting", "full", *QUICK, "--out", str(tmp_path / "x"), "--labels-of", str(tmp_path / "all"), message="is of other data (setting disjoint_normal)")
    refused(*args, "--out", str(tmp_path / "x"), "--labels-of", str(tmp_path / "third"), message="no finished pseudo labels")


def test_an_unreadable_image_has_no_pseudo_label(few, tmp_path, capsys, monkeypatch):
    opened = train.start(train.parse_args(["--data", str(few), "--profile", "tiny", "--out", str(tmp_path), *QUICK]))
    opened.config["steps"] = 1
    train.run_teachers(opened)
    real = BDD100K.image

    def image(self, i):
        if self.stems[i] == opened.split["drivable"][0]:
            raise InputError("it is broken.")
        return real(self, i)
    monkeypatch.setattr(BDD100K, "image", image)
    with pytest.raises(InputError, match="1 of [0-9]+ images that lack [a-z]+ labels cannot be used"):
        train.run_pseudo(opened)
    monkeypatch.setattr(train, "BAD_SHARE", 0.2)
    train.run_pseudo(opened)
    assert "no pseudo label for images/100k/train" in capsys.readouterr().err
    pseudo = train.pseudo_labels(opened)
    lacks = {task: set(opened.train.stems) - set(stems) - set(pseudo.stems[pseudo.labelled[task]]) for task, stems in opened.split.items()}
    unused = set(opened.train.stems) - set().union(*opened.split.values())
    assert lacks == {task: unused | ({opened.split["drivable"][0]} if task != "drivable" else set()) for task in opened.split}
    monkeypatch.setattr(train, "BAD_SHARE", 0.01)
    with pytest.raises(InputError, match="has no detection labels for 1 of the"):
        train.pseudo_labels(opened)


def test_averaged_weights_follow_and_are_what_is_scored(few, tmp_path, monkeypatch):
    model = torch.nn.BatchNorm1d(2)
    ema = {key: value.clone() for key, value in model.state_dict().items()}
    model.weight.data += 1
    model.num_batches_tracked += 3
    train.average(ema, model, 0.25)
    assert ema["weight"].tolist() == [1.25, 1.25] and ema["num_batches_tracked"] == 3 and model.weight.tolist() == [2, 2]
    averaged = steps(few, tmp_path, 3, monkeypatch).state_dict()
    saved = torch.load(tmp_path / "adapt.pt", weights_only=True)["model"]
    assert all(torch.equal(value, averaged[key]) for key, value in saved.items())


def test_two_processes_train_and_save_once(few, tmp_path):
    ended = run("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29612", "train.py", "--data", str(few), "--profile",
                "tiny", "--stage", "adapt", "--out", str(tmp_path / "run"), *QUICK)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert torch.load(tmp_path / "run/adapt.pt", weights_only=True)["step"] == 1 and ended.stdout.count("plan: ") == 1


def test_two_processes_resume_bit_identically(few, tmp_path):
    """One of them is killed at its fifth step, the other one's share of dropout and samples comes back too."""
    (tmp_path / "resumes.py").write_text(RESUMES.format(root=str(ROOT)))

    def two(out, **env):
        return run("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29615", str(tmp_path / "resumes.py"), "--data", str(few),
                   "--profile", "tiny", "--setting", "full", "--scheme", "pretrain-finetune", "--out", str(tmp_path / out), *QUICK,
                   "--steps", "7", "--ema", "0.9", **env)
    assert two("whole").returncode == 0
    assert two("parts", KILL_AT="5").returncode and torch.load(tmp_path / "parts/finetune.pt", weights_only=True)["step"] == 4
    ended = two("parts")
    assert ended.returncode == 0 and "resumes at step 4" in ended.stdout, ended.stderr[-3000:]
    whole, parts = (torch.load(tmp_path / out / "finetune.pt", weights_only=True) for out in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][key]) for key, value in whole["model"].items())
    assert parts["scores"] == whole["scores"] and len(whole["rng"]) == 2


RESUMES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
train.SAVE_SECONDS, real = -1, train.one_step
train.hmpl.PROFILES["tiny"]["dropout"] = 0.1
def one_step(*args):
    one_step.done += 1
    if os.environ.get("KILL_AT") == str(one_step.done) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
one_step.done = 0
train.one_step = one_step
train.main()
"""


def test_nuimages_is_learned_and_scored(tmp_path):
    for split in ("train", "val"):
        write_nuimages(tmp_path / "data", split)
    ended = run("train.py", "--dataset", "nuimages", "--data", str(tmp_path / "data"), "--profile", "tiny", "--stage", "all", "--out",
                str(tmp_path / "run"), *QUICK)
    assert ended.returncode == 1 and "apart from images that are in the validation set too" in ended.stderr, ended.stderr
    frames = json.loads((tmp_path / "data/v1.0-val/sample_data.json").read_text())
    (tmp_path / "data/v1.0-val/sample_data.json").write_text(json.dumps([f | {"filename": f["filename"].replace("n003", "n004")} for f in frames]))
    for file in (tmp_path / "data/samples/CAM_FRONT").glob("n003*"):
        shutil.copy(file, file.with_name(file.name.replace("n003", "n004")))
    args = ["train.py", "--dataset", "nuimages", "--data", str(tmp_path / "data"), "--profile", "tiny", "--out", str(tmp_path / "run"), *QUICK]
    ended = run(*args)
    assert ended.returncode == 0 and "detection 2, semantic 2" in ended.stdout, ended.stderr
    scored = run("evaluate.py", "--ckpt", str(tmp_path / "run/finetune.pt"), "--save", str(tmp_path / "saved"), "--show", str(tmp_path / "show"))
    assert scored.returncode == 0 and scored.stdout.splitlines()[-9:] == ended.stdout.splitlines()[-9:], scored.stderr
    assert len(list((tmp_path / "show").iterdir())) == 2 and len(list((tmp_path / "saved").rglob("*.png"))) == 2
    assert set(torch.load(tmp_path / "run/finetune.pt", weights_only=True)["scores"]) == {"detection", "semantic", "images"}


def test_runs_are_printed_side_by_side(tmp_path):
    def finished(name, seed, adapter, iou, scores=True):
        train.save(tmp_path / name / "finetune.pt", {
            "stage": "finetune", "step": 9, "steps": 9, "notes": [], "scores": {"semantic": {"mIoU": iou}, "images": 3} if scores else None,
            "config": {"seed": seed, "adapter": adapter, "data": name, "origin": {"command": name}}, "model_config": {"classes": {}}, "model": {"w": torch.zeros(1)}})
        return str(tmp_path / name)
    paths = [finished("a", 0, ["lv"], 10.), finished("b", 1, ["lv"], 14.), finished("c", 0, ["fpn"], 9.)]
    lines = run("tests/table.py", *paths).stdout.splitlines()
    assert [line.split(" | ")[:2] + [line.split(" | ")[5]] for line in lines[2:]] == [
        ["| adapter ['lv']", "2", "12.0 ± 2.8"], ["| adapter ['fpn']", "1", "9.0"]]
    refused("tests/table.py", finished("d", 0, ["lv"], 1., scores=False), message="no stage that is finished")


@pytest.mark.parametrize("how", ["a bad file", "killed"])
def test_a_process_that_dies_stops_the_others_soon(few, tmp_path, how):
    root = tmp_path / "data"
    shutil.copytree(few, root)
    if how == "a bad file":
        for file in sorted((root / "labels/sem_seg/masks/train").iterdir())[::2]:
            file.write_bytes(b"no PNG")                                         # the first teacher's
    script = tmp_path / "dies.py"
    script.write_text(DIES.format(root=str(ROOT), killed=how == "killed"))
    began = time.monotonic()
    ended = run("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29614", str(script), "--data", str(root), "--profile", "tiny",
                "--out", str(tmp_path / "run"), *QUICK, "--steps", "4000")
    assert ended.returncode and time.monotonic() - began < 90                   # a minute after the first steps
    assert ("cannot be read as an image" if how == "a bad file" else "Signal 9 (SIGKILL)") in ended.stderr, ended.stderr[-3000:]


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
real = train.one_step
def one_step(*args):
    one_step.done += 1
    if {killed} and one_step.done == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
one_step.done = 0
train.one_step = one_step
train.main()
"""


# ------------------------------------------------------------------------------------ bad input

def refused(*args, message):
    ended = run(*args)
    assert ended.returncode in (1, 2) and "Traceback" not in ended.stderr, ended.stderr
    assert message in ended.stderr.strip().splitlines()[-1], ended.stderr


def test_bad_input_is_one_sentence_and_nothing_is_lost(few, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    refused("train.py", "--data", str(tmp_path / "nowhere"), *out, message="no data folder")
    refused("train.py", "--data", str(few), "--size", "axb", "--profile", "tiny", *out, message="expected WIDTHxHEIGHT")
    refused("train.py", "--data", str(few), "--pretrained", str(tmp_path / "no.pth"), "--clip", "none", *out, message="no file")
    refused("train.py", "--data", str(few), "--profile", "tiny", "--sampler", "weighted", *QUICK, *out, message="add --labels own")
    refused("train.py", "--data", str(few), "--profile", "tiny", "--scheme", "pretrain-finetune", "--stage", "adapt", *QUICK, *out,
            message="there are only teachers, pseudo, finetune")
    for options, message in [(["--dataset", "nuimages", "--tasks", "drivable"], "nuimages has detection, semantic"),
                             (["--dataset", "nuimages", "--setting", "disjoint_normal"], "use --setting full"),
                             (["--adapter", "fpn", "--pixel-text"], "add +lv"), (["--tasks", "detection", "--pixel-text"], "needs a task with masks"),
                             (["--heads", "conv", "--shared-pixel-decoder"], "--heads transformer"),
                             (["--threshold", "detection=2"], "expected TASK=NUMBER"), (["--ema", "1"], "between 0 and 1")]:
        with pytest.raises((InputError, SystemExit)) as stopped:
            train.make_config(train.parse_args([*options, *QUICK]), few, BDD100K(few) if "nuimages" not in options else NuImages, [])
        assert message in str(stopped.value) + capsys.readouterr().err
    refused("evaluate.py", "--ckpt", str(tmp_path / "no.pt"), message="no checkpoint")
    text = tmp_path / "text.pt"
    text.write_text("no checkpoint")
    refused("evaluate.py", "--ckpt", str(text), message="is not a checkpoint of train.py")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"cache"}
    shutil.rmtree(tmp_path / "run")
    assert run("train.py", "--data", str(few), "--profile", "tiny", "--dry-run", *out, *QUICK).returncode == 0
    assert not (tmp_path / "run").exists()


def test_changed_options_are_refused_by_name(few, tmp_path):
    args = ["train.py", "--data", str(few), "--profile", "tiny", "--out", str(tmp_path), "--stage", "teachers", *QUICK]
    assert run(*args).returncode == 0
    refused(*args, "--seed", "5", message="seed 0 -> 5")


def test_checkpoint_of_another_class_list_is_refused(few, tmp_path):
    args = ["train.py", "--data", str(few), "--profile", "tiny", "--out", str(tmp_path), "--stage", "teachers", *QUICK]
    assert run(*args).returncode == 0
    saved = torch.load(tmp_path / "teachers/drivable.pt", weights_only=True)
    saved["model_config"]["classes"]["drivable"] = ("mine", "yours", "background")
    torch.save(saved, tmp_path / "other.pt")
    refused("evaluate.py", "--ckpt", str(tmp_path / "other.pt"), message="drivable classes are mine, yours, background; the data's are direct")


def test_one_unreadable_image_in_a_hundred_is_replaced(tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(ROADS, root)
    opened = train.start(train.parse_args(["--data", str(root), "--profile", "tiny", "--setting", "full", "--out", str(tmp_path / "run"), *QUICK]))
    samples, stems = train.Samples(opened.train, opened.split, ["drivable"]), opened.train.stems
    for n in (7, 8):
        (root / "labels/drivable/masks/train" / f"{stems[n]}.png").write_bytes(b"no PNG")
    key = (64, 64), False
    image, target, file, unreadable = samples[7, *key]
    assert file == opened.train.files[9] and list(unreadable) == opened.train.files[7:9].tolist()
    assert torch.equal(image, samples[9, *key][0]) and "cannot be read as an image" in list(unreadable.values())[0]
    with pytest.raises(InputError, match="cannot be read"):
        train.Samples(opened.train, opened.split, ["drivable"], strict=True)[7, *key]
    training = train.Training(opened, train.new_model(opened, ["drivable"]), len(samples), "adapt", 9, tmp_path / "x.pt")
    training.step = 2
    for _ in range(2):
        training.note_unreadable(unreadable)                                    # the same two of 800
    assert capsys.readouterr().err.count("another image stands in") == 2
    training.note_unreadable({f"{n}.jpg": "is broken." for n in range(6)})
    with pytest.raises(InputError, match="9 of 800 images cannot be used"):
        training.note_unreadable({"x.jpg": "x.jpg is broken."})
    training.step, training.unreadable = 1, {}
    with pytest.raises(InputError, match="1 of 800"):
        training.note_unreadable({"x.jpg": "x.jpg is broken."})                  # in the first batch


def test_losses_that_stay_infinite_end_the_run_by_name(few, tmp_path, monkeypatch):
    monkeypatch.setattr(train.hmpl.HMPL, "forward", lambda self, images, targets: {
        "semantic_dice": sum(p.sum() for p in self.parameters() if p.requires_grad) * math.inf})
    with pytest.raises(InputError, match="semantic_dice not finite for 10 steps up to 10, with images/100k/train/.*jpg"):
        steps(few, tmp_path, 30, monkeypatch)


def test_a_broken_training_file_stops_the_run_with_its_name(few, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(few, root)
    for name in BDD100K(root, "train").stems:
        path = root / "labels/drivable/masks/train" / f"{name}.png"
        path.unlink()
        Image.new("RGB", (320, 180)).save(path)
    args = ["--data", str(root), "--profile", "tiny", "--out", str(tmp_path / "run"), *QUICK]
    refused("train.py", *args, message="mode RGB, not class ids")
    refused("train.py", *args, "--workers", "1", message="train.py: none of the 6 images can be read: " + str(root))      # a worker's error, unwrapped
    image = next((root / "images/100k/train").iterdir())
    shutil.rmtree(root / "labels/drivable")
    shutil.copytree(few / "labels/drivable", root / "labels/drivable")
    data = image.read_bytes()
    for name in BDD100K(root, "train").files:
        (root / name).unlink()
        (root / name).write_bytes(data[:len(data) // 2])
    refused("train.py", *args, message="cannot be read as an image")


def test_validation_may_lack_a_tasks_labels(few, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(few, root)
    shutil.rmtree(root / "labels/drivable/masks/val")
    ended = run("train.py", "--data", str(root), "--profile", "tiny", "--stage", "teachers", "--out", str(tmp_path / "run"), *QUICK)
    assert ended.returncode == 0, ended.stderr
    assert torch.load(tmp_path / "run/teachers/drivable.pt", weights_only=True)["scores"] == {"images": 0}


@pytest.mark.parametrize("heads", ["transformer", "conv"])
def test_nearly_nothing_to_learn_from_is_no_error(few, tmp_path, heads):
    """An image for each task and one to validate: no boxes, masks of which all is ignored, batches of one."""
    root = tmp_path / "data"
    for split, count in (("train", 3), ("val", 1)):
        stems = BDD100K(few, split).stems[:count].tolist()
        (root / "images/100k" / split).mkdir(parents=True)
        for stem in stems:
            shutil.copy(few / f"images/100k/{split}/{stem}.jpg", root / f"images/100k/{split}")
        for folder in evaluate.MASK_FOLDERS.values():
            (root / folder / split).mkdir(parents=True)
            for stem in stems:
                Image.fromarray(np.full((180, 320), 255, np.uint8)).save(root / folder / split / f"{stem}.png")
        evaluate.write_json(root / f"labels/det_20/det_{split}.json", [{"name": f"{stem}.jpg", "labels": None} for stem in stems])
    ended = run("train.py", "--data", str(root), "--profile", "tiny", "--setting", "disjoint_normal", "--stage", "all", "--heads", heads,
                "--out", str(tmp_path / "run"), *QUICK, "--batch", "1", "--threshold", "detection=1,semantic=1")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "NOTE: no detection pseudo label is left" in ended.stdout and "--threshold detection=0.05" in ended.stdout
    losses = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in losses if "norm" in line for value in line.values() if isinstance(value, float))


def test_boxes_without_area_are_no_predictions(few, tmp_path):
    """A proposal that drifts off the image is clamped to a line: neither scored nor written."""
    def drifted(rows, images):
        boxes = torch.tensor([[0., 5, 0, 10], [319.99, 5, 320, 10], [4, 4, 4.01, 9]])
        return [{"boxes": boxes, "scores": torch.ones(3), "labels": torch.tensor([1, 2, 3])} for _ in images]
    data, writer = BDD100K(few, "train"), evaluate.LabelWriter(tmp_path, "train")
    for i, _, _, prediction in evaluate.predictions(drifted, data, [0], torch.device("cpu"), batch=1):
        writer.add(data.files[i], prediction)
    writer.close()
    assert BDD100K(few, "train", labels=tmp_path).target(0, ["detection"])["labels"].tolist() == [2, 3]
