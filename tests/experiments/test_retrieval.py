import numpy as np

from experiments.long_context.retrieval import (
    FILLER,
    FIRST_PAIR,
    KEYS,
    PAIRS,
    TRAINED_PAIRS,
    VALUES,
    Batches,
    Config,
    sequences,
    table,
)


def test_every_key_is_asked_for_once_and_answered_before():
    for tokens in sequences(np.random.default_rng(0), 3, 512):
        context, asked = tokens[: -2 * PAIRS], tokens[-2 * PAIRS :].reshape(PAIRS, 2)
        assert set(asked[:, 0]) <= set(KEYS) and len(set(asked[:, 0])) == PAIRS
        for key, pair in asked:
            assert (pair - FIRST_PAIR) // len(VALUES) == key
            assert (context == pair).sum() == 1
        assert np.isin(context, FILLER).sum() == len(context) - PAIRS


def test_values_at_the_end_are_trained_on_and_a_place_can_be_taken_up():
    config = Config(row=1024, rows=3, steps=100)
    batches = Batches(config, seed=5)
    seen = [next(batches) for _ in range(100)]
    segments = [[len(np.unique(batch.segment_ids[0, row])) for row in range(3)] for batch in seen]
    assert set(np.ravel(segments[:20])) == {16}  # of 64 tokens
    assert set(np.ravel(segments)) == {1, 2, 4, 8, 16}
    for batch, counts in zip(seen, segments):
        for row, count in enumerate(counts):
            mask = np.asarray(batch.mask)[0, row]
            assert mask.sum() in [count * pairs for pairs in TRAINED_PAIRS]
            assert np.all(np.asarray(batch.targets)[0, row][mask] >= FIRST_PAIR)
            np.testing.assert_allclose(np.sum(batch.weight[0, row]), 1, rtol=1e-5)
    again = Batches(config, seed=5)
    again.set_state({"update": 70})
    np.testing.assert_array_equal(next(again).tokens, seen[70].tokens)


def test_table():
    found = [{"seed": s, "tokens": 256, "right": 256 * (s + 1), "of": 512} for s in (0, 1)]
    assert "| 256 | 75.0% | 50.0% | 100.0% |" in table(found)
