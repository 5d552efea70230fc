"""FLOPs of a traced function, exactly: every loop's body as often as it runs.

Only matrix products and convolutions are counted, as is usual (Chowdhery et al. 2022,
arXiv 2204.02311, appendix B): a product of [m, k] and [k, n] is 2 m k n. What a backward pass
recomputes is in the traced function and so in the count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from unclip_jax.errors import UserError


def count(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of `function(*args)`; the arguments may be shapes.

    Raises:
        UserError: a loop has matrix products in it, and how often it runs is known only at run
            time.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_training(
    loss: Callable[..., Any], params: Any, *args: Any, trained: Any, times: int = 3
) -> int:
    """FLOPs of a loss and its gradient, of which nothing is recomputed.

    What depends on trained params counts `times`, once forward and twice backward as is usual
    (Chowdhery et al. 2022, appendix B); what does not, such as a frozen encoder, counts once.

    Args:
        loss: a function of the params and of `args`.
        params: arrays by their names, or their shapes.
        args: whatever else it takes, or the shapes.
        trained: those entries of `params` that training moves.
        times: 2 where a trained layer's kernel is frozen, as beside adapters.

    Raises:
        UserError: as `count`.
    """
    marks = {
        name: jax.tree.map(lambda _, n=name: n in trained, part) for name, part in params.items()
    }
    jaxpr = jax.make_jaxpr(loss)(params, *args).jaxpr
    marks = [*jax.tree.leaves(marks), *(False for _ in jax.tree.leaves(args))]
    return of_jaxpr(jaxpr) + (times - 1) * _depending(jaxpr, marks)[0]


def of_jaxpr(jaxpr: core.Jaxpr) -> int:
    """FLOPs of a jaxpr. Of a condition's branches, the dearest counts."""
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def sub_jaxprs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _of_equation(equation: core.JaxprEqn) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        return _of_product(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    inner = [of_jaxpr(jaxpr) for jaxpr in sub_jaxprs(equation)]
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise UserError(
            "FLOPs: a while loop has matrix products in it and no fixed number of turns; use"
            " jax.lax.scan"
        )
    if name.startswith("custom_") and inner:
        return inner[0]  # the function; its derivatives are traced where they are taken
    return _turns(equation) * sum(inner)


def _turns(equation: core.JaxprEqn) -> int:
    """How often the jaxpr of a call, a scan or a shard_map is computed."""
    if equation.primitive.name == "shard_map":  # its shapes are one device's
        sizes = equation.params["mesh"].shape
        return math.prod(sizes[axis] for axis in equation.params["newly_manual_axes"])
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _depending(jaxpr: core.Jaxpr, marks: Sequence[bool]) -> tuple[int, list[bool]]:
    """FLOPs of what depends on the marked arguments, and which results do."""
    marked = {variable for variable, mark in zip(jaxpr.invars, marks, strict=True) if mark}
    total = 0
    for equation in jaxpr.eqns:
        given = [not isinstance(v, core.Literal) and v in marked for v in equation.invars]
        if any(given):
            own, results = _depending_equation(equation, given)
            total += own
            marked |= {v for v, mark in zip(equation.outvars, results, strict=True) if mark}
    return total, [not isinstance(v, core.Literal) and v in marked for v in jaxpr.outvars]


def _depending_equation(equation: core.JaxprEqn, given: list[bool]) -> tuple[int, list[bool]]:
    """As `_depending`, of an equation with a marked argument; what is not looked into, whole."""
    name, inner = equation.primitive.name, list(sub_jaxprs(equation))
    results = [name != "stop_gradient"] * len(equation.outvars)
    if name == "cond" and not given[0]:
        found = [_depending(branch, given[1:]) for branch in inner]
        results = [any(marks) for marks in zip(*(marks for _, marks in found), strict=True)]
        return max(own for own, _ in found), results
    if name == "scan":
        first, count = equation.params["num_consts"], equation.params["num_carry"]
        while True:
            own, results = _depending(inner[0], given)
            carried = [
                a or b for a, b in zip(given[first : first + count], results[:count], strict=True)
            ]
            if carried == given[first : first + count]:
                return _turns(equation) * own, results
            given = [*given[:first], *carried, *given[first + count :]]
    if inner and name != "while" and len(inner[0].invars) == len(given):
        own, marks = _depending(inner[0], given)
        if len(marks) == len(results):
            return _turns(equation) * own, marks
    return _of_equation(equation), results


def _of_product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _of_convolution(equation: core.JaxprEqn) -> int:
    """Two FLOPs for each output and each element of the kernel that meets an input.

    Zeros count where padding or a dilated kernel brings them: an edge is as dear as the middle. Of
    a dilated input, the zeros in between do not.
    """
    kernel = equation.invars[1].aval.shape
    spec = equation.params["dimension_numbers"].rhs_spec  # (out, in, *space)
    taps = math.prod(kernel[i] for i in spec[1:])
    spread = math.prod(equation.params["lhs_dilation"])
    return 2 * math.prod(equation.outvars[0].aval.shape) * taps // spread


# FLOP/s of dense bfloat16 matrix products, by the beginning of a device's kind: as Google
# Cloud's and NVIDIA's pages have them. A device is what JAX calls one: half a chip on TPU7x.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(kind: str) -> float | None:
    """The peak of a device by its `device_kind`, FLOP/s; None for a kind that is not in `PEAKS`."""
    return next((rate for name, rate in PEAKS.items() if kind.startswith(name)), None)
