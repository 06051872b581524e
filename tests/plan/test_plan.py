"""The planner's arithmetic: exact where the sharding table decides, and what it says to a user."""

import json
import math

import pytest

from m1jax import cli
from m1jax.config import ModelConfig
from m1jax.errors import UserError
from m1jax.plan import hardware, search
from m1jax.plan.memory import elements, memory
from m1jax.plan.setup import Setup
from m1jax.plan.speed import exchanges, speed
from m1jax.sharding import parse_mesh

M1 = ModelConfig.preset("m1-456b")
V5P = hardware.CHIPS["v5p"]


def setup(mesh="fsdp=16,expert=8,tensor=4", **changes):
    return Setup(**{"model": M1, "task": "rl", "mesh": parse_mesh(mesh), "context": 32_768, "rows": 128, **changes})


@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [("v5p-1024", "v5p", 512), ("v6e-256", "v6e", 256), ("h200x64", "h200", 64), ("V5Px8", "v5p", 8)],
)
def test_names_of_hardware(name, kind, devices):
    assert hardware.parse_hardware(name)[::2] == (kind, devices)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("abacus", "'abacus' is unknown; known: v5e"),
        ("h300x8", "did you mean h800x8?"),
        ("h10", "did you mean h100x8?"),
        ("h20x64", "did you mean h200x64?"),
        ("v5pp-16", "did you mean v5px16?"),
        ("h100", "how many? For eight of them write h100x8, for the fewest add --search"),
        ("V5P", "write v5px8"),
        ("h200 8", "did you mean h200x8?"),
        ("x8", "known: v5e"),
        ("", "known: v5e"),
        ("h200-8", "write h200x8"),
        ("v5p-3", "3 is no number of v5p's cores, 2 to a chip"),
        ("h100x0", "'h100x0' is none at all; write h100x8"),
        ("v6e-0", "write v6ex8"),
    ],
)
def test_unknown_hardware(name, says):
    with pytest.raises(UserError) as error:
        hardware.parse_hardware(name)
    assert str(error.value).startswith(f"hardware {name!r}")
    assert says in str(error.value)


@pytest.mark.parametrize(("text", "tokens"), [("32768", 32_768), ("128k", 131_072), ("1m", 2**20), ("0.5M", 2**19)])
def test_contexts(text, tokens):
    assert hardware.parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "long", "-1k", "1.5"])
def test_contexts_that_are_none(text):
    with pytest.raises(UserError, match="32768, 128k or 1m"):
        hardware.parse_tokens(text)


def test_every_parameter_is_counted_once():
    assert sum(elements(setup("data=1", rows=1))) == 456_089_655_296


def test_parameters_follow_the_sharding_table():
    layers, other = elements(setup())
    m = M1
    experts = 80 * 3 * m.num_experts * m.intermediate_size * m.hidden_size / 512  # fsdp, expert and tensor
    routers = 80 * m.num_experts * m.hidden_size  # repeated
    assert experts + routers < layers < 1.1 * (experts + routers)
    assert other == 2 * m.vocab_size * m.hidden_size / 512 + m.hidden_size
    found = memory(setup(), "tpu")
    assert found["parameters"] == 4 * (layers + other)
    assert found["optimizer"] == 2 * found["parameters"]


def test_the_cache_of_a_million_tokens():
    """2 x 10 layers x 8 heads x 128 channels in bfloat16 are 40,960 bytes a token; 70 states are 293,6 MB a row."""
    found = memory(setup("tensor=8", task="generate", context=2**20, rows=3), "tpu")
    assert found["KV cache"] == 3 * 40_960 * 2**20 / 8
    assert found["states"] == 3 * 70 * 64 * 128 * 128 * 4 / 8


def test_rows_too_few_to_be_cut_are_repeated():
    one, two = (memory(setup("expert=8,tensor=8", task="generate", rows=rows), "tpu")["KV cache"] for rows in (1, 8))
    assert one == two


def test_without_recomputation_more_is_kept():
    kept, recomputed = (memory(setup(remat=remat), "tpu")["activations"] for remat in ("none", "layers"))
    assert recomputed == 80 * 8192 * 6144 * 2  # one residual per layer, time cut over tensor
    assert kept > 10 * recomputed


def test_several_micro_batches_have_a_sum():
    """One has none; the gradients of a layer's weights are bfloat16 in any case."""
    one, two = (memory(setup(micro_batches=n), "tpu") for n in (1, 2))
    assert two["gradients"] - one["gradients"] == one["parameters"]
    assert {**two, "gradients": 0} == {**one, "gradients": 0}


def test_exchanges_of_the_compiled_update():
    """The large ones as counted in the compiled program (experiments/compile_456b): 773 + 515 GB, 126 + 52 + 33."""
    found = {e.purpose: e.bytes / 1e9 for e in exchanges(setup(), "tpu")}
    assert found["tokens to all experts and back"] == pytest.approx(1288.5, rel=1e-3)
    assert found["tokens gathered for attention"] == pytest.approx(211, rel=0.1)
    assert found["expert weights"] == pytest.approx(36 + 18 + 18 + 9, rel=0.02)


def test_speed_is_bounded_by_the_slowest():
    bound = speed(setup(), V5P, price=4.2)
    assert bound.seconds == max(bound.compute, bound.hbm, bound.links)
    # Recomputation alone keeps the model's operations at three of four.
    assert bound.mfu == pytest.approx(0.75 * bound.compute / bound.seconds)
    hours = bound.million_tokens_seconds / 3600
    assert bound.million_tokens_dollars == pytest.approx(hours * 512 * 4.2)
    assert bound.tokens == 128 * 32_768


def test_decoding_is_bound_by_memory_traffic():
    decode = setup("tensor=8", task="generate", context=2**20, rows=1)
    assert speed(decode, hardware.CHIPS["h200"], 1.0).bound_by == "HBM"


def test_gpus_of_other_hosts_are_slower_to_reach():
    h200 = hardware.CHIPS["h200"]
    near, far = setup("expert=1,tensor=8", rows=8), setup("expert=8,tensor=8", rows=8)
    rate_near = sum(e.bytes for e in exchanges(near, "gpu")) / speed(near, h200, 1.0).links
    rate_far = sum(e.bytes for e in exchanges(far, "gpu")) / speed(far, h200, 1.0).links
    assert rate_near == pytest.approx(h200.link)
    assert rate_far < h200.link / 4


def test_search_finds_the_fewest_devices():
    start = setup("data=1", task="generate", context=2**20, rows=1)
    found = search.smallest(start, V5P)
    assert found is not None
    assert sum(memory(found, "tpu").values()) <= V5P.memory
    fewer = search.best(start, V5P, found.devices // 2)
    assert fewer is None
    # bfloat16 parameters alone are 912 GB
    assert found.devices * V5P.memory > 912e9


def test_meshes_multiply_to_the_devices():
    found = list(search.meshes(16))
    assert all(math.prod(mesh.values()) == 16 for mesh in found)
    assert len(found) == len({tuple(mesh.values()) for mesh in found}) == 35


@pytest.mark.parametrize(
    ("mesh", "changes", "first"),
    [
        ("fsdp=16,expert=8,tensor=4", dict(remat="none"), "--remat"),
        ("fsdp=16,expert=8,tensor=4", dict(rows=1024), "--rows 512"),
        ("expert=8,tensor=8", dict(context=2**18, rows=8), "256 devices with --mesh"),
    ],
)
def test_remedies(mesh, changes, first):
    there = setup(mesh, **changes)
    assert sum(memory(there, "tpu").values()) > V5P.memory
    assert search.remedies(there, V5P)[0].startswith(first)


def run(capsys, *arguments):
    try:
        cli.main(["plan", *arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_command(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    arguments = ("--hardware", "v5p-1024", "--task", "rl", "--context", "32k", "--rows", "128")
    arguments += ("--mesh", "fsdp=16,expert=8,tensor=-1")
    status, out, _ = run(capsys, *arguments, "--picture", str(picture))
    assert status == 0
    assert "It fits." in out
    assert picture.stat().st_size > 1000
    status, out, _ = run(capsys, *arguments, "--json", "--price", "1")
    plan = json.loads(out)
    assert plan["fits"]
    assert plan["total_bytes"] == sum(plan["bytes_per_device"].values()) == sum(memory(setup(), "tpu").values())
    assert plan["million_tokens_dollars"] == pytest.approx(plan["million_tokens_seconds"] / 3600 * 512)


def test_the_command_searches(capsys):
    status, out, _ = run(capsys, "--hardware", "h200", "--context", "1m", "--search", "--json")
    assert status == 0
    assert json.loads(out)["fits"]


def test_what_does_not_fit_says_what_would(capsys):
    status, out, _ = run(capsys, "--hardware", "v5e-8", "--mesh", "tensor=8")
    assert status == 1
    assert "It does not fit." in out
    assert "devices with --mesh" in out
    status, out, _ = run(capsys, "--hardware", "v5e-8", "--mesh", "tensor=8", "--json")
    assert status == 1
    assert not json.loads(out)["fits"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--hardware", "h300x8"), "known: v5e, v5p"),
        (("--hardware", "h100"), "write h100x8"),
        (("--hardware", "h100x0"), "none at all"),
        (
            ("--hardware", "h100x8", "--preset", "m1-tiny", "--context", "8k"),
            "context = 8,192 is more than the model's 4,096 positions",
        ),
        (("--hardware", "h100", "--context", "16m", "--search"), "more than the model's 10,240,000 positions"),
        (("--hardware", "h200x8", "--mesh", "tensor=4"), "the nearest is fsdp=2,tensor=4"),
        (("--hardware", "h200x16", "--mesh", "tensor=16"), "the nearest that work: 8"),
        (("--hardware", "h200x8", "--context", "long"), "128k"),
        (("--hardware", "h200x8", "--preset", "m2"), "m1-456b"),
        (("--hardware", "h200x22"), "power of two"),
        (("--hardware", "h200x8", "--rows", "0"), "rows = 0"),
        (("--hardware", "h200x8", "--price", "-1"), "price = -1"),
        (("--hardware", "h200x8", "--price", "nan"), "price = nan"),
        (("--hardware", "h200x8", "--context", "9" * 400), "128k"),
        (("--hardware", "h200x8", "--picture", "nowhere/plan.png"), "nowhere/plan.png: cannot be written"),
        (("--hardware", "h200x8", "--compile"), "v5e, v5p, v6e"),
        (("--hardware", "v5e", "--task", "rl", "--context", "8m", "--rows", "4096", "--search"), "fits on no mesh"),
    ],
)
def test_mistakes(capsys, arguments, says):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
