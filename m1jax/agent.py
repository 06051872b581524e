"""A model and its tools: the model speaks, its calls are made, it reads their results and speaks again."""

import asyncio
import contextlib
import contextvars
import dataclasses
import inspect
import json
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from typing import Any, Literal, Protocol, TypeVar

import pydantic_core

from m1jax.chat import CallError, Event, Message, StreamParser, Tool, ToolCall, as_tools
from m1jax.errors import UserError, require_positive

Messages = Sequence[Mapping[str, Any]]
"""as `m1jax.chat.render` takes them"""
Ended = Literal["answer", "empty", "max_steps", "overflow"]
"""Why a run ended: the model answered and called nothing; it said nothing at all, or was cut off inside its thought; it
had spoken max_steps times; the conversation no longer fitted into the model's context."""

T = TypeVar("T")


class ContextOverflow(UserError):
    """A conversation is longer than a model can read; `Model.respond` raises it."""


class Model(Protocol):
    """What an agent needs of a model."""

    def respond(
        self, messages: Messages, tools: Sequence[Tool]
    ) -> str | Iterable[str] | AsyncIterable[str] | Awaitable[str]:
        """The assistant's next turn as the model writes it, tags and all: at once, or in pieces as they come.

        The assistant's turns in `messages` hold the very texts that were returned for them.

        Raises:
            ContextOverflow: the conversation is too long.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What came of one call."""

    name: str
    text: str
    """what the model reads"""
    status: Literal["ok", "error", "timeout"]
    seconds: float = dataclasses.field(default=0.0, compare=False)


@dataclasses.dataclass(frozen=True)
class Step:
    """A turn of the model and what came of its calls."""

    text: str
    """as the model wrote it"""
    message: Message
    results: tuple[ToolResult, ...]
    """of all calls, also of those that could not be made, in the order in which they were written"""

    @property
    def done(self) -> bool:
        """Whether the model called nothing, and so has nothing to wait for."""
        return not (self.message.tool_calls or self.message.errors)

    @property
    def reply(self) -> dict[str, Any]:
        """The results as the message that the model reads next."""
        return {
            "role": "tool",
            "content": [{"type": "text", "name": result.name, "text": result.text} for result in self.results],
        }


@dataclasses.dataclass(frozen=True)
class Transcript:
    """All of a run."""

    messages: tuple[Mapping[str, Any], ...]
    """the whole conversation, the assistant's turns as the model wrote them; the next run may begin with it"""
    tools: tuple[Mapping[str, Any], ...]
    """schemas"""
    steps: tuple[Step, ...]
    ended: Ended

    @property
    def answer(self) -> str:
        """What the model said in the end, without its thought; "" where it never came to an end."""
        return self.steps[-1].message.content if self.ended == "answer" else ""

    def record(self) -> dict[str, Any]:
        """The conversation as a line of a training file (`m1jax train sft`)."""
        return {"messages": list(self.messages), "tools": list(self.tools)}


class Toolbox:
    """Makes the calls that a model writes. Whatever goes wrong in one becomes a result that the model can read.

    The calls of one turn run at the same time: coroutines side by side, other functions in threads of their own. A
    coroutine that takes too long is cancelled; a thread cannot be, so its result is no longer waited for.

    Args:
        tools: Python functions (see `m1jax.chat.Tool.of`), also coroutine functions.
        timeout: of each call, in seconds.
        longest: characters of a result; more are cut out of its middle.

    Raises:
        UserError: something wrong with a tool, naming it, or a limit that is not positive.
    """

    def __init__(
        self,
        tools: Sequence[Tool | Callable[..., object]],
        *,
        timeout: float = 60.0,
        longest: int = 50_000,
    ):
        self.tools = as_tools(tools)
        self.timeout, self.longest = timeout, longest
        require_positive(self, "timeout", "longest")
        self._by_name = {tool.name: tool for tool in self.tools}
        if missing := [tool.name for tool in self.tools if tool.function is None]:
            raise UserError(f"tool {missing[0]!r} is a description without a function; give the function itself")

    def step(self, text: str) -> Step:
        """Takes apart a turn of the model and makes its calls; blocks until they are made."""
        return _block(self.astep(text))

    async def astep(self, text: str) -> Step:
        """`step` for coroutines."""
        parser = StreamParser(self.tools)
        events = [*parser.feed(text), *parser.close()]
        return Step(text, parser.message, await self.answer(events))

    async def answer(self, events: Sequence[Event]) -> tuple[ToolResult, ...]:
        """The results of the calls among a turn's events."""
        calls = [event for event in events if isinstance(event, ToolCall | CallError)]
        return tuple(await asyncio.gather(*map(self._result, calls)))

    async def _result(self, call: ToolCall | CallError) -> ToolResult:
        if isinstance(call, CallError):
            return ToolResult(call.name or "unknown", self._shortened(f"Error: {call.message}"), "error")
        start = time.monotonic()
        task = asyncio.ensure_future(self._made(call))
        try:
            # Not wait_for: that one waits for a coroutine that is slow to take its cancellation.
            done, _ = await asyncio.wait({task}, timeout=self.timeout)
        finally:
            task.cancel()
        if done:
            text, status = task.result()
        else:
            text, status = f"Error: {call.name} took longer than {self.timeout:g} s.", "timeout"
        return ToolResult(call.name, self._shortened(text), status, time.monotonic() - start)

    async def _made(self, call: ToolCall) -> tuple[str, Literal["ok", "error"]]:
        tool = self._by_name[call.name]
        try:
            arguments = tool.bind(call.arguments)
        except ValueError as error:
            return f"Error: the arguments of {call.name} are wrong: {error}", "error"
        assert tool.function is not None
        try:
            if inspect.iscoroutinefunction(tool.function):
                value = await tool.function(**arguments)
            else:
                value, raised = await _in_thread(tool.function, arguments)
                if raised is not None:
                    return _failure(raised), "error"
                value = await value if inspect.isawaitable(value) else value
            return _as_text(value), "ok"
        except (Exception, SystemExit) as error:  # whatever a stranger's function raises is the model's to read
            return _failure(error), "error"

    def _shortened(self, text: str) -> str:
        text = text.encode(errors="replace").decode()  # halves of letters cannot be tokens
        if len(text) <= self.longest:
            return text
        half = self.longest // 2
        return f"{text[: self.longest - half]}\n[... {len(text) - self.longest} characters ...]\n{text[-half:]}"


class Agent:
    """Lets a model work on a task with tools until it answers.

    Args:
        model: what speaks.
        tools: what it may call; see `Toolbox`.
        system: a system message to begin with, where a task is given as a text.
        max_steps: turns of the model in one run.
        timeout, longest: limits of a call and its result; see `Toolbox`.

    Raises:
        UserError: something wrong with a tool, naming it, or a limit that is not positive.
    """

    def __init__(
        self,
        model: Model,
        tools: Sequence[Tool | Callable[..., object]] = (),
        *,
        system: str | None = None,
        max_steps: int = 40,
        timeout: float = 60.0,
        longest: int = 50_000,
    ):
        self.model, self.system, self.max_steps = model, system, max_steps
        require_positive(self, "max_steps")
        self.toolbox = Toolbox(tools, timeout=timeout, longest=longest)

    def run(self, task: str | Messages, watch: Callable[[Event | ToolResult], object] | None = None) -> Transcript:
        """Works on a task to the end.

        Args:
            task: what to do, or a whole conversation to go on with.
            watch: is given everything as it happens: pieces of thoughts and answers, calls, results.
        """
        return _block(self.arun(task, watch))

    async def arun(
        self, task: str | Messages, watch: Callable[[Event | ToolResult], object] | None = None
    ) -> Transcript:
        """`run` for coroutines."""
        transcript = None
        async for event in self.stream(task):
            if isinstance(event, Transcript):
                transcript = event
            elif watch:
                watch(event)
        assert transcript is not None  # it comes last
        return transcript

    async def stream(self, task: str | Messages) -> AsyncGenerator[Event | ToolResult | Transcript, None]:
        """Everything as it happens, and in the end the transcript."""
        if isinstance(task, str):
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            task = [*system, {"role": "user", "content": task}]
        messages: list[Mapping[str, Any]] = list(task)
        steps: list[Step] = []
        ended: Ended = "max_steps"
        while len(steps) < self.max_steps:
            parser, events, text = StreamParser(self.toolbox.tools), [], ""
            try:
                async for piece in _pieces(self.model.respond(list(messages), self.toolbox.tools)):
                    text += piece
                    for event in parser.feed(piece):
                        events.append(event)
                        yield event
            except ContextOverflow:
                ended = "overflow"
                break
            for event in parser.close():
                events.append(event)
                yield event
            messages.append({"role": "assistant", "content": text})
            step = Step(text, parser.message, ())
            if step.done:
                steps.append(step)
                ended = "answer" if step.message.content.strip() else "empty"
                break
            if len(steps) + 1 < self.max_steps:  # after the last turn nobody would read what came of its calls
                step = dataclasses.replace(step, results=await self.toolbox.answer(events))
                for result in step.results:
                    yield result
                messages.append(step.reply)
            steps.append(step)
        schemas = tuple(tool.schema for tool in self.toolbox.tools)
        yield Transcript(tuple(messages), schemas, tuple(steps), ended)


async def _pieces(response: str | Iterable[str] | AsyncIterable[str] | Awaitable[str]) -> AsyncIterator[str]:
    if isinstance(response, Awaitable):
        response = await response
    if isinstance(response, str):
        yield response
    elif isinstance(response, AsyncIterable):
        async for piece in response:
            yield piece
    else:
        for piece in response:
            yield piece


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(pydantic_core.to_jsonable_python(value, fallback=str), ensure_ascii=False)


def _failure(error: BaseException) -> str:
    return f"Error: {type(error).__name__}: {error}".removesuffix(": ")


async def _in_thread(
    function: Callable[..., object], arguments: Mapping[str, object]
) -> tuple[object, BaseException | None]:
    """What a function returns, or what it raises.

    Not in an executor's thread: those are waited for when the program ends, which one that hangs would prevent.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[object, BaseException | None]] = loop.create_future()
    context = contextvars.copy_context()

    def tell(value: object, error: BaseException | None) -> None:
        if not future.done():
            future.set_result((value, error))

    def work() -> None:
        value, error = None, None
        try:
            value = context.run(lambda: function(**arguments))
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, value, error)

    threading.Thread(target=work, daemon=True).start()
    return await future


def _block(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
