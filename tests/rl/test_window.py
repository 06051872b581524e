"""The window grows when perplexity stands still and responses reach it, and only then."""

import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl.recipe import GenerationRecipe, RLRecipe, UpdateRecipe
from m1jax.rl.window import Window, WindowRecipe, perplexity
from tests.rl.episodes import episode, scored

RECIPE = WindowRecipe(windows=(10, 20, 40), window_batches=2, window_tolerance=0.05, window_nearness=0.9)


def batch(length, logp):
    return [scored([1, 0], episodes=[episode(tokens=range(length), logp=logp)] * 2)]


def test_perplexity():
    assert perplexity([*batch(4, -1.0), *batch(2, -4.0)]) == pytest.approx(np.exp((8 * 1 + 4 * 4) / 12))


def test_stages():
    window, grown, sizes = Window(), [], []
    for length, logp in [(10, -1), (10, -1.01), (20, -2), (9, -2), (18, -3), (18, -3.02), (40, -1), (40, -1)]:
        sizes.append(window.tokens(RECIPE, 40))
        grown.append(window.see(batch(length, logp), RECIPE))
    # Batch 1 still moves; batch 3 is still but short; the perplexity before a stage does not count in the next.
    assert grown == [False, True, False, False, False, True, False, False]
    assert sizes == [10, 10, 20, 20, 20, 20, 40, 40]


def test_no_stages_is_one():
    window = Window()
    assert not window.see(batch(10, -1.0), WindowRecipe())
    assert window.tokens(WindowRecipe(), 40) == 40


def test_what_is_refused():
    with pytest.raises(UserError, match="must grow from stage to stage"):
        WindowRecipe(windows=(20, 10))
    with pytest.raises(UserError, match="the last must be max_new_tokens = 30"):
        RLRecipe(
            generation=GenerationRecipe(max_prompt_tokens=2, max_new_tokens=30),
            update=UpdateRecipe(row_length=32),
            window=RECIPE,
        )
