"""What is wrong with the arguments of a forward pass, said before anything is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from m1jax.config import ModelConfig
from m1jax.errors import UserError
from m1jax.model.cache import Cache


def check_forward(
    config: ModelConfig, tokens: Any, cache: Cache | None, segment_ids: Any, lengths: Any, routes: Any
) -> None:
    """Refuses arguments of ``MiniMaxM1.forward``; values are looked at where they are concrete, outside of jit.

    Raises:
        UserError: names the argument, what it is and what it should be.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens must be integers [batch, time], not {tokens.dtype}{list(tokens.shape)}")
    if 0 in tokens.shape:
        raise UserError(f"tokens is empty: shape {list(tokens.shape)}; a call needs at least one token per row")
    batch, time = tokens.shape
    if segment_ids is not None:
        if cache is not None or lengths is not None:
            raise UserError("segment_ids packs whole sequences: give neither a cache nor lengths with it")
        if segment_ids.shape != tokens.shape:
            raise UserError(f"segment_ids {list(segment_ids.shape)} must have tokens' shape {list(tokens.shape)}")
    for name, value in (("cache", None if cache is None else cache.lengths), ("lengths", lengths)):
        if value is not None and value.shape != (batch,):
            raise UserError(f"{name} is for {value.shape[0]} rows, tokens has {batch}")
    if lengths is not None and not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise UserError(f"lengths must be integers, one per row: got {lengths.dtype}")
    if routes is not None and routes.shape != (batch, time, config.num_layers, config.experts_per_token):
        expected = [batch, time, config.num_layers, config.experts_per_token]
        raise UserError(f"routes must be [batch, time, layers, k] = {expected}: got {list(routes.shape)}")
    if cache is None and time > config.max_position_embeddings:
        raise UserError(
            f"rows of {time} tokens are longer than the model's max_position_embeddings = "
            f"{config.max_position_embeddings}; cut them, or take a model with more positions"
        )
    check_vocabulary(config, tokens, "token ids")
    if lengths is not None and is_concrete(lengths):
        known = np.asarray(lengths)
        if not np.all((known >= 0) & (known <= time)):
            raise UserError(f"lengths must lie between 0 and tokens' time {time}, found {lengths}")
    if cache is not None and cache.max_length is not None and is_concrete(cache.lengths):
        new = time if lengths is None or not is_concrete(lengths) else np.asarray(lengths)
        if (needed := int(np.max(np.asarray(cache.lengths) + new))) > cache.max_length:
            raise UserError(
                f"context overflow: {needed} tokens in a cache with room for {cache.max_length}; "
                "make it larger with init_cache(batch, max_length)"
            )


def check_vocabulary(config: ModelConfig, ids: Any, name: str) -> None:
    """Refuses ids (where they are concrete) that are no words of the model.

    Raises:
        UserError: names the smallest and the largest id.
    """
    if is_concrete(ids):
        low, high = np.asarray(ids).min(), np.asarray(ids).max()
        if low < 0 or high >= config.vocab_size:
            raise UserError(
                f"{name} {low}..{high} are not all in the vocabulary 0..{config.vocab_size - 1}; "
                "is this another model's tokenizer?"
            )


def is_concrete(x: Any) -> bool:
    """Whether an array's values can be looked at, here and now."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
