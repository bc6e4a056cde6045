"""Lane marking: files, polygons, the official score, and thin lines that reach the loss."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt

import evaluate
import hmpl
from evaluate import LANE, BDD100K, InputError, LabelWriter, LaneF1, read_mask

BACKGROUND = 8


def empty(height=10, width=10):
    return np.full((height, width), BACKGROUND, np.uint8)


def f1(truth, prediction):
    meter = LaneF1(LANE)
    meter.update(truth, prediction)
    scores = meter.compute()
    return [scores[f"per_class {radius}px"]["single white"] for radius in evaluate.LANE_RADII]


def test_f1_by_hand(monkeypatch):
    truth, below = empty(), empty()
    truth[3, 3:7], below[7, 3:7] = 6, 6                             # 4 pixels apart
    assert f1(truth, below) == [0, 0, 1]
    assert f1(truth, empty()) == f1(empty(), truth) == [0, 0, 0]    # one is empty
    assert f1(empty(), empty()) == [1, 1, 1]                        # both are
    monkeypatch.setattr(evaluate, "LANE_RADII", (2, 3, 4, 5))
    assert f1(truth, below) == [0, 0, 1, 1]
    truth, beside = empty(), empty()
    truth[3, 3:6], beside[5:8, 7] = 6, 6
    assert f1(truth, beside) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def reference_f1(truth, prediction, k, radius):
    """The toolkit's rule in words: shares of pixels by Euclidean distance transforms."""
    truth, prediction = truth == k, prediction == k
    if not truth.any() or not prediction.any():
        return float(truth.any() == prediction.any())
    precision = (distance_transform_edt(~truth)[prediction] <= radius).mean()
    recall = (distance_transform_edt(~prediction)[truth] <= radius).mean()
    return 2 * precision * recall / max(precision + recall, 1e-9)


def test_f1_is_that_of_distance_transforms_and_merges():
    rng = np.random.default_rng(0)
    pairs = []
    for shape in ((40, 60), (3, 50), (50, 4), (1, 1)):
        maps = rng.integers(0, 8, (2, *shape)).astype(np.uint8)
        pairs.append(np.where(rng.random((2, *shape)) < 0.03, maps, BACKGROUND).astype(np.uint8))
    pairs[0][1, 5:9] = 255                                          # no class: as background
    whole, first, rest = (LaneF1(LANE) for _ in range(3))
    for n, pair in enumerate(pairs):
        whole.update(*pair)
        (rest if n else first).update(*pair)
    first.merge(rest)
    scores, merged = whole.compute(), first.compute()
    assert merged["per_class"] == pytest.approx(scores["per_class"])
    assert merged["binary IoU"] == scores["binary IoU"]
    for radius in (1, 2, 5):
        expected = [np.mean([reference_f1(*pair, k, radius) for pair in pairs]) for k in range(8)]
        assert list(scores[f"per_class {radius}px"].values()) == pytest.approx(expected, abs=1e-9)
        assert scores[f"F1 {radius}px"] == pytest.approx(np.mean(expected))
    truth, predicted = (np.concatenate([pair[i].ravel() < 8 for pair in pairs]) for i in (0, 1))
    assert scores["binary IoU"] == (truth & predicted).sum() / (truth | predicted).sum()
    assert scores["binary recall"] == (truth & predicted).sum() / truth.sum()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images/100k/val").mkdir(parents=True)
    for stem in "ab":
        Image.new("RGB", (1280, 720)).save(tmp_path / f"images/100k/val/{stem}.jpg")
    return tmp_path


def test_official_bytes_are_decoded_and_written(root):
    masks = root / "labels/lane/masks/val"
    written = np.full((720, 1280), 255, np.uint8)
    written[:4, :8] = np.arange(8) + np.array([0, 16, 32, 48], np.uint8)[:, None]
    evaluate.write_picture(masks / "a.png", Image.fromarray(written))
    data = BDD100K(root, tasks=["lane"])
    assert data.labelled["lane"].tolist() == [True, False] and data.classes["lane"] == LANE
    assert "lane" not in BDD100K(root).classes                      # unless it is asked for
    ids = data.sample(0)[1]["lane"]
    assert (ids[:4, :8] == torch.arange(8)).all() and (ids[4:] == BACKGROUND).all()
    ids[10:12] = 255                                                # no pseudo label
    writer = LabelWriter(root / "out", "val", data.classes)
    writer.add("a.jpg", {"lane": ids})
    writer.close()
    file = root / "out/labels/lane/masks/val/a.png"
    stored = np.array(Image.open(file))
    assert (stored[:4, :8] == np.arange(8)).all() and (stored[20:] == 255).all()
    assert (stored[10:12] & 8).all()                                # the toolkit's background
    assert np.array_equal(read_mask(file, 9, lane=True), ids)
    for wrong in (np.uint8([[64]]), np.uint16([[256]]), np.uint16([[65535]])):
        evaluate.write_picture(masks / "a.png", Image.fromarray(wrong))
        with pytest.raises(InputError, match=r"holds id (64|256|65479)"):
            data.mask("lane", 0)


def marking(category, vertices, types, closed=False, **attributes):
    return {"category": category, "attributes": attributes,
            "poly2d": [{"vertices": vertices, "types": types, "closed": closed}]}


@pytest.mark.parametrize("file", ["lane/polygons/lane_val.json",
                                  "bdd100k_labels_images_val.json"])
def test_polygons_are_drawn_as_official_masks_look(root, file):
    lines = [("single white", [[100, 300], [900, 300]], "LL", False),
             ("road curb", [[200, 100], [200, 700]], "LL", False),
             ("crosswalk", [[400, 400], [600, 400], [600, 500], [400, 500]], "LLLL", True),
             ("single yellow", [[700, 600], [800, 500], [900, 700], [1000, 600]], "LCCC", False)]
    if file.startswith("lane"):
        labels = [marking(*line) for line in lines]
    else:
        labels = [marking("lane", *line[1:], laneType=line[0]) for line in lines]
        labels.append(marking("drivable area", [[0, 0], [9, 9]], "LL"))      # of another task
    evaluate.write_json(root / "labels" / file, [{"name": "a.jpg", "labels": labels}])
    data = BDD100K(root, tasks=["lane"])
    assert data.labelled["lane"].tolist() == [True, False]
    mask = data.sample(0)[1]["lane"].numpy()
    assert (mask[299:302, 300:890] == 6).all() and (mask[[297, 303], 300:890] == 8).all()
    assert (mask[110:690, 199:202] == 4).all()                      # 3 wide, and over the first
    assert (mask[450, [400, 600]] == 0).all() and mask[450, 500] == 8        # an outline
    assert (mask[[600, 600, 600], [700, 850, 1000]] == 7).all()     # a curve through its middle
    assert mask[571, 766] == 7 and mask[600, 800] == 8              # and beside its chord
    for name, end, types, message in [
            ("road", 4, "LL", "(laneType|category) 'road': expected one of crosswalk"),
            ("crosswalk", 4, "L", "poly2d"), ("crosswalk", 4, "LX", "poly2d .*as many types"),
            ("crosswalk", 10 ** 400, "LL", "poly2d"), ("crosswalk", "x", "LL", "poly2d")]:
        category = name if file.startswith("lane") else "lane"
        bad = marking(category, [[1, 2], [3, end]], types, laneType=name)
        evaluate.write_json(root / "labels" / file, [{"name": "a.jpg", "labels": [bad]}])
        with pytest.raises(InputError, match=f"frame a.jpg, label 0 has {message}"):
            BDD100K(root, tasks=["lane"])
    evaluate.write_json(root / "labels" / file, [{"name": "a.jpg", "labels": []}] * 2)
    with pytest.raises(InputError, match="image a occurs more than once"):
        BDD100K(root, tasks=["lane"])


def test_folders_of_official_masks_are_scored(root, capsys):
    truth = empty(20, 30)
    truth[4, 5:20], truth[15, 5:20] = 3, 6
    bytes_of = np.where(truth == BACKGROUND, 255, truth | 16).astype(np.uint8)         # dashed
    evaluate.write_picture(root / "gt/a.png", Image.fromarray(bytes_of))
    evaluate.write_picture(root / "gt/b.png", Image.fromarray(bytes_of))
    evaluate.write_picture(root / "dt/a.png", Image.fromarray(bytes_of))
    evaluate.main(["--gt", f"{root}/gt", "--dt", f"{root}/dt", "--task", "lane",
                   "--json", f"{root}/scores.json"])
    assert "lane F1 2px" in capsys.readouterr().out
    scores = json.loads((root / "scores.json").read_text())
    assert scores["lane"]["F1 2px"] == 100 * (6 + 2 * 0.5) / 8      # b is missed: an empty mask
    assert scores["lane"]["binary recall"] == 50
    assert scores["dropped"]["images without prediction, counted as all missed"] == 1


def test_thin_lines_reach_the_matching_whole():
    """A label larger than its image: each cell has the shares of the label's own pixels."""
    label = torch.zeros(12, 24, dtype=torch.uint8)                  # image: 4 x 8, thrice as small
    label[:, 7], label[0, 12:18] = 1, 255
    (fine, fine_valid), (coarse, valid) = hmpl.mask_targets(
        hmpl.stretch_labels([label], torch.tensor([[4., 8.]])), 2, (1, 2))
    assert fine[0, 1] == pytest.approx(np.array([[0, 1 / 6, 0, 0]] * 2))
    assert fine_valid == pytest.approx(np.array([[[1, 1, 5 / 6, 1], [1, 1, 1, 1]]]))
    assert coarse[0, 1] == pytest.approx(np.array([[1 / 12, 0]]))
    assert valid == pytest.approx(np.array([[[1, 1 - 1 / 24]]]))
    noise = torch.randint(0, 3, (12, 24), generator=torch.Generator().manual_seed(0)).byte()
    large, sizes = noise.repeat_interleave(3, 0).repeat_interleave(3, 1), torch.tensor([[12., 24.]])
    a, b = (hmpl.mask_targets(hmpl.stretch_labels([x], sizes), 3, (3, 6)) for x in (noise, large))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_thin_lines_reach_the_loss_whole():
    """Labels larger than their images: each cell draws one of its label's pixels, any of them, and
    masks are sampled at that pixel's centre, as if they had been enlarged to the label's size."""
    rng = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 3, size, dtype=torch.uint8, generator=rng)
              for size in ((12, 24), (9, 15))]
    stretched = hmpl.stretch_labels(labels, torch.tensor([[4., 8.], [3., 5.]]))    # one is padded
    features = torch.randn(2, 1, 1, 2, generator=rng)               # stride 4
    drawn = [set(), set()]
    for _ in range(300):
        ids, centres = hmpl.draw_pixels(stretched, (1, 2))
        values = F.grid_sample(features, centres, padding_mode="border", align_corners=False)
        pixels = ((centres + 1) / 2 * torch.tensor([24, 12]) - 0.5).round().long()
        for i, label in enumerate(labels):
            enlarged = F.interpolate(features[i:i + 1], size=(12, 24), mode="bilinear")[0, 0]
            for row, column in np.ndindex(2, 4):
                x, y = pixels[i, row, column].tolist()
                assert (y // 6, x // 6) == (row, column)
                inside = y < label.shape[0] and x < label.shape[1]
                assert ids[i, row, column] == (label[y, x] if inside else 255)
                assert values[i, 0, row, column] == pytest.approx(float(enlarged[y, x]), abs=1e-5)
                drawn[i].add((y, x))
    assert len(drawn[0]) > 280                                      # of 288


def test_a_label_is_the_same_at_any_size(monkeypatch):
    """Enlarged three times it gives nearly the same losses, with both kinds of heads, although they
    are computed at other places of a cell; also in a padded batch. If each cell draws the pixel at
    its centre, MaskFormer's losses are equal."""
    rng = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=rng)
              for size in ((32, 64), (40, 48))]
    labels = [torch.randint(0, 3, (len(image[0]) // 8, image.shape[2] // 8), dtype=torch.uint8,
                            generator=rng).repeat_interleave(8, 0).repeat_interleave(8, 1)
              for image in images]
    large = [label.repeat_interleave(3, 0).repeat_interleave(3, 1) for label in labels]
    medium = [label[::2, ::2] for label in large]                   # 3 x 3 pixels a cell
    for heads in hmpl.HEADS:
        torch.manual_seed(0)
        model = hmpl.HMPL({"ground": "abc"}, **hmpl.PROFILES["tiny"], heads=heads).eval()
        a, b = (model(images, [{"ground": x} for x in maps]) for maps in (labels, large))
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=0.02, atol=0)
        if heads == "transformer":
            monkeypatch.setattr(torch, "rand", lambda *size, device: torch.full(size, 0.5))
            c = model(images, [{"ground": x} for x in medium])
            monkeypatch.undo()
            for key, value in a.items():
                torch.testing.assert_close(c[key], value, rtol=1e-5, atol=0)


def test_a_line_needs_a_fifth_of_its_background():
    """Lines win where their score is above a fifth of background's; other tasks take the best."""
    model = hmpl.HMPL({"lane": LANE, "path": "abcdefghi"}, background_weights={"lane": 0.2},
                      **hmpl.PROFILES["tiny"]).eval()
    scores = torch.zeros(1, 9, 32, 64)
    scores[:, 6], scores[:, 8] = 0.19, 0.81
    scores[:, 6, 16:] = 0.13
    for head in model.heads.values():
        head.predict = lambda features: scores.clone()
    prediction = model.predict([torch.zeros(3, 32, 64, dtype=torch.uint8)])[0]
    assert (prediction["lane"][:16] == 6).all() and (prediction["lane"][16:] == 8).all()
    assert (prediction["path"] == 8).all()
