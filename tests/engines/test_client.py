"""JSON over HTTP: spreading, retries, and what goes wrong, against small servers on loopback."""

import json
import logging
import socket
import socketserver
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minizs import UserError
from minizs.engines import client
from minizs.engines.client import Client, ServiceError

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
                status, content, *more = 404, "not found"
            else:
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

    async def note(seconds):
        waits.append(seconds)

    monkeypatch.setattr(client.asyncio, "sleep", note)
    return waits


def failing(times, *failure):
    """Fails so many times, then answers {"x": 1}."""
    left = [failure] * times
    return lambda *_: left.pop() if left else (200, {"x": 1})


def x(answer, asked):
    return answer["x"]


def test_answers_come_in_the_order_of_the_questions():
    """Guards replies that are handed to another request when some are slow."""

    def answer(path, body, headers):
        threading.Event().wait(0.002 * (body["i"] % 3))
        return 200, {"x": body["i"]}

    with serving(answer) as (url, seen):
        asker = Client(url, concurrency=8)
        assert asker.post("/f", [{"i": i} for i in range(40)], x) == list(range(40))
        assert len(seen) == 40 and seen[0][0] == "/f"


def test_requests_spread_over_all_servers():
    """Guards servers that are paid for and never asked."""
    with serving(lambda *_: (200, {"x": 1})) as one, serving(lambda *_: (200, {"x": 1})) as two:
        asker = Client(f"{one[0]}/, {two[0]}")
        assert asker.post("/f", [{}] * 60, x) == [1] * 60
        assert min(len(one[1]), len(two[1])) > 10


def test_a_dead_server_is_made_up_for_by_the_other():
    """Guards a retry that goes to the server that has just failed."""
    with serving(lambda *_: (200, {"x": 1})) as (url, seen):
        asker = Client(f"{DEAD},{url}", retries=1)
        assert [asker.get("/f", x) for _ in range(9)] == [1] * 9
        assert len(seen) == 9


@pytest.mark.parametrize("status", client.RETRIED)
def test_failures_that_pass_are_waited_for(status, quick):
    """Guards a run that ends with a server's first hiccup, and retries without a growing wait."""
    with serving(failing(4, status, "busy")) as (url, seen):
        assert Client(url).get("/f", x) == 1
    assert len(seen) == 5
    least = [0, 0.25, 0.75, 1.75, 3.75]
    assert all(low <= wait <= 2 * low for wait, low in zip(quick, least, strict=True))


@pytest.mark.parametrize(
    "body", ["", "<html>Bad gateway</html>", b"\xff\xfe", "[]", '{"y": 1}', "null", '{"x": ']
)
def test_an_answer_of_another_form_is_a_failure(body):
    """Guards KeyErrors and JSON errors that end a run, and wrong answers that pass for right."""
    with serving(failing(2, 200, body)) as (url, seen):
        assert Client(url).get("/f", x) == 1 and len(seen) == 3
    with serving(lambda *_: (200, body)) as (url, seen):
        with pytest.raises(ServiceError, match="expected form"):
            Client(url, retries=1).get("/f", x)
        assert len(seen) == 2


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


@pytest.mark.parametrize("opening", [b"", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_trickling_server_is_given_up(opening):
    """Guards a hang where each byte, of the head or the body, comes in time and the last never."""

    class Trickle(socketserver.BaseRequestHandler):
        def handle(self):
            with suppress(OSError):  # the client has left: what is wanted
                self.request.sendall(opening)
                for byte in b"HTTP/1.1 " * 50:
                    self.request.sendall(bytes([byte]))
                    threading.Event().wait(0.03)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Trickle)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    start = time.monotonic()
    with pytest.raises(ServiceError, match="within 0.1 seconds"):
        Client(f"http://127.0.0.1:{server.server_address[1]}", 0.1, retries=1).get("/f", x)
    assert time.monotonic() - start < 2
    server.shutdown()
    server.server_close()


def test_the_first_failure_ends_them_all():
    """Guards minutes of work for a turn that has failed already."""
    with serving(lambda *_: (404, "")) as (url, seen):
        asker = Client(url, concurrency=2)
        with pytest.raises(ServiceError):
            asker.post("/f", [{}] * 500, x)
        assert len(seen) < 100


@pytest.mark.parametrize("status", [200, 401, 503])
def test_keys_stay_secret(status, caplog, capsys):
    """Guards keys in error messages, tracebacks and logs, in whatever way a request fails."""
    caplog.set_level(logging.DEBUG)
    sent = []

    def answer(path, body, headers):
        sent.append(headers["Authorization"])
        return status, f"no JSON, {SECRET}", {"X-Key": SECRET}

    with serving(answer, f"no {SECRET}") as (url, _):
        for address in (url, DEAD):
            asker = Client(address, retries=1, headers={"Authorization": f"Bearer {SECRET}"})
            with pytest.raises(ServiceError) as error:
                asker.post("/f", [{}], x)
            assert SECRET not in str(error.value) and SECRET not in repr(asker)
            assert error.value.__cause__ is error.value.__context__ is None
        assert {*sent} == {f"Bearer {SECRET}"}
    assert SECRET not in caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "status, body",
    [(200, f"no JSON, {SECRET}"), (200, {"y": SECRET}), (302, ""), (401, SECRET), (503, SECRET)],
)
def test_keys_in_an_address_stay_secret(status, body, caplog, capsys):
    """Guards the same where a service takes its key in the query alone, and a key that is sent
    wherever a redirect points; retries of it, and failures that are passed over."""
    caplog.set_level(logging.DEBUG)
    key, texts = {"engine": "g", "api_key": SECRET}, []
    with serving(lambda *_: (500, ""), f"no {SECRET}") as (other, elsewhere):
        with serving(lambda *_: (status, body, {"Location": f"{other}/g"})) as (url, seen):
            for address in (url, DEAD):
                asker = Client(address, retries=1, query=key)
                with pytest.raises(ServiceError, match=f"{address}/f ") as error:
                    asker.post("/f", [{"q": "a"}], x)
                assert error.value.__cause__ is error.value.__context__ is None
                passing = Client(address, retries=1, query=key, on_error="empty")
                with pytest.warns(UserWarning, match="A search has failed") as warned:
                    assert passing.post("/f", [{"q": "a"}], x) == [None]
                texts += [str(error.value), repr(asker), *(str(w.message) for w in warned)]
    assert [*seen] == [(f"/f?engine=g&api_key={SECRET}&q=a", None)] * len(seen)
    assert len(seen) == (2 if status in (302, 401) else 4) and not elsewhere
    assert SECRET not in "".join([*texts, caplog.text, *capsys.readouterr()])


def test_the_path_may_be_in_the_address():
    """Guards .../v1/v1/models for an address as the servers' manuals give it."""
    with serving(lambda *_: (200, {"x": 1})) as (url, seen):
        Client(url + "/v1").get("/v1/models", x)
        Client(url + "/retrieve/").post("/retrieve", [{}], x)
        Client(url + "/behind/v1").get("/v1/models", x)
    assert [path for path, _ in seen] == ["/v1/models", "/retrieve", "/behind/v1/models"]


def test_failures_may_be_passed_over():
    """Guards one bad query that empties the others."""

    def answer(path, body, headers):
        return (422, "") if body["i"] % 3 == 0 else (200, {"x": body["i"]})

    with serving(answer) as (url, seen):
        asker = Client(url, on_error="empty")
        with pytest.warns(UserWarning, match=f"A search has failed: {url}/f answered 422"):
            found = asker.post("/f", [{"i": i} for i in range(30)], x)
    assert found == [None if i % 3 == 0 else i for i in range(30)] and len(seen) == 30
    with serving(lambda *_: (503, "")) as (url, seen):
        asker = Client(url, retries=2, on_error="empty")
        with pytest.warns(UserWarning, match="answered 503"):
            assert asker.post("/f", [{}] * 40, x) == [None] * 40
        with pytest.raises(ServiceError):  # without which nothing could begin
            asker.get("/f", x)
    assert len(seen) == 3 * 41


@pytest.mark.parametrize(
    "url",
    [
        "http://h:x",
        "http://127.0.0.1:-1",
        "http://256.256.256.256",
        "http://a..b:1",
        "http://[::1]:9",
        "http://127.0.0.1:99999/v1",
    ],
)
def test_addresses_of_nothing(url):
    """Guards tracebacks of the library for addresses that it cannot read or find."""
    with pytest.raises(ServiceError, match="cannot be reached"):
        Client(url, retries=0).get("/f", x)


@pytest.mark.parametrize(
    "name, value",
    [
        ("HTTP_PROXY", f"ftp://u:{SECRET}@h"),
        ("ALL_PROXY", f"socks5://u:{SECRET}@h:1"),
        ("SSL_CERT_FILE", "/nowhere"),
    ],
)
def test_an_environment_of_no_use(name, value, monkeypatch):
    """Guards a traceback for a proxy that cannot be used, and its password."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="HTTPS_PROXY, SSL_CERT_FILE") as error:
        Client(DEAD)
    assert SECRET not in str(error.value) and error.value.__suppress_context__


def test_keys_that_cannot_be_sent():
    """Guards a traceback for a key with a stray letter."""
    for key in ("Bearer s3cr\u00e9t", "a\nb"):
        with pytest.raises(UserError) as error:
            Client(DEAD, retries=0, headers={"Authorization": key}).get("/f", x)
        assert key not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://h,",
        f"http://h?k={SECRET}",
        f"http://u:{SECRET}@host",
    ],
)
def test_addresses_that_are_none(url):
    """Guards a mistyped address that is noticed when the first search is made."""
    with pytest.raises(UserError, match="http://HOST:PORT") as error:
        Client(url)
    assert SECRET not in str(error.value)
