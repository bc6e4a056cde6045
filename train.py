"""Trains HMPL: teachers -> pseudo labels -> adapt -> finetune; a run goes on where it stopped.

    python train.py --setting disjoint_normal --stage adapt         # BDD100K, or the drawn sample
    torchrun --nproc_per_node=8 train.py --setting full --data data/bdd100k
    python train.py --setting disjoint_balance --dry-run            # only the plan

pretrain-adapt-finetune ("Effective Adaptation in Multi-Task Co-Training for Unified Autonomous
Driving", NeurIPS 2022): a pretrained body is frozen while adapters, prompts' contexts and heads
learn from all tasks (adapt, a third of the budget), then everything learns (finetune, two thirds).
Images are labelled for one task each; single-task teachers fill in the rest with pseudo labels.

Like make, a stage first runs whatever it needs that is not there yet. One run folder holds it all:
config.json, split.json, teachers/TASK.pt, pseudo/ (BDD100K's layout), adapt.pt, finetune.pt,
log.jsonl, curves.png and pictures/ to watch it, lock, which the process that runs holds, and cache/
with the labels once read, which may be deleted.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

import evaluate
import hmpl
import prompts
from evaluate import BDD100K, InputError, LabelledImages

STAGES = ("teachers", "pseudo", "adapt", "finetune")
SETTINGS = {  # images with ground truth for each task, appendix A; None = all there are
    "disjoint_normal": {"drivable": 20000, "detection": 10000, "semantic": 7000},
    "disjoint_balance": {"drivable": 7000, "detection": 7000, "semantic": 7000},
    "full": {"drivable": None, "detection": None, "semantic": None},
}
SCHEMES = {  # each joint stage's share of the plain schedule
    "pretrain-adapt-finetune": {"adapt": 1 / 3, "finetune": 2 / 3},
    "pretrain-finetune": {"finetune": 1.},
}
# How each of hmpl.PROFILES learns. lr: for its batch; lr_factors: what learns at another rate;
# scales: of the training images; confidence: of pseudo pixels; tower: the random text tower;
# teachers: each one's share of the plain schedule, in the order in which they learn; chained: each
# begins with what the one before has learned, and the first joint stage with what all have.
TRAINING = {
    "paper": dict(
        epochs=36, batch=16, lr=1e-4, decay=1e-4, warmup=1000, scales=(5 / 6, 1),
        lr_factors={"body": 0.25, "adapter": 0.25, "heads.detection": 0.25},
        confidence=0.5, tower={}, chained=False,
        teachers={"semantic": 0.25, "detection": 0.25, "drivable": 0.25}),
    "tiny": dict(
        epochs=3, batch=4, lr=7e-4, decay=1e-2, warmup=20, scales=(5 / 6, 7 / 6),
        lr_factors={"body": 0.3},
        confidence=0.1, tower=dict(width=64, layers=2, embed_dim=64), chained=True,
        teachers={"semantic": 0.6, "detection": 0.5, "drivable": 0.55}),
}
ZOO = "https://download.openmmlab.com/mmselfsup/1.x"
PRETRAINED = {  # MMSelfSup's ResNet-50 by name; what has no release with a checksum comes as a file
    "moco-v2": "mocov2_resnet50_8xb32-coslr-200e_in1k_20220825-b6d23c86",
    "simclr": "simclr_resnet50_16xb256-coslr-200e_in1k_20220825-4d9cce50",
    "swav": "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96_20220825-5b3fc7fc",
    "byol": "byol_resnet50_16xb256-coslr-200e_in1k_20220825-de817331",
    "densecl": "densecl_resnet50_8xb32-coslr-200e_in1k_20220825-3078723b",
}
TINY_WIDTH = 128             # of the tiny profile's images, unless --size says other
PSEUDO_SCORE = 0.3           # pseudo boxes are kept from this score on
EMBEDDINGS = ("query_embed", "proposal_features", "proposal_boxes", "contexts")
CLIP_NORM = 1.0
MAX_TRIES = 10               # unreadable samples, or steps that are not finite, in a row
BAD_SHARE = 0.01             # of the images may be unreadable
SAVE_SECONDS = 600
LOG_STEPS, CURVE_STEPS = 10, 100
CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#999999", "#000000")
ADAPTERS = ("lv", *hmpl.ADAPTERS, *(f"{pyramid}+lv" for pyramid in hmpl.ADAPTERS))
MAY_CHANGE = {"data", "accum", "amp", "origin"}     # when a run is resumed


# ------------------------------------------------------------------------------------- the split

def make_split(train: LabelledImages, val_stems: Sequence[str], setting: str, seed: int,
               tasks: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Stems of the images whose ground truth each of the tasks (default: all of the data set) may
    use, none of the validation set; the same whichever tasks are asked for. Disjoint settings take
    the paper's numbers, or the largest in these proportions for which disjoint sets exist. Raises
    InputError for tasks without labels."""
    tasks = tuple(tasks or train.classes)
    free = ~np.isin(train.stems, val_stems)
    labelled = {task: train.labelled[task] & free for task in train.classes}
    for task in tasks:
        if not labelled[task].any():
            raise InputError(
                f"{train.labels} has no {task} labels for {train.split}, apart from images that "
                f"are in the validation set too: setting {setting} needs them.")
    wanted = {task: number for task, number in SETTINGS[setting].items()
              if task in labelled and labelled[task].any()}
    if setting == "full":
        return {task: train.stems[labelled[task]].tolist() for task in wanted if task in tasks}
    columns = np.stack([labelled[task] for task in wanted], axis=1)          # [images, tasks]
    # Images that are labelled for the same tasks are of one kind; kinds [kinds, tasks].
    kinds, kind = np.unique(columns[:, ::-1], axis=0, return_inverse=True)
    kinds, kind = kinds[:, ::-1], kind.reshape(-1)
    flow = share_out(kinds, np.bincount(kind), np.array(list(wanted.values())))
    if not flow.sum(0).all():
        raise InputError(f"{train.root} has {len(kind)} images for {train.split}: too few for "
                         f"{len(wanted)} disjoint sets.")
    shuffled = np.random.default_rng(seed).permutation(len(kind))
    images = {task: [] for task in wanted}
    for k, numbers in enumerate(flow):
        members = np.split(shuffled[kind[shuffled] == k], np.cumsum(numbers))
        for task, chosen in zip(wanted, members):
            images[task] += train.stems[chosen].tolist()
    return {task: sorted(images[task]) for task in wanted if task in tasks}


def share_out(kinds: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How many images of each kind go to each task, [kinds, tasks]: the wanted numbers, or the
    largest in the same proportions that Hall's condition over the tasks allows.

    kinds [kinds, tasks]: which labels an image of the kind has. counts [kinds]: images there are.
    """
    num_kinds, num_tasks = kinds.shape
    scale = 1.
    for size in range(1, num_tasks + 1):
        for tasks in map(list, itertools.combinations(range(num_tasks), size)):
            usable = counts[kinds[:, tasks].any(1)].sum()
            scale = min(scale, usable / wanted[tasks].sum())
    source, sink = num_kinds + num_tasks, num_kinds + num_tasks + 1
    capacity = np.zeros((sink + 1, sink + 1), np.int32)      # source -> kinds -> tasks -> sink
    capacity[source, :num_kinds] = counts
    capacity[:num_kinds, num_kinds:source] = kinds * counts[:, None]
    capacity[num_kinds:source, sink] = np.maximum(1, wanted * scale + 1e-9)
    flow = maximum_flow(csr_matrix(capacity), source, sink).flow.toarray()
    return flow[:num_kinds, num_kinds:source]


# -------------------------------------------------------------------------------------- samples

class Samples(torch.utils.data.Dataset):
    """Training images with ground truth where the split grants it, else with the pseudo label.

    Indexed by (n, (width, height), flip), drawn by `batch_keys`, so that no sample depends on the
    worker that makes it. Gives (image, target, file, unreadable): a sample whose files cannot be
    read is replaced by the next with ground truth of the same tasks; `unreadable` says, by file,
    why.
    granted [tasks, images]: whose ground truth is used. rows: the images in use.
    """

    def __init__(self, data: LabelledImages, split: dict[str, list[str]], tasks: Sequence[str],
                 pseudo: BDD100K | None = None):
        self.data, self.pseudo, self.tasks = data, pseudo, tuple(tasks)
        self.granted = np.stack([np.isin(data.stems, split[task]) for task in tasks])
        self.rows = np.flatnonzero(self.granted.any(0))

    def __len__(self) -> int:
        return len(self.rows)

    def groups(self) -> list[np.ndarray]:
        """Sample numbers that may share a batch: all, or, without pseudo labels, those with ground
        truth of the same task, so that a batch is not labelled for each task once or twice."""
        granted = self.granted[:, self.rows]
        if self.pseudo is not None or granted.all():
            return [np.arange(len(self))]
        return [np.flatnonzero(of_task) for of_task in granted]

    def __getitem__(self, key: tuple[int, tuple[int, int], bool]) -> tuple:
        n, size, flip = key
        granted = self.granted[:, self.rows]
        alike = np.flatnonzero((granted == granted[:, [n]]).all(0))
        unreadable = {}
        for i in self.rows[np.roll(alike, -np.searchsorted(alike, n))][:MAX_TRIES]:
            file = str(self.data.files[i])
            try:
                return *augment(*self.sample(i), size, flip), file, unreadable
            except (InputError, OSError) as error:
                unreadable[file] = str(error)
        raise InputError(f"none of {len(unreadable)} images can be read: {unreadable[file]}")

    def sample(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image i as it is on the disk, with the labels it may use."""
        granted = [task for task, yes in zip(self.tasks, self.granted[:, i]) if yes]
        image, target = self.data.sample(i, granted)
        if self.pseudo is not None:
            lacking = [task for task in self.tasks if task not in granted]
            target |= self.pseudo.target(i, lacking, image.shape[1:])
        return image, target


def augment(image: Tensor, target: dict[str, Tensor], size: tuple[int, int],
            flip: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Resizes image and target to (width, height) and mirrors them; boxes are clipped to the image
    and those left without area are dropped. All stay in the types they came in."""
    height, width = image.shape[1:]
    target = dict(target)
    image = resize(image, list(size[::-1]), antialias=True)
    for task in evaluate.MASK_FOLDERS.keys() & target.keys():
        mask = resize(target[task][None], list(size[::-1]), InterpolationMode.NEAREST_EXACT)[0]
        target[task] = mask.flip(-1) if flip else mask
    if "boxes" in target:
        boxes = target["boxes"] * torch.tensor([size[0] / width, size[1] / height]).repeat(2)
        if flip:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([size[0] - x2, y1, size[0] - x1, y2], dim=1)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([*size, *size], dtype=torch.float32))
        keep = (boxes[:, 2:] - boxes[:, :2]).amin(1) > 0
        target["boxes"] = boxes
        target |= {key: target[key][keep] for key in ("boxes", "labels", "crowd")}
    return image.flip(-1) if flip else image, target


def batch_keys(groups: Sequence[np.ndarray], batch: int, start: int, steps: int, seed: int,
               sizes: Sequence[tuple[int, int]], accum: int = 1, rank: int = 0,
               world: int = 1) -> Iterator[list[tuple]]:
    """The keys of samples for every batch from step `start` on, as a pure function of the seed. The
    groups of sample numbers take turns, each epoch after epoch in a new order; a step has one of
    the sizes (width, height) for all its images, so that none is padded. Each of `world` processes
    takes every world-th image of a step's global batch, in `accum` parts."""
    for step in range(start, steps):
        rng = np.random.default_rng([seed, 1, step])
        size = sizes[rng.integers(len(sizes))]
        turn, g = divmod(step, len(groups))
        count = len(groups[g])
        keys, epoch = [], -1
        for n in range(turn * batch, (turn + 1) * batch):
            if n // count != epoch:
                epoch = n // count
                shuffled = np.random.default_rng([seed, 0, epoch, g]).permutation(groups[g])
            keys.append((int(shuffled[n % count]), size, bool(rng.random() < 0.5)))
        keys = keys[rank::world]
        for part in range(accum):
            yield keys[part::accum]


def collate(items: list[tuple]) -> tuple[list, ...]:
    """Samples -> images, targets, files and what was unreadable, as lists."""
    return tuple(list(column) for column in zip(*items))


# ---------------------------------------------------------------------------------- optimisation

def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Factor at a step: linear warm-up, then polynomial decay with power 0.9 (MaskFormer's)."""
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 - (step - warmup) / (steps - warmup)) ** 0.9


def parameter_groups(model: nn.Module, lr: float, factors: dict[str, float],
                     decay: float) -> list[dict]:
    """AdamW's groups: no weight decay on biases, norms and learned embeddings; the modules that
    `factors` names learn at that many times the rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matching = (factors[part] for part in factors if name.startswith(part + "."))
            rate = lr * next(matching, 1)
            plain = p.dim() < 2 or name.endswith(EMBEDDINGS)
            groups.setdefault((rate, 0. if plain else decay), []).append(p)
    return [{"params": params, "lr": rate, "base": rate, "weight_decay": weight_decay}
            for (rate, weight_decay), params in groups.items()]


# ----------------------------------------------------------------------------------------- a run

@dataclass
class Run:
    """What all stages share. `config` is what a result depends on; it is kept in config.json."""
    out: Path
    config: dict
    device: torch.device
    amp: torch.dtype | None
    workers: int
    train: LabelledImages
    val: LabelledImages
    split: dict[str, list[str]]
    rank: int = 0
    world: int = 1
    lock: IO | None = None                   # held as long as the run lives

    @property
    def stems(self) -> set[str]:
        """The stems of all images that have ground truth for a task."""
        return set().union(*self.split.values())

    @functools.cached_property
    def lacking(self) -> dict[str, np.ndarray]:
        """Rows of the images that are to get pseudo labels, by the task whose labels they lack."""
        rows = {}
        for task, granted in self.split.items():
            lacking = np.isin(self.train.stems, sorted(self.stems.difference(granted)))
            if lacking.any() and self.config["labels"] == "pseudo":
                rows[task] = np.flatnonzero(lacking)
        return rows

    def steps(self, share: float = 1.) -> int:
        """Optimizer steps of a share of the plain schedule, which is `epochs` over all images."""
        config = self.config
        plain = config["steps"] or len(self.stems) * config["epochs"] / config["batch"]
        return max(1, round(plain * share))

    @property
    def notes(self) -> list[str]:
        """What a reader of the scores must know."""
        notes = []
        if self.config["data"] == str(evaluate.SAMPLE):
            notes.append("the SAMPLE of drawn roads, not real data: scores mean nothing beyond it")
        for key, kind in (("pretrained", "body"), ("clip", "CLIP text tower")):
            if self.config[key] == "none":
                notes.append(f"RANDOM {kind} weights, nothing pretrained")
        return notes

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def log(self, line: dict) -> None:
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


@dataclass
class Stage:
    """What is trained once: the teacher of a task, or all tasks together."""
    name: str                                # "teacher TASK", "adapt" or "finetune"
    tasks: list[str]
    steps: int
    path: Path                               # of its checkpoint
    begins: list["Stage"]                    # with the weights of these, one after the other

    @property
    def joint(self) -> bool:
        return self.name in STAGES


def stages_of(run: Run, last: str = STAGES[-1]) -> dict[str, list[Stage]]:
    """What each stage of this run trains, in order, up to the last one wanted; teachers and pseudo
    labels are stages only where the run makes its own labels."""
    config, rule = run.config, TRAINING[run.config["profile"]]
    stages, chain = {}, []
    if run.lacking and not config["labels_of"]:
        stages = {"teachers": [], "pseudo": []}
        needed = run.split if rule["chained"] else run.lacking
        for task in [task for task in rule["teachers"] if task in needed]:
            path = run.out / "teachers" / f"{task}.pt"
            steps = run.steps(rule["teachers"][task])
            teacher = Stage(f"teacher {task}", [task], steps, path, list(chain))
            stages["teachers"].append(teacher)
            if rule["chained"]:
                chain.append(teacher)
    for name, share in SCHEMES[config["scheme"]].items():
        path = run.out / f"{name}.pt"
        stages[name] = [Stage(name, list(run.split), run.steps(share), path, list(chain))]
        chain += stages[name]
    names = list(stages)
    if last not in names:
        raise InputError(f"--stage {last} was given, but with --scheme {config['scheme']}, "
                         f"--labels {config['labels']} and tasks {', '.join(run.split)} there are "
                         f"only {', '.join(names)}.")
    return {name: stages[name] for name in names[:names.index(last) + 1]}


def state(run: Run, stage: Stage) -> str:
    """"to do", "resumes at step N" or "done"."""
    saved = load_stage(run, stage)
    if saved is None:
        return "to do"
    return "done" if saved["scores"] else f"resumes at step {saved['step']}"


class Stopped(BaseException):
    """The run was asked to end (SIGTERM, SIGINT)."""


class Interrupt:
    """SIGTERM and SIGINT end a run at once, but what is held, such as a step and its saving, is
    done first. A signal more than five seconds after the first ends that too; sooner, torchrun may
    have handed on what a scheduler has sent to all processes."""

    held, stop, signalled_at = 0, False, None

    def on_signal(self, number: int, frame) -> None:
        if self.signalled_at is None:
            self.signalled_at, self.stop = time.monotonic(), True
            if not self.held:
                raise Stopped
        elif time.monotonic() - self.signalled_at > 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __enter__(self) -> None:
        self.held += 1

    def __exit__(self, kind, error, trace) -> None:
        self.held -= 1
        if self.stop and not self.held and kind is None:
            raise Stopped


interrupt = Interrupt()


# ---------------------------------------------------------------------------------- checkpoints

def save(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint so that at every moment one is there, whole, on the disk; the last one is
    kept as FILE.old."""
    try:
        with evaluate.written_whole(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                os.replace(path, path.with_suffix(".old"))
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)                                                 # the names too
        os.close(folder)
    except (OSError, RuntimeError) as error:
        need = sum(t.numel() * t.element_size() for t in checkpoint["model"].values()) * 3 >> 20
        path.with_suffix(".part").unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}); about {need} MB are needed and the last "
                      "checkpoint is unharmed: free some space and run the same command") from error


def load_stage(run: Run, stage: Stage) -> dict | None:
    """A stage's last checkpoint, or the one before where that is damaged, if there is any; it must
    hold the network that this run builds for the stage's tasks."""
    path, old = stage.path, stage.path.with_suffix(".old")
    if not path.exists() and not old.exists():
        return None
    try:
        saved = evaluate.load_checkpoint(path if path.exists() else old)
    except InputError as error:
        if not (path.exists() and old.exists()):
            raise
        run.say(f"NOTE: {error} The one before it, {old}, is used.")
        saved = evaluate.load_checkpoint(old)
        if run.lock:                                 # else the next save would make it the old one
            path.rename(path.with_suffix(".damaged"))
    expected = model_config(run, stage.tasks)
    differing = [key for key in expected if saved["model_config"].get(key) != expected[key]]
    if differing:
        raise InputError(
            f"{path} was written for another network ({', '.join(differing)} differ): use another "
            f"--out, or delete it, and {old.name}, to train this stage anew.")
    return saved


# ------------------------------------------------------------------------------------ the model

def model_config(run: Run, tasks: Sequence[str]) -> dict:
    """The network's arguments."""
    config, profile = run.config, hmpl.PROFILES[run.config["profile"]]
    # The queries read P5, as in the paper, if it is at least 8 cells wide, else the finer P4.
    level = 5 if config["size"][0] >= 8 * hmpl.STRIDES[-1] else 4
    pyramid = [part for part in config["adapter"] if part != "lv"] or ["fpn"]
    return {**profile,
            "classes": {task: run.train.classes[task] for task in tasks},
            "maskformer": profile["maskformer"] | {"memory_level": level},
            "size": tuple(config["size"]), "adapter": pyramid[0],
            "pixels": config["pixels"], "heads": config["heads"]}


def new_model(run: Run, stage: Stage) -> hmpl.HMPL:
    """The model as a stage begins with it: what it has in common with the stages before comes from
    them; else its body is pretrained and all else new. Joint stages have the LV-Adapter, unless
    --adapter leaves it out; only adapt's body is frozen."""
    config, frozen = run.config, stage.name == "adapt"
    torch.manual_seed(config["seed"])
    text = text_source(run) if stage.joint and "lv" in config["adapter"] else None
    model = hmpl.HMPL(**model_config(run, stage.tasks), text=text)
    for before in stage.begins:
        model.load_state_dict(load_stage(run, before)["model"], strict=False)
    if config["pretrained"] == "none" and not stage.begins:
        calibrate(model, run, frozen)
    elif not stage.begins:
        path = find_body(config["pretrained"], config["profile"])
        run.say(f"  body {path}: {hmpl.load_body(model.body, path)[0]}")
    model.freeze_body(frozen)
    return model


def calibrate(model: hmpl.HMPL, run: Run, frozen: bool) -> None:
    """Sets a random body's BatchNorm statistics from 32 training images: with the initial ones
    (mean 0, variance 1) a frozen body would pass on features that grow with every block. The
    residual branches of one that is frozen are emptied: it passes on its stem, which serves better
    than random branches, while one that learns learns faster with them."""
    body, count = model.to(run.device).body, len(run.train)
    if frozen:
        for block in itertools.chain(body.layer1, body.layer2, body.layer3, body.layer4):
            nn.init.zeros_(getattr(block, "bn3", block.bn2).weight)
    rows = np.random.default_rng(run.config["seed"]).choice(count, min(32, count), replace=False)
    images = [resize(image, run.config["size"][::-1], antialias=True)
              for _, image, *_ in evaluate.read_items(run.train, (), False, rows)
              if image is not None]                  # readable
    update_bn([model.batch(images[n:n + 8])[0] for n in range(0, len(images), 8)], body)


def find_body(name: str, profile: str) -> Path:
    """A file of body weights: the one given, or a name's, cached or downloaded (its name ends in
    the first 8 digits of its sha256)."""
    depth, release = hmpl.PROFILES[profile]["depth"], PRETRAINED.get(name)
    if Path(name).is_file():
        return Path(name)
    if name == "supervised":
        url = torchvision.models.get_model_weights(f"resnet{depth}").IMAGENET1K_V1.url
    elif release is None:
        raise hmpl.WeightsError(
            f"--pretrained {name} is neither a file nor one of none, supervised, "
            f"{', '.join(PRETRAINED)}; files of others are in the repositories facebookresearch/"
            "moco (v1), xieenze/DetCo and zdaxie/PixPro.")
    elif depth != 50:
        raise hmpl.WeightsError(f"--pretrained {name} is a ResNet-50, the profile {profile} has a "
                                f"ResNet-{depth}: use supervised, none or a file.")
    else:
        url = f"{ZOO}/{release.split('_')[0]}/{release.rsplit('_', 1)[0]}/{release}.pth"
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), path.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:                         # or another checksum
            raise OSError(f"{url} cannot be downloaded to {path}: {error}") from None
    return path


def find_text(name: str, profile: str) -> tuple[prompts.TextTower, prompts.Tokenizer]:
    """CLIP's text tower, of a name or a checkpoint file, and the tokenizer of the vocabulary that
    lies beside it, if one does; none: a random tower that reads bytes."""
    if name == "none":
        tower = prompts.TextTower(**TRAINING[profile]["tower"])
        return tower, prompts.Tokenizer(prompts.BYTES)
    path = Path(name) if Path(name).is_file() else prompts.find_tower(name)
    beside = path.parent / "bpe_simple_vocab_16e6.txt.gz"
    vocabulary = prompts.find_vocabulary(beside if beside.exists() else None)
    return prompts.load_text_tower(path), prompts.Tokenizer(vocabulary)


def text_source(run: Run) -> nn.Module | Tensor:
    """The LV-Adapter's text: learned task prompts, or the features of hand-written ones."""
    config, contexts = run.config, run.config["contexts"]
    classes = {task: run.train.classes[task] for task in run.split}
    tower, tokenizer = find_text(config["clip"], config["profile"])
    if config["prompts"] == "learned":
        begin = {"num_contexts": contexts} if isinstance(contexts, int) else {"words": contexts}
        return prompts.TaskPrompts(tower, tokenizer, classes, **begin)
    return torch.cat([prompts.encode_templates(tower, tokenizer, names, templates_of(run))
                      for names in classes.values()])


def templates_of(run: Run) -> tuple[str, ...]:
    """The hand-written prompts, with {} for the class."""
    return getattr(prompts, run.config["prompts"].upper())               # ENGINEERED or ENSEMBLE


def describe_text(run: Run) -> str:
    """Says which prompts the LV-Adapter reads; raises TextError for some that no tower can read."""
    if run.config["prompts"] != "learned":
        templates = templates_of(run)
        return f"hand-written prompts, {len(templates)} for each class, the first {templates[0]!r}"
    text = text_source(run)
    return (f"learned prompts, X = context: {text.texts[0]!r} and so on, "
            f"{int(text.eot.max()) + 1} tokens at most")


# ------------------------------------------------------------------------------------- the loop

class Training:
    """A stage's model with all that its training needs to go on after a break as if there had been
    none. images: how many it learns from."""

    def __init__(self, run: Run, stage: Stage, model: hmpl.HMPL, images: int):
        config, device = run.config, run.device
        if run.world > 1 and device.type == "cuda":
            model.body = nn.SyncBatchNorm.convert_sync_batchnorm(model.body)
        self.run, self.stage, self.images = run, stage, images
        self.model = self.parallel = model.to(device).train()
        factors = dict(config["lr_factors"])
        if config["pretrained"] == "none" and all(before.joint for before in stage.begins):
            del factors["body"]                      # began random: it has everything to learn
        groups = parameter_groups(model, config["lr"], factors, config["decay"])
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp is torch.float16)
        self.step = self.skipped = self.clipped = 0
        self.unreadable = {}                         # files, and why
        if run.rank:
            torch.manual_seed(config["seed"] + run.rank)     # other dropout than the first process
        saved = load_stage(run, stage)
        if saved:
            self.restore(saved)
        self.infinite = 0                            # steps in a row
        self.saved = self.logged = time.monotonic()
        self.logged_step = self.step
        if run.world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(model, static_graph=True)

    def save(self, scores: dict | None = None) -> None:
        """Writes all that resuming and scoring need; called by all processes, done by the first."""
        run, model = self.run, self.model
        rng = {"torch": torch.get_rng_state()}
        if run.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(run.device)
        rng = evaluate.from_all_ranks(rng)
        self.saved = time.monotonic()
        if run.rank:
            return
        model.update_text()
        with interrupt:
            save(self.stage.path, {
                "stage": self.stage.name, "step": self.step, "steps": self.stage.steps,
                "notes": run.notes, "scores": scores, "config": run.config,
                "model_config": model_config(run, self.stage.tasks), "model": model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "rng": rng, "skipped": self.skipped, "clipped": self.clipped,
                "unreadable": self.unreadable})
            if scores:
                self.stage.path.with_suffix(".old").unlink(missing_ok=True)

    def restore(self, saved: dict) -> None:
        """Puts everything back as it was at the checkpoint."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.run.rank < len(saved["rng"]):
            rng = saved["rng"][self.run.rank]
            torch.set_rng_state(rng["torch"])
            if "cuda" in rng and torch.cuda.is_available():
                torch.cuda.set_rng_state(rng["cuda"])
        for key in ("step", "skipped", "clipped", "unreadable"):
            setattr(self, key, saved[key])

    def advance(self, batches: Iterator) -> dict[str, float]:
        """One optimizer step; returns its losses. A step whose gradients are not finite (with DDP
        they are the same on all processes) changes nothing; MAX_TRIES in a row raise InputError."""
        optimizer = self.optimizer
        factor = learning_rate(self.step, self.stage.steps, self.run.config["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        losses, files = self.backward(batches)
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM, foreach=True)
        flags = torch.tensor([interrupt.stop, time.monotonic() - self.saved > SAVE_SECONDS])
        flags = flags.float().to(self.run.device, non_blocking=True)
        if self.run.world > 1:
            dist.all_reduce(flags)
        numbers = torch.cat([torch.stack([*losses.values(), norm]), flags])
        *values, self.norm, stop, due = numbers.tolist()                 # the step's one wait
        losses = dict(zip(losses, values))
        self.stop, self.due = stop > 0, due > 0
        interrupt.stop = interrupt.stop or self.stop
        finite = math.isfinite(self.norm)
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        self.skipped += not finite
        self.clipped += self.norm > CLIP_NORM
        # A scaler that still goes down is no sign of infinite losses.
        scaling = not finite and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        self.infinite = 0 if finite or scaling else self.infinite + 1
        if self.infinite == MAX_TRIES:
            names = [key for key, value in losses.items() if not math.isfinite(value)]
            raise InputError(f"stage {self.stage.name}: {', '.join(names) or 'gradients'} not "
                             f"finite for {MAX_TRIES} steps up to {self.step}, with "
                             f"{', '.join(files)}: start in another --out with a lower --lr or "
                             "--amp no.")
        return losses

    def backward(self, batches: Iterator) -> tuple[dict[str, Tensor], list[str]]:
        """Gradients of `accum` batches: the losses' means and the files."""
        run, accum = self.run, self.run.config["accum"]
        self.optimizer.zero_grad(set_to_none=True)
        means, files, unreadable = {}, [], {}
        for _ in range(accum):
            images, targets, batch_files, replaced = next(batches)
            with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
                losses = self.parallel(images, targets)
            self.scaler.scale(sum(losses.values()) / accum).backward()
            for key, value in losses.items():
                means[key] = means.get(key, 0) + value.detach() / accum
            files += batch_files
            for reasons in replaced:
                unreadable |= reasons
        self.note_unreadable(unreadable)
        return means, files

    def note_unreadable(self, replaced: dict[str, str]) -> None:
        """Says once what was replaced; raises InputError where it is more than good data needs."""
        for file, why in replaced.items() - self.unreadable.items():
            tqdm.write(f"NOTE: another image stands in for {file}: {why}", file=sys.stderr)
            self.unreadable[file] = why
        most = BAD_SHARE * self.images
        if replaced and (self.step == 0 or len(self.unreadable) > most):
            raise InputError(f"{len(self.unreadable)} of {self.images} images cannot be used, more "
                             f"than may be replaced: {next(iter(replaced.values()))}")

    def log(self, losses: dict[str, float]) -> None:
        """Adds a line to the log; its speed is that since the last one."""
        now, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        if self.run.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.run.device) >> 20
        images = (self.step - self.logged_step) * self.run.config["batch"]
        self.run.log({
            "stage": self.stage.name, "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"], **losses, "norm": self.norm,
            "skipped": self.skipped, "clipped": round(self.clipped / self.step, 4),
            "unreadable": len(self.unreadable), "memory_mb": memory,
            "images_per_s": round(images / (now - self.logged), 2)})
        self.logged, self.logged_step = now, self.step


def train(run: Run, stage: Stage, model: hmpl.HMPL, samples: Samples) -> hmpl.HMPL:
    """Trains a stage's model on from its checkpoint, then scores it on the validation images."""
    t, config, steps = Training(run, stage, model, len(samples)), run.config, stage.steps
    width, height = config["size"]
    sizes = [(round(width * s), round(height * s)) for s in np.linspace(*config["scales"], 6)]
    batches = iter(torch.utils.data.DataLoader(
        samples, num_workers=run.workers, collate_fn=collate, pin_memory=run.device.type == "cuda",
        batch_sampler=batch_keys(samples.groups(), config["batch"], t.step, steps, config["seed"],
                                 sizes, config["accum"], run.rank, run.world),
        worker_init_fn=evaluate.leave_signals,
        generator=torch.Generator()))                # else a resumed run would draw one number more
    if run.rank == 0:
        trim_log(run.out / "log.jsonl", stage.name, t.step)
    bar = tqdm(range(t.step, steps), initial=t.step, total=steps, desc=stage.name, unit="step",
               mininterval=0.5, disable=run.rank > 0, dynamic_ncols=True)
    with interrupt:
        for _ in bar:
            losses = t.advance(batches)
            bar.set_postfix(loss=f"{sum(losses.values()):.2f}")
            if t.step % LOG_STEPS == 0 or t.step == steps:
                t.log(losses)
            if t.step % CURVE_STEPS == 0 and run.rank == 0:
                draw_curves(run.out / "log.jsonl")
            if t.stop:                               # all processes at the same step
                batches = None                       # ends the workers, who have heard it too
            if t.stop or t.due or t.step == steps:
                t.save()
            if t.stop:
                break
    model.eval().requires_grad_(False)               # as `evaluate.build_model` does
    if run.world > 1:
        for buffer in model.buffers():               # BatchNorm's saw each rank's last images
            dist.broadcast(buffer, 0)
    scores = {"images": 0}                           # validation may lack these labels
    labelled = {task: np.flatnonzero(run.val.labelled[task]) for task in stage.tasks}
    if any(map(len, labelled.values())):
        scores = evaluate.evaluate(model, run.val, amp=run.amp, workers=run.workers,
                                   batch=evaluate.batch_size(run.device),
                                   keep=progress_pictures(run, stage),
                                   skip=leave_out(run.val, "score", labelled))
    run.log({"stage": stage.name, "step": t.step, "val": scores})
    t.save(scores)
    if run.rank == 0:
        draw_curves(run.out / "log.jsonl")
    run.say(evaluate.table(scores, stage.name))
    return model


def leave_out(data: LabelledImages, what: str, rows_of: dict[str, np.ndarray]) -> Callable:
    """What `evaluate.predictions` calls with a row and the reason why it cannot be read: says what
    that image goes without; raises InputError where these are more of a task's rows than good data
    needs."""
    unreadable = []

    def skip(i: int, why: str) -> None:
        tqdm.write(f"NOTE: no {what} for {data.files[i]}: {why}", file=sys.stderr)
        unreadable.append(i)
        for task, rows in rows_of.items():
            count = np.isin(rows, unreadable).sum()
            if count > BAD_SHARE * len(rows):
                raise InputError(f"no {what} for {count} of the {len(rows)} {data.split} images "
                                 f"for {task}, more than may be left out: {why}")
    return skip


def trim_log(path: Path, stage: str, step: int) -> None:
    """Drops a stage's lines after a step, and any that was cut off, from the log."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            if line["stage"] != stage or line["step"] <= step and "val" not in line:
                lines.append(text + "\n")
        except ValueError:
            pass
    with evaluate.written_whole(path) as file:
        file.write("".join(lines).encode())


def progress_pictures(run: Run, stage: Stage) -> Callable:
    """What `evaluate.evaluate` calls with each image: draws three fixed validation images, of those
    with most labels."""
    labels = sum(run.val.labelled[task].astype(int) for task in stage.tasks)
    rows = np.flatnonzero(labels == labels.max())
    rows, folder = rows[[0, len(rows) // 2, -1]], run.out / "pictures"
    folder.mkdir(exist_ok=True)

    def keep(i: int, image: Tensor, target: dict, prediction: dict) -> None:
        if i in rows:
            sheet = evaluate.draw(image, prediction, target, stage.name, classes=run.val.classes)
            name = f"{run.val.stems[i]}_{stage.name.replace(' ', '_')}.png"
            sheet.save(folder / name, compress_level=1)
    return keep


def draw_curves(log: Path) -> None:
    """Draws a run's log as curves.png beside it: losses by task, learning rate and validation
    scores over its lines, from 0 to the 95th percentile; the last values are named."""
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    losses, rates, scores = {}, {}, {}                                   # name: points
    for x, line in enumerate(lines):
        if "lr" in line:
            rates.setdefault("learning rate", []).append((x, line["lr"]))
        for task in hmpl.KINDS:
            loss = sum(value for key, value in line.items() if key.startswith(f"{task}_"))
            if 0 < loss < math.inf:
                losses.setdefault(f"{task} loss", []).append((x, loss))
        for column, (task, key) in evaluate.COLUMNS.items():
            score = line.get("val", {}).get(task, {}).get(key)
            if score is not None:
                scores.setdefault(column, []).append((x, score))
    sheet = Image.new("RGB", (1000, 660), "white")
    pen = ImageDraw.Draw(sheet)
    for bottom, curves in zip((210, 430, 650), (losses, rates, scores)):
        for x, line in enumerate(lines):
            if x == 0 or line["stage"] != lines[x - 1]["stage"]:         # a stage begins
                at = 1000 * x / len(lines)
                pen.line((at, bottom - 200, at, bottom), "#cccccc")
                pen.text((at + 3, bottom - 12), line["stage"], "#999999")
        values = [y for points in curves.values() for _, y in points]
        top = 1.1 * np.percentile(values or [1.], 95) or 1.
        for k, (name, points) in enumerate(curves.items()):
            pen.text((5 + 160 * k, bottom - 198), f"{name} {points[-1][1]:.4g}", CURVE_COLOURS[k])
            places = [(1000 * (x + 0.5) / len(lines), bottom - 200 * min(y / top, 1))
                      for x, y in points]
            for n, (x, y) in enumerate(places):
                if curves is scores:
                    pen.ellipse((x - 4, y - 4, x + 4, y + 4), CURVE_COLOURS[k])
                elif n and points[n][0] - points[n - 1][0] < 3:          # not from stage to stage
                    pen.line((places[n - 1], (x, y)), CURVE_COLOURS[k], width=2)
        pen.rectangle((0, bottom - 200, 999, bottom), outline="black")
    sheet.save(log.with_name("curves.png"))


# --------------------------------------------------------------------------------- pseudo labels

def run_pseudo(run: Run, teachers: Sequence[Stage]) -> None:
    """Labels images for the tasks they lack, each process its share of the batches.

    Each batch's predictions go to a file of their own, then the labels are written from all files;
    report.json comes last and means: done. Broken off, it goes on with the files that are missing.
    """
    report, folder = run.out / "pseudo" / "report.json", run.out / "pseudo" / "batches"
    if not report.exists():
        rows = np.unique(np.concatenate(list(run.lacking.values())))
        size = evaluate.batch_size(run.device)       # fixed: rounding depends on it
        batches = np.split(rows, range(size, len(rows), size))[run.rank::run.world]
        files = {folder / f"{batch[0]}-{batch[-1]}.zip": batch.tolist() for batch in batches}
        file_of = {i: file for file, batch in files.items()
                   if not zipfile.is_zipfile(file) for i in batch}
        predictions = teach(run, teachers, list(file_of))
        for file, items in itertools.groupby(predictions, lambda item: file_of[item[0]]):
            batch = {i: prediction for i, _, _, prediction in items}
            with (interrupt, evaluate.written_whole(file) as part,
                  zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
                  archive.open("predictions", "w") as entry):
                torch.save(batch, entry)
        # A file is missing where no image of its batch could be read.
        counts = write_labels(run, filter(Path.exists, files))
        if run.rank == 0:
            evaluate.write_json(report, counts)
    if run.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


def teach(run: Run, teachers: Sequence[Stage],
          todo: Sequence[int]) -> Iterator[tuple[int, Tensor, dict, dict]]:
    """The teachers' predictions, as `evaluate.predictions` yields them, for the rows to do whose
    images can be read; each teacher predicts those that lack its task."""
    models = {teacher.tasks[0]: evaluate.build_model(load_stage(run, teacher)).to(run.device)
              for teacher in teachers if teacher.tasks[0] in run.lacking}

    def predict(rows: list[int], images: list[Tensor]) -> list[dict]:
        predictions = [{} for _ in rows]
        for task, model in models.items():
            chosen = np.flatnonzero(np.isin(rows, run.lacking[task]))
            threshold = run.config["thresholds"][task] or 0.
            results = model.predict([images[n] for n in chosen], threshold)
            for n, result in zip(chosen, results):
                predictions[n] |= result
        return predictions

    return evaluate.predictions(
        predict, run.train, todo, run.device, batch=evaluate.batch_size(run.device), desc="pseudo",
        workers=run.workers, amp=run.amp, skip=leave_out(run.train, "pseudo label", run.lacking))


def write_labels(run: Run, files: Iterable[Path]) -> dict[str, dict]:
    """Writes the predictions in these files as labels; returns what became of them, by task."""
    writer = evaluate.LabelWriter(run.out / "pseudo", run.train.split, run.train.classes)
    meters = {task: evaluate.meter_of(task, run.train.classes[task]) for task in run.lacking}
    boxes, kept = {}, {task: [] for task in run.lacking}     # kept: share of each image's pixels
    for path in files:
        with zipfile.ZipFile(path) as archive:
            predictions = torch.load(io.BytesIO(archive.read("predictions")), weights_only=True)
        for i, prediction in predictions.items():
            tasks = [task for task, rows in run.lacking.items() if i in rows]
            # Ground truth that the split does not grant only measures how good the labels are.
            with contextlib.suppress(InputError, OSError):
                evaluate.update_meters(meters, run.train.target(i, tasks), prediction, i)
            if "detection" in tasks:
                boxes[i] = {key: prediction.pop(key) for key in ("boxes", "scores", "labels")}
            for task, mask in prediction.items():
                kept[task].append((mask < evaluate.IGNORE).float().mean().item())
            writer.add(run.train.files[i], prediction)
    counts = {}
    for task, rows in run.lacking.items():
        meter, *others = evaluate.from_all_ranks(meters[task])
        for other in others:
            meter.merge(other)
        if task == "detection":
            counts[task] = add_boxes(run, writer, boxes)
            if meter.images:
                counts[task]["AP50"] = evaluate.percent(meter.compute()["AP50"])
        else:
            shares = itertools.chain(*evaluate.from_all_ranks(kept[task]))
            counts[task] = {"kept_pixels": math.fsum(shares) / len(rows),
                            "threshold": run.config["thresholds"][task]}
            if meter.confusion.any():
                counts[task]["mIoU"] = evaluate.percent(meter.compute()["mIoU"])
        say_counts(run, task, counts[task])
    writer.close()
    return counts


def add_boxes(run: Run, writer: evaluate.LabelWriter, boxes: dict[int, dict[str, Tensor]]) -> dict:
    """Hands the writer the boxes above the threshold; returns how many they are. Without
    --threshold: from PSEUDO_SCORE on, or, where few are, because the teacher is weak, as many as
    the images with ground truth have on average: an image without its boxes would teach that there
    are none (after LabelMatch, CVPR 2022)."""
    data, threshold = run.train, run.config["thresholds"]["detection"]
    granted = np.isin(data.stems, run.split["detection"])
    true_boxes = float(np.diff(data.offsets)[granted].mean())
    scores = evaluate.from_all_ranks([image["scores"] for image in boxes.values()])
    scores = list(itertools.chain(*scores))          # of each image
    images, scores = len(scores), torch.cat(scores).sort(descending=True).values
    if threshold is None:
        threshold = PSEUDO_SCORE
        wanted = min(round(true_boxes * images), len(scores))
        if wanted:
            threshold = min(threshold, scores[wanted - 1].item())
    for i, image in boxes.items():
        keep = image["scores"] >= threshold
        writer.add(data.files[i], {key: value[keep] for key, value in image.items()})
    kept = int((scores >= threshold).sum())
    return {"boxes_per_image": kept / images, "kept_boxes": kept / max(1, len(scores)),
            "true_boxes_per_image": true_boxes, "threshold": threshold}


def say_counts(run: Run, task: str, counts: dict) -> None:
    numbers = [f"{name} {value:.3g}" for name, value in counts.items() if value is not None]
    run.say(f"  pseudo labels {task}, {len(run.lacking[task])} images: {', '.join(numbers)}")
    if not counts.get("kept_boxes", counts.get("kept_pixels")):
        run.say(f"NOTE: no {task} pseudo label is left, so that most images seem to show nothing: "
                f"the teacher is weak. To keep more, delete {run.out / 'pseudo'} and add "
                f"--threshold {task}=0.05.")


def pseudo_labels(run: Run) -> BDD100K:
    """This or another run's pseudo labels; InputError where more than 1% of them are missing."""
    folder = Path(run.config["labels_of"] or run.out) / "pseudo"
    with first_alone():
        pseudo = BDD100K(run.train.root, run.train.split, labels=folder, cache=run.out / "cache")
    for task, rows in run.lacking.items():
        missing = np.count_nonzero(~pseudo.labelled[task][rows])
        if missing > BAD_SHARE * len(rows):
            raise InputError(f"{folder} has no {task} labels for {missing} of the {len(rows)} "
                             "images that need them: delete it and run stage pseudo again.")
    return pseudo


# ------------------------------------------------------------------------------------ the stages

def run_stage(run: Run, stage: Stage) -> None:
    """Trains a teacher on its task's ground truth, or all tasks together on pseudo labels too."""
    progress = state(run, stage)
    if progress == "done":
        return
    if progress == "to do" and not stage.joint and run.rank == 0:
        shutil.rmtree(run.out / "pseudo", ignore_errors=True)            # of an earlier teacher
    pseudo = pseudo_labels(run) if stage.joint and run.lacking else None
    samples = Samples(run.train, run.split, stage.tasks, pseudo)
    model = new_model(run, stage)
    if stage.joint:
        run.say(parameter_table(model))
    train(run, stage, model, samples)


def parameter_table(model: hmpl.HMPL) -> str:
    modules = {"body": model.body, "adapter": model.adapter, "LV-Adapter": model.lv_adapter,
               "contexts": model.text, "CLIP text tower": getattr(model.text, "tower", None),
               **{f"head {task}": head for task, head in model.heads.items()}}
    lines = [f"  {'parameters':<20}{'trainable':>12}{'frozen':>12}"]
    for name, module in modules.items():
        if module is not None:
            total = sum(p.numel() for p in module.parameters())
            free = sum(p.numel() for p in module.parameters() if p.requires_grad)
            lines.append(f"  {name:<20}{free:>12,}{total - free:>12,}")
    return "\n".join(lines)


def plan(run: Run, stages: dict[str, list[Stage]]) -> str:
    """What will be done, stage by stage, and what is there already."""
    config = run.config
    width, height = config["size"]
    truth = ", ".join(f"{task} {len(stems)}" for task, stems in run.split.items())
    lines = [f"NOTE: {note}" for note in run.notes]
    lines += [
        f"plan: {config['dataset']}, setting {config['setting']}, scheme {config['scheme']}, "
        f"{config['heads']} heads, profile {config['profile']}, {width}x{height}, batch "
        f"{config['batch']}, lr {config['lr']:.2e}, {run.device.type}, {run.amp or torch.float32}, "
        f"run folder {run.out}",
        f"  images with ground truth: {truth}; {len(run.stems)} in all; validation {len(run.val)}"]
    if "lv" in config["adapter"]:
        lines.append(f"  {describe_text(run)}")
    for name in stages:
        if name == "pseudo":
            done = (run.out / "pseudo" / "report.json").exists()
            lines.append(f"  {name:<20} labels that images lack  {'done' if done else 'to do'}")
        for stage in stages[name]:
            frozen = ", body frozen" if stage.name == "adapt" else ""
            begins = " and ".join(before.name for before in stage.begins)
            begins = f", begins with {begins}" if begins else ""
            lines.append(f"  {stage.name:<20} {stage.steps:>6} steps{frozen}{begins}  "
                         f"{state(run, stage)}")
    return "\n".join(lines)


# ------------------------------------------------------------------- what a run is, from options

def start(args: argparse.Namespace) -> Run:
    """Opens the data and decides what the run is; if it was begun before, it must be the same."""
    device = evaluate.this_device()
    rank, world = evaluate.rank_and_world()
    bdd, reader = args.dataset == "bdd100k", evaluate.DATASETS[args.dataset]
    out = Path(args.out or f"runs/{args.setting if bdd else args.dataset}")
    cache = {"cache": out / "cache"} if bdd and not args.dry_run else {}
    lock = None if args.dry_run or rank else lock_folder(out)
    with first_alone():
        root = data_folder(args.data, args.dataset)
        train, val = reader(root, "train", **cache), reader(root, "val", **cache)
        args.tasks = args.tasks or tuple(train.classes)
        if not set(args.tasks) <= set(train.classes):
            raise InputError(f"--tasks {','.join(args.tasks)} was given, but {root} has "
                             f"{', '.join(train.classes)}: name some of these.")
        config = make_config(args, root, train)      # may download weights
    config |= {"images": fingerprint(train, val), "origin": origin()}
    split = remembered_split(args, out, config)
    if split is None:
        split = make_split(train, val.stems, args.setting, args.seed, args.tasks)
    amp = evaluate.amp_type(args.amp, device)
    workers = evaluate.num_workers(device) if args.workers is None else args.workers
    return Run(out, config, device, amp, workers, train, val, split, rank, world, lock)


def lock_folder(out: Path) -> IO:
    """The run folder's lock, which this process holds until it ends, however it does."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(f"{out} is in use by {file.read()}: wait for it, end it, or give another "
                         "--out.") from None
    except OSError:
        pass                                         # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} ({shlex.join(sys.argv)})")
    file.flush()
    return file


def make_config(args: argparse.Namespace, root: Path, train: LabelledImages) -> dict:
    """Everything that a result depends on, from options, profile and the weights that are there."""
    sample = root.resolve() == evaluate.SAMPLE
    profile = args.profile or ("tiny" if sample else "paper")
    rule = TRAINING[profile]
    batch, shares = args.batch or rule["batch"], args.accum * evaluate.rank_and_world()[1]
    if batch % shares:
        raise InputError(f"a batch of {batch} images cannot be shared by {shares} parts (processes "
                         f"x --accum): give a --batch that {shares} divides.")
    pretrained, pixels = usable_weights(args.pretrained, "body", body_pixels, profile, sample)
    clip, _ = usable_weights(args.clip, "CLIP text tower", find_text, profile, sample)
    lr_factors = dict(rule["lr_factors"])
    if args.heads == "conv":
        lr_factors.pop("heads.detection", None)                          # it is Sparse R-CNN's
    confidence = {task: None if task == "detection" else rule["confidence"] for task in args.tasks}
    size = args.size or train.size
    own_classes = train.classes != type(train).classes
    if not args.size and (profile == "tiny" or own_classes):             # the images' own
        height, width = train.image(0).shape[1:]
        scale = min(1, TINY_WIDTH / width) if profile == "tiny" else 1
        size = round(width * scale), round(height * scale)
    as_given = ("dataset", "setting", "scheme", "labels", "heads", "prompts", "steps", "accum",
                "amp", "seed")
    return {
        **{key: getattr(args, key) for key in as_given},
        **{key: rule[key] for key in ("decay", "warmup", "scales")},
        "data": str(root.resolve()), "tasks": list(args.tasks), "profile": profile,
        "adapter": sorted(args.adapter.split("+")),
        "contexts": int(args.contexts) if args.contexts.isdecimal() else args.contexts,
        "labels_of": args.labels_of and str(Path(args.labels_of).resolve()),
        "pretrained": pretrained, "clip": clip, "pixels": args.pixels or pixels or "imagenet",
        "size": list(size), "epochs": args.epochs or rule["epochs"], "batch": batch,
        "lr": args.lr or rule["lr"] * math.sqrt(batch / rule["batch"]), "lr_factors": lr_factors,
        "thresholds": confidence | args.threshold}


def usable_weights(name: str, kind: str, load: Callable, profile: str, sample: bool) -> tuple:
    """The weights' name, or file's absolute path, and what `load` gives of them. Where they cannot
    be had: an error on real data, "none" on the sample."""
    if name == "none":
        return name, None
    given = Path(name).is_file()
    try:
        return str(Path(name).resolve()) if given else name, load(name, profile)
    except (OSError, prompts.TextError, hmpl.WeightsError) as error:
        if sample and not given and isinstance(error, OSError):
            return "none", None
        raise InputError(f"no {kind} weights ({error}): put the file there, name another, or "
                         "'none' for random weights.") from None


def body_pixels(name: str, profile: str) -> str:
    """The pixels that weights of a body want; they must fit the profile's."""
    body = hmpl.ResNetBody(hmpl.PROFILES[profile]["depth"])
    return hmpl.load_body(body, find_body(name, profile))[1]


def remembered_split(args: argparse.Namespace, out: Path, config: dict) -> dict | None:
    """The split of the run begun in `out`, or of the one that --labels-of names, which must be the
    same in all that would change the result; None if there is neither."""
    checkpoints = {file.stem for file in out.rglob("*") if file.suffix in (".pt", ".old")}
    if checkpoints and (out / "config.json").exists():                   # else nothing is lost
        free = MAY_CHANGE
        if not (out / "pseudo").exists() and checkpoints.isdisjoint(STAGES):
            free = MAY_CHANGE | {"thresholds"}
        folder, keys = out, config.keys() - free
        misfit, advice = f"{out} was begun with other options", "use them again, or another --out"
    elif args.labels_of:
        folder, keys = Path(args.labels_of), ("dataset", "setting", "tasks", "images")
        misfit = f"--labels-of {folder} is of other data"
        advice = "name a run of the same data and setting"
        if not (folder / "pseudo" / "report.json").exists():
            raise InputError(f"--labels-of {folder} has no finished pseudo labels: run its stage "
                             "pseudo first.")
    else:
        return None
    before = evaluate.read_json(folder / "config.json")
    now = json.loads(json.dumps(config))                                 # tuples as lists
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in keys
               if before.get(key) != now[key]]
    if changed:
        raise InputError(f"{misfit} ({'; '.join(changed)}): {advice}.")
    return evaluate.read_json(folder / "split.json")


def fingerprint(*splits: LabelledImages) -> str:
    """A digest of classes, images, which labels there are, and boxes; masks would take too long."""
    digest = hashlib.sha256()
    for data in splits:
        digest.update(repr(data.classes).encode())
        arrays = [data.files, *data.labelled.values()]
        for array in (*arrays, data.boxes, data.box_labels, data.crowd, data.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def origin() -> dict:
    """Command, versions and, where the code is a git checkout, its commit, of this start."""
    folder, commit = Path(__file__).resolve().parent, None
    if (folder / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {lib.__name__: str(lib.__version__) for lib in (torch, torchvision, np)}
    return {"command": shlex.join(sys.argv), "commit": commit, "python": sys.version.split()[0],
            **versions}


def data_folder(given: str | None, dataset: str = "bdd100k") -> Path:
    """The data given, or found; the sample is drawn, by a process of its own, at its first use."""
    root = evaluate.find_data(given, dataset)
    if root.resolve() == evaluate.SAMPLE and not root.is_dir():
        script = root.parent / "draw_roads.py"
        if subprocess.run([sys.executable, script], check=False).returncode:
            raise InputError(f"{script} could not draw the sample: see above, or give --data.")
    return root


@contextlib.contextmanager
def first_alone():
    """The first process goes through the block before the others, who find what it has kept."""
    rank, world = evaluate.rank_and_world()
    if rank:
        dist.barrier()
    yield
    if world > 1 and not rank:
        dist.barrier()


# --------------------------------------------------------------------------------- command line

def argument_error(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} was given, expected {expected}.")


def image_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 32:
        return int(width), int(height)
    raise argument_error(text, "WIDTHxHEIGHT from 32x32 on, such as 256x144")


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if 0 < number < math.inf:
        return number
    raise argument_error(text, "a number between 0 and inf")


def thresholds(text: str) -> dict[str, float]:
    numbers = {}
    try:
        for pair in text.split(","):
            task, number = pair.split("=")
            numbers[task] = float(number)
        if all(0 <= number <= 1 for number in numbers.values()):
            return numbers
    except ValueError:
        pass
    raise argument_error(
        text, "TASK=NUMBER, numbers from 0 to 1, such as detection=0.5,semantic=0.6")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Trains HMPL in stages (teachers, pseudo, adapt, finetune), all in one run "
        "folder. Each stage first runs what it lacks; the same command again resumes.")
    whole = evaluate.whole

    add = p.add_argument_group("data").add_argument
    add("--data", metavar="DIR",
        help="default: $BDD100K, data/bdd100k, else a drawn sample; $NUIMAGES, data/nuimages")
    add("--dataset", choices=evaluate.DATASETS, default="bdd100k",
        help="bdd100k (default): three tasks; nuimages: detection and semantic")
    add("--setting", choices=SETTINGS, help="whose ground truth is used: 20k drivable, 10k "
        "detection, 7k semantic images (default), 7k each, or all (nuImages' default)")
    add("--tasks", metavar="T,T", help="learn only these; default: all there are")
    add("--labels", choices=("pseudo", "own"), default="pseudo", help="pseudo (default): teachers "
        "give the labels that images lack; own: what an image lacks adds no loss")
    add("--labels-of", metavar="RUN", help="take split and pseudo labels from this run folder, as "
        "experiments that are compared should; default: the run's own")
    add("--threshold", type=thresholds, default={}, metavar="T=X,T=X",
        help=f"least score of pseudo boxes (default {PSEUDO_SCORE}, less for a weak teacher) and "
        "confidence of pseudo pixels (by profile): detection=0.5,semantic=0.6")

    add = p.add_argument_group("method").add_argument
    add("--scheme", choices=SCHEMES, default="pretrain-adapt-finetune",
        help="the paper's (default), or pretrain-finetune: the whole schedule in finetune")
    add("--heads", choices=hmpl.HEADS, default="transformer", help="transformer (default): Sparse "
        "R-CNN and MaskFormer; conv: Faster R-CNN and Semantic FPN")
    add("--adapter", choices=ADAPTERS, default="lv", metavar="KIND",
        help="lv (default): FPN and LV-Adapter; fpn: FPN alone; pre, post: with two convolutions a "
        "level before or after it; pre_scalar, pre_vector: as residuals of learnable weight; "
        "pre+lv and so on: with the LV-Adapter too")
    add("--prompts", choices=("learned", "engineered", "ensemble"), default="learned",
        help="learned task contexts (default), one sentence for each class, or the mean of 63")
    add("--contexts", default="16", metavar="N|WORDS",
        help="learned tokens of a prompt (default 16), or words that they begin as")
    add("--clip", metavar="NAME", default="ViT-B-16", help="CLIP's text tower: RN50, ViT-B-32, "
        "ViT-B-16 (default), a checkpoint file, or none = random")
    add("--pretrained", metavar="NAME", default="supervised", help="the body: supervised "
        "(default) = torchvision's, none = random, "
        f"{', '.join(PRETRAINED)}, or a file of theirs, MoCo, DetCo or PixPro")
    add("--pixels", choices=hmpl.PIXELS, help="that this body wants; default: as its file tells")
    add("--profile", choices=hmpl.PROFILES, help="paper: ResNet-50 at 1280x720, needs a GPU; "
        "tiny: ResNet-18 for small images and laptops; default: tiny on the sample, else paper")

    add = p.add_argument_group("schedule").add_argument
    add("--stage", choices=(*STAGES, "all"), default=STAGES[-1],
        help="run up to this stage (default: finetune, the last; all: the same)")
    add("--epochs", type=positive, help="length of the plain schedule: adapt has a third of it, "
        "finetune two thirds, each teacher a share; default by profile")
    add("--steps", type=whole(1), help="the same in optimizer steps; default: by --epochs")
    add("--batch", type=whole(1), help="images in a step, over all GPUs; default by profile")
    add("--lr", type=positive, help="learning rate; default: the profile's x sqrt(batch / its "
        "batch), AdamW's rule (arXiv 2205.10287); if losses become NaN, halve it")
    add("--size", type=image_size, metavar="WxH", help="network's image size; default: the "
        f"profile's, for tiny the images' own up to {TINY_WIDTH} wide")
    add("--seed", type=whole(0), default=0,
        help="of split, weights, order and augmentation (default 0)")

    add = p.add_argument_group("machine").add_argument
    add("--out", metavar="DIR", help="run folder; default: runs/SETTING, or runs/nuimages")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--accum", type=whole(1), default=1, help="parts a batch is computed in (default 1); if "
        "memory is short, double it: results stay nearly the same")
    add("--amp", choices=("auto", "bf16", "fp16", "no"), default="auto", help="mixed precision; "
        "auto (default): bf16 where the hardware has it, else fp16 on a GPU, none on a CPU")
    add("--workers", type=whole(0),
        help="processes that read images, for each GPU; default: 8 on a GPU, else 0")

    args = p.parse_args(argv)
    args.setting = args.setting or ("disjoint_normal" if args.dataset == "bdd100k" else "full")
    args.stage = STAGES[-1] if args.stage == "all" else args.stage
    classes = evaluate.DATASETS[args.dataset].classes
    args.tasks = tuple(dict.fromkeys(args.tasks.split(","))) if args.tasks else ()
    if not set(args.tasks) <= set(classes):
        p.error(f"--tasks {','.join(args.tasks)} was given, but {args.dataset} has "
                f"{', '.join(classes)}: name some of these.")
    if args.dataset != "bdd100k" and args.setting != "full":
        p.error(f"--setting {args.setting} shares out BDD100K's three tasks, but every image of "
                f"{args.dataset} is labelled for all it has: use --setting full.")
    if not set(args.threshold) <= set(args.tasks or classes):
        p.error(f"--threshold {', '.join(args.threshold)} was given, but the tasks are "
                f"{', '.join(args.tasks or classes)}: name only these.")
    return args


def run_stages(args: argparse.Namespace) -> None:
    run = start(args)
    stages = stages_of(run, args.stage)
    run.say(plan(run, stages))
    if args.dry_run:
        return
    if run.world > 1:
        dist.barrier()                               # all have read what is there
    if run.rank == 0:
        evaluate.write_json(run.out / "split.json", run.split)
        evaluate.write_json(run.out / "config.json", run.config)
    for name in stages:
        if name == "pseudo":
            run_pseudo(run, stages["teachers"])
        for stage in stages[name]:
            run_stage(run, stage)
        if run.world > 1:
            dist.barrier()


def main(argv: Sequence[str] | None = None) -> None:
    args, failed = parse_args(argv), None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt.on_signal)
    try:
        run_stages(args)
    except Stopped:
        if evaluate.rank_and_world()[0] == 0:
            tqdm.write(f"stopped; the same command goes on: {shlex.join(sys.argv)}")
    except (InputError, hmpl.WeightsError, prompts.TextError, OSError) as error:
        # Exits below: in here the error's frames would keep the workers alive.
        failed = f"train.py: {evaluate.sentence(error)}"
    if failed:
        sys.exit(failed)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
