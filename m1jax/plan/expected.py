"""Time of one step as it is to be expected: measured rates of kernels, products, copies and collectives
(`m1jax.plan.hardware.Rates`), and how much each has to do.

Elementwise work is counted in passes over arrays, read off the compiled update (`m1-2b`, one H200): what fuses with
what is XLA's choice, and the same for all sizes. No term was fitted to the time of a step: the rate of exchanges, and
what of them shows although other work goes on, are read off traces of two cards (experiments/scaling).
"""

from __future__ import annotations

from m1jax.config import LIGHTNING
from m1jax.flops import parameters_per_token
from m1jax.model.cache import key_value_bytes, state_bytes
from m1jax.plan.hardware import Rates
from m1jax.plan.memory import elements, expert_bytes, gathered_tokens, words
from m1jax.plan.setup import Setup
from m1jax.plan.speed import exchanges, expert_tokens

Seconds = dict[str, float]

# Passes over bfloat16 arrays in an update with cheap rematerialisation, both directions, each a read or a write.
HIDDEN_PASSES = 38  # [tokens, hidden]: residuals, norms and their gradients, casts
INNER_PASSES = 41  # [tokens, heads x channels]: activations of q, k, v, their split and gradient, norm, gate
EXPERT_PASSES = 10  # [routed tokens, width of an expert]
ROUTED_PASSES = 5  # [routed tokens, hidden]: to the experts and back
FORWARD = 0.35  # the share of these that belongs to the forward pass, which remat "layers" repeats
# AdamW 26 (float32 parameter and moments read and written, bfloat16 gradient read), cast 6, norm 2, gradient written to
# its stack 4.
PARAMETER_BYTES = 38
SUM_BYTES = 16  # per parameter and micro-batch where there are several: gradients summed in float32, cast again
HEAD_PRODUCTS = 5  # two of split weights forward, one backward to have the probabilities again, two gradients
HEAD_BYTES = 7  # per token and word, beside products
KERNELS = 15  # of a layer in decoding, with its share of those of a whole step
SAMPLING_PASSES = 12  # over float32 logits
CUT_OUT_PASSES = 6  # over a device's part of a layer's experts: cut out to be gathered, twice; gradients put back
SHOWN = 0.5  # of exchanges behind work: what they slow down, and what is left of them where work ends before


def expected(setup: Setup, rates: Rates) -> Seconds:
    """What a step spends its time on -> seconds; together the step's time.

    Exchanges within a host only. "exchanges" are those that work must wait for; of others what shows of them.
    """
    parts = _decoding(setup, rates) if setup.task == "generate" else _update(setup, rates)
    waited = behind = 0.0
    for exchange in exchanges(setup, "gpu"):
        size = 1
        for axis in exchange.axes:
            size *= setup.mesh[axis]
        sent = (size - 1) / size / rates.exchange
        waited += exchange.waited * sent
        behind += (exchange.bytes - exchange.waited) * sent
    parts["exchanges"] = waited + max(SHOWN * behind, behind - sum(parts.values()))
    return {name: seconds for name, seconds in parts.items() if seconds}


def _update(setup: Setup, rates: Rates) -> Seconds:
    m, mesh = setup.model, setup.mesh
    lightning = m.layer_types.count(LIGHTNING)
    softmax = m.num_layers - lightning
    tensor, inner = mesh["tensor"], m.num_heads * m.head_dim
    tokens = setup.rows * setup.context / setup.devices  # whose products a device computes, however they are cut
    local = setup.rows_per_device * setup.time_per_device
    routed = m.experts_per_token * expert_tokens(setup, "gpu")
    again = 1 / 3 if setup.remat == "layers" else 0.0
    # Matrix products of one token: experts, head, and the others.
    of_experts = 3 * m.experts_per_token * m.hidden_size * m.intermediate_size * m.num_layers
    of_head = m.vocab_size * m.hidden_size
    others = parameters_per_token(m) - of_experts - of_head
    pairs = setup.rows * setup.sequences * _triangle(setup.context // setup.sequences) / setup.devices
    small = m.head_dim / 128
    elementwise = 2 * m.num_layers * (
        HIDDEN_PASSES * setup.rows_per_device * setup.residual_time * m.hidden_size
        + INNER_PASSES * local * inner / tensor
        + routed * (EXPERT_PASSES * m.intermediate_size / tensor + ROUTED_PASSES * m.hidden_size)
    )  # fmt: skip
    elementwise *= 1 + FORWARD * bool(again)
    times = {
        "experts": 6 * tokens * of_experts * (1 + again) / rates.experts,
        "other products": 6 * tokens * others * (1 + again) / rates.products,
        "head": 2 * HEAD_PRODUCTS * tokens * of_head / rates.products + HEAD_BYTES * local * words(setup) / rates.copy,
        "lightning attention": (1 + again) * lightning * local * m.num_heads / tensor * small * rates.lightning,
        "softmax attention": (1 + again) * 12 * softmax * inner * pairs / (rates.attention * small),
        "norms, gates, routing": elementwise / rates.copy,
    }
    if mesh["fsdp"] > 1:
        times["experts cut out"] = m.num_layers * CUT_OUT_PASSES * expert_bytes(setup) / mesh["fsdp"] / rates.copy
    times = {name: setup.micro_batches * seconds for name, seconds in times.items()}
    summed = SUM_BYTES * setup.micro_batches * (setup.micro_batches > 1)
    return times | {"optimizer": (PARAMETER_BYTES + summed) * sum(elements(setup)) / rates.copy}


def _decoding(setup: Setup, rates: Rates) -> Seconds:
    m = setup.model
    rows, tensor = setup.rows_per_device, setup.mesh["tensor"]
    tokens = rows * setup.piece
    share = setup.rows * setup.piece / setup.devices if setup.rows_are_cut else tokens / tensor
    each = 3 * m.hidden_size * m.intermediate_size
    used = m.num_experts * (1 - (1 - m.experts_per_token / m.num_experts) ** gathered_tokens(setup))
    others = parameters_per_token(m) - m.num_layers * m.experts_per_token * each
    weights = 2 * (others + m.num_layers * used * each / setup.mesh["expert"])
    moved = weights + rows * (2 * state_bytes(m) + setup.context * key_value_bytes(m, "bfloat16"))
    return {
        "weights, states, keys and values": moved / tensor / rates.copy,
        "products": 2 * share * parameters_per_token(m) / rates.products,
        "launches": KERNELS * m.num_layers * rates.launch + _small_exchanges(setup) * rates.collective,
        "sampling": SAMPLING_PASSES * 4 * rows * words(setup) / rates.copy,
    }


def _small_exchanges(setup: Setup) -> int:
    """Of a decoding step, one after the other: tensor sums what attention, the experts and the embedding give and what
    a lightning layer's norm needs, and deals scores and new tokens out; expert gathers tokens and sums back."""
    m, tensor = setup.model, setup.mesh["tensor"] > 1
    experts = 2 if setup.mesh["expert"] > 1 and setup.rows_are_cut else tensor
    return m.num_layers * (experts + tensor) + tensor * (m.layer_types.count(LIGHTNING) + 3)


def _triangle(length: int) -> float:
    return length * (length + 1) / 2
