"""What a stage needs to train: where its params start, its data, its figures, its previews.

`prepare(config)` turns a config into a `Prepared`, which train.py hands to the training loop.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from unclip_jax import stages
from unclip_jax.common import checks
from unclip_jax.common import config as settings
from unclip_jax.common.params import fingerprint
from unclip_jax.data import datasets
from unclip_jax.data.examples import TextEncoder
from unclip_jax.data.records import Source, summary
from unclip_jax.data.tokenizer import FileTokenizer
from unclip_jax.errors import UserError, wrong
from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.stages import normalisation
from unclip_jax.stages.base import JointLoss
from unclip_jax.training import beginning, distillation, lora
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.distillation import Distillation
from unclip_jax.training.fine_tuning import Origin
from unclip_jax.training.heldout import Held, Params, figures
from unclip_jax.training.inputs import (
    check_classes,
    data_for,
    load_canvas,
    load_clip,
    load_prior,
    text_encoder,
    warn_of_repeats,
    with_embeddings,
)
from unclip_jax.training.lora import Lora
from unclip_jax.training.prepared import MACHINE_FIELDS, Prepared
from unclip_jax.training.prior_samples import Mixed, with_samples
from unclip_jax.training.step import LossFn
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.t5 import T5
from unclip_jax.weights.trained import clip_fingerprint, read_stage, stage_folder

STATE_COPIES = 4  # of the params: themselves, their average, two moments


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole config, checked; configs/base.py says what each part is."""

    stage: dict[str, Any]
    data: datasets.DataConfig
    train: TrainConfig
    heldout_split: str = "heldout"
    clip: str = ""
    canvas: str = ""
    prior: str = ""
    prior_share: float = 0.5
    prior_samples: int = 2
    embeddings: str = ""
    t5: str = ""
    t5_dtype: str = "float32"
    normalisation: str = "whiten"
    previews: int = 16
    init: str = ""
    lora: Lora = dataclasses.field(default_factory=Lora)
    distillation: Distillation = dataclasses.field(default_factory=Distillation)
    mesh: sharding.MeshConfig = dataclasses.field(default_factory=sharding.MeshConfig)

    def __post_init__(self) -> None:
        """Check the fields that belong to no part."""
        checks.choice("config.normalisation", self.normalisation, (*normalisation.NAMES, "codes"))
        checks.count("config.previews", self.previews)
        checks.number("config.prior_share", self.prior_share, least=0, most=1)
        checks.count("config.prior_samples", self.prior_samples)
        if self.lora.rank and self.distillation.steps:
            raise wrong("config.lora.rank", self.lora.rank, "0 with config.distillation")


def prepare(config: Mapping[str, Any]) -> Prepared:
    """Check a config and prepare its data, embedding it with CLIP where the stage needs that.

    Raises:
        UserError: anything in the config, the data, the CLIP folder or the folder to start from is
            not as it must be.
    """
    given = settings.build(Settings, config, "config")
    origin = Origin.read(given.init, given.stage) if given.init else None
    stage = with_canvas(given, origin.stage if origin else stages.build(given.stage), origin)
    if given.distillation.steps:
        distillation.check(stage, given.distillation, has_origin=origin is not None)
    if origin is None:
        check_from_the_beginning(given, stage)
    clip = load_clip(given.clip, stage) if "z_i" in stage.reads else None
    if origin is not None and clip is not None:
        origin.check_clip(clip_fingerprint(clip), given.clip)
    canvas = load_canvas(given.canvas, clip) if given.canvas else None
    beside: Params = {} if canvas is None else {"canvas": canvas.params}
    if origin is not None:
        origin = dataclasses.replace(origin, stage=stage, replaced=beside)
    prior = load_prior(given.prior, stage, clip) if given.prior else None
    data = data_for(stage, given.data)
    encoder = text_encoder(stage, clip, given.t5, given.t5_dtype)
    check_embeddings(given, stage)
    needs_images = "image" in stage.reads
    source = datasets.load(data, needs_images=needs_images)
    trained = origin.description if origin else None
    if "label" in stage.reads:
        check_classes(stage, source, trained)
    if isinstance(stage.loss, JointLoss):
        warn_of_repeats(source)
    heldout_data = dataclasses.replace(data, split=given.heldout_split, captions="first")
    heldout = datasets.load(
        heldout_data, needs_images=needs_images, split_field="config.heldout_split"
    )
    for name, one in ((data.split, source), (given.heldout_split, heldout)):
        print(f"data: {summary(one, name)}", flush=True)
    description = describe(given, stage, source, origin)
    if trained and "tokenizer" in trained:  # a CLIP's own
        description["tokenizer"] = trained["tokenizer"]
        encoder = FileTokenizer.of(trained["tokenizer"], stage.context[0])
    if isinstance(encoder, T5):
        description["t5"] = {"fingerprint": encoder.fingerprint, "dtype": encoder.config.dtype}
    if canvas is not None:
        description["canvas"] = {"fingerprint": fingerprint(canvas.params)}
    if clip is not None:
        description["clip_fingerprint"] = clip_fingerprint(clip)
        source = with_embeddings(source, data, clip, given.embeddings)
        heldout = with_embeddings(heldout, heldout_data, clip)
    loss: LossFn = stage.loss
    if given.distillation.steps:
        loss = distillation.loss(stage, given.distillation)
    if prior is not None:
        source = with_samples(source, prior, clip, given.prior_samples, given.data.cache)
        loss = Mixed(loss, given.prior_share)
        how = {"share": given.prior_share, "samples": given.prior_samples}
        description["prior"] = {"fingerprint": fingerprint(prior.params)} | how
    held = Held(heldout, data, given.previews, encoder)
    evaluate, preview = figures(stage, held)
    run = Prepared(
        stage=stage,
        init_params=first_params(given, stage, origin, source, encoder, beside),
        loss=loss,
        source=source,
        data=data,
        train=given.train,
        mesh=mesh_for(given, stage),
        evaluate=evaluate,
        preview=preview,
        export=lambda params: params,
        description=description,
        encoder=encoder,
    )
    if given.lora.rank:
        return with_adapters(run, origin, given.lora)
    return with_teacher(run) if given.distillation.steps else run


def mesh_for(given: Settings, stage: stages.Stage) -> Mesh:
    """The mesh that the config asks for; on a CPU, of as many devices as a microbatch has use for.

    Raises:
        UserError: it does not fit the number of devices, or the stage.
    """

    def state_bytes() -> int:
        shapes = jax.tree.leaves(jax.eval_shape(stage.init, jax.random.key(0)))
        return STATE_COPIES * sum(x.size * x.dtype.itemsize for x in shapes)

    rows = given.train.batch_size // given.train.grad_accum
    most = 1 if stage.dense else cpu_devices.AT_MOST
    mesh = cpu_devices.make_mesh(given.mesh, rows=rows, held_bytes=state_bytes, most=most)
    sharding.check_spatial(mesh, stage.feature_rows)
    return mesh


def describe(
    given: Settings, stage: stages.Stage, source: Source, origin: Origin | None
) -> dict[str, Any]:
    """What a checkpoint or model folder says of any run."""
    data = settings.to_dict(data_for(stage, given.data))
    description = {
        "stage": stages.describe(stage),
        "data": {name: value for name, value in data.items() if name not in MACHINE_FIELDS},
        "data_fingerprint": source.fingerprint,
        "train": settings.to_dict(given.train),
    }
    if origin is not None:
        description["init"] = {"fingerprint": origin.fingerprint}
        for name, part, on in (
            ("lora", given.lora, given.lora.rank),
            ("distillation", given.distillation, given.distillation.steps),
        ):
            description |= {name: settings.to_dict(part)} if on else {}
    elif "z_i" in stage.reads:
        description["normalisation"] = given.normalisation
    if "label" in stage.reads:
        description["classes"] = list(source.classes)
    return description


def with_canvas(given: Settings, stage: stages.Stage, origin: Origin | None) -> stages.Stage:
    """The stage with the canvas that config.canvas names, if it names one.

    UserError if the stage takes no such canvas, or lacks the trained one that it needs.
    """
    if given.canvas:
        return stage.with_canvas(read_stage(stage_folder(given.canvas), "canvas")[0].model)
    if stage.canvas and (origin is None or origin.trained.canvas is None):
        raise UserError(
            "config.canvas: empty, expected the folder of the trained canvas that config.stage asks"
            " for; train one (kind canvas) and give --config.canvas=WORKDIR"
        )
    return stage


def first_params(
    given: Settings,
    stage: stages.Stage,
    origin: Origin | None,
    source: Source,
    encoder: TextEncoder | None,
    beside: Params,
) -> Callable[[], Params]:
    """What makes the params that training begins with; `beside` are trained before it."""
    key = jax.random.key(given.train.seed)
    if origin is not None:
        lora = given.lora
        return functools.partial(origin.adapted, lora, key) if lora.rank else origin.params

    def measured() -> Params:
        found: Params = {}
        if "z_i" in stage.reads:
            found |= beginning.measured(stage, given.normalisation, source, given.data.shared)
        if isinstance(encoder, ClipText) and stage.empty_null:
            found["null_caption"] = encoder.empty_caption()
        return found

    return beginning.FromRandom(stage, key, beside, measured)


def with_adapters(run: Prepared, origin: Origin, config: Lora) -> Prepared:
    """The run that trains low-rank adapters of its stage, and exports the stage they make."""
    whole = functools.partial(lora.beside, config)
    return dataclasses.replace(
        run,
        loss=lora.loss(config, run.loss),
        evaluate=lambda params, step: run.evaluate(whole(params), step),
        preview=lambda params, step: run.preview(whole(params), step),
        export=functools.partial(origin.merged, config),
        save_adapters=lambda path, params, about: origin.save_adapters(path, config, params, about),
    )


def with_teacher(run: Prepared) -> Prepared:
    """The run that distils its stage from the one it starts from, which stays beside it."""
    begun, own = run.init_params, distillation.detach
    return dataclasses.replace(
        run,
        init_params=lambda: distillation.attach(begun()),
        evaluate=lambda params, step: run.evaluate(own(params), step),
        preview=lambda params, step: run.preview(own(params), step),
        export=own,
    )


def check_from_the_beginning(given: Settings, stage: stages.Stage) -> None:
    """Raise UserError unless the stage can be trained from random params."""
    if given.lora.rank:
        raise UserError(
            f"config.lora.rank: got {given.lora.rank}, but config.init is empty: adapters change a"
            " trained stage; give its folder with --config.init=DIR, or set the rank to 0"
        )
    stage.check_untrained()
    if "z_i" in stage.reads:
        checks.choice("config.normalisation", given.normalisation, stage.normalisations)


def check_embeddings(given: Settings, stage: stages.Stage) -> None:
    """Raise UserError unless config.embeddings, if given, is read and says something new."""
    if not given.embeddings:
        return
    if "z_i" not in stage.reads:
        what = f"this {stage.kind} reads none; leave it out"
    elif given.data.name.startswith("embeddings:"):
        what = f"config.data.name is {given.data.name!r}, embeddings already; give one of them"
    else:
        return
    raise UserError(f"config.embeddings: got {given.embeddings!r}, but {what}")
