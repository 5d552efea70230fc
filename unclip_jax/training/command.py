"""Train one stage: CLIP first, then the prior, the decoder and the upsamplers in any order.

    unclip train --config=emoji/clip --workdir=runs/emoji/clip
    unclip train --config=emoji/prior --workdir=runs/emoji/prior --config.clip=runs/emoji/clip

Any field can be set: --config.train.learning_rate=1e-4. A config ends in :smoke to run in seconds.
The same command again resumes. When the run ends, WORKDIR/model holds the trained stage.

On several hosts the same command runs on each: under Slurm, Open MPI or on a TPU pod they find
each other, elsewhere --coordinator_address, --num_processes and --process_id say where. See
docs/pods.md.
"""

from __future__ import annotations

import functools

from absl import flags

from unclip_jax.common import command_line
from unclip_jax.errors import UserError

FLAGS = flags.FlagValues()
CONFIG = command_line.define_config(FLAGS)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints, metrics and previews go, a folder or gs://BUCKET/FOLDER.",
    flag_values=FLAGS,
)
PROFILE = flags.DEFINE_string(
    "profile", "", "START:STOP, steps to trace into WORKDIR/profile.", flag_values=FLAGS
)
DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether to join the processes of other hosts.",
    flag_values=FLAGS,
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0.", flag_values=FLAGS
)
PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train together.", flag_values=FLAGS
)
PROCESS = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0.", flag_values=FLAGS
)


def parse(argv: list[str]) -> None:
    """Read the command line into the flags.

    Raises:
        UserError: a flag or config field that does not exist, or a value of the wrong type.
    """
    command_line.parse(FLAGS, argv, "train", __doc__)
    command_line.check(FLAGS, argv, "train", "config", "workdir")


def main(argv: list[str]) -> None:
    """Prepare the run, train, and save the stage."""
    parse(argv)
    if not PROCESS.value:
        config = command_line.name_of(FLAGS)
        print(f"train: {config} in {WORKDIR.value}, starting", flush=True)

    from unclip_jax.parallel import distributed  # imports JAX: wrong usage is told before

    distributed.initialize(DISTRIBUTED.value, COORDINATOR.value, PROCESSES.value, PROCESS.value)

    from unclip_jax.parallel import compile_cache
    from unclip_jax.parallel.cpu import devices as cpu_devices
    from unclip_jax.parallel.cpu import memory as host_memory
    from unclip_jax.training import loop, prepare
    from unclip_jax.training.profile import Span
    from unclip_jax.training.run import NotFinite
    from unclip_jax.training.workdir import Workdir

    cpu_devices.use()
    compile_cache.use(shared=WORKDIR.value)
    host_memory.keep_freed()

    span = Span.parse(PROFILE.value)
    run = prepare.prepare(CONFIG.value)
    place = Workdir(WORKDIR.value)

    try:
        loop.train(
            loss_fn=run.loss,
            init_params=run.init_params,
            batches=run.batches(),
            config=run.train,
            workdir=WORKDIR.value,
            description=run.description,
            complete=run.complete,
            mesh=run.mesh,
            evaluate=run.evaluate,
            preview=run.preview,
            export=functools.partial(run.save, place.local),
            profile=span,
        )
    except NotFinite as error:
        again = command_line.with_field(argv, "config.train.learning_rate", f"{error.rate:g}")
        raise UserError(f"{error}: {command_line.called('train', again)}") from error
