"""Scored groups -> the micro-batches of a generation batch's updates."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from m1jax.rl.advantages import group_advantages, informative
from m1jax.rl.aggregation import prompt_mean
from m1jax.rl.recipe import RLRecipe
from m1jax.rl.types import Episode, RLBatch, Scored, Updates, stacked
from m1jax.train import packing


def useful(scored: Sequence[Scored]) -> list[Scored]:
    """Groups that teach something: whose raw rewards differ. Penalties alone make no difference worth learning."""
    return [group for group in scored if informative(group.raw)]


def prepare(scored: Sequence[Scored], recipe: RLRecipe) -> Updates:
    """Advantages of the first P useful groups, dealt out to the updates and packed.

    Whole groups go to one update, as evenly as possible, so that the loss's mean within a prompt stays within one
    update. With fewer groups than updates there is one update per group; with none there is none.
    """
    kept = useful(scored)[: recipe.generation.prompts]
    rows, row_length, count = recipe.update.rows, recipe.update.row_length, recipe.micro_batches
    batches = []
    for part in np.array_split(np.arange(len(kept)), min(recipe.update.updates, len(kept))) if kept else []:
        prompts = np.concatenate([np.full(len(kept[i].group.episodes), i) for i in part])
        weights = iter(prompt_mean(np.concatenate([kept[i].lengths for i in part]), prompts))
        examples = [
            example(episode, float(advantage), float(next(weights)))
            for i in part
            for episode, advantage in zip(kept[i].group.episodes, group_advantages(kept[i].rewards))
        ]
        batches.append(packing.micro_batches(packing.pack(examples, row_length), rows, count))
    return Updates(stacked(batches) if batches else RLBatch.padding((0, count, rows, row_length)))


def example(episode: Episode, advantage: float, weight: float) -> RLBatch:
    """An episode as fields [positions], aligned to the position that predicts."""
    ids = np.concatenate([episode.prompt, episode.tokens])
    first = len(episode.prompt) - 1

    def aligned(values: Float[np.ndarray, " time"] | np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros(first, values.dtype), values])

    mask = aligned(episode.written)
    return RLBatch.of(
        tokens=ids[:-1],
        targets=ids[1:],
        segment_ids=np.zeros(len(ids) - 1, np.int32),
        mask=mask,
        weight=np.where(mask, np.float32(weight), np.float32(0)),
        old_logp=aligned(episode.logp),
        advantage=np.where(mask, np.float32(advantage), np.float32(0)),
    )
