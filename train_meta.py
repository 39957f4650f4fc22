"""Train MetaSemi, or another row of the paper's ablation.  `python3 train_meta.py --help` lists the flags."""
import os
import sys
import warnings
from contextlib import closing
from functools import partial

from datasets import check_root
from utils import cli
from utils.distributed import World
from utils.errors import RunFailure, UsageError, one_line_errors
from utils.experiment import check_same_flags, read_named_files, resolve_flags, versions
from utils.files import check_evaluation_paths, check_paths
from utils.interrupt import Interrupt, Stopped, exit_code

PROG = "train_meta.py"


def main(argv=None):
    cli.escape_output()
    args, named = resolve_flags(argv)
    world = World()                     # the processes of torchrun, or this one alone

    def describe_rest():
        from utils.checkpoint import describe_last

        return describe_last(args.save_path)

    with Interrupt() as interrupt, one_line_errors(
            PROG, world.fail, f" with --batch-size {args.batch_size}: lower it, or take --precision bfloat16",
            None if args.evaluate else describe_rest):
        files = read_named_files(args, named)
        if args.evaluate:
            check_evaluation_paths(args.evaluate, args.predictions)
            from utils.evaluation import evaluate_file

            return evaluate_file(args, files.sums)
        try:
            if world.size == 1:
                interrupt.listen()      # several processes do so once they are connected
            if world.rank == 0:
                check_paths(args.save_path, args.resume, args.overwrite)
            check_root(args.dataset, args.data_path, args.num_test)
            # torch takes seconds to load: only now, so that a wrong flag answers at once.
            from utils.device import choose_device

            device = choose_device(args.device, world.local_rank)
            world.join(device)
            interrupt.listen()
            return train(args, files, device, interrupt, world)
        except Stopped as stopped:
            print(f"{PROG}: stopped by a signal before the first step", file=sys.stderr, flush=True)
            os._exit(*stopped.args)          # an orderly exit could wait for workers that are still starting


def train(args, files, device, interrupt, world):
    """Makes the whole run.  Returns the exit code."""
    import torch

    from datasets import Batches
    from utils.device import fingerprint, set_precision
    from utils.evaluation import measure_sets
    from utils.run_folder import RunFolder, git_commit
    from utils.setup import describe_resumption, describe_run, prepare_data, prepare_model
    from utils.state import RunState

    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)     # raised inside torch by its own jvp
    dtype = set_precision(args.precision, device)

    # The run so far, if there is one.  Nothing is written before every check has passed.
    folder = RunFolder(args.save_path, world)
    saved, where, finished = world.broadcast_object(folder.open(args.resume))
    if saved is not None:
        check_same_flags(args, files.sums, saved["args"], saved["files"], saved["step"])
        if saved["step"] > args.total_steps and not finished:
            raise UsageError(f"argument --total-steps: {args.total_steps}, but the run that --resume continues is at step "
                             f"{saved['step']} already: give more")
        if saved["step"] >= args.total_steps and finished:
            more = "" if args.schedule == "cosine" else "; a larger --total-steps would continue it"
            folder.print(f"{args.save_path}: finished at step {saved['step']}{more}")
            world.leave()
            return 0

    # Data, network and optimizer
    images, data, labeled, validation, unlabeled = prepare_data(args, files, world, device, saved)
    model, warned = prepare_model(args, world, device, dtype, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
                                fused=True)     # so that an update can be left out without waiting for the device
    state = RunState(args, files.sums, images, data, labeled, validation, model, optimizer)
    if saved is not None:
        state.load_state_dict(saved, where)
    batches = Batches(images, labeled, unlabeled, batch_size=args.batch_size, seed=args.seed, device=device,
                      mixup_gamma=args.alpha if args.mix_up else None, rows=world.rows(args.batch_size))
    measure = partial(measure_sets, state, images, dtype, world, interrupt)
    state.sessions.append({"from_step": state.step, "commit": git_commit(), **versions(),
                           **fingerprint(device, args.precision, world.size)})
    not_restored = state.set_random_state(world)
    folder.start(state, args.overwrite)
    folder.print(*describe_run(args, state, images, unlabeled, warned))
    if saved is not None:
        folder.print(*describe_resumption(state, where), *not_restored)

    interrupt.deferred = True           # from here on there is something to save
    with batches, closing(folder):      # also on an error: the thread of tensorboardX would speak at the exit of the program
        stop = take_steps(args, state, batches, measure, folder, interrupt, dtype, world)
        if not stop:
            accuracies = measure("labeled")
            stop = world.agree_to_stop(interrupt.received)
        if stop and stop.fault:
            raise RunFailure(stop.fault)
        if stop and state.step == 0:    # nothing was saved
            raise Stopped(exit_code(stop.signal))
        if stop:
            folder.print(f"stopped by a signal at step {state.step}/{args.total_steps}; --resume continues")
        else:
            folder.finish(accuracies["labeled/accuracy"])
    world.leave()
    return exit_code(stop.signal) if stop else 0


def take_steps(args, state, batches, measure, folder, interrupt, dtype, world):
    """Makes the steps from that of the state on.  Returns None, or the Stop that ended them; either way the run is saved."""
    from metasemi import training_step
    from utils.meters import Meter, Timer
    from utils.trial import network_failures

    update = partial(training_step, state.model, state.optimizer, meta=not args.no_meta, method=args.meta_gradient,
                     epsilon=args.epsilon, consistency=args.consistency, dtype=dtype,
                     average=world.all_reduce_mean if world.size > 1 else None)
    images_per_step = args.batch_size * (1 if args.no_meta and not args.mix_up else 2)
    meter, timer = Meter(state.step), Timer(state.seconds, state.step)
    if state.needs_evaluation():        # a signal left it out
        evaluate_and_save(state, folder, measure, timer)

    for step in range(state.step + 1, args.total_steps + 1):
        batch, fault = batches.read(step)                                               # lines 1, 2, 9
        if stop := world.agree_to_stop(interrupt.received, fault):
            if state.step:
                meter.check()
                folder.save(timer.seconds())
            return stop
        alpha, beta, weight = schedule(args, step)
        with network_failures(args.arch, step):
            result = update(batch.x_l, batch.y_l, batch.x_u, lam=batch.lam, alpha=alpha, beta=beta, weight=weight)  # 3-8, 10-15
        world.broadcast(list(state.model.buffers()))    # running statistics differ between processes; rank 0's are kept
        meter.add_step(step, result, batch.y_u)
        state.step = step
        folder.bar.update()

        if step % args.print_freq == 0 or step == args.total_steps:
            means = meter.read(world.all_reduce_mean)           # waits for the device
            seconds, left = timer.speed(step, args.total_steps, args.test_freq)
            folder.log_means(alpha, means, images_per_step / seconds, left)
        elif sign := timer.first_sign(step, args.total_steps):
            folder.print(f"step {step}/{args.total_steps}  {sign}")
        if state.needs_evaluation():
            meter.check()
            evaluate_and_save(state, folder, measure, timer)
    return world.agree_to_stop(interrupt.received)


def schedule(args, step):
    """Returns the learning rate alpha, the meta learning rate beta and the weight of the consistency loss at a step."""
    from metasemi import learning_rate, ramp

    alpha = learning_rate(step, args.lr, args.warmup, args.milestones, args.gamma,
                          args.total_steps if args.schedule == "cosine" else None)
    return (alpha, alpha if args.meta_lr is None else args.meta_lr,
            ramp(step, args.warmup if args.ramp is None else args.ramp, args.weight))


def evaluate_and_save(state, folder, measure, timer):
    """Measures the run and saves it; a signal leaves the measuring out."""
    with timer.paused():
        scalars = measure("test", "validation")
        if scalars is not None:
            state.add_evaluation(scalars)
            folder.log_accuracies(scalars)
        folder.save(timer.seconds(), last=scalars is None or state.step == state.args["total_steps"])


if __name__ == "__main__":
    sys.exit(main())
