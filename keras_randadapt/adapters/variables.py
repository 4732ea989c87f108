"""`AdapterVariables`: how an adapter creates, shares and stores variables."""

import contextlib
import contextvars
import hashlib
import json
import math
from typing import Any
from typing import TypeVar

import keras
import numpy as np
from keras import ops

from keras_randadapt import _compat
from keras_randadapt._types import Initializer
from keras_randadapt._types import Store
from keras_randadapt._types import Tensor
from keras_randadapt.adapters import stacked
from keras_randadapt.ops.sparse import dense
from keras_randadapt.sites.site import Site

# A basis of `keras_randadapt.bases`, or one like them.
_Basis = TypeVar("_Basis", bound=Any)

# The variables that the adapters built in a `shared_bases` block share, by a
# key that describes their content.
_shared = contextvars.ContextVar("keras_randadapt_shared_bases", default=None)

# How many stored values the adapter that is being built may have, how many it
# has so far, and how many a file holds for all sites: a list of three ints.
# `None` where there is no limit.
_limit = contextvars.ContextVar("keras_randadapt_limit", default=None)


@contextlib.contextmanager
def shared_bases():
    """Adapters that are built in this block share equal frozen variables.

    Each injection has its own block, and nothing is shared between blocks: if
    two models shared a variable, JAX's trainer would donate it twice.
    """
    before = _shared.get()
    try:
        _shared.set({})
        yield
    finally:
        _shared.set(before)


@contextlib.contextmanager
def at_most(count, total=None):
    """An adapter that is built in this block may store only so many values.

    The config of a file may claim a rank of millions. The weights in the file
    bound what is built for it: a method adds its trainable weights before it
    draws its bases, and a weight beyond the limit is an error before it is
    made.

    Args:
        count: int, the number of values that the file holds for the adapter,
            or `None` for no limit.
        total: int, the number that it holds for all sites.
    """
    before = _limit.get()
    try:
        _limit.set(None if count is None else [count, 0, total])
        yield
    finally:
        _limit.set(before)


class SharedVariable:
    """A reference to another adapter's variable, which Keras does not track.

    Attributes:
        variable: The `keras.Variable`.
    """

    def __init__(self, variable: keras.Variable):
        self.variable = variable


class AdapterVariables(keras.layers.Layer):
    """The part of an `Adapter` that makes and keeps its variables.

    A subclass has an attribute `seed`, which determines the first values.
    """

    def __init__(self, *, dtype: str, name: str | None):
        super().__init__(dtype=dtype, name=name)
        self.step_counter = None
        #: The `Site` that the adapter is built for; `None` for a template.
        self.site: Site = None
        #: The weights that have an axis of experts in front.
        self.stacked_weights: tuple[keras.Variable, ...] = ()
        self._frozen_names: tuple[str, ...] = ()
        self._derived_names: tuple[str, ...] = ()

    def add_trainable(
        self,
        name: str,
        shape: tuple[int, ...],
        initializer: Initializer,
        regularizer: keras.regularizers.Regularizer | None = None,
        apart: bool = True,
    ) -> keras.Variable:
        """A trainable weight whose first values are equal on every backend.

        Where kernels are stacked, each of them has a weight of its own, and
        the variable has an axis for them in front.

        Args:
            name: string.
            shape: tuple of ints.
            initializer: A name that `initial_values` knows, a dict
                `{"name": ..., **arguments}` for it, or any Keras initializer
                (whose values differ from backend to backend).
            regularizer: Optional Keras regularizer. Its penalty on the weight
                is among the model's losses while the adapter is trained.
        """
        stack = self.site.stack if apart else None
        self._check_limit(name, (stack or 1, *shape))
        initializer = stacked.first_values(
            initializer, self.seed, f"{self.site.address}/{name}", shape, stack
        )
        if stack is not None:
            shape = (stack, *shape)
            regularizer = regularizer and stacked.Penalty(regularizer)
        weight = self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            # Products cast explicitly, because autocasting would also round
            # the delta that is merged in float32.
            autocast=False,
            regularizer=regularizer,
        )
        if stack is not None:
            self.stacked_weights += (weight,)
        return weight

    def add_frozen(self, name: str, basis: _Basis) -> _Basis:
        """Keeps the values of a random basis in a variable that no file has.

        The values are a variable because every executable would have its own
        copy of a constant. Adapters of one injection with equal bases share
        the variable.

        Args:
            name: string. The variable is the attribute `<name>_values`.
            basis: A basis of `keras_randadapt.bases`. Its products use the
                variable from then on. A basis without values is not changed.

        Returns:
            `basis`.
        """
        if not hasattr(basis, "bind"):
            return basis
        shared = _shared.get()
        variable = None if shared is None else shared.get(basis.key)
        if variable is None:
            variable = self._frozen_variable(
                name, basis.values, basis.shape, basis.dtype
            )
            if shared is not None:
                shared[basis.key] = variable
        self._keep_frozen(name, variable)
        basis.bind(variable)
        return basis

    def add_frozen_values(self, name: str, values: np.ndarray) -> None:
        """Keeps frozen random values of this site in a variable.

        Args:
            name: string. The variable is the attribute `<name>_values`.
            values: NumPy array that a seed determines. No file has it.
        """
        variable = self._frozen_variable(
            name, lambda: values, values.shape, str(values.dtype)
        )
        self._keep_frozen(name, variable)

    def _check_limit(self, name, shape):
        """Raises `ValueError` if a file does not hold a weight's values."""
        limit = _limit.get()
        if limit is None:
            return
        allowed, so_far, _ = limit
        limit[1] = so_far + math.prod(shape)
        if limit[1] > allowed:
            raise ValueError(
                f"its weight '{name}' would have the shape {tuple(shape)}, and "
                f"the file holds {allowed - so_far} values for it."
            )

    def _check_frozen_limit(self, name, shape):
        """Raises `ValueError` if a basis is out of proportion to a file."""
        limit = _limit.get()
        if limit is None:
            return
        kernel = self.site.input_dim * self.site.output_dim
        # A basis has a dimension of the kernel, one that trained weights have
        # too, at this site or another, and at most one more of the kernel.
        if math.prod(shape) > 4 * max(limit[2], 1) * max(kernel, 1):
            raise ValueError(
                f"its basis '{name}' would have the shape {tuple(shape)}, and "
                f"the file holds {limit[2]} values."
            )

    def _frozen_variable(self, name, values, shape, dtype):
        self._check_frozen_limit(name, shape)

        def initializer(shape, dtype=None):
            return ops.convert_to_tensor(values(), dtype=dtype)

        return self.add_weight(
            name=f"{name}_values",
            shape=shape,
            dtype=dtype,
            initializer=initializer,
            trainable=False,
            autocast=False,
        )

    def _keep_frozen(self, name, variable):
        setattr(self, f"{name}_values", variable)
        self._frozen_names += (f"{name}_values",)

    def add_shared_trainable(
        self, name: str, shape: tuple[int, ...], initializer: Initializer
    ) -> SharedVariable:
        """A trainable weight that all adapters of one injection share.

        The first of them owns it, so files hold it once.

        Args:
            name: string.
            shape: tuple of ints.
            initializer: See `add_trainable`.

        Returns:
            A `SharedVariable`.
        """
        shared = _shared.get()
        key = f"trainable {name}"
        variable = None if shared is None else shared.get(key)
        if variable is None:
            variable = self.add_trainable(name, shape, initializer, apart=False)
            if shared is not None:
                shared[key] = variable
        return SharedVariable(variable)

    def add_derived(
        self, name: str, shape: tuple[int, ...], dtype: str = "float32"
    ) -> keras.Variable:
        """A variable for values that `start_from` derives.

        Keras's files hold it; adapter files do not.
        """
        self._derived_names += (name,)
        stack = self.site.stack
        weight = self.add_weight(
            name=name,
            shape=shape if stack is None else (stack, *shape),
            dtype=dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
        )
        if stack is not None:
            self.stacked_weights += (weight,)
        return weight

    def _prepare_dropout(self) -> None:
        # Each site has its own state, because every site of a model is called
        # in each step and one state would give all sites related masks.
        text = f"dropout/{self.seed}/{self.site.address}"
        key = hashlib.sha256(text.encode()).digest()
        self.dropout_seed_generator = keras.random.SeedGenerator(
            int.from_bytes(key[:4], "little") % 2**31
        )

    def drop(self, x: Any, training: bool | None) -> Any:
        """Dropout of the delta's inputs; sparse ones are made dense."""
        if not self.dropout or not training:
            return x
        return keras.random.dropout(
            dense(x), self.dropout, seed=self.dropout_seed_generator
        )

    def add_step_counter(self) -> None:
        """Adds a counter of training steps, for methods that draw in each.

        The adapted model increments it once in each training call, before any
        layer computes. All adapters of one injection therefore see one number
        throughout a step, even if their site is called several times. The
        count is state like that of dropout: Keras's files hold it; adapter
        files do not.
        """
        shared = _shared.get()
        key = "step counter"
        counter = None if shared is None else shared.get(key)
        if counter is None:
            counter = self.add_weight(
                name="step_counter",
                shape=(),
                dtype="int32",
                initializer="zeros",
                trainable=False,
                autocast=False,
            )
            if shared is not None:
                shared[key] = counter
        self.step_counter = counter

    def training_step(self) -> Tensor:
        """The number of training calls so far: an int32 scalar tensor."""
        return ops.convert_to_tensor(self.step_counter)

    def frozen_weights(self) -> list[keras.Variable]:
        """The variables of frozen bases, of this adapter and inner ones."""
        return [
            getattr(layer, name)
            for layer in _compat.flatten_layers(self)
            if isinstance(layer, AdapterVariables)
            for name in layer._frozen_names
        ]

    def stored_weights(self) -> list[keras.Variable]:
        """The weights that adapter files hold.

        These are all weights except bases, step counters and those derived
        from the kernel. This and `frozen_weights` are methods, because Keras's
        saving would walk into lists that properties return.
        """
        left_out = {id(variable) for variable in self.frozen_weights()}
        for layer in _compat.flatten_layers(self):
            if isinstance(layer, AdapterVariables):
                left_out.add(id(layer.step_counter))
                left_out.update(
                    id(getattr(layer, name)) for name in layer._derived_names
                )
        return [w for w in self.weights if id(w) not in left_out]

    def has_derived(self) -> bool:
        """Whether `start_from` derives variables from the base kernel."""
        return any(
            layer._derived_names
            for layer in _compat.flatten_layers(self)
            if isinstance(layer, AdapterVariables)
        )

    def description(self) -> dict[str, Any]:
        """What the adapter is, for Keras's weights files.

        Two adapters with equal descriptions have weights of one meaning.
        """
        # A round trip through JSON makes tuples of a config lists, as a file's.
        return json.loads(
            json.dumps(
                {
                    "name": self.name,
                    "address": self.site.address,
                    "class": keras.saving.get_registered_name(type(self)),
                    "config": self.get_config(),
                    "bases": self.basis_digest(),
                },
                sort_keys=True,
            )
        )

    def basis_digest(self) -> str:
        """A short hash of the frozen bases, or `""` where there are none."""
        return ""

    def derived_digest(self) -> str:
        """A short hash of choices that `start_from` made, or `""`.

        An adapter file is refused where it differs. It is for choices that no
        rounding of the base kernel may change.
        """
        return ""

    def save_own_variables(self, store: Store) -> None:
        for i, variable in enumerate(self._own_stored_variables()):
            store[str(i)] = variable
        text = json.dumps(self.description(), sort_keys=True)
        store["description"] = np.frombuffer(text.encode(), "uint8")

    def load_own_variables(self, store: Store) -> None:
        # A file of the model without adapters has no variables here, and it
        # must still load.
        keys = set(store.keys())
        if not keys:
            return
        if "description" in keys:
            self._check_description(store["description"])
        variables = self._own_stored_variables()
        if len(keys - {"description"}) != len(variables):
            raise ValueError(
                f"The file holds {len(keys)} variables for the "
                f"adapter '{self.path}', which has {len(variables)}: "
                f"{[v.name for v in variables]}. It was written with another "
                "adapter on this layer."
            )
        for i, variable in enumerate(variables):
            variable.assign(store[str(i)])

    def _check_description(self, stored):
        """Raises `ValueError` if a file's adapter is another one.

        `model.weights_file` compares whole models before anything is loaded.
        This is for files of a part of a model, and for `skip_mismatch`.
        """
        theirs = json.loads(bytes(np.asarray(stored, "uint8")))
        ours = self.description()
        for key in ("class", "config", "bases"):
            if theirs.get(key) != ours[key]:
                raise ValueError(
                    f"The file holds the weights of another adapter than "
                    f"'{self.path}': its {key} is {theirs.get(key)!r} in the "
                    f"file, and {ours[key]!r} here."
                )

    def _own_stored_variables(self):
        frozen = {id(getattr(self, name)) for name in self._frozen_names}
        own = _compat.owned_variables(self)
        return [v for v in own if id(v) not in frozen]
