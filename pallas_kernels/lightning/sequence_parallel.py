"""Lightning attention over a sequence that is split between devices.

What a device needs of the tokens before its own is one state per head. So each sums its own tokens into a state, all
gather these states once, and each weighs those before it by the decay in between (LASP-2, arXiv 2502.07563, with a
decay). What is exchanged does not depend on the length; the gradient takes the same way back, as a reduce-scatter.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import _compat
from pallas_kernels.kept import KEPT
from pallas_kernels.lightning.api import LADDER, check, lightning_attention
from pallas_kernels.lightning.segments import is_real


def lightning_attention_sequence_parallel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    axis_name: str,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention` inside `jax.shard_map`, the tokens split along T over the mesh axis `axis_name`.

    Args:
      q, k, v, segment_ids: this device's tokens, [B,T/n,...]; shapes, dtypes and meaning as in `lightning_attention`:
        over the whole row ids do not go down and padding stands at the end.
      log_decay: [H] float32, the same on all devices of the axis.
      initial_state: [B,H,K,V] float32 or None, the state before the whole row, the same on all devices of the axis.
      axis_name: the mesh axis that T is split over.
      implementation: as in `lightning_attention`, for this device's tokens.

    Returns:
      o for this device's tokens, and the float32 state [B,H,K,V] after the last real token of the whole row, the same
      on all devices of the axis (shard_map knows: its out_specs need not name the axis).

    Raises:
      ValueError, TypeError: as `lightning_attention`.
    """
    check(q, k, v, log_decay, initial_state, segment_ids)
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], q.shape[2], k.shape[3], v.shape[3]), jnp.float32)
    name = LADDER.choose(implementation, q, k, v)
    return _attention(axis_name, name, q, k, v, jnp.asarray(log_decay), initial_state, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(axis_name, name, q, k, v, log_decay, initial_state, segment_ids):
    return _forward(axis_name, name, q, k, v, log_decay, initial_state, segment_ids)[0]


def _forward(axis_name, name, q, k, v, log_decay, initial_state, segment_ids):
    enters, decays = _between_shards(log_decay, q.shape[1], segment_ids, axis_name)
    own = _left_behind(name, k, v, log_decay, segment_ids)
    ahead, final_state = _exchange(axis_name, enters, decays, own, initial_state)
    enters, decays, ahead = (checkpoint_name(x, KEPT) for x in (enters, decays, ahead))
    o, _ = lightning_attention(q, k, v, log_decay, initial_state=ahead, segment_ids=segment_ids, implementation=name)
    return (o, final_state), (q, k, v, log_decay, initial_state, segment_ids, enters, decays, ahead)


def _backward(axis_name, name, saved, cotangents):
    """As forward: what a device needs of the tokens behind its own is one gradient per head, of the state behind it."""
    q, k, v, log_decay, initial_state, segment_ids, enters, decays, ahead = saved
    do, d_final_state = cotangents
    d_ahead = _gradient_ahead(name, q, k, v, log_decay, segment_ids, ahead, do)
    # The exchange is linear: any states do to take its gradient at.
    exchange = jax.vjp(functools.partial(_exchange, axis_name, enters, decays), ahead, initial_state)[1]
    d_own, d_initial_state = exchange((d_ahead, d_final_state))
    attention = functools.partial(
        lightning_attention, initial_state=ahead, segment_ids=segment_ids, implementation=name
    )
    dq, dk, dv = jax.vjp(lambda q, k, v: attention(q, k, v, log_decay), q, k, v)[1]((do, d_own))
    return dq, dk, dv, None, d_initial_state, None


_attention.defvjp(_forward, _backward)


def _left_behind(name, k, v, log_decay, segment_ids):
    """The state [B,H,K,V] that this device's tokens alone leave behind them."""
    if name == "hopper":
        return LADDER.module(name).left_behind(*_alike(k, v, log_decay, segment_ids), reverse=False)
    return lightning_attention(k, k, v, log_decay, segment_ids=segment_ids, implementation=name)[1]


def _gradient_ahead(name, q, k, v, log_decay, segment_ids, ahead, do):
    """The gradient [B,H,K,V] of the state `ahead` of this device's tokens, as far as their outputs depend on it."""
    if name == "hopper":
        return LADDER.module(name).left_behind(*_alike(q, do, log_decay, segment_ids), reverse=True)

    def outputs(state):
        return lightning_attention(
            q, k, v, log_decay, initial_state=state, segment_ids=segment_ids, implementation=name
        )[0]

    return jax.vjp(outputs, ahead)[1](do)[0]


def _alike(*arrays):
    """The arrays, all marked as differing over the same mesh axes, as a kernel wants them."""
    axes = _compat.varying_axes(*arrays)
    return [x if x is None else _compat.vary_over(x, axes) for x in arrays]


def _exchange(axis_name, enters, decays, own, initial_state):
    """The state in front of this device's tokens, and the one behind all, from what each device's leave behind."""
    # One exchange, told twice: the states in front of a device differ between devices, the one behind all does not.
    ahead = _fold(enters, decays, lax.axis_index(axis_name), initial_state, lax.all_gather(own, axis_name))
    # Without check_vma the gradient of a value that all devices share comes in parts, which must be summed here.
    checked = axis_name in _compat.varying_axes(lax.axis_index(axis_name))
    gathered = lax.all_gather(own, axis_name, to="invarying" if checked else "varying")
    return ahead, _fold(None, decays, lax.axis_size(axis_name), initial_state, gathered)


def _between_shards(log_decay, length, segment_ids, axis_name):
    """For all devices of the axis
    enters [n,B], whether the state in front of the device belongs to its first token's segment,
    decays [n,B,H], what becomes of that state across the device. B is 1 without segment_ids.
    """
    shards = lax.axis_size(axis_name)
    if segment_ids is None:
        decays = jnp.broadcast_to(jnp.exp(length * log_decay), (shards, 1, *log_decay.shape))
        return jnp.ones((shards, 1), bool), decays
    real = is_real(segment_ids)
    count = real.sum(1, dtype=jnp.int32)
    first, last = segment_ids[:, 0], jnp.where(real, segment_ids, segment_ids[:, :1]).max(1)
    first, last, count = lax.all_gather(jnp.stack([first, last, count]), axis_name, axis=1, to="invarying")
    empty = count == 0
    enters = empty | (first == jnp.concatenate([first[:1], last[:-1]]))
    crosses = enters & (empty | (first == last))
    return enters, jnp.where(crosses[..., None], jnp.exp(count[..., None] * log_decay), 0.0)


def _fold(enters, decays, device, initial_state, states):
    """The state in front of `device` (n: behind all), [B,H,K,V], from those that each device's own tokens sum to."""
    states = jnp.concatenate([initial_state[None], states])
    source, crossed = jnp.arange(len(states))[:, None], jnp.arange(len(decays))
    between = (crossed >= source) & (crossed < device)
    weights = jnp.where(between[..., None, None], decays, 1.0).prod(1)
    weights = jnp.where((source <= device)[..., None], weights, 0.0)
    if enters is not None:
        weights = jnp.where(enters[device][..., None], weights, 0.0)
    return (weights[..., None, None] * states).sum(0)
