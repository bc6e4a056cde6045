"""Counts what the network would launch, read and write on a GPU, without one: it runs on fake
tensors, which have shapes and a device but no values. Views launch nothing and are not counted."""
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import hmpl
from evaluate import CLASSES

ALLOCATIONS = ("empty", "new_empty", "detach", "lift_fresh", "alias", "_unsafe_view")


def tensors(values) -> list:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class Launches(TorchDispatchMode):
    """Counts by function of hmpl.py: "launches", "bytes" (each operand once, broadcasts at their
    own size), "flops"; and `from_cpu`, the copies of tensors with dimensions from the CPU."""

    def __init__(self):
        super().__init__()
        self.launches, self.bytes, self.flops, self.from_cpu = (Counter() for _ in range(4))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name, inputs, outputs = function.__name__, tensors((args, kwargs or {})), tensors(result)
        on_gpu = [x for x in inputs + outputs if x.device.type == "cuda"]
        views = function.is_view or name.split(".")[0].startswith(ALLOCATIONS)
        if views or not on_gpu or function.namespace == "prim":
            return result
        where = self.where()
        if any(x.device.type == "cpu" and x.dim() for x in inputs):
            self.from_cpu[where] += 1
        self.launches[where] += 1
        for x in on_gpu:
            stored = [n for n, stride in zip(x.shape, x.stride()) if stride]
            self.bytes[where] += torch.Size(stored).numel() * x.element_size()
        if function.overloadpacket in flop_registry:
            count = flop_registry[function.overloadpacket]
            self.flops[where] += count(*args, **kwargs or {}, out_val=result)
        return result

    @staticmethod
    def where() -> str:
        frame = sys._getframe(2)
        while frame and Path(frame.f_code.co_filename).name != "hmpl.py":
            frame = frame.f_back
        return frame.f_code.co_qualname.split(".<locals>")[0] if frame else "elsewhere"


def attention(q, k, v, mask=None, dropout=0.):
    """The kernel that a GPU takes in low precision."""
    if mask is not None:
        operation = torch.ops.aten._scaled_dot_product_efficient_attention
        return operation(q, k, v, mask, False, dropout)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout)[0]


@unset_fake_temporarily()
def no_match(cost, present):
    return torch.zeros(cost.shape[0], *present.shape, dtype=torch.long)


def count(profile: str, size: tuple, batch: int, training: bool) -> Launches:
    """Counts forward and losses of a training step (20 boxes and all classes in each image), or a
    prediction, of a batch of images of a size (width, height) in bfloat16."""
    (width, height), classes = size, sum(map(len, CLASSES.values()))
    model = hmpl.HMPL(CLASSES, **hmpl.PROFILES[profile] | {"size": size},
                      text=torch.zeros(classes, 512)).train(training)
    all_classes = unset_fake_temporarily()(hmpl.matched_classes)
    with (FakeTensorMode(allow_non_fake_inputs=True), Launches() as launches,
          mock.patch.multiple(hmpl, match=no_match, matched_classes=all_classes),
          mock.patch.object(F, "scaled_dot_product_attention", attention)):
        model.to_empty(device="cuda")
        launches.launches.clear()
        launches.bytes.clear()
        images = [torch.zeros(3, height, width, dtype=torch.uint8) for _ in range(batch)]
        mask = torch.zeros(height, width, dtype=torch.uint8)
        target = {"boxes": torch.zeros(20, 4), "labels": torch.zeros(20, dtype=torch.long),
                  "semantic": mask, "drivable": mask}
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            if training:
                model(images, [target] * batch)
            else:
                with torch.no_grad():
                    stacked = torch.zeros(batch, 3, height, width, dtype=torch.uint8, device="cuda")
                    model.predict_batch(stacked)
        finally:
            torch.set_autocast_enabled("cuda", False)
    return launches
