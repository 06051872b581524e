"""Scored groups -> the micro-batches of a generation batch's updates."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from m1jax.rl.advantages import informative
from m1jax.rl.aggregation import Responses
from m1jax.rl.recipe import RLRecipe
from m1jax.rl.types import Episode, RLBatch, Scored, Updates, stacked
from m1jax.train import packing


def useful(scored: Sequence[Scored]) -> list[Scored]:
    """Groups that teach something: whose raw rewards differ. Penalties alone make no difference worth learning."""
    return [group for group in scored if informative(group.raw)]


def prepare(scored: Sequence[Scored], recipe: RLRecipe) -> Updates:
    """Advantages of the first P useful groups, dealt out to the updates and packed.

    Whole groups go to one update, as evenly as possible, so that a loss's mean within a prompt stays within one update.
    With fewer groups than updates there is one update per group; with none there is none.
    """
    kept = useful(scored)[: recipe.generation.prompts]
    replay = recipe.update.replay_routes
    rows, row_length, count = recipe.update.rows, recipe.update.row_length, recipe.micro_batches
    if not kept:
        return Updates(RLBatch.padding((0, count, rows, row_length)))
    convention = recipe.loss.chosen
    prompts = np.concatenate([np.full(len(group.rewards), number) for number, group in enumerate(kept)])
    episodes = [episode for group in kept for episode in group.group.episodes]
    advantages = convention.advantages(np.concatenate([group.rewards for group in kept]), prompts)
    tokens = np.array([episode.length for episode in episodes])
    parts = np.array_split(np.arange(len(kept)), min(recipe.update.updates, len(kept)))
    batches = []
    for part in parts:
        mine = np.flatnonzero(np.isin(prompts, part))
        weights = convention.aggregation(
            Responses(
                tokens=tokens[mine],
                prompts=prompts[mine],
                batch_tokens=int(tokens.sum()),
                updates=len(parts),
                limit=recipe.generation.max_new_tokens,
            )
        )
        examples = [
            example(episodes[i], float(advantages[i]), float(weight), replay=replay) for i, weight in zip(mine, weights)
        ]
        batches.append(packing.micro_batches(packing.pack(examples, row_length), rows, count))
    return Updates(stacked(batches))


def example(episode: Episode, advantage: float, weight: float, *, replay: bool = False) -> RLBatch:
    """An episode as fields [positions], aligned to the position that predicts; `replay`: with its routes."""
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
        **({"routes": _routes(episode)} if replay else {}),
    )


def _routes(episode: Episode) -> UInt8[np.ndarray, "positions layers k"]:
    """Of every position: the last token has none, and is none."""
    positions = len(episode.prompt) + len(episode.tokens) - 1
    assert episode.routes is not None, "routes were not recorded"
    assert len(episode.routes) == positions, "routes are not those of this episode"
    return episode.routes
