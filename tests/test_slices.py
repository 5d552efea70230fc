"""Several TPU slices: which devices lie where, and what a program sends inside them and between."""

import json
import types

import pytest

from tests import slices_run
from tests.test_plan import run_python
from unclip_jax.errors import UserError
from unclip_jax.parallel import sharding
from unclip_jax.parallel.sharding import MeshConfig
from unclip_jax.plan import chips
from unclip_jax.plan.collectives import Collective
from unclip_jax.plan.hlo import Program

SHARD = 2 * slices_run.WIDTH * slices_run.HIDDEN  # bytes of a matrix in bfloat16, of which are two


def device(process=0, platform="cpu", **more):
    return types.SimpleNamespace(process_index=process, platform=platform, **more)


def groups(devices, slices=0):
    """Which of `devices` are together, by their place in the list."""
    place = {id(d): i for i, d in enumerate(devices)}
    return [[place[id(d)] for d in group] for group in sharding.by_slice(devices, slices)]


def test_tpus_say_which_slice_they_are_in():
    mixed = [device(i, "tpu", slice_index=s) for i, s in enumerate((1, 0, 1, 0))]
    assert groups(mixed) == groups(mixed, 2) == [[1, 3], [0, 2]]
    assert groups([device(0, "tpu"), device(0, "tpu")]) == [[0, 1]]
    with pytest.raises(UserError, match=r"mesh\.slices: got 4, expected 2, which these TPUs are"):
        groups(mixed, 4)
    uneven = [device(0, "tpu", slice_index=s) for s in (0, 0, 0, 1)]
    with pytest.raises(UserError, match=r"mesh\.slices: got 2, expected slices of as many"):
        groups(uneven)


def test_elsewhere_slices_are_processes_that_follow_each_other():
    processes = [device(i // 2) for i in range(8)]
    assert groups(processes) == groups(processes, 1) == [list(range(8))]
    assert groups(processes, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(processes[::-1], 2) == [[6, 7, 4, 5], [2, 3, 0, 1]]
    gpus = [device(i // 2, "gpu", slice_index=i // 2) for i in range(8)]  # one for each host
    assert groups(gpus) == [list(range(8))]
    assert groups(gpus, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(gpus, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match=r"mesh\.slices: got 3, expected a divisor of the 8"):
        groups(processes, 3)


@pytest.mark.parametrize("slices", [-1, 1.5, "2"])
def test_a_number_of_slices_is_a_number(slices):
    with pytest.raises(UserError, match=r"mesh\.slices: got .*, expected a number of slices"):
        MeshConfig(slices=slices)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """`slices_run` for TPUs that are not there."""
    try:
        chips.check_compiler()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("plans")

    def found(*args):
        done = run_python("-m", "tests.slices_run", *args, UNCLIP_JAX_CACHE=str(folder))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return found


def test_only_data_leaves_a_slice(compiler):
    """On two and four slices of every kind, whatever else the mesh splits."""
    found = compiler("meshes")
    assert len(found) == len(slices_run.TOPOLOGIES) * len(slices_run.MESHES)
    for name in slices_run.TOPOLOGIES:
        topology = chips.Topology.parse(name)
        for key, config in slices_run.MESHES.items():
            told = found[f"{name} {key}"]
            if key == "too wide" and topology.slices > 1:
                assert f"expected a multiple of the {topology.slices} slices" in told
                continue
            (data, *rest), rows = told
            assert (data, *rest) == config.shape(topology.device_count)
            each = data // topology.slices
            assert rows == [[i] for i in range(topology.slices) for _ in range(each)]


# On small slices the compiler sums some gradients whole and slices the sum, where it could scatter:
# on the first, where fsdp is all of the slice, both; on the other the one that is split by columns.
SUMMED = {"v5p:2x2x2=8": 2, "4xv5e:2x2=2": 1}


def by_hand(topology: str, fsdp: int, summed: int = 0) -> dict[tuple[str, int], int]:
    """Bytes of the operands by kind and group: two matrices, in bfloat16 as they are sent.

    Each device gathers their parts and scatters the sums of their gradients over fsdp; what is
    left of those is summed over the copies of a slice, and each has its part of that to add to
    the other slices'.
    """
    pod = chips.Topology.parse(topology)
    copies = pod.device_count // pod.slices // fsdp
    part = 2 * SHARD // fsdp
    found = {}
    if fsdp > 1:
        found["all-gather", fsdp] = part
        found["reduce-scatter", fsdp] = (2 - summed) * SHARD
        found["all-reduce", fsdp] = summed * SHARD
    if pod.slices == 1:
        if copies > 1:
            found["all-reduce", copies] = found.get(("all-reduce", copies), 0) + part
        return found
    for kind, size in (("reduce-scatter", part), ("all-gather", part // copies)):
        found[kind, copies] = found.get((kind, copies), 0) + size
    found["dcn-all-reduce", pod.slices] = part // copies
    return found


@pytest.mark.parametrize(
    "asked",
    [
        ["v6e:4x4=4", "2xv5e:4x4=4"],
        pytest.param(["v5e:4x4=1", "v5e:4x4=4", "v6e:4x4=1"], marks=pytest.mark.slow),
        pytest.param(["2xv6e:4x4=4", "4xv6e:4x4=4"], marks=pytest.mark.slow),
        pytest.param(["v5p:2x2x2=4", "v5p:2x2x2=8", "4xv5e:2x2=2"], marks=pytest.mark.slow),
    ],
)
def test_collectives_are_those_counted_by_hand(compiler, asked):
    """Gathers, scattered sums and sums, in fusions too, inside each slice and between them."""
    for name, collectives in compiler("programs", *asked).items():
        topology, _, fsdp = name.partition("=")
        counted = {(kind, group): size for kind, group, size, _, _ in collectives}
        expected = by_hand(topology, int(fsdp), SUMMED.get(name, 0))
        assert counted == {key: size for key, size in expected.items() if size}, name


def test_a_collective_over_several_fusions_counts_once():
    """Six fusions that are parts of two gathers."""
    text = calls = ""
    for i in range(6):
        text += (
            f"%f{i} (p: bf16[4]) -> bf16[8] {{\n  %p = bf16[4] parameter(0)\n"
            "  %g = bf16[8] all-gather(%p), replica_groups={{0,1}},"
            f' frontend_attributes={{chain_id="{i // 3}"}}\n}}\n\n'
        )
        calls += f"  %c{i} = bf16[8] fusion(%x), kind=kCustom, calls=%f{i}\n"
    text += f"ENTRY %main (x: bf16[4]) -> bf16[8] {{\n  %x = bf16[4] parameter(0)\n{calls}}}"
    assert Program(text, 2).collectives() == (Collective("all-gather", 2, 16, 2),)


def test_what_computes_beside_a_collective_does_not_move_it_again():
    """Of [4] gathered to [8], the first fusion's 8 + 16 bytes, and a product's 32 in the second."""
    gather = (
        "  %g = bf16[8] all-gather(%p0), replica_groups={{0,1}},"
        ' frontend_attributes={chain_id="0"}\n'
    )
    text = (
        "%first (p0: bf16[4]) -> (bf16[4], bf16[8]) {\n  %p0 = bf16[4] parameter(0)\n" + gather
        + "  ROOT %r = (bf16[4], bf16[8]) custom-call(%g),"
        ' custom_call_target="AsyncCollectiveStart"\n}\n\n'
        "%beside (p0: bf16[4], p1: bf16[8], p2: bf16[8]) -> (bf16[8], bf16[4], ..., ...) {\n"
        "  %p0 = bf16[4] parameter(0)\n  %p1 = bf16[8] parameter(1)\n"
        "  %p2 = bf16[8] parameter(2)\n" + gather
        + "  %m = bf16[8] multiply(%p2, %p2)\n"
        "  ROOT %r = (bf16[8], bf16[4], bf16[8], bf16[8]) tuple(%m, %p0, %p1, %g)\n}\n\n"
        "%last (p0: bf16[4], p1: bf16[8]) -> bf16[8] {\n"
        "  %p0 = bf16[4] parameter(0)\n  %p1 = bf16[8] parameter(1)\n" + gather
        + "  ROOT %r = bf16[8] custom-call(%p1, %g),"
        ' custom_call_target="AsyncCollectiveDone"\n}\n\n'
        "ENTRY %main (x: bf16[4], y: bf16[8]) -> bf16[8] {\n"
        "  %x = bf16[4] parameter(0)\n  %y = bf16[8] parameter(1)\n"
        "  %a = (bf16[4], bf16[8]) fusion(%x), kind=kCustom, calls=%first\n"
        "  %a0 = bf16[4] get-tuple-element(%a), index=0\n"
        "  %a1 = bf16[8] get-tuple-element(%a), index=1\n"
        "  %b = (bf16[8], bf16[4], bf16[8], bf16[8]) fusion(%a0, %a1, %y), calls=%beside\n"
        "  %b2 = bf16[8] get-tuple-element(%b), index=3\n"
        "  ROOT %c = bf16[8] fusion(%a0, %b2), kind=kCustom, calls=%last\n}"
    )  # fmt: skip
    program = Program(text, 2)
    assert program.collectives() == (Collective("all-gather", 2, 8, 1),)
    assert program.bytes() == (8 + 16) + 2 * 16


PAIRS = "{{100003->200000},{100002->200001},{200003->100000},{200002->100001}}"
GROUPS = "{{100000,100003,200000,200003},{100001,100002,200001,200002}}"


@pytest.mark.parametrize(
    ("target", "how", "slices", "sent"),
    [
        ('"{1,2}x{0:15}"', "ALL_REDUCE", 2, 8),
        ('"{1:4}x{0:3}"', "ALL_REDUCE", 4, 12),
        ('"{1:4}x{0:3}"', "ALL_GATHER", 4, 24),
        (GROUPS, "ALL_TO_ALL", 2, 4),
        (PAIRS, "ONE_TO_ONE", 2, 8),
    ],
)
def test_what_goes_to_other_slices_is_read_from_sends(target, how, slices, sent):
    attributes = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{how}"'
    text = (
        "ENTRY %main (x: bf16[4]) -> bf16[4] {\n  %x = bf16[4] parameter(0)\n"
        "  %t = token[] after-all()\n  %s = (bf16[4], u32[], token[]) send(%x, %t),"
        f" channel_id=2, is_host_transfer=true, frontend_attributes={{{attributes}}}\n}}"
    )
    (found,) = Program(text, 4).collectives()
    kind = {"ONE_TO_ONE": "collective-permute"}.get(how, how.lower().replace("_", "-"))
    assert found == Collective(f"dcn-{kind}", slices, 8, 1)
    assert found.between_slices and found.sent == sent
