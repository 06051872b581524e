"""Responses of the policy, judged, and turned into the micro-batches of a generation batch's updates."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.chat import Tokenizer
from m1jax.errors import UserError
from m1jax.inference import decode, pad_prompts
from m1jax.rl.advantages import overlong_penalty
from m1jax.rl.rewards import judge
from m1jax.rl.tasks import Problem, Split, Task
from m1jax.train import packing
from m1jax.train.placement import gathered, on_host


@dataclasses.dataclass(frozen=True)
class Group:
    """A problem and the policy's G responses to it."""

    problem: Problem
    prompt: list[int]
    responses: list[list[int]]
    """generated ids, the end token included"""
    log_probs: list[np.ndarray]
    """of the sampler, one per response [length] float32"""
    texts: list[str]
    rewards: np.ndarray
    """[G] float32, the overlong penalty included"""
    correct: np.ndarray
    """[G] bool"""
    finished: np.ndarray
    """[G] bool: ended by itself, not by the limit"""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(response) for response in self.responses])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Asks problems of a task and judges the answers. Every call has the same compiled shape.

    Args:
        task, tokenizer: what to ask, and in which tokens.
        graph: of `nnx.split(model)`.
        prompts: problems per call.
        samples: G, responses per problem.
        max_prompt_tokens, max_new_tokens: limits in tokens.
        temperature: of sampling; no nucleus, so that log-probabilities are those of the policy itself.
        format_reward: see `rewards.judge`.
        overlong_buffer: see `advantages.overlong_penalty`.
    """

    task: Task
    tokenizer: Tokenizer
    graph: Any
    prompts: int
    samples: int
    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    format_reward: float
    overlong_buffer: int

    def sample(self, params: Any, split: Split, seed: int, first: int) -> list[Group]:
        """Responses to problems number first .. first + prompts - 1 of a split.

        A response's randomness comes from (split, seed, problem number, sample number) alone.

        Raises:
            UserError: a prompt is empty or longer than max_prompt_tokens.
        """
        numbers = np.arange(first, first + self.prompts)
        problems = [self.task.problem(split, seed, int(i)) for i in numbers]
        prompts = [self.tokenizer.encode(problem.prompt) for problem in problems]
        for problem, prompt in zip(problems, prompts):
            if not 0 < len(prompt) <= self.max_prompt_tokens:
                raise UserError(
                    f"{self.task.name}: the prompt {problem.prompt[:60]!r} has {len(prompt)} tokens; "
                    f"max_prompt_tokens is {self.max_prompt_tokens}"
                )
        seeds = np.array([seed, split == "heldout"], np.uint32)
        out = on_host(
            decode(
                self.graph,
                params,
                *pad_prompts(prompts, self.max_prompt_tokens),
                _keys(seeds, numbers.astype(np.uint32), self.samples),
                np.array([self.tokenizer.eos_id], np.int32),
                np.float32(self.temperature),
                samples_per_prompt=self.samples,
                max_new_tokens=self.max_new_tokens,
            )
        )
        tokens, log_probs, lengths, finished = (x.reshape(self.prompts, self.samples, *x.shape[1:]) for x in out)
        responses = [[row[:n].tolist() for row, n in zip(*group)] for group in zip(tokens, lengths)]
        texts = [
            [self.tokenizer.decode(r[:-1] if done else r) for r, done in zip(*group)]
            for group in zip(responses, finished)
        ]
        rewards, correct = self._judged(problems, texts, finished)
        penalty = overlong_penalty(lengths, max_tokens=self.max_new_tokens, buffer_tokens=self.overlong_buffer)
        return [
            Group(
                problems[i],
                prompts[i],
                responses[i],
                [row[:n] for row, n in zip(log_probs[i], lengths[i])],
                texts[i],
                rewards[i] + penalty[i],
                correct[i],
                finished[i],
            )
            for i in range(self.prompts)
        ]

    def _judged(
        self, problems: list[Problem], texts: list[list[str]], finished: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards [prompts, samples] float32 and whether right, bool. Each process judges its share of the problems."""
        verdicts = np.zeros((2, *finished.shape), np.float32)
        for i in range(jax.process_index(), len(problems), jax.process_count()):
            for j, (text, done) in enumerate(zip(texts[i], finished[i])):
                found = judge(self.task, problems[i], text, finished=bool(done), format_reward=self.format_reward)
                verdicts[:, i, j] = found.reward, found.correct
        rewards, correct = gathered(verdicts).sum(axis=0)
        return rewards, correct > 0


@jax.jit(static_argnums=2)
def _keys(seeds: jax.Array, problems: jax.Array, samples: int) -> jax.Array:
    seed, split = seeds
    base = jax.random.fold_in(jax.random.key(seed), split)

    def one(problem: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(base, problem), jnp.arange(samples))

    return jax.vmap(one)(problems).reshape(-1)


def build_updates(
    groups: Sequence[Group], advantages: np.ndarray, *, updates: int, rows: int, row_length: int, micro_batches: int
) -> dict[str, np.ndarray]:
    """Deal the groups of a generation batch out to its updates and pack each update's responses.

    Whole groups go to one update, as evenly as possible, so that the loss's mean within a prompt stays within one
    update.

    Args:
        groups: at least one.
        advantages: [len(groups), G] float32.
        updates: how many updates the batch should serve; with fewer groups than that there is one update per group.
        rows, row_length: shape of a micro-batch.
        micro_batches: room per update.

    Returns:
        Fields [updates, micro_batches, rows, row_length]: tokens, targets, segment_ids (int32), old_logp, advantage,
        weight (float32; weight is the loss's normaliser: per update it sums to 1 over the responses' tokens and is zero
        elsewhere).
    """
    updates = min(updates, len(groups))
    batches = []
    for part in np.array_split(np.arange(len(groups)), updates):
        examples = []
        for i in part:
            weight = 1.0 / (groups[i].lengths.sum() * len(part))
            for response, log_probs, advantage in zip(groups[i].responses, groups[i].log_probs, advantages[i]):
                fields = {"old_logp": log_probs, "advantage": advantage, "weight": weight}
                examples.append(packing.example(groups[i].prompt, response, **fields))
        batches.append(packing.micro_batches(packing.pack(examples, row_length), rows, micro_batches))
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
