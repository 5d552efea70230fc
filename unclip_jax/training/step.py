"""One step of training, compiled, and the averages of what steps measure.

The step is a pure function of the state and the batch, whatever the stage: the stage's part in it
is a loss function.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from jax.sharding import Mesh

from unclip_jax.parallel import axes, sharding
from unclip_jax.stages.base import JointLoss
from unclip_jax.training import ema, sam
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.optimizers import Params, learning_rate, stored, trained

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]
StepFn = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]

# Metrics of the step itself; a loss function names its own otherwise.
OWN_METRICS = ("loss", "grad_norm", "param_norm", "learning_rate", "finite", "step")

_EMA = np.iinfo(np.uint32).max  # folded into a step's key, for the rounding of the average
_NEVER = np.iinfo(np.int32).max

# Compiling took 12 times as long as tracing for configs/emoji/clip, on two CPU cores.
COMPILING_PER_TRACING = 12.0

# Drawing takes 80 ns a param where the compiler did not optimise, 23 ns where it did for 10 s more.
_FEW = 200_000_000
_HASTE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: steps done, int32 scalar.
        params: all of a stage's, of which `optimizers.trained` names what a step moves.
        ema_params: the exponential moving average of what is trained, in `ema_dtype`.
        opt_state: the optimizer's, of what is trained.
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState

    @property
    def averaged(self) -> Params:
        """All params, with the average, as float32, in place of what is trained."""
        return self.params | jax.tree.map(lambda p: p.astype(jnp.float32), self.ema_params)


def random_params(init: Callable[[jax.Array], Params], key: jax.Array) -> Params:
    """`init(key)` as one compiled program, in the host's memory.

    Uncompiled, Flax would compile every operation of a network's forward pass apart. The program
    runs once: for few params it is compiled in haste, as drawing them is faster than optimising.
    """
    key = jax.device_put(key, sharding.host_device())
    lowered = jax.jit(init).lower(key)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(lowered.out_info))
    return lowered.compile(_HASTE if count < _FEW else None)(key)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, ema_dtype: str = "float32"
) -> TrainState:
    """The state before the first step. Params are copied, since a step consumes its state."""
    weights = trained(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(lambda p: jnp.array(p, copy=True), params),
        ema_params=jax.tree.map(lambda p: jnp.array(p, ema_dtype, copy=True), weights),
        opt_state=optimizer.init(weights),
    )


def sharded_state(
    params: Params, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> TrainState:
    """`init_state`, of params that every process has, on a mesh: no device holds but its part."""
    init = functools.partial(init_state, optimizer=optimizer, ema_dtype=config.ema_dtype)
    shapes = state_shapes(params, optimizer, config, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(init, out_shardings=where)(sharding.place(params, where.params))


def state_shapes(
    params: Params, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of what `sharded_state` makes; no device holds anything."""
    init = functools.partial(init_state, optimizer=optimizer, ema_dtype=config.ema_dtype)
    return placed(jax.eval_shape(init, params), mesh)


def placed(shapes: Any, mesh: Mesh) -> Any:
    """The shapes of params, or of a state of them, with their places on a mesh."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> StepFn:
    """Compile one step: (state, batch) -> (state, metrics). The given state is consumed.

    With `grad_accum` the loss is the mean over microbatches, a `JointLoss` that of the whole batch.
    With `sam_rho` the gradient is that of sharpness-aware minimisation, see `sam`.

    The metrics are float32 scalars: the loss function's own, and `loss`, `grad_norm` (before
    clipping), `param_norm` (after the update), `learning_rate`, `finite` (0 or 1) and `step`. If
    the loss, the gradient's norm or the new params' norm is not finite, params, average and
    optimizer keep their old values, and only the step number moves on.
    """
    rate = learning_rate(config)

    def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        weights = trained(state.params)

        def whole(weights: Params) -> Params:
            return state.params | weights

        def loss_of(weights: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
            return loss_fn(whole(weights), batch, key)

        def gradients(weights: Params) -> tuple[jax.Array, Metrics, Params]:
            with axes.on(mesh):
                if isinstance(loss_fn, JointLoss) and config.grad_accum > 1:
                    loss = loss_fn.of(whole)
                    return _joint_gradients(loss, config.grad_accum, mesh, weights, batch)
                return _gradients(loss_of, config.grad_accum, mesh, weights, batch, key)

        loss, own, grads = gradients(weights)
        if config.sam_rho:
            grads = sam.gradient(gradients, weights, grads, config.sam_rho)
        updates, opt_state = optimizer.update(grads, state.opt_state, weights)
        moved = optax.apply_updates(weights, updates)
        ema_params = ema.average(state.ema_params, moved, ema.decay(config, state.step))
        ema_params = stored(jax.random.fold_in(key, _EMA), ema_params, config.ema_dtype)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(moved)}
        finite = jnp.all(jnp.isfinite(jnp.stack([loss, *norms.values()])))
        weights, ema_params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (moved, ema_params, opt_state),
            (weights, state.ema_params, state.opt_state),
        )
        kept = state
        state = TrainState(state.step + 1, state.params | weights, ema_params, opt_state)
        own |= {"loss": loss, **norms, "learning_rate": rate(kept.step), "finite": finite}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in own.items()}
        return jax.lax.with_sharding_constraint(
            (state, metrics | {"step": state.step}),
            (sharding.tree_shardings(state, mesh), sharding.replicated(mesh)),
        )

    return jax.jit(step_fn, donate_argnums=0)


def about_to_compile(step_fn: StepFn, state: TrainState, batch: Batch) -> float:
    """About how many seconds the first step will take to compile, where no cache has it.

    Tracing is not done twice: the first step finds what was traced here.
    """
    began = time.perf_counter()
    step_fn.trace(state, batch)
    return COMPILING_PER_TRACING * (time.perf_counter() - began)


def _gradients(
    loss_fn: LossFn, microbatches: int, mesh: Mesh, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics, Params]:
    """Loss, own metrics and gradient, each the mean over the microbatches.

    Microbatch i draws from `fold_in(key, i)`.
    """

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        value, own = loss_fn(params, batch, key)
        return value.astype(jnp.float32), _checked(own)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        (value, own), grads = value_and_grad(params, batch, key)
        return value, own, _like_params(grads, mesh)

    def add(total: Any, inputs: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        i, microbatch = inputs
        part, grads = value_and_grad(params, microbatch, jax.random.fold_in(key, i))
        part = (part, _like_params(grads, mesh))
        return jax.tree.map(lambda t, x: t + jnp.asarray(x, jnp.float32), total, part), None

    stacked = _microbatches(batch, microbatches, mesh)
    first = jax.tree.map(lambda x: x[0], stacked)
    shapes = jax.eval_shape(value_and_grad, params, first, key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(add, zero, (jnp.arange(microbatches), stacked))
    (value, own), grads = jax.tree.map(lambda x: x / microbatches, total)
    return value, own, grads


def _joint_gradients(
    loss_fn: JointLoss, microbatches: int, mesh: Mesh, params: Params, batch: Batch
) -> tuple[jax.Array, Metrics, Params]:
    """Loss, own metrics and gradient of the whole batch, whose rows are computed part by part.

    In two passes (GradCache, Gao et al. 2021, arXiv 2101.06983): the first keeps what the network
    makes of each row and nothing else; from that come the loss and its gradient by every row; the
    second computes the microbatches again, each with its rows' gradients. To rounding the result is
    that without microbatches, and memory is that of one, the rows' embeddings and their comparison.
    """
    stacked = _microbatches(batch, microbatches, mesh)

    def read(carry: None, microbatch: Batch) -> tuple[None, Any]:
        return None, loss_fn.rows(params, microbatch)

    def together(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, sharding.batch_sharding(mesh))

    made, told = jax.tree.map(together, jax.lax.scan(read, None, stacked)[1])

    def loss(params: Params, made: Any) -> tuple[jax.Array, Metrics]:
        value, own = loss_fn.together(params, made, told)
        return value.astype(jnp.float32), _checked(own)

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, own), (grads, by_row) = both(params, made)

    def add(total: Params, inputs: tuple[Batch, Any]) -> tuple[Params, None]:
        microbatch, by_row = inputs
        _, back = jax.vjp(lambda params: loss_fn.rows(params, microbatch)[0], params)
        part = _like_params(back(by_row)[0], mesh)
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, part), None

    grads = jax.tree.map(lambda g: g.astype(jnp.float32), _like_params(grads, mesh))
    parts = (stacked, _microbatches(by_row, microbatches, mesh))
    grads, _ = jax.lax.scan(add, grads, parts)
    return value, own, grads


def _microbatches(batch: Any, count: int, mesh: Mesh) -> Any:
    """Arrays [b, ...] as [count, b / count, ...].

    Microbatch i takes every `count`-th example from the i-th on, so that the rows of each one are
    spread over the devices as the batch's rows are.
    """

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(x, sharding.microbatch_sharding(mesh))

    return jax.tree.map(split, batch)


def _checked(own: Metrics) -> Metrics:
    """What a loss measures; ValueError where a name is the step's own."""
    taken = sorted(set(own) & set(OWN_METRICS))
    if taken:
        raise ValueError(f"metrics {taken} are the loop's own; name the loss's otherwise")
    return own


def _like_params(grads: Params, mesh: Mesh) -> Params:
    """Gradients where their params are: each device receives the sum of its own part alone."""
    return jax.lax.with_sharding_constraint(grads, sharding.tree_shardings(grads, mesh))


# Of metrics that are averaged, or of which the last counts (a dict, as a clu `Collection` takes
# Python identifiers only); and the first step that was not finite, int32.
Window = tuple[dict[str, clu_metrics.Metric], jax.Array]


@jax.jit
def open_window(metrics: Metrics) -> Window:
    """Begin to average over steps."""
    window: dict[str, clu_metrics.Metric] = {
        name: clu_metrics.Average.from_model_output(value)
        for name, value in metrics.items()
        if name not in ("finite", "step", "learning_rate", "param_norm")
    }
    for name in ("learning_rate", "param_norm"):
        window[name] = clu_metrics.LastValue.from_model_output(metrics[name])
    return window, jnp.where(metrics["finite"] > 0, _NEVER, metrics["step"])


@jax.jit
def merge_windows(first: Window, second: Window) -> Window:
    """The averages over both; the last values are the second's."""
    merged = {name: metric.merge(second[0][name]) for name, metric in first[0].items()}
    return merged, jnp.minimum(first[1], second[1])


def read_window(window: Window) -> tuple[dict[str, float], int | None]:
    """The averages, and the first step that was not finite. Waits for the devices."""
    computed = {name: metric.compute() for name, metric in window[0].items()}
    values, bad_step = jax.device_get((computed, window[1]))
    names = [name for name in OWN_METRICS if name in values]
    names += sorted(values.keys() - names)
    averages = {f"train/{name}": float(values[name]) for name in names}
    return averages, None if bad_step == _NEVER else int(bad_step)
