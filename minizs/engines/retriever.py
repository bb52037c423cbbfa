"""A retriever's server: BM25 over a corpus, for any number of runs on any machines.

    python -m minizs.engines.retriever --corpus corpus.jsonl --port 8000
    curl localhost:8000/retrieve -d '{"queries": ["Ann born in"], "topk": 3, "return_scores": true}'

ZeroSearch's form `{"query": ..., "top_k": ...}` is answered, too. Let only your own reach it."""

import json
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from minizs import UserError, require
from minizs.engines.ranking import BM25
from minizs.runs.flags import option, parse, run_script
from minizs.world.facts import embedded


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
    """The answer to a request, in its own shape. Raises what odd requests raise."""
    queries = body["queries"] if "queries" in body else [body["query"]]
    n = body.get("topk", body.get("top_k")) or engine.top_k
    require(isinstance(queries, list) and n > 0, "No list, or no number above 0")
    found = engine.scored(queries, n) if queries else []
    if "queries" not in body:
        return [{"text": t} for t, _ in found[0]]
    return {
        "result": [
            [
                {"document": {"contents": t}, "score": score}
                if body.get("return_scores")
                else {"contents": t}
                for t, score in row
            ]
            for row in found
        ]
    }


def make_server(engine: BM25, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens already; `serve_forever()` answers. Raises UserError."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                status, content = 200, answer(engine, json.loads(body))
            except Exception as error:  # whatever is wrong with the request
                status, content = 400, {"error": f"{error!r}; give 'queries' or 'query'."}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"Cannot listen at {host}:{port} ({error}); give another.") from error
    server.socket.listen(256)  # connections that may wait at a time; the default of 5 refuses most
    return server


def main(argv: list[str] | None = None) -> None:
    config = parse(RetrieverConfig, argv)
    engine = (
        BM25.of_corpus(config.corpus, config.top_k)
        if config.corpus
        else BM25(embedded("test").documents, config.top_k)
    )
    server = make_server(engine, config.host, config.port)
    print(f"{len(engine.documents)} documents at {server.server_address}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_script(main)
