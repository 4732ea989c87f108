"""The table and the plot at the end of a comparison of training runs."""

HEADER = (
    "method",
    "validation accuracy",
    "adapter parameters",
    "bias parameters",
    "head parameters",
    "file",
    "seconds an epoch",
)


def format_table(header, rows):
    """Formats rows as text, with all but the first column aligned right.

    Args:
        header: A sequence of strings.
        rows: A list of sequences of strings, each as long as the header.

    Returns:
        A string of lines with an underlined header.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows)]

    def line(cells):
        first = cells[0].ljust(widths[0])
        others = (c.rjust(w) for c, w in zip(cells[1:], widths[1:]))
        return "  ".join([first, *others])

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def format_bytes(size):
    """A number of bytes with a unit, such as "512 B", "18.2 kB", "1.8 MB"."""
    if size < 1000:
        return f"{size} B"
    if size < 1000**2:
        return f"{size / 1000:.1f} kB"
    return f"{size / 1000**2:.1f} MB"


def table(runs):
    """The table of a list of `training.Run`."""
    rows = [
        (
            run.name,
            f"{100 * run.accuracy[-1]:.1f}%",
            f"{run.adapter_parameters:,}",
            f"{run.other_parameters:,}",
            f"{run.head_parameters:,}",
            format_bytes(run.file_bytes),
            f"{run.seconds_per_epoch:.1f}",
        )
        for run in runs
    ]
    return format_table(HEADER, rows)


def plot(runs, title, path):
    """Draws training loss and validation accuracy over epochs to a PNG.

    Args:
        runs: A list of `training.Run`.
        title: The title of the figure.
        path: The file to write.
    """
    # The figure is only written to a file, so no window system is needed.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), layout="constrained"
    )
    for run, marker in zip(runs, "os^Dv"):
        epochs = range(1, len(run.accuracy) + 1)
        parameters = run.adapter_parameters + run.other_parameters
        label = f"{run.name} ({parameters:,} parameters)"
        left.plot(epochs, run.loss, marker=marker, label=label)
        accuracy = [100 * value for value in run.accuracy]
        right.plot(epochs, accuracy, marker=marker, label=label)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_tasks(accuracies, path):
    """Draws the accuracies of methods on tasks as bars, with every seed.

    Args:
        accuracies: A dict from method to a dict from task to the list of the
            accuracies of all seeds.
        path: The file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(accuracies)
    for place, (method, tasks) in enumerate(accuracies.items()):
        lefts = [number + place * width for number in range(len(tasks))]
        means = [100 * sum(v) / len(v) for v in tasks.values()]
        axes.bar(lefts, means, 0.9 * width, label=method, alpha=0.7)
        for left, values in zip(lefts, tasks.values()):
            dots = [100 * value for value in values]
            axes.plot([left] * len(dots), dots, "k.", markersize=4)
    names = list(next(iter(accuracies.values())))
    middle = 0.4 - width / 2
    axes.set_xticks([n + middle for n in range(len(names))], names)
    lowest = min(
        100 * v for t in accuracies.values() for s in t.values() for v in s
    )
    axes.set(ylabel="validation accuracy (%)", ylim=(lowest - 5, None))
    axes.legend(ncols=len(accuracies), loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
