import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1jax.train import packing
from pallas_kernels import PADDING


def _example(rng, length):
    split = int(rng.integers(1, length))
    tokens = rng.integers(1, 100, length).tolist()
    return packing.example(tokens[:split], tokens[split:], score=rng.normal(size=length - split), weight=1.0)


def test_example_aligns_fields_to_the_predicting_position():
    columns = packing.example([5, 6, 7], [8, 9], old_logp=np.array([-1.0, -2.0]))
    np.testing.assert_array_equal(columns["tokens"], [5, 6, 7, 8])
    np.testing.assert_array_equal(columns["targets"], [6, 7, 8, 9])
    np.testing.assert_array_equal(columns["old_logp"], [0, 0, -1, -2])
    with pytest.raises(ValueError, match="at least one token"):
        packing.example([], [1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 13), min_size=1, max_size=20), st.integers(0, 10))
def test_every_example_is_somewhere_whole(lengths, seed):
    rng = np.random.default_rng(seed)
    examples = [_example(rng, n) for n in lengths]
    packed = packing.pack(examples, 12)
    found = []
    for row in range(len(packed["tokens"])):
        ids = packed["segment_ids"][row]
        assert (np.diff(ids.astype(np.int64)) >= 0).all()
        for segment in sorted(set(ids[ids != PADDING].tolist())):
            where = ids == segment
            found.append(tuple(tuple(packed[name][row][where].tolist()) for name in sorted(examples[0])))
        assert (packed["weight"][row][ids == PADDING] == 0).all()
    assert sorted(found) == sorted(tuple(tuple(e[name].tolist()) for name in sorted(e)) for e in examples)


def test_micro_batches_keep_rows_and_fill_up_with_padding():
    rng = np.random.default_rng(0)
    packed = packing.pack([_example(rng, 9) for _ in range(5)], 8)
    batches = packing.micro_batches(packed, 2, 4)
    assert batches["tokens"].shape == (4, 2, 8)
    np.testing.assert_array_equal(batches["tokens"].reshape(8, 8)[:5], packed["tokens"])
    assert (batches["segment_ids"].reshape(8, 8)[5:] == PADDING).all()
    with pytest.raises(ValueError, match="need 3 micro-batches"):
        packing.micro_batches(packed, 2, 2)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="an example has 8 positions, a row 7"):
        packing.pack([packing.example([1], list(range(8)))], 7)
