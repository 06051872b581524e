"""The engine without a model: whatever happens around a request, its completion is what the definition says."""

import collections
import contextlib
import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.inference.capacity import Capacity
from m1jax.inference.engine import Engine
from m1jax.inference.types import Finished, RepetitionStop, Request, Sampling, ThinkingBudget, Wrote
from tests.inference.fake import VOCAB, FakeRunner, check, expected

CAPACITY = Capacity(
    rows=3, max_length=40, page_size=4, pages=14, snapshots=3, steps=3, decode=(1, 3), prefill=((1, 3), (2, 8)), stall=8
)
ROOMY = dataclasses.replace(CAPACITY, rows=8, pages=200, snapshots=16, decode=(1, 2, 4, 8))


def request(tokens, seed=0, samples=1, **options):
    sampling = {"max_new_tokens": 8} | {k: options.pop(k) for k in list(options) if k in SAMPLING}
    return Request(np.array(tokens, np.int32), key(seed), Sampling(**sampling), samples, **options)


key = functools.cache(jax.random.key)
SAMPLING = {field.name for field in dataclasses.fields(Sampling)}


def finished(engine):
    """All that happens until the engine is at rest."""
    events = []
    while engine.busy:
        audit(engine)
        events += engine.step()
    audit(engine)
    return {(e.ticket, e.sample): e.completion for e in events if isinstance(e, Finished)}


def audit(engine):
    """The books are right: every place has as many holders as are known to hold it."""
    for scheduler in engine._parts:
        audit_part(scheduler)


def audit_part(scheduler):
    held = [page for s in scheduler.running for page in s.pages]
    held += [page for snapshot in scheduler.prefixes._kept.values() for page in snapshot.pages]
    assert collections.Counter(held) == {
        page: scheduler.pages.holders(page) for page in scheduler.pages.numbers if scheduler.pages.holders(page)
    }
    rows = [s.row for s in scheduler.running]
    assert len(set(rows)) == len(rows) == scheduler.capacity.rows - scheduler.rows.free
    assert all(s.row == -1 and not s.pages and not s.junctions for s in scheduler.waiting)
    promised = [node for s in scheduler.running for node in s.junctions.values()]
    nodes = list(walk(scheduler.prefixes.root))
    assert set(promised) == {node for node in nodes if node.promised}
    for node in nodes:
        assert node is scheduler.prefixes.root or node.snapshot or node.promised or len(node.children) > 1
        assert (node in scheduler.prefixes._kept) == (node.snapshot is not None)


def walk(node):
    yield node
    for child in node.children.values():
        assert child.parent is node
        assert child.depth == node.depth + len(child.edge)
        yield from walk(child)


@pytest.mark.parametrize("capacity", [CAPACITY, ROOMY])
def test_completions_are_what_the_definition_says(capacity):
    engine = Engine(FakeRunner(capacity))
    requests = [request(range(1, 2 + n), seed=n, samples=1 + n % 3, record_routes=n % 2 == 0) for n in range(12)]
    tickets = [engine.submit(r) for r in requests]
    done = finished(engine)
    assert len(done) == sum(r.samples for r in requests)
    for r, ticket in zip(requests, tickets):
        for sample in range(r.samples):
            check(r, done[ticket, sample])
            assert done[ticket, sample].sample == sample


def test_events_tell_all_tokens_in_order():
    engine = Engine(FakeRunner(CAPACITY))
    engine.submit(request([1, 2, 3], samples=2, max_new_tokens=7))
    told, completions = {0: [], 1: []}, {}
    while engine.busy:
        for event in engine.step():
            assert event.sample not in completions
            if isinstance(event, Wrote):
                assert len(event.tokens) == len(event.logp) > 0
                told[event.sample] += event.tokens
            else:
                completions[event.sample] = event.completion
    assert {sample: c.tokens.tolist() for sample, c in completions.items()} == told


def test_run_yields_as_they_end_and_keeps_what_others_wait_for():
    engine = Engine(FakeRunner(ROOMY))
    other = engine.submit(request([9], max_new_tokens=2))
    lengths = [12, 3, 6]
    order = [
        (number, len(completion.tokens))
        for number, completion in engine.run([request([n], max_new_tokens=n) for n in lengths])
    ]
    assert order == [(1, 3), (2, 6), (0, 12)]
    assert [event.ticket for event in engine.step() if isinstance(event, Finished)] == [other]


def test_run_left_early_leaves_nothing_behind():
    engine = Engine(FakeRunner(CAPACITY))
    for _ in engine.run([request([n], max_new_tokens=2 * n) for n in range(1, 9)]):
        break
    assert not engine.busy
    assert not any(part.running for part in engine._parts)
    audit(engine)


def test_ends():
    free = request([3, 4], max_new_tokens=12)
    tokens = expected(free, 0).tokens
    engine = Engine(FakeRunner(ROOMY))
    ((_, stopped),) = engine.run([request([3, 4], max_new_tokens=12, end_ids=(VOCAB - 1, tokens[5]))])
    assert stopped.finish == "stop"
    assert stopped.tokens.tolist() == tokens[: tokens.index(tokens[5]) + 1]
    repeated = request([3, 4], max_new_tokens=40 - 2, repetition_stop=RepetitionStop(tokens=4))
    ((_, stopped),) = engine.run([repeated])
    assert stopped.finish == "repetition"
    assert (stopped.logp[-4:] > np.log(0.99)).all()
    check(repeated, stopped)
    engine._runner.faulty = {tokens[6]}
    ((_, sick), (_, well)) = sorted(engine.run([free, request([5], max_new_tokens=3)]), key=lambda pair: pair[0])
    assert (sick.finish, sick.tokens.tolist()) == ("fault", tokens[: tokens.index(tokens[6]) + 1])
    assert well.finish == "length"
    audit(engine)


def test_a_thought_is_closed_when_it_has_taken_all_it_may():
    budget = ThinkingBudget(tokens=5, close=(48, 49))
    thinking = request([3, 4], max_new_tokens=15, thinking_budget=budget)
    engine = Engine(FakeRunner(ROOMY))
    ((_, completion),) = engine.run([thinking])
    assert completion.tokens[5:7].tolist() == [48, 49]
    assert completion.written.tolist() == [True] * 5 + [False] * 2 + [True] * 8
    assert (completion.logp[5:7] == 0).all()
    check(thinking, completion)
    cut = request([3, 4], max_new_tokens=6, thinking_budget=budget)
    ((_, completion),) = engine.run([cut])
    assert completion.tokens[5:].tolist() == [48]
    assert completion.finish == "length"


def test_a_first_token_is_told_at_once():
    engine = Engine(FakeRunner(ROOMY))
    engine.submit(request([1, 2]))
    assert [len(event.tokens) for event in engine.step()] == [1]
    assert [len(event.tokens) for event in engine.step()] == [ROOMY.steps]


def test_the_next_call_is_on_its_way_before_the_last_ones_tokens_are_told():
    """... whoever comes and goes meanwhile: who has ended writes no more, and who comes is read between two calls. Only
    first tokens are told before anything else begins."""
    engine = Engine(FakeRunner(dataclasses.replace(ROOMY, ahead=True)))
    requests = [request([n, n + 1], seed=n, max_new_tokens=5 + 6 * n, end_ids=(7,)) for n in range(4)]
    tickets = [engine.submit(r) for r in requests]
    done, told, on_the_way, first = {}, set(), [], []
    while engine.busy:
        audit(engine)
        events = engine.step()
        done |= {e.ticket: e.completion for e in events if isinstance(e, Finished)}
        on_the_way.append(len(engine._runner.unseen))
        writing = {e.ticket for e in events if isinstance(e, Wrote)}
        first.append(not writing <= told)
        told |= writing
        if len(on_the_way) == 3:
            requests.append(request([7, 8, 9], max_new_tokens=4))
            tickets.append(engine.submit(requests[-1]))
    for r, ticket in zip(requests, tickets):
        check(r, done[ticket])
    assert on_the_way == [not one for one in first[:-1]] + [0]
    assert 0 < sum(first) < len(first) - 4


@pytest.mark.parametrize("ahead", [False, True])
def test_prompts_are_read_together_where_reading_one_costs_as_much(ahead):
    """... a row that falls free waits for others while all the rest write, and nobody waits where rows are free."""
    engine = Engine(FakeRunner(dataclasses.replace(ROOMY, ahead=ahead, prefill=((8, 8),), stall=64, steps=1)))
    requests = [request([n, n + 1], seed=n, max_new_tokens=3 + 5 * (n % 8)) for n in range(24)]
    tickets = [engine.submit(r) for r in requests]
    read, free, done = [], [], {}
    while engine.busy:
        audit(engine)
        (part,) = engine._parts
        free.append(part.rows.free if part.waiting else 0)
        before, writing = part.counts.prefilled, len(part.running)
        done |= {e.ticket: e.completion for e in engine.step() if isinstance(e, Finished)}
        if part.counts.prefilled > before:
            read.append(part.counts.prefilled - before)
            assert sum(free) >= writing if ahead else sum(free) == free[-1]
            free.clear()
    for r, ticket in zip(requests, tickets):
        check(r, done[ticket])
    assert read[0] == 8
    assert sum(read) == 24
    assert len(read) < 10 if ahead else len(read) > 15


def test_who_comes_where_rows_are_free_waits_for_nobody():
    engine = Engine(FakeRunner(dataclasses.replace(ROOMY, ahead=True)))
    for n in range(6):
        engine.submit(request([n, n + 1], seed=n))
        engine.step()
        assert not engine._parts[0].waiting


def test_a_group_prefills_its_prompt_once():
    engine = Engine(FakeRunner(ROOMY))
    group = request(range(30), samples=20, max_new_tokens=4, keep=False)
    for _, completion in engine.run([group]):
        check(group, completion)
    assert engine.counts.prefilled == 29
    assert engine.counts.reused == 19 * 29


def test_a_growing_history_prefills_only_what_is_new():
    engine = Engine(FakeRunner(ROOMY))
    history = [1, 2, 3, 4, 5]
    for turn in range(4):
        before = engine.counts.prefilled
        asked = request(history, seed=turn, max_new_tokens=4)
        ((_, completion),) = engine.run([asked])
        check(asked, completion)
        assert engine.counts.prefilled - before == (4 if turn == 0 else 3)  # the last token written, and two of three
        history = [*history, *completion.tokens.tolist(), 40 + turn, 41, 42]


def test_where_prompts_part_is_found():
    """A system prompt that nobody marked: the second request finds it, the third and later ones are spared it."""
    system, engine = list(range(20)), Engine(FakeRunner(ROOMY))
    spared = []
    for user in range(3):
        before = engine.counts.prefilled
        asked = request([*system, 30 + user, 7, 8, 9])
        ((_, completion),) = engine.run([asked])
        check(asked, completion)
        spared.append(23 - (engine.counts.prefilled - before))
    assert spared == [0, 0, 20]


def test_requests_that_come_together_share_what_they_have_in_common():
    system, engine = list(range(20)), Engine(FakeRunner(ROOMY))
    requests = [request([*system, 30 + user, 7, 8, 9], keep=False) for user in range(6)]
    for number, completion in engine.run(requests):
        check(requests[number], completion)
    assert engine.counts.prefilled == 20 + 6 * 3


def test_marked_junctions_are_kept():
    engine = Engine(FakeRunner(ROOMY))
    list(engine.run([request([*range(8), 30, 31], junctions=(8,), keep=False)]))
    before = engine.counts.prefilled
    list(engine.run([request([*range(8), 40, 41])]))
    assert engine.counts.prefilled - before == 1


def test_without_room_for_prefixes_all_is_computed():
    engine = Engine(FakeRunner(dataclasses.replace(ROOMY, snapshots=0)))
    group = request(range(30), samples=3)
    for _, completion in engine.run([group, group]):
        check(group, completion)
    assert engine.counts.prefilled == 6 * 29


def test_preempted_when_pages_run_out():
    engine = Engine(FakeRunner(CAPACITY))
    requests = [request([n, 1, 2, 3], seed=n, max_new_tokens=30, record_routes=True) for n in range(5)]
    for number, completion in engine.run(requests):
        check(requests[number], completion)
    assert engine.counts.preempted > 0


def test_a_long_prompt_lets_others_decode():
    capacity = dataclasses.replace(ROOMY, max_length=400, stall=3)
    engine = Engine(FakeRunner(capacity))
    short = engine.submit(request([1], max_new_tokens=100))
    engine.step()
    engine.submit(request([2] * 150, max_new_tokens=1))
    for _ in range(20):
        assert any(isinstance(event, Wrote) and event.ticket == short for event in engine.step())
    assert engine.counts.prefilled == 20 * 3


def test_parts_of_a_mesh_share_the_work_and_keep_groups_together():
    engine = Engine(FakeRunner(dataclasses.replace(ROOMY, rows=4, decode=(4,), parts=2)))
    groups = [request([n, *range(20)], samples=4, max_new_tokens=6, keep=False) for n in range(4)]
    for group in groups:
        engine.submit(group)
    assert [part.load for part in engine._parts] == [8, 8]
    done = finished(engine)
    for (ticket, _), completion in done.items():
        check(groups[ticket.number], completion)
    assert engine.counts.prefilled == 4 * 20


def test_cancel():
    engine = Engine(FakeRunner(CAPACITY))
    tickets = [engine.submit(request([n, 2], samples=2, max_new_tokens=20)) for n in range(4)]
    engine.step()
    engine.cancel(tickets[0])
    engine.cancel(tickets[3])
    done = finished(engine)
    for number, ticket in enumerate(tickets):
        for sample in range(2):
            completion = done[ticket, sample]
            if number in (0, 3):
                assert completion.finish == "cancelled"
                assert len(completion.tokens) < 20
            else:
                check(request([number, 2], samples=2, max_new_tokens=20), completion)
    engine.cancel(tickets[0])  # long gone
    assert not engine.busy


def test_fork():
    engine = Engine(FakeRunner(ROOMY))
    asked = request([5, 6, 7], max_new_tokens=12, record_routes=True)
    ticket = engine.submit(asked)
    engine.step()
    engine.step()
    forks = engine.fork(ticket, 3)
    done = finished(engine)
    check(asked, done[ticket, 0])
    written = 4  # the first token alone, then three steps
    for number, fork in enumerate(forks):
        completion = done[fork, 1 + number]
        assert completion.tokens[:written].tolist() == done[ticket, 0].tokens[:written].tolist()
        check(asked, completion, inherited=written)
    assert engine.counts.prefilled == 2  # the forks found their parent's states
    with pytest.raises(UserError, match="sample 0 of request 0 is not running"):
        engine.fork(ticket, 1)


def test_new_weights():
    engine = Engine(FakeRunner(CAPACITY))
    old = engine.submit(request([1, 2, 3], max_new_tokens=9))
    new = [engine.submit(request([1, 2, 3, 4, 5, 6, 7, n], max_new_tokens=9)) for n in range(4)]
    engine.step()
    engine.load(7, version=3)
    done = finished(engine)
    assert done[old, 0].version.tolist() == [0] + [3] * 8
    for n, ticket in enumerate(new):
        assert set(done[ticket, 0].version) == {3}
        check(request([1, 2, 3, 4, 5, 6, 7, n], max_new_tokens=9), done[ticket, 0], weights=7)


def test_nothing_that_older_weights_computed_is_handed_on():
    engine = Engine(FakeRunner(ROOMY))
    mixed = engine.submit(request([1, 2, 3], max_new_tokens=20))
    engine.step()
    half_read = engine.submit(request([9] * 30))
    engine.step()
    assert engine._live[half_read][0].pending
    engine.load(7, version=1)
    follower = engine.submit(request([9] * 30, seed=2))
    done = finished(engine)
    check(request([9] * 30), done[half_read, 0], weights=7)
    check(request([9] * 30, seed=2), done[follower, 0], weights=7)
    history = request([1, 2, 3, *done[mixed, 0].tokens, 4], max_new_tokens=5)
    ((_, completion),) = engine.run([history])
    check(history, completion, weights=7)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request([]), "the prompt is empty"),
        (request([1, VOCAB]), f"prompt holds token {VOCAB}, but the vocabulary has {VOCAB}"),
        (request([-1]), "prompt holds token -1"),
        (
            Request(np.zeros((1, 2), np.int32), jax.random.key(0)),
            r"tokens must be integers \[prompt\], not int32\[1, 2\]",
        ),
        (Request(np.zeros(2, np.float32), jax.random.key(0)), "not float32"),
        (request([1] * 35), "35 tokens and max_new_tokens = 8 exceed the engine's max_length = 40 by 3"),
        (request([1], max_new_tokens=0), "max_new_tokens = 0 must be at least 1"),
        (request([1], temperature=-0.5), "temperature = -0.5"),
        (request([1], temperature=float("nan")), "temperature = nan"),
        (request([1], top_p=0.0), "top_p = 0.0 must be above 0"),
        (request([1], end_ids=(VOCAB,)), f"end_ids holds token {VOCAB}"),
        (request([1], end_ids=tuple(range(9))), "number of end_ids = 9 must be at most 8"),
        (request([1], repetition_stop=RepetitionStop(tokens=0)), "repetition_stop.tokens = 0"),
        (request([1], repetition_stop=RepetitionStop(probability=1.0)), "repetition_stop.probability = 1.0"),
        (request([1], thinking_budget=ThinkingBudget(tokens=0, close=(1,))), "thinking_budget.tokens = 0"),
        (request([1], thinking_budget=ThinkingBudget(tokens=1, close=())), "thinking_budget.close"),
        (request([1], samples=0), "samples = 0"),
        (request([1, 2], junctions=(3,)), "junction 3 lies outside the prompt of 2 tokens"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(asked, message):
    engine = Engine(FakeRunner(CAPACITY))
    with pytest.raises(UserError, match=message):
        engine.submit(asked)
    assert not engine.busy


def test_requests_beyond_this_engine_are_refused():
    engine = Engine(FakeRunner(dataclasses.replace(CAPACITY, pages=5)))
    with pytest.raises(UserError, match="need 6 pages of keys and values, the engine has 5"):
        engine.submit(request([1] * 14))
    runner = FakeRunner(CAPACITY)
    runner.records_routes = False
    with pytest.raises(UserError, match="not made to record"):
        Engine(runner).submit(request([1], record_routes=True))


# Prompts of a few families, so that they share beginnings of all lengths.
prompts = st.builds(
    lambda family, length, tail: [*(np.arange(length) * (family + 1) % 7).tolist(), *tail],
    st.integers(0, 1),
    st.integers(0, 20),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
)
thoughts = st.builds(
    ThinkingBudget,
    tokens=st.integers(1, 6),
    close=st.sampled_from([(48, 49), (47,)]),
    open=st.sampled_from([(), (2,), (3,)]),
)
requests = st.builds(
    request,
    prompts,
    seed=st.integers(0, 3),
    samples=st.integers(1, 3),
    max_new_tokens=st.integers(1, 14),
    end_ids=st.sampled_from([(), (0, 1), (7, 8, 9, 10)]),
    repetition_stop=st.none() | st.builds(RepetitionStop, tokens=st.integers(1, 6)),
    thinking_budget=st.none() | thoughts,
    record_routes=st.booleans(),
    junctions=st.sampled_from([(), (1,)]),
    keep=st.booleans(),
)
actions = st.one_of(
    requests,
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("fork"), st.integers(0, 30)),
    st.tuples(st.just("load"), st.integers(0, 30)),
)
capacities = st.builds(
    lambda rows, pages, snapshots, page_size, steps, parts, ahead: Capacity(
        rows=rows,
        max_length=40,
        page_size=page_size,
        pages=pages + -(-40 // page_size),
        snapshots=snapshots,
        steps=steps,
        decode=tuple(sorted({1, (rows + 1) // 2, rows})),
        prefill=((1, 3), (2, 8)),
        stall=3,
        parts=parts,
        ahead=ahead,
    ),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1, 1, 2]),
    st.booleans(),
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(capacities, st.lists(actions, max_size=25))
def test_random_schedules(capacity, actions):
    engine = Engine(FakeRunner(capacity))
    asked, cancelled, inherited, version, of_version = {}, set(), {}, 0, {}
    events = []

    def live():
        return [(t, s) for t, samples in engine._live.items() for s in samples]

    for action in actions:
        audit(engine)
        if isinstance(action, Request):
            ticket = engine.submit(action)
            asked[ticket], of_version[ticket] = action, version
            continue
        kind, number = action
        if kind == "step":
            for _ in range(number):
                events += engine.step()
        elif kind == "load":
            version += 1
            engine.load(version, version)
        elif live():
            ticket, sample = live()[number % len(live())]
            if kind == "cancel":
                engine.cancel(ticket)
                cancelled.add(ticket)
                continue
            with contextlib.suppress(UserError):  # what was on its way has ended it
                for fork in engine.fork(ticket, 2, sample):
                    asked[fork], inherited[fork] = asked[ticket], engine._live[ticket][sample].new
                    of_version[fork] = of_version[ticket]
    done = finished(engine)
    done |= {(e.ticket, e.sample): e.completion for e in events if isinstance(e, Finished)}
    assert {ticket for ticket, _ in done} == set(asked)
    for (ticket, _), completion in done.items():
        check_one(asked[ticket], completion, ticket in cancelled, inherited.get(ticket, 0), of_version[ticket])
    for part in engine._parts:
        part.prefixes.clear()
        audit(engine)
        assert part.pages.free == capacity.pages
        assert not part.prefixes.root.children


def check_one(asked, completion, cancelled, inherited, first):
    """Tokens that several versions wrote have no definition: their states are mixed. All others have."""
    n = len(completion.tokens)
    assert all(version >= first for version in completion.version)
    assert n == len(completion.logp) == len(completion.written) == len(completion.version)
    assert (np.diff(completion.version) >= 0).all()
    assert completion.finish == "cancelled" or not cancelled or n > 0
    if completion.finish == "cancelled":
        assert cancelled
    elif len(set(completion.version)) == 1:
        check(asked, completion, weights=int(completion.version[0]), inherited=inherited)


def test_one_sample_is_cancelled_and_the_others_go_on():
    engine = Engine(FakeRunner(ROOMY))
    several = request([1, 2], samples=3, max_new_tokens=20)
    ticket = engine.submit(several)
    begun = engine.step()
    engine.cancel(ticket, 1)
    done = finished(engine)
    assert done[ticket, 1].finish == "cancelled"
    told = [token for event in begun if event.sample == 1 for token in event.tokens]
    assert done[ticket, 1].tokens.tolist() == told
    for sample in (0, 2):
        check(several, done[ticket, sample])


def test_what_an_engine_was_not_made_for():
    engine = Engine(FakeRunner(CAPACITY))
    with pytest.raises(UserError, match="top = 1, but this engine was made to tell from 0 to 0"):
        engine.submit(request([1], top=1))
    with pytest.raises(UserError, match="it has a constraint"):
        engine.submit(request([1], constraint=object()))
    assert not engine.busy


class Seen(list):
    """A constraint that allows everything, and the matcher of its only completion."""

    def begin(self):
        return self

    def take(self, tokens):
        self.extend(tokens)


@pytest.mark.parametrize("capacity", [CAPACITY, ROOMY, dataclasses.replace(ROOMY, ahead=True)])
def test_a_matcher_is_told_every_token_once(capacity):
    """Also where the runner has shown it some of them while it wrote, or all, and goes on before the engine has seen
    them."""

    class Asking(FakeRunner):
        constrains = True

        def decode(self, sequences, allowances, most, patience, after):
            guided = [s for s in sequences if s.matcher is not None]
            assert after is None or not guided or set(sequences) <= set(after.sequences)
            followed.update(after is not None for _ in guided)
            call = super().decode(sequences, allowances, most, patience, after)
            unseen = 1 if most == 1 or not capacity.ahead else 0
            for i, sequence in enumerate(sequences):
                if sequence in guided:
                    seen, known = sequence.matcher, sequence.tokens[sequence.prompt :]
                    assert seen[: len(known)] == known and (after is not None or len(seen) == len(known))
                    for token in call.out.tokens[i, : call.out.counts[i] - unseen].tolist():
                        sequence.show(token)
            return call

    followed = set()

    def run(*constraints):
        engine = Engine(Asking(capacity))
        budget = ThinkingBudget(tokens=4, close=(48, 49))
        requests = [
            request(
                [n, n + 1],
                seed=n,
                max_new_tokens=5 + 2 * n,
                thinking_budget=budget if n % 2 else None,
                constraint=constraint,
            )
            for n, constraint in enumerate(constraints)
        ]
        tickets = [engine.submit(r) for r in requests]
        done = finished(engine)
        for r, ticket in zip(requests, tickets):
            check(r, done[ticket, 0])
        return [done[ticket, 0].tokens.tolist() for ticket in tickets]

    free = run(*[None] * 6)
    watched = [Seen(), None, None, Seen(), Seen(), None]
    assert run(*watched) == free
    assert [list(seen) for seen in watched if seen is not None] == [free[n] for n in (0, 3, 4)]
    assert followed == ({False, True} if capacity.ahead else {False})
