"""Where the time of a training step goes, how fast prediction is, and what peers take for the same.

    python tests/bench.py                 # everything, on the GPU if there is one, else on the CPU
    python tests/bench.py step peers --size 512x288 --batch 2

Random weights and drawn labels. Ratios come from runs in turn in one process, so that what else the
machine does hits both; peers that are not installed are left out by name. Tables are Markdown.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import count_launches  # noqa: E402
import evaluate  # noqa: E402
import hmpl  # noqa: E402
import prompts  # noqa: E402
import train  # noqa: E402

CLASSES, DEVICE = evaluate.CLASSES, evaluate.this_device()


# ------------------------------------------------------------------------------------- measuring

def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(*runs, rounds: int = 5) -> list[float]:
    """Median seconds of each run, taken in turn; the first round only warms up."""
    times = [[] for _ in runs]
    for n in range(rounds + 1):
        for run_times, run in zip(times, runs):
            start = now()
            run()
            if n:
                run_times.append(now() - start)
    return [statistics.median(run_times) for run_times in times]


def peak_mb() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class Arithmetic(TorchDispatchMode):
    """FLOPs of the operations while it is on; like FlopCounterMode, whose track of modules
    transformers' matcher breaks."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs or {}, out_val=result)
        return result


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gflop(run) -> float:
    with Arithmetic() as counter:
        run()
    return counter.flops / 1e9


class Clock:
    """Seconds spent in functions and modules while they are watched."""

    def __init__(self):
        self.seconds, self.undo = {}, []

    def watch(self, owner, name: str, label: str) -> None:
        real = getattr(owner, name)

        def timed(*args, **kwargs):
            start = now()
            result = real(*args, **kwargs)
            self.seconds[label] = self.seconds.get(label, 0.) + now() - start
            return result
        self.undo.append((owner, name, real))
        setattr(owner, name, timed)

    def __exit__(self, *error) -> None:
        for owner, name, real in self.undo:
            setattr(owner, name, real)

    def __enter__(self):
        return self


def table(header: str, rows: list[tuple]) -> None:
    names = header.split(" | ")
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


# --------------------------------------------------------------------------------------- the work

def draw_batch(batch: int, size: tuple[int, int], tasks=tuple(CLASSES)) -> tuple[list, list]:
    """Noise with blocks of every class and 20 boxes an image."""
    rng, (w, h) = torch.Generator().manual_seed(0), size
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=rng)
              for _ in range(batch)]
    targets = []
    for _ in range(batch):
        corner = torch.rand(20, 2, generator=rng) * torch.tensor([w * 0.8, h * 0.8])
        extent = 4 + torch.rand(20, 2, generator=rng) * torch.tensor([w / 6, h / 6])
        labels, target = torch.randint(0, 10, (20,), generator=rng), {}
        if "detection" in tasks:
            target = {"boxes": torch.cat([corner, corner + extent], 1), "labels": labels,
                      "crowd": torch.zeros(20, dtype=torch.bool)}
        for task in set(tasks) - {"detection"}:
            blocks = torch.randint(0, len(CLASSES[task]), (-(-h // 32), -(-w // 32)), generator=rng)
            pixels = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
            target[task] = pixels[:h, :w].to(torch.uint8)
        targets.append(target)
    return images, targets


def make_model(args, tasks=tuple(CLASSES), language: bool = True, frozen: bool = False,
               classes=CLASSES, **changes):
    torch.manual_seed(0)
    classes, text = {task: classes[task] for task in tasks}, None
    if language:
        tower = prompts.TextTower(**(train.TRAINING[args.profile]["tower"] or {}))
        text = prompts.TaskPrompts(tower, prompts.Tokenizer(prompts.BYTES), classes)
    profile = hmpl.PROFILES[args.profile] | {"size": args.size}
    model = hmpl.HMPL(classes, **profile | changes, text=text)
    model.freeze_backbone(frozen)
    return model.to(DEVICE).train()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6, fused=True)


def mixed(args):
    return torch.autocast(DEVICE.type, args.amp, enabled=args.amp is not None)


def train_step(args, model, batch, optimizer=None):
    def run():
        model.zero_grad(set_to_none=True)
        with mixed(args):
            losses = model(*batch)
        sum(losses.values()).backward()
        if optimizer:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1., foreach=True)
            optimizer.step()
    return run


# ----------------------------------------------------------------------------------------- tables

def sample_batches(args, count: int):
    """Batches of the drawn sample at the bench's size, as training draws them."""
    data = evaluate.BDD100K(evaluate.SAMPLE, "train")
    samples = train.Samples(data, dict.fromkeys(CLASSES, data.stems.tolist()), tuple(CLASSES))
    order = train.batch_keys([np.arange(len(samples))], args.batch, 0, count, 0, [args.size])
    loader = torch.utils.data.DataLoader(
        samples, batch_sampler=order, num_workers=evaluate.WORKERS[DEVICE.type],
        collate_fn=train.collate, pin_memory=DEVICE.type == "cuda")
    return ((images, targets) for images, targets, *_ in loader)


def watched_parts(model) -> list[tuple]:
    """The model's parts: owner, method and name in the tables."""
    modules = {"backbone": model.backbone, "adapter": model.adapter, "LV-Adapter": model.lv_adapter,
               "text tower": model.text,
               **{f"head {task}": head for task, head in model.heads.items()}}
    return [(module, "forward", name) for name, module in modules.items() if module is not None]


def bench_step(args) -> None:
    """A training step taken apart, on the drawn sample. Parts wait for the device, the whole does
    not."""
    model = make_model(args)
    optimizer, timings, totals = optimizer_of(model), {}, []
    batches = sample_batches(args, 2 * args.rounds + 1)
    train_step(args, model, next(batches), optimizer)()
    for n in range(2 * args.rounds):
        with Clock() as clock:
            if n % 2:                                                     # every other step
                clock.watch(model, "batch", "copy and normalise")
                for part in watched_parts(model):
                    clock.watch(*part)
                for function, name in (
                        ("box_cost", "matching: cost"), ("mask_cost", "matching: cost"),
                        ("match", "matching: copy and scipy"),
                        ("linear_sum_assignment", "of that scipy")):
                    clock.watch(hmpl, function, name)
                clock.watch(torch.Tensor, "backward", "backward")
                clock.watch(optimizer, "step", "optimizer")
            start = now()
            batch = next(batches)
            waited = now() - start
            train_step(args, model, batch, optimizer)()
            clock.seconds |= {"data wait": waited, "all": now() - start}
        if n % 2:
            for name, value in clock.seconds.items():
                timings.setdefault(name, []).append(value)
        else:
            totals.append(clock.seconds["all"])
    total = statistics.median(totals)
    timings = {name: statistics.median(values) for name, values in timings.items()}
    whole = timings.pop("all")
    rest = whole - sum(value for name, value in timings.items() if not name.startswith("of that"))
    flops = gflop(train_step(args, model, batch))
    print(f"\nA training step: {setup(args)}")
    timings |= {"losses, clipping and the rest": rest, "all": whole}
    table("part | ms | share", [(name, f"{1000 * value:.1f}", f"{value / whole:.1%}")
                                for name, value in timings.items()])
    speeds = ", ".join(f"{name} {speed / 1e9:.0f} GFLOP/s"
                       for name, speed in machine_rates(args).items())
    print(f"\nUnwatched {1000 * total:.0f} ms: {args.batch / total:.2f} images/s, "
          f"{flops / total:.0f} GFLOP/s, peak memory {peak_mb()} MB; this machine's own rate: "
          f"{speeds}")


def bench_memory(args) -> None:
    """What a step's graph keeps of each part until backward, in adapt and in finetune."""
    columns = []
    for frozen in (True, False):
        model, kept, current = make_model(args, frozen=frozen), {}, ["losses"]
        state = (*model.parameters(), *model.buffers())
        storages = {tensor.untyped_storage().data_ptr() for tensor in state}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                kept[current[-1]] = kept.get(current[-1], 0) + storage.nbytes()
            return tensor
        for owner, name, label in watched_parts(model):
            owner.register_forward_pre_hook(lambda *_, label=label: current.append(label))
            owner.register_forward_hook(lambda *_: current.pop() and None)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed(args):
            losses = model(*draw_batch(args.batch, args.size))            # the graph lives with it
        columns.append(kept | {"all": sum(kept.values())})
        del losses
    print(f"\nMB an image that the graph keeps: {setup(args)}")
    table("part | adapt | finetune", [
        (name, *(f"{kept.get(name, 0) / args.batch / 2 ** 20:.1f}" for kept in columns))
        for name in columns[1]])


def setup(args) -> str:
    w, h = args.size
    return f"profile {args.profile}, {w}x{h}, batch {args.batch}, {args.amp or 'float32'}"


def machine_rates(args) -> dict[str, float]:
    """FLOP/s of a large product and of a 3x3 convolution in the dtype of the bench."""
    n, dtype = 8192 if DEVICE.type == "cuda" else 1024, args.amp or torch.float32
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    x, weight = (torch.randn(shape, device=DEVICE, dtype=dtype)
                 for shape in ((8, 256, n // 64, n // 64), (256, 256, 3, 3)))
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    product, convolution = seconds(lambda: a @ b, lambda: F.conv2d(x, weight, padding=1))
    return {"matrix product": 2 * n ** 3 / product,
            "convolution": 2 * x[:, 0].numel() * 256 * 256 * 9 / convolution}


def bench_ratios(args) -> None:
    """Prints what heads save by sharing backbone and adapter, and adapt by a frozen backbone."""
    batch, tasks = draw_batch(args.batch, args.size), tuple(CLASSES)
    whole = make_model(args)
    alone = [make_model(args, (task,)) for task in tasks]
    shared = make_model(args)

    def trunk():
        shared.zero_grad(set_to_none=True)
        with mixed(args):
            levels = shared.features(*shared.batch(batch[0]), shared.embeddings()).levels
        sum(level.float().square().mean() for level in levels).backward()
    three, base, *single = seconds(
        train_step(args, whole, batch), trunk, *(train_step(args, model, batch) for model in alone),
        rounds=args.rounds)
    expected = base + sum(time - base for time in single)
    frozen = make_model(args, frozen=True)
    work = [gflop(train_step(args, model, batch)) for model in (frozen, whole)]
    adapt, finetune = seconds(train_step(args, frozen, batch), train_step(args, whole, batch),
                              rounds=args.rounds)
    print(f"\nRatios: {setup(args)}")
    table("what | measured | wanted", [
        ("three tasks / (backbone and adapter once + each head alone)", f"{three / expected:.2f}",
         "at most 1.05"),
        ("adapt step / finetune step", f"{adapt / finetune:.2f}",
         f"{work[0] / work[1]:.2f} by arithmetic")])


def bench_predict(args) -> None:
    """Prediction alone, and scoring the drawn sample beside predicting it."""
    model, rows = make_model(args).eval(), []
    for batch in (1, 8):
        images, _ = draw_batch(batch, args.size)

        def predict():
            with torch.inference_mode(), mixed(args):
                model.predict(images)
        time_, = seconds(predict, rounds=args.rounds)
        rows.append((batch, f"{batch / time_:.1f}", f"{1000 * time_:.1f}"))
    print(f"\nPrediction: {setup(args)}")
    table("batch | images/s | ms a batch", rows)
    data = evaluate.BDD100K(evaluate.SAMPLE, "val")
    size = evaluate.BATCH[DEVICE.type]
    batches = [list(range(len(data)))[n:n + size] for n in range(0, len(data), size)]
    options = {"amp": args.amp, "workers": evaluate.WORKERS[DEVICE.type]}

    def scoring():
        evaluate.evaluate(model, data, batch=size, **options)

    def predicting():
        for _ in evaluate.predictions(lambda _, images: model.predict(images), data, batches,
                                      DEVICE, **options):
            pass
    scored, alone = seconds(scoring, predicting, rounds=args.rounds)
    print(f"\nThe sample's {len(data)} images: scoring takes {scored / alone:.2f} times as long as "
          "predicting them (wanted: at most 1.10)")
    with tempfile.TemporaryDirectory() as folder:
        labelling, alone = seconds(*pseudo_runs(args, folder), rounds=args.rounds)
    print(f"Pseudo labels of its training images take {labelling / alone:.2f} times as long as the "
          "three teachers' predictions")


def pseudo_runs(args, folder: str) -> tuple:
    """The stage pseudo with teachers that have learned nothing, and their predictions alone."""
    width, height = args.size
    run = train.start(train.parse_args([
        "--data", str(evaluate.SAMPLE), "--profile", args.profile, "--size", f"{width}x{height}",
        "--pretrained", "none", "--clip", "none", "--out", folder]))
    run.say = lambda text: None
    teachers = train.stages_of(run)["teachers"]
    for stage in teachers:
        t = train.Training(run, stage, train.new_model(run, stage))
        t.step = stage.steps
        t.save({"images": 0})
    indices, size = np.unique(np.concatenate(list(run.to_label.values()))), evaluate.BATCH["cpu"]
    batches = np.split(indices, range(size, len(indices), size))

    def labelling():
        shutil.rmtree(run.out / "pseudo", ignore_errors=True)
        train.run_pseudo(run, teachers)

    def alone():
        for _ in train.teacher_predictions(run, teachers, batches):
            pass
    return labelling, alone


def bench_count(args) -> None:
    """Prints what a GPU would launch, read and write, counted on fake tensors, so without one."""
    for profile, size in (("paper", (1280, 720)), ("tiny", (256, 144))):
        for training, batch in ((True, 16), (False, 1)):
            counts = count_launches.count(profile, size, batch, training)
            what = "forward and losses" if training else "prediction"
            print(f"\n{what}, profile {profile}, {size[0]}x{size[1]}, batch {batch}, bfloat16")
            rows = [(name, launches, f"{counts.bytes[name] / 1e9:.2f}",
                     f"{counts.flops[name] / 1e12:.3f}", counts.from_cpu[name])
                    for name, launches in counts.launches.most_common()]
            totals = [sum(x.values()) for x in (counts.launches, counts.bytes, counts.flops)]
            rows.append(("all", totals[0], f"{totals[1] / 1e9:.1f}", f"{totals[2] / 1e12:.2f}",
                         sum(counts.from_cpu.values())))
            table("function | launches | GB | TFLOP | copies from the CPU", rows)


def bench_speed(args) -> None:
    """Prints speed and memory of training steps and predictions, a GPU's also without graphs."""
    rows = []
    for frozen, batch in ((False, 16), (True, 16), (False, 2)):
        model, work = make_model(args, frozen=frozen), draw_batch(batch, args.size)
        reset_peak()
        time_, = seconds(train_step(args, model, work, optimizer_of(model)),
                         rounds=2 * args.rounds)
        rows.append((f"{'adapt' if frozen else 'train'}, {batch}", f"{batch / time_:.1f}",
                     f"{1000 * time_:.1f}", peak_mb(), ""))
        del model
    model = make_model(args).eval()
    for batch in (1, 8, 16):
        images, _ = draw_batch(batch, args.size)

        def predict():
            with torch.inference_mode(), mixed(args):
                return model.predict(images)

        def eager():
            stacked = torch.stack(images).to(DEVICE)
            with torch.inference_mode(), mixed(args):
                return model.predict_batch(stacked)
        reset_peak()
        time_, eager_time = seconds(predict, eager, rounds=4 * args.rounds)
        captured, plain = predict(), eager()
        equal = all(torch.equal(one[key], plain[key][i])
                    for i, one in enumerate(captured) for key in one)
        rows.append((f"predict, {batch}", f"{batch / time_:.1f}", f"{1000 * time_:.1f}", peak_mb(),
                     f"{1000 * eager_time:.1f} ms without a graph, equal: {equal}"))
    print(f"\nSpeed: {setup(args)}")
    table("what, batch | images/s | ms | peak MB | beside it", rows)


def bench_peers(args) -> None:
    """Each peer beside ours; of both also the FLOPs, as ours is not always the same network."""
    rows = []
    for make in (maskformer_peer, faster_rcnn_peer, open_clip_peer, transformers_clip_peer):
        try:
            what, ours, peer = make(args)
        except ImportError as missing:
            print(f"left out: {missing.name} is not installed")
            continue
        time_ours, time_peer = seconds(ours, peer, rounds=args.rounds)
        rows.append((what, f"{1000 * time_ours:.0f}", f"{1000 * time_peer:.0f}",
                     f"{time_peer / time_ours:.2f}", f"{gflop(ours):.0f}", f"{gflop(peer):.0f}"))
    table("forward, losses and backward | ours, ms | peer, ms | peer / ours | ours, GFLOP | "
          "peer, GFLOP", rows)


def maskformer_peer(args):
    """transformers' MaskFormer, ResNet-50, 100 queries, 6 decoder layers, no encoder, at 512x288,
    batch 2."""
    from transformers import (DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation,
                              ResNetConfig)
    size, batch = (512, 288), 2
    images, targets = draw_batch(batch, size, ("semantic",))
    args = argparse.Namespace(**vars(args) | {"profile": "paper", "size": size})
    ours = make_model(args, ("semantic",), language=False)
    config = MaskFormerConfig(
        backbone_config=ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"]),
        decoder_config=DetrConfig(encoder_layers=0, decoder_layers=6, num_queries=100),
        num_labels=19, use_auxiliary_loss=True)
    theirs = MaskFormerForInstanceSegmentation(config).to(DEVICE).train()
    pixels = torch.stack(images).to(DEVICE).float() / 255
    labels = [target["semantic"].unique().to(DEVICE) for target in targets]
    masks = [(target["semantic"].to(DEVICE) == classes[:, None, None]).float()
             for target, classes in zip(targets, labels)]

    def peer():
        theirs.zero_grad(set_to_none=True)
        with mixed(args):
            loss = theirs(pixel_values=pixels, mask_labels=masks, output_hidden_states=True,
                          class_labels=[classes.long() for classes in labels]).loss
        loss.sum().backward()
    return "MaskFormer R50, transformers", train_step(args, ours, (images, targets)), peer


def faster_rcnn_peer(args):
    """torchvision's Faster R-CNN R50-FPN at 512x288, batch 2."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn
    size, batch = (512, 288), 2
    images, targets = draw_batch(batch, size, ("detection",))
    args = argparse.Namespace(**vars(args) | {"profile": "paper", "size": size})
    ours = make_model(args, ("detection",), language=False, heads="conv")
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=11,
                                     min_size=288, max_size=512, trainable_backbone_layers=5)
    theirs.to(DEVICE).train()
    pixels = [image.to(DEVICE).float() / 255 for image in images]
    truth = [{"boxes": target["boxes"].to(DEVICE), "labels": target["labels"].to(DEVICE) + 1}
             for target in targets]

    def peer():
        theirs.zero_grad(set_to_none=True)
        with mixed(args):
            losses = theirs(pixels, truth)
        sum(losses.values()).backward()
    return "Faster R-CNN R50-FPN, torchvision", train_step(args, ours, (images, targets)), peer


def learned_prompts():
    """32 prompts on a tower of ViT-B/16's size, and the ids of the sentences with 16 words in place
    of contexts. The names are two letters long: two tokens without CLIP's vocabulary, as the
    longest of BDD100K's class names are with it."""
    tokenizer = prompts.Tokenizer(prompts.BYTES)
    names = [a + b for a in "abcd" for b in "efghijkl"]
    text = prompts.TaskPrompts(prompts.TextTower(), tokenizer, {"semantic": names}).to(DEVICE)
    tokens = tokenizer(text.texts).to(DEVICE)

    def ours():
        text.contexts.grad = None
        text().square().mean().backward()
    return ours, tokens


def open_clip_peer(args):
    """open_clip's text tower on the same prompts, embedded, over its 77 tokens, as CoOp does it."""
    import open_clip
    ours, tokens = learned_prompts()
    clip = open_clip.create_model("ViT-B-16").to(DEVICE).requires_grad_(False)
    embedded = clip.token_embedding(tokens).detach().requires_grad_()

    def peer():
        embedded.grad = None
        x = clip.transformer(embedded + clip.positional_embedding, attn_mask=clip.attn_mask)
        x = clip.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ clip.text_projection
        x.square().mean().backward()
    return "text tower, 32 learned prompts, open_clip", ours, peer


def transformers_clip_peer(args):
    """transformers' text tower on the same tokens; gradients reach their embeddings."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    ours, tokens = learned_prompts()
    config = CLIPTextConfig(projection_dim=512, eos_token_id=49407)
    clip = CLIPTextModelWithProjection(config).to(DEVICE).requires_grad_(False)
    embeddings = next(module for name, module in clip.named_modules()
                      if name.endswith("token_embedding"))
    embedded = embeddings(tokens).detach().requires_grad_()
    embeddings.forward = lambda ids: embedded

    def peer():
        embedded.grad = None
        clip(input_ids=tokens).text_embeds.square().mean().backward()
    return "text tower, 32 learned prompts, transformers", ours, peer


def bench_growth(args) -> None:
    """A training step's cost as one thing grows."""
    (w, h), profile = args.size, hmpl.PROFILES[args.profile]
    many = {task: tuple(f"{name} {n}" for n in range(4) for name in names)
            for task, names in CLASSES.items()}
    queries = profile["maskformer"] | {"queries": 2 * profile["maskformer"]["queries"]}
    proposals = profile["sparse_rcnn"] | {"proposals": 2 * profile["sparse_rcnn"]["proposals"]}
    cases = [("twice the width and height", {"size": (2 * w, 2 * h)}, {}),
             ("twice the batch", {"batch": 2 * args.batch}, {}),
             ("twice the queries", {}, {"maskformer": queries}),
             ("twice the proposals", {}, {"sparse_rcnn": proposals}),
             ("four times the classes", {}, {"classes": many}),
             ("two tasks", {"tasks": ("detection", "semantic")}, {}),
             ("convolutional heads", {}, {"heads": "conv"})]
    rows, base = [], train_step(args, make_model(args), draw_batch(args.batch, args.size))
    for name, work, changes in cases:
        tasks = work.pop("tasks", tuple(CLASSES))
        case = argparse.Namespace(**vars(args) | work)
        step = train_step(case, make_model(case, tasks, **changes),
                          draw_batch(case.batch, case.size, tasks))
        plain, grown = seconds(base, step, rounds=args.rounds)
        rows.append((name, f"{1000 * plain:.0f}", f"{1000 * grown:.0f}", f"{grown / plain:.2f}"))
    print(f"\nGrowth: {setup(args)}")
    table("training step | ms without | ms with | ratio", rows)


def bench_data(args) -> None:
    """1280x720 files to augmented tensors on one core, beside PIL and ToTensor; and labels of
    BDD100K's number."""
    torch.set_num_threads(1)
    drawn = evaluate.BDD100K(evaluate.SAMPLE, "train")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        image = Image.open(drawn.root / drawn.files[0])
        image.resize((1280, 720), Image.Resampling.LANCZOS).save(root / "x.jpg", quality=90)
        for task in ("semantic", "drivable"):
            mask = Image.fromarray(drawn.mask(task, 0))
            mask.resize((1280, 720), Image.Resampling.NEAREST).save(root / f"{task}.png")

        def ours():
            train.augment(evaluate.read_image(root / "x.jpg"), {}, (1152, 648), True)

        def whole():
            target = {task: torch.from_numpy(evaluate.read_mask(root / f"{task}.png"))
                      for task in ("semantic", "drivable")}
            train.augment(evaluate.read_image(root / "x.jpg"), target, (1152, 648), True)

        def pil():
            picture = Image.open(root / "x.jpg").convert("RGB")
            picture = picture.resize((1152, 648), Image.Resampling.BILINEAR)
            to_tensor(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        a, b, c = seconds(ours, pil, whole, rounds=10 * args.rounds)
        script = root / "labels.py"
        script.write_text(LABELS.format(path=sys.path[0], root=str(root)))
        done = subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
        labels = json.loads(done.stdout)
    print("\nData")
    table("what | measured", [
        ("1280x720 JPEG to 1152x648, mirrored, one core",
         f"{1000 * a:.1f} ms; PIL and ToTensor {1000 * b:.1f} ms: {b / a:.2f} times as fast"),
        ("the same with two masks", f"{1000 * c:.1f} ms: 16 workers give {16 / c:.0f} images/s"),
        ("boxes of 69,863 images",
         f"{labels['seconds']:.1f} s, {labels['boxes']:,} boxes, resident {labels['resident']} MB "
         f"more, {labels['touched']} MB more in a worker that has read all")])


LABELS = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {path!r})
import numpy as np
import evaluate
root, rng = Path({root!r}), np.random.default_rng(0)
if not (root / "labels").exists():
    (root / "labels/det_20").mkdir(parents=True)
    (root / "images/100k/train").mkdir(parents=True)
    names = [f"{{n:08x}}-{{n * 7919 % 10 ** 8:08x}}.jpg" for n in range(69863)]
    weather = {{"weather": "clear", "scene": "city street", "timeofday": "daytime"}}
    state = {{"occluded": False, "truncated": False, "trafficLightColor": "NA"}}
    def frames():
        for name, count in zip(names, rng.poisson(18.46, len(names))):
            corners = (rng.random((count, 2)) * 600).tolist()
            yield {{"name": name, "attributes": weather, "timestamp": 10000, "labels": [
                {{"id": str(j), "category": "car", "attributes": state,
                 "box2d": {{"x1": x, "y1": y, "x2": x + 30.5, "y2": y + 20.5}}}}
                for j, (x, y) in enumerate(corners)]}}
    evaluate.write_entries(root / "labels/det_20/det_train.json", frames())
    for name in names:
        (root / "images/100k/train" / name).touch()
def megabytes(key):
    lines = open("/proc/self/smaps_rollup")
    return sum(int(line.split()[1]) for line in lines if line.startswith(key)) >> 10
before, start = megabytes("Rss:"), time.perf_counter()
data = evaluate.BDD100K(root, "train")
measured = {{"seconds": time.perf_counter() - start, "boxes": len(data.boxes),
            "resident": megabytes("Rss:") - before}}
end, write = os.pipe()
if not os.fork():
    dirty = megabytes("Private_Dirty:")
    for i in range(len(data)):
        data.target(i, ["detection"])
    os.write(write, str(megabytes("Private_Dirty:") - dirty).encode())
    os._exit(0)
os.wait()
print(json.dumps(measured | {{"touched": int(os.read(end, 20))}}))
"""


BENCHES = {"count": bench_count, "speed": bench_speed, "step": bench_step,
           "memory": bench_memory, "ratios": bench_ratios, "predict": bench_predict,
           "peers": bench_peers, "growth": bench_growth, "data": bench_data}


def main() -> None:
    gpu = DEVICE.type == "cuda"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", nargs="*", choices=[*BENCHES, []], help="which tables; default all")
    p.add_argument("--profile", choices=hmpl.PROFILES, default="paper" if gpu else "tiny")
    p.add_argument("--size", type=train.image_size, metavar="WxH",
                   default=(1280, 720) if gpu else (256, 144))
    p.add_argument("--batch", type=int, default=16 if gpu else 4)
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "no"), default="auto")
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    args.amp = evaluate.amp_type(args.amp, DEVICE)
    versions = " ".join(f"{name} {importlib.metadata.version(name)}"
                        for name in ("torch", "torchvision", "transformers", "open_clip_torch")
                        if importlib.util.find_spec(name.removesuffix("_torch")))
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    name = f"{platform.processor() or platform.machine()}, {cores}"
    if gpu:
        name = torch.cuda.get_device_name()
    print(f"{name}; Python {platform.python_version()} {versions}")
    for what in args.what or BENCHES:
        BENCHES[what](args)


if __name__ == "__main__":
    main()
