"""The planner: programs read, topologies named, plans printed."""

import json
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests import plan_run, tiny
from unclip_jax import stages
from unclip_jax.configs.emoji import prior as emoji_prior
from unclip_jax.errors import UserError
from unclip_jax.parallel import flops
from unclip_jax.plan import (
    analysis,
    chips,
    collectives,
    command,
    hlo,
    kept,
    measure,
    report,
    search,
)
from unclip_jax.plan.blocks import Split
from unclip_jax.plan.chips import CHIPS, Topology
from unclip_jax.plan.collectives import Collective
from unclip_jax.plan.hlo import Program
from unclip_jax.plan.measure import Roofline
from unclip_jax.plan.programs import Plan

ROOT = Path(__file__).parent.parent
LAYERS, WIDTH, ROWS = plan_run.LAYERS, plan_run.WIDTH, plan_run.ROWS


def run_python(*args: str, devices: int = 1, **environ: str) -> subprocess.CompletedProcess:
    environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=os.environ | environ, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def on_eight():
    """What plan_run.py found on 8 devices."""
    done = run_python("-m", "tests.plan_run", devices=8)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# What a compiled program moves


def test_a_scans_collectives_count_as_often_as_it_turns(on_eight):
    """An all-reduce of [16, 64] float32 among 8, once in each of 7 turns, and nothing else."""
    assert ["all-reduce", 8, LAYERS * 4 * ROWS * WIDTH, LAYERS] in on_eight["scan"]
    others = [c for c in on_eight["scan"] if c[0] != "all-reduce"]
    assert sum(size for _, _, size, _ in others) < 4 * ROWS * WIDTH


def test_a_scan_reads_each_layer_once(on_eight):
    """A turn reads and writes the carry and reads its layer, not the whole stack every time."""
    turn = 3 * 4 * 512 * 512
    assert 32 * turn <= on_eight["bytes"] <= 1.4 * 32 * turn


def test_what_a_ring_sends():
    """On a ring of 4, 12 bytes each: a sum is scattered and gathered, in 3 steps of a quarter."""
    assert Collective("reduce-scatter", 4, 12, 1).sent == 9
    assert Collective("all-gather", 4, 3, 1).sent == 9
    assert Collective("all-reduce", 4, 12, 1).sent == 18
    assert Collective("all-to-all", 4, 12, 1).sent == 9
    assert Collective("collective-permute", 1, 12, 1).sent == 12


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x={1}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups={}, to_apply=%add", 8),
    ],
)
def test_groups_are_read_in_every_form(text, devices):
    line = "ENTRY %main (p: f32[6]) -> f32[6] {\n  %p = f32[6]{0} parameter(0)\n  ROOT %r = "
    line += f"f32[6]{{0}} all-reduce(%p), {text}\n}}"
    (found,) = Program(line, 8).collectives()
    assert found == Collective("all-reduce", devices, 24, 1)


def test_arrays_in_the_cores_own_memory_cost_nothing():
    text = "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[2,3]{1,0:T(8,128)}, pred[])"
    assert hlo.array_bytes(text) == 2 * 8 * 128 + 24 + 1
    assert hlo.array_bytes(text, slow_only=True) == 25


# A TPU slices a layer off a stack of kernels in a fusion inside the fusion of its product.
NESTED = """
%inner (p: bf16[8,16,32], i: s32[]) -> bf16[16,32] {
  %p = bf16[8,16,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,16,32]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,16,32}
  ROOT %b = bf16[16,32]{1,0} bitcast(%s)
}

%outer (x: bf16[4,16], w: bf16[8,16,32], j: s32[]) -> f32[4,32] {
  %x = bf16[4,16]{1,0} parameter(0)
  %w = bf16[8,16,32]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %f = bf16[16,32]{1,0} fusion(%w, %j), kind=kLoop, calls=%inner
  ROOT %c = f32[4,32]{1,0} convolution(%x, %f), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[4,16], w: bf16[8,16,32], j: s32[]) -> f32[4,32] {
  %x.1 = bf16[4,16]{1,0} parameter(0)
  %w.1 = bf16[8,16,32]{2,1,0} parameter(1)
  %j.1 = s32[] parameter(2)
  ROOT %r = f32[4,32]{1,0} fusion(%x.1, %w.1, %j.1), kind=kOutput, calls=%outer
}
"""


def test_a_layer_that_an_inner_fusion_slices_is_read_alone():
    layer, x, index, result = 2 * 16 * 32, 2 * 4 * 16, 4, 4 * 4 * 32
    assert Program(NESTED, 1).bytes() == layer + x + index + result


def test_no_device_holds_a_table_of_tokens_or_its_gradient(on_eight):
    """Copies sum their parts of the gradient; inside one only what was looked up is exchanged."""
    part = 4 * plan_run.TOKENS * WIDTH // 4
    table = on_eight["table"]
    assert table["temporary"] < 2 * part
    large = [c for c in table["collectives"] if c[2] >= part]
    assert large == [["all-reduce", 2, part]]
    exchanged = [size for kind, _, size in table["collectives"] if kind == "all-to-all"]
    assert sum(exchanged) == 2 * 4 * (ROWS // 8) * 4 * WIDTH  # there and back, of one device's rows


# A program by its blocks


def test_equal_blocks_are_found_once(on_eight):
    counts = [count for count, _ in on_eight["blocks"]["labels"]]
    assert counts == [LAYERS, 1]


def test_blocks_and_shell_hold_all_the_flops(on_eight):
    """Forward, recomputation and backward are four passes; a stand-in computes nothing."""
    blocks = on_eight["blocks"]
    deep, wide = 2 * 2 * ROWS * WIDTH * WIDTH, 2 * ROWS * WIDTH * 4 * WIDTH
    assert blocks["block_flops"] == [deep, wide]
    assert blocks["shell_flops"] == 0
    # What recomputation would have only to throw away, each block's last product, is not traced.
    assert 3 * (LAYERS * deep + wide) < blocks["flops"] <= 4 * (LAYERS * deep + wide)


def test_the_shell_has_the_whole_programs_arguments_and_results(on_eight):
    blocks = on_eight["blocks"]
    assert blocks["arguments"][0] == blocks["arguments"][1]
    assert blocks["results"][0] == blocks["results"][1]


def test_blocks_send_what_the_whole_program_sends(on_eight):
    blocks = on_eight["blocks"]
    assert blocks["sent_blocks"] == pytest.approx(blocks["sent_whole"], rel=0.35)


def test_the_states_bytes_are_those_a_device_holds(on_eight):
    assert on_eight["state"]["planned"] == on_eight["state"]["held"]


def test_what_fits_is_split_no_more_than_it_must(on_eight):
    """Plenty of memory: nothing is split or recomputed. Less: more is. Next to none: an error."""
    plenty, less, least, none = on_eight["fits"]
    assert plenty == [1, 1, "none"]
    assert plenty[0] <= less[0] < least[0] <= 8
    assert "too small for this config" in none


def on_one(**train) -> Plan:
    """The tiny CLIP, its Transformers recomputed, on this device."""
    config = {"stage": stages.describe(tiny.CLIP), "train": {"batch_size": 8} | train, "mesh": {}}
    return search.with_remat(Plan.of(config, jax.devices()[:1]), "full")


@pytest.mark.parametrize(("accum", "passes"), [(1, [10]), (4, [10, 1] * 4)])
def test_a_joint_loss_runs_every_block_once_more(monkeypatch, accum, passes):
    """With microbatches each block runs forward alone, then forward and back: 1 and 10 bytes."""

    def compiled(lowered, *_):
        moved = lowered if isinstance(lowered, int) else 0
        return measure.Measured(0, 0, 0, moved, (), 0, {}, 0.0)

    monkeypatch.setattr(analysis, "compiled", compiled)
    monkeypatch.setattr(Split, "lowered", lambda self, block, backward: 10 if backward else 1)
    plan = on_one(grad_accum=accum)
    figures = analysis.train_figures(plan, Topology("v5e", (1, 1)), blocks=True, say=lambda _: None)
    once = sum(p["count"] for p in figures["parts"] if not p["block"].endswith("forward"))
    assert figures["moved"] == once * sum(passes)


# What is kept


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    """Another program, option, place of chips or reader is another; a damaged file is no file."""
    compiles = []

    def counted(lowered, *args):
        compiles.append(lowered)
        return original(lowered, *args)

    original = measure.compiled
    monkeypatch.setattr(measure, "compiled", counted)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    turned = jax.make_mesh((1, 1), ("fsdp", "data"), devices=jax.devices()[:1])

    def needs(scale, mesh=mesh, options=()):
        lowered = jax.jit(lambda x: jnp.tanh(x * scale) @ x).lower(jnp.ones((8, 8)))
        return kept.compiled(lowered, mesh, dict(options), tmp_path)

    first = needs(2.0)
    assert first.arguments == 4 * 64 and first.moved > 0
    assert needs(2.0) == first and len(compiles) == 1
    needs(3.0)
    needs(2.0, mesh=turned)
    needs(2.0, options={"xla_cpu_enable_fast_math": "True"}.items())
    assert len(compiles) == 4 and len(list(tmp_path.glob("*.json"))) == 4
    for file in tmp_path.iterdir():
        file.write_text(file.read_text()[:-9])
    again = needs(2.0)
    assert again == first and len(compiles) == 5
    assert again.compile_s > 0 and needs(2.0).compile_s == again.compile_s
    for count, module in enumerate((hlo, collectives, measure), start=6):  # all that read figures
        reader = tmp_path / "reader.py"
        reader.write_text(Path(module.__file__).read_text(encoding="utf-8") + "# another\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(reader))
            assert needs(2.0) == first and len(compiles) == count


# Chips and time


def test_topologies_by_name():
    pod = Topology.parse("v5p:4x4x8")
    assert (pod.chips, pod.name, pod.chip) == (128, "v5p:4x4x8", CHIPS["v5p"])
    assert Topology.parse("v5e:16x16").chips == 256
    two = Topology.parse("2 x v5p:4x4x8")
    assert (two.slices, two.chips, two.device_count, two.name) == (2, 256, 256, "2xv5p:4x4x8")
    seventh = Topology.parse("tpu7x:2x2x1")
    assert (seventh.chips, seventh.device_count) == (4, 8)
    assert Topology.parse("h100:8x4").device_count == 32


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9:2x2", "a chip among v4, v5e, v5p, v6e"),
        ("v5e", "CHIP:AxB"),
        ("v5e:16", "expected 2 axes of at least 1 for v5e, as in v5e:16x16"),
        ("v5p:16x16", "expected 3 axes"),
        ("v6e:0x16", "of at least 1"),
        ("v5e:-2x2", "CHIP:AxB"),
        ("0xv5e:2x2", "of at least 1"),
        ("xv5e:2x2", "CHIP:AxB"),
        ("2xh100:8x4", "GPUs of a host x hosts, such as h100:8x8"),
        ("h100:8", "expected 2 axes"),
        ("", "CHIP:AxB"),
    ],
)
def test_no_such_topology(text, said):
    with pytest.raises(UserError) as error:
        Topology.parse(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(chips.importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"libtpu: not installed.*pip install.*\[plan\]"):
        Topology.parse("v5e:2x2").devices()


def test_another_jaxs_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(chips.importlib.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(UserError, match=r"libtpu: got 0\.0\.1, expected 0\.0\.\d+\.\*"):
        chips.check_compiler()


def test_a_roofline_is_the_slowest_rate():
    """One second each of computing and memory, and of network half: 8 of 8 halves gathered."""
    chip = CHIPS["v5e"]
    gathered = Collective("all-gather", 2, int(chip.ici_rate / 2), 1)
    line = Roofline.of(chip, chip.bf16, chip.hbm_rate, [gathered])
    assert (line.compute, line.memory, line.network) == (1.0, 1.0, 0.5)
    assert (line.least, line.most) == (1.0, 2.5)
    to_others = Collective("dcn-all-reduce", 2, int(3 * chip.dcn_rate), 1)
    line = Roofline.of(chip, chip.bf16, chip.hbm_rate, [gathered, to_others])
    assert (line.network, line.dcn, line.least, line.most) == (0.5, 3.0, 3.0, 5.5)


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("Ran out of memory. Used 32.50G of 15.75G hbm. Exceeded", "32.50 GiB"),
        ("memory required for HLO temporaries (512.00M) exceeds available HBM (94.75G).", "0.50 G"),
        ("INTERNAL: something else", None),
    ],
)
def test_what_a_compiler_refuses_is_read_from_its_words(said, needed):
    def refuse(**_):
        raise jax.errors.JaxRuntimeError(said)

    lowered = types.SimpleNamespace(compile=refuse)
    with pytest.raises(measure.TooLarge if needed else jax.errors.JaxRuntimeError) as error:
        measure.compiled(lowered, 1, {})
    assert (needed or said) in str(error.value)


# The command


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--config: missing"),
        (["--config=configs/paper/prior.py"], "--topology: missing"),
        (["--nonsense=1"], "nonsense"),
        (["stray"], "argument 'stray'"),
        (["--config=configs/paper/prior.py", "--topology=v5e:2x2", "--blocks", "--whole"], "both"),
        (["--config=configs/paper/nobody.py", "--topology=v5e:2x2"], "nobody"),
        (["--config=paper/prior", "--topology=v5e:2x2", "--notrain"], "--notrain: got no --sample"),
        (
            ["--config=paper/prior", "--topology=v5e:2x2", "--sample=1", "--dtype=int8"],
            "--dtype: got 'int8', expected one of float32, bfloat16",
        ),
    ],
)
def test_wrong_command_lines_are_one_line(argv, said):
    command.FLAGS.unparse_flags()
    for flag in ("config", "topology", "blocks", "whole", "table", "sample", "train", "dtype"):
        command.FLAGS[flag].unparse()
    with pytest.raises(UserError) as error:
        command.parse(argv)
    assert said in str(error.value) and "\n" not in str(error.value)


def planned(monkeypatch, *argv, remat=None, small=False):
    """`plan_of` with these flags on this device, and what it tried.

    With `small`, the first attempt is too large for the compiler, the second holds too much.
    """
    tried = []

    def figures(plan, *_, **__):
        tried.append((plan.mesh.shape["fsdp"], plan.train.grad_accum, search.remat_of(plan.stage)))
        if small and len(tried) == 1:
            raise measure.TooLarge("99 GiB")
        return {"fits": not small or len(tried) != 2}

    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[:1])
    monkeypatch.setattr(command.analysis, "train_figures", figures)
    for flag in (*FLAGS, "topology", "table", "mesh", "json"):
        command.FLAGS[flag].unparse()
    command.parse([*argv, "--topology=v5e:1x1"])
    config = command.CONFIG.value
    if remat is not None:
        config.stage.model.remat = remat
    try:
        return command.plan_of(config, Topology("v5e", (1, 1))), tried
    finally:
        for flag in FLAGS:
            command.FLAGS[flag].unparse()


FLAGS = ("config", "fit", "blocks", "whole", "sample", "train", "dtype")


@pytest.mark.parametrize("policy", ["none", "dots"])
@pytest.mark.parametrize("flag", [[], ["--blocks"]])
def test_a_unet_that_recomputes_less_is_not_planned_by_blocks(monkeypatch, policy, flag):
    config = "--config=configs/paper/upsampler_256.py:smoke"
    with pytest.raises(UserError, match=f"--blocks: got a network with remat {policy!r}.*--whole"):
        planned(monkeypatch, config, *flag, remat=policy)


def test_what_the_compiler_refuses_is_not_the_end_of_a_search(monkeypatch):
    """What fits by the model may need more, or turn out to hold more: the next one is tried."""
    figures, tried = planned(
        monkeypatch, "--config=configs/paper/prior.py:smoke", "--fit", small=True
    )
    assert [policy for *_, policy in tried] == ["none", "dots", "full"]
    assert figures["suggestion"].startswith("smallest that fits")
    assert figures["remat"] == tried[-1][2] and figures["train"]["fits"]


def test_a_search_by_blocks_recomputes_everything(monkeypatch):
    config = "--config=configs/paper/upsampler_256.py:smoke"
    _, tried = planned(monkeypatch, config, "--fit")
    assert tried == [(1, 1, "full")]
    _, tried = planned(monkeypatch, config, "--fit", "--whole")
    assert tried == [(1, 1, "none")]


def test_a_sampler_is_planned_alone_with_its_weights_in_few_bits(monkeypatch, tmp_path):
    """Its shapes are those that load(dtype) makes: constants stay as they are."""
    plans = []
    figures = {"mode": "whole", "rows": 3, "bytes": {"peak": 5}, "fits": True, "moved": 1}
    figures |= {"flops": {"chip": 1}, "collectives": [], "roofline": {"least": 1, "most": 2}}
    take = lambda plan, *_, **__: plans.append(plan) or figures  # noqa: E731
    monkeypatch.setattr(command.analysis, "sample_figures", take)
    argv = "--config=paper/prior:smoke", "--notrain", "--sample=3", "--dtype=bfloat16"
    found, trained = planned(monkeypatch, *argv)
    assert not trained and "train" not in found and found["sample"] == figures
    assert plans[0].stage.model.dtype == "bfloat16"
    params = plans[0].sampler_shapes(3)[0]
    assert {x.dtype for x in jax.tree.leaves(params["network"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(params["normalisation"])} == {jnp.dtype("float32")}
    assert "sampling 3 at once" in report.in_words(found)
    (tmp_path / "alone.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="no plans there"):  # the table is of training
        report.table(tmp_path)


def test_adapters_are_planned_as_they_train():
    """Frozen weights in half the bytes; average, moments and gradients of the adapters alone."""
    whole = emoji_prior.get_config("smoke")
    adapted = emoji_prior.get_config("smoke")
    adapted.lora.rank = 4
    whole, adapted = (Plan.of(c, jax.devices()[:1]) for c in (whole, adapted))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    params, state = adapted.params(), adapted.state()
    assert {x.dtype for x in jax.tree.leaves(params["base_network"])} == {jnp.dtype("bfloat16")}
    assert count(params["base_network"]) == count(whole.params()["network"])
    small = count(params["network"])
    assert 0 < small < count(params["base_network"]) / 2
    assert 2 * small <= count(state.opt_state) < 2 * small + 10
    steps = [flops.count(p.step(), p.state(), p.batch()) for p in (adapted, whole)]
    assert steps[0] < 0.9 * steps[1], "frozen kernels have no gradients"


@pytest.mark.parametrize("text", ["fsdp", "fsdp=x", "model=4", "fsdp=4;tensor=2", ""])
def test_wrong_meshes(text):
    with pytest.raises(UserError, match=r"--mesh="):
        command.parse_mesh(text)


def test_meshes_by_name():
    mesh = command.parse_mesh("fsdp=8,tensor=2")
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (-1, 8, 2)


def test_a_table_needs_plans(tmp_path):
    with pytest.raises(UserError, match="no plans there"):
        report.table(tmp_path)
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(UserError, match=r"odd\.json is no plan"):
        report.table(tmp_path)


def test_a_small_plan_by_the_real_compiler(tmp_path):
    """The smoke prior's whole train step and sampler for four v5e chips."""
    try:
        chips.check_compiler()
    except UserError as error:
        pytest.skip(str(error))
    file = tmp_path / "plan.json"
    done = run_python(
        "-m", "unclip_jax", "plan", "--config=configs/paper/prior.py:smoke", "--topology=v5e:2x2",
        "--mesh=fsdp=2", "--sample=4", f"--json={file}", UNCLIP_JAX_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(file.read_text())
    train = plan["train"]
    assert plan["mesh"] == "data 2, fsdp 2, spatial 1, tensor 1"
    assert train["fits"] and plan["sample"]["fits"]
    kept = train["bytes"]
    assert 1.9 < kept["optimizer"] / kept["ema"] < 2.1, "two moments for one average"
    assert kept["peak"] >= kept["params"] + kept["ema"] + kept["optimizer"]
    assert train["roofline"]["least"] <= train["roofline"]["most"]
    assert {"all-reduce"} <= {c["kind"] for c in train["collectives"]}
    assert "training, whole" in done.stdout and "sampling 4 at once" in done.stdout
    assert report.table(tmp_path).splitlines()[2].startswith("| prior | v5e:2x2 |")
