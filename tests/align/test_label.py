"""The labelling page without a browser: what is asked, what is kept, who is answered."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from align.collect.label.server import build_app, serve
from align.collect.label.session import (
    REPEAT_SHARE,
    LabelPair,
    Session,
    StaleAnswer,
    leave_out_unreadable,
    list_label_pairs,
    lock_folder,
)
from align.pairs.choices import CHOICES, Choice, read_choices, standing_choices
from align.pairs.read import read_preferences
from backbone.io import local_server
from backbone.io.console import UserError
from backbone.io.files import write_json
from tests.align.conftest import PROMPTS, picture
from tests.browser import serve_page

TOKEN, PORT = "secret-token", 4711


def folder_of(tmp_path: Path, prompts: int = 4, per_prompt: int = 2) -> Path:
    """A folder as `align sample` leaves it."""
    folder = tmp_path / "pairs"
    (folder / "pictures").mkdir(parents=True)
    for i in range(prompts):
        for j in range(per_prompt):
            picture(10 * i + j).save(folder / f"pictures/p{i:05d}-s{j:02d}.png")
    texts = [PROMPTS[i % 4] + " " * 0 + (f" {i}" if i >= 4 else "") for i in range(prompts)]
    entries = [{"prompt": text, "category": ""} for text in texts]
    write_json(folder / "samples.json", {"format": 1, "per_prompt": per_prompt, "prompts": entries})
    return folder


def asked(folder: Path, *, seed: int = 0) -> list[LabelPair]:
    from align.pairs.samples import read_samples

    prompts, pictures = read_samples(folder)
    return list_label_pairs([prompt.text for prompt in prompts], pictures, seed=seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path)


@pytest.fixture
def session(folder: Path) -> Session:
    return Session(folder, asked(folder))


@pytest.fixture
def client(session: Session) -> TestClient:
    return client_of(session)


def client_of(session: Session) -> TestClient:
    app = build_app(session, token=TOKEN, port=PORT)
    return TestClient(
        app, base_url=f"http://127.0.0.1:{PORT}", headers={"Origin": f"http://127.0.0.1:{PORT}"}
    )


def state(client: TestClient) -> dict[str, Any]:
    return dict(client.get(f"/{TOKEN}/state").json())


def choose(client: TestClient, verdict: str, number: int | None = None) -> Any:
    number = state(client)["number"] if number is None else number
    return client.post(f"/{TOKEN}/choose", json={"number": number, "verdict": verdict})


# What is asked ----------------------------------------------------------------------------------------------


def test_a_folder_is_labelled_where_files_cannot_be_locked_and_by_one_person_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    with (
        lock_folder(tmp_path),
        pytest.raises(UserError, match="being labelled by another"),
        lock_folder(tmp_path),
    ):
        pass
    assert (tmp_path / ".labelling").stat().st_mode & 0o777 == 0o666 & ~_umask()

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_folder(tmp_path):
        pass


def test_a_folder_in_which_no_choice_could_be_kept_is_refused_before_the_page_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / CHOICES
    kept.touch()  # another person's
    for place in (kept, tmp_path):
        monkeypatch.setattr(os, "access", lambda path, mode, place=place: path != place)
        with pytest.raises(UserError, match=f"{place} is read-only"), lock_folder(tmp_path):
            pass
        kept.unlink(missing_ok=True)


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_every_pair_of_a_prompt_is_asked_once_and_disjoint_ones_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, prompts=3, per_prompt=4)
    pairs = asked(folder)
    assert len(pairs) == 3 * 6
    assert len({pair.name for pair in pairs}) == 18
    first_round = pairs[:6]
    files = [file for pair in first_round for file in (pair.first, pair.second)]
    assert len(files) == len(set(files))
    assert Counter(pair.prompt for pair in first_round) == dict.fromkeys(PROMPTS[:3], 2)
    assert asked(folder) == pairs
    assert asked(folder, seed=1) != pairs


def test_sides_are_random(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, prompts=40)
    session = Session(folder, asked(folder))
    turned = 0
    while (question := session.question) is not None:
        turned += question.left == question.pair.second
        session.answer(question.number, "left")
    assert 10 < turned < 34


def test_about_one_question_in_ten_is_an_earlier_one_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, prompts=150)
    session = Session(folder, asked(folder))
    last_seen: dict[str, int] = {}
    while (question := session.question) is not None:
        if question.repeat:
            assert len(session.choices) - last_seen[question.pair.name] > 5
        last_seen[question.pair.name] = len(session.choices)
        session.answer(question.number, "left")
    repeats = sum(choice.repeat for choice in session.choices)
    assert 0.5 * REPEAT_SHARE < repeats / len(session.choices) < 2 * REPEAT_SHARE
    assert session.answered == 150
    assert session.agreement[1] == repeats
    assert len(read_preferences(folder).pairs) == 150


def test_each_person_is_asked_everything(folder: Path) -> None:
    for user in ("ann", "bob"):
        session = Session(folder, asked(folder), user=user)
        assert session.answered == 0
        while (question := session.question) is not None:
            session.answer(question.number, "left" if user == "ann" else "right")
        assert Session(folder, asked(folder), user=user).answered == 4
    assert len(read_preferences(folder).pairs) == 8
    for user in ("ann", "bob"):
        own = read_preferences(folder, user=user).pairs
        assert len(own) == 4 and {pair.user for pair in own} == {user}


def test_what_cannot_be_shown_is_named_and_not_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from align.pairs.samples import read_samples

    (folder / "pictures/p00001-s00.png").write_bytes(b"")
    prompts, pictures = read_samples(folder)
    shown = leave_out_unreadable(folder, pictures)
    assert "p00001-s00.png is empty (0 bytes), so it is not asked about." in capsys.readouterr().err
    pairs = list_label_pairs([prompt.text for prompt in prompts], shown)
    assert len(pairs) == 3 and "p00001" not in "".join(pair.name for pair in pairs)
    for path in folder.glob("pictures/*-s00.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no two usable pictures"):
        leave_out_unreadable(folder, pictures)


def test_a_pair_whose_picture_is_gone_can_be_skipped(client: TestClient, folder: Path) -> None:
    assert client.get(f"/{TOKEN}/picture/0/left").status_code == 200
    for path in folder.glob("pictures/*.png"):
        path.unlink()
    assert client.get(f"/{TOKEN}/picture/0/left").status_code == 404
    assert choose(client, "skip").status_code == 200
    assert state(client)["answered"] == 1


# What is kept -----------------------------------------------------------------------------------------------


def test_each_choice_is_on_the_disk_when_it_is_answered(folder: Path, client: TestClient) -> None:
    for number, verdict in enumerate(("left", "right", "tie", "both_bad")):
        assert choose(client, verdict).status_code == 200
        lines = read_choices(folder / CHOICES)
        assert len(lines) == number + 1
    assert [line.verdict for line in lines if isinstance(line, Choice)] == [
        "left",
        "right",
        "tie",
        "both_bad",
    ]
    assert state(client)["done"] is True


def test_undo_asks_the_same_pair_again_with_the_same_sides(session: Session) -> None:
    first = session.question
    assert first is not None
    session.answer(first.number, "left")
    session.undo(session.next_number)
    again = session.question
    assert again is not None
    assert (again.pair, again.left, again.right) == (first.pair, first.left, first.right)
    session.answer(again.number, "right")
    assert [choice.verdict for choice in standing_choices(read_choices(session.path))] == ["right"]


def test_a_new_process_goes_on_where_the_old_one_was_killed(folder: Path, client: TestClient) -> None:
    choose(client, "left")
    choose(client, "right")
    before = state(client)
    with (folder / CHOICES).open("ab") as file:
        file.write(b'{"number": 2, "pair": "cut o')  # as a kill in the middle of a write leaves it
    again = client_of(Session(folder, asked(folder)))
    assert state(again) == before
    assert choose(again, "tie").status_code == 200
    assert [c.verdict for c in standing_choices(read_choices(folder / CHOICES))] == ["left", "right", "tie"]


def test_a_second_window_cannot_answer_a_question_that_is_gone(client: TestClient, folder: Path) -> None:
    old = state(client)["number"]
    choose(client, "left", old)
    late = choose(client, "right", old)
    assert late.status_code == 409
    assert late.json()["number"] == state(client)["number"]
    assert len(read_choices(folder / CHOICES)) == 1


def test_an_undo_makes_the_other_window_s_answer_stale(session: Session) -> None:
    session.answer(session.next_number, "left")
    shown = session.next_number
    session.undo(shown)
    with pytest.raises(StaleAnswer):
        session.answer(shown, "left")


def test_nothing_is_undone_before_anything_is_chosen(client: TestClient) -> None:
    assert client.post(f"/{TOKEN}/undo", json={"number": 0}).status_code == 409


def test_what_is_done_says_how_far_one_agrees_with_oneself(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, prompts=40)
    session = Session(folder, asked(folder))
    client = client_of(session)
    while (question := session.question) is not None:
        better = "left" if question.left < question.right else "right"  # always the same picture
        session.answer(question.number, better)
    agreement = state(client)["agreement"]
    assert agreement["repeats"] > 0
    assert agreement["value"] == 1.0


def test_one_folder_is_labelled_by_one_process(folder: Path) -> None:
    with lock_folder(folder), pytest.raises(UserError, match="another `align`"), lock_folder(folder):
        pass
    with lock_folder(folder):
        pass


# Blindness --------------------------------------------------------------------------------------------------


def test_nothing_sent_names_a_file_or_tells_a_repeat(client: TestClient) -> None:
    sent = client.get(f"/{TOKEN}/state")
    assert set(sent.json()) == {"number", "prompt", "done", "answered", "total", "can_undo", "agreement"}
    shown = client.get(f"/{TOKEN}/picture/0/left")
    assert shown.headers["content-type"] == "image/png"
    for answer in (sent, shown):
        assert "p0000" not in answer.text[:2000] + str(answer.headers)


def test_the_picture_of_each_side_is_the_one_that_is_written_down(client: TestClient, folder: Path) -> None:
    left = client.get(f"/{TOKEN}/picture/0/left").content
    choose(client, "left")
    (choice,) = standing_choices(read_choices(folder / CHOICES))
    assert (folder / choice.left).read_bytes() == left
    assert choice.preferred == choice.left


# Who is answered --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["/", "/state", "/wrong/", "/wrong/state", "/wrong/picture/0/left", f"/{TOKEN}x/"]
)
def test_without_the_token_there_is_nothing(client: TestClient, address: str) -> None:
    assert client.get(address).status_code == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:4711", "127.0.0.1", "127.0.0.1:80", "localhost.evil:4711"]
)
def test_a_foreign_host_header_is_refused(client: TestClient, host: str) -> None:
    answer = client.get(f"/{TOKEN}/state", headers={"Host": host})
    assert answer.status_code == 421
    assert "prompt" not in answer.text


def test_localhost_is_a_name_of_ours(client: TestClient) -> None:
    assert client.get(f"/{TOKEN}/state", headers={"Host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:80"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_post_from_another_origin_is_refused(
    client: TestClient, folder: Path, headers: dict[str, str]
) -> None:
    answer = client.post(f"/{TOKEN}/choose", json={"number": 0, "verdict": "left"}, headers=headers)
    assert answer.status_code == 403
    assert not (folder / CHOICES).exists()


def test_a_form_that_needs_no_permission_is_refused(client: TestClient, folder: Path) -> None:
    """text/plain is what another site can post without asking first."""
    answer = client.post(
        f"/{TOKEN}/choose", content='{"number": 0, "verdict": "left"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400
    assert not (folder / CHOICES).exists()


@pytest.mark.parametrize(
    "address",
    [
        "picture/0/../../samples.json",
        "picture/0/..%2f..%2fsamples.json",
        "picture/0/%2e%2e%2f%2e%2e%2fsamples.json",
        "picture/0/pictures%2fp00000-s00.png",
        "picture/..%2fsamples.json/left",
        "../samples.json",
    ],
)
def test_no_path_leads_to_a_file(client: TestClient, address: str) -> None:
    answer = client.get(f"/{TOKEN}/{address}")
    assert answer.status_code == 404
    assert "per_prompt" not in answer.text


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"number": "0", "verdict": "left"}',
        '{"number": 0, "verdict": "best"}',
        '{"number": 0}',
        "x" * 9999,
    ],
)
def test_a_post_that_says_nothing_sensible_is_refused(client: TestClient, folder: Path, content: str) -> None:
    answer = client.post(f"/{TOKEN}/choose", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert not (folder / CHOICES).exists()


def test_the_page_asks_nobody_else_for_anything(client: TestClient) -> None:
    answer = client.get(f"/{TOKEN}/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "http://" not in answer.text and "https://" not in answer.text and "{{" not in answer.text
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert answer.text.count(f'nonce="{nonce}"') == 2
    other = client.get(f"/{TOKEN}/").headers["content-security-policy"]
    assert nonce not in other
    for name, value in {"cache-control": "no-store", "referrer-policy": "no-referrer"}.items():
        assert answer.headers[name] == value


def test_a_picture_of_a_question_that_is_over_is_gone(client: TestClient) -> None:
    choose(client, "left")
    assert client.get(f"/{TOKEN}/picture/0/left").status_code == 410


def test_the_page_is_opened_where_there_is_a_screen(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And when its address is said somebody listens there."""
    opened: list[str] = []
    served = threading.Event()

    def open_browser(address: str) -> None:
        """Shows the page in the terminal: it is there until the server has answered."""
        opened.append(address)
        assert served.wait(10)

    class Server:
        def __init__(self, config: object) -> None:
            pass

        def run(self, sockets: list[socket.socket]) -> None:
            address = capsys.readouterr().err.split()[1]
            port = int(address.split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                assert opened in ([], [address])
            served.set()

    monkeypatch.setattr("uvicorn.Server", Server)
    monkeypatch.setattr("webbrowser.open", open_browser)
    monkeypatch.setattr("sys.platform", "linux")
    for screen, wanted, times in ((":0", True, 1), (":0", False, 0), ("", True, 0)):
        monkeypatch.setenv("DISPLAY", screen)
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        opened.clear()
        served.clear()
        serve(session, browser=wanted)
        for thread in [one for one in threading.enumerate() if one.daemon and "_open_browser" in one.name]:
            thread.join(10)
        assert len(opened) == times


# The real server --------------------------------------------------------------------------------------------


def test_the_server_listens_on_this_machine_alone_and_survives_a_kill(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for verdicts in (("left", "tie"), ("right", "both_bad")):
        process, address = started(folder)
        try:
            assert address.startswith("http://127.0.0.1:")
            for verdict in verdicts:
                post(address, verdict)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert [choice.verdict for choice in standing_choices(read_choices(folder / CHOICES))] == [
        "left", "tie", "right", "both_bad",
    ]  # fmt: skip


def started(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """`align label` in a process of its own, and its address."""
    return serve_page("align", "label", str(folder))


def post(address: str, verdict: str) -> None:
    import json

    with urllib.request.urlopen(address + "state", timeout=60) as answer:
        number = json.load(answer)["number"]
    body = json.dumps({"number": number, "verdict": verdict}).encode()
    request = urllib.request.Request(address + "choose", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()


# What goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"[" * 4000, b'{"number": [1]}', '{"number": 0}'.encode("utf-16")])
@pytest.mark.parametrize("address", ["choose", "undo"])
def test_a_malformed_post_is_a_bad_request(client: TestClient, address: str, content: bytes) -> None:
    answer = client.post(f"/{TOKEN}/{address}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_number_of_thousands_of_digits_is_an_old_picture(client: TestClient) -> None:
    assert client.get(f"/{TOKEN}/picture/{'9' * 5000}/left").status_code == 410


@pytest.mark.parametrize("address", ["", "state", "picture/0/left", "nothing"])
def test_no_answer_may_be_framed(client: TestClient, address: str) -> None:
    assert "frame-ancestors 'none'" in client.get(f"/{TOKEN}/{address}").headers["Content-Security-Policy"]


def test_a_mistake_of_the_server_has_its_headers_too(
    client: TestClient, session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(session), "question", property(lambda self: 1 / 0))
    answer = client.get(f"/{TOKEN}/state")
    assert answer.status_code == 500
    assert answer.headers["Cache-Control"] == "no-store" and "Content-Security-Policy" in answer.headers
    assert capsys.readouterr().err.count("\n") == 1


def test_a_choice_in_a_folder_that_is_gone_is_not_kept_and_makes_no_folder(
    client: TestClient, folder: Path
) -> None:
    folder.rename(folder.with_name("elsewhere"))
    answer = choose(client, "left")
    assert answer.status_code == 503 and "is gone" in answer.text
    assert not folder.exists()
    folder.with_name("elsewhere").rename(folder)
    assert choose(client, "left").status_code == 200


def test_a_picture_that_is_gone_is_answered_and_work_goes_on(client: TestClient, folder: Path) -> None:
    for path in (folder / "pictures").iterdir():
        path.unlink()
    assert client.get(f"/{TOKEN}/picture/0/left").status_code == 404
    assert choose(client, "skip").status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: x", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_connection_without_a_whole_request_is_closed(
    session: Session, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    import asyncio

    import uvicorn

    monkeypatch.setattr(local_server, "REQUEST_SECONDS", 0.2)

    async def stays_open_for() -> float:
        app = build_app(session, token=TOKEN, port=PORT)
        config = uvicorn.Config(
            app, lifespan="off", http=local_server._make_protocol(), log_level="critical", port=0
        )
        serving = uvicorn.Server(config)
        task = asyncio.create_task(serving.serve())
        while not serving.started:
            await asyncio.sleep(0.01)
        port = serving.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        writer.write(sent)
        await asyncio.wait_for(reader.read(), timeout=5)
        seconds = time.monotonic() - began
        serving.should_exit = True
        await task
        return seconds

    assert asyncio.run(stays_open_for()) < 3


def test_a_polite_end_does_not_wait_for_half_a_request(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "SHUTDOWN_SECONDS", 0.3)
    began: list[float] = []

    def end(text: str) -> None:
        def halve_and_end(port: int) -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as half:
                half.sendall(
                    f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 9\r\n\r\n{{".encode()
                )
                time.sleep(0.5)  # until it has been read
                began.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
                half.recv(1)

        if not began and text.startswith("Open"):
            port = int(text.split(":")[2].split("/")[0])
            threading.Thread(target=halve_and_end, args=(port,), daemon=True).start()

    monkeypatch.setattr(local_server, "notify", end)
    serve(session)
    assert time.monotonic() - began[0] < local_server.REQUEST_SECONDS / 2


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_there_is_not_is_a_sentence(port: int) -> None:
    with pytest.raises(UserError, match=f"Port {port} cannot be used"):
        local_server.check_port(port)


def test_the_address_is_said_when_the_port_listens(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    said: list[tuple[str, bool]] = []

    def connects(text: str) -> None:
        port = int(re.findall(r"127\.0\.0\.1:(\d+)", text)[0])
        with socket.socket() as knock:
            said.append((text, knock.connect_ex(("127.0.0.1", port)) == 0))

    monkeypatch.setattr(local_server, "notify", connects)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.2 50000 10.0.0.1 22")
    serve(session)
    (address, listens), (tunnel, _) = said
    port = re.findall(r"127\.0\.0\.1:(\d+)", address)[0]
    assert listens and f"ssh -L {port}:127.0.0.1:{port}" in tunnel and "must be the same" in tunnel
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.setenv("DISPLAY", ":0")
    serve(session)
    assert len(said) == 3  # who sits at the machine needs no tunnel
