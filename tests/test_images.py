"""The pictures of the README are made from our own text and say where the code really is."""
import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "images"))
import make_images  # noqa: E402


def test_the_algorithm_picture_names_the_lines_where_the_code_stands_now():
    with Image.open(ROOT / "images" / "algorithm.png") as image:
        assert image.info["Description"] == make_images.describe(make_images.algorithm_rows()), \
            "images/algorithm.png is out of date: python3 images/make_images.py"


def test_a_line_that_is_not_in_the_source_is_an_error():
    with pytest.raises(ValueError, match="has 0 lines that begin with 'nothing of this'"):
        make_images.locate("train_meta.py", "nothing of this")


def test_every_picture_is_drawn_and_opaque(tmp_path, monkeypatch):
    monkeypatch.setattr(make_images, "HERE", tmp_path)
    make_images.main()
    for name in ("formulation", "algorithm", "step"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 900 and image.convert("RGBA").getextrema()[3] == (255, 255)
            assert image.size == Image.open(ROOT / "images" / f"{name}.png").size
