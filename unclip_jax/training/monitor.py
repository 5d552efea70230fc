"""What a run says of its own speed: step time, MFU, goodput, memory, slow hosts, and standstill.

A thread waits for every step's end, which the loop itself need not: so what the devices waited for
their input is known, and a run that hangs in the midst of a step dumps its stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import queue
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax

from unclip_jax.parallel import distributed, flops
from unclip_jax.training import lora
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.goodput import OVERHEADS, Goodput
from unclip_jax.training.optimizers import trained

# A host is slow that keeps the steps waiting, and takes this many times what the others take.
SLOW, SLOW_SHARE = 1.5, 0.5
STACKS = "stacks-{}.txt"


class Ends:
    """When steps end on this process's devices, seen by a thread of its own."""

    def __init__(self) -> None:
        """Start the thread."""
        self.step, self.at, self.peaceful = -1, time.perf_counter(), True
        self._queue: queue.SimpleQueue[tuple[int, jax.Array] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="ends of steps", daemon=True)
        self._thread.start()

    def expect(self, step: int, result: jax.Array) -> None:
        """A step is on its way; it ends when `result` is there."""
        self._queue.put((step, result))

    def close(self) -> None:
        """Wait for no more."""
        self._queue.put(None)

    def _wait(self) -> None:
        while (one := self._queue.get()) is not None:
            step, result = one
            try:
                result.block_until_ready()
            except Exception:  # the loop meets it, too, and tells it
                self.peaceful = False
                return
            self.step, self.at = step, time.perf_counter()


class Watchdog:
    """Dumps the stacks of all threads once nothing has happened for too long."""

    def __init__(self, minutes: float, file: Path, state: Callable[[], tuple[float, str]]) -> None:
        """Watch from now on; 0 minutes watch nothing.

        Args:
            minutes: without an end of a step, an evaluation or a save.
            file: gets the stacks.
            state: when something happened last, by `time.perf_counter`, and what the run does.
        """
        self._seconds, self._file, self._state = 60 * minutes, file, state
        self._over = threading.Event()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._over.set()

    def _watch(self) -> None:
        told = -math.inf
        while not self._over.wait(min(10.0, self._seconds / 4)):
            last, doing = self._state()
            if last <= told or time.perf_counter() - last < self._seconds:
                continue
            told = last
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%F %T')} {socket.gethostname()}: {doing}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            print(
                f"no step has ended for {self._seconds / 60:g} minutes ({doing}); the stacks of"
                f" all threads are in {self._file}",
                file=sys.stderr,
                flush=True,
            )


class Monitor:
    """Times a run. All processes of it have one, and read it at the same steps."""

    def __init__(
        self,
        workdir: Path,
        start: int,
        began: float,
        config: TrainConfig,
        devices: int,
        say: Callable[[str], None],
    ) -> None:
        """Count a run that goes on from step `start`, or begins at 0.

        Args:
            workdir: where the lead keeps what earlier lives took, and stacks go.
            start: the step that the run goes on from.
            began: when this life did, by `time.perf_counter`.
            config: has the size of a batch, and the patience of the watchdog.
            devices: of all processes.
            say: prints a line.
        """
        self._start, self._batch_size, self._devices = start, config.batch_size, devices
        self._say = say
        self._goodput = Goodput(workdir, start, reads=distributed.is_lead())
        self._model_flops = 0
        self._ends, self._doing = Ends(), "starting"
        self._sent, self._step = start, start
        self._touched, self._counted = time.perf_counter(), began  # goodput is counted up to then
        self._since, self._timed = 0.0, math.inf  # of the speed, and the step it begins after
        self._overheads = dict.fromkeys(OVERHEADS, 0.0)
        self._overheads["checkpoint" if start else "compile"] = self._touched - began
        self._own = 0.0  # seconds that this host took for itself
        self._slow: str | None = None
        file = workdir / STACKS.format(jax.process_index())
        self._watchdog = Watchdog(config.stall_minutes, file, self._state)

    def _state(self) -> tuple[float, str]:
        return max(self._ends.at, self._touched), f"since step {self._step}; {self._doing}"

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stop the threads, and keep what was counted."""
        self._watchdog.close()
        self._ends.close()
        # What came after the last reading is told apart as far as it was an overhead.
        self._goodput.add(self._step, sum(self._overheads.values()), self._overheads, False)
        if distributed.is_lead():
            self._goodput.write()

    def count_flops(self, loss_fn: Any, params: Any, batch: Any) -> None:
        """Learn what a step of `loss_fn` computes; only where a device's peak is known.

        See `flops.of_training`: whatever is recomputed does not count.
        """
        if flops.peak(jax.devices()[0].device_kind) is None:
            return
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
        with contextlib.suppress(Exception):  # a loss that can't be counted trains all the same
            key = jax.random.key(0)
            told = {"trained": trained(shapes[0]), "times": lora.passes(shapes[0])}
            self._model_flops = flops.of_training(loss_fn, *shapes, key, **told)

    # What the loop does

    @contextlib.contextmanager
    def overhead(self, kind: str) -> Iterator[None]:
        """A block that the devices wait for: "compile", "checkpoint" or "evaluate"."""
        began, before = time.perf_counter(), self._doing
        self._doing, self._touched = kind, began
        yield
        self._doing, self._touched = before, time.perf_counter()
        self._overheads[kind] += self._touched - began

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """The next batch is read and sent; the devices wait from when they are done."""
        began, before = time.perf_counter(), self._doing
        self._doing = "waiting for the data"
        yield
        now = time.perf_counter()
        self._doing = before
        self._own += now - began
        if self._sent == self._start or self._ends.step == self._sent:
            self._overheads["input"] += now - max(began, self._ends.at)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[list[jax.Array]]:
        """A step is sent to the devices; the block adds a result of it. The first two compile."""
        compiling = step <= self._start + 2
        self._doing = "compile" if compiling else "step"
        began, result = time.perf_counter(), []
        yield result
        took = time.perf_counter() - began
        if compiling:
            self._overheads["compile"] += took
        else:
            self._own += took
        self._sent = step
        self._ends.expect(step, result[0])

    def restart(self, step: int) -> None:
        """Speed is measured from here on; what was before is left out of it."""
        self._timed, self._since, self._own = step, time.perf_counter(), 0.0

    # What it tells

    def read(self, step: int, saved: bool) -> dict[str, float]:
        """Figures of the steps since the last reading. All processes must call it."""
        figures: dict[str, float] = {}
        timed = step - self._timed
        seconds = (time.perf_counter() - self._since) / timed if timed > 0 else math.nan
        mine = {
            "host": socket.gethostname(),
            "own": self._own / timed if timed > 0 else 0.0,
            "overheads": self._overheads,
            "memory": device_memory(),
        }
        every = distributed.gather(mine)
        if timed > 0:
            figures["train/steps_per_second"] = 1 / seconds
            figures["train/examples_per_second"] = self._batch_size / seconds
            figures["run/step_seconds"] = seconds
            rate = flops.peak(jax.devices()[0].device_kind)
            if self._model_flops and rate:
                figures["run/mfu"] = self._model_flops / seconds / self._devices / rate
            figures |= self._hosts([(one["host"], one["own"]) for one in every], seconds)
        if memory := max(one["memory"] for one in every):
            figures["run/device_memory_gib"] = memory / 2**30
        # Everyone waits for the host that waits longest.
        longest = {kind: max(one["overheads"][kind] for one in every) for kind in OVERHEADS}
        self._count(step, saved, longest)
        if distributed.is_lead():
            self._goodput.write()
        return figures | {f"run/{name}": share for name, share in self._goodput.shares().items()}

    def _count(self, step: int, saved: bool, overheads: dict[str, float]) -> None:
        now = time.perf_counter()
        self._goodput.add(step, now - self._counted, overheads, saved)
        self._counted, self._step = now, step
        self._overheads = dict.fromkeys(OVERHEADS, 0.0)

    def _hosts(self, own: list[tuple[str, float]], seconds: float) -> dict[str, float]:
        """What the slowest host takes for itself a step, and which process it is; told if others
        wait for it."""
        slowest = max(range(len(own)), key=lambda process: own[process][1])
        host, longest = own[slowest]
        figures = {"run/host_seconds": longest}
        if len(own) == 1:
            return figures
        usual = statistics.median(x for process, (_, x) in enumerate(own) if process != slowest)
        slow = longest > SLOW * usual and longest > SLOW_SHARE * seconds
        if slow and host != self._slow:
            self._say(
                f"host {host} (process {slowest}) is slow: it takes {longest:.3g} s a step to read"
                f" and send its data, the others {usual:.3g} s; all wait for it"
            )
        self._slow = host if slow else None
        return figures | {"run/slowest_process": float(slowest)}


def device_memory() -> int:
    """The most bytes that a device of this process has held; 0 where devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(one.get("peak_bytes_in_use", 0) for one in stats)
