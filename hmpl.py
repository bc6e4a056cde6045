"""HMPL: one network for traffic object detection, semantic segmentation and drivable area.

The model of "Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving" (NeurIPS
2022), in plain PyTorch and one file:

    image -> ResNetBody C2..C5 -> Adapter P2..P5 -> LVAdapter writes language into P5 -> heads

    ResNetBody    torchvision's ResNet, any pretrained weights (`load_body`), frozen in the adapt stage
    Adapter       FPN, alone or with convolutions before or after it
    LVAdapter     Language-to-Vision adapter: P5 := TransDecoder(q=P5, k=v=Linear(text embeddings))
    SparseRCNN    detection head (Sun et al. 2021, arXiv 2011.12450)
    MaskFormer    semantic and drivable heads (Cheng et al. 2021, arXiv 2107.06278)
    FasterRCNN    with SemanticFPN the convolutional heads of appendix D.2
    HMPL          all of it; losses from images labelled for any of the tasks, predictions for all

Images are RGB uint8 [3, H, W]; boxes are absolute xyxy pixels, x2 and y2 exclusive; 255 in a mask is
ignored. A target may lack any of its keys: then the image is not labelled for that task. Every head has
two doors, `losses` and `predict`, so that one of your own fits beside these.

Example:

>>> classes = {"detection": ("car", "bus"), "semantic": ("road", "sky", "car"),
...            "drivable": ("direct", "other")}
>>> model = HMPL(classes, **PROFILES["tiny"], text=torch.randn(7, 32))     # text: [K, D] or a module
>>> images = list(torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8))
>>> boxes = {"boxes": torch.tensor([[8., 8., 40., 30.]]), "labels": torch.tensor([1])}
>>> masks = {"semantic": torch.randint(0, 3, (96, 160), dtype=torch.uint8)}
>>> losses = model(images, [boxes, masks])                     # {"detection_class": ..., ...}
>>> sum(losses.values()).backward()
>>> prediction = model.eval().predict(images)[0]               # boxes, scores, labels, semantic, drivable
>>> prediction["boxes"].shape, prediction["semantic"].shape    # [N, 4], [H, W]
(torch.Size([50, 4]), torch.Size([96, 160]))
"""
import codecs
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_convert, sigmoid_focal_loss

KINDS = {"detection": "boxes", "semantic": "mask", "drivable": "mask"}    # kind of each task
STRIDES = (4, 8, 16, 32)                                                  # of C2..C5 and P2..P5
IGNORE = 255                                                              # in masks: not labelled
HEADS = ("transformer", "conv")                                           # kinds of heads
ADAPTERS = ("fpn", "pre", "post", "pre_scalar", "pre_vector")
NO_OBJECT = 0.1                                                           # weight of queries without a target
PIXELS = {  # mean and standard deviation of RGB 0..255 that pretrained weights expect
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "swav": ((123.675, 116.28, 103.53), (58.14, 57.12, 57.375)),              # SwAV's own release
    "unit": ((0., 0., 0.), (255., 255., 255.)),                               # SimCLR's: 0..1
}
ENCODERS = ("backbone.", "encoder_q.0.", "encoder_q.", "online_net.0.", "encoder.", "")    # prefixes of trained bodies

PROFILES = {  # keyword arguments of HMPL
    "paper": dict(depth=50, width=256, feedforward=2048, size=(1280, 720),
                  proposals=100, stages=6, dynamic_dim=64, pool=7, dense_proposals=False,
                  queries=100, layers=6, memory_level=5, dense_weight=0., dropout=0.1,
                  conv_dim=128, box_dim=1024, anchor_scale=8),
    "tiny": dict(depth=18, width=128, feedforward=512, size=None,
                 proposals=50, stages=2, dynamic_dim=32, pool=4, dense_proposals=True,
                 queries=25, layers=3, memory_level=4, dense_weight=4., dropout=0.,
                 conv_dim=64, box_dim=256, anchor_scale=2),
}


class WeightsError(ValueError):
    """Pretrained weights that do not fit; the message says which tensors and what to do."""


class Features(NamedTuple):
    """What the heads see of a batch of B images."""
    levels: list[Tensor]                      # P2..P5 [B, C, h, w]
    sizes: Tensor                             # [B, 2] float: height and width without padding, in pixels
    padded: bool                              # whether any image is padded
    pixels: tuple | None                      # what a shared PixelDecoder makes of the levels
    shape: tuple[int, int]                    # height and width with padding
    text: Tensor | None                       # class embeddings [K, D]


# ---------------------------------------------------------------------------------------- boxes

def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Moves and scales boxes [..., 4] (xyxy) by deltas [..., 4]; Sparse R-CNN's weights (2, 2, 1, 1)."""
    x, y, w, h = box_convert(boxes, "xyxy", "cxcywh").unbind(-1)
    dx, dy, dw, dh = deltas.unbind(-1)
    dw, dh = (d.clamp(max=math.log(100000 / 16)) for d in (dw, dh))
    moved = torch.stack([x + dx / 2 * w, y + dy / 2 * h, w * dw.exp(), h * dh.exp()], dim=-1)
    return box_convert(moved, "cxcywh", "xyxy")


def area(low: Tensor, high: Tensor) -> Tensor:
    """Areas between corners low and high [..., 2]; 0 where turned inside out. (`prod` would wait for the device in
    backward.)"""
    w, h = (high - low).clamp(min=0).unbind(-1)
    return w * h


def box_area(boxes: Tensor) -> Tensor:
    """Areas of boxes [..., 4]."""
    return area(boxes[..., :2], boxes[..., 2:])


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (arXiv 1902.09630) of boxes [..., 4] with boxes of a shape that broadcasts: a[..., i] with
    b[..., i], no N x N table; finite for boxes without area."""
    inter = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = box_area(a) + box_area(b) - inter
    return inter / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


class Pyramid:
    """P2..P5 [B, C, h, w] as one table of feature vectors, [all cells of all levels and images, C], which
    RoIAlign reads with a single weighted gather.

    torchvision pools level by level, which needs the boxes of each level back from the device, and its
    CPU kernels are slow: this is the same arithmetic (to rounding), without waiting for the device, and
    about thirty times as fast on a CPU.
    """

    def __init__(self, levels: Sequence[Tensor]):
        self.table = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in levels]).float()
        shapes = [x.shape[-2:] for x in levels]
        cells = [len(levels[0]) * h * w for h, w in shapes]
        starts = [sum(cells[:i]) for i in range(len(cells))]
        layout = [(h, w, stride, start) for (h, w), stride, start in zip(shapes, STRIDES, starts)]
        self.layout = torch.tensor(layout).to(self.table.device, non_blocking=True)          # [4, 4] int64

    @torch.no_grad()
    def taps(self, low: Tensor, high: Tensor, length: Tensor, pool: int) -> tuple[Tensor, Tensor]:
        """Cells and weights along one axis: pool bins x (2 samples x 2 neighbours), [B, N, pool, 4].
        low, high [B, N]: the boxes' edges in cells; length [B, N]: of the axis."""
        low, high, length = (v.unsqueeze(-1) for v in (low, high, length))
        steps = (torch.arange(2 * pool, device=low.device) + 0.5) / (2 * pool)
        at = low + (high - low) * steps - 0.5                                     # [B, N, 2 pool]
        inside = (at >= -1) & (at <= length)                                      # beyond: zero
        at = at.nan_to_num().clamp(min=0).minimum(length - 1)
        cell = at.floor()
        share = at - cell
        cells = torch.stack([cell, (cell + 1).minimum(length - 1)], dim=-1).long()
        weights = torch.stack([1 - share, share], dim=-1) * inside.unsqueeze(-1) / 2
        return cells.unflatten(2, (pool, 2)).flatten(-2), weights.unflatten(2, (pool, 2)).flatten(-2)

    def roi_align(self, boxes: Tensor, pool: int = 7) -> Tensor:
        """RoIAlign (Mask R-CNN, arXiv 1703.06870; 2 x 2 samples a bin, aligned) of boxes [B, N, 4] in image
        pixels, each on the level that fits it (FPN, arXiv 1612.03144: 224 pixels -> P4).
        Returns [B, N, pool * pool, C] float32."""
        with torch.no_grad():
            boxes = boxes.float()
            side = box_area(boxes).sqrt()                                                         # [B, N]
            level = (4 + torch.log2(side / 224 + 1e-8)).floor().nan_to_num().clamp(2, 5).long() - 2
            h, w, stride, start = self.layout[level].unbind(-1)
            x1, y1, x2, y2 = (boxes / stride.unsqueeze(-1)).unbind(-1)
            rows, row_weights = self.taps(y1, y2, h, pool)
            columns, column_weights = self.taps(x1, x2, w, pool)
            start = start + torch.arange(len(boxes), device=boxes.device).unsqueeze(1) * h * w
            rows = start[..., None, None] + rows * w[..., None, None]
            index = rows[:, :, :, None, :, None] + columns[:, :, None, :, None]   # [B, N, pool, pool, 4, 4]
            weights = row_weights[:, :, :, None, :, None] * column_weights[:, :, None, :, None]
        bins = F.embedding_bag(index.view(-1, 16), self.table, mode="sum",
                               per_sample_weights=weights.view(-1, 16))
        return bins.view(*boxes.shape[:2], pool * pool, bins.shape[-1])


# -------------------------------------------------------------------------- matching and losses

def average_over_ranks(count: Tensor) -> Tensor:
    """Mean of counts over all processes, at least 1: the losses' normalisers."""
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1)


@torch.no_grad()
def match(cost: Tensor, present: Tensor) -> Tensor:
    """Hungarian matching of every image and every stage, with one copy from the device.

    cost [S, B, Q, M]: of giving target m to query q; any value, NaN and infinity count as very bad.
    present [B, M]: which targets exist, the others are padding.
    Returns int64 [S, B, M] on the CPU: the query of each target, -1 for padding and for targets beyond Q.
    """
    cost = cost.float().nan_to_num(1e6, 1e6, -1e6).clamp(-1e6, 1e6)
    cost = cost.masked_fill(~present[:, None, :], math.inf).cpu().numpy()         # the copy
    query_of = torch.full((cost.shape[0], *present.shape), -1)
    for stage, problems in enumerate(cost):
        for image, problem in enumerate(problems):                                # [Q, M]
            targets = (problem[0] < math.inf).nonzero()[0]
            rows, columns = linear_sum_assignment(problem[:, targets])
            query_of[stage, image, targets[columns]] = torch.from_numpy(rows)
    return query_of


def pick(queries: Tensor, query_of: Tensor) -> Tensor:
    """The queries [S, B, Q, C] of each target, [S, B, M, C]; for padding (-1), query 0."""
    index = query_of.clamp(min=0).unsqueeze(-1)
    return queries.gather(2, index.expand(*index.shape[:3], queries.shape[-1]))


def stacked(outputs: dict, name: str) -> Tensor:
    """One output of all stages in float32, [S, B, ...], the last stage last."""
    return torch.stack([*(aux[name] for aux in outputs["aux_outputs"]), outputs[name]]).float()


def labelled(targets: Sequence[dict], key: str, device) -> tuple[list[dict], Tensor | slice]:
    """The targets that have `key`, and the rows of the batch they are."""
    rows = [i for i, target in enumerate(targets) if key in target]
    if len(rows) == len(targets):
        return list(targets), slice(None)                                         # no copy of the outputs
    return [targets[i] for i in rows], torch.tensor(rows).to(device, non_blocking=True)


def connected_zeros(used: Iterable[Tensor], names: Sequence[str], counts: int) -> dict[str, Tensor]:
    """Losses of a task that no image of the batch is labelled for: zeros that touch all that is `used`, so that
    each process of a distributed run has the same graph; it also joins the others in averaging `counts`."""
    zero = sum(value.sum(dtype=torch.float32) for value in used) * 0
    average_over_ranks(torch.zeros(counts, device=zero.device))
    return {name: zero for name in names}


def tensors_of(outputs: dict) -> list[Tensor]:
    """All outputs of a head, of every stage."""
    return [value for output in (outputs, *outputs["aux_outputs"]) for value in output.values()
            if isinstance(value, Tensor)]


def focal_class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.) -> Tensor:
    """Cost of classes for matching: focal loss of the class being there minus of it being absent.
    logits [S, B, Q, K], labels [B, M] -> [S, B, Q, M]."""
    p = logits.sigmoid()
    there = alpha * (1 - p) ** gamma * -F.logsigmoid(logits)
    absent = (1 - alpha) * p ** gamma * -F.logsigmoid(-logits)
    index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
    return (there - absent).gather(3, index)


def pad_boxes(targets: Sequence[dict], device) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [B, M, 4], labels [B, M] and presence [B, M] of B images, padded to the largest count M.
    Crowd regions are not targets (BDD100K's ignored boxes)."""
    boxes, labels, present = [], [], []
    for target in targets:
        box = target["boxes"].to(device, torch.float32, non_blocking=True).reshape(-1, 4)
        crowd = target.get("crowd", torch.zeros(len(box), dtype=torch.bool))
        boxes.append(box)
        labels.append(target["labels"].to(device, non_blocking=True))
        present.append(~crowd.to(device, non_blocking=True))
    return tuple(nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (boxes, labels, present))


def box_losses(outputs: dict, targets: Sequence[dict], sizes: Tensor) -> dict[str, Tensor]:
    """Sparse R-CNN's losses, matched and summed over all stages (weights 2, 5, 2).

    outputs: pred_logits [B, N, K], pred_boxes [B, N, 4] (xyxy pixels), aux_outputs. targets: of the B
    images, labelled or not. sizes [B, 2]: height and width of the images without padding.
    """
    names = ("detection_class", "detection_l1", "detection_giou")
    targets, rows = labelled(targets, "boxes", sizes.device)
    if not targets:
        return connected_zeros(tensors_of(outputs), names, counts=1)
    with torch.autocast(sizes.device.type, enabled=False):
        logits, boxes = (stacked(outputs, name)[:, rows] for name in ("pred_logits", "pred_boxes"))
        true_boxes, labels, present = pad_boxes(targets, boxes.device)
        scale = sizes[rows].flip(1).repeat(1, 2)[:, None]                         # [B, 1, 4]: w, h, w, h
        query_of = match(box_cost(logits, boxes, true_boxes, labels, scale), present).to(boxes.device, non_blocking=True)
        weight = (query_of >= 0).float()                                          # [S, B, M]
        hits = torch.zeros_like(logits).flatten(2)                                # [S, B, N * K]
        hits.scatter_add_(2, query_of.clamp(min=0) * logits.shape[-1] + labels, weight)
        matched = pick(boxes, query_of)                                           # [S, B, M, 4]
        l1 = F.l1_loss(matched / scale, (true_boxes / scale).expand_as(matched), reduction="none").sum(-1)
        giou = 1 - paired_giou(matched, true_boxes)
        sums = (sigmoid_focal_loss(logits.flatten(2), hits, reduction="sum") * 2,
                (l1 * weight).sum() * 5, (giou * weight).sum() * 2)
        count = average_over_ranks(present.sum().float())
        return {name: value / count for name, value in zip(names, sums)}


@torch.no_grad()
def box_cost(logits: Tensor, boxes: Tensor, true_boxes: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """2 focal class + 5 L1 (of boxes divided by the image's size) - 2 GIoU, [S, B, N, M]."""
    giou = paired_giou(boxes.unsqueeze(3), true_boxes[None, :, None])             # [S, B, N, M]
    l1 = torch.cdist(boxes / scale, (true_boxes / scale).expand(len(boxes), -1, -1, -1), p=1)
    return 2 * focal_class_cost(logits, labels) + 5 * l1 - 2 * giou


def pad_maps(labels: Sequence[Tensor], height: int, width: int, device) -> Tensor:
    """uint8 maps [H, W] of any sizes in one [B, height, width], 255 beyond them."""
    maps = torch.full((len(labels), height, width), IGNORE, dtype=torch.uint8, device=device)
    for row, label in zip(maps, labels):
        row[:label.shape[0], :label.shape[1]] = label.to(device, non_blocking=True)
    return maps


def mask_targets(labels: Sequence[Tensor], num_classes: int, size: tuple[int, int], device,
                 stride: int = 4) -> tuple[Tensor, Tensor]:
    """Class maps at a stride: how much of each cell of stride x stride pixels is of each class.

    labels: B uint8 maps [H, W] with ids below num_classes or 255. Returns the classes' shares of the
    cells' labelled pixels [B, K, h, w] and the labelled share of each cell [B, h, w]; cells of padding
    and of ignored pixels have share 0 and so no part in any loss.
    """
    maps = pad_maps(labels, size[0] * stride, size[1] * stride, device)
    cells = maps.clamp(max=num_classes).unflatten(1, (-1, stride)).unflatten(3, (-1, stride))    # [B, h, stride, w, stride]
    cells = cells.permute(0, 2, 4, 1, 3).flatten(1, 2).long()                          # [B, stride ** 2, h, w]
    counts = torch.zeros(len(labels), num_classes + 1, *size, device=device)
    counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.float32))
    valid = stride ** 2 - counts[:, num_classes]
    return counts[:, :num_classes] / valid.clamp(min=1).unsqueeze(1), valid / stride ** 2


@torch.no_grad()
def mask_cost(logits: Tensor, masks: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """MaskFormer's matching cost of one stage: 1 class + 20 focal + 1 dice, over valid pixels.

    logits [B, Q, K + 1], masks [B, Q, h, w] (logits), target [B, K, h, w], valid [B, h, w] -> [B, Q, K].
    """
    x, valid = masks.flatten(2), valid.flatten(1).unsqueeze(2)                    # [B, Q, P], [B, P, 1]
    pixels = torch.cat([target.flatten(2).transpose(1, 2) * valid, valid], dim=2)    # [B, P, K + 1]: each class's, all
    p = x.sigmoid().clamp_(min=1e-38)                                             # above 0: log p stays finite
    log_p = p.log()                                                               # log(1 - p) = log_p - x
    there = (1 - p).square_().mul_(log_p) @ pixels                                # in place: memory is what takes time
    absent = log_p.sub_(x).mul_(p).mul_(p) @ pixels
    area, sizes = p @ pixels, pixels.sum(1, keepdim=True)                         # [B, Q, K + 1], [B, 1, K + 1]
    focal = 0.75 * (absent[..., :-1] - absent[..., -1:]) - 0.25 * there[..., :-1]
    dice = 1 - (2 * area[..., :-1] + 1) / (area[..., -1:] + sizes[..., :-1] + 1)
    return 20 * focal / sizes[..., -1:].clamp(min=1) + dice - logits.softmax(-1)[..., :-1]


def mask_losses(masks: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of each mask over its image's valid pixels.
    masks [S, B, M, h, w] (logits), target [B, M, h, w], valid [B, h, w] -> two [S, B, M]."""
    valid = valid.unsqueeze(1)                                                    # [B, 1, h, w]
    focal = sigmoid_focal_loss(masks, target.expand_as(masks), reduction="none") * valid
    focal = focal.sum((-2, -1)) / valid.sum((-2, -1)).clamp(min=1)
    p = masks.sigmoid() * valid
    t = target * valid
    dice = 1 - (2 * (p * target).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + t.sum((-2, -1)) + 1)
    return focal, dice


def map_losses(task: str, outputs: dict, targets: Sequence[dict]) -> dict[str, Tensor]:
    """MaskFormer's losses for a task of kind mask, matched and summed over all decoder layers.

    outputs: pred_logits [B, Q, K + 1], mask_embed [B, Q, C], mask_features [B, C, h, w], aux_outputs.
    One target mask for each class present. Masks are formed for all queries only to match them, without
    a graph; the losses see those of `matched_classes`.
    """
    names = (f"{task}_class", f"{task}_focal", f"{task}_dice")
    features = outputs["mask_features"]
    targets, rows = labelled(targets, task, features.device)
    if not targets:
        return connected_zeros(tensors_of(outputs), names, counts=2)
    with torch.autocast(features.device.type, enabled=False):
        logits, embed = (stacked(outputs, name)[:, rows] for name in ("pred_logits", "mask_embed"))
        features, (num_queries, num_classes) = features[rows].float(), (logits.shape[2], logits.shape[3] - 1)
        target, valid = mask_targets([target[task] for target in targets], num_classes, features.shape[-2:],
                                     features.device)
        present = target.flatten(2).amax(2) > 0                                   # [B, K]
        with torch.no_grad():
            cost = torch.stack([mask_cost(l, torch.einsum("bqc,bchw->bqhw", e, features), target, valid)
                                for l, e in zip(logits, embed)])                  # [S, B, Q, K]
        classes, query_of = (x.to(features.device, non_blocking=True) for x in matched_classes(match(cost, present)))
        weight = (query_of >= 0).float()                                          # [S, B, M]
        target = target.gather(1, classes[..., None, None].expand(-1, -1, *target.shape[2:]))    # [B, M, h, w]
        masks = torch.einsum("sbmc,bchw->sbmhw", pick(embed, query_of), features)
        focal, dice = mask_losses(masks, target, valid)
        spare = num_queries * len(targets) - weight[0].sum()                      # queries without a target
        counts = torch.stack([present.sum(), weight[0].sum() + NO_OBJECT * spare])
        masks_count, queries_count = average_over_ranks(counts)
        values = (class_loss(logits, query_of, classes) / queries_count, 20 * (focal * weight).sum() / masks_count,
                  (dice * weight).sum() / masks_count)
        return dict(zip(names, values))


def matched_classes(query_of: Tensor) -> tuple[Tensor, Tensor]:
    """The classes that queries are matched with, so that the others, half of BDD100K's in an image, cost no masks.
    query_of [S, B, K] -> classes [B, M], where M is the largest number in an image, and their query_of [S, B, M]."""
    matched = (query_of >= 0).any(0)                                              # [B, K]
    most = max(1, int(matched.sum(1).max()))
    classes = matched.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return classes, query_of.gather(2, classes.expand(len(query_of), -1, -1))


def class_loss(logits: Tensor, query_of: Tensor, classes: Tensor) -> Tensor:
    """Summed cross-entropy of all queries, those without a target towards "no object" with weight NO_OBJECT.
    logits [S, B, Q, K + 1], query_of [S, B, M]: the query of each of classes [B, M], -1 = of none."""
    stages, batch, num_queries, num_classes = *logits.shape[:3], logits.shape[3] - 1
    labels = torch.full((stages, batch, num_queries + 1), num_classes, device=logits.device)
    spare = query_of.where(query_of >= 0, num_queries)                            # absent classes write here
    labels.scatter_(2, spare, classes.expand_as(query_of))
    weight = torch.ones(num_classes + 1, device=logits.device)
    weight[-1] = NO_OBJECT
    return F.cross_entropy(logits.flatten(0, 2), labels[:, :, :-1].flatten(), weight, reduction="sum")


def cell_loss(task: str, logits: Tensor, targets: Sequence[dict], stride: int) -> Tensor:
    """Mean cross-entropy of cells with the classes' shares of each. logits [B, K, h, w] at a stride, targets of the B
    images, labelled or not."""
    targets, rows = labelled(targets, task, logits.device)
    if not targets:
        return connected_zeros([logits], (task,), counts=1)[task]
    with torch.autocast(logits.device.type, enabled=False):
        labels = [target[task] for target in targets]
        shares, valid = mask_targets(labels, logits.shape[1], logits.shape[-2:], logits.device, stride)
        loss = -(shares * logits[rows].float().log_softmax(1)).sum(1) * valid                    # [B, h, w]
        return loss.sum() / average_over_ranks(valid.sum())


# ----------------------------------------------------------------------------------------- body

class ResNetBody(nn.Module):
    """torchvision's ResNet of the given depth without its classifier; images -> [C2, C3, C4, C5]."""

    def __init__(self, depth: int = 50):
        super().__init__()
        if depth not in (18, 34, 50, 101):
            raise ValueError(f"depth {depth} is not a ResNet body that exists: choose 18, 34, 50 or 101.")
        net = getattr(torchvision.models, f"resnet{depth}")()
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(net, name))
        self.channels = [c * (4 if depth >= 50 else 1) for c in (64, 128, 256, 512)]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        levels = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            levels.append(x)
        return levels


def load_body(body: ResNetBody, path: str | Path) -> tuple[str, str]:
    """Fills the body from a file of pretrained weights; `read_weights` and `online_encoder` know many forms.

    Returns a report of what matched, and the key of PIXELS that these weights expect. Raises WeightsError unless every
    convolution and BatchNorm tensor is there with its shape.
    """
    wanted = {key: value for key, value in body.state_dict().items() if not key.endswith("num_batches_tracked")}
    state, names, pixels = online_encoder(read_weights(path), list(wanted))
    matched = {key: state[key].float() for key in wanted if key in state and state[key].shape == wanted[key].shape}
    missing = [key for key in wanted if key not in matched]
    unused = [key for key in state if key not in wanted and not key.endswith("num_batches_tracked")]
    report = f"{names}, {len(matched)} of {len(wanted)} tensors matched, {len(missing)} missing, {len(unused)} not used"
    if missing:
        raise WeightsError(f"{path}: {report}; a body needs all of them. Missing or of another shape: "
                           f"{', '.join(missing[:8])}{' ...' * (len(missing) > 8)}.")
    body.load_state_dict(matched, strict=False)
    return report + (f" ({', '.join(unused[:4])})" if unused else ""), pixels


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a file of weights, out of their container (`state_dict`, `model`, `resnet` or none): torch's files
    and detectron2's pickles of numpy arrays. Nothing that a file may hold besides is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"no file {path}: expected pretrained ResNet weights.") from None
    except Exception as refused:  # torch raises many kinds, all meaning: not a plain state dict
        try:
            with open(path, "rb") as file:
                content = ArrayUnpickler(file, encoding="latin1").load()
        except Exception:
            raise WeightsError(f"{path} cannot be read as a state dict ({str(refused).splitlines()[0]}).") from refused
    for container in ("state_dict", "model", "resnet"):
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    state = {key: torch.as_tensor(value) for key, value in content.items()
             if isinstance(value, Tensor | np.ndarray)} if isinstance(content, dict) else {}
    if not state:
        raise WeightsError(f"{path} holds no tensors by name: expected a state dict, or one under state_dict or model.")
    return state


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain Python types; refuses whatever else a pickle names, so that no code runs."""

    allowed = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.zeros(0).__reduce__()[0],
               "scalar": np.float32(0).__reduce__()[0], "OrderedDict": OrderedDict, "encode": codecs.encode}

    def find_class(self, module: str, name: str):
        if module.split(".")[0] in ("numpy", "collections", "_codecs") and name in self.allowed:
            return self.allowed[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def online_encoder(state: dict[str, Tensor], wanted: Sequence[str]) -> tuple[dict[str, Tensor], str, str]:
    """The body's tensors in a state dict, by torchvision's names; what they were called; the key of PIXELS.

    Self-supervised checkpoints hold the trained encoder under one of ENCODERS, often beside its momentum copy
    (encoder_k, target_net), projectors and queues. Known: torchvision, MoCo, SwAV, BYOL, DenseCL, PixPro, SimCLR,
    MMSelfSup 0.x and 1.x, detectron2's names (DetCo), and SimCLR v2's, which are matched by the order of modules.
    """
    while all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("net.0.") for key in state):
        return in_module_order(state, wanted), "SimCLR v2's names", "unit"
    pixels = "swav" if any(key.startswith(("prototypes", "projection_head")) for key in state) else "imagenet"
    parts = {}
    for prefix in ENCODERS:
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        parts[prefix or "no prefix"] = part
        parts[f"{prefix} detectron2's names".strip()] = {torchvision_name(key): value for key, value in part.items()}
    best = max(parts, key=lambda name: len(parts[name].keys() & set(wanted)))       # of equals the first
    return parts[best], best, pixels


def torchvision_name(name: str) -> str:
    """detectron2's name of a ResNet tensor -> torchvision's."""
    name = re.sub(r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}.", name.removeprefix("stem."))
    name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
    return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")


def in_module_order(state: dict[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """Pairs a ResNet's convolutions and BatchNorms with torchvision's names by their order: the stem, then every block's
    projection, where it has one, before its convolutions."""
    convs = [key for key, value in state.items() if value.dim() == 4]
    norms = [key.removesuffix("running_mean") for key in state if key.endswith("running_mean")]
    places = dict.fromkeys((re.sub(r"(conv|bn|downsample\.)\d\.\w+$", "", key) for key in wanted))    # stem and blocks
    named = {}
    for place in places:
        parts = [("downsample.0.", "downsample.1."), *((f"conv{i}.", f"bn{i}.") for i in (1, 2, 3))]
        for conv, norm in parts:
            if place + conv + "weight" in wanted and convs and norms:
                named[place + conv + "weight"], prefix = state[convs.pop(0)], norms.pop(0)
                named |= {place + norm + key: state[prefix + key] for key in
                          ("weight", "bias", "running_mean", "running_var") if prefix + key in state}
    return named


# -------------------------------------------------------------------------------------- adapter

class TwoConvs(nn.Module):
    """Two 3x3 convolutions on a map of C channels, `width` between them. scale: None = instead of the map; "scalar" or
    "vector" = added to it, times a learnable number, or one for each channel, that begins at 0.001."""

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
        return self.convs(x) if self.scale is None else x + self.scale.view(-1, 1, 1) * self.convs(x)


class Adapter(nn.Module):
    """Multi-scale adapter C2..C5 -> P2..P5 of `width` channels: torchvision's FPN, by kind of ADAPTERS with two
    convolutions on each level before it or after it (appendix D.3)."""

    def __init__(self, channels: Sequence[int], width: int, kind: str = "fpn"):
        super().__init__()
        if kind not in ADAPTERS:
            raise ValueError(f"adapter {kind!r} was given, expected one of {', '.join(ADAPTERS)}.")
        where, _, scale = kind.partition("_")
        self.before = nn.ModuleList(TwoConvs(c, width, scale) for c in channels) if where == "pre" else None
        self.fpn = FeaturePyramidNetwork(channels, width)
        self.after = nn.ModuleList(TwoConvs(width, width) for _ in channels) if where == "post" else None

    def forward(self, levels: Sequence[Tensor], language: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """language: what becomes of C5's lateral map [B, width, h, w] before the top-down path starts from it."""
        if self.before is not None:
            levels = [adapt(level) for adapt, level in zip(self.before, levels)]
        inner = self.fpn.inner_blocks[3]
        with inner.register_forward_hook(lambda module, x, top: language(top)) if language else nullcontext():
            levels = list(self.fpn({str(i): level for i, level in enumerate(levels, start=2)}).values())
        return levels if self.after is None else [adapt(level) for adapt, level in zip(self.after, levels)]


# --------------------------------------------------------------------------------- transformer

def sine_positions(sizes: Tensor, shape: tuple[int, int], width: int) -> Tensor:
    """2-D sine positions (DETR, arXiv 2005.12872) normalised by each image's own extent.
    sizes [B, 2]: rows and columns of the map that are image. Returns [B, h * w, width]."""
    frequency = 10000 ** (torch.arange(0, width // 2, 2, device=sizes.device) / (width // 2))
    axes = []
    for length, extent in zip(shape, sizes.unbind(1)):
        steps = torch.arange(1, length + 1, device=sizes.device) / extent[:, None]  # [B, length]
        angle = steps[..., None] * 2 * math.pi / frequency                        # [B, length, width / 4]
        axes.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2))  # [B, length, width / 2]
    y, x = axes
    y, x = y[:, :, None].expand(-1, -1, shape[1], -1), x[:, None].expand(-1, shape[0], -1, -1)
    return torch.cat([y, x], dim=-1).flatten(1, 2)


def padding_mask(sizes: Tensor, shape: tuple[int, int]) -> Tensor:
    """True where a map [h, w] is padding, [B, h * w]; sizes [B, 2] as in `sine_positions`."""
    rows, columns = (torch.arange(n, device=sizes.device) for n in shape)
    below, right = rows[None, :, None] >= sizes[:, :1, None], columns[None, None] >= sizes[:, 1:, None]
    return (below | right).flatten(1)


class DecoderLayer(nn.Module):
    """Post-norm transformer decoder layer; positions are added to queries and keys, not to values."""

    def __init__(self, width: int, heads: int = 8, feedforward: int = 2048, dropout: float = 0.1):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.ReLU(inplace=True), nn.Dropout(dropout),
                                         nn.Linear(feedforward, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, x_pos=0, memory_pos=0, x_padding=None,
                memory_padding=None) -> Tensor:
        """x [B, Q, C] attends to itself and to memory [B, L, C]; paddings are bool, True = not there."""
        q = x + x_pos
        attended = self.self_attn(q, q, x, key_padding_mask=x_padding, need_weights=False)[0]
        x = self.norm1(x + self.dropout(attended))
        attended = self.cross_attn(x + x_pos, memory + memory_pos, memory, key_padding_mask=memory_padding,
                                   need_weights=False)[0]
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.dropout(self.feedforward(x)))


def init_transformer(module: nn.Module) -> None:
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)


class LVAdapter(nn.Module):
    """Language-to-Vision adapter: the top map P5 reads the class embeddings and is replaced.

    A(T, z5) = TransDecoder(q = z5, k = v = Linear(T)); residual and LayerNorm are the decoder layer's.
    """

    def __init__(self, width: int, text_dim: int, feedforward: int = 2048, dropout: float = 0.1):
        super().__init__()
        self.text_proj = nn.Linear(text_dim, width)
        self.decoder = DecoderLayer(width, feedforward=feedforward, dropout=dropout)
        init_transformer(self)

    def forward(self, p5: Tensor, text: Tensor, sizes: Tensor, padded: bool = False) -> Tensor:
        """p5 [B, C, h, w], text [K, D], sizes [B, 2] of the images at this stride -> [B, C, h, w]."""
        shape = p5.shape[-2:]
        text = self.text_proj(text).expand(len(p5), -1, -1)                       # [B, K, C]
        z5 = self.decoder(p5.flatten(2).transpose(1, 2), text, x_pos=sine_positions(sizes, shape, p5.shape[1]),
                          x_padding=padding_mask(sizes, shape) if padded else None)
        return z5.transpose(1, 2).unflatten(2, shape)


# -------------------------------------------------------------------------------- Sparse R-CNN

class DynamicConv(nn.Module):
    """Each proposal's feature makes the two 1x1 convolutions that read its own RoI."""

    def __init__(self, width: int, dim: int = 64, pool: int = 7):
        super().__init__()
        self.dim = dim
        self.parameters_of = nn.Linear(width, 2 * width * dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(width), nn.LayerNorm(width)
        self.out = nn.Linear(width * pool * pool, width)

    def forward(self, proposals: Tensor, rois: Tensor) -> Tensor:
        """proposals [B, N, C], where B may be 1 if all images share them, and rois [B, N, bins, C] -> [B, N, C]."""
        first, second = self.parameters_of(proposals).chunk(2, dim=-1)
        x = F.relu(self.norm1(rois @ first.unflatten(-1, (-1, self.dim))))        # [B, N, bins, dim]
        x = F.relu(self.norm2(x @ second.unflatten(-1, (self.dim, -1))))          # [B, N, bins, C]
        return F.relu(self.norm3(self.out(x.flatten(2))))


def branch(width: int, depth: int) -> nn.Sequential:
    layers = [(nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU(inplace=True)) for _ in range(depth)]
    return nn.Sequential(*(module for layer in layers for module in layer))


class ProposalStage(nn.Module):
    """One of Sparse R-CNN's cascaded stages: proposals talk, read their RoIs, move their boxes."""

    def __init__(self, num_classes: int, width: int, heads: int = 8, feedforward: int = 2048,
                 dynamic_dim: int = 64, pool: int = 7):
        super().__init__()
        self.pool = pool
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.dynamic_conv = DynamicConv(width, dynamic_dim, pool)
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.ReLU(inplace=True),
                                         nn.Linear(feedforward, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

        self.class_branch, self.box_branch = branch(width, 1), branch(width, 3)
        self.class_logits = nn.Linear(width, num_classes)
        self.box_deltas = nn.Linear(width, 4)

    def forward(self, pyramid: Pyramid, boxes: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pyramid of P2..P5, boxes [B, N, 4], proposals [B, N, C] (B may be 1 if all images share them) ->
        logits [B, N, K], boxes, proposals."""
        x = self.norm1(proposals + self.self_attn(proposals, proposals, proposals, need_weights=False)[0])
        x = self.norm2(x + self.dynamic_conv(x, pyramid.roi_align(boxes, self.pool)))       # [B, N, C]
        x = self.norm3(x + self.feedforward(x))
        boxes = apply_deltas(boxes, self.box_deltas(self.box_branch(x)).float())
        return self.class_logits(self.class_branch(x)), boxes, x


def set_prior(classifier: nn.Linear | nn.Conv2d, prior: float) -> None:
    """Every class begins with probability `prior` (focal loss, arXiv 1708.02002)."""
    nn.init.constant_(classifier.bias, -math.log((1 - prior) / prior))


class DenseProposals(nn.Module):
    """Proposals from the image: every cell of P2..P5 predicts classes, a box and a feature; the N cells of the highest
    scores become the proposals, as in Featurized Query R-CNN (arXiv 2206.06258). It learns by the same Hungarian
    losses as the stages, so that one cell speaks for an object and no NMS is needed."""

    side = 3                                                                      # of a cell's first box, in strides

    def __init__(self, num_classes: int, width: int, proposals: int, prior: float):
        super().__init__()
        self.proposals = proposals
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.class_logits, self.box_deltas = nn.Conv2d(width, num_classes, 1), nn.Conv2d(width, 4, 1)
        self.feature = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        set_prior(self.class_logits, prior)
        nn.init.zeros_(self.box_deltas.weight)
        nn.init.zeros_(self.box_deltas.bias)

    def forward(self, levels: Sequence[Tensor], sizes: Tensor) -> tuple[dict, Tensor, Tensor]:
        """levels P2..P5, sizes [B, 2] -> what all L cells predict (pred_logits [B, L, K], pred_boxes [B, L, 4]), and the
        best cells' boxes [B, N, 4] and features [B, N, C]; N is less where there are fewer cells."""
        maps = [F.relu(self.conv(level)) for level in levels]
        features, logits, deltas = (
            torch.cat([predict(x).flatten(2) for x in maps], dim=2).transpose(1, 2)
            for predict in (nn.Identity(), self.class_logits, self.box_deltas))
        anchors = torch.cat([self.anchors(*x.shape[-2:], stride, x.device) for x, stride in zip(maps, STRIDES)])
        boxes = apply_deltas(anchors, deltas.float())
        padding = (anchors[:, 2:] + anchors[:, :2]).flip(1) / 2 >= sizes[:, None]   # [B, L, 2]: y, x of the centres
        logits = logits.float().masked_fill(padding.any(-1, keepdim=True), -1e4)
        best = logits.detach().amax(-1).topk(min(self.proposals, logits.shape[1]), dim=1).indices[..., None]
        chosen = features.gather(1, best.expand(-1, -1, features.shape[-1]))
        outputs = {"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}
        return outputs, boxes.detach().gather(1, best.expand(-1, -1, 4)), self.feature(chosen)

    def anchors(self, rows: int, columns: int, stride: int, device) -> Tensor:
        """Boxes around a map's cells, row by row, xyxy in pixels [rows * columns, 4]."""
        y, x = ((torch.arange(n, device=device) + 0.5) * stride for n in (rows, columns))
        centres = torch.cartesian_prod(y, x).flip(1)
        return torch.cat([centres - self.side * stride / 2, centres + self.side * stride / 2], dim=1)


class SparseRCNN(nn.Module):
    """Sparse R-CNN head: N proposals refined over S stages, no anchors, no NMS.

    dense_proposals: False: as in the original every proposal has a learned feature and a learned box, which begins as
        large as the image. True: the proposals come from the image (`DenseProposals`), which learns much faster.
    pool: bins of a RoI along each axis.
    """

    def __init__(self, num_classes: int, width: int = 256, *, proposals: int = 100, stages: int = 6,
                 feedforward: int = 2048, dynamic_dim: int = 64, pool: int = 7, dense_proposals: bool = False,
                 prior: float = 0.01):
        super().__init__()
        self.stages = nn.ModuleList(ProposalStage(num_classes, width, feedforward=feedforward, dynamic_dim=dynamic_dim,
                                                  pool=pool) for _ in range(stages))
        init_transformer(self.stages)
        for stage in self.stages:
            set_prior(stage.class_logits, prior)
            nn.init.zeros_(stage.box_deltas.weight)      # boxes begin where the proposals are, in every stage
            nn.init.zeros_(stage.box_deltas.bias)
        self.dense = DenseProposals(num_classes, width, proposals, prior) if dense_proposals else None
        if not dense_proposals:
            self.proposal_features = nn.Parameter(torch.randn(proposals, width))
            self.proposal_boxes = nn.Parameter(torch.tensor([[0.5, 0.5, 1., 1.]]).repeat(proposals, 1))   # cxcywh, shares

    def forward(self, levels: Sequence[Tensor], sizes: Tensor) -> dict:
        """levels P2..P5, sizes [B, 2] of the images in pixels -> pred_logits [B, N, K], pred_boxes
        [B, N, 4] (xyxy pixels) of the last stage, and aux_outputs, a list of the same of the others;
        dense_outputs of `DenseProposals`, if there is one."""
        if self.dense is not None:
            dense, boxes, proposals = self.dense(levels, sizes)
        else:
            scale = sizes.flip(1).repeat(1, 2)[:, None]                           # [B, 1, 4]: w, h, w, h
            boxes = box_convert(self.proposal_boxes, "cxcywh", "xyxy") * scale    # [B, N, 4]
            dense, proposals = None, self.proposal_features[None]         # [1, N, C]: the same for all images so far
        pyramid, outputs = Pyramid(levels), []
        for stage in self.stages:
            logits, boxes, proposals = stage(pyramid, boxes, proposals)
            outputs.append({"pred_logits": logits, "pred_boxes": boxes})
            boxes = boxes.detach()
        return outputs[-1] | {"aux_outputs": outputs[:-1], "dense_outputs": dense}

    def losses(self, task: str, features: Features, targets: Sequence[dict]) -> dict[str, Tensor]:
        outputs = self(features.levels, features.sizes)
        losses = box_losses(outputs, targets, features.sizes)
        if outputs["dense_outputs"]:
            for name, value in box_losses(outputs["dense_outputs"], targets, features.sizes).items():
                losses[name] = losses[name] + value
        return losses

    def predict(self, task: str, features: Features, shape: tuple[int, int], confidence: float = 0.) -> list[dict]:
        return top_boxes(self(features.levels, features.sizes), features.sizes, shape)


# ---------------------------------------------------------------------------------- MaskFormer

def conv_norm(c_in: int, c_out: int, kernel: int, relu: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.GroupNorm(32, c_out), *([nn.ReLU(inplace=True)] if relu else []))


class PixelDecoder(nn.Module):
    """MaskFormer's pixel decoder on P2..P5: a second top-down pass, with GroupNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.lateral = nn.ModuleList(conv_norm(width, width, 1, relu=False) for _ in range(3))
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
    """MaskFormer head: Q queries, each a class and a mask, decoded over `layers` layers.

    memory_level: 5 = the queries attend to P5, as in the original; 4 = to the pixel decoder's map at
        stride 16, for small images, whose P5 is only a few cells.
    own_pixels: False = the head is given what a pixel decoder, shared with others, makes of P2..P5.
    dense_weight: of an auxiliary loss, in training alone: the pixel decoder's cells at stride 4 are classified too
        (as PSPNet's auxiliary branch does, arXiv 1612.01105), so that they need not wait for the queries to learn.
    """

    def __init__(self, num_classes: int, width: int = 256, *, queries: int = 100, layers: int = 6,
                 feedforward: int = 2048, memory_level: int = 5, dropout: float = 0.1, own_pixels: bool = True,
                 dense_weight: float = 0.):
        super().__init__()
        self.memory_level, self.dense_weight = memory_level, dense_weight
        self.dense_logits = nn.Conv2d(width, num_classes, 1) if dense_weight else None
        self.pixel_decoder = PixelDecoder(width) if own_pixels else None
        self.layers = nn.ModuleList(DecoderLayer(width, feedforward=feedforward, dropout=dropout)
                                    for _ in range(layers))
        init_transformer(self.layers)
        self.norm = nn.LayerNorm(width)
        self.query_embed = nn.Parameter(torch.randn(queries, width))
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.mask_embed = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width),
                                        nn.ReLU(inplace=True), nn.Linear(width, width))

    def forward(self, levels: Sequence[Tensor], sizes: Tensor, padded: bool = False, pixels: tuple | None = None) -> dict:
        """levels P2..P5, sizes [B, 2] in pixels -> pred_logits [B, Q, K + 1] (last: no object) and
        mask_embed [B, Q, C] of the last layer, aux_outputs of the others, mask_features [B, C, h, w].
        `pred_masks` forms the masks. pixels: a shared PixelDecoder's result."""
        features, maps = pixels or self.pixel_decoder(levels)
        memory, stride = (levels[3], 32) if self.memory_level == 5 else (maps[2], 16)
        shape, sizes = memory.shape[-2:], (sizes / stride).ceil()
        memory_pos = sine_positions(sizes, shape, memory.shape[1])
        padding = padding_mask(sizes, shape) if padded else None
        memory = memory.flatten(2).transpose(1, 2)                                # [B, h * w, C]
        x = torch.zeros_like(self.query_embed).expand(len(memory), -1, -1)        # [B, Q, C]
        outputs = []
        for layer in self.layers:
            x = layer(x, memory, self.query_embed, memory_pos, memory_padding=padding)
            y = self.norm(x)
            outputs.append({"pred_logits": self.class_logits(y), "mask_embed": self.mask_embed(y)})
        return outputs[-1] | {"aux_outputs": outputs[:-1], "mask_features": features}

    def losses(self, task: str, features: Features, targets: Sequence[dict]) -> dict[str, Tensor]:
        pixels = features.pixels or self.pixel_decoder(features.levels)
        losses = map_losses(task, self(features.levels, features.sizes, features.padded, pixels), targets)
        if self.dense_logits is not None:
            losses[f"{task}_dense"] = self.dense_weight * cell_loss(task, self.dense_logits(pixels[1][0]), targets, 4)
        return losses

    def predict(self, task: str, features: Features, shape: tuple[int, int], confidence: float = 0.) -> list[dict]:
        outputs = self(features.levels, features.sizes, features.padded, features.pixels)
        return [{task: class_map(scores, features.shape, shape, confidence)} for scores in class_scores(outputs)]


def pred_masks(outputs: dict) -> Tensor:
    """Mask logits of every query, [B, Q, h, w] at stride 4."""
    return torch.einsum("bqc,bchw->bqhw", outputs["mask_embed"], outputs["mask_features"])


def class_scores(outputs: dict) -> Tensor:
    """MaskFormer's semantic inference, sum over queries of class probability x mask, [B, K, h, w]; at stride 4,
    where the original first enlarges the Q masks: K maps are then left to enlarge, for nearly the same result."""
    with torch.autocast(outputs["mask_features"].device.type, enabled=False):     # ties and thresholds need float32
        masks = pred_masks({key: outputs[key].float() for key in ("mask_embed", "mask_features")}).sigmoid()
        return torch.einsum("bqk,bqhw->bkhw", outputs["pred_logits"].float().softmax(-1)[..., :-1], masks)


# -------------------------------------------------------------------------- convolutional heads

class Anchors(AnchorGenerator):
    """torchvision's anchors in three shapes on each of P2..P6, at the levels' own strides: torchvision divides the
    images' size by the map's, which is wrong for sizes that are no multiple of 64."""

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, maps[0].device)
        strides = [(stride, stride) for stride in (*STRIDES, 64)]
        return [torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], strides))] * len(images.image_sizes)


class BoxPool(nn.Module):
    """`Pyramid.roi_align` for torchvision's RoIHeads: boxes [n, 4] of each image -> [all n, 49, C]."""

    def forward(self, levels: dict[str, Tensor], boxes: list[Tensor], shapes) -> Tensor:
        counts = [len(own) for own in boxes]
        rois = Pyramid(list(levels.values())).roi_align(nn.utils.rnn.pad_sequence(boxes, batch_first=True))
        return torch.cat([own[:count] for own, count in zip(rois, counts)])


class RPNMaps(RPNHead):
    """Objectness and box deltas in float32, also under autocast: boxes need its precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([y.float() for y in maps] for maps in super().forward(x))


class BoxPredictor(FastRCNNPredictor):
    """Class logits and box deltas in float32, also under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(y.float() for y in super().forward(x))


class FasterRCNN(nn.Module):
    """Faster R-CNN head (arXiv 1506.01497) with FPN (arXiv 1612.03144): torchvision's RPN and RoI heads on P2..P6.

    box_dim: width of the two fully connected layers. anchor_scale: side of the anchors in cells of their level.
    Boxes are learned by torchvision's smooth L1 (beta 1/9), close to the L1 of other implementations.
    """

    def __init__(self, num_classes: int, width: int = 256, *, box_dim: int = 1024, anchor_scale: int = 8):
        super().__init__()
        anchors = Anchors(tuple((anchor_scale * stride,) for stride in (*STRIDES, 64)), ((0.5, 1., 2.),) * 5)
        self.rpn = RegionProposalNetwork(anchors, RPNMaps(width, 3), 0.7, 0.3, 256, 0.5,
                                         {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}, 0.7)
        self.roi_heads = RoIHeads(BoxPool(), TwoMLPHead(width * 49, box_dim), BoxPredictor(box_dim, num_classes + 1),
                                  0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100)

    def forward(self, levels: Sequence[Tensor], sizes: Tensor, targets: list[dict] | None = None) -> tuple[list[dict], dict]:
        """levels P2..P5, sizes [B, 2] in pixels -> in eval mode the boxes of each image, in training mode, where targets
        (boxes, labels from 1 on) are needed, the losses by torchvision's names."""
        shapes = [(int(h), int(w)) for h, w in sizes.tolist()]
        maps = {str(i): x.float() for i, x in enumerate([*levels, F.max_pool2d(levels[3], 1, 2)], start=2)}
        proposals, rpn_losses = self.rpn(ImageList(levels[0], shapes), maps, targets)
        del maps["6"]
        boxes, losses = self.roi_heads(maps, proposals, shapes, targets)
        return boxes, rpn_losses | losses

    def losses(self, task: str, features: Features, targets: Sequence[dict]) -> dict[str, Tensor]:
        """Of the images that are labelled; RPN and RoI heads average over the anchors and boxes that they draw from them.
        The head must be in training mode."""
        names = {"detection_objectness": "loss_objectness", "detection_proposals": "loss_rpn_box_reg",
                 "detection_class": "loss_classifier", "detection_box": "loss_box_reg"}
        targets, rows = labelled(targets, "boxes", features.sizes.device)
        if not targets:
            return connected_zeros([*features.levels, *self.parameters()], tuple(names), counts=1)
        truth = []
        for boxes, labels, present in zip(*pad_boxes(targets, features.sizes.device)):
            present = present & (box_area(boxes) > 0)
            truth.append({"boxes": boxes[present], "labels": labels[present] + 1})
        losses = self([level[rows] for level in features.levels], features.sizes[rows], truth)[1]
        images = torch.tensor(float(len(targets)), device=features.sizes.device)
        share = images / average_over_ranks(images)                      # so that processes average to one with all images
        return {name: losses[key] * share for name, key in names.items()}

    def predict(self, task: str, features: Features, shape: tuple[int, int], confidence: float = 0.) -> list[dict]:
        scale = (torch.tensor(shape, device=features.sizes.device) / features.sizes).flip(1).repeat(1, 2)          # [B, 4]
        return [{"boxes": found["boxes"] * own, "scores": found["scores"], "labels": found["labels"] - 1}
                for found, own in zip(self(features.levels, features.sizes)[0], scale)]


class SemanticFPN(nn.Module):
    """Semantic FPN head (Panoptic FPN, arXiv 1901.02446) with GroupNorm: each level is convolved and doubled up to
    stride 4, their sum classified cell by cell."""

    def __init__(self, num_classes: int, width: int = 256, *, conv_dim: int = 128):
        super().__init__()
        self.convs = nn.ModuleList(nn.ModuleList(
            conv_norm(conv_dim if step else width, conv_dim, 3) for step in range(max(1, i))) for i in range(4))
        self.classifier = nn.Conv2d(conv_dim, num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """levels P2..P5 -> class logits [B, K, h, w] at stride 4."""
        total = 0
        for i, (x, convs) in enumerate(zip(levels, self.convs)):
            for step, conv in enumerate(convs):
                x = conv(x)
                if i:
                    x = F.interpolate(x, size=levels[i - step - 1].shape[-2:], mode="bilinear")
            total = total + x
        return self.classifier(total)

    def losses(self, task: str, features: Features, targets: Sequence[dict]) -> dict[str, Tensor]:
        """Mean cross-entropy of the labelled pixels, the logits enlarged to the image."""
        logits = self(features.levels)
        targets, rows = labelled(targets, task, logits.device)
        if not targets:
            return connected_zeros([logits], (f"{task}_class",), counts=1)
        with torch.autocast(logits.device.type, enabled=False):
            logits = F.interpolate(logits[rows].float(), scale_factor=4, mode="bilinear")
            maps = pad_maps([target[task] for target in targets], *logits.shape[-2:], logits.device)
            loss = F.cross_entropy(logits, maps.long(), ignore_index=IGNORE, reduction="sum")
            return {f"{task}_class": loss / average_over_ranks((maps != IGNORE).sum().float())}

    def predict(self, task: str, features: Features, shape: tuple[int, int], confidence: float = 0.) -> list[dict]:
        return [{task: class_map(scores, features.shape, shape, confidence)}
                for scores in self(features.levels).float().softmax(1)]


# ----------------------------------------------------------------------------------- the model

class HMPL(nn.Module):
    """The multi-task model; with one task it is that task's single-task model.

    classes: for each task its class names in id order; tasks and their kinds are KINDS's.
    depth, width, ...: see PROFILES for the two sets of values in use.
    size: (width, height) at which `predict` runs the network, None = the images' own size. `forward`
        takes images as they are: augmentation decides.
    heads: "transformer" (Sparse R-CNN, MaskFormer) or "conv" (Faster R-CNN, Semantic FPN).
    adapter: one of ADAPTERS, what makes P2..P5 of C2..C5.
    pixels: key of PIXELS, how the pretrained body wants its images (`load_body` tells).
    text: None leaves P5 alone; a Tensor [K, D] of class embeddings or a module
        with attribute `text_dim` whose forward returns one switches the LV-Adapter on. The buffer
        `text_features` holds the latest embeddings: a saved model needs no text module to predict.

    Beyond the paper, off by default:
    early_language: the LV-Adapter writes into C5's lateral map instead of P5, so that FPN's top-down path carries
        the language to every level (as early fusion does in GLIP, arXiv 2112.03857).
    pixel_text: DenseCLIP's auxiliary loss between P5's cells and the class embeddings of the tasks of kind mask.
    shared_pixel_decoder: the mask heads share one pixel decoder, as tasks share it in OneFormer (arXiv 2211.06220).
    uncertainty: the tasks' losses are weighted by learned variances (Kendall et al., arXiv 1705.07115).
    """

    def __init__(self, classes: dict[str, Sequence[str]], *, depth: int = 50, width: int = 256,
                 feedforward: int = 2048, size: tuple[int, int] | None = None, proposals: int = 100,
                 stages: int = 6, dynamic_dim: int = 64, pool: int = 7, dense_proposals: bool = False, queries: int = 100,
                 layers: int = 6, memory_level: int = 5, dense_weight: float = 0., dropout: float = 0.1, conv_dim: int = 128, box_dim: int = 1024,
                 anchor_scale: int = 8, heads: str = "transformer", adapter: str = "fpn", pixels: str = "imagenet",
                 text: nn.Module | Tensor | None = None, early_language: bool = False, pixel_text: bool = False,
                 shared_pixel_decoder: bool = False, uncertainty: bool = False):
        super().__init__()
        if not classes or not set(classes) <= set(KINDS):
            raise ValueError(f"tasks {list(classes)} were given, expected some of {list(KINDS)}.")
        if heads not in HEADS:
            raise ValueError(f"heads {heads!r} were given, expected one of {', '.join(HEADS)}.")
        masks = [task for task in classes if KINDS[task] == "mask"]
        if (early_language or pixel_text) and text is None or pixel_text and not masks:
            raise ValueError("early_language and pixel_text need text, pixel_text also a task of kind mask: give them or "
                             "leave it out.")
        if shared_pixel_decoder and (heads == "conv" or len(masks) < 2):
            raise ValueError("shared_pixel_decoder needs two MaskFormer heads: have both mask tasks and transformer heads, "
                             "or leave it out.")
        self.classes, self.size = {task: tuple(names) for task, names in classes.items()}, size
        for name, value in zip(("mean", "std"), PIXELS[pixels]):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.body = ResNetBody(depth)
        self.body_frozen = False
        self.adapter = Adapter(self.body.channels, width, adapter)
        self.text = text if isinstance(text, nn.Module) else None
        self.early_language, self.pixel_text, self.lv_adapter = early_language, pixel_text, None
        if text is not None:
            if self.text is None:
                embeddings = text.detach().float().clone()
            else:
                embeddings = torch.zeros(sum(map(len, classes.values())), text.text_dim)
            self.register_buffer("text_features", embeddings)
            self.lv_adapter = LVAdapter(width, embeddings.shape[1], feedforward, dropout)
        self.pixel_decoder = PixelDecoder(width) if shared_pixel_decoder else None
        make = {
            ("boxes", "transformer"): lambda k: SparseRCNN(
                k, width, proposals=proposals, stages=stages, feedforward=feedforward, dynamic_dim=dynamic_dim,
                pool=pool, dense_proposals=dense_proposals),
            ("mask", "transformer"): lambda k: MaskFormer(
                k, width, queries=queries, layers=layers, feedforward=feedforward, memory_level=memory_level,
                dropout=dropout, own_pixels=not shared_pixel_decoder, dense_weight=dense_weight),
            ("boxes", "conv"): lambda k: FasterRCNN(k, width, box_dim=box_dim, anchor_scale=anchor_scale),
            ("mask", "conv"): lambda k: SemanticFPN(k, width, conv_dim=conv_dim),
        }
        self.heads = nn.ModuleDict({task: make[KINDS[task], heads](len(names)) for task, names in classes.items()})
        self.log_variances = nn.ParameterDict({task: torch.zeros(()) for task in classes}) if uncertainty else None
        self.to(memory_format=torch.channels_last)

    def freeze_body(self, frozen: bool = True) -> None:
        """Frozen: the body gets no gradients, keeps no graph, and its BatchNorm statistics stand still."""
        self.body_frozen = frozen
        self.body.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.body_frozen:
            self.body.eval()
        if not mode:
            self.update_text()
        return self

    @torch.no_grad()
    def update_text(self) -> None:
        """Brings `text_features` up to date with the text module; done by `eval()`."""
        if self.text is not None:
            self.text_features.copy_(self.text())

    def batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, bool]:
        """uint8 images [3, H, W] -> normalised [B, 3, H, W] padded with the mean colour at right and
        bottom, their sizes [B, 2] (height, width), and whether any is padded."""
        device = self.mean.device
        shapes = [image.shape[-2:] for image in images]
        h, w = (max(extent) for extent in zip(*shapes))
        padded = any(shape != (h, w) for shape in shapes)
        x = torch.zeros(len(images), 3, h, w, device=device).contiguous(memory_format=torch.channels_last)
        for row, image in zip(x, images):
            image = image.to(device, non_blocking=True)
            row[:, :image.shape[1], :image.shape[2]] = (image - self.mean) / self.std
        return x, torch.tensor(shapes, dtype=torch.float32).to(device, non_blocking=True), padded

    def features(self, images: Sequence[Tensor]) -> Features:
        """uint8 images [3, H, W] -> what the heads see of them: P2..P5, P5 with the language prior."""
        x, sizes, padded = self.batch(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.body_frozen):
            levels = self.body(x)                                                 # C2..C5
        text = language = None
        if self.lv_adapter is not None:
            text = self.text() if self.training and self.text is not None else self.text_features
            language = lambda top: self.lv_adapter(top, text, (sizes / 32).ceil(), padded)          # noqa: E731
        levels = self.adapter(levels, language if self.early_language else None)  # P2..P5
        if language and not self.early_language:
            levels[3] = language(levels[3])
        pixels = self.pixel_decoder(levels) if self.pixel_decoder is not None else None
        return Features(levels, sizes, padded, pixels, tuple(x.shape[-2:]), text)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict]) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is to be minimised.

        images: B uint8 [3, H, W], of any sizes. targets: B dicts in the images' frame with any of
        `boxes` [N, 4], `labels` [N] int64, `crowd` [N] bool (optional) for detection, `semantic` and
        `drivable` [H, W] uint8; a missing key = not labelled for that task.
        """
        features, losses = self.features(images), {}
        for task, head in self.heads.items():
            own = head.losses(task, features, targets)
            if self.pixel_text and KINDS[task] == "mask":
                own[f"{task}_pixel_text"] = self.pixel_text_loss(task, features, targets)
            if self.log_variances is not None:
                given = any(("boxes" if task == "detection" else task) in target for target in targets)
                own = {name: value * (-self.log_variances[task]).exp() for name, value in own.items()}
                own[f"{task}_uncertainty"] = self.log_variances[task] * given
            losses |= own
        return losses

    def pixel_text_loss(self, task: str, features: Features, targets: Sequence[dict]) -> Tensor:
        """Cross-entropy of the cosine similarities of P5's cells and a task's class embeddings, at temperature 0.07,
        weight 0.4: the auxiliary loss of DenseCLIP (arXiv 2112.01518)."""
        before = list(self.classes)[:list(self.classes).index(task)]
        start = sum(len(self.classes[other]) for other in before)
        text = self.lv_adapter.text_proj(features.text)[start:start + len(self.classes[task])]       # [K, C]
        cells = F.normalize(features.levels[3].float(), dim=1)
        logits = torch.einsum("bchw,kc->bkhw", cells, F.normalize(text.float(), dim=1)) / 0.07
        return 0.4 * cell_loss(task, logits, targets, 32)

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], confidence: float = 0.) -> list[dict[str, Tensor]]:
        """For each uint8 image [3, H, W]: `boxes` [N, 4] xyxy in its pixels, `scores` [N] falling,
        `labels` [N]; `semantic` and `drivable` [H, W] uint8, 255 where the best class holds less than
        `confidence` of all classes' score. Images of one size share a batch, so that no prediction
        depends on padding or on the other images."""
        results, by_size = [{} for _ in images], {}
        for i, image in enumerate(images):
            by_size.setdefault(tuple(image.shape[-2:]), []).append(i)
        for shape, rows in by_size.items():
            inputs = [images[i] for i in rows]
            if self.size and self.size != shape[::-1]:
                inputs = list(resize(torch.stack(inputs).to(self.mean.device), self.size))
            features = self.features(inputs)
            for task, head in self.heads.items():
                for row, found in zip(rows, head.predict(task, features, shape, confidence)):
                    results[row] |= found
        return results


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 images [B, 3, H, W] to (width, height), bilinear with antialiasing."""
    x = F.interpolate(images.float(), size=size[::-1], mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def top_boxes(output: dict, sizes: Tensor, shape: tuple[int, int]) -> list[dict[str, Tensor]]:
    """The N best of all proposals' class scores; one box may appear with several classes."""
    scores = output["pred_logits"].float().sigmoid().nan_to_num()                 # [B, N, K]
    num_proposals, num_classes = scores.shape[1:]
    scores, index = scores.flatten(1).topk(num_proposals, dim=1)                  # [B, N]
    boxes = output["pred_boxes"].float().gather(1, (index // num_classes)[..., None].expand(-1, -1, 4))
    extent = torch.tensor([*shape[::-1], *shape[::-1]], device=boxes.device, dtype=boxes.dtype)   # w, h, w, h
    boxes = boxes * (extent / sizes.flip(1).repeat(1, 2))[:, None]
    boxes = torch.minimum(boxes.nan_to_num().clamp(min=0), extent)
    return [{"boxes": b, "scores": s, "labels": i % num_classes}
            for b, s, i in zip(boxes, scores, index)]


def class_map(scores: Tensor, size: tuple[int, int], shape: tuple[int, int], confidence: float) -> Tensor:
    """Class scores [K, h, w] at stride 4 of an image of `size` (height, width) -> uint8 map of `shape`,
    255 = unsure."""
    scores = F.interpolate(scores[None], scale_factor=4, mode="bilinear")[..., :size[0], :size[1]]
    if size != shape:
        scores = F.interpolate(scores, size=shape, mode="bilinear")
    scores = scores[0]
    best, label = scores.max(0)
    return label.to(torch.uint8).masked_fill(best < confidence * scores.sum(0), IGNORE)
