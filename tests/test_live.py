"""The live page of a run: only who knows its address gets it, it is fresh, it costs little, and it only reads."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import guard
import pages
import pytest
import tiny

from mlxtune.errors import UserError
from mlxtune.report import surveyed
from mlxtune.report.live import server as serving
from mlxtune.report.live.fresh import REST_TIMES, Fresh, Made, traces
from mlxtune.report.live.server import Server
from mlxtune.report.live.view import View
from mlxtune.train import events, lock
from mlxtune.train.events import Following

TOKEN = "abcdefghijklmnopqrstuv"
PAGE = Made(b"<p>page</p>", '"1"')


@contextlib.contextmanager
def served(page: Any = lambda: PAGE, say: Any = print) -> Iterator[Server]:
    with Server(0, TOKEN, page, "default-src 'none'", say) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server: Server, method: str = "GET", path: str = f"/{TOKEN}/", **headers: str) -> tuple[int, bytes, Any]:
    """(status, body, headers) of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    given = {"Host": f"127.0.0.1:{server.server_port}"} | {
        name.replace("_", "-"): text for name, text in headers.items()
    }
    connection.putrequest(method, path, skip_host=True)
    for name, text in given.items():
        connection.putheader(name, text)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def raw(server: Server, text: bytes) -> bytes:
    """What is answered to bytes that need not be a request."""
    with socket.create_connection(("127.0.0.1", server.server_port), 10) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_the_page_is_given_to_who_knows_its_address_by_get_and_head() -> None:
    with served() as server:
        assert server.address == f"http://127.0.0.1:{server.server_port}/{TOKEN}/"
        status, body, headers = asked(server)
        assert (status, body, headers["Content-Type"]) == (200, PAGE.body, "text/html; charset=utf-8")
        assert asked(server, Host=f"localhost:{server.server_port}")[0] == 200
        status, body, headers = asked(server, "HEAD")
        assert (status, body, headers["Content-Length"]) == (200, b"", str(len(PAGE.body)))
        assert asked(server, If_None_Match=PAGE.tag)[:2] == (304, b"")
        assert asked(server, If_None_Match='"2"')[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_what_would_change_something_is_refused(method: str) -> None:
    with served() as server:
        status, body, headers = asked(server, method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert PAGE.body not in body


@pytest.mark.parametrize("path", ["/", f"/{TOKEN}", f"/{TOKEN[:-1]}w/", f"/{TOKEN}/x", f"/{TOKEN}/?", "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_a_missing_or_a_wrong_token_is_refused(method: str, path: str) -> None:
    with served() as server:
        status, body, _ = asked(server, method, path)
        assert status == 403 and PAGE.body not in body


@pytest.mark.parametrize(
    "host", ["evil.example:{}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{}.evil.example", "", "[::1]:{}"]
)
def test_another_host_name_is_refused_even_with_the_token(host: str) -> None:
    with served() as server:
        assert asked(server, Host=host.format(server.server_port))[0] == 403


def test_two_host_names_and_none_are_refused() -> None:
    with served() as server:
        host = f"Host: 127.0.0.1:{server.server_port}\r\n"
        for hosts in ("", host + "Host: evil.example\r\n", host + host):
            answer = raw(server, f"GET /{TOKEN}/ HTTP/1.1\r\n{hosts}\r\n".encode())
            assert answer.startswith(b"HTTP/1.0 403 ") and PAGE.body not in answer


@pytest.mark.parametrize("status", [200, 304, 403, 405])
def test_every_answer_forbids_what_a_page_of_others_could_do_with_it(status: int) -> None:
    ways: dict[int, Any] = {200: {}, 304: {"If_None_Match": PAGE.tag}, 403: {"path": "/"}, 405: {"method": "POST"}}
    with served() as server:
        found, _, headers = asked(server, **ways[status])
        assert found == status
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["X-Frame-Options"] == "DENY" and headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers and "Python" not in headers["Server"]


NO_REQUESTS = (b"", b"\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"FROB / HTTP/1.1\r\n\r\n", b"A" * 70_000)


@pytest.mark.parametrize("text", NO_REQUESTS)
def test_what_is_no_request_gets_nothing_of_the_page_and_prints_nothing(text: bytes, capfd: Any) -> None:
    with served() as server:
        assert PAGE.body not in raw(server, text)
        assert asked(server)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_page_that_cannot_be_made_just_now_is_said_to_be_none() -> None:
    faults, said = [OSError("gone"), ZeroDivisionError("a fault"), ZeroDivisionError("a fault")], list[str]()
    with served(Mock(side_effect=faults), said.append) as server:
        given = [asked(server)[:2] for _ in faults]
    assert given == [(503, b"the page cannot be made just now\n")] * 3
    assert said == ["the page cannot be made (ZeroDivisionError: a fault)"]


def test_a_reader_who_goes_away_and_one_who_says_nothing_disturb_nobody(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(serving._Request, "timeout", 0.1)
    large = Made(b"x" * 30_000_000, '"2"')
    with served(lambda: large) as server:
        place = ("127.0.0.1", server.server_port)
        with socket.create_connection(place, 10) as silent, socket.create_connection(place, 10) as leaving:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.sendall(f"GET /{TOKEN}/ HTTP/1.0\r\nHost: 127.0.0.1:{place[1]}\r\n\r\n".encode())
            leaving.recv(1000)
            leaving.close()
            assert silent.recv(1000) == b""  # closed
            assert len(asked(server)[1]) == len(large.body)
    assert capfd.readouterr() == ("", "")


def test_no_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any) -> str:
        raise AssertionError("a name is looked up")

    monkeypatch.setattr(socket, "getfqdn", look_up)
    with served() as server:
        assert asked(server)[0] == 200


def test_it_listens_on_this_machine_alone_and_refuses_a_port_that_is_taken() -> None:
    with served() as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=f"port {server.server_port} of 127.0.0.1 cannot be had"):
            Server(server.server_port, TOKEN, lambda: PAGE, "", print)


def test_a_token_is_128_random_bits() -> None:
    tokens = {serving.new_token() for _ in range(100)}
    assert len(tokens) == 100 and {len(token) for token in tokens} == {22}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_page_is_made_again_only_when_something_changed_and_after_a_rest() -> None:
    clock, seen, made = Clock(), [0], []

    def make() -> str:
        clock.now += 2.0
        made.append(seen[0])
        return f"page {seen[0]}"

    fresh = Fresh(lambda: seen[0], make, clock)
    first = fresh.page()
    assert (first.body, made) == (b"page 0", [0])
    clock.now += 100
    assert fresh.page() == first and made == [0]
    clock.now -= 100
    seen[0] = 9
    assert fresh.page().body == b"page 9"  # after the first there is no rest
    clock.now += 100
    made.clear()
    seen[0] = 1
    second = fresh.page()
    assert (second.body, made) == (b"page 1", [1]) and second.tag != first.tag
    seen[0] = 2
    clock.now += 2.0 * REST_TIMES - 0.1
    assert fresh.page() == second
    clock.now += 0.2
    assert fresh.page().body == b"page 2"


def test_only_new_bytes_of_the_events_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pages.write(tmp_path / "run", pages.told(50))
    following = Following(run)
    assert following.history().events == events.read(run)
    parsed: list[bytes] = []
    real = events._whole_event
    monkeypatch.setattr(events, "_whole_event", lambda line: (parsed.append(line), real(line))[1])
    with (run / "events.jsonl").open("a") as file:
        file.write('{"kind": "begin", "step": 40, "steps": 60}\n{"kind": "train", "step": 41, "lo')
        file.flush()
        first = following.history()
        assert (first.events[-1]["kind"], first.taken_back, len(parsed)) == ("begin", [(40, 50)], 2)
        file.write('ss": 0.5}\nno event\n')
    last = following.history()
    assert last.events[-1] == {"kind": "train", "step": 41, "loss": 0.5}
    assert last.events == Following(run).history().events and len(last.damaged) == 1
    assert len(parsed) < 10 + 70


def test_a_file_that_was_replaced_or_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    run = pages.write(tmp_path / "run", pages.told(50))
    following = Following(run)
    assert len(following.history().events) > 50
    (run / "events.jsonl").write_text('{"kind": "begin", "step": 0, "steps": 3}\n')
    assert [event["kind"] for event in following.history().events] == ["begin"]
    shutil.move(run / "events.jsonl", run / "before")
    pages.append(run, *pages.told(5))
    assert following.history().events == events.read(run)


def viewed(run: Path, *others: Path) -> View:
    return View(run, others, TOKEN)


def test_a_run_is_followed_from_before_its_beginning_to_after_its_folder_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    view = viewed(run)
    fresh = Fresh(view.look, view.page, lambda: 0.0)
    assert b"has not begun yet" in fresh.page().body and not view.has_begun()
    pages.write(run, [pages.begun(20)])
    with lock.locked(run / ".lock"):
        assert b"not begun" not in fresh.page().body
        before = fresh.page()
        pages.append(run, pages.event(7, 0.123456))
        assert fresh.page() != before
        assert b'"state":"running"' in fresh.page().body
    assert b'"state":"killed"' in fresh.page().body  # the lock alone changed
    pages.append(run, {"kind": "end", "step": 7, "state": "finished"})
    assert b'"state":"finished"' in fresh.page().body
    shutil.rmtree(run)
    body = fresh.page().body
    assert b"is not there any more: this is what was last read" in body and b'"state":"finished"' in body


def test_a_folder_that_is_no_run_and_cannot_become_one_is_refused(tmp_path: Path) -> None:
    viewed(tmp_path / "new").require_runs()
    with pytest.raises(UserError, match="is not a run of mlxtune"):
        viewed(tmp_path / "new", tmp_path / "none").require_runs()
    (tmp_path / "thesis.tex").write_text("theirs")
    with pytest.raises(UserError, match="is not a run of mlxtune"):
        viewed(tmp_path).require_runs()


def test_looking_changes_nothing_and_whoever_looks_keeps_no_run_from_starting(tmp_path: Path) -> None:
    run = pages.write(tmp_path / "run", pages.told(5))
    with lock.locked(run / ".lock"):
        pass
    view, before = viewed(run), guard.picture(tmp_path)
    view.look()
    view.page()
    assert guard.picture(tmp_path) == before
    # `look` asks for the lock for a moment: a run that begins in that moment waits for it.
    began = threading.Event()

    def look() -> None:
        with lock._opened(run / ".lock", 0) as file:
            lock._taken(file.fileno(), lock.fcntl.LOCK_SH)
            began.set()
            time.sleep(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    began.wait()
    with lock.locked(run / ".lock") as held:
        assert held
    thread.join()


def test_runs_that_it_is_compared_with_are_followed_too(tmp_path: Path) -> None:
    run, other = (pages.write(tmp_path / name, pages.told(5)) for name in ("run", "other"))
    view = viewed(run, other)
    view.require_runs()
    fresh = Fresh(view.look, view.page, lambda: 0.0)
    before = fresh.page()
    assert b"2 runs compared" in before.body
    pages.append(other, pages.event(6))
    assert fresh.page() != before
    shutil.rmtree(other)
    assert b"other: The folder of the run is not there any more" in fresh.page().body


def test_one_page_for_which_much_was_read_keeps_the_next_from_nobody() -> None:
    clock, took, seen = Clock(), [0.1, 9.0, 0.1], [0]

    def make() -> str:
        clock.now += took[seen[0]]
        return str(seen[0])

    fresh = Fresh(lambda: seen[0], make, clock)
    for number in range(3):
        seen[0] = number
        assert fresh.page().body == str(number).encode()
        clock.now += 0.1 * REST_TIMES + 0.01


def test_steps_do_not_wait_until_the_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pages.write(tmp_path / "run", pages.told(5))
    is_read = threading.Event()
    real = surveyed.of_run
    monkeypatch.setattr(surveyed, "of_run", lambda folder: (is_read.wait(20), real(folder))[1])
    view = viewed(run)
    fresh = Fresh(view.look, view.page, lambda: 0.0)
    assert b'id="curves"' in fresh.page().body and b'id="data"' not in fresh.page().body
    is_read.set()
    until = time.monotonic() + 20
    while b'id="data"' not in fresh.page().body:
        assert time.monotonic() < until


def test_changes_of_files_folders_and_what_is_gone_are_noticed(tmp_path: Path) -> None:
    run = pages.write(tmp_path / "run", pages.told(5))
    seen = [traces({run: 1})]
    assert traces({run: 1}) == seen[0]
    for change in (
        lambda: pages.append(run, pages.event(6)),
        lambda: (run / "export").mkdir(),
        lambda: (run / "export" / "verification.json").write_text("{}"),
        lambda: (run / "export" / "verification.json").write_text("{ }"),
        lambda: shutil.rmtree(run),
    ):
        change()
        seen.append(traces({run: 1}))
    assert len(set(seen)) == len(seen)


def test_an_export_and_an_evaluation_that_are_made_beside_a_run_are_noticed(tmp_path: Path) -> None:
    run = pages.write(tmp_path / "runs" / "run", pages.told(5))
    view = viewed(run)
    seen = [view.look()]
    assert view.look() == seen[0]
    (tmp_path / "runs" / "fused").mkdir()
    seen.append(view.look())
    (tmp_path / "runs" / "fused" / "verification.json").write_text("{}")
    seen.append(view.look())
    (tmp_path / "evals" / "first").mkdir(parents=True)
    seen.append(view.look())
    (tmp_path / "evals" / "first" / "summary.json").write_text("{}")
    seen.append(view.look())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_the_address_and_ends_on_a_signal_the_run_untouched(tmp_path: Path, number: int) -> None:
    run = pages.write(tmp_path / "run", pages.told(5))
    before = guard.picture(tmp_path)
    with tiny.started("report", run, "--live") as process:
        assert process.stdout
        address = process.stdout.readline().strip()
        _, _, place, token, _ = address.split("/")
        host, _, port = place.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("GET", f"/{token}/")
        answer = connection.getresponse()
        assert (answer.status, b"<h1>Run run</h1>" in answer.read()) == (200, True)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)]
        assert said.splitlines()[-1] == "stopped" and "Traceback" not in said
    assert guard.picture(tmp_path) == before
