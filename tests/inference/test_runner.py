"""The engine with a model: the same tokens whatever else is going on, on one device and on meshes."""

import contextlib
import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig
from m1jax.collectives import collectives
from m1jax.compiling import jit
from m1jax.errors import UserError
from m1jax.inference import Engine, Finished, Request, Sampling, Wrote, programs
from m1jax.inference.capacity import Capacity
from m1jax.inference.runner import ModelRunner, laid_out, parts
from m1jax.sharding import make_mesh, parameter_shardings

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    layer_types=("lightning", "softmax"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_experts=4,
    experts_per_token=2,
    initializer_range=0.3,
    max_position_embeddings=256,
)
SCARCE = Capacity(
    rows=3, max_length=48, page_size=4, pages=15, snapshots=2, steps=3, decode=(3,), prefill=((1, 4), (2, 8)), stall=4
)
ROOMY = dataclasses.replace(SCARCE, rows=1, pages=40, snapshots=0, decode=(1,), prefill=((1, 16),), stall=16)
key = functools.cache(jax.random.key)


@functools.cache
def model() -> MiniMaxM1:
    return MiniMaxM1(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def alone():
    """What a sample of a request writes when nobody else is there, nothing is kept and nothing is scarce."""
    runner = ModelRunner(*nnx.split(model()), ROOMY, constrains=True)

    @functools.cache
    def serve(*of_a_request):
        request = asked(*of_a_request)
        return {completion.sample: completion for _, completion in Engine(runner).run([request])}

    return serve


@pytest.fixture(scope="module", params=[False, True], ids=["", "ahead"])
def scarce(request):
    return ModelRunner(*nnx.split(model()), dataclasses.replace(SCARCE, ahead=request.param), constrains=True)


def asked(tokens, seed=0, samples=1, new=12, junctions=(), keep=True, every_other=None):
    constraint = None if every_other is None else Alternating(every_other, new)
    sampling = Sampling(max_new_tokens=new)
    return Request(
        np.array(tokens, np.int32), key(seed), sampling, samples, junctions=junctions, keep=keep, constraint=constraint
    )


class Alternating:
    """A constraint that allows all ids and one of them by turns. Its matchers must be shown each token before they say
    what may follow."""

    def __init__(self, id, new):
        self.id, self.new, self.begun = id, new, []

    def begin(self):
        self.begun.append(AlternatingMatcher(self.id, self.new))
        return self.begun[-1]


class AlternatingMatcher:
    def __init__(self, id, new):
        self.id, self.new, self.seen = id, new, []

    def allowed(self, left):
        assert left == self.new - len(self.seen)
        return np.array([1 << self.id, 0] if len(self.seen) % 2 else [0xFFFFFFFF] * 2, np.uint32)

    def take(self, tokens):
        self.seen += tokens


def same(completion, expected):
    assert completion.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(completion.logp, expected.logp, atol=1e-4)
    assert completion.finish == expected.finish


prompts = st.builds(
    lambda family, length, tail: (*(np.arange(length) * (family + 3) % 61).tolist(), *tail),
    st.integers(0, 1),
    st.integers(0, 24),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
requests = st.tuples(
    prompts,
    st.integers(0, 2),
    st.integers(1, 3),
    st.sampled_from([5, 16]),
    st.sampled_from([(), (1,)]),
    st.booleans(),
    st.sampled_from([None, None, 7]),
)
actions = st.one_of(
    requests,
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("fork"), st.integers(0, 30)),
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(actions, min_size=3, max_size=20))
def test_random_schedules(alone, scarce, actions):
    """Submit, cancel and fork at random, with pages for two sequences of three and room for two prefixes."""
    engine, events, wanted, forked = Engine(scarce), [], {}, {}
    for action in actions:
        kind, number = action[:2]
        live = [(t, s) for t, samples in engine._live.items() for s in samples]
        if kind == "step":
            for _ in range(number):
                events += engine.step()
        elif kind not in ("cancel", "fork"):
            wanted[engine.submit(asked(*action))] = action
        elif live:
            ticket, sample = live[number % len(live)]
            if kind == "cancel":
                engine.cancel(ticket)
            else:
                begun = engine._live[ticket][sample].new
                with contextlib.suppress(UserError):  # what was on its way has ended it
                    (fork,) = engine.fork(ticket, 1, sample)
                    wanted[fork], forked[fork] = wanted[ticket], (ticket, sample, begun)
    while engine.busy:
        events += engine.step()
    done = {(e.ticket, e.sample): e.completion for e in events if isinstance(e, Finished)}
    for (ticket, sample), completion in done.items():
        if completion.finish == "cancelled":
            continue
        if (id := wanted[ticket][6]) is not None:
            assert set(completion.tokens[1::2].tolist()) <= {id}
        if ticket not in forked:
            same(completion, alone(*wanted[ticket])[sample])
            continue
        teacher_forced(wanted[ticket][0], completion)
        parent, of, begun = forked[ticket]
        assert completion.tokens[:begun].tolist() == done[parent, of].tokens[:begun].tolist()


def teacher_forced(prompt, completion):
    """The log-probabilities are those of the plain forward pass over the whole sequence."""
    tokens = np.zeros(SCARCE.max_length, np.int32)
    row = [*prompt, *completion.tokens]
    tokens[: len(row)] = row
    log_probs = jax.nn.log_softmax(model()(jnp.asarray(tokens)[None])[0], axis=-1)
    at = np.arange(len(prompt), len(row))
    np.testing.assert_allclose(completion.logp, log_probs[at - 1, tokens[at]], atol=1e-4)


def test_pages_run_out_and_prefixes_go(alone, scarce):
    """The schedules above are hard enough: this one preempts, hits and evicts."""
    engine = Engine(scarce)
    requests = [(tuple(range(n, n + 12)), n, 1, 30, (), True) for n in range(6)]
    requests += [((*range(12), 5, n), n, 2, 5, (), True) for n in range(3)]
    for number, completion in engine.run([asked(*request) for request in requests]):
        same(completion, alone(*requests[number])[completion.sample])
    assert engine.counts.preempted > 0
    assert engine.counts.reused > 0


def test_nothing_is_compiled_for_a_request(scarce):
    compiled = []
    watching = [True]

    def listen(event, duration_secs, **kwargs):
        if watching[0] and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs.get("fun_name"))

    engine = Engine(scarce)
    list(engine.run([asked([1, 2])]))  # what JAX itself compiles once, for keys
    jax.monitoring.register_event_duration_secs_listener(listen)
    list(engine.run([asked(range(n, 20), n, 1 + n % 3, 4 + n, (), True, None if n % 2 else 7) for n in range(8)]))
    watching[0] = False
    assert compiled == []


def test_few_rows_run_in_a_small_program_wherever_they_are(alone, monkeypatch):
    """The last of three is alone at the end, in the last row: nothing is moved, and the smallest program serves it."""
    runner = ModelRunner(*nnx.split(model()), dataclasses.replace(SCARCE, pages=40, decode=(1, 3)))
    sizes, copied = [], []
    decode, copy = runner._decode, runner.copy
    monkeypatch.setattr(runner, "_decode", lambda packed, *rest: sizes.append(len(packed)) or decode(packed, *rest))
    monkeypatch.setattr(runner, "copy", lambda copies: copied.extend(copies) or copy(copies))
    requests = [((1, 2, 3), 0, 1, 5, (), False), ((4, 5), 1, 1, 5, (), False), ((6,), 2, 1, 16, (), False)]
    for number, completion in Engine(runner).run([asked(*request) for request in requests]):
        same(completion, alone(*requests[number])[completion.sample])
    assert sizes[0] == 3
    assert sizes[-1] == 1
    moved = [c for c in copied if c.slot_from >= 0 and max(c.slot_from, c.slot_to) < SCARCE.rows]
    assert moved == []


def test_the_pool_lies_beside_the_weights_again_after_a_rest():
    device = jax.devices()[1]
    graph, params = nnx.split(model())
    params = jax.device_put(params, device)
    engine = Engine(ModelRunner(graph, params, ROOMY))
    for _ in range(2):
        list(engine.run([asked([1, 2, 3])]))
        assert {d for leaf in jax.tree.leaves(engine._runner._cache) for d in leaf.devices()} == {device}
        engine.rest()
        engine.load(params, version=1)
        assert {d for leaf in jax.tree.leaves(engine._runner._cache) for d in leaf.devices()} == {device}


def test_constrained_rows_are_shown_each_token_and_free_ones_write_as_ever(alone):
    """More requests than rows, so that some begin while others are in the middle of theirs."""
    capacity = dataclasses.replace(SCARCE, pages=40, decode=(1, 3), ahead=True)
    runner = ModelRunner(*nnx.split(model()), capacity, constrains=True, record_routes=True, top=2)
    ids = [7, None, 9, None, None, 11]
    prompts = [(1, 2, 3), (4, 5), (6,), (7, 8), (9, 1), (2, 2)]
    wanted = [
        dataclasses.replace(asked(prompt, n, every_other=id), record_routes=True)
        for n, (prompt, id) in enumerate(zip(prompts, ids))
    ]
    for number, completion in Engine(runner).run(wanted):
        teacher_forced(prompts[number], completion)
        assert len(completion.routes) == len(prompts[number]) + 11
        same(completion, alone(prompts[number], number, 1, 12, (), True, ids[number])[0])
        if ids[number] is not None:
            (matcher,) = wanted[number].constraint.begun
            assert matcher.seen == completion.tokens.tolist()
            assert set(matcher.seen[1::2]) == {ids[number]}

    engine = Engine(runner)
    engine.submit(dataclasses.replace(asked((1, 2, 3), 0, every_other=7), top=2))
    told = []
    while engine.busy:
        told += [x for e in engine.step() if isinstance(e, Wrote) for x in zip(e.tokens, e.logp, e.top)]
    assert len(told) == 12
    for token, logp, ((_, best), (_, next_best)) in told:  # of the model, whatever the constraint
        assert max(logp, next_best) <= best and (logp <= next_best or logp == best), token


class Nothing:
    """Allows nothing, from the third token on: as a host that does not answer."""

    def begin(self):
        return self

    def __init__(self):
        self.seen = 0

    def allowed(self, left):
        return np.full(2, 0xFFFFFFFF if self.seen < 2 else 0, np.uint32)

    def take(self, tokens):
        self.seen += len(tokens)


def test_where_nothing_is_allowed_nothing_is_written(scarce):
    wanted = dataclasses.replace(asked((1, 2, 3)), constraint=Nothing())
    ((_, completion),) = Engine(scarce).run([wanted])
    assert completion.finish == "fault"
    assert len(completion.tokens) == 2


def test_programs_take_options_of_the_compiler_as_on_a_gpu(monkeypatch, alone):
    """JAX has them for outermost programs only: none may be traced within another."""
    for program in vars(programs).values():
        if isinstance(program, jit):
            options = {"compiler_options": {"xla_cpu_enable_fast_min_max": False}, **program._options}
            monkeypatch.setitem(vars(program), "_jitted", jax.jit(program._function, **options))
    runner = ModelRunner(*nnx.split(model()), dataclasses.replace(SCARCE, ahead=True), constrains=True, top=2)
    wanted = [asked((1, 2, 3)), asked((1, 2, 3), every_other=7)]
    free, constrained = (completion for _, completion in sorted(Engine(runner).run(wanted), key=lambda told: told[0]))
    same(free, alone((1, 2, 3), 0, 1, 12, (), True)[0])
    assert set(constrained.tokens[1::2].tolist()) == {7}


def test_what_fails_is_told(monkeypatch):
    monkeypatch.setattr(ModelRunner, "_compile", lambda self: None)
    runner = ModelRunner(*nnx.split(model()), dataclasses.replace(SCARCE, ahead=True))

    def lost(*arguments):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(programs, "prefill", lost)
    with pytest.raises(RuntimeError, match="the device is lost"):
        list(Engine(runner).run([asked([1, 2, 3])]))


def on(spec):
    return contextlib.nullcontext() if spec is None else jax.set_mesh(make_mesh(spec))


def mesh_runner(spec, *, ahead=False):
    """On a mesh, from parameters that lie as training lays them out."""
    graph, params = nnx.split(model())
    with on(spec):
        if spec is not None:
            params = jax.device_put(params, parameter_shardings(params, jax.sharding.get_mesh()))
        sizes = {"rows": 2, "pages": 30, "decode": (2,), "prefill": ((1, 8),), "stall": 8}
        capacity = dataclasses.replace(SCARCE, parts=parts(), ahead=ahead, **sizes)
        return ModelRunner(graph, params, capacity), params


@pytest.mark.parametrize(
    ("spec", "ahead"),
    [("tensor=2,expert=4", False), ("fsdp=4,tensor=2", True), ("data=2,fsdp=2,expert=2", False)],
)
def test_on_a_mesh(alone, spec, ahead):
    requests = [(tuple(range(n, n + 5)), n, 2, 8, (), True) for n in range(6)]
    runner, params = mesh_runner(spec, ahead=ahead)
    with on(spec):
        engine = Engine(runner)
        for number, completion in engine.run([asked(*request) for request in requests]):
            same(completion, alone(*requests[number])[completion.sample])
        loaded = engine.load(jax.tree.map(jnp.zeros_like, params), version=5)
        ((_, completion),) = engine.run([asked([1, 2, 3])])
    assert loaded.version == 5 and loaded.seconds > 0
    assert loaded.bytes == held(runner._weights.model) - held(params)
    np.testing.assert_allclose(completion.logp, -np.log(64), rtol=1e-6)
    assert set(completion.version) == {5}


def held(tree):
    """Bytes on all devices together."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)


@pytest.mark.parametrize("spec", ["fsdp=8", "fsdp=4,tensor=2", "fsdp=2,expert=4", "tensor=2,expert=4"])
def test_no_weights_are_gathered_for_a_token(spec, monkeypatch):
    monkeypatch.setattr(ModelRunner, "_compile", lambda self: None)
    runner, params = mesh_runner(spec)
    with on(spec), runner._on_mesh():
        arrays = runner._weights, runner._cache, runner._packed, None, np.int32(1), np.int32(1), np.bool_(False)
        program = programs.decode.lower(*arrays, runner.capacity, False, 0).compile()
    moved = sum(c.bytes for c in collectives(program))  # the loop over steps counts once
    assert moved < 0.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))  # activations; gathered weights: 0.3 up


@pytest.mark.parametrize("spec", ["fsdp=8", "fsdp=2,tensor=2,expert=2"])
def test_weights_are_laid_out_by_their_devices(spec, monkeypatch):
    """`jax.device_put` is left with what lies right already: all else it would take by way of the host."""
    moved, put = [], jax.device_put

    def watched(x, to):
        moved.extend(
            a for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(to)) if not b.is_equivalent_to(a.sharding, a.ndim)
        )
        return put(x, to)

    with on(spec):
        mesh = jax.sharding.get_mesh()
        there = put(model(), parameter_shardings(model(), mesh))
        monkeypatch.setattr(jax, "device_put", watched)
        whole = laid_out(there, parameter_shardings(there, mesh, whole=True))
    assert moved == []
    assert held(whole) > held(there)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(model()))


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,tensor=2,expert=2"])
def test_states_and_pages_are_copied_where_they_lie(spec, monkeypatch):
    monkeypatch.setattr(ModelRunner, "_compile", lambda self: None)
    runner, _ = mesh_runner(spec)
    with on(spec), runner._on_mesh():
        program = programs.copy.lower(runner._cache, np.zeros((4, 4), np.int32)).compile()
    assert collectives(program) == []
