"""What the model writes, taken apart: by hand, at every cut, and for texts that hypothesis thinks of."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1jax.chat import CallError, Content, Message, Reasoning, StreamParser, ToolCall, as_tools, parse_message, render


def add(a: int, b: int = 0) -> int:
    """Adds.

    Args:
        a: one number
        b: another
    """
    return a + b


def say(text: str) -> str:
    """Says it."""
    return text


TOOLS = as_tools([add, say])
ADD = '{"name": "add", "arguments": {"a": 1}}'
CALL = ToolCall("add", {"a": 1})


def block(*lines):
    return "<tool_calls>\n" + "\n".join(lines) + "\n</tool_calls>"


# (text, content, thought, calls, tools named by the errors)
SAMPLES = [
    ("", "", "", [], []),
    ("  Hello <b> \n", "  Hello <b> \n", "", [], []),
    ("<think>\nhm\n</think>\n\nHello", "Hello", "hm", [], []),
    ("<think>hm</think>Hello", "Hello", "hm", [], []),
    ("\n<think></think>Hello ", "Hello ", "", [], []),
    ("<think>one < two", "", "one < two", [], []),
    ("<think>a</think> b <think>c</think> d", "b\nd", "a\nc", [], []),
    ("a </think> b", "a </think> b", "", [], []),
    ("<thin <think", "<thin <think", "", [], []),
    (block(ADD), "", "", [CALL], []),
    (f"<think>t</think>\n\nLet me see.\n{block(ADD)}\n", "Let me see.", "t", [CALL], []),
    (f"before {block(ADD)} trailing text", "before\ntrailing text", "", [CALL], []),
    (block(ADD, ADD), "", "", [CALL, CALL], []),
    (f"<tool_calls>{ADD}{ADD}</tool_calls>", "", "", [CALL, CALL], []),
    (block(ADD) + block(ADD), "", "", [CALL, CALL], []),
    (block(json.dumps(json.loads(ADD), indent=4)), "", "", [CALL], []),
    (block(f"[{ADD}, {ADD}]"), "", "", [CALL, CALL], []),
    (block(json.dumps([json.loads(ADD)] * 2, indent=2)), "", "", [CALL, CALL], []),
    (block("```json", ADD, "```"), "", "", [CALL], []),
    # The block, or the array in it, is never closed: what is complete counts.
    (f"<tool_calls>\n{ADD}", "", "", [CALL], []),
    (f"<tool_calls>\n{ADD}\n</tool_ca", "", "", [CALL], []),
    (f"<tool_calls>\n[{ADD}, {ADD[:-3]}", "", "", [CALL], ["add"]),
    (f"<tool_calls>\n{ADD}\n{ADD[:-1]}", "", "", [CALL], ["add"]),
    (f"<tool_calls>\n{ADD[:-1]}\n</tool_calls>\nbye", "bye", "", [], ["add"]),
    # Arguments.
    (block('{"name": "add", "arguments": "{\\"a\\": 1}"}'), "", "", [CALL], []),
    (block('{"name": "add", "arguments": "a=1"}'), "", "", [], ["add"]),
    (block('{"name": "add", "arguments": [1]}'), "", "", [], ["add"]),
    (block('{"name": "add", "arguments": "[1]"}'), "", "", [], ["add"]),
    (block('{"name": "add"}'), "", "", [], ["add"]),
    (block('{"name": "add", "arguments": {"a": "1"}}', ADD), "", "", [CALL], ["add"]),
    (block('{"name": "add", "arguments": {"a": 1, "c": 2}}'), "", "", [], ["add"]),
    (block('{"name": "add", "arguments": {"a": NaN}}'), "", "", [], ["add"]),
    (block('{"name": "add", "arguments": {"a": 1e999}}'), "", "", [], ["add"]),
    (block('{"name": "say", "arguments": {"text": "\\ud800"}}'), "", "", [], ["say"]),
    (block('{"name": "say", "arguments": {"text": "a\nb"}}'), "", "", [ToolCall("say", {"text": "a\nb"})], []),
    # Names.
    (block('{"name": "rm", "arguments": {}}', ADD), "", "", [CALL], ["rm"]),
    (block('{"name": 5, "arguments": {}}'), "", "", [], [""]),
    (block('{"arguments": {}}'), "", "", [], [""]),
    # Broken JSON, and what is none.
    (block('{"name": "add", "arguments": {"a": 1,}}', ADD), "", "", [CALL], ["add"]),
    (block("{'name': 'add'}", ADD), "", "", [CALL], [""]),
    (block('{"name": "add",, "arguments": {}} ' + ADD), "", "", [], ["add"]),
    (block(f"I call: {ADD}", ADD), "", "", [CALL], [""]),
    (block("5", "null", '"' + ADD + '"'), "", "", [], ["", "", ""]),
    (block(ADD[:-1], ADD), "", "", [], ["add"]),
    ("<tool_calls></tool_calls>", "", "", [], [""]),
    ("<tool_calls>\n", "", "", [], [""]),
    # A closing tag inside a string is text; one inside a string that never ends leaves what follows as text.
    (
        block('{"name": "say", "arguments": {"text": "\\"</tool_calls>{<think>"}}', ADD) + "bye",
        "bye",
        "",
        [ToolCall("say", {"text": '"</tool_calls>{<think>'}), CALL],
        [],
    ),
    (block('{"name": "say", "arguments": {"text": "x}}') + f"bye {block(ADD)}", f"bye {block(ADD)}", "", [], ["say"]),
    (block('{"name": "say", "arguments": {"text": "5" x"}}') + "bye", "bye", "", [], ["say"]),
    # A call inside a thought is a thought, wherever the thought begins, closed or not.
    (f"<think>{block(ADD)}", "", block(ADD), [], []),
    (f"<think>{block(ADD)}</think>no", "no", block(ADD), [], []),
    (f"<think>a</think>x <think>{block(ADD)}", "x", f"a\n{block(ADD)}", [], []),
    (f"<tool_calls>\n<think>\n{ADD}\n</think>\n{ADD}\n</tool_calls>", "", ADD, [CALL], []),
    (f"<tool_calls>\nhm <think>\n{ADD}\n</tool_calls>", "", f"{ADD}\n</tool_calls>", [], [""]),
    (f"<tool_calls>\n{{<think>\n}}\n{ADD}\n</think>{ADD}", ADD, "}\n" + ADD, [], [""]),
]


def pieces(text, cuts):
    cuts = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


def stream(parts, tools=TOOLS):
    """The message from the parser's events alone, compared with its own."""
    parser = StreamParser(tools)
    events = [event for part in parts for event in parser.feed(part)] + parser.close()

    def of(kind):
        return [event for event in events if isinstance(event, kind)]

    said = ["".join(event.text for event in of(kind)) for kind in (Content, Reasoning)]
    message = Message(*said, tuple(of(ToolCall)), tuple(of(CallError)))
    assert message == parser.message
    return message


@pytest.mark.parametrize(("text", "content", "thought", "calls", "errors"), SAMPLES)
def test_samples_whole_and_at_every_cut(text, content, thought, calls, errors):
    message = parse_message(text, TOOLS)
    assert (message.content, message.reasoning_content) == (content, thought)
    assert list(message.tool_calls) == calls
    assert [error.name for error in message.errors] == errors
    assert stream(text) == message  # letter by letter
    for cut in range(len(text)):
        assert stream(pieces(text, [cut])) == message
        assert stream(pieces(text, [cut, cut + 5])) == message


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ('{"name": "rm", "arguments": {}}', 'There is no tool "rm". The tools are: add, say.'),
        ('{"arguments": {}}', 'The call has no "name"'),
        ('{"name": "add", "arguments": {"b": "x"}}', "'a' is a required property; at b: 'x' is not of type 'integer'"),
        ('{"name": "add", "arguments": 5}', '"arguments" must be a JSON object, not 5.'),
        ('{"name": "add", "arguments": "{"}', '"arguments" is a text that is no JSON'),
        ('{"name": "add" "arguments": {}}', "Expecting ',' delimiter: line 1 column 16"),
        ('{"name": "add", ', "it breaks off"),
        ("add(1)", "no JSON object"),
    ],
)
def test_errors_tell_the_model_what_is_wrong(call, says):
    (error,) = parse_message(block(call), TOOLS).errors
    assert says in error.message
    assert error.text.strip() == call.strip()


def test_without_tools():
    assert parse_message(block(ADD)) == Message(content=block(ADD))
    assert "There are no tools" in parse_message(block(ADD), []).errors[0].message


def test_absurd_input_is_an_error_and_no_exception():
    deep = '{"name": "add", "arguments": ' + '{"a": ' * 50_000 + "1" + "}" * 50_000 + "}"
    for call in (deep, '{"name": "add", "arguments": {"a": ' + "9" * 10_000 + "}}", "{" * 50_000, "[" * 50_000 + "x"):
        assert parse_message(block(call), TOOLS).errors
    recursive = {"name": "loop", "parameters": {"$ref": "#"}}
    message = parse_message(block('{"name": "loop", "arguments": {}}'), [recursive])
    assert message.errors[0].name == "loop"


def test_what_is_taken_apart_renders_as_it_was():
    """So that a conversation that comes back in OpenAI's spelling has the tokens of the one that was written."""
    text = f"<think>\nhm\n</think>\n\nLet me see.\n{block(ADD, ADD)}"
    message = parse_message(text, TOOLS)
    calls = [{"function": {"name": c.name, "arguments": json.dumps(c.arguments)}} for c in message.tool_calls]
    theirs = {
        "role": "assistant",
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls,
    }
    assert render([theirs]) == render([{"role": "assistant", "content": text}])


# Texts whose meaning is known, because they are put together from parts whose meaning is known.
WORDS = st.text(st.sampled_from('ab{}[],:"\\ \n'), min_size=1, max_size=8).map(lambda text: f"w{text}w")
GOOD = st.builds(
    lambda name, arguments, indent, as_text: (
        json.dumps({"name": name, "arguments": json.dumps(arguments) if as_text else arguments}, indent=indent),
        ToolCall(name, arguments),
    ),
    *(st.just("say"), st.builds(dict, text=st.text(max_size=8) | st.just('</tool_calls>"<think>{'))),
    st.sampled_from([None, 1]),
    st.booleans(),
)
BAD = st.sampled_from(
    [
        '{"name": "rm", "arguments": {}}',
        '{"name": "add", "arguments": {"a": "x"}}',
        '{"name": "add", "arguments": {"a": 1,}}',
        '{"name": "add"}',
        "w",
    ]
).map(lambda text: (text, None))
ITEMS = st.lists(GOOD | BAD, min_size=1, max_size=4)
BLOCKS = st.builds(
    lambda items, array: (
        f"<tool_calls>{'[' if array else ''}\n"
        + (",\n" if array else "\n").join(text for text, _ in items)
        + f"\n{']' if array else ''}</tool_calls>",
        items,
    ),
    ITEMS,
    st.booleans(),
)
SEGMENTS = st.one_of(
    WORDS.map(lambda text: ("content", text, text)),
    st.one_of(WORDS, BLOCKS.map(lambda b: b[0]).filter(lambda text: "think>" not in text)).map(
        lambda text: ("thought", f"<think>\n{text}\n</think>", text)
    ),
    BLOCKS.map(lambda b: ("block", *b)),
)


def separated(segments):
    """Without two answers side by side, which would be one."""
    return [s for i, s in enumerate(segments) if i == 0 or not s[0] == segments[i - 1][0] == "content"]


CUTS = st.lists(st.integers(0, 400), max_size=12)
MEANT = st.tuples(st.lists(SEGMENTS, max_size=5).map(separated), CUTS)


def check_meaning(segments, cuts):
    text = "".join(text for _, text, _ in segments)
    message = parse_message(text, TOOLS)
    items = [item for kind, _, items in segments if kind == "block" for item in items]
    assert message.content == "\n".join(text for kind, text, _ in segments if kind == "content")
    assert message.reasoning_content == "\n".join(thought for kind, _, thought in segments if kind == "thought")
    assert list(message.tool_calls) == [call for _, call in items if call]
    assert len(message.errors) == sum(call is None for _, call in items)
    assert stream(pieces(text, cuts)) == message


def check_soup(fragments, cuts):
    """A text of any form: cuts change nothing, what is called may be called, and a thought calls nothing."""
    text = "".join(fragments)
    message = parse_message(text, TOOLS)
    assert stream(pieces(text, cuts)) == message
    assert stream(text) == message
    for call in message.tool_calls:
        assert call.name in ("add", "say")
        assert json.loads(json.dumps(call.arguments)) == call.arguments
    for error in message.errors:
        assert error.message
        assert error.text in text
    assert not parse_message(f"<think>{text.replace('</think>', '')}", TOOLS).tool_calls
    # Closing the block, or cutting the text off, never makes a call of what was none.
    for end in cuts:
        shorter = parse_message(text[:end], TOOLS).tool_calls
        assert shorter == message.tool_calls[: len(shorter)]


SOUP = st.tuples(
    st.lists(
        st.sampled_from(
            [
                *("<think>", "</think>", "<tool_calls>", "</tool_calls>", ADD, ADD[:-1], ADD[:20], "```json\n"),
                *("[", "]", ",", " ", "<", "</", "x", "\n", '"', "\\", "{", "}", '"}}'),
                '{"name": "say", "arguments": {"text": "',
            ]
        )
        | st.text(max_size=3),
        max_size=14,
    ),
    CUTS,
)


@settings(max_examples=300)
@given(MEANT)
def test_texts_of_known_meaning(case):
    check_meaning(*case)


@settings(max_examples=300)
@given(SOUP)
def test_texts_of_any_form(case):
    check_soup(*case)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(MEANT)
def test_ten_thousand_texts_of_known_meaning(case):
    check_meaning(*case)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(SOUP)
def test_ten_thousand_texts_of_any_form(case):
    check_soup(*case)
