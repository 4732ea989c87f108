"""`AdapterBank`: many adapters of one model, each example with its own."""

import os
import threading
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Self

import keras
import numpy as np

from keras_randadapt import arguments
from keras_randadapt.model import attach
from keras_randadapt.model import build
from keras_randadapt.model import checks
from keras_randadapt.model import file_format
from keras_randadapt.model import load
from keras_randadapt.model import parts
from keras_randadapt.model import paths
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import switch
from keras_randadapt.serving import computation
from keras_randadapt.serving import layout as layout_lib
from keras_randadapt.serving import requests
from keras_randadapt.serving import saved_model
from keras_randadapt.serving import tenants
from keras_randadapt.serving.head import TenantHead

Path = str | bytes | os.PathLike


class AdapterBank:
    """Adapters of many tenants on one model, in one batch.

    A tenant is an adapter file. With RLoRA, VeRA, IA3 and BitFit it is a few
    vectors, and all tenants share everything else. The weights of all tenants
    lie in the memory of the host; those of a batch travel with its inputs.

    All tenants of a bank share the method, the sites and, where the method has
    random bases, seed and configuration. LoRA's ranks and scalings may differ:
    smaller ones than the first tenant's are filled up. Each tenant has its own
    kept layers, which must be Dense layers. A head of fewer classes than the
    model's is filled up if it is the last layer: logits of absent classes are
    the lowest number of the dtype.

    The model belongs to the bank until `close`. It is thread-safe: each request
    sees one consistent state, and nothing is switched between requests.

    Args:
        model: A built Keras model without adapters. Examples must be the first
            axis of all its inputs.
        adapters: Optional dict from name to adapter file, or a folder whose
            `*.safetensors` files are the tenants, named by their stems.
        capacity: int, the number of tenants that the bank has room for. Memory
            is used as they are added.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the model is adapted already or not built.

    Example:

    ```python
    kra.inject(model, kra.RLoRA(64), keep_trainable="logits")
    kra.save_adapter(model, "alice.safetensors")
    kra.eject(model)

    with kra.serving.AdapterBank(model, {"alice": "alice.safetensors"}) as bank:
        answers = bank.predict(x, adapters=["alice"] * len(x))
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        adapters: Mapping[str, Path] | Path | None = None,
        *,
        capacity: int = 10_000,
    ):
        checks.check_model(model)
        if state_lib.is_adapted(model) or parts.owner_of(model) is not None:
            raise ValueError(
                f"Model '{model.name}' has adapters attached. A bank needs the "
                "base model: call `keras_randadapt.eject(model)` first."
            )
        self.model = model
        self.capacity = arguments.check_rank(capacity, "capacity")
        self._lock = threading.RLock()
        self._names: dict[str, int] = {}
        self._classes: dict[str, int | None] = {}
        self._free: list[int] = []
        self._first: tenants.File | None = None
        self._closed = False
        self._table: Any = None
        for name, file in requests.listed(adapters).items():
            try:
                self.add(name, file)
            except BaseException:
                self.close()
                raise

    def add(self, name: str, file: Path) -> None:
        """Adds a tenant. Nothing is compiled.

        Args:
            name: The tenant's name, any string but the empty one.
            file: An adapter file.

        Raises:
            TypeError: If `name` is no string.
            ValueError: If the name is taken, the bank is full, or the file is
                damaged or not of an adapter that can share the bank. The bank
                is then unchanged.
            FileNotFoundError: If there is no such file.
        """
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string. Received: name={name!r}")
        if not name:
            raise ValueError(
                "`name` must not be empty: the empty name is the base model's."
            )
        read = tenants.File(paths.check_path(file))
        with self._lock:
            self._check_open()
            if name in self._names:
                raise ValueError(
                    f"The bank has a tenant called {name!r} already. Call "
                    "`remove` first."
                )
            if len(self._names) >= self.capacity:
                raise ValueError(
                    f"The bank is full: its capacity is {self.capacity}. "
                    f"Received: name={name!r}"
                )
            row = self._row_of(read)
            if self._free:
                place = self._free.pop()
            else:
                place = len(self._names) + 1
            self._table[place] = row
            self._classes[name] = read.classes
            self._names = {**self._names, name: place}

    def remove(self, name: str) -> None:
        """Removes a tenant.

        Args:
            name: Its name.

        Raises:
            ValueError: If there is no such tenant.
        """
        with self._lock:
            self._check_open()
            self._check_known(name)
            names = dict(self._names)
            place = names.pop(name)
            del self._classes[name]
            self._names = names
            self._free.append(place)

    def predict(
        self,
        x: Any,
        adapters: Sequence[str | None] | None = None,
        *,
        batch_size: int = 32,
    ) -> Any:
        """The model's outputs, each example with its tenant's adapter.

        Args:
            x: Inputs: an array, or a list or dict of arrays, whose first axis
                is that of examples. A dict may have the names in an entry
                `"adapter"`. It may also be an iterable of batches of such
                dicts, a `tf.data.Dataset` for example.
            adapters: The tenants' names, one for each example. `None` or `""`
                is the base model.
            batch_size: int, the number of examples that are computed at once.

        Returns:
            NumPy arrays like the outputs of `model.predict`.

        Raises:
            ValueError: If a name is unknown, or if there are not as many names
                as examples.
        """
        batch_size = arguments.check_rank(batch_size, "batch_size")
        if adapters is None and not isinstance(x, Mapping):
            pairs = [requests.split(batch) for batch in x]
            batches = [self._predict(b, n, batch_size) for b, n in pairs]
            if not batches:
                raise ValueError("There is no example to compute anything for.")
        elif adapters is None:
            inputs, names = requests.split(x)
            batches = [self._predict(inputs, names, batch_size)]
        else:
            batches = [self._predict(x, adapters, batch_size)]
        return keras.tree.map_structure(lambda *a: np.concatenate(a), *batches)

    def __call__(self, x: Any, adapters: Sequence[str | None]) -> Any:
        """Like `predict` for one batch, not compiled.

        Args:
            x: Inputs: tensors or arrays, whose first axis is that of examples.
            adapters: See `predict`.

        Returns:
            Tensors like the outputs of `model(x)`.

        Raises:
            ValueError: See `predict`.
        """
        x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        rows = self._rows(adapters, requests.examples(x))
        return computation.outputs(
            self.model, self._layout, x, keras.ops.convert_to_tensor(rows)
        )

    def classes(self, name: str) -> int | None:
        """The number of classes of a tenant's head, or `None` without one.

        Args:
            name: The tenant's name.

        Raises:
            ValueError: If there is no such tenant.
        """
        with self._lock:
            self._check_known(name)
            return self._classes[name]

    @property
    def names(self) -> list[str]:
        """The tenants' names, in the order in which they were added."""
        return list(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def export(self, filepath: Path) -> None:
        """Writes the model and all tenants as one TensorFlow SavedModel.

        Its signature has one input more than the model: `adapter`, a string
        for each example, which is a tenant's name. The empty string is the base
        model. An unknown name is an error of an operation. TensorFlow alone
        runs it.

        Args:
            filepath: The folder to make.

        Raises:
            ValueError: On another backend than TensorFlow, or if the bank has
                no tenant.
        """
        saved_model.check_backend()
        path = paths.check_path(filepath)
        with self._lock:
            self._check_open()
            if self._first is None:
                raise ValueError("The bank has no tenant yet. Call `add`.")
            names = list(self._names)
            table = self._table[[0, *(self._names[name] for name in names)]]
            saved_model.write(path, self.model, self._layout, names, table)

    def status(self) -> str:
        """A few lines about the bank: method, tenants and bytes."""
        lines = [f"AdapterBank on '{self.model.name}'"]
        lines.append(f"  tenants  {len(self):,} of {self.capacity:,}")
        if self._first is not None:
            row = 4 * self._layout.size
            method = self._first.metadata["adapter"]["class"]
            lines += [
                f"  method   {method.rpartition('>')[2]}",
                f"  sites    {len(self._built):,}, heads {len(self._kept):,}",
                f"  bytes    {row:,} a tenant, {row * len(self):,} in all",
            ]
        return "\n".join(lines)

    def close(self) -> None:
        """Gives the model back as it was. The bank is empty then."""
        with self._lock:
            if not self._closed and state_lib.is_adapted(self.model):
                switch.eject(self.model)
            self._closed = True
            self._names = {}
            self._table = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self):
        if self._closed:
            raise ValueError("The bank is closed. Make a new one.")

    def _check_known(self, name):
        if name not in self._names:
            raise ValueError(
                f"The bank has no tenant called {name!r}. It has "
                f"{len(self._names)}: {list(self._names)[:5]}."
            )

    def _predict(self, x, adapters, batch_size):
        adapters = list(adapters)
        count = requests.examples(x)
        requests.check_count(adapters, count)
        found = []
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            inputs = keras.tree.map_structure(lambda a: np.asarray(a)[part], x)
            rows = self._rows(adapters[part], len(adapters[part]))
            missing = batch_size - len(rows) if start else 0
            if missing:
                # The last batch is filled up, so that it is not compiled for
                # its own size.
                inputs = keras.tree.map_structure(
                    lambda a: np.concatenate([a, a[:1].repeat(missing, 0)]),
                    inputs,
                )
                rows = np.pad(rows, ((0, missing), (0, 0)))
            out = computation.as_numpy(self._compiled(inputs, rows))
            if missing:
                out = keras.tree.map_structure(lambda a: a[:-missing], out)
            found.append(out)
        return keras.tree.map_structure(lambda *a: np.concatenate(a), *found)

    def _rows(self, adapters, count):
        """The weights of each example: float32 `(examples, size)`."""
        adapters = list(adapters)
        requests.check_count(adapters, count)
        with self._lock:
            self._check_open()
            places = self._places(adapters)
            if self._first is None:
                raise ValueError("The bank has no tenant yet. Call `add`.")
            # A place can't be given to another tenant meanwhile.
            return self._table[places]

    def _places(self, names):
        places, unknown = [], []
        for name in names:
            if isinstance(name, bytes):
                name = name.decode()
            if name is None or name == "":
                places.append(0)
            elif name in self._names:
                places.append(self._names[name])
            else:
                unknown.append(name)
        if unknown:
            raise ValueError(
                f"The bank has no tenants called {unknown[:5]}. It has "
                f"{len(self._names)}: {list(self._names)[:5]}."
            )
        return places

    def _row_of(self, file):
        """The weights of a file as a row; the first file attaches."""
        if self._first is None:
            return self._open(file)
        for address in self._kept:
            if address == self._last:
                file.fill_up(address, self._layers[address])
        tenants.check_alike(self._first, file)
        tenants.check_base(file, self._first)
        return self._layout.row(self._values(file))

    def _values(self, file):
        return tenants.values(
            file, self._template, self._built, self._layers, self._kept
        )

    def _open(self, file):
        """Attaches the adapter of the first file, and heads."""
        model = self.model
        layers = state_lib.layers_of(model)
        last = tenants.last_dense(model, file.metadata["kept"], layers)
        if last is not None:
            file.fill_up(last, layers[last])
        loading = load.checked(
            model,
            file.path,
            layout_lib.ADAPTER,
            content=(file.tensors, file.metadata),
        )
        attachment = loading.attachment
        kept, built = attachment.kept, attachment.built
        tenants.check_method(
            file.path, attachment.template, layers, list(built), kept
        )
        if any(loading.rename(key) != key for key in file.metadata["kept"]):
            raise ValueError(
                f"'{file.path}' is of a part of this model or of a larger one. "
                "Make the bank of the model that the adapter was trained on."
            )
        heads = build.build_adapters(
            TenantHead(), layout_lib.HEADS, layers, kept, {}
        )
        self._template, self._built = attachment.template, built
        self._layers, self._kept, self._last = layers, kept, last
        values = self._values(file)
        self._layout = layout_lib.Layout(
            [(key, name, np.shape(v)) for (key, name), v in values.items()]
        )
        table = np.zeros((self.capacity + 1, self._layout.size), "float32")
        # Files of version 1 do not tell their base weights.
        told = file_format.BASE_KEY in file.tensors
        with attach.changing(model) as change:
            attach.attach(change, tenants.attachment(attachment, built))
            loading.check_base_weights("error" if told else "warn")
            if heads:
                attach.attach(
                    change, tenants.attachment(attachment, heads, TenantHead())
                )
                names = (layout_lib.ADAPTER, layout_lib.HEADS)
                attach.activate(change, names, train=())
                attach.refresh(change)
            for address in [*built, *heads]:
                change.set(layers[address].adapter, "per_example", True)
            table[0] = self._base_row(values)
        self._table = table
        self._compiled = computation.compiled(model, self._layout)
        self._first = file
        return self._layout.row(values)

    def _base_row(self, values):
        """The row with which the model computes as the base model does."""
        base = {}
        for address, adapter in self._built.items():
            for weight in adapter.stored_weights():
                key = (address, layout_lib.ADAPTER), weight.name
                # An adapter that was just built changes nothing.
                base[key] = keras.ops.convert_to_numpy(weight)
        for address in self._kept:
            layer = self._layers[address]
            key = address, layout_lib.HEADS
            kernel = keras.ops.convert_to_numpy(layer.kernel)
            base[key, "kernel"] = layer.to_view(kernel)
            if layer.bias is not None:
                base[key, "bias"] = keras.ops.convert_to_numpy(layer.bias)
        return self._layout.row({key: base[key] for key in values})
