"""HMPL: one network for object detection and any number of segmentation tasks in traffic scenes.

The model of "Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving"
(NeurIPS 2022), in plain PyTorch and one file:

    image -> ResNetBackbone C2..C5 -> Adapter P2..P5 -> LVAdapter adds language to P5 -> heads

    ResNetBackbone  torchvision's ResNet; `load_backbone` fills it with pretrained weights
    Adapter         FPN, alone or with convolutions before or after it
    LVAdapter       Language-to-Vision adapter, P5 := TransDecoder(q=P5, k=v=Linear(text))
    SparseRCNN      detection head (Sun et al. 2021, arXiv 2011.12450)
    MaskFormer      head of every mask task (Cheng et al. 2021, arXiv 2107.06278)
    FasterRCNN, SemanticFPN     the convolutional heads of appendix D.2
    HMPL            the whole network: computes losses for training, predicts all tasks
    load_model      builds a trained HMPL from a checkpoint of train.py, ready to predict

Images are RGB uint8 [3, H, W]; boxes are absolute xyxy pixels, x2 and y2 exclusive; 255 in a mask
is ignored. If a target lacks a task's key, the image is not labelled for that task. In shapes:
B images, Q queries or N proposals, M targets, K classes, C channels, and S stages: the cascade
stages of Sparse R-CNN or the decoder layers of MaskFormer, each with a prediction of its own.

Example (`load_model("adapt.pt").predict(images)` predicts with a trained model):

>>> classes = {"detection": ("car", "bus"), "semantic": ("road", "sky", "car")}
>>> model = HMPL(classes, **PROFILES["tiny"], text=torch.randn(5, 32))    # text: [K, D] or a module
>>> images = list(torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8))
>>> boxes = {"boxes": torch.tensor([[8., 8., 40., 30.]]), "labels": torch.tensor([1])}
>>> masks = {"semantic": torch.randint(0, 3, (96, 160), dtype=torch.uint8)}
>>> sum(model(images, [boxes, masks]).values()).backward()    # {"detection_class": ..., ...}
>>> prediction = model.eval().predict(images)[0]              # boxes, scores, labels, semantic
>>> prediction["boxes"].shape, prediction["semantic"].shape   # [N, 4], [H, W]
(torch.Size([50, 4]), torch.Size([96, 160]))
"""
import contextlib
import math
import pickle
import re
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torchvision.models.detection import anchor_utils, faster_rcnn, image_list, roi_heads, rpn
from torchvision.ops import FeaturePyramidNetwork, box_convert, sigmoid_focal_loss

STRIDES = (4, 8, 16, 32)                       # of C2..C5 and P2..P5
IGNORE = 255                                   # value of unlabelled pixels in masks
LOSS_STRIDE = 2                                # of MaskFormer's masks: at 4 thin objects blur
NO_OBJECT_WEIGHT = 0.1                         # in the class loss of queries without an object
ATTENTION_HEADS = 8
MAX_LOG_SCALE = math.log(100000 / 16)          # of a box delta, as in Sparse R-CNN
HEADS = ("transformer", "conv")
ADAPTERS = ("fpn", "pre", "post", "pre_scalar", "pre_vector")
PIXELS = {  # mean and standard deviation of RGB 0..255 that pretrained weights expect
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "swav": ((123.675, 116.28, 103.53), (58.14, 57.12, 57.375)),          # SwAV's own release
    "unit": ((0., 0., 0.), (255., 255., 255.)),                           # SimCLR's: 0..1
}
PROFILES = {  # keyword arguments of HMPL, each head's own nested in them
    "paper": {
        "depth": 50, "width": 256, "feedforward": 2048, "dropout": 0.1, "size": (1280, 720),
        "sparse_rcnn": {"proposals": 100, "stages": 6, "dynamic_dim": 64, "pool": 7},
        "maskformer": {"queries": 100, "layers": 6, "memory_level": 5},
        "faster_rcnn": {"box_dim": 1024, "anchor_scale": 8}, "semantic_fpn": {"conv_dim": 128},
    },
    "tiny": {
        "depth": 18, "width": 128, "feedforward": 512, "dropout": 0., "size": None,
        "sparse_rcnn": {"proposals": 50, "stages": 2, "dynamic_dim": 32, "pool": 4,
                        "dense_proposals": True},
        "maskformer": {"queries": 25, "layers": 3, "memory_level": 4, "dense_weight": 4.},
        "faster_rcnn": {"box_dim": 256, "anchor_scale": 2}, "semantic_fpn": {"conv_dim": 64},
    },
}
CHECKPOINT_KEYS = ("model_config", "model", "config", "stage", "step", "steps", "notes", "scores")
NO_BOXES = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}     # a target
Indices = Tensor | slice                       # the images of a batch that are labelled for a task


class WeightsError(ValueError):
    """Says why weights or a checkpoint cannot be used, and what to do."""


class Features(NamedTuple):
    """The input of the heads, for a batch of B images."""
    levels: list[Tensor]                       # P2..P5 [B, C, h, w]
    sizes: Tensor                              # [B, 2] float: heights and widths without padding
    padded: bool                               # whether any image is padded


def kind_of(task: str) -> str:
    """Returns the kind of a task's labels and predictions: "boxes" or "mask"."""
    return "boxes" if task == "detection" else "mask"


# --------------------------------------------------------------------------- boxes and their RoIs

def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Moves and scales xyxy boxes [..., 4] by deltas [..., 4], with Sparse R-CNN's box weights
    (2, 2, 1, 1): moves are halved."""
    low, high = boxes.chunk(2, dim=-1)
    move, scale = deltas.chunk(2, dim=-1)
    size = high - low
    centre = torch.addcmul(low, size, 0.5 + move / 2)
    half = size * scale.clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def area(low: Tensor, high: Tensor) -> Tensor:
    """Returns the areas [...] between corners low and high [..., 2], 0 if high lies below low."""
    w, h = (high - low).clamp(min=0).unbind(-1)       # `prod` would wait for the device in backward
    return w * h


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Computes the GIoU (arXiv 1902.09630) of paired boxes a and b [..., 4], which broadcast. The
    result [...] is finite even for boxes without area."""
    larger, smaller = torch.maximum(a, b), torch.minimum(a, b)                # of each coordinate
    inter = area(larger[..., :2], smaller[..., 2:])           # from the larger low corner to the
    hull = area(smaller[..., :2], larger[..., 2:])            # smaller high one; the hull: reversed
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - inter
    return inter / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


class Pyramid:
    """Joins P2..P5 [B, C, h, w] into a table [cells of all levels and images, C], so that RoIAlign
    is one weighted gather. torchvision pools level by level and waits for the device in between;
    this computes the same (up to rounding) about thirty times as fast on a CPU.

    pool: bins of a RoI along each axis. Nothing is copied from the CPU: CUDA graphs forbid it."""

    def __init__(self, levels: Sequence[Tensor], pool: int = 7):
        self.pool, device = pool, levels[0].device
        self.table = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in levels])
        layout, start = [], 0
        for x, stride in zip(levels, STRIDES):
            h, w = x.shape[-2:]
            layout += [torch.full((), n, device=device) for n in (w - 1, h - 1, stride, start)]
            start += h * w
        self.layout = torch.stack(layout).view(4, 4)          # level by w - 1, h - 1, stride, start
        self.layout[:, 3] *= levels[0].shape[0]               # start: the level's first table row
        self.areas = 112 ** 2 * 4 ** torch.arange(3, device=device)           # from 224² on: P4
        self.fractions = (torch.arange(2 * pool, device=device) + 0.5) / (2 * pool)  # of samples
        self.images = torch.arange(levels[0].shape[0], device=device)[:, None, None]  # [B, 1, 1]

    def roi_align(self, boxes: Tensor) -> Tensor:
        """Pools boxes [B, N, 4] (pixels) by RoIAlign (Mask R-CNN, arXiv 1703.06870; 2 x 2 samples
        per bin, aligned), each from the level for its size (FPN, arXiv 1612.03144: 224 pixels ->
        P4). Returns [B, N, pool * pool, C]."""
        with torch.no_grad():
            boxes = boxes.float()
            level = torch.bucketize(area(boxes[..., :2], boxes[..., 2:]), self.areas, right=True)
            last, stride, start = self.layout[level].split((2, 1, 1), dim=-1)

            # Along x and along y each bin has 2 samples, each interpolated between 2 cells.
            low, high = (boxes / stride).unsqueeze(-1).chunk(2, dim=2)        # [B, N, 2, 1]
            samples = torch.lerp(low, high, self.fractions) - 0.5             # [B, N, 2, 2 pool]
            limit = last.unsqueeze(-1)
            inside = (samples >= -1) & (samples <= limit + 1)                 # others: zero
            samples = samples.nan_to_num().clamp(min=0).minimum(limit)
            cell = samples.floor()
            fraction = samples - cell
            cells = torch.stack([cell, (cell + 1).minimum(limit)], dim=-1).long()
            weights = torch.stack([1 - fraction, fraction], dim=-1) * (inside / 2).unsqueeze(-1)
            cells, weights = (x.unflatten(3, (self.pool, 2)).flatten(-2)      # [B, N, 2, pool, 4]
                              for x in (cells, weights))
            x_cells, y_cells = cells.unbind(2)                                # [B, N, pool, 4]
            x_weights, y_weights = weights.unbind(2)

            # Each bin sums the 4 x 4 cells that its samples touch; row_start: of a row of cells.
            w, h = (last + 1).unsqueeze(-1).unbind(2)                         # [B, N, 1]
            row_start = (start + self.images * (w * h)).unsqueeze(-1) + y_cells * w.unsqueeze(-1)
            index = row_start[:, :, :, None, :, None] + x_cells[:, :, None, :, None]
            weights = y_weights[:, :, :, None, :, None] * x_weights[:, :, None, :, None]
        bins = F.embedding_bag(index.view(-1, 16), self.table, mode="sum",
                               per_sample_weights=weights.view(-1, 16).to(self.table.dtype))
        return bins.view(*boxes.shape[:2], self.pool ** 2, bins.shape[-1])


# -------------------------------------------------------------------------- matching and losses

def average_over_ranks(count: Tensor) -> Tensor:
    """Averages counts, by which losses are divided, over all ranks; returns at least 1."""
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1)


def connected_zero(*used: Tensor) -> Tensor:
    """Returns a zero that depends on all tensors `used`: the loss of a task for which no image of
    the batch is labelled. With it every rank of a distributed run builds the same graph."""
    return sum(value.sum(dtype=torch.float32) for value in used) * 0


@torch.no_grad()
def match(cost: Tensor, present: Tensor) -> Tensor:
    """Computes the Hungarian matching of each image and prediction, with one copy from the device.
    cost [S, B, Q, M], where NaN and infinity count as very high; present [B, M]: False = padding.
    Returns int64 [S, B, M] on the CPU: each target's query, -1 for padding and, if M > Q, for the
    targets that are left over."""
    cost = cost.float().nan_to_num(1e6, 1e6, -1e6).clamp(-1e6, 1e6)
    cost = cost.masked_fill(~present[:, None, :], math.inf).cpu().numpy()     # the copy
    query_of = np.full((len(cost), *present.shape), -1)
    for image in range(cost.shape[1]):
        targets = (cost[0, image, 0] < math.inf).nonzero()[0]                 # others: padding
        for s, costs in enumerate(cost[:, image][..., targets]):              # [Q, targets]
            queries, matched = linear_sum_assignment(costs)
            query_of[s, image, targets[matched]] = queries
    return torch.from_numpy(query_of)


def pad_boxes(targets: Sequence[dict], device) -> tuple[Tensor, Tensor, Tensor]:
    """Pads the boxes of B images to the largest count M. Returns boxes [B, M, 4], labels [B, M] and
    presence [B, M], which is False for padding and for crowd regions (BDD100K's ignored boxes)."""
    boxes, labels, present = [], [], []
    for target in targets:
        boxes.append(target["boxes"].float().reshape(-1, 4))
        labels.append(target["labels"])
        present.append(~target.get("crowd", torch.zeros_like(labels[-1], dtype=torch.bool)))
    return tuple(nn.utils.rnn.pad_sequence(x, batch_first=True).to(device, non_blocking=True)
                 for x in (boxes, labels, present))


@torch.no_grad()
def box_cost(logits: Tensor, boxes: Tensor, labels: Tensor, true_boxes: Tensor, extent: Tensor):
    """Computes Sparse R-CNN's matching cost, 2 focal + 5 L1 - 2 GIoU, with L1 on boxes / extent:
    [S, B, N, M]. logits [S, B, N, K], boxes [S, B, N, 4], labels [B, M], true_boxes [B, M, 4],
    extent [B, 1, 4]: w, h, w, h of the images."""
    p = logits.sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -F.logsigmoid(logits)
    negative = 0.75 * p ** 2 * -F.logsigmoid(-logits)
    focal = positive - negative                                               # [S, B, N, K]
    focal = focal.take_along_dim(labels[None, :, None, :], dim=3)             # [S, B, N, M]
    l1 = torch.cdist(boxes / extent, (true_boxes / extent).expand(len(boxes), -1, -1, -1), p=1)
    return 2 * focal + 5 * l1 - 2 * paired_giou(boxes.unsqueeze(3), true_boxes[None, :, None])


def box_losses(outputs: dict, targets: Sequence[dict], indices: Indices, sizes: Tensor) -> dict:
    """Computes Sparse R-CNN's losses, summed over all S predictions, each with its own matching
    (class, L1, GIoU weigh 2, 5, 2). outputs: `SparseRCNN`'s for all images. targets: those of the
    labelled images, which are `indices` of the batch. sizes [B, 2]: heights and widths."""
    logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"]
    true_boxes, labels, present = pad_boxes(targets or [NO_BOXES], boxes.device)
    count = average_over_ranks(present.sum().float())        # a rank without targets takes part
    if not targets:
        return dict.fromkeys(("class", "l1", "giou"), connected_zero(logits, boxes))

    logits, boxes = logits[:, indices], boxes[:, indices]
    extent = sizes[indices].flip(1).repeat(1, 2)[:, None]           # [B, 1, 4]: w, h, w, h
    query_of = match(box_cost(logits, boxes, labels, true_boxes, extent), present)
    query_of = query_of.to(boxes.device, non_blocking=True)                   # [S, B, M]
    matched, query_of = (query_of >= 0).float(), query_of.clamp(min=0)
    one_hot = torch.zeros_like(logits).flatten(2)                             # [S, B, N * K]
    index = query_of * logits.shape[-1] + labels                              # [S, B, M]
    one_hot.scatter_add_(2, index, matched)                                   # unmatched: adds 0
    focal = sigmoid_focal_loss(logits.flatten(2), one_hot, reduction="sum")
    boxes = boxes.take_along_dim(query_of.unsqueeze(-1), dim=2)               # [S, B, M, 4]
    l1 = F.l1_loss(boxes / extent, (true_boxes / extent).expand_as(boxes), reduction="none")
    giou = 1 - paired_giou(boxes, true_boxes)
    return {"class": 2 * focal / count, "l1": 5 * (l1.sum(-1) * matched).sum() / count,
            "giou": 2 * (giou * matched).sum() / count}


def stretch_labels(labels: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
    """Stretches B uint8 label maps of any sizes over their images, without resampling them. sizes
    [B, 2]: the images' heights and widths. Returns the maps, padded with IGNORE, [B, H, W], and in
    image pixels y [B, H] and x [B, W] of their pixels' centres and a pixel's size [B, 2]."""
    shapes = torch.tensor([label.shape for label in labels], dtype=torch.float32).view(-1, 2)
    height, width = (max((label.shape[i] for label in labels), default=0) for i in (0, 1))
    maps = torch.full((len(labels), height, width), IGNORE, dtype=torch.uint8, device=sizes.device)
    for padded, label in zip(maps, labels):
        padded[:label.shape[0], :label.shape[1]] = label.to(sizes.device, non_blocking=True)
    scale = sizes / shapes.to(sizes.device, non_blocking=True)
    y, x = ((torch.arange(n, device=sizes.device) + 0.5) * scale[:, i:i + 1]
            for i, n in enumerate((height, width)))
    return maps, y, x, scale


def mask_targets(stretched: tuple[Tensor, ...], num_classes: int, size: tuple) -> tuple:
    """Makes soft targets for cells of LOSS_STRIDE and of stride 4. Counts each label pixel in the
    cell that holds its centre, so that thin lines are not lost where labels are larger than images.
    stretched: `stretch_labels`' result, with ids below num_classes, or 255. size: h, w in cells of
    stride 4. Returns for either stride each class's share of a cell's labelled pixels [B, K, h, w],
    and the labelled share of each cell [B, h, w], the cell's weight."""
    maps, y, x, scale = stretched
    maps = maps.clamp(max=num_classes).long()                                 # 255: an extra class
    height, width = (n * STRIDES[0] // LOSS_STRIDE for n in size)
    row = (y / LOSS_STRIDE).long().clamp(max=height - 1)                      # padding is ignored
    column = (x / LOSS_STRIDE).long().clamp(max=width - 1)
    index = ((maps * height + row[:, :, None]) * width + column[:, None]).flatten(1)
    fine = torch.zeros(len(maps), (num_classes + 1) * height * width, device=maps.device)
    area = scale.prod(1, keepdim=True) / LOSS_STRIDE ** 2                     # in cells
    fine.scatter_add_(1, index, area.expand_as(index))
    fine = fine.view(-1, num_classes + 1, height, width)[:, :num_classes]
    targets = []
    for shares in (fine, F.avg_pool2d(fine, STRIDES[0] // LOSS_STRIDE)):
        valid = shares.sum(1)
        targets.append((shares / valid.clamp(min=1e-6).unsqueeze(1), valid))
    return tuple(targets)


def draw_pixels(stretched: tuple[Tensor, ...], size: tuple) -> tuple[Tensor, Tensor]:
    """Draws a random point in each cell of LOSS_STRIDE and takes the label pixel there. Arguments
    as in `mask_targets`. Returns the pixels' ids [B, 2 h, 2 w], IGNORE outside of a label, and
    their centres [B, 2 h, 2 w, 2] as F.grid_sample expects them: x, y from -1 to 1."""
    maps, _, _, scale = stretched
    maps = F.pad(maps, (0, 1, 0, 1), value=IGNORE)
    height, width = (n * STRIDES[0] // LOSS_STRIDE for n in size)
    images, rows, columns = (torch.arange(n, device=maps.device)
                             for n in (len(maps), height, width))
    pixel_height, pixel_width = (scale / LOSS_STRIDE).view(-1, 2, 1, 1).unbind(1)    # in cells
    offset_y, offset_x = torch.rand(2, len(maps), height, width, device=maps.device)
    y = ((rows[:, None] + offset_y) / pixel_height).long().clamp(max=maps.shape[1] - 1)
    x = ((columns + offset_x) / pixel_width).long().clamp(max=maps.shape[2] - 1)
    centres = torch.stack([(x + 0.5) * pixel_width / width, (y + 0.5) * pixel_height / height], -1)
    return maps[images[:, None, None], y, x], centres * 2 - 1


def mask_dtype(features: Tensor) -> torch.dtype:
    """Returns the dtype for whole masks: float16 on a GPU under autocast, else float32. bfloat16
    would change matches and make classes tie."""
    mixed = features.is_cuda and features.dtype != torch.float32
    return torch.float16 if mixed else torch.float32


@torch.no_grad()
def mask_cost(logits: Tensor, embed: Tensor, features: Tensor, target: Tensor, valid: Tensor):
    """Computes MaskFormer's matching cost, 1 class + 20 focal + 1 dice [S, B, Q, K], all layers in
    one product over the P = h * w cells. logits [S, B, Q, K + 1], embed [S, B, Q, C], features
    [B, C, h, w], target [B, K, h, w], valid [B, h, w]."""
    dtype = mask_dtype(features)
    queries = embed.transpose(0, 1).flatten(1, 2).to(dtype)                   # [B, S * Q, C]
    valid = valid.flatten(1).unsqueeze(2)                                     # [B, P, 1]
    pixels = target.flatten(2).transpose(1, 2) * valid                        # [B, P, K]
    pixels = torch.cat([pixels, valid], dim=2)                                # last: valid itself
    scaled = (pixels / 256).to(dtype)                   # sums stay below float16's limit, 65,504

    def total(values: Tensor) -> Tensor:                                      # [B, S * Q, K + 1]
        return (values @ scaled).float() * 256

    x = queries @ features.flatten(2).to(dtype)                               # [B, S * Q, P]
    minus_log_q = F.softplus(x)                                               # q = 1 - p
    minus_log_p = minus_log_q - x
    p = x.sigmoid_()                                                          # in place: large
    inter = total(p)
    negative = total(minus_log_q.mul_(p).mul_(p))                             # -p² log q
    p.sub_(1)                                                                 # now p - 1
    positive = total(minus_log_p.mul_(p).mul_(p))                             # -(p - 1)² log p
    sizes = pixels.sum(1, keepdim=True)
    negative = negative[..., -1:] - negative[..., :-1]        # over all valid cells but the class's
    focal = 0.75 * negative + 0.25 * positive[..., :-1]
    dice = 1 - (2 * inter[..., :-1] + 1) / (inter[..., -1:] + sizes[..., :-1] + 1)
    cost = 20 * focal / sizes[..., -1:].clamp(min=1) + dice
    return cost.unflatten(1, (len(embed), -1)).transpose(0, 1) - logits.softmax(-1)[..., :-1]


def focal_and_dice(masks: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Computes focal and dice loss of each mask over its image's valid cells, in masks' dtype, with
    float32 sums. masks [B, S, M, h, w] (logits), target [B, M, h, w], valid [B, h, w] -> two
    [B, S, M]."""
    target, valid = target[:, None].to(masks.dtype), valid[:, None, None].to(masks.dtype)
    labelled, p = target * valid, masks.sigmoid()

    def total(x: Tensor) -> Tensor:
        return x.sum((-2, -1), dtype=torch.float32)

    wrong = torch.addcmul(target, p, 1 - 2 * target)         # t + p (1 - 2 t): 1 - p_t of RetinaNet
    entropy = torch.addcmul(F.softplus(masks), masks, target, value=-1)       # -log p_t
    focal = total(entropy * wrong * wrong * ((0.75 - 0.5 * target) * valid))
    dice = 1 - (2 * total(p * labelled) + 1) / (total(p * valid) + total(labelled) + 1)
    return focal / total(valid).clamp(min=1), dice


def class_loss(logits: Tensor, query_of: Tensor, classes: Tensor) -> Tensor:
    """Sums the cross-entropy of all queries; unmatched ones weigh NO_OBJECT_WEIGHT. logits
    [S, B, Q, K + 1], query_of [S, B, M]: the query matched to each of classes [B, M], or -1."""
    layers, batch, num_queries, num_outputs = logits.shape
    labels = torch.full((layers, batch, num_queries + 1), num_outputs - 1, device=logits.device)
    index = query_of.where(query_of >= 0, num_queries)       # an extra query takes the unmatched
    labels.scatter_(2, index, classes.expand_as(query_of))
    labels = labels[:, :, :num_queries].flatten()
    weight = torch.ones(num_outputs, device=logits.device)
    weight[-1] = NO_OBJECT_WEIGHT
    return F.cross_entropy(logits.flatten(0, 2), labels, weight, reduction="sum")


def matched_classes(query_of: Tensor) -> tuple[Tensor, Tensor]:
    """Selects the classes matched in any layer, on BDD100K about half of those in an image: masks
    are built only for these. query_of [S, B, K] -> classes [B, M], where M is the largest number of
    matched classes in an image, and their query_of [S, B, M]; all on the CPU."""
    matched = (query_of >= 0).any(0)                                          # [B, K]
    most = max(1, int(matched.sum(1).max()))
    classes = matched.int().argsort(dim=1, descending=True, stable=True)  # the matched ones first
    classes = classes[:, :most]
    return classes, query_of.take_along_dim(classes[None], dim=2)


def mask_losses(outputs: dict, labels: Sequence[Tensor], indices: Indices, sizes: Tensor,
                dense_weight: float = 1.) -> dict:
    """Computes MaskFormer's losses, summed over all decoder layers, each with its own matching
    (class, focal, dice weigh 1, 20, 1). outputs: `MaskFormer`'s for all images. labels: uint8 maps
    of the labelled images, which are `indices` of the batch; each class present is a target. sizes
    [B, 2]: heights and widths of all images.
    Masks are matched at stride 4. Only matched ones are enlarged to LOSS_STRIDE and get gradients.
    If a label is larger than the images, each cell is compared with one pixel of its label
    (`draw_pixels`), since shares would blur thin lines.
    With `dense_logits` in outputs the result also has their loss times dense_weight, "dense"."""
    logits, embed, features = (outputs[x] for x in ("pred_logits", "mask_embed", "mask_features"))
    logits, device = logits.float(), logits.device
    num_queries, num_classes = logits.shape[2], logits.shape[3] - 1
    size = features.shape[-2:]
    stretched = stretch_labels(labels, sizes[indices])
    fine, coarse = mask_targets(stretched, num_classes, size)
    losses = {}
    if "dense_logits" in outputs:
        losses["dense"] = dense_weight * cell_loss(outputs["dense_logits"], *coarse, indices)
    present = coarse[0].flatten(2).amax(2) > 0                                # [B, K]
    num_matched = present.sum(1).clamp(max=num_queries).sum()
    num_unmatched = num_queries * len(labels) - num_matched
    weights = num_matched + NO_OBJECT_WEIGHT * num_unmatched              # of the class loss
    mask_count, query_weight = average_over_ranks(torch.stack([present.sum(), weights]))
    if not labels:
        zero = connected_zero(logits, embed, features)
        return losses | dict.fromkeys(("class", "focal", "dice"), zero)

    logits, embed, features = logits[:, indices], embed[:, indices], features[indices]
    cost = mask_cost(logits, embed, features, *coarse)                    # [S, B, Q, K]
    classes, query_of = (x.to(device, non_blocking=True)                  # [B, M], [S, B, M]
                         for x in matched_classes(match(cost, present)))
    embed = embed.take_along_dim(query_of.clamp(min=0).unsqueeze(-1), dim=2)
    coarse_masks = embed.transpose(0, 1).flatten(1, 2) @ features.flatten(2)
    coarse_masks = coarse_masks.unflatten(2, size)                        # [B, S * M, h, w]
    if any(n > STRIDES[0] * m for label in labels for n, m in zip(label.shape, size)):
        ids, centres = draw_pixels(stretched, size)                       # [B, 2 h, 2 w], [..., 2]
        target, valid = ids.unsqueeze(1) == classes[..., None, None], ids != IGNORE
        fine_masks = F.grid_sample(coarse_masks.float(), centres, mode="bilinear",
                                   padding_mode="border", align_corners=False)
        fine_masks = fine_masks.to(coarse_masks.dtype)
    else:
        target, valid = fine[0].take_along_dim(classes[..., None, None], dim=1), fine[1]
        scale = STRIDES[0] // LOSS_STRIDE
        fine_masks = F.interpolate(coarse_masks, scale_factor=scale, mode="bilinear")
    fine_masks = fine_masks.unflatten(1, (len(embed), -1))            # [B, S, M, 2 h, 2 w]
    focal, dice = focal_and_dice(fine_masks, target, valid)
    matched = (query_of >= 0).transpose(0, 1)                             # [B, S, M]
    return losses | {"class": class_loss(logits, query_of, classes) / query_weight,
                     "focal": 20 * (focal * matched).sum() / mask_count,
                     "dice": (dice * matched).sum() / mask_count}


def cell_loss(logits: Tensor, shares: Tensor, valid: Tensor, indices: Indices) -> Tensor:
    """Computes the mean cross-entropy of cells with soft targets (`mask_targets`). logits
    [B, K, h, w]: all images' at stride 4. indices: those of the images that are labelled."""
    loss = -(shares * logits[indices].float().log_softmax(1)).sum(1) * valid  # [B, h, w]
    return loss.sum() / average_over_ranks(valid.sum())


# ----------------------------------------------------------------------- backbone and adapters

class ResNetBackbone(nn.Module):
    """Runs torchvision's ResNet of a depth without its classifier: images -> [C2, C3, C4, C5]."""

    def __init__(self, depth: int = 50):
        super().__init__()
        if depth not in (18, 34, 50, 101):
            raise ValueError(f"depth {depth} is no ResNet that exists: choose 18, 34, 50 or 101.")
        net = getattr(torchvision.models, f"resnet{depth}")()
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(net, name))
        self.channels = [c * (4 if depth >= 50 else 1) for c in (64, 128, 256, 512)]

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            levels.append(layer(levels[-1]))
        return levels[1:]


class Inert:
    """Stands in for objects in a file that are neither tensors nor plain types, such as mmengine's
    logs: keeps nothing and runs nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain types; refuses all else in a pickle, so that no code is run."""

    allowed = re.compile(r"collections\.OrderedDict|_codecs\.encode|numpy\.(ndarray|dtype)|"
                         r"numpy\._?core\.multiarray\.(_reconstruct|scalar)")

    def find_class(self, module: str, name: str):
        if not self.allowed.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"{module}.{name} is no array")
        return super().find_class(module, name)


def first_sentence(error: Exception) -> str:
    return re.split(r"\. |\n", str(error) or type(error).__name__)[0]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """Reads a file of torch.save or detectron2's pickle of numpy arrays, without running code from
    it. Returns its state dict and, for a checkpoint of train.py, the key of PIXELS, else None."""
    try:
        zipped = zipfile.is_zipfile(path)           # of other files torch cannot list the types
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        with torch.serialization.safe_globals([(Inert, name) for name in unsafe]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"no file {path}: expected pretrained ResNet weights.") from None
    except Exception as refused:  # torch raises many kinds, all meaning: not a plain state dict
        try:
            with open(path, "rb") as file:
                content = ArrayUnpickler(file, encoding="latin1").load()
        except Exception:
            raise WeightsError(f"{path} cannot be read as a state dict ({first_sentence(refused)}):"
                               " fetch it anew, or name another.") from refused
    content = content if isinstance(content, dict) else {}
    config = content.get("model_config")
    for container in ("state_dict", "model", "resnet"):
        if isinstance(content.get(container), dict):
            content = content[container]
    state = {str(key): torch.as_tensor(value) for key, value in content.items()
             if isinstance(value, Tensor | np.ndarray)}
    if not state:
        raise WeightsError(f"{path} holds no tensors by name: expected a state dict, or one under "
                           "state_dict or model.")
    return state, config.get("pixels") if isinstance(config, dict) else None


# Prefixes of the trained encoder's tensors; a file may hold its momentum copy, too.
ENCODERS = ("backbone.", "encoder_q.0.", "encoder_q.", "online_net.0.", "encoder.", "")
RENAMES = (  # applied in this order: detectron2's and SimCLR v2's names -> torchvision's
    (r"^(module\.)+|\bstem\.|\bprojection\.", ""),
    *((rf"\bres{i + 1}\.|^net\.{i}\.blocks\.", f"layer{i}.") for i in (1, 2, 3, 4)),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.|\bbn\.0\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
    (r"^net\.0\.0\.", "conv1."),
    (r"^net\.0\.1\.0\.", "bn1."),
    *((rf"\.net\.{2 * i - 2}\.", f".conv{i}.") for i in (1, 2, 3)),
    *((rf"\.net\.{2 * i - 1}\.0\.", f".bn{i}.") for i in (1, 2, 3)),
)


def load_backbone(backbone: ResNetBackbone, path: str | Path) -> tuple[str, str]:
    """Fills a backbone from a file of torchvision, MoCo, SwAV, BYOL, DenseCL, PixPro, DetCo, SimCLR
    v2, MMSelfSup or train.py. Returns a report of the matched tensors and the key of PIXELS that
    the weights expect. Raises WeightsError if tensors are missing or the ResNet is deeper."""
    state, pixels = read_weights(path)
    swav = any(re.match(r"(module\.)*(prototypes|projection_head)", key) for key in state)
    simclr = any(key.startswith("net.0.") for key in state)
    pixels = pixels or ("swav" if swav else "unit" if simclr else "imagenet")
    for pattern, name in RENAMES:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}

    wanted = {key: value.shape for key, value in backbone.state_dict().items()
              if not key.endswith("num_batches_tracked")}
    prefix = max(ENCODERS, key=lambda p: sum(p + key in state for key in wanted))
    encoder = {key.removeprefix(prefix): value for key, value in state.items()
               if key.startswith(prefix) and not key.endswith("num_batches_tracked")}
    matched = {key: encoder[key].float() for key, shape in wanted.items()
               if key in encoder and encoder[key].shape == shape}
    missing = [key for key in wanted if key not in matched]
    unused = [key for key in encoder if key not in wanted]
    report = (f"{prefix or 'no prefix'}, {len(matched)} of {len(wanted)} tensors matched, "
              f"{len(missing)} missing, {len(unused)} not used")
    if missing:
        raise WeightsError(f"{path}: {report}; a backbone needs all of them. Missing or of another "
                           f"shape: {', '.join(missing[:8])}{' ...' * (len(missing) > 8)}.")
    deeper = [key for key in unused if re.match(r"layer\d\.", key)]
    if deeper:
        raise WeightsError(f"{path} is of a deeper ResNet ({len(deeper)} tensors too many, such as "
                           f"{deeper[0]}): name a file of this depth, or build the deeper one.")
    backbone.load_state_dict(matched, strict=False)
    return report + (f" ({', '.join(unused[:4])})" if unused else ""), pixels


class TwoConvs(nn.Module):
    """Applies two 3x3 convolutions with `width` channels between them, y = convs(x). scale: None
    returns y; "scalar", "vector" return x + s * y with a learnable scalar or vector s, initially
    0.001."""

    def __init__(self, channels: int, width: int, scale: str | None = None):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True),
                                   nn.Conv2d(width, channels, 3, padding=1))
        for conv in (self.convs[0], self.convs[2]):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)
        sizes = {"scalar": 1, "vector": channels}
        self.scale = nn.Parameter(torch.full((sizes[scale],), 1e-3)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x)
        return y if self.scale is None else x + self.scale.view(-1, 1, 1).to(y.dtype) * y


class Adapter(nn.Module):
    """Turns C2..C5 into P2..P5 of `width` channels: torchvision's FPN with, depending on the kind
    (one of ADAPTERS), two convolutions before or after it on each level (appendix D.3)."""

    def __init__(self, channels: Sequence[int], width: int, kind: str = "fpn"):
        super().__init__()
        if kind not in ADAPTERS:
            raise ValueError(f"adapter {kind!r} was given, expected one of {', '.join(ADAPTERS)}.")
        place, _, scale = kind.partition("_")
        self.before = nn.ModuleList(
            TwoConvs(c, width, scale) if place == "pre" else nn.Identity() for c in channels)
        self.fpn = FeaturePyramidNetwork(channels, width)
        self.after = nn.ModuleList(
            TwoConvs(width, width) if place == "post" else nn.Identity() for _ in channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        maps = {str(i): adapt(x) for i, (adapt, x) in enumerate(zip(self.before, levels))}
        return [adapt(x) for adapt, x in zip(self.after, self.fpn(maps).values())]


def flatten_map(x: Tensor, sizes: Tensor, stride: int, padded: bool) -> tuple:
    """Flattens a map [B, C, h, w] into tokens [B, h * w, C]. Also returns their 2-D sine positions
    [B, h * w, C] (DETR, arXiv 2005.12872), normalised by each image's own size, and a padding mask
    [B, h * w], or None if not `padded`. sizes [B, 2]: heights and widths in pixels."""
    width, h, w = x.shape[1:]
    period = 10000 ** (torch.arange(0, width // 2, 2, device=x.device) / (width // 2))
    steps = torch.cat([torch.arange(1, n + 1, device=x.device) for n in (h, w)])
    extent = (sizes / stride).ceil()
    extent = torch.cat([extent[:, :1].expand(-1, h), extent[:, 1:].expand(-1, w)], dim=1)
    angle = (steps / extent)[..., None] * 2 * math.pi / period                # [B, h + w, C / 4]
    waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(x.dtype)
    y_waves = waves[:, :h, None].expand(-1, -1, w, -1)                        # [B, h, w, C / 2]
    x_waves = waves[:, None, h:].expand(-1, h, -1, -1)
    positions = torch.cat([y_waves, x_waves], dim=-1).flatten(1, 2)           # [B, h * w, C]
    outside = steps > extent                                                  # [B, h + w]
    padding = (outside[:, :h, None] | outside[:, None, h:]).flatten(1) if padded else None
    return x.flatten(2).transpose(1, 2), positions, padding


class Attention(nn.MultiheadAttention):
    """Attends like torch's module, batch first, with fewer kernel launches; returns no weights."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None):
        """query [B, Q, C], key, value [B, L, C], padding [B, L] (True: left out) -> [B, Q, C]."""
        inputs = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(*x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in inputs)
        mask = None if padding is None else ~padding[:, None, None]
        dropout = self.dropout if self.training else 0.
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)     # [B, heads, Q, ...]
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Post-norm transformer decoder layer."""

    def __init__(self, width: int, feedforward: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(width, ATTENTION_HEADS, dropout)
        self.cross_attn = Attention(width, ATTENTION_HEADS, dropout)
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.ReLU(inplace=True),
                                         nn.Dropout(dropout), nn.Linear(feedforward, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, x_pos: Tensor, keys: Tensor, values: Tensor,
                x_padding: Tensor | None = None, key_padding: Tensor | None = None) -> Tensor:
        """x [B, Q, C] attends to itself and then to keys and values [B, L, C], except where padding
        is True. x_pos: positions, added to queries and keys of x."""
        q = x + x_pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, x_padding)))
        attended = self.cross_attn(x + x_pos, keys, values, key_padding)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.dropout(self.feedforward(x)))


def init_transformer(module: nn.Module) -> None:
    """Initialises all matrices by Xavier's uniform distribution."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)


class LVAdapter(nn.Module):
    """Language-to-Vision adapter: replaces the map P5 by TransDecoder(q = P5, k = v = Linear(T)),
    where T are the class embeddings."""

    def __init__(self, width: int, text_dim: int, feedforward: int, dropout: float):
        super().__init__()
        self.text_proj = nn.Linear(text_dim, width)
        self.decoder = DecoderLayer(width, feedforward, dropout)
        init_transformer(self)

    def forward(self, p5: Tensor, text: Tensor, sizes: Tensor, padded: bool) -> Tensor:
        """p5 [B, C, h, w], text [K, D], sizes [B, 2] of the images in pixels -> [B, C, h, w]."""
        text = self.text_proj(text.to(p5.dtype)).expand(p5.shape[0], -1, -1)      # [B, K, C]
        tokens, positions, padding = flatten_map(p5, sizes, STRIDES[3], padded)
        z5 = self.decoder(tokens, positions, text, text, padding)             # [B, h * w, C]
        return z5.transpose(1, 2).unflatten(2, p5.shape[-2:])


# --------------------------------------------------------------------------- transformer heads

class DynamicConv(nn.Module):
    """Filters each proposal's RoI with two 1x1 convolutions that its feature generates."""

    def __init__(self, width: int, dim: int, pool: int):
        super().__init__()
        self.dim = dim
        self.parameters_of = nn.Linear(width, 2 * width * dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(n) for n in (dim, width, width))
        self.out = nn.Linear(width * pool * pool, width)

    def forward(self, proposals: Tensor, rois: Tensor) -> Tensor:
        """proposals [B, N, C], rois [B, N, bins, C] -> [B, N, C]."""
        first, second = self.parameters_of(proposals).chunk(2, dim=-1)
        x = F.relu(self.norm1(rois @ first.unflatten(-1, (-1, self.dim))))    # [B, N, bins, dim]
        x = F.relu(self.norm2(x @ second.unflatten(-1, (self.dim, -1))))      # [B, N, bins, C]
        return F.relu(self.norm3(self.out(x.flatten(2))))


def branch(width: int, depth: int) -> nn.Sequential:
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class CascadeStage(nn.Module):
    """One cascade stage: proposals attend to each other, read their RoIs, move their boxes."""

    def __init__(self, num_classes: int, width: int, feedforward: int, dynamic_dim: int, pool: int):
        super().__init__()
        self.self_attn = Attention(width, ATTENTION_HEADS)
        self.dynamic_conv = DynamicConv(width, dynamic_dim, pool)
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.ReLU(inplace=True),
                                         nn.Linear(feedforward, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.class_branch, self.box_branch = branch(width, 1), branch(width, 3)
        self.class_logits, self.box_deltas = nn.Linear(width, num_classes), nn.Linear(width, 4)

    def forward(self, pyramid: Pyramid, boxes: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """boxes [B, N, 4], proposals x [B or 1, N, C] -> logits [B, N, K], boxes, proposals."""
        x = self.norm1(x + self.self_attn(x, x, x))
        rois = pyramid.roi_align(boxes)                                       # [B, N, bins, C]
        x = self.norm2(x + self.dynamic_conv(x, rois))                        # [B, N, C]
        x = self.norm3(x + self.feedforward(x))
        boxes = apply_deltas(boxes, self.box_deltas(self.box_branch(x)).float())
        return self.class_logits(self.class_branch(x)), boxes, x


def init_prediction(class_logits: nn.Module, box_deltas: nn.Module, prior: float = 0.01) -> None:
    """Sets all class probabilities to `prior` (focal loss, arXiv 1708.02002), box deltas to 0."""
    nn.init.constant_(class_logits.bias, -math.log((1 - prior) / prior))
    nn.init.zeros_(box_deltas.weight)
    nn.init.zeros_(box_deltas.bias)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Joins maps [B, C, h, w] of several sizes into [B, L, C], where L counts the cells of all."""
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


class DenseProposals(nn.Module):
    """Predicts classes, a box and a feature from each cell of P2..P5; the N cells of the highest
    scores become the proposals (Featurized Query R-CNN, arXiv 2206.06258). Trained with the cascade
    stages' losses, one-to-one."""

    def __init__(self, num_classes: int, width: int, proposals: int):
        super().__init__()
        self.proposals = proposals
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.class_logits = nn.Conv2d(width, num_classes, 1)
        self.box_deltas = nn.Conv2d(width, 4, 1)
        self.feature = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        init_prediction(self.class_logits, self.box_deltas)

    def forward(self, features: Features) -> tuple[dict, Tensor, Tensor]:
        """Returns the predictions of all L cells (pred_logits [1, B, L, K], pred_boxes
        [1, B, L, 4]) and the best cells' boxes [B, N, 4] and features [B, N, C]; N <= L."""
        maps = [F.relu(self.conv(level)) for level in features.levels]
        cells = flatten_levels(maps)                                          # [B, L, C]
        logits = flatten_levels([self.class_logits(x) for x in maps])         # [B, L, K]
        deltas = flatten_levels([self.box_deltas(x) for x in maps])           # [B, L, 4]
        anchors = torch.cat([self.anchors(*x.shape[-2:], stride, x.device)
                             for x, stride in zip(maps, STRIDES)])            # [L, 4]
        boxes = apply_deltas(anchors, deltas.float())
        centres = (anchors[:, 2:] + anchors[:, :2]).flip(1) / 2    # y, x [L, 2], as sizes are h, w
        padding = (centres >= features.sizes[:, None]).any(-1, keepdim=True)  # [B, L, 1]
        logits = logits.float().masked_fill(padding, -1e4)
        count = min(self.proposals, logits.shape[1])
        best = logits.detach().amax(-1).topk(count, dim=1).indices.unsqueeze(-1)      # [B, N, 1]
        outputs = {"pred_logits": logits[None], "pred_boxes": boxes[None]}
        boxes = boxes.detach().gather(1, best.expand(-1, -1, 4))
        cells = cells.gather(1, best.expand(-1, -1, cells.shape[2]))
        return outputs, boxes, self.feature(cells)

    def anchors(self, h: int, w: int, stride: int, device) -> Tensor:
        """Returns boxes 3 cells wide around all cells of a map: xyxy pixels [h * w, 4]."""
        y, x = ((torch.arange(n, device=device) + 0.5) * stride for n in (h, w))
        centres = torch.cartesian_prod(y, x).flip(1)
        half = 3 * stride / 2
        return torch.cat([centres - half, centres + half], dim=1)


def matrix_nms(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Lowers the scores of boxes that overlap a better box of their class (Matrix NMS of SOLOv2,
    arXiv 2003.10152): score_j *= min over better i of exp(-2 iou_ij²) / exp(-2 compensation_i²),
    where compensation_i is box i's largest overlap with a better box. boxes [B, N, 4], descending
    scores and labels [B, N] -> scores [B, N]."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    inter, areas = area(low, high), area(boxes[..., :2], boxes[..., 2:])
    iou = inter / (areas[:, :, None] + areas[:, None] - inter).clamp(min=1e-6)   # [B, N, N]
    iou = iou.nan_to_num() * (labels[:, :, None] == labels[:, None])
    iou = iou.triu(diagonal=1)                                 # row: better box, column: other box
    compensation = iou.amax(1).unsqueeze(2)      # a duplicate lowers the boxes below it less
    return scores * (2 * (compensation.square() - iou.square())).exp().amin(1)


class SparseRCNN(nn.Module):
    """Sparse R-CNN head: refines N proposals over S cascade stages.

    dynamic_dim: channels inside DynamicConv. pool: bins of a RoI along each axis.
    dense_proposals: True: from `DenseProposals`, which learns much faster; False: learned features
        and boxes, as in the original, where all boxes start as the whole image."""

    def __init__(self, num_classes: int, width: int = 256, *, proposals: int = 100,
                 stages: int = 6, feedforward: int = 2048, dynamic_dim: int = 64, pool: int = 7,
                 dense_proposals: bool = False):
        super().__init__()
        self.pool = pool
        sizes = (num_classes, width, feedforward, dynamic_dim, pool)
        self.stages = nn.ModuleList(CascadeStage(*sizes) for _ in range(stages))
        init_transformer(self.stages)
        for stage in self.stages:
            init_prediction(stage.class_logits, stage.box_deltas)
        self.dense = DenseProposals(num_classes, width, proposals) if dense_proposals else None
        if not dense_proposals:
            self.proposal_features = nn.Parameter(torch.randn(proposals, width))
            whole_image = torch.tensor([[0.5, 0.5, 1., 1.]])                  # relative cxcywh
            self.proposal_boxes = nn.Parameter(whole_image.repeat(proposals, 1))

    def forward(self, features: Features) -> dict:
        """Returns pred_logits [S, B, N, K] and pred_boxes [S, B, N, 4] (xyxy pixels) of all cascade
        stages in order, and dense_outputs: those of DenseProposals or None."""
        if self.dense is not None:
            dense, boxes, proposals = self.dense(features)
        else:
            extent = features.sizes.flip(1).repeat(1, 2)[:, None]   # [B, 1, 4]: w, h, w, h
            boxes = box_convert(self.proposal_boxes, "cxcywh", "xyxy") * extent
            dense, proposals = None, self.proposal_features[None]             # shared: [1, N, C]
        pyramid = Pyramid(features.levels, self.pool)
        proposals, outputs = proposals.to(pyramid.table.dtype), []
        for stage in self.stages:
            logits, boxes, proposals = stage(pyramid, boxes, proposals)
            outputs.append((logits, boxes))
            boxes = boxes.detach()
        logits, boxes = (torch.stack(x) for x in zip(*outputs))
        return {"pred_logits": logits, "pred_boxes": boxes, "dense_outputs": dense}

    def losses(self, features: Features, targets: Sequence[dict], indices: Indices) -> dict:
        outputs = self(features)
        losses = box_losses(outputs, targets, indices, features.sizes)
        if self.dense is not None:
            dense = box_losses(outputs["dense_outputs"], targets, indices, features.sizes)
            losses = {name: value + dense[name] for name, value in losses.items()}
        return losses

    def predict(self, features: Features) -> dict[str, Tensor]:
        """Selects the N best of all N * K class scores; a box may appear with several classes.
        Lowers the scores of boxes that overlap a better one of their class (`matrix_nms`)."""
        outputs = self(features)
        scores = outputs["pred_logits"][-1].float().sigmoid().nan_to_num()     # [B, N, K]
        num_proposals, num_classes = scores.shape[1:]
        scores, index = scores.flatten(1).topk(num_proposals, dim=1)          # [B, N]
        boxes, labels = outputs["pred_boxes"][-1], index % num_classes
        boxes = boxes.gather(1, (index // num_classes).unsqueeze(-1).expand(-1, -1, 4))
        scores, order = matrix_nms(boxes, scores, labels).sort(dim=1, descending=True, stable=True)
        return {"boxes": boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)), "scores": scores,
                "labels": labels.gather(1, order)}


def conv_norm(c_in: int, c_out: int, kernel: int, activation=nn.ReLU) -> nn.Sequential:
    layers = torchvision.ops.Conv2dNormActivation(
        c_in, c_out, kernel, norm_layer=partial(nn.GroupNorm, 32), activation_layer=activation)
    nn.init.kaiming_uniform_(layers[0].weight, a=1)
    return layers


class PixelDecoder(nn.Module):
    """MaskFormer's pixel decoder on P2..P5: a second top-down pass, with GroupNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.lateral = nn.ModuleList(conv_norm(width, width, 1, None) for _ in range(3))
        self.output = nn.ModuleList(conv_norm(width, width, 3) for _ in range(4))
        self.mask_features = nn.Conv2d(width, width, 3, padding=1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """P2..P5 -> mask features at stride 4 [B, C, h, w] and the maps at strides 4, 8, 16, 32."""
        maps = [self.output[3](levels[3])]
        for i in (2, 1, 0):
            up = F.interpolate(maps[0], size=levels[i].shape[-2:], mode="nearest")
            maps.insert(0, self.output[i](self.lateral[i](levels[i]) + up))
        return self.mask_features(maps[0]), maps


class MaskFormer(nn.Module):
    """MaskFormer head: decodes Q queries, each into a class and a mask, over several layers.

    memory_level: 5: the queries attend to P5, as in the original. 4: they attend to the pixel
        decoder's map at stride 16, for small images whose P5 has only a few cells.
    dense_weight: weight of an auxiliary loss that classifies each cell of the pixel decoder at
        stride 4 (as in PSPNet, arXiv 1612.01105), so that the cells learn before the queries do."""

    def __init__(self, num_classes: int, width: int = 256, *, queries: int = 100, layers: int = 6,
                 feedforward: int = 2048, dropout: float = 0.1, memory_level: int = 5,
                 dense_weight: float = 0.):
        super().__init__()
        self.memory_level, self.dense_weight = memory_level, dense_weight
        self.dense_logits = nn.Conv2d(width, num_classes, 1) if dense_weight else None
        self.pixel_decoder = PixelDecoder(width)
        self.layers = nn.ModuleList(DecoderLayer(width, feedforward, dropout)
                                    for _ in range(layers))
        init_transformer(self.layers)
        self.norm = nn.LayerNorm(width)
        self.query_embed = nn.Parameter(torch.randn(queries, width))
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.mask_embed = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True),
                                        nn.Linear(width, width), nn.ReLU(inplace=True),
                                        nn.Linear(width, width))

    def forward(self, features: Features) -> dict:
        """Returns pred_logits [S, B, Q, K + 1] (last: no object) and mask_embed [S, B, Q, C] of all
        layers in order; mask_features [B, C, h, w]: mask_embed @ these are the mask logits at
        stride 4; pixel_features: the pixel decoder's map that they are computed from."""
        mask_features, maps = self.pixel_decoder(features.levels)
        memory, stride = features.levels[3], STRIDES[3]
        if self.memory_level == 4:
            memory, stride = maps[2], STRIDES[2]
        memory, memory_pos, padding = flatten_map(memory, features.sizes, stride, features.padded)
        keys, query_pos = memory + memory_pos, self.query_embed.to(memory.dtype)
        x = torch.zeros_like(query_pos).expand(memory.shape[0], -1, -1)       # [B, Q, C]
        decoded = []
        for layer in self.layers:
            x = layer(x, query_pos, keys, memory, key_padding=padding)
            decoded.append(x)
        x = self.norm(torch.stack(decoded))                                   # [S, B, Q, C]
        return {"pred_logits": self.class_logits(x), "mask_embed": self.mask_embed(x),
                "mask_features": mask_features, "pixel_features": maps[0]}

    def losses(self, features: Features, labels: Sequence[Tensor], indices: Indices) -> dict:
        outputs = self(features)
        if self.dense_logits is not None:
            outputs["dense_logits"] = self.dense_logits(outputs["pixel_features"])
        return mask_losses(outputs, labels, indices, features.sizes, self.dense_weight)

    def predict(self, features: Features) -> Tensor:
        """Enlarges the masks to the image and sums class probability x mask over the queries
        (MaskFormer's semantic inference). Returns class scores [B, K, H, W]."""
        outputs = self(features)
        dtype = mask_dtype(outputs["mask_features"])
        probabilities = outputs["pred_logits"][-1].float().softmax(-1)[..., :-1].to(dtype)
        masks = torch.einsum("bqc,bchw->bqhw", outputs["mask_embed"][-1].to(dtype),
                             outputs["mask_features"].to(dtype))
        masks = F.interpolate(masks, scale_factor=STRIDES[0], mode="bilinear").sigmoid_()
        return torch.einsum("bqk,bqhw->bkhw", probabilities, masks)


# -------------------------------------------------------------------------- convolutional heads

class Anchors(anchor_utils.AnchorGenerator):
    """Places torchvision's anchors on P2..P6 at the levels' own strides. torchvision divides the
    images' size by the map's, which is wrong unless 64 divides it."""

    def forward(self, images: image_list.ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, maps[0].device)
        strides = [(stride, stride) for stride in (*STRIDES, 64)]
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], strides))
        return [anchors] * len(images.image_sizes)


class BoxPool(nn.Module):
    """Adapts `Pyramid.roi_align` to torchvision's RoIHeads: lists of boxes -> [all, 49, C]."""

    def forward(self, levels: list[Tensor], boxes: list[Tensor], shapes) -> Tensor:
        padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
        rois = Pyramid(levels).roi_align(padded)
        return torch.cat([x[:len(image_boxes)] for x, image_boxes in zip(rois, boxes)])


def to_float32(module: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
    """Forward hook: turns logits and deltas, tensors or lists (RPN), into float32 for the boxes."""
    return tuple([y.float() for y in x] if isinstance(x, list) else x.float() for x in outputs)


class FasterRCNN(nn.Module):
    """Faster R-CNN head (arXiv 1506.01497): torchvision's RPN and RoI heads on P2..P6. box_dim:
    width of the RoI head's two linear layers. anchor_scale: side of the anchors in cells."""

    def __init__(self, num_classes: int, width: int = 256, *, box_dim: int = 1024,
                 anchor_scale: int = 8):
        super().__init__()
        sizes = tuple((anchor_scale * stride,) for stride in (*STRIDES, 64))
        self.rpn = rpn.RegionProposalNetwork(
            Anchors(sizes, ((0.5, 1., 2.),) * 5), rpn.RPNHead(width, 3), fg_iou_thresh=0.7,
            bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, nms_thresh=0.7,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000})
        self.roi_heads = roi_heads.RoIHeads(
            BoxPool(), faster_rcnn.TwoMLPHead(width * 49, box_dim),
            faster_rcnn.FastRCNNPredictor(box_dim, num_classes + 1), fg_iou_thresh=0.5,
            bg_iou_thresh=0.5, batch_size_per_image=512, positive_fraction=0.25,
            bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100)
        for layer in (self.rpn.head, self.roi_heads.box_predictor):
            layer.register_forward_hook(to_float32)

    def forward(self, features: Features, targets: list[dict] | None = None) -> tuple:
        """Returns each image's boxes, scores and labels (empty in training mode) and the losses by
        torchvision's names (empty in eval mode). targets: for training; labels start at 1."""
        shapes = [(int(h), int(w)) for h, w in features.sizes.tolist()]
        images = image_list.ImageList(features.levels[0], shapes)            # only shapes are read
        p6 = F.max_pool2d(features.levels[3], 1, 2)
        maps = dict(enumerate([*features.levels, p6]))
        proposals, rpn_losses = self.rpn(images, maps, targets)
        boxes, losses = self.roi_heads(features.levels, proposals, shapes, targets)
        return boxes, rpn_losses | losses

    def losses(self, features: Features, targets: Sequence[dict], indices: Indices) -> dict:
        """Computes torchvision's losses of sampled anchors and boxes; needs training mode."""
        names = {"objectness": "loss_objectness", "proposals": "loss_rpn_box_reg",
                 "class": "loss_classifier", "box": "loss_box_reg"}
        count = torch.tensor(float(len(targets)), device=features.sizes.device)
        share = count / average_over_ranks(count)        # DDP averages ranks; weighs by labels
        if not targets:
            return dict.fromkeys(names, connected_zero(*features.levels, *self.parameters()))
        levels, sizes = [level[indices] for level in features.levels], features.sizes[indices]
        truth = []
        for boxes, labels, present in zip(*pad_boxes(targets, sizes.device)):
            present = present & (boxes[:, 2:] > boxes[:, :2]).all(1)
            truth.append({"boxes": boxes[present], "labels": labels[present] + 1})
        losses = self(Features(levels, sizes, features.padded), truth)[1]
        return {name: losses[key] * share for name, key in names.items()}

    def predict(self, features: Features) -> dict[str, list[Tensor]]:
        results = self(features)[0]
        return {"boxes": [x["boxes"] for x in results], "scores": [x["scores"] for x in results],
                "labels": [x["labels"] - 1 for x in results]}


class SemanticFPN(nn.Module):
    """Semantic FPN head (Panoptic FPN, arXiv 1901.02446) with GroupNorm: convolves each level and
    enlarges it step by step to stride 4, then classifies each cell of the sum."""

    def __init__(self, num_classes: int, width: int = 256, *, conv_dim: int = 128):
        super().__init__()
        self.convs = nn.ModuleList()
        for count in (1, 1, 2, 3):                                            # of P2..P5
            dims = [width] + [conv_dim] * count
            self.convs.append(nn.ModuleList(conv_norm(*pair, 3) for pair in zip(dims, dims[1:])))
        self.classifier = nn.Conv2d(conv_dim, num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """levels P2..P5 -> class logits [B, K, h, w] at stride 4."""
        total = 0
        for i, (x, convs) in enumerate(zip(levels, self.convs)):
            for step, conv in enumerate(convs, start=1):
                x = conv(x)
                if i:                                         # enlarge to the next finer level
                    x = F.interpolate(x, levels[i - step].shape[-2:], mode="bilinear")
            total = total + x
        return self.classifier(total)

    def losses(self, features: Features, labels: Sequence[Tensor], indices: Indices) -> dict:
        """Computes the mean cross-entropy of the labelled pixels at the labels' resolution."""
        logits = self(features.levels)
        maps, y, x, _ = stretch_labels(labels, features.sizes[indices])
        count = average_over_ranks((maps != IGNORE).sum().float())
        if not labels:
            return {"class": connected_zero(logits)}
        y, x = (2 * n / (STRIDES[0] * m) - 1 for n, m in zip((y, x), logits.shape[-2:]))
        grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=-1)
        logits = F.grid_sample(logits[indices].float(), grid, mode="bilinear",
                               padding_mode="border", align_corners=False)    # [B, K, H, W]
        loss = F.cross_entropy(logits, maps.long(), ignore_index=IGNORE, reduction="sum")
        return {"class": loss / count}

    def predict(self, features: Features) -> Tensor:
        """Returns class probabilities [B, K, H, W] at the image's resolution."""
        logits = self(features.levels).float()
        return F.interpolate(logits, scale_factor=STRIDES[0], mode="bilinear").softmax(1)


# ------------------------------------------------------------------- the model, its checkpoints

def class_map(scores: Tensor, size: tuple, shape: tuple, confidence: float) -> Tensor:
    """Crops scores [B, K, H, W] to `size`, resizes them to `shape` (both height, width), takes the
    argmax. Returns uint8 maps, 255 where the best class's share of all scores is below
    `confidence`."""
    scores = scores[..., :size[0], :size[1]]
    if size != shape:
        scores = F.interpolate(scores, size=shape, mode="bilinear")
    best, label = scores.max(1)
    return label.to(torch.uint8).masked_fill(best < confidence * scores.sum(1), IGNORE)


class CastTogether(torch.autograd.Function):
    """Casts tensors to a dtype, and their gradients back, each with one launch for all of them."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        copies = [torch.empty_like(x, dtype=dtype) for x in tensors]
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        return None, *CastTogether.forward(ctx, ctx.dtype, *gradients)


@contextlib.contextmanager
def lower_precision(model: "HMPL") -> Iterator[None]:
    """Within autocast, replaces it by one cast of all weights but the text module's. autocast would
    launch a cast for each use, and norms and interpolation would run in float32; BatchNorm's
    weights and all statistics stay float32."""
    device = model.mean.device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    kinds = (nn.Conv2d, nn.Linear, nn.MultiheadAttention, nn.LayerNorm, nn.GroupNorm)
    weights = {f"{path}.{name}": weight for path, module in model.named_modules()
               if isinstance(module, kinds) and not path.startswith("text.")
               for name, weight in module.named_parameters(recurse=False)}
    copies = CastTogether.apply(torch.get_autocast_dtype(device), *weights.values())
    with (_reparametrize_module(model, dict(zip(weights, copies))),
          torch.autocast(device, enabled=False)):
        yield


GRAPHS = weakref.WeakKeyDictionary()         # for each model: (images, graph, outputs) by options


class HMPL(nn.Module):
    """The multi-task model; with one task it is that task's single-task model.

    classes: {task: its class names in id order}; `detection` has boxes, any other name masks.
    depth: of the ResNet. width: channels C of P2..P5. feedforward, dropout: of transformer layers.
    size: (width, height) to which `predict`, but not `forward`, resizes images; None: as they are.
    heads: "transformer" (Sparse R-CNN, MaskFormer) or "conv" (Faster R-CNN, Semantic FPN). A custom
        head in `model.heads` needs two methods: losses(features, labels, indices), which returns
        losses of the labelled images by name; predict(features), which returns boxes, scores and
        labels of each image, or class scores [B, K, H, W], in pixels of the network's input.
        Within autocast it gets features and weights in that dtype (`lower_precision`).
    adapter: one of ADAPTERS. pixels: the key of PIXELS that `load_backbone` returns.
    text: the LV-Adapter's class embeddings [K, D], or a module with attribute `text_dim` (D) that
        returns them; None: no LV-Adapter. The buffer `text_features` holds the latest embeddings:
        a saved model needs no text module to predict.
    background_weights: {mask task: factor of its last class's scores in `predict`}. Below 1, thin
        objects get more pixels.
    sparse_rcnn, maskformer, faster_rcnn, semantic_fpn: arguments of that head, as in PROFILES."""

    def __init__(self, classes: dict[str, Sequence[str]], *, depth: int = 50, width: int = 256,
                 feedforward: int = 2048, dropout: float = 0.1, size: tuple | None = None,
                 heads: str = "transformer", adapter: str = "fpn", pixels: str = "imagenet",
                 text: nn.Module | Tensor | None = None,
                 background_weights: dict[str, float] | None = None,
                 sparse_rcnn: dict | None = None, maskformer: dict | None = None,
                 faster_rcnn: dict | None = None, semantic_fpn: dict | None = None):
        super().__init__()
        if not classes or not all(classes.values()):
            raise ValueError(f"tasks {classes} were given, expected some, each with class names.")
        if heads not in HEADS:
            raise ValueError(f"heads {heads!r} were given, expected one of {', '.join(HEADS)}.")
        self.classes = {task: tuple(names) for task, names in classes.items()}
        self.size = size
        self.background_weights = background_weights or {}
        for name, value in zip(("mean", "std"), PIXELS[pixels]):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.backbone = ResNetBackbone(depth)
        self.backbone_frozen = False
        self.adapter = Adapter(self.backbone.channels, width, adapter)
        self.text, self.lv_adapter = None, None
        if isinstance(text, nn.Module):
            self.text = text
            text = torch.zeros(sum(map(len, classes.values())), text.text_dim)
        if text is not None:
            self.register_buffer("text_features", text.detach().float().clone())
            self.lv_adapter = LVAdapter(width, text.shape[1], feedforward, dropout)
        if heads == "transformer":
            box_head = partial(SparseRCNN, feedforward=feedforward, **(sparse_rcnn or {}))
            kwargs = {"dropout": dropout, **(maskformer or {})}
            mask_head = partial(MaskFormer, feedforward=feedforward, **kwargs)
        else:
            box_head = partial(FasterRCNN, **(faster_rcnn or {}))
            mask_head = partial(SemanticFPN, **(semantic_fpn or {}))
        make_head = {"boxes": box_head, "mask": mask_head}
        self.heads = nn.ModuleDict({task: make_head[kind_of(task)](len(names), width)
                                    for task, names in classes.items()})
        self.to(memory_format=torch.channels_last)

    def freeze_backbone(self, frozen: bool = True) -> None:
        """Freezes the backbone: no graph, no gradients, fixed BatchNorm statistics."""
        self.backbone_frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def _apply(self, *args, **kwargs):
        GRAPHS.pop(self, None)                        # graphs read the weights' old addresses
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True):
        GRAPHS.pop(self, None)                        # frees the memory of graphs
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        if not mode:
            self.update_text()
        return self

    @torch.no_grad()
    def update_text(self) -> None:
        """Copies the text module's embeddings to `text_features`. `eval()` calls this."""
        if self.text is not None:
            self.text_features.copy_(self.text())

    def normalise(self, images: Tensor) -> Tensor:                # [..., 3, H, W]
        return (images - self.mean) / self.std

    def batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, bool]:
        """Normalises uint8 images [3, H, W] and pads them at right and bottom with the mean colour.
        Returns x [B, 3, H, W], heights and widths [B, 2], and whether any image is padded."""
        device, shapes = self.mean.device, [image.shape[-2:] for image in images]
        h, w = (max(extent) for extent in zip(*shapes))
        x = torch.zeros(len(images), h, w, 3, device=device).permute(0, 3, 1, 2)  # channels_last
        for padded, image in zip(x, images):
            image = image.to(device, non_blocking=True)
            padded[:, :image.shape[1], :image.shape[2]] = self.normalise(image)
        sizes = torch.tensor(shapes, dtype=torch.float32).to(device, non_blocking=True)
        return x, sizes, any(shape != (h, w) for shape in shapes)

    def embeddings(self) -> Tensor | None:
        """Returns the class embeddings [K, D]: in training the text module's, else the stored."""
        learning = self.training and self.text is not None
        return self.text() if learning else getattr(self, "text_features", None)

    def features(self, x: Tensor, sizes: Tensor, padded: bool, text: Tensor | None) -> Features:
        """Computes P2..P5, with language in P5, from the output of `batch` and `embeddings`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_frozen):
            levels = self.backbone(x.to(self.backbone.conv1.weight.dtype))    # C2..C5
        levels = self.adapter(levels)                                         # P2..P5
        if self.lv_adapter is not None:
            levels[3] = self.lv_adapter(levels[3], text, sizes, padded)
        return Features(levels, sizes, padded)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict]) -> dict[str, Tensor]:
        """Returns weighted losses by name; training minimises their sum. images: B uint8 [3, H, W]
        of any sizes. targets: B dicts with any of `boxes` [N, 4] and `labels` [N] int64, optionally
        with `crowd` [N] bool, in image pixels; and by mask task uint8 maps of any size, which are
        stretched over the image."""
        batch, text, losses = self.batch(images), self.embeddings(), {}
        with lower_precision(self):
            features = self.features(*batch, text)
            for task, head in self.heads.items():
                key = "boxes" if kind_of(task) == "boxes" else task
                labelled = [i for i, target in enumerate(targets) if key in target]
                labels = [targets[i] if key == "boxes" else targets[i][task] for i in labelled]
                indices = slice(None)                                         # a view, no copy
                if len(labelled) < len(targets):
                    indices = torch.tensor(labelled, dtype=torch.long)
                    indices = indices.to(self.mean.device, non_blocking=True)
                task_losses = head.losses(features, labels, indices)
                losses |= {f"{task}_{name}": value for name, value in task_losses.items()}
        return losses

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], confidence: float = 0.) -> list[dict[str, Tensor]]:
        """Predicts all tasks for uint8 images [3, H, W], in their own pixels: `boxes` [N, 4] xyxy,
        `scores` [N] descending, `labels` [N], and by task uint8 maps [H, W] as in `class_map`. Only
        images of one size share a batch, so no prediction depends on padding or other images."""
        by_size = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        results = [{} for _ in images]
        for indices in by_size.values():
            batch = [images[i].to(self.mean.device, non_blocking=True) for i in indices]
            outputs = self.replay(torch.stack(batch), confidence)
            for n, i in enumerate(indices):
                results[i] = {key: values[n] for key, values in outputs.items()}
        return results

    def replay(self, images: Tensor, confidence: float) -> dict[str, Tensor]:
        """Returns `predict_batch`'s results, on a GPU from the second batch of a shape on by a CUDA
        graph: one launch in place of 1,200. Faster R-CNN's shapes vary, so it is not captured."""
        varying = any(isinstance(head, FasterRCNN) for head in self.heads.values())
        if varying or not (images.is_cuda and torch.cuda.is_available()):
            return self.predict_batch(images, confidence)
        amp = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (images.shape, confidence, amp, torch.is_inference_mode_enabled())
        graphs = GRAPHS.setdefault(self, {})
        if key not in graphs:
            graphs[key] = None                # the first batch is the warm-up, the next is captured
            return self.predict_batch(images, confidence)
        with torch.cuda.device(images.device):
            if graphs[key] is None:
                captured = [graph for _, graph, _ in filter(None, graphs.values())]
                pool = captured[0].pool() if captured else None      # all graphs share its memory
                inputs, graph = images.clone(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                    outputs = self.predict_batch(inputs, confidence)
                graphs[key] = inputs, graph, outputs
            inputs, graph, outputs = graphs[key]
            inputs.copy_(images)
            graph.replay()
            return {name: value.clone() for name, value in outputs.items()}

    def predict_batch(self, images: Tensor, confidence: float = 0.) -> dict[str, Tensor]:
        """Predicts like `predict` for images [B, 3, H, W] on its device; callers disable gradients.
        Convolutional heads give lists of boxes, scores and labels and cannot be exported."""
        shape = tuple(images.shape[-2:])                              # height, width of results
        size = tuple(self.size[::-1]) if self.size else shape         # height, width in the network
        if size != shape:
            x = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
            images = x.round().clamp(0, 255).to(torch.uint8)
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        # Filled on the device, since copies from the CPU cannot be captured: [1, 2] each.
        sizes, extent = (torch.stack([x.new_full((1,), n) for n in pair], dim=1)
                         for pair in (size, shape))
        text = self.embeddings()
        with lower_precision(self):
            features = self.features(x, sizes.expand(x.shape[0], -1), False, text)
            outputs = {task: head.predict(features) for task, head in self.heads.items()}
        scale = (extent / sizes).flip(1).repeat(1, 2)                         # [1, 4]: x, y, x, y
        extent = extent.flip(1).repeat(1, 2)                                  # [1, 4]: w, h, w, h

        def to_image(boxes: Tensor) -> Tensor:
            return torch.minimum((boxes * scale).nan_to_num().clamp(min=0), extent)

        results = {}
        for task, output in outputs.items():
            if kind_of(task) == "mask":
                if task in self.background_weights:
                    output[:, -1] *= self.background_weights[task]
                results[task] = class_map(output, size, shape, confidence)
            elif isinstance(output["boxes"], Tensor):
                results |= output | {"boxes": to_image(output["boxes"])}
            else:
                results |= output | {"boxes": [to_image(boxes) for boxes in output["boxes"]]}
        return results


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint of train.py, tensors and plain types, without running code from it. Raises
    WeightsError if the file is absent, damaged or of another kind."""
    if not Path(path).is_file():
        raise WeightsError(f"no checkpoint {path}: train one with train.py, or name another.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = [key for key in CHECKPOINT_KEYS if key not in content]
        for part, key in (("model_config", "classes"), ("config", "data")):
            if not missing and (not isinstance(content[part], dict) or key not in content[part]):
                missing = [f"{part}.{key}"]
        if missing or not isinstance(content["model"], dict):
            raise ValueError(f"it has no {', '.join(missing) or 'state dict'}")
    except Exception as refused:  # torch raises many kinds, all meaning: not such a checkpoint
        raise WeightsError(f"{path} cannot be read as a checkpoint of train.py "
                           f"({first_sentence(refused)}): name a .pt file of a run folder; if it "
                           "is damaged, delete it and run the training command again.") from refused
    return content


def load_model(path: str | Path, device: str | torch.device = "cpu") -> HMPL:
    """Builds the model of a checkpoint of train.py, ready to `predict` on a device. Needs no CLIP,
    as text embeddings are stored. Raises WeightsError if the file or its network does not fit."""
    checkpoint = load_checkpoint(path)
    state = {k: v for k, v in checkpoint["model"].items() if not k.startswith("text.")}
    try:
        text = torch.zeros_like(state["text_features"]) if "text_features" in state else None
        model = HMPL(**checkpoint["model_config"], text=text)
        model.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as misfit:
        raise WeightsError(f"{path} holds another network than this code builds "
                           f"({first_sentence(misfit)}): use the code that wrote it, or train "
                           "anew.") from misfit
    return model.eval().requires_grad_(False).to(device)
