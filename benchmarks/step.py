"""A training step of this repository beside a plain recipe of the same algorithm, and what each fast option gives alone.

    python3 benchmarks/step.py
    python3 benchmarks/step.py --arch convsmall --batch-size 64 --image-size 16
    python3 benchmarks/step.py --growth

The plain recipe is Algorithm 2 as one would first write it: eager, float32, contiguous, the paper's finite difference on
the weights themselves, batch norm not folded, SGD in a for loop, every metric read at every step.
Time: median over variants that take turns in one process; "times as fast" is the median over the turns.
TFLOP/s: the FLOP of one plain step, counted once by torch's FlopCounterMode, over the time of the row; the share is that of
a large square matrix product of the row's precision, measured in the same turns.  It is no ceiling where convolutions
have the better library: MKL's float32 product on an AMD processor runs at about half the rate of oneDNN's convolutions.
Memory: each variant in a process of its own; on CUDA `max_memory_allocated`, on the CPU the growth of the process's peak.
Error: of the meta-gradient, relative to double backward in float64.  Update: of the weights in the first step, relative
difference to the plain recipe's with the same random numbers.
"""
import argparse
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from measuring import peak_memory, relative_error, take_turns
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from metasemi import cross_domain_mixup, kl_divergence, squared_error, training_step, update_pseudo_labels  # noqa: E402
from metasemi.meta_gradient import compiled_jvp, meta_gradient, meta_gradient_with_telemetry  # noqa: E402
from models import NETWORKS, build_model  # noqa: E402
from models.layers import ConvBN  # noqa: E402
from utils.device import set_precision  # noqa: E402

VARIANTS = {                    # name -> options; "ours" is train_meta.py's way: metasemi.training_step with all that follows
    "plain recipe": "", "channels-last": "channels-last", "jvp": "jvp", "bfloat16": "bfloat16", "tf32": "tf32",
    "SGD fused": "fused", "no host reads": "no-reads", "batch norm folded": "folded", "in-place activations": "in-place",
    "training passes compiled": "compiled-model", "all": "ours", "all, tf32": "ours tf32", "all, bfloat16": "ours bfloat16",
    "all, compiled": "ours compiled-jvp", "all, bfloat16, compiled": "ours bfloat16 compiled-jvp",
    "all, compiled, training passes too": "ours compiled-jvp compiled-model",
    "all, bfloat16, compiled, training passes too": "ours bfloat16 compiled-jvp compiled-model",
    "all, CUDA graph": "ours graph", "all, bfloat16, CUDA graph": "ours bfloat16 graph",
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="convlarge")
    parser.add_argument("--batch-size", type=int, help="labeled images, and as many unlabeled (default: 32, on CUDA 128)")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--growth", action="store_true", help="growth with batch, classes, image and width instead")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME",
                        help="beside the plain recipe (default: all; CUDA's are skipped elsewhere)")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or (128 if args.device.type == "cuda" else 32)
    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)

    NETWORKS.update({f"convlarge-{width}": ("models.convlarge", "ConvLarge", {"width": width}) for width in (32, 64)})
    torch._inductor.config.fallback_random = True               # compiled dropout draws as the eager one does
    print(f"{args.arch}, {args.batch_size} + {args.batch_size} images of {args.image_size}x{args.image_size}, "
          f"{args.num_classes} classes, {args.device}, {torch.get_num_threads()} threads\n" if not args.one else "")
    print(one(args) if args.one else growth(args) if args.growth else comparison(args))


def comparison(args):
    variants, updates, gradients, failures = {}, {}, {}, {}
    asked = {name: options for name, options in VARIANTS.items() if name in ("plain recipe", *(args.variants or VARIANTS))}
    for name, options in asked.items():
        if args.device.type != "cuda" and any(word in name for word in ("tf32", "CUDA", "too")):
            failures[name] = "for CUDA"
            continue
        try:
            variant = Variant(options, args)
            updates[name], gradients[name] = variant.first_update(), variant.meta()[1]
            variants[name] = variant
        except Exception as error:
            failures[name] = f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"
    with FlopCounterMode(display=False) as counter:
        variants["plain recipe"].step()
    oracle = Variant("ours", args)
    x_l, y_l, x_u, *_ = oracle.batch
    exact = meta_gradient(oracle.model.double(), x_l.double(), y_l, x_u.double(), "unrolled")[1]

    size = 8192 if args.device.type == "cuda" else 2048
    kinds = {precision(options) for name, options in asked.items() if name not in failures}
    products = {kind: product(size, kind, args.device) for kind in sorted(kinds)}
    work = {name: variant.step for name, variant in variants.items()}
    work |= {("product", kind): f for kind, f in products.items()}              # a pair, as "bfloat16" names a row, too
    times = take_turns(work, args.repeats, args.device)
    median = {name: statistics.median(values) for name, values in times.items()}
    flop, peak = counter.get_total_flops(), {kind: 2 * size ** 3 / median["product", kind] for kind in products}

    lines = [f"{flop / 1e12:.3g} TFLOP a step; matrix product of {size}x{size}: "
             + ", ".join(f"{p} {value / 1e12:.3g} TFLOP/s" for p, value in peak.items()), "",
             "| variant | ms a step | times as fast | images a second | TFLOP/s | share of the peak | peak memory, MiB "
             "| error | update |", "|---|---|---|---|---|---|---|---|---|"]
    for name, options in asked.items():
        if name in failures:
            lines.append(f"| {name} | {failures[name]} | | | | | | | |")
            continue
        faster = statistics.median(plain / own for plain, own in zip(times["plain recipe"], times[name]))
        share = flop / median[name] / peak[precision(options)]
        # On the CPU the compiler's memory would be measured, not the step's.
        memory = "-" if "compiled" in options and args.device.type == "cpu" else f"{alone(args, name, repeats=1)[1]:.0f}"
        lines.append(f"| {name} | {median[name] * 1000:.4g} | {faster:.2f} | {2 * args.batch_size / median[name]:.4g} "
                     f"| {flop / median[name] / 1e12:.3g} | {share:.0%} | {memory} "
                     f"| {relative_error(gradients[name], exact):.1e} "
                     f"| {relative_error(updates[name], updates['plain recipe']):.1e} |")
    return "\n".join(lines)


def growth(args):
    """Each point a process of its own; the exponent is the slope of the least-squares line through the logarithms."""
    import numpy as np

    lines = ["The variant \"all\"; what a row does not name is as above.\n",
             "| what grows | values | ms a step | exponent | peak memory, MiB | exponent |", "|---|---|---|---|---|---|"]
    axes = {"batch_size": [args.batch_size * k // 4 for k in (1, 2, 4, 8)], "num_classes": [10, 100, 1000],
            "image_size": [32, 48, 64], "arch": ["convsmall", "convlarge-32", "convlarge-64", "convlarge"]}
    for axis, values in axes.items():
        ms, memory = np.array([alone(args, "all", **{axis: value}) for value in values]).T * [[1000], [1]]
        if axis == "arch":
            values = [sum(w.numel() for w in build_model(arch, args.num_classes).parameters()) for arch in values]
        slopes = [np.polyfit(np.log(values), np.log(row), 1)[0] for row in (ms, memory)]
        sizes, ms, memory = (" / ".join(f"{value:,.0f}" for value in row) for row in (values, ms, memory))
        name = "parameters" if axis == "arch" else axis.replace("_", " ")
        lines.append(f"| {name} | {sizes} | {ms} | {slopes[0]:.2f} | {memory} | {slopes[1]:.2f} |")
    return "\n".join(lines)


def one(args):
    """Seconds a step and MiB, of one variant in this process."""
    Variant("folded", args)                                                         # what the libraries take to start
    before = peak_memory()
    variant = Variant(VARIANTS[args.one], args)
    times, = take_turns({args.one: variant.step}, args.repeats, args.device).values()
    cuda = args.device.type == "cuda"
    return f"{statistics.median(times)} {torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else peak_memory() - before}"


def alone(args, name, **changes):
    """The same from a process of its own."""
    flags = {k: v for k, v in vars(args).items() if k not in ("one", "growth", "variants")} | changes
    command = [sys.executable, __file__, "--one", name, *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(word) for word in done.stdout.split()[-2:]]


class Variant:
    """A model, its optimizer and its way to take one step on one batch; every variant starts from the same weights."""

    def __init__(self, options, args):
        options = options.replace("ours", "ours channels-last jvp fused folded in-place")
        self.options, self.device, B, size = options.split(), args.device, args.batch_size, args.image_size
        self.dtype = torch.bfloat16 if "bfloat16" in options else None
        torch.manual_seed(0)
        self.model = build_model(args.arch, args.num_classes)
        x_l, x_u = torch.randn(2, B, 3, size, size)
        y_l, y_u = torch.randint(0, args.num_classes, (2, B))
        self.batch = [t.to(self.device) for t in (x_l, y_l, x_u, torch.rand(B), y_u)]
        with torch.no_grad():
            self.model(x_l)                                                         # running statistics
        self.model.to(self.device, memory_format=torch.channels_last if "channels-last" in options else torch.preserve_format)
        self.start = {k: v.clone() for k, v in self.model.state_dict().items()}
        kind = {"fused": True} if "fused" in options else {"foreach": False}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, **kind)
        for layer in self.model.modules():
            if isinstance(layer, ConvBN) and "folded" not in options:
                layer.forward = lambda x, layer=layer: layer.bn(layer.conv(x))
            if isinstance(layer, torch.nn.LeakyReLU):
                layer.inplace = "in-place" in options
        if "compiled-model" in options:
            self.model.compile()
        self.method = compiled_jvp() if "compiled-jvp" in options else "jvp"
        self.alpha = torch.tensor(0.1, device=self.device) if "graph" in options else 0.1
        self.step = self.ours if "ours" in options else self.plain
        if "graph" in options:
            self.capture()

    def ours(self):
        set_precision(precision(self.options), self.device)
        training_step(self.model, self.optimizer, *self.batch[:3], alpha=self.alpha, beta=self.alpha, lam=self.batch[3],
                      method=self.method, dtype=self.dtype)

    def capture(self):
        """From here on a step is the replay of one CUDA graph; a schedule would write into alpha."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.ours()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.ours()
        self.step = graph.replay

    def plain(self):
        set_precision(precision(self.options), self.device)
        x_l, y_l, x_u, lam, y_u = self.batch
        y_tilde, gradient, logits_l = self.meta()
        y_hat = update_pseudo_labels(y_tilde, gradient, self.alpha)
        self.model.train()
        x_in, y_in = cross_domain_mixup(x_l, one_hot(y_l, y_hat.shape[1]).to(y_hat.dtype), x_u, y_hat, lam)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits_in = self.model(x_in)
            logits_u = self.model(x_u)
        loss_in, loss_u = kl_divergence(logits_in.float(), y_in).mean(), squared_error(logits_u.float(), y_hat).mean()
        self.optimizer.zero_grad()
        (loss_in + loss_u).backward()
        self.optimizer.step()
        metrics = [loss_in, loss_u, cross_entropy(logits_l, y_l), (logits_l.argmax(dim=1) == y_l).float().mean(),
                   (y_tilde.argmax(dim=1) == y_u).float().mean()]
        return metrics if "no-reads" in self.options else [metric.item() for metric in metrics]

    def meta(self):
        """y_tilde, the meta-gradient and the labeled logits; the finite difference by moving the weights and back."""
        x_l, y_l, x_u, *_ = self.batch
        if "jvp" in self.options or self.dtype:
            method = self.method if "jvp" in self.options else "finite-difference"
            return meta_gradient_with_telemetry(self.model, x_l, y_l, x_u, method, dtype=self.dtype)[:3]
        self.model.eval()
        logits_l, theta = self.model(x_l), list(self.model.parameters())
        g = torch.autograd.grad(cross_entropy(logits_l, y_l), theta)
        predictions = []
        with torch.no_grad():
            half_step = 1e-2 / torch.stack([d.norm() for d in g]).norm()
            for move in (0, 1, -2, 1):
                if move:
                    for w, d in zip(theta, g):
                        w += move * half_step * d
                if len(predictions) < 3:
                    predictions.append(self.model(x_u).softmax(dim=1))
        y_tilde, plus, minus = predictions
        return y_tilde, (plus - minus) / half_step, logits_l.detach()

    def first_update(self):
        """What one step from the start adds to the weights."""
        self.model.load_state_dict(self.start)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        torch.manual_seed(1)
        self.step()
        update = torch.cat([(w - self.start[k]).flatten() for k, w in self.model.named_parameters()])
        self.model.load_state_dict(self.start)
        return update


def product(size, options, device):
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if options == "bfloat16" else torch.float32)
    return lambda: (set_precision(options, device), a @ a)


def precision(options):
    return next((name for name in ("bfloat16", "tf32") if name in options), "float32")


if __name__ == "__main__":
    main()
