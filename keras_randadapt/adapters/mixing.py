"""The mixing matrix of RandLoRA."""

from keras import ops

from keras_randadapt.ops.fast_products import reshape


class Mixing:
    """The mixing matrix N as a function of the vectors, and its gradients.

    `N[i, j * rank + k] = scale * lambda[j, k] * gamma[j, i] * A[k, i]`.
    """

    def __init__(self, basis_a, terms, scale):
        self._basis = basis_a
        self._terms = terms
        self._scale = scale
        self.rank, self.dim = basis_a.shape

    def form(self, lambdas, gamma, *a):
        """N, `(dim, terms * rank)`, float32."""
        n = self._scaled_a(a) * ops.transpose(gamma)[:, :, None] * lambdas
        return reshape(n, (self.dim, self._terms * self.rank))

    def gradients(self, arguments, upstream):
        """The gradients of `form`'s arguments, from the gradient of N."""
        lambdas, gamma, *a = arguments
        upstream = reshape(upstream, (self.dim, self._terms, self.rank))
        upstream = upstream * self._scaled_a(a)
        of_lambdas = ops.sum(upstream * ops.transpose(gamma)[:, :, None], 0)
        of_gamma = ops.transpose(ops.sum(upstream * lambdas, -1))
        return of_lambdas, of_gamma, *[None for _ in a]

    def _scaled_a(self, a):
        a = ops.transpose(self._basis.matrix(a)) * self._scale
        return ops.expand_dims(a, 1)
