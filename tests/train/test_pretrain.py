"""Documents become full rows, whoever reads them; a training stopped in the middle goes on to the same bits."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, cli, from_pretrained, save_pretrained
from m1jax.chat import Tokenizer
from m1jax.errors import STOPPED, UserError
from m1jax.train import packing, placement
from m1jax.train.guards import StopRequests
from m1jax.train.meter import MEASURED
from m1jax.train.pretrain import PretrainRecipe, Rows
from pallas_kernels import PADDING

CONFIG = ModelConfig(
    vocab_size=263,
    hidden_size=16,
    intermediate_size=16,
    layer_types=("lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=2,
    experts_per_token=2,
    initializer_range=0.1,
)


def document(number):
    """Of 3 ... 21 tokens, which say where they come from."""
    tokens = np.arange(4 + (5 * number) % 19, dtype=np.int32) + 100 * np.int32(number)
    return packing.masked(tokens, np.ones(len(tokens), bool))


def rows(share, monkeypatch, **recipe):
    monkeypatch.setattr(placement, "share_of_rows", lambda: share)
    values = dict(steps=6, context="8:2,16", batch_tokens=64, micro_batch_tokens=32) | recipe
    documents = grain.MapDataset.range(10_000).map(lambda n: document(int(n)))
    return Rows(lambda stage: documents.shuffle(seed=stage), PretrainRecipe(**values))


def test_rows_are_full_and_whole(monkeypatch):
    stream = rows((0, 1), monkeypatch)
    for length in (8, 8, 16, 16, 16, 16):
        batch = next(stream)
        assert batch.tokens.shape == (2, 32 // length, length)
        assert (batch.segment_ids != PADDING).all()
        assert batch.mask.all()
        np.testing.assert_array_equal(batch.targets, batch.tokens + 1)  # within one document, always
        inside = np.diff(batch.segment_ids, axis=2) == 0
        assert (np.diff(batch.tokens, axis=2)[inside] == 1).all()
        assert (np.diff(batch.tokens, axis=2)[~inside] != 1).all()
    stream.close()


def test_rows_do_not_depend_on_who_reads_them(monkeypatch):
    halves = []
    for share in (0, 1):
        half = rows((share, 2), monkeypatch)
        halves.append([next(half) for _ in range(6)])
        half.close()
    whole = rows((0, 1), monkeypatch)
    for first, second in zip(*halves):
        batch = next(whole)
        for name, value in batch.fields().items():
            parts = [getattr(half, name) for half in (first, second)]
            np.testing.assert_array_equal(value, np.concatenate(parts, axis=1))
    whole.close()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_the_place_can_be_kept(monkeypatch, stop):
    """By one process, for another number of them too; 2 is where the stage ends."""
    stream = rows((0, 1), monkeypatch)
    for _ in range(stop):
        next(stream)
    kept = json.loads(json.dumps(stream.get_state()))
    again = rows((1, 2), monkeypatch)
    again.set_state(kept)
    monkeypatch.setattr(placement, "share_of_rows", lambda: (0, 1))
    want = next(stream)
    monkeypatch.setattr(placement, "share_of_rows", lambda: (1, 2))
    got = next(again)
    half = want.tokens.shape[1] // 2
    for name, value in want.fields().items():
        np.testing.assert_array_equal(getattr(got, name), value[:, half:])
    stream.close()
    again.close()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(context="32k,1m"), "write LENGTH:UPDATES"),
        (dict(context="8:2,16:3"), "write LENGTH:UPDATES"),
        (dict(context="8:7,16"), "need more than steps = 6"),
        (dict(context="12"), "a context of 12 does not divide micro_batch_tokens = 32"),
        (dict(batch_tokens=48), "does not divide batch_tokens = 48"),
        (dict(context="16:2,8"), "context '16:2,8' shrinks"),
    ],
)
def test_wrong_stages(monkeypatch, wrong, says):
    with pytest.raises(UserError, match=says):
        rows((0, 1), monkeypatch, **wrong)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("files")
    save_pretrained(MiniMaxM1(CONFIG, rngs=nnx.Rngs(0)), home / "model")
    Tokenizer.tiny().save(home / "model")
    for name, text in (("a", "one two three "), ("b", "1 2 3 4 5 6 7 8 9 ")):
        lines = [json.dumps({"text": text * (1 + i % 3)}) + "\n" for i in range(5)]
        (home / f"{name}.jsonl").write_text("".join(lines))
    return home


def test_stopped_in_the_middle_it_ends_in_the_same_bits(files, tmp_path, monkeypatch):
    data = ["--data", f"{files}/a.jsonl=2", f"{files}/b.jsonl", "--context", "16", "--steps", "4"]
    sizes = ["--batch-tokens", "64", "--micro-batch-tokens", "32", "--log-every", "1"]
    command = ["train", "pretrain", str(files / "model"), *data, *sizes, "--runs", str(tmp_path)]
    cli.main([*command, "--name", "undisturbed", "--profile"])
    assert list((tmp_path / "undisturbed/profile").rglob("*.xplane.pb"))

    asked = iter([False, False, True])
    monkeypatch.setattr(StopRequests, "requested", lambda self: next(asked, False))
    with pytest.raises(SystemExit) as leaving:
        cli.main([*command, "--name", "stopped"])
    assert leaving.value.code == STOPPED
    assert not (tmp_path / "stopped/export").exists()
    cli.main([*command, "--name", "stopped"])

    def result(name):
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        weights = [file.read_bytes() for file in sorted((tmp_path / name / "export").glob("*.safetensors"))]
        return [{k: v for k, v in r.items() if k not in MEASURED} for r in records], weights

    assert result("stopped") == result("undisturbed")
    records, weights = result("stopped")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all(r["nll"] > 0 and r["balance"] > 0 and r["grad_norm"] > 0 for r in records)
    assert weights


def test_master_weights_are_float32(files):
    model = from_pretrained(files / "model", dtype=jnp.bfloat16, param_dtype=jnp.float32)
    stored = {leaf.dtype for leaf in jax.tree.leaves(nnx.split(model)[1])}
    assert stored == {jnp.dtype("float32")}
    assert jax.eval_shape(model.forward, jnp.ones((1, 4), jnp.int32)).hidden.dtype == jnp.bfloat16
