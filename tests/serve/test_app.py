"""The server as its clients see it."""

import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

from m1jax.chat import encode_prompt
from tests import tiny
from tests.serve.conftest import ROWS, running

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
SAY = {"type": "function", "function": {"name": "say", "parameters": {"type": "object", "properties": {}}}}


def events(response):
    """What a stream tells, and whether it says that it is at its end."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"], lines[-1] == "data: [DONE]"


def stream(live, path, **body):
    with live.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks, done = events(response)
    assert done
    return chunks


def test_a_reply(live, tokenizer):
    answer = live.chat(max_tokens=12, seed=1, return_token_ids=True)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert choice["message"]["role"] == "assistant"
    assert answer["prompt_token_ids"] == encode_prompt(tokenizer, USER).tolist()
    written = len(choice["token_ids"])
    assert (choice["finish_reason"], written) == ("length", 12) or choice["token_ids"][-1] == tokenizer.eos_id
    prompt = len(answer["prompt_token_ids"])
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }


def test_what_conversations_have_in_common_is_read_once(live):
    book = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once upon a time. " * 20}]
    spent = []
    for question in ("Who?", "And how does it end?"):
        before = live.backend.counts.prefilled
        prompt = live.post(CHAT, messages=[*book, {"role": "user", "content": question}], max_tokens=2).json()["usage"]
        spent.append((live.backend.counts.prefilled - before, prompt["prompt_tokens"]))
    (first, long), (second, _) = spent
    assert first == long - 1
    assert second < 80


def test_the_same_seed_gives_the_same_reply(live):
    seen = [live.chat(max_tokens=12, seed=s)["choices"][0]["message"] for s in (5, 5, 6, None)]
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def test_a_stream_tells_what_a_whole_reply_tells(live):
    body = {"messages": USER, "max_tokens": 40, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 3}
    body["return_token_ids"] = True
    whole = live.post(CHAT, **body).json()
    chunks = stream(live, CHAT, **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for index, choice in enumerate(whole["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [t for c in mine for t in c["token_ids"]] == choice["token_ids"]
        assert [c["finish_reason"] for c in mine][-1] == choice["finish_reason"]
        assert all(c["finish_reason"] is None for c in mine[:-1])
        told = [token for c in mine for token in c["logprobs"]["content"]]
        assert [t["token"] for t in told] == [t["token"] for t in choice["logprobs"]["content"]]


def test_log_probabilities_are_the_models(live, tokenizer):
    """Also of tokens that a grammar forced."""
    model = tiny.model()
    for extra in ({}, {"response_format": {"type": "json_object"}}):
        answer = live.chat(
            max_tokens=30, seed=2, temperature=0.7, logprobs=True, top_logprobs=5, return_token_ids=True, **extra
        )
        prompt, written = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
        tokens = np.array([prompt + written], np.int32)
        logits = np.asarray(model(tokens), np.float64)[0, len(prompt) - 1 : -1] / 0.7
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        told = answer["choices"][0]["logprobs"]["content"]
        np.testing.assert_allclose([t["logprob"] for t in told], expected[np.arange(len(written)), written], atol=1e-3)
        best = np.sort(expected)[:, :-6:-1]
        np.testing.assert_allclose([[t["logprob"] for t in each["top_logprobs"]] for each in told], best, atol=1e-3)


def test_stop(live):
    text = live.post(COMPLETE, prompt="abc", max_tokens=60, seed=4).json()["choices"][0]["text"]
    stop = text[20:22]
    for cut in (stop, ["never", stop]):
        choice = live.post(COMPLETE, prompt="abc", max_tokens=60, seed=4, stop=cut).json()["choices"][0]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
    chunks = stream(live, COMPLETE, prompt="abc", max_tokens=60, seed=4, stop=stop)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text[: text.index(stop)]
    assert live.at_rest()


def test_completions(live, tokenizer):
    ids = tokenizer.encode("abc")
    texts = live.post(COMPLETE, prompt=["abc", "abd"], max_tokens=5, seed=4, n=2, return_token_ids=True).json()
    choices = texts["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert [c["prompt_token_ids"] for c in choices] == [ids, ids, [*ids[:2], 100], [*ids[:2], 100]]
    tokens = live.post(COMPLETE, prompt=ids, max_tokens=5, seed=4, return_token_ids=True, logprobs=2).json()
    assert tokens["choices"][0]["token_ids"] == choices[0]["token_ids"]
    logprobs = tokens["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == len(choices[0]["token_ids"])
    assert all(1 <= len(top) <= 2 for top in logprobs["top_logprobs"])  # two tokens may read alike
    several = live.post(COMPLETE, prompt=[ids, ids], max_tokens=5).json()["choices"]
    assert len(several) == 2


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_tools_that_must_be_called(live, choice, streams):
    for seed in range(4):
        body = dict(messages=USER, tools=[SAY, ADD], tool_choice=choice, max_tokens=400, seed=seed)
        if streams:
            chunks = stream(live, CHAT, **body)
            calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
            assert [call["index"] for call in calls] == list(range(len(calls)))
            assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        else:
            (answer,) = live.post(CHAT, **body).json()["choices"]
            calls, content = answer["message"]["tool_calls"], answer["message"]["content"]
            assert (content, answer["finish_reason"]) == (None, "tool_calls")
        assert calls
        assert len({call["id"] for call in calls}) == len(calls)
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            assert isinstance(arguments, dict)
            if call["function"]["name"] == "add":
                assert isinstance(arguments["a"], int)
        if choice != "required":
            assert [call["function"]["name"] for call in calls] == ["add"]


def test_tools_that_may_be_called(live):
    for choice in ("auto", "none", None):
        answer = live.chat(tools=[ADD], tool_choice=choice, max_tokens=10)
        assert isinstance(answer["choices"][0]["message"]["content"], str)
    with_tools, without = (live.chat(tools=t, max_tokens=1)["usage"]["prompt_tokens"] for t in ([ADD], None))
    assert with_tools > without
    assert live.chat(tools=[ADD], tool_choice="none", max_tokens=1)["usage"]["prompt_tokens"] == without


def test_json(live):
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    schema["additionalProperties"] = False
    for seed in range(4):
        content = live.chat(max_tokens=200, seed=seed, response_format={"type": "json_object"})
        assert isinstance(json.loads(content["choices"][0]["message"]["content"]), dict)
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        content = live.chat(max_tokens=200, seed=seed, response_format=form)
        assert list(json.loads(content["choices"][0]["message"]["content"])) == ["x"]


def test_constrained_beside_free(live):
    """Who shares a step with a constrained reply writes what it would have written alone."""
    alone = live.chat(max_tokens=80, seed=9)["choices"][0]["message"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        constrained = pool.submit(live.chat, max_tokens=80, seed=1, response_format={"type": "json_object"})
        free = [pool.submit(live.chat, max_tokens=80, seed=9) for _ in range(2)]
        assert all(each.result()["choices"][0]["message"] == alone for each in free)
        assert isinstance(json.loads(constrained.result()["choices"][0]["message"]["content"]), dict)


def test_a_thought_has_its_budget(live):
    """The prompt's end opens the thought; a model with random weights would never close it."""
    messages = [*USER, {"role": "assistant", "content": "x"}]
    answer = live.post(CHAT, messages=messages, max_tokens=100, thinking_budget=10, seed=0).json()
    assert answer["choices"]
    assert live.post(CHAT, messages=messages, max_tokens=5, thinking_budget="80k").status_code == 200


def test_messages_as_clients_send_them(live):
    call = {"id": "c1", "type": "function", "name": "add", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": "U", "name": "someone"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    assert live.post(CHAT, messages=messages, tools=[ADD], max_tokens=2).status_code == 200


def refused(response, status, says):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (CHAT, {}, 422, "messages: Field required"),
        (CHAT, {"messages": []}, 422, "messages"),
        (CHAT, {"messages": USER, "max_token": 3}, 422, "max_token: Extra inputs"),
        (CHAT, {"messages": USER, "temperature": -1}, 422, "temperature"),
        (CHAT, {"messages": USER, "temperature": "hot"}, 422, "temperature"),
        (CHAT, {"messages": USER, "n": 0}, 422, "n:"),
        (CHAT, {"messages": USER, "frequency_penalty": 1}, 422, "frequency_penalty"),
        (CHAT, {"messages": [{"role": "bot", "content": "x"}]}, 422, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0]: content must be"),
        (CHAT, {"messages": USER, "top_logprobs": 2}, 400, "needs logprobs"),
        (CHAT, {"messages": USER, "tool_choice": "required"}, 400, "there are no tools"),
        (
            CHAT,
            {"messages": USER, "tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            400,
            "no tool 'x'",
        ),
        (CHAT, {"messages": USER, "tools": [ADD, ADD]}, 400, "two of them are called 'add'"),
        (CHAT, {"messages": USER, "max_tokens": 1001}, 400, "at most 1000"),
        (
            CHAT,
            {
                "messages": USER,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
            },
            400,
            "cannot be enforced",
        ),
        (COMPLETE, {"prompt": ""}, 422, "prompt"),
        (COMPLETE, {"prompt": [[]]}, 400, "The prompt is empty"),
        (COMPLETE, {"prompt": [263]}, 400, "token 263"),
        (COMPLETE, {"prompt": [-1]}, 422, "prompt"),
        (COMPLETE, {"prompt": "x", "model": "gpt-4"}, 404, "no model 'gpt-4'"),
    ],
)
def test_what_is_wrong_is_said(live, path, body, status, says):
    refused(live.post(path, **body), status, says)
    assert live.backend.alive


def test_too_long_by_how_much(live):
    prompt = "a" * 2040
    error = refused(live.post(COMPLETE, prompt=prompt, max_tokens=20), 400, "exceeds it by 12")
    assert error["code"] == "context_length_exceeded"
    refused(live.post(COMPLETE, prompt="a" * 2050, max_tokens=None), 400, "exceeds it by 3")


def test_the_length_that_the_model_has_is_the_one_that_is_kept(live):
    """Also for a client that asks for more than this server writes of any reply."""
    length = live.client.get("/v1/models/tiny").json()["max_model_len"]
    assert live.post(COMPLETE, prompt="a" * (length - 1), max_tokens=1).status_code == 200
    refused(live.post(COMPLETE, prompt="a" * length, max_tokens=1), 400, f"context is {length} tokens")
    error = refused(live.post(COMPLETE, prompt="a", max_tokens=length), 400, f"context is {length} tokens")
    assert error["code"] == "context_length_exceeded"


def test_no_json_and_no_route(live):
    for body in (b"{", b"\xff", b"", b'{"a": "\\ud800"}'):
        refused(live.client.post(CHAT, content=body), 400, "The body is no JSON")
    refused(live.client.get("/v1/nothing"), 404, "/v1/nothing")
    refused(live.client.get(CHAT), 405, "Method Not Allowed")


def test_models_health_metrics_description(live):
    (model,) = live.client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 2048)
    assert live.client.get("/v1/models/tiny").json() == model
    refused(live.client.get("/v1/models/other"), 404, "no model")
    assert live.client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    live.chat(max_tokens=3)
    metrics = live.client.get("/metrics").text
    assert 'm1jax_requests_total{route="/v1/chat/completions",status="200"}' in metrics
    assert "m1jax_running 0.0" in metrics
    assert "m1jax_first_token_seconds_bucket" in metrics
    description = live.client.get("/openapi.json").json()
    assert {CHAT, COMPLETE, "/v1/models", "/health", "/metrics"} <= set(description["paths"])
    text = json.dumps(description)
    for name in description["components"]["schemas"]:
        assert f"#/components/schemas/{name}" in text


def slowed(engine):
    """Its step, on a machine that needs a third of a second for each."""
    step = engine.step

    def slow():
        time.sleep(0.3)
        return step()

    return slow


def test_a_client_that_leaves_frees_its_rows(live, monkeypatch):
    monkeypatch.setattr(live.backend._engine, "step", slowed(live.backend._engine))
    for streams in (True, False):
        body = {"messages": USER, "stream": streams, "n": ROWS}
        if streams:
            with live.client.stream("POST", CHAT, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                live.client.post(CHAT, json=body, timeout=0.5)
        assert live.at_rest()
    assert live.chat(max_tokens=3)["choices"]


def test_keys_limits_and_queue(make_engine, tokenizer):
    with running(make_engine, tokenizer, api_key="secret", body=2000, queue=2, seconds=0.5) as live:
        refused(live.client.post(CHAT, json={"messages": USER}, headers={"Authorization": "Bearer no"}), 401, "key")
        refused(httpx.post(live.client.base_url.join(CHAT), json={"messages": USER}), 401, "key")
        assert live.client.get("/health", headers={"Authorization": ""}).status_code == 200
        refused(live.post(COMPLETE, prompt="a" * 3000), 413, "2000")
        refused(live.client.post(COMPLETE, content=(b"a" * 100 for _ in range(100))), 413, "2000")
        response = live.post(CHAT, messages=USER, n=ROWS + 3)
        refused(response, 429, "try again later")
        assert response.headers["retry-after"] == "1"
        live.backend._engine.step = slowed(live.backend._engine)
        cut = live.post(CHAT, messages=USER, n=ROWS + 2)  # beyond its time
        reasons = {choice["finish_reason"] for choice in cut.json()["choices"]}
        assert {"length"} <= reasons <= {"length", "stop"}, reasons  # a quick one may have ended by itself
        assert live.at_rest()


def test_a_step_that_fails_ends_its_requests_and_not_the_server(make_engine, tokenizer):
    with running(make_engine, tokenizer) as live:
        engine = live.backend._engine
        step, fails = engine.step, threading.Event()

        def sick():
            if fails.is_set():
                raise RuntimeError("the device is gone")
            return step()

        engine.step = sick
        with live.client.stream("POST", CHAT, json={"messages": USER, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            fails.set()
            last = [line for line in lines if line][-1]
        assert "The engine failed" in json.loads(last[6:])["error"]["message"]
        assert live.chat(max_tokens=5)["choices"]
        assert live.backend._engine is not engine
        assert "m1jax_failed_steps 1.0" in live.client.get("/metrics").text
        live.backend._engine.step = lambda: 1 / 0
        refused(live.post(CHAT, messages=USER), 500, "The engine failed")
        assert live.at_rest()


def test_a_request_that_the_engine_cannot_take_in_ends_alone(live, monkeypatch):
    class Broken:
        def begin(self):
            raise ValueError("no grammar")

    engine, submit = live.backend._engine, live.backend._engine.submit

    def sick(request):
        return submit(dataclasses.replace(request, constraint=Broken()) if request.samples == 2 else request)

    monkeypatch.setattr(engine, "submit", sick)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = pool.submit(live.chat, max_tokens=200)
        for streams in (True, False):
            body = {"messages": USER, "n": 2, "stream": streams}
            assert refused(live.post(CHAT, **body), 500, "failed to take this in")["type"] == "server_error"
        assert other.result()["choices"]
    assert live.backend._engine is engine
    assert live.at_rest()


@pytest.mark.parametrize("patience", [None, 0.2])
def test_sigterm_ends_what_is_being_written(tmp_path, patience):
    """With little patience, replies are cut."""
    directory = tiny.save(tmp_path / "model")
    code = "from m1jax.serve import server; " + (f"server.DRAIN = {patience}; " if patience else "")
    code += "from m1jax.cli import main; main()"
    arguments = [str(directory), "--port", "0", "--rows", "2", "--max-length", "1024", "--name", "m"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        place = process.stdout.readline().split("http://")[1].split("/")[0]
        body = {"prompt": "hi", "stream": True, "max_tokens": 900 if patience else 100, "temperature": 2, "top_p": 1}
        with httpx.stream("POST", f"http://{place}{COMPLETE}", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert time.monotonic() - start < 30
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{place}/health")
    finally:
        process.kill()
        process.communicate()
