import gzip
import json
import sys
from pathlib import Path

import pytest

from m1jax.chat import Tokenizer
from m1jax.errors import UserError
from m1jax.train.data import (
    PAIR,
    Conversations,
    Documents,
    Source,
    mixture,
    prompt_answer,
    weighted,
)
from m1jax.train.files import open_records


def pairs(path):
    found = Source(path, prompt_answer, PAIR, ("prompt", "answer"))
    return [found[index] for index in range(len(found))]


def test_reads_texts_and_numbers(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": 2}\n\n{"prompt": "é\u2028", "answer": "x", "id": 7}\n')
    assert pairs(file) == [("1+1=", "2"), ("é\u2028", "x")]


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
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "a", "answer": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match="p.jsonl, " + message.replace("[", r"\[")):
        pairs(file)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no lines"):
        pairs(tmp_path / "empty.jsonl")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "answer": "b"}\r\n')
    assert pairs(tmp_path / "p.jsonl") == [("a", "b")]
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfhi")
    assert [record["text"] for record in open_records(tmp_path / "t.txt", "text")] == ["hi"]


def test_compressed_lines(tmp_path):
    lines = b'{"prompt": "a", "answer": "b"}\n\n{"prompt": "c", "answer": "d"}\n'
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines))
    assert pairs(tmp_path / "p.jsonl.gz") == [("a", "b"), ("c", "d")]
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines + b"["))
    with pytest.raises(UserError, match=r"p\.jsonl\.gz, line 4, column 2: not JSON"):
        pairs(tmp_path / "p.jsonl.gz")
    for damage in (lambda whole: whole[:-9], lambda whole: whole[:20] + b"?" + whole[21:], lambda whole: lines):
        (tmp_path / "p.jsonl.gz").write_bytes(damage(gzip.compress(lines)))
        with pytest.raises(UserError, match=r"p\.jsonl\.gz: not a whole gzip file"):
            pairs(tmp_path / "p.jsonl.gz")


def write_parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path, **options)


def test_parquet_is_read_as_the_same_lines(tmp_path):
    """Conversations and pairs in one file, as JSON lines and as Parquet, whose missing values are nulls."""
    messages = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]
    tools = [{"name": "f", "description": "d", "parameters": {"type": "object"}}]
    rows = [{"messages": messages, "tools": tools}, {"messages": messages}, {"prompt": "a", "answer": "b"}] * 700
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty = dict.fromkeys(("messages", "tools", "prompt", "answer"))
    write_parquet(tmp_path / "c.parquet", [empty | row | {"id": i} for i, row in enumerate(rows)], row_group_size=300)
    want, got = (Conversations(tmp_path / name, Tokenizer.tiny(), 5000) for name in ("c.jsonl", "c.parquet"))
    assert len(got) == len(want) == len(rows)
    for index in (0, 1, 2, 299, 300, 1023, 1024, 1025, 2099):
        assert got[index].tokens.tolist() == want[index].tokens.tolist()
        assert got[index].mask.tolist() == want[index].mask.tolist()


def test_rows_of_parquet_are_named(tmp_path):
    path = tmp_path / "p.parquet"
    write_parquet(path, [{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": None}])
    with pytest.raises(UserError, match=r"p\.parquet, row 2: no 'answer'"):
        pairs(path)
    with pytest.raises(UserError, match=r'p\.parquet: its columns are prompt, answer; expected \{"text"'):
        Documents(path, Tokenizer.tiny())
    whole = path.read_bytes()
    for damaged in (b"", whole[:-20], whole[:-8] + b"????PAR1", b'{"prompt": "a"}' * 9):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"p\.parquet: not a whole Parquet file"):
            pairs(path)
    path.unlink()
    with pytest.raises(UserError, match=r"p\.parquet: cannot be read"):
        pairs(path)


def test_parquet_needs_a_library(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"p\.parquet: reading Parquet needs pyarrow"):
        open_records(tmp_path / "p.parquet", "pairs")


def test_plain_text_is_cut_at_the_ends_of_lines(tmp_path):
    text = "".join(f"line {number} é\n" for number in range(20_000))
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "book.md.gz").write_bytes(gzip.compress(text.encode()))
    records = open_records(tmp_path / "book.txt", "text")
    pieces = [record["text"] for record in records]
    assert "".join(pieces) == text
    assert 60 <= len(pieces) <= 64
    assert all(piece.endswith("\n") for piece in pieces)
    first = pieces[1].split()[1]  # lines count from 1, their contents from 0
    assert records.where(1) == f"{tmp_path}/book.txt, line {int(first) + 1}"
    assert [record["text"] for record in open_records(tmp_path / "book.md.gz", "text")] == pieces
    tokens = Documents(tmp_path / "book.txt", Tokenizer.tiny())[1].tokens
    assert Tokenizer.tiny().decode(tokens) == "<begin_of_document>" + pieces[1]


@pytest.mark.parametrize(
    ("content", "lengths"),
    [(b"a", [1]), (b"a" * 5000, [5000]), (b"a\n" * 1000, [1024, 976]), (b"\n" * 3000 + b"a\n", [954]),
     ((b"a" * 1023 + b"\n") * (1 << 16), [1 << 16] * 1024)],
)  # fmt: skip
def test_lengths_of_plain_text(tmp_path, content, lengths):
    (tmp_path / "t.txt").write_bytes(content)
    assert [len(record["text"]) for record in open_records(tmp_path / "t.txt", "text")] == lengths


def test_plain_text_has_no_prompts(tmp_path):
    (tmp_path / "t.txt").write_text("hello\n")
    with pytest.raises(UserError, match=r"t\.txt, line 1: no 'prompt' and no 'answer'; expected"):
        pairs(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"t\.txt, line 1: not UTF-8"):
        Documents(tmp_path / "t.txt", Tokenizer.tiny())
    (tmp_path / "t.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"t\.txt: no lines"):
        Documents(tmp_path / "t.txt", Tokenizer.tiny())


def test_only_what_the_assistant_writes_is_learned(tmp_path):
    file, tokenizer = tmp_path / "chat.jsonl", Tokenizer.tiny()
    messages = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}] * 2
    file.write_text(json.dumps({"messages": messages}) + '\n{"prompt": "a", "answer": "bc"}\n')
    chat, pair = Conversations(file, tokenizer, 500)
    learned = chat.targets[chat.mask]
    assert tokenizer.decode(learned) == "2<end_of_sentence>2<end_of_sentence>"
    assert tokenizer.decode(pair.targets[pair.mask]) == "bc<end_of_sentence>"


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
        sources.append((Source(name, prompt_answer, "pairs", ("prompt", "answer")), weight))
    mixed = mixture(sources, seed=(0,))
    first: list = [mixed[i] for i in range(16)]
    assert [sum(prompt == p for prompt, _ in first) for p in "ab"] == [12, 4]
    assert sorted(answer for prompt, answer in first if prompt == "a") == sorted("012345" * 2)  # each as often
    assert [mixture(sources, seed=(0,))[i] for i in range(16)] == first
    assert [mixture(sources, seed=(1,))[i] for i in range(16)] != first
    for wrong in ("a.jsonl=0", "a.jsonl=x", "a.jsonl=-1", "a.jsonl=nan"):
        with pytest.raises(UserError, match="is no weight"):
            weighted([wrong])
