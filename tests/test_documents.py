"""The programs in docs/usage.md: each is taken out of the page and run."""
import csv
import re
from pathlib import Path

import torch
from conftest import ROOT
from oracle import close
from test_datasets import make_folder

import train_meta

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/usage.md").read_text(), re.DOTALL)


def block(words):
    """The one program of the page that holds some words."""
    found, = (text for text in BLOCKS if words in text)
    return found


def test_the_model_in_a_program_gives_the_probabilities_of_the_predictions_also_once_it_is_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", count=4)
    assert train_meta.main(["--dataset", "folder", "--data-path", "photos", "--num-label", "4", "--image-size", "16",
                            "-a", "convsmall", "--batch-size", "4", "--total-steps", "2", "--warmup", "1", "--device", "cpu",
                            "--num-workers", "0", "--save-path", "results/photos"]) == 0
    assert train_meta.main(["--evaluate", "results/photos/model_best.pth", "--predictions", "all.csv", "--device", "cpu"]) == 0
    row, *_ = csv.DictReader(open("all.csv", encoding="utf-8"))
    code = block("torch.export.save")
    for ours, here in (('"convlarge"', '"convsmall"'), ('"photo.jpg"', repr(row["file"]))):
        assert code.count(ours) == 1
        code = code.replace(ours, here)
    found = {}
    exec(code, found)
    expected = torch.tensor([float(row[name]) for name in found["names"]])
    exported = torch.export.load("model.pt2").module()(found["x"]).softmax(dim=1)[0]
    assert close(found["probabilities"], expected) and close(exported, expected) and len(expected) == 2
    assert found["names"][found["probabilities"].argmax()] == row["predicted_name"]


def test_four_lines_make_class_folders_of_a_table_of_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "source", count=1)
    (tmp_path / "source" / "train").rename("images")
    files = sorted(str(path.relative_to("images")) for path in Path("images").rglob("*.png"))
    lines = ["file,class", *(f'{file},"class {i}, of two"' for i, file in enumerate(files))]
    Path("labels.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    code = block("labels.csv")
    exec(code, {})
    made = {str(path): path.read_bytes() for path in Path("photos").rglob("*.png")}
    assert made == {f"photos/train/class {i}, of two/00.png": Path("images", file).read_bytes() for i, file in enumerate(files)}
    assert len(made) == 2 and len(code.splitlines()) == 4
