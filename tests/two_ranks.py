"""Run by torchrun in two processes: images with other labels give both the gradients of all.

Prints RESULT and SAME with the outcomes, which test_train.py reads.
"""
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from test_hmpl import make_model, random_images, random_target  # noqa: E402


def split(target):
    """Boxes and masks of a target, apart."""
    boxes = {key: target.pop(key) for key in ("boxes", "labels", "crowd")}
    return boxes, target


def step(model, images, targets):
    model.zero_grad()
    loss = sum(model(images, targets).values())
    loss.backward()
    return loss.detach()


parallel = partial(torch.nn.parallel.DistributedDataParallel, static_graph=True)
dist.init_process_group("gloo")
rank = dist.get_rank()

# Each rank has labels for other tasks: losses and gradients average to those of all.
images = random_images((64, 96), (64, 96))
targets = split(random_target(64, 96, 0, boxes=5))[0], split(random_target(64, 96, 1))[1]
model, alone = make_model().eval(), make_model().eval()   # BatchNorm would see one image, not two
model.text_features = model.text_features.detach()
both = parallel(model)
for _ in range(2):
    total = step(both, images[rank:rank + 1], targets[rank:rank + 1])
dist.all_reduce(total)
joint = step(alone, images, targets)
grads = [(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters())
         if q.grad is not None]
whole = torch.stack([q.norm() for _, q in grads]).norm()       # some are zero but for rounding
worst = max(((p - q).norm() / (q.norm() + 1e-5 * whole)).item() for p, q in grads)
if rank == 0:
    print("RESULT", abs(total.item() / 2 / joint.item() - 1) < 1e-5, worst < 1e-3, len(grads) > 100)

# Convolutional heads make their losses inside: the graph is the same whatever is labelled.
model = make_model(heads="conv")
both = parallel(model)
everything = random_target(64, 96, rank)
boxes, masks = split(dict(everything))
orders = [boxes, masks], [masks, boxes], [{}, everything], [everything, {}], [{}, {}]
for targets in orders:
    step(both, random_images((64, 96), seed=rank), [targets[rank]])
    total = sum(p.grad.double().sum() for p in model.parameters() if p.requires_grad)
    other = [torch.zeros_like(total) for _ in range(2)]
    dist.all_gather(other, total)
    if rank == 0:
        print("SAME", bool(other[0] == other[1]), bool(total.isfinite()))
del both                                         # its hooks hold the process group
dist.barrier()
dist.destroy_process_group()
