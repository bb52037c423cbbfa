"""JSON over HTTP: spreading, retries, and what goes wrong, against small servers on loopback."""

import logging
import socketserver
import threading
import time
from contextlib import suppress

import pytest
from servers import DEAD, SECRET, serving

from minizs import UserError
from minizs.engines import client
from minizs.engines.client import Call, Client, ServiceError, Unusable, method_url

KEY = {"Authorization": f"Bearer {SECRET}"}


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between tries, in seconds: they are noted, not slept."""
    waits = []

    async def note(seconds):
        waits.append(seconds)

    monkeypatch.setattr(client.asyncio, "sleep", note)
    return waits


def failing(times, *failure):
    """Fails so many times, then answers {"x": 1}."""
    failures = [failure] * times
    return lambda *_: failures.pop() if failures else (200, {"x": 1})


def x(answer):
    return answer["x"]


def calls(bodies, path="/f", read=x):
    return [Call(path, read, lambda _, body=body: body) for body in bodies]


def test_answers_come_in_the_order_of_the_questions():
    """Each call gets the answer to its own body, however long the server takes for each."""

    def answer(path, body, headers):
        threading.Event().wait(0.002 * (body["i"] % 3))
        return 200, {"x": body["i"]}

    with serving(answer) as (url, seen):
        sender = Client(url, concurrency=8)
        assert sender.send(calls({"i": i} for i in range(40))) == list(range(40))
        assert len(seen) == 40 and seen[0][0] == "/f"


def test_requests_spread_over_all_servers():
    """Of two servers, each gets a good part of 60 requests."""
    with serving(lambda *_: (200, {"x": 1})) as one, serving(lambda *_: (200, {"x": 1})) as two:
        sender = Client(f"{one[0]}/, {two[0]}")
        assert sender.send(calls([{}] * 60)) == [1] * 60
        assert min(len(one[1]), len(two[1])) > 10


def test_a_dead_server_is_made_up_for_by_the_other():
    """A retry goes to the next address, not to the server that has just failed."""
    with serving(lambda *_: (200, {"x": 1})) as (url, seen):
        sender = Client(f"{DEAD},{url}", retries=1)
        assert [sender.get("/f", x) for _ in range(9)] == [1] * 9
        assert len(seen) == 9


def test_one_of_two_dead_addresses_is_mentioned():
    """At the start each address is tried: a dead one is named, and all dead ones are an error."""
    with serving(lambda *_: (200, {"x": 1})) as (url, _):
        with pytest.warns(UserWarning, match=f"{DEAD} cannot be reached.*the others are used"):
            Client(f"{url},{DEAD}").reach()
        Client(f"{url},{url}").reach()  # warns of nothing
    with pytest.raises(ServiceError, match=f"{DEAD} cannot be reached"):
        Client(f"{DEAD},{DEAD}", retries=1).reach()


@pytest.mark.parametrize("status", client.RETRIED)
def test_failures_that_pass_are_waited_for(status, waits):
    """A busy server is asked again, after waits that double."""
    with serving(failing(4, status, "busy")) as (url, seen):
        assert Client(url).get("/f", x) == 1
    assert len(seen) == 5
    least = [0, 0.25, 0.75, 1.75, 3.75]
    assert all(low <= wait <= 2 * low for wait, low in zip(waits, least, strict=True))


@pytest.mark.parametrize(
    "body", ["", "<html>Bad gateway</html>", b"\xff\xfe", "[]", '{"y": 1}', "null", '{"x": ']
)
def test_an_answer_of_another_form_is_a_failure(body):
    """What cannot be read is asked for again, and is a ServiceError in the end."""
    with serving(failing(2, 200, body)) as (url, seen):
        assert Client(url).get("/f", x) == 1 and len(seen) == 3
    with serving(lambda *_: (200, body)) as (url, seen):
        with pytest.raises(ServiceError, match="expected form"):
            Client(url, retries=1).get("/f", x)
        assert len(seen) == 2


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_refusal_is_final(status):
    """A wrong address or key is not tried for minutes, and no redirect is followed with the key."""
    with serving(lambda *_: (status, "", {"Location": "/g"})) as (url, seen):
        with pytest.raises(ServiceError, match=f"/f answered {status}") as error:
            Client(url).get("/f", x)
        assert len(seen) == 1 and error.value.status == status


def test_the_last_failure_is_told():
    """An error says which address, what happened, after how many tries, and what to check."""
    with serving(lambda *_: (503, "")) as (url, seen):
        with pytest.raises(
            UserError, match=rf"{url}/f answered 503 \(after 3 tries\); check that this server runs"
        ):
            Client(url, retries=2).get("/f", x)
        assert len(seen) == 3
    with pytest.raises(ServiceError, match=f"{DEAD}/f cannot be reached"):
        Client(DEAD, retries=1).get("/f", x)


@pytest.mark.parametrize(
    "status, error, cause",
    [
        (401, {"type": "invalid_request_error", "code": "invalid_api_key"}, "invalid_api_key"),
        (404, {"type": "NotFoundError", "message": "no such model"}, "NotFoundError"),
        (400, {"code": 400, "status": "INVALID_ARGUMENT"}, "INVALID_ARGUMENT"),
    ],
)
def test_the_servers_cause_is_named(status, error, cause):
    """Status and type of error stand in the message; the server's sentence does not."""
    with serving(lambda *_: (status, {"error": error})) as (url, _):
        with pytest.raises(
            ServiceError, match=rf"answered {status} .*{cause}.*\(at the"
        ) as failure:
            Client(url).get("/f", x)
    assert "no such model" not in str(failure.value)


@pytest.mark.parametrize(
    "kind", [SECRET, "sk_live_abcdef", "sk_live_abcdef_is_wrong", "e_abcdef", "a b", "x" * 60, 7]
)
def test_a_type_of_error_cannot_repeat_the_key(kind):
    """A word that is the key, or holds part of it, is no type of error."""
    headers = {"Authorization": "Bearer sk_live_abcdef"}
    with serving(lambda *_: (400, {"error": {"type": kind}, "object": "error"})) as (url, _):
        with pytest.raises(ServiceError, match=r"/f answered 400 \(at the first try\)"):
            Client(url, headers=headers).get("/f", x)


def test_a_silent_server_is_given_up():
    """A server that takes a request and never answers costs `timeout` seconds a try."""
    finished = threading.Event()
    with serving(lambda *_: (finished.wait(5), (200, {"x": 1}))[1]) as (url, _):
        start = time.monotonic()
        with pytest.raises(ServiceError, match="did not answer within 0.1 seconds"):
            Client(url, timeout=0.1, retries=1).get("/f", x)
        assert time.monotonic() - start < 2
        finished.set()


@pytest.mark.parametrize("opening", [b"", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_trickling_server_is_given_up(opening):
    """So does one whose bytes, of the head or the body, come one by one and never end."""

    class Trickle(socketserver.BaseRequestHandler):
        def handle(self):
            with suppress(OSError):  # the client has left, as it should
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
    """Where failures stop a run, the other requests of a turn are not waited for."""
    with serving(lambda *_: (404, "")) as (url, seen):
        with pytest.raises(ServiceError):
            Client(url, concurrency=2).send(calls([{}] * 500))
        assert len(seen) < 100


# ---- replies of no use --------------------------------------------------------------------------


def only_even(answer):
    if answer["x"] % 2:
        raise Unusable("it is odd")
    return answer["x"]


def test_a_reply_of_no_use_is_asked_for_again_at_once(waits):
    """`body` is told how many replies were of no use, and a server that works is not spared."""
    with serving(lambda path, body, headers: (200, {"x": body["n"]})) as (url, seen):
        call = Call("/f", only_even, lambda unusable: {"n": 1 + unusable})
        assert Client(url).send([call]) == [2]
    assert [body["n"] for _, body in seen] == [1, 2] and waits == [0, 0]


def test_a_request_without_a_useful_reply_is_given_up_alone():
    """It is None and a warning, even where failures stop a run; the others are answered."""
    with serving(lambda path, body, headers: (200, {"x": body["n"]})) as (url, seen):
        with pytest.warns(UserWarning, match="nothing to use .it is odd. .after 3 tries"):
            results = Client(url, retries=2).send(calls([{"n": 2}, {"n": 3}], read=only_even))
    assert results == [2, None] and len(seen) == 4


def test_a_failure_of_the_server_does_not_change_what_is_asked():
    """The number that `body` gets counts replies of no use alone: a resumed run asks the same."""
    failures = [(503, ""), (200, "")]
    answer = lambda path, body, headers: failures.pop() if failures else (200, {"x": body["n"]})  # noqa: E731
    with serving(answer) as (url, seen):
        call = Call("/f", x, lambda unusable: {"n": unusable})
        assert Client(url).send([call]) == [0] and len(seen) == 3


def test_a_refusal_can_be_mended():
    """Where `mend` says so, the changed body is sent at once, though no retry is left."""
    names = ["old"]

    def mend(answer):
        names[0] = answer["use"]
        return True

    def answer(path, body, headers):
        return (200, {"x": 1}) if "new" in body else (400, {"use": "new"})

    with serving(answer) as (url, seen):
        call = Call("/f", x, lambda _: {names[0]: 5}, mend)
        assert Client(url, retries=0).send([call]) == [1]
    assert [body for _, body in seen] == [{"old": 5}, {"new": 5}]


# ---- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 401, 503])
def test_keys_stay_secret(status, caplog, capsys):
    """No error, traceback or log holds the key, in whatever way a request fails."""
    caplog.set_level(logging.DEBUG)
    sent = []

    def answer(path, body, headers):
        sent.append(headers["Authorization"])
        return status, f"no JSON, {SECRET}", {"X-Key": SECRET}

    with serving(answer, f"no {SECRET}") as (url, _):
        for address in (url, DEAD):
            sender = Client(address, retries=1, headers=KEY)
            with pytest.raises(ServiceError) as error:
                sender.send(calls([{}]))
            assert SECRET not in str(error.value) and SECRET not in repr(sender)
            assert error.value.__cause__ is error.value.__context__ is None
            passing = Client(address, retries=1, headers=KEY, on_error="empty")
            with pytest.warns(UserWarning, match="A search has failed") as warned:
                assert passing.send(calls([{}])) == [None]
            assert not any(SECRET in str(warning.message) for warning in warned)
        assert {*sent} == {f"Bearer {SECRET}"}
    assert SECRET not in caplog.text + "".join(capsys.readouterr())


def test_keys_are_not_sent_elsewhere():
    """A redirect is not followed: the key would go wherever the server says."""
    with serving(lambda *_: (200, {"x": 1})) as (other, elsewhere):
        with serving(lambda *_: (302, "", {"Location": f"{other}/g"})) as (url, _):
            with pytest.raises(ServiceError, match="answered 302"):
                Client(url, headers=KEY).get("/f", x)
    assert not elsewhere


def test_keys_that_cannot_be_sent():
    """A key with a stray letter is one sentence, which does not repeat it."""
    for key in ("Bearer s3cr\u00e9t", "a\nb"):
        with pytest.raises(UserError) as error:
            Client(DEAD, retries=0, headers={"Authorization": key}).get("/f", x)
        assert key not in str(error.value)


# ---- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, path, url",
    [
        ("http://h:1", "/v1/models", "http://h:1/v1/models"),
        ("http://h/v1", "/v1/chat/completions", "http://h/v1/chat/completions"),
        ("http://h/behind/v1", "/v1/models", "http://h/behind/v1/models"),
        ("http://h/behind", "/v1/models", "http://h/behind/v1/models"),
        ("https://h/api/paas/v4", "/v1/chat/completions", "https://h/api/paas/v4/chat/completions"),
        ("https://h/api/v3", "/v1/completions", "https://h/api/v3/completions"),
        ("https://h/v1beta/openai", "/v1/models", "https://h/v1beta/openai/models"),
        ("https://v2.h/openai", "/v1/models", "https://v2.h/openai/v1/models"),
        ("https://h/v1.1", "/v1/models", "https://h/v1.1/models"),
        ("https://h/v1/chat/completions", "/v1/models", "https://h/v1/models"),
        ("https://h/api/v3/completions", "/v1/completions", "https://h/api/v3/completions"),
        (
            "https://h/openai/deployments/gpt",
            "/v1/chat/completions",
            "https://h/openai/deployments/gpt/chat/completions",
        ),
        ("http://h/retrieve", "/retrieve", "http://h/retrieve"),
        ("http://h/api/v3", "/retrieve", "http://h/api/v3/retrieve"),
    ],
)
def test_where_a_method_is(base, path, url):
    """A base that names a version itself is followed by the method's path alone."""
    assert method_url(base, path) == url


def test_the_path_may_be_in_the_address():
    """The same on the wire, with a slash at the end as manuals have it."""
    with serving(lambda *_: (200, {"x": 1})) as (url, seen):
        Client(url + "/v1").get("/v1/models", x)
        Client(url + "/retrieve/").send(calls([{}], "/retrieve"))
        Client(url + "/api/paas/v4/").get("/v1/models", x)
    assert [path for path, _ in seen] == ["/v1/models", "/retrieve", "/api/paas/v4/models"]


def test_failures_may_be_passed_over():
    """With `on_error="empty"`, a bad request is None and does not empty the others."""

    def answer(path, body, headers):
        return (422, "") if body["i"] % 3 == 0 else (200, {"x": body["i"]})

    with serving(answer) as (url, seen):
        sender = Client(url, on_error="empty")
        with pytest.warns(UserWarning, match=f"A search has failed: {url}/f answered 422"):
            results = sender.send(calls({"i": i} for i in range(30)))
    assert results == [None if i % 3 == 0 else i for i in range(30)] and len(seen) == 30
    with serving(lambda *_: (503, "")) as (url, seen):
        sender = Client(url, retries=2, on_error="empty")
        with pytest.warns(UserWarning, match="answered 503"):
            assert sender.send(calls([{}] * 40)) == [None] * 40
        with pytest.raises(ServiceError):  # without which nothing could begin
            sender.get("/f", x)
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
    """An address that the library cannot read or find is a ServiceError, not a traceback."""
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
    """A proxy that cannot be used is one sentence, without its password."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="HTTPS_PROXY, SSL_CERT_FILE") as error:
        Client(DEAD)
    assert SECRET not in str(error.value) and error.value.__suppress_context__


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
    """A mistyped address is refused at once, not when the first search is made."""
    with pytest.raises(UserError, match="http://HOST:PORT") as error:
        Client(url)
    assert SECRET not in str(error.value)
