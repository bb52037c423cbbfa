"""A retriever's server: BM25 over a corpus, for any number of runs on any machines.

    python -m minizs.engines.retriever --corpus corpus.jsonl --port 8000
    curl localhost:8000/retrieve -d '{"queries": ["Ann born in"], "topk": 3, "return_scores": true}'

It speaks Search-R1's protocol, as above, and ZeroSearch's, `{"query": ..., "top_k": ...}`. It asks
nobody for a key: let only your own machines reach it."""

import json
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from minizs import UserError, require
from minizs.engines.bm25 import BM25
from minizs.runs.flags import option, parse, run_script
from minizs.world.facts import embedded

BACKLOG = 256  # connections that may wait at a time; the default of 5 refuses most


@dataclass
class RetrieverConfig:
    """A retriever's server: BM25 over a corpus, for any number of runs on any machines."""

    corpus: str = option(
        "",
        "The documents: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, which can be "
        "compressed (.gz). By default those of the tiny world.",
        metavar="FILE",
    )
    host: str = option(
        "127.0.0.1", "The address to listen at. 0.0.0.0 is all addresses of this machine."
    )
    port: int = option(8000, "The port to listen at. 0 is any that is free.", min=0, max=65535)
    top_k: int = option(
        3, "The number of documents for a query where the request does not say.", min=1
    )


def answer(engine: BM25, body: dict) -> dict | list:
    """The answer to a request, in the protocol it came in. Raises what odd requests raise."""
    n = body.get("topk", body.get("top_k")) or engine.top_k
    require(n > 0, "The number of documents is not above 0")
    if "queries" not in body:
        [ranking] = engine.scored([body["query"]], n)
        return [{"text": text} for text, _ in ranking]
    queries = body["queries"]
    require(isinstance(queries, list), "'queries' is no list")
    rankings = engine.scored(queries, n) if queries else []
    row = scored_row if body.get("return_scores") else plain_row
    return {"result": [[row(*pair) for pair in ranking] for ranking in rankings]}


def scored_row(text: str, score: float) -> dict:
    return {"document": {"contents": text}, "score": score}


def plain_row(text: str, score: float) -> dict:
    return {"contents": text}


def make_server(engine: BM25, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens already; its `serve_forever()` answers. Raises UserError."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = int(self.headers["Content-Length"] or 0)
                content = answer(engine, json.loads(self.rfile.read(length)))
                status = 200
            except Exception as error:  # whatever is wrong with the request
                content = {"error": f"{error!r}; give 'queries' or 'query'."}
                status = 400
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"Cannot listen at {host}:{port} ({error}); give another.") from error
    server.socket.listen(BACKLOG)
    return server


def main(argv: list[str] | None = None) -> None:
    config = parse(RetrieverConfig, argv)
    if config.corpus:
        engine = BM25.of_corpus(config.corpus, config.top_k)
    else:
        engine = BM25(embedded("test").documents, config.top_k)
    server = make_server(engine, config.host, config.port)
    print(f"{len(engine.documents)} documents at {server.server_address}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_script(main)
