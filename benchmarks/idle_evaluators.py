"""How long evaluators wait while a study searches: three of them, with evaluation times that differ by four.

    python benchmarks/idle_evaluators.py [--trials 48] [--searchers cmaes gp random]

A real study on a local Ray cluster. Candidates are scored by lm-eval over HTTP, as on an inference server; the server
answers at random and takes one to four times as long, drawn for each candidate from its digest. Idle is what is left of
three evaluators' time between the first trial's start and the last one's ask, when the budget has nothing more to give;
the end of a search, where evaluators run out of work whatever asks for it, is shown apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from measure import REPORTS_DIR, markdown_table, scratch_folder, versions, write_report
from remelt.commit import MANIFEST_FILE
from remelt_evals import zoo
from remelt_jobs.demo import demo_study
from remelt_jobs.journal import read_journal
from remelt_jobs.ray_session import ray_session
from remelt_jobs.study import run_study
from remelt_jobs.study_config import parse_study

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from study_fixtures import write_suite

PACKAGES = ("ray", "lm-eval", "cmaes", "optuna")
TARGET = 0.10
SPREAD = 4.0
REQUESTS = 20
"""Of one evaluation: forty items in batches of four, two choices each."""


class Idle(NamedTuple):
    """One study, looked at afterwards."""

    searcher: str
    num_trials: int
    busy_seconds: float
    """Of all evaluators, while there was something to ask for."""
    window_seconds: float
    tail_seconds: float
    """From the last ask to the last score."""
    shortest: float
    longest: float
    """Seconds of a trial."""
    num_evaluators: int

    @property
    def idle(self) -> float:
        """The part of the evaluators' time that was not a trial's."""
        return 1 - self.busy_seconds / (self.window_seconds * self.num_evaluators)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--evaluators", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the shortest evaluation, at the server")
    parser.add_argument("--searchers", nargs="+", default=["cmaes", "gp", "random"])
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    options = parser.parse_args()
    found = []
    with (
        scratch_folder(options.scratch) as folder,
        slow_server(options.seconds / REQUESTS) as url,
        ray_session(num_cpus=options.evaluators + 1),
    ):
        suite = folder / "suite" / "suite.yaml"
        if not suite.exists():
            write_suite(suite.parent)
        for searcher in options.searchers:
            document = study(searcher, options.trials, options.evaluators, suite, url)
            output = folder / f"{searcher}-{options.trials}-{int(time.time())}"
            run_study(parse_study(document), output)
            found.append(look_back(searcher, output, options.evaluators))
            print(f"{searcher}: idle {found[-1].idle:.1%}", flush=True)
    write_report("idle_evaluators", "Evaluators waiting for work", sections(found), data(found), folder=options.reports)
    return int(any(each.idle > TARGET for each in found))


def study(searcher: str, num_trials: int, num_evaluators: int, suite: Path, url: str) -> dict[str, Any]:
    """The demo's study with other evaluations."""
    arguments = {
        "base_url": url,
        "model": "{checkpoint}",
        "tokenizer": str(zoo.base()),
        "tokenizer_backend": "huggingface",
        "max_length": 127,
    }
    return demo_study(num_trials=num_trials, num_evaluators=num_evaluators) | {
        "suite": str(suite),
        "searcher": searcher,
        "backend": {"name": "lm_eval", "model": "local-completions", "model_args": arguments},
    }


@contextmanager
def slow_server(seconds: float) -> Iterator[str]:
    """A completions API that takes `seconds` to `SPREAD` times as long for a request, the same for one checkpoint."""

    def factor(checkpoint: str) -> float:
        manifest = Path(checkpoint) / MANIFEST_FILE
        name = json.loads(manifest.read_text())["digest"] if manifest.exists() else checkpoint
        return 1 + (SPREAD - 1) * int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32

    def choice(index: int, tokens: list[int]) -> dict[str, Any]:
        scores = [-(hash((token, place)) % 1000) / 100 for place, token in enumerate(tokens)]
        return {
            "index": index,
            "text": "",
            "logprobs": {
                "tokens": [*map(str, tokens), "0"],
                "token_logprobs": [None, *scores[1:], -1.0],
                "top_logprobs": [None, *({str(token): -0.5} for token in tokens[1:]), {"0": -0.5}],
            },
        }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompts = body["prompt"]
            prompts = prompts if isinstance(prompts[0], list) else [prompts]
            time.sleep(seconds * factor(body["model"]))
            answer = json.dumps({"choices": [choice(*each) for each in enumerate(prompts)]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1/completions"
    httpd.shutdown()
    httpd.server_close()


def look_back(searcher: str, output: Path, num_evaluators: int) -> Idle:
    """What the study's journal says of its evaluators."""
    records = read_journal(output)
    asked = [datetime.fromisoformat(record["at"]) for record in records if record["type"] == "asked"]
    trials = [
        (datetime.fromisoformat(record["at"]), timedelta(seconds=record["seconds"]))
        for record in records
        if record["type"] == "finished"
    ]
    begin = min(end - took for end, took in trials)
    last_ask, last_end = asked[-1], max(end for end, _ in trials)
    busy = sum(
        (min(end, last_ask) - max(end - took, begin)).total_seconds() for end, took in trials if end - took < last_ask
    )
    seconds = [took.total_seconds() for _, took in trials]
    return Idle(
        searcher,
        len(trials),
        busy,
        (last_ask - begin).total_seconds(),
        (last_end - last_ask).total_seconds(),
        min(seconds),
        max(seconds),
        num_evaluators,
    )


def sections(found: list[Idle]) -> list[str]:
    rows = [
        [
            each.searcher,
            each.num_trials,
            f"{each.shortest:.1f} to {each.longest:.1f}",
            f"{each.window_seconds:.0f}",
            f"**{each.idle:.1%}**",
            f"{each.tail_seconds:.1f}",
        ]
        for each in found
    ]
    return [
        f"{found[0].num_evaluators} evaluators; wanted: idle less than {TARGET:.0%}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions(sys.executable, PACKAGES).items())
        + ".",
        markdown_table(
            ["searcher", "trials", "seconds of a trial", "seconds of the search", "idle", "seconds after the last ask"],
            rows,
        ),
    ]


def data(found: list[Idle]) -> dict[str, Any]:
    return {"searchers": [each._asdict() | {"idle": each.idle} for each in found]}


if __name__ == "__main__":
    sys.exit(main())
