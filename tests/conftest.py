"""Set up before anything imports jax: eight CPU devices, no network, shapes and types checked at run time."""

import gc
import os
from collections.abc import Iterator
from importlib import metadata
from typing import Any

# Tests run tiny programs once: compiling them lightly is several times faster. XLA aborts on a flag it does not know,
# so the flags are for the versions they were tried with.
if metadata.version("jaxlib").startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch: several test processes share the cores

import hypothesis  # noqa: E402
import jax  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.typecheck  # noqa: E402, F401  (the hook looks it up by name)

jax.config.update("jax_num_cpu_devices", 8)

# Every annotation such as Float[Array, "B T"] in ppo_jax is checked on each call.
install_import_hook("ppo_jax", "tests.typecheck.check")

# No deadline: the first call of a property compiles. In CI the same examples are drawn each time.
hypothesis.settings.register_profile("ppo_jax", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("ppo_jax")


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Compiled programs are kept for tests that share them, until they fill memory: two workers run side by side."""
    yield
    if psutil.Process().memory_info().rss > 4 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Of a module that compiles tiny programs many times and runs them once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def screen() -> Any:
    """A `display.Screen` that shows nothing."""
    from ppo_jax.runs.output.screen import progress  # after the hook

    with progress("test", main_process=False) as screen:
        return screen


# Those that wait for processes of their own for minutes begin first, so that no worker is left alone with them.
LONGEST = (
    "test_kill",
    "test_preemption",
    "test_disk",
    "test_launch",
    "test_distributed",
    "test_stages_processes",
    "test_asked",
    "test_agreement",
    "test_gathered_rollout",
    "test_stages_mesh",
    "test_cli",
    "test_sharding",
    "test_pipeline",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of LONGEST come first (`make test` hands files to workers in this order)."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
