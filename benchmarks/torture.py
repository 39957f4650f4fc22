"""Every fault of tests/injections.py, injected into real runs in its full form, and once more without the protection.

    python3 benchmarks/torture.py
    python3 benchmarks/torture.py F1 F6
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]
from injections import INJECTIONS  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="F", default=list(INJECTIONS), help="injections (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places (default: 0)")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(INJECTIONS):
        parser.error(f"no injection is named {min(unknown)}; choose from {', '.join(INJECTIONS)}")

    print("| | injection | tries | survived | lost | lost without the protection | seconds |\n|---|---|---|---|---|---|---|",
          flush=True)
    faults = []
    for name in args.names:
        injection, start = INJECTIONS[name], time.perf_counter()
        outcomes = inject(injection, injection.full, args.seed)
        seconds = time.perf_counter() - start
        control = inject(injection, injection.short, args.seed, injection.without)
        lost = [fault for fault in outcomes if fault]
        faults += [f"{name}: {fault}" for fault in lost]
        said = injection.inject.__doc__.rstrip(".")
        print(f"| {name} | {said} | {len(outcomes)} | {len(outcomes) - len(lost)} | {len(lost)} "
              f"| {sum(fault is not None for fault in control)} of {len(control)} | {seconds:.0f} |", flush=True)
    print("\n".join(faults))
    return bool(faults)


def inject(injection, tries, seed, patch=None):
    """Returns the outcome of each try: what was lost, or None."""
    with tempfile.TemporaryDirectory() as folder:
        return list(injection.inject(Path(folder), tries, np.random.default_rng(seed), patch))


if __name__ == "__main__":
    sys.exit(main())
