"""A checkpoint of transformers: its names, shapes and numbers."""

import os

from keras_randadapt.peft import directory as directory_lib

_ENDING = ".safetensors"

#: The files beside the weights that a server needs, if they are there.
_BESIDE = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


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
        self.folder = folder or "."
        self._names = names
        self.shapes = {}
        for name in names:
            header = directory_lib.read_header(self.folder, name)
            self.shapes.update({k: shape for k, (_, shape) in header.items()})

    def config(self):
        """The content of `config.json`, which must be there."""
        return directory_lib.read_config(self.folder, "config.json")

    def tensors(self):
        """dict from name to array; numbers that are no integers in float32."""
        found = {}
        for name in self._names:
            found.update(
                directory_lib.read_tensors(self.folder, name, integers=True)
            )
        return found

    def beside(self):
        """dict from the names of files of the tokenizer to their bytes."""
        found = {}
        for name in _BESIDE:
            path = os.path.join(self.folder, name)
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    found[name] = file.read()
        return found

    def key(self, name, prefix):
        """The name of a tensor here, with or without a prefix, or `None`.

        Args:
            name: The tensor's name, with or without the prefix.
            prefix: The name under which task classes hold the base model.
        """
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return next((one for one in names if one in self.shapes), None)

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
