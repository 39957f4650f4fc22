"""Images read from disk: the same batches as from memory, whatever the number of workers; ImageNet's crops and recipe."""
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from math import floor
from threading import Timer

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import differing, finish, orphans, records, start, wait_for
from PIL import Image
from sklearn.datasets import load_sample_images
from test_datasets import make_folder
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms import functional as F

import datasets.loading
import metasemi
import plot_features
import train_meta
import utils.device
import utils.metrics
from datasets import Batches, DataError, load_dataset, normalized_batches, split_labels
from datasets.decoding import decode_file, random_box
from datasets.sampling import resized_crop_choices
from datasets.streaming import PREFETCH, ImageFiles
from metasemi import learning_rate

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
    memory = load_dataset("folder", root, 16, flip=True)
    disk = load_dataset("folder", root, 16, flip=True, num_workers=workers, memory=0)
    assert isinstance(disk.train_images, ImageFiles) and isinstance(memory.train_images, torch.Tensor)
    assert equal((disk.mean, disk.std, disk.train_labels), (memory.mean, memory.std, memory.train_labels))
    plain = batches_of(memory)
    with batches_of(disk) as batches:
        for step in (1, 2, 3, 4, 90, 91, 2):
            assert equal(batches(step), plain(step))
    tests = [list(normalized_batches(i.test_images, i.test_labels, i.mean, i.std, batch_size=10)) for i in (memory, disk)]
    assert len(tests[1]) == 4 and all(equal(a, b) for a, b in zip(*tests, strict=True))


def test_order_and_augmentation_are_the_same_for_0_2_and_4_workers_and_from_any_step(photographs):
    drawn = {}
    for workers in (0, 2, 4):
        images = load_dataset("imagenet", photographs, 64, num_workers=workers)
        with batches_of(images) as batches:
            drawn[workers] = [batches(step) for step in (1, 2, 3)]
        with batches_of(images._replace(train_images=load_dataset("imagenet", photographs, 64).train_images)) as late:
            assert equal(late(3), drawn[workers][2])
    assert all(equal(a, b) for other in (2, 4) for a, b in zip(drawn[0], drawn[other]))
    assert not torch.equal(drawn[0][0].x_u, drawn[0][1].x_u)


def test_what_is_decoded_ahead_is_canceled_when_the_steps_jump_or_end(tmp_path, monkeypatch):
    images, futures = load_dataset("folder", make_folder(tmp_path, count=17), 16, num_workers=1, memory=0), []

    def submit(paths, image_size, crops):
        futures.append(Future())
        futures[-1].size = len(paths)
        return futures[-1]

    workers = images.train_images.workers
    monkeypatch.setattr(workers, "submit", submit)
    monkeypatch.setattr(workers, "result", lambda future: (np.zeros((future.size, 3, 16, 16), np.uint8), []))
    batches = batches_of(images)
    batches(1), batches(2)
    tasks = 2 * 2                                       # 20 + 20 images in tasks of 16
    assert len(futures) == (2 + PREFETCH) * tasks and not any(future.cancelled() for future in futures)
    batches(50)
    assert [future.cancelled() for future in futures] == (
        [False] * 2 * tasks + [True] * PREFETCH * tasks + [False] * (1 + PREFETCH) * tasks)
    batches.cancel()
    assert sum(future.cancelled() for future in futures) == 2 * PREFETCH * tasks


def test_a_step_that_could_not_be_read_can_be_asked_for_again(tmp_path):
    root = make_folder(tmp_path, count=17)
    whole = batches_of(load_dataset("folder", root, 16))
    batches = batches_of(load_dataset("folder", root, 16, memory=0, statistics=(whole.mean, whole.std)))
    batches(1)
    (root / "train" / "ant").rename(root / "away")
    assert isinstance(batches.fault(2), DataError)
    (root / "away").rename(root / "train" / "ant")
    assert batches.fault(2) is None and equal(batches(2), whole(2)) and equal(batches(3), whole(3))


def test_every_step_crops_the_same_image_anew(photographs):
    batches = Batches(load_dataset("imagenet", photographs, 64), [7], [7], batch_size=1, seed=1)
    means = [x.mean().item() for step in (1, 2, 3) for x in (batches(step).x_l, batches(step).x_u)]    # flips keep them
    assert len({round(mean, 4) for mean in means}) == 6


def test_what_an_image_looks_like_depends_on_its_place_in_the_step_alone():
    whole = resized_crop_choices(8, 1, "crop labeled", 3)
    assert not np.array_equal(whole, resized_crop_choices(8, 1, "crop unlabeled", 3))
    assert not np.array_equal(whole, resized_crop_choices(8, 1, "crop labeled", 4))
    assert len({tuple(row.ravel()) for row in whole}) == 8
    assert np.array_equal(whole[:4], resized_crop_choices(4, 1, "crop labeled", 3))


def test_images_stay_in_memory_exactly_as_long_as_they_fit(tmp_path):
    root = make_folder(tmp_path)
    size = 24 * 3 * 16 ** 2
    fits, does_not = (load_dataset("folder", root, 16, memory=memory) for memory in (size, size - 1))
    assert isinstance(fits.train_images, torch.Tensor) and fits.source.startswith("in memory: 0.00 GB")
    assert isinstance(does_not.train_images, ImageFiles) and "they may take 0.00 GB of memory" in does_not.source
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < utils.device.memory_for_images(torch.device("cpu")) < physical / 2


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


# Files that cannot be read

@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_or_gives_way_to_the_next_of_its_set(tmp_path, workers):
    root = make_folder(tmp_path, count=8)
    whole = load_dataset("folder", root, 16)
    bad = root / "train/ant/03.png"
    bad.write_bytes(bad.read_bytes()[:100])
    (root / "test/bee/07.png").write_bytes(b"")
    statistics = whole.mean, whole.std
    labeled, unlabeled = np.array([1, 3, 9]), np.setdiff1d(np.arange(16), [1, 3, 9])

    def draw(skip):
        images = load_dataset("folder", root, 16, num_workers=workers, memory=0, skip_corrupt=skip, statistics=statistics)
        images.train_images.task_size = images.test_images.task_size = 1
        with Batches(images, labeled, unlabeled, batch_size=3, seed=1) as batches:
            return images, batches(1)

    with pytest.raises(DataError, match=r"train/ant/03.png cannot be read.*replace or remove it; --skip-corrupt trains"):
        draw(skip=False)
    images, batch = draw(skip=True)
    expected = Batches(whole, labeled, unlabeled, batch_size=3, seed=1)
    order = expected.streams["labeled"](1)
    assert sorted(order) == [1, 3, 9] and batch.y_l.tolist() == [int(i != 1) for i in order]       # 9 stands for 3
    kept = torch.from_numpy(order != 3)
    assert torch.equal(batch.x_l[kept], expected(1).x_l[kept]) and torch.equal(batch.x_u, expected(1).x_u)
    assert [line.split(" cannot")[0] for line in images.skipped()] == [f"skipped: {bad}"] and images.skipped() == []
    x, y = map(torch.cat, zip(*normalized_batches(images.test_images, images.test_labels, *statistics, batch_size=5)))
    assert equal((x, y), next(normalized_batches(whole.test_images[:15], whole.test_labels[:15], *statistics)))


def test_a_set_of_which_nothing_can_be_read_is_refused(tmp_path):
    root = make_folder(tmp_path, count=2)
    for path in root.glob("train/*/*"):
        path.write_bytes(b"")
    images = load_dataset("folder", root, 16, skip_corrupt=True, statistics=(torch.zeros(3), torch.ones(3)))
    with pytest.raises(DataError, match="nor can any other of 2 images"):
        Batches(images, [0, 2], batch_size=2, seed=1)(1)


# Whole runs

def test_a_run_from_disk_equals_the_run_from_memory_bit_for_bit(train, tmp_path, monkeypatch):
    root = make_folder(tmp_path / "images", classes=("ant", "bee", "cow"), count=8)
    flags = ["--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--flip", "--num-label", "6",
             "--num-val", "3", "--mix-up", "--num-workers", "1"]
    assert train("memory", *flags) == 0
    monkeypatch.setattr("utils.state.memory_for_images", lambda device: 1000)
    assert train("disk", *flags) == 0
    assert differing(tmp_path / "memory", tmp_path / "disk") == []
    assert "images in memory: " in (tmp_path / "memory" / "log.txt").read_text()
    assert "images read from disk by 1 worker:" in (tmp_path / "disk" / "log.txt").read_text()


def test_resnet18_learns_200_classes_from_disk_with_top_five_and_resumes_bit_for_bit(imagenet, tmp_path, monkeypatch, capsys):
    assert imagenet("whole") == 0
    monkeypatch.setattr(utils.metrics, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
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


@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_features_of_a_run_from_disk_are_drawn(imagenet, tmp_path):
    import plot_features

    assert imagenet("a", "--total-steps", "1") == 0
    assert plot_features.main(["--checkpoint-path", str(tmp_path / "a/checkpoint.pth"), "--save-path", str(tmp_path / "f"),
                               "--method", "pca", "--num-point", "30", "--num-workers", "0"]) == 0
    assert (tmp_path / "f" / "features.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_whole_group_saves_the_run_or_kills_it_and_leaves_no_worker_behind(tmp_path, photographs, number):
    flags = ["--dataset", "imagenet", "--data-path", photographs, "--image-size", "64", "--num-label", "200", "-a", "convsmall",
             "--no-meta", "--batch-size", "8", "--total-steps", "100000", "--print-freq", "1", "--num-workers", "2",
             "--save-path", tmp_path / "a"]
    process = start(flags, output=tmp_path / "output")
    wait_for(tmp_path / "output.out", "step 2/", process)
    if number == signal.SIGKILL:
        process.kill()                                  # the parent alone: its workers have to notice
    else:
        os.killpg(process.pid, number)
    assert finish(process) == (143 if number == signal.SIGTERM else -9)
    assert number == signal.SIGKILL or (tmp_path / "output.err").read_text() == ""
    assert (tmp_path / "a" / "checkpoint.pth").exists() == (number == signal.SIGTERM)
    assert orphans(process.pid) is None


@pytest.fixture
def from_disk(train, tmp_path, monkeypatch):
    """from_disk(folder, *flags): four steps on a folder of images that are read from disk; at_step(step, action) during one."""
    root = make_folder(tmp_path / "images", count=8)
    flags = ["--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--num-label", "4", "--total-steps", "4",
             "--batch-size", "2", "--num-workers", "0", "--print-freq", "2", "--test-freq", "2"]
    monkeypatch.setattr("utils.state.memory_for_images", lambda device: 0)

    def run(folder, *more, actions=()):
        load, step, calls = datasets.loading.load_dataset, metasemi.training_step, []

        def loading(*args, **options):
            run.images = load(*args, **options)
            return run.images

        def stepping(*args, **options):
            result = step(*args, **options)
            calls.append(1)
            dict(actions).get(len(calls), lambda images: None)(run.images)
            return result

        with monkeypatch.context() as patch:
            patch.setattr("utils.state.load_dataset", loading)
            patch.setattr(metasemi, "training_step", stepping)
            return train(folder, *flags, *more)
    run.root = root
    return run


@pytest.mark.parametrize(("part", "step"), [("train", 1), ("test", 2)])
def test_images_that_vanish_end_a_run_once_it_is_saved_and_a_resume_is_exact(from_disk, tmp_path, capsys, part, step):
    assert from_disk("whole") == 0
    capsys.readouterr()
    folder, away = from_disk.root / part / "ant", from_disk.root / "away"
    assert from_disk("a", actions=[(step, lambda images: folder.rename(away))]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"train_meta.py: {folder}/0.\.png cannot be read .*No such file.*; step {step} is saved.*\n", error)
    assert torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"] == step
    away.rename(folder)
    assert from_disk("a", "--resume") == 0
    assert differing(tmp_path / "whole", tmp_path / "a") == []
    whole, parts = ([r for r in records(tmp_path / name) if "test/accuracy" in r] for name in ("whole", "a"))
    assert whole == parts and len(whole) == 2


def test_a_worker_that_is_killed_ends_the_run_with_one_line_once_its_weights_are_saved(from_disk, tmp_path, capsys):
    def kill(images):
        workers = images.train_images.workers
        os.kill(workers.processes()[0].pid, signal.SIGKILL)
        while not workers.pool._broken:                         # until the pool knows
            time.sleep(0.01)

    assert from_disk("a", "--num-workers", "2", "--total-steps", "9", "--test-freq", "9", actions=[(1, kill)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"train_meta.py: .*killed for its memory perhaps: lower --num-workers; step 1 is saved.*\n", error)
    assert torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"] == 1


def test_a_signal_ends_a_run_whose_workers_are_stopped(from_disk, tmp_path, capsys):
    processes = []

    def stop(images):
        processes.extend(images.train_images.workers.processes())
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    assert from_disk("a", "--num-workers", "1", "--total-steps", "50", "--test-freq", "90", actions=[(1, stop)]) == 143
    assert 1 <= torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"] < 50
    for process in processes:
        process.join()                                  # it goes on, and ends
    assert capsys.readouterr().err == ""


def test_a_program_without_a_main_guard_is_told_so(tmp_path):
    root = make_folder(tmp_path / "images", count=2)
    (tmp_path / "own.py").write_text(f"from datasets import load_dataset\nimages = load_dataset('folder', {str(root)!r}, 16, "
                                     "num_workers=1, memory=0, statistics=(0, 1))\nnext(images.test_images.batches(4))\n")
    done = subprocess.run([sys.executable, tmp_path / "own.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stderr.splitlines()[-1].endswith('start the work under if __name__ == "__main__":')


def test_every_evaluation_of_fewer_images_says_so_and_the_run_can_be_evaluated_and_plotted(from_disk, tmp_path, capsys):
    (from_disk.root / "train/bee/02.png").write_bytes(b"")
    (from_disk.root / "test/ant/03.png").write_bytes(b"")

    def damage(images):
        (from_disk.root / "test/bee/07.png").write_bytes(b"")
        kind, number = divmod(int((tmp_path / "a" / "label_indices.txt").read_text().split()[0]), 8)
        (from_disk.root / "train" / ("ant", "bee")[kind] / f"0{number}.png").write_bytes(b"")

    assert from_disk("a", "--skip-corrupt", "--num-val", "2", actions=[(4, damage)]) == 0
    log = (tmp_path / "a" / "log.txt").read_text()
    for name in ("train/bee/02", "test/ant/03", "test/bee/07"):
        assert log.count(f"skipped: {from_disk.root}/{name}.png") == 1
    tests = [record for record in records(tmp_path / "a") if "test/accuracy" in record]
    assert [record["test/images"] for record in tests] == [15, 14]
    assert "over 15 of 16 test images" in log and "over 14 of 16 test images: the others cannot be read" in log
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["images_covered"] == {"test": [14, 16], "labeled": [3, 4]} and "; over 3 of 4 labeled images" in log

    capsys.readouterr()
    path = str(tmp_path / "a" / "checkpoint.pth")
    assert train_meta.main(["--evaluate", path, "--num-workers", "0", "--predictions", str(tmp_path / "p.csv")]) == 0
    out = capsys.readouterr().out
    assert out.count("skipped: ") == 2 and "over 14 of 16 images" in out
    assert int(re.search(r"of (\d+) are right", out)[1]) == 14
    assert f"{100 * tests[-1]['test/accuracy']:.2f} %" in out
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == [i for i in range(16) if i not in (3, 15)]
    assert all(row["file"].endswith(f"{row['label_name']}/{int(row['index']) % 8:02d}.png") for row in rows)
    for _ in range(2):                                  # the second time from the features that are kept
        assert plot_features.main(["--checkpoint-path", path, "--save-path", str(tmp_path / "f"), "--method", "pca",
                                   "--num-workers", "0"]) == 0
        assert "images, the others cannot be read" in capsys.readouterr().out
        with np.load(tmp_path / "f" / "embedding.npz") as arrays:
            test = arrays["sample_0"][arrays["part_0"] == "test"]
            assert test.tolist() == [i for i in range(16) if i not in (3, 15)]
            assert arrays["classes_0"][arrays["part_0"] == "test"].tolist() == [int(i > 7) for i in test]


def test_a_test_set_without_one_readable_image_is_one_line(from_disk, tmp_path, capsys):
    for path in from_disk.root.glob("test/*/*"):
        path.write_bytes(b"")
    assert from_disk("a", "--skip-corrupt") == 1
    assert capsys.readouterr().err == ("train_meta.py: not one of the images to evaluate can be read: give readable ones; "
                                       "step 2 is saved, and --resume continues from there\n")
    with pytest.raises(SystemExit, match="2"):
        train_meta.main(["--evaluate", str(tmp_path / "a" / "checkpoint.pth"), "--num-workers", "0"])
    assert capsys.readouterr().err == "train_meta.py: not one of the images to evaluate can be read: give readable ones\n"


# Schedule and top-5

def test_the_cosine_starts_at_the_end_of_the_warm_up_and_ends_at_zero():
    rates = [learning_rate(step, 0.4, 2, total_steps=10) for step in range(11)]
    assert rates[:3] == [0, 0.2, 0.4] and rates[6] == pytest.approx(0.2) and rates[10] == 0
    assert rates[4] == pytest.approx(0.2 * (1 + 0.5 ** 0.5)) and rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(5, 0.4, 10, total_steps=10) == 0.2 and learning_rate(10, 0.4, 10, total_steps=10) == 0.4
    assert learning_rate(1, 0.4, 0, total_steps=1) == 0


def test_top_five_counts_the_classes_among_the_five_likeliest():
    from sklearn.metrics import top_k_accuracy_score

    torch.manual_seed(0)
    x, y = torch.randn(90, 12), torch.randint(0, 12, (90,))
    measured = utils.metrics.evaluate(torch.nn.Identity(), [(x[:50], y[:50]), (x[50:], y[50:])])
    assert measured == {"accuracy": pytest.approx(top_k_accuracy_score(y, x, k=1, labels=range(12))),
                        "top5": pytest.approx(top_k_accuracy_score(y, x, k=5, labels=range(12))), "images": 90}
    assert set(utils.metrics.evaluate(torch.nn.Identity(), [(x[:, :10], y % 10)])) == {"accuracy", "images"}


def test_top_five_is_reported_for_what_the_rules_select_by_top_one():
    evaluations = [{"step": s, "test": t, "test_top5": f, "validation": v, "validation_top5": 1.0}
                   for s, t, f, v in ((1, 0.5, 0.9, 0.9), (2, 0.8, 0.85, 0.7), (3, 0.7, 0.95, 0.6))]
    assert utils.metrics.error_rates(evaluations, "test_top5") == {"last": 5.0, "median_last_20": 10.0, "best_validation": 10.0,
                                                                   "best_test": 15.0}
    assert utils.metrics.error_rates([{"step": 1, "test": 0.5}], "test_top5") is None
