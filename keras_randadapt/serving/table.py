"""`Table`: the rows of all tenants of a bank, by name."""

import contextlib
import dataclasses
import difflib
import functools
import threading

import numpy as np

# Names are compared one by one for a suggestion, which takes long for many.
_NAMES_TO_COMPARE = 20_000

# Rows beyond the capacity, for tenants that come while others that went are
# still read.
_SPARE = 64


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Where a tenant is in a `Table`.

    Attributes:
        place: int, the number of its row.
        classes: int, the classes of its own head, or `None` without one.
    """

    place: int
    classes: int | None


class Kept:
    """The tenants of one moment, whose rows stay as they are; see `Table.kept`.

    Attributes:
        tenants: dict from name to `Tenant`.
    """

    def __init__(self, table, tenants):
        self._table = table
        self.tenants = tenants

    def check(self, names):
        """Raises `ValueError` if a name is unknown; `""` is the base model."""
        unknown = dict.fromkeys(n for n in names if n and n not in self.tenants)
        if unknown:
            raise ValueError(_unknown(list(unknown), list(self.tenants)))

    def rows(self, names):
        """The rows of tenants.

        Args:
            names: list of known names, of which `""` is the base model.

        Returns:
            float32 array `(len(names), size)`.
        """
        self.check(names)
        places = [self.tenants[name].place if name else 0 for name in names]
        return self._table.gathered(places)


class Table:
    """Rows in the memory of the host. Threads may use it at once.

    Args:
        capacity: int, the number of tenants that it has room for. Memory is
            used as they are added.
        base: float32 vector, the row of the base model.
    """

    def __init__(self, capacity, base):
        self.capacity = capacity
        self._places = capacity + _SPARE
        self._rows = np.zeros((self._places + 1, len(base)), "float32")
        self._rows[0] = base
        # The dict is replaced and never changed, so readers take no copy.
        self._tenants = {}
        self._free = []
        self._used = 0
        self._changed = threading.Condition(threading.RLock())
        # Functions that read the rows of tenants which nobody asked for yet.
        self._unread = {}
        # Each removal has a number. A keeper is known by that of the removal
        # before it, and holds the places of those after it.
        self._removals = 0
        self._keepers = []
        self._held = []

    def __len__(self):
        return len(self._tenants)

    def __contains__(self, name):
        return name in self._tenants

    @property
    def names(self):
        return list(self._tenants)

    def check_new(self, name):
        """Raises `ValueError` if no tenant of this name can be added."""
        if name in self._tenants:
            raise ValueError(
                f"The bank has a tenant called {name!r} already. Call "
                "`remove` first."
            )
        if len(self._tenants) >= self.capacity:
            raise ValueError(
                f"The bank is full: its capacity is {self.capacity}. "
                f"Received: name={name!r}"
            )

    def add(self, name, row, classes):
        with self._changed:
            self.check_new(name)
            place = self._new_place()
            self._unread.pop(place, None)
            self._rows[place] = row
            self._tenants = {**self._tenants, name: Tenant(place, classes)}

    def add_file(self, names, classes, parts=None, read=None):
        """Adds the tenants of a file to an empty table.

        Args:
            names: list of names, no more than the capacity.
            classes: list of their classes; see `Tenant`.
            parts: Iterable of pairs of a start and an array of rows.
            read: Instead of `parts`, a function that gives the row of a
                tenant's number when somebody asks for it.
        """
        with self._changed:
            for start, rows in parts or ():
                self._rows[start + 1 : start + 1 + len(rows)] = rows
            if read is not None:
                self._unread = {
                    i + 1: functools.partial(read, i) for i in range(len(names))
                }
            self._used = len(names)
            self._tenants = {
                name: Tenant(i + 1, count)
                for i, (name, count) in enumerate(zip(names, classes))
            }

    def gathered(self, places):
        """The rows at some places, which somebody keeps; see `kept`."""
        if self._unread:
            with self._changed:
                for place in {*places} & self._unread.keys():
                    self._rows[place] = self._unread[place]()
                    del self._unread[place]
        return self._rows[places]

    @property
    def read(self):
        """The number of tenants whose rows are in memory."""
        places = {tenant.place for tenant in self._tenants.values()}
        return len(places - {*self._unread})

    def remove(self, name):
        with self._changed:
            place = self.tenant(name).place
            self._tenants = {
                n: t for n, t in self._tenants.items() if n != name
            }
            self._removals += 1
            self._held.append((self._removals, place))
            self._free_places()

    def tenant(self, name):
        """The `Tenant` of a name; raises `ValueError` if there is none."""
        tenants = self._tenants
        if name not in tenants:
            raise ValueError(_unknown([name], list(tenants)))
        return tenants[name]

    @contextlib.contextmanager
    def kept(self):
        """Within this block, the rows of today's tenants stay as they are.

        Yields:
            A `Kept`.
        """
        with self._changed:
            since = self._removals
            self._keepers.append(since)
            tenants = self._tenants
        try:
            yield Kept(self, tenants)
        finally:
            with self._changed:
                self._keepers.remove(since)
                self._free_places()

    def _free_places(self):
        """Frees the places of tenants that nobody keeps any more."""
        oldest = min(self._keepers, default=self._removals)
        self._free += [place for n, place in self._held if n <= oldest]
        self._held = [(n, place) for n, place in self._held if n > oldest]
        self._changed.notify_all()

    def _new_place(self):
        while not self._free and self._used >= self._places:
            # All free places are those of tenants that somebody still reads.
            self._changed.wait()
        if self._free:
            return self._free.pop()
        self._used += 1
        return self._used


def _unknown(wanted, names):
    text = f"The bank has no tenant called {wanted[0]!r}. "
    if len(wanted) > 1:
        text = f"The bank has no tenants called {wanted[:5]}. "
    if len(names) <= 5:
        return f"{text}It has {len(names)}: {names}."
    close = difflib.get_close_matches(
        str(wanted[0]), names[:_NAMES_TO_COMPARE], 3
    )
    if close:
        return f"{text}Did you mean one of {close}? It has {len(names)}."
    return f"{text}It has {len(names)}, such as {names[:3]}."
