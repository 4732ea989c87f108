"""Per-example gradients in PyTorch: `torch.func`'s `vmap` of `grad`."""

import contextlib

import keras
import numpy as np
import torch


def strategies(loss):
    """`(name, function of a chunk and a scale)` pairs, the fastest first."""

    def all_at_once(chunk, scale):
        def gradient(values, example):
            return torch.func.grad(
                lambda values: loss(values, [], example, float(scale))
            )(values)

        with _evaluating(loss.model), torch.no_grad(), _plain_attention():
            gradients = torch.func.vmap(gradient, in_dims=(None, 0))(
                _values(loss), _tensors(chunk)
            )
        return [keras.ops.convert_to_numpy(g) for g in gradients]

    def one_by_one(chunk, scale):
        rows = []
        with _evaluating(loss.model):
            for i in range(len(chunk[0])):
                values = [v.requires_grad_() for v in _values(loss)]
                example = _tensors([array[i] for array in chunk])
                total = loss(values, [], example, float(scale))
                rows.append(
                    torch.autograd.grad(
                        total, values, allow_unused=True, materialize_grads=True
                    )
                )
        return [
            np.stack([keras.ops.convert_to_numpy(g) for g in column])
            for column in zip(*rows)
        ]

    return [("all at once", all_at_once), ("one by one", one_by_one)]


def intermediate_bytes(loss, batch):
    """The bytes that the forward pass keeps for the backward pass."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    values = [v.requires_grad_() for v in _values(loss)]
    with _evaluating(loss.model):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss.of_batch(values, [], _tensors(batch))
    return sum(size for size, _ in saved.values())


@contextlib.contextmanager
def _evaluating(model):
    # Torch modules inside Keras wrappers depend on this mode.
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _plain_attention():
    # The fused kernels have no rule for batching, so `vmap` would loop.
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def _values(loss):
    return [variable.value.detach() for variable in loss.variables]


def _tensors(arrays):
    return [keras.ops.convert_to_tensor(array) for array in arrays]
