"""Images without a class: where they lie, what they are used for, and that nothing else ever takes them for labeled."""
import hashlib
import json
import os
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import SHORT
from helpers import differing, records
from PIL import Image
from test_custom_network import section
from test_datasets import make_folder, no_network

import plot_features
import train_meta
from datasets import DataError, data_digest, load_dataset
from datasets.batches import ordered_batches
from metasemi.step import Step
from utils.meters import Meter

UNLABELED = ("one.png", "x/two.png", "x/y/z/three.png", "x/four.png", "y/five.png")


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
    (root / "unlabeled" / "x" / "notes.txt").write_text("no image")
    (root / "unlabeled" / ".cache").mkdir()
    make_unlabeled(root / "unlabeled" / ".cache", ["six.png"])
    (root / "unlabeled" / "loop").symlink_to(root / "unlabeled")
    memory, disk = load_dataset("folder", root, 16), load_dataset("folder", root, 16, memory=0)
    assert memory.train_labels.tolist() == disk.train_labels.tolist() == [0] * 6 + [1] * 6 + [-1] * 5 and memory.num_train == 12
    names = [os.path.relpath(path, root / "unlabeled") for path in disk.train_images.paths[12:]]
    assert names == sorted(UNLABELED)
    _, pixels = next(ordered_batches(disk.train_images))
    assert torch.equal(pixels, memory.train_images) and torch.equal(memory.mean, disk.mean)
    assert memory.ignored == ("1 hidden ('unlabeled/.cache'); 1 a link to a folder ('unlabeled/loop'); "
                              "1 of another suffix ('unlabeled/x/notes.txt')")
    assert "12 (6 a class) training, 5 without a class and 12 (6 a class) test images" in memory.describe()


def test_by_default_all_of_train_is_labeled_and_nothing_asks_for_the_classes_that_are_not_there(run, tmp_path, capsys):
    assert run("a") == 0
    assert json.loads((tmp_path / "a" / "args.json").read_text())["args"]["num_label"] == 12
    assert (tmp_path / "a" / "label_indices.txt").read_text().split() == [str(i) for i in range(12)]
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "12 labeled, 5 unlabeled" in log
    assert "5 images have no class: validation, unlabel-acc and pseudo-acc leave them out" in log
    names = {name for record in records(tmp_path / "a") for name in record}
    assert "train/label-acc" in names and not names & {"train/unlabel-acc", "train/pseudo-acc"}
    capsys.readouterr()
    assert plot_features.main(["--checkpoint-path", str(tmp_path / "a" / "checkpoint.pth"), "--method", "pca", "--num-workers",
                               "0", "--save-path", str(tmp_path / "figure")]) == 0
    assert "5 images have no class: the figure and its measures leave them out" in capsys.readouterr().out
    assert np.load(tmp_path / "figure" / "embedding.npz")["classes_0"].min() == 0


def test_training_images_without_a_label_join_them_and_alone_count_in_the_accuracy_and_validation(run, tmp_path):
    assert run("a", "--num-label", "4", "--num-val", "4", "--print-freq", "1") == 0
    assert "4 labeled, 9 unlabeled, 4 for validation" in (tmp_path / "a" / "log.txt").read_text()
    assert max(json.loads((tmp_path / "a" / "split.json").read_text())["validation"]) < 12
    accuracies = [record["train/unlabel-acc"] for record in records(tmp_path / "a") if "train/unlabel-acc" in record]
    assert accuracies and all(0 <= accuracy <= 1 for accuracy in accuracies)


def test_the_accuracy_is_over_the_images_that_have_a_class_and_absent_without_any():
    def step(meter, y_u):
        y_tilde = torch.eye(3)[[0, 1, 2, 1]]
        result = Step(torch.tensor(1.0), {}, y_tilde, y_tilde, torch.tensor(True))
        meter.add_step(1, result, torch.tensor(y_u))

    meter = Meter()
    for y_u in ([0, 2, -1, -1], [-1, -1, -1, -1], [0, 1, 2, -1]):
        step(meter, y_u)
    assert meter.read(lambda tensors: tensors) == {"loss": 1.0, "unlabel-acc": 0.75}
    step(meter, [-1, -1, -1, -1])
    assert meter.read(lambda tensors: tensors) == {"loss": 1.0}


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
    (lambda root: Image.new("L", (9, 9)).save(root / "unlabeled/one.png"), ["sizes"]),
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
    difference = small.train_images[23].permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
    assert small.image_size == 32 and difference.abs().max() <= 1
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
