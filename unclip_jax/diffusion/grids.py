"""Grids: at which times of a noise process a sampler asks the network.

`spacing`, of `Sampling` and `Diffusion.process`, is one of

    ""            every step of training
    20, "20"      so many, evenly in t, both ends included
    "25,25,25"    so many in each of equal sections, the cleanest first
    "ddim25"      an integer stride from timestep 0
    "RULE:20"     so many by a rule of `RULES`; "karras:20:5" and "beta:20:0.6:0.6" set its numbers
    (999, 0)      times of your own, rising or falling, as the network counts them; also an array

Where the network is given whole timesteps (`Diffusion.continuous` is False, and the process is of
betas), times are rounded to distinct ones.
"""

from __future__ import annotations

import functools
import numbers
import re
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion.schedules import (
    Process,
    Schedule,
    levels,
    levels_at,
    process_at,
    times_at,
    times_of,
)
from unclip_jax.errors import wrong

Spacing = str | int | tuple[float, ...]

# Noise over signal, the noisiest first: "Align your steps" (arXiv 2404.14507), for ten steps.
AYS = {
    "ays-sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays-svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}

RULES = {
    "even": (),  # in t, both ends included
    "leading": (0.0,),  # multiples of steps // n, from the cleanest step, moved by its number
    "trailing": (),  # in t, from the noisiest step
    "logsnr": (),  # in log SNR, both ends included
    "exponential": (),  # the same, under k-diffusion's name
    "karras": (7.0,),  # in sigma^(1/rho) (arXiv 2206.00364, eq. 5), both ends included
    "beta": (0.6, 0.6),  # t by the quantiles of a Beta distribution (arXiv 2407.12173)
    **{name: () for name in AYS},
}
EXPECTED = (
    'an integer, "" (every step), "250", "25,25,25", "ddim25", a rule and its number of steps'
    f' such as "karras:20" (rules: {", ".join(RULES)}), or a tuple of timesteps'
)
BY_RATIO = ("logsnr", "exponential", "karras", *AYS)


class Rule(NamedTuple):
    """A rule, read: its name, the number of steps, and its own numbers."""

    name: str
    count: int
    numbers: tuple[float, ...]


def read(spacing: Any) -> Spacing:
    """A spacing in the form that is kept: hashable, and checked as far as it can be alone.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(spacing, str):
        _rule(spacing)
        return spacing
    if isinstance(spacing, numbers.Integral) and not isinstance(spacing, bool):
        return checks.count("spacing", spacing)
    try:
        times = np.asarray(spacing, np.float64)
    except Exception:
        raise wrong("spacing", spacing, EXPECTED) from None
    if isinstance(spacing, bool | numbers.Real) or times.ndim != 1 or not len(times):
        raise wrong("spacing", spacing, EXPECTED)
    steps = np.diff(times)
    if not np.all(np.isfinite(times)) or times.min() < 0 or not (all(steps > 0) or all(steps < 0)):
        raise wrong("spacing", spacing, "times, 0 or more, that all rise or all fall")
    return tuple(int(t) if t.is_integer() else t for t in times.tolist())


def _rule(spacing: str) -> Rule | None:
    """The rule that a string names; None for the forms without one."""
    if re.fullmatch(r"|ddim[0-9]+|[0-9]+(,[0-9]+)*", spacing):
        return None
    name, *given = spacing.split(":")
    try:
        count, values = int(given[0]), tuple(map(float, given[1:]))
        usual = RULES[name]
        fits = (
            given[0].isdigit()
            and count >= 1
            and len(values) <= len(usual)
            and all(0 < v < np.inf for v in values)
        )
    except (IndexError, KeyError, ValueError):
        fits = False
    if not fits:
        near = re.fullmatch(r"([a-z]+)([0-9]+)", spacing)
        do = f'write "{near[1]}:{near[2]}"' if near and near[1] in RULES else ""
        raise wrong("spacing", spacing, EXPECTED, do)
    return Rule(name, count, values + usual[len(values) :])


def respaced(kept: Spacing, steps: Spacing) -> Spacing:
    """What `steps` asks for where `kept` is the grid: a number alone keeps a "leading" one's rule.

    Public models are trained to be asked at those timesteps, such as 1, 11, ..., 991.
    """
    rule = _rule(kept) if isinstance(kept, str) else None
    if rule is None or rule.name != "leading" or not str(steps).isdigit():
        return steps
    return f"leading:{steps}" + (f":{rule.numbers[0]:g}" if rule.numbers[0] else "")


def even_in_time(spacing: Spacing) -> bool:
    """Whether steps are even in whole timesteps, so that log SNR jumps at the clean end."""
    if isinstance(spacing, str):
        rule = _rule(spacing)
        return rule is None or rule.name in ("even", "leading", "trailing")
    return isinstance(spacing, int)


@functools.lru_cache(maxsize=256)
def tables(
    schedule: Schedule,
    steps: int,
    spacing: Spacing = "",
    continuous: bool = False,
    dtype: Any = np.float32,
) -> Process:
    """The process at the kept times.

    Args:
        schedule: the noise process.
        steps: length of the whole process.
        spacing: as `read` gives it.
        continuous: whether the network takes times between whole timesteps.
        dtype: of the tables.

    Raises:
        UserError: the spacing asks for more steps, or for other times, than there are.
    """
    whole = schedule.family == "betas" and not continuous
    if isinstance(spacing, tuple):
        times = _own(schedule, steps, spacing, whole)
    else:
        times = _kept(schedule, steps, str(spacing), whole)
    if schedule.family == "betas" and levels(schedule, steps).alpha_bar[-1] == 0:
        last = steps - 1
        if np.any((last - 1 < times) & (times < last)):
            expected = f"none between {last - 1} and {last}, where log SNR falls without end"
            raise wrong("spacing", spacing, expected)
    preserving = schedule.family == "betas"
    return process_at(times, *levels_at(schedule, steps, times), preserving, dtype)


def _own(schedule: Schedule, steps: int, given: tuple[float, ...], whole: bool) -> np.ndarray:
    """Times of the caller's own, rising."""
    times = np.sort(np.asarray(given, np.float64))
    if whole:
        if times[-1] > steps - 1 or np.any(times % 1):
            raise wrong("spacing", given, f"whole timesteps from 0 to {steps - 1}")
        return times.astype(np.int32)
    if schedule.family == "betas":
        if times[-1] > steps - 1:
            raise wrong("spacing", given, f"times from 0 to {steps - 1}")
        return times
    times = times[times > 0]  # 0 is the data, where the walk ends anyway
    if not len(times) or (schedule.family == "flow" and times[-1] > 1):
        expected = "sigmas above 0" if schedule.family == "sigmas" else "times above 0, to 1"
        raise wrong("spacing", given, expected)
    return times


def _kept(schedule: Schedule, steps: int, spacing: str, whole: bool) -> np.ndarray:
    """The times that a spacing in words keeps, rising."""
    rule = _rule(spacing)
    if rule is None and spacing.isdigit() and not whole:
        rule = Rule("even", int(spacing), ())
    if rule is None:
        positions = spaced_timesteps(steps, spacing)
        return positions if whole else times_at(schedule, steps, positions)
    if (rule.count > steps and (whole or rule.name == "leading")) or rule.count < 1:
        raise wrong("spacing", spacing, f"1 to {steps} steps")
    if rule.name in BY_RATIO:
        times = _by_ratio(schedule, steps, rule)
    else:
        times = times_at(schedule, steps, _positions(steps, rule, whole))
    if whole:
        return _distinct(times, steps)
    if np.any(np.diff(times) <= 0):
        ends = "sigma/alpha of the process, {:.3g} to {:.3g}".format(
            *levels(schedule, steps).ratio[[0, -1]]
        )
        raise wrong("spacing", spacing, f"a rule whose levels are apart within {ends}")
    return times


def _positions(steps: int, rule: Rule, whole: bool) -> np.ndarray:
    """Positions from 0 to steps - 1, rising, float64 `[count]`."""
    n = rule.count
    if rule.name == "leading":
        found = np.arange(n) * float(steps // n) + rule.numbers[0]
        if found[-1] > steps - 1:
            given = ":".join(["leading", str(n), f"{rule.numbers[0]:g}"])
            raise wrong("spacing", given, f"timesteps from 0 to {steps - 1}")
        return found
    if rule.name == "trailing":
        found = steps * np.arange(1, n + 1) / n
        return (np.round(found) if whole else found) - 1
    if rule.name == "beta":
        from scipy import stats  # takes a moment, and is asked for seldom

        return stats.beta.ppf(np.arange(1, n + 1) / n, *rule.numbers) * (steps - 1)
    return np.linspace(0, steps - 1, n) if n > 1 else np.array([steps - 1.0])


def _by_ratio(schedule: Schedule, steps: int, rule: Rule) -> np.ndarray:
    """Times at which sigma / alpha follows a rule between the process's two ends.

    Where the noisiest level holds no signal, it is the first step, and the rule gives the others
    from the next level of training on.
    """
    whole, n = levels(schedule, steps), rule.count
    ratio, end = whole.ratio, whole.times[-1:]
    if endless := np.isinf(ratio[-1]):
        ratio, n = ratio[:-1], n - 1
        if not n or not len(ratio):
            return end
    low, high = ratio[0], ratio[-1]
    along = np.linspace(0, 1, n) if n > 1 else np.ones(1)
    if rule.name in AYS:
        known = np.log(AYS[rule.name][::-1])
        found = np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(known)), known))
        values = np.clip(np.append(found[1:-1], high), low, high)
    elif rule.name == "karras":
        root = 1 / rule.numbers[0]
        values = (low**root + along * (high**root - low**root)) ** (1 / root)
    else:
        values = low * (high / low) ** along
    times = times_of(schedule, steps, values)
    return np.append(times, end) if endless else times


def _distinct(times: np.ndarray, steps: int) -> np.ndarray:
    """Rounded to whole timesteps, int32, those that coincide moved apart."""
    count = np.arange(len(times))
    apart = np.maximum.accumulate(np.round(times).astype(np.int32) - count)
    return (np.minimum(apart, steps - len(times)) + count).astype(np.int32)


def spaced_timesteps(steps: int, spacing: str) -> np.ndarray:
    """The timesteps of a spacing without a rule, rising, int32 `[n]`.

    One section of n steps keeps round(i (size - 1) / (n - 1)); one step alone keeps the noisiest
    timestep of its section, because that is where sampling starts.

    Raises:
        UserError: it asks for more steps than there are.
    """
    if spacing == "":
        return np.arange(steps, dtype=np.int32)
    if spacing.startswith("ddim"):
        return _strided_timesteps(steps, int(spacing[4:]))
    counts = [int(count) for count in spacing.split(",")]
    sections = np.array_split(np.arange(steps, dtype=np.int32), len(counts))
    for count, section in zip(counts, sections, strict=True):
        if not 1 <= count <= len(section):
            most = len(section)
            expected = f"1 to {most} of each section's {most} timesteps ({steps} in all)"
            raise wrong("spacing", spacing, expected)
    return np.concatenate([_even(*pair) for pair in zip(sections, counts, strict=True)])


def _even(section: np.ndarray, count: int) -> np.ndarray:
    """So many timesteps of a section, evenly."""
    if count == 1:
        return section[-1:]
    return section[np.round(np.arange(count) * ((len(section) - 1) / (count - 1))).astype(np.int32)]


def _strided_timesteps(steps: int, count: int) -> np.ndarray:
    """Timesteps 0, s, 2s, ... for the smallest integer stride s that gives exactly `count`."""
    for stride in range(1, steps):
        if count > 1 and len(range(0, steps, stride)) == count:
            return np.arange(0, steps, stride, dtype=np.int32)
    raise wrong(
        "spacing",
        f"ddim{count}",
        f"a number, 2 or more, that an integer stride over {steps} timesteps keeps exactly",
        f'choose a divisor of {steps}, or spacing="{max(count, 1)}"',
    )
