"""JSON over HTTP to one server or several alike: served simulators and remote engines ask by it.

A request that fails is sent again, to the next address, after a growing, partly random wait, and a
bounded number of times. Nothing hangs: a try ends after `timeout`, however its bytes drip, and a
wait after `LONGEST_WAIT`. Messages hold the address alone: keys travel in headers.
"""

import asyncio
import itertools
import logging
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from http.client import responses
from typing import Any

import httpx2

from minizs.config import UserError, require

for name in ("httpx2", "httpcore2"):
    logging.getLogger(name).setLevel(logging.WARNING)  # below it they write what servers say
RETRIED = (429, 500, 502, 503, 504)  # it may work later; any other refusal is final
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
Read = Callable[[Any, dict | None], Any]  # (answer, what was posted) -> what is wanted, or raises


class ServiceError(UserError):
    """A server does not answer as it should: which one, what happened, what to do."""


@cache
def shared() -> tuple[asyncio.AbstractEventLoop, httpx2.AsyncClient]:
    """What sends all requests, and the loop that it runs in: a thread of its own, since a
    notebook's is taken already. Raises UserError."""
    try:  # no redirects: the headers, and so the key, would go wherever the server says
        http = httpx2.AsyncClient(timeout=None)
    except (ImportError, OSError, ValueError):  # whose words might hold a password
        raise UserError("The proxy or the certificates that the environment names are of no use; "
                        "mend HTTPS_PROXY, SSL_CERT_FILE and the like.") from None  # fmt: skip
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop, http


class Client:
    """Asks `urls` (commas between) by turns. `timeout`: seconds of a try; `concurrency`: most
    requests at a time; `on_error`: what has failed for good is a ServiceError ("stop"), or None and
    a warning ("empty"). Raises UserError for an address that is none."""

    def __init__(self, urls: str, timeout: float = 60.0, retries: int = 5,
                 headers: dict[str, str] | None = None, on_error: str = "stop",
                 concurrency: int = 16) -> None:  # fmt: skip
        self.urls = [url.strip().rstrip("/") for url in urls.split(",")]
        for url in self.urls:  # one with a user or a query might not be shown
            good = re.fullmatch(r"https?://[^/?#@\s]+?(:\d+)?(/[^?#@\s]*)?", url)
            require(bool(good) and 0 < int((good[1] or ":80")[1:]) < 65536,
                    "A server's address is http://HOST:PORT, with no user or query.")  # fmt: skip
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.headers, self.on_error, self._turns = headers, on_error, itertools.count()
        self._lost = 0  # requests that failed for good since one was answered
        self._loop, self._http = shared()

    def get(self, path: str, read: Read) -> Any:
        """`read(answer, None)`. Raises ServiceError."""
        return asyncio.run_coroutine_threadsafe(self._ask(path, read), self._loop).result()

    def post(self, path: str, payloads: Iterable[dict], read: Read) -> list:
        """`read(answer, payload)` for each of these JSON bodies, in their order; see `on_error`."""
        posts = self._post(path, payloads, read)
        return asyncio.run_coroutine_threadsafe(posts, self._loop).result()

    async def _post(self, path: str, payloads: Iterable[dict], read: Read) -> list:
        room = asyncio.Semaphore(self.concurrency)

        async def one(payload: dict) -> Any:
            async with room:
                try:
                    return await self._ask(path, read, payload)
                except ServiceError as error:
                    if self.on_error == "stop":
                        raise
                    warnings.warn(f"A search has failed: {error}", stacklevel=1)

        tasks = [asyncio.create_task(one(payload)) for payload in payloads]
        try:
            return await asyncio.gather(*tasks)
        finally:  # the first failure ends it all
            for task in tasks:
                task.cancel()

    async def _ask(self, path: str, read: Read, payload: dict | None = None) -> Any:
        first = next(self._turns)
        send = partial(self._http.request, "GET" if payload is None else "POST", json=payload,
                       headers=self.headers)  # fmt: skip
        # Where all that went out together is lost, patience with the rest would take hours.
        tries = self.retries + 1 if self._lost < self.concurrency else 1
        for attempt in range(tries):
            base = self.urls[(first + attempt) % len(self.urls)]
            # Many give an address with its first step, as in http://host:8000/v1: that is as good.
            url = base.removesuffix("/" + path.split("/")[1]) + path
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
            try:
                async with asyncio.timeout(self.timeout):
                    response = await send(url)
                status = response.status_code
                if status == 200:
                    found = read(response.json(), payload)
                    self._lost = 0
                    return found
                # Not in the server's own words, which might repeat the key.
                problem = f"answered {status} ({responses.get(status)})"
                if status not in RETRIED:
                    break
                after = response.headers.get("Retry-After", "")  # seconds; dates are left out
                wait = min(LONGEST_WAIT, float(after if after.isdecimal() else 0)) or wait
            except TimeoutError:
                problem = f"did not answer within {self.timeout:g} seconds"
            except (httpx2.HTTPError, httpx2.InvalidURL, ExceptionGroup):
                problem = "cannot be reached, or broke off"
            except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
                problem = "did not answer in the expected form"
            if attempt + 1 < tries:
                await asyncio.sleep(wait)
        self._lost += 1
        # Not chained to its cause, whose text might hold the key.
        raise ServiceError(f"{url} {problem} (try {attempt + 1}); check that this server runs, its "
                           "address, and the key and the model's name if any.")  # fmt: skip
