"""Splits, order, augmentation and loading."""
import hashlib
import os
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from oracle import close
from PIL import Image
from torchvision.transforms import functional as F

import datasets.loading
from datasets import DATASETS, Batches, DataError, load_dataset, normalized_batches, split_labels
from datasets.augment import crop_and_flip, normalize
from datasets.decoding import decode_file, decode_files
from datasets.sampling import IndexStream, crop_and_flip_choices, mixup_weights
from datasets.splits import split_training
from utils.flags import training_parser


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:         # all of them, here
        patch.setitem(datasets.loading.LOADERS, "digits", datasets.loading.load_digits)
        yield load_dataset("digits", "unused")


# Splits

def test_split_is_balanced_disjoint_complete_and_ascending(digits):
    labeled, unlabeled = split_labels(digits.train_labels, 50, 10, seed=3)
    assert torch.bincount(digits.train_labels[labeled]).tolist() == [5] * 10
    assert sorted([*labeled, *unlabeled]) == list(range(len(digits.train_labels)))
    assert list(labeled) == sorted(labeled)


def test_split_depends_on_the_seed_and_on_nothing_else(digits):
    first = split_labels(digits.train_labels, 50, 10, seed=3)[0]
    torch.manual_seed(99), np.random.seed(99)
    assert np.array_equal(split_labels(digits.train_labels, 50, 10, seed=3)[0], first)
    assert not np.array_equal(split_labels(digits.train_labels, 50, 10, seed=4)[0], first)


@pytest.mark.parametrize(("num_label", "message"), [
    (55, "55 labels cannot be split evenly over 10 classes: use 50 or 60"), (5, "use 10$"),
    (0, "use 1 to 1297"), (1298, "use 1 to 1297"), (1290, "class 0, which has 127: use at most 1220")])
def test_split_that_cannot_be_balanced_is_refused_with_the_remedy(digits, num_label, message):
    with pytest.raises(ValueError, match=message):
        split_labels(digits.train_labels, num_label, 10, seed=0)


def test_all_images_can_be_labeled_whatever_their_balance(digits):
    labeled, unlabeled = split_labels(digits.train_labels, 1297, 10, seed=0)
    assert len(labeled) == 1297 and len(unlabeled) == 0


def test_the_validation_set_is_balanced_and_disjoint_from_the_labeled_one(digits):
    labeled, validation = split_training(digits.train_labels, 50, 100, 10, seed=0)
    assert torch.bincount(digits.train_labels[validation]).tolist() == [10] * 10
    assert torch.bincount(digits.train_labels[labeled]).tolist() == [5] * 10
    assert not set(labeled) & set(validation)


# Order

def test_every_pass_holds_every_image_once_in_an_order_of_its_own():
    indices = np.arange(100, 137)
    stream = IndexStream(indices, batch_size=10, seed=1, stream="labeled")
    order = np.concatenate([stream(step) for step in range(1, 112)])
    passes = [tuple(order[i:i + 37]) for i in range(0, 37 * 30, 37)]
    assert all(sorted(p) == list(indices) for p in passes)
    assert len(set(passes)) == 30


def test_a_batch_may_span_several_passes():
    stream = IndexStream(np.arange(3), batch_size=8, seed=1, stream="labeled")
    batch = np.concatenate([stream(step) for step in (1, 2, 3)])
    assert np.bincount(batch).tolist() == [8, 8, 8]


def test_a_batch_is_a_function_of_seed_and_step_alone(digits):
    labeled, unlabeled = split_labels(digits.train_labels, 50, 10, seed=0)

    def batches(seed=5):
        return Batches(digits, labeled, unlabeled, batch_size=16, seed=seed, mixup_gamma=1.0)

    in_order = batches()
    drawn = {step: in_order(step) for step in range(1, 200)}
    torch.manual_seed(3)
    fresh = batches()
    for step in (150, 3, 199):
        assert all(torch.equal(a, b) for a, b in zip(fresh(step), drawn[step]))
    assert not torch.equal(batches(seed=6)(3).x_u, drawn[3].x_u)


def test_streams_do_not_share_random_numbers():
    draws = [IndexStream(np.arange(50), 50, 1, stream)(1).tolist() for stream in ("labeled", "unlabeled")]
    assert draws[0] != draws[1]
    a, b = (crop_and_flip_choices(50, 4, True, 1, f"augment {part}", 1).tolist() for part in ("labeled", "unlabeled"))
    assert a != b


def test_memory_of_the_order_does_not_grow_with_the_step():
    stream = IndexStream(np.arange(1000), batch_size=10, seed=0, stream="labeled")
    stream(40_000_000)
    assert sum(value.nbytes for value in vars(stream).values() if isinstance(value, np.ndarray)) == 2 * 1000 * 8


def test_mixup_weights_follow_the_beta_distribution():
    for gamma in (0.1, 1.0, 5.0):
        lam = np.concatenate([mixup_weights(1000, gamma, 0, step) for step in range(1, 21)])
        assert lam.min() >= 0 and lam.max() <= 1
        assert lam.mean() == pytest.approx(0.5, abs=0.02)
        assert lam.var() == pytest.approx(1 / (4 * (2 * gamma + 1)), rel=0.05)


# Augmentation

def test_batched_crop_flip_and_normalize_equal_torchvision_for_every_offset():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (162, 3, 32, 32), dtype=torch.uint8)
    choices = torch.tensor([(dy, dx, flip) for dy in range(9) for dx in range(9) for flip in (0, 1)])
    mean, std = torch.tensor(DATASETS["cifar10"].mean), torch.tensor(DATASETS["cifar10"].std)
    batch = normalize(crop_and_flip(images, choices, 4), mean, std)
    for image, (dy, dx, flip), value in zip(images, choices.tolist(), batch):
        expected = F.crop(F.pad(F.to_pil_image(image), [4]), dy, dx, 32, 32)
        expected = F.hflip(expected) if flip else expected
        assert close(value, F.normalize(F.to_tensor(expected), mean.tolist(), std.tolist()))


def test_all_81_offsets_and_both_flips_occur_evenly():
    choices = np.concatenate([crop_and_flip_choices(256, 4, True, 0, "augment labeled", step) for step in range(1, 401)])
    counts = np.bincount(choices[:, 0] * 9 + choices[:, 1], minlength=81)
    expected = len(choices) / 81
    assert ((counts - expected) ** 2 / expected).sum() < 125           # chi-square, 80 degrees of freedom, p = 0.001
    assert choices[:, 2].mean() == pytest.approx(0.5, abs=0.005)


def test_only_photographs_are_flipped():
    assert {name for name, row in DATASETS.items() if row.flip} == {"cifar10", "cifar100", "stl10", "imagenet"}
    assert crop_and_flip_choices(1000, 4, False, 0, "augment labeled", 1)[:, 2].sum() == 0


def test_evaluation_images_are_normalized_in_order_and_not_augmented(digits):
    batches = list(normalized_batches(digits.test_images, digits.test_labels, digits.mean, digits.std, batch_size=130))
    assert [len(x) for x, _ in batches] == [130, 130, 130, 110]
    assert torch.equal(torch.cat([x for x, _ in batches]), normalize(digits.test_images, digits.mean, digits.std))
    assert torch.equal(torch.cat([y for _, y in batches]), digits.test_labels)


# Loading

def test_digits_are_real_fixed_and_normalized_to_zero_mean_and_unit_deviation(digits):
    assert digits.train_images.shape == (1297, 3, 16, 16) and digits.test_images.shape == (500, 3, 16, 16)
    assert digits.train_images.dtype == torch.uint8 and digits.num_classes == 10
    assert digits.labels_sha256 == load_dataset("digits", "elsewhere").labels_sha256
    x = normalize(digits.train_images, digits.mean, digits.std)
    assert x.mean().abs() < 1e-4 and x.std().item() == pytest.approx(1, abs=1e-3)


def test_pixels_move_to_a_device_and_labels_stay(digits):
    moved = digits.to("meta")
    assert moved.train_images.is_meta and moved.test_images.is_meta and moved.image_size == digits.image_size == 16
    assert moved.train_labels is digits.train_labels and moved.labels_sha256 == digits.labels_sha256


def make_folder(root, classes=("ant", "bee"), count=6, size=(20, 24)):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.png")
    return root


def test_folder_is_read_by_class_resized_and_measured(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    images = load_dataset("folder", root, image_size=16, flip=True)
    assert images.train_images.shape == images.test_images.shape == (12, 3, 16, 16)
    assert images.class_names == ("ant", "bee") and images.train_labels.tolist() == [0] * 6 + [1] * 6
    assert images.flip
    pixels = images.train_images.double() / 255
    assert close(images.mean, pixels.mean(dim=(0, 2, 3)))
    assert close(images.std, pixels.std(dim=(0, 2, 3), correction=0))


def test_folder_keeps_the_pixels_of_images_that_have_the_size_and_any_number_of_workers_reads_the_same(tmp_path, monkeypatch):
    root = make_folder(tmp_path, size=(16, 16))
    monkeypatch.setattr("datasets.folder.TASK_SIZE", 2)
    images = load_dataset("folder", root, image_size=16)
    pixels = torch.from_numpy(np.array(Image.open(root / "train/bee/01.png"))).permute(2, 0, 1)
    assert torch.equal(images.train_images[7], pixels)
    assert torch.equal(load_dataset("folder", root, image_size=16, num_workers=2).train_images, images.train_images)


def test_folders_that_cannot_be_trained_on_are_refused(tmp_path):
    with pytest.raises(DataError, match="train is not a folder"):
        load_dataset("folder", tmp_path)
    root = make_folder(tmp_path / "a")
    (root / "train" / "cow").mkdir()
    with pytest.raises(DataError, match="only one has cow"):
        load_dataset("folder", root)
    (root / "test" / "cow").mkdir()
    with pytest.raises(DataError, match="training set: no image of class cow"):
        load_dataset("folder", root)
    (root / "train" / "bee" / "00.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="00.png cannot be read as an image"):
        load_dataset("folder", root)
    with pytest.raises(DataError, match="1 class folders: at least 2"):
        load_dataset("folder", make_folder(tmp_path / "b", classes=("ant",)))


# Files of the user's own

def decoded(path, crop=None):
    """Pixels (16, 16, 3) of a file."""
    return decode_file(path, 16, crop).transpose(1, 2, 0)


def write_gray(path, values):
    Image.fromarray(values).save(path)
    return path


def test_gray_images_of_16_bits_and_of_floats_keep_their_levels(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    big_endian = Image.frombytes("I;16B", (16, 16), (levels * 257).astype(">u2").tobytes())
    big_endian.save(tmp_path / "b.tiff")
    paths = [tmp_path / "b.tiff", write_gray(tmp_path / "float.tiff", levels.astype(np.float32) / 255),
             *(write_gray(tmp_path / name, levels * 257) for name in ("a.png", "a.tiff", "a.pgm", "a.jp2"))]
    assert {Image.open(path).mode for path in paths} == {"I;16", "I;16B", "I", "F"}
    for path in paths:
        assert np.array_equal(decoded(path), np.repeat(levels[:, :, None], 3, axis=2)), path.name
    odd = np.random.default_rng(0).integers(0, 65_536, (16, 16), dtype=np.uint16)
    assert np.array_equal(decoded(write_gray(tmp_path / "odd.png", odd))[:, :, 0], (odd / 257).round())
    Image.fromarray(levels * 257).save(tmp_path / "clear.png", transparency=257 * 7)
    assert (decoded(tmp_path / "clear.png")[:, :, 0] == np.where(levels == 7, 255, levels)).all()


@pytest.mark.parametrize(("value", "words"), [(np.int32(65_536), "from 0 to 65536"), (np.int32(-1), "from -1 to 0"),
                                              (np.float32(1.5), "from 0 to 1.5"), (np.float32(np.nan), "from nan")])
def test_numbers_whose_range_is_unknown_are_refused_with_the_ranges_that_are_known(tmp_path, value, words):
    values = np.zeros((16, 16), value.dtype)
    values[3, 3] = value
    with pytest.raises(DataError, match=f"{words}.*: scale whole ones to 0 to 65,535, floats to 0 to 1"):
        decoded(write_gray(tmp_path / "a.tiff", values))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_images_are_upright_as_their_exif_says_and_damaged_exif_turns_nothing(tmp_path, suffix):
    blocks = np.kron(np.arange(8).reshape(2, 4) * 36, np.ones((8, 4), int))
    upright = Image.fromarray(blocks.astype(np.uint8)).convert("RGB")
    turned = {1: upright, 3: upright.rotate(180), 6: upright.transpose(Image.Transpose.ROTATE_90),
              8: upright.transpose(Image.Transpose.ROTATE_270), 5: upright.transpose(Image.Transpose.TRANSPOSE)}
    for orientation, image in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"a.{suffix}", exif=exif, quality=100)
        assert np.abs(decoded(tmp_path / f"a.{suffix}").astype(int) - np.asarray(upright)).max() < 9, orientation
    if suffix in ("jpg", "png"):
        upright.save(tmp_path / f"b.{suffix}", exif=b"Exif\x00\x00MM\x00*damaged", quality=100)
        assert np.abs(decoded(tmp_path / f"b.{suffix}").astype(int) - np.asarray(upright)).max() < 9


def test_what_is_transparent_is_white(tmp_path):
    left = np.arange(16) < 8
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, left] = 10, 200, 30, 255
    rgba[:, ~left, :3] = 66, 66, 66
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba[:, :, [1, 3]]).save(tmp_path / "la.png")
    palette = Image.fromarray(rgba[:, :, :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((15, 0)))
    Image.fromarray(rgba).save(tmp_path / "p.gif")
    Image.fromarray(rgba[:, :, :3]).save(tmp_path / "key.png", transparency=(66, 66, 66))
    assert [Image.open(tmp_path / name).mode for name in ("la.png", "p.png", "p.gif")] == ["LA", "P", "P"]
    for name in ("rgba.png", "p.png", "p.gif", "key.png", "la.png"):
        pixels = decoded(tmp_path / name)
        assert (pixels[:, ~left] == 255).all(), name
        assert (pixels[:, left] == ((200, 200, 200) if name == "la.png" else (10, 200, 30))).all(), name
    rgba[:, :, 3] = 51                                                      # a fifth
    Image.fromarray(rgba).save(tmp_path / "half.png")
    assert np.abs(decoded(tmp_path / "half.png")[0, 0].astype(int) - (206, 244, 210)).max() <= 1


def test_opaque_images_of_8_bits_are_what_pillow_makes_of_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgb, gray = Image.fromarray(pixels[:, :, :3]), Image.fromarray(pixels[:, :, 0])
    for name, image in (("rgb.png", rgb), ("rgb.jpg", rgb), ("gray.png", gray), ("1.png", gray.convert("1")),
                        ("p.png", rgb.convert("P")), ("ycbcr.tiff", rgb.convert("YCbCr")),
                        ("cmyk.jpg", Image.frombytes("CMYK", (16, 16), pixels.tobytes()))):
        image.save(tmp_path / name)
        assert np.array_equal(decoded(tmp_path / name), np.asarray(Image.open(tmp_path / name).convert("RGB"))), name


@pytest.mark.filterwarnings("error")
def test_hostile_files_are_refused_before_they_cost_anything(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "script.png").write_bytes(script)
    Image.new("1", (20_000, 1)).save(tmp_path / "thin.png")
    Image.new("1", (1, 20_000)).save(tmp_path / "tall.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.avif")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.dds")
    whole = {suffix: (tmp_path / f"a.{suffix}").read_bytes() for suffix in ("avif", "dds")}
    (tmp_path / "cut.avif").write_bytes(whole["avif"][:-20])
    (tmp_path / "cut.dds").write_bytes(whole["dds"][:60])
    names = ["script.png", "bomb.png", "cut.avif", "cut.dds"]
    for crop, more in ((None, ["none.png", "bin"]), ("center", ["thin.png", "tall.png"])):
        _, faults = decode_files([tmp_path / name for name in names + more], 224, [crop] * 6)
        assert len(faults) == 6 and all("cannot be read as an image (" in fault for fault in faults), faults
    assert "20000x1 pixels are too long and thin to cut out the center" in faults[4] and not (tmp_path / "ran").exists()
    assert decode_file(tmp_path / "thin.png", 16).shape == (3, 16, 16)
    monkeypatch.setattr("datasets.decoding.to_rgb", lambda image: 1 / 0)         # whatever Pillow may raise
    with pytest.raises(DataError, match="division by zero"):
        decoded(tmp_path / "a.dds")


def test_what_is_no_image_is_ignored_with_its_number_and_reason_and_never_opened(tmp_path):
    root = make_folder(tmp_path, count=2)
    ant = root / "train" / "ant"
    for name in ("x.gif", "x.jfif", "x.tga", "x.bmp", "x.jp2", "x.PGM"):
        Image.new("RGB", (8, 8)).save(ant / name, format="JPEG" if name == "x.jfif" else None)
    (ant / "._x.jpg").write_bytes(b"")
    (ant / ".DS_Store").write_bytes(b"")
    (ant / "notes.txt").write_bytes(b"")
    (ant / "script.eps").write_bytes(b"%!PS")
    os.mkfifo(root / "test" / "bee" / "x.png")
    (ant / "more.png").mkdir()
    (root / "train" / ".thumbnails").mkdir()
    images = load_dataset("folder", root, 16)
    assert images.train_labels.tolist() == [0] * 8 + [1] * 2 and len(images.test_labels) == 4
    assert images.ignored == ("1 outside a class folder ('train/.thumbnails'); 2 hidden ('train/ant/.DS_Store', ...); "
                              "1 a folder in a class folder ('train/ant/more.png'); "
                              "2 of another suffix ('train/ant/notes.txt', ...); 1 not a regular file ('test/bee/x.png')")
    assert load_dataset("digits", root).ignored == ""
    (ant / "lost.png").symlink_to("nowhere")                             # an image that is missing
    with pytest.raises(DataError, match="lost.png cannot be read.*No such file"):
        load_dataset("folder", root, 16)


def write_cifar(root, source, monkeypatch, label_key):
    """Files in the layout of the CIFAR archives, five images each, with their sums made known to torchvision."""
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    classes = 10 if label_key == "labels" else 100

    def put(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(source, attribute, [put(name, {"data": rng.integers(0, 256, (classes, 3072), dtype=np.uint8),
                                                           label_key: list(range(classes))})
                                                for name, _ in getattr(source, attribute)])
    name, md5 = put(source.meta["filename"], {source.meta["key"]: [f"class {k}" for k in range(classes)]})
    monkeypatch.setattr(source, "meta", {**source.meta, "filename": name, "md5": md5})
    return folder


def no_network(*args, **kwargs):
    raise URLError("no network")


@pytest.mark.parametrize(("name", "source", "label_key", "classes", "count"), [
    ("cifar10", "CIFAR10", "labels", 10, 50), ("cifar100", "CIFAR100", "fine_labels", 100, 100)])
def test_cifar_files_that_are_there_are_used_without_a_network(tmp_path, monkeypatch, name, source, label_key, classes, count):
    import torchvision.datasets

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    folder = write_cifar(tmp_path, getattr(torchvision.datasets, source), monkeypatch, label_key)
    images = load_dataset(name, tmp_path)
    assert images.train_images.shape == (count, 3, 32, 32) and images.num_classes == classes and images.flip
    assert images.test_labels.tolist() == list(range(classes))
    first = pickle.loads((folder / ("data_batch_1" if name == "cifar10" else "train")).read_bytes())
    assert torch.equal(images.train_images[0].flatten(), torch.from_numpy(first["data"][0]))


def test_missing_and_damaged_files_without_a_network_are_named_with_their_sum(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    with pytest.raises(DataError, match="data_batch_1 is missing and could not.*c99cafc152244af753f735de768cd75f"):
        load_dataset("cifar10", tmp_path)
    with pytest.raises(DataError, match="train_32x32.mat is missing.*e26dedcc434d2e4c54c9b2d4a06d8373"):
        load_dataset("svhn", tmp_path)
    folder = write_cifar(tmp_path, CIFAR10, monkeypatch, "labels")
    data = bytearray((folder / "data_batch_3").read_bytes())
    data[1000] ^= 1
    (folder / "data_batch_3").write_bytes(data)
    with pytest.raises(DataError, match="data_batch_3 is damaged"):
        load_dataset("cifar10", tmp_path)


def test_svhn_maps_label_ten_to_zero_and_is_not_flipped(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    files = {}
    for split in ("train", "test"):
        url, name, _ = SVHN.split_list[split]
        savemat(tmp_path / name, {"X": np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8),
                                  "y": np.arange(1, 11, dtype=np.uint8)[:, None]})
        files[split] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", files)
    images = load_dataset("svhn", tmp_path)
    assert images.train_images.shape == (10, 3, 32, 32) and not images.flip
    assert images.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_the_table_names_every_data_set_once():
    with pytest.raises(DataError, match="no data set is named 'mnist'; choose from cifar10"):
        load_dataset("mnist", "unused")
    assert {row.loader for row in DATASETS.values()} == set(datasets.loading.LOADERS)
    assert training_parser().parse_args(["--dataset", "digits"]).dataset == "digits"
