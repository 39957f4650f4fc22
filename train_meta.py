"""Train MetaSemi, or another row of the paper's ablation.  `python3 train_meta.py --help` lists the flags."""
import os
import sys
import warnings

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))        # python -P leaves it out

from utils.interrupt import Interrupt, Stopped, end_at_once, exit_code

if __name__ == "__main__":
    end_at_once("train_meta.py")      # first of all: the other imports take a while

from datasets import check_root
from utils import cli
from utils.distributed import World
from utils.failure import network_failures, one_line_errors
from utils.files import printable
from utils.flags import check_evaluation_files, check_same_experiment, common_facts, parse_training, read_given_files
from utils.run_folder import RunFolder, check_paths, git_commit

PROG = "train_meta.py"
FAULT = 1000            # where a signal's number would be: some process cannot read the images of the next step
REPLICAS_FREQ = 1000    # steps between checks that all processes have the same weights; every save has one, too


def main(argv=None):
    cli.open_standard_streams()
    try:
        world = World()                 # the processes of torchrun, or this one alone
    except cli.UsageError as error:
        cli.fail(PROG, error, 2)
    args = parse_training(argv, world.fail)
    with Interrupt() as interrupt, one_line_errors(
            PROG, world.fail, f" with --batch-size {args.batch_size}: lower it, or take --precision bfloat16",
            None if args.evaluate else args.save_path):
        try:
            read_given_files(args)
            if args.evaluate:
                check_evaluation_files(args)
                from utils.evaluation import evaluate_file

                return evaluate_file(args)
            if world.rank == 0:
                check_paths(args.save_path, args.resume, args.overwrite)
            check_root(args.dataset, args.data_path)
            world.join(args.device, common_facts(args))
            # torch takes seconds to load: only now, so that a wrong flag answers at once.
            warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)     # raised inside torch by its own jvp
            return train(args, interrupt, world)
        except Stopped:
            if world.fails_first(interrupt.exit_code):
                print(f"{PROG}: stopped by a signal before the first step", file=sys.stderr, flush=True)
            os._exit(interrupt.exit_code)       # an orderly exit could wait for workers that are still starting


def train(args, interrupt, world):
    """The whole run.  Returns the exit code."""
    import torch

    from datasets import Batches
    from utils.device import check_compiler, choose_device, fingerprint, set_precision
    from utils.evaluation import Evaluator
    from utils.setup import describe_resumption, describe_run, prepare_data, prepare_model
    from utils.state import RunState, check_same_split

    device = choose_device(args.device)
    dtype = set_precision(args.precision, device)
    if args.compile:
        check_compiler()

    # The run so far, if there is one.  Nothing is written before every check has passed.
    folder = RunFolder(args.save_path, writes=world.rank == 0, overwrite=args.overwrite)
    saved, source, has_results = world.broadcast_object(folder.open(args.resume))
    if saved is not None:
        check_same_experiment(args, saved["args"], saved["step"])
        check_same_split(args, saved)
        if saved["step"] > args.total_steps and not has_results:
            raise cli.UsageError(f"argument --total-steps: {args.total_steps}, but the run that --resume continues is at step "
                                 f"{saved['step']} already: give more")
        if saved["step"] >= args.total_steps and has_results:
            if world.rank == 0:
                more = "" if args.schedule == "cosine" else "; a larger --total-steps would continue it"
                print(printable(f"{args.save_path}: finished at step {saved['step']}{more}"))
            world.leave()
            return 0

    # Data, network and optimizer
    images, data, labeled, unlabeled, validation = prepare_data(args, world, device, saved, source, interrupt)
    model, warned = prepare_model(args, world, device, dtype, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
                                fused=True)     # so that an update can be left out without waiting for the device
    state = RunState(args, images, data, labeled, validation, model, optimizer)
    if saved is not None:
        state.load_state_dict(saved, source)
    batches = Batches(images, labeled, unlabeled, batch_size=args.batch_size,
                      seed=args.seed, device=device, mixup_gamma=args.alpha if args.mix_up else None,
                      rows=world.rows(args.batch_size))
    evaluator = Evaluator(state, images, device, dtype, world)

    state.sessions.append({"from_step": state.step, "commit": git_commit(),
                           **fingerprint(device, args.precision, args.compile, world.size)})
    folder.start(state)
    folder.print(*describe_run(args, state, images, unlabeled, device, warned))
    if saved is not None:
        folder.print(*describe_resumption(state, saved, source))
    state.set_random_state(world, device)

    interrupt.defer()
    with batches, folder.progress(state.step, args.total_steps):
        stopping = take_steps(args, state, batches, evaluator, folder, interrupt, world)
        labeled = None if stopping else evaluator.measure_labeled(interrupt)
        evaluator.raise_fault()
        if labeled is None:
            stopping = stopping or world.all_reduce_max(interrupt.received)
    if stopping:
        folder.print(f"stopped by a signal at step {state.step}/{args.total_steps}; --resume continues")
        folder.close()
    else:
        folder.finish(state, labeled, evaluator.counts)
    world.leave()
    return exit_code(stopping) if stopping else 0


def take_steps(args, state, batches, evaluator, folder, interrupt, world):
    """The steps from that of the state on.  Returns None, or the signal that ended them; either way the run is saved."""
    from metasemi import learning_rate, ramp, training_step
    from metasemi.meta_gradient import compiled_jvp
    from utils.metrics import Meter, Timer

    meta, images_per_step = not args.no_meta, args.batch_size * (1 if args.no_meta and not args.mix_up else 2)
    method = compiled_jvp() if args.compile else args.meta_gradient
    all_reduce_mean = world.all_reduce_mean if world.size > 1 else None
    meter, timer = Meter(), Timer(state.seconds, state.step)
    if state.lacks_evaluation():        # a signal came first
        evaluate_and_save(state, folder, evaluator, timer, interrupt)

    for step in range(state.step + 1, args.total_steps + 1):
        x_l, y_l, x_u, y_u, lam = batches(step)                                         # lines 1, 2, 9
        alpha = learning_rate(step, args.lr, args.warmup, args.milestones, args.gamma,
                              args.total_steps if args.schedule == "cosine" else None)
        weight = ramp(step, args.warmup if args.ramp is None else args.ramp, args.weight)
        with network_failures(args.arch, step):
            result = training_step(                                                     # lines 3-8, 10-15
                state.model, state.optimizer, x_l, y_l, x_u, alpha=alpha, beta=alpha if args.meta_lr is None else args.meta_lr,
                weight=weight, lam=lam, meta=meta, method=method, epsilon=args.epsilon, consistency=args.consistency,
                dtype=evaluator.dtype, average=all_reduce_mean)
        world.broadcast(list(state.model.buffers()))    # batch statistics: a process has its own, rank 0's count
        meter.add_step(step, result, y_u)
        state.step = step
        folder.advance()

        last = step == args.total_steps
        if step % args.print_freq == 0 or last:
            meter.check()               # waits for the device
            rate = timer.rate(step)
            left = (args.total_steps - step) * (1 / rate + timer.pause / args.test_freq)
            folder.print_once(evaluator.skipped())
            folder.log_means(step, args.total_steps, alpha, meter.read(world.all_reduce_mean), rate * images_per_step, left)
        evaluator.fault = None if last else batches.fault(step + 1)
        stopping = world.all_reduce_max(FAULT if evaluator.fault else interrupt.received)
        if step % args.test_freq == 0 or last or stopping:
            meter.check()
            interrupt.elsewhere = stopping
            evaluate_and_save(state, folder, evaluator, timer, interrupt)
            stopping = world.all_reduce_max(interrupt.received)         # it may have come meanwhile
        elif step % REPLICAS_FREQ == 0:
            world.check_replicas(state.model.state_dict(), step)
        if stopping:
            return stopping
    return None


def evaluate_and_save(state, folder, evaluator, timer, interrupt):
    """Measures the run and saves it.  A signal leaves out the measuring, and so do images that cannot be read: they end the
    run once it is saved."""
    with timer.paused():
        state.check_finite()
        evaluator.world.check_replicas(state.model.state_dict(), state.step)
        scalars = evaluator.evaluate(interrupt)
        folder.print_once(evaluator.skipped())
        best = state.best
        if scalars is not None:
            state.add_evaluation(scalars)
            folder.record(state.step, scalars)
            folder.print(f"step {state.step}/{state.args['total_steps']}  {evaluator.describe(scalars)}")
        state.seconds = timer.seconds()
        state.get_random_state(evaluator.world, evaluator.device)
        last = state.step == state.args["total_steps"] or scalars is None or interrupt()
        if not folder.save(state, state.best != best, last):
            state.best = best
    if scalars is None:
        evaluator.raise_fault()


if __name__ == "__main__":
    sys.exit(main())
