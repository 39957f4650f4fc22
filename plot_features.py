"""Figure 3 of the paper: learned features in 2D.  `python3 plot_features.py --help` lists the flags."""
import sys
import warnings

from datasets import DATASETS
from models import check_network
from utils.cli import Parser, escape_output, number, option, path, refuse_without_effect
from utils.distributed import processes
from utils.errors import UsageError, one_line_errors, printable
from utils.files import CHECKPOINT
from utils.flags import DEVICES
from utils.interrupt import Interrupt

PROG = "plot_features.py"


def main(argv=None):
    escape_output()
    args = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)           # of the embedding libraries, about one another
    with Interrupt() as interrupt, one_line_errors(PROG):
        interrupt.listen()
        check_files(args)
        args.arch = {name: check_network(name) for name in args.arch}       # name -> SHA-256 of a file of the user's own
        # torch and the embedding take seconds to load: only now, so that a wrong flag answers at once.
        if args.curves:
            from reproduction.figures import draw_curves

            paths = draw_curves(args.curves, args.save_path, args.row_label)
        else:
            from reproduction.features import plot

            paths = plot(args)
    print("\n".join(map(printable, paths)))
    return 0


def plotting_parser():
    """Returns the parser of the flags of plot_features.py."""
    parser = Parser(prog=PROG, description="Figure 3 of the paper: the features of one or several trained networks in 2D, one "
                                           "row each; or, with --curves, the course of one or several runs.")
    parser.add_argument("--checkpoint-path", nargs="+", type=path, metavar="PATH",
                        help="checkpoints of train_meta.py, or run folders, one row each")
    parser.add_argument("--row-label", nargs="+", metavar="NAME",
                        help="names of the rows (default: of the run folders), or with --curves of the lines (default: by the "
                             "flags in which their runs differ)")
    parser.add_argument("--save-path", required=True, type=path, metavar="DIR", help="folder for the figure and its data")
    parser.add_argument("--dataset", choices=DATASETS, help="default: that of the checkpoint; another is refused")
    parser.add_argument("--data-path", type=path, metavar="DIR", help="where its files lie (default: as the run had it)")
    parser.add_argument("-a", "--arch", nargs="+", default=[], metavar="NETWORK",
                        help="the networks of the checkpoints; needed for one in a file of your own, FILE:CLASS, which is "
                             "executed")
    parser.add_argument("--index-path", nargs="+", type=path, metavar="PATH",
                        help="label_indices.txt, one per checkpoint; must be the checkpoint's split (default: in its folder)")
    parser.add_argument("--num-point", type=number(int, low=1), metavar="N",
                        help="unlabeled points, and test points, that are drawn; all if there are fewer (default: 5000)")
    parser.add_argument("--embed-all", action="store_true", help="embed every image and sample for drawing, as the paper did; "
                                                                 "default: sample first")
    parser.add_argument("--method", choices=("tsne", "pca"), default="tsne", help="embedding (default: %(default)s)")
    parser.add_argument("--perplexity", type=number(float, low=1), default=30.0, metavar="X",
                        help="of tsne (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, low=0, high=2 ** 32 - 1), default=1234, metavar="N",
                        help="of the sample and the embedding (default: %(default)s)")
    parser.add_argument("--mark-errors", action="store_true", help="mark the test points that the network misclassifies")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="auto: the accelerator that torch finds, else the CPU")
    parser.add_argument("--num-workers", default=4, type=number(int, low=0, high=256), metavar="N",
                        help="processes that decode the images of a folder (default: %(default)s)")
    parser.add_argument("--curves", nargs="+", type=path, metavar="RUN",
                        help="instead of features: test error and loss of these run folders; runs that differ only in their "
                             "seed become one line with a band")
    return parser


def parse(argv):
    """Returns the flags of a command line.  Exits with code 2 on a contradiction."""
    parser = plotting_parser()
    args = parser.parse_args(argv)
    if bool(args.curves) == bool(args.checkpoint_path):
        parser.error("arguments --checkpoint-path and --curves: give one of them")
    if args.curves:
        refuse_without_effect(parser, args, "--curves", [name for name in vars(args)
                                                         if name not in ("curves", "save_path", "row_label")])
    for name in () if args.curves else ("row_label", "index_path"):
        given, needed = len(getattr(args, name) or args.checkpoint_path), len(args.checkpoint_path)
        if given != needed:
            parser.error(f"argument {option(name)}: {given} values for {needed} checkpoints: give one for each")
    if args.method != "tsne":
        refuse_without_effect(parser, args, f"--method {args.method}", ("perplexity",))
    return args


def check_files(args):
    """Raises UsageError under torchrun, for what is not there, and for a file in the place of a folder.

    A run folder in the place of a checkpoint stands for its last one.
    """
    if processes()[2] > 1:
        raise UsageError("it takes one process: leave out torchrun")
    if args.save_path.exists() and not args.save_path.is_dir():
        raise UsageError(f"argument --save-path: {args.save_path} is a file: give a folder")
    args.checkpoint_path = [file / CHECKPOINT if file.is_dir() else file for file in args.checkpoint_path or ()]
    for name in ("checkpoint_path", "index_path", "curves"):
        for file in getattr(args, name) or ():
            if not file.exists():
                raise UsageError(f"argument {option(name)}: {file} does not exist: give what a run has left")


if __name__ == "__main__":
    sys.exit(main())
