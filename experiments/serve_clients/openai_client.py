"""The openai SDK against a running server: python openai_client.py http://127.0.0.1:8000 PID (needs openai).

PID is the server's process.
"""

import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai

TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "description": "Keeps a note.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "maxLength": 8}},
            "required": ["text"],
            "additionalProperties": False,
        },
    },
}
ROUNDS = 32


def protocol(client: Any, model: str) -> None:
    """Everything once, through the SDK's own types."""
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=20, seed=1, n=2, logprobs=True, top_logprobs=2
    )
    assert len(whole.choices) == 2
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=20, seed=1, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens <= 20
    parsed = client.chat.completions.create(
        model=model, messages=messages, max_tokens=200, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(parsed.choices[0].message.content), dict)
    completion = client.completions.create(model=model, prompt="abc", max_tokens=5, logprobs=1)
    assert completion.choices[0].logprobs.tokens
    assert [each.id for each in client.models.list()] == [model]
    for wrong, kind in (
        ({"model": "other"}, openai.NotFoundError),
        ({"temperature": 3}, openai.UnprocessableEntityError),
        ({"max_tokens": 10**6}, openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(**{"model": model, "messages": messages, **wrong})
        except kind as error:
            assert "message" in str(error.body)  # noqa: PT017
        else:
            raise AssertionError(wrong)


def prefilled(place: str) -> int:
    """Tokens of prompts that the server has computed so far."""
    with urllib.request.urlopen(f"{place}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("m1jax_prefilled_tokens "))))


def processor(pid: int) -> float:
    """Seconds that a process has computed, on all cores together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rounds(client: Any, model: str, place: str, pid: int) -> list[tuple[int, float, float, int, int]]:
    """An agent whose history grows: (tokens of the prompt, seconds, the server's seconds of processor time, tokens
    written, tokens prefilled) of each round."""
    messages: list = [{"role": "user", "content": "Keep notes. " * 3}]
    found = []
    for number in range(ROUNDS):
        before, spent = prefilled(place), processor(pid)
        start = time.perf_counter()
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=[TOOL], tool_choice="required", max_tokens=120, seed=number,
            parallel_tool_calls=False,
        )  # fmt: skip
        seconds, spent = time.perf_counter() - start, processor(pid) - spent
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        usage = answer.usage
        found.append((usage.prompt_tokens, seconds, spent, usage.completion_tokens, prefilled(place) - before))
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            arguments = json.loads(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"kept: {arguments['text']}"})
    return found


def main() -> None:
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=120)
    model = client.models.list().data[0].id
    protocol(client, model)
    found = rounds(client, model, sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"version": openai.__version__, "rounds": found}))


if __name__ == "__main__":
    main()
