"""What is kept of prefixes: states and keys at the junctions where requests part.

A lightning state is the sum of all tokens before it and cannot be cut back, so a prefix can be shared only where a
state was kept. It is kept at junctions, not at block boundaries: the places are named by requests, or found, because a
radix tree of the kept prefixes shows where a new prompt leaves an old one.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jaxtyping import Int32, UInt8

from m1jax.inference.pool import Pool


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Where the memory of a prefix lies: its states in a slot, its keys and values in pages, the last perhaps partly
    full."""

    slot: int
    pages: tuple[int, ...]
    routes: tuple[UInt8[np.ndarray, "n layers k"], ...]
    """the experts of its tokens, in pieces; empty where nobody records them"""


class Node:
    """The tokens from the root to here, and perhaps what a model remembers after them."""

    def __init__(self, parent: Node | None, edge: Int32[np.ndarray, " n"]) -> None:
        self.parent = parent
        self.edge = edge
        self.children: dict[int, Node] = {}
        self.depth: int = len(edge) + (0 if parent is None else parent.depth)
        self.snapshot: Snapshot | None = None
        self.promised = False
        """a running sequence will leave a snapshot here"""


class Prefixes:
    """A radix tree of kept prefixes, the least recently used forgotten first.

    Args:
        pages: snapshots hold their pages there like anybody else.
        slots: numbers of the states that snapshots may use.
    """

    def __init__(self, pages: Pool, slots: range) -> None:
        self._pages, self._slots = pages, Pool(slots)
        self._kept: collections.OrderedDict[Node, Snapshot] = collections.OrderedDict()
        self._uses: collections.Counter[int] = collections.Counter()
        self.root = Node(None, np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, tokens: Int32[np.ndarray, " n"]) -> tuple[list[Node], int]:
        """The nodes along these tokens, root first, and how many of the tokens the tree knows."""
        path, known = [self.root], 0
        while known < len(tokens) and (child := path[-1].children.get(int(tokens[known]))) is not None:
            same = _common(child.edge, tokens[known:])
            known += same
            if same < len(child.edge):
                break
            path.append(child)
        return path, known

    def promise(self, tokens: Int32[np.ndarray, " n"]) -> Node | None:
        """The node of exactly these tokens, made if there is none, promised from now on until `keep` or `withdraw`.

        None where it is already promised or kept, or where nothing can be kept.
        """
        node = self._node(tokens) if self._slots.numbers else self.root
        if node is self.root or node.promised or node.snapshot is not None:
            return None
        node.promised = True
        return node

    def withdraw(self, node: Node) -> None:
        """Nothing will be kept at a promised node after all."""
        node.promised = False
        self.prune(node)

    def _node(self, tokens: Int32[np.ndarray, " n"]) -> Node:
        path, known = self.find(tokens)
        node = path[-1]
        if known > node.depth:  # the tree goes on another way in the middle of an edge
            node = self._split(node.children[int(tokens[node.depth])], known)
        if known < len(tokens):
            child = Node(node, tokens[known:].copy())
            node.children[int(tokens[known])] = child
            node = child
        return node

    def keep(
        self, node: Node, pages: list[int], routes: list[UInt8[np.ndarray, "n layers k"]] | None = None
    ) -> int | None:
        """Remember a promised node, whose keys lie in these pages; this settles the promise.

        Returns the slot that its states must be copied to; None where they are already kept, or no slot can be had.
        """
        slot = self._keep(node, pages, tuple(routes or ()))
        node.promised = False
        self.prune(node)
        return slot

    def _keep(self, node: Node, pages: list[int], routes: tuple[UInt8[np.ndarray, "n layers k"], ...]) -> int | None:
        if node.snapshot is not None:
            self.touch(node)
            return None
        if not self._slots.free and not self.evict():
            return None
        self._pages.share(pages)
        self._uses.update(pages)
        (slot,) = self._slots.take(1)
        node.snapshot = self._kept[node] = Snapshot(slot, tuple(pages), routes)
        return slot

    def touch(self, node: Node) -> None:
        """A node was of use: if it is kept, it will be forgotten last."""
        if node in self._kept:
            self._kept.move_to_end(node)

    def evict(self) -> bool:
        """Forget the least recently used snapshot; False where none is left."""
        if not self._kept:
            return False
        node, snapshot = self._kept.popitem(last=False)
        node.snapshot = None
        self._slots.release([snapshot.slot])
        self._pages.release(snapshot.pages)
        for page in snapshot.pages:
            self._uses[page] -= 1
            if not self._uses[page]:
                del self._uses[page]
        self.prune(node)
        return True

    def clear(self) -> None:
        """Forget everything, as one must when the weights change."""
        while self.evict():
            pass

    def reclaimable(self) -> int:
        """How many pages would be free if everything were forgotten."""
        return sum(self._pages.holders(page) == uses for page, uses in self._uses.items())

    def prune(self, node: Node) -> None:
        """Take a node out of the tree, and those above it, where they no longer say anything."""
        while node.parent is not None and node.snapshot is None and not node.promised and len(node.children) < 2:
            parent = node.parent
            if node.children:
                (child,) = node.children.values()
                child.parent, child.edge = parent, np.concatenate([node.edge, child.edge])
                parent.children[int(node.edge[0])] = child
                return
            del parent.children[int(node.edge[0])]
            node = parent

    def _split(self, node: Node, depth: int) -> Node:
        """A new node above this one, at that depth."""
        assert node.parent is not None
        cut = depth - node.parent.depth
        upper = Node(node.parent, node.edge[:cut])
        node.parent.children[int(node.edge[0])] = upper
        node.parent, node.edge = upper, node.edge[cut:]
        upper.children[int(node.edge[0])] = node
        return upper


def _common(a: Int32[np.ndarray, " n"], b: Int32[np.ndarray, " m"]) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
