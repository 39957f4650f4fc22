"""Train MetaSemi, or another row of the paper's ablation.  `python3 train_meta.py --help` lists the flags."""
import sys
import time
import warnings

from datasets import DATASETS, DataError
from datasets.splits import check_num_label
from models import NETWORKS
from utils import cli

PROG = "train_meta.py"


def main(argv=None):
    args = cli.parse_training(argv, DATASETS, NETWORKS, check_num_label)
    # torch takes seconds to load: only now, so that a wrong flag answers at once.
    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)      # raised inside torch by its own jvp
    from utils.metrics import Diverged

    try:
        return train(args)
    except (DataError, cli.UsageError) as error:
        cli.fail(PROG, error, 2)
    except OSError as error:
        cli.fail(PROG, error, 1)
    except Diverged as error:
        cli.fail(PROG, f"{error}; the checkpoints in {args.save_path} are from before", 1)
    except KeyboardInterrupt:
        cli.fail(PROG, "interrupted before the first step", 130)


def train(args):
    """The whole run; returns the exit code."""
    import numpy as np
    import torch

    from datasets import Batches, load_dataset, normalized_batches
    from datasets.splits import split_training
    from metasemi import learning_rate, ramp, training_step
    from metasemi.step import accuracy
    from models import build_model
    from utils import checkpoint
    from utils.device import choose_device, fingerprint, set_precision
    from utils.interrupt import Interrupt
    from utils.metrics import Diverged, Meter, error_rates, evaluate
    from utils.run_folder import RunFolder, check_same_experiment, experiment, git_commit, prepare

    device = choose_device(args.device)
    dtype = set_precision(args.precision, device)
    meta, uses_unlabeled = not args.no_meta, args.mix_up or not args.no_meta

    # The run so far, if there is one.  Nothing is written before every check has passed.
    folder, saved = prepare(args.save_path, args.resume, args.overwrite)
    if saved is not None:
        check_same_experiment(args, saved["args"], saved["step"])
        done = folder is not None and folder.has_results()
        if saved["step"] > args.total_steps or saved["step"] == args.total_steps and done:
            print(f"{args.save_path}: finished at step {saved['step']}; a larger --total-steps would continue it")
            return 0

    # Data and split
    images = load_dataset(args.dataset, args.data_path, args.image_size, args.flip, args.num_workers)
    if saved is None:
        labeled, validation = split_training(images.train_labels, args.num_label, args.num_val, images.num_classes, args.seed)
    else:
        if images.labels_sha256 != saved["labels_sha256"]:
            raise DataError(f"argument --data-path: {args.data_path} is not what {args.save_path} was trained on: "
                            "the training labels differ")
        labeled, validation = saved["labeled"].numpy(), saved["validation"].numpy()
    taken = validation if args.include_labeled else np.concatenate([validation, labeled])
    unlabeled = np.setdiff1d(np.arange(len(images.train_labels)), taken)
    if uses_unlabeled and len(unlabeled) == 0:
        raise DataError(f"argument --num-label: {args.num_label} leaves no unlabeled image: add --include-labeled, "
                        "or train supervised with --no-meta and no --mix-up")

    # Model
    torch.manual_seed(args.seed)
    model = build_model(args.arch, images.num_classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    start, seconds, evaluations, sessions = 0, 0.0, [], []
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, seconds, evaluations, sessions = (saved[k] for k in ("step", "seconds", "evaluations", "sessions"))
    batches = Batches(images, labeled, unlabeled if uses_unlabeled else None, batch_size=args.batch_size,
                      seed=args.seed, device=device, mixup_gamma=args.alpha if args.mix_up else None)
    held_out = {"test": (images.test_images.to(device), images.test_labels)}
    if len(validation):
        held_out["validation"] = images.train_images[validation].to(device), images.train_labels[validation]
    select_by = "validation" if len(validation) else "test"

    # Run folder
    folder = folder or RunFolder(args.save_path)
    sessions = [*sessions, {"from_step": start, "commit": git_commit(), **fingerprint(device, args.precision)}]
    folder.start(experiment(args), sessions, labeled, validation, images.labels_sha256, keep=start)
    folder.say(f"{args.dataset}: {len(images.train_labels)} training and {len(images.test_labels)} test images of "
               f"{images.train_images.shape[-1]}x{images.train_images.shape[-1]}, {images.num_classes} classes, "
               f"labels {images.labels_sha256[:12]}; {len(labeled)} labeled"
               + (f", {len(unlabeled)} unlabeled" if uses_unlabeled else "")
               + (f", {len(validation)} for validation" if len(validation) else ""))
    folder.say(f"{args.arch}, {sum(w.numel() for w in model.parameters()):,} parameters, {sessions[-1]['device']}"
               + (" (no CUDA device is visible)" if args.device == "auto" and device.type == "cpu" else ""))
    if saved is not None:
        folder.say(f"resumed at step {start}")
        for key, value in sessions[-1].items():
            if key not in ("from_step", "commit") and value != sessions[-2].get(key):
                folder.say(f"{key} was {sessions[-2].get(key)} and is {value}: equal to the first part only up to rounding")

    meter = Meter()
    with Interrupt() as interrupt, folder.progress(start, args.total_steps) as bar:
        def test_and_save(step):
            """Evaluates and saves; only saves if a signal comes."""
            nonlocal seconds, clock
            meter.check()
            if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
                raise Diverged(f"the weights are not finite at step {step}")
            accuracies = {}
            for part, (x, y) in held_out.items():
                accuracies[part] = evaluate(model, normalized_batches(x, y, images.mean, images.std, device), dtype, interrupt)
            best = False
            if None not in accuracies.values():
                best = all(accuracies[select_by] > earlier[select_by] for earlier in evaluations)
                evaluations.append({"step": step, **accuracies})
                folder.record(step, {f"{part}/accuracy": value for part, value in accuracies.items()})
                folder.say(f"step {step}/{args.total_steps}  " + "  ".join(
                    f"{part} error {100 * (1 - value):.2f} %" for part, value in accuracies.items()))
            now = time.perf_counter()
            seconds, clock = seconds + now - clock, now
            checkpoint.save({
                "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "args": experiment(args), "sessions": sessions, "seconds": seconds, "evaluations": evaluations,
                "labeled": torch.from_numpy(labeled), "validation": torch.from_numpy(validation),
                "labels_sha256": images.labels_sha256, "class_names": list(images.class_names),
                "mean": images.mean, "std": images.std, "image_size": images.train_images.shape[-1],
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            }, folder.path)
            if best:
                checkpoint.save_best(folder.path)

        if saved is not None:
            torch.set_rng_state(saved["rng"])
            if device.type == "cuda" and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"], device)
        clock = logged_at = time.perf_counter()
        logged_step = start
        due = start and (start % args.test_freq == 0 or start == args.total_steps)
        if due and (not evaluations or evaluations[-1]["step"] != start):           # a signal came first
            test_and_save(start)

        for step in range(start + 1, args.total_steps + 1):
            x_l, y_l, x_u, hidden, lam = batches(step)                                  # lines 1, 2, 9
            alpha = learning_rate(step, args.lr, args.warmup, args.milestones, args.gamma)
            beta = alpha if args.meta_lr is None else args.meta_lr
            result = training_step(                                                     # lines 3-8, 10-15
                model, optimizer, x_l, y_l, x_u, alpha=alpha, beta=beta, weight=ramp(step, args.warmup, args.weight),
                lam=lam, meta=meta, method=args.meta_gradient, epsilon=args.epsilon, consistency=args.consistency,
                dtype=dtype)

            telemetry = {"loss": result.loss, **result.telemetry}
            if result.y_tilde is not None:
                telemetry["unlabel-acc"] = accuracy(result.y_tilde, hidden)
            if meta:
                telemetry["pseudo-acc"] = accuracy(result.y_hat, hidden)
            meter.add(step, telemetry)
            bar.update()

            last = step == args.total_steps
            if step % args.print_freq == 0 or last:
                meter.check()
                now = time.perf_counter()
                rate = (step - logged_step) / (now - logged_at)                         # steps per second
                logged_at, logged_step = now, step
                folder.log(step, args.total_steps, alpha, meter.read(), rate, args.batch_size * (1 + uses_unlabeled))
            if step % args.test_freq == 0 or last or interrupt():
                test_and_save(step)
            if interrupt():
                folder.say(f"stopped by a signal at step {step}/{args.total_steps}; --resume continues")
                folder.close()
                return interrupt.exit_code

    folder.finish(args.total_steps, seconds, error_rates(evaluations), len(evaluations), experiment(args), sessions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
