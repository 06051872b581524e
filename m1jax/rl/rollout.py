"""Problems -> groups: the policy's attempts, nothing judged yet."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from m1jax.chat import Tokenizer, encode_chat, encode_prompt
from m1jax.errors import UserError, require_positive
from m1jax.inference.types import Completion, Finish, Request, Sampling
from m1jax.rl.environment import Environment, MakeEnvironment, Messages, SingleTurn, environment_of
from m1jax.rl.generator import Generator
from m1jax.rl.tasks import Problem, Split, Task
from m1jax.rl.types import Episode, Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRecipe:
    """What is asked, and how answers are drawn."""

    prompts: int = 64
    """P, problems in a generation batch"""
    samples: int = 16
    """G, responses to each problem"""
    rounds: int = 3
    """dynamic sampling: problems whose responses are all rewarded alike teach nothing; they are dropped, and others are
    asked in up to so many rounds of P (1: dropped without refill)"""
    temperature: float = 1.0
    max_prompt_tokens: int = 256
    max_new_tokens: int = 1024
    chat: bool = True
    """put problems into the model's chat format; without it their text alone is continued, which suits a model
    fine-tuned on prompts and answers"""

    def __post_init__(self) -> None:
        require_positive(self, "prompts", "rounds", "temperature", "max_prompt_tokens", "max_new_tokens")
        if self.samples < 2:
            raise UserError(f"rl: samples = {self.samples}; an advantage compares at least 2 responses to a problem")

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its response."""
        return self.max_prompt_tokens + self.max_new_tokens


class Prompts:
    """Messages as the tokens of a prompt.

    Args:
        tokenizer: the model's.
        chat: whether in the model's chat format; else messages are put one behind the other.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool):
        self._tokenizer, self._chat = tokenizer, chat

    def first(self, messages: Messages) -> list[int]:
        """The beginning, up to where the policy writes."""
        if not self._chat:
            return self._tokenizer.encode(_plain(messages))
        return encode_prompt(self._tokenizer, messages).tolist()

    def next(self, before: Messages, answer: Messages) -> list[int]:
        """What follows the policy's last turn (the last of `before`), up to where it writes again."""
        if not self._chat:
            return self._tokenizer.encode(_plain(answer))
        _, written = encode_chat(self._tokenizer, before)
        return encode_prompt(self._tokenizer, [*before, *answer]).tolist()[np.flatnonzero(written)[-1] + 1 :]


class Rollout:
    """Lets the policy attempt problems of a task. Every call has the same compiled shape where a turn is all there is.

    Args:
        task: where problems come from.
        tokenizer: the model's.
        generator: the policy.
        recipe: sizes and sampling.
        environment: what the policy acts in, made anew for every attempt; None: what the task says.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        generator: Generator,
        recipe: GenerationRecipe,
        environment: MakeEnvironment | None = None,
    ):
        self._task, self._tokenizer, self._generator = task, tokenizer, generator
        self._recipe, self._environment = recipe, environment or environment_of(task)
        self._prompts = Prompts(tokenizer, recipe.chat)

    def __call__(self, split: Split, seed: int, first: int) -> list[Group]:
        """Attempts at problems number first ... first + prompts - 1 of a split.

        An attempt's randomness comes from (split, seed, problem number, sample number) alone.

        Raises:
            UserError: a prompt is empty or longer than max_prompt_tokens.
        """
        numbers = np.arange(first, first + self._recipe.prompts, dtype=np.uint32)
        problems = [self._task.problem(split, seed, int(number)) for number in numbers]
        keys = list(_keys_of_problems(np.array([seed, split == "heldout"], np.uint32), numbers))
        attempts: list[list[_Attempt]] = []
        for problem, number, key in zip(problems, numbers, keys):
            group: list[_Attempt] = []
            for g in range(self._recipe.samples):
                rng = np.random.default_rng([split == "heldout", seed, int(number), g])
                group.append(self._begin(problem, rng, g, key, group))
            attempts.append(group)
        # The attempts of a group share their first prompt, unless the environment speaks by chance.
        self._first_turn(attempts)
        turn = 1
        while live := [attempt for group in attempts for attempt in group if not attempt.done]:
            self._later_turn(live, turn)
            turn += 1
        return [Group(p, tuple(attempt.episode() for attempt in group)) for p, group in zip(problems, attempts)]

    def _begin(
        self,
        problem: Problem,
        rng: np.random.Generator,
        sample: int,
        key: Key[Array, ""],
        others: Sequence["_Attempt"],
    ) -> "_Attempt":
        environment = self._environment()
        messages = list(environment.reset(problem, rng))
        prompt = others[-1].prompt if others and others[-1].messages == messages else self._prompts.first(messages)
        if not 0 < len(prompt) <= self._recipe.max_prompt_tokens:
            raise UserError(
                f"{self._task.name}: the prompt {problem.prompt[:60]!r} has {len(prompt)} tokens; max_prompt_tokens is "
                f"{self._recipe.max_prompt_tokens}"
            )
        return _Attempt(environment, messages, prompt, sample, key)

    def _first_turn(self, groups: Sequence[Sequence["_Attempt"]]) -> None:
        shared = all(attempt.prompt == group[0].prompt for group in groups for attempt in group)
        if not shared:
            self._later_turn([attempt for group in groups for attempt in group], 0)
            return
        sampling = self._sampling(self._recipe.max_new_tokens)
        requests = [
            Request(
                tokens=group[0].context(),
                key=group[0].key,
                sampling=sampling,
                samples=len(group),
                keep=self._environment is not SingleTurn,
            )
            for group in groups
        ]
        for group, completions in zip(groups, self._generator.run(requests)):
            for attempt, completion in zip(group, completions):
                self._take(attempt, completion)

    def _later_turn(self, attempts: Sequence["_Attempt"], turn: int) -> None:
        samples = np.array([attempt.sample for attempt in attempts], np.uint32)
        keys = list(_keys_of_turn(jnp.stack([attempt.key for attempt in attempts]), samples, np.uint32(turn)))
        requests = [
            Request(tokens=a.context(), key=key, sampling=self._sampling(self._recipe.max_new_tokens - len(a.tokens)))
            for a, key in zip(attempts, keys)
        ]
        for attempt, (completion,) in zip(attempts, self._generator.run(requests)):
            self._take(attempt, completion)

    def _sampling(self, max_new_tokens: int) -> Sampling:
        end_ids = (self._tokenizer.eos_id,)
        # From the whole distribution: log-probabilities are then those of the policy itself.
        return Sampling(temperature=self._recipe.temperature, top_p=1.0, max_new_tokens=max_new_tokens, end_ids=end_ids)

    def _take(self, attempt: "_Attempt", completion: Completion) -> None:
        """What the policy wrote, and what the environment has to say to it."""
        finished = completion.finish == "stop"
        text = self._tokenizer.decode(completion.tokens[:-1] if finished else completion.tokens)
        attempt.write(completion, text)
        if not finished:
            attempt.done = True
            return
        stepped = attempt.environment.step(text)
        assert isinstance(stepped, tuple)
        answer, attempt.done = stepped[0], stepped[1]
        if attempt.done:
            return
        tokens = self._prompts.next(attempt.messages, answer)
        if len(attempt.tokens) + len(tokens) >= self._recipe.max_new_tokens:  # no room for another turn
            attempt.finish, attempt.done = "length", True
            return
        attempt.messages += answer
        attempt.hear(tokens)


class _Attempt:
    """An episode while it happens."""

    def __init__(
        self,
        environment: Environment,
        messages: list[Mapping[str, str]],
        prompt: list[int],
        sample: int,
        key: Key[Array, ""],
    ):
        self.environment, self.messages, self.prompt, self.sample, self.key = environment, messages, prompt, sample, key
        self.tokens: list[int] = []
        self.done = False
        self.finish: Finish = "length"
        self._written: list[bool] = []
        self._logp: list[np.ndarray] = []
        self._version: list[int] = []
        self._turns: list[str] = []

    def context(self) -> np.ndarray:
        return np.array([*self.prompt, *self.tokens], np.int32)

    def write(self, completion: Completion, text: str) -> None:
        self.tokens += completion.tokens.tolist()
        self._written += completion.written.tolist()
        self._logp.append(completion.logp)
        self._version += completion.version.tolist()
        self._turns.append(text)
        self.messages.append({"role": "assistant", "content": text})
        self.finish = completion.finish

    def hear(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self._written += [False] * len(tokens)
        self._logp.append(np.zeros(len(tokens), np.float32))
        self._version += [-1] * len(tokens)

    def episode(self) -> Episode:
        return Episode(
            prompt=np.array(self.prompt, np.int32),
            tokens=np.array(self.tokens, np.int32),
            written=np.array(self._written, bool),
            logp=np.concatenate(self._logp),
            version=np.array(self._version, np.int32),
            turns=tuple(self._turns),
            finish=self.finish,
        )


def _plain(messages: Messages) -> str:
    return "".join(message["content"] for message in messages)


@jax.jit
def _keys_of_problems(
    seeds: UInt32[jax.Array, "2"], problems: UInt32[jax.Array, " problems"]
) -> Key[Array, " problems"]:
    seed, split = seeds
    base = jax.random.fold_in(jax.random.key(seed), split)
    return jax.vmap(jax.random.fold_in, (None, 0))(base, problems)


@jax.jit
def _keys_of_turn(
    problems: Key[Array, " attempts"], samples: UInt32[jax.Array, " attempts"], turn: UInt32[jax.Array, ""]
) -> Key[Array, " attempts"]:
    """Behind all that a first turn draws with, which folds in the number of a token."""

    def one(problem: jax.Array, sample: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(problem, sample), np.uint32(2**31) + turn)

    return jax.vmap(one)(problems, samples)
