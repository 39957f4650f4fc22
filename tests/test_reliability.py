"""What a run survives: the short forms of the injections, and what they do not reach."""
import numpy as np
import pytest
from injections import INJECTIONS


def lost(name, folder, tries, patch=None):
    return [fault for fault in INJECTIONS[name].inject(folder, tries, np.random.default_rng(0), patch) if fault]


@pytest.mark.parametrize("name", INJECTIONS)
def test_nothing_is_lost(tmp_path, name):
    assert lost(name, tmp_path, INJECTIONS[name].short) == []


@pytest.mark.parametrize("name", INJECTIONS)
def test_without_its_protection_something_is_lost(tmp_path, name):
    assert lost(name, tmp_path, INJECTIONS[name].short, INJECTIONS[name].without) != []
