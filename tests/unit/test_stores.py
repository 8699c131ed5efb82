"""Object stores, against a real server of the S3 protocol: what is put there comes back, refusals have words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import S3
from zoray import stores
from zoray.stores import StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several sizes, one of them more than a part of an upload."""
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    for name, content in {"a.txt": b"one", "inner/b.bin": os.urandom(11 << 20), "empty": b"", "z.json": b"{}"}.items():
        (made / name).write_bytes(content)
    return made


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_folder_comes_back(s3: S3, folder: Path, tmp_path: Path) -> None:
    stores.put(folder, s3.uri("deep", "er"), "z.json")
    found = stores.entries(s3.uri("deep", "er"))
    assert [(each.name, each.size) for each in found] == [
        ("a.txt", 3),
        ("empty", 0),
        ("inner/b.bin", 11 << 20),
        ("z.json", 2),
    ]
    assert stores.entries(s3.uri("deep", "er") + "/") == found
    stores.fetch(s3.uri("deep", "er"), [each.name for each in found], tmp_path / "back")
    for each in found:
        assert (tmp_path / "back" / each.name).read_bytes() == (folder / each.name).read_bytes()
    assert stores.read(s3.uri("deep", "er", "a.txt")) == b"one"


def test_the_last_file_comes_last(s3: S3, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that is cut off at any file leaves all before `last`, and never `last` itself."""
    from pyarrow import fs

    whole = fs.copy_files
    for cut in range(4):
        left = iter(range(cut))

        def copy(*arguments: object, left: Iterator[int] = left, **keys: object) -> None:
            if next(left, None) is None:
                raise OSError("AWS Error NETWORK_CONNECTION during UploadPart operation: gone")
            whole(*arguments, **keys)

        monkeypatch.setattr(fs, "copy_files", copy)
        with pytest.raises(StoreError, match="cannot be reached"):
            stores.put(folder, s3.uri(f"cut-{cut}"), "a.txt")
        assert len(s3.names(f"cut-{cut}/")) == cut
        assert f"cut-{cut}/a.txt" not in s3.names()


def test_an_object_of_equal_size_has_another_version(s3: S3) -> None:
    s3.write(b"one", "x")
    before = stores.entries(s3.uri())
    s3.write(b"two", "x")
    after = stores.entries(s3.uri())
    assert [each.size for each in before] == [each.size for each in after]
    assert before != after


def test_removing(s3: S3, folder: Path) -> None:
    stores.put(folder, s3.uri("there"), "z.json")
    s3.write(b"stays", "thereafter")
    stores.remove(s3.uri("there"), "z.json")
    assert s3.names() == ["thereafter"]
    stores.remove(s3.uri("there"), "z.json")


def test_a_place_that_can_be_written_is_left_empty(s3: S3) -> None:
    stores.check_writable(s3.uri("new", "place"))
    assert s3.names() == [] and stores.entries(s3.uri("new", "place")) == []


def test_the_uri_says_where_the_store_is(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.write(b"one", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    address = s3.address.removeprefix("http://")
    uri = f"s3://{s3.bucket}?endpoint_override={address}&scheme=http&region=us-east-1"
    assert stores.read(stores.join(uri, "x")) == b"one"


def test_keys_are_not_shown() -> None:
    uri = "s3://KEY:SECRET@bucket/a/b?endpoint_override=localhost:9000&scheme=http"
    assert stores.shown(uri) == "s3://bucket/a/b"
    assert stores.join(uri, "c") == uri.replace("a/b", "a/b/c")
    assert stores.shown("/a local/path?") == "/a local/path?"
    assert stores.shown("s3://KEY:SEC/RET@bucket/a") == "s3://bucket/a"
    assert stores.shown("s3://bucket/a@b?region=x") == "s3://bucket/a@b"
    assert [stores.has_keys(each) for each in (uri, "s3://KEY:SEC/RET@b/a", "s3://bucket/a@b?region=x", "a:b@c")] == [
        True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(StoreError) as caught:
        stores.entries(uri + "&nonsense=1")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://no-such-bucket/x", "no bucket"),
        ("s3://b/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1", "cannot be reached"),
        ("s3://b/x?endpoint_override=no.such.host.invalid&scheme=http&region=us-east-1", "cannot be reached"),
        ("s3://b/x?endpoint=y", "'endpoint'"),
        ("s4://b/x", "cannot be opened"),
    ],
)
def test_refusals_have_words_and_come_soon(s3_server: str, uri: str, words: str) -> None:
    for call in (stores.entries, stores.check_writable):
        began = time.monotonic()
        with pytest.raises(StoreError, match=words) as caught:
            call(uri)
        assert caught.value.advice
        assert time.monotonic() - began < 15


def test_wrong_keys_are_refused_with_advice(s3: S3) -> None:
    for call in (stores.entries, stores.check_writable):
        with s3.strict(), pytest.raises(StoreError, match="refuses access") as caught:
            call(s3.uri("x"))
        assert "AWS_ACCESS_KEY_ID" in str(caught.value.advice)


def test_a_silent_store_is_given_up(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_SILENCE", 1.0)
    began = time.monotonic()
    with pytest.raises(StoreError, match="cannot be reached"):
        stores.entries(f"s3://b/x?endpoint_override={silent}&scheme=http&region=us-east-1")
    assert time.monotonic() - began < 10


def test_google_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would try for a quarter of an hour."""
    monkeypatch.setattr(stores, "_SILENCE", 0.5)
    with pytest.raises(StoreError, match="cannot be reached"):
        stores.entries("gs://anonymous@b/x?endpoint_override=127.0.0.1:9&scheme=http")


def test_a_process_that_used_a_store_ends_in_silence(s3: S3) -> None:
    code = f"from zoray import stores; print(stores.entries({s3.uri()!r}))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_the_module_does_not_load_pyarrow() -> None:
    code = "import sys, zoray.stores; print('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
