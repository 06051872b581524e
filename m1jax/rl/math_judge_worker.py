"""The helper process of `math_judge`: lines `[expected, answer]` (JSON) in, `true` or `false` out."""

import json
import sys


def main() -> None:
    from math_verify import parse, verify

    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing that a library prints may look like an answer
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        expected, answer = json.loads(line)
        try:
            # The parent enforces the time limit.
            gold, found = (parse(text, parsing_timeout=None) for text in (expected, answer))  # pyright: ignore[reportArgumentType]
            equal = bool(verify(gold, found, timeout_seconds=None))
        except Exception:  # whatever a strange answer does to the parser, it is not the expected one
            equal = False
        answers.write(b"true\n" if equal else b"false\n")
        answers.flush()


if __name__ == "__main__":
    main()
