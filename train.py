"""Trains HMPL: teachers -> pseudo labels -> adapt -> finetune, each stage once, resumed where it was left.

    python train.py --setting disjoint_normal --stage adapt                # BDD100K if it is there, else the sample
    python train.py --setting disjoint_normal --stage finetune --data data/bdd100k
    torchrun --nproc_per_node=8 train.py --setting full --stage finetune --data data/bdd100k
    python train.py --setting disjoint_balance --stage finetune --dry-run  # only the plan

pretrain-adapt-finetune ("Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving",
NeurIPS 2022): a pretrained body is frozen while adapters, prompts' contexts and heads learn from all tasks
(adapt, a third of the budget), then everything learns (finetune, two thirds). Images are labelled for one
task each; single-task teachers fill in the rest with pseudo labels.

Like make, a stage first runs whatever it needs that is not there yet. One run folder holds it all:
config.json, split.json, teachers/TASK.pt, pseudo/ (BDD100K's layout), adapt.pt, finetune.pt, log.jsonl, and cache/
with the labels once read, which may be deleted.
"""
import argparse
import errno
import hashlib
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
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
TRAINING = {  # how each profile of hmpl.PROFILES learns. lr: for its batch; rates: parts that learn slower; teachers:
              # each one's share of the plain schedule, in the order in which they learn; chained: each begins as the one
              # before ended, and the first joint stage as the last
    "paper": dict(epochs=36, batch=16, lr=1e-4, rates={"body": 0.25, "adapter": 0.25, "heads.detection": 0.25},
                  decay=1e-4, warmup=1000, scales=(5 / 6, 1), confidence=0.5, tower=None,
                  teachers={"semantic": 0.25, "detection": 0.25, "drivable": 0.25}, chained=False),
    "tiny": dict(epochs=3, batch=4, lr=7e-4, rates={"body": 0.3}, decay=1e-2, warmup=20,
                 scales=(5 / 6, 7 / 6), confidence=0.1, tower=dict(width=64, layers=2, embed_dim=64),
                 teachers={"semantic": 0.6, "detection": 0.5, "drivable": 0.55}, chained=True),
}
ZOO = "https://download.openmmlab.com/mmselfsup/1.x/"     # MMSelfSup's, file names end in their sha256's first 8 digits
PRETRAINED = {  # ResNet-50 by name: where it is, or what to get
    "supervised": "torchvision's release",
    "moco-v1": "moco_v1_200ep_pretrain.pth.tar from the MoCo repository (facebookresearch/moco)",
    "moco-v2": ZOO + "mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k/"
                     "mocov2_resnet50_8xb32-coslr-200e_in1k_20220825-b6d23c86.pth",
    "simclr": ZOO + "simclr/simclr_resnet50_16xb256-coslr-200e_in1k/"
                    "simclr_resnet50_16xb256-coslr-200e_in1k_20220825-4d9cce50.pth",
    "swav": ZOO + "swav/swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96/"
                  "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96_20220825-5b3fc7fc.pth",
    "byol": ZOO + "byol/byol_resnet50_16xb256-coslr-200e_in1k/"
                  "byol_resnet50_16xb256-coslr-200e_in1k_20220825-de817331.pth",
    "detco": "detco_200ep.pth or detco_200ep_AA.pkl from the DetCo repository (xieenze/DetCo)",
    "densecl": ZOO + "densecl/densecl_resnet50_8xb32-coslr-200e_in1k/"
                     "densecl_resnet50_8xb32-coslr-200e_in1k_20220825-3078723b.pth",
    "pixpro": "pixpro_base_r50_100ep from the PixPro repository (zdaxie/PixPro)",
}
TINY_WIDTH = 128                      # of the images that the tiny profile works on, unless --size says other
SCHEMES = {  # each joint stage's share of the plain schedule
    "pretrain-adapt-finetune": {"adapt": 1 / 3, "finetune": 2 / 3},
    "pretrain-finetune": {"finetune": 1.},
}
PSEUDO_SCORE = 0.3                    # pseudo boxes are kept from this score on, pixels from `confidence` on
CLIP_NORM = 1.0
EXTRAS = ("early_language", "pixel_text", "shared_pixel_decoder", "uncertainty")       # arguments of HMPL
MAY_CHANGE = {"data", "accum", "amp", "origin"}          # what a run may be resumed with other values of
MAX_TRIES = 10                        # unreadable samples, or steps that are not finite, in a row
BAD_SHARE = 0.01                      # of the images may be unreadable
SAVE_SECONDS = 600
CHUNK = 256                           # images whose pseudo boxes are written together
LOG_STEPS = 10


# ------------------------------------------------------------------------------------- the split

def make_split(train: LabelledImages, val_stems: Sequence[str], setting: str, seed: int,
               tasks: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Stems of the images whose ground truth each of the tasks (default: all of the data set) may use; the same
    whichever tasks are asked for.

    Disjoint settings take the paper's numbers where the data has them, else the largest numbers in the
    same proportions for which disjoint sets exist (Hall's condition over the tasks). No stem of the
    validation set is used. Raises InputError when a task has no labelled image.
    """
    free, tasks = ~np.isin(train.stems, val_stems), tuple(tasks or train.classes)
    has = {task: train.labelled[task] & free for task in train.classes}
    for task in tasks:
        if not has[task].any():
            raise InputError(f"{train.labels} has no {task} labels for {train.split}, apart from images that are in the "
                             f"validation set too: setting {setting} needs them.")
    wanted = {task: number for task, number in SETTINGS[setting].items() if task in has and has[task].any()}
    if setting == "full":
        return {task: train.stems[has[task]].tolist() for task in wanted if task in tasks}
    n = len(wanted)
    kinds = np.arange(1 << n)                                                    # which labels an image has, as bits
    kind = sum(has[task].astype(int) << t for t, task in enumerate(wanted))
    counts, numbers = np.bincount(kind, minlength=len(kinds)), np.array(list(wanted.values()))
    tasks_of = kinds[:, None] >> np.arange(n) & 1 > 0                            # [kind, task]
    scale = min(1., *(counts[(kinds & group) > 0].sum() / numbers[tasks_of[group]].sum() for group in kinds[1:]))
    size = len(kinds) + n + 2                                # source -> kinds -> tasks -> sink
    first, source, sink = len(kinds), size - 2, size - 1
    capacity = np.zeros((size, size), np.int32)
    capacity[source, :first], capacity[:first, first:source] = counts, tasks_of * counts[:, None]
    capacity[first:source, sink] = np.maximum(1, numbers * scale + 1e-9)
    flow = maximum_flow(csr_matrix(capacity), source, sink).flow.toarray()[:first, first:source]     # [kind, task]
    if not flow.sum(0).all():
        raise InputError(f"{train.root} has {len(train)} images for {train.split}: too few for {n} disjoint sets.")
    shuffled = np.random.default_rng(seed).permutation(len(train))
    parts = [np.split(shuffled[kind[shuffled] == k], np.cumsum(flow[k]))[:n] for k in kinds]
    return {task: sorted(train.stems[np.concatenate([part[t] for part in parts])].tolist())
            for t, task in enumerate(wanted) if task in tasks}


# -------------------------------------------------------------------------------------- samples

class Samples(torch.utils.data.Dataset):
    """Training images with ground truth where the split grants it, else with the pseudo label.

    Indexed by (image, size, flip), all drawn beforehand (`Order`), so that a sample never depends on
    the worker that makes it. Gives (image, target, file, unreadable): a sample whose files cannot be read is replaced by
    the next one, and `unreadable` says, by file, why; strict: it ends the run instead. rows: the images in use, as
    numbers of `data`.
    """

    def __init__(self, data: LabelledImages, split: dict[str, list[str]], tasks: Sequence[str],
                 pseudo: BDD100K | None = None, strict: bool = False):
        self.data, self.pseudo, self.tasks, self.strict = data, pseudo, tuple(tasks), strict
        self.own = {task: np.isin(data.stems, split[task]) for task in tasks}
        self.rows = np.flatnonzero(np.any(list(self.own.values()), axis=0))
        self.alike = sum(own[self.rows].astype(int) << t for t, own in enumerate(self.own.values()))    # tasks, as bits

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, tuple[int, int], bool]) -> tuple[Tensor, dict[str, Tensor], str, dict[str, str]]:
        n, size, flip = key
        unreadable = {}
        same = np.flatnonzero(self.alike == self.alike[n])               # stand-ins have ground truth of the same tasks
        for i in self.rows[np.roll(same, -np.searchsorted(same, n))]:
            try:
                return *augment(*self.sample(i), size, flip), str(self.data.files[i]), unreadable
            except (InputError, OSError) as error:
                unreadable[str(self.data.files[i])] = str(error)
                if self.strict or len(unreadable) == MAX_TRIES:
                    raise InputError(str(error)) from error
        raise InputError(f"none of the {len(same)} images can be read: {next(iter(unreadable.values()))}")

    def sample(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image i as it is on the disk, with the labels it may use."""
        image, target = self.data.sample(i, [task for task in self.tasks if self.own[task][i]])
        if self.pseudo is not None:
            target |= self.pseudo.sized_target(i, image, [task for task in self.tasks if not self.own[task][i]])
        return image, target


def augment(image: Tensor, target: dict[str, Tensor], size: tuple[int, int], flip: bool) -> tuple[Tensor, dict]:
    """Resizes image and target to (width, height) and mirrors them; boxes are clipped to the image and
    those left without area are dropped. All stay in the types they came in."""
    height, width = image.shape[1:]
    image = resize(image, list(size[::-1]), antialias=True)
    target = dict(target)
    for task in ("semantic", "drivable"):
        if task in target:
            mask = resize(target[task][None], list(size[::-1]), InterpolationMode.NEAREST_EXACT)[0]
            target[task] = mask.flip(-1) if flip else mask
    if "boxes" in target:
        boxes = target["boxes"] * torch.tensor([size[0] / width, size[1] / height]).repeat(2)
        if flip:
            boxes = torch.stack([size[0] - boxes[:, 2], boxes[:, 1], size[0] - boxes[:, 0], boxes[:, 3]], dim=1)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([*size, *size], dtype=torch.float32))
        keep = (boxes[:, 2:] - boxes[:, :2]).amin(1) > 0
        target |= {"boxes": boxes[keep], "labels": target["labels"][keep], "crowd": target["crowd"][keep]}
    return image.flip(-1) if flip else image, target


class Order(torch.utils.data.Sampler):
    """The keys of `Samples` for every batch from a step on, as a pure function of the seed: group after
    group of samples as `turns` says, each epoch after epoch in a new order, one size for all images of a
    step so that none is padded.

    groups: arrays of sample numbers. turns [steps]: the group that each step takes its images from.
    Each of `world` processes takes every world-th image of a step's global batch, in `accum` parts.
    """

    def __init__(self, groups: Sequence[np.ndarray], turns: np.ndarray, batch: int, start: int, seed: int,
                 sizes: Sequence[tuple[int, int]], *, accum: int = 1, rank: int = 0, world: int = 1):
        self.groups, self.turns, self.batch, self.start, self.seed = groups, turns, batch, start, seed
        self.sizes, self.accum, self.rank, self.world = sizes, accum, rank, world

    def __len__(self) -> int:
        return (len(self.turns) - self.start) * self.accum

    def __iter__(self) -> Iterator[list[tuple]]:
        drawn = np.bincount(self.turns[:self.start], minlength=len(self.groups)) * self.batch
        epochs, permutations = [-1] * len(self.groups), [None] * len(self.groups)
        for step in range(self.start, len(self.turns)):
            rng, g = np.random.default_rng([self.seed, 1, step]), self.turns[step]
            size, keys, group = self.sizes[rng.integers(len(self.sizes))], [], self.groups[g]
            for n in range(drawn[g], drawn[g] + self.batch):
                if n // len(group) != epochs[g]:
                    epochs[g] = n // len(group)
                    permutations[g] = np.random.default_rng([self.seed, 0, epochs[g], g]).permutation(group)
                keys.append((int(permutations[g][n % len(group)]), size, bool(rng.random() < 0.5)))
            drawn[g] += self.batch
            own = keys[self.rank::self.world]
            for part in range(self.accum):
                yield own[part::self.accum]


def take_turns(samples: Samples, sampler: str, steps: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Groups of samples and each step's group: all samples (mixed), or those with ground truth of one task after the
    other (round-robin), or of a task drawn in proportion to their number (weighted)."""
    if sampler == "mixed":
        return [np.arange(len(samples))], np.zeros(steps, np.int64)
    groups = [np.flatnonzero(own[samples.rows]) for own in samples.own.values()]
    if sampler == "round-robin":
        return groups, np.arange(steps) % len(groups)
    sizes = np.array([len(group) for group in groups])
    return groups, np.random.default_rng([seed, 2]).choice(len(groups), steps, p=sizes / sizes.sum())


def unzip(items: list[tuple]) -> tuple[list, ...]:
    """Samples -> images, targets and what else comes with each, as lists."""
    return tuple(list(column) for column in zip(*items))


# ---------------------------------------------------------------------------------- optimisation

def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Factor at a step: linear warm-up, then polynomial decay with power 0.9 (MaskFormer's)."""
    warmup = min(warmup, steps // 4)
    return (step + 1) / (warmup + 1) if step < warmup else (1 - (step - warmup) / (steps - warmup)) ** 0.9


def parameter_groups(model: nn.Module, lr: float, rates: dict[str, float], decay: float) -> list[dict]:
    """AdamW's groups: no weight decay on biases, norms and learned embeddings; the parts of the model that
    `rates` names learn at that many times the rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = lr * next((factor for part, factor in rates.items() if name.startswith(part + ".")), 1)
            embedding = name.endswith(("query_embed", "proposal_features", "proposal_boxes", "contexts"))
            key = rate, 0. if p.dim() < 2 or embedding else decay
            groups.setdefault(key, []).append(p)
    return [{"params": p, "lr": rate, "base": rate, "weight_decay": wd} for (rate, wd), p in groups.items()]


# ----------------------------------------------------------------------------------------- a run

@dataclass
class Run:
    """What all stages share. `config` is what a result depends on; it is kept in config.json."""
    out: Path
    config: dict
    device: torch.device
    workers: int
    train: LabelledImages
    val: LabelledImages
    split: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)
    rank: int = 0
    world: int = 1
    strict: bool = False

    @property
    def amp(self) -> torch.dtype | None:
        return evaluate.amp_type(self.config["amp"], self.device)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The sizes of multi-scale training, (width, height)."""
        (w, h), (low, high) = self.config["size"], self.config["scales"]
        return [(round(w * s), round(h * s)) for s in np.linspace(low, high, 6)]

    def path(self, stage: str, task: str | None = None) -> Path:
        return self.out / "teachers" / f"{task}.pt" if task else self.out / f"{stage}.pt"

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)


class Stopped(BaseException):
    """The run was asked to end (SIGTERM, SIGINT)."""


class Interrupt:
    """SIGTERM and SIGINT end a run in order: at once, but while something is held, such as a step and its saving, when that
    is done. A second signal is not waited for."""

    held, stop = 0, False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.stop = True
        if not self.held:
            raise Stopped

    def __enter__(self) -> None:
        self.held += 1

    def __exit__(self, kind, error, trace) -> None:
        self.held -= 1
        if self.stop and not self.held and kind is None:
            raise Stopped


interrupt = Interrupt()


def save(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint so that at every moment one is there, whole, on the disk; the last one is kept as FILE.old."""
    part, old = path.with_suffix(".part"), path.with_suffix(".old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with interrupt:
            with open(part, "wb") as f:
                torch.save(checkpoint, f)
                f.flush()
                os.fsync(f.fileno())
            if path.exists():
                os.replace(path, old)
            os.replace(part, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)                                             # the names too
            os.close(folder)
    except (OSError, RuntimeError) as full:
        need = sum(t.numel() * t.element_size() for t in checkpoint["model"].values()) * 3 >> 20
        part.unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, f"cannot write {path} ({full}); about {need} MB are needed and the last "
                      "checkpoint is unharmed: free some space and run the same command") from full


def model_config(run: Run, tasks: Sequence[str]) -> dict:
    """The network's arguments. Those beyond the paper are for the model of all the run's tasks, not for teachers."""
    config = run.config
    extras = config["extras"] if list(tasks) == list(run.split) else []
    # The queries read P5, as in the paper, if it is at least 8 cells wide, else the map twice as fine.
    level = 5 if config["size"][0] >= 8 * hmpl.STRIDES[-1] else 4
    profile = hmpl.PROFILES[config["profile"]]
    return {"classes": {task: run.train.classes[task] for task in tasks},
            **profile, "maskformer": profile["maskformer"] | {"memory_level": level},
            "size": tuple(config["size"]), "pixels": config["pixels"],
            "heads": config["heads"], "adapter": next((part for part in config["adapter"] if part != "lv"), "fpn"),
            **{extra: True for extra in extras}}


def text_source(run: Run) -> nn.Module | Tensor:
    """The LV-Adapter's text: learned task prompts, or the features of hand-written ones."""
    name, config, classes = run.config["clip"], run.config, {task: run.train.classes[task] for task in run.split}
    if name == "none":
        tower = prompts.TextTower(**(TRAINING[config["profile"]]["tower"] or {}))
        tokenizer = prompts.Tokenizer(prompts.BYTES)
    else:
        path, vocabulary = text_files(name)
        tower = prompts.load_text_tower(path)
        tokenizer = prompts.Tokenizer(prompts.find_vocabulary(vocabulary))
    if config["prompts"] == "learned":
        contexts = config["contexts"]
        how = {"num_contexts": contexts} if isinstance(contexts, int) else {"words": contexts}
        text = prompts.TaskPrompts(tower, tokenizer, classes, **how, position=config["context_position"],
                                   class_contexts=config["class_contexts"])
        run.say(f"  learned prompts, X = context{' of each class' * config['class_contexts']}: \"{text.texts[0]}\" and "
                f"so on, {int(text.eot.max()) + 1} tokens at most")
        return text
    templates = prompts.ENGINEERED if config["prompts"] == "engineered" else prompts.ENSEMBLE
    run.say(f"  hand-written prompts, {len(templates)} for each class, the first \"{templates[0]}\"")
    return torch.cat([prompts.encode_templates(tower, tokenizer, names, templates) for names in classes.values()])


def text_files(name: str) -> tuple[Path, Path | None]:
    """CLIP's checkpoint, a file or a name, and the vocabulary that lies beside it, if one does."""
    path = Path(name) if Path(name).is_file() else prompts.find_tower(name)
    beside = path.parent / "bpe_simple_vocab_16e6.txt.gz"
    return path, beside if beside.exists() else None


def new_model(run: Run, tasks: Sequence[str], language: bool = False, frozen: bool = False,
              teachers: Sequence[str] = ()) -> hmpl.HMPL:
    """A model with the pretrained body and everything else new; language: with the LV-Adapter, unless
    --adapter leaves it out; frozen: the body will not learn; teachers: those whose weights it takes over."""
    torch.manual_seed(run.config["seed"])
    language = language and "lv" in run.config["adapter"]
    model = hmpl.HMPL(**model_config(run, tasks), text=text_source(run) if language else None)
    name = run.config["pretrained"]
    if teachers:
        take_over(model, run, teachers)
    elif name == "none":
        calibrate(model, run, frozen)
    else:
        path = find_body(name, run.config["profile"])
        run.say(f"  body {path}: {hmpl.load_body(model.body, path)[0]}")
    return model


def take_over(model: hmpl.HMPL, run: Run, teachers: Sequence[str]) -> None:
    """Body and adapter of the last of these teachers, who each began with those of the one before, and all the heads
    that they have in common with the model."""
    for task in teachers:
        learned = load_stage(run, run.path("teachers", task), [task])["model"]
        parts = ("body.", "adapter.", *(f"heads.{task}." for task in model.classes))
        model.load_state_dict({key: value for key, value in learned.items() if key.startswith(parts)}, strict=False)


def calibrate(model: hmpl.HMPL, run: Run, frozen: bool) -> None:
    """Sets a random body's BatchNorm statistics from 32 training images: with those of its birth (mean 0,
    variance 1) a body frozen in the adapt stage would pass on features that grow with every block. The residual
    branches of one that is frozen are emptied: it passes on its stem, which serves better than random branches, while
    one that learns learns faster with them."""
    norms = [m for m in model.body.modules() if isinstance(m, nn.BatchNorm2d)]
    for block in (*model.body.layer1, *model.body.layer2, *model.body.layer3, *model.body.layer4) if frozen else ():
        nn.init.zeros_((block.bn3 if hasattr(block, "bn3") else block.bn2).weight)
    rows = np.random.default_rng(run.config["seed"]).choice(len(run.train), min(32, len(run.train)), replace=False)
    images = [augment(run.train.image(i), {}, tuple(run.config["size"]), False)[0] for i in rows]
    momentum = norms[0].momentum
    for m in norms:
        m.momentum = None                                                # cumulative average
    with torch.no_grad():
        for start in range(0, len(images), 8):
            model.body(model.batch(images[start:start + 8])[0])
    for m in norms:
        m.momentum = momentum


def find_body(name: str, profile: str) -> Path:
    """A file of body weights, by its path or by a name of PRETRAINED (cached or downloaded, sha256 checked)."""
    if Path(name).is_file():
        return Path(name)
    depth = hmpl.PROFILES[profile]["depth"]
    if name not in PRETRAINED:
        raise hmpl.WeightsError(f"--pretrained {name} is neither a file nor 'none' nor one of {', '.join(PRETRAINED)}.")
    if name == "supervised":
        url = torchvision.models.get_model_weights(f"resnet{depth}").IMAGENET1K_V1.url
    elif depth != 50:
        raise hmpl.WeightsError(f"--pretrained {name} is a ResNet-50, the profile {profile} has a ResNet-{depth}: use "
                                "supervised, none or a file.")
    else:
        url = PRETRAINED[name]
        if not url.startswith("https:"):
            raise hmpl.WeightsError(f"{name} has no release with a checksum: get {url}, and give its path to --pretrained.")
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:         # RuntimeError: another checksum
            raise OSError(f"{url} cannot be downloaded to {path}: {error}") from None
    return path


# ------------------------------------------------------------------------------------- the loop

def memory_mb(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class Training:
    """A stage's model with all that its training needs to go on after a break as if there had been none."""

    def __init__(self, run: Run, model: hmpl.HMPL, images: int, name: str, steps: int, path: Path):
        config, device = run.config, run.device
        if run.world > 1 and device.type == "cuda":
            model.body = nn.SyncBatchNorm.convert_sync_batchnorm(model.body)
        self.run, self.model, self.name, self.steps, self.path = run, model.to(device).train(), name, steps, path
        rates = dict(config["rates"])
        if begins_random(run, name):
            del rates["body"]                                            # has everything to learn
        groups = parameter_groups(model, config["lr"], rates, config["decay"])
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp is torch.float16)
        self.ema = {key: value.clone() for key, value in model.state_dict().items()} if config["ema"] else None
        self.images, self.step, self.skipped, self.clipped, self.unreadable = images, 0, 0, 0, {}
        if run.rank:
            torch.manual_seed(config["seed"] + run.rank)                 # other dropout than the first process
        if exists(path):
            self.restore()
        self.saved = time.monotonic()
        self.parallel = nn.parallel.DistributedDataParallel(model, static_graph=True) if run.world > 1 else model

    def save(self, scores: dict | None = None) -> None:
        """Saves all that resuming and scoring need; called by all processes, written by the first."""
        run, model = self.run, self.model
        rng = {"torch": torch.get_rng_state()}
        if run.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(run.device)
        rng, self.saved = evaluate.from_all_ranks(rng), time.monotonic()
        if run.rank:
            return
        model.update_text()
        with interrupt:
            save(self.path, {
                "stage": self.name, "step": self.step, "steps": self.steps, "notes": run.notes, "scores": scores,
                "config": run.config, "model_config": model_config(run, model.classes), "model": model.state_dict(),
                "ema": None if scores else self.ema, "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "rng": rng,
                "skipped": self.skipped, "clipped": self.clipped, "unreadable": self.unreadable})
            if scores:
                self.path.with_suffix(".old").unlink(missing_ok=True)

    def restore(self) -> None:
        """Puts everything back as it was at the checkpoint."""
        saved = load_stage(self.run, self.path, self.model.classes)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        for key, value in (saved["ema"] or {}).items():
            self.ema[key].copy_(value)
        for rng in saved["rng"][self.run.rank:self.run.rank + 1]:        # none for processes that were not there
            torch.set_rng_state(rng["torch"])
            if "cuda" in rng and torch.cuda.is_available():
                torch.cuda.set_rng_state(rng["cuda"])
        for key in ("step", "skipped", "clipped", "unreadable"):
            setattr(self, key, saved[key])

    def advance(self, batches: Iterator) -> tuple[dict[str, float], float, list[str]]:
        """One optimizer step: the losses, the gradients' norm before clipping and the files it saw. A step whose
        gradients are not finite changes nothing; with DDP they are the same on all processes."""
        config = self.run.config
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * learning_rate(self.step, self.steps, config["warmup"])
        flags = (interrupt.stop, time.monotonic() - self.saved > SAVE_SECONDS)
        losses, norm, (self.stop, self.due), parts = one_step(
            self.parallel, self.optimizer, self.scaler, batches, config["accum"], self.run, flags)
        self.step, interrupt.stop = self.step + 1, interrupt.stop or self.stop
        self.skipped, self.clipped = self.skipped + (not math.isfinite(norm)), self.clipped + (norm > CLIP_NORM)
        if self.ema and math.isfinite(norm):
            average(self.ema, self.model, max(1 - config["ema"], 9 / (9 + self.step)))    # the first steps must not linger
        for files, unreadable in parts:
            self.note_unreadable({file: why for found in unreadable for file, why in found.items()})
        return losses, norm, [file for files, _ in parts for file in files]

    def line(self, losses: dict[str, float], norm: float) -> dict:
        """What the log says of a step."""
        return {"stage": self.name, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"], **losses, "norm": norm,
                "skipped": self.skipped, "clipped": round(self.clipped / self.step, 4), "unreadable": len(self.unreadable),
                "memory_mb": memory_mb(self.run.device)}

    def note_unreadable(self, found: dict[str, str]) -> None:
        """Says once what was replaced; raises InputError when it is more than may happen to good data."""
        for file, why in found.items() - self.unreadable.items():
            tqdm.write(f"NOTE: another image stands in for {file}: {why}", file=sys.stderr)
            self.unreadable[file] = why
        if found and (self.step == 1 or len(self.unreadable) > BAD_SHARE * self.images / self.run.world):
            raise InputError(f"{len(self.unreadable)} of {self.images} images cannot be used, more than may be replaced: "
                             f"{next(iter(found.values()))}")


def train(run: Run, model: hmpl.HMPL, samples: Samples, name: str, steps: int, path: Path) -> hmpl.HMPL:
    """Trains for `steps` optimizer steps, from the checkpoint at `path` if there is one, then scores the
    model on the validation images and saves both."""
    config, t = run.config, Training(run, model, len(samples), name, steps, path)
    order = Order(*take_turns(samples, config["sampler"], steps, config["seed"]), config["batch"], t.step, config["seed"],
                  run.sizes, accum=config["accum"], rank=run.rank, world=run.world)
    loader = torch.utils.data.DataLoader(samples, batch_sampler=order, num_workers=run.workers, collate_fn=unzip,
                                         pin_memory=run.device.type == "cuda", worker_init_fn=evaluate.leave_signals,
                                         generator=torch.Generator())    # else a resumed run would draw one number more
    batches, bad, began, last = iter(loader), 0, time.monotonic(), t.step
    bar = tqdm(range(t.step, steps), initial=t.step, total=steps, desc=name, unit="step", mininterval=0.5,
               disable=run.rank > 0, dynamic_ncols=True)
    log = open_log(run.out / "log.jsonl", name, t.step) if run.rank == 0 else None
    with interrupt:
        for _ in bar:
            losses, norm, files = t.advance(batches)
            bad = 0 if math.isfinite(norm) else bad + 1
            if bad == MAX_TRIES:
                wrong = ", ".join(key for key, value in losses.items() if not math.isfinite(value)) or "gradients"
                raise InputError(f"stage {name}: {wrong} not finite for {bad} steps up to {t.step}, with "
                                 f"{', '.join(files)}: start in another --out with a lower --lr or --amp no.")
            bar.set_postfix(loss=f"{sum(losses.values()):.2f}")
            if t.step % LOG_STEPS == 0 or t.step == steps:
                speed = (t.step - last) * config["batch"] / (time.monotonic() - began)
                if log:
                    log.write(json.dumps(t.line(losses, norm) | {"images_per_s": round(speed, 2)}) + "\n")
                began, last = time.monotonic(), t.step
            if t.stop:                                                           # by all processes at the same step
                batches = None                                                   # ends the workers, who have heard it too
            if t.stop or t.due or t.step == steps:
                t.save()
            if t.stop:
                break
    finish(t, log)
    return model


def finish(t: Training, log) -> None:
    """Scores a stage's model and saves it with its scores."""
    run, model = t.run, t.model
    if t.ema:
        model.load_state_dict(t.ema)
    model.eval()
    if run.world > 1:
        for buffer in model.buffers():                                           # BatchNorm's saw each rank's last images
            dist.broadcast(buffer, 0)
    scores = {"images": 0}                                                       # validation may lack these labels
    if any(run.val.labelled[task].any() for task in model.classes):
        scores = evaluate.evaluate(model, run.val, amp=run.amp, workers=run.workers, batch=evaluate.batch_size(run.device))
    if log:
        log.write(json.dumps({"stage": t.name, "step": t.steps, "val": scores}) + "\n")
        log.close()
    t.save(scores)
    run.say(evaluate.table(scores, t.name))


def open_log(path: Path, stage: str, step: int):
    """The log to go on writing after a step of a stage: lines of later steps, and one that was cut off, are dropped."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            if line["stage"] != stage or line["step"] <= step and "val" not in line:
                lines.append(text + "\n")
        except ValueError:
            pass
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text("".join(lines))
    os.replace(path.with_suffix(".part"), path)
    return open(path, "a", buffering=1)


def one_step(model: nn.Module, optimizer, scaler, batches: Iterator, accum: int, run: Run,
             flags: Sequence[bool] = ()) -> tuple[dict, float, list[bool], list]:
    """One optimizer step over `accum` batches: the losses' means, the gradients' norm before clipping, each of the flags,
    set where it is on any process, and for each batch its files and what was unreadable. A step whose gradients are
    not finite changes nothing."""
    optimizer.zero_grad(set_to_none=True)
    total, seen = {}, []
    for _ in range(accum):
        images, targets, *about = next(batches)
        seen.append(about)
        with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
            losses = model(images, targets)
        scaler.scale(sum(losses.values()) / accum).backward()
        for key, value in losses.items():
            total[key] = total.get(key, 0) + value.detach() / accum
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP_NORM, foreach=True)
    flags = torch.tensor(flags, dtype=torch.float32).to(run.device, non_blocking=True)
    if run.world > 1:
        dist.all_reduce(flags)
    values = torch.cat([torch.stack([*total.values(), norm]), flags]).tolist()   # one wait for all of them
    losses, norm, flags = dict(zip(total, values)), values[len(total)], [value > 0 for value in values[len(total) + 1:]]
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    return losses, norm, flags, seen


@torch.no_grad()
def average(ema: dict[str, Tensor], model: nn.Module, share: float) -> None:
    """Moves the averaged weights (Mean Teacher, arXiv 1703.01780) towards the model's by a share; counters are copied."""
    now = model.state_dict()
    floats = [key for key, value in now.items() if value.is_floating_point()]
    get_ema_multi_avg_fn(1 - share)([ema[key] for key in floats], [now[key] for key in floats], None)
    for key in now.keys() - set(floats):
        ema[key].copy_(now[key])


def exists(path: Path) -> bool:
    """Whether a stage has a checkpoint, the last one or the one before it."""
    return path.exists() or path.with_suffix(".old").exists()


def load_stage(run: Run, path: Path, tasks: Sequence[str]) -> dict:
    """A stage's last checkpoint, or the one before where that is damaged; it must hold the network that this run builds
    for these tasks."""
    old = path.with_suffix(".old")
    try:
        saved = evaluate.load_checkpoint(path if path.exists() else old)
    except InputError as damaged:
        if not (path.exists() and old.exists()):
            raise
        run.say(f"NOTE: {damaged} The one before it, {old}, is used.")
        saved = evaluate.load_checkpoint(old)
        if run.rank == 0:
            path.unlink(missing_ok=True)                                 # else the next save would make it the old one
    expected = model_config(run, tasks)
    wrong = [key for key in expected if saved["model_config"].get(key) != expected[key]]
    if wrong:
        raise InputError(f"{path} was written for another network ({', '.join(wrong)} differ): use another --out, "
                         f"or delete it, and {old.name}, to train this stage anew.")
    return saved


# ------------------------------------------------------------------------------------ the stages

def finished(run: Run, path: Path, tasks: Sequence[str]) -> bool:
    if not exists(path):
        return False
    saved = load_stage(run, path, tasks)
    return saved["step"] == saved["steps"] and saved["scores"] is not None


def plain_steps(run: Run) -> float:
    """Optimizer steps of the plain schedule, pretrain-finetune: `epochs` over all images."""
    images = len(set().union(*run.split.values()))
    return run.config["steps"] or images * run.config["epochs"] / run.config["batch"]


def stage_steps(run: Run, stage: str, task: str | None = None) -> int:
    """Optimizer steps of a joint stage, or of a task's teacher: its share of the plain schedule."""
    shares = TRAINING[run.config["profile"]]["teachers"] if task else SCHEMES[run.config["scheme"]]
    return max(1, round(plain_steps(run) * shares[task or stage]))


def lacking(run: Run, task: str) -> np.ndarray:
    """Rows of the split's images that have no ground truth for a task."""
    everything = sorted(set().union(*run.split.values()))
    return np.flatnonzero(np.isin(run.train.stems, everything) & ~np.isin(run.train.stems, run.split[task]))


def wants_pseudo(run: Run) -> bool:
    """Whether images lack labels that pseudo labels are to fill in."""
    return run.config["labels"] == "pseudo" and any(len(lacking(run, task)) for task in run.split)


def stages_of(run: Run) -> list[str]:
    """The stages of this run, in order: teachers and pseudo labels only where it makes its own."""
    makes = wants_pseudo(run) and not run.config["labels_of"]
    return [stage for stage in STAGES if stage in SCHEMES[run.config["scheme"]] or makes and stage in STAGES[:2]]


def up_to(run: Run, last: str) -> list[str]:
    """The stages of this run up to the last one wanted."""
    stages = stages_of(run)
    if last not in stages:
        raise InputError(f"--stage {last} was given, but with --scheme {run.config['scheme']}, --labels "
                         f"{run.config['labels']} and tasks {', '.join(run.split)} there are only {', '.join(stages)}.")
    return stages[:stages.index(last) + 1]


def teachers_of(run: Run) -> list[str]:
    """The teachers' tasks in the order in which they learn."""
    order = TRAINING[run.config["profile"]]["teachers"]
    return [task for task in order if task in run.split] if "teachers" in stages_of(run) else []


def taken_over(run: Run) -> list[str]:
    """The teachers whose weights are passed on, in short runs, where a pretrained body and new heads would not get far."""
    return teachers_of(run) if TRAINING[run.config["profile"]]["chained"] else []


def begins_random(run: Run, stage: str) -> bool:
    """Whether a stage's body begins with random weights: none are pretrained and no teacher's are taken over."""
    chain = taken_over(run)
    return run.config["pretrained"] == "none" and (not chain or stage == f"teacher {chain[0]}")


def run_teachers(run: Run) -> None:
    for n, task in enumerate(teachers_of(run)):
        if not finished(run, run.path("teachers", task), [task]):
            model = new_model(run, [task], teachers=taken_over(run)[:n])
            samples = Samples(run.train, run.split, [task], strict=run.strict)
            steps, path = stage_steps(run, "teachers", task), run.path("teachers", task)
            train(run, model, samples, f"teacher {task}", steps, path)


def run_pseudo(run: Run) -> None:
    """Labels the images of the split for the tasks they lack, all teachers in one pass, each process its share of the
    images, and goes on where it was broken off; report.json comes last and means: done."""
    report, folder = run.out / "pseudo" / "report.json", run.out / "pseudo" / "boxes"
    if report.exists():
        if run.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return
    rows = {task: own for task in run.split if len(own := lacking(run, task))}
    meters = {task: evaluate.meter_of(task, run.train.classes[task]) for task in rows}
    writer, kept, chunk = evaluate.LabelWriter(run.out / "pseudo", run.train.split), {task: [] for task in rows}, {}

    def note(i: int, target: dict, prediction: dict) -> None:
        """Counts a pseudo label, and scores it where image i has ground truth after all, without being granted it."""
        own = {task: meter for task, meter in meters.items() if ("boxes" if task == "detection" else task) in prediction}
        evaluate.update_meters(own, target, prediction, i)
        for task in own.keys() & evaluate.MASK_FOLDERS.keys():
            kept[task].append((prediction[task] < evaluate.IGNORE).float().mean().item())
    mine = np.unique(np.concatenate(list(rows.values())))[run.rank::run.world]
    batch, boxes, todo = evaluate.batch_size(run.device), read_chunks(folder), []       # found before the run was broken off
    wanted = {task: set(np.intersect1d(mine, own).tolist()) for task, own in rows.items()}
    for own in np.split(mine, range(batch, len(mine), batch)):           # whole batches: their sizes decide the last bits
        found = {(task, i): boxes.get(i) if task == "detection" else old_mask(run, writer, task, i)
                 for i in own.tolist() for task in rows if i in wanted[task]}
        if all(found.values()):
            for (task, i), prediction in found.items():
                note(i, truth(run, i, task, prediction), prediction)
        else:
            todo += own.tolist()
    evaluate.from_all_ranks(None)                                        # all have read before anyone writes
    for i, _, target, prediction in teach(run, todo, wanted, batch):
        writer.add(run.train.files[i], {task: prediction[task] for task in prediction.keys() & evaluate.MASK_FOLDERS.keys()})
        note(i, target, prediction)
        if "boxes" in prediction and i not in boxes:
            chunk[i] = {key: prediction[key] for key in ("boxes", "scores", "labels")}
        if len(chunk) == CHUNK:
            write_chunk(folder, chunk)
            chunk = {}
    write_chunk(folder, chunk)
    writer.flush()
    parts = evaluate.from_all_ranks(kept)                                # all have written theirs
    counts = {}
    for task, own in rows.items():
        kept_pixels = math.fsum(value for part in parts for value in part[task]) / len(own)     # whatever their order
        counts[task] = sum_up(run, task, len(own), kept_pixels, meters[task], folder)
    if run.rank == 0:
        evaluate.write_json(report, counts)
        shutil.rmtree(folder, ignore_errors=True)


def sum_up(run: Run, task: str, images: int, kept_pixels: float, meter, folder: Path) -> dict:
    """What became of a task's pseudo labels, also said; writes the boxes from their folder."""
    if task == "detection":
        written, key = write_boxes(run, folder) if run.rank == 0 else None, "AP50"
        counts = evaluate.from_all_ranks(written)[0]
        text = ("{boxes_per_image:.1f} boxes an image kept, {kept_boxes:.0%} of all, scores from {threshold:.2f} on; "
                "ground truth has {true_boxes_per_image:.1f}")
    else:
        counts, key = {"kept_pixels": kept_pixels, "threshold": run.config["thresholds"][task]}, "mIoU"
        text = "{kept_pixels:.0%} of the pixels kept, those of confidence {threshold:.2f} on"
    text = text.format(**counts) + quality(meter, key, counts)
    run.say(f"  pseudo labels {task}, {images} images: {text}")
    if not counts.get("kept_boxes", counts.get("kept_pixels")):
        run.say(f"NOTE: no {task} pseudo label is left, so that most images seem to show nothing: the teacher is weak. "
                f"To keep more, delete {run.out / 'pseudo'} and add --threshold {task}=0.05.")
    return counts


def teach(run: Run, todo: Sequence[int], wanted: dict[str, set[int]], batch: int) -> Iterator[tuple[int, Tensor, dict, dict]]:
    """The teachers' predictions for images, each teacher's of the rows that are wanted of it, but for images that cannot be
    read; with image and ground truth."""
    unreadable = dict.fromkeys(wanted, 0)
    teachers = {task: evaluate.build_model(load_stage(run, run.path("teachers", task), [task])).to(run.device) for task in wanted}

    def predict(rows: list[int], images: list[Tensor]) -> list[dict]:
        found = [{} for _ in rows]
        for task, teacher in teachers.items():
            own = [n for n, i in enumerate(rows) if i in wanted[task]]
            results = teacher.predict([images[n] for n in own], run.config["thresholds"][task] or 0.)
            for n, result in zip(own, results):
                found[n] |= result
        return found

    def skip(i: int, why: str) -> None:
        tqdm.write(f"NOTE: no pseudo label for {run.train.files[i]}: {why}", file=sys.stderr)
        for task, own in wanted.items():
            unreadable[task] += i in own
            if i in own and (run.strict or unreadable[task] > BAD_SHARE * len(own)):
                raise InputError(f"{unreadable[task]} of {len(own)} images that lack {task} labels cannot be used, more than "
                                 f"may be left out: {why}")
    return evaluate.predictions(predict, run.train, todo, run.device, batch=batch, desc="pseudo", workers=run.workers,
                                tasks=list(wanted), amp=run.amp, skip=skip)


def old_mask(run: Run, writer: evaluate.LabelWriter, task: str, i: int) -> dict | None:
    """The pseudo label that a run which was broken off has written; a damaged one is made anew."""
    path = writer.mask_path(task, run.train.files[i])
    try:
        return {task: torch.from_numpy(evaluate.read_mask(path))} if path.exists() else None
    except InputError:
        path.unlink()
        return None


def truth(run: Run, i: int, task: str, prediction: dict) -> dict:
    """Image i's ground truth for a task, if it has any that can be read and that fits the prediction."""
    try:
        seen = prediction[task][None] if task in prediction else None
        return run.train.target(i, [task]) if seen is None else run.train.sized_target(i, seen, [task])
    except InputError:                                                   # nothing depends on it
        return {}


def write_chunk(folder: Path, chunk: dict[int, dict[str, Tensor]]) -> None:
    """Boxes of some images, by row, as one file; whole or not at all."""
    if chunk:
        folder.mkdir(parents=True, exist_ok=True)
        columns = {key: torch.cat([boxes[key] for boxes in chunk.values()]).numpy() for key in ("boxes", "scores", "labels")}
        part = folder / f"{min(chunk)}.part"
        with interrupt:
            with open(part, "wb") as f:
                np.savez(f, rows=list(chunk), counts=[len(boxes["scores"]) for boxes in chunk.values()], **columns)
            os.replace(part, part.with_suffix(".npz"))


def read_chunks(folder: Path) -> dict[int, dict[str, Tensor]]:
    """What all processes have written with `write_chunk`, also those of a run that was broken off."""
    found = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path) as chunk:
                ends = np.cumsum(chunk["counts"])[:-1]
                columns = {key: np.split(chunk[key], ends) for key in ("boxes", "scores", "labels")}
                found |= {row: {key: torch.from_numpy(values[n]) for key, values in columns.items()}
                          for n, row in enumerate(chunk["rows"].tolist())}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):      # damaged: made anew
            path.unlink(missing_ok=True)
    return found


def quality(meter, key: str, counts: dict) -> str:
    """The score of pseudo labels, of all processes, for the log; also put into counts."""
    meter, *others = evaluate.from_all_ranks(meter)
    for other in others:
        meter.merge(other)
    if not (meter.images if key == "AP50" else meter.confusion.any()):
        return ""
    counts[key] = evaluate.percent(meter.compute()[key])
    return "" if counts[key] is None else f"; {key} {counts[key]:.1f} where there is ground truth to judge by"


def write_boxes(run: Run, folder: Path) -> dict:
    """Writes those of the boxes in a folder of chunks that are sure enough. Without a threshold: from PSEUDO_SCORE on, or,
    where few are, because the teacher is weak, as many as the images with ground truth have on average: an image without
    its boxes would teach that there are none (after LabelMatch, CVPR 2022)."""
    found = read_chunks(folder)
    data, rows, threshold = run.train, sorted(found), run.config["thresholds"]["detection"]
    true = float(np.diff(data.offsets)[np.isin(data.stems, run.split["detection"])].mean())
    scores = torch.cat([found[i]["scores"] for i in rows]).sort(descending=True).values
    if threshold is None:
        wanted = min(round(true * len(rows)), len(scores))
        threshold = min(PSEUDO_SCORE, scores[wanted - 1].item() if wanted else PSEUDO_SCORE)
    writer, kept = evaluate.LabelWriter(run.out / "pseudo", data.split), 0
    for i in rows:
        keep = found[i]["scores"] >= threshold
        writer.add(data.files[i], {key: value[keep] for key, value in found[i].items()})
        kept += int(keep.sum())
    writer.write()
    return {"boxes_per_image": kept / len(rows), "kept_boxes": kept / max(1, len(scores)), "true_boxes_per_image": true,
            "threshold": threshold}


def run_adapt(run: Run) -> None:
    run_joint(run, "adapt", None)


def run_finetune(run: Run) -> None:
    run_joint(run, "finetune", run.path("adapt") if "adapt" in stages_of(run) else None)


def run_joint(run: Run, stage: str, init: Path | None) -> None:
    """Trains all tasks together: adapt with the body frozen, finetune from adapt's result with it free."""
    tasks = list(run.split)
    if finished(run, run.path(stage), tasks):
        return
    pseudo = None
    if wants_pseudo(run):
        pseudo = pseudo_labels(run)
    samples = Samples(run.train, run.split, tasks, pseudo, run.strict)
    model = new_model(run, tasks, language=True, frozen=stage == "adapt", teachers=taken_over(run))
    if init:
        model.load_state_dict(load_stage(run, init, tasks)["model"])
    model.freeze_body(stage == "adapt")
    run.say(parameter_table(model))
    train(run, model, samples, stage, stage_steps(run, stage), run.path(stage))


def pseudo_labels(run: Run) -> BDD100K:
    """The pseudo labels, made by this run or by another; for nearly all images that lack ground truth."""
    folder = Path(run.config["labels_of"] or run.out) / "pseudo"
    pseudo = first_alone(lambda: BDD100K(run.train.root, run.train.split, labels=folder, cache=run.out / "cache"))
    for task in run.split:
        rows = lacking(run, task)
        missing = np.count_nonzero(~pseudo.labelled[task][rows])
        if missing > BAD_SHARE * len(rows):
            raise InputError(f"{folder} has no {task} labels for {missing} of the {len(rows)} images that need them: "
                             "delete it and run stage pseudo again.")
    return pseudo


def parameter_table(model: hmpl.HMPL) -> str:
    parts = {"body": model.body, "adapter": model.adapter,
             "LV-Adapter": model.lv_adapter, "contexts": model.text, "shared pixel decoder": model.pixel_decoder,
             **{f"head {task}": head for task, head in model.heads.items()}}
    lines = [f"  {'parameters':<20}{'trainable':>12}{'frozen':>12}"]
    for name, module in parts.items():
        if module is not None:
            free = sum(p.numel() for p in module.parameters() if p.requires_grad)
            lines.append(f"  {name:<20}{free:>12,}{sum(p.numel() for p in module.parameters()) - free:>12,}")
    if isinstance(model.text, prompts.TaskPrompts):
        tower = sum(p.numel() for p in model.text.tower.parameters())
        lines.append(f"  {'CLIP text tower':<20}{0:>12,}{tower:>12,}")
    return "\n".join(lines)


def plan(run: Run, last: str) -> str:
    """What will be done, stage by stage, and what is there already."""
    config = run.config
    images = len(set().union(*run.split.values()))
    width, height = config["size"]
    truth = ", ".join(f"{task} {len(stems)}" for task, stems in run.split.items())
    lines = [f"plan: {config['dataset']}, setting {config['setting']}, {config['heads']} heads, profile "
             f"{config['profile']}, {width}x{height}, batch {config['batch']}, lr {config['lr']:.2e}, {run.device.type}, "
             f"amp {config['amp']}, run folder {run.out}",
             f"  images with ground truth: {truth}; {images} in all; validation {len(run.val)}"]
    for stage in up_to(run, last):
        if stage == "pseudo":
            state = "done" if (run.out / "pseudo" / "report.json").exists() else "to do"
            lines.append(f"  pseudo               labels that images lack  {state}")
        for task in teachers_of(run) if stage == "teachers" else [None] if stage != "pseudo" else []:
            path, steps = run.path(stage, task), stage_steps(run, stage, task)
            state = "to do"
            if exists(path):
                tasks = [task] if task else list(run.split)
                saved = load_stage(run, path, tasks)
                state = "done" if finished(run, path, tasks) else f"resumes at step {saved['step']}"
            frozen = ", body frozen" if stage == "adapt" else ""
            lines.append(f"  {('teacher ' + task) if task else stage:<20} {steps:>6} steps{frozen}  {state}")
    if taken_over(run):
        lines.append("  body and adapter go from teacher to teacher, and with all their heads to the first joint stage")
    steps = {stage: stage_steps(run, stage) for stage in ("adapt", "finetune") if stage in stages_of(run)}
    plain = max(1, round(plain_steps(run)))
    lines.append(f"  scheme {config['scheme']}: {' + '.join(f'{stage} {n}' for stage, n in steps.items())} = "
                 f"{sum(steps.values())} steps; pretrain-finetune would take {plain}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------- command line

def image_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 32):
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected WIDTHxHEIGHT from 32x32 on, such as 256x144.")
    return int(width), int(height)


def fraction(text: str) -> float:
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected a number above 0.")


def contexts(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def adapters(text: str) -> tuple[str, ...]:
    parts = tuple(sorted(set(text.split("+"))))
    if set(parts) <= {"lv", *hmpl.ADAPTERS} and len(set(parts) - {"lv"}) <= 1:
        return parts
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected lv, one of {', '.join(hmpl.ADAPTERS)}, or both with a "
                                     "+ between them, such as pre+lv.")


def task_list(text: str) -> tuple[str, ...]:
    tasks = tuple(text.split(","))
    if set(tasks) <= set(hmpl.KINDS) and len(set(tasks)) == len(tasks):
        return tasks
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected some of {', '.join(hmpl.KINDS)}, with commas "
                                     "between them.")


def thresholds(text: str) -> dict[str, float]:
    try:
        found = {task: float(value) for task, value in (part.split("=") for part in text.split(","))}
        if set(found) <= set(hmpl.KINDS) and all(0 <= value <= 1 for value in found.values()):
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected TASK=NUMBER, numbers from 0 to 1, such as "
                                     "detection=0.5,semantic=0.6.")


def share(text: str) -> float:
    if not 0 < fraction(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected a number between 0 and 1.")
    return float(text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Trains HMPL in stages; each stage first runs what it lacks.")
    p.add_argument("--dataset", choices=evaluate.DATASETS, default="bdd100k", help="bdd100k (default): three tasks. "
                   "nuimages: detection and semantic, every image labelled for both")
    p.add_argument("--setting", choices=SETTINGS, help="which images have ground truth for which task: 20k drivable / 10k "
                   "detection / 7k semantic (default), 7k each, or all there are (nuImages' default). Smaller data keeps "
                   "the proportions")
    p.add_argument("--stage", choices=(*STAGES, "all"), default="finetune", help="run up to this stage (default: finetune, "
                   "the last; all: the same); finished ones are not run again")
    p.add_argument("--scheme", choices=SCHEMES, default="pretrain-adapt-finetune", help="the paper's (default), or "
                   "pretrain-finetune: the whole schedule in finetune. Both cost the same")
    p.add_argument("--heads", choices=hmpl.HEADS, default="transformer", help="transformer (default): Sparse R-CNN and "
                   "MaskFormer; conv: Faster R-CNN and Semantic FPN")
    p.add_argument("--adapter", type=adapters, default="lv", metavar="KIND", help="lv (default): FPN and the LV-Adapter; "
                   "fpn: FPN alone; pre, post: two convolutions on each level before or after it; pre_scalar, pre_vector: "
                   "the first as a residual with a learnable weight; pre+lv and so on: these with the LV-Adapter")
    p.add_argument("--tasks", type=task_list, metavar="T,T", help="learn only these, such as semantic or "
                   "detection,drivable; the LV-Adapter then reads their classes alone. Default: all of the data set")
    p.add_argument("--labels", choices=("pseudo", "own"), default="pseudo", help="pseudo (default): teachers give the "
                   "labels that images lack. own: what an image lacks adds no loss")
    p.add_argument("--labels-of", metavar="RUN", help="take split and pseudo labels from this run folder instead of making "
                   "them: experiments that are compared should share them, and save the teachers")
    p.add_argument("--sampler", choices=("mixed", "round-robin", "weighted"), default="mixed", help="for --labels own: "
                   "images of all tasks in a batch (default), one task a step in turn, or drawn by its number of images")
    p.add_argument("--threshold", type=thresholds, default={}, metavar="T=X,T=X", help="what is sure enough to be a pseudo "
                   f"label: score of boxes (default {PSEUDO_SCORE}, less where a weak teacher would leave images without "
                   "boxes), confidence of pixels (default by profile), such as detection=0.5,semantic=0.6")
    p.add_argument("--data", metavar="DIR", help="data in the data set's layout; default: $BDD100K, data/bdd100k, else "
                   "the drawn sample that comes with the code; $NUIMAGES, data/nuimages")
    p.add_argument("--out", metavar="DIR", help="run folder; default: runs/SETTING, for nuImages runs/nuimages. The same "
                   "command again resumes")
    p.add_argument("--profile", choices=hmpl.PROFILES, help="paper: ResNet-50 at 1280x720, needs a GPU. tiny: "
                   "ResNet-18 for small images and laptops. Default: tiny on the sample, else paper")
    p.add_argument("--pretrained", metavar="NAME", default="supervised", help="the body's weights: supervised "
                   f"(default) = torchvision's ImageNet release, none = random, {', '.join(list(PRETRAINED)[1:])}, or a "
                   "file of any of these projects; the encoder in it is found")
    p.add_argument("--pixels", choices=hmpl.PIXELS, help="how these weights want their images: ImageNet's mean and std, "
                   "SwAV's, or 0..1 (SimCLR's own releases). Default: as far as the file tells, else imagenet")
    p.add_argument("--clip", metavar="NAME", default="ViT-B-16", help="CLIP's text tower: RN50, ViT-B-32, ViT-B-16 "
                   "(default; cached or downloaded), a checkpoint file (its vocabulary is looked for beside it), "
                   "or none = random")
    p.add_argument("--prompts", choices=("learned", "engineered", "ensemble"), default="learned", help="what the "
                   "tower reads: learned task contexts (default), one sentence for each class, or the mean of 63")
    p.add_argument("--contexts", type=contexts, default=16, metavar="N|WORDS", help="learned tokens of a prompt (default "
                   "16), or words that they begin as, such as 'a photo of a'")
    p.add_argument("--context-position", choices=prompts.POSITIONS, default="end", help="where the class name stands: "
                   "after the learned contexts (end, default), amid or before them")
    p.add_argument("--class-contexts", action="store_true", help="contexts of its own for every class, not for every task")
    beyond = p.add_argument_group("beyond the paper, off by default")
    beyond.add_argument("--early-language", action="store_true", help="the LV-Adapter writes before FPN's top-down path, so "
                        "that every level hears the language, not P5 alone (early fusion, as in GLIP)")
    beyond.add_argument("--pixel-text", action="store_true", help="auxiliary loss between P5's cells and the class "
                        "embeddings (DenseCLIP)")
    beyond.add_argument("--shared-pixel-decoder", action="store_true", help="one pixel decoder for both mask heads (tasks "
                        "share it in OneFormer): less to compute")
    beyond.add_argument("--uncertainty", action="store_true", help="tasks' losses weighted by learned variances (Kendall et "
                        "al., CVPR 2018)")
    beyond.add_argument("--ema", type=share, metavar="DECAY", help="score and pass on averaged weights, decay such as 0.999 "
                        "(Mean Teacher)")
    p.add_argument("--epochs", type=fraction, help="length of the plain schedule over all images: adapt has a third of "
                   "it, finetune two thirds, each teacher a quarter. Longer scores better. Default by profile")
    p.add_argument("--steps", type=evaluate.whole(1), help="the same in optimizer steps, instead of --epochs")
    p.add_argument("--batch", type=evaluate.whole(1), help="images in an optimizer step, over all GPUs and accumulated "
                   "parts. Default by profile")
    p.add_argument("--accum", type=evaluate.whole(1), default=1, help="parts a batch is computed in (default 1). If "
                   "memory is short, double it: results stay nearly the same, as BatchNorm sees the parts")
    p.add_argument("--lr", type=fraction, help="learning rate of the mask heads, used as it is. Default: the profile's "
                   "x sqrt(batch / the profile's batch), AdamW's rule (arXiv 2205.10287). If losses become NaN, halve it")
    p.add_argument("--size", type=image_size, metavar="WxH", help="network's image size. Default: the profile's, for "
                   f"tiny the images' own up to {TINY_WIDTH} wide. Larger finds smaller objects and costs in "
                   "proportion to the area")
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "no"), default="auto", help="mixed precision; auto "
                   "(default): bf16 where the GPU has it, else fp16, on the CPU none")
    p.add_argument("--workers", type=evaluate.whole(0), help="processes that read images, for each GPU; default: 8 "
                   "on a GPU, else 0")
    p.add_argument("--seed", type=int, default=0, help="of split, initial weights, order and augmentation (default 0)")
    p.add_argument("--strict", action="store_true", help="end the run at the first file that cannot be read; default: "
                   "another image stands in, for up to 1%% of them")
    p.add_argument("--check-data", action="store_true", help="only walk the data folder, decode everything in it and print "
                   "what is there and what is wrong")
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = p.parse_args(argv)
    args.setting = args.setting or ("disjoint_normal" if args.dataset == "bdd100k" else "full")
    args.tasks = args.tasks or tuple(evaluate.DATASETS[args.dataset].classes)
    args.stage = STAGES[-1] if args.stage == "all" else args.stage
    return args


def fingerprint(*parts: LabelledImages) -> str:
    """Of the images' names, which labels they have, and the boxes; that of the masks' pixels would take too long."""
    digest = hashlib.sha256()
    for data in parts:
        for array in (data.files, *data.labelled.values(), data.boxes, data.box_labels, data.crowd, data.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def origin() -> dict:
    """Command, versions and, where the code is a git checkout, its commit, of the start that wrote this."""
    here, commit = Path(__file__).resolve(), None
    if shutil.which("git"):
        git = ["git", "-C", str(here.parent)]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False)
        if tracked.returncode == 0:
            commit = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True,
                                    check=False).stdout.strip()
    return {"command": shlex.join(sys.argv), "commit": commit, "python": sys.version.split()[0],
            **{lib.__name__: str(lib.__version__) for lib in (torch, torchvision, np)}}


def check_combination(args: argparse.Namespace, train: LabelledImages) -> None:
    """Refuses options that make no sense together, before anything is trained."""
    unknown = [task for task in args.tasks if task not in train.classes]
    if unknown:
        raise InputError(f"--tasks {','.join(unknown)} was given, but {args.dataset} has {', '.join(train.classes)}: name "
                         "some of these.")
    if args.dataset != "bdd100k" and args.setting != "full":
        raise InputError(f"--setting {args.setting} shares out BDD100K's three tasks, but every image of {args.dataset} is "
                         "labelled for all it has: use --setting full.")
    if not set(args.threshold) <= set(args.tasks):
        raise InputError(f"--threshold {', '.join(args.threshold)} was given, but the tasks are {', '.join(args.tasks)}: "
                         "name only these.")
    masks = [task for task in args.tasks if hmpl.KINDS[task] == "mask"]
    if (args.early_language or args.pixel_text) and "lv" not in args.adapter:
        raise InputError("--early-language and --pixel-text need the LV-Adapter, but --adapter "
                         f"{'+'.join(args.adapter)} has none: add +lv to it, or leave them out.")
    if args.pixel_text and not masks:
        raise InputError("--pixel-text needs a task with masks: add semantic or drivable to --tasks, or leave it out.")
    if args.shared_pixel_decoder and (args.heads == "conv" or len(masks) < 2):
        raise InputError("--shared-pixel-decoder is for two MaskFormer heads: use --heads transformer with semantic and "
                         "drivable, or leave it out.")


def make_config(args: argparse.Namespace, root: Path, train: LabelledImages, notes: list[str]) -> dict:
    """Everything that a result depends on, from options and profile."""
    sample = root.resolve() == evaluate.SAMPLE
    profile = args.profile or ("tiny" if sample else "paper")
    rule = TRAINING[profile]
    check_combination(args, train)
    if args.sampler != "mixed" and args.labels == "pseudo":
        raise InputError(f"--sampler {args.sampler} chooses by ground truth, but pseudo labels give every image all tasks: "
                         "add --labels own.")
    batch, parts = args.batch or rule["batch"], args.accum * int(os.environ.get("WORLD_SIZE", 1))
    if batch % parts:
        raise InputError(f"a batch of {batch} images cannot be shared by {parts} parts (processes x --accum): "
                         f"give a --batch that {parts} divides.")
    pretrained = weights_or_none(args.pretrained, "body", lambda: find_body(args.pretrained, profile), sample, notes)
    fits = "imagenet"
    if pretrained != "none":                                             # those that do not fit end the run here
        fits = hmpl.load_body(hmpl.ResNetBody(hmpl.PROFILES[profile]["depth"]), find_body(pretrained, profile))[1]
    rates = dict(rule["rates"])
    if args.heads == "conv":
        rates.pop("heads.detection", None)                               # that rate is Sparse R-CNN's
    unsure = {task: None if task == "detection" else rule["confidence"] for task in args.tasks}
    return {
        "dataset": args.dataset, "setting": args.setting, "scheme": args.scheme, "labels": args.labels,
        "labels_of": args.labels_of and str(Path(args.labels_of).resolve()), "sampler": args.sampler,
        "heads": args.heads, "adapter": list(args.adapter), "tasks": list(args.tasks),
        "data": str(root.resolve()), "profile": profile, "seed": args.seed,
        "size": list(args.size or (train.size if hmpl.PROFILES[profile]["size"] else small_size(train))),
        "epochs": args.epochs or rule["epochs"], "steps": args.steps, "batch": batch, "accum": args.accum,
        "lr": args.lr or rule["lr"] * math.sqrt(batch / rule["batch"]), "amp": args.amp,
        **{key: rule[key] for key in ("decay", "warmup", "scales")}, "rates": rates, "prompts": args.prompts,
        "thresholds": unsure | args.threshold,
        "extras": [extra for extra in EXTRAS if getattr(args, extra)], "ema": args.ema,
        "contexts": args.contexts, "context_position": args.context_position, "class_contexts": args.class_contexts,
        "pretrained": pretrained, "pixels": args.pixels or fits,
        "clip": weights_or_none(args.clip, "CLIP text tower", lambda: find_text(args.clip), sample, notes),
    }


def small_size(data: LabelledImages) -> tuple[int, int]:
    """The images' own (width, height), of wider ones that of a copy TINY_WIDTH wide."""
    height, width = data.image(0).shape[1:]
    scale = min(1, TINY_WIDTH / width)
    return round(width * scale), round(height * scale)


def find_text(name: str) -> None:
    """Makes sure that text tower and vocabulary are there and can be used."""
    tower, vocabulary = text_files(name)
    prompts.find_vocabulary(vocabulary)
    prompts.load_text_tower(tower)


def weights_or_none(name: str, what: str, get, sample: bool, notes: list[str]) -> str:
    """The weights' name, or file's absolute path, if they can be had, or "none". If they can't: an error on
    real data, "none" on the sample."""
    given = Path(name).is_file()
    if name != "none" and not given and (os.sep in name or Path(name).suffix):
        raise InputError(f"no file {name} with the {what}'s weights: give the path of one, or 'none' for random weights.")
    if name != "none":
        try:
            get()
        except (OSError, prompts.TextError, hmpl.WeightsError) as error:
            if given or not sample or isinstance(error, hmpl.WeightsError):
                raise InputError(f"no {what} weights ({error}): put the file there, name another, or 'none' for random "
                                 "weights.") from None
            name = "none"
    if name == "none":
        notes.append(f"RANDOM {what} weights, nothing pretrained")
    return str(Path(name).resolve()) if given else name


def start(args: argparse.Namespace) -> Run:
    """Opens data and run folder, makes or checks config.json and split.json."""
    device = evaluate.this_device()
    rank, world = evaluate.rank_and_world()
    root, notes, reader = data_folder(args), [], evaluate.DATASETS[args.dataset]
    out = Path(args.out or f"runs/{args.setting if args.dataset == 'bdd100k' else args.dataset}")
    cache = {} if args.dry_run or args.dataset != "bdd100k" else {"cache": out / "cache"}
    if root.resolve() == evaluate.SAMPLE:
        notes.append("the SAMPLE of drawn roads, not real data: scores mean nothing beyond it")
    train, val = first_alone(lambda: (reader(root, "train", **cache), reader(root, "val", **cache)), bool(cache))
    config = make_config(args, root, train, notes) | {"images": fingerprint(train, val), "origin": origin()}
    if any(file.suffix in (".pt", ".old") for file in out.rglob("*")):   # only then would something be lost
        old = evaluate.read_json(out / "config.json")
        now = json.loads(json.dumps(config))                             # tuples as lists
        free = MAY_CHANGE if (out / "pseudo").exists() else MAY_CHANGE | {"thresholds"}
        changed = [f"{key} {old.get(key)} -> {now[key]}" for key in now.keys() - free if now[key] != old.get(key)]
        if changed:
            raise InputError(f"{out} was begun with other options ({'; '.join(changed)}): use them again, or another --out.")
        split = evaluate.read_json(out / "split.json")
    elif args.labels_of:
        split = split_of(Path(args.labels_of), config, train)
    else:
        split = make_split(train, val.stems, args.setting, args.seed, args.tasks)
    workers = args.workers if args.workers is not None else evaluate.num_workers(device)
    run = Run(out, config, device, workers, train, val, split, notes, rank, world, args.strict)
    for note in notes:
        run.say(f"NOTE: {note}")
    rule = TRAINING[config["profile"]]
    how = "as given" if args.lr else f"{rule['lr']:.0e} x sqrt(batch {config['batch']} / {rule['batch']})"
    run.say(f"learning rate {config['lr']:.2e}: {how}")
    return run


def data_folder(args: argparse.Namespace) -> Path:
    """The data given, or found; the sample is drawn when it is first used."""
    root = evaluate.find_data(args.data, args.dataset)
    if root.resolve() == evaluate.SAMPLE:
        first_alone(draw_sample)
    return root


def draw_sample() -> None:
    """Draws the sample, in a process of its own, unless it is there."""
    if not evaluate.SAMPLE.is_dir():
        script = evaluate.SAMPLE.parent / "draw_roads.py"
        if subprocess.run([sys.executable, str(script)], check=False).returncode:
            raise InputError(f"{script} could not draw the sample: see above, or give --data.")


def first_alone(read: Callable, wait: bool = True):
    """What `read` gives, in each process. wait: the first is done before the others begin, who find what it has kept."""
    rank, world = evaluate.rank_and_world()
    if wait and rank:
        dist.barrier()
    found = read()
    if wait and world > 1 and not rank:
        dist.barrier()
    return found


def split_of(folder: Path, config: dict, train: LabelledImages) -> dict[str, list[str]]:
    """The split of a run whose pseudo labels are done; it must be of the same data, setting and tasks."""
    if not (folder / "pseudo" / "report.json").exists():
        raise InputError(f"--labels-of {folder} has no finished pseudo labels: run its stage pseudo first.")
    other = evaluate.read_json(folder / "config.json")
    wrong = [f"{key} {other.get(key)}" for key in ("dataset", "setting", "tasks") if other.get(key) != config[key]]
    split = evaluate.read_json(folder / "split.json")
    unknown = set().union(*split.values()) - set(train.stems.tolist())
    wrong += [f"{len(unknown)} images are not here"] * bool(unknown)
    if wrong:
        raise InputError(f"--labels-of {folder} is of other data ({', '.join(wrong)}): name a run of the same data, setting "
                         "and tasks.")
    return split


def run_stages(args: argparse.Namespace) -> None:
    run = start(args)
    run.say(plan(run, args.stage))
    if args.dry_run:
        return
    if run.world > 1:
        dist.barrier()                                                   # all have read what is there
    if run.rank == 0:
        for name, value in (("split", run.split), ("config", run.config)):
            evaluate.write_json(run.out / f"{name}.json", value)
    for stage in up_to(run, args.stage):
        {"teachers": run_teachers, "pseudo": run_pseudo, "adapt": run_adapt, "finetune": run_finetune}[stage](run)
        if run.world > 1:
            dist.barrier()


def main(argv: Sequence[str] | None = None) -> None:
    args, failed = parse_args(argv), None
    interrupt.listen()
    try:
        if args.check_data:
            workers = min(8, os.cpu_count()) if args.workers is None else args.workers
            if not evaluate.check_data(data_folder(args), args.dataset, workers):
                failed = "train.py: the data needs mending, see above."
        else:
            run_stages(args)
    except Stopped:
        world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if evaluate.rank_and_world()[0] == 0:
            python = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
            tqdm.write("stopped; the same command goes on: "
                       f"{python} train.py {shlex.join(sys.argv[1:] if argv is None else argv)}")
    except (InputError, hmpl.WeightsError, prompts.TextError, OSError) as error:
        failed = f"train.py: {evaluate.sentence(error)}"                 # its frames are let go, and with them the workers
    if failed:
        sys.exit(failed)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
