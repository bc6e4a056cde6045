"""How fast evaluate.py's metrics are, beside pycocotools and faster-coco-eval (if installed).

    python tests/bench_metrics.py            # all of it, about six minutes
    python tests/bench_metrics.py --quick    # a tenth of the images

Box AP on drawn detections of the shape of BDD100K's and COCO's validation sets: seconds from flat
arrays (the peers: from their own objects, building these not counted) to precision and recall, the
largest difference to pycocotools, and the peak memory of a process of its own over what it held
after its imports. Then how that grows with the number of images, and mIoU's milliseconds an image.
"""
import argparse
import contextlib
import importlib.metadata
import io
import multiprocessing
import os
import platform
import queue as queue_module
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SHAPES = {  # images, classes, boxes and detections of an image
    "BDD100K val": (10_000, 10, 18.5, 100),
    "COCO val": (5_000, 80, 7.3, 100),
}


def draw_problem(images: int, classes: int, boxes: float, detections: int) -> tuple[dict, dict]:
    """Arrays as `evaluate.coco_ap` takes them: half the detections lie near a box, the others
    anywhere; classes are as unequal as in real data."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, classes + 1)
    share /= share.sum()

    def anywhere(n):
        size = np.exp(rng.normal(3.3, 1, (n, 2)))
        return np.concatenate([rng.random((n, 2)) * [1280, 720] - size / 2, size], axis=1)
    image = np.repeat(np.arange(images), rng.poisson(boxes, images))
    label, box = rng.choice(classes, len(image), p=share), anywhere(len(image))
    gt = {"image": image, "label": label, "box": box, "area": box[:, 2] * box[:, 3],
          "crowd": rng.random(len(image)) < 0.02}
    total = images * detections
    source = rng.integers(0, len(image), total // 2)
    near = box[source] + rng.normal(0, 0.15, (len(source), 4)) * np.tile(box[source, 2:], 2)
    near[:, 2:] = np.abs(near[:, 2:]) + 1
    other = total - len(source)
    dt = {"image": np.r_[image[source], rng.integers(0, images, other)],
          "box": np.r_[near, anywhere(other)],
          "label": np.r_[np.where(rng.random(len(source)) < 0.9, label[source],
                                  rng.integers(0, classes, len(source))),
                         rng.choice(classes, other, p=share)],
          "score": np.r_[rng.beta(2, 2, len(source)), rng.beta(1, 5, other)]}
    order = np.argsort(dt["image"], kind="stable")
    return gt, {key: value[order] for key, value in dt.items()}


def coco_objects(COCO, gt: dict, dt: dict, images: int, classes: int):
    truth = COCO()
    columns = zip(*(gt[key].tolist() for key in ("image", "label", "box", "area", "crowd")))
    truth.dataset = {
        "images": [{"id": i + 1} for i in range(images)],
        "categories": [{"id": k + 1} for k in range(classes)],
        "annotations": [{"id": n, "image_id": i + 1, "category_id": k + 1, "bbox": b, "area": a,
                         "iscrowd": int(c)} for n, (i, k, b, a, c) in enumerate(columns, start=1)]}
    truth.createIndex()
    rows = zip(*(dt[key].tolist() for key in ("image", "label", "box", "score")))
    return truth, truth.loadRes([{"image_id": i + 1, "category_id": k + 1, "bbox": b, "score": s}
                                 for i, k, b, s in rows])


def ours(gt, dt, images, classes):
    import evaluate
    yield
    yield evaluate.coco_ap(gt, dt, images, classes)


def pycocotools(gt, dt, images, classes):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    judge = COCOeval(*coco_objects(COCO, gt, dt, images, classes), "bbox")
    yield
    judge.evaluate(), judge.accumulate()
    yield judge.eval["precision"][..., 2], judge.eval["recall"]


def faster_coco_eval(gt, dt, images, classes):
    from faster_coco_eval import COCO, COCOeval_faster
    judge = COCOeval_faster(*coco_objects(COCO, gt, dt, images, classes), "bbox")
    yield
    judge.evaluate(), judge.accumulate()
    yield judge.eval["precision"][..., 2], judge.eval["recall"]


def peak_mb() -> float:
    """Of this process alone: getrusage's would begin at its parent's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def measure(scorer, shape, queue) -> None:
    """Runs in a process of its own."""
    import evaluate                                # noqa: F401  its imports do not count as the metric's memory
    held = peak_mb()
    with contextlib.redirect_stdout(io.StringIO()):
        run = scorer(*draw_problem(*shape), *shape[:2])
        next(run)
        began = time.perf_counter()
        result = next(run)
    queue.put((time.perf_counter() - began, peak_mb() - held, result))


def in_process(scorer, shape):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(scorer, shape, queue))
    process.start()
    while True:
        with contextlib.suppress(queue_module.Empty):
            answer = queue.get(timeout=5)
            process.join()
            return answer
        if not process.is_alive():
            sys.exit(f"{scorer.__name__} ended with exit code {process.exitcode}: out of memory?")


def installed(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def bench_ap(scale: float) -> None:
    peers = {"pycocotools": pycocotools, "faster-coco-eval": faster_coco_eval}
    for name, (images, *rest) in SHAPES.items():
        shape = (round(images * scale), *rest)
        print(f"\nbox AP, shape of {name}: {shape[0]} images, {shape[1]} classes, "
              f"{shape[0] * shape[3]} detections")
        print(f"  {'':<26}{'seconds':>9}{'peak MB':>9}  difference to pycocotools")
        times, reference = {}, None
        for peer, scorer in (peers | {"evaluate.py": ours}).items():
            version = installed(peer) if peer in peers else ""
            if version is None:
                print(f"  {peer:<26}not installed")
                continue
            runs = [in_process(scorer, shape) for _ in range(1 if peer == "pycocotools" else 3)]
            times[peer], memory, result = min(runs, key=lambda answer: answer[0])
            reference = result if peer == "pycocotools" else reference
            difference = "" if reference is None else max(
                float(np.abs(a - b).max()) for a, b in zip(result, reference))
            print(f"  {peer + ' ' + version:<26}{times[peer]:>9.2f}{memory:>9.0f}  {difference}",
                  flush=True)
        for peer in times.keys() & peers.keys():
            ratio = times[peer] / times["evaluate.py"]
            print(f"  evaluate.py is {ratio:.1f} times as fast as {peer}")


def bench_growth(scale: float) -> None:
    print("\nbox AP, growth with the number of images (10 classes, 100 detections each)")
    for images in (1_000, 10_000, 50_000):
        seconds, memory, _ = in_process(ours, (round(images * scale), 10, 18.5, 100))
        each = 1e6 * seconds / (images * scale * 100)
        print(f"  {round(images * scale):>7} images{seconds:>7.2f} s{each:>7.2f} us a detection"
              f"{memory:>7.0f} MB", flush=True)


def bench_miou(repeats: int) -> None:
    import evaluate
    rng = np.random.default_rng(0)
    print("\nmIoU, maps of 1280x720, one thread")
    for classes, width in ((19, 128), (3, 640)):      # a row changes class as often as in BDD100K
        truth = rng.integers(0, classes, (12, 1280 // width), np.uint8)
        truth = np.repeat(np.repeat(truth, 60, 0), width, 1)
        truth[:20] = 255
        shifted = np.roll(np.where(truth == 255, 0, truth), 5, (0, 1))
        noise = rng.random(truth.shape) < 0.1, rng.integers(0, classes, truth.shape, np.uint8)
        for what, guess in (("areas, edges shifted by 5 pixels", shifted),
                            ("and every tenth pixel noise", np.where(*noise, shifted))):
            meter = evaluate.MeanIoU([str(k) for k in range(classes)])
            meter.update(truth, guess)
            began = time.perf_counter()
            for _ in range(repeats):
                meter.update(truth, guess)
            each = (time.perf_counter() - began) / repeats
            print(f"  {classes:>2} classes, {what:<34}{1000 * each:>6.2f} ms an image, "
                  f"{10_000 * each:>5.1f} s for 10,000")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    scale = 0.1 if parser.parse_args().quick else 1.
    model, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    print(f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"numpy {np.__version__}")
    bench_miou(round(200 * scale))
    bench_ap(scale)
    bench_growth(scale)
