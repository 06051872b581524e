"""Files of prompts and answers."""

import json
from pathlib import Path

from m1jax.errors import UserError


def read_prompt_answers(path: str | Path) -> list[tuple[str, str]]:
    """Reads JSON lines `{"prompt": "...", "answer": "..."}`; empty lines are skipped.

    Returns:
        (prompt, answer) pairs. An answer may be a number in the file; it becomes text.

    Raises:
        UserError: the file is missing, not UTF-8 or empty, or a line is not such an object; the message names the line.
    """
    path = Path(path)
    expected = 'expected {"prompt": "...", "answer": "..."}'
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {expected} on every line") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}, column {error.colno}: not JSON ({error.msg}); {expected}"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a {type(record).__name__}, not an object; {expected}")
        missing = [key for key in ("prompt", "answer") if key not in record]
        if missing:
            raise UserError(f"{path}, line {number}: no {' and no '.join(map(repr, missing))}; {expected}")
        prompt, answer = record["prompt"], record["answer"]
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        for name, value in (("prompt", prompt), ("answer", answer)):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}, line {number}: {name!r} is {value!r}; it must be a text that is not empty")
        pairs.append((prompt, answer))
    if not pairs:
        raise UserError(f"{path}: no lines; {expected} on every line")
    return pairs
