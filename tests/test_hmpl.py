"""hmpl.py against torchvision, transformers and hand computation; invariances, empty targets."""
import itertools
import math
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torchvision.models.detection import anchor_utils, image_list

import count_launches
import hmpl
from evaluate import CLASSES
from hmpl import HMPL, PROFILES

TINY = PROFILES["tiny"]
SMALL = TINY | {
    "width": 32, "feedforward": 64,
    "sparse_rcnn": TINY["sparse_rcnn"] | {"proposals": 12, "dynamic_dim": 8},
    "maskformer": TINY["maskformer"] | {"queries": 24, "layers": 2},
    "faster_rcnn": {"box_dim": 32, "anchor_scale": 2}, "semantic_fpn": {"conv_dim": 32},
}
ALL = slice(None)                                                     # all images are labelled
NUM_CLASSES = sum(len(names) for names in CLASSES.values())


def make_model(seed=0, tasks=CLASSES, plain=False, **changes):
    torch.manual_seed(seed)
    text = None if plain else Contexts()
    return HMPL({task: CLASSES[task] for task in tasks}, **SMALL | changes, text=text)


class Contexts(nn.Module):
    """A text source: learned contexts through something frozen."""

    text_dim = 16

    def __init__(self):
        super().__init__()
        self.contexts = nn.Parameter(torch.randn(NUM_CLASSES, 8))
        self.tower = nn.Linear(8, 16).requires_grad_(False)

    def forward(self):
        return self.tower(self.contexts)


def random_images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator)
            for h, w in sizes]


def random_target(h, w, seed=0, boxes=3):
    """Boxes, and masks of blocks of 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=generator) * torch.tensor([w / 2, h / 2])
    extent = 8 + torch.rand(boxes, 2, generator=generator) * torch.tensor([w / 3, h / 3])
    semantic, drivable = (torch.randint(0, classes, (h // 8, w // 8), generator=generator)
                          for classes in (19, 3))
    return {"boxes": torch.cat([corner, corner + extent], 1),
            "labels": torch.randint(0, 10, (boxes,), generator=generator),
            "crowd": torch.zeros(boxes, dtype=torch.bool),
            "semantic": enlarge(semantic.to(torch.uint8), 8),
            "drivable": enlarge(drivable.to(torch.uint8), 8)}


def enlarge(image, factor):
    return image.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


@pytest.mark.parametrize("depth, total", [(18, 100), (50, 265)])
def test_backbone_is_torchvisions(depth, total, tmp_path):
    reference = getattr(torchvision.models, f"resnet{depth}")().eval()
    torch.save(reference.state_dict(), tmp_path / "backbone.pth")
    backbone = hmpl.ResNetBackbone(depth).eval()
    report, pixels = hmpl.load_backbone(backbone, tmp_path / "backbone.pth")
    assert pixels == "imagenet" and report == (
        f"no prefix, {total} of {total} tensors matched, 0 missing, 2 not used "
        "(fc.weight, fc.bias)")
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        levels = backbone(image)
        features = levels[-1].mean((2, 3))
        torch.testing.assert_close(reference.fc(features), reference(image), atol=1e-5, rtol=1e-5)
    assert [tuple(x.shape[2:]) for x in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [x.shape[1] for x in levels] == backbone.channels


HISTORY = "mmengine.logging.history_buffer"
HistoryBuffer = type("HistoryBuffer", (), {"__module__": HISTORY})        # beside the weights
DETECTRON2 = {
    r"^(?!layer)": "stem.", r"layer(\d)": lambda match: f"res{int(match[1]) + 1}",
    r"bn(\d)": r"conv\1.norm", r"downsample\.0": "shortcut", r"downsample\.1": "shortcut.norm",
}
SIMCLR2 = {
    "^conv1": "net.0.0", "^bn1": "net.0.1.0", r"layer(\d)": r"net.\1.blocks",
    r"downsample\.0": "projection.shortcut", r"downsample\.1": "projection.bn.0",
    r"conv(\d)": lambda match: f"net.{2 * int(match[1]) - 2}",
    r"bn(\d)": lambda match: f"net.{2 * int(match[1]) - 1}.0",
}


def rename(state, rules):
    """Replaces patterns in torchvision's names."""
    for pattern, new in rules.items():
        state = {re.sub(pattern, new, key): value for key, value in state.items()}
    return state


def under(prefix, state):
    return rename(state, {"^": prefix})


def backbone_files(body, decoy):
    """Each source's file content, with the trained tensors and a decoy's of other values."""
    w, history = torch.zeros(3), HistoryBuffer()
    history.values = np.arange(3.)
    arrays = {key: value.numpy() for key, value in rename(body, DETECTRON2).items()
              if not key.endswith("tracked")}
    return {
        "MMSelfSup 0.x": {"state_dict": under("backbone.", body) | under("encoder_q.0.", body)
                          | under("encoder_k.0.", decoy) | {"queue": w}, "meta": {}},
        "MMSelfSup 1.x": {"state_dict": under("target_net.module.0.", decoy)
                          | under("backbone.", body) | {"head.prototypes.weight": w},
                          "message_hub": {"log_scalars": {"train/loss": history}}},
        "extracted": {"state_dict": body, "author": "OpenSelfSup"},
        "MoCo": {"state_dict": under("module.encoder_k.", decoy)
                 | under("module.encoder_q.", body) | {"module.queue": w}, "optimizer": {}},
        "BYOL": {"state_dict": under("target_net.0.", decoy) | under("online_net.0.", body)},
        "SwAV": under("module.", body | {"prototypes.weight": w, "projection_head.0.weight": w}),
        "PixPro": {"model": under("module.encoder_k.", decoy) | under("module.encoder.", body)},
        "DetCo": {"model": arrays, "matching_heuristics": True},
        "train.py": {"model_config": {"pixels": "swav"}, "optimizer": {"state": {0: decoy}},
                     "model": under("backbone.", body) | {"heads.semantic.norm.weight": w}},
        "SimCLR v2": {"resnet": rename(body, SIMCLR2) | {"fc.weight": w},
                      "head": {"layers.0.weight": w}},
    }


@pytest.mark.parametrize("source", backbone_files({}, {}))
def test_backbone_loads_every_projects_trained_encoder(source, tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = hmpl.ResNetBackbone(50).state_dict()
    trained, decoy = ({key: torch.rand_like(value.float()) for key, value in state.items()}
                      for _ in range(2))
    content = backbone_files(trained, decoy)[source]
    for name in ("mmengine", HISTORY):                       # while it is written
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(HistoryBuffer=HistoryBuffer))
    if source == "DetCo":
        (tmp_path / "file").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=source != "MoCo")
    monkeypatch.undo()
    backbone = hmpl.ResNetBackbone(50)
    report, pixels = hmpl.load_backbone(backbone, tmp_path / "file")
    assert "265 of 265 tensors matched, 0 missing" in report
    expected = {"SwAV": "swav", "SimCLR v2": "unit", "train.py": "swav"}
    assert pixels == expected.get(source, "imagenet")
    for key, value in backbone.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(value, trained[key]), key


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": Evil()}))
    state = torchvision.models.resnet18().state_dict()
    del state["layer3.1.bn2.running_var"]
    torch.save(state | {"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "short.pth")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "deeper.pth")
    for name, message in [
            ("deeper.pth", "is of a deeper ResNet .80 tensors too many, such as layer1.2.conv1"),
            ("evil.pkl", "cannot be read as a state dict"), ("absent.pth", "no file"),
            ("short.pth", "98 of 100 tensors matched, 2 missing.*"
                          "layer1.0.conv1.weight, layer3.1.bn2.running_var")]:
        with pytest.raises(hmpl.WeightsError, match=message):
            hmpl.load_backbone(hmpl.ResNetBackbone(18), tmp_path / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", hmpl.ADAPTERS)
def test_adapters(kind):
    """All give P2..P5 and learn everywhere; the residual ones begin close to plain FPN."""
    torch.manual_seed(0)
    channels = [8, 16, 24, 32]
    adapter, shapes = hmpl.Adapter(channels, 16, kind), [(16, 24), (8, 12), (4, 6), (2, 3)]
    levels = [torch.randn(2, c, *shape) for c, shape in zip(channels, shapes)]
    maps = adapter(levels)
    assert [x.shape for x in maps] == [(2, 16, *shape) for shape in shapes]
    sum(x.square().sum() for x in maps).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    if "_" in kind:
        plain = adapter.fpn({str(i): x for i, x in enumerate(levels)}).values()
        assert all(0 < (a - b).abs().max() < 0.01 * b.abs().max() for a, b in zip(maps, plain))
        scales = [len(two.scale) for two in adapter.before]
        assert scales == ([1] * 4 if kind == "pre_scalar" else channels)


def test_roi_align_is_torchvisions_on_the_level_that_fits():
    torch.manual_seed(0)
    levels = [torch.randn(2, 8, -(-150 // stride), -(-250 // stride), dtype=torch.double,
                          requires_grad=True) for stride in hmpl.STRIDES]
    corner = torch.rand(2, 40, 2) * torch.tensor([300., 180.]) - 25
    boxes = torch.cat([corner, corner + torch.rand(2, 40, 2) ** 3 * 700], -1)
    side = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
    level = (4 + torch.log2(side / 224)).floor().clamp(2, 5) - 2
    pooled = [torchvision.ops.roi_align(features, list(boxes.double()), 7, 1 / stride, 2, True)
              for features, stride in zip(levels, hmpl.STRIDES)]           # each [80, 8, 7, 7]
    expected = torch.stack(pooled)[level.flatten().long(), torch.arange(80)]
    ours = hmpl.Pyramid(levels).roi_align(boxes).double()
    expected = expected.flatten(2).transpose(1, 2).unflatten(0, (2, 40))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(ours)
    a, b = (torch.autograd.grad(x, levels, grad) for x in (ours, expected))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_boxes_are_compared_and_moved_as_in_torchvision_and_sparse_rcnn():
    torch.manual_seed(0)
    corners = torch.rand(2, 50, 2) * 50
    a, b = torch.cat([corners, corners + torch.rand(2, 50, 2) * 50], -1)
    ours = hmpl.paired_giou(a, b)
    torch.testing.assert_close(ours, torchvision.ops.generalized_box_iou(a, b).diag())
    degenerate = torch.tensor([[5., 5, 5, 5], [9., 9, 1, 1]])
    assert hmpl.paired_giou(degenerate, degenerate.flip(0)).isfinite().all()

    box, deltas = torch.tensor([[10., 20, 30, 60]]), torch.tensor([[2., 0, math.log(2), 0]])
    right_and_wider = torch.tensor([[20., 20, 60, 60]])                    # weights 2, 2, 1, 1
    torch.testing.assert_close(hmpl.apply_deltas(box, deltas), right_and_wider)
    assert hmpl.apply_deltas(box, torch.full((1, 4), 1e9)).isfinite().all()


def test_sine_positions_are_maskformers():
    module = pytest.importorskip("transformers.models.maskformer.modeling_maskformer")
    reference = module.MaskFormerSinePositionEmbedding(num_position_features=16, normalize=True)
    valid = torch.zeros(1, 5, 7, dtype=torch.bool)
    valid[:, :4, :5] = True
    expected = reference((1, 3, 5, 7), torch.device("cpu"), torch.float32, valid)
    expected = expected.flatten(2).transpose(1, 2)
    image, sizes = torch.randn(1, 32, 5, 7), torch.tensor([[31., 40.]])        # 4 x 5 cells of 8
    tokens, positions, padding = hmpl.flatten_map(image, sizes, stride=8, padded=True)
    assert torch.equal(padding, ~valid.flatten(1)) and torch.equal(tokens[0, 9], image[0, :, 1, 2])
    torch.testing.assert_close(positions[~padding], expected[~padding], atol=1e-4, rtol=1e-4)
    assert hmpl.flatten_map(image, sizes, stride=8, padded=False)[2] is None


def test_match_finds_the_cheapest_assignment_and_never_raises():
    torch.manual_seed(0)
    cost = torch.rand(2, 3, 5, 4)
    present = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    query_of = hmpl.match(cost, present)
    for stage, image in itertools.product(range(2), range(3)):
        targets = present[image].nonzero().flatten()
        orders = list(itertools.permutations(range(5), len(targets)))
        totals = [cost[stage, image, list(queries), targets].sum() for queries in orders]
        assert tuple(query_of[stage, image, targets].tolist()) == orders[np.argmin(totals)]
        assert (query_of[stage, image, ~present[image]] == -1).all()
    every = torch.ones(1, 5, dtype=torch.bool)
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0, 1e30]).repeat(4, 1).T.expand(1, 1, 5, 4)
    assert (hmpl.match(bad, every[:, :4]) >= 0).any()
    more = hmpl.match(torch.rand(1, 1, 2, 5), every).flatten()             # targets than queries
    assert sorted(more.tolist()) == [-1, -1, -1, 0, 1]
    assert hmpl.match(torch.zeros(2, 1, 3, 0), every[:, :0]).shape == (2, 1, 0)


def mask_outputs(masks, logits):
    """A MaskFormer's outputs whose masks [S, B, Q, h, w] are given: the features are the identity
    over pixels."""
    h, w = masks.shape[3:]
    return {"pred_logits": logits, "mask_embed": masks.flatten(3),
            "mask_features": torch.eye(h * w).view(1, h * w, h, w)}


def test_mask_cost_and_losses_are_transformers():
    """Of two layers' masks, in a larger frame whose padding is not labelled."""
    reference = pytest.importorskip("transformers.models.maskformer.modeling_maskformer")
    torch.manual_seed(0)
    present = torch.tensor([0, 2, 4])                                      # of five classes
    pixels = present[torch.randint(0, 3, (9, 12))]
    true_masks = (pixels == present[:, None, None]).float()
    layers = [(torch.randn(1, 8, 9, 12), torch.randn(1, 8, 6)) for _ in range(2)]
    matcher = reference.MaskFormerHungarianMatcher(cost_class=1., cost_dice=1., cost_mask=20.)
    criterion = reference.MaskFormerLoss(5, matcher, {}, eos_coef=0.1)
    a, b = (criterion(*layer, [enlarge(true_masks, 2)], [present]) for layer in layers)
    masks, logits = layers[0]
    x, t = masks[0].flatten(1), true_masks.flatten(1)
    cost = (20 * reference.pair_wise_sigmoid_focal_loss(x, t)
            + reference.pair_wise_dice_loss(x, t) - logits[0].softmax(-1)[:, present])

    edged = [F.pad(masks, (0, 1, 0, 1), mode="replicate") for masks, _ in layers]
    outputs = mask_outputs(F.pad(torch.stack(edged), (0, 1, 0, 1), value=100),
                           torch.stack([logits for _, logits in layers]))
    label = enlarge(pixels.to(torch.uint8), 4)
    for label in (label, F.pad(label, (0, 8, 0, 8), value=255)):
        sizes = torch.tensor([label.shape]).float()
        coarse = hmpl.mask_targets(hmpl.stretch_labels([label], sizes), 5, (11, 14))[1]
        ours = hmpl.mask_cost(*outputs.values(), *coarse)
        torch.testing.assert_close(ours[0, 0, :, present], cost, atol=1e-5, rtol=1e-5)
        losses = hmpl.mask_losses(outputs, [label], ALL, sizes)
        for name, weight, theirs in [("class", 1, "loss_cross_entropy"), ("focal", 20, "loss_mask"),
                                     ("dice", 1, "loss_dice")]:
            torch.testing.assert_close(losses[name], weight * (a[theirs] + b[theirs]))


def test_partly_labelled_cells_weigh_by_their_share():
    """A perfect mask costs nothing however little of its cells is labelled; cost and loss agree."""
    target = torch.zeros(1, 2, 4, 4)
    target[0, 0, :2], target[0, 1, 2:] = 1, 1
    for share in (1., 0.5, 1 / 16):
        perfect = (target * 2 - 1)[:, None] * 40
        losses = hmpl.focal_and_dice(perfect, target, torch.full((1, 4, 4), share))
        assert max(loss.abs().max() for loss in losses) < 1e-6
    valid, logits, masks = torch.rand(1, 4, 4), torch.randn(1, 2, 3), torch.randn(1, 2, 4, 4)
    cost = hmpl.mask_cost(*mask_outputs(masks[None], logits[None]).values(), target, valid)
    focal, dice = hmpl.focal_and_dice(masks[:, None], target, valid)
    expected = (20 * focal + dice)[0, 0] - logits.softmax(-1)[0, :, :-1].diag()
    torch.testing.assert_close(cost[0, 0].diag(), expected, atol=1e-5, rtol=1e-4)


def test_focal_and_dice_gradients_are_torchvisions_focal_loss_and_dices_own():
    torch.manual_seed(0)
    masks = torch.randn(2, 3, 4, 5, 6, dtype=torch.double).mul(4).requires_grad_()
    target, valid = torch.rand(2, 4, 5, 6).double(), torch.rand(2, 5, 6).double()
    weights = torch.rand(2, 2, 3, 4).double()
    t, v = target[:, None].expand_as(masks), valid[:, None, None]
    focal = torchvision.ops.sigmoid_focal_loss(masks, t, reduction="none") * v
    p, t = masks.sigmoid() * v, t * v
    dice = 1 - (2 * (p * target[:, None]).sum((-2, -1)) + 1) / ((p + t).sum((-2, -1)) + 1)
    expected = torch.stack([focal.sum((-2, -1)) / v.sum((-2, -1)), dice])
    ours = torch.stack(hmpl.focal_and_dice(masks, target, valid))
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((losses * weights).sum(), masks)[0]
                 for losses in (expected, ours)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_masks_are_enlarged_before_they_are_read():
    """Two classes' masks cross between the centres of two cells, at pixels 2 and 6, a 21st of the
    way; of the cells' sigmoids it would be a third, one pixel further."""
    head = hmpl.MaskFormer(2, 32)
    masks = torch.tensor([[[[[1., -20.]], [[-1., 20.]]]]])                 # [1, 1, 2, 1, 2]
    sure = torch.tensor([[[[9., 0, 0], [0, 9., 0]]]])
    head.forward = lambda features: mask_outputs(masks, sure)
    best = head.predict(None).argmax(1)
    assert best.shape == (1, 4, 8) and (best == torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])).all()


def test_matrix_nms_by_hand():
    """The second box lies on the first, the third on both; the fourth is of another class, the
    fifth elsewhere."""
    boxes = torch.tensor([[[0., 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 10],
                           [20, 0, 30, 10]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]]), torch.tensor([[0, 0, 0, 1, 0]])
    third = min(math.exp(-2 * 0.5 ** 2), math.exp(2 * (0.8 ** 2 - (5 / 8) ** 2)))
    expected = [0.9, 0.8 * math.exp(-2 * 0.8 ** 2), 0.7 * third, 0.6, 0.5]
    assert hmpl.matrix_nms(boxes, scores, labels)[0].tolist() == pytest.approx(expected)
    assert hmpl.matrix_nms(boxes * 0, scores, labels).equal(scores)            # without area
    boxes[0, 4] = math.nan                                                     # spoils no others
    assert hmpl.matrix_nms(boxes, scores, labels)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_box_losses_by_hand(order):
    """Two proposals, two stages, a box, and a crowd, which is no target: every term by hand."""
    target = {"boxes": torch.tensor([[10., 10, 30, 40], [60, 5, 90, 45]]),
              "labels": torch.tensor([1, 0]), "crowd": torch.tensor([False, True])}
    target = {key: value[order] for key, value in target.items()}
    boxes = torch.tensor([[[12., 10, 30, 40], [60., 5, 90, 45]]]).repeat(2, 1, 1, 1)
    logits = torch.tensor([[[0.3, -1.], [0.2, 0.5]]]).repeat(2, 1, 1, 1)
    losses = hmpl.box_losses({"pred_logits": logits, "pred_boxes": boxes}, [target], ALL,
                             sizes=torch.tensor([[50., 100.]]))

    def focal(x, t):
        p = 1 / (1 + math.exp(-x))
        return 0.25 * (1 - p) ** 2 * -math.log(p) if t else 0.75 * p ** 2 * -math.log(1 - p)
    expected = 2 * (focal(0.3, 0) + focal(-1., 1) + focal(0.2, 0) + focal(0.5, 0))
    assert losses["class"].item() == pytest.approx(2 * expected, rel=1e-5)
    assert losses["l1"].item() == pytest.approx(2 * 5 * 2 / 100, rel=1e-5)
    assert losses["giou"].item() == pytest.approx(2 * 2 * (1 - 18 / 20), rel=1e-5)


def test_cell_loss_by_hand():
    """Two cells of 4 x 4 pixels: the first is of class 0, of the second a quarter."""
    logits = torch.tensor([[[[3., 0.]], [[0., 2.]]]])                      # [1, 2, 1, 2]
    label = torch.zeros(4, 8, dtype=torch.uint8)
    label[:, 5:], label[:1] = 1, 255                                      # ignored weigh nothing
    first = math.log(1 + math.exp(-3))
    second = 0.25 * math.log(1 + math.exp(2)) + 0.75 * math.log(1 + math.exp(-2))
    for batch, indices in ((1, ALL), (2, torch.tensor([1]))):                # nor unlabelled images
        stretched = hmpl.stretch_labels([label], torch.tensor([[4., 8.]]))
        coarse = hmpl.mask_targets(stretched, 2, (1, 2))[1]
        loss = hmpl.cell_loss(logits.expand(batch, -1, -1, -1), *coarse, indices)
        assert loss.item() == pytest.approx((first + second) / 2)
    empty = hmpl.mask_targets(hmpl.stretch_labels([], torch.zeros(0, 2)), 2, (1, 2))[1]
    assert hmpl.cell_loss(logits, *empty, slice(0)) == 0


def test_dense_proposals_are_the_best_cells_boxes():
    """Cells of four levels of a 64 x 64 image, which fills the left half of the batch's frame."""
    torch.manual_seed(0)
    dense = hmpl.DenseProposals(num_classes=2, width=8, proposals=3)
    levels = [torch.randn(1, 8, 64 // stride, 128 // stride) for stride in hmpl.STRIDES]
    features = hmpl.Features(levels, torch.tensor([[64., 64.]]), padded=True)
    outputs, boxes, proposals = dense(features)
    assert outputs["pred_logits"].shape == (1, 1, 512 + 128 + 32 + 8, 2)
    assert proposals.shape == (1, 3, 8) and not boxes.requires_grad
    all_boxes, scores = outputs["pred_boxes"][0, 0], outputs["pred_logits"][0, 0].amax(1)
    assert all_boxes[33].tolist() == [0, 0, 12, 12]                        # 3 cells of P2 wide
    assert all_boxes[-1].tolist() == [64, 0, 160, 96]                      # 3 cells of P5 wide
    assert torch.equal(boxes[0], all_boxes[scores.topk(3).indices])
    centres = (all_boxes[:, 0] + all_boxes[:, 2]) / 2                      # padding proposes none
    assert (scores[centres > 64] == -1e4).all() and (scores[centres < 64] > -100).all()
    head = hmpl.SparseRCNN(4, 8, proposals=1000, stages=1, feedforward=8, dynamic_dim=4, pool=2,
                           dense_proposals=True)
    assert head(features)["pred_boxes"].shape == (1, 1, 680, 4)            # fewer than 1000 cells
    prior, deltas = head.stages[0].class_logits.bias, head.stages[0].box_deltas.bias
    assert prior.tolist() == pytest.approx([-math.log(99)] * 4) and (deltas == 0).all()


def test_proposals_and_cells_learn_by_losses_of_their_own():
    model, images, target = make_model(), random_images((64, 96)), random_target(64, 96)
    losses = model(images, [target])
    outputs = model.heads["detection"](model.features(*model.batch(images), model.embeddings()))
    stages, dense = (hmpl.box_losses(x, [target], ALL, torch.tensor([[64., 96.]]))
                     for x in (outputs, outputs["dense_outputs"]))
    for name in dense:
        torch.testing.assert_close(losses[f"detection_{name}"], stages[name] + dense[name])
    losses["semantic_dense"].backward()
    head = model.heads["semantic"]
    assert head.dense_logits.weight.grad.any() and head.pixel_decoder.output[0][0].weight.grad.any()
    plain = make_model(maskformer={"queries": 24, "layers": 2})
    assert "semantic_dense" not in plain(images, [target])


def test_anchors_are_torchvisions_at_the_levels_strides():
    """Where 64 divides the images torchvision's strides are right too; elsewhere ours go on."""
    strides, results = (4, 8, 16, 32, 64), []
    reference = anchor_utils.AnchorGenerator(
        tuple((2 * stride,) for stride in strides), ((0.5, 1., 2.),) * 5)
    anchors = hmpl.FasterRCNN(4, 32, box_dim=16, anchor_scale=2).rpn.anchor_generator
    for network, h, w in [(reference, 128, 192), (anchors, 128, 192), (anchors, 100, 150)]:
        maps = [torch.zeros(2, 1, -(-h // stride), -(-w // stride)) for stride in strides]
        images = image_list.ImageList(torch.zeros(2, 3, h, w), [(h, w)] * 2)
        results.append(network(images, maps)[1])
    expected, divided, other = results
    assert torch.equal(divided, expected) and torch.equal(other[-18:], expected[-18:])  # P6: 2 x 3


def test_convolutional_boxes_are_learned_in_the_frame_of_the_image():
    """An image is learned by heart at an odd size and detected again in one of twice the size."""
    torch.manual_seed(4)
    model = HMPL({"detection": ("a", "b")}, **SMALL | {"size": (90, 70)}, heads="conv")
    image = enlarge(random_images((7, 9))[0], 10)
    boxes = torch.tensor([[10., 10, 30, 30], [50, 20, 80, 60]])
    optimizer = torch.optim.AdamW(model.train().parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        losses = model([image], [{"boxes": boxes, "labels": torch.tensor([0, 1])}])
        sum(losses.values()).backward()
        optimizer.step()
    result = model.eval().predict([enlarge(image, 2)])[0]
    best = torch.stack([result["boxes"][result["labels"] == k][0] for k in (0, 1)])
    assert torchvision.ops.box_iou(best, 2 * boxes).diag().min() > 0.7
    assert result["scores"][0] > 0.7


def test_semantic_fpn_loss_is_the_mean_over_labelled_pixels():
    model, images = make_model(heads="conv").eval(), random_images((70, 110))
    label = F.pad(random_target(64, 96)["semantic"], (0, 14, 0, 6), value=255)
    label[:20] = 255
    features = model.features(*model.batch(images), model.embeddings())
    head = model.heads["semantic"]
    logits = F.interpolate(head(features.levels), scale_factor=4, mode="bilinear")[:, :, :70, :110]
    expected = F.cross_entropy(logits, label[None].long(), ignore_index=255)
    torch.testing.assert_close(head.losses(features, [label], ALL)["class"], expected)
    assert (model.predict(images)[0]["semantic"] == logits.argmax(1)[0]).all()


@pytest.mark.parametrize("heads", hmpl.HEADS)
def test_targets_may_lack_anything(heads):
    model, images = make_model(heads=heads), random_images((64, 96), (64, 96))
    full = random_target(64, 96)
    boxes = {key: full[key] for key in ("boxes", "labels")}
    empty = full | {key: full[key][:0] for key in ("boxes", "labels", "crowd")}
    ignored = torch.full((64, 96), 255, dtype=torch.uint8)
    names = list(model(images, [full, full]))
    for targets in ([{}, {}], [full, {}], [empty, empty], [boxes, empty],
                    [{"semantic": ignored}, {"drivable": ignored}]):
        losses = model(images, targets)
        assert list(losses) == names and all(value.isfinite() for value in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()                                    # one graph on all ranks
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert sum(model(images, [{}, {}]).values()) == 0
    if heads == "transformer":                                             # which draw no samples
        alone, beside = model.eval()(images[:1], [full]), model(images, [full, {}])
        torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads, frozen", [("transformer", True), ("conv", True),
                                           ("transformer", False)])
def test_a_frozen_backbone_stays_and_everything_else_learns(heads, frozen):
    model = make_model(heads=heads).train()
    model.freeze_backbone(frozen)
    fixed = ("backbone.", "text.tower.") if frozen else ("text.tower.",)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, learned = torch.optim.AdamW(free.values(), lr=1e-2, weight_decay=0.1), set()
    for seed in range(2):
        losses = model(random_images((64, 96), seed=seed), [random_target(64, 96, seed)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        learned |= {name for name, p in model.named_parameters()
                    if p.grad is not None and p.grad.any()}
        optimizer.step()
    names = {name for name, _ in model.named_parameters() if not name.startswith(fixed)}
    assert learned == names == free.keys()
    state = model.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in state if name.startswith(fixed))
    statistics = "backbone.bn1.running_mean"
    assert torch.equal(state[statistics], before[statistics]) == frozen


def same(a, b):
    assert a.keys() == b.keys() == {"boxes", "scores", "labels", "semantic", "drivable"}
    torch.testing.assert_close(a["scores"], b["scores"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-2, rtol=1e-4)
    for task in ("semantic", "drivable"):
        assert (a[task] != b[task]).float().mean() < 1e-3


@pytest.mark.parametrize("heads", hmpl.HEADS)
def test_batch_is_its_singles_whatever_the_sizes(heads):
    model = make_model(heads=heads).eval()
    images = random_images((64, 96), (70, 110), (64, 96), (33, 47))
    for image, result in zip(images, model.predict(images)):
        same(result, model.predict([image])[0])
        assert result["semantic"].shape == result["drivable"].shape == image.shape[1:]
        assert (result["boxes"][:, 2] <= image.shape[2]).all() and (result["boxes"] >= 0).all()
        assert (result["scores"].diff() <= 0).all() and result["semantic"].max() < 19
        assert (model.predict([image], confidence=1.)[0]["semantic"] == 255).all()


def test_predictions_come_in_the_frame_of_the_image_also_compiled():
    """A network that runs at 96 x 64 predicts the same for an image and for one twice as large."""
    model, small = make_model(size=(96, 64)).eval(), random_images((64, 96))[0]
    images = [small, enlarge(small, 2)]
    a, b = model.predict(images)
    torch.testing.assert_close(b["scores"], a["scores"], atol=0.02, rtol=0.1)
    assert b["semantic"].shape == (128, 192) and 96 < b["boxes"].max() <= 192
    assert (b["semantic"][::2, ::2] == a["semantic"]).float().mean() > 0.8
    for plain, compiled in zip((a, b), torch.compile(model.predict, backend="eager")(images)):
        same(compiled, plain)


def test_language_reaches_only_p5_and_predicting_needs_no_text_module():
    model, image = make_model().eval(), random_images((64, 96))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("text.")}
    other = HMPL(CLASSES, **SMALL, text=torch.zeros(NUM_CLASSES, 16))
    other.load_state_dict(state)
    same(other.eval().predict(image)[0], model.predict(image)[0])
    torch.testing.assert_close(other.text_features, model.text())
    other.text_features += torch.randn_like(other.text_features)
    levels = [network.features(*network.batch(image), network.embeddings()).levels
              for network in (model, other)]
    assert [torch.equal(a, b) for a, b in zip(*levels)] == [True] * 3 + [False]


@pytest.mark.parametrize("heads", hmpl.HEADS)
def test_a_model_is_loaded_from_its_checkpoint_alone(heads, tmp_path):
    changes = {"heads": heads, "size": (96, 64), "pixels": "unit",
               "background_weights": {"drivable": 0.1}}
    model, images = make_model(**changes).eval(), random_images((64, 96))
    config = {"classes": CLASSES, **SMALL, **changes}
    content = {"model_config": config, "model": model.state_dict(), "config": {"data": ""},
               "stage": "adapt", "step": 1, "steps": 1, "notes": [], "scores": {}}
    torch.save(content, tmp_path / "adapt.pt")
    loaded = hmpl.load_model(tmp_path / "adapt.pt")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded.predict(images), model.predict(images), atol=0, rtol=0)

    torch.save(content | {"model_config": config | {"width": 64}}, tmp_path / "other.pt")
    torch.save(content | {"model_config": {"width": 32}}, tmp_path / "classes.pt")
    torch.save(content | {"model": []}, tmp_path / "state.pt")
    torch.save({"model": {}}, tmp_path / "bare.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "adapt.pt").read_bytes()[:-99])
    for name, message in [
            ("absent.pt", "no checkpoint .*absent.pt: train one"),
            ("other.pt", "other.pt holds another network than this code builds"),
            ("classes.pt", "cannot be read .*it has no model_config.classes.: name a .pt file"),
            ("state.pt", "it has no state dict"), ("bare.pt", "it has no model_config, config"),
            ("cut.pt", "cut.pt cannot be read as a checkpoint of train.py .*delete it and run")]:
        with pytest.raises(hmpl.WeightsError, match=message):
            hmpl.load_model(tmp_path / name)


def test_a_single_task_model_is_the_same_class():
    for task in CLASSES:
        model = make_model(tasks=[task], plain=True)
        losses = model(random_images((64, 96)), [random_target(64, 96)])
        assert {name.split("_")[0] for name in losses} == {task} and list(model.heads) == [task]
        assert model.lv_adapter is None


def test_bad_arguments_are_refused():
    for options, message in [
            ({"classes": {}}, "expected some"), ({"classes": {"lanes": ()}}, "with class names"),
            ({"depth": 20}, "choose 18, 34, 50 or 101"), ({"adapter": "none"}, "one of fpn, pre"),
            ({"heads": "dense"}, "expected one of transformer, conv")]:
        with pytest.raises(ValueError, match=message):
            HMPL(**{"classes": CLASSES} | options)


@pytest.mark.parametrize("heads, dense", [("transformer", False), ("transformer", True),
                                          ("conv", False)])
@pytest.mark.parametrize("device, dtype, rtol", [
    ("cpu", torch.bfloat16, 0.1), ("cuda", torch.float32, 0.05), ("cuda", torch.bfloat16, 0.15),
    ("cuda", torch.float16, 0.15)])
def test_results_are_those_of_float32_on_the_cpu(device, dtype, rtol, heads, dense):
    """But for boxes' losses where rounding decides which cells or which samples are drawn."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    images = random_images((64, 96), (32, 48))
    targets = [random_target(64, 96), random_target(32, 48, 1)]

    def results(device, dtype):
        boxes = SMALL["sparse_rcnn"] | {"dense_proposals": dense}
        model = make_model(heads=heads, size=(96, 64), sparse_rcnn=boxes).to(device).eval()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            predictions = model.predict(images)
            return model.train()(images, targets), predictions
    expected, plain = results("cpu", torch.float32)
    losses, predictions = results(device, dtype)
    mixed = dtype != torch.float32
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32 and value.isfinite()
        if not (name.startswith("detection") and (heads == "conv" or mixed and dense)):
            torch.testing.assert_close(value.cpu(), expected[name], atol=0.3, rtol=rtol)
    for a, b in zip(plain, predictions):
        assert b["scores"].dtype == torch.float32 and b["boxes"].isfinite().all()
        for task in ("semantic", "drivable"):
            assert device != "cpu" or (a[task] == b[task]).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_prediction_is_the_eager_one(dtype):
    """From the second batch of a shape on; learned weights are seen, and so are moved ones."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = make_model(size=(96, 64)).cuda().eval()
    batches = [random_images(*[(64, 96)] * n) for n in (1, 1, 2, 2, 1)]

    def check():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), torch.no_grad():
            for images in batches:
                expected = model.predict_batch(torch.stack(images).cuda())
                for i, prediction in enumerate(model.predict(images)):
                    same(prediction, {key: value[i] for key, value in expected.items()})
    check()
    with torch.no_grad():
        model.backbone.layer1[0].conv1.weight.mul_(1.5)
    check()
    model.cpu().cuda()
    check()


@pytest.mark.skipif(torch.__version__ < "2.10", reason="older fake tensors need a real GPU")
def test_launches_and_bytes_stay_below_half_of_what_they_were():
    """Counts on fake tensors of forward and losses (16 images of 1280x720) and of a prediction,
    into which nothing may be copied from the CPU, as a CUDA graph cannot hold that."""
    training = count_launches.count("paper", (1280, 720), 16, training=True)
    assert sum(training.launches.values()) < 1900 and sum(training.bytes.values()) < 200e9
    prediction = count_launches.count("paper", (1280, 720), 1, training=False)
    assert sum(prediction.launches.values()) < 1250 and sum(prediction.bytes.values()) < 9.5e9
    assert not prediction.from_cpu
    assert sum(count_launches.count("tiny", (256, 144), 1, False).launches.values()) < 800


@pytest.mark.skipif(torch.__version__ < "2.10", reason="older fake tensors need a real GPU")
@pytest.mark.parametrize("adapter", hmpl.ADAPTERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_rehearsal_on_a_gpu_that_is_not_there(profile, adapter, monkeypatch):
    """Fake tensors refuse to meet those of the CPU and to be read: whatever waits for the device is
    in the stand-ins, one copy for each matching. torchvision's convolutional boxes wait anyway."""
    changes = PROFILES[profile] | {"width": 32, "feedforward": 64, "adapter": adapter}
    copies = []

    @unset_fake_temporarily()
    def match(cost, present):
        copies.append(cost.device.type)
        return torch.zeros(cost.shape[0], *present.shape, dtype=torch.long)

    monkeypatch.setattr(hmpl, "match", match)
    on_the_cpu = unset_fake_temporarily()(hmpl.matched_classes)
    monkeypatch.setattr(hmpl, "matched_classes", on_the_cpu)
    for heads in hmpl.HEADS:
        model = make_model(**changes | {"heads": heads, "size": (96, 64)})
        if heads == "conv":
            model.heads.pop("detection")
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cuda")
            images = [torch.zeros(3, h, 96, dtype=torch.uint8) for h in (64, 48)]
            masks = torch.zeros(64, 96, dtype=torch.uint8)
            boxes = {"boxes": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.long)}
            losses = model(images, [boxes | {"semantic": masks}, {"drivable": masks[:48]}])
            prediction = model.eval().predict(images)[0]
        assert {(x.device.type, x.dtype) for x in losses.values()} == {("cuda", torch.float32)}
        assert {x.device.type for x in prediction.values()} == {"cuda"}
    dense = changes["sparse_rcnn"].get("dense_proposals", False)
    assert copies == ["cuda"] * (3 + dense)
