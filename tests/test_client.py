"""JSON over HTTP: spreading, retries, and what goes wrong, against small servers on loopback."""

import json
import logging
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minizs import client
from minizs.client import Client, ServiceError
from minizs.config import UserError

SECRET = "s3cret"
DEAD = "http://127.0.0.1:9"  # nobody listens there


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # connections that may wait


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
            seen.append((self.path, body))
            status, content, *more = answer(self.path, body, self.headers)
            content = content if isinstance(content, bytes | str) else json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            self.send_response(status, reason)
            self.send_header("Content-Length", str(len(content)))
            for name, value in (more[0] if more else {}).items():
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


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits are noted, not slept."""
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    return waits


def failing(times, *failure):
    """Fails so many times, then answers {"x": 1}."""
    left = [failure] * times
    return lambda *_: left.pop() if left else (200, {"x": 1})


def x(answer):
    return answer["x"]


def test_answers_come_in_the_order_of_the_questions():
    """Guards replies that are handed to another request when some are slow."""

    def answer(path, body, headers):
        threading.Event().wait(0.002 * (body["i"] % 3))
        return 200, {"x": body["i"]}

    with serving(answer) as (url, seen):
        asker = Client(url, concurrency=8)
        assert asker.map(lambda i: asker.post("/f", {"i": i}, x), range(40)) == list(range(40))
        assert len(seen) == 40 and seen[0][0] == "/f"


def test_requests_spread_over_all_servers():
    """Guards servers that are paid for and never asked."""
    with serving(lambda *_: (200, {"x": 1})) as one, serving(lambda *_: (200, {"x": 1})) as two:
        asker = Client(f"{one[0]}/, {two[0]}")
        assert asker.map(lambda _: asker.get("/f", x), range(10)) == [1] * 10
        assert len(one[1]) == len(two[1]) == 5


def test_a_dead_server_is_made_up_for_by_the_other():
    """Guards a retry that goes to the server that has just failed."""
    with serving(lambda *_: (200, {"x": 1})) as (url, seen):
        asker = Client([DEAD, url], retries=1)
        assert [asker.get("/f", x) for _ in range(4)] == [1] * 4
        assert len(seen) == 4


@pytest.mark.parametrize("status", client.RETRIED)
def test_failures_that_pass_are_waited_for(status, quick):
    """Guards a run that ends with a server's first hiccup, and retries without a growing wait."""
    with serving(failing(4, status, "busy")) as (url, seen):
        assert Client(url).get("/f", x) == 1
    assert len(seen) == 5
    least = [0.25, 0.5, 1, 2]
    assert all(low <= wait <= 2 * low for wait, low in zip(quick, least, strict=True))


@pytest.mark.parametrize("body", ["", "<html>Bad gateway</html>", b"\xff\xfe", "[]", '{"y": 1}',
                                  "null", '{"x": '])  # fmt: skip
def test_an_answer_of_another_form_is_a_failure(body):
    """Guards KeyErrors and JSON errors that end a run, and wrong answers that pass for right."""
    with serving(failing(2, 200, body)) as (url, seen):
        assert Client(url).get("/f", x) == 1 and len(seen) == 3
    with serving(lambda *_: (200, body)) as (url, seen):
        with pytest.raises(ServiceError, match="expected form"):
            Client(url, retries=1).get("/f", x)
        assert len(seen) == 2


def test_retry_after_is_honoured_within_a_bound(quick):
    """Guards hammering a server that has named its time, and waiting for as long as it likes."""
    for header, wait in (("7", 7), ("9" * 5000, client.LONGEST_WAIT)):
        with serving(failing(1, 429, "", {"Retry-After": header})) as (url, _):
            assert Client(url).get("/f", x) == 1
        assert quick.pop() == wait
    for header in ("soon", "0", "", "Mon, 01 Jan 99999 00:00:00 GMT"):
        with serving(lambda *_, header=header: (429, "", {"Retry-After": header})) as (url, _):
            with pytest.raises(ServiceError, match="answered 429"):  # and nothing else is wrong
                Client(url, retries=1).get("/f", x)
        assert 0 < quick.pop() <= client.FIRST_WAIT


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_refusal_is_final(status):
    """Guards a wrong address or key that is tried for minutes, and a key that follows redirects."""
    with serving(lambda *_: (status, "", {"Location": "/g"})) as (url, seen):
        with pytest.raises(ServiceError, match=f"/f answered {status}"):
            Client(url).get("/f", x)
        assert len(seen) == 1


def test_the_last_failure_is_told():
    """Guards endless retries, and errors that do not say where, what, and what to do."""
    with serving(lambda *_: (503, "")) as (url, seen):
        with pytest.raises(UserError, match=rf"{url}/f answered 503 .*\(try 3\); check that"):
            Client(url, retries=2).get("/f", x)
        assert len(seen) == 3
    with pytest.raises(ServiceError, match=f"{DEAD}/f cannot be reached"):
        Client(DEAD, retries=1).get("/f", x)


def test_a_silent_server_is_given_up():
    """Guards a hang where a server takes a request and never answers."""
    done = threading.Event()
    with serving(lambda *_: (done.wait(5), (200, {"x": 1}))[1]) as (url, _):
        start = time.monotonic()
        with pytest.raises(ServiceError, match="did not answer within 0.1 seconds"):
            Client(url, timeout=0.1, retries=1).get("/f", x)
        assert time.monotonic() - start < 2
        done.set()


def test_a_trickling_server_is_given_up():
    """Guards a hang where each byte comes in time and the last one never does."""

    class Trickle(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                threading.Event().wait(0.03)

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client has left: what is wanted
                self.close_connection = True

        def log_message(self, *_):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Trickle)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    start = time.monotonic()
    with pytest.raises(ServiceError, match="within 0.1 seconds"):
        Client(f"http://127.0.0.1:{server.server_port}", timeout=0.1, retries=1).get("/f", x)
    assert time.monotonic() - start < 2
    server.shutdown()
    server.server_close()


def test_the_first_failure_ends_a_map():
    """Guards minutes of work for a turn that has failed already."""
    with serving(lambda *_: (404, "")) as (url, seen):
        asker = Client(url, concurrency=2)
        with pytest.raises(ServiceError):
            asker.map(lambda i: asker.get("/f", x), range(500))
        assert len(seen) < 100


@pytest.mark.parametrize("status", [200, 401, 503])
def test_keys_stay_secret(status, caplog, capsys):
    """Guards keys in error messages, tracebacks and logs, in whatever way a request fails."""
    caplog.set_level(logging.DEBUG)
    with serving(lambda *_: (status, "no JSON"), f"no {SECRET}") as (url, seen):
        for address in (url, DEAD):
            asker = Client(address, retries=1, headers={"Authorization": f"Bearer {SECRET}"})
            with pytest.raises(ServiceError) as error:
                asker.get("/f", x, {"api_key": SECRET})
            assert SECRET not in str(error.value) and SECRET not in repr(asker)
            assert error.value.__cause__ is error.value.__context__ is None
        assert SECRET in seen[0][0]  # it was sent
    assert SECRET not in caplog.text + "".join(capsys.readouterr())


def test_the_path_may_be_in_the_address():
    """Guards .../v1/v1/models for an address as the servers' manuals give it."""
    with serving(lambda *_: (200, {"x": 1})) as (url, seen):
        Client(url + "/v1").get("/v1/models", x)
        Client(url + "/retrieve/").post("/retrieve", {}, x)
        Client(url + "/behind/v1").get("/v1/models", x)
    assert [path for path, _ in seen] == ["/v1/models", "/retrieve", "/behind/v1/models"]


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://h,",
                                 f"http://h?k={SECRET}", f"http://u:{SECRET}@host"])  # fmt: skip
def test_addresses_that_are_none(url):
    """Guards a mistyped address that is noticed when the first search is made."""
    with pytest.raises(UserError, match="http://HOST:PORT") as error:
        Client(url)
    assert SECRET not in str(error.value)
