"""Train MetaSemi, or another row of the paper's ablation.  `python3 train_meta.py --help` lists the flags."""
import os
import sys
import time
import warnings

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))        # python -P leaves it out

from utils.interrupt import Interrupt, Stopped, end_at_once, exit_code

if __name__ == "__main__":
    end_at_once("train_meta.py")      # first of all: the other imports take a while

from datasets import DATASETS, DataError, check_root
from datasets.splits import check_num_label
from models import NETWORKS, NetworkError, check_network
from utils import cli
from utils.distributed import World, WorldError
from utils.files import printable
from utils.run_folder import check_paths, read_given_split, shared

PROG = "train_meta.py"
FAULT = 1000            # where a signal's number would be: some process cannot read the images of the next step
REPLICAS_FREQ = 1000    # steps between checks that all processes have the same weights; every save has one, too


def main(argv=None):
    cli.open_standard_streams()
    try:
        world = World()                 # the processes of torchrun, or this one alone
    except cli.UsageError as error:
        cli.fail(PROG, error, 2)
    args = cli.parse_training(argv, DATASETS, NETWORKS, check_num_label, world.fail)
    with Interrupt() as interrupt:
        try:
            if args.evaluate:
                return evaluate_only(args)
            if world.rank == 0:
                check_paths(args.save_path, args.resume, args.overwrite)
            check_root(args.dataset, args.data_path)
            given = None
            if args.split:
                given = read_given_split(args.split, args.num_label)
                args.num_label = len(given)
            sha256 = check_network(args.arch)
            if sha256:
                args.arch_sha256 = sha256
            world.join(args.device, shared(args))
            # torch takes seconds to load: only now, so that a wrong flag answers at once.
            warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)     # raised inside torch by its own jvp
            return train(args, given, interrupt, world)
        except (DataError, NetworkError, cli.UsageError) as error:
            world.fail(PROG, error, 2)
        except OSError as error:
            world.fail(PROG, error, 1)
        except Stopped:
            if world.speaks(interrupt.exit_code):
                print(f"{PROG}: stopped by a signal before the first step", file=sys.stderr, flush=True)
            os._exit(interrupt.exit_code)       # an orderly exit could wait for workers that are still starting
        except (ArithmeticError, MemoryError, RuntimeError) as error:
            from utils.checkpoint import describe_last
            from utils.device import is_out_of_memory
            from utils.failure import NetworkFailure
            from utils.metrics import Diverged

            if is_out_of_memory(error):
                error = f"out of memory with --batch-size {args.batch_size}: lower it, or take --precision bfloat16"
            elif not isinstance(error, (Diverged, NetworkFailure, WorldError)):
                raise
            world.fail(PROG, error if args.evaluate else f"{error}; {describe_last(args.save_path)}", 1)


def evaluate_only(args):
    """--evaluate; returns the exit code."""
    cli.check_evaluation_files(args)
    sha256 = check_network(args.arch) if args.arch else None
    import datasets
    import models
    from utils.evaluation import evaluate_file

    return evaluate_file(args, sha256, datasets, models)


def train(args, given, interrupt, world):
    """The whole run; given: the labeled indices of --split, or None.  Returns the exit code."""
    from functools import partial

    import numpy as np
    import torch

    from datasets import Batches, load_dataset, normalized_batches
    from datasets.splits import check_split, split_training
    from metasemi import learning_rate, meta_gradient, ramp, training_step
    from metasemi.meta_gradient import compiled_jvp
    from metasemi.step import accuracy
    from models import build_model, rehearse
    from models.synchronized import synchronize_batch_norm
    from utils import checkpoint
    from utils.device import check_compiler, choose_device, fingerprint, memory_for_images, set_precision, slow_precision
    from utils.failure import own_network
    from utils.metrics import Diverged, Meter, all_finite, coverage, error_rates, evaluate, finite_names
    from utils.run_folder import NoFolder, RunFolder, check_same_data, check_same_experiment, experiment, git_commit, prepare

    device = choose_device(args.device)
    dtype = set_precision(args.precision, device)
    if args.compile:
        check_compiler()
    ramp_steps = args.warmup if args.ramp is None else args.ramp
    meta, uses_unlabeled = not args.no_meta, args.mix_up or not args.no_meta

    # The run so far, if there is one.  Nothing is written before every check has passed.
    folder, saved, source = NoFolder(), None, None
    if world.rank == 0:
        folder, saved, source = prepare(args.save_path, args.resume, args.overwrite)
    saved, source, done = world.share((saved, source, bool(folder and saved and folder.has_results(saved))))
    if saved is not None:
        check_same_experiment(args, saved["args"], saved["step"])
        if given not in (None, saved["labeled"].tolist()):
            raise cli.UsageError(f"argument --split: {args.split} is not the split of the run that --resume continues")
        if saved["step"] > args.total_steps or saved["step"] == args.total_steps and done:
            if world.rank == 0:
                print(printable(f"{args.save_path}: finished at step {saved['step']}; a larger --total-steps would continue "
                                "it"))
            world.leave()
            return 0

    # Data and split
    with world.one_first():             # it may download
        images = load_dataset(args.dataset, args.data_path, args.image_size, args.flip, args.num_workers,
                              memory=memory_for_images(device), skip_corrupt=args.skip_corrupt,
                              statistics=saved and (saved["mean"], saved["std"]), stop=interrupt)
    data = images.digest
    if saved is None:
        labeled, validation = split_training(images.train_labels, args.num_label, args.num_val, images.num_classes, args.seed,
                                             given)
    else:
        check_same_data(data, saved, "the run that --resume continues", args.data_path)
        labeled, validation = saved["labeled"].numpy(), saved["validation"].numpy()
        check_split(labeled, validation, len(images.train_labels), source)
    images = images.to(device)
    world.compare({**data, "labeled images": labeled.tolist(), "validation images": validation.tolist()})
    taken = validation if args.include_labeled else np.concatenate([validation, labeled])
    unlabeled = np.setdiff1d(np.arange(len(images.train_labels)), taken)
    if uses_unlabeled and len(unlabeled) == 0:
        raise DataError(f"argument --num-label: {args.num_label} leaves no unlabeled image: add --include-labeled, "
                        "or train supervised with --no-meta and no --mix-up")

    # Model
    warned = rehearse(
        args.arch, images.num_classes, images.image_size, device, dtype,
        partial(meta_gradient, method=args.meta_gradient, consistency=args.consistency, dtype=dtype) if meta else None,
        min(4, args.batch_size // world.size))
    torch.manual_seed(args.seed)
    model = build_model(args.arch, images.num_classes, device)
    always_finite = finite_names(model)             # an infinite buffer, such as the mask of an attention, may be so
    average = None                      # of tensors over the processes, if there are several
    if world.size > 1:
        average = world.average
        world.copy_first(list(model.state_dict().values()))
        if args.sync_bn:
            synchronize_batch_norm(model, average, world.size)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
                                fused=True)     # so that an update can be left out without waiting for the device
    start, seconds, evaluations, best, sessions = 0, 0.0, [], None, []
    if saved is not None:
        checkpoint.restore(saved, model, optimizer, source)
        start, seconds, evaluations, best, sessions = (
            saved[key] for key in ("step", "seconds", "evaluations", "best", "sessions"))
    batches = Batches(images, labeled, unlabeled if uses_unlabeled else None, batch_size=args.batch_size,
                      seed=args.seed, device=device, mixup_gamma=args.alpha if args.mix_up else None,
                      rows=world.rows(args.batch_size))
    held_out = {"test": (world.part(images.test_images), world.part(images.test_labels))}
    if len(validation):
        mine = world.part(validation)
        held_out["validation"] = images.train_images[mine], images.train_labels[mine]
    counts = {"test": len(images.test_labels), "validation": len(validation)}
    select_by = "validation" if len(validation) else "test"

    # Run folder
    folder = folder or RunFolder(args.save_path, new=True)
    sessions = [*sessions, {"from_step": start, "commit": git_commit(),
                            **fingerprint(device, args.precision, args.compile, world.size)}]
    folder.start(experiment(args), sessions, labeled, validation, images.labels_sha256, keep=start)
    folder.say(f"{images.describe()}; {len(labeled)} labeled" + (f", {len(unlabeled)} unlabeled" if uses_unlabeled else "")
               + (f", {len(validation)} for validation" if len(validation) else ""))
    folder.say(f"{args.arch}, {sum(w.numel() for w in model.parameters()):,} parameters, {sessions[-1]['device']}"
               + (" (no CUDA device is visible)" if args.device == "auto" and device.type == "cpu" else ""))
    if images.source:
        folder.say(f"images {images.source}")
    ignored = images.ignored and f"ignored: {images.ignored}"
    for line in filter(None, (ignored, cli.cut_short(args), slow_precision(args.precision, device), *warned)):
        folder.say(line)
    if saved is not None:
        folder.say(f"resumed at step {start} from {source}")
        if "data" not in saved:
            folder.say(f"{source}: of an earlier version, which kept no digest of its images: they could not be compared")
        for key, value in sessions[-1].items():
            if key not in ("from_step", "commit") and value != sessions[-2].get(key):
                folder.say(f"{key} was {sessions[-2].get(key)} and is {value}: equal to the first part only up to rounding")
        if folder.source and evaluations and max(evaluations, key=lambda e: e[select_by])["step"] == start:
            checkpoint.save_best(folder.source)     # a kill may have come between the checkpoint and this

    method = compiled_jvp() if args.compile else args.meta_gradient
    meter = Meter()
    fault, said = None, set()           # an error of images that this process could not read; skipped files that were said
    interrupt.defer()
    with batches, folder.progress(start, args.total_steps):
        def say_skipped():
            if args.skip_corrupt:
                for line in {line: None for lines in world.gather(images.skipped()) for line in lines if line not in said}:
                    folder.say(line)
                    said.add(line)

        def measure(step, x, y, stop):
            """As `evaluate`; an error of the network or its logits names the step."""
            try:
                with own_network(args.arch, step):
                    return evaluate(model, normalized_batches(x, y, images.mean, images.std, device), dtype, stop, world.sum)
            except Diverged as error:
                raise Diverged(f"{error} at step {step}") from None

        def test_and_save(step, stopping=None):
            """Evaluates and saves; only saves if a signal comes, or images cannot be read: then that is raised."""
            nonlocal best, clock, fault, logged_at, pause, seconds
            meter.check()               # waits for the steps so far
            paused_at = time.perf_counter()
            if not all_finite(value for name, value in model.state_dict().items() if name in always_finite):
                raise Diverged(f"the weights are not finite at step {step}")
            world.check_replicas(model.state_dict(), step)
            accuracies, fewer = {}, {}
            for part, (x, y) in held_out.items():
                try:
                    measured = measure(step, x, y, lambda: stopping or interrupt())
                except (DataError, OSError) as error:
                    measured, fault = None, error
                if measured is None:
                    break
                covered = measured.pop("images")
                if covered < counts[part]:
                    fewer[f"{part}/images"] = covered
                accuracies |= {f"{part}/{name}": value for name, value in measured.items()}
            say_skipped()
            is_best = False
            if measured is not None:
                is_best = best is None or accuracies[f"{select_by}/accuracy"] > best
                evaluations.append({"step": step} | {name.removesuffix("/accuracy").replace("/", "_"): value
                                                     for name, value in (accuracies | fewer).items()})
                folder.record(step, accuracies | fewer)
                folder.say(f"step {step}/{args.total_steps}  " + "  ".join(
                    f"{name.replace('/accuracy', '').replace('/top5', ' top-5')} error {100 * (1 - value):.2f} %"
                    for name, value in accuracies.items())
                    + "".join(f"  over {covered:,} of {counts[part]:,} {part} images: the others cannot be read"
                              for part, covered in ((name.split("/")[0], n) for name, n in fewer.items())))
            now = time.perf_counter()
            seconds, clock = seconds + now - clock, now
            (rng, cuda_rng), *other_rng = world.gather(
                [torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None])
            state = {
                "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "args": experiment(args), "sessions": sessions, "seconds": seconds, "evaluations": evaluations,
                "best": accuracies[f"{select_by}/accuracy"] if is_best else best,
                "labeled": torch.from_numpy(labeled), "validation": torch.from_numpy(validation),
                "labels_sha256": images.labels_sha256, "class_names": list(images.class_names),
                "data": data,
                "mean": images.mean, "std": images.std, "image_size": images.image_size,
                "rng": rng, "cuda_rng": cuda_rng, **({"other_rng": other_rng} if other_rng else {}),
            }
            if folder.save(state, is_best, last=step == args.total_steps or measured is None or interrupt()):
                best = state["best"]
            pause = time.perf_counter() - paused_at
            logged_at += pause          # the speed is that of training alone
            if measured is None:
                faults = [error for error in world.gather(fault and str(fault)) if error]
                if faults:
                    raise OSError(f"{faults[0]}; step {step} is saved, and --resume continues from there")

        world.seed(args.seed, start)
        if saved is not None:
            states = [[saved["rng"], saved["cuda_rng"]], *saved.get("other_rng", [])]
            if world.rank == 0 or len(states) == world.size:
                rng, cuda_rng = states[world.rank]
                torch.set_rng_state(rng)
                if device.type == "cuda" and cuda_rng is not None:
                    torch.cuda.set_rng_state(cuda_rng, device)
        clock = logged_at = time.perf_counter()
        logged_step, pause = start, 0.0
        due = start and (start % args.test_freq == 0 or start == args.total_steps)
        if due and (not evaluations or evaluations[-1]["step"] != start):           # a signal came first
            test_and_save(start)

        for step in range(start + 1, args.total_steps + 1):
            x_l, y_l, x_u, y_u, lam = batches(step)                                     # lines 1, 2, 9
            alpha = learning_rate(step, args.lr, args.warmup, args.milestones, args.gamma,
                                  args.total_steps if args.schedule == "cosine" else None)
            beta = alpha if args.meta_lr is None else args.meta_lr
            with own_network(args.arch, step):
                result = training_step(                                                 # lines 3-8, 10-15
                    model, optimizer, x_l, y_l, x_u, alpha=alpha, beta=beta, weight=ramp(step, ramp_steps, args.weight),
                    lam=lam, meta=meta, method=method, epsilon=args.epsilon, consistency=args.consistency,
                    dtype=dtype, average=average)
            world.copy_first(list(model.buffers()))             # batch statistics: a process has its own, rank 0's count

            telemetry = {"loss": result.loss, **result.telemetry}
            if result.y_tilde is not None:
                telemetry["unlabel-acc"] = accuracy(result.y_tilde, y_u)
            if meta:
                telemetry["pseudo-acc"] = accuracy(result.y_hat, y_u)
            meter.add(step, result.finite, telemetry)
            folder.advance()

            last = step == args.total_steps
            if step % args.print_freq == 0 or last:
                meter.check()
                now = time.perf_counter()
                rate = (step - logged_step) / (now - logged_at)                         # steps per second
                left = (args.total_steps - step) * (1 / rate + pause / args.test_freq)
                logged_at, logged_step = now, step
                say_skipped()
                means = meter.read(average or list)
                folder.log(step, args.total_steps, alpha, means, rate * args.batch_size * (1 + uses_unlabeled), left)
            fault = None if last else batches.fault(step + 1)
            stopping = world.agree(FAULT if fault else interrupt.received)
            if step % args.test_freq == 0 or last or stopping:
                test_and_save(step, stopping)
                stopping = world.agree(interrupt.received)      # it may have come meanwhile
            elif step % REPLICAS_FREQ == 0:
                world.check_replicas(model.state_dict(), step)
            if stopping:
                folder.say(f"stopped by a signal at step {step}/{args.total_steps}; --resume continues")
                folder.close()
                world.leave()
                return exit_code(stopping)

    mine = world.part(labeled)
    fitted = measure(args.total_steps, images.train_images[mine], images.train_labels[mine], interrupt)
    if fitted is None:                  # the run is saved, and --resume comes back to here
        folder.close()
        world.leave()
        return exit_code(world.agree(interrupt.received))
    folder.finish(args.total_steps, seconds, error_rates(evaluations), error_rates(evaluations, "test_top5"),
                  round(100 * (1 - fitted["accuracy"]), 4), len(evaluations), experiment(args), sessions,
                  coverage(evaluations, counts))
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
