"""Comparisons with the layers of Hugging Face PEFT, on PyTorch."""

import keras
import numpy as np

import keras_randadapt as kra
from tests import methods
from tests import zoo


def check(template, config, view, weights, prepare=None):
    """Asserts that PEFT's layer computes what an adapter does.

    Both have one kernel, one bias and the same trained numbers. Outputs,
    gradients and merged kernels are compared to 1e-5.

    Args:
        template: An adapter.
        config: The config of PEFT, whose target is the module "site".
        view: `(input_dim, output_dim)`.
        weights: dict from the name of a trained weight to a pair. The first is
            PEFT's name, or a function of its layer that gives the weight. The
            second is a function from the values of ours, a NumPy array, to
            PEFT's. It must be linear, and it maps gradients too.
        prepare: Optional function that changes PEFT's layer first.
    """
    import peft
    import torch

    model = _model(view)
    layer = model.get_layer("site")
    module = torch.nn.Sequential()
    module.add_module("site", torch.nn.Linear(*view))
    theirs = peft.get_peft_model(module, config)
    peer = theirs.base_model.model.site
    if prepare is not None:
        prepare(peer)
    with torch.no_grad():
        base = peer.get_base_layer()
        base.weight.copy_(torch.tensor(methods.numpy(layer.kernel).T))
        base.bias.copy_(torch.tensor(methods.numpy(layer.bias)))
    kernel = methods.numpy(layer.kernel)
    kra.inject(model, template, "site")
    values = methods.randomize(layer.adapter.get("default"))
    parameters = {}
    for name, (attribute, move) in weights.items():
        parameter = (
            attribute(peer)
            if callable(attribute)
            else getattr(peer, attribute)["default"]
        )
        given = torch.tensor(move(values[name]), dtype=torch.float32)
        assert parameter.shape == given.shape
        with torch.no_grad():
            parameter.copy_(given)
        parameters[name] = parameter

    x = zoo.normal(6, view[0])
    upstream = torch.tensor(zoo.normal(6, view[1], seed=4))
    found = []
    variables = {
        v.name: v.value for v in layer.adapter.get("default").trainable_weights
    }
    assert set(variables) == set(weights)
    for function, trained in ((model, variables), (theirs, parameters)):
        inputs = torch.tensor(x, requires_grad=True)
        y = function(inputs)
        tensors = [inputs, *(trained[name] for name in weights)]
        found.append([y, *torch.autograd.grad(y, tensors, upstream)])
    (y, of_x, *of_ours), (their_y, of_their_x, *of_theirs) = found
    assert np.abs(methods.numpy(y - _base(x, kernel, layer))).max() > 0.1
    methods.close(y, methods.numpy(their_y.detach()))
    methods.close(of_x, methods.numpy(of_their_x))
    for (_, move), ours, their in zip(weights.values(), of_ours, of_theirs):
        methods.close(move(methods.numpy(ours)), methods.numpy(their))
    kra.merge(model)
    merged = theirs.merge_and_unload().site.weight.detach()
    methods.close(layer.kernel, methods.numpy(merged).T)
    assert np.abs(methods.numpy(layer.kernel) - kernel).max() > 0.1


def _model(view):
    layer = keras.layers.Dense(view[1], name="site")
    model = keras.Sequential([keras.Input((view[0],)), layer])
    return zoo.set_weights(model)


def _base(x, kernel, layer):
    import torch

    return torch.tensor(x @ kernel + methods.numpy(layer.bias))
