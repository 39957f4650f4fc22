"""What a first accelerator is to answer in ten minutes: does the program hold there, how exact is it, and how fast?

    make gpu-check
    python3 benchmarks/gpu_check.py --device cpu --batch-size 32 --parts exactness speed

waits      steps 2 and 3 of training, their batches included, never make the host wait for the device
exactness  of the meta-gradient: errors relative to double backward in float64 on the CPU
speed      of the step of train_meta.py, in turns with that of float32.  TFLOP: counted in a step with the finite difference.
           Peak: a product of two large matrices.  Operations: those of torch that compute or copy, each one kernel or more
input      images a second, cropped, flipped and normalized, in memory and decoded from disk
resume     a bfloat16 run of train_meta.py that is killed and resumed
processes  two processes on one device over gloo, which have the meta-gradient of the whole batch, and equal weights

Each line is printed as soon as it is known.  A check that fails is a line, too, and the others go on; the exit code is then 1.
On the CPU everything is small unless --batch-size is given.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path

import torch
from measuring import make_images, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from datasets import Batches, load_dataset, split_labels  # noqa: E402
from metasemi import meta_gradient, training_step  # noqa: E402
from models import NETWORKS  # noqa: E402

NARROW = {"convlarge": {"width": 16}, "wideresnet": {"depth": 10, "widen": 1}, "shakeshake": {"depth": 8, "width": 16},
          "resnet18": {}}
VARIANTS = {"float32": {}, "tf32": {}, "bfloat16": {"dtype": torch.bfloat16}, "unrolled": {"method": "unrolled"},
            "finite-difference": {"method": "finite-difference"}, "supervised": {"meta": False, "lam": None}}
ROUNDING = {"float32": 1e-3, "tf32": 0.3, "bfloat16": 0.3, "unrolled": 1e-3}         # the largest relative errors that pass
HEADERS = {
    "waits": "network | steps 2 and 3", "exactness": "network | error of the meta-gradient",
    "speed": "network | variant | ms a step | times as fast as float32 | images a second | TFLOP/s | share of peak | peak MiB "
             "| operations",
    "input": "images | images a second", "resume": "network | killed and resumed", "processes": "network | two processes"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    parser.add_argument("--device", type=torch.device, default=default, help="default: that of torch.accelerator, else cpu")
    parser.add_argument("--batch-size", type=int, help="labeled images, and as many unlabeled (default: 128; on the CPU 2)")
    parser.add_argument("--archs", nargs="+", choices=NARROW, default=[*NARROW], help="default: all four")
    parser.add_argument("--parts", nargs="+", choices=HEADERS, default=[*HEADERS], help="default: all")
    args = parser.parse_args(argv)
    args.small = args.device.type == "cpu" and args.batch_size is None
    args.batch_size, args.image_size = args.batch_size or (2 if args.small else 128), 16 if args.small else 32
    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)
    torch.backends.cudnn.benchmark = True

    name = getattr(torch.get_device_module(args.device), "get_device_name", lambda device: device.type)(args.device)
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads; {args.batch_size} "
          f"+ {args.batch_size} images of {args.image_size}x{args.image_size} a step")
    failures = 0
    for part in args.parts:
        print(f"\n## {part}\n\n| {HEADERS[part]} |\n|{'---|' * (HEADERS[part].count('|') + 1)}")
        for row, check, *more in rows(part, args):
            try:
                print(f"| {row} | {check(args, *more)} |", flush=True)
            except Exception as error:              # of whatever kind: the next check may still tell something
                failures += 1
                print(f"| {row} | FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]} |", flush=True)
    print(f"\n{failures or 'No'} check{'s' * (failures != 1)} failed.")
    return int(failures > 0)


def rows(part, args):
    """Returns (row, its check, arguments after the flags) of a part."""
    if part == "input":
        return [("32x32 in memory", input_rate, 32), ("224x224 from disk", input_rate, 224)]
    if part == "speed":
        few = ("float32", "tf32", "bfloat16", "supervised")
        return [(f"{arch} | {variant}", speed, arch, variant) for arch in args.archs
                for variant in on_device(args, VARIANTS if arch == args.archs[0] else few)]
    check = {"waits": waits, "exactness": exactness, "resume": resume, "processes": processes}[part]
    archs = args.archs if part in ("waits", "exactness") else ["convsmall" if args.small else "convlarge"]
    return [(arch, check, arch) for arch in archs]


def on_device(args, variants):
    return [name for name in variants if name != "tf32" or args.device.type == "cuda"]


def hold(claim, said):
    """Returns what is said about a claim that holds on this device; raises AssertionError with it for one that does not."""
    if not claim:
        raise AssertionError(said)
    return said


class Trainer:
    """A network in one of VARIANTS with one batch, from the same seed; `step()` is that of train_meta.py."""

    def __init__(self, args, arch, variant="float32", batch_size=None):
        torch.manual_seed(0)
        module, name, options = NETWORKS[arch]
        self.model = getattr(import_module(module), name)(10, **options | (NARROW.get(arch, {}) if args.small else {}))
        count = batch_size or args.batch_size
        x_l, x_u = torch.randn(2, count, 3, args.image_size, args.image_size)
        with torch.no_grad():
            self.model(x_l)                                 # running statistics
        self.model.to(args.device, memory_format=torch.channels_last)
        self.batch = [x.to(args.device) for x in (x_l, torch.arange(count) % 10, x_u, torch.rand(count))]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        self.tf32, self.options = variant == "tf32", VARIANTS[variant]

    def step(self, batch=None, **more):
        set_tf32(self.tf32)
        *examples, lam = batch or self.batch
        training_step(self.model, self.optimizer, *examples, **{"alpha": 0.01, "beta": 0.01, "lam": lam} | self.options | more)

    def gradient(self, **more):
        set_tf32(self.tf32)
        return meta_gradient(self.model, *self.batch[:3], **self.options | more)[1]


def set_tf32(on):
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def waits(args, arch):
    cuda, images = args.device.type == "cuda", load_dataset("digits", ".")
    index_sets = split_labels(images.train_labels, 50, 10, seed=1)
    batches = Batches(images, *index_sets, batch_size=args.batch_size, seed=1, device=args.device, mixup_gamma=1.0)
    for variant in ("float32", "bfloat16"):
        trainer = Trainer(args, arch, variant)
        try:
            for step in (1, 2, 3):
                if cuda and step > 1:
                    torch.cuda.set_sync_debug_mode("error")
                batch = batches(step)
                trainer.step([batch.x_l, batch.y_l, batch.x_u, batch.lam])
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
        hold(all(w.isfinite().all() for w in trainer.model.parameters()), f"weights are not finite after steps in {variant}")
    return "do not wait" if cuda else "done; only CUDA can tell whether they wait"


def exactness(args, arch):
    count = min(args.batch_size, 8)
    oracle = Trainer(args, arch, batch_size=count)
    oracle.model.to("cpu", torch.float64)
    oracle.batch = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in oracle.batch]
    exact = oracle.gradient(method="unrolled")
    errors = {variant: relative_error(Trainer(args, arch, variant, count).gradient(), exact)
              for variant in on_device(args, [*ROUNDING, "finite-difference"])}
    return hold(all(errors[variant] <= most for variant, most in ROUNDING.items() if variant in errors),
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
    a = torch.randn(size, size, device=args.device, dtype=own.options.get("dtype"))
    times = seconds(args, base.step, own.step, lambda: (set_tf32(own.tf32), a @ a))
    ratio = statistics.median(x / y for x, y, _ in times)
    _, step, product = map(statistics.median, zip(*times))
    rate = counter.get_total_flops() / step
    return (f"{1000 * step:.4g} | {ratio:.2f} | {2 * args.batch_size / step:.4g} | {rate / 1e12:.3g} "
            f"| {rate / (2 * size ** 3 / product):.0%} | {peak} | {operations.count:,}")


def seconds(args, *work):
    """Returns the seconds of functions, what they leave the accelerator to do included, in each of some turns.

    Before these there is one in which everything starts.
    """
    def measure(function):
        start = time.perf_counter()
        function()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    return [[measure(function) for function in work] for _ in range(2 if args.small else 6)][1:]


class CountOperations(TorchDispatchMode):
    """Counts the operations within it that compute or copy: views, empty tensors and questions of shape start no kernel."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns, name = function._schema.returns, function._schema.name
        view = any(result.alias_info and not result.alias_info.is_write for result in returns)
        self.count += not view and "empty" not in name and [str(result.type) for result in returns] != ["bool"]
        return function(*args, **kwargs or {})


def input_rate(args, size):
    steps, flags = 2 if args.small else 200 if size == 32 else 10, (32, True) if size == 32 else (224, False, 4)
    with tempfile.TemporaryDirectory() as folder:
        root = make_images(Path(folder), 20 if args.small else 400, (32, 32) if size == 32 else (500, 375))
        images = load_dataset("folder" if size == 32 else "imagenet", root, *flags)
        index_sets = torch.arange(len(images.train_labels)).chunk(2)
        with Batches(images, *index_sets, batch_size=args.batch_size, seed=0, device=args.device) as batches:
            times = seconds(args, lambda: [batches(step) for step in range(1, steps + 1)])
    return f"{2 * args.batch_size * steps / statistics.median(turn for turn, in times):,.0f}"


def resume(args, arch):
    steps = 12 if args.small else 200
    flags = (f"--dataset digits --num-label 50 -a {arch} --mix-up --precision bfloat16 --device {args.device.type} "
             f"--batch-size {min(args.batch_size, 64)} --total-steps {steps} --warmup 4 --print-freq 1 "
             f"--test-freq {steps // 4} --save-path")
    command = [sys.executable, ROOT / "train_meta.py", *flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "whole"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
        with subprocess.Popen([*command, "killed"], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith(f"step {steps // 2 + 1}/"):
                    process.kill()
        done = subprocess.run([*command, "killed", "--resume"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        a, b = (torch.load(f"{folder}/{name}/checkpoint.pth", map_location="cpu", weights_only=True)["model"].values()
                for name in ("whole", "killed"))
    resumed = process.returncode < 0 and f"step {steps // 4}/" not in done.stdout
    error = relative_error(*(torch.cat([value.double().flatten() for value in weights]) for weights in (b, a)))
    return hold(resumed and (args.device.type != "cpu" or error == 0), f"{'resumed' if resumed else 'begun again'} after step "
                f"{steps // 2}, where it was killed; weights differ by {error:.1e} from those of a whole run")


def processes(args, arch):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_of_two, (folder, args, arch), nprocs=2)
        gradients, weights = zip(*[torch.load(f"{folder}/{rank}.pth", weights_only=True) for rank in range(2)])
    error, equal = relative_error(torch.cat(gradients), Trainer(args, arch).gradient()), all(map(torch.equal, *weights))
    return hold(error <= ROUNDING["float32"] and equal, f"the meta-gradient differs from that of one process by {error:.1e}; "
                f"weights are {'equal' if equal else 'different'} after two steps")


def one_of_two(rank, folder, args, arch):
    """Takes half of the batch, in a process of its own, and saves its part of the meta-gradient and its weights."""
    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)
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
