"""JSON over HTTP to one server or several alike: served simulators and remote engines ask by it.

A request that fails is sent again, to the next address, after a growing, partly random wait, and a
bounded number of times. Nothing hangs: a try takes at most twice `timeout` (until the answer begins
and until it ends), a wait at most `LONGEST_WAIT`. Messages hold the address alone: keys travel in
headers and queries.
"""

import itertools
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import responses
from typing import Any

import requests
from urllib3.exceptions import HTTPError, TimeoutError

from minizs.config import UserError, require

logging.getLogger("urllib3").setLevel(logging.INFO)  # at DEBUG it writes queries, keys included
RETRIED = (429, 500, 502, 503, 504)  # it may work later; any other refusal is final
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
Read = Callable[[Any], Any]  # takes what is wanted out of an answer; raises if it is not there


class ServiceError(UserError):
    """A server does not answer as it should: which one, what happened, what to do."""


class Client:
    """Asks `urls` (in a string, commas between) by turns; `timeout` in seconds; `concurrency`: most
    requests at a time in `map`. Raises UserError for an address that is none."""

    def __init__(self, urls: str | Sequence[str], *, timeout: float = 60.0, retries: int = 5,
                 concurrency: int = 16, headers: dict[str, str] | None = None) -> None:  # fmt: skip
        urls = urls.split(",") if isinstance(urls, str) else urls
        self.urls = [url.strip().rstrip("/") for url in urls]
        for url in self.urls:  # one with a user or a query might not be shown
            good = re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url)
            require(bool(good), "A server's address is http://HOST:PORT, with no user or query.")
        self.timeout, self.retries, self.headers = timeout, retries, headers
        self._turns, self._threads = itertools.count(), threading.local()
        self._pool = ThreadPoolExecutor(concurrency)

    def post(self, path: str, payload: dict, read: Read) -> Any:
        """`read` of the answer to this JSON body. Raises ServiceError."""
        return self._ask("POST", path, read, json=payload)

    def get(self, path: str, read: Read, params: dict | None = None) -> Any:
        """`read` of the answer to this query. Raises ServiceError."""
        return self._ask("GET", path, read, params=params)

    def map(self, function: Callable[[Any], Any], items: Iterable) -> list:
        """`function` of each item, in their order; the first failure ends it all."""
        return list(self._pool.map(function, items))

    def _ask(self, method: str, path: str, read: Read, **content: Any) -> Any:
        if not hasattr(self._threads, "session"):
            self._threads.session = requests.Session()
        # No redirects: the headers, and so the key, would go wherever the server says.
        send = partial(self._threads.session.request, method, headers=self.headers, stream=True,
                       timeout=self.timeout, allow_redirects=False, **content)  # fmt: skip
        first, problem = next(self._turns), ""
        for attempt in range(self.retries + 1):
            base = self.urls[(first + attempt) % len(self.urls)]
            # Many give an address with its first step, as in http://host:8000/v1: that is as good.
            url = base.removesuffix("/" + path.split("/")[1]) + path
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
            try:
                with send(url) as response:
                    body = b"".join(_pieces(response.raw, time.monotonic() + self.timeout))
                if response.status_code == 200:
                    return read(json.loads(body))
                # Not in the server's own words, which might repeat the key.
                problem = f"answered {response.status_code} ({responses.get(response.status_code)})"
                if response.status_code not in RETRIED:
                    break
                after = response.headers.get("Retry-After", "")  # seconds; dates are left out
                wait = min(LONGEST_WAIT, float(after if after.isdecimal() else 0)) or wait
            except (requests.Timeout, TimeoutError):
                problem = f"did not answer within {self.timeout:g} seconds"
            except (requests.RequestException, HTTPError):
                problem = "cannot be reached, or broke off"
            except (AttributeError, LookupError, TypeError, ValueError):
                problem = "did not answer in the expected form"
            except ServiceError as error:  # raised by `read`: what is there instead
                problem = str(error)
            if attempt < self.retries:
                time.sleep(wait)
        # Not chained to its cause, whose text would hold the whole query, a key included.
        raise ServiceError(f"{url} {problem} (try {attempt + 1}); check that this server runs, its "
                           "address, and the key and the model's name if any.")  # fmt: skip


def _pieces(stream, end: float) -> Iterator[bytes]:
    while piece := stream.read1(decode_content=True):
        yield piece
        if time.monotonic() > end:  # the timeout of `requests` is one read's, of many
            raise requests.Timeout
