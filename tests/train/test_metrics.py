"""The log of a run: valid JSON whatever was measured, and neither damage nor loss passes in silence or stops a run."""

import errno
import json
import math
import os

import pytest

from m1jax.errors import UserError
from m1jax.train.metrics import MetricsLog


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def lines(run):
    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    """Six records of two phases."""
    log = MetricsLog(tmp_path)
    for step in range(1, 4):
        log.append("sft", step, {"loss": 1 / step})
    for step in range(3):
        log.append("rl", step, {"reward": step / 2})
    log.close()
    return tmp_path


def steps(log, phase):
    return [record["step"] for record in log.of(phase)]


def damage(run, change):
    file = run / "metrics.jsonl"
    content = file.read_bytes().splitlines(keepends=True)
    change(content)
    file.write_bytes(b"".join(content))


def test_resume_forgets_what_comes_after(run, caplog):
    log = MetricsLog(run)
    log.resume("rl", 1, 2)
    assert (steps(log, "sft"), steps(log, "rl")) == ([1, 2, 3], [0, 1])
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 0, 1]
    log.append("rl", 2, {"reward": 1.0})
    assert log.count("rl") == 3
    assert len(list((run / "tensorboard").iterdir())) == 1
    log.close()
    assert not caplog.text


def test_what_is_no_number_is_null_and_named(tmp_path):
    values = {"loss": math.nan, "norm": math.inf, "by_update": [1.0, -math.inf, math.nan], "mfu": None, "text": "x"}
    log = MetricsLog(tmp_path)
    log.append("sft", 1, values)
    log.append("sft", 2, {"loss": 0.5})
    log.close()
    first, second = lines(tmp_path)
    assert (first["loss"], first["norm"], first["by_update"], first["mfu"]) == (None, None, [1.0, None, None], None)
    marks = {"loss": "nan", "norm": "inf", "by_update[1]": "-inf", "by_update[2]": "nan"}
    assert first["nonfinite"] == marks
    assert "nonfinite" not in second
    again = MetricsLog(tmp_path)
    assert repr(again.records) == repr(log.records)  # as they were measured, NaN and all
    again.resume("sft", 2, 2)
    assert lines(tmp_path) == [first, second]
    again.close()


DAMAGE = {
    "half a line inside": lambda content: content.__setitem__(1, content[1][:9] + b"\n"),
    "not UTF-8": lambda content: content.__setitem__(1, b'{"phase": "sft", "step": 2, "loss": "\xff"}\n'),
    "zeros": lambda content: content.__setitem__(1, bytes(100) + b"\n"),
    "no record": lambda content: content.__setitem__(1, b"[1, 2]\n"),
    "a record of nothing": lambda content: content.__setitem__(1, b'{"loss": 1.0}\n'),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_left_out_told_and_kept(run, change, caplog):
    damage(run, change)
    before = (run / "metrics.jsonl").read_bytes()
    log = MetricsLog(run)
    assert (steps(log, "sft"), steps(log, "rl")) == ([1, 3], [0, 1, 2])
    log.resume("sft", 3, 3)
    assert "no records in line 2; left out, the file as it was is" in caplog.text
    assert "1 of 3 records of phase 'sft' up to step 3 are missing" in caplog.text
    assert (run / "metrics.damaged-1.jsonl").read_bytes() == before
    assert [line["step"] for line in lines(run)] == [1, 3, 0, 1, 2]
    log.resume("rl", 2, 3)  # told once
    assert caplog.text.count("left out") == 1
    log.close()


@pytest.mark.parametrize("change", [lambda c: c.clear(), lambda c: c.__delitem__(0), lambda c: c.__delitem__(2)])
def test_missing_records_are_told(run, change, caplog):
    damage(run, change)
    log = MetricsLog(run)
    log.resume("sft", 3, 3)
    assert "records of phase 'sft' up to step 3 are missing" in caplog.text
    log.append("sft", 4, {"loss": 0.1})
    log.close()


def test_a_deleted_log_is_told(run, caplog):
    (run / "metrics.jsonl").unlink()
    log = MetricsLog(run)
    log.resume("rl", 2, 3)
    assert "3 of 3 records of phase 'rl' up to step 2 are missing" in caplog.text
    log.close()


def test_the_half_line_of_a_killed_process_is_nothing(run, caplog):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": "rl", "step": 3, "rew')
    log = MetricsLog(run)
    log.resume("rl", 2, 3)
    assert not caplog.text
    assert steps(log, "rl") == [0, 1, 2]
    log.close()


def test_a_last_line_without_its_end_counts(run, caplog):
    damage(run, lambda content: content.__setitem__(-1, content[-1].rstrip(b"\n")))  # as editors do
    log = MetricsLog(run)
    log.resume("rl", 2, 3)
    assert not caplog.text
    assert len(lines(run)) == 6
    log.close()


def test_a_run_that_was_moved_is_noticed(run):
    log = MetricsLog(run)
    run.rename(run.with_name("moved"))
    with pytest.raises(UserError, match="was moved or removed while it was written to"):
        log.append("rl", 3, {"reward": 1.0})
    assert not run.exists()
    run.with_name("moved").rename(run)


@pytest.mark.parametrize("where", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_told_with_the_file(run, where, monkeypatch, recwarn):
    log = MetricsLog(run)
    log.append("rl", 3, {"reward": 1.0})
    fsync = os.fsync
    left = [1 if where == "tensorboard" else 0]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=rf"{where}.*: the disk is full"):
            log.append("rl", 4, {"reward": 1.0})
    log.close()
    assert not recwarn.list  # no thread died of it


def test_tensorboard_shows_the_numbers(run):
    from tensorboardX.proto.event_pb2 import Event

    log = MetricsLog(run)
    log.resume("rl", 2)
    log.close()
    (file,) = (run / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    while content:  # length, its checksum, event, checksum
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    shown = {(v.tag, e.step): round(v.simple_value, 3) for e in events for v in e.summary.value}
    assert shown[("sft/loss", 3)] == 0.333
    assert shown[("rl/reward", 1)] == 0.5
    assert len(shown) == 6
