"""What constrained requests cost the batch they are in: 32 free ones against the same with 8 that must be JSON.

    python -m experiments.serve_speed.constrained runs/m1-100m

The engine alone, by turns, one process, until the first reply ends, so that all rows write as long. A reply that must
be JSON is a list of objects.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import m1jax
from experiments.serve_speed.client import prompts
from m1jax.chat import Tokenizer
from m1jax.inference import Engine, Finished, Request, Sampling, Wrote
from m1jax.inference.memory import capacity_for
from m1jax.inference.runner import ModelRunner
from m1jax.serve.grammar import Grammars

HERE = Path(__file__).parent
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "amount": {"type": "integer"}},
    "required": ["name", "amount"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--constrained", type=int, default=8, help="of them")
    parser.add_argument("--tokens", type=int, default=256, help="of each reply, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: constrained-MODEL.json beside this file")
    given = parser.parse_args()
    model, tokenizer = m1jax.from_pretrained(given.model), Tokenizer.from_dir(given.model)
    # It has more to say than there are tokens, and room for that: no reply is led to its end.
    schema = {"type": "array", "items": ITEM, "minItems": given.tokens // 25}
    form = Grammars(tokenizer, model.config.vocab_size).json(schema)
    capacity = capacity_for(model.config, model.dtype, rows=given.requests, max_length=1024)
    capacity = dataclasses.replace(capacity, decode=(given.requests,))  # all write to the end: one size is enough
    engine = Engine(ModelRunner(*nnx.split(model), capacity, constrains=True))
    free = Sampling(max_new_tokens=given.tokens)
    bound = Sampling(max_new_tokens=2 * given.tokens, end_ids=(tokenizer.eos_id,))

    def run(seed: int, constrained: int) -> tuple[float, float]:
        """Tokens a second until the first reply ends, and tokens a second of processor time."""
        for number, prompt in enumerate(prompts(given.requests, seed)):
            key, tokens = jax.random.key(seed), np.array(prompt, np.int32)
            is_json = number < constrained
            engine.submit(Request(tokens, key, bound if is_json else free, constraint=form if is_json else None))
        start, processor, events = time.perf_counter(), time.process_time(), []
        while not any(isinstance(event, Finished) for event in events):
            events += engine.step()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        for ticket in {event.ticket for event in events}:
            engine.cancel(ticket)
        while engine.busy:
            engine.step()
        written = sum(len(event.tokens) for event in events if isinstance(event, Wrote))
        return written / seconds, written / processor

    rates: dict[str, list[float]] = {"free": [], "constrained": []}
    by_processor: dict[str, list[float]] = {"free": [], "constrained": []}

    def share(of: dict[str, list[float]]) -> float:
        return statistics.median(of["constrained"]) / statistics.median(of["free"])

    for constrained in (0, given.constrained):
        run(1000, constrained)
    for seed in range(given.rounds):
        for name, constrained in (("free", 0), ("constrained", given.constrained)):
            rate, processor = run(seed, constrained)
            rates[name].append(rate)
            by_processor[name].append(processor)
        told = {"device": jax.devices()[0].device_kind, "model": given.model.name, "requests": given.requests}
        told |= {"constrained": given.constrained, "tokens": given.tokens, "tokens_per_second": rates}
        told |= {"tokens_per_processor_second": by_processor}
        told |= {"share": share(rates), "share_by_processor_time": share(by_processor)}
        (given.out or HERE / f"constrained-{given.model.name}.json").write_text(json.dumps(told, indent=1) + "\n")
        print(
            f"free {rates['free'][-1]:.0f}, constrained {rates['constrained'][-1]:.0f} tokens/s: {share(rates):.1%}, "
            f"by processor time {share(by_processor):.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
