"""A window of the queue: who is whole goes first, nobody overtakes by more, and what is cut off goes on."""

import contextlib
import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax.chat import Tokenizer
from m1jax.errors import UserError
from m1jax.inference.types import Completion, Ticket
from m1jax.rl.environment import SingleTurn
from m1jax.rl.fifo import Fifo
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.rollout import GenerationRecipe, Rollout
from m1jax.train import guards
from tests import tiny
from tests.rl.test_trainer import RECIPE, Numbers, judge_of
from tests.rl.test_trainer import train as trained

TOKENIZER = Tokenizer.tiny()
GENERATION = GenerationRecipe(
    prompts=2, samples=2, rounds=4, fifo_window=4, max_prompt_tokens=2, max_new_tokens=30, chat=False
)
LONG = (0, 5)
"""problems whose responses take 9 tokens, the others' 3; every step writes two"""


class Writer:
    """Writes its version, and where it is, until a response is as long as its problem wants."""

    rows = 8

    def __init__(self):
        self.version, self.work, self.count = 0, {}, itertools.count()

    def load(self, params, version):
        assert not self.work
        self.version = version

    def submit(self, request):
        ticket = Ticket(next(self.count))
        self.work[ticket] = (request, [])
        return ticket

    def step(self):
        ended = []
        for ticket, (request, written) in list(self.work.items()):
            text = TOKENIZER.decode(request.tokens)
            before = len(request.tokens) - 1
            end = 9 if int(text[0]) in LONG else 3
            for _ in range(2):
                if before + len(written) < end:
                    written.append(before + len(written))
            if before + len(written) == end:
                ended.append((ticket, self.completion(ticket, "stop")))
        return ended

    def cancel(self, tickets):
        assert set(tickets) == set(self.work)
        return [(ticket, self.completion(ticket, "cancelled")) for ticket in tickets]

    def completion(self, ticket, finish):
        _, written = self.work.pop(ticket)
        n = len(written)
        return Completion(
            np.array(written, np.int32),
            np.array(written, np.float32),
            np.array(written, np.float32),
            np.ones(n, bool),
            np.full(n, self.version, np.int32),
            None,
            finish,
            0,
        )


def fifo(generator, recipe=GENERATION, task=None):
    return Fifo(Rollout(task or Numbers(), TOKENIZER, generator, recipe), generator, 0, recipe.fifo_window)


def taken(queue, generator, version, count=2, *, params=None, limit=30):
    generator.load(params, version)
    with contextlib.closing(queue.groups(limit, lambda problem: False)) as groups:
        return list(itertools.islice(groups, count))


def test_who_is_whole_goes_first_within_the_window():
    generator = Writer()
    queue = fifo(generator)
    found = [[group.number for group in taken(queue, generator, version)] for version in range(4)]
    # Problem 0 is overtaken by 1, 2 and 3, and by no other: 4 may begin only when it is done.
    assert found[0] == [1, 2]
    assert found[1][:1] == [3]
    assert found[1][1] == 0
    assert sorted(number for some in found for number in some) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert all(number - found[0][0] < 4 + 2 * batch for batch, some in enumerate(found) for number in some)


def test_tokens_say_who_wrote_them():
    generator = Writer()
    queue = fifo(generator)
    taken(queue, generator, 0)
    late = next(group for group in taken(queue, generator, 1) if group.number == 0)
    for episode in late.episodes:
        assert episode.tokens.tolist() == list(range(9))  # nothing lost, nothing twice
        assert episode.logp.tolist() == list(range(9))
        assert episode.version.tolist() == [0] * 4 + [1] * 5
        assert (episode.finish, episode.ended, episode.length) == ("stop", "done", 9)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_it_goes_on_from_its_state(after):
    generator = Writer()
    queue = fifo(generator)
    want = [taken(queue, generator, version) for version in range(5)]
    queue = fifo(generator)
    for version in range(after):
        taken(queue, generator, version)
    rest, arrays = queue.state()
    taken(queue, generator, after)  # the next batch is made while that is written
    queue = fifo(generator)
    queue.restore(rest, arrays)
    for version in range(after, 5):
        for a, b in zip(taken(queue, generator, version), want[version]):
            assert a.number == b.number
            for mine, other in zip(a.episodes, b.episodes):
                assert dataclasses.replace(mine, **_plain(mine)) == dataclasses.replace(other, **_plain(other))


def _plain(episode):
    return {n: getattr(episode, n).tolist() for n in ("prompt", "tokens", "written", "logp", "version")}


class Halted(EngineGenerator):
    """Stops in the middle of its second step."""

    left = 1

    def step(self):
        if not self.left:
            self.left = -1
            raise KeyboardInterrupt
        self.left -= 1
        return super().step()


def test_what_goes_on_is_what_the_policy_writes():
    """Log-probabilities of a response in two pieces are those of the whole: it is read again, not remembered."""
    model, recipe = tiny.model(), dataclasses.replace(GENERATION, max_new_tokens=24)
    graph, params = nnx.split(model)
    generator = Halted(graph, prompts=4, samples=2, prompt_tokens=2, new_tokens=24)
    queue = fifo(generator, recipe)
    generator.load(params, 0)
    with pytest.raises(KeyboardInterrupt):
        next(queue.groups(24, lambda problem: False))
    found = [episode for group in taken(queue, generator, 1, params=params, limit=24) for episode in group.episodes]
    assert all(set(episode.version.tolist()) == {0, 1} for episode in found)
    for episode in found:
        ids = jnp.concatenate([episode.prompt, episode.tokens])[None]
        logp, _ = model.log_probs(model.forward(ids[:, :-1]).hidden, ids[:, 1:])
        np.testing.assert_allclose(logp[0, len(episode.prompt) - 1 :], episode.logp, atol=2e-4)


def test_a_training_stopped_in_mid_window_ends_alike(tmp_path, monkeypatch):
    """In the middle of an update's batch, with another in flight and responses that are cut off."""
    # The repetition stop makes lengths differ.
    generation = dataclasses.replace(
        RECIPE.generation, fifo_window=4, max_new_tokens=24, repetition_tokens=1, repetition_probability=0.008
    )
    update = dataclasses.replace(RECIPE.update, row_length=32)
    recipe = dataclasses.replace(RECIPE, generation=generation, update=update, staleness=1, iterations=3)
    want, records = trained(tmp_path / "whole", recipe, judge_of(*range(20)))
    assert any(r["older_tokens"] > 0 for r in records[1:])
    stopped = []
    with monkeypatch.context() as patch:
        patch.setattr(guards.StopRequests, "requested", lambda self: not stopped and not stopped.append(1))
        with pytest.raises(SystemExit):
            trained(tmp_path / "run", recipe, judge_of(*range(20)))
    got, others = trained(tmp_path / "run", recipe, judge_of(*range(20)))
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)
    assert others == records


class Rounds(Numbers):
    class environment(SingleTurn):
        pass


def test_what_cannot_be_cut_off():
    with pytest.raises(UserError, match="fifo_window: numbers is attempted in several turns"):
        taken(fifo(Writer(), task=Rounds()), Writer(), 0)
    with pytest.raises(UserError, match="fifo_window = 1 must hold a generation batch: prompts = 2"):
        GenerationRecipe(prompts=2, fifo_window=1)
