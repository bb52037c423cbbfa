"""JSON over HTTP: requests to one server, or spread over several that are alike.

A request that fails is sent again, to the next address, after a growing, partly random wait, and a
bounded number of times. An error names the status and the type of error that the server gave, but
never repeats its sentences, which might hold the key."""

import asyncio
import html
import logging
import random
import re
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import httpx2

from minizs import UserError, require

for name in ("httpx2", "httpcore2"):
    logging.getLogger(name).setLevel(logging.WARNING)  # below it they write what servers say

RETRIED = (429, 500, 502, 503, 504)  # it may work later; any other refusal is final
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two tries
ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#@\s]*)?")
VERSION = re.compile(r"v\d+([.p]\d+)*((alpha|beta)\d*)?")  # a part of an address: v1, v1beta
METHODS = ("/chat/completions", "/completions")  # OpenAI's, behind the version
MENDS = 4  # times that one request is changed, since a server names one fault at a time
ESCAPED_CODE = re.compile(r"\\(?:u00|x)([0-9a-fA-F]{2})")
PART_OF_KEY = 8  # letters or digits in a row, which no other text has by chance
ERROR_TYPE = re.compile(r"[A-Za-z][A-Za-z_]{2,39}")
# What odd answers raise where they are read.
MISREAD = (AttributeError, LookupError, TypeError, ValueError, RecursionError)
ADVICE = {
    400: "see the server's log for what it does not take",
    401: "check the key",
    403: "check the key",
    404: "check the address and the model's name",
    422: "see the server's log for what it does not take",
    429: "ask it less at a time, or raise --retries",
}
CHECK_SERVER = "check that this server runs, and its address"
UNUSABLE = "it counts as an empty reply"
CHECK_KIND = "check that the address is that of such a service"


class ServiceError(UserError):
    """A server does not answer as it should: which one, what happened, what to do."""

    status = 0  # of its last answer, if there was one
    unusable = False  # whether it did answer, and none of its replies was of use


class Unusable(ValueError):
    """A reply in the right form that is of no use, such as a model's that holds no document. It is
    asked for again, at once; if none is better, this request alone is given up."""


@dataclass(frozen=True)
class Call:
    """One request: a POST of `body(n)`, or a GET where there is no body.

    `read(answer)` gives what is wanted of the JSON that comes back. It raises Unusable, or what odd
    answers raise by themselves (`MISREAD`). `n` is the number of replies so far that were Unusable,
    so that a model can be asked with another seed. `mend(answer)` is told of a refusal: where it
    returns True, it has changed what `body` makes, and that is sent at once."""

    path: str
    read: Callable[[Any], Any]
    body: Callable[[int], dict] | None = None
    mend: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Failure:
    """How a try went wrong."""

    problem: str
    advice: str = CHECK_SERVER
    status: int = 0
    final: bool = False  # another try would end in the same way
    unusable: bool = False


class Client:
    """Sends requests to the servers at `urls`, which have commas between them.

    At most `concurrency` requests are open at a time, and each try may take `timeout` seconds.
    A request that has failed for good is a ServiceError where `on_error` is "stop", or None and a
    warning where it is "empty". Raises UserError for an address that is none."""

    def __init__(
        self,
        urls: str,
        timeout: float = 60.0,
        retries: int = 5,
        headers: dict[str, str] | None = None,
        on_error: str = "stop",
        concurrency: int = 16,
    ) -> None:
        self.bases = [url.strip().rstrip("/") for url in urls.split(",")]
        require(
            all(map(ADDRESS.fullmatch, self.bases)),
            "A server's address is http://HOST:PORT, with no user or query.",
        )
        self.timeout = timeout
        self.retries = retries
        self.on_error = on_error
        self._secrets = " ".join((headers or {}).values())
        try:  # no redirects: the headers, and so the key, would go wherever the server says
            self._http = httpx2.AsyncClient(timeout=None, headers=headers)
        except (ImportError, OSError, ValueError):  # whose words might hold a password
            raise UserError(
                "The environment's proxy or certificates are of no use; mend "
                "HTTPS_PROXY, SSL_CERT_FILE and the like."
            ) from None
        self._room = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        # In a thread of its own: a notebook's loop runs already, and cannot be waited for.
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def reach(self) -> None:
        """Raise ServiceError if no server is there, so that nothing is begun in vain. Warn of each
        address where there is none."""

        async def knock_everywhere() -> list[Failure | None]:
            return await asyncio.gather(*(self._knock(base) for base in self.bases))

        for _ in range(self.retries + 1):
            failures = self._wait(knock_everywhere())
            if not all(failures):
                break
            self._wait(asyncio.sleep(FIRST_WAIT))
        else:
            raise ServiceError(f"{self.bases[0]} {failures[0].problem}; {failures[0].advice}.")
        for base, failure in zip(self.bases, failures, strict=True):
            if failure:
                warnings.warn(f"{base} {failure.problem}; the others are used.", stacklevel=2)

    def get(self, path: str, read: Callable[[Any], Any]) -> Any:
        """`read` of the JSON at this path. Raises ServiceError, whatever `on_error` says."""
        return self._wait(self._ask(Call(path, read)))

    def send(self, calls: Iterable[Call]) -> list:
        """What each call reads, in their order, or None for what has failed (see `on_error`)."""

        async def ask_all() -> list:
            tasks = [asyncio.create_task(self._ask_or_warn(call)) for call in calls]
            try:
                return await asyncio.gather(*tasks)
            finally:  # the first ServiceError ends them all
                for task in tasks:
                    task.cancel()

        return self._wait(ask_all())

    def redact(self, text: str) -> str:
        """A server's words without the key, and none of them if a part of it stands there in some
        other form: encoded as in an address or in JSON, in other case, or with signs between."""
        for secret in self._secrets.split():
            text = text.replace(secret, "(key)")
            letters = letters_and_digits(secret)
            is_key = len(letters) >= PART_OF_KEY  # and not the word "Bearer" before one
            if is_key and share_letters(letters, letters_and_digits(text), PART_OF_KEY):
                return "(withheld, since it holds a part of the key)"
        return text

    def _wait(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _knock(self, base: str) -> Failure | None:
        """Whether a server answers, whatever it says."""
        response = await self._request(base + "/", None)
        return response if isinstance(response, Failure) else None

    async def _ask_or_warn(self, call: Call) -> Any:
        try:
            return await self._ask(call)
        except ServiceError as error:
            if self.on_error == "stop" and not error.unusable:
                raise
            warnings.warn(f"A search has failed: {error}", stacklevel=1)
            return None

    async def _ask(self, call: Call) -> Any:
        """Send a call until an answer can be read. Raises ServiceError after the last try."""
        first = random.randrange(len(self.bases))
        failures = 0
        unusable = 0
        for attempt in range(self.retries + 1):
            wait = min(LONGEST_WAIT, FIRST_WAIT * (2 ** min(failures, 9) - 1))
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            url = method_url(self.bases[(first + attempt) % len(self.bases)], call.path)
            outcome = await self._try(call, url, unusable)
            if not isinstance(outcome, Failure):
                return outcome
            if outcome.final:
                break
            failures += not outcome.unusable
            unusable += outcome.unusable
        tries = f"after {attempt + 1} tries" if attempt else "at the first try"
        error = ServiceError(f"{url} {outcome.problem} ({tries}); {outcome.advice}.")
        error.status = outcome.status
        error.unusable = outcome.unusable
        raise error  # not chained to its cause, whose text might hold the key

    async def _try(self, call: Call, url: str, unusable: int) -> Any:
        """What the call reads of one answer, or a Failure."""
        response = await self._request(url, call.body and call.body(unusable))
        if isinstance(response, Failure):
            return response
        for _ in range(MENDS):
            if response.status_code == 200 or not (call.mend and call.mend(parsed(response))):
                break
            response = await self._request(url, call.body(unusable))
            if isinstance(response, Failure):
                return response
        if response.status_code != 200:
            return self._refusal(response)
        try:
            return call.read(response.json())
        except Unusable as error:
            return Failure(f"answered with nothing to use ({error})", UNUSABLE, unusable=True)
        except MISREAD:
            return Failure("did not answer in the expected form", CHECK_KIND)

    async def _request(self, url: str, body: dict | None) -> httpx2.Response | Failure:
        method = "GET" if body is None else "POST"
        try:
            async with self._room, asyncio.timeout(self.timeout):
                return await self._http.request(method, url, json=body)
        except TimeoutError:
            return Failure(f"did not answer within {self.timeout:g} seconds")
        except (httpx2.HTTPError, httpx2.InvalidURL, ExceptionGroup, ValueError):
            return Failure("cannot be reached, or broke off")

    def _refusal(self, response: httpx2.Response) -> Failure:
        status = response.status_code
        types = error_types(parsed(response), self._secrets)
        problem = f"answered {status}" + (f" {', '.join(types)}" if types else "")
        advice = ADVICE.get(status, CHECK_SERVER)
        return Failure(problem, advice, status, final=status not in RETRIED)


def method_url(base: str, path: str) -> str:
    """Where a method is: its path behind the base, without what the base names already.

    OpenAI's paths begin with a version, /v1. A base that names one itself, as in `/api/paas/v4` or
    `/v1beta/openai`, is followed by the rest, and so is Azure's `/openai/deployments/NAME`. A base
    may also end as the path begins, or be the address of a method."""
    first = path.split("/")[1]
    if first != "v1":
        return base.removesuffix(f"/{first}") + path
    for method in METHODS:
        base = base.removesuffix(method)
    parts = base.split("/")[3:]
    if any(map(VERSION.fullmatch, parts)) or parts[:2] == ["openai", "deployments"]:
        return base + path.removeprefix("/v1")
    return base + path


def parsed(response: httpx2.Response) -> Any:
    """The JSON of a response, or None."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def error_types(answer: Any, secrets: str) -> list[str]:
    """The types of error that a refusal names: plain words, none of which holds part of a key."""
    if not isinstance(answer, dict):
        return []
    inner = answer.get("error")
    types = []
    for place in (inner if isinstance(inner, dict) else {}, answer):
        for name in ("type", "code", "status", "error_type"):
            value = place.get(name)
            if isinstance(value, str) and ERROR_TYPE.fullmatch(value) and value != "error":
                types.append(value)
    return [word for word in dict.fromkeys(types) if not share_letters(word, secrets)]


def letters_and_digits(text: str) -> str:
    """What is left of a text without signs and spaces, and without the escapes of addresses, JSON
    and HTML."""
    text = ESCAPED_CODE.sub(lambda code: chr(int(code[1], 16)), unquote(text))
    return "".join(filter(str.isalnum, html.unescape(text)))


def share_letters(word: str, text: str, length: int = 5) -> bool:
    """Whether a part of the word, this long, or the whole of a shorter one, stands in the text, in
    any case."""
    pieces = (word[i : i + length] for i in range(max(1, len(word) - length + 1)))
    return any(piece.lower() in text.lower() for piece in pieces)
