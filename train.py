"""Trains hmpl.HMPL: teachers -> pseudo labels -> adapt -> finetune; the same command resumes a run.

    python train.py --setting disjoint_normal --stage adapt     # BDD100K, or the synthetic sample
    torchrun --nproc_per_node=8 train.py --setting full --data data/bdd100k
    python train.py --setting disjoint_balance --dry-run            # only the plan

pretrain-adapt-finetune ("Effective Adaptation in Multi-Task Co-Training for Unified Autonomous
Driving", NeurIPS 2022): a pretrained backbone is frozen while adapters, prompt contexts and heads
learn from all tasks (adapt, a third of the budget), then everything learns (finetune, two thirds).
Images are labelled for one task each; single-task teachers add the missing labels as pseudo labels.

Each stage first runs the earlier stages that are not done. One run folder holds everything:
config.json, split.json, teachers/TASK.pt, pseudo/ (BDD100K's layout), adapt.pt and finetune.pt;
log.jsonl, curves.png and pictures/ show the progress; `lock` keeps out other processes.
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
from pathlib import Path

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
from evaluate import BDD100K, InputError, LabelledImages, at_least, require

try:
    import fcntl
except ImportError:                          # Windows: run folders are not locked there
    fcntl = None

STAGES = ("teachers", "pseudo", "adapt", "finetune")
SETTINGS = {  # images with ground truth by task (paper, appendix A); others: as many as semantic
    "disjoint_normal": {"drivable": 20000, "detection": 10000, "semantic": 7000},
    "disjoint_balance": {"drivable": 7000, "detection": 7000, "semantic": 7000},
    "full": {},                              # all images of each task
}
SCHEMES = {  # each joint (multi-task) stage's share of the full schedule, which is --epochs long
    "pretrain-adapt-finetune": {"adapt": 1 / 3, "finetune": 2 / 3},
    "pretrain-finetune": {"finetune": 1.},
}
# How each of hmpl.PROFILES learns. lr: for this batch; lr_factors: modules with another rate;
# scales: smallest and largest of six training scales; confidence: pseudo pixels below it are
# ignored; tower: sizes of the text tower of --clip none; teachers: their shares of the full
# schedule, in the order of training; chained: each teacher is initialised from the ones before,
# the first joint stage from all teachers.
TRAINING = {
    "paper": dict(
        epochs=36, batch=16, lr=1e-4, weight_decay=1e-4, warmup=1000, scales=(5 / 6, 1),
        lr_factors={"backbone": 0.25, "adapter": 0.25, "heads.detection": 0.25},
        confidence=0.5, tower={}, chained=False,
        teachers={"semantic": 0.25, "detection": 0.25, "drivable": 0.25}),
    "tiny": dict(
        epochs=3, batch=4, lr=7e-4, weight_decay=1e-2, warmup=20, scales=(5 / 6, 7 / 6),
        lr_factors={"backbone": 0.3},
        confidence=0.1, tower=dict(width=64, layers=2, embed_dim=64), chained=True,
        teachers={"semantic": 0.6, "detection": 0.5, "drivable": 0.55}),
}
ZOO = "https://download.openmmlab.com/mmselfsup/1.x"
PRETRAINED = {  # MMSelfSup's ResNet-50s, whose names end with a checksum
    "moco-v2": "mocov2_resnet50_8xb32-coslr-200e_in1k_20220825-b6d23c86",
    "simclr": "simclr_resnet50_16xb256-coslr-200e_in1k_20220825-4d9cce50",
    "swav": "swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96_20220825-5b3fc7fc",
    "byol": "byol_resnet50_16xb256-coslr-200e_in1k_20220825-de817331",
    "densecl": "densecl_resnet50_8xb32-coslr-200e_in1k_20220825-3078723b",
}
TEMPLATES = {"engineered": prompts.ENGINEERED, "ensemble": prompts.ENSEMBLE}
ADAPTER_CHOICES = ("lv", *hmpl.ADAPTERS, *(f"{kind}+lv" for kind in hmpl.ADAPTERS))
TINY_WIDTH = 128             # of the tiny profile's images, unless --size is given
PSEUDO_SCORE = 0.3           # score_threshold of pseudo boxes
LANE_BACKGROUND = 0.2        # factor of lane's background score, since argmax misses thin lines
NO_DECAY = ("query_embed", "proposal_features", "proposal_boxes", "contexts")     # embeddings
CLIP_NORM = 1.0
MAX_UNREADABLE = 10          # samples in a row
MAX_NOT_FINITE = 10          # steps in a row
SAVE_SECONDS = 600
LOG_STEPS, CURVE_STEPS = 10, 100
MAY_CHANGE = {"data", "accum", "amp", "origin"}     # when a run is resumed; see `origin`
Split = dict[str, list[str]]                        # task -> stems of images with ground truth


# -------------------------------------------------------------------------- split and samples

def make_split(train: LabelledImages, val_stems: Sequence[str], setting: str, seed: int,
               tasks: Sequence[str] | None = None) -> Split:
    """Chooses for each task (default: all) the stems of the training images whose ground truth it
    may use. Disjoint settings take the paper's numbers, scaled down together if there are too few
    images. Asking for fewer tasks does not change a task's images."""
    tasks = tuple(tasks or train.classes)
    not_val = ~np.isin(train.stems, val_stems)
    labelled = {task: train.labelled[task] & not_val for task in train.classes}
    # A fixed order makes the split reproducible: the paper's tasks, then the others.
    order = dict.fromkeys([*SETTINGS["disjoint_normal"], *train.classes])
    if setting == "full":
        return {task: train.stems[labelled[task]].tolist() for task in order if task in tasks}
    in_paper = SETTINGS[setting]
    wanted = {task: in_paper.get(task, in_paper["semantic"]) for task in order
              if task in labelled and labelled[task].any()}
    has_labels = np.stack([labelled[task] for task in wanted], axis=1)       # [images, tasks]
    # Groups images into kinds by the set of tasks they are labelled for, encoded as a bit mask.
    codes = has_labels @ (1 << np.arange(len(wanted)))
    _, first, kind = np.unique(codes, return_index=True, return_inverse=True)
    flow = assign(has_labels[first], np.bincount(kind), np.array(list(wanted.values())))
    require(flow.sum(0).all(), f"{train.labels} has {len(kind)} images for {train.split}: too few "
            f"for {len(wanted)} disjoint sets: use --setting full.")
    shuffled = np.random.default_rng(seed).permutation(len(kind))
    chosen = {task: [] for task in wanted}
    for k, numbers in enumerate(flow):               # numbers[t] images of this kind go to task t
        of_kind = shuffled[kind[shuffled] == k]
        for task, images in zip(wanted, np.split(of_kind, np.cumsum(numbers))):    # drops the rest
            chosen[task] += train.stems[images].tolist()
    return {task: sorted(chosen[task]) for task in wanted if task in tasks}


def assign(kinds: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns how many images of each kind go to each task, [kinds, tasks]. The totals of the tasks
    are the wanted numbers, scaled down until every subset of the tasks has enough usable images; by
    Hall's theorem a maximum flow reaches them. kinds [kinds, tasks]: whether images of the kind
    have the task's labels. counts [kinds]: images of each kind."""
    num_kinds, num_tasks = kinds.shape
    scale = 1.
    for size in range(1, num_tasks + 1):
        for tasks in map(list, itertools.combinations(range(num_tasks), size)):
            usable = counts[kinds[:, tasks].any(1)].sum()
            scale = min(scale, usable / wanted[tasks].sum())
    source, sink = num_kinds + num_tasks, num_kinds + num_tasks + 1      # after kinds and tasks
    capacity = np.zeros((sink + 1, sink + 1), np.int32)      # source -> kinds -> tasks -> sink
    capacity[source, :num_kinds] = counts
    capacity[:num_kinds, num_kinds:source] = kinds * counts[:, None]
    per_task = np.floor(wanted * scale + 1e-9)               # 1e-9: 20.0 may be 19.999...
    capacity[num_kinds:source, sink] = np.maximum(1, per_task)           # at least one image
    flow = maximum_flow(csr_matrix(capacity), source, sink).flow.toarray()
    return flow[:num_kinds, num_kinds:source]


class Samples(torch.utils.data.Dataset):
    """Training images with ground truth for the tasks that the split assigns to them, and pseudo
    labels for the others.

    A key is (n, (width, height), flip), where n is a position in `indices`. `batch_keys` draws the
    keys, so that samples do not depend on the number of workers. A sample is (image, target, file);
    the next one replaces an unreadable one.
    assigned [tasks, images]: whether ground truth is used. indices: of the images in use.
    pseudo: reads the pseudo labels of all of data's images.
    """

    def __init__(self, data: LabelledImages, split: Split, tasks: Sequence[str],
                 pseudo: BDD100K | None = None):
        self.data, self.pseudo, self.tasks = data, pseudo, tuple(tasks)
        self.assigned = np.stack([np.isin(data.stems, split[task]) for task in tasks])
        self.indices = np.flatnonzero(self.assigned.any(0))

    def __len__(self) -> int:
        return len(self.indices)

    def groups(self) -> list[np.ndarray]:
        """Returns groups of samples; each batch is drawn from one group. Without pseudo labels each
        task has its own: a mixed batch would hold too few labels of a task."""
        assigned = self.assigned[:, self.indices]                            # [tasks, samples]
        if self.pseudo is not None or assigned.all():
            return [np.arange(len(self))]
        return [np.flatnonzero(of_task) for of_task in assigned]

    def __getitem__(self, key: tuple[int, tuple[int, int], bool]) -> tuple[Tensor, dict, str]:
        n, size, flip = key
        for attempt in range(MAX_UNREADABLE):
            i = self.indices[(n + attempt) % len(self)]
            file = str(self.data.files[i])
            assigned = [task for task, yes in zip(self.tasks, self.assigned[:, i]) if yes]
            others = [task for task in self.tasks if task not in assigned]
            try:
                image, target = self.data.sample(i, assigned)
                if self.pseudo is not None:
                    target |= self.pseudo.target(i, others, image.shape[1:])
                return *augment(image, target, size, flip), file
            except (InputError, OSError) as error:
                reason = str(error)
                tqdm.write(f"NOTE: the next image replaces {file}: {reason}", file=sys.stderr)
        raise InputError(f"{MAX_UNREADABLE} images in a row cannot be used, the last because "
                         f"{reason}")


def augment(image: Tensor, target: dict, size: tuple[int, int], flip: bool) -> tuple[Tensor, dict]:
    """Resizes image and target to (width, height) and mirrors them. Clips boxes to the image and
    drops those without area. Masks of further tasks (not in evaluate.CLASSES) keep their size,
    since nearest neighbours would tear thin lines such as lane marking."""
    (width, height), (old_height, old_width) = size, image.shape[1:]
    target = dict(target)
    image = resize(image, [height, width], antialias=True)
    for task in target.keys() - evaluate.BOX_KEYS:
        mask = target[task]
        if task in evaluate.CLASSES:
            mask = resize(mask[None], [height, width], InterpolationMode.NEAREST_EXACT)[0]
        target[task] = mask.flip(-1) if flip else mask
    if "boxes" in target:
        boxes = target["boxes"] * torch.tensor([width / old_width, height / old_height]).repeat(2)
        if flip:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([*size, *size], dtype=torch.float32))
        keep = (boxes[:, 2:] - boxes[:, :2]).amin(1) > 0
        target["boxes"] = boxes
        target |= {key: target[key][keep] for key in ("boxes", "labels", "crowd")}
    return image.flip(-1) if flip else image, target


def batch_keys(groups: Sequence[np.ndarray], batch: int, start: int, steps: int, seed: int,
               sizes: Sequence[tuple], accum: int = 1, rank: int = 0, world: int = 1) -> Iterator:
    """Yields the keys of samples for every batch from step `start` on, given by the seed alone. The
    groups take turns: step s uses group s % len(groups), which is reshuffled every epoch. All
    images of a step have one of the sizes (width, height), so that none is padded. Of a step's
    global batch, process `rank` takes images rank, rank + world and so on, in `accum`
    micro-batches."""
    for step in range(start, steps):
        rng = np.random.default_rng([seed, 1, step])         # 1: sizes and flips, 0: order
        size = sizes[rng.integers(len(sizes))]
        turn, g = divmod(step, len(groups))
        count = len(groups[g])
        keys, epoch = [], -1
        for n in range(turn * batch, (turn + 1) * batch):    # a batch may span two epochs
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


# ----------------------------------------------------------------------------------------- a run

@dataclass
class Run:
    """State that all stages share. `config` holds everything a result depends on."""
    out: Path
    config: dict
    device: torch.device
    amp: torch.dtype | None
    workers: int
    train: LabelledImages
    val: LabelledImages
    split: Split
    label_notes: list[str]                                   # warnings about missing labels
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        self.stems = set().union(*self.split.values())       # of all images with ground truth
        self.to_label = {}         # task -> indices of the training images for pseudo labels
        for task, stems in self.split.items():
            missing = np.isin(self.train.stems, sorted(self.stems.difference(stems)))
            if missing.any() and self.config["labels"] == "pseudo":
                self.to_label[task] = np.flatnonzero(missing)

    def steps(self, share: float) -> int:
        """Returns the number of optimizer steps in this share of the full schedule."""
        config = self.config
        full = config["steps"] or len(self.stems) * config["epochs"] / config["batch"]
        return max(1, round(full * share))

    @property
    def notes(self) -> list[str]:
        """Warnings that belong beside the scores."""
        notes = []
        if self.config["data"] == str(evaluate.SAMPLE):
            notes.append("the synthetic SAMPLE, not real data: scores mean nothing beyond it")
        for key, kind in (("pretrained", "backbone"), ("clip", "CLIP text tower")):
            if self.config[key] == "none":
                notes.append(f"RANDOM {kind} weights, nothing pretrained")
        return notes

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def log(self, line: dict) -> None:
        """Adds a line to the log; now and then draws its curves."""
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if "val" in line or line["step"] % CURVE_STEPS == 0:
                evaluate.draw_curves(self.out / "log.jsonl", self.split)


@dataclass
class Stage:
    """A model to train. The stage `teachers` has one for each task; adapt and finetune have one."""
    name: str                                # "teacher TASK", "adapt" or "finetune"
    tasks: list[str]
    steps: int
    path: Path                               # of its checkpoint
    init_from: list["Stage"]                 # loads these stages' weights, in this order

    @property
    def joint(self) -> bool:
        """Whether all tasks learn together: adapt or finetune."""
        return self.name in STAGES


def stages_of(run: Run, last: str = STAGES[-1]) -> dict[str, list[Stage]]:
    """Returns the models to train in each stage, in order, up to the stage `last`."""
    config, defaults = run.config, TRAINING[run.config["profile"]]
    stages, chain = {}, []
    if run.to_label and not config["labels_of"]:
        stages = {"teachers": [], "pseudo": []}              # pseudo trains nothing
        # Chained teachers all train, even if a task needs no labels: the next starts from them.
        needed = run.split if defaults["chained"] else run.to_label
        shares = defaults["teachers"]
        for task in dict.fromkeys([*shares, *run.split]):
            if task in needed:
                path = run.out / "teachers" / f"{task}.pt"
                steps = run.steps(shares.get(task, shares["semantic"]))
                teacher = Stage(f"teacher {task}", [task], steps, path, list(chain))
                stages["teachers"].append(teacher)
                if defaults["chained"]:
                    chain.append(teacher)
    for name, share in SCHEMES[config["scheme"]].items():
        path = run.out / f"{name}.pt"
        stages[name] = [Stage(name, list(run.split), run.steps(share), path, list(chain))]
        chain += stages[name]                # finetune loads adapt over the teachers, if chained
    names = list(stages)
    require(last in names, f"--stage {last} was given, but with --scheme {config['scheme']}, "
            f"--labels {config['labels']} and tasks {', '.join(run.split)} there are only "
            f"{', '.join(names)}.")
    return {name: stages[name] for name in names[:names.index(last) + 1]}


def state(run: Run, stage: Stage) -> str:
    """Returns "to do", "resumes at step N" or, if the checkpoint has scores, "done"."""
    saved = load_stage(run, stage)
    if saved is None:
        return "to do"
    return f"resumes at step {saved['step']}" if saved["scores"] is None else "done"


def load_stage(run: Run, stage: Stage) -> dict | None:
    """Loads a stage's checkpoint, if there is one; its network must be the one this run builds."""
    if not stage.path.exists():
        return None
    saved = hmpl.load_checkpoint(stage.path)
    expected = model_config(run, stage)
    differing = [key for key in expected if saved["model_config"].get(key) != expected[key]]
    require(not differing, f"{stage.path} was written for another network ({', '.join(differing)} "
            "differ): use another --out, or delete it to train this stage anew.")
    return saved


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint atomically, even if the power fails."""
    try:
        with evaluate.atomic_write(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{error}; the last checkpoint is unharmed: free some space and run the same "
                      "command") from error


# ------------------------------------------------------------------------------------ the model

def model_config(run: Run, stage: Stage) -> dict:
    """Returns the arguments of a stage's network."""
    config, profile = run.config, hmpl.PROFILES[run.config["profile"]]
    # MaskFormer's queries attend to P5, as in the paper, or to level 4 if P5 is below 8 cells wide.
    level = 5 if config["size"][0] >= 8 * hmpl.STRIDES[-1] else 4
    pyramid = [part for part in config["adapter"] if part != "lv"] or ["fpn"]
    classes = {task: run.train.classes[task] for task in stage.tasks}
    weights = None
    if classes.get("lane", ("",))[-1] == "background":
        # The teacher's pseudo labels already contain the factor: a model that learns more from
        # them than from ground truth would apply it twice.
        pseudo = run.to_label.get("lane", ()) if stage.joint else ()
        if len(pseudo) <= len(run.split["lane"]):
            weights = {"lane": LANE_BACKGROUND}
    return {**profile,
            "classes": classes, "background_weights": weights,
            "maskformer": profile["maskformer"] | {"memory_level": level},
            "size": tuple(config["size"]), "adapter": pyramid[0],
            "pixels": config["pixels"], "heads": config["heads"]}


def new_model(run: Run, stage: Stage) -> hmpl.HMPL:
    """Builds a stage's model. Loads the weights of `stage.init_from`; if that is empty, the
    pretrained backbone. Other parameters are random. Only joint stages have the LV-Adapter."""
    config, frozen = run.config, stage.name == "adapt"
    torch.manual_seed(config["seed"])
    text = text_source(run) if stage.joint and "lv" in config["adapter"] else None
    model = hmpl.HMPL(**model_config(run, stage), text=text)
    if stage.init_from:
        for before in stage.init_from:
            model.load_state_dict(load_stage(run, before)["model"], strict=False)
    elif config["pretrained"] == "none":
        calibrate(model, run, frozen)
    else:
        path = find_backbone(config["pretrained"], config["profile"])
        report, _ = hmpl.load_backbone(model.backbone, path)
        run.say(f"  backbone {path}: {report}")
    model.freeze_backbone(frozen)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.say(f"  {stage.name}: {learned:,} parameters learn")
    return model


def calibrate(model: hmpl.HMPL, run: Run, frozen: bool) -> None:
    """Sets the BatchNorm statistics of a random backbone from 32 training images, else its features
    would grow with every block. If it is frozen, also zeroes its residual branches, since random
    ones that never learn only hurt."""
    backbone, count = model.to(run.device).backbone, len(run.train)
    if frozen:
        for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            for block in layer:
                nn.init.zeros_(getattr(block, "bn3", block.bn2).weight)      # a block's last
    rng = np.random.default_rng(run.config["seed"])
    indices = rng.choice(count, min(32, count), replace=False)
    images = [resize(image, run.config["size"][::-1], antialias=True)
              for _, image, _ in evaluate.read_items(run.train, (), strict=False, indices=indices)]
    batches = [model.batch(images[n:n + 8])[0] for n in range(0, len(images), 8)]    # normalised
    update_bn(batches, backbone)


def find_backbone(name: str, profile: str) -> Path:
    """Returns a file of backbone weights: the given one, or the one of this name in the cache."""
    if Path(name).is_file():
        return Path(name)
    if name == "supervised":
        depth = hmpl.PROFILES[profile]["depth"]
        url = torchvision.models.get_model_weights(f"resnet{depth}").IMAGENET1K_V1.url
    else:
        require(name in PRETRAINED, f"--pretrained {name} is neither a file nor one of none, "
                f"supervised, {', '.join(PRETRAINED)}.")
        release = PRETRAINED[name]           # METHOD_CONFIG_DATE-DIGEST
        method, folder = release.split("_")[0], release.rsplit("_", 1)[0]
        url = f"{ZOO}/{method}/{folder}/{release}.pth"
    digest = Path(url).stem.rsplit("-", 1)[1]        # the first digits of its sha256
    return prompts.cached(url, digest, Path(torch.hub.get_dir(), "checkpoints"))


def load_text(name: str, profile: str) -> tuple[prompts.TextTower, prompts.Tokenizer]:
    """Loads CLIP's text tower, by name or from a checkpoint file, and its tokenizer, with the
    vocabulary beside that file if there is one. The name "none" gives a random tower and a
    byte-level tokenizer."""
    if name == "none":
        tower = prompts.TextTower(**TRAINING[profile]["tower"])
        return tower, prompts.Tokenizer(prompts.BYTES)
    path = Path(name) if Path(name).is_file() else prompts.find_tower(name)
    tower = prompts.load_text_tower(path)
    beside = path.parent / "bpe_simple_vocab_16e6.txt.gz"
    vocabulary = prompts.find_vocabulary(beside if beside.exists() else None)
    return tower, prompts.Tokenizer(vocabulary)


def text_source(run: Run) -> nn.Module | Tensor:
    """Returns the LV-Adapter's text source: learned prompts, or features of hand-written ones."""
    config, contexts = run.config, run.config["contexts"]
    classes = {task: run.train.classes[task] for task in run.split}
    tower, tokenizer = load_text(config["clip"], config["profile"])
    if config["prompts"] == "learned":
        start = {"num_contexts": contexts} if isinstance(contexts, int) else {"words": contexts}
        return prompts.TaskPrompts(tower, tokenizer, classes, **start)
    templates = TEMPLATES[config["prompts"]]
    return torch.cat([prompts.encode_templates(tower, tokenizer, names, templates)
                      for names in classes.values()])


# --------------------------------------------------------------------------------- the training

def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Returns the multiple of the base rate at a step: linear warm-up, then polynomial decay."""
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 - (step - warmup) / (steps - warmup)) ** 0.9


def parameter_groups(model: nn.Module, lr: float, factors: dict, decay: float) -> list[dict]:
    """Returns AdamW's groups: no weight decay on biases, norms and learned embeddings. factors:
    module name -> its learning rate as a multiple of `lr`."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matching = (factors[part] for part in factors if name.startswith(part + "."))
            rate = lr * next(matching, 1)
            no_decay = p.dim() < 2 or name.endswith(NO_DECAY)
            groups.setdefault((rate, 0. if no_decay else decay), []).append(p)
    return [{"params": params, "lr": rate, "base": rate, "weight_decay": weight_decay}
            for (rate, weight_decay), params in groups.items()]


class Training:
    """A stage's model, optimizer and counters: all that resuming must restore."""

    def __init__(self, run: Run, stage: Stage, model: hmpl.HMPL):
        config, device = run.config, run.device
        if run.world > 1 and device.type == "cuda":
            model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
        self.run, self.stage = run, stage
        self.model = self.wrapped = model.to(device).train()
        factors = dict(config["lr_factors"])
        from_teachers = any(not before.joint for before in stage.init_from)
        if config["pretrained"] == "none" and not from_teachers:
            factors.pop("backbone", None)            # a random backbone learns at the full rate
        groups = parameter_groups(model, config["lr"], factors, config["weight_decay"])
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp is torch.float16)
        self.step = self.skipped = 0
        self.not_finite = 0                                  # consecutive steps
        if run.rank:
            torch.manual_seed(config["seed"] + run.rank)     # other random numbers than rank 0's
        saved = load_stage(run, stage)
        if saved:
            self.restore(saved)
        self.saved_at = self.logged_at = time.monotonic()
        self.logged_step = self.step
        if run.world > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)

    def save(self, scores: dict | None = None) -> None:
        """Writes the checkpoint; all processes call this, the first writes. Without scores the
        stage is unfinished: the optimizer's state and all else that resuming needs is kept too."""
        run, model = self.run, self.model
        rng = {"torch": torch.get_rng_state()}
        if run.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(run.device)
        rng = evaluate.from_all_ranks(rng)
        self.saved_at = time.monotonic()
        if run.rank:
            return
        model.update_text()                          # computes the class embeddings to be saved
        checkpoint = {
            "stage": self.stage.name, "step": self.step, "steps": self.stage.steps,
            "notes": run.notes, "scores": scores, "config": run.config,
            "model_config": model_config(run, self.stage), "model": model.state_dict()}
        if scores is None:
            checkpoint |= {
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "rng": rng, "skipped": self.skipped}
        write_checkpoint(self.stage.path, checkpoint)

    def restore(self, saved: dict) -> None:
        """Restores the state that `save` wrote."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.run.rank < len(saved["rng"]):        # more processes may resume a run
            rng = saved["rng"][self.run.rank]
            torch.set_rng_state(rng["torch"])
            if "cuda" in rng and torch.cuda.is_available():
                torch.cuda.set_rng_state(rng["cuda"])
        self.step, self.skipped = saved["step"], saved["skipped"]

    def advance(self, batches: Iterator, signal_number: int = 0) -> dict[str, float]:
        """Does one optimizer step, unless a gradient is not finite; returns the losses. Sets `stop`
        (the number of a signal that any process received, or 0) and `due` (whether to save)."""
        optimizer = self.optimizer
        factor = lr_factor(self.step, self.stage.steps, self.run.config["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        losses, files = self.backward(batches)
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM, foreach=True)
        flags = torch.tensor([signal_number, time.monotonic() - self.saved_at > SAVE_SECONDS])
        flags = flags.float().to(self.run.device, non_blocking=True)
        if self.run.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        numbers = torch.cat([torch.stack([*losses.values(), norm]), flags])
        *values, self.norm, stop, due = numbers.tolist()     # the only GPU sync of a step
        losses = dict(zip(losses, values))
        self.stop, self.due = int(stop), due > 0
        finite = math.isfinite(self.norm)
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        self.skipped += not finite
        # Of fp16, count only steps with a loss scale below 1: a larger one may be the reason.
        scale_too_high = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        self.not_finite = 0 if finite or scale_too_high else self.not_finite + 1
        if self.not_finite == MAX_NOT_FINITE:
            names = [key for key, value in losses.items() if not math.isfinite(value)]
            raise InputError(
                f"stage {self.stage.name}: {', '.join(names) or 'gradients'} not finite for "
                f"{MAX_NOT_FINITE} steps up to {self.step}, with {', '.join(files)}: start in "
                "another --out with a lower --lr or --amp no.")
        return losses

    def backward(self, batches: Iterator) -> tuple[dict[str, Tensor], list[str]]:
        """Computes the gradients of `accum` batches; returns the losses' means and the files."""
        run, accum = self.run, self.run.config["accum"]
        self.optimizer.zero_grad(set_to_none=True)
        means, files = {}, []
        for _ in range(accum):
            images, targets, batch_files = next(batches)
            with torch.autocast(run.device.type, run.amp, enabled=run.amp is not None):
                losses = self.wrapped(images, targets)
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
                "skipped": self.skipped, "images_per_s": round(images / (now - self.logged_at), 2)}
        if self.run.device.type == "cuda":
            line["memory_mb"] = torch.cuda.max_memory_allocated(self.run.device) >> 20
        self.run.log(line)
        self.logged_at, self.logged_step = now, self.step


def train(run: Run, stage: Stage, model: hmpl.HMPL, samples: Samples) -> hmpl.HMPL:
    """Trains a stage's model, from its checkpoint if there is one, then scores it."""
    training, config, steps = Training(run, stage, model), run.config, stage.steps
    width, height = config["size"]
    sizes = [(round(width * s), round(height * s)) for s in np.linspace(*config["scales"], 6)]
    keys = batch_keys(samples.groups(), config["batch"], training.step, steps, config["seed"],
                      sizes, config["accum"], run.rank, run.world)
    batches = iter(torch.utils.data.DataLoader(
        samples, batch_sampler=keys, num_workers=run.workers, collate_fn=collate,
        pin_memory=run.device.type == "cuda", worker_init_fn=evaluate.delay_signals,
        generator=torch.Generator()))        # else it draws a seed from the global generator
    if run.rank == 0:
        trim_log(run.out / "log.jsonl", stage.name, training.step)
    bar = tqdm(range(training.step, steps), initial=training.step, total=steps, desc=stage.name,
               unit="step", mininterval=0.5, disable=run.rank > 0, dynamic_ncols=True)
    received = []                                    # signals, which `advance` shares with all
    with handle_signals(lambda number, frame: received.append(number)):
        for _ in bar:
            losses = training.advance(batches, max(received, default=0))
            bar.set_postfix(loss=f"{sum(losses.values()):.2f}")
            last = training.step == steps
            if training.step % LOG_STEPS == 0 or last:
                training.log(losses)
            if training.stop or training.due or last:
                training.save()
            if training.stop:
                del batches                          # ends its workers
                run.wait()                           # until the first process has saved
                end_process(training.stop)
    del batches
    if received:                                     # after the last `advance` had begun
        end_process(received[0])
    score(run, stage, training)
    return model


@contextlib.contextmanager
def handle_signals(handler: Callable) -> Iterator[None]:
    """SIGINT and SIGTERM call the handler during this block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


def end_process(number: int, frame=None) -> None:
    """Signal handler: ends the process at once, with the exit code that shells expect."""
    if evaluate.rank_and_world()[0] == 0:
        name = signal.Signals(number).name
        message = f"\ntrain.py: interrupted by {name}; the same command resumes the run.\n"
        os.write(sys.stderr.fileno(), message.encode())
    os._exit(128 + number)


def score(run: Run, stage: Stage, training: Training) -> None:
    """Scores a trained stage on the validation images, draws three of them and saves the scores."""
    model = training.model.eval().requires_grad_(False)      # like a model that evaluate.py loads
    if run.world > 1:
        for buffer in model.buffers():               # each rank's BatchNorm saw other images
            dist.broadcast(buffer, 0)
    num_labels = sum(run.val.labelled[task].astype(int) for task in stage.tasks)
    most = np.flatnonzero(num_labels == num_labels.max())    # images with the most labelled tasks
    chosen = most[[0, len(most) // 2, -1]]

    def draw_chosen(i: int, image: Tensor, target: dict, prediction: dict) -> None:
        if i in chosen:
            sheet = evaluate.draw(image, prediction, target, stage.name, classes=run.val.classes)
            path = run.out / "pictures" / f"{run.val.stems[i]}_{stage.name.replace(' ', '_')}.png"
            evaluate.write_picture(path, sheet)

    scores = {"images": 0}
    if num_labels.any():
        scores = evaluate.evaluate(model, run.val, amp=run.amp, workers=run.workers,
                                   batch=evaluate.BATCH[run.device.type], on_result=draw_chosen)
    run.log({"stage": stage.name, "step": training.step, "val": scores})
    training.save(scores)
    run.say(evaluate.table(scores, stage.name))


def trim_log(path: Path, stage: str, step: int) -> None:
    """Removes from the log a stage's scores and lines after a step, and an incomplete last line."""
    kept = []
    path.touch()
    for text in path.read_text().split("\n")[:-1]:           # the last is empty or incomplete
        line = json.loads(text)
        if line["stage"] != stage or (line["step"] <= step and "val" not in line):
            kept.append(text + "\n")
    with evaluate.atomic_write(path) as file:
        file.write("".join(kept).encode())


# --------------------------------------------------------------------------------- pseudo labels

def run_pseudo(run: Run, teachers: Sequence[Stage]) -> None:
    """Writes pseudo labels for the tasks that images lack. Fixed batches are distributed over the
    processes. For each batch it writes the masks, then one JSON with the boxes and a part of the
    report; a batch whose JSON exists is skipped. At the end the JSONs become the label file and
    report.json."""
    folder, report = run.out / "pseudo", run.out / "pseudo" / "report.json"
    if report.exists():
        return
    indices = np.unique(np.concatenate(list(run.to_label.values())))
    size = evaluate.BATCH[run.device.type]           # fixed: rounding depends on the batch size
    batches = {}                                     # path of the JSON -> indices of images
    for n in range(0, len(indices), size):
        batches[folder / "batches" / f"{indices[n]}.json"] = indices[n:n + size].tolist()
    todo = [path for path in list(batches)[run.rank::run.world] if not path.exists()]
    writer = evaluate.LabelWriter(folder, run.train.split, run.train.classes)
    predicted = teacher_predictions(run, teachers, [batches[path] for path in todo])
    for path, items in zip(todo, predicted):
        evaluate.write_json(path, label_batch(run, writer, items))
    run.wait()
    if run.rank == 0:
        numbers = finish_labels(run, writer, [evaluate.read_json(path) for path in batches])
    writer.close()
    if run.rank == 0:                                # the report marks the stage as done
        evaluate.write_json(report, numbers)
        shutil.rmtree(folder / "batches")


def teacher_predictions(run: Run, teachers: Sequence[Stage], batches: Sequence) -> Iterator[list]:
    """Yields predictions for batches; each teacher predicts the images that lack its task."""
    models = {teacher.tasks[0]: hmpl.load_model(teacher.path, run.device)
              for teacher in teachers if teacher.tasks[0] in run.to_label}

    def predict(indices: list[int], images: list[Tensor]) -> list[dict]:
        predictions = [{} for _ in indices]
        for task, model in models.items():
            chosen = np.flatnonzero(np.isin(indices, run.to_label[task]))
            confidence = run.config["thresholds"][task] or 0.    # None: add_boxes selects boxes
            results = model.predict([images[n] for n in chosen], confidence)
            for n, result in zip(chosen, results):
                predictions[n] |= result
        return predictions

    return evaluate.predictions(
        predict, run.train, batches, run.device, desc="pseudo", workers=run.workers, amp=run.amp,
        tasks=list(run.to_label), strict=False)


def label_batch(run: Run, writer: evaluate.LabelWriter, items: Sequence[tuple]) -> dict:
    """Writes a batch's masks. Returns its boxes and, for each mask task, the share of pixels kept
    in each image and the confusion matrix against ground truth, both for the report."""
    boxes, kept, meters = [], {}, {}
    for i, _, target, prediction in items:
        if "boxes" in prediction:
            boxes.append([i, *(prediction[key].tolist() for key in ("boxes", "scores", "labels"))])
        masks = {key: prediction[key] for key in prediction if key not in evaluate.BOX_KEYS}
        writer.add(run.train.files[i], masks)
        for task, mask in masks.items():
            kept.setdefault(task, []).append((mask < evaluate.IGNORE).float().mean().item())
            if task in target:
                meter = meters.setdefault(task, evaluate.MeanIoU(run.train.classes[task]))
                meter.update(target[task].numpy(), mask.numpy())
    writer.wait()
    return {"boxes": boxes, "kept": kept,
            "confusion": {task: meter.confusion.tolist() for task, meter in meters.items()}}


def finish_labels(run: Run, writer: evaluate.LabelWriter, batches: list[dict]) -> dict[str, dict]:
    """Hands the writer the boxes of all batches. Returns and prints the report: for each task, how
    many labels are kept and, if the data has ground truth for these images, how good they are."""
    report = {}
    for task, indices in run.to_label.items():
        if evaluate.kind_of(task) == "boxes":
            image_boxes = list(itertools.chain(*(batch["boxes"] for batch in batches)))
            numbers = add_boxes(run, writer, image_boxes)
        else:
            shares = itertools.chain(*(batch["kept"].get(task, ()) for batch in batches))
            numbers = {"kept_pixels": math.fsum(shares) / len(indices),
                       "threshold": run.config["thresholds"][task]}
            names = run.train.classes[task]
            meter = evaluate.MeanIoU(names, evaluate.background_of(names))
            for batch in batches:
                meter.confusion += np.array(batch["confusion"].get(task, 0))
            if meter.confusion.any():
                numbers["mIoU"] = evaluate.percent(meter.compute()["mIoU"])
        report[task] = numbers
        text = ", ".join(f"{name} {n:.3g}" for name, n in numbers.items() if n is not None)
        run.say(f"  pseudo labels {task}, {len(indices)} images: {text}")
        if not numbers.get("kept_boxes", numbers.get("kept_pixels")):
            run.say(f"NOTE: no {task} pseudo label is left: the teacher is weak. To keep more, "
                    f"delete {run.out / 'pseudo'} and add --threshold {task}=0.05.")
    return report


def add_boxes(run: Run, writer: evaluate.LabelWriter, images: list[list]) -> dict:
    """Hands the writer the boxes that reach the score threshold; returns numbers for the report.
    images: [index, boxes, scores, labels] each. By default the threshold is lowered until the mean
    number of boxes is that of the images with ground truth (after LabelMatch, CVPR 2022), since
    missing boxes would be learned as background."""
    data, score_threshold = run.train, run.config["thresholds"]["detection"]
    labelled = np.isin(data.stems, run.split["detection"])
    true_boxes = float(np.diff(data.offsets)[labelled].mean())
    scores = itertools.chain(*(image_scores for _, _, image_scores, _ in images))
    scores = sorted(scores, reverse=True)
    if score_threshold is None:
        score_threshold = PSEUDO_SCORE
        wanted = min(round(true_boxes * len(images)), len(scores))
        if wanted:
            score_threshold = min(score_threshold, scores[wanted - 1])
    meter, kept = evaluate.meter_of("detection", data.classes["detection"]), 0
    for i, *values in images:
        prediction = dict(zip(("boxes", "scores", "labels"), map(torch.tensor, values)))
        target = data.target(i, ["detection"])
        if target:                                   # for the report alone
            meter.update(target, prediction, i)
        keep = prediction["scores"] >= score_threshold
        kept += int(keep.sum())
        writer.add(data.files[i], {key: value[keep] for key, value in prediction.items()})
    numbers = {"boxes_per_image": kept / len(images), "kept_boxes": kept / max(1, len(scores)),
               "true_boxes_per_image": true_boxes, "threshold": score_threshold}
    if meter.images:
        numbers["AP50"] = evaluate.percent(meter.compute()["AP50"])
    return numbers


def pseudo_labels(run: Run) -> BDD100K:
    """Opens this or another run's pseudo labels; raises InputError if a task has none of them."""
    folder = Path(run.config["labels_of"] or run.out) / "pseudo"
    pseudo = BDD100K(run.train.root, run.train.split, folder, run.train.classes)
    for task, indices in run.to_label.items():
        require(pseudo.labelled[task][indices].any(), f"{folder} has no {task} labels for the "
                f"{len(indices)} images that need them: delete it and run stage pseudo again.")
    return pseudo


# ------------------------------------------------------------------------------ the command line

def image_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 32:
        return int(width), int(height)
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected WIDTHxHEIGHT, at least 32x32.")


def thresholds(text: str) -> dict[str, float]:
    with contextlib.suppress(ValueError):
        pairs = [pair.split("=") for pair in text.split(",")]
        numbers = {task: float(number) for task, number in pairs}
        if all(0 <= number <= 1 for number in numbers.values()):
            return numbers
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected TASK=NUMBER from 0 to 1.")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.splitlines()[0])
    add = p.add_argument_group("data").add_argument
    add("--data", metavar="DIR",
        help="default: $BDD100K, else data/bdd100k, else a synthetic sample; for nuImages "
        "$NUIMAGES, else data/nuimages")
    add("--dataset", choices=evaluate.DATASETS, default="bdd100k", help="default bdd100k")
    add("--setting", choices=SETTINGS, help="images whose ground truth is used: disjoint_normal "
        "(default): 20k drivable, 10k detection, 7k semantic; disjoint_balance: 7k for each task; "
        "full (nuImages' default): all")
    add("--tasks", metavar="T,T", help="learn only these; default: all tasks with labels, those of "
        "classes.json or the paper's three. BDD100K's lane is learned only if it is named here")
    add("--labels", choices=("pseudo", "own"), default="pseudo", help="pseudo (default): teachers "
        "add the missing labels; own: only ground truth, a missing label adds no loss")
    add("--labels-of", metavar="RUN", help="use the split and pseudo labels of this run folder")
    add("--threshold", type=thresholds, default={}, metavar="detection=X,semantic=X",
        help=f"minimum score of pseudo boxes (default {PSEUDO_SCORE}, less for a weak teacher) and "
        "minimum confidence of pseudo pixels (default by profile)")

    add = p.add_argument_group("method").add_argument
    add("--scheme", choices=SCHEMES, default="pretrain-adapt-finetune",
        help="the paper's (default), or pretrain-finetune: the whole schedule in finetune")
    add("--heads", choices=hmpl.HEADS, default="transformer", help="transformer (default): Sparse "
        "R-CNN and MaskFormer; conv: Faster R-CNN and Semantic FPN")
    add("--adapter", choices=ADAPTER_CHOICES, default="lv", metavar="KIND",
        help="fpn; pre, post: two convolutions per level before or after the FPN; pre_scalar, "
        "pre_vector: x + s * convolutions(x); KIND+lv: with the LV-Adapter; lv (default): fpn+lv")
    add("--prompts", choices=("learned", *TEMPLATES), default="learned",
        help="learned task contexts (default); engineered: one sentence for each class; ensemble: "
        "the mean of 63 sentences")
    add("--contexts", default="16", metavar="N|WORDS",
        help="learned tokens of a prompt (default 16), or words to initialise them from")
    add("--clip", metavar="NAME", default="ViT-B-16",
        help="CLIP's text tower: RN50, ViT-B-32, ViT-B-16 (default), a file, or none = random")
    add("--pretrained", metavar="NAME", default="supervised", help="the backbone: supervised "
        f"(default) = torchvision's, none = random, {', '.join(PRETRAINED)}, or a weight file, "
        "also of MoCo, DetCo, PixPro or this project")
    add("--pixels", choices=hmpl.PIXELS,
        help="mean and standard deviation for normalisation; default: the backbone's own")
    add("--profile", choices=hmpl.PROFILES, help="paper: ResNet-50 at 1280x720, needs a GPU; "
        "tiny: ResNet-18 for small images and laptops; default: tiny on the sample, else paper")

    add = p.add_argument_group("schedule").add_argument
    add("--stage", choices=(*STAGES, "all"), default="all", help="run up to this; default: all")
    add("--epochs", type=float, help="length of the full schedule: adapt has a third of it, "
        "finetune two thirds, each teacher a share; default by profile")
    add("--steps", type=at_least(1), help="the same in optimizer steps; default: by --epochs")
    add("--batch", type=at_least(1), help="images in a step, over all GPUs; default by profile")
    add("--lr", type=float, help="learning rate; default: the profile's times sqrt(batch / the "
        "profile's batch), AdamW's rule (arXiv 2205.10287); if losses become NaN, halve it")
    add("--size", type=image_size, metavar="WxH", help="network's image size; default by profile")
    add("--seed", type=at_least(0), default=0, help="default 0")

    add = p.add_argument_group("machine").add_argument
    add("--out", metavar="DIR", help="run folder; default: runs/SETTING, or runs/nuimages")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--accum", type=at_least(1), default=1, help="gradient accumulation steps in a batch, to "
        "save memory (default 1)")
    add("--amp", choices=("auto", "bf16", "fp16", "no"), default="auto", help="mixed precision; "
        "auto (default): bf16 where the hardware has it, else fp16 on a GPU, none on a CPU")
    add("--workers", type=at_least(0), help="DataLoader workers; default: 8 for each GPU, else 0")
    args = p.parse_args(argv)
    bdd = args.dataset == "bdd100k"
    args.setting = args.setting or ("disjoint_normal" if bdd else "full")
    args.out = args.out or f"runs/{args.setting if bdd else args.dataset}"
    args.stage = STAGES[-1] if args.stage == "all" else args.stage
    args.tasks = list(dict.fromkeys(args.tasks.split(","))) if args.tasks else []
    for value in (args.epochs, args.lr):
        if value is not None and not 0 < value < math.inf:
            p.error(f"--epochs or --lr {value} was given, expected a number between 0 and inf.")
    if not bdd and args.setting != "full":
        p.error(f"--setting {args.setting} splits images between tasks, but every image of "
                f"{args.dataset} has labels for all tasks: use --setting full.")
    return args


def start(args: argparse.Namespace) -> Run:
    """Opens data and weights and builds the run; an existing run must have the same options."""
    device, out = evaluate.this_device(), Path(args.out)     # joins torchrun's processes
    rank, world = evaluate.rank_and_world()
    if rank == 0 and not args.dry_run:
        lock_folder(out)
    if rank > 0:
        dist.barrier()                       # until the first has drawn the sample and downloaded
    root = data_folder(args.data, args.dataset, out)
    sample = root.resolve() == evaluate.SAMPLE
    reader = evaluate.DATASETS[args.dataset]
    train, val = (reader(root, split, tasks=args.tasks) for split in ("train", "val"))
    profile = args.profile or ("tiny" if sample else "paper")
    pretrained = usable_weights(args.pretrained, find_backbone, profile, sample)
    clip = usable_weights(args.clip, load_text, profile, sample)
    if rank == 0 and world > 1:
        dist.barrier()                       # lets the others begin
    pixels = "imagenet"
    if pretrained != "none":
        backbone = hmpl.ResNetBackbone(hmpl.PROFILES[profile]["depth"])
        pixels = hmpl.load_backbone(backbone, find_backbone(pretrained, profile))[1]
    require(set(args.tasks) <= set(train.classes), f"--tasks {','.join(args.tasks)} was given, but "
            f"{root} has {', '.join(train.classes)}: name some of these.")
    tasks, label_notes, errors = evaluate.usable_tasks(train, val, args.tasks)
    if errors:
        raise InputError(errors[0])
    config = make_config(args, profile, world, {
        "data": str(root.resolve()), "pretrained": pretrained, "clip": clip,
        "pixels": args.pixels or pixels, "tasks": tasks,
        "size": list(args.size or network_size(train, profile)), "images": fingerprint(train),
        "origin": origin()})
    split = find_split(args, out, config, train, val)
    amp = evaluate.amp_type(args.amp, device)
    workers = evaluate.WORKERS[device.type] if args.workers is None else args.workers
    return Run(out, config, device, amp, workers, train, val, split, label_notes, rank, world)


def lock_folder(out: Path) -> None:
    """Locks the run folder until this process ends, however it ends: the file is never closed."""
    out.mkdir(parents=True, exist_ok=True)
    file = os.open(out / "lock", os.O_RDWR | os.O_CREAT)
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{out} is in use by {os.read(file, 1000).decode()}: wait for it, end it, "
                         "or give another --out.") from None
    except OSError:
        pass                                         # a file system without locks
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())


def data_folder(given: str | None, dataset: str = "bdd100k", out: Path | None = None) -> Path:
    """Returns the data folder: the given one, else that of the run begun in `out`, else what
    `evaluate.find_data` finds; draws the sample at its first use."""
    begun = None
    if given is None and out and (out / "config.json").exists() and any(out.rglob("*.pt")):
        begun = evaluate.read_json(out / "config.json")["data"]
        given = begun if Path(begun).is_dir() else None
    root = evaluate.find_data(given, dataset)
    if root.resolve() == evaluate.SAMPLE and not root.is_dir():
        require(begun in (None, str(evaluate.SAMPLE)),
                f"{out} was begun with {begun}, which is gone: give its new place with --data.")
        script = root.parent / "draw_roads.py"
        ended = subprocess.run([sys.executable, script], check=False)
        require(ended.returncode == 0, f"{script} could not draw the sample: give --data.")
    return root


def usable_weights(name: str, find: Callable, profile: str, sample: bool) -> str:
    """Returns "none", a file's absolute path, or the name of weights that are in the cache now. If
    they cannot be downloaded, that is an error on real data; on the sample "none" replaces them."""
    given = Path(name).is_file()
    require(not given or Path(name).suffix != ".safetensors", f"safetensors such as {name} "
            f"are not read: torch.save(safetensors.torch.load_file({name!r}), 'x.pth') converts.")
    try:
        if name != "none":
            find(name, profile)                      # a bad file ends the run here
    except OSError as error:
        if given or not sample:
            raise InputError(f"{error}: put the file there, name another, or 'none'.") from error
        return "none"
    return str(Path(name).resolve()) if given else name


def network_size(train: LabelledImages, profile: str) -> tuple[int, int]:
    """Returns the default width and height of the network's images."""
    height, width = train.image(0).shape[1:]
    if profile == "tiny":
        scale = min(1, TINY_WIDTH / width)
        return max(1, round(width * scale)), max(1, round(height * scale))
    official = train.classes in (type(train).classes, evaluate.BDD_CLASSES)
    return train.size if official else (width, height)       # own images may have any size


def fingerprint(data: LabelledImages) -> str:
    """Returns a digest of classes, images, boxes and which labels there are; masks are not read."""
    digest = hashlib.sha256(repr(data.classes).encode())
    for array in (data.files, *data.labelled.values(), data.boxes, data.box_labels, data.crowd,
                  data.offsets):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def origin() -> dict:
    """Describes this start: its command, versions and, in a git checkout, commit."""
    folder, commit = Path(__file__).resolve().parent, None
    if (folder / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"command": shlex.join(sys.argv), "commit": commit, "python": sys.version.split()[0],
            **{lib.__name__: str(lib.__version__) for lib in (torch, torchvision, np)}}


def make_config(args: argparse.Namespace, profile: str, world: int, found: dict) -> dict:
    """Returns all that a result depends on: options, the profile's defaults, and `found`, which
    `start` found: data and weights."""
    defaults, parts = TRAINING[profile], args.accum * world
    batch, tasks = args.batch or defaults["batch"], found["tasks"]
    require(batch % parts == 0, f"a batch of {batch} images cannot be shared by {parts} parts "
            f"(processes x --accum): give a --batch that {parts} divides.")
    require(set(args.threshold) <= set(tasks), f"--threshold {', '.join(args.threshold)} was "
            f"given, but the tasks are {', '.join(tasks)}: name only these.")
    thresholds = {task: None if evaluate.kind_of(task) == "boxes" else defaults["confidence"]
                  for task in tasks}
    lr = args.lr or defaults["lr"] * math.sqrt(batch / defaults["batch"])
    factors = dict(defaults["lr_factors"])
    if args.heads == "conv":
        factors.pop("heads.detection", None)         # Sparse R-CNN's
    as_given = ("dataset", "setting", "scheme", "labels", "heads", "prompts", "steps", "accum",
                "amp", "seed")
    return {
        **{key: getattr(args, key) for key in as_given},
        **{key: defaults[key] for key in ("weight_decay", "warmup", "scales")},
        "profile": profile, "adapter": sorted(args.adapter.split("+")),
        "contexts": int(args.contexts) if args.contexts.isdecimal() else args.contexts,
        "labels_of": args.labels_of and str(Path(args.labels_of).resolve()),
        "epochs": args.epochs or defaults["epochs"], "batch": batch, "lr": lr,
        "lr_factors": factors, "thresholds": thresholds | args.threshold, **found}


def find_split(args: argparse.Namespace, out: Path, config: dict, train: LabelledImages,
               val: LabelledImages) -> Split:
    """Returns the split of the run begun in `out`, else of --labels-of's run, else a new one."""
    if any(out.rglob("*.pt")) and (out / "config.json").exists():
        keys = config.keys() - MAY_CHANGE
        joint_begun = any(out.glob("*.pt"))          # teachers lie in a folder of their own
        if not joint_begun and not (out / "pseudo").exists():
            keys -= {"thresholds"}                   # they may change until stage pseudo has begun
        same_options(out, config, keys, "use them again, or another --out")
        return evaluate.read_json(out / "split.json")
    if not args.labels_of:
        return make_split(train, val.stems, args.setting, args.seed, config["tasks"])
    other = Path(args.labels_of)
    require((other / "pseudo" / "report.json").exists(), f"--labels-of {other} has no finished "
            "pseudo labels: run its stage pseudo first.")
    same_options(other, config, ("dataset", "setting", "tasks", "images"),
                 "name a run of the same data and setting with --labels-of")
    return evaluate.read_json(other / "split.json")


def same_options(folder: Path, config: dict, keys: Iterable[str], advice: str) -> None:
    """Raises InputError unless the run in `folder` was begun with these values of `config`."""
    before = evaluate.read_json(folder / "config.json")
    now = json.loads(json.dumps(config))                                 # tuples as lists
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in keys
               if before.get(key) != now[key]]
    require(not changed, f"{folder} was begun with other options ({'; '.join(changed)}): {advice}.")


def plan(run: Run, stages: dict[str, list[Stage]]) -> str:
    """Describes the run stage by stage, and which stages are done."""
    config = run.config
    shown = ("dataset", "setting", "scheme", "heads", "profile", "size", "batch", "lr")
    options = ", ".join(f"{key} {config[key]}" for key in shown)
    truth = ", ".join(f"{task} {len(stems)}" for task, stems in run.split.items())
    lines = [
        *(f"NOTE: {note}" for note in run.notes + run.label_notes),
        f"plan: {options}, {run.device.type}, {run.amp or torch.float32}, run folder {run.out}",
        f"  images with ground truth: {truth}; {len(run.stems)} in all; validation {len(run.val)}"]
    if "lv" in config["adapter"]:
        name = config["prompts"]
        # Builds the prompts already here, so that too long ones fail at once.
        example = text_source(run).texts[0] if name == "learned" else TEMPLATES[name][0]
        lines.append(f"  {name} prompts, such as {example!r}")
    for name in stages:
        if name == "pseudo":
            done = (run.out / "pseudo" / "report.json").exists()
            lines.append(f"  {name:<20} the missing labels  {'done' if done else 'to do'}")
        for stage in stages[name]:
            begins = " and ".join(before.name for before in stage.init_from) or "the backbone"
            lines.append(f"  {stage.name:<20} {stage.steps:>6} steps, begins with {begins}  "
                         f"{state(run, stage)}")
    return "\n".join(lines)


def run_stage(run: Run, stage: Stage) -> None:
    """Trains a teacher on ground truth, or all tasks together on ground truth and pseudo labels."""
    if state(run, stage) != "done":
        pseudo = pseudo_labels(run) if stage.joint and run.to_label else None
        samples = Samples(run.train, run.split, stage.tasks, pseudo)
        train(run, stage, new_model(run, stage), samples)


def run_stages(args: argparse.Namespace) -> None:
    """Runs the stages up to --stage that are not done."""
    run = start(args)
    stages = stages_of(run, args.stage)
    run.say(plan(run, stages))
    if args.dry_run:
        return
    run.wait()                                       # until all processes have read the folder
    if run.rank == 0:
        evaluate.write_json(run.out / "split.json", run.split)
        evaluate.write_json(run.out / "config.json", run.config)
        if any(state(run, teacher) == "to do" for teacher in stages.get("teachers", ())):
            # A teacher will be trained anew: deletes the pseudo labels of the one before.
            shutil.rmtree(run.out / "pseudo", ignore_errors=True)
    for name in stages:
        if name == "pseudo":
            run_pseudo(run, stages["teachers"])
        for stage in stages[name]:
            run_stage(run, stage)
        run.wait()


def main(argv: Sequence[str] | None = None) -> None:
    evaluate.escape_unprintable()
    args, failure = parse_args(argv), None
    with handle_signals(end_process):
        try:
            run_stages(args)
        except (InputError, hmpl.WeightsError, prompts.TextError, OSError) as error:
            # No exit inside `except`: the traceback would keep the DataLoader's workers alive.
            failure = f"train.py: {evaluate.sentence(error)}"
        if failure:
            sys.exit(failure)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
