"""Meshes: what goes where, and that 8 devices compute what one does."""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests import sharded_run
from tests.xla_flags import xla_flags
from unclip_jax import stages
from unclip_jax.errors import UserError
from unclip_jax.parallel import sharding
from unclip_jax.parallel.sharding import MeshConfig

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
CONFIGS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in ROOT.glob("configs/*/*.py")
    if path.stem != "base"
)
NEED_INIT = ("configs.karlo.upsampler",)  # their sizes come from the weights they start from


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, 1, tensor), ("data", "fsdp", "spatial", "tensor"))


# What the axes of params are


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("configs.paper.")])
def test_the_papers_params_split_over_a_pod(name):
    """Over 8 x 4 devices nearly nothing is left whole, and what is left is small."""
    stage = stages.build(importlib.import_module(name).get_config().stage.to_dict())
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    tensor = 2 if name.endswith("ar_prior") else 4  # it has 26 heads
    mesh = mesh_of(fsdp=8, tensor=tensor)
    where = sharding.tree_shardings(shapes, mesh)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(where), strict=True)
    held = whole = 0
    for leaf, place in pairs:
        whole += leaf.size
        held += np.prod(place.shard_shape(leaf.shape), dtype=np.int64)
    assert held < whole / 7.5


def test_a_param_no_one_knows_is_named():
    tree = {"network": {"thing": {"strange": jnp.zeros((4, 4, 4))}}}
    with pytest.raises(UserError, match=r"param 'network/thing/strange' with 3 axes: no row"):
        sharding.tree_shardings(tree, mesh_of(fsdp=2))
    with pytest.raises(UserError, match="no row"):  # nothing is split, and yet it is an error
        sharding.tree_shardings(tree, mesh_of(data=4))


def test_an_axis_that_does_not_divide_is_named():
    tree = {"network": {"blocks": {"qkv": {"kernel": jnp.zeros((2, 12, 3, 6, 2))}}}}
    with pytest.raises(UserError, match=r"mesh\.tensor: got 4, expected a divisor of 6.*'heads'"):
        sharding.tree_shardings(tree, mesh_of(tensor=4))
    with pytest.raises(UserError, match=r"mesh\.fsdp: got 5, expected a divisor of 12.*'embed'"):
        sharding.tree_shardings(tree, mesh_of(fsdp=5))
    (place,) = jax.tree.leaves(sharding.tree_shardings(tree, mesh_of(fsdp=4, tensor=3)))
    assert place.shard_shape((2, 12, 3, 6, 2)) == (2, 3, 3, 2, 2)


def test_constants_adapters_and_scalars_stay_whole():
    tree = {
        "normalisation": {"components": jnp.zeros((8, 8))},
        "network": {"out": {"lora_a": jnp.zeros((3, 8, 4)), "lora_b": jnp.zeros((3, 4, 8))}},
        "base_network": {"up": {"kernel": jnp.zeros((8, 8))}},
    }
    where = sharding.tree_shardings((tree, jnp.zeros(())), mesh_of(fsdp=4, tensor=2))
    specs = jax.tree.map(lambda place: place.spec, where)
    assert specs[0]["base_network"]["up"]["kernel"] == PartitionSpec(("fsdp",), ("tensor",))
    assert specs[0]["normalisation"]["components"] == specs[1] == PartitionSpec()
    assert set(specs[0]["network"]["out"]["lora_a"]) == {None}


# Meshes


def test_meshes_take_what_is_left():
    assert MeshConfig().shape(8) == (8, 1, 1, 1)
    assert MeshConfig(data=2, fsdp=-1, tensor=2).shape(32) == (2, 8, 1, 2)
    assert MeshConfig(fsdp=2, spatial=4).shape(32) == (4, 2, 4, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp": 0}, r"mesh\.fsdp: got 0, expected a number of devices, or -1"),
        ({"tensor": 2.0}, r"mesh\.tensor: got 2\.0"),
        ({"fsdp": -1}, r"mesh: got data -1, fsdp -1, spatial 1, tensor 1, expected -1 for one"),
        ({"spatial": 2, "tensor": 2}, r"mesh: got .* expected spatial or tensor to be 1"),
        ({"data": 1, "spatial": -1, "tensor": 2}, r"expected spatial or tensor to be 1"),
    ],
)
def test_bad_meshes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**fields)


def test_a_mesh_that_does_not_fit_the_devices_is_named():
    for config in (MeshConfig(fsdp=3), MeshConfig(data=4), MeshConfig(data=16, fsdp=1)):
        with pytest.raises(UserError, match=r"mesh: got .* does not make the 8 devices"):
            config.shape(8)


class Device:
    """All that `data_shard` asks of a device."""

    def __init__(self, process):
        self.process_index = process


def shares(per_process: int, processes: int, tensor: int = 1, spatial: int = 1) -> list:
    """The share of each process, on a mesh whose devices come process by process."""
    devices = np.array([Device(i // per_process) for i in range(per_process * processes)])
    devices = devices.reshape(-1, 1, spatial, tensor)
    mesh = types.SimpleNamespace(
        devices=devices,
        shape=dict(zip(("data", "fsdp", "spatial", "tensor"), devices.shape, strict=True)),
        local_devices=[None] * per_process,
    )
    found = [sharding.data_shard(mesh, process) for process in range(processes)]
    return [(share.index, share.count) for share in found]


def test_processes_that_compute_one_block_read_the_same_share():
    assert shares(4, 2, tensor=1) == shares(4, 2, tensor=4) == [(0, 2), (1, 2)]
    assert shares(4, 2, tensor=8) == [(0, 1), (0, 1)]
    assert shares(2, 4, tensor=4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shares(4, 2, spatial=4) == [(0, 2), (1, 2)]
    assert shares(2, 4, spatial=4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    for axis in ("tensor", "spatial"):
        said = rf"mesh\.{axis}: got 4, expected a divisor or a multiple"
        with pytest.raises(UserError, match=said):
            shares(6, 2, **{axis: 4})


def test_images_are_split_only_where_there_are_any_and_evenly():
    mesh = types.SimpleNamespace(shape={"spatial": 4})
    sharding.check_spatial(mesh, 8)
    with pytest.raises(UserError, match=r"mesh\.spatial: got 4, expected a divisor of the 6 rows"):
        sharding.check_spatial(mesh, 6)
    with pytest.raises(UserError, match=r"mesh\.spatial: got 4, expected 1, as this stage has no"):
        sharding.check_spatial(mesh, 0)
    sharding.check_spatial(types.SimpleNamespace(shape={"spatial": 1}), 0)


# 8 devices equal 1


def run_on_eight(*arguments: str) -> str:
    """What Python prints on 8 fake devices."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | ENVIRONMENT | {"XLA_FLAGS": xla_flags(8)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    return done.stdout


def check_equal(stage: str, *meshes: str) -> None:
    """Loss, params, average and samples agree to float32's rounding, and params did move."""
    report = json.loads(run_on_eight(sharded_run.__file__, stage, *meshes))
    assert report["moved"] > 1e-3
    assert set(report["meshes"]) == set(meshes)
    for mesh, figures in report["meshes"].items():
        parts = {"data": 1, "fsdp": 8, "spatial": 2, "tensor": 2, "all": 4}[mesh]
        assert figures["loss"] < 1e-5 and figures["params"] < 1e-6 and figures["ema"] < 1e-6, mesh
        assert figures.get("sample", 0.0) < 2e-5, mesh
        # Small params stay whole, and these networks have little else.
        assert 1 / parts <= figures["held"] <= 1 / parts + (0.12 if parts > 1 else 0), mesh


@pytest.mark.slow
def test_a_mesh_with_every_axis_trains_and_samples_as_one_device():
    """The decoder, which has a U-Net and a Transformer, and a canvas here."""
    check_equal("on_canvas", "all")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*sharded_run.STAGES, "prior:muon", "decoder:muon"])
def test_eight_devices_train_and_sample_as_one_in_every_arrangement(stage):
    no_images = sharded_run.STAGES[stage.partition(":")[0]].unet is None
    check_equal(stage, *(m for m in sharded_run.MESHES if m != "spatial" or not no_images))


EMBEDDED = """
import jax, numpy as np
from tests import tiny
from unclip_jax.parallel import sharding
from unclip_jax.stages.conditioning import example_keys
model = tiny.model()
spread = model.on(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2)))
for texts in (["a red apple", "a dog"] * 4, ["a cat", "a tree", "a hat"]):
    keys = example_keys(jax.random.key(3), len(texts))
    ours, theirs = spread.sample_prior(keys, texts), model.sample_prior(keys, texts)
    assert len(ours.devices()) == 8
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
print("equal")
"""


@pytest.mark.slow
def test_a_prior_on_eight_devices_draws_the_same_embeddings():
    """Batches that the devices divide and batches that they do not."""
    assert run_on_eight("-c", EMBEDDED).strip() == "equal"


GENERATED = """
import jax, numpy as np
from tests import tiny
from unclip_jax.parallel import sharding
model, key = tiny.model(), jax.random.key(3)
images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
def pictures(model):
    return [model.generate(key, ["a red apple", "a dog"], num=4, upsample=False),
            model.variations(key, images, batch_size=3, upsample=False)]
alone = pictures(model)
mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
for ours, theirs in zip(pictures(model.on(mesh)), alone, strict=True):
    assert ours.shape == theirs.shape and len(np.unique(theirs)) > 50
    apart = np.abs(ours.astype(int) - theirs)
    assert apart.max() <= 3 and apart.mean() < 0.05, (apart.max(), apart.mean())
print("equal")
"""


@pytest.mark.slow
def test_a_model_on_eight_devices_draws_the_same_pictures():
    assert run_on_eight("-c", GENERATED).strip() == "equal"


LOADED = """
import jax, numpy as np, sys
from tests import tiny
from unclip_jax.parallel import sharding
from unclip_jax.pipeline.unclip import UnCLIP
model = tiny.model()
model.save(sys.argv[1])
mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
spread = model.on(mesh).parts()
found = UnCLIP.load(sys.argv[1], mesh=mesh)
assert found.mesh == mesh and set(found.parts()) == set(spread)
for name, part in found.parts().items():
    def check(a, b):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    jax.tree.map(check, part.params, spread[name].params)
print("equal")
"""


def test_a_model_is_loaded_straight_to_where_it_lies_on_eight_devices(tmp_path):
    assert run_on_eight("-c", LOADED, str(tmp_path / "model")).strip() == "equal"


ONE_IMAGE = """
import jax, jax.numpy as jnp, json, numpy as np, re, sys
from tests import networks
from unclip_jax.parallel import axes, sharding
from unclip_jax.models.unet import UNet, UNetConfig
net = UNet(UNetConfig(image_size=32, channels=16, channel_mults=(1, 1), res_blocks=1, groups=4,
                      attention_sizes=(16,), head_channels=8, context_dim=12))
rng = np.random.default_rng(0)
x, context = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 32, 32, 3), (1, 5, 12)))
params = networks.random(networks.shapes(net, x, jnp.zeros(1), None, context))
def loss(params, x, mesh):
    with axes.on(mesh):
        y = net.apply({"params": params}, x, jnp.full(1, 7.0), None, context)
    return jnp.mean(y**2), y
step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
(_, y), grads = step(params, x, None)
for sides in json.loads(sys.argv[1]):
    config = sharding.MeshConfig(*sides)
    mesh = sharding.make_mesh(config, jax.devices()[: np.prod(sides)])
    given = jax.device_put((params, x), sharding.replicated(mesh))
    program = step.lower(*given, mesh).compile()
    (_, ours), ours_grads = program(*given)
    np.testing.assert_allclose(ours, y, atol=2e-4, rtol=2e-4)
    for a, b in zip(jax.tree.leaves(ours_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-3)
    text = program.as_text()
    heights = {int(h) for h in re.findall(r"f32\\[1,(\\d+),32,16\\]\\S* convolution", text)}
    print(*sorted(heights), "collective-permute" in text)
"""


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ([[2, 2, 1, 1], [2, 1, 1, 2]], ["8 True", "32 "]),
        pytest.param(
            [[4, 1, 1, 1], [8, 1, 1, 1], [2, 1, 4, 1]],
            ["8 True", "4 True", "4 True"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_image_is_split_by_its_height(sides, expected):
    """As one device computes it, gradients too; its neighbours' rows are fetched.

    Beside tensor parallelism it is whole.
    """
    said = run_on_eight("-c", ONE_IMAGE, json.dumps(sides)).splitlines()
    assert len(said) == len(expected)
    assert all(line.startswith(begin) for line, begin in zip(said, expected, strict=True))


# The compiled programs


CONTRASTIVE = """
import jax, jax.numpy as jnp, re
from unclip_jax.parallel import axes, sharding
from unclip_jax.stages.clip import contrastive_loss
b, e = 512, 24
mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))
def loss(z_i, z_t):
    with axes.on(mesh):
        return contrastive_loss(z_i, z_t, jnp.float32(10.0))[0]
rows = sharding.batch_sharding(mesh)
z = jax.ShapeDtypeStruct((b, e), jnp.float32, sharding=rows)
text = jax.jit(jax.grad(loss, (0, 1))).lower(z, z).compile().as_text()
sizes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\\[(\\d+,\\d+)\\]", text)}
print(sorted(sizes))
"""


def test_the_contrastive_loss_holds_its_own_rows_alone():
    """On 8 devices no array of the loss and its gradient is wider than b / 8 x b."""
    sizes = json.loads(run_on_eight("-c", CONTRASTIVE).replace("(", "[").replace(")", "]"))
    assert [64, 512] in sizes or [512, 64] in sizes
    assert max(rows * columns for rows, columns in sizes) == 64 * 512


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_a_deeper_transformer_is_no_larger_a_program(remat):
    """A step of 24 layers lowers to as many operations as one of 6: blocks are scanned."""
    from unclip_jax.models.prior import PriorConfig

    def operations(layers: int) -> int:
        model = PriorConfig(
            embed_dim=8, width=16, layers=layers, heads=2, context_length=8, vocab_size=32,
            text_width=0, remat=remat,
        )  # fmt: skip
        stage = stages.PriorStage(model=model)
        params = jax.eval_shape(stage.init, jax.random.key(0))
        batch = {
            "tokens": jax.ShapeDtypeStruct((4, 8), jnp.int32),
            "z_i": jax.ShapeDtypeStruct((4, 8), jnp.float32),
            "z_t": jax.ShapeDtypeStruct((4, 8), jnp.float32),
        }
        step = jax.jit(jax.grad(stage.loss, has_aux=True))
        return step.lower(params, batch, jax.random.key(0)).as_text().count("stablehlo.")

    assert operations(24) == operations(6)
