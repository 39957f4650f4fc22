"""One process on two threads beside two processes of one thread each, and the bytes that a step sends.

    python3 benchmarks/distributed.py [--arch convsmall] [--batch-size 64] [--image-size 32] [--steps 10] [--repeats 3]

The two take turns.  Bytes are those that a process hands to a collective call, counted, in whatever way they then travel.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

PART = "METASEMI_BENCHMARK_PART"        # in the environment of a process that is to measure


def parse(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--arch", default="convsmall")
    for flag, default in (("--batch-size", 64), ("--image-size", 32), ("--steps", 10), ("--repeats", 3)):
        parser.add_argument(flag, type=int, default=default)
    return parser.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    times = {1: [], 2: []}
    for _ in range(args.repeats):
        for size in times:
            seconds, sent = run(size, argv)
            times[size].append(seconds)
    print("| processes x threads | ms a step | images a second | times as fast | bytes a step and process |")
    print("|---|---|---|---|---|")
    for size, count in ((1, 0), (2, sent)):
        median = statistics.median(times[size])
        ratio = statistics.median(a / b for a, b in zip(times[1], times[size]))
        rate = 2 * args.batch_size / median
        print(f"| {size} x {2 // size} | {1000 * median:.1f} | {rate:.4g} | {ratio:.2f} | {count:,.0f} |")


def run(size, argv):
    """Seconds a step, and bytes, of rank 0 of as many processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    done = subprocess.run([*torchrun, __file__, *argv], check=True, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(2 // size), PART: "1"})
    return map(float, done.stdout.split())


def measure(args):
    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)
    import torch
    import torch.distributed as dist

    from metasemi import training_step
    from models import build_model
    from utils.distributed import World

    sent = 0

    def counting(call):
        def counted(tensor, *more, **named):
            nonlocal sent
            sent += tensor.numel() * tensor.element_size()
            return call(tensor, *more, **named)
        return counted

    dist.all_reduce, dist.broadcast = counting(dist.all_reduce), counting(dist.broadcast)
    world = World()
    world.join("cpu")
    torch.manual_seed(0)
    model = build_model(args.arch, 10, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    rows = world.rows(args.batch_size)
    x_l, x_u = (x[rows] for x in torch.randn(2, args.batch_size, 3, args.image_size, args.image_size))
    y_l, lam = torch.arange(args.batch_size)[rows] % 10, torch.rand(args.batch_size)[rows]
    for step in range(args.steps + 2):
        if step == 2:                   # the first two are for warming up
            sent, start = 0, time.perf_counter()
        training_step(model, optimizer, x_l, y_l, x_u, alpha=0.1, beta=0.1, lam=lam,
                      average=world.all_reduce_mean if world.size > 1 else None)
        world.broadcast(list(model.buffers()))
        world.all_reduce_max(None)
    seconds = (time.perf_counter() - start) / args.steps
    if world.rank == 0:
        print(seconds, sent / args.steps)
    world.leave()


if __name__ == "__main__":
    measure(parse(None)) if PART in os.environ else main()
