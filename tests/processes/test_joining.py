"""Real processes that are told nothing: Slurm's or a TPU pod's variables in their environment bring them together."""

import http.server
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster
from jax.experimental import multihost_utils

from ppo_jax.parallel.launch import start
from tests.processes import forks

OTHERS = ("SLURM_", "TPU_", "MEGASCALE_")
JOB = random.randrange(1, 4096)  # jax takes the coordinator's port from the job's number


def slurm(process: int) -> dict[str, str]:
    """What srun gives each task of a step with two tasks, the node's name aside."""
    found = {"JOB_ID": JOB, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": process, "LOCALID": process}
    return {f"SLURM_{name}": str(value) for name, value in found.items()}


def pod(process: int) -> dict[str, str]:
    """What a pod slice of two hosts gives each; JAX_FORCE_TPU_INIT stands in for the chips."""
    hosts = {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(process)}
    return hosts | {"TPU_SKIP_MDS_QUERY": "1", "JAX_FORCE_TPU_INIT": "1"}


def addressed(process: int) -> dict[str, str]:
    """The same as newer runtimes say it."""
    given = pod(process)
    return given | {"TPU_PROCESS_ADDRESSES": given.pop("TPU_WORKER_HOSTNAMES")}


def slices(process: int) -> dict[str, str]:
    """Two slices of one host each."""
    alone = pod(0) | {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_COORDINATOR_ADDRESS": "localhost"}
    return alone | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": str(process)}


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of a Cloud machine that has nothing to add to the environment."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def metadata() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def find_others() -> None:
    """One process: what `start()` has found without arguments."""
    if "JAX_FORCE_TPU_INIT" in os.environ:  # which jax asks for when it is imported
        cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    start()
    seen = multihost_utils.process_allgather(jax.numpy.array(jax.process_index() + 10))
    here = jax.process_index(), jax.process_count(), jax.local_device_count()
    print(json.dumps([*here, seen.tolist(), jax.config.jax_enable_compilation_cache]), flush=True)


def run(folder: Path, environments: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Exit code and what it says of one process per environment, all at once."""
    nothing = {name: None for name in os.environ if name.startswith(OTHERS)}
    started = [
        forks.start(find_others, folder=folder, environment=nothing | environment) for environment in environments
    ]
    with forks.ending(started):
        return [(process.wait(120), process.text) for process in started]  # raises when they hang


@pytest.mark.parametrize("platform", [slurm, pod, addressed, slices])
def test_processes_find_each_other_without_arguments(
    tmp_path: Path, platform: Callable[[int], dict], metadata: str
) -> None:
    found = run(tmp_path, [platform(i) | {"GCE_METADATA_IP": metadata} for i in range(2)])
    for i, (code, said) in enumerate(found):
        assert code == 0, said
        assert json.loads(said.splitlines()[-1]) == [i, 2, 1, [10, 11], False]


def test_a_platform_that_does_not_answer_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    [(code, said)] = run(tmp_path, [pod(0) | {"GCE_METADATA_IP": "127.0.0.1:9"}])
    assert code == 1 and "ConnectionError: the processes did not come together" in said
    assert "Give --distributed.coordinator" in said
