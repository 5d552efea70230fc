"""Two processes of four devices each are one run: equal, killed, resumed, told to stop."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests import pod_run
from tests.xla_flags import xla_flags
from unclip_jax.errors import UserError
from unclip_jax.parallel import distributed
from unclip_jax.training import writers

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
SETTINGS = {
    "steps": 24,
    "batch_size": 16,
    "checkpoint_every": 8,
    "log_every": 4,
    "eval_every": 12,
    "mesh": MESH,
}


def start(workdir: Path, devices: int, *processes: str, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, pod_run.__file__, str(workdir), json.dumps(settings), *processes],
        env=os.environ | ENVIRONMENT | {"XLA_FLAGS": xla_flags(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_pod(
    workdir: Path, count: int = 2, devices: int = 4, **settings
) -> list[subprocess.Popen]:
    """Two processes, or another number; the first leads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(workdir, devices, address, str(count), str(i), **settings) for i in range(count)]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What they print; they must end well."""
    said = [process.communicate(timeout=1800)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def leaves(workdir: Path, file: str = "final.npz") -> list[np.ndarray]:
    with np.load(workdir / file) as arrays:
        return [arrays[name] for name in arrays.files]


def seen(workdir: Path) -> dict[int, list[int]]:
    """Step -> the examples that its batch held, over all processes; what was undone is dropped.

    A step that was done again, perhaps by fewer processes, is theirs that did it last: the first
    process, which is there in every life of a run, says how many they were.
    """
    steps: dict[int, dict[int, dict]] = {}
    for path in workdir.glob("seen-*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], {})[int(path.stem.split("-")[1])] = record
    batches = {}
    for step, parts in steps.items():
        last = [parts[process] for process in range(parts[0]["of"])]
        assert {part["of"] for part in last} == {len(last)}
        batches[step] = [i for part in last for i in part["index"]]
    return batches


def metrics(workdir: Path) -> list[dict]:
    records = writers.read_metrics(workdir / writers.METRICS_FILE)
    return [{k: v for k, v in r.items() if not writers.by_the_clock(k)} for r in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("pod") / "whole"
    said = finish(start_pod(workdir, **SETTINGS))
    assert "on 8 x cpu (data 2, fsdp 2, spatial 1, tensor 2)" in said[0]
    assert "parameters" not in said[1]  # the lead alone speaks
    return workdir


def test_two_processes_equal_one(whole, tmp_path):
    """The same examples in the same rows, so the same losses and params."""
    alone = tmp_path / "alone"
    finish([start(alone, 8, **SETTINGS)])
    assert seen(whole) == seen(alone)
    for ours, theirs in zip(leaves(whole), leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    for ours, theirs in zip(metrics(whole), metrics(alone), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    for ours, theirs in zip(
        leaves(whole, "exported.npz"), leaves(alone, "exported.npz"), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_every_example_is_seen_once_an_epoch(whole):
    """24 batches of 16 are 7 epochs of 50 pictures, and 34 of the eighth."""
    batches = seen(whole)
    stream = [i for step in sorted(batches) for i in batches[step]]
    assert sorted(batches) == list(range(1, 25))
    for epoch in range(7):
        assert Counter(stream[50 * epoch : 50 * (epoch + 1)]) == Counter(range(50))
    assert max(Counter(stream[350:]).values()) == 1


@pytest.mark.slow
def test_no_process_of_a_restarted_run_compiles_anything(whole, tmp_path):
    workdir, settings = tmp_path / "again", SETTINGS | {"eval_every": 0, "cache": True}
    compiled = []
    for _ in range(3):  # from the beginning, from step 16, and so again
        finish(start_pod(workdir, **settings))
        shutil.rmtree(workdir / "checkpoints" / "24")
        counts = (json.loads((workdir / f"compiled-{p}.json").read_text()) for p in range(2))
        compiled.append([(n["compile_requests_use_cache"], n["cache_hits"]) for n in counts])
    assert all(asked > 5 and found < asked for asked, found in compiled[0])
    assert all(asked > 5 and found == asked for asked, found in compiled[2])
    for ours, theirs in zip(leaves(workdir), leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_killed_process_costs_nothing(whole, tmp_path):
    """One of two killed with no warning, both started again: bit for bit the undisturbed run."""
    workdir = tmp_path / "killed"
    processes = start_pod(workdir, **SETTINGS, slow=0.1)
    deadline = time.monotonic() + 1200
    while not (workdir / "checkpoints" / "8").is_dir():
        assert time.monotonic() < deadline and processes[1].poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    processes[1].kill()
    processes[0].kill()  # a lone process waits for its peer until a scheduler ends it
    for process in processes:
        process.communicate()
    assert not (workdir / "final.npz").exists()
    said = finish(start_pod(workdir, **SETTINGS))
    assert "resumed from step " in said[0]
    for ours, theirs in zip(leaves(workdir), leaves(whole), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert seen(workdir) == seen(whole)
    assert metrics(workdir) == metrics(whole)


def test_sigterm_to_one_process_saves_and_ends_both(whole, tmp_path):
    """Both stop after the same step with status 0; what follows on one process is the same run."""
    workdir = tmp_path / "stopped"
    processes = start_pod(workdir, **SETTINGS, slow=0.15)
    deadline = time.monotonic() + 1200
    while len(list(workdir.glob("seen-1.jsonl"))) == 0:
        assert time.monotonic() < deadline and processes[1].poll() is None
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    assert "stopped by SIGTERM; step " in said[0]
    assert not (workdir / "final.npz").exists()
    # On another number of processes, and another mesh.
    finish([start(workdir, 8, **SETTINGS | {"mesh": {"data": 8}})])
    assert seen(workdir) == seen(whole)
    for ours, theirs in zip(leaves(workdir), leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        (1, {}),
        pytest.param(8, {"data": 8}, marks=pytest.mark.slow),
        pytest.param(8, {"fsdp": 8}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_anywhere(whole, tmp_path, devices, mesh):
    """What 2 x 4 devices saved at step 16 ends alike on one device and on eight."""
    workdir = tmp_path / "moved"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "24")
    said = finish([start(workdir, devices, **SETTINGS | {"mesh": mesh})])
    assert "resumed from step 16 of 24" in said[0]
    for ours, theirs in zip(leaves(workdir), leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_two_slices_of_two_processes_are_one_run(whole, tmp_path):
    """One of four killed with no warning, all started again as two: every example once."""
    workdir = tmp_path / "slices"
    settings = SETTINGS | {"mesh": {"fsdp": 4, "slices": 2}}
    processes = start_pod(workdir, 4, 2, **settings, slow=0.1)
    deadline = time.monotonic() + 1200
    while not (workdir / "checkpoints" / "8").is_dir():
        assert time.monotonic() < deadline and processes[3].poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    for process in reversed(processes):
        process.kill()
        process.communicate()
    said = finish(start_pod(workdir, **settings))
    assert "resumed from step " in said[0] and "data 2, fsdp 4" in said[0]
    assert seen(workdir) == seen(whole)
    for ours, theirs in zip(leaves(workdir), leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


# How processes find each other


def test_environments_are_told_apart():
    slurm = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}
    assert distributed.environment(slurm) == "Slurm"
    assert distributed.environment(slurm | {"SLURM_NTASKS": "1"}) is None
    assert distributed.environment({"SLURM_NTASKS": "4"}) is None  # in sbatch, before srun
    assert distributed.environment({"OMPI_COMM_WORLD_SIZE": "2"}) == "Open MPI"
    assert distributed.environment({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}) == "TPU pod"
    assert distributed.environment({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert distributed.environment({"MEGASCALE_NUM_SLICES": "2"}) == "TPU pod"
    assert distributed.environment({}) is None
    torchrun = {"WORLD_SIZE": "4", "RANK": "3"}
    assert distributed.environment(torchrun) == "torchrun"
    assert distributed.environment(torchrun | {"WORLD_SIZE": "1"}) is None
    assert distributed.environment({"WORLD_SIZE": "4"}) is None
    assert distributed.environment({"PMI_SIZE": "2", "PMI_RANK": "0"}) == "MPICH"
    assert distributed.environment(slurm | {"PMI_SIZE": "4", "PMI_RANK": "0"}) == "Slurm"
    job = {"JOB_COMPLETION_INDEX": "0"}
    assert distributed.environment(job) == "Kubernetes"
    assert distributed.environment(job | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert distributed.environment(job | {"TPU_WORKER_HOSTNAMES": "t-0,t-1"}) == "TPU pod"


TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(
    ("variables", "address", "told"),
    [
        (TORCHRUN, None, ("n1:29500", 4, 3, None)),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, None, ("n1:29501", 4, 3, None)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "n2:1", ("n2:1", 4, 3, [1])),
        (MPICH, "n1:99", ("n1:99", 2, 1, [1])),
        (MPICH | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, "n1:99", ("n1:99", 2, 1, None)),
        (MPICH | {"JAX_COORDINATOR_ADDRESS": "n3:1"}, None, ("n3:1", 2, 1, [1])),
    ],
)
def test_launchers_tell_jax_who_is_who(monkeypatch, variables, address, told):
    joined = []
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **k: joined.append(k))
    distributed.initialize("auto", address)
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    assert [tuple(given.get(name) for name in names) for given in joined] == [told]
    distributed.initialize("off")
    assert len(joined) == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            MPICH,
            r"--coordinator_address: missing, and MPICH .* number 1 of 2 \(PMI_RANK, PMI_SIZE\)",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"missing, and torchrun .*--distributed=off"),
        ({"JOB_COMPLETION_INDEX": "0"}, r"process 0 of an indexed job of Kubernetes.*=off if it"),
    ],
)
def test_no_process_of_several_trains_alone(monkeypatch, variables, message):
    """An error names what started it, rather than let each write into the workdir of the others."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    for mode in ("auto", "on"):
        with pytest.raises(UserError, match=message):
            distributed.initialize(mode)
    distributed.initialize("off")


def test_torchruns_processes_find_each_other():
    """Two processes of this machine, with the variables that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "from unclip_jax.parallel import distributed; distributed.initialize(); import jax;"
        "print(jax.process_count(), jax.process_index(), distributed.gather(jax.process_index()))"
    )
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
            env=os.environ | ENVIRONMENT | shared | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [text.strip().splitlines()[-1] for text in finish(processes)]
    assert said == ["2 0 [0, 1]", "2 1 [0, 1]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sometimes",), r"--distributed: got 'sometimes', expected one of auto, on, off"),
        (("auto", "host:1"), r"--num_processes: missing, expected with --coordinator_address"),
        (("auto", None, 2, 0), r"--coordinator_address: missing, expected with --num_processes"),
        (("auto", "host", 2, 0), r"--coordinator_address: got 'host', expected HOST:PORT"),
        (("auto", "host:99999", 2, 0), r"--coordinator_address: got 'host:99999'"),
        (("auto", "host:1", 0, 0), r"--num_processes: got 0, expected an integer, 1 or more"),
        (("auto", "host:1", 2, 2), r"--process_id: got 2, expected 0 to 1"),
        (("off", "host:1", 2, 0), r"--distributed=off: contradicts --coordinator_address"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)


def test_one_process_needs_no_one():
    distributed.initialize("auto")
    distributed.initialize("off")
    assert distributed.is_lead() and distributed.gather({"a": 1}) == [{"a": 1}]
