"""FLOPs counted before compilation, against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from unclip_jax.errors import UserError
from unclip_jax.parallel import flops


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, jnp.float32)


def matmul(x, w):
    return x @ w


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_a_matrix_product_is_two_m_k_n():
    assert flops.count(matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7


def test_batched_products_count_for_every_member():
    attend = lambda q, k: jnp.einsum("bnlk,bnmk->bnlm", q, k)  # noqa: E731
    assert flops.count(attend, shape(2, 3, 5, 7), shape(2, 3, 11, 7)) == 2 * 2 * 3 * 5 * 11 * 7


def test_a_convolution_and_both_its_gradients_cost_the_same():
    x, kernel = shape(2, 8, 8, 3), shape(3, 3, 3, 5)
    one = 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    assert flops.count(convolve, x, kernel) == one
    both = jax.grad(lambda x, k: (convolve(x, k) ** 2).sum(), argnums=(0, 1))
    assert flops.count(both, x, kernel) == 3 * one


def test_grouped_convolutions_cost_their_groups():
    def depthwise(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", feature_group_count=6,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    assert flops.count(depthwise, shape(1, 4, 4, 6), shape(3, 3, 1, 6)) == 2 * (4 * 4 * 6) * 9


def test_zeros_between_the_inputs_of_a_strided_convolutions_gradient_cost_nothing():
    def halve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((0, 0), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, kernel = shape(1, 8, 8, 3), shape(2, 2, 3, 5)
    one = flops.count(halve, x, kernel)
    assert one == 2 * (4 * 4 * 5) * (2 * 2 * 3)
    back = jax.grad(lambda x, k: halve(x, k).sum())
    assert flops.count(back, x, kernel) == 2 * one  # forward, and the input's gradient


def test_a_scan_counts_its_body_as_often_as_it_runs():
    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    one = 2 * 4 * 6 * 6
    assert flops.count(layers, shape(4, 6), shape(9, 6, 6)) == 9 * one
    nested = lambda x, ws: jax.lax.scan(lambda x, _: (layers(x, ws), None), x, None, 5)[0]  # noqa: E731
    assert flops.count(nested, shape(4, 6), shape(9, 6, 6)) == 5 * 9 * one


@pytest.mark.parametrize(("keep", "products"), [(False, 3), (True, 4)])
def test_recomputation_is_one_forward_pass_more(keep, products):
    def block(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w)

    block = jax.checkpoint(block) if keep else block
    back = jax.grad(lambda x, w: block(x, w).sum(), argnums=(0, 1))
    counted = flops.count(back, shape(4, 6), shape(6, 6)) / (2 * 4 * 6 * 6)
    # The last product of the recomputation gives its argument to sin's derivative: both run again.
    assert counted == 2 * products


def test_of_branches_the_dearest_counts():
    def either(p, x, w):
        return jax.lax.cond(p, lambda: x @ w, lambda: x)

    assert flops.count(either, jax.ShapeDtypeStruct((), bool), shape(4, 4), shape(4, 4)) == 128


def test_functions_with_derivatives_of_their_own_count_once():
    assert flops.count(jax.nn.silu, shape(4)) == 0
    assert flops.count(jax.jit(lambda x: jax.nn.relu(x @ x)), shape(4, 4)) == 128


def test_a_loop_of_unknown_length_is_an_error():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    with pytest.raises(UserError, match=r"while loop .* use jax\.lax\.scan"):
        flops.count(until, shape(4, 4))


def test_what_devices_compute_apart_is_counted_for_all_of_them():
    mesh = AbstractMesh((2, 3), ("a", "b"))
    rows = jax.shard_map(matmul, mesh=mesh, in_specs=(P(("a", "b")), P()), out_specs=P(("a", "b")))
    assert flops.count(rows, shape(6, 5), shape(5, 7)) == 2 * 6 * 5 * 7


# A step of training


def frozen_then_kept(params, x):
    return jnp.tanh(jnp.tanh(x @ params["frozen"]) @ params["network"])


def frozen_then_trained(params, x):
    return frozen_then_kept(params, x).sum()


PARAMS = {"frozen": shape(5, 7), "network": shape(7, 11)}
FROZEN, TRAINED = 2 * 3 * 5 * 7, 2 * 3 * 7 * 11


def of_training(loss, params=PARAMS, **settings):
    return flops.of_training(loss, params, shape(3, 5), trained={"network": None}, **settings)


def test_what_is_trained_counts_three_times_and_what_is_constant_once():
    assert of_training(frozen_then_trained) == FROZEN + 3 * TRAINED
    assert of_training(frozen_then_trained, times=2) == FROZEN + 2 * TRAINED
    first = lambda params, x: ((x @ params["network"]) @ params["frozen"]).sum()  # noqa: E731
    params = {"network": shape(5, 7), "frozen": shape(7, 11)}
    assert of_training(first, params) == 3 * (FROZEN + TRAINED), "what is behind it, too"
    assert flops.of_training(frozen_then_trained, PARAMS, shape(3, 5), trained=PARAMS) == (
        3 * (FROZEN + TRAINED)
    )


@jax.custom_vjp
def own_rule(params, x):
    return frozen_then_trained(params, x)


own_rule.defvjp(lambda params, x: (own_rule(params, x), None), lambda _, g: (None, None))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: own_rule])
def test_a_call_is_looked_into(wrap):
    wrapped = wrap(frozen_then_trained)
    assert of_training(lambda params, x: wrapped(params, x)) == FROZEN + 3 * TRAINED


def test_what_devices_compute_apart_depends_for_all_of_them():
    mesh = AbstractMesh((2, 3), ("a", "b"))
    rows = P(("a", "b"))
    apart = jax.shard_map(frozen_then_kept, mesh=mesh, in_specs=(P(), rows), out_specs=rows)
    found = flops.of_training(
        lambda params, x: apart(params, x).sum(), PARAMS, shape(6, 5), trained={"network": None}
    )
    assert found == 2 * (FROZEN + 3 * TRAINED)


def test_what_a_gradient_does_not_pass_is_constant():
    def stopped(params, x):
        h = jax.lax.stop_gradient(x @ params["network"])
        return (h @ params["frozen"]).sum()

    params = {"network": shape(5, 7), "frozen": shape(7, 11)}
    assert of_training(stopped, params) == 3 * FROZEN + TRAINED


def test_a_loop_depends_from_the_turn_on_that_brings_it():
    """The carry is constant at first; a constant of the body that no turn mixes in stays so."""

    def loss(params, x):
        def turn(h, _):
            aside = (x @ params["frozen"]).sum()
            return jnp.tanh(h @ params["network"]), aside

        h, aside = jax.lax.scan(turn, jnp.ones((3, 7)), length=4)
        return h.sum() + aside.sum()

    params = {"frozen": shape(5, 9), "network": shape(7, 7)}
    assert of_training(loss, params) == 4 * (2 * 3 * 5 * 9 + 3 * 2 * 3 * 7 * 7)


def test_of_branches_that_depend_the_dearest_counts():
    def loss(params, x):
        h = x @ params["frozen"]
        return jax.lax.cond(x.sum() > 0, lambda: (h @ params["network"]).sum(), lambda: h.sum())

    assert of_training(loss) == FROZEN + 3 * TRAINED
