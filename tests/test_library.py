"""The package on its own: built as a wheel, installed alone, and the examples that show it."""
import re
import shutil
import subprocess
import sys
import zipfile

import matplotlib.pyplot as plt
from conftest import ROOT

import metasemi

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
import own_loop  # noqa: E402
import two_moons  # noqa: E402


def test_a_wheel_of_the_package_alone_runs_the_loop_of_the_example(tmp_path):
    tree = tmp_path / "tree"                    # building writes into the tree
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "data", "results", "images", "tests"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", tmp_path, tree], check=True, capture_output=True, text=True)
    wheel, = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"metasemi", f"metasemi-{metasemi.__version__}.dist-info"}
    assert {name for name in names if name.endswith(".py")} == {f"metasemi/{path.name}"
                                                                for path in (ROOT / "metasemi").glob("*.py")}
    metadata = zipfile.ZipFile(wheel).read(f"metasemi-{metasemi.__version__}.dist-info/METADATA").decode()
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist")] == ["Requires-Dist: torch>=2.11"]

    shutil.copy(EXAMPLES / "own_loop.py", tmp_path / "alone.py")
    code = ("import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2])['main'](steps=3); import metasemi;"
            "assert metasemi.__file__.startswith(sys.argv[1]), metasemi.__file__")
    done = subprocess.run([sys.executable, "-I", "-c", code, wheel, tmp_path / "alone.py"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "test accuracy" in done.stdout, done.stderr


def test_the_loop_of_the_example_learns(capsys):
    own_loop.main(steps=30)
    last, averaged = (float(value) for value in re.findall(r"weights: (\S+)%", capsys.readouterr().out))
    assert last > 40 and 0 < averaged <= 100                # by chance, 10; the average still holds much of the first weights


def test_the_two_moons_are_drawn_and_every_accuracy_told(tmp_path, capsys):
    two_moons.main([str(tmp_path / "moons.png"), "--steps", "10"])
    assert re.findall(r"^(.*): \d+\.\d%$", capsys.readouterr().out, re.MULTILINE) == ["supervised", "MetaSemi",
                                                                                    "MetaSemi, beta = 0"]
    picture = plt.imread(tmp_path / "moons.png")[..., :3]
    assert len(picture.reshape(-1, 3)) > 500_000 and picture.std(axis=(0, 1)).min() > 0.05       # not blank
