"""Scored groups -> the micro-batches of a generation batch's updates."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from m1jax.rl.advantages import informative
from m1jax.rl.aggregation import Responses
from m1jax.rl.recipe import RLRecipe
from m1jax.rl.types import Episode, RLBatch, Scored, Updates, stacked
from m1jax.train import packing


def useful(scored: Sequence[Scored], recipe: RLRecipe) -> list[Scored]:
    """Groups that may teach something: whose raw rewards differ; about the baseline of a batch, all that were judged.
    Penalties alone make no difference worth learning."""
    by_batch = recipe.loss.chosen.advantages.baseline == "batch"
    return [group for group in scored if (len(group.raw) > 0 if by_batch else informative(group.raw))]


def trained_on(scored: Sequence[Scored], recipe: RLRecipe) -> list[Scored]:
    """The first P useful groups; none where all their raw rewards are equal, as a batch's may be."""
    kept = useful(scored, recipe)[: recipe.generation.prompts]
    return kept if kept and informative(np.concatenate([group.raw for group in kept])) else []


def prepare(scored: Sequence[Scored], recipe: RLRecipe) -> Updates:
    """Advantages of the first P useful groups, dealt out to the updates and packed.

    Whole groups go to one update, as evenly as possible, so that a loss's mean within a prompt stays within one update.
    With fewer groups than updates there is one update per group; with none there is none.
    """
    kept = trained_on(scored, recipe)
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
    shape = _shape_of_groups(kept) if recipe.update.share_prompts else None
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
        if shape is None:
            batches.append(packing.micro_batches(packing.pack(examples, row_length), rows, count))
            continue
        groups = [[e for e, i in zip(examples, mine) if prompts[i] == number] for number in part]
        each = max(1, rows // recipe.generation.samples)
        lengths = [len(kept[number].group.episodes[0].prompt) - 1 for number in part]
        most = -(-len(parts[0]) // each)
        batches.append(_in_groups(groups, lengths, each, most, recipe.generation.samples, shape))
    return Updates(stacked(batches))


def _shape_of_groups(kept: Sequence[Scored]) -> tuple[int, int]:
    """(tokens of a prompt but for its last, tokens of a response), for the longest: one of few sizes."""
    groups = [group.group for group in kept]
    before = max(len(group.episodes[0].prompt) - 1 for group in groups)
    after = max(len(episode.tokens) for group in groups for episode in group.episodes)
    return _rounded(before), _rounded(after)


def _rounded(length: int) -> int:
    """The next of 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1 << max(length - 1, 1).bit_length()
    return power if length > power * 3 // 4 or power < 4 else power * 3 // 4


def _in_groups(
    groups: Sequence[Sequence[RLBatch]],
    lengths: Sequence[int],
    each: int,
    count: int,
    samples: int,
    shape: tuple[int, int],
) -> RLBatch:
    """Micro-batches of whole groups.

    Args:
        groups: their episodes, fields [positions].
        lengths: positions of each group's prompt but for its last.
        each: groups of a micro-batch.
        count: micro-batches.
        samples: rows of a group; what is missing is empty.
        shape: see `_shape_of_groups`.
    """
    before, after = shape
    first, routes = groups[0][0], groups[0][0].routes
    rows = first.emptied((count * each * samples, after))
    columns = {name: np.asarray(values) for name, values in rows.fields().items()}
    prompts = np.full((count * each, before), -1, np.int32)
    prompt_routes = None if routes is None else np.zeros((count * each, before, *routes.shape[1:]), np.uint8)
    for number, (group, length) in enumerate(zip(groups, lengths)):
        prompts[number, :length] = group[0].tokens[:length]
        if prompt_routes is not None:
            assert group[0].routes is not None
            prompt_routes[number, :length] = group[0].routes[:length]
        for sample, one in enumerate(group):
            for name, values in one.fields().items():
                columns[name][number * samples + sample, : one.positions - length] = values[length:]
    batch = dataclasses.replace(rows, prompts=prompts, prompt_routes=prompt_routes)
    return batch.map(lambda x: x.reshape(count, -1, *x.shape[1:]))


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
