"""The image, without an engine: what its files say, and its steps run on a copy of the tree."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, SHORT

from plot_features import parse as parse_plotting
from utils.experiment import resolve_flags

DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = (ROOT / "docker" / "compose.yaml").read_text()
# User 1000 without any right of root's but to read: the interpreter may lie in root's home.
AS_USER = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups",
           "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def instructions(name=None):
    """(name, rest) of the Dockerfile's instructions in their order; with a name only the rests of those."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    pairs = [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]
    return [rest for key, rest in pairs if key == name] if name else pairs


def is_sent(path):
    """Whether .dockerignore lets a path of the tree into the build: the last rule that names it or a folder above decides."""
    sent = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = re.escape(rule.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(pattern + "(/.*)?", str(path)):
            sent = rule.startswith("!")
    return sent


def test_every_requirement_is_a_range_and_has_one_exact_version_in_it():
    lines, exact = ("".join((ROOT / f"{name}.txt").read_text() for name in names)
                    for names in (("requirements", "requirements-dev"), ("constraints",)))
    ranges = dict(re.findall(r"^([\w-]+)>=([\d.]+)(?:$|;)", lines, re.MULTILINE))
    versions = dict(re.findall(r"^([\w-]+)==([\d.]+)$", exact, re.MULTILINE))
    assert versions.keys() == ranges.keys() and len(versions) > 15
    assert set(re.findall(r"^[\w-]+==[\d.]+$", lines, re.MULTILINE)) <= set(exact.splitlines())     # the tests need these
    for name, version in versions.items():
        assert [int(n) for n in version.split(".")] >= [int(n) for n in ranges[name].split(".")], name


def test_nothing_private_is_sent_and_the_last_user_is_not_root():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", *instructions("USER"))
    for path in (".git/config", ".venv/pyvenv.cfg", ".env", "docker/.env", "key.pem", "data/cifar10/x", "results/tmp/log.txt",
                 "tests/conftest.py", "models/__pycache__/layers.pyc", "__pycache__/train_meta.pyc"):
        assert not is_sent(path), path


@pytest.fixture
def image():
    """The working directory of the image: what COPY and the last RUN make of this tree, of which only root may read."""
    if subprocess.run([*AS_USER, "true"], capture_output=True).returncode:
        pytest.skip("becoming another user needs root and setpriv")
    with tempfile.TemporaryDirectory() as folder:                   # not tmp_path, which other users cannot enter
        tree = Path(folder, *Path(*instructions("WORKDIR")).parts[1:])
        tree.mkdir()
        for name in filter(is_sent, os.listdir(ROOT)):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        shutil.rmtree(tree / "utils" / "__pycache__", ignore_errors=True)
        subprocess.run(["chmod", "-R", "go=", tree], check=True)
        subprocess.run(["sh", "-c", instructions("RUN")[1]], cwd=tree, check=True)
        os.chmod(folder, 0o755)
        yield tree


def test_another_user_trains_in_the_image_and_can_change_only_what_is_its_own(image):
    environment = dict(word.split("=") for line in instructions("ENV") for word in shlex.split(line))
    environment = {key: value.replace("${COMMIT}", "c0ffee-dirty") for key, value in environment.items()}
    environment |= {"HOME": str(image / "results"), "OMP_NUM_THREADS": "1"}         # here /tmp is everybody's
    python, = json.loads(*instructions("ENTRYPOINT"))

    def run(*words):
        return subprocess.run([*AS_USER, *words], cwd=image, capture_output=True, text=True,
                              env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment})

    done = run(python, "train_meta.py", *SHORT, "--total-steps", "2", "--test-freq", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    folder = image / "results" / "tmp"
    assert {"args.json", "checkpoint.pth", "results.json"} <= {path.name for path in folder.iterdir()}
    assert {(path.stat().st_uid, path.stat().st_gid) for path in (folder, *folder.iterdir())} == {(1000, 1000)}
    assert '"commit": "c0ffee-dirty"' in (folder / "args.json").read_text()

    assert run("sh", "-c", "touch data/mine results/mine mine").returncode == 0
    for attempt in ("echo >> train_meta.py", "rm train_meta.py", "mv train_meta.py x.py", "rm -r utils", "touch models/x.py"):
        assert run("sh", "-c", attempt).returncode != 0, attempt


def test_its_readme_runs_commands_that_the_scripts_accept_and_whose_results_stay():
    service = re.search(r"^services:\n  (\w+):", COMPOSE, re.MULTILINE)[1]
    commands = [shlex.split(line.split(f" {service} ")[1]) for line in (ROOT / "docker" / "README.md").read_text().splitlines()
                if re.match(r"    .*docker (compose )?run ", line)]
    kept = [resolve_flags(flags)[0] if script == "train_meta.py" else parse_plotting(flags) for script, *flags in commands]
    assert {script for script, *_ in commands} == {"train_meta.py", "plot_features.py"}
    assert {args.save_path.parts[0] for args in kept} == {"results"}
