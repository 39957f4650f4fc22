"""Error, time and memory of the three roads to the meta-gradient, beside each other.

    python3 benchmarks/meta_gradient.py --arch convlarge --batch-size 32

Time: median over interleaved calls in one process, as a ratio to the evaluation-mode forward pass of one batch.
Memory: growth of the process's peak over its size before the call, each road in a process of its own.
Error: relative to double backward in float64.
"""
import argparse
import statistics
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

from measuring import peak_memory, relative_error, take_turns

sys.path.insert(0, str(Path(__file__).parent.parent))
ROADS = {
    "jvp": {"method": "jvp"},
    "finite-difference, epsilon 1e-2": {"method": "finite-difference"},
    "finite-difference, epsilon 1e-3": {"method": "finite-difference", "epsilon": 1e-3},
    "unrolled": {"method": "unrolled"},
    "jvp, bfloat16": {"method": "jvp", "dtype": "bfloat16"},
    "finite-difference, bfloat16": {"method": "finite-difference", "dtype": "bfloat16"},
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="convlarge")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=ROADS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)

    import torch

    from metasemi import meta_gradient
    from models import build_model

    torch.manual_seed(0)
    model = build_model(args.arch, 10)
    x_l, x_u = torch.randn(2, args.batch_size, 3, 32, 32)
    y_l = torch.randint(0, 10, (args.batch_size,))
    with torch.no_grad():
        model(x_l)
    model = model.eval()

    def road(name):
        options = dict(ROADS[name])
        if "dtype" in options:
            options["dtype"] = getattr(torch, options["dtype"])
        return meta_gradient(model, x_l, y_l, x_u, **options)[1]

    if args.memory_of:
        before = peak_memory()
        road(args.memory_of)
        print(peak_memory() - before)
        return

    @torch.no_grad()
    def forward():
        model(x_u)

    times = take_turns({"forward": forward, **{name: partial(road, name) for name in ROADS}}, args.repeats)
    median = {name: statistics.median(values) for name, values in times.items()}

    gradients = {name: road(name) for name in ROADS}
    model = model.double()
    exact = meta_gradient(model, x_l.double(), y_l, x_u.double(), method="unrolled")[1]
    print(f"{args.arch}, {args.batch_size} + {args.batch_size} images of 32x32, {torch.get_num_threads()} threads; "
          f"one forward pass {median['forward'] * 1000:.0f} ms\n")
    print("| road | relative error | time, forward passes | peak memory, MiB |\n|---|---|---|---|")
    for name in ROADS:
        error = relative_error(gradients[name], exact)
        memory = float(subprocess.run([sys.executable, __file__, "--arch", args.arch, "--batch-size", str(args.batch_size),
                                       "--memory-of", name], check=True, capture_output=True, text=True).stdout)
        print(f"| {name} | {error:.1e} | {median[name] / median['forward']:.1f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
