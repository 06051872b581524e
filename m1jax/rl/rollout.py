"""Problems -> groups: the policy's attempts, nothing judged yet."""

import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key, UInt32

from m1jax.chat import Tokenizer, encode_chat, encode_prompt
from m1jax.errors import UserError, require_finite, require_positive
from m1jax.inference.types import Completion, RepetitionStop, Request, Sampling
from m1jax.rl import plugins
from m1jax.rl.attempt import Attempt, key_of_turn
from m1jax.rl.conversations import answer_of, converse
from m1jax.rl.environment import Answer, Environment, MakeEnvironment, Messages, SingleTurn, environment_of
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
    asked in up to so many rounds of P (1: dropped without refill). A convention with the baseline of a batch keeps
    them"""
    fifo_window: int = 0
    """windowed FIFO (arXiv 2605.26494): so many problems are in work, and a generation batch takes those first whose
    responses have all ended; long ones go on with the next, under its parameters (0: a batch waits for its own)"""
    keep_surplus: bool = False
    """groups beyond P that teach something wait for the next generation batch, instead of being dropped"""
    retire_above: float | None = None
    """no-positive resampling (ScaleRL, arXiv 2510.13786): a problem of which a larger share of responses was right is
    not asked again (None: all are)"""
    temperature: float = 1.0
    max_prompt_tokens: int = 256
    max_new_tokens: int = 1024
    """of an episode, what an environment says among them"""
    max_turn_tokens: int | None = None
    """of one turn, where there are several (None: whatever is left of the episode)"""
    max_turns: int = 32
    """turns of the model in an episode"""
    answer_seconds: float = 600.0
    """an environment that takes longer to answer (by a coroutine) costs its episode"""
    repetition_tokens: int = 3000
    """a response ends after so many tokens in a row each with more than repetition_probability (report, section 4.2; 0:
    never)"""
    repetition_probability: float = 0.99
    chat: bool = True
    """put problems into the model's chat format; without it their text alone is continued, which suits a model
    fine-tuned on prompts and answers"""

    def __post_init__(self) -> None:
        require_positive(self, "prompts", "samples", "rounds", "temperature")
        require_finite(self, "temperature")
        require_positive(self, "max_prompt_tokens", "max_new_tokens", "max_turns", "answer_seconds")
        if self.max_turn_tokens is not None:
            require_positive(self, "max_turn_tokens")
        require_positive(self, "repetition_tokens", "fifo_window", zero=True)
        if 0 < self.fifo_window < self.prompts:
            raise UserError(f"fifo_window = {self.fifo_window} must hold a generation batch: prompts = {self.prompts}")
        for name in ("repetition_probability", "retire_above"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserError(f"rl: {name} = {value} must lie between 0 and 1")

    @property
    def in_work(self) -> int:
        """Problems at once."""
        return max(self.prompts, self.fifo_window)

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its response."""
        return self.max_prompt_tokens + self.max_new_tokens


Tools = Sequence[Mapping[str, Any]]
"""their schemas"""
GIVE_UP = 10_000
"""problems skipped in a row"""


class Draw(NamedTuple):
    """How answers are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    """1: from the whole distribution; log-probabilities are then those of the policy itself, as training needs them"""


class Prompts:
    """Messages as the tokens of a prompt.

    Args:
        tokenizer: the model's.
        chat: whether in the model's chat format; else messages are put one behind the other.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool):
        self._tokenizer, self._chat = tokenizer, chat

    def first(self, messages: Messages, tools: Tools = ()) -> list[int]:
        """The beginning, up to where the policy writes. Bare texts say nothing of the tools."""
        if not self._chat:
            return self._tokenizer.encode(_plain(messages))
        return encode_prompt(self._tokenizer, messages, tools).tolist()

    def next(self, before: Messages, answer: Messages, tools: Tools = ()) -> list[int]:
        """What follows the policy's last turn (the last of `before`), up to where it writes again."""
        if not self._chat:
            return self._tokenizer.encode(_plain(answer))
        _, written = encode_chat(self._tokenizer, before, tools)
        return encode_prompt(self._tokenizer, [*before, *answer], tools).tolist()[np.flatnonzero(written)[-1] + 1 :]


class Rollout:
    """Lets the policy attempt problems of a task. Every call has the same compiled shape where a turn is all there is.

    Args:
        task: where problems come from.
        tokenizer: the model's.
        generator: the policy.
        recipe: sizes and sampling.
        environment: what the policy acts in, made anew for every attempt; None: what the task says.
        record_routes: keep the experts that every token went to.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        generator: Generator,
        recipe: GenerationRecipe,
        environment: MakeEnvironment | None = None,
        *,
        record_routes: bool = False,
    ):
        self._record_routes = record_routes
        self._task, self._tokenizer, self._generator = task, tokenizer, generator
        self._recipe, self._environment = recipe, environment or environment_of(task)
        self._prompts = Prompts(tokenizer, recipe.chat)

    def __call__(
        self,
        split: Split,
        seed: int,
        first: int,
        *,
        window: int | None = None,
        draw: Draw | None = None,
        skip: Callable[[Problem], bool] = lambda problem: False,
    ) -> list[Group]:
        """Attempts at the next problems of a split from number `first` on.

        An attempt's randomness comes from (split, seed, problem number, sample number) alone.

        Args:
            split, seed: whose problems.
            first: number of the first that may be asked.
            window: tokens that an attempt may have; None: max_new_tokens, which it may not exceed.
            draw: how; None: from the whole distribution, at the recipe's temperature.
            skip: says of a problem that it is not to be asked.

        Raises:
            UserError: a prompt is empty or longer than max_prompt_tokens, or no problem is left to be asked.
        """
        self._window = self._recipe.max_new_tokens if window is None else window
        self._draw = draw or Draw(self._recipe.temperature)
        numbered = list(itertools.islice(self._wanted(split, seed, first, skip), self._recipe.prompts))
        keys = _keys(split, seed, [number for number, _ in numbered])
        attempts: list[list[Attempt]] = []
        for (number, problem), key in zip(numbered, keys):
            group: list[Attempt] = []
            for g in range(self._recipe.samples):
                rng = np.random.default_rng([split == "heldout", seed, number, g])
                group.append(self._begin(problem, rng, g, key, group))
            attempts.append(group)
        if self._environment is SingleTurn:
            self._answer_once(attempts)
        else:
            converse(
                [attempt for group in attempts for attempt in group],
                self._generator,
                ask=self._request,
                spoke=self._spoke,
                heard=self._heard,
                seconds=self._recipe.answer_seconds,
            )
        return [
            Group(problem, tuple(attempt.episode() for attempt in group), number)
            for (number, problem), group in zip(numbered, attempts)
        ]

    def unbegun(self, split: Split, seed: int, first: int, count: int, skip: Callable[[Problem], bool]) -> list[Group]:
        """The next problems, with attempts that have no token yet; for `continued`. A turn must be all there is.

        Raises:
            UserError: as a call does, or the environment has several turns.
        """
        if self._environment is not SingleTurn:
            raise UserError(
                f"fifo_window: {self._task.name} is attempted in several turns, which cannot be cut off in the middle; "
                "take 0"
            )
        groups = []
        for number, problem in itertools.islice(self._wanted(split, seed, first, skip), count):
            prompt = np.array(self._prompt(problem, SingleTurn().reset(problem, np.random.default_rng()), ()), np.int32)
            episode = Episode(
                prompt=prompt,
                tokens=np.zeros(0, np.int32),
                written=np.zeros(0, bool),
                logp=np.zeros(0, np.float32),
                version=np.zeros(0, np.int32),
                turns=("",),
                finish="cancelled",
            )
            groups.append(Group(problem, (episode,) * self._recipe.samples, number))
        return groups

    def continued(
        self, split: Split, seed: int, groups: Sequence[Group], window: int
    ) -> Iterator[list[tuple[int, Request]]]:
        """Of each group, the attempts that have not ended, and requests that go on with them.

        A token's randomness comes from (split, seed, problem number, sample number, tokens before its request, its
        place behind them) alone.
        """
        self._window, self._draw = window, Draw(self._recipe.temperature)
        for group, key in zip(groups, _keys(split, seed, [group.number for group in groups])):
            yield [
                (
                    sample,
                    Request(
                        tokens=np.concatenate([episode.prompt, episode.tokens]),
                        key=key_of_turn(key, np.uint32(sample), np.uint32(len(episode.tokens))),
                        sampling=self._sampling(window - len(episode.tokens)),
                        record_routes=self._record_routes,
                        keep=False,
                    ),
                )
                for sample, episode in enumerate(group.episodes)
                if episode.finish == "cancelled"
            ]

    def extended(self, episode: Episode, completion: Completion) -> Episode:
        """An attempt of one turn with what was written next."""
        cut = completion.finish == "cancelled"
        tokens = np.concatenate([episode.tokens, completion.tokens])
        return dataclasses.replace(
            episode,
            tokens=tokens,
            written=np.concatenate([episode.written, completion.written]),
            logp=np.concatenate([episode.logp, completion.logp]),
            version=np.concatenate([episode.version, completion.version]),
            turns=(self._tokenizer.decode(tokens[:-1] if completion.finish == "stop" else tokens),),
            finish=completion.finish,
            routes=None if cut else completion.routes,  # who goes on will read it all again
            ended="done" if completion.finish == "stop" else "cut",
        )

    def _wanted(
        self, split: Split, seed: int, first: int, skip: Callable[[Problem], bool]
    ) -> Iterator[tuple[int, Problem]]:
        skipped = 0
        for number in itertools.count(first):
            problem = self._task.problem(split, seed, number)
            if not skip(problem):
                skipped = 0
                yield number, problem
            elif (skipped := skipped + 1) == GIVE_UP:
                raise UserError(
                    f"{self._task.name}: the policy has mastered all problems ({GIVE_UP} in a row are retired): "
                    "give it harder ones, or a higher --retire-above"
                )

    def _begin(
        self,
        problem: Problem,
        rng: np.random.Generator,
        sample: int,
        key: Key[Array, ""],
        others: Sequence[Attempt],
    ) -> Attempt:
        try:
            environment = self._environment()
            messages = list(environment.reset(problem, rng))
        except UserError:
            raise
        except Exception as error:  # it costs this attempt alone
            return Attempt(self._blame(error, problem), problem, [], [self._tokenizer.eos_id], sample, key)
        known = others[-1] if others and others[-1].ended is None else None
        if known is not None and known.messages == messages:
            prompt = known.prompt
        else:
            prompt = self._prompt(problem, messages, _tools(environment))
        return Attempt(environment, problem, messages, prompt, sample, key)

    def _prompt(self, problem: Problem, messages: Messages, tools: Tools) -> list[int]:
        prompt = self._prompts.first(messages, tools)
        if not 0 < len(prompt) <= self._recipe.max_prompt_tokens:
            raise UserError(
                f"{self._task.name}: the prompt {problem.prompt[:60]!r} has {len(prompt)} tokens; max_prompt_tokens is "
                f"{self._recipe.max_prompt_tokens}"
            )
        return prompt

    def _answer_once(self, groups: Sequence[Sequence[Attempt]]) -> None:
        """A turn is all there is, and the attempts of a group share their prompt."""
        requests = [
            Request(
                tokens=group[0].context(),
                key=group[0].key,
                sampling=self._sampling(self._window),
                samples=len(group),
                record_routes=self._record_routes,
                keep=False,
            )
            for group in groups
        ]
        for group, completions in zip(groups, self._generator.run(requests)):
            for attempt, completion in zip(group, completions):
                attempt.write(completion, self._text(completion))
                if attempt.ended is None:
                    attempt.stop("done")

    def _request(self, attempt: Attempt) -> Request:
        """For an attempt's next turn."""
        left = self._window - len(attempt.tokens)
        return Request(
            tokens=attempt.context(),
            key=key_of_turn(attempt.key, np.uint32(attempt.sample), np.uint32(len(attempt.turns))),
            sampling=self._sampling(min(left, self._recipe.max_turn_tokens or left)),
            record_routes=self._record_routes,
        )

    def _spoke(self, attempt: Attempt, completion: Completion) -> Answer | Awaitable[Answer]:
        """A turn of the policy, and what the environment has to say to it."""
        text = self._text(completion)
        attempt.write(completion, text)
        if attempt.ended is None:
            try:
                return attempt.environment.step(text)
            except UserError:
                raise
            except Exception as error:  # it costs this attempt alone
                attempt.fail(self._blame(error, attempt.problem))
        return [], True

    def _heard(self, attempt: Attempt, answer: Answer | BaseException) -> None:
        """What an environment said; whether there is another turn."""
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, BaseException):
            attempt.fail(self._blame(answer, attempt.problem))
            return
        try:
            messages, done, _ = answer_of(attempt, answer)
            tokens = [] if done else self._prompts.next(attempt.messages, messages, _tools(attempt.environment))
        except Exception as error:  # no answer, or no messages
            attempt.fail(self._blame(error, attempt.problem))
            return
        if done:
            attempt.stop("done")
        elif len(attempt.turns) >= self._recipe.max_turns:
            attempt.stop("turns")
        elif len(attempt.tokens) + len(tokens) >= self._window:
            attempt.stop("overflow")
        else:
            attempt.hear(messages, tokens)

    def _text(self, completion: Completion) -> str:
        return self._tokenizer.decode(completion.tokens[:-1] if completion.finish == "stop" else completion.tokens)

    def _blame(self, error: BaseException, problem: Problem) -> str:
        name = getattr(self._environment, "__name__", type(self._environment).__name__)
        return f"environment {name}: {plugins.located(error)}, at problem {problem.prompt!a:.60} of {self._task.name}"

    def _sampling(self, max_new_tokens: int) -> Sampling:
        recipe = self._recipe
        stop = RepetitionStop(probability=recipe.repetition_probability, tokens=recipe.repetition_tokens)
        return Sampling(
            temperature=self._draw.temperature,
            top_p=self._draw.top_p,
            max_new_tokens=max_new_tokens,
            end_ids=(self._tokenizer.eos_id,),
            repetition_stop=stop if recipe.repetition_tokens else None,
        )


def _plain(messages: Messages) -> str:
    """Their texts alone; of a tool's message, those of its parts."""
    contents = [message["content"] for message in messages]
    return "".join(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)


def _tools(environment: Environment) -> Tools:
    return getattr(environment, "tools", ())


def _keys(split: Split, seed: int, numbers: Sequence[int]) -> list[Key[Array, ""]]:
    """Of problems."""
    return list(_keys_of_problems(np.array([seed, split == "heldout"], np.uint32), np.array(numbers, np.uint32)))


@jax.jit
def _keys_of_problems(
    seeds: UInt32[jax.Array, "2"], problems: UInt32[jax.Array, " problems"]
) -> Key[Array, " problems"]:
    seed, split = seeds
    base = jax.random.fold_in(jax.random.key(seed), split)
    return jax.vmap(jax.random.fold_in, (None, 0))(base, problems)
