"""An endpoint of chat completions on this machine that says what it was told to say."""

import contextlib
import http.server
import json
import threading
import time


class Script:
    """Answers of the server in turn: a text, a status (int), or a function of the request that returns either; the last
    one for ever. What was asked is kept."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.headers = []
        self.lock = threading.Lock()

    def next(self, request, headers):
        with self.lock:
            self.asked.append(request)
            self.headers.append(headers)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer(request) if callable(answer) else answer


def completion(text, finish="stop", tokens=(100, 20)):
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]},
    }


def slow(seconds, text):
    """An answer that comes late."""

    def answer(request):
        time.sleep(seconds)
        return text

    return answer


@contextlib.contextmanager
def endpoint(script):
    """The address of a server that follows a script."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = script.next(request, dict(self.headers))
            status, extra = 200, {}
            if self.path != "/v1/chat/completions":
                status, answer = 404, "no such path"
            elif isinstance(answer, tuple):
                (status, extra), answer = answer, "wait"
            elif isinstance(answer, int):
                status, answer = answer, "scripted"
            body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **extra}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
