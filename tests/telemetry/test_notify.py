"""Notifications: each event reaches a real process and a real server, and no failure of theirs matters."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from rebeca_ray.config.load import parse_config
from rebeca_ray.config.telemetry import NotifySettings, ReportSettings
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.telemetry.attempt import Attempt
from rebeca_ray.telemetry.reporting import reported
from rebeca_ray.telemetry.summary import Summary
from tests.telemetry.receiver import receiving

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')"
SECRET = "Bearer 5ec2e7"


def settings_of(**values: object) -> ReportSettings:
    return ReportSettings(notify=NotifySettings(**values))


def attempt_of(folder: Path, settings: ReportSettings) -> Attempt:
    return Attempt(job="generate", settings=settings, out=str(folder / "catalog"), inputs={})


def end(attempt: Attempt, error: BaseException | None = None) -> None:
    """Run an attempt that ends at once."""
    with reported(attempt):
        if error:
            raise error


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("rebeca_ray")]


def test_each_event_reaches_a_process_and_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", SECRET)
    file = tmp_path / "received"
    with receiving() as receiver:
        settings = settings_of(
            command=(sys.executable, "-S", "-c", APPEND, str(file)),
            url=receiver.url,
            authorization="env:HOOK_TOKEN",
            events=("success", "failure", "late", "refused"),
        )
        end(attempt_of(tmp_path, settings))
        with pytest.raises(InputError):
            end(attempt_of(tmp_path, settings), InputError("request r: is empty; give users"))
        with pytest.raises(QualityGateError):
            end(attempt_of(tmp_path, settings), QualityGateError("p-value: 0.4; at most 0.01; train longer"))
        late = attempt_of(tmp_path, settings)
        late.publish_by = late.began_at.replace(year=2026, month=1)
        end(late)
        nothing = attempt_of(tmp_path, settings)
        nothing.changed = False
        end(nothing)
    events = [["success"], ["failure"], ["refused"], ["success", "late"]]
    read = [Summary.model_validate_json(line) for line in file.read_text().splitlines()]
    assert [summary.events for summary in read] == events
    assert [values["events"] for values in receiver.received] == events
    assert [values["text"].partition(",")[0] for values in receiver.received[:3]] == [
        "rebeca generate: published",
        "rebeca generate: failed: request r: is empty; give users",
        "rebeca generate: refused: p-value: 0.4; at most 0.01; train longer",
    ]
    assert {headers["Authorization"] for headers in receiver.headers} == {SECRET}
    assert [values["attempt_id"] for values in receiver.received] == [each.attempt_id for each in read]


def test_only_chosen_events_are_sent(tmp_path: Path) -> None:
    with receiving() as receiver:
        end(attempt_of(tmp_path, settings_of(url=receiver.url)))  # a success, which is not chosen by default
        assert receiver.received == []
        with pytest.raises(ZeroDivisionError):
            end(attempt_of(tmp_path, settings_of(url=receiver.url)), ZeroDivisionError("a bug"))
    assert [values["exit_code"] for values in receiver.received] == [1]


def test_a_night_repeats_no_error_that_its_part_has_sent(tmp_path: Path) -> None:
    with receiving() as receiver:
        settings = settings_of(url=receiver.url)
        night, part = attempt_of(tmp_path, settings), attempt_of(tmp_path, settings)
        night.job = "nightly"
        with pytest.raises(InputError), reported(night):
            end(part, InputError("a: b; c"))
        assert [values["job"] for values in receiver.received] == ["generate"]
        again = attempt_of(tmp_path, settings)
        again.job = "nightly"
        with pytest.raises(InputError):
            end(again, InputError("a: b; c"))
    assert [values["job"] for values in receiver.received] == ["generate", "nightly"]


def hanging_url(url: str, _: Path) -> dict[str, object]:
    return {"url": url}


def failing_command(_: str, folder: Path) -> dict[str, object]:
    return {"command": (sys.executable, "-S", "-c", "raise SystemExit(3)")}


def slow_command(_: str, folder: Path) -> dict[str, object]:
    return {"command": ("sh", "-c", f"sleep 60 & echo $! > {folder}/child; wait")}


@pytest.mark.parametrize(
    ("status", "hangs", "values_of", "reason"),
    [
        (500, False, hanging_url, "url: a report was not delivered (HTTP 500)"),
        (302, False, hanging_url, "url: a report was not delivered (HTTP 302)"),
        (200, True, hanging_url, "url: a report was not delivered (timed out)"),
        (200, False, failing_command, "command: a report was not delivered (ended with exit code 3)"),
        (200, False, slow_command, "command: a report was not delivered (did not end within 0.5 s)"),
    ],
)
def test_a_failing_receiver_is_one_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
    hangs: bool,
    values_of: Callable[[str, Path], dict[str, object]],
    reason: str,
) -> None:
    with receiving(status=status, hangs=hangs) as receiver:
        settings = settings_of(events=("success",), timeout_seconds=0.5, **values_of(receiver.url, tmp_path))
        end(attempt_of(tmp_path, settings))
    assert warnings(caplog) == [f"report.notify.{reason}; the result stands"]
    assert len(receiver.received) == (status != 200)  # a redirect is not followed
    if (child := tmp_path / "child").exists():
        assert not is_running(int(child.read_text()))


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


@pytest.mark.parametrize(
    "address",
    [
        *("http://127.0.0.1:9/hook/5ec2e7", "ftp://host/5ec2e7", "http://[5ec2e7"),
        *("http://user:5ec2e7@127.0.0.1/hook", "http://127.0.0.1:9/5ec2e7 # the hook of the team"),
    ],
)
def test_a_secret_address_is_never_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    monkeypatch.setenv("HOOK_URL", address)
    end(attempt_of(tmp_path, settings_of(url="env:HOOK_URL", events=("success",))))
    assert len(warnings(caplog)) == 1
    assert "5ec2e7" not in caplog.text


def test_an_answer_that_is_no_http_is_not_blamed_on_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"\x15\x03\x01\n")  # as a port that speaks TLS alone

        answering = Thread(target=answer)
        answering.start()
        monkeypatch.setenv("HOOK_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        end(attempt_of(tmp_path, settings_of(url="env:HOOK_URL", events=("success",))))
        answering.join()
    assert "was not delivered (the answer is no HTTP (BadStatusLine))" in caplog.text


def test_the_line_break_of_a_mounted_secret_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOOK_TOKEN", f"{SECRET}\n")
    with receiving() as receiver:
        settings = settings_of(url=receiver.url, authorization="env:HOOK_TOKEN", events=("success",))
        end(attempt_of(tmp_path, settings))
    assert warnings(caplog) == []
    assert [headers["Authorization"] for headers in receiver.headers] == [SECRET]


def test_a_missing_variable_is_a_warning_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HOOK_TOKEN", raising=False)
    with receiving() as receiver:
        settings = settings_of(url=receiver.url, authorization="env:HOOK_TOKEN", events=("success",))
        with reported(attempt_of(tmp_path, settings)):
            assert len(warnings(caplog)) == 1
        assert "report.notify.authorization: HOOK_TOKEN is not set here" in caplog.text
    assert receiver.received == []  # nothing goes out without the header


@pytest.mark.parametrize(
    ("name", "value"), [("authorization", SECRET), ("url", "hooks.example.com"), ("url", "env:a-b")]
)
def test_a_secret_or_a_wrong_address_in_a_config_is_refused(name: str, value: str) -> None:
    with pytest.raises(InputError, match=r"; give (env:name|one such as http://)") as caught:
        parse_config(NotifySettings, {name: value}, where="file")
    assert SECRET not in str(caught.value)


def test_the_payload_is_small(tmp_path: Path) -> None:
    with receiving() as receiver:
        end(attempt_of(tmp_path, settings_of(url=receiver.url, events=("success",))))
    (payload,) = receiver.received
    assert len(json.dumps(payload)) < 2000
    assert "versions" not in payload
