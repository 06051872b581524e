"""A model in this process as what an agent speaks with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from m1jax.agent import ContextOverflow, Messages
from m1jax.chat import TextStream, Tokenizer, Tool, encode_prompt, partings
from m1jax.errors import require_seed
from m1jax.inference import Engine, Finished, RepetitionStop, Request, Sampling, Wrote
from m1jax.inference.thinking import thinking_budget
from m1jax.model import MiniMaxM1


class LocalModel:
    """`agent.Model` of a model and its tokenizer. What a conversation has in common with the last one is kept.

    Args:
        temperature, top_p: M1's own.
        max_new_tokens: longest turn; shorter where the context ends.
        thinking: tokens that a thought may have before it is closed; None: as many as the turn.
        max_length: longest conversation; None: what the model and the device have room for.
        seed: the same seed gives the same turns.

    Raises:
        UserError: an option is out of range, or the memory is too small.
    """

    def __init__(
        self,
        model: MiniMaxM1,
        tokenizer: Tokenizer,
        *,
        temperature: float = 1.0,
        top_p: float = 0.95,
        max_new_tokens: int = 81_920,
        thinking: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
    ):
        require_seed(seed)
        self._tokenizer, self._key, self._turns = tokenizer, jax.random.key(seed), 0
        self._engine = Engine.of(model, rows=1, max_length=max_length)
        self._sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            end_ids=(tokenizer.eos_id,),
            repetition_stop=RepetitionStop(),
            thinking_budget=None if thinking is None else thinking_budget(tokenizer, thinking),
        )

    def respond(self, messages: Messages, tools: Sequence[Tool]) -> Iterator[str]:
        """The assistant's next turn, in pieces as they come.

        Raises:
            ContextOverflow: the conversation is too long.
            UserError: something is wrong with a message.
        """
        prompt = encode_prompt(self._tokenizer, messages, [tool.schema for tool in tools])
        room = self._engine.capacity.max_length - len(prompt)
        if room < 1:
            raise ContextOverflow(
                f"the conversation has {len(prompt)} tokens; with one more it exceeds the context of "
                f"{self._engine.capacity.max_length} by {1 - room}"
            )
        sampling = dataclasses.replace(self._sampling, max_new_tokens=min(room, self._sampling.max_new_tokens))
        key = jax.random.fold_in(self._key, self._turns)
        self._turns += 1
        request = Request(prompt, key, sampling, junctions=partings(self._tokenizer, prompt, messages))
        ticket, text = self._engine.submit(request), TextStream(self._tokenizer)
        try:
            while self._engine.busy:
                for event in self._engine.step():
                    if isinstance(event, Wrote) and event.ticket == ticket:
                        yield text.feed(token for token in event.tokens if token != self._tokenizer.eos_id)
                    elif isinstance(event, Finished) and event.ticket == ticket:
                        yield text.close()
        finally:  # the listener may have gone away
            self._engine.cancel(ticket)
