"""litellm against a server: python litellm_client.py http://127.0.0.1:8000 MODEL (never its 1.82.7 or 1.82.8)."""

import json
import sys
from importlib import metadata
from typing import Any

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def main() -> None:
    assert metadata.version("litellm") not in ("1.82.7", "1.82.8")
    place, model = sys.argv[1], sys.argv[2]
    common: dict[str, Any] = dict(
        model=f"openai/{model}", api_base=f"{place}/v1", api_key="none", messages=[{"role": "user", "content": "hi"}]
    )
    answer: Any = litellm.completion(**common, max_tokens=10, seed=1, temperature=0.0, num_retries=0)
    assert isinstance(answer.choices[0].message.content, str)
    assert answer.usage.completion_tokens <= 10
    streamed: Any = litellm.completion(**common, max_tokens=10, seed=1, temperature=0.0, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in streamed)
    assert text == answer.choices[0].message.content
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        answer = litellm.completion(**common, tools=[TOOL], tool_choice=choice, max_tokens=200)
        message = answer.choices[0].message
        assert message.tool_calls
        assert all(isinstance(json.loads(call.function.arguments), dict) for call in message.tool_calls)
    turns = [*common["messages"], message.model_dump(), *(
        {"role": "tool", "tool_call_id": call.id, "content": "3"} for call in message.tool_calls
    )]  # fmt: skip
    litellm.completion(**{**common, "messages": turns}, tools=[TOOL], tool_choice="auto", max_tokens=10)
    try:
        litellm.completion(**common, max_tokens=10**7)
    except litellm.BadRequestError as error:
        assert "max_tokens" in str(error)  # noqa: PT017
    else:
        raise AssertionError("too many tokens were taken")
    print(json.dumps({"version": metadata.version("litellm")}))


if __name__ == "__main__":
    main()
