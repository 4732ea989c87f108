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
from keras_randadapt.model import checks
from keras_randadapt.model import parts
from keras_randadapt.model import paths
from keras_randadapt.model import state as state_lib
from keras_randadapt.model import switch
from keras_randadapt.serving import bank_file
from keras_randadapt.serving import computation
from keras_randadapt.serving import generation
from keras_randadapt.serving import low_rank
from keras_randadapt.serving import requests
from keras_randadapt.serving import saved_model
from keras_randadapt.serving import shared as shared_lib
from keras_randadapt.serving import tenants
from keras_randadapt.serving.table import Table

Path = str | bytes | os.PathLike


class AdapterBank:
    """Adapters of many tenants on one model, in one batch.

    A tenant is an adapter file. With RLoRA, VeRA, IA3 and BitFit it is a few
    vectors, and all tenants share everything else. The weights of all tenants
    lie in the memory of the host; those of a batch travel with its inputs.

    All tenants of a bank share the method, the sites and, where the method has
    random bases, seed and configuration. LoRA's ranks and scalings may differ
    from tenant to tenant and from site to site: smaller ranks than the bank's
    are filled up. Each tenant has its own kept layers, which must be Dense
    layers. A head of fewer classes than the model's is filled up if it is the
    last layer: logits of absent classes are the lowest number of the dtype.

    The model belongs to the bank until `close`. It is thread-safe: each request
    sees one consistent state, and nothing is switched between requests.

    Args:
        model: A built Keras model without adapters. Examples must be the first
            axis of all its inputs.
        adapters: Optional dict from name to adapter file, or a folder whose
            `*.safetensors` files are the tenants, named by their stems.
        capacity: int, the number of tenants that the bank has room for. Memory
            is used as they are added.
        rank: Optional int, for LoRA: the largest rank of a tenant. By default
            it is that of the first one.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the model is adapted already or not built.

    Example:

    ```python
    kra.inject(model, kra.RLoRA(64), keep_trainable="logits")
    kra.save_adapter(model, "alice.safetensors")
    kra.eject(model)

    with kra.serving.AdapterBank(model, {"alice": "alice.safetensors"}) as bank:
        answers = bank.predict(x, adapters=["alice", None, None, "alice"])
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        adapters: Mapping[str, Path] | Path | None = None,
        *,
        capacity: int = 10_000,
        rank: int | None = None,
    ):
        checks.check_model(model)
        if state_lib.is_adapted(model) or parts.owner_of(model) is not None:
            raise ValueError(
                f"Model '{model.name}' has adapters attached. A bank needs the "
                "base model: call `keras_randadapt.eject(model)` first."
            )
        self.model = model
        self.capacity = arguments.check_rank(capacity, "capacity")
        self._rank = None if rank is None else arguments.check_rank(rank)
        # Requests take no lock but the table's, so they do not wait for files.
        self._lock = threading.RLock()
        self._shared: Any = None
        self._table = Table(self.capacity, np.zeros(0))
        self._compiled: Any = None
        self._generator: Any = None
        self._file: Any = None
        self._closed = False
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
        requests.check_name(name)
        read = tenants.read(paths.check_path(file))
        with self._lock:
            self._check_open()
            self._table.check_new(name)
            if self._shared is None:
                read = low_rank.first(read, self._rank)
                row, classes = self._open(read).own_row(read), read.classes
            else:
                row, classes = self._shared.row(read)
            self._table.add(name, row, classes)

    def remove(self, name: str) -> None:
        """Removes a tenant.

        Args:
            name: Its name.

        Raises:
            ValueError: If there is no such tenant.
        """
        with self._lock:
            self._check_open()
            self._table.remove(name)

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
                `"adapter"`. It may also be an iterable of such dicts, each a
                batch: a `tf.data.Dataset`, a `keras.utils.PyDataset` or a
                PyTorch `DataLoader`, for example.
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
        _, table = self._opened()
        return requests.predict(table, self._answer, x, adapters, batch_size)

    def __call__(
        self, x: Any, adapters: Sequence[str | None] | None = None
    ) -> Any:
        """Like `predict` for one batch, not compiled.

        Args:
            x: Inputs: tensors or arrays, whose first axis is that of examples.
                A dict may have the names in an entry `"adapter"`.
            adapters: See `predict`.

        Returns:
            Tensors like the outputs of `model(x)`.

        Raises:
            ValueError: See `predict`.
        """
        shared, table = self._opened()
        if adapters is None:
            x, adapters = requests.split(x)
        x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        names = requests.names_of(adapters, requests.examples(x))
        with table.kept() as kept:
            rows = kept.rows(names)
        return computation.outputs(
            self.model, shared.layout, x, keras.ops.convert_to_tensor(rows)
        )

    def generate(
        self, prompts: Any, adapters: Sequence[str | None], **arguments: Any
    ) -> Any:
        """Generates text, each prompt with its tenant's adapter.

        The whole batch runs in one loop, which is compiled as KerasHub compiles
        `generate` on the backend: once for each shape of a batch, and not for
        other tenants. The sampler is the one that `model.compile` was given.

        Args:
            prompts: What `generate` of the model takes: a list of strings, a
                dict of arrays, or a `tf.data.Dataset` of such batches.
            adapters: The tenants' names, one for each prompt. `None` or `""`
                is the base model.
            **arguments: Other arguments of the model's `generate`, such as
                `max_length`.

        Returns:
            What `generate` of the model returns.

        Raises:
            ValueError: If the model is no language model of KerasHub, if a
                name is unknown, or if there are not as many names as prompts.

        Example:

        ```python
        tenants = {"alice": "alice.safetensors"}
        with kra.serving.AdapterBank(causal_lm, tenants) as bank:
            bank.generate(["hello", "hello"], ["alice", None], max_length=16)
        ```
        """
        _, table = self._opened()
        return self._generator.generate(table, prompts, adapters, arguments)

    def classes(self, name: str) -> int | None:
        """The number of classes of a tenant's head, or `None` without one.

        Args:
            name: The tenant's name.

        Raises:
            ValueError: If there is no such tenant.
        """
        return self._table.tenant(name).classes

    @property
    def names(self) -> list[str]:
        """The tenants' names, in the order in which they were added."""
        return self._table.names

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def export(self, filepath: Path, input_signature: Any = None) -> None:
        """Writes the model and all tenants as one TensorFlow SavedModel.

        Its signature has one input more than the model: `adapter`, a string
        for each example, which is a tenant's name. The empty string is the base
        model. An unknown name is an error of an operation. TensorFlow alone
        runs it.

        Args:
            filepath: The folder to make.
            input_signature: Optional specs of the model's inputs, as in
                Keras's `Model.export`: a list or dict of `keras.InputSpec`. By
                default they are those of the model, whose lengths may be open.

        Raises:
            ValueError: On another backend than TensorFlow, if the bank has no
                tenant, or if the signature does not fit the model's inputs.
        """
        saved_model.check_backend()
        path = paths.check_path(filepath)
        shared, table = self._opened()
        specs = saved_model.specs_of(self.model, input_signature)
        with table.kept() as kept:
            names = list(kept.tenants)
            rows = kept.rows(["", *names])
        saved_model.write(path, self.model, shared.layout, names, rows, specs)

    def save(self, filepath: Path) -> None:
        """Saves all tenants in one file.

        It holds what their adapter files hold: nothing of the base model, and
        nothing that a seed rebuilds. It is written beside its destination and
        then moved there, so it is never incomplete. Requests go on meanwhile.

        Args:
            filepath: Path of the file, by convention `*.safetensors`.

        Raises:
            TypeError: If `filepath` is no path.
            ValueError: If the bank had no tenant yet, or if a file that is read
                lazily is damaged.
            OSError: If the file can't be written.

        Example:

        ```python
        with kra.serving.AdapterBank(model, "tenants") as bank:
            bank.save("bank.safetensors")
        ```
        """
        path = paths.check_path(filepath)
        shared, table = self._opened()
        with table.kept() as kept:
            bank_file.write(path, shared, kept)

    @classmethod
    def load(
        cls,
        filepath: Path,
        model: keras.Model,
        *,
        capacity: int | None = None,
        lazy: bool = False,
    ) -> Self:
        """Makes a bank of a file that `save` wrote, on any backend.

        It is as strict as `load_adapter` with `check_base="error"`.

        Args:
            filepath: Path of the file.
            model: The base model, without adapters.
            capacity: Optional int, the number of tenants that the bank has room
                for: by default 10,000, or those of the file if they are more.
            lazy: bool. Whether to read a tenant from the file when it is asked
                for first. The file is then open until `close`. A damaged
                tenant is an error for those who ask for it.

        Returns:
            An `AdapterBank`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, foreign or of a newer format, if
                the model is adapted or another than the file's, if its base
                weights are others, or if the capacity is too small. The model
                is then unchanged.

        Example:

        ```python
        with kra.serving.AdapterBank.load("bank.safetensors", model) as bank:
            print(bank.names)
        ```
        """
        file = bank_file.BankFile(paths.check_path(filepath))
        try:
            count = len(file.names)
            if capacity is None:
                capacity = max(10_000, count)
            bank = cls(model, capacity=capacity)
            if bank.capacity < count:
                raise ValueError(
                    f"'{file.path}' has {count} tenants. "
                    f"Received: capacity={capacity}"
                )
            first = file.first(state_lib.layers_of(model))
            try:
                bank._open(first, file.check)
                file.fill(bank._table, bank._shared, lazy)
            except BaseException:
                bank.close()
                raise
        except BaseException:
            file.close()
            raise
        if lazy:
            bank._file = file
        else:
            file.close()
        return bank

    def status(self) -> str:
        """A few lines about the bank: method, tenants and bytes."""
        lines = [f"AdapterBank on '{self.model.name}'"]
        lines.append(f"  tenants  {len(self):,} of {self.capacity:,}")
        shared = self._shared
        if shared is not None:
            row = 4 * shared.layout.size
            method = shared.first.metadata["adapter"]["class"]
            sites, heads = len(shared.built), len(shared.kept)
            lines += [
                f"  method   {method.rpartition('>')[2]}",
                f"  sites    {sites:,}, heads {heads:,}",
                f"  bytes    {row:,} a tenant, {row * len(self):,} in all",
            ]
            if self._file is not None:
                lines.append(f"  read     {self._table.read:,} tenants so far")
        return "\n".join(lines)

    def close(self) -> None:
        """Gives the model back as it was. The bank is empty then."""
        with self._lock:
            if not self._closed and state_lib.is_adapted(self.model):
                switch.eject(self.model)
            self._closed = True
            self._table = Table(self.capacity, np.zeros(0))
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self):
        if self._closed:
            raise ValueError("The bank is closed. Make a new one.")

    def _opened(self):
        """What the bank's tenants share, and the table of them."""
        self._check_open()
        if self._shared is None:
            raise ValueError("The bank has no tenant yet. Call `add`.")
        return self._shared, self._table

    def _open(self, file, check=None):
        """Attaches the adapter of the first file; the bank is empty then."""
        shared, table = shared_lib.attached(
            self.model, file, self.capacity, check
        )
        self._compiled = computation.compiled(self.model, shared.layout)
        self._generator = generation.Generator(self.model, shared.layout)
        self._shared, self._table = shared, table
        return shared

    def _answer(self, inputs, rows):
        """The outputs for one batch, as NumPy arrays."""
        return computation.as_numpy(self._compiled(inputs, rows))
