"""Images read from disk: the same batches as from memory, ImageNet's crops and recipe; images without a class, STL-10."""
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
from itertools import count
from math import floor

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT
from helpers import FEW, differing, few_images, finish, orphans, records, start, state_of, wait_for
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.metrics import top_k_accuracy_score
from test_custom_network import section
from test_datasets import make_folder, no_network
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms import functional as F

import metasemi
import plot_features
import train_meta
import utils.evaluation
import utils.meters
import utils.setup
from datasets import Batches, DataError, data_digest, load_dataset, normalized_batches, split_labels
from datasets.batches import ordered_batches
from datasets.decoding import decode_file, random_box
from datasets.streaming import ImageFiles
from metasemi.step import Step

CLASSES = 200
UNLABELED = ("one.png", "x/two.png", "x/y/z/three.png", "x/four.png", "y/five.png")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """In ImageNet's layout: 200 classes, each pieces of one place in a photograph, of several sizes; 3 + 1 images a class."""
    root, photos, rng = tmp_path_factory.mktemp("photographs"), load_sample_images().images, np.random.default_rng(0)
    for k in range(CLASSES):
        photo, place = photos[k % 2], rng.integers(0, (300, 500))
        for i, part in enumerate(("train", "train", "train", "val")):
            folder = root / part / f"n{k:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (top, left), (height, width) = place + rng.integers(0, 20, 2), rng.integers(64, 100, 2)
            Image.fromarray(photo[top:top + height, left:left + width]).save(folder / f"{part}_{i}.JPEG")
    return root


@pytest.fixture
def imagenet(train, tmp_path, photographs):
    """imagenet(folder, *flags): the run of docs/usage.md, short and small: four steps of resnet18 at 32 pixels."""
    line = next(line for line in (ROOT / "docs" / "usage.md").read_text().splitlines() if line.startswith("    python3")
                and "imagenet" in line)
    flags = [*shlex.split(line)[2:], "--milestones", "[300000, 350000]", "--data-path", str(photographs), "--image-size", "32",
             "--num-label", "200", "--batch-size", "8", "--warmup", "1", "--total-steps", "4", "--print-freq", "1",
             "--test-freq", "2", "--num-workers", "0"]
    return lambda folder, *more: train(folder, *flags, "--save-path", str(tmp_path / folder), *more)


def batches_of(images, gamma=1.0, rows=slice(None)):
    labeled, unlabeled = split_labels(images.train_labels, images.num_classes, images.num_classes, seed=0)
    return Batches(images, labeled, unlabeled, batch_size=20, seed=5, mixup_gamma=gamma, rows=rows)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The same batches

@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_disk_equal_those_from_memory_bit_for_bit(tmp_path, workers):
    root = make_folder(tmp_path, count=17)
    memory, disk = (load_dataset("folder", root, 16, True, workers, memory=memory) for memory in (None, 0))
    assert isinstance(disk.train_images, ImageFiles) and isinstance(memory.train_images, torch.Tensor)
    assert equal((disk.mean, disk.std, disk.train_labels), (memory.mean, memory.std, memory.train_labels))
    plain = batches_of(memory)
    with batches_of(disk) as batches:
        for step in (1, 2, 3, 4, 90, 91, 2):
            assert equal(batches(step), plain(step))
    for images in (memory, disk):                       # the rows of one process of several
        assert equal(batches_of(images, rows=slice(5, 10))(3), [tensor[5:10] for tensor in plain(3)])
    tests = [normalized_batches(i.test_images, i.test_labels, i.mean, i.std, batch_size=10) for i in (memory, disk)]
    assert all(equal(a, b) for a, b in zip(*tests, strict=True))


def test_crops_differ_from_step_to_step_and_are_the_same_for_any_number_of_workers_and_processes_and_from_any_step(photographs):
    drawn = {}
    for workers in (0, 2, 4):
        with batches_of(load_dataset("imagenet", photographs, 64, num_workers=workers)) as batches:
            drawn[workers] = [batches(step) for step in (1, 2, 3)]
    assert all(equal(a, b) for other in (2, 4) for a, b in zip(drawn[0], drawn[other]))
    images = load_dataset("imagenet", photographs, 64)
    assert equal(batches_of(images)(3), drawn[0][2])
    assert equal(batches_of(images, rows=slice(5, 10))(3), [tensor[5:10] for tensor in drawn[0][2]])
    same = Batches(images, [7], [7], batch_size=1, seed=1)
    means = [x.mean().item() for step in (1, 2, 3) for x in (same(step).x_l, same(step).x_u)]      # flips keep them
    assert len({round(mean, 4) for mean in means}) == 6


def test_a_worker_that_dies_is_one_line_and_the_next_step_starts_others(tmp_path):
    images = load_dataset("folder", make_folder(tmp_path, count=17), 16, num_workers=2, memory=0)
    with batches_of(images) as batches:
        first = batches(1)
        for process in images.train_images.workers.pool._processes.values():
            process.kill()
        faults = [fault for _, fault in map(batches.read, range(2, 20)) if fault]
        assert len(faults) == 1 and isinstance(faults[0], OSError) and "lower --num-workers; in a program" in str(faults[0])
        assert equal(batches(1), first)


def test_images_stay_in_memory_exactly_as_long_as_they_fit(tmp_path):
    root, size = make_folder(tmp_path), 24 * 3 * 16 ** 2
    fits, does_not = (load_dataset("folder", root, 16, memory=memory) for memory in (size, size - 1))
    assert isinstance(fits.train_images, torch.Tensor) and isinstance(does_not.train_images, ImageFiles)


# The crops of ImageNet

def test_the_random_box_is_that_of_torchvision_for_the_same_random_numbers(monkeypatch):
    rng, drawn = np.random.default_rng(0), iter(())
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_(low + (high - low) * next(drawn)))
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.tensor([floor(next(drawn) * high)]))
    fallbacks = 0
    for size in ((64, 64), (375, 500), (500, 333), (30, 200), (200, 30), (9, 9)):
        for _ in range(200):
            uniform = rng.random((10, 4))
            box = random_box(*size, uniform)
            tries = [i for i in range(10) if random_box(*size, uniform[i:i + 1]) != random_box(*size, uniform[:0])]
            fallbacks += not tries
            last = tries[0] if tries else 10
            drawn = iter([*uniform[:last, :2].ravel(), *uniform[last:last + 1].ravel()])    # the box is drawn for the last only
            expected = RandomResizedCrop.get_params(Image.new("RGB", size[::-1]), (0.08, 1), (3 / 4, 4 / 3))
            assert np.abs(np.subtract(box, expected)).max() <= 1                            # float32 there, float64 here
            assert 0 <= box[0] <= size[0] - box[2] and 0 <= box[1] <= size[1] - box[3]
    assert fallbacks > 10


@pytest.mark.parametrize("size", [(80, 64), (71, 97), (300, 41)])
def test_pixels_are_those_of_torchvision(tmp_path, size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    uniform = np.random.default_rng(2).random((10, 4))
    expected = F.resized_crop(image, *random_box(*size, uniform), (64, 64))
    assert np.array_equal(decode_file(tmp_path / "a.png", 64, uniform), np.asarray(expected).transpose(2, 0, 1))
    expected = CenterCrop(64)(Resize(int(64 / 0.875))(image))
    assert np.array_equal(decode_file(tmp_path / "a.png", 64, "center"), np.asarray(expected).transpose(2, 0, 1))


# Whole runs

def test_resnet18_learns_200_classes_from_disk_with_top_five_and_resumes_bit_for_bit(imagenet, tmp_path, monkeypatch, capsys):
    assert imagenet("whole") == 0
    monkeypatch.setattr(utils.evaluation, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert imagenet("parts") == 143
    monkeypatch.undo()
    assert imagenet("parts", "--resume", "--total-steps", "5") == 2
    assert "--total-steps: 5 now, 4 in the run" in capsys.readouterr().err
    assert imagenet("parts", "--resume") == 0
    assert differing(tmp_path / "whole", tmp_path / "parts") == []

    lines = records(tmp_path / "whole")
    assert [line["train/lr"] for line in lines if "train/lr" in line] == pytest.approx([0.1, 0.075, 0.025, 0])
    last = lines[-1]
    assert 0 <= last["test/accuracy"] <= last["test/top5"] <= 1
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["top5_error_rate"]["last"] == pytest.approx(100 * (1 - last["test/top5"]), abs=1e-3)
    assert "test top-5 error" in (tmp_path / "whole" / "log.txt").read_text()


def test_workers_end_when_the_run_is_killed(tmp_path, photographs):
    flags = [*FEW, "--dataset", "imagenet", "--data-path", photographs, "--num-label", "200", "-a", "convsmall", "--no-meta",
             "--total-steps", "100000", "--print-freq", "1", "--num-workers", "2", "--save-path", tmp_path / "a"]
    process = start(flags, output=tmp_path / "output")
    wait_for(tmp_path / "output.out", "step 2/", process)
    process.kill()                                      # the parent alone
    assert finish(process) == -9 and orphans(process.pid) is None


@pytest.fixture
def from_disk(train, tmp_path, monkeypatch):
    """from_disk(folder, *flags): four steps on the images under tmp_path / "images", read from disk."""
    monkeypatch.setattr("utils.setup.memory_for_images", lambda device: 0)
    flags = [*FEW, "--data-path", str(few_images(tmp_path / "images", count=8)), "--total-steps", "4", "--test-freq", "2"]
    return lambda folder, *more: train(folder, *flags, *more)


@pytest.mark.parametrize(("part", "last", "saved"), [("train", 1, 1), ("test", 3, 2)])
def test_images_that_vanish_end_a_run_with_a_checkpoint_and_a_resume_is_exact(
        from_disk, tmp_path, monkeypatch, capsys, part, last, saved):
    folder, away = tmp_path / "images" / part / "ant", tmp_path / "away"
    training_step, steps = metasemi.training_step, count(1)

    def vanishing(*args, **options):
        result = training_step(*args, **options)
        if next(steps) == last:
            folder.rename(away)
        return result

    monkeypatch.setattr(metasemi, "training_step", vanishing)
    assert from_disk("a") == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"train_meta.py: {folder}/.\.bmp cannot .*No such file.*: replace it, or start anew with --skip-corr.*"
                        rf"checkpoint.pth of step {saved} .*\n", error)
    assert state_of(tmp_path / "a")["step"] == saved
    away.rename(folder)
    assert from_disk("a", "--resume") == 0 and from_disk("whole") == 0
    assert differing(tmp_path / "whole", tmp_path / "a") == []


def test_a_run_that_leaves_images_out_names_them_and_is_evaluated_without_them(from_disk, tmp_path, capsys):
    broken = [tmp_path / "images" / name for name in ("train/bee/2.bmp", "test/ant/3.bmp", "test/bee/7.bmp")]
    for path in broken:
        path.write_bytes(b"")
    assert from_disk("a", "--skip-corrupt", "--num-val", "2") == 0
    log = (tmp_path / "a" / "log.txt").read_text()
    assert all(log.count(str(path)) == 1 for path in broken) and "14 (7 a class) test images" in log
    assert train_meta.main(["--evaluate", str(tmp_path / "a"), "--num-workers", "0"]) == 0
    last = [record for record in records(tmp_path / "a") if "test/accuracy" in record][-1]
    out = capsys.readouterr().out.partition(" images, ")[2]
    assert re.search(rf"accuracy {100 * last['test/accuracy']:.2f} %.* of 14 are right", out)
    assert all(f"left out: {path.relative_to(tmp_path / 'images')}" in out for path in broken)


# Top-5

def test_top_five_counts_the_classes_among_the_five_likeliest_and_is_reported_for_what_top_one_selects():
    torch.manual_seed(0)
    x, y = torch.randn(90, 12), torch.randint(0, 12, (90,))
    measured = utils.evaluation.evaluate(torch.nn.Identity(), [(x[:50], y[:50]), (x[50:], y[50:])])
    assert measured == {name: pytest.approx(top_k_accuracy_score(y, x, k=k, labels=range(12)))
                        for name, k in (("accuracy", 1), ("top5", 5))}
    assert set(utils.evaluation.evaluate(torch.nn.Identity(), [(x[:, :10], y % 10)])) == {"accuracy"}
    stops = iter([False, False])                        # a signal in the last batch loses nothing
    assert utils.evaluation.evaluate(torch.nn.Identity(), [(x, y)] * 2, stop=lambda: next(stops, True)) == measured
    evaluations = [{"step": s, "test": t, "test_top5": f, "validation": v, "validation_top5": 1.0}
                   for s, t, f, v in ((1, 0.5, 0.9, 0.9), (2, 0.8, 0.85, 0.7), (3, 0.7, 0.95, 0.6))]
    assert utils.meters.error_rates(evaluations, "test_top5") == {"last": 5.0, "median_last_20": 10.0, "best_validation": 10.0,
                                                                   "best_test": 15.0}
    assert utils.meters.error_rates([{"step": 1, "test": 0.5}], "test_top5") is None


# Images without a class

def make_unlabeled(folder, names=UNLABELED):
    rng = np.random.default_rng(7)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)


@pytest.fixture
def root(tmp_path):
    """Two classes of six training and six test images, and five images without a class."""
    make_unlabeled(make_folder(tmp_path / "images") / "unlabeled")
    return tmp_path / "images"


@pytest.fixture
def run(root, tmp_path):
    """run(name, *flags): a run of a few steps on the images, all of train/ labeled, from memory unless a flag says else."""
    def main(name, *flags):
        short = [flag for flag in SHORT if flag not in ("--num-label", "50")]
        try:
            return train_meta.main([*short, "--dataset", "folder", "--data-path", str(root), "--image-size", "16",
                                    "--num-workers", "0", "--mix-up", "--save-path", str(tmp_path / name), *flags])
        except SystemExit as error:
            return error.code
    return main


def test_images_without_a_class_follow_the_others_from_any_depth_and_are_the_same_from_disk(root):
    make_unlabeled(root / "unlabeled" / ".cache", ["six.png"])
    (root / "unlabeled" / "loop").symlink_to(root / "unlabeled")
    memory, disk = load_dataset("folder", root, 16), load_dataset("folder", root, 16, memory=0)
    assert memory.train_labels.tolist() == disk.train_labels.tolist() == [0] * 6 + [1] * 6 + [-1] * 5 and memory.num_train == 12
    names = [os.path.relpath(path, root / "unlabeled") for path in disk.train_images.paths[12:]]
    assert names == sorted(UNLABELED)
    _, pixels = next(ordered_batches(disk.train_images))
    assert torch.equal(pixels, memory.train_images) and torch.equal(memory.mean, disk.mean)
    assert memory.ignored == "1 hidden ('unlabeled/.cache'); 1 a link to a folder ('unlabeled/loop')"
    assert "12 (6 a class) training, 5 without a class and 12 (6 a class) test images" in memory.describe()


def test_by_default_all_of_train_is_labeled_and_nothing_asks_for_the_classes_that_are_not_there(run, tmp_path, capsys):
    assert run("a") == 0
    assert (tmp_path / "a" / "label_indices.txt").read_text().split() == [str(i) for i in range(12)]
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "12 labeled, 5 unlabeled" in log
    assert "5 images have no class: validation, unlabel-acc and pseudo-acc leave them out" in log
    names = {name for record in records(tmp_path / "a") for name in record}
    assert "train/label-acc" in names and not names & {"train/unlabel-acc", "train/pseudo-acc"}
    assert plot_features.main(["--checkpoint-path", str(tmp_path / "a" / "checkpoint.pth"), "--method", "pca", "--num-workers",
                               "0", "--save-path", str(tmp_path / "figure")]) == 0
    assert "5 images have no class: the figure and its measures leave them out" in capsys.readouterr().out
    assert np.load(tmp_path / "figure" / "embedding.npz")["classes_0"].min() == 0


def test_training_images_without_a_label_join_them_and_alone_are_for_validation(run, tmp_path):
    assert run("a", "--num-label", "4", "--num-val", "4") == 0
    assert "4 labeled, 9 unlabeled, 4 for validation" in (tmp_path / "a" / "log.txt").read_text()
    assert max(json.loads((tmp_path / "a" / "split.json").read_text())["validation"]) < 12


def test_the_accuracy_is_over_the_images_that_have_a_class_and_absent_without_any():
    meter, y_tilde = utils.meters.Meter(), torch.eye(3)[[0, 1, 2, 1]]
    for labels, accuracy in (([[0, 2, -1, -1], [-1] * 4, [0, 1, 2, -1]], {"unlabel-acc": 0.75}), ([[-1] * 4], {})):
        for y_u in labels:
            result = Step(torch.tensor(1.0), {}, y_tilde, y_tilde, torch.tensor(True))
            meter.add_step(1, result, torch.tensor(y_u))
        assert meter.read(lambda tensors: tensors) == {"loss": 1.0, **accuracy}


def test_a_run_is_the_same_from_memory_from_disk_after_a_resume_and_whatever_the_unlabeled_files_are_called(
        root, run, tmp_path, monkeypatch):
    assert run("memory", "--flip", "--num-val", "2") == 0
    assert run("parts", "--flip", "--num-val", "2", "--total-steps", "4") == 0
    monkeypatch.setattr("utils.setup.memory_for_images", lambda device: 1000)
    assert run("parts", "--resume") == 0 and run("disk", "--flip", "--num-val", "2", "--num-workers", "1") == 0
    assert run("parts", "--resume", "--num-label", "8", "--total-steps", "9") == 2
    for i, name in enumerate(sorted(UNLABELED)):
        folder = root / "unlabeled" / f"{i} ant"
        folder.mkdir()
        (root / "unlabeled" / name).rename(folder / "renamed.png")
    assert run("renamed", "--flip", "--num-val", "2") == 0
    for other in ("parts", "disk", "renamed"):
        weights = [torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"] for name in ("memory", other)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), other
    assert differing(tmp_path / "memory", tmp_path / "disk") == []


@pytest.mark.parametrize(("change", "names"), [
    (lambda root: make_unlabeled(root / "unlabeled", ["more.png"]), ["training labels", "names", "sizes"]),
    (lambda root: (root / "unlabeled/one.png").rename(root / "unlabeled/uno.png"), ["names"]),
    (lambda root: shutil.rmtree(root / "unlabeled"), ["training labels"])])
def test_other_unlabeled_images_are_other_data(root, change, names):
    before = data_digest(load_dataset("folder", root, 16, memory=0))
    change(root)
    now = data_digest(load_dataset("folder", root, 16, memory=0))
    assert [name.removesuffix(" of unlabeled files") for name in now if now[name] != before[name]] == names


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """data/stl10_binary in the official format, 20 + 20 images of 10 classes and 30 others: columns first, classes from 1."""
    from torchvision.datasets import STL10

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "stl10_binary"
    folder.mkdir(parents=True)
    rng, pixels = np.random.default_rng(0), {}

    def put(name):
        part, kind = name.removesuffix(".bin").split("_")
        if kind == "X":
            pixels[part] = rng.integers(0, 256, (30 if part == "unlabeled" else 20, 3, 96, 96), dtype=np.uint8)
            data = pixels[part].transpose(0, 1, 3, 2).tobytes()
        else:
            data = (np.arange(20, dtype=np.uint8) % 10 + 1).tobytes()
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, attribute, [put(name) for name, _ in getattr(STL10, attribute)])
    folds = (" ".join(str((fold + i) % 20) for i in range(15)) for fold in range(10))
    (folder / "fold_indices.txt").write_text("".join(f"{fold} \n" for fold in folds))
    return pixels


def test_stl10_is_read_upright_and_resized_as_pillow_does_it_and_a_damaged_file_is_named(stl10, tmp_path, monkeypatch):
    images = load_dataset("stl10", "data")
    assert torch.equal(images.train_images, torch.from_numpy(np.concatenate([stl10["train"], stl10["unlabeled"]])))
    assert torch.equal(images.test_images, torch.from_numpy(stl10["test"])) and images.flip and images.padding == 12
    assert images.train_labels.tolist() == [*range(10), *range(10)] + [-1] * 30 and images.num_train == 20
    assert images.test_labels.tolist() == [*range(10), *range(10)] and images.class_names[7] == "monkey"
    small = load_dataset("stl10", "data", 32)
    expected = Image.fromarray(stl10["unlabeled"][3].transpose(1, 2, 0)).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(small.train_images[23].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    (tmp_path / "data" / "stl10_binary" / "unlabeled_X.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="unlabeled_X.bin is damaged and could not be downloaded"):
        load_dataset("stl10", "data")


def test_stl10_trains_as_the_documents_say_all_of_it_and_a_standard_fold(stl10, tmp_path):
    fold = (tmp_path / "data" / "stl10_binary" / "fold_indices.txt").read_text().splitlines()[0]
    (tmp_path / "fold1.txt").write_text(fold + "\n")
    lines = [shlex.split(line)[2:] for line in section("STL-10").splitlines() if line.startswith("    python3 ")]
    for words in lines:
        assert train_meta.main([*words, "-a", "convsmall", "--total-steps", "2", "--batch-size", "4", "--warmup", "1"]) == 0
    logs = [(tmp_path / "results" / name / "log.txt").read_text() for name in ("stl10", "stl10-fold1")]
    assert len(lines) == 2 and "48x48" in logs[0]
    assert "20 labeled, 30 unlabeled" in logs[0] and "15 labeled, 35 unlabeled" in logs[1]
