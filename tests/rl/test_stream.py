"""Which version writes which batch: exact, whoever is faster."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from m1jax.errors import UserError
from m1jax.rl.experience import Made
from m1jax.rl.stream import Stream, split
from tests.rl.episodes import scored


class Notes:
    """Makes batches that say by what, and in which thread."""

    def __init__(self, delay=0.0):
        self.delay, self.count, self.threads = delay, 0, set()

    def batch(self, params, version):
        time.sleep(self.delay)
        self.threads.add(threading.current_thread().name)
        assert float(params["w"]) == version  # the parameters are those of that version
        self.count += 1
        return Made(version=version, scored=[scored([self.count, 0])], figures={"number": self.count})

    def state(self):
        return {"count": self.count}, {"carried": {}}

    def restore(self, stored, arrays):
        self.count = stored["count"]


def params(version):
    return {"w": jnp.float32(version)}


def trained(stream, first, batches, until=None):
    found = []
    for version in range(first, batches if until is None else until):
        given = params(version)
        stream.give(given, version)
        made = stream.take()
        found.append((int(made.figures["number"]), made.version))
        given["w"].delete()  # as the step donates it
    return found


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_versions(staleness, delay):
    notes = Notes(delay)
    with Stream(notes, staleness=staleness, batches=6) as stream:
        found = trained(stream, 0, 6)
    assert found == [(batch + 1, max(batch - staleness, 0)) for batch in range(6)]
    assert (threading.current_thread().name in notes.threads) == (staleness == 0)


@pytest.mark.parametrize("staleness", [0, 2])
def test_what_is_in_flight_is_kept(staleness):
    with Stream(Notes(), staleness=staleness, batches=7) as stream:
        want = trained(stream, 0, 7)
    with Stream(Notes(0.01), staleness=staleness, batches=7) as stream:
        before = trained(stream, 0, 7, until=3)
        rest, arrays = stream.state()
    assert len(rest["ready"]) == staleness
    with Stream(Notes(), staleness=staleness, batches=7) as stream:
        stream.restore(rest, arrays)
        assert before + trained(stream, 3, 7) == want


def test_evaluation_waits_for_its_turn():
    notes = Notes(0.01)
    with Stream(notes, staleness=2, batches=5) as stream:
        stream.give(params(0), 0)
        assert stream.run(lambda experience, own: (experience.count, float(own["w"])), params(9)) == (3, 9.0)


@pytest.mark.parametrize("staleness", [0, 1])
def test_on_another_device(staleness):
    where = []

    class Looks(Notes):
        def batch(self, params, version):
            where.append((params["w"].devices(), jnp.zeros(()).devices()))
            return super().batch(params, version)

    others, mesh = split("data=1")
    assert others == jax.devices()[:-1]
    with Stream(Looks(), staleness=staleness, batches=2, mesh=mesh) as stream:
        trained(stream, 0, 2)
        assert stream.run(lambda _, own: own["w"].devices(), params(2)) == {jax.devices()[-1]}
    assert where == [({jax.devices()[-1]}, {jax.devices()[-1]})] * 2


def test_what_a_version_cost():
    with Stream(Notes(), staleness=1, batches=3, mesh=split("data=1")[1]) as stream:
        figures = []
        for version in range(3):
            stream.give(params(version), version)
            figures.append(stream.take().figures)
    assert [f["sync_bytes"] for f in figures] == [4, 4, 4]
    assert all(f["generation_seconds"] >= 0 and f["sync_seconds"] >= 0 for f in figures)


@pytest.mark.parametrize(
    ("spec", "why"),
    [("data=8", "for 1 to 7 devices: there are 8"), ("data=-1", "for 1 to 7"), ("rows=2", "axis 'rows' is unknown")],
)
def test_a_split_that_is_none(spec, why):
    with pytest.raises(UserError, match=why):
        split(spec)


def test_a_failure_reaches_the_trainer():
    class Fails(Notes):
        def batch(self, params, version):
            raise UserError("no problem is left")

    with Stream(Fails(), staleness=1, batches=2) as stream:
        stream.give(params(0), 0)
        with pytest.raises(UserError, match="no problem is left"):
            stream.take()
