"""A function's results and gradients, on the backend of Keras that this process has."""

import keras


def on_jax(function, tensors, dy, run=None):
    """Runs `function(*tensors)`, whose first result is y; returns results and gradients of y."""
    import jax

    def both(tensors, dy):
        (y, *rest), pull = jax.vjp(function, *tensors)
        return (y, *rest), pull((dy, *map(jax.numpy.zeros_like, rest)))

    return (jax.jit(both) if run == "compiled" else both)(tensors, dy)


def on_tensorflow(function, tensors, dy, run=None):
    """See `on_jax`."""
    import tensorflow as tf

    def both(tensors, dy):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y, *rest = function(*tensors)
        return (y, *rest), tape.gradient(y, tensors, dy)

    return (tf.function(both, jit_compile=True) if run == "compiled" else both)(tensors, dy)


def on_torch(function, tensors, dy, run=None):
    """See `on_jax`."""
    import torch

    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    function = torch.compile(function) if run == "compiled" else function
    y, *rest = function(*tensors)
    gradients = torch.autograd.grad(y, tensors, dy, allow_unused=True)
    detached = [t.detach() if torch.is_tensor(t) else t for t in (y, *rest)]
    return detached, gradients


differentiated = {"jax": on_jax, "tensorflow": on_tensorflow, "torch": on_torch}[
    keras.backend.backend()
]
