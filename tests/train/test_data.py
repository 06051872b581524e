import pytest

from m1jax.errors import UserError
from m1jax.train.data import read_prompt_answers


def test_reads_texts_and_numbers(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": 2}\n\n{"prompt": "é\u2028", "answer": "x", "id": 7}\n')
    assert read_prompt_answers(file) == [("1+1=", "2"), ("é\u2028", "x")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "answer"}', "line 2, column 25: not JSON"),
        (b'["a", "b"]', "line 2: a list, not an object"),
        (b'{"prompt": "a"}', "line 2: no 'answer'"),
        (b'{"prompt": " ", "answer": "b"}', "line 2: 'prompt' is ' '"),
        (b'{"prompt": "a", "answer": null}', "line 2: 'answer' is None"),
        (b'{"prompt": "\xff"}', "line 2: not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "a", "answer": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match="p.jsonl, " + message.replace("[", r"\[")):
        read_prompt_answers(file)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_prompt_answers(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no lines"):
        read_prompt_answers(tmp_path / "empty.jsonl")
