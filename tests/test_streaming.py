"""Images read from disk: the same batches as from memory, whatever the number of workers; ImageNet's crops and recipe."""
import json
import os
import re
import shlex
import signal
from concurrent.futures import Future
from itertools import count
from math import floor

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import FEW, differing, few_images, finish, orphans, records, start, state_of, wait_for
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.metrics import top_k_accuracy_score
from test_datasets import make_folder
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms import functional as F

import metasemi
import train_meta
import utils.evaluation
import utils.meters
import utils.setup
from datasets import Batches, DataError, load_dataset, normalized_batches, split_labels
from datasets.decoding import decode_file, random_box
from datasets.streaming import PREFETCH, ImageFiles

CLASSES = 200


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

@pytest.mark.parametrize("memory", [0, 2 ** 30])
@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_the_rows_of_one_process_are_those_of_the_whole_batch(photographs, tmp_path, name, memory):
    root = photographs if name == "imagenet" else make_folder(tmp_path, count=17)
    images = load_dataset(name, root, 32, flip=True, memory=memory)
    whole, part = batches_of(images)(3), batches_of(images, rows=slice(5, 10))(3)
    assert equal([tensor[5:10] for tensor in whole], part) and len(part.x_l) == 5


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
    tests = [list(normalized_batches(i.test_images, i.test_labels, i.mean, i.std, batch_size=10)) for i in (memory, disk)]
    assert len(tests[1]) == 4 and all(equal(a, b) for a, b in zip(*tests, strict=True))


def test_crops_differ_from_step_to_step_and_are_the_same_for_0_2_and_4_workers_and_from_any_step(photographs):
    drawn = {}
    for workers in (0, 2, 4):
        with batches_of(load_dataset("imagenet", photographs, 64, num_workers=workers)) as batches:
            drawn[workers] = [batches(step) for step in (1, 2, 3)]
    assert all(equal(a, b) for other in (2, 4) for a, b in zip(drawn[0], drawn[other]))
    images = load_dataset("imagenet", photographs, 64)
    assert equal(batches_of(images)(3), drawn[0][2])
    same = Batches(images, [7], [7], batch_size=1, seed=1)
    means = [x.mean().item() for step in (1, 2, 3) for x in (same(step).x_l, same(step).x_u)]      # flips keep them
    assert len({round(mean, 4) for mean in means}) == 6


def test_what_is_decoded_ahead_is_canceled_when_the_steps_jump_or_end(tmp_path, monkeypatch):
    images, futures = load_dataset("folder", make_folder(tmp_path, count=17), 16, num_workers=1, memory=0), []

    def submit(paths, image_size, crops):
        futures.append(Future())
        futures[-1].result = lambda: (np.zeros((len(paths), 3, 16, 16), np.uint8), [None] * len(paths))
        return futures[-1]

    monkeypatch.setattr(images.train_images.workers, "submit", submit)
    tasks = 2 * 2                                       # 20 + 20 images in tasks of 16
    with batches_of(images) as batches:
        batches(1), batches(2)
        assert len(futures) == (2 + PREFETCH) * tasks and not any(future.cancelled() for future in futures)
        batches(50)
        assert [future.cancelled() for future in futures] == (
            [False] * 2 * tasks + [True] * PREFETCH * tasks + [False] * (1 + PREFETCH) * tasks)
    assert sum(future.cancelled() for future in futures) == 2 * PREFETCH * tasks


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_that_cannot_be_read_comes_with_its_fault_and_can_be_asked_for_again(tmp_path, workers):
    root = make_folder(tmp_path, count=17)
    whole = batches_of(load_dataset("folder", root, 16))
    images = load_dataset("folder", root, 16, num_workers=workers, memory=0, statistics=(whole.mean, whole.std))
    with batches_of(images) as batches:
        batches(1)
        batches.next_step = None                        # what is decoded ahead would still be read
        (root / "train" / "ant").rename(root / "away")
        batch, fault = batches.read(2)
        assert batch is None and isinstance(fault, DataError)
        assert re.search(r"train/ant/..\.png cannot be read .*: replace it, or start anew with --skip-corrupt", str(fault))
        with pytest.raises(DataError, match="No such file"):
            batches(2)
        (root / "away").rename(root / "train" / "ant")
        batch, fault = batches.read(2)
        assert fault is None and equal(batch, whole(2)) and equal(batches(3), whole(3))


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
    root = make_folder(tmp_path)
    size = 24 * 3 * 16 ** 2
    fits, does_not = (load_dataset("folder", root, 16, memory=memory) for memory in (size, size - 1))
    assert isinstance(fits.train_images, torch.Tensor) and fits.where == "0.00 GB as pixels, in memory"
    assert isinstance(does_not.train_images, ImageFiles) and "they may take 0.00 GB of memory" in does_not.where


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
    capsys.readouterr()
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
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "200 classes" in log and "random resized crops need the files" in log and "test top-5 error" in log


def test_workers_end_when_the_run_is_killed(tmp_path, photographs):
    flags = ["--dataset", "imagenet", "--data-path", photographs, "--image-size", "64", "--num-label", "200", "-a", "convsmall",
             "--no-meta", "--batch-size", "8", "--total-steps", "100000", "--print-freq", "1", "--num-workers", "2",
             "--save-path", tmp_path / "a"]
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
    assert from_disk("whole") == 0
    folder, away = tmp_path / "images" / part / "ant", tmp_path / "away"
    training_step, steps = metasemi.training_step, count(1)

    def vanishing(*args, **options):
        result = training_step(*args, **options)
        if next(steps) == last:
            folder.rename(away)
        return result

    monkeypatch.setattr(metasemi, "training_step", vanishing)
    capsys.readouterr()
    assert from_disk("a") == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"train_meta.py: {folder}/.\.bmp cannot .*No such file.*checkpoint.pth of step {saved} .*\n", error)
    assert state_of(tmp_path / "a")["step"] == saved
    away.rename(folder)
    assert from_disk("a", "--resume") == 0
    assert differing(tmp_path / "whole", tmp_path / "a") == []
    whole, parts = ([r for r in records(tmp_path / name) if "test/accuracy" in r] for name in ("whole", "a"))
    assert whole == parts and len(whole) == 2


def test_a_run_that_leaves_images_out_names_them_and_is_evaluated_without_them(from_disk, tmp_path, capsys):
    broken = [tmp_path / "images" / name for name in ("train/bee/2.bmp", "test/ant/3.bmp", "test/bee/7.bmp")]
    for path in broken:
        path.write_bytes(b"")
    assert from_disk("a", "--skip-corrupt", "--num-val", "2") == 0
    log = (tmp_path / "a" / "log.txt").read_text()
    assert all(log.count(str(path)) == 1 for path in broken) and "14 (7 a class) test images" in log
    capsys.readouterr()
    assert train_meta.main(["--evaluate", str(tmp_path / "a"), "--num-workers", "0"]) == 0
    last = [record for record in records(tmp_path / "a") if "test/accuracy" in record][-1]
    assert re.search(rf"accuracy {100 * last['test/accuracy']:.2f} %.* of 14 are right", capsys.readouterr().out)


# Top-5

def test_top_five_counts_the_classes_among_the_five_likeliest_and_is_reported_for_what_top_one_selects():
    torch.manual_seed(0)
    x, y = torch.randn(90, 12), torch.randint(0, 12, (90,))
    measured = utils.evaluation.evaluate(torch.nn.Identity(), [(x[:50], y[:50]), (x[50:], y[50:])])
    assert measured == {name: pytest.approx(top_k_accuracy_score(y, x, k=k, labels=range(12)))
                        for name, k in (("accuracy", 1), ("top5", 5))}
    assert set(utils.evaluation.evaluate(torch.nn.Identity(), [(x[:, :10], y % 10)])) == {"accuracy"}
    evaluations = [{"step": s, "test": t, "test_top5": f, "validation": v, "validation_top5": 1.0}
                   for s, t, f, v in ((1, 0.5, 0.9, 0.9), (2, 0.8, 0.85, 0.7), (3, 0.7, 0.95, 0.6))]
    assert utils.meters.error_rates(evaluations, "test_top5") == {"last": 5.0, "median_last_20": 10.0, "best_validation": 10.0,
                                                                   "best_test": 15.0}
    assert utils.meters.error_rates([{"step": 1, "test": 0.5}], "test_top5") is None
