"""The shapes of a checkpoint of transformers, whose numbers are not read."""

import os

from keras_randadapt.peft import directory as directory_lib

_ENDING = ".safetensors"


class Checkpoint:
    """The names and shapes of the tensors of a checkpoint.

    Args:
        path: A safetensors file, or a directory that has some.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is damaged.
    """

    def __init__(self, path):
        self.path = directory_lib.check_path(path)
        folder, names = os.path.split(self.path)[0], []
        if os.path.isdir(self.path):
            folder = self.path
            names = sorted(
                one for one in os.listdir(folder) if one.endswith(_ENDING)
            )
            if not names:
                raise FileNotFoundError(
                    f"There is no '*{_ENDING}' in '{folder}', so it is no "
                    "checkpoint of a base model."
                )
        else:
            names = [os.path.basename(self.path)]
        self.shapes = {}
        for name in names:
            header = directory_lib.read_header(folder or ".", name)
            self.shapes.update({k: shape for k, (_, shape) in header.items()})

    def weight_shape(self, module, transposed=False, outputs=None):
        """The shape of a linear layer's weight, with its outputs first.

        Args:
            module: The module's name, with or without the prefix of a task
                class.
            transposed: Whether weights have their inputs first, as GPT-2's.
            outputs: The number of outputs, if it is known.

        Raises:
            ValueError: If the checkpoint has no weight of this name, or
                several that it may be, or one of another shape.
        """
        wanted = f"{module}.weight"
        keys = [key for key in self.shapes if key == wanted] or [
            key
            for key in self.shapes
            if key.endswith(f".{wanted}")
            or ("." in key and wanted.endswith(f".{key}"))
        ]
        if len(keys) != 1:
            raise ValueError(
                f"The checkpoint '{self.path}' has {len(keys)} tensors that "
                f"may be the weight of the module '{module}'"
                + (f": {keys[:5]}." if keys else ".")
                + " Give the checkpoint that the adapter was trained on."
            )
        shape = self.shapes[keys[0]]
        if len(shape) != 2 or outputs not in (None, *shape):
            raise ValueError(
                f"The checkpoint '{self.path}' has '{keys[0]}' of shape "
                f"{shape}, which is no weight of a linear layer"
                + (f" with {outputs} outputs." if outputs else ".")
                + " Give the checkpoint that the adapter was trained on."
            )
        if outputs is not None:
            transposed = shape[0] != outputs
        return shape[::-1] if transposed else shape
