"""Types that annotations of the whole package share.

Tensors of TensorFlow, JAX and PyTorch, Keras's variables and its symbolic
tensors have no type in common, and a backend need not be installed. `Tensor`
therefore checks nothing: it tells the reader what is meant.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import TypeAlias

import keras

#: A tensor of the backend, a variable or a symbolic Keras tensor.
Tensor: TypeAlias = Any

#: Arrays or tensors in any nest, or whatever else `keras.Model.fit` takes.
Data: TypeAlias = Any

#: A Matplotlib axis. Its class is not named, since Matplotlib is optional.
Axis: TypeAlias = Any

#: A config, which `get_config` returns and `from_config` takes.
Config: TypeAlias = dict[str, Any]

#: The initializer of a weight: a name, a name with arguments, or Keras's own.
Initializer: TypeAlias = str | dict[str, Any] | keras.initializers.Initializer

#: The logs that Keras gives to callbacks.
Logs: TypeAlias = dict[str, float] | None

#: A model's layers by their structural addresses.
Layers: TypeAlias = Mapping[str, keras.layers.Layer]

#: A function from a layer's address to its address in another model.
Rename: TypeAlias = Callable[[str], str]

#: The store into which Keras saves variables and from which it loads them.
Store: TypeAlias = Any
