import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None,        # nothing here depends on how fast the machine is
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("busy")
# torch would take compiled code from an earlier run even where ATEN_CPU_CAPABILITY now forbids its instructions
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
ROOT = Path(__file__).parent.parent
SHORT = ["--dataset", "digits", "--num-label", "50", "-a", "convsmall", "--batch-size", "8", "--total-steps", "7",
         "--warmup", "2", "--milestones", "5", "--print-freq", "2", "--test-freq", "3", "--seed", "1"]


def pytest_collection_modifyitems(items):
    """The tests of a file share fixtures, so one worker runs them; the injections share none, and any worker takes one."""
    for item in items:
        if item.path.name != "test_reliability.py":
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def short_evaluations():
    """Runs on the digits evaluate few of them, in this process as in those that the injections start."""
    from helpers import few_digits

    from datasets import loading

    loading.LOADERS["digits"] = few_digits


@pytest.fixture
def train(tmp_path):
    """train(folder, *flags): a run of a few steps in this process; flags override. Returns the exit code."""
    import train_meta

    def run(folder, *flags):
        try:
            return train_meta.main([*SHORT, "--save-path", str(tmp_path / folder), *flags])
        except SystemExit as error:
            return error.code
    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(*flags): the folder of an uninterrupted run of `train`, made once and not to be written to."""
    import train_meta

    @cache
    def make(*flags):
        folder = tmp_path_factory.mktemp("whole")
        assert train_meta.main([*SHORT, "--save-path", str(folder), *flags]) == 0
        return folder
    return make
