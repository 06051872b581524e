"""Follow arrows from node to node: a lookup for each step, and no way to see the end without walking there."""

import numpy as np

from m1jax.rl.tasks.base import Family, Problem


class Arrows(Family):
    """`af ba cd db ec fe b4=` (from b, four arrows on) -> `<think>ba af fe ec</think>c`.

    The arrows form one cycle through all nodes and are listed in any order.
    """

    name = "arrows"

    def __init__(self, nodes: int = 6, steps: int = 4):
        self.nodes, self.steps = nodes, steps

    def draw(self, rng: np.random.Generator) -> Problem:
        cycle = rng.permutation([chr(ord("a") + i) for i in range(self.nodes)])
        following = dict(zip(cycle, np.roll(cycle, -1)))
        arrows = [node + following[node] for node in rng.permutation(cycle)]
        node = start = str(rng.choice(cycle))
        thinking = []
        for _ in range(self.steps):
            thinking.append(node + following[node])
            node = following[node]
        return Problem(f"{' '.join(arrows)} {start}{self.steps}=", str(node), " ".join(thinking), self.name)
