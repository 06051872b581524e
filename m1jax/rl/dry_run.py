"""What a training would do, before it does it."""

import math

import jax

from m1jax import parameters
from m1jax.config import ModelConfig
from m1jax.flops import forward_flops, peak_flops, training_flops
from m1jax.inference.memory import batch_capacity
from m1jax.model.cache import key_value_bytes, state_bytes
from m1jax.model.transformer import default_dtype
from m1jax.rl.recipe import GenerationRecipe, RLRecipe
from m1jax.train.estimate import CORE, cores, spelt

REACHED = 0.3
"""of a GPU's or TPU's peak, that a training reaches; a guess"""
DECODING = 0.1
"""of the speed of training, that decoding reaches; a guess"""


def described(config: ModelConfig, recipe: RLRecipe) -> list[str]:
    """Lines for a person: updates, tokens, memory, time. Responses are taken to be as long as they may be."""
    asked, evaluation = recipe.generation, recipe.evaluation
    problems, longest = asked.prompts * asked.rounds, asked.longest
    # A batch of windowed FIFO also begins what the next ones take, and reads again what the last one began.
    begun = asked.fifo_window
    response = asked.samples * asked.max_new_tokens  # tokens, of a problem
    trained = asked.prompts * asked.samples * longest
    updates = min(recipe.update.updates, asked.prompts)  # one has a problem at least
    evaluations = 1 + math.ceil(recipe.iterations / evaluation.evaluate_every)
    heldout = evaluation.evaluate_rounds * asked.prompts
    again = begun * asked.samples * forward_flops(config, longest)
    speed = _speed()
    generating = (_answering(config, asked, problems + begun) + again) / speed
    updating = training_flops(config, trained, trained * (longest + 1) / 2) / speed
    evaluating = evaluations * _answering(config, asked, heldout) / speed
    shorter, longer = sorted((generating, updating))
    # Beside each other, but for the first batch and the last updates.
    batches = recipe.iterations * longer + (1 if recipe.staleness else recipe.iterations) * shorter
    return [
        f"loss: {recipe.loss.chosen}",
        f"{recipe.iterations} generation batches of {asked.prompts} problems x {asked.samples} responses, at most "
        f"{updates} updates each ({math.ceil(asked.prompts / updates)} problems an update): "
        f"{recipe.iterations * updates:,} updates",
        f"asked: at most {problems} problems a batch, as those that teach nothing are replaced",
        f"tokens: at most {(problems + begun) * response:,} written and {trained:,} trained on a batch, "
        f"{(recipe.iterations * problems + begun) * response:,} and {recipe.iterations * trained:,} in all, held-out "
        "problems apart",
        *_memory(config, recipe),
        f"time: at most {spelt(generating)} to generate and {spelt(updating)} to update a batch, "
        f"{spelt(evaluating)} for held-out problems, {spelt(batches + evaluating)} in all "
        f"({speed:.1e} operations a second are taken for granted, and responses of full length)",
        f"held-out problems: {heldout} before, after, and every {evaluation.evaluate_every} batches: "
        f"{evaluations} times",
    ]


def _answering(config: ModelConfig, asked: GenerationRecipe, problems: int) -> float:
    """Operations, in units of training's speed, of all responses to so many problems."""
    reading = forward_flops(config, asked.max_prompt_tokens)
    writing = asked.samples * forward_flops(config, asked.max_new_tokens, start=asked.max_prompt_tokens)
    return problems * (reading + writing / DECODING)


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
