"""The server as its clients see it."""

import json


def test_first(live):
    print(live.chat(max_tokens=20, logprobs=True, top_logprobs=2))
    with live.client.stream(
        "POST",
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 10, "stream": True},
    ) as r:
        print("".join(r.iter_text()))
    print(live.client.get("/metrics").text[:3000])
    print(live.client.get("/health").text)
    print(live.client.get("/openapi.json").text[:300])
    print(live.chat(max_tokens=100, response_format={"type": "json_object"}))
    assert 0
