"""Sources whose weights change on the way: verifiable problems first, others mixed in later (report, section 4.2)."""

from collections.abc import Sequence

from m1jax.errors import UserError
from m1jax.rl.tasks import Mixture, Task, UserProblems
from m1jax.rl.tasks.base import Turns

Stage = tuple[int, list[float]]
"""(number of the first problem, weights of all sources)"""


def stage(text: str) -> Stage:
    """A stage `START:WEIGHT,WEIGHT,...`.

    Raises:
        UserError: it is written otherwise, or no weight is positive.
    """
    start, _, weights = text.partition(":")
    try:
        found = int(start), [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise UserError(f"curriculum {text!r}: write START:WEIGHT,WEIGHT,..., for example 50000:3,1") from error
    if found[0] < 0 or not all(0 <= weight < float("inf") for weight in found[1]) or not any(found[1]):
        raise UserError(f"curriculum {text!r}: weights are zero or more, and one at least is more")
    return found


class Curriculum:
    """Which source comes when. A pure function of the number of a problem, as resuming needs it.

    Args:
        stages: their starts grow from 0.
        sources: how many there are.

    Raises:
        UserError: stages in another order, or other numbers of weights.
    """

    def __init__(self, stages: Sequence[Stage], sources: int):
        starts = [start for start, _ in stages]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise UserError(f"curriculum: stages begin at {starts}; the first must be 0, and each later than the last")
        self._stages: list[tuple[int, list[int], Turns, list[int]]] = []
        before = [0] * sources
        for number, (start, weights) in enumerate(stages):
            if len(weights) != sources:
                raise UserError(f"curriculum: {len(weights)} weights from problem {start} on, for {sources} sources")
            wanted = [source for source, weight in enumerate(weights) if weight]
            turns = Turns([weights[source] for source in wanted])
            self._stages.append((start, wanted, turns, before.copy()))
            if number + 1 < len(stages):
                for index in range(starts[number + 1] - start):
                    before[wanted[turns[index][0]]] += 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        start, wanted, turns, before = next(stage for stage in reversed(self._stages) if stage[0] <= index)
        place, count = turns[index - start]
        return wanted[place], before[wanted[place]] + count


def stages_of(task: Task, texts: Sequence[str]) -> list[Stage]:
    """The stages that a task of several sources goes through; without any, the only one, of its own weights.

    Raises:
        UserError: stages for a single source, or what `Curriculum` raises.
    """
    if not isinstance(task, Mixture | UserProblems):
        if texts:
            raise UserError(f"curriculum: {task.name} is a single source; give several files or tasks")
        return [(0, [1.0])]
    stages = [stage(text) for text in texts] or [(0, task.weights)]
    Curriculum(stages, len(task.parts))
    return stages


def follow(task: Task, stages: Sequence[Stage]) -> None:
    """Lets a task of several sources go through its stages; a single one has none."""
    if isinstance(task, Mixture | UserProblems):
        task.turns = Curriculum(stages, len(task.parts))
