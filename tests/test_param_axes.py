"""One table says what the axes of params are: sharding, Muon and LoRA take it from there."""

import dataclasses
import importlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from tests.test_sharding import CONFIGS, NEED_INIT
from unclip_jax import stages
from unclip_jax.common.params import flatten
from unclip_jax.errors import UserError
from unclip_jax.models.convolution import Conv
from unclip_jax.models.presets import KARLO_SUPER_RES
from unclip_jax.parallel import axes, sharding
from unclip_jax.training import lora, optimizers
from unclip_jax.training.optimizers import MatrixAxes

AT_PIXELS = ("conv_in", "conv_out", "patches", "pixels", "narrow", "from_pixels", "to_pixels")


def stage_of(name: str) -> stages.Stage:
    if name == "karlo.super_res":
        return stages.UpsamplerStage(model=KARLO_SUPER_RES, low_size=64, last_steps=1)
    return stages.build(importlib.import_module(name).get_config().stage.to_dict())


def network_and_layers(stage: stages.Stage) -> tuple[dict, dict]:
    """The shapes of a stage's network, and of each kernel's layer over how many axes it sums and
    how many it makes, by its own attributes."""
    layers = {}

    def watch(call, args, kwargs, context):
        layer, count = context.module, lambda part: len(part) if isinstance(part, tuple) else 1
        if isinstance(layer, nn.DenseGeneral):
            layers["/".join(layer.path)] = count(layer.axis), count(layer.features)
        elif isinstance(layer, nn.Dense):
            layers["/".join(layer.path)] = 1, 1
        elif isinstance(layer, nn.Conv | Conv):
            layers["/".join(layer.path)] = 3, 1
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        made = jax.eval_shape(stage.init, jax.random.key(0))
    for path in flatten(made.get("canvas", {}).get("network", {})):  # frozen, in a decoder
        layers.pop(path.removesuffix("/kernel"), None)
    return made["network"], layers


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in NEED_INIT] + ["karlo.super_res"])
def test_sharding_muon_and_lora_see_every_param_as_its_layer_does(name):
    network, layers = network_and_layers(stage_of(name))
    found = jax.tree_util.tree_leaves_with_path(
        optimizers.matrix_axes({"network": network}),
        is_leaf=lambda x: x is None or isinstance(x, MatrixAxes),
    )
    matrices = {"/".join(key.key for key in path[1:]): matrix for path, matrix in found}
    for path, leaf in flatten(network).items():
        shape, keys = leaf.shape, ("network", *path.split("/"))
        names = axes.of_param(keys, len(shape)).names
        split = [n for n in names if axes.MESH_AXES[n]]
        assert len(names) == len(shape) and len(set(split)) == len(split), path
        stack, own = shape[: "blocks" in keys], shape["blocks" in keys :]
        inputs, outputs = layers.pop(path.removesuffix("/kernel"), (0, 0))
        if not path.endswith("/kernel"):
            assert lora.matrix_shape(path, shape, True) is matrices[path] is None, path
            continue
        assert inputs + outputs == len(own), path
        rows, columns = math.prod(own[:inputs]), math.prod(own[inputs:])
        assert lora.matrix_shape(path, shape, True) == (*stack, rows, columns), path
        assert (lora.matrix_shape(path, shape) is None) == (inputs == 3), path
        # Of three axes that a layer makes, the first counts projections: matrices of their own.
        apart = own[inputs] if outputs == 3 else 1
        assert (matrices[path] is None) == (keys[-2] in AT_PIXELS), path
        if matrices[path] is not None:
            sizes = [math.prod(shape[axis] for axis in part) for part in matrices[path]]
            assert sizes == [rows, columns // apart], path
    assert not layers


def test_the_pool_of_a_classifier_reads_all_features_into_keys_and_values():
    """Muon took it for two matrices of [64, 64], LoRA for one of [256, 32]."""
    path, shape = "pool/key_value/kernel", (64, 2, 2, 32)
    assert lora.matrix_shape(path, shape) == (64, 128)
    kernel = {"network": {"pool": {"key_value": {"kernel": jnp.zeros(shape)}}}}
    (matrix,) = jax.tree.leaves(
        optimizers.matrix_axes(kernel), is_leaf=lambda x: isinstance(x, MatrixAxes)
    )
    assert matrix == MatrixAxes((0,), (2, 3))


# ---------------------------------------------------------------- a param that no row is for


class Gated(nn.Module):
    """A user's own network: where the prior's Transformer was, a layer that no row is for."""

    @nn.compact
    def __call__(self, z_noised, t, z_t, text, text_mask):
        gate = nn.DenseGeneral((4, 4), use_bias=False, name="gate")(z_noised)
        return nn.Dense(z_noised.shape[-1], name="out")(gate.reshape(len(gate), 16))


class GatedStage(stages.PriorStage):
    """A prior with that network."""

    @property
    def network(self):
        return Gated()


NO_ROW = (
    r"param 'network/gate/kernel' with 3 axes: no row of parallel\.axes\.PARAM_AXES says what they"
    " are; add one"
)


def test_a_param_without_a_row_is_an_error_at_init_on_one_device():
    stage = GatedStage(
        **{f.name: getattr(tiny.PRIOR, f.name) for f in dataclasses.fields(tiny.PRIOR)}
    )
    with pytest.raises(UserError, match=NO_ROW):
        stage.init(jax.random.key(0))


def test_nor_do_loading_and_training_take_one():
    """Whatever made the params, and on whatever mesh."""
    params = {"network": {"gate": {"kernel": jnp.zeros((8, 4, 4))}}}
    with pytest.raises(UserError, match=NO_ROW):
        sharding.tree_shardings(params, sharding.make_mesh())
    with pytest.raises(UserError, match=NO_ROW):
        optimizers.matrix_axes(params)
    with pytest.raises(UserError, match="gate/kernel"):
        lora.matrix_shape("gate/kernel", (8, 4, 4))


@pytest.mark.parametrize("row", ["embed -> fused heads head", "window window pixel -> embed"])
def test_every_view_follows_from_a_row_that_is_added(monkeypatch, row):
    monkeypatch.setitem(axes.PARAM_AXES, "gate/kernel", row)
    shape = (8, 2, 4, 4)
    kernel = {"network": {"gate": {"kernel": jnp.zeros(shape)}}}
    (matrix,) = jax.tree.leaves(
        optimizers.matrix_axes(kernel)["network"]["gate"]["kernel"] or "none",
        is_leaf=lambda x: isinstance(x, MatrixAxes),
    )
    if "pixel" in row:
        assert matrix == "none" and lora.matrix_shape("gate/kernel", shape) is None
        assert lora.matrix_shape("gate/kernel", shape, True) == (64, 4)
    else:
        assert matrix == MatrixAxes((0,), (2, 3))
        assert lora.matrix_shape("gate/kernel", shape) == (8, 32)
