"""Sequences share rows whole, whatever fields they have."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float

from m1jax.train import packing
from m1jax.train.batch import Batch, column
from pallas_kernels import PADDING


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredBatch(Batch):
    """A batch with one field more: packing must take it along."""

    score: Float[jax.Array, "*batch time"] = column(np.float32)


def _example(rng, length):
    split = int(rng.integers(1, length))
    tokens = rng.integers(1, 100, length).tolist()
    plain = packing.example(tokens[:split], tokens[split:])
    return ScoredBatch(**plain.fields(), score=rng.normal(size=length - 1).astype(np.float32))


def test_example_aligns_fields_to_the_predicting_position():
    example = packing.example([5, 6, 7], [8, 9])
    np.testing.assert_array_equal(example.tokens, [5, 6, 7, 8])
    np.testing.assert_array_equal(example.targets, [6, 7, 8, 9])
    np.testing.assert_array_equal(example.mask, [False, False, True, True])
    np.testing.assert_array_equal(example.weight, [0, 0, 1, 1])
    with pytest.raises(ValueError, match="at least one token"):
        packing.example([], [1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 13), min_size=1, max_size=20), st.integers(0, 10))
def test_every_example_is_somewhere_whole(lengths, seed):
    rng = np.random.default_rng(seed)
    examples = [_example(rng, n) for n in lengths]
    packed = packing.pack(examples, 12)
    names = sorted(set(packed.columns()) - {"segment_ids"})
    found = []
    for row, ids in enumerate(packed.segment_ids):
        assert (np.diff(ids.astype(np.int64)) >= 0).all()
        for segment in sorted(set(ids[ids != PADDING].tolist())):
            found.append(tuple(tuple(getattr(packed, n)[row][ids == segment].tolist()) for n in names))
        assert (packed.weight[row][ids == PADDING] == 0).all()
        assert not packed.mask[row][ids == PADDING].any()
    assert sorted(found) == sorted(tuple(tuple(getattr(e, n).tolist()) for n in names) for e in examples)


def test_micro_batches_keep_rows_and_fill_up_with_padding():
    rng = np.random.default_rng(0)
    packed = packing.pack([_example(rng, 9) for _ in range(5)], 8)
    batches = packing.micro_batches(packed, 2, 4)
    assert isinstance(batches, ScoredBatch)
    assert {x.shape for x in batches.fields().values()} == {(4, 2, 8)}
    for name, values in batches.fields().items():
        np.testing.assert_array_equal(values.reshape(8, 8)[:5], getattr(packed, name))
    assert (batches.segment_ids.reshape(8, 8)[5:] == PADDING).all()
    with pytest.raises(ValueError, match="need 3 micro-batches"):
        packing.micro_batches(packed, 2, 2)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="an example has 8 positions, a row 7"):
        packing.pack([packing.example([1], list(range(8)))], 7)
