"""Trains HMPL: teachers -> pseudo labels -> adapt -> finetune; the same command resumes a run.

    python train.py --setting disjoint_normal --stage adapt         # BDD100K, or the drawn sample
    torchrun --nproc_per_node=8 train.py --setting full --data data/bdd100k
    python train.py --setting disjoint_balance --dry-run            # only the plan

pretrain-adapt-finetune ("Effective Adaptation in Multi-Task Co-Training for Unified Autonomous
Driving", NeurIPS 2022): a pretrained backbone is frozen while adapters, prompt contexts and heads
learn from all tasks (adapt, a third of the budget), then everything learns (finetune, two thirds).
Images are labelled for one task each; single-task teachers add the missing labels as pseudo labels.

Like make, a stage first runs the stages it needs. One run folder holds everything: config.json,
split.json, teachers/TASK.pt, pseudo/ (BDD100K's layout), adapt.pt, finetune.pt, log.jsonl,
curves.png and pictures/ to watch it, and lock, which the running process holds.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
import torchvision
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

try:
    import fcntl
except ImportError:                          # Windows: run folders are not locked there
    fcntl = None

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
# How each of hmpl.PROFILES learns. lr: for this batch; lr_factors: modules with another rate;
# scales: of the training images; confidence: least one of pseudo pixels; tower: the random text
# tower; teachers: their shares of the plain schedule, in the order in which they learn; chained:
# each begins with the weights of the one before, the first joint stage with those of all.
TRAINING = {
    "paper": dict(
        epochs=36, batch=16, lr=1e-4, decay=1e-4, warmup=1000, scales=(5 / 6, 1),
        lr_factors={"backbone": 0.25, "adapter": 0.25, "heads.detection": 0.25},
        confidence=0.5, tower={}, chained=False,
        teachers={"semantic": 0.25, "detection": 0.25, "drivable": 0.25}),
    "tiny": dict(
        epochs=3, batch=4, lr=7e-4, decay=1e-2, warmup=20, scales=(5 / 6, 7 / 6),
        lr_factors={"backbone": 0.3},
        confidence=0.1, tower=dict(width=64, layers=2, embed_dim=64), chained=True,
        teachers={"semantic": 0.6, "detection": 0.5, "drivable": 0.55}),
}
ZOO = "https://download.openmmlab.com/mmselfsup/1.x"
PRETRAINED = {  # MMSelfSup's ResNet-50; releases without a checksum are given as a file
    "moco-v2": "mocov2_resnet50_8xb32-coslr-200e_in1k_20220825-b6d23c86",
    "simclr": "simclr_resnet50_16xb256-coslr-200e_in1k_20220825-4d9cce50",
    "swav": "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96_20220825-5b3fc7fc",
    "byol": "byol_resnet50_16xb256-coslr-200e_in1k_20220825-de817331",
    "densecl": "densecl_resnet50_8xb32-coslr-200e_in1k_20220825-3078723b",
}
TEMPLATES = {"engineered": prompts.ENGINEERED, "ensemble": prompts.ENSEMBLE}
ADAPTER_CHOICES = ("lv", *hmpl.ADAPTERS, *(f"{pyramid}+lv" for pyramid in hmpl.ADAPTERS))
TINY_WIDTH = 128             # of the tiny profile's images, unless --size is given
PSEUDO_SCORE = 0.3           # score_threshold of pseudo boxes
EMBEDDINGS = ("query_embed", "proposal_features", "proposal_boxes", "contexts")
CLIP_NORM = 1.0
MAX_TRIES = 10               # unreadable samples, or steps that are not finite, in a row
SAVE_SECONDS = 600
LOG_STEPS, CURVE_STEPS = 10, 100
MAY_CHANGE = {"data", "accum", "amp", "origin"}     # when a run is resumed


# ------------------------------------------------------------------------------------- the split

def make_split(train: LabelledImages, val_stems: Sequence[str], setting: str, seed: int,
               tasks: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Chooses for each task (default: all of the data set) the stems of the training images whose
    ground truth it may use, without those of the validation set. A task's stems do not depend on
    which other tasks are asked for. Disjoint settings take the paper's numbers, or the largest in
    these proportions for which disjoint sets exist. Raises InputError for tasks without labels."""
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
    # Images of one kind are labelled for the same tasks; kinds [kinds, tasks].
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
    """Shares out images: how many of each kind go to each task, [kinds, tasks]. These are the wanted
    numbers, or the largest in the same proportions that Hall's condition over the tasks allows.

    kinds [kinds, tasks]: which labels an image of the kind has. counts [kinds]: number of images.
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
    """Training images with ground truth for the tasks that the split assigns them, and pseudo labels
    for the others.

    Indexed by (n, (width, height), flip), as `batch_keys` draws them, so that no sample depends on
    the worker that makes it. Yields (image, target, file). If a sample cannot be read, the next one
    takes its place.
    assigned [tasks, images]: whose ground truth is used. indices: the images in use.
    """

    def __init__(self, data: LabelledImages, split: dict[str, list[str]], tasks: Sequence[str],
                 pseudo: BDD100K | None = None):
        self.data, self.pseudo, self.tasks = data, pseudo, tuple(tasks)
        self.assigned = np.stack([np.isin(data.stems, split[task]) for task in tasks])
        self.indices = np.flatnonzero(self.assigned.any(0))

    def __len__(self) -> int:
        return len(self.indices)

    def groups(self) -> list[np.ndarray]:
        """Sample numbers that may share a batch: all, or, without pseudo labels, those with ground
        truth for the same task, so that no batch has only one or two labels of a task."""
        assigned = self.assigned[:, self.indices]
        if self.pseudo is not None or assigned.all():
            return [np.arange(len(self))]
        return [np.flatnonzero(to_task) for to_task in assigned]

    def __getitem__(self, key: tuple[int, tuple[int, int], bool]) -> tuple[Tensor, dict, str]:
        n, size, flip = key
        for _ in range(MAX_TRIES):
            i = self.indices[n % len(self)]
            try:
                return *augment(*self.sample(i), size, flip), str(self.data.files[i])
            except (InputError, OSError) as error:
                reason = str(error)
            tqdm.write(f"NOTE: the next image replaces {self.data.files[i]}: {reason}",
                       file=sys.stderr)
            n += 1
        raise InputError(f"{MAX_TRIES} images in a row cannot be used, the last one because {reason}")

    def sample(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image i at its own size with its labels."""
        assigned = [task for task, yes in zip(self.tasks, self.assigned[:, i]) if yes]
        image, target = self.data.sample(i, assigned)
        if self.pseudo is not None:
            others = [task for task in self.tasks if task not in assigned]
            target |= self.pseudo.target(i, others, image.shape[1:])
        return image, target


def augment(image: Tensor, target: dict[str, Tensor], size: tuple[int, int],
            flip: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Resizes image and target to (width, height) and mirrors them. Clips boxes to the image and
    drops those without area. All keep their types."""
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
    """Yields the keys of samples for every batch from step `start` on, a pure function of the seed.
    The groups of sample numbers take turns, each in a new order every epoch. All images of a step
    have one of the sizes (width, height), so that none is padded. Each of `world` processes takes
    every world-th image of a step's global batch, in `accum` parts."""
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
    """Samples -> lists of images, targets and files."""
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
    """AdamW's groups: no weight decay on biases, norms and learned embeddings. factors: module name
    -> its learning rate as a multiple of `lr`."""
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
    """State that all stages share. `config` holds everything a result depends on; config.json keeps
    it."""
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
    lock: IO | None = None                   # held until the process ends

    @property
    def stems(self) -> set[str]:
        """The stems of all images with ground truth for a task."""
        return set().union(*self.split.values())

    @cached_property
    def unlabelled(self) -> dict[str, np.ndarray]:
        """For each task, the indices of the training images that need pseudo labels."""
        indices = {}
        for task, labelled in self.split.items():
            missing = np.isin(self.train.stems, sorted(self.stems.difference(labelled)))
            if missing.any() and self.config["labels"] == "pseudo":
                indices[task] = np.flatnonzero(missing)
        return indices

    def steps(self, share: float = 1.) -> int:
        """Optimizer steps of a share of the plain schedule, which is `epochs` over all images."""
        config = self.config
        plain = config["steps"] or len(self.stems) * config["epochs"] / config["batch"]
        return max(1, round(plain * share))

    @property
    def notes(self) -> list[str]:
        """Warnings that belong beside the scores."""
        notes = []
        if self.config["data"] == str(evaluate.SAMPLE):
            notes.append("the SAMPLE of drawn roads, not real data: scores mean nothing beyond it")
        for key, kind in (("pretrained", "backbone"), ("clip", "CLIP text tower")):
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
    """One training: of a task's teacher, or of all tasks together."""
    name: str                                # "teacher TASK", "adapt" or "finetune"
    tasks: list[str]
    steps: int
    path: Path                               # of its checkpoint
    begins: list["Stage"]                    # with the weights of these, loaded in this order

    @property
    def joint(self) -> bool:
        return self.name in STAGES


def stages_of(run: Run, last: str = STAGES[-1]) -> dict[str, list[Stage]]:
    """The trainings of each stage of this run, in order, up to the stage `last`. Teachers and pseudo
    labels are stages only if the run makes its own labels."""
    config, rule = run.config, TRAINING[run.config["profile"]]
    stages, chain = {}, []
    if run.unlabelled and not config["labels_of"]:
        stages = {"teachers": [], "pseudo": []}
        needed = run.split if rule["chained"] else run.unlabelled
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
    return f"resumes at step {saved['step']}" if saved["scores"] is None else "done"


# ---------------------------------------------------------------------- signals and checkpoints

def interrupted(number: int) -> str:
    return f"train.py: interrupted by {signal.Signals(number).name}; the same command resumes the run."


def end_at_once(number: int, frame) -> None:
    """Signal handler: ends the process with the exit code that shells expect, 130 or 143."""
    os.write(2, f"\n{interrupted(number)}\n".encode())
    os._exit(128 + number)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM only add their number to the list, so that a loop can end after a step."""
    numbers, handlers = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, frame: numbers.append(number))
    try:
        yield numbers
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def save(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint to a temporary file, syncs it to the disk and renames it, so that `path`
    is whole at every moment."""
    try:
        with evaluate.written_whole(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        need = sum(t.numel() * t.element_size() for t in checkpoint["model"].values()) * 3 >> 20
        path.with_suffix(".part").unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}); about {need} MB are needed and the last "
                      "checkpoint is unharmed: free some space and run the same command") from error


def load_stage(run: Run, stage: Stage) -> dict | None:
    """A stage's checkpoint, if there is one; it must hold the network that this run builds."""
    if not stage.path.exists():
        return None
    saved = hmpl.load_checkpoint(stage.path)
    expected = model_config(run, stage.tasks)
    differing = [key for key in expected if saved["model_config"].get(key) != expected[key]]
    if differing:
        raise InputError(
            f"{stage.path} was written for another network ({', '.join(differing)} differ): use "
            "another --out, or delete it to train this stage anew.")
    return saved


# ------------------------------------------------------------------------------------ the model

def model_config(run: Run, tasks: Sequence[str]) -> dict:
    """The network's arguments."""
    config, profile = run.config, hmpl.PROFILES[run.config["profile"]]
    # The queries attend to P5, as in the paper, if it is at least 8 cells wide, else to stride 16.
    level = 5 if config["size"][0] >= 8 * hmpl.STRIDES[-1] else 4
    pyramid = [part for part in config["adapter"] if part != "lv"] or ["fpn"]
    return {**profile,
            "classes": {task: run.train.classes[task] for task in tasks},
            "maskformer": profile["maskformer"] | {"memory_level": level},
            "size": tuple(config["size"]), "adapter": pyramid[0],
            "pixels": config["pixels"], "heads": config["heads"]}


def new_model(run: Run, stage: Stage) -> hmpl.HMPL:
    """The model at the beginning of a stage: weights of the stages that it begins with, else a
    pretrained backbone; the rest is new. Joint stages have the LV-Adapter unless --adapter leaves it
    out; adapt's backbone is frozen."""
    config, frozen = run.config, stage.name == "adapt"
    torch.manual_seed(config["seed"])
    text = text_source(run) if stage.joint and "lv" in config["adapter"] else None
    model = hmpl.HMPL(**model_config(run, stage.tasks), text=text)
    for before in stage.begins:
        model.load_state_dict(load_stage(run, before)["model"], strict=False)
    if config["pretrained"] == "none" and not stage.begins:
        calibrate(model, run, frozen)
    elif not stage.begins:
        path = find_backbone(config["pretrained"], config["profile"])
        run.say(f"  backbone {path}: {hmpl.load_backbone(model.backbone, path)[0]}")
    model.freeze_backbone(frozen)
    total = sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.say(f"  {stage.name}: {learned:,} parameters learn, {total - learned:,} are frozen")
    return model


def calibrate(model: hmpl.HMPL, run: Run, frozen: bool) -> None:
    """Sets the BatchNorm statistics of a random backbone from 32 training images: with the initial
    ones (mean 0, variance 1), features of a frozen backbone would grow with every block. If it is
    frozen, its residual branches are emptied too: its stem alone serves better than random
    branches, while a backbone that learns does so faster with them."""
    backbone, count = model.to(run.device).backbone, len(run.train)
    if frozen:
        for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            for block in layer:
                nn.init.zeros_(getattr(block, "bn3", block.bn2).weight)
    rng = np.random.default_rng(run.config["seed"])
    indices = rng.choice(count, min(32, count), replace=False)
    images = [resize(image, run.config["size"][::-1], antialias=True)
              for _, image, _ in evaluate.read_items(run.train, (), False, indices)]
    update_bn([model.batch(images[n:n + 8])[0] for n in range(0, len(images), 8)], backbone)


def find_backbone(name: str, profile: str) -> Path:
    """A file of backbone weights: the given one, or the one of this name, cached or downloaded (its
    name ends in the first 8 digits of its sha256)."""
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
    """CLIP's text tower, by name or from a checkpoint file, and its tokenizer, with the vocabulary
    beside that file if there is one. none: a random tower that reads bytes."""
    if name == "none":
        tower = prompts.TextTower(**TRAINING[profile]["tower"])
        return tower, prompts.Tokenizer(prompts.BYTES)
    path = Path(name) if Path(name).is_file() else prompts.find_tower(name)
    beside = path.parent / "bpe_simple_vocab_16e6.txt.gz"
    vocabulary = prompts.find_vocabulary(beside if beside.exists() else None)
    return prompts.load_text_tower(path), prompts.Tokenizer(vocabulary)


def text_source(run: Run) -> nn.Module | Tensor:
    """The text source of the LV-Adapter: learned task prompts, or features of hand-written ones."""
    config, contexts = run.config, run.config["contexts"]
    classes = {task: run.train.classes[task] for task in run.split}
    tower, tokenizer = find_text(config["clip"], config["profile"])
    if config["prompts"] == "learned":
        begin = {"num_contexts": contexts} if isinstance(contexts, int) else {"words": contexts}
        return prompts.TaskPrompts(tower, tokenizer, classes, **begin)
    templates = TEMPLATES[config["prompts"]]
    return torch.cat([prompts.encode_templates(tower, tokenizer, names, templates)
                      for names in classes.values()])


def describe_text(run: Run) -> str:
    """Describes the LV-Adapter's prompts; raises TextError if the tower cannot read them."""
    if run.config["prompts"] != "learned":
        templates = TEMPLATES[run.config["prompts"]]
        return f"hand-written prompts, {len(templates)} for each class, the first {templates[0]!r}"
    text = text_source(run)
    return (f"learned prompts, X = context: {text.texts[0]!r} and so on, "
            f"{int(text.eot.max()) + 1} tokens at most")


# ------------------------------------------------------------------------------------- the loop

class Training:
    """A stage's model, optimizer and counters: everything that a checkpoint has to restore so that a
    resumed run equals an uninterrupted one."""

    def __init__(self, run: Run, stage: Stage, model: hmpl.HMPL):
        config, device = run.config, run.device
        if run.world > 1 and device.type == "cuda":
            model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
        self.run, self.stage = run, stage
        self.model = self.parallel = model.to(device).train()
        groups = parameter_groups(model, config["lr"], lr_factors(run, stage), config["decay"])
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp is torch.float16)
        self.step = self.skipped = self.clipped = 0
        if run.rank:
            torch.manual_seed(config["seed"] + run.rank)     # other dropout than the first process
        saved = load_stage(run, stage)
        if saved:
            self.restore(saved)
        self.infinite = self.stop = 0                # steps in a row; number of a signal
        self.saved = self.logged = time.monotonic()
        self.logged_step = self.step
        if run.world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(model, static_graph=True)

    def save(self, scores: dict | None = None) -> None:
        """Writes the checkpoint; called by all processes, done by the first. Without scores the
        stage is unfinished: the optimizer's state and all else that resuming needs is kept too."""
        run, model = self.run, self.model
        rng = {"torch": torch.get_rng_state()}
        if run.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(run.device)
        rng = evaluate.from_all_ranks(rng)
        self.saved = time.monotonic()
        if run.rank:
            return
        model.update_text()
        checkpoint = {
            "stage": self.stage.name, "step": self.step, "steps": self.stage.steps,
            "notes": run.notes, "scores": scores, "config": run.config,
            "model_config": model_config(run, self.stage.tasks), "model": model.state_dict()}
        if scores is None:
            checkpoint |= {
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "rng": rng, "skipped": self.skipped, "clipped": self.clipped}
        save(self.stage.path, checkpoint)

    def restore(self, saved: dict) -> None:
        """Restores the state that `save` wrote."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.run.rank < len(saved["rng"]):
            rng = saved["rng"][self.run.rank]
            torch.set_rng_state(rng["torch"])
            if "cuda" in rng and torch.cuda.is_available():
                torch.cuda.set_rng_state(rng["cuda"])
        self.step, self.skipped, self.clipped = (
            saved[key] for key in ("step", "skipped", "clipped"))

    def advance(self, batches: Iterator, signal_number: int = 0) -> dict[str, float]:
        """Does one optimizer step; returns its losses. All processes agree on `stop`, the number of
        a signal that any of them received, and on `due`, whether to save. A step with gradients
        that are not finite (with DDP they are the same everywhere) changes nothing."""
        optimizer = self.optimizer
        factor = learning_rate(self.step, self.stage.steps, self.run.config["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        losses, files = self.backward(batches)
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM, foreach=True)
        flags = torch.tensor([signal_number, time.monotonic() - self.saved > SAVE_SECONDS])
        flags = flags.float().to(self.run.device, non_blocking=True)
        if self.run.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        numbers = torch.cat([torch.stack([*losses.values(), norm]), flags])
        *values, self.norm, stop, due = numbers.tolist()                 # the step's one wait
        losses = dict(zip(losses, values))
        self.stop, self.due = int(stop), due > 0
        finite = math.isfinite(self.norm)
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        self.skipped += not finite
        self.clipped += self.norm > CLIP_NORM
        self.count_infinite(finite, losses, files)
        return losses

    def count_infinite(self, finite: bool, losses: dict[str, float], files: list[str]) -> None:
        """Raises InputError after MAX_TRIES steps in a row that were not finite. Steps at which a
        scaler still lowers its scale do not count."""
        scaling = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        self.infinite = 0 if finite or scaling else self.infinite + 1
        if self.infinite == MAX_TRIES:
            names = [key for key, value in losses.items() if not math.isfinite(value)]
            raise InputError(f"stage {self.stage.name}: {', '.join(names) or 'gradients'} not "
                             f"finite for {MAX_TRIES} steps up to {self.step}, with "
                             f"{', '.join(files)}: start in another --out with a lower --lr or "
                             "--amp no.")

    def backward(self, batches: Iterator) -> tuple[dict[str, Tensor], list[str]]:
        """Computes the gradients of `accum` batches; returns the losses' means and the files."""
        run, accum = self.run, self.run.config["accum"]
        self.optimizer.zero_grad(set_to_none=True)
        means, files = {}, []
        for _ in range(accum):
            images, targets, batch_files = next(batches)
            with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
                losses = self.parallel(images, targets)
            self.scaler.scale(sum(losses.values()) / accum).backward()
            for key, value in losses.items():
                means[key] = means.get(key, 0) + value.detach() / accum
            files += batch_files
        return means, files

    def log(self, losses: dict[str, float]) -> None:
        """Adds a line to the log; its speed is the mean since the last line."""
        now, images = time.monotonic(), (self.step - self.logged_step) * self.run.config["batch"]
        line = {"stage": self.stage.name, "step": self.step,
                "lr": self.optimizer.param_groups[0]["lr"], **losses, "norm": self.norm,
                "skipped": self.skipped, "clipped": round(self.clipped / self.step, 4),
                "images_per_s": round(images / (now - self.logged), 2)}
        if self.run.device.type == "cuda":
            line["memory_mb"] = torch.cuda.max_memory_allocated(self.run.device) >> 20
        self.run.log(line)
        self.logged, self.logged_step = now, self.step


def lr_factors(run: Run, stage: Stage) -> dict[str, float]:
    """The config's learning-rate factors. A backbone that begins random learns at the full rate."""
    random = run.config["pretrained"] == "none" and all(before.joint for before in stage.begins)
    return {name: factor for name, factor in run.config["lr_factors"].items()
            if name != "backbone" or not random}


def train(run: Run, stage: Stage, model: hmpl.HMPL, samples: Samples) -> hmpl.HMPL:
    """Trains a stage's model, from its checkpoint if there is one, then scores it."""
    t, config, steps = Training(run, stage, model), run.config, stage.steps
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
    with noted_signals() as signals:
        for _ in bar:
            losses = t.advance(batches, max(signals, default=0))
            bar.set_postfix(loss=f"{sum(losses.values()):.2f}")
            if t.step % LOG_STEPS == 0 or t.step == steps:
                t.log(losses)
            if t.step % CURVE_STEPS == 0 and run.rank == 0:
                evaluate.draw_curves(run.out / "log.jsonl")
            if t.stop or t.due or t.step == steps:
                t.save()
            if t.stop:
                break
        del batches                                  # ends its workers
        if t.stop:                                   # in all processes, after the same step
            if run.world > 1:
                dist.barrier()                       # until the first has saved
            if run.rank == 0:
                print(interrupted(t.stop), file=sys.stderr)
            sys.exit(128 + t.stop)
    score(run, stage, t)
    return model


def score(run: Run, stage: Stage, t: Training) -> None:
    """Scores a trained stage on the validation images, of which there may be none, and saves it as
    finished."""
    model = t.model.eval().requires_grad_(False)     # as `hmpl.load_model` does
    if run.world > 1:
        for buffer in model.buffers():               # each rank's BatchNorm saw other images
            dist.broadcast(buffer, 0)
    scores = {"images": 0}
    if any(run.val.labelled[task].any() for task in stage.tasks):
        scores = evaluate.evaluate(model, run.val, amp=run.amp, workers=run.workers,
                                   batch=evaluate.BATCH[run.device.type],
                                   keep=progress_pictures(run, stage))
    run.log({"stage": stage.name, "step": t.step, "val": scores})
    t.save(scores)
    if run.rank == 0:
        evaluate.draw_curves(run.out / "log.jsonl")
    run.say(evaluate.table(scores, stage.name))


def trim_log(path: Path, stage: str, step: int) -> None:
    """Drops a stage's lines after a step from the log, and lines that were cut off."""
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
    """A `keep` for `evaluate.evaluate` that draws three fixed validation images, of those with most
    labels."""
    labels = sum(run.val.labelled[task].astype(int) for task in stage.tasks)
    most = np.flatnonzero(labels == labels.max())
    chosen, folder = most[[0, len(most) // 2, -1]], run.out / "pictures"
    folder.mkdir(exist_ok=True)

    def keep(i: int, image: Tensor, target: dict, prediction: dict) -> None:
        if i in chosen:
            sheet = evaluate.draw(image, prediction, target, stage.name, classes=run.val.classes)
            name = f"{run.val.stems[i]}_{stage.name.replace(' ', '_')}.png"
            sheet.save(folder / name, compress_level=1)
    return keep


# --------------------------------------------------------------------------------- pseudo labels

def run_pseudo(run: Run, teachers: Sequence[Stage]) -> None:
    """Labels images for the tasks whose labels they lack. The processes share fixed batches.

    Each batch writes its masks, then one JSON with its boxes and its part of the report; a batch
    whose JSON is there is skipped. At the end the first process turns the JSONs into the label file
    and report.json.
    """
    folder, report = run.out / "pseudo", run.out / "pseudo" / "report.json"
    if report.exists():
        return
    indices = np.unique(np.concatenate(list(run.unlabelled.values())))
    size = evaluate.BATCH[run.device.type]           # fixed: rounding depends on it
    batches = {folder / "batches" / f"{indices[n]}.json": indices[n:n + size].tolist()
               for n in range(0, len(indices), size)}
    todo = [path for path in list(batches)[run.rank::run.world] if not path.exists()]
    writer = evaluate.LabelWriter(folder, run.train.split, run.train.classes)
    predicted = teach(run, teachers, [batches[path] for path in todo])
    for path, items in zip(todo, predicted):
        evaluate.write_json(path, label_batch(run, writer, items))
    if run.world > 1:
        dist.barrier()
    if run.rank == 0:
        numbers = finish_labels(run, writer, [evaluate.read_json(path) for path in batches])
    writer.close()
    if run.rank == 0:
        evaluate.write_json(report, numbers)
        shutil.rmtree(folder / "batches")


def teach(run: Run, teachers: Sequence[Stage],
          batches: Sequence[Sequence[int]]) -> Iterator[list[tuple]]:
    """The teachers' `evaluate.predictions` for batches of training images; each teacher predicts
    the images that lack its task. Images that cannot be read are skipped."""
    models = {teacher.tasks[0]: hmpl.load_model(teacher.path, run.device)
              for teacher in teachers if teacher.tasks[0] in run.unlabelled}

    def predict(indices: list[int], images: list[Tensor]) -> list[dict]:
        predictions = [{} for _ in indices]
        for task, model in models.items():
            chosen = np.flatnonzero(np.isin(indices, run.unlabelled[task]))
            confidence = run.config["thresholds"][task] or 0.
            results = model.predict([images[n] for n in chosen], confidence)
            for n, result in zip(chosen, results):
                predictions[n] |= result
        return predictions

    return evaluate.predictions(
        predict, run.train, batches, run.device, desc="pseudo", workers=run.workers, amp=run.amp,
        tasks=list(run.unlabelled), strict=False)


def label_batch(run: Run, writer: evaluate.LabelWriter, items: Sequence[tuple]) -> dict:
    """Writes a batch's masks. Returns its boxes, and for each mask task the kept share of each
    image's pixels and the confusion with ground truth, which only measures the labels here: the
    split does not assign it."""
    boxes, kept, meters = [], {}, {}
    for i, _, target, prediction in items:
        if "boxes" in prediction:
            boxes.append([i, *(prediction[key].tolist() for key in ("boxes", "scores", "labels"))])
        masks = {task: mask for task, mask in prediction.items() if task in run.unlabelled}
        writer.add(run.train.files[i], masks)
        for task, mask in masks.items():
            kept.setdefault(task, []).append((mask < evaluate.IGNORE).float().mean().item())
            if task in target:
                meter = meters.setdefault(task, evaluate.meter_of(task, run.train.classes[task]))
                meter.update(target[task].numpy(), mask.numpy())
    writer.wait()
    return {"boxes": boxes, "kept": kept,
            "confusion": {task: meter.confusion.tolist() for task, meter in meters.items()}}


def finish_labels(run: Run, writer: evaluate.LabelWriter, batches: list[dict]) -> dict[str, dict]:
    """Hands the writer the boxes of all batches. Returns the report: for each task, how many labels
    are kept and, if the data has ground truth for these images, how good they are."""
    report = {}
    for task, indices in run.unlabelled.items():
        if evaluate.kind_of(task) == "boxes":
            numbers = add_boxes(run, writer, [image for batch in batches
                                              for image in batch["boxes"]])
        else:
            shares = itertools.chain(*(batch["kept"].get(task, ()) for batch in batches))
            numbers = {"kept_pixels": math.fsum(shares) / len(indices),
                       "threshold": run.config["thresholds"][task]}
            meter = evaluate.meter_of(task, run.train.classes[task])
            for batch in batches:
                meter.confusion += np.array(batch["confusion"].get(task, 0))
            if meter.confusion.any():
                numbers["mIoU"] = evaluate.percent(meter.compute()["mIoU"])
        say_numbers(run, task, numbers)
        report[task] = numbers
    return report


def add_boxes(run: Run, writer: evaluate.LabelWriter, images: list[list]) -> dict:
    """Hands the writer the boxes from the score threshold on; returns their numbers for the report.
    Without --threshold it is PSEUDO_SCORE; if a weak teacher gives few boxes from there on, it is
    lower: as many boxes are kept as images with ground truth have on average (after LabelMatch,
    CVPR 2022), since an image without its boxes would teach that there are none."""
    data, score_threshold = run.train, run.config["thresholds"]["detection"]
    labelled = np.isin(data.stems, run.split["detection"])
    true_boxes = float(np.diff(data.offsets)[labelled].mean())
    scores = sorted(itertools.chain(*(scores for _, _, scores, _ in images)), reverse=True)
    if score_threshold is None:
        score_threshold = PSEUDO_SCORE
        wanted = min(round(true_boxes * len(images)), len(scores))
        if wanted:
            score_threshold = min(score_threshold, scores[wanted - 1])
    meter, kept = evaluate.meter_of("detection", data.classes["detection"]), 0
    for i, *values in images:
        prediction = dict(zip(("boxes", "scores", "labels"), map(torch.tensor, values)))
        target = data.target(i, ["detection"])
        if target:                                   # only measures the labels
            meter.update(target, prediction, i)
        keep = prediction["scores"] >= score_threshold
        kept += int(keep.sum())
        writer.add(data.files[i], {key: value[keep] for key, value in prediction.items()})
    numbers = {"boxes_per_image": kept / len(images), "kept_boxes": kept / max(1, len(scores)),
               "true_boxes_per_image": true_boxes, "threshold": score_threshold}
    if meter.images:
        numbers["AP50"] = evaluate.percent(meter.compute()["AP50"])
    return numbers


def say_numbers(run: Run, task: str, numbers: dict) -> None:
    text = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items() if value is not None)
    run.say(f"  pseudo labels {task}, {len(run.unlabelled[task])} images: {text}")
    if not numbers.get("kept_boxes", numbers.get("kept_pixels")):
        run.say(f"NOTE: no {task} pseudo label is left, so that most images seem to show nothing: "
                f"the teacher is weak. To keep more, delete {run.out / 'pseudo'} and add "
                f"--threshold {task}=0.05.")


def pseudo_labels(run: Run) -> BDD100K:
    """This or another run's pseudo labels; raises InputError if a task has none of them."""
    folder = Path(run.config["labels_of"] or run.out) / "pseudo"
    pseudo = BDD100K(run.train.root, run.train.split, labels=folder)
    for task, indices in run.unlabelled.items():
        if not pseudo.labelled[task][indices].any():
            raise InputError(f"{folder} has no {task} labels for the {len(indices)} images that "
                             "need them: delete it and run stage pseudo again.")
    return pseudo


# ------------------------------------------------------------------------------------ the stages

def run_stage(run: Run, stage: Stage) -> None:
    """Trains a teacher on its task's ground truth, or all tasks together on pseudo labels too."""
    if state(run, stage) == "done":
        return
    pseudo = pseudo_labels(run) if stage.joint and run.unlabelled else None
    samples = Samples(run.train, run.split, stage.tasks, pseudo)
    train(run, stage, new_model(run, stage), samples)


def drop_outdated_labels(run: Run, stages: dict[str, list[Stage]]) -> None:
    """Deletes pseudo labels if a teacher is still to be trained: they came from an earlier one."""
    if any(state(run, teacher) == "to do" for teacher in stages.get("teachers", ())):
        shutil.rmtree(run.out / "pseudo", ignore_errors=True)


def plan(run: Run, stages: dict[str, list[Stage]]) -> str:
    """Describes the run stage by stage, and which stages are done."""
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
            lines.append(f"  {name:<20} the missing labels  {'done' if done else 'to do'}")
        for stage in stages[name]:
            frozen = ", backbone frozen" if stage.name == "adapt" else ""
            begins = " and ".join(before.name for before in stage.begins)
            begins = f", begins with {begins}" if begins else ""
            lines.append(f"  {stage.name:<20} {stage.steps:>6} steps{frozen}{begins}  "
                         f"{state(run, stage)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------ options and the data

def start(args: argparse.Namespace) -> Run:
    """Opens data and weights and builds the run; a run that was begun before must be the same."""
    device = evaluate.this_device()
    rank, world = evaluate.rank_and_world()
    bdd, reader = args.dataset == "bdd100k", evaluate.DATASETS[args.dataset]
    out = Path(args.out or f"runs/{args.setting if bdd else args.dataset}")
    lock = None if args.dry_run or rank else lock_folder(out)
    with first_alone():                              # it may draw the sample and download weights
        root = data_folder(args.data, args.dataset)
        train, val = reader(root, "train"), reader(root, "val")
        if not set(args.tasks) <= set(train.classes):
            raise InputError(f"--tasks {','.join(args.tasks)} was given, but {root} has "
                             f"{', '.join(train.classes)}: name some of these.")
        sample = root.resolve() == evaluate.SAMPLE
        profile = args.profile or ("tiny" if sample else "paper")
        pretrained, pixels = usable_weights(args.pretrained, "backbone", backbone_pixels, profile,
                                            sample)
        clip, _ = usable_weights(args.clip, "CLIP text tower", find_text, profile, sample)
    config = make_config(args, profile, world, {
        "data": str(root.resolve()), "pretrained": pretrained, "clip": clip,
        "pixels": args.pixels or pixels or "imagenet",
        "tasks": list(args.tasks or train.classes),
        "size": list(args.size or network_size(train, profile)), "images": fingerprint(train),
        "origin": origin()})
    split = find_split(args, out, config, train, val)
    amp = evaluate.amp_type(args.amp, device)
    workers = evaluate.WORKERS[device.type] if args.workers is None else args.workers
    return Run(out, config, device, amp, workers, train, val, split, rank, world, lock)


def lock_folder(out: Path) -> IO:
    """Locks the run folder until this process ends, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "lock", "a+")
    try:
        if fcntl:
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


def make_config(args: argparse.Namespace, profile: str, world: int, found: dict) -> dict:
    """Everything that a result depends on: options, the profile's rules and what was `found`."""
    rule, shares = TRAINING[profile], args.accum * world
    batch = args.batch or rule["batch"]
    if batch % shares:
        raise InputError(f"a batch of {batch} images cannot be shared by {shares} parts (processes "
                         f"x --accum): give a --batch that {shares} divides.")
    factors = dict(rule["lr_factors"])
    if args.heads == "conv":
        factors.pop("heads.detection", None)         # Sparse R-CNN's
    confidence = {task: None if evaluate.kind_of(task) == "boxes" else rule["confidence"]
                  for task in found["tasks"]}
    as_given = ("dataset", "setting", "scheme", "labels", "heads", "prompts", "steps", "accum",
                "amp", "seed")
    return {
        **{key: getattr(args, key) for key in as_given},
        **{key: rule[key] for key in ("decay", "warmup", "scales")},
        "profile": profile, "adapter": sorted(args.adapter.split("+")),
        "contexts": int(args.contexts) if args.contexts.isdecimal() else args.contexts,
        "labels_of": args.labels_of and str(Path(args.labels_of).resolve()),
        "epochs": args.epochs or rule["epochs"], "batch": batch,
        "lr": args.lr or rule["lr"] * math.sqrt(batch / rule["batch"]), "lr_factors": factors,
        "thresholds": confidence | args.threshold, **found}


def network_size(train: LabelledImages, profile: str) -> tuple[int, int]:
    """The default width and height of the network's images: the data set's, or for own classes and
    small profiles the first image's, in `tiny` at most TINY_WIDTH wide."""
    if profile != "tiny" and train.classes == type(train).classes:
        return train.size
    height, width = train.image(0).shape[1:]
    scale = min(1, TINY_WIDTH / width) if profile == "tiny" else 1
    return round(width * scale), round(height * scale)


def usable_weights(name: str, kind: str, load: Callable, profile: str, sample: bool) -> tuple:
    """The weights' name, or their file's absolute path, and the result of `load`. If they cannot be
    had, that is an error on real data; on the sample "none" replaces them."""
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


def backbone_pixels(name: str, profile: str) -> str:
    """The pixel statistics that backbone weights expect; the weights must fit the profile."""
    backbone = hmpl.ResNetBackbone(hmpl.PROFILES[profile]["depth"])
    return hmpl.load_backbone(backbone, find_backbone(name, profile))[1]


def find_split(args: argparse.Namespace, out: Path, config: dict, train: LabelledImages,
               val: LabelledImages) -> dict[str, list[str]]:
    """The split of the run begun in `out`, or of the run that --labels-of names, else a new one."""
    trained = {file.stem for file in out.rglob("*.pt")}
    if trained and (out / "config.json").exists():
        keys = config.keys() - MAY_CHANGE
        if not (out / "pseudo").exists() and trained.isdisjoint(STAGES):
            keys -= {"thresholds"}                   # not used yet
        same_options(out, config, keys, "use them again, or another --out")
        return evaluate.read_json(out / "split.json")
    if not args.labels_of:
        return make_split(train, val.stems, args.setting, args.seed, config["tasks"])
    other = Path(args.labels_of)
    if not (other / "pseudo" / "report.json").exists():
        raise InputError(f"--labels-of {other} has no finished pseudo labels: run its stage pseudo "
                         "first.")
    same_options(other, config, ("dataset", "setting", "tasks", "images"),
                 "name a run of the same data and setting with --labels-of")
    return evaluate.read_json(other / "split.json")


def same_options(folder: Path, config: dict, keys: Iterable[str], advice: str) -> None:
    """Raises InputError unless the run in `folder` was begun with these values of `config`."""
    before = evaluate.read_json(folder / "config.json")
    now = json.loads(json.dumps(config))                                 # tuples as lists
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in keys
               if before.get(key) != now[key]]
    if changed:
        raise InputError(f"{folder} was begun with other options ({'; '.join(changed)}): {advice}.")


def fingerprint(data: LabelledImages) -> str:
    """A digest of classes, images, boxes and which labels there are; masks would take too long."""
    digest = hashlib.sha256(repr(data.classes).encode())
    for array in (data.files, *data.labelled.values(), data.boxes, data.box_labels, data.crowd,
                  data.offsets):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def origin() -> dict:
    """This start's command, versions and, in a git checkout, commit."""
    folder, commit = Path(__file__).resolve().parent, None
    if (folder / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {lib.__name__: str(lib.__version__) for lib in (torch, torchvision, np)}
    return {"command": shlex.join(sys.argv), "commit": commit, "python": sys.version.split()[0],
            **versions}


def data_folder(given: str | None, dataset: str = "bdd100k") -> Path:
    """The data folder (`evaluate.find_data`); draws the sample at its first use."""
    root = evaluate.find_data(given, dataset)
    if root.resolve() == evaluate.SAMPLE and not root.is_dir():
        script = root.parent / "draw_roads.py"
        if subprocess.run([sys.executable, script], check=False).returncode:
            raise InputError(f"{script} could not draw the sample: see above, or give --data.")
    return root


@contextlib.contextmanager
def first_alone():
    """Runs the block in the first process before the others, which find its files."""
    rank, world = evaluate.rank_and_world()
    if rank:
        dist.barrier()
    yield
    if world > 1 and not rank:
        dist.barrier()


# --------------------------------------------------------------------------------- command line

def image_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 32:
        return int(width), int(height)
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected WIDTHxHEIGHT from 32x32 on, "
                                     "such as 256x144.")


def positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected a number between 0 and inf.")


def thresholds(text: str) -> dict[str, float]:
    with contextlib.suppress(ValueError):
        numbers = {task: float(number) for task, number in
                   (pair.split("=") for pair in text.split(","))}
        if all(0 <= number <= 1 for number in numbers.values()):
            return numbers
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected TASK=NUMBER, numbers from 0 to "
                                     "1, such as detection=0.5,semantic=0.6.")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Trains HMPL in stages (teachers, pseudo, adapt, finetune), all in one run "
        "folder. Each stage first runs the stages it needs; the same command again resumes.")
    whole = evaluate.whole

    add = p.add_argument_group("data").add_argument
    add("--data", metavar="DIR",
        help="default: $BDD100K, data/bdd100k, else a drawn sample; $NUIMAGES, data/nuimages")
    add("--dataset", choices=evaluate.DATASETS, default="bdd100k",
        help="bdd100k (default): three tasks; nuimages: detection and semantic")
    add("--setting", choices=SETTINGS, help="whose ground truth is used: 20k drivable, 10k "
        "detection, 7k semantic images (default), 7k each, or all (nuImages' default)")
    add("--tasks", metavar="T,T", help="learn only these; default: all of the data")
    add("--labels", choices=("pseudo", "own"), default="pseudo", help="pseudo (default): teachers "
        "add the missing labels; own: a missing label adds no loss")
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
    add("--adapter", choices=ADAPTER_CHOICES, default="lv", metavar="KIND",
        help="lv (default): FPN and LV-Adapter; fpn: FPN alone; pre, post: with two convolutions a "
        "level before or after it; pre_scalar, pre_vector: as residuals of learnable weight; "
        "pre+lv and so on: with the LV-Adapter too")
    add("--prompts", choices=("learned", "engineered", "ensemble"), default="learned",
        help="learned task contexts (default), one sentence for each class, or the mean of 63")
    add("--contexts", default="16", metavar="N|WORDS",
        help="learned tokens of a prompt (default 16), or words that they begin as")
    add("--clip", metavar="NAME", default="ViT-B-16", help="CLIP's text tower: RN50, ViT-B-32, "
        "ViT-B-16 (default), a checkpoint file, or none = random")
    add("--pretrained", metavar="NAME", default="supervised", help="the backbone: supervised "
        "(default) = torchvision's, none = random, "
        f"{', '.join(PRETRAINED)}, or a file: theirs, MoCo's, DetCo's, PixPro's, or a checkpoint "
        "of this project")
    add("--pixels", choices=hmpl.PIXELS, help="pixel statistics that this backbone expects; "
        "default: as its file tells")
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
        dist.barrier()                               # all have read the folder
    if run.rank == 0:
        evaluate.write_json(run.out / "split.json", run.split)
        evaluate.write_json(run.out / "config.json", run.config)
        drop_outdated_labels(run, stages)
    for name in stages:
        if name == "pseudo":
            run_pseudo(run, stages["teachers"])
        for stage in stages[name]:
            run_stage(run, stage)
        if run.world > 1:
            dist.barrier()


def main(argv: Sequence[str] | None = None) -> None:
    args, failed = parse_args(argv), None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)
    try:
        run_stages(args)
    except (InputError, hmpl.WeightsError, prompts.TextError, OSError) as error:
        # Exits below: in here the error's frames would keep the workers alive.
        failed = f"train.py: {evaluate.sentence(error)}"
    if failed:
        sys.exit(failed)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
