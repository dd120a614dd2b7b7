"""Set up before anything imports jax: eight CPU devices, no network, shapes and types checked at run time."""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

# A shell ignores Ctrl-C for what it starts in the background, nohup a lost terminal: the tests' processes shall not.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Tests run tiny programs once: compiling them lightly, in one piece, is several times faster. XLA aborts on a flag it
# does not know, so the flags are for the versions they were tried with.
if metadata.version("jaxlib").startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    flags += " --xla_cpu_parallel_codegen_split_count=1"
    if flags not in os.environ.get("XLA_FLAGS", ""):  # workers have those of the process that starts them
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch: several test processes share the cores

# Every program is compiled once for all processes of the tests, and kept for the next time: the key of an entry is all
# that it depends on (the program, flags, versions, devices). Several processes joined by gloo do without (see launch).
ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / ".pytest_cache" / "programs"
MOST_BYTES = 2**30
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.typecheck  # noqa: E402, F401  (the hook looks it up by name)

jax.config.update("jax_num_cpu_devices", 8)

# Every annotation such as Float[Array, "B T"] in ppo_jax is checked on each call, with all others of its module. Those
# without arrays are left to mypy: there the checks would cost a tenth of the tests' time.
ARRAYS = [path for path in (ROOT / "ppo_jax").rglob("*.py") if "from jaxtyping import" in path.read_text("utf-8")]
install_import_hook(
    [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ARRAYS], "tests.typecheck.check"
)

# No deadline: the first call of a property compiles. In CI the same examples are drawn each time.
hypothesis.settings.register_profile("ppo_jax", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("ppo_jax")

# Tracing makes millions of objects and hardly a cycle: looking for cycles every 700 of them takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)


def pytest_configure(config: pytest.Config) -> None:
    """Programs of old versions of the code are thrown away when there are many."""
    if hasattr(config, "workerinput") or not PROGRAMS.is_dir():
        return
    if sum(entry.stat().st_size for entry in os.scandir(PROGRAMS)) > MOST_BYTES:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Compiled programs are kept for tests that share them, until they fill memory: two workers run side by side."""
    yield
    if psutil.Process().memory_info().rss > 4 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def screen() -> Any:
    """A `display.Screen` that shows nothing."""
    from ppo_jax.runs.output.screen import progress  # after the hook

    with progress("test", main_process=False) as screen:
        return screen


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for processes of its own comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "processes" not in item.path.parts)
    gc.collect()
    gc.freeze()  # what was imported and collected stays; nobody looks through it again
