"""Pulling: whole files only, each once, from folders and from a server that speaks S3."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from remelt.errors import EvaluationError
from remelt_evals.report_pulling import pull_reports
from remelt_evals.report_reading import read_evaluations, read_trials, with_samples
from study_reports import STUDY_ID, write_study

ALL = date(2026, 1, 1)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_study(folder)
    return folder


@pytest.fixture
def cluster(written: Path, tmp_path: Path) -> Path:
    """Reports that a test may change."""
    return shutil.copytree(written, tmp_path / "cluster" / "reports")


def test_what_was_pulled_is_what_was_there_and_is_not_pulled_twice(cluster: Path, tmp_path: Path) -> None:
    (cluster / "runs" / "notes.txt").write_text("no report")
    first = pull_reports(str(cluster), ALL, tmp_path / "here")
    here = files(tmp_path / "here")
    assert here == {name: content for name, content in files(cluster).items() if name.endswith(".parquet")}
    assert len(first.parts) == len(here) and first.num_present == 0
    again = pull_reports(cluster.as_uri(), ALL, tmp_path / "here")
    assert (len(again.parts), again.num_present) == (0, len(here))


def test_runs_and_trials_come_last(cluster: Path, tmp_path: Path) -> None:
    tables = [part.table for part in pull_reports(str(cluster), ALL, tmp_path / "here").parts]
    assert tables == sorted(tables, key=["samples", "metrics", "runs", "trials"].index)


def test_only_partitions_since_the_date_come_and_the_trials_of_their_studies(cluster: Path, tmp_path: Path) -> None:
    # The study began at 23:30: its trials lie under the first date, most evaluations under the second.
    pulled = pull_reports(str(cluster), date(2026, 11, 21), tmp_path / "here")
    dates = {(part.table, str(part.date)) for part in pulled.parts}
    assert dates == {("trials", "2026-11-20"), *((t, "2026-11-21") for t in ("runs", "metrics", "samples"))}
    evaluations = read_evaluations(tmp_path / "here", study_id=STUDY_ID)
    assert 0 < len(evaluations) < len(read_evaluations(cluster))
    assert len(read_trials(tmp_path / "here", STUDY_ID, evaluations)) == 9
    assert with_samples(tmp_path / "here", evaluations[-1]).tasks[0].samples


def test_trials_that_went_on_are_pulled_again(cluster: Path, tmp_path: Path) -> None:
    pull_reports(str(cluster), ALL, tmp_path / "here")
    (trials,) = cluster.glob("trials/**/*.parquet")
    later = trials.stat().st_mtime + 60
    os.utime(trials, (later, later))
    again = pull_reports(str(cluster), ALL, tmp_path / "here")
    assert [part.table for part in again.parts] == ["trials"]


def test_a_damaged_file_is_left_out_and_named_and_the_others_come(cluster: Path, tmp_path: Path) -> None:
    broken, foreign = sorted(cluster.glob("runs/**/*.parquet"))[:2]
    broken.write_bytes(broken.read_bytes()[:-9])
    foreign.write_bytes(next(cluster.glob("samples/**/*.parquet")).read_bytes())
    pulled = pull_reports(str(cluster), ALL, tmp_path / "here")
    assert len(pulled.damaged) == 2
    assert "does not read as Parquet" in pulled.damaged[0]
    assert "is no file of table runs" in pulled.damaged[1]
    here = files(tmp_path / "here")
    assert str(broken.relative_to(cluster)) not in here
    assert len(here) == len(files(cluster)) - 2
    assert not [name for name in here if Path(name).name.startswith(".")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gopher://somewhere/reports", "cannot be opened"),
        ("{tmp}/nowhere", "there is nothing"),
        ("{tmp}/file", "that is a file"),
        ("{tmp}/empty", "holds no reports"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=message):
        pull_reports(source.format(tmp=tmp_path), ALL, tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.slow
def test_a_bucket_is_read_through_s3(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3_server(cluster.parent, "bucket") as port:
        where = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        pulled = pull_reports(f"s3://bucket/reports?{where}", ALL, tmp_path / "here")
        assert files(tmp_path / "here") == files(cluster)
        assert len(pulled.parts) == len(files(cluster))
        again = pull_reports(f"s3://bucket/reports?{where}", ALL, tmp_path / "here")
        assert (len(again.parts), again.num_present) == (0, len(pulled.parts))
        with pytest.raises(EvaluationError, match="there is nothing"):
            pull_reports(f"s3://bucket/elsewhere?{where}", ALL, tmp_path / "here")


@contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[int]:
    """The few operations of S3 that a reader needs, over a folder: HEAD, GET with ranges, ListObjectsV2."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            if "list-type" in query:
                self._send(200, self._listing(query.get("prefix", [""])[0], query.get("delimiter", [""])[0]))
            else:
                self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            name, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
            path = folder / key
            if name != bucket or (key and not path.is_file()):
                self._send(404, b"" if not with_body else b"<Error><Code>NoSuchKey</Code></Error>")
                return
            if not key:
                self._send(200, b"")
                return
            content, status = path.read_bytes(), 200
            if with_body and (wanted := self.headers.get("Range")):
                low, _, high = wanted.removeprefix("bytes=").partition("-")
                content, status = content[int(low) : int(high or len(content)) + 1], 206
            self._send(status, content, modified=path.stat().st_mtime, with_body=with_body)

        def _listing(self, prefix: str, delimiter: str) -> bytes:
            keys = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            keys = [key for key in keys if key.startswith(prefix)]
            shown, common = [], set()
            for key in keys:
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    common.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    shown.append(key)
            contents = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{(folder / key).stat().st_size}</Size>"
                f"<LastModified>2026-11-21T12:00:00.000Z</LastModified></Contents>"
                for key in shown
            )
            prefixes = "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in common)
            return (
                '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(shown) + len(common)}</KeyCount>"
                f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{contents}{prefixes}</ListBucketResult>"
            ).encode()

        def _send(self, status: int, content: bytes, *, modified: float = 0, with_body: bool = True) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"tag"')
            if modified:
                self.send_header("Last-Modified", formatdate(modified, usegmt=True))
            self.end_headers()
            if with_body and self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
