"""Which of a run's backends a test meets, where it needs only one.

`tests/run_backends.py` runs the suite once a backend, and a test of NumPy code
or of a refusal would give the same answer three times. A test marked
`one_backend` runs on one backend of the run: on the one that the mark names, on
the one that the mark's number picks, or on one picked by a checksum of the
test's name. `day` moves every choice one backend further a day, so runs on
three days meet every backend.
"""

import re
import zlib

#: Refusals, round trips of configs and counts of weights are Python code before
#: any tensor, so what has such a name needs one backend without a mark.
NEEDS_ONE = re.compile(
    r"::(TestBad|TestArguments|TestErrors|TestPaperCount|TestReport|"
    r"test_bad_|test_config|test_counts$)"
)


def checksum(text):
    """A number that is the same in every process and on every machine."""
    return zlib.crc32(text.encode())


def backend_of(choice, name, backends, day=0):
    """The backend on which a test runs.

    Args:
        choice: What the mark says: a backend, a number, or None.
        name: str, the name of the test without its parameters. Cases of one
            function stay together, as they share what is compiled.
        backends: list of the backends of the run, in any order.
        day: int.

    Returns:
        One of `backends`. A named backend that is not part of the run is
        replaced by one that is.
    """
    backends = sorted(backends)
    if choice in backends:
        number = backends.index(choice)
    elif isinstance(choice, int):
        number = choice
    else:
        number = checksum(name)
    return backends[(number + day) % len(backends)]


def spread(cells, colors=3):
    """Numbers for the cells of a table, even over its rows and columns.

    Args:
        cells: list of `(row, column)`, those that matter most first.
        colors: int, the number of backends.

    Returns:
        A dict from cell to a number below `colors`. A row or column of at
        least `colors` cells has every number.
    """
    numbers = {}
    used = {}

    def count(line, number):
        return used.get((line, number), 0)

    for row, column in cells:
        lines = ("row", row), ("column", column), "all"
        start = checksum(f"{row}-{column}")

        def cost(number):
            in_row, in_column, overall = (count(x, number) for x in lines)
            return (
                # A number that a line lacks comes before any balance.
                (in_row > 0) + (in_column > 0),
                in_row + in_column,
                overall,
                (number - start) % colors,
            )

        number = min(range(colors), key=cost)
        numbers[row, column] = number
        for line in lines:
            used[line, number] = count(line, number) + 1
    return numbers
