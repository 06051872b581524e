import hypothesis
import hypothesis.strategies as st
import numpy as np

from m1jax.inference.pool import Pool
from m1jax.inference.prefixes import Prefixes


def ids(*tokens):
    return np.array(tokens, np.int32)


def keep(prefixes, pages, tokens):
    """What a sequence does that computes these tokens, four to a page."""
    node = prefixes.promise(ids(*tokens))
    own = pages.take(-(-len(tokens) // 4))
    slot = None if node is None else prefixes.keep(node, own)
    pages.release(own)
    return slot


def test_found_by_tokens():
    pages = Pool(range(20))
    prefixes = Prefixes(pages, range(10, 14))
    assert keep(prefixes, pages, [1, 2, 3, 4, 5]) == 10
    assert keep(prefixes, pages, [1, 2, 3]) == 11
    path, known = prefixes.find(ids(1, 2, 3, 4, 9))
    assert ([node.depth for node in path], known) == ([0, 3], 4)
    assert path[-1].snapshot.slot == 11
    assert prefixes.find(ids(1, 2, 3, 4, 5))[0][-1].snapshot.pages == (0, 1)
    assert prefixes.find(ids(2))[1] == 0
    assert keep(prefixes, pages, [1, 2, 3]) is None  # it is there already


def test_the_least_recently_used_goes_first():
    pages = Pool(range(20))
    prefixes = Prefixes(pages, range(2))
    keep(prefixes, pages, [1, 2])
    keep(prefixes, pages, [1, 3])
    prefixes.touch(prefixes.find(ids(1, 2))[0][-1])
    assert keep(prefixes, pages, [4]) == 1
    assert prefixes.find(ids(1, 3))[1] == 1
    assert prefixes.find(ids(1, 2))[0][-1].snapshot is not None
    prefixes.clear()
    assert (len(prefixes), pages.free, prefixes.root.children) == (0, 20, {})


def test_reclaimable_are_pages_that_nobody_else_holds():
    pages = Pool(range(20))
    prefixes = Prefixes(pages, range(4))
    own = pages.take(3)
    prefixes.keep(prefixes.promise(ids(*range(6))), own[:2])
    prefixes.keep(prefixes.promise(ids(*range(12))), own)
    assert prefixes.reclaimable() == 0
    pages.release(own[1:])
    assert prefixes.reclaimable() == 2
    pages.release(own[:1])
    assert prefixes.reclaimable() == 3


def test_promises():
    pages = Pool(range(4))
    prefixes = Prefixes(pages, range(4))
    node = prefixes.promise(ids(1, 2, 3))
    assert prefixes.promise(ids(1, 2, 3)) is None
    assert prefixes.promise(ids()) is None
    half = prefixes.promise(ids(1, 2))
    prefixes.withdraw(node)
    assert prefixes.find(ids(1, 2, 3))[0] == [prefixes.root, half]
    prefixes.withdraw(half)
    assert not prefixes.root.children
    assert Prefixes(pages, range(0)).promise(ids(1)) is None


@hypothesis.given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.booleans()), max_size=25))
def test_the_longest_kept_prefix_is_found(history):
    """Against a plain dictionary, least recently used first as well."""
    pages = Pool(range(40))
    prefixes, plain = Prefixes(pages, range(4)), {}
    for tokens, ask in history:
        if ask:
            path, _ = prefixes.find(ids(*tokens))
            found = [node.depth for node in path if node.snapshot]
            assert found == [n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in plain]
        elif keep(prefixes, pages, tokens) is not None:
            assert tuple(tokens) not in plain
            plain[tuple(tokens)] = None
            if len(plain) > 4:
                del plain[next(iter(plain))]
        else:
            assert tuple(tokens) in plain
    assert len(prefixes) == len(plain)
