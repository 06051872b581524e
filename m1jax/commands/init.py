"""`m1jax init`: a model with random weights, to be trained."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated

import tyro

from m1jax.errors import UserError, require_seed

TINY = "tiny"
MULTIPLE = 64
"""of which a vocabulary is one, so that meshes can share it out: M1's 200,064 is the first behind its tokens"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Make a model with random weights from a preset: the official layout in float32, with its tokenizer.

    m1jax init m1-100m models/my-model
    """

    preset: Annotated[str, tyro.conf.Positional]
    """Shape of the model: m1-tiny, m1-demo, m1-100m, m1-1b, m1-2b, m1-456b. Its vocabulary becomes the tokenizer's."""
    directory: Annotated[Path, tyro.conf.Positional]
    """Where to: a directory that does not exist, or is empty."""
    tokenizer: str = TINY
    """Directory with a tokenizer.json that has M1's special tokens, such as a published model's; or tiny, the built-in
    one with a token for each byte."""
    seed: int = 0
    """Of the weights."""


def main(config: Config) -> None:
    """Writes the model and says what it is.

    Raises:
        UserError: no such preset or tokenizer, the directory is in use, or the machine is too small for the model.
    """
    require_seed(config.seed)
    import jax.numpy as jnp
    from flax import nnx

    from m1jax.chat import Tokenizer
    from m1jax.config import ModelConfig
    from m1jax.flops import parameters_per_token
    from m1jax.model import MiniMaxM1
    from m1jax.weights.names import tensors
    from m1jax.weights.pretrained import save_pretrained

    preset = ModelConfig.preset(config.preset)
    built_in = config.tokenizer == TINY
    tokenizer = Tokenizer.tiny() if built_in else Tokenizer.from_dir(config.tokenizer)
    shape = dataclasses.replace(
        preset,
        vocab_size=-(-tokenizer.vocab_size // MULTIPLE) * MULTIPLE,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    directory = config.directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is there already; give the name of a new directory")
    parameters = sum(math.prod(tensor.shape) for tensor in tensors(shape))
    _require_memory(config.preset, parameters)
    save_pretrained(
        MiniMaxM1(shape, rngs=nnx.Rngs(config.seed), param_dtype=jnp.float32),
        directory,
        tokenizer=tokenizer if built_in else None,
        tokenizer_from=None if built_in else config.tokenizer,
    )
    print(
        f"{directory}: {config.preset}, {parameters:,} parameters ({parameters_per_token(shape):,} for each token), "
        f"{shape.vocab_size:,} of vocabulary for {tokenizer.vocab_size:,} tokens"
    )
    print(f"  m1jax train pretrain {directory} --data FILE.jsonl")


def _require_memory(preset: str, parameters: int) -> None:
    """Raises UserError where the machine cannot hold the weights: it would end the program without a word, or stall."""
    needed, there = 4 * parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"{preset} has {parameters / 1e9:.0f} billion parameters, {needed / 1e9:,.0f} GB in float32; this machine "
            f"has {there / 1e9:,.0f} GB of memory; take a smaller preset"
        )
