"""Splits, order, augmentation and loading."""
import hashlib
import os
import pickle
import shutil
from itertools import product
from urllib.error import URLError

import numpy as np
import PIL
import pytest
import torch
from injections import other_sums, tiny_cifar
from oracle import close
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, SVHN
from torchvision.transforms import functional as F

import datasets.loading
from datasets import DATASETS, Batches, DataError, data_digest, duplicates, load_dataset, split_labels
from datasets.augment import crop_and_flip, normalize
from datasets.batches import normalized_batches, ordered_batches
from datasets.decoding import decode_file, decode_files
from datasets.sampling import IndexStream, crop_and_flip_choices, mixup_weights, resized_crop_choices
from datasets.splits import split_training


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:         # all of them, here
        patch.setitem(datasets.loading.LOADERS, "digits", datasets.loading.load_digits)
        yield load_dataset("digits", "unused")


# Splits

def test_a_split_is_balanced_disjoint_complete_ascending_and_depends_on_nothing_but_the_seed(digits):
    labeled, unlabeled = split_labels(digits.train_labels, 50, 10, seed=3)
    assert torch.bincount(digits.train_labels[labeled]).tolist() == [5] * 10
    assert sorted([*labeled, *unlabeled]) == list(range(len(digits.train_labels)))
    assert list(labeled) == sorted(labeled)
    torch.manual_seed(99), np.random.seed(99)
    assert np.array_equal(split_labels(digits.train_labels, 50, 10, seed=3)[0], labeled)
    assert not np.array_equal(split_labels(digits.train_labels, 50, 10, seed=4)[0], labeled)
    labeled, unlabeled = split_labels(digits.train_labels, 1297, 10, seed=0)        # all, whatever their balance
    assert len(labeled) == 1297 and len(unlabeled) == 0
    labeled, validation = split_training(digits.train_labels, 50, 100, 10, seed=0)
    assert torch.bincount(digits.train_labels[validation]).tolist() == [10] * 10
    assert torch.bincount(digits.train_labels[labeled]).tolist() == [5] * 10
    assert not set(labeled) & set(validation)


@pytest.mark.parametrize(("num_label", "message"), [
    (55, "--num-label: 55 images cannot be drawn evenly from 10 classes: use a multiple of 10 up to 1220, or 1297 for all$"),
    (5, "5 images"), (0, "0 images"), (1298, "1298 images"), (1225, "1225 images"), (1290, "1290 images .* up to 1220")])
def test_split_that_cannot_be_balanced_is_refused_with_the_remedy(digits, num_label, message):
    with pytest.raises(ValueError, match=message):
        split_labels(digits.train_labels, num_label, 10, seed=0)


# Order

def test_every_pass_holds_every_image_once_in_an_order_of_its_own():
    indices = np.arange(100, 137)
    stream = IndexStream(indices, batch_size=10, seed=1, stream="labeled")
    order = np.concatenate([stream(step) for step in range(1, 112)])
    passes = [tuple(order[i:i + 37]) for i in range(0, 37 * 30, 37)]
    assert all(sorted(p) == list(indices) for p in passes)
    assert len(set(passes)) == 30
    stream = IndexStream(np.arange(3), batch_size=8, seed=1, stream="labeled")
    batch = np.concatenate([stream(step) for step in (1, 2, 3)])
    assert np.bincount(batch).tolist() == [8, 8, 8]


@pytest.mark.parametrize("choices", [
    lambda seed, stream, step: IndexStream(np.arange(50), 50, seed, stream)(step),
    lambda seed, stream, step: crop_and_flip_choices(50, 4, True, seed, f"augment {stream}", step),
    lambda seed, stream, step: resized_crop_choices(50, seed, f"crop {stream}", step)])
def test_seeds_streams_and_steps_do_not_share_random_numbers(choices):
    drawn = [choices(*of).tolist() for of in product((1, 2), ("labeled", "unlabeled"), (1, 2))]
    assert all(drawn[i] != drawn[j] for i in range(8) for j in range(i))


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
    assert crop_and_flip_choices(1000, 4, False, 0, "augment labeled", 1)[:, 2].sum() == 0


# Loading

def test_sizes_means_and_deviations_are_those_of_the_paper():
    found = {name: (row.num_train, *(row.mean or ()), *(row.std or ())) for name, row in DATASETS.items() if row.num_train}
    assert found == {"cifar10": (50_000, .49139968, .48215841, .44653091, .24703223, .24348513, .26158784),
                     "cifar100": (50_000, .50707516, .48654887, .44091784, .26733429, .25643846, .27615047),
                     "svhn": (73_257, .4376821, .4437697, .47280442, .19803012, .20101562, .19703614),
                     "stl10": (5_000,), "digits": (1_297,)}


def test_digits_are_fixed_normalized_to_zero_mean_and_unit_deviation_and_evaluated_in_order(digits):
    assert digits.train_images.shape == (1297, 3, 16, 16) and digits.test_images.shape == (500, 3, 16, 16)
    assert digits.train_images.dtype == torch.uint8 and digits.num_classes == 10 and digits.train_images.max() == 255
    batches = list(normalized_batches(digits.test_images, digits.test_labels, digits.mean, digits.std, batch_size=130))
    assert torch.equal(torch.cat([x for x, _ in batches]), normalize(digits.test_images, digits.mean, digits.std))
    assert torch.equal(torch.cat([y for _, y in batches]), digits.test_labels)
    x = normalize(digits.train_images, digits.mean, digits.std)
    assert x.mean().abs() < 1e-4 and x.std().item() == pytest.approx(1, abs=1e-3)


def make_folder(root, classes=("ant", "bee"), count=6, size=(20, 24)):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.png")
    return root


def test_a_folder_is_read_by_class_resized_and_measured_by_any_number_of_workers(tmp_path, monkeypatch):
    root = make_folder(tmp_path)
    touch(root, "train/ant/notes.txt", "train/ant/deep/x.png", "train/.small/x.png")
    (root / "train" / "ant" / "05.png").rename(root / "train" / "ant" / "05.JFIF")
    Image.new("RGB", (16, 16), (9, 99, 199)).save(root / "train" / "bee" / "01.png")
    monkeypatch.setattr("datasets.streaming.TASK_SIZE", 2)
    images = load_dataset("folder", root, 16, True)
    assert images.train_images.shape == images.test_images.shape == (12, 3, 16, 16)
    assert images.class_names == ("ant", "bee") and images.train_labels.tolist() == [0] * 6 + [1] * 6
    assert images.ignored == ("1 outside a class folder ('train/.small'); 1 a folder in a class folder ('train/ant/deep'); "
                              "1 of another suffix ('train/ant/notes.txt')")
    assert images.flip and images.train_images[7, :, 3, 5].tolist() == [9, 99, 199]
    assert torch.equal(load_dataset("folder", root, 16, num_workers=2).train_images, images.train_images)
    pixels = images.train_images.double() / 255
    assert close(images.mean, pixels.mean(dim=(0, 2, 3)))
    assert close(images.std, pixels.std(dim=(0, 2, 3), correction=0))


def remove(root, *names):
    for name in names:
        shutil.rmtree(root / name)
    return root


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.mark.parametrize(("damage", "options", "message"), [
    (lambda root: (remove(root, "test") / "test").symlink_to("train"), {},
     "test/ant/00.png is the same file as .*train/ant/00.png: remove one of them"),
    (lambda root: os.link(root / "train/ant/03.png", root / "test/bee/x.png"), {}, "test/bee/x.png is .*train/ant/03.png"),
    (lambda root: (root / "unlabeled/x.png").symlink_to(root / "test/bee/03.png"), {}, "test/bee/03.png is .*unlabeled/x.png"),
    (lambda root: (root / "test/bee/x.png").symlink_to(root / "test/ant/03.png"), {}, "test/bee/x.png is .*test/ant/03.png"),
    (lambda root: os.link(root / "train/ant/03.png", remove(root, "test") / "train/ant/x.png"), {"num_test": 2},
     "train/ant/x.png is the same file as .*train/ant/03.png"),                    # one of the two might be held out
    (lambda root: None, {"num_test": 2}, "argument --num-test: .*test has the test images: leave --num-test out"),
    (lambda root: (remove(root, "test") / "train/bee/00.png").unlink(), {"num_test": 3}, "--num-test: 3 images cannot be"),
    (lambda root: (remove(root, "test") / "train/bee/00.png").unlink(), {"num_test": 10}, "use a multiple of 2 up to 8$"),
    (lambda root: remove(root, "test"), {}, "test is not a folder: --dataset folder reads .*; --num-test N holds N"),
    (lambda root: remove(root, "train/ant"), {}, "1 class folders: at least 2"),
    (lambda root: touch(root, "test/cow/x.png"), {}, "train has no class cow: add training images of it, or remove its folder"),
    (lambda root: touch(root, *(f"test/{name}/{i:02d}.png" for name in ("ant", "bee") for i in range(6))),
     {"skip_corrupt": True}, "no test image, and 12 that cannot be read"),
    (lambda root: (remove(root, "unlabeled") / "unlabeled" / "deep").mkdir(parents=True), {}, "unlabeled holds no image: put"),
    (lambda root: (root / "unlabeled").rename(root / "train" / "unlabeled"), {}, "images without a class in .*es/unlabeled")])
def test_folders_that_cannot_be_trained_on_are_refused_in_one_line_with_the_remedy(tmp_path, damage, options, message):
    root = make_folder(tmp_path / "images")
    shutil.copytree(root / "train" / "ant", root / "unlabeled")
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("folder", root, **options)
    assert "\n" not in str(caught.value)


def test_a_class_without_images_is_refused_with_what_lies_there_and_one_without_test_images_is_a_warning(tmp_path):
    root = make_folder(tmp_path)
    assert load_dataset("folder", root).warnings == ()
    shutil.rmtree(root / "test" / "ant")
    images = load_dataset("folder", root)
    assert images.warnings == ("1 of 2 classes have no test image: ant",) and images.test_labels.tolist() == [1] * 6
    assert "12 (6 a class) training and 6 (0 to 6 a class) test images" in images.describe()
    touch(root, *(f"train/cow/{name}" for name in ("x.heic", "y.heic", "train.png")))
    with pytest.raises(DataError, match=r"train/cow: no image of class cow beside 2 of another suffix \('x.heic', ...\); "
                                        r"1 unreadable \('train.png'\): add one"):
        load_dataset("folder", root, skip_corrupt=True)


def test_test_images_with_the_pixels_of_a_training_image_are_counted(tmp_path):
    root = make_folder(tmp_path)
    assert duplicates(load_dataset("folder", root)) == 0
    for name in ("ant/02.png", "bee/03.png"):
        shutil.copy(root / "train" / name, root / "test" / name)
    shutil.copy(root / "train/ant/01.png", root / "train/ant/more.png")         # within one set
    assert duplicates(load_dataset("folder", root)) == 2 and duplicates(load_dataset("folder", root, memory=0)) == 0


# Images that are held out, and those that cannot be read

@pytest.mark.parametrize("memory", [None, 0])
def test_held_out_images_are_balanced_always_the_same_and_nowhere_else(tmp_path, memory):
    root = make_folder(tmp_path, count=8)
    shutil.rmtree(root / "test")
    images = load_dataset("folder", root, 16, num_test=6, memory=memory)
    names = [os.path.relpath(path, root) for path in images.test_files]
    assert names == [f"train/{name}.png" for name in ("ant/00", "ant/02", "ant/07", "bee/00", "bee/01", "bee/03")]
    assert images.test_labels.tolist() == [0] * 3 + [1] * 3 and images.train_labels.tolist() == [0] * 5 + [1] * 5
    for files, index in ((images.train_files, images.train_images), (images.test_files, images.test_images)):
        pixels = torch.cat([pixels for _, pixels in ordered_batches(index)])
        assert np.array_equal(pixels, [decode_file(path, 16) for path in files])
    for name in names:                                  # in the place of training images they would change the mean
        Image.new("RGB", (9, 9), "white").save(root / name)
    again = load_dataset("folder", root, 16, num_test=6, memory=memory)
    assert torch.equal(again.mean, images.mean) and torch.equal(again.std, images.std)
    with pytest.raises(DataError, match="argument --split: there is no training image ant/00.png: it is a test image"):
        images.indices_of(["ant/01.png", "ant/00.png"])


def drawn(images):
    """Everything that a run takes from images, a list of tensors."""
    labeled, unlabeled = split_labels(images.train_labels, 4, 2, seed=0)
    with Batches(images, labeled, unlabeled, batch_size=8, seed=1) as batches:
        return [images.mean, images.std, *batches(1)[:4], *batches(2)[:4],
                *next(normalized_batches(images.test_images, images.test_labels, images.mean, images.std))]


@pytest.mark.parametrize("memory", [None, 0])
def test_what_cannot_be_read_is_left_out_as_if_it_were_not_there(tmp_path, monkeypatch, memory):
    roots = [make_folder(tmp_path / root, count=8) for root in ("damaged", "clean")]
    broken = ["train/ant/03.png", "train/bee/00.png", "unlabeled/ant/01.png", "test/bee/07.png"]
    for root in roots:
        shutil.copytree(root / "train", root / "unlabeled")
    for file in broken:
        (roots[0] / file).write_bytes((roots[0] / file).read_bytes()[:100])
        (roots[1] / file).unlink()

    def load(root, **options):
        return load_dataset("folder", root, 16, memory=memory, **options)

    others = "; nor can 3 more, such as .*bee/00.png.*" * (memory is None)
    with pytest.raises(DataError, match=rf"ant/03.png cannot be read as an image .*\){others}: replace it, or"):
        load(roots[0])
    monkeypatch.setattr("datasets.streaming.TASK_SIZE", 7)
    images, clean = load(roots[0], skip_corrupt=True, num_workers=2), load(roots[1], skip_corrupt=True)
    assert list(images.left_out) == broken and clean.left_out == {}
    assert images.where.endswith("in memory" if memory is None else "GB of memory")
    assert all(reason.startswith(f"{roots[0] / file} cannot be read as an image (") for file, reason in images.left_out.items())
    assert data_digest(images) == data_digest(clean)
    assert all(map(torch.equal, drawn(images), drawn(clean)))
    with pytest.raises(DataError, match="there is no training image ant/03.png: --skip-corrupt left it out"):
        images.indices_of(["ant/03.png"])
    given = load(roots[0], skip_corrupt=True, left_out=broken)
    assert given.left_out == dict.fromkeys(broken, "") and data_digest(given) == data_digest(images)
    assert all(map(torch.equal, drawn(given), drawn(clean)))


# Files of the user's own

def decoded(path, crop=None):
    """Pixels (16, 16, 3) of a file."""
    return decode_file(path, 16, crop).transpose(1, 2, 0)


def test_gray_images_of_16_bits_and_of_floats_keep_their_levels_and_those_of_unknown_range_are_refused(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.frombytes("I;16B", (16, 16), (levels * 257).astype(">u2").tobytes()).save(tmp_path / "b.tiff")
    Image.fromarray(levels.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    for name in ("a.png", "a.tiff", "a.pgm", "a.jp2"):
        Image.fromarray(levels * 257).save(tmp_path / name)
    paths = sorted(tmp_path.iterdir())
    assert {Image.open(path).mode for path in paths} == {"I;16", "I;16B", "I", "F"}
    for path in paths:
        assert np.array_equal(decoded(path), np.repeat(levels[:, :, None], 3, axis=2)), path.name
    Image.fromarray(levels * 257).save(tmp_path / "clear.png", transparency=257 * 7)
    assert (decoded(tmp_path / "clear.png")[:, :, 0] == np.where(levels == 7, 255, levels)).all()
    for value, words in ((np.int32(65_536), "from 0 to 65536"), (np.int32(-1), "from -1 to 0"),
                         (np.float32(1.5), "from 0 to 1.5"), (np.float32(np.nan), "from nan")):
        Image.fromarray(np.where(levels == 7, value, 0).astype(value.dtype)).save(tmp_path / "a.tiff")
        with pytest.raises(DataError, match=f"{words}.*: scale whole ones to 0 to 65,535, floats to 0 to 1"):
            decoded(tmp_path / "a.tiff")


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
    rgba = np.where(left[:, None], np.uint8([10, 200, 30, 255]), np.uint8([66, 66, 66, 0])) * np.ones((16, 1, 1), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba[:, :, [1, 3]]).save(tmp_path / "la.png")
    palette = Image.fromarray(rgba[:, :, :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((15, 0)))
    Image.fromarray(rgba).save(tmp_path / "p.gif")
    Image.fromarray(rgba[:, :, :3]).save(tmp_path / "key.png", transparency=(66, 66, 66))
    for name in ("rgba.png", "p.png", "p.gif", "key.png", "la.png"):
        pixels = decoded(tmp_path / name)
        assert (pixels[:, ~left] == 255).all(), name
        assert (pixels[:, left] == ((200, 200, 200) if name == "la.png" else (10, 200, 30))).all(), name
    Image.new("RGBA", (16, 16), (10, 200, 30, 51)).save(tmp_path / "fifth.png")
    assert np.abs(decoded(tmp_path / "fifth.png")[0, 0].astype(int) - (206, 244, 210)).max() <= 1


def test_opaque_images_of_8_bits_are_what_pillow_makes_of_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgb, gray = Image.fromarray(pixels[:, :, :3]), Image.fromarray(pixels[:, :, 0])
    for name, image in (("rgb.png", rgb), ("rgb.jpg", rgb), ("gray.png", gray), ("1.png", gray.convert("1")),
                        ("p.png", rgb.convert("P")),
                        # Pillow 12.3 cannot read what it writes
                        *([] if PIL.__version__.startswith("12.3.") else [("ycbcr.tiff", rgb.convert("YCbCr"))]),
                        ("cmyk.jpg", Image.frombytes("CMYK", (16, 16), pixels.tobytes()))):
        image.save(tmp_path / name)
        assert np.array_equal(decoded(tmp_path / name), np.asarray(Image.open(tmp_path / name).convert("RGB"))), name


@pytest.mark.filterwarnings("error")
def test_files_that_are_cut_off_or_cost_too_much_are_named_whatever_pillow_raises(tmp_path, monkeypatch):
    Image.new("1", (20_000, 1)).save(tmp_path / "thin.png")
    for suffix, length in (("avif", -20), ("dds", 60)):
        Image.new("RGB", (16, 16)).save(tmp_path / f"a.{suffix}")
        (tmp_path / f"cut.{suffix}").write_bytes((tmp_path / f"a.{suffix}").read_bytes()[:length])
    names = ["cut.avif", "cut.dds", "none.png", "thin.png"]
    _, faults = decode_files([tmp_path / name for name in names], 224, [None, None, None, "center"])
    assert len(faults) == 4 and all("cannot be read as an image (" in fault for fault in faults), faults
    assert "20000x1 pixels are too long and thin to cut out the center" in faults[3]
    assert decode_file(tmp_path / "thin.png", 16).shape == (3, 16, 16)
    monkeypatch.setattr("datasets.decoding.to_rgb", lambda image: 1 / 0)
    with pytest.raises(DataError, match="division by zero"):
        decoded(tmp_path / "a.dds")


def no_network(*args, **kwargs):
    raise URLError("no network")


def test_cifar_files_that_are_there_are_used_without_a_network(tmp_path, monkeypatch):
    for attribute in ("train_list", "test_list", "meta"):       # put back afterwards
        monkeypatch.setattr(CIFAR10, attribute, getattr(CIFAR10, attribute))
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    other_sums(tiny_cifar(tmp_path))
    images = load_dataset("cifar10", tmp_path)
    assert images.train_images.shape == (50, 3, 32, 32) and images.num_classes == 10 and images.flip
    assert images.test_labels.tolist() == list(range(10)) and images.class_names[3] == "class 3"
    first = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    assert torch.equal(images.train_images[0].flatten(), torch.from_numpy(first["data"][0]))


def test_svhn_maps_label_ten_to_zero_and_is_not_flipped(tmp_path, monkeypatch):
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


def test_the_table_names_every_data_set_and_only_photographs_are_flipped():
    with pytest.raises(DataError, match="argument --num-test: digits has a test set of its own"):
        load_dataset("digits", "unused", num_test=10)
    assert {name for name, row in DATASETS.items() if row.flip} == {"cifar10", "cifar100", "stl10", "imagenet"}
