"""Claim: any model type of lm-eval, another environment or a server scores a checkpoint as the hf backend does."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest
from remelt_evals.evaluator import Evaluator
from remelt_evals.evaluator_process import EvaluatorProcess
from remelt_evals.lm_eval_backend import model_arguments, names_one_model


def request_for(checkpoint: Path, suite: Path) -> EvalRequest:
    return EvalRequest(checkpoint=str(checkpoint), digest=checkpoint.name, suite=str(suite), role="search")


def values(report: EvalReport) -> dict[str, float]:
    return {task.metric: task.value for task in report.tasks}


@pytest.fixture(scope="module")
def by_hf(checkpoints: dict[str, Path], suite_path: Path) -> EvalReport:
    return Evaluator(BackendOptions()).evaluate(request_for(checkpoints["first"], suite_path))


def test_lm_evals_own_hf_type_gives_the_same_numbers(
    checkpoints: dict[str, Path], suite_path: Path, by_hf: EvalReport
) -> None:
    options = BackendOptions(name="lm_eval", model="hf", model_args={"dtype": "float32"})
    report = Evaluator(options).evaluate(request_for(checkpoints["first"], suite_path))
    assert values(report) == pytest.approx(values(by_hf), rel=1e-6)
    assert report.evaluation_id != by_hf.evaluation_id


@pytest.fixture(scope="module")
def second_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of its own, which finds this environment's packages by a path file."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_an_interpreter_of_another_environment_evaluates(
    checkpoints: dict[str, Path], suite_path: Path, by_hf: EvalReport, second_environment: Path
) -> None:
    with EvaluatorProcess(BackendOptions(), interpreter=str(second_environment)) as evaluator:
        evaluator.start()
        assert evaluator.pid is not None
        command = Path(f"/proc/{evaluator.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        report = evaluator.evaluate(request_for(checkpoints["first"], suite_path))
    assert command == str(second_environment)
    assert values(report) == values(by_hf)


def test_an_unknown_type_and_what_cannot_be_loaded_are_named(checkpoints: dict[str, Path], suite_path: Path) -> None:
    request = request_for(checkpoints["first"], suite_path)
    with pytest.raises(EvaluationError, match="cannot provide model type 'vlm'"):
        Evaluator(BackendOptions(name="lm_eval", model="vlm")).evaluate(request)
    options = BackendOptions(name="lm_eval", model="hf", model_args={"pretrained": "/nowhere/at/all"})
    with pytest.raises(EvaluationError, match="cannot be made with"):
        Evaluator(options).evaluate(request)


def test_the_checkpoint_goes_where_the_arguments_say() -> None:
    assert model_arguments({"dtype": "auto"}, "/c") == {"dtype": "auto", "pretrained": "/c"}
    assert model_arguments({"model": "{checkpoint}", "tokenizer": "{checkpoint}/t"}, "/c") == {
        "model": "/c",
        "tokenizer": "/c/t",
    }
    assert names_one_model({"base_url": "http://h", "model": "served"})
    assert not names_one_model({"model": "{checkpoint}"})
    assert not names_one_model({"tensor_parallel_size": 2})
    assert model_arguments({"base_url": "http://h", "model": "served"}, "/c") == {
        "base_url": "http://h",
        "model": "served",
    }


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path]) -> Iterator[str]:
    """A server of OpenAI's completions API over loopback, with the real checkpoint behind it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints["first"], dtype=torch.float32).eval()
    lock = threading.Lock()

    def choice(index: int, tokens: list[int]) -> dict[str, Any]:
        with lock, torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
        chosen = [None] + [float(logprobs[place - 1, token]) for place, token in enumerate(tokens) if place]
        best = [None] + [{str(int(row.argmax())): float(row.max())} for row in logprobs[:-1]]
        # As with `echo`, followed by the one token that was asked for.
        last = {str(int(logprobs[-1].argmax())): float(logprobs[-1].max())}
        return {
            "index": index,
            "text": "",
            "logprobs": {
                "tokens": [str(token) for token in tokens] + [next(iter(last))],
                "token_logprobs": [*chosen, next(iter(last.values()))],
                "top_logprobs": [*best, last],
            },
        }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompts = body["prompt"]
            prompts = prompts if isinstance(prompts[0], list) else [prompts]
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
    thread.join()
    httpd.server_close()


def test_a_server_gives_the_same_numbers(
    checkpoints: dict[str, Path], suite_path: Path, by_hf: EvalReport, server: str
) -> None:
    arguments = {
        "base_url": server,
        "model": "served",
        "tokenizer": "{checkpoint}",
        "tokenizer_backend": "huggingface",
        "max_length": 127,
    }
    options = BackendOptions(name="lm_eval", model="local-completions", model_args=arguments)
    report = Evaluator(options).evaluate(request_for(checkpoints["first"], suite_path))
    assert report.is_ok
    assert values(report)["acc"] == values(by_hf)["acc"]
    assert values(report) == pytest.approx(values(by_hf), rel=1e-3)
