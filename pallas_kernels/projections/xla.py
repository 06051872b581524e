"""Projections in plain XLA."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.ladder import always as unsupported
from pallas_kernels.projections.api import Projection

__all__ = ["project", "unsupported"]

_ACTIVATIONS = {"none": lambda x: x, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def project(x: jax.Array, projections: Sequence[Projection], layer: jax.Array) -> list[jax.Array]:
    """Arguments as in `api.project`."""
    outputs = []
    for weights, activation, parts, width in projections:
        out = _ACTIVATIONS[activation](jnp.einsum("ti,oi->to", x, weights[layer]))
        if parts == 1:
            outputs.append(out)
        else:
            dealt = out.reshape(len(x), -1, parts, width)
            outputs += [dealt[:, :, part].reshape(len(x), -1) for part in range(parts)]
    return outputs
