"""A CPU's cores as devices: as many as serve a batch, and the same pictures."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.xla_flags import haste
from unclip_jax.parallel.cpu import devices as cpu_devices


def ran(script: str, **environment: str) -> list[str]:
    """The words that Python prints in a process where nobody says how many devices there are."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": haste()} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


USED = """
import jax
from unclip_jax.parallel.cpu import devices as cpu_devices
cpu_devices._cores = lambda: {cores}
print(cpu_devices.use(), jax.device_count())
"""


@pytest.mark.parametrize(("cores", "devices"), [(1, 1), (6, 4), (100, 8)])
def test_devices_are_a_power_of_two_of_the_cores(cores, devices):
    assert ran(USED.format(cores=cores)) == [str(devices)] * 2


@pytest.mark.parametrize(
    "said",
    [
        {"JAX_NUM_CPU_DEVICES": "3"},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
    ],
)
def test_what_the_environment_says_of_devices_is_left(said):
    assert ran(USED.format(cores=4), **said) == ["0", "3"]


def test_where_jax_has_its_devices_nothing_is_done():
    import jax

    before = jax.devices()
    assert cpu_devices.use() == 0 and jax.devices() == before


LATE = """
import time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from unclip_jax.parallel.cpu import devices as cpu_devices
cpu_devices._cores = lambda: 2
cpu_devices.use()
def late(i):
    time.sleep(50 * int(i))
    return np.float32(1)
def summed(x):
    device = jax.lax.axis_index("data")
    x += jax.pure_callback(late, jax.ShapeDtypeStruct((), jnp.float32), device)
    return jax.lax.psum(x, "data")
mesh = cpu_devices.make_mesh()
mapped = jax.shard_map(summed, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
print(jax.jit(mapped)(jnp.ones(2)))
"""


@pytest.mark.slow
def test_a_device_waits_for_one_that_is_late():
    """XLA by itself would end the process after 40 seconds."""
    assert ran(LATE) == ["[4.]"]


MESHES = """
import jax
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.parallel.sharding import MeshConfig
cpu_devices._cores = lambda: 4
cpu_devices.memory.total_bytes = lambda: 4000
cpu_devices.use()
def shape(config=MeshConfig(), rows=0, held=1, most=8):
    mesh = cpu_devices.make_mesh(config, rows=rows, held_bytes=lambda: held, most=most)
    print("x".join(map(str, mesh.devices.shape)))
shape()                                         # 4: as many as there are
shape(rows=32)                                  # 4
shape(rows=6)                                   # 2 divide the rows
shape(rows=5)                                   # 1
shape(held=500)                                 # 2 copies are a quarter of the memory
shape(held=5000)                                # 1: more than fits
shape(MeshConfig(fsdp=-1, data=1), held=1000)   # 4: one copy, split
shape(MeshConfig(data=1), rows=3)               # 1: as asked
shape(MeshConfig(tensor=2), rows=3)             # rows are over data and fsdp alone
shape(MeshConfig(spatial=2), rows=1)            # and so here
shape(MeshConfig(spatial=2), held=500)          # 2 copies, of which each has half of an image
shape(rows=32, most=1)                          # 1: more would not serve
shape(MeshConfig(data=2), rows=32, most=1)      # 2: as asked
"""


def test_a_mesh_has_as_many_devices_as_divide_the_rows_and_fit_in_memory():
    assert ran(MESHES) == [
        "4x1x1x1", "4x1x1x1", "2x1x1x1", "1x1x1x1", "2x1x1x1", "1x1x1x1",
        "1x4x1x1", "1x1x1x1", "1x1x1x2", "1x1x2x1", "1x1x2x1", "1x1x1x1", "2x1x1x1",
    ]  # fmt: skip


REFUSED = """
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.errors import UserError
from unclip_jax.parallel.sharding import MeshConfig
cpu_devices._cores = lambda: 2
cpu_devices.use()
try:
    cpu_devices.make_mesh(MeshConfig(fsdp=3))
except UserError as error:
    print(str(error).split(";")[0])
"""


def test_a_mesh_of_devices_that_are_not_there_is_an_error():
    message = " ".join(ran(REFUSED))
    assert message == (
        "mesh: got data -1, fsdp 3, spatial 1, tensor 1, whose product does not make the 2 devices"
        " there are"
    )


SHARED = """
import jax, jax.numpy as jnp, numpy as np
from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import devices as cpu_devices, memory
cpu_devices._cores = lambda: 4
cpu_devices.use()
mesh = cpu_devices.make_mesh()
host = np.arange(1000, dtype=np.float32)
for tree in ({"x": host}, {"x": jnp.asarray(host)}, {"x": jnp.asarray(host, jnp.bfloat16)}):
    placed = memory.place(tree, sharding.tree_shardings(tree, mesh))["x"]
    pointers = {shard.data.unsafe_buffer_pointer() for shard in placed.addressable_shards}
    print(len(placed.devices()), len(pointers))
    more = jax.jit(lambda x: x + 1, donate_argnums=0)(placed)
    np.testing.assert_array_equal(np.asarray(more), np.asarray(tree["x"] + 1))
    np.testing.assert_array_equal(tree["x"], host.astype(tree["x"].dtype))
"""


def test_weights_are_in_memory_once_for_all_devices_and_stay_what_they_are():
    assert ran(SHARED) == ["4", "1"] * 3


UNTRIED = """
import logging
import jax, jaxlib.version
jaxlib.version.__version__ = "0.99.1"
from unclip_jax.parallel.cpu import devices as cpu_devices
cpu_devices._cores = lambda: 4
logging.warning = lambda text, *args: print(text % args)
print(cpu_devices.use(), jax.device_count())
"""


def test_a_release_that_is_untried_is_named_in_a_line_and_left_alone():
    *line, done, count = ran(UNTRIED)
    assert "jaxlib 0.99.1:" in " ".join(line)
    assert (done, count) == ("0", "1")


SPREAD = """
import jax, numpy as np
from tests import tiny
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.parallel.cpu import devices as cpu_devices
cpu_devices._cores = lambda: 4
cpu_devices.use()
alone = tiny.model()
spread = alone.on(cpu_devices.make_mesh())
key = jax.random.key(3)
"""

EMBEDDED = """
for texts in (["a dog"] * 4, ["a cat", "a tree", "a hat"]):
    keys = example_keys(key, len(texts))
    ours, theirs = spread.sample_prior(keys, texts), alone.sample_prior(keys, texts)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    print(len(ours.devices()))
"""


def test_devices_that_share_cores_draw_the_same_embeddings():
    """By four devices, or by one where they do not divide the rows."""
    assert ran(SPREAD + EMBEDDED) == ["4", "1"]


DRAWN = """
images = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
for n in (3, 4):
    ours, theirs = (model.variations(key, images[:n], upsample=False) for model in (spread, alone))
    assert ours.shape == theirs.shape and len(np.unique(theirs)) > 50
    apart = np.abs(ours.astype(int) - theirs)
    assert apart.max() <= 3 and apart.mean() < 0.05, (apart.max(), apart.mean())
print("equal")
"""


@pytest.mark.slow
def test_devices_that_share_cores_draw_the_same_pictures():
    """Rows that they divide and rows that they do not, through inversion, decoder and CLIP."""
    assert ran(SPREAD + DRAWN) == ["equal"]


HELD = """
images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
def where(part, rows):
    return spread.lay(part, jax.numpy.zeros((rows, 2)), rows)[2].size
print(where(spread.decoder, 1), where(spread.upsamplers[0], 1), where(spread.decoder, 4))
cpu_devices.LEAST_SPLIT = spread.decoder.stage.unet.work
print(where(spread.decoder, 1), where(spread.prior, 1))
ours, theirs = (model.variations(key, images[:1], upsample=False) for model in (spread, alone))
apart = np.abs(ours.astype(int) - theirs)
assert len(np.unique(theirs)) > 50 and apart.max() <= 3 and apart.mean() < 0.05, apart.max()
"""


@pytest.mark.slow
def test_a_large_picture_is_split_and_a_small_one_is_not():
    assert ran(SPREAD + HELD) == ["1", "1", "4", "4", "1"]


TRAINED = """
import sys
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.training import command as train
cpu_devices._cores = lambda: {cores}
sys.argv[1:] = ["--config=configs/emoji/upsampler.py:smoke", "--workdir={workdir}",
                "--config.data.name={pictures}", "--config.data.split=all",
                "--config.data.cache_dir={workdir}-data", "--config.heldout_split=all",
                "--config.stage.model.channel_mults=(1,)", "--config.train.steps={steps}",
                "--config.train.eval_every=0", "--config.train.preview_every=0"]
train.main(sys.argv[1:])
"""


def test_training_splits_its_batches_over_the_cores_and_goes_on_over_fewer(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 0, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"number {i}")

    def trained(cores: int, steps: int) -> str:
        script = TRAINED.format(
            cores=cores, steps=steps, workdir=tmp_path / "run", pictures=pictures
        )
        return " ".join(ran(script))

    assert "on 4 x cpu (data 4, fsdp 1, spatial 1, tensor 1)" in trained(cores=4, steps=2)
    fewer = "on 2 x cpu (data 2, fsdp 1, spatial 1, tensor 1) resumed from step 2 of 3"
    assert fewer in trained(cores=2, steps=3)
    assert (tmp_path / "run" / "model" / "config.json").exists()
