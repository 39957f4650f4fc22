"""Time and peak memory of the t-SNE of 128-d features: openTSNE and scikit-learn at one size, openTSNE at SVHN's 99,289.

    python3 benchmarks/embedding.py --points 10000
    python3 benchmarks/embedding.py --points 99289 --backends opentsne

The features are ten Gaussian clusters; each run is a process of its own.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

from measuring import peak_memory

ROOT = Path(__file__).parent.parent


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--backends", nargs="+", choices=("opentsne", "sklearn"), default=["opentsne", "sklearn"])
    parser.add_argument("--one", choices=("opentsne", "sklearn"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(run(args.one, args.points))
        return
    print("| backend | points | seconds | peak memory, MiB | KL divergence |\n|---|---|---|---|---|")
    for backend in args.backends:
        done = subprocess.run([sys.executable, __file__, "--points", str(args.points), "--one", backend], check=True,
                              stdout=subprocess.PIPE, text=True)
        print(done.stdout.strip(), flush=True)


def run(backend, points):
    import warnings

    import numpy as np

    sys.path.insert(0, str(ROOT))
    from reproduction.features import embed

    warnings.filterwarnings("ignore", category=FutureWarning)
    rng = np.random.default_rng(0)
    centers = 2 * rng.normal(size=(10, 128))
    features = (centers[rng.integers(0, 10, points)] + rng.normal(size=(points, 128))).astype(np.float32)
    args = argparse.Namespace(method="tsne", backend=backend, perplexity=30.0, seed=1234)
    start = time.perf_counter()
    _, divergence, software = embed(features, args)
    return f"| {software} | {points:,} | {time.perf_counter() - start:.0f} | {peak_memory():.0f} | {divergence:.3f} |"


if __name__ == "__main__":
    main()
