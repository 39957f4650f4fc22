"""The pictures of the documents are made from our own text."""
import sys

from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "images"))
import make_images  # noqa: E402


def test_every_picture_is_drawn_and_opaque(tmp_path, monkeypatch):
    monkeypatch.setattr(make_images, "HERE", tmp_path)
    make_images.main()
    for name in ("formulation", "step"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 900 and image.convert("RGBA").getextrema()[3] == (255, 255)
            assert image.size == Image.open(ROOT / "images" / f"{name}.png").size
