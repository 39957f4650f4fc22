"""Run folders of any kind: which of them differ only in their seed, the flags in which the others differ, and their table."""
import re

from reproduction.cells import ROWS, row_of
from reproduction.report import CONTRAST, error_table, markdown, paired
from reproduction.run import resolved, texts
from utils.cli import option
from utils.errors import UsageError, printable
from utils.files import RESULTS, csv_text, read_flags, read_results, read_split_sums

SAME = {"seed", "split", "num_workers", "print_freq", "device"}     # flags in which runs of one row may differ


def grouped(folders):
    """Returns lists of (flags, folder), one for each row, whose runs differ only in the flags SAME.

    Data are the same if their labels are; their path is then the one that was seen first.
    Raises UsageError for a folder that is not one of a run, and for the same run given twice.
    """
    groups, paths, seen = {}, {}, {}
    for folder in folders:
        flags, sums = {**resolved(), **read_flags(folder)}, read_split_sums(folder)
        flags["data_path"] = paths.setdefault(sums["labels_sha256"], flags["data_path"])
        key = (sums["labels_sha256"], *sorted((name, shown(value)) for name, value in flags.items()
                                              if name not in SAME and shown(value) != "-"))
        first = seen.setdefault((key, flags["seed"], sums["sha256"]), folder)
        if first is not folder:
            raise UsageError(f"{first} and {folder} are the same run, seed {flags['seed']} with the same labeled images: give "
                             "each run once")
        groups.setdefault(key, []).append((flags, folder))
    return list(groups.values())


def differing(rows):
    """Returns the names of the flags in which rows differ; rows: flags, name -> value."""
    names = dict.fromkeys(name for flags in rows for name in flags if name not in SAME)
    return [name for name in names if len({shown(flags.get(name)) for flags in rows}) > 1]


def shown(value):
    """Returns a flag's value as text; a flag that is not set is "-"."""
    return "-" if value is None or value is False else "yes" if value is True else printable(value)


def label(flags, names):
    """Returns a row's name, made of some of its flags."""
    return ", ".join(option(name) if flags[name] is True else f"{option(name)} {shown(flags[name])}"
                     for name in names if shown(flags.get(name)) != "-") or f"without {', '.join(map(option, names))}"


def sweep_table(folders, form):
    """Returns the table of some finished runs, and that of the differences between rows on common seeds; form: of FORMS."""
    groups = grouped(folders)
    rows = [flags for (flags, _), *_ in groups]
    names, titles = differing(rows), [ROWS[row_of(flags)].title for flags in rows]
    titled = len(set(titles)) == len(rows) > 1
    cells = [[*[title] * titled, *(shown(flags.get(name)) for name in names)] for title, flags in zip(titles, rows)]
    groups = [[measured(*run) for run in group] for group in groups]
    table = error_table([*["row"] * titled, *map(option, names)], list(zip(cells, groups)), form)
    labels = titles if titled else [label(flags, names) for flags in rows]
    pairs = [[f"{labels[j]} less {labels[i]}", *found] for j in range(len(rows)) for i in range(j)
             if (found := paired(groups[j], groups[i]))]
    return table + (f"\n\n{form(['difference', *CONTRAST], pairs)}" if pairs else "")


def measured(flags, folder):
    """Returns what a run has measured, column -> text.  Raises UsageError if it is not finished."""
    if not (folder / RESULTS).exists():
        raise UsageError(f"{folder} holds a run that is not finished: continue it, or leave it out")
    results = read_results(folder)
    return texts({"seed": flags["seed"], **results["error_rate"], "labeled": results.get("labeled_error_rate"),
                  "seconds": results["seconds"]})


def as_csv(head, rows):
    """Returns a table as CSV; mean and standard deviation have a column each."""
    columns = []
    for name, *cells in zip(head, *rows):
        means, _, deviations = zip(*(cell.partition(" ± ") for cell in cells))
        columns.append([name, *means])
        if any(deviations):
            columns.append([f"{name}, standard deviation", *deviations])
    return csv_text(zip(*columns)).rstrip("\n")


def as_latex(head, rows):
    """Returns a table in LaTeX, which needs no package."""
    def escape(text):
        special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
                   "-": "-{}"}               # two would become a dash
        return re.sub(r"-(?=-)|[\\~^±&%$#_{}]", lambda match: special.get(match[0], f"\\{match[0]}"), text)

    lines = [" & ".join(map(escape, row)) + r" \\" for row in (head, *rows)]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline",
                      r"\end{tabular}"])


FORMS = {"markdown": markdown, "csv": as_csv, "latex": as_latex}
