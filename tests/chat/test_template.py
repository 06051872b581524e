"""Our template against the published one, and what only ours accepts."""

import json
from pathlib import Path

import jinja2.sandbox
import numpy as np
import pytest

from m1jax.chat import Tokenizer, encode_chat, render
from m1jax.errors import UserError

# The published file is not ours to copy; where the project's shared data lies beside the checkout, it is compared with.
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "minimax-m1" / "tokenizer_config.json"


def text(string):
    return [{"type": "text", "text": string}]


TOOLS = [
    {"name": "weather", "description": "Wetter für <Ort> & 'Zeit'", "parameters": {"type": "object", "a": [1, None]}},
    {"type": "function", "function": {"name": "zip", "parameters": {}}},
]
CONVERSATION = [
    {"role": "system", "content": text("Be brief.\n")},
    {"role": "user", "content": text("  What is 2+2? 你好\n")},
    {"role": "assistant", "content": [*text("<think>\neasy\n</think>\n\n"), *text("4")]},
    {"role": "user", "content": text("")},
    {"role": "assistant", "content": text('<tool_calls>\n{"name": "weather", "arguments": {}}\n</tool_calls>')},
    {"role": "tool", "content": [{"type": "text", "name": "weather", "text": "{}"}]},
    {"role": "tool", "content": [{"type": "text", "name": name, "text": name + "\n"} for name in ("a", "b")]},
    {"role": "system", "content": text(" And polite.")},
]


@pytest.fixture(scope="module")
def published():
    """The published template, in an environment like that of Transformers."""
    if not PUBLISHED.exists():
        pytest.skip("the published tokenizer_config.json is not at hand")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(json.loads(PUBLISHED.read_text())["chat_template"])


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [], TOOLS])
@pytest.mark.parametrize("start", [0, 1])
def test_renders_the_published_bytes(published, start, tools, add_generation_prompt):
    for end in range(start + 1, len(CONVERSATION) + 1):
        arguments = {
            "messages": CONVERSATION[start:end],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        assert render(**arguments) == published.render(**arguments)


def test_the_format_written_out():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "tool", "name": "t", "content": "R"},
    ]
    assert render(messages, tools=[{"name": "t", "a": "<é>"}]) == (
        "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nS<end_of_sentence>\n"
        "<beginning_of_sentence>system tool_setting=tools\nYou are provided with these tools:\n<tools>\n"
        '{"name": "t", "a": "<é>"}\n</tools>\n\n'
        "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide tool-name and "
        "json-object of arguments, following the format below:\n<tool_calls>\n"
        "{name: <tool-name-1>, arguments: <args-json-object-1>}\n...\n</tool_calls><end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nU<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\nA<end_of_sentence>\n"
        "<beginning_of_sentence>tool name=tools\ntool name: t\ntool result: R\n\n<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )


def test_strings_and_all_text_parts_count():
    for role in ("system", "user", "assistant"):
        whole = render([{"role": role, "content": text("ab\n")}])
        assert render([{"role": role, "content": "ab\n"}]) == whole
        assert render([{"role": role, "content": [*text("a"), *text("b\n")]}]) == whole
    parts = {"role": "tool", "content": [{"type": "text", "name": "t", "text": "R"}]}
    assert render([{"role": "tool", "name": "t", "content": text("R")}]) == render([parts])
    assert render([{"role": "tool", "name": "t", "content": "R"}]) == render([parts])


def test_loss_falls_on_what_the_assistant_writes():
    tokenizer = Tokenizer.tiny()
    ids, mask = encode_chat(tokenizer, CONVERSATION, tools=TOOLS)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert ids.shape == mask.shape
    assert tokenizer.decode(ids) == render(CONVERSATION, TOOLS, add_generation_prompt=False)
    assert tokenizer.decode(ids[mask]) == (
        "<think>\neasy\n</think>\n\n4<end_of_sentence>"
        '<tool_calls>\n{"name": "weather", "arguments": {}}\n</tool_calls><end_of_sentence>'
    )
    # What stands before a turn is what the model is given when it is to write that turn.
    first = int(mask.argmax())
    assert ids[:first].tolist() == tokenizer.encode(render([*CONVERSATION[:2], CONVERSATION[-1]], TOOLS))


def test_no_assistant_no_loss():
    _, mask = encode_chat(Tokenizer.tiny(), [{"role": "user", "content": "hello"}])
    assert not mask.any()


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "empty"),
        ("hello", "messages: expected a list"),
        (5, "messages: expected a list"),
        (["hello"], r"messages\[0\]: expected an object"),
        ([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}], r"messages\[1\].*role is one of system"),
        ([{"role": "user"}], r"messages\[0\]: content must be"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], r"messages\[0\]: content must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]: content must be"),
        ([{"role": "tool", "content": "4"}], "needs the tool's name"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "write the calls into the content"),
    ],
)
def test_what_the_format_cannot_say(messages, says):
    with pytest.raises(UserError, match=says):
        render(messages)


@pytest.mark.parametrize(
    ("tools", "says"), [(5, "tools: expected a list"), ("ab", "tools: expected"), ([{}, 5], r"tools\[1\]")]
)
def test_tools_that_are_none(tools, says):
    with pytest.raises(UserError, match=says):
        render([{"role": "user", "content": "a"}], tools)
