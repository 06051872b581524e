import json
from pathlib import Path

import pytest

from m1jax.chat import Tokenizer
from m1jax.errors import UserError
from m1jax.train.data import (
    Conversations,
    Documents,
    JsonLines,
    mixture,
    prompt_answer,
    read_problems,
    weighted,
)


def test_reads_texts_and_numbers(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": 2}\n\n{"prompt": "é\u2028", "answer": "x", "id": 7}\n')
    assert read_problems(file, Tokenizer.tiny(), 9) == [("1+1=", "2"), ("é\u2028", "x")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "answer"}', "line 2, column 25: not JSON"),
        (b'["a", "b"]', "line 2: a list, not an object"),
        (b'{"prompt": "a"}', "line 2: no 'answer'"),
        (b'{"prompt": " ", "answer": "b"}', "line 2: 'prompt' is ' '"),
        (b'{"prompt": "a", "answer": null}', "line 2: 'answer' is None"),
        (b'{"prompt": "\xff"}', "line 2: not UTF-8"),
        (b'{"prompt": "a", "answer": "b\\ud83d"}', "line 2: no valid Unicode at character 2"),
        (b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}", "line 2: not to be read as JSON"),
        (b"[" * 100_000, "line 2: not to be read as JSON"),
        # Before the training begins, and not when that problem's turn comes.
        (b'{"prompt": "aaaaaaaaaa", "answer": "b"}', "line 2: a prompt of 10 tokens; max_prompt_tokens is 9"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "a", "answer": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match="p.jsonl, " + message.replace("[", r"\[")):
        read_problems(file, Tokenizer.tiny(), 9)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_problems(tmp_path / "none.jsonl", Tokenizer.tiny(), 9)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no lines"):
        read_problems(tmp_path / "empty.jsonl", Tokenizer.tiny(), 9)


def test_only_what_the_assistant_writes_is_learned(tmp_path):
    file, tokenizer = tmp_path / "chat.jsonl", Tokenizer.tiny()
    messages = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}] * 2
    file.write_text(json.dumps({"messages": messages}) + '\n{"prompt": "a", "answer": "bc"}\n')
    chat, pair = Conversations(file, tokenizer, 500)
    learned = chat["targets"][chat["weight"] > 0]
    assert tokenizer.decode(learned) == "2<end_of_sentence>2<end_of_sentence>"
    assert tokenizer.decode(pair["targets"][pair["weight"] > 0]) == "bc<end_of_sentence>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: nothing to learn"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', r"line 2: messages\[0\]: expected an object whose role"),
        ('{"prompt": "a", "answer": "bcdefghi"}', "line 2: 10 tokens; row_length is 8"),
        ('{"text": "a"}', "line 2: no 'prompt' and no 'answer'"),
        ('{"messages": 5}', "line 2: messages: expected a list"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2: no valid Unicode"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_named(tmp_path, line, message):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match="chat.jsonl, " + message):
        Conversations(file, Tokenizer.tiny(), 8)


def test_a_document_is_named_too(tmp_path):
    (tmp_path / "web.jsonl").write_text('{"text": "hi"}\n{"txt": "hi"}\n')
    with pytest.raises(UserError, match=r"web\.jsonl, line 2: 'text' is None"):
        Documents(tmp_path / "web.jsonl", Tokenizer.tiny())


def test_a_mixture_keeps_its_weights(tmp_path):
    sources = []
    for name, weight in weighted([f"{tmp_path}/a.jsonl=3", f"{tmp_path}/b.jsonl"]):
        Path(name).write_text("".join(f'{{"prompt": "{name[-7]}", "answer": "{i}"}}\n' for i in range(6)))
        sources.append((JsonLines(name, prompt_answer, "pairs"), weight))
    mixed = mixture(sources, seed=(0,))
    first: list = [mixed[i] for i in range(16)]
    assert [sum(prompt == p for prompt, _ in first) for p in "ab"] == [12, 4]
    assert sorted(answer for prompt, answer in first if prompt == "a") == sorted("012345" * 2)  # each as often
    assert [mixture(sources, seed=(0,))[i] for i in range(16)] == first
    assert [mixture(sources, seed=(1,))[i] for i in range(16)] != first
    for wrong in ("a.jsonl=0", "a.jsonl=x", "a.jsonl=-1", "a.jsonl=nan"):
        with pytest.raises(UserError, match="is no weight"):
            weighted([wrong])
