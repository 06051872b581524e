"""The loop of model and tools, with models that follow a script."""

import asyncio
import contextvars
import dataclasses
import datetime
import json
import sys
import threading
import time

import pytest

from m1jax.agent import Agent, ContextOverflow, Toolbox, ToolResult, Transcript
from m1jax.chat import Content, Reasoning, Tool, ToolCall, render
from m1jax.errors import UserError


def call(tool, /, **arguments):
    return json.dumps({"name": tool, "arguments": arguments}, ensure_ascii=False)


def block(*calls):
    return "<tool_calls>\n" + "\n".join(calls) + "\n</tool_calls>"


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@dataclasses.dataclass
class Script:
    """A model that says what it is told to say, and keeps what it was given."""

    turns: list[str]
    seen: list = dataclasses.field(default_factory=list)

    def respond(self, messages, tools):
        self.seen.append(([dict(message) for message in messages], [tool.name for tool in tools]))
        turn = self.turns[min(len(self.seen), len(self.turns)) - 1]
        if isinstance(turn, Exception):
            raise turn
        return turn


def test_calls_are_made_until_the_model_answers():
    first = f"<think>\n17 + 25\n</think>\n\nLet me see.\n{block(call('add', a=17, b=25))}"
    model = Script([first, f"{block(call('add', a=42, b=1), call('add', a=42, b='x'))}", "<think>ok</think>It is 43."])
    agent = Agent(model, [add], system="Be exact.")
    seen = []
    transcript = agent.run("17 + 25 + 1?", watch=seen.append)
    assert (transcript.answer, transcript.ended) == ("It is 43.", "answer")
    results = [[(result.name, result.text, result.status) for result in step.results] for step in transcript.steps]
    wrong = "Error: The arguments do not fit the tool's schema: at b: 'x' is not of type 'integer'."
    assert results == [[("add", "42", "ok")], [("add", "43", "ok"), ("add", wrong, "error")], []]
    # What the model is given: the conversation so far, its own turns letter by letter.
    assert [len(messages) for messages, _ in model.seen] == [2, 4, 6]
    assert model.seen[0] == (
        [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "17 + 25 + 1?"}],
        ["add"],
    )
    assert model.seen[1][0][2:] == [
        {"role": "assistant", "content": first},
        {"role": "tool", "content": [{"type": "text", "name": "add", "text": "42"}]},
    ]
    for (before, _), (after, _) in zip(model.seen, model.seen[1:]):
        tools = [tool.schema for tool in agent.toolbox.tools]
        assert render(after, tools).startswith(render(before, tools))
    assert [type(event) for event in seen[:4]] == [Reasoning, Content, ToolCall, ToolResult]
    assert transcript.record() == {"messages": list(transcript.messages), "tools": [Tool.of(add).schema]}
    json.dumps(transcript.record())


def test_a_conversation_goes_on():
    model = Script(["One.", "Two."])
    agent = Agent(model)
    first = agent.run("Count.")
    second = agent.run([*first.messages, {"role": "user", "content": "Further."}])
    assert [message["content"] for message in second.messages] == ["Count.", "One.", "Further.", "Two."]


class Streams:
    """The same turns in pieces: from an iterator, an asynchronous one, or after a while."""

    def __init__(self, how, turns):
        self.how, self.turns = how, iter(turns)

    def respond(self, messages, tools):
        return getattr(self, self.how)(next(self.turns))

    def iterator(self, turn):
        yield from turn

    async def asynchronous(self, turn):
        for letter in turn:
            await asyncio.sleep(0)
            yield letter

    async def awaited(self, turn):
        await asyncio.sleep(0)
        return turn


@pytest.mark.parametrize("how", ["iterator", "asynchronous", "awaited"])
def test_models_that_stream(how):
    turns = [f"Hm. {block(call('add', a=1, b=2))}", "<think>x</think>3"]
    transcript = Agent(Streams(how, turns), [add]).run("1+2")
    assert transcript == Agent(Script(turns), [add]).run("1+2")
    assert transcript.answer == "3"


def test_errors_are_read_and_not_raised():
    def fails(what: str):
        raise {"lookup": KeyError, "stop": StopIteration, "exit": SystemExit}[what]("why")

    async def fails_later():
        raise ValueError("later")

    def day(day: datetime.date) -> str:
        return str(day)

    def cyclic():
        ring = []
        ring.append(ring)
        return ring

    turn = block(
        *(call("fails", what=what) for what in ("lookup", "stop", "exit")),
        *(call("fails_later"), call("day", day="2024-02-30"), call("cyclic"), call("rm"), "rm -r"),
    )
    model = Script([turn, "sorry"])
    transcript = Agent(model, [fails, fails_later, day, cyclic]).run("go")
    assert transcript.answer == "sorry"
    texts = [result.text for result in transcript.steps[0].results]
    assert [result.status for result in transcript.steps[0].results] == ["error"] * 8
    assert texts[:3] == ["Error: KeyError: 'why'", "Error: StopIteration: why", "Error: SystemExit: why"]
    assert texts[3] == "Error: ValueError: later"
    assert texts[4].startswith("Error: the arguments of day are wrong")
    assert texts[5].startswith("Error: ValueError: Circular")
    assert texts[6] == 'Error: There is no tool "rm". The tools are: fails, fails_later, day, cyclic.'
    assert "no JSON object" in texts[7]
    assert [result.name for result in transcript.steps[0].results][-2:] == ["rm", "unknown"]
    assert "tool name: rm\ntool result: Error: There is no tool" in render(model.seen[1][0])


def test_calls_of_one_turn_run_at_the_same_time_and_keep_their_order():
    together = threading.Barrier(3, timeout=30)
    state = contextvars.ContextVar("state", default="")
    state.set("set")

    def wait(name: str) -> str:
        together.wait()
        return name + state.get()

    async def other(name: str) -> str:
        await asyncio.to_thread(together.wait)
        return name

    step = Toolbox([wait, other]).step(block(call("wait", name="a"), call("other", name="b"), call("wait", name="c")))
    assert [result.text for result in step.results] == ["aset", "b", "cset"]


def test_what_takes_too_long_is_not_waited_for():
    release = threading.Event()
    cancelled = []

    def sleeps() -> str:
        release.wait(60)
        return "late"

    async def sleeps_too():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    start = time.monotonic()
    step = Toolbox([sleeps, sleeps_too, add], timeout=0.2).step(
        block(call("sleeps"), call("sleeps_too"), call("add", a=1, b=2))
    )
    assert time.monotonic() - start < 30
    assert [result.status for result in step.results] == ["timeout", "timeout", "ok"]
    assert step.results[0].text == "Error: sleeps took longer than 0.2 s."
    assert cancelled == [True]
    release.set()


def test_results_as_text():
    @dataclasses.dataclass
    class Answer:
        value: float
        day: datetime.date

    values = ["ü\ud800", None, 1.5, {"ä": [True]}, Answer(1.0, datetime.date(2024, 1, 2)), {1}, "x" * 30]
    expected = ["ü?", "null", "1.5", '{"ä": [true]}', '{"value": 1.0, "day": "2024-01-02"}', "[1]"]

    def value(number: int) -> object:
        return values[number]

    step = Toolbox([value], longest=40).step(block(*(call("value", number=i) for i in range(6))))
    assert [result.text for result in step.results] == expected
    short = Toolbox([value], longest=10).step(block(call("value", number=6))).results[0]
    assert short.text == "xxxxx\n[... 20 characters ...]\nxxxxx"
    assert short.status == "ok"


def test_limits():
    loop = Script([block(call("add", a=1, b=1))])
    transcript = Agent(loop, [add]).run("go")
    assert transcript.ended == "max_steps"
    assert len(transcript.steps) == len(loop.seen) == 40
    assert transcript.answer == ""
    assert transcript.steps[-2].results
    assert not transcript.steps[-1].results  # nobody would read them
    assert transcript.messages[-1]["role"] == "assistant"

    assert Agent(Script(["<think>and then"])).run("go").ended == "empty"
    full = Agent(Script([block(call("add", a=1, b=1)), ContextOverflow("too long")]), [add]).run("go")
    assert (full.ended, full.answer, len(full.steps)) == ("overflow", "", 1)


def test_thoughts_call_nothing():
    made = []

    def act() -> str:
        made.append(1)
        return ""

    transcript = Agent(Script([f"<think>{block(call('act'))}</think>no"]), [act]).run("go")
    assert transcript.answer == "no"
    assert not made


def test_from_within_a_running_loop():
    """As in a notebook; and as a coroutine, several at once."""

    async def outer():
        inner = Agent(Script(["yes"])).run("go").answer
        agents = [Agent(Script([block(call("add", a=i, b=i)), str(i)]), [add]) for i in range(5)]
        return inner, [t.answer for t in await asyncio.gather(*(agent.arun("go") for agent in agents))]

    assert asyncio.run(outer()) == ("yes", ["0", "1", "2", "3", "4"])


def test_errors_of_the_model_are_raised():
    with pytest.raises(ZeroDivisionError):
        Agent(Script([ZeroDivisionError()])).run("go")

    async def outer():
        Agent(Script([ZeroDivisionError()])).run("go")

    with pytest.raises(ZeroDivisionError):
        asyncio.run(outer())


def test_a_stream_that_is_left_early_leaves_nothing_behind():
    async def outer():
        agent = Agent(Streams("asynchronous", ["a long answer"]))
        async for event in agent.stream("go"):
            if isinstance(event, Content):
                break
        assert not isinstance(event, Transcript)

    asyncio.run(outer())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Agent(Script([]), [{"name": "f"}]), "'f' is a description without a function"),
        (lambda: Agent(Script([]), [add, add]), "two of them are called 'add'"),
        (lambda: Agent(Script([]), max_steps=0), "max_steps = 0"),
        (lambda: Agent(Script([]), timeout=-1), "timeout = -1"),
        (lambda: Toolbox([add], longest=0), "longest = 0"),
    ],
)
def test_bad_agents(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_a_hanging_tool_does_not_keep_the_program(tmp_path):
    """Neither at the end of the run, nor when the interpreter exits."""
    import subprocess

    script = (
        "import threading\nfrom m1jax.agent import Toolbox\n"
        "def hang():\n    threading.Event().wait()\n"
        'print(Toolbox([hang], timeout=0.1).step(\'<tool_calls>{"name": "hang"}\').results[0].status)\n'
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "timeout\n"), done.stderr
