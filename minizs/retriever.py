"""A retriever's server: BM25 over a corpus, for any number of runs on any machines.

    python -m minizs.retriever --corpus corpus.jsonl --port 8000
    curl localhost:8000/retrieve -d '{"queries": ["Ann born in"], "topk": 3, "return_scores": true}'

It answers the requests of Search-R1 (above) and of ZeroSearch's wiki server (`{"query": ...,
"top_k": ...}`), and at /health whether it runs. It asks for no key: let only your own reach it.
"""

import json
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from minizs.config import UserError, check_ranges, option, parse, require, run_script
from minizs.engines import BM25
from minizs.world import embedded


@dataclass
class RetrieverConfig:
    corpus: str = option("", "A .txt, .jsonl, .json or .parquet file; empty: the tiny world.")
    host: str = option("127.0.0.1", "The address to listen at; 0.0.0.0: all of this machine's.")
    port: int = option(8000, "The port to listen at; 0: any that is free.")
    top_k: int = option(3, "Documents a query where the request does not say.")


def answer(engine: BM25, body: Any) -> Any:
    """The answer to a request, in the shape that goes with the request's. Raises UserError."""
    require(isinstance(body, dict), "The body should be a JSON object.")
    queries = body.get("queries", [body.get("query")])
    n = body.get("topk", body.get("top_k")) or engine.top_k
    strings = isinstance(queries, list) and all(isinstance(query, str) for query in queries)
    require(strings, "Give 'queries', a list of strings, or 'query', a string.")
    require(type(n) is int and n > 0, "'topk' or 'top_k' should be a whole number above 0.")
    found = engine.scored(queries, n) if queries else []
    if "queries" not in body:
        return [{"text": text} for text, _ in found[0]]
    scored = body.get("return_scores")
    return {"result": [[{"document": {"contents": text}, "score": score} if scored else
                        {"contents": text} for text, score in row] for row in found]}  # fmt: skip


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections that may wait at a time; the default of 5 refuses most


def make_server(engine: BM25, host: str, port: int) -> Server:
    """A server that listens already; `serve_forever()` answers. Raises UserError."""

    class Handler(BaseHTTPRequestHandler):
        wbufsize = -1  # head and body leave together
        timeout = 60  # seconds that a connection may be silent

        def do_GET(self) -> None:
            self.reply(200 if self.path == "/health" else 404, {})

        def do_POST(self) -> None:
            try:
                size = int(self.headers.get("Content-Length", 0))
                require(0 < size < 2**24, "Send a JSON body, of less than 16 MB.")
                body = json.loads(self.rfile.read(size))
                require(self.path == "/retrieve", "Only /retrieve answers.")
                self.reply(200, answer(engine, body))
            except (UserError, ValueError) as error:
                self.reply(400, {"error": str(error)})

        def reply(self, status: int, content: Any) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    try:
        return Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"Cannot listen at {host}:{port} ({error}); give another.") from error


def main(argv: list[str] | None = None) -> None:
    config = parse(RetrieverConfig, argv)
    check_ranges(config, "top_k", "port")
    engine = (BM25.of_corpus(config.corpus, config.top_k) if config.corpus
              else BM25(embedded("test").documents, config.top_k))  # fmt: skip
    server = make_server(engine, config.host, config.port)
    print(f"{len(engine.documents)} documents at {server.server_address}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_script(main)
