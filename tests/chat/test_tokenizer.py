"""The built-in tokenizer, and tokenizers read from a directory."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1jax.chat import TextStream, Tokenizer, encode_prompt, partings, render
from m1jax.chat.tokenizer import SPECIAL_TOKENS
from m1jax.errors import UserError


@given(st.text())
def test_every_text_survives(string):
    tokenizer = Tokenizer.tiny()
    ids = tokenizer.encode(string)
    assert tokenizer.decode(ids) == string
    if not any(token in string for token in SPECIAL_TOKENS):
        assert bytes(ids) == string.encode()


def test_special_tokens():
    tokenizer = Tokenizer.tiny()
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == list(range(256, 263))
    assert tokenizer.vocab_size == 263
    assert (tokenizer.bos_id, tokenizer.eos_id) == (257, 258)
    assert tokenizer.decode([97, tokenizer.eos_id], skip_special_tokens=True) == "a"
    assert tokenizer.decode("é".encode()[:1]) == "\ufffd"


@given(st.lists(st.integers(0, 262) | st.sampled_from(list("é你😀\ufffd".encode())), max_size=60))
def test_text_comes_as_the_tokens_do(ids):
    """Letters of several bytes, cut ones and rubbish among them."""
    tokenizer = Tokenizer.tiny()
    stream = TextStream(tokenizer)
    pieces = [stream.feed([i]) for i in ids]
    assert "".join([*pieces, stream.close()]) == tokenizer.decode(ids)
    together = TextStream(tokenizer)
    assert together.feed(ids) + together.close() == tokenizer.decode(ids)


def test_nothing_is_kept_back_without_need():
    stream = TextStream(Tokenizer.tiny())
    assert [stream.feed([i]) for i in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.close() == "\ufffd"
    assert stream.close() == ""
    # A model that writes nothing but rubbish: the work per token stays the same.
    rubbish = [0x80] * 100
    assert "".join(stream.feed([i]) for i in rubbish) == "\ufffd" * 99
    assert len(stream._ids) <= 9


def test_saved_and_read_again(tmp_path):
    tokenizer = Tokenizer.tiny()
    tokenizer.save(tmp_path / "new" / "directory")
    again = Tokenizer.from_dir(tmp_path / "new" / "directory")
    prompt = render([{"role": "user", "content": "1 + 1 = ?"}])
    assert again.encode(prompt) == tokenizer.encode(prompt)
    assert again.decode(again.encode(prompt)) == prompt


def test_transformers_reads_what_we_save(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.tiny()
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "é\n"}, {"role": "assistant", "content": "<think>\n\n</think>2"}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == render(messages)
    prompt = render(messages)
    assert theirs.encode(prompt) == tokenizer.encode(prompt)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_directories_that_hold_no_tokenizer_of_ours(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist: copy"):
        Tokenizer.from_dir(tmp_path)
    with pytest.raises(UserError, match="nowhere is no directory"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer.from_dir(tmp_path)
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer has no token '<beginning_of_sentence>'"):
        Tokenizer.from_dir(tmp_path)


SYSTEM, USER, AI = (
    {"role": role, "content": f"<beginning_of_sentence> {role}"} for role in ("system", "user", "assistant")
)
NOTHING = {"role": "system", "content": ""}
RESULT = {"role": "tool", "name": "add", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("messages", "tools", "common"),
    [
        ([USER], [], []),
        ([SYSTEM, USER], [], [[SYSTEM]]),
        ([USER], TOOLS, [[NOTHING]]),
        ([USER, AI, USER], [], [[USER, AI]]),
        ([SYSTEM, USER, AI, USER], TOOLS, [[SYSTEM], [SYSTEM, USER, AI]]),
        ([SYSTEM, USER, AI, RESULT, RESULT], TOOLS, [[SYSTEM]]),
        ([USER, USER], [], [[USER]]),
        ([SYSTEM], [], []),
    ],
)
def test_where_conversations_part(messages, tools, common):
    """Behind the system prompt and the tools, and before the last question."""
    tokenizer = Tokenizer.tiny()
    prompt = encode_prompt(tokenizer, messages, tools)
    opening = len(tokenizer.encode("<beginning_of_sentence>ai name=assistant\n"))
    lengths = [len(encode_prompt(tokenizer, part, tools)) - opening for part in common]
    assert list(partings(tokenizer, prompt, messages)) == lengths
