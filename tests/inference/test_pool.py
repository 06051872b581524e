import pytest

from m1jax.inference.pool import Pool


def test_lowest_first_and_freed_by_the_last_holder():
    pool = Pool(range(3, 7))
    assert pool.take(3) == [3, 4, 5]
    pool.share([4, 5])
    pool.release([3, 4, 5])
    assert (pool.free, pool.holders(4), pool.holders(3)) == (2, 1, 0)
    assert pool.take(2) == [3, 6]
    pool.release([5])
    assert pool.take(1) == [5]


def test_what_nobody_holds_cannot_be_given_back_or_shared():
    pool = Pool(range(2))
    with pytest.raises(AssertionError, match="3 of 2 free"):
        pool.take(3)
    for wrong in (pool.share, pool.release):
        with pytest.raises(AssertionError, match="place 1 is free"):
            wrong([1])
