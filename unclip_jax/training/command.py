"""Train one stage: CLIP first, then the prior, the decoder and the upsamplers in any order.

    python train.py --config=configs/emoji/clip.py --workdir=runs/emoji/clip
    python train.py --config=configs/emoji/prior.py --workdir=runs/emoji/prior \
        --config.clip=runs/emoji/clip

Any field can be set: --config.train.learning_rate=1e-4. A config ends in :smoke to run in seconds.
The same command again resumes. When the run ends, WORKDIR/model holds the trained stage.

On several hosts the same command runs on each: under Slurm, Open MPI or on a TPU pod they find
each other, elsewhere --coordinator_address, --num_processes and --process_id say where. See
docs/pods.md.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from unclip_jax.common import command_line
from unclip_jax.parallel import distributed

COMMAND = "python train.py"

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as emoji/clip.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and previews go.")
DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", distributed.MODES, "Whether to join the processes of other hosts."
)
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def parse(argv: list[str]) -> None:
    """Read the command line into the flags.

    Raises:
        UserError: a flag or config field that does not exist, or a value of the wrong type.
    """
    command_line.parse(flags.FLAGS, argv, COMMAND)
    command_line.check(flags.FLAGS, argv, COMMAND, "config", "workdir")


def main(argv: list[str]) -> None:
    """Prepare the run, train, and save the stage."""
    parse(argv)
    distributed.initialize(DISTRIBUTED.value, COORDINATOR.value, PROCESSES.value, PROCESS.value)

    from unclip_jax.parallel import compile_cache
    from unclip_jax.parallel.cpu import devices as cpu_devices
    from unclip_jax.parallel.cpu import memory as host_memory
    from unclip_jax.training import loop, prepare
    from unclip_jax.weights import folder as model_folder

    cpu_devices.use()
    compile_cache.use()
    host_memory.keep_freed()

    run = prepare.prepare(CONFIG.value)
    workdir = Path(WORKDIR.value)

    def export(params, step: int) -> None:
        model_folder.save_stage(
            workdir / "model",
            params=run.export(params),
            description=run.description | {"step": step},
        )

    loop.train(
        loss_fn=run.loss,
        init_params=run.init_params,
        batches=run.batches(),
        config=run.train,
        workdir=workdir,
        description=run.description,
        mesh=run.mesh,
        evaluate=run.evaluate,
        preview=run.preview,
        export=export,
    )
