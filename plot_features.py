"""Figure 3 of the paper: learned features in 2D.  `python3 plot_features.py --help` lists the flags."""
import os
import sys
import warnings

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))        # python -P leaves it out

from utils.interrupt import Interrupt, Stopped, end_at_once

if __name__ == "__main__":
    end_at_once("plot_features.py")      # first of all: the other imports take a while

from models import check_network
from utils import cli
from utils.failure import one_line_errors
from utils.files import printable
from utils.flags import check_plotting_files, parse_plotting

PROG = "plot_features.py"


def main(argv=None):
    cli.open_standard_streams()
    args = parse_plotting(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)           # of the embedding libraries, about one another
    with Interrupt() as interrupt, one_line_errors(PROG, cli.fail):
        try:
            check_plotting_files(args)
            args.arch = {name: check_network(name) for name in args.arch}       # name -> SHA-256 of a file of the user's own
            # torch and the embedding take seconds to load: only now, so that a wrong flag answers at once.
            if args.curves:
                from reproduction.figures import draw_curves

                paths = draw_curves(args.curves, args.save_path)
            else:
                from reproduction.features import plot

                paths = plot(args)
        except Stopped:
            cli.fail(PROG, "stopped by a signal before all was written", interrupt.exit_code)
    print("\n".join(map(printable, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
