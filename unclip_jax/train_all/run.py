"""The four stages in order, each as `unclip train` would train it, within a time."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path

import jax

from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import UserError, wrong
from unclip_jax.train_all import page, sizes
from unclip_jax.train_all.budget import FEWEST_STEPS, Budget, Entry
from unclip_jax.train_all.look import Found, look
from unclip_jax.train_all.pace import measure
from unclip_jax.training import lock, loop, prepare
from unclip_jax.training.run import NotFinite, compiling
from unclip_jax.training.step import StepFn

# A stage that takes so much longer than was measured ends there: others want time, too.
PATIENCE = 1.25
CPU_MINUTES = 30  # that size small wants on a CPU; in less, tiny draws better


def run(data: str, out: Path, size: str | None, minutes: float) -> None:
    """Look, plan, train what is not trained, and write the page.

    Raises:
        UserError: no such data, or `out` was begun with others or in another size.
    """
    out.mkdir(parents=True, exist_ok=True)
    with lock.hold(out):
        began = time.monotonic()
        budget = Budget.read(out)
        size = _size(budget, size, minutes, out)
        found = look(DataConfig(name=data, image_size=sizes.draws(size)))
        say(*found.words(), *(f"note: {line}" for line in found.warnings(sizes.draws(size))))
        compiled: dict[str, StepFn] = {}
        if budget is None:
            budget = _begin(found, size, minutes, out, compiled)
        else:
            _check(budget, found, out)
            budget.extend(minutes)
        budget.spent += time.monotonic() - began
        budget.write(out)
        _say_plan(budget, out)
        for name in budget.left():
            _train(name, budget, found, out, compiled.pop(name, None))
            page.write(out, found, budget, drawing=False)
        page.write(out, found, budget, drawing=True)
        say("", f"Open {(out / page.PAGE).absolute()} in a browser.")


def say(*lines: str) -> None:
    """Print lines, at once."""
    print("\n".join(lines), flush=True)


def _size(budget: Budget | None, size: str | None, minutes: float, out: Path) -> str:
    """The size asked for, or that in which `out` was begun, or what suits this machine."""
    if budget is not None:
        if size not in (None, budget.size):
            expected = f"{budget.size}, with which {str(out)!r} was begun"
            raise wrong("--size", size, expected, "leave it out, or give another --out")
        return budget.size
    if size is None and jax.devices()[0].platform == "cpu" and minutes < CPU_MINUTES:
        say(
            f"size tiny, for {minutes:g} minutes on a CPU: it draws {sizes.draws('tiny')} px;"
            f" --size small draws {sizes.draws('small')} px and wants {CPU_MINUTES} minutes or more"
        )
        return "tiny"
    return size or ("small" if jax.devices()[0].platform == "cpu" else "base")


def _check(budget: Budget, found: Found, out: Path) -> None:
    """Raise UserError if `out` was begun with other data."""
    if budget.fingerprint != found.fingerprint:
        expected = f"the pictures and captions that {str(out)!r} was begun with"
        changed = "they have changed" if budget.data == found.data.name else f"not {budget.data!r}"
        raise wrong("--data", found.data.name, f"{expected} ({changed})", "give another --out")


def _begin(
    found: Found, size: str, minutes: float, out: Path, compiled: dict[str, StepFn]
) -> Budget:
    """A budget from a few steps of each stage; what was compiled for that is kept."""
    device = jax.devices()[0]
    where = f"{jax.device_count()} x {device.device_kind}"
    say("", f"timing a few steps of each stage ({size}) on {where}, which compiles them")
    entries = {}
    for name in sizes.STAGES:

        def tell(parameters: int, seconds: float, name: str = name) -> None:
            say(f"  {name:<9} {parameters / 1e6:5.1f} M parameters, {compiling(seconds)}")

        pace, compiled[name] = measure(sizes.config(name, size, found, out), tell)
        entries[name] = Entry(pace)
        say(
            f"  {'':<9} compiled in {pace.compiling:.0f} s; a step of {pace.batch_size}"
            f" takes {_seconds(pace.step)}"
        )
    return Budget(size, found.data.name, found.fingerprint, minutes, 0.0, entries)


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _say_plan(budget: Budget, out: Path) -> None:
    """What is still to do, and about how long it takes."""
    left = budget.left()
    if not left:
        say("", f"all is trained, in {budget.minutes:g} minutes; more --minutes train on")
        return
    spendable, lines = budget.training_seconds(), []
    least = {name: FEWEST_STEPS * budget.entries[name].pace.step for name in left}
    shares = {name: sizes.SHARES[name] for name in left}
    total = 0.0
    for name in left:
        entry = budget.entries[name]
        seconds = max(spendable * shares[name] / sum(shares.values()), least[name])
        total += seconds
        steps = entry.steps or int(seconds / entry.pace.step)
        lines.append(
            f"  {name:<9} about {seconds / 60:5.1f} min, {steps:,} steps,"
            f" {steps * entry.pace.batch_size:,} examples"
        )
    minutes = (total + budget.aside()) / 60
    say("", f"to do, in about {minutes:.1f} more minutes:", *lines)
    say(
        "  figures, previews and the page take the rest; every fifth of a stage leaves a preview",
        f"  in {out}/STAGE/previews; stop it whenever you like: the same command goes on",
    )
    if total > max(spendable, 0.0) + 1.0:
        enough = math.ceil(2 * (budget.spent + budget.aside()) / 60)  # half of it for steps
        smaller = "" if budget.size == "tiny" else ", or another --out with --size tiny"
        say(
            f"note: {budget.minutes:g} minutes are too few for size {budget.size} on this machine:"
            f" stages train {FEWEST_STEPS} steps all the same, and draw nothing to speak of; give"
            f" --minutes {enough} or more{smaller}"
        )


def _train(name: str, budget: Budget, found: Found, out: Path, step_fn: StepFn | None) -> None:
    """Train a stage, or go on with it."""
    began, workdir = time.monotonic(), out / name
    kept = (path.name for path in (workdir / "checkpoints").glob("*"))
    trained = max((int(step) for step in kept if step.isdecimal()), default=0)
    entry = budget.entries[name]
    if not entry.steps:
        budget.settle(name, trained)
        budget.write(out)
    behind = entry.seconds * max(0, trained - entry.base) / (entry.steps - entry.base)
    ahead = entry.seconds - behind
    say("", f"== {name}: to step {entry.steps:,}, about {ahead / 60:.1f} minutes")
    config = sizes.config(name, budget.size, found, out, entry.steps, entry.pace.step)
    prepared = prepare.prepare(config)
    deadline = time.monotonic() + PATIENCE * ahead
    try:
        state = loop.train(
            loss_fn=prepared.loss,
            init_params=prepared.init_params,
            batches=prepared.batches(),
            config=prepared.train,
            workdir=workdir,
            description=prepared.description,
            complete=prepared.complete,
            mesh=prepared.mesh,
            evaluate=prepared.evaluate,
            preview=prepared.preview,
            export=functools.partial(prepared.save, workdir),
            step_fn=step_fn,
            ends=lambda step: step >= entry.base + FEWEST_STEPS and time.monotonic() > deadline,
        )
    except NotFinite as error:
        raise UserError(
            f"{name}: the loss or its gradient is not finite, so training stopped; look at"
            f" {workdir / 'previews'}, and for odd pictures in {found.data.name}; another --out"
            " begins anew"
        ) from error
    entry.done, entry.steps = True, int(state.step)
    budget.spent += behind + time.monotonic() - began
    budget.write(out)
