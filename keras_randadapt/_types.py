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

#: A Matplotlib axis, which is not named since Matplotlib is optional.
Axis: TypeAlias = Any

#: What `get_config` returns and `from_config` takes.
Config: TypeAlias = dict[str, Any]

#: First values of a weight, by a name, a name with arguments, or by Keras.
Initializer: TypeAlias = str | dict[str, Any] | keras.initializers.Initializer

#: What Keras tells callbacks.
Logs: TypeAlias = dict[str, float] | None

#: A model's layers by their structural addresses.
Layers: TypeAlias = Mapping[str, keras.layers.Layer]

#: Gives the address in another model of the layer that has an address here.
Rename: TypeAlias = Callable[[str], str]

#: What Keras saves into and loads from.
Store: TypeAlias = Any
