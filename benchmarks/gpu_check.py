"""What a first accelerator is to answer in ten minutes: does the program hold there, how exact is it, and how fast?

    make gpu-check
    python3 benchmarks/gpu_check.py --device cpu --batch-size 32 --parts exactness speed

benchmarks/README.md says what the parts are.  Of the speed: TFLOP are those of a step with the finite difference, the peak is
that of a product of two large matrices, and operations are those of torch that compute or copy, each one kernel or more.

Each line is printed as soon as it is known.  A check that fails is a line, too, and the others go on; the exit code is then 1.
On the CPU everything is small unless --batch-size is given.
"""
import argparse
import signal
import statistics
import sys
import tempfile
from functools import partial
from math import inf
from pathlib import Path

import torch
from measuring import NARROW, ROOT, make_images, relative_error, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from datasets import Batches, load_dataset, split_labels
from metasemi import meta_gradient, training_step
from models import build_model
from utils.device import choose_device, fingerprint, set_precision
from utils.errors import one_line_errors

VARIANTS = {"float32": {}, "tf32": {}, "bfloat16": {}, "unrolled": {"method": "unrolled"},
            "finite-difference": {"method": "finite-difference"}, "supervised": {"meta": False, "lam": None}}
ROUNDING = {"float32": 1e-3, "tf32": 0.3, "bfloat16": 0.3, "unrolled": 1e-3, "finite-difference": inf}   # errors that pass
HEADERS = {
    "waits": "network | steps 2 and 3", "exactness": "network | error of the meta-gradient",
    "speed": "network | variant | ms a step | times as fast as float32 | images a second | TFLOP/s | share of peak | peak MiB "
             "| operations",
    "input": "images | images a second", "resume": "network | killed and resumed", "processes": "network | two processes"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="default: that of torch.accelerator, else cpu")
    parser.add_argument("--batch-size", type=int, help="labeled images, and as many unlabeled (default: 128; on the CPU 2)")
    parser.add_argument("--archs", nargs="+", choices=NARROW, default=[*NARROW], help="default: all four")
    parser.add_argument("--parts", nargs="+", choices=HEADERS, default=[*HEADERS], help="default: all")
    args = parser.parse_args(argv)
    with one_line_errors("gpu_check.py"):
        args.device = choose_device(args.device)
    args.variants = [variant for variant in VARIANTS if variant != "tf32" or args.device.type == "cuda"]
    args.small = args.device.type == "cpu" and args.batch_size is None
    args.batch_size, args.image_size = args.batch_size or (2 if args.small else 128), 16 if args.small else 32

    about = fingerprint(args.device, "float32", processes=1)
    print(f"{about['device']}, torch {about['torch']}, CUDA {torch.version.cuda}, {about['threads']} threads; "
          f"{args.batch_size} + {args.batch_size} images of {args.image_size}x{args.image_size} a step")
    failures = 0
    for part in args.parts:
        print(f"\n## {part}\n\n| {HEADERS[part]} |\n|{'---|' * (HEADERS[part].count('|') + 1)}")
        for row, check, *more in rows(part, args):
            try:
                holds, said = check(args, *more)
            except Exception as error:              # of whatever kind: the next check may still tell something
                holds, said = False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            print(f"| {row} | {'' if holds else 'FAILED: '}{said} |", flush=True)
            failures += not holds
    print(f"\n{failures or 'No'} check{'s' * (failures != 1)} failed.")
    return int(failures > 0)


def rows(part, args):
    """Returns (row, its check, arguments after the flags) of a part."""
    if part == "input":
        return [("32x32 in memory", input_rate, "folder", (32, 32), 200, 32, True),
                ("224x224 from disk", input_rate, "imagenet", (500, 375), 10, 224, False, 4)]
    if part == "speed":
        return [(f"{arch} | {variant}", speed, arch, variant) for arch in args.archs for variant in args.variants
                if arch == args.archs[0] or "method" not in VARIANTS[variant]]
    check = {"waits": waits, "exactness": exactness, "resume": resume, "processes": processes}[part]
    archs = args.archs if part in ("waits", "exactness") else ["convsmall" if args.small else "convlarge"]
    return [(arch, check, arch) for arch in archs]


class Trainer:
    """A network in one of VARIANTS with one batch, from the same seed; `step()` is that of train_meta.py."""

    def __init__(self, args, arch, variant="float32", batch_size=None):
        torch.manual_seed(0)
        self.model = NARROW[arch]() if args.small and arch in NARROW else build_model(arch, 10)
        count = batch_size or args.batch_size
        x_l, x_u = torch.randn(2, count, 3, args.image_size, args.image_size)
        with torch.no_grad():
            self.model(x_l)                                 # running statistics
        self.model.to(args.device, memory_format=torch.channels_last)
        self.batch = [x.to(args.device) for x in (x_l, torch.arange(count) % 10, x_u, torch.rand(count))]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        self.options = VARIANTS[variant]
        self.dtype = partial(set_precision, variant if variant in ("tf32", "bfloat16") else "float32", args.device)

    def step(self, **more):
        *examples, lam = self.batch
        options = {"alpha": 0.01, "beta": 0.01, "lam": lam, "dtype": self.dtype()} | self.options | more
        training_step(self.model, self.optimizer, *examples, **options)

    def gradient(self, **more):
        return meta_gradient(self.model, *self.batch[:3], **{"dtype": self.dtype()} | self.options | more)[1]


# Each check returns whether it holds on this device, and what to say.

def waits(args, arch):
    cuda, images = args.device.type == "cuda", load_dataset("digits", ".")
    split = split_labels(images.train_labels, 50, 10, seed=1)
    batches = Batches(images, *split, batch_size=args.batch_size, seed=1, device=args.device, mixup_gamma=1.0)
    for variant in ("float32", "bfloat16"):
        trainer = Trainer(args, arch, variant)
        try:
            for step in (1, 2, 3):
                if cuda and step > 1:
                    torch.cuda.set_sync_debug_mode("error")
                x_l, y_l, x_u, _, lam = batches(step)
                trainer.batch = [x_l, y_l, x_u, lam]
                trainer.step()
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    return True, "do not wait" if cuda else "done; only CUDA can tell whether they wait"


def exactness(args, arch):
    count = min(args.batch_size, 8)
    oracle = Trainer(args, arch, batch_size=count)
    oracle.model.to("cpu", torch.float64)
    oracle.batch = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in oracle.batch]
    exact = oracle.gradient(method="unrolled")
    errors = {variant: relative_error(Trainer(args, arch, variant, count).gradient(), exact)
              for variant in args.variants if variant in ROUNDING}
    return (all(error <= ROUNDING[variant] for variant, error in errors.items()),
            ", ".join(f"{variant} {error:.1e}" for variant, error in errors.items()))


def speed(args, arch, variant):
    base, own = Trainer(args, arch), Trainer(args, arch, variant)
    own.step()                                              # momenta, and what the libraries try first
    device = torch.get_device_module(args.device)
    if measured := hasattr(device, "reset_peak_memory_stats"):
        device.reset_peak_memory_stats()
    with CountOperations() as operations:
        own.step()
    peak = f"{device.max_memory_allocated() / 2 ** 20:.0f}" if measured else "-"
    with FlopCounterMode(display=False) as counter:
        own.step(method="finite-difference")
    size = 128 if args.small else 2048 if args.device.type == "cpu" else 8192
    a = torch.randn(size, size, device=args.device, dtype=own.dtype())
    float32, product, step = seconds(args, base.step, lambda: (own.dtype(), a @ a), own.step)
    rate = counter.get_total_flops() / step
    cells = (f"{1000 * step:.4g}", f"{float32 / step:.2f}", f"{2 * args.batch_size / step:.4g}", f"{rate / 1e12:.3g}",
             f"{rate * product / (2 * size ** 3):.0%}", peak, f"{operations.count:,}")
    return True, " | ".join(cells)


def seconds(args, *work):
    """Returns the median seconds of each function, what it leaves the accelerator to do included, measured in turns.

    Before these there is one in which everything starts.
    """
    taken = [[] for _ in work]
    for _ in range(2 if args.small else 6):
        for function, times in zip(work, taken):
            start = timer()                                 # waits for the accelerator
            function()
            times.append(timer() - start)
    return [statistics.median(times[1:]) for times in taken]


class CountOperations(TorchDispatchMode):
    """Counts the operations within it that compute or copy: views, empty tensors and questions of shape start no kernel."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns, name = function._schema.returns, function._schema.name
        view = any(result.alias_info and not result.alias_info.is_write for result in returns)
        self.count += not view and "empty" not in name and [str(result.type) for result in returns] != ["bool"]
        return function(*args, **kwargs or {})


def input_rate(args, dataset, size, steps, *options):
    steps, count = (2, 20) if args.small else (steps, 400)
    with tempfile.TemporaryDirectory() as folder:
        images = load_dataset(dataset, make_images(Path(folder), count, size), *options)
        halves = torch.arange(len(images.train_labels)).chunk(2)
        with Batches(images, *halves, batch_size=args.batch_size, seed=0, device=args.device) as batches:
            time, = seconds(args, lambda: [batches(step) for step in range(1, steps + 1)])
    return True, f"{2 * args.batch_size * steps / time:,.0f}"


def resume(args, arch):
    steps = 12 if args.small else 200
    flags = (f"--dataset digits --num-label 50 -a {arch} --mix-up --precision bfloat16 --device {args.device.type} "
             f"--batch-size {min(args.batch_size, 64)} --total-steps {steps} --warmup 4 --print-freq 1 "
             f"--test-freq {steps // 4} --save-path")
    command = [ROOT / "train_meta.py", *flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        run([*command, "whole"], folder)
        run([*command, "killed"], folder, f"step {steps // 2 + 1}/", signal.SIGKILL, -signal.SIGKILL)
        output = run([*command, "killed", "--resume"], folder)
        a, b = (torch.load(f"{folder}/{name}/checkpoint.pth", map_location="cpu", weights_only=True)["model"].values()
                for name in ("whole", "killed"))
    resumed = f"step {steps // 4}/" not in output
    error = relative_error(*(torch.cat([value.double().flatten() for value in weights]) for weights in (b, a)))
    said = f"{'resumed' if resumed else 'begun again'} after step {steps // 2}; weights differ by {error:.1e} from a whole run"
    return resumed and (args.device.type != "cpu" or error == 0), said


def processes(args, arch):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_of_two, (folder, args, arch), nprocs=2)
        gradients, weights = zip(*[torch.load(f"{folder}/{rank}.pth", weights_only=True) for rank in range(2)])
    error, equal = relative_error(torch.cat(gradients), Trainer(args, arch).gradient()), all(map(torch.equal, *weights))
    said = f"the meta-gradient differs from that of one by {error:.1e}; weights are {'equal' if equal else 'different'}"
    return error <= ROUNDING["float32"] and equal, said


def one_of_two(rank, folder, args, arch):
    """Takes half of the batch, in a process of its own, and saves its part of the meta-gradient and its weights."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    trainer = Trainer(args, arch)
    trainer.batch = [x.chunk(2)[rank] for x in trainer.batch]

    def average(tensors):
        means = [tensor / 2 for tensor in tensors]
        for mean in means:
            dist.all_reduce(mean)
        return means

    gradient = trainer.gradient(average=average).cpu()
    for _ in range(2):
        trainer.step(average=average)
    torch.save([gradient, [w.detach().cpu() for w in trainer.model.parameters()]], f"{folder}/{rank}.pth")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
