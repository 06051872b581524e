"""What a training would do, before it does it."""

import math

import jax

from m1jax import parameters
from m1jax.config import ModelConfig
from m1jax.flops import forward_flops, peak_flops, training_flops
from m1jax.inference.memory import batch_capacity
from m1jax.model.cache import key_value_bytes, state_bytes
from m1jax.model.transformer import default_dtype
from m1jax.rl.recipe import RLRecipe
from m1jax.train.estimate import CORE, cores, spelt

REACHED = 0.3
"""of a GPU's or TPU's peak, that a training reaches; a guess"""
DECODING = 0.1
"""of the speed of training, that decoding reaches; a guess"""


def described(config: ModelConfig, recipe: RLRecipe) -> list[str]:
    """Lines for a person: updates, tokens, memory, time. Responses are taken to be as long as they may be."""
    asked = recipe.generation
    problems, longest = asked.prompts * asked.rounds, asked.longest
    written = asked.prompts * asked.samples * asked.max_new_tokens
    trained = asked.prompts * asked.samples * longest
    reading = asked.prompts * forward_flops(config, asked.max_prompt_tokens)
    writing = asked.prompts * asked.samples * forward_flops(config, asked.max_new_tokens, start=asked.max_prompt_tokens)
    training = training_flops(config, trained, trained * (longest + 1) / 2)
    speed = _speed()
    generation, updates = (reading + writing / DECODING) / speed, training / speed
    batch = max(generation, updates) if recipe.staleness else generation + updates
    per_update = math.ceil(asked.prompts / recipe.update.updates)
    return [
        f"loss: {recipe.loss.chosen}",
        f"{recipe.iterations} generation batches of {asked.prompts} problems x {asked.samples} responses, "
        f"{recipe.update.updates} updates each ({per_update} problems an update): {recipe.planned_updates} updates",
        f"asked: at most {problems} problems a batch, as those that teach nothing are replaced",
        f"tokens: at most {written:,} written and {trained:,} trained on a batch, "
        f"{written * recipe.iterations:,} and {trained * recipe.iterations:,} in all",
        *_memory(config, recipe),
        f"time: at most {spelt(generation)} to generate and {spelt(updates)} to update a batch, "
        f"{spelt(batch * recipe.iterations)} in all ({speed:.1e} operations a second are taken for granted, and "
        "responses of full length)",
        f"held-out problems: {recipe.evaluation.evaluate_rounds * asked.prompts} before, after, and every "
        f"{recipe.evaluation.evaluate_every} batches",
    ]


def _memory(config: ModelConfig, recipe: RLRecipe) -> list[str]:
    asked, dtype = recipe.generation, default_dtype()
    counted = parameters.of_model(config), *(parameters.of_block(config, kind) for kind in config.layer_types)
    number = sum(math.prod(parameter.shape) for declared in counted for parameter in declared)
    # Float32: the parameters, both moments of AdamW, gradients; another copy where something else keeps one.
    copies = 4 + bool(recipe.staleness) + bool(recipe.loss.kl_coefficient)
    capacity = batch_capacity(
        config,
        dtype,
        prompts=asked.in_work,
        samples=asked.samples,
        prompt_tokens=asked.max_prompt_tokens,
        new_tokens=asked.max_new_tokens,
    )
    cache = capacity.slots * state_bytes(config)
    cache += capacity.pages * capacity.page_size * key_value_bytes(config, dtype)
    logits = 4 * recipe.update.rows * recipe.update.row_length * config.hidden_size * config.num_layers
    return [
        f"memory of all devices together: {_size(4 * copies * number)} for {number:,} parameters, their gradients and "
        f"optimizer; while generating, {_size(cache * capacity.parts)} of states, keys and values for {capacity.rows} "
        f"sequences at once; while updating, some {_size(logits)} of residual streams for a micro-batch of "
        f"{recipe.update.rows} x {recipe.update.row_length} tokens, before what attention and experts keep "
        "(m1jax plan tells more; with --compile, on TPUs, exactly)"
    ]


def _speed() -> float:
    """Operations a second of all devices."""
    devices = jax.devices()
    peak = peak_flops(devices[0].device_kind)
    return CORE * cores() if peak is None else REACHED * peak * len(devices)


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
