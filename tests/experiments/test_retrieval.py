import numpy as np

from experiments.long_context.retrieval import FILLER, KEYS, PAIRS, VALUES, Batches, Config, sequence, table


def test_every_key_is_asked_for_once_and_answered_before():
    tokens = sequence(np.random.default_rng(0), 512)
    context, asked = tokens[: -2 * PAIRS], tokens[-2 * PAIRS :].reshape(PAIRS, 2)
    assert set(asked[:, 0]) <= set(KEYS) and len(set(asked[:, 0])) == PAIRS
    assert set(asked[:, 1]) <= set(VALUES)
    for key, value in asked:
        (place,) = np.flatnonzero(context == key)
        assert context[place + 1] == value
    assert np.isin(context, FILLER).sum() == len(context) - 2 * PAIRS


def test_values_at_the_end_are_trained_on_and_a_place_can_be_taken_up():
    batches = Batches(Config(row=1024, rows=3), seed=5)
    first, second = next(batches), next(batches)
    for row in range(3):
        segments = len(np.unique(first.segment_ids[0, row]))
        assert segments in (1, 2, 4)
        assert first.mask[0, row].sum() == segments * PAIRS
        assert np.isin(np.asarray(first.targets)[0, row][np.asarray(first.mask)[0, row]], VALUES).all()
    again = Batches(Config(row=1024, rows=3), seed=5)
    again.set_state({"update": 1})
    np.testing.assert_array_equal(next(again).tokens, second.tokens)


def test_table():
    found = [{"seed": s, "tokens": 256, "right": 256 * (s + 1), "of": 512} for s in (0, 1)]
    assert "| 256 | 75.0% | 50.0% | 100.0% |" in table(found)
