"""Servers on loopback that stand in for real services."""

import json
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from minizs.generate import generate

SECRET = "s3cret"
DEAD = "http://127.0.0.1:9"  # nobody listens there


class Server(ThreadingHTTPServer):
    """Closed, it answers no more, not even where a connection is open still."""

    request_queue_size = 64  # connections that may wait

    def get_request(self):
        self.opened = [*getattr(self, "opened", ()), super().get_request()]
        return self.opened[-1]

    def server_close(self):
        super().server_close()
        for connection, _ in getattr(self, "opened", ()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(answer, reason=None):
    """A server on loopback: `answer(path, body, headers)` gives (status, content[, headers]).

    Yields its address and the list of the requests' (path, body). Content that is no text or bytes
    is sent as JSON.
    """
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.loads(body) if body else None
            if self.path == "/":  # is anyone there? Real servers say something like this
                status, content, *headers = 404, "not found"
            else:
                seen.append((self.path, body))
                status, content, *headers = answer(self.path, body, self.headers)
            content = content if isinstance(content, bytes | str) else json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            self.send_response(status, reason)
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_):
            """Quiet."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def openai(model, tokenizer, seen, names=("the-simulator", "another")):
    """An OpenAI-compatible server around `model`, for `serving`. It lists these models."""

    def answer(path, body, headers):
        seen.append((path, body))
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in names]}
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        [reply] = generate(
            model,
            tokenizer([text])["input_ids"],
            body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
            vocab_size=len(tokenizer),
            eos_id=tokenizer.eos_token_id,
        )
        text = tokenizer.decode(reply.ids, skip_special_tokens=True)
        message = {"message": {"role": "assistant", "content": text}}
        choice = message if "messages" in body else {"text": text}
        choice["finish_reason"] = "length" if reply.reason == "length" else "stop"
        return 200, {"choices": [{"index": 0, **choice}]}

    return answer
