"""Faults in what was logged: losses, gradients, figures of evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from unclip_jax.training.doctor.findings import TENTH, Finding, error, note, warning
from unclip_jax.training.doctor.theory import Band, band
from unclip_jax.training.doctor.workdir import FEWEST_EXAMPLES, Workdir

FEWEST_LINES = 8  # of a curve that is judged by its shape
SURE = 3.0  # standard errors
UNLIKELY = 0.00135  # the tail of a normal beyond so many
FEW = 32  # held-out pairs
BY_HEART = 0.5  # of a batch's pairs that CLIP tells apart, where it tells no others
FALLEN_DB = 0.3  # PSNR that longer training has cost


def examine(run: Workdir) -> Iterator[Finding]:
    """Findings in metrics.jsonl."""
    steps, losses = run.series("train/loss")
    if not len(steps):
        if run.step > run.train.log_every:
            yield warning(
                "no_metrics",
                f"the run is at step {run.step:,}, but metrics.jsonl has no loss",
                "it was deleted or its disk was full; the next log line begins it anew",
            )
        return
    yield from not_finite(run)
    if not np.all(np.isfinite(losses)):
        return
    yield from length(run)
    yield from level(run, band(run))
    yield from shape(run)
    yield from warm_up(run)
    yield from gradients(run)
    yield from few_heldout(run)
    yield from evaluations(run)
    yield from overfitting(run)


def length(run: Workdir) -> Iterator[Finding]:
    """Whether the run has seen so little that nothing else can be said of it."""
    if not run.short:
        return
    seen = f"{run.examples:,} examples seen, repeats counted"
    what = f"from random weights a stage draws nothing to speak of before about {FEWEST_EXAMPLES:,}"
    if run.done >= 1.0:
        steps = -(-3 * FEWEST_EXAMPLES // run.train.batch_size)
        yield warning(
            "too_short",
            f"the run is done with {seen}; {what}",
            f"train on: the same command with --config.train.steps={steps} or more",
        )
    else:
        yield note("too_early", f"{seen}; {what}", "look again later")


def not_finite(run: Workdir) -> Iterator[Finding]:
    """Anything logged that is no number."""
    for record in run.records:
        names = [name for name, value in record.items() if not math.isfinite(value)]
        if names:
            yield error(
                "not_finite",
                f"{names[0]} is not finite at step {int(record['step']):,}",
                "check the data; the same command with a lower --config.train.learning_rate"
                f" ({run.train.learning_rate:g}) or with train.grad_clip goes on from the last"
                " checkpoint",
            )
            return


def too_early(run: Workdir, step: float) -> bool:
    """Whether the learning rates so far add up to less than the weights' root mean square.

    Adam moves a weight by at most about the rate a step: none can have moved as far as it is large.
    """
    steps, rates = run.series("train/learning_rate")
    norm = run.last("train/param_norm")
    if norm is None or step <= run.train.warmup_steps:
        return True
    seen = steps <= step
    moved = float(np.sum(rates[seen] * np.diff(steps[seen], prepend=0.0)))
    return moved < norm / math.sqrt(run.parameters)


def level(run: Workdir, expected: Band | None) -> Iterator[Finding]:
    """The loss against what theory says of a network that has learned nothing."""
    if expected is None:
        return
    steps, values = run.series(expected.metric)
    if not len(steps):
        return
    recent = float(np.mean(values[-3:]))
    where = f"{expected.metric} is {recent:.4g} at step {int(steps[-1]):,}"
    if too_early(run, steps[-1]):
        if run.done >= 1.0 and recent > (1 - TENTH) * expected.ignorant:
            yield error(
                "nothing_learned",
                f"{where}, and a network that has learned nothing has {expected.ignorant:.4g}; the"
                " learning rates of all steps together are less than the size of a weight, so the"
                " weights are still about what they began with",
                f"train in a new workdir for more steps ({run.train.steps:,}) or with a higher"
                f" train.learning_rate ({run.train.learning_rate:g})",
            )
    elif recent > (1 + TENTH) * expected.ignorant:
        yield error(
            "loss_above_ignorance",
            f"{where}; a network that has learned nothing has {expected.ignorant:.4g}"
            f" ({expected.because})",
            f"train in a new workdir with a lower train.learning_rate"
            f" ({run.train.learning_rate:g}), with train.warmup_steps, or with train.grad_clip=1",
        )
    elif recent > (1 - TENTH) * expected.ignorant:
        yield error(
            "nothing_learned",
            f"{where}, what a network has that has learned nothing: {expected.ignorant:.4g}"
            f" ({expected.because})",
            "look at a few examples of the data (unclip evaluate shows pictures), and"
            f" try train.learning_rate ({run.train.learning_rate:g}) three times higher or lower",
        )
    elif expected.linear is not None and recent > expected.linear and _judged(run):
        yield warning(
            "hardly_learned",
            f"{where}; knowing the data's variance and nothing else gives {expected.linear:.4g}",
            "train longer, or with a higher train.learning_rate"
            f" ({run.train.learning_rate:g}) or a larger network",
        )


def _judged(run: Workdir) -> bool:
    """Whether the run should have learned something by now."""
    return run.done > 0.5 and not run.short


def shape(run: Workdir) -> Iterator[Finding]:
    """Whether the loss falls, and stays down."""
    steps, losses = run.series("train/loss")
    past = steps > run.train.warmup_steps
    steps, losses = steps[past], losses[past]
    if len(losses) < FEWEST_LINES:
        return
    quarters = np.array_split(losses, 4)
    means = [float(np.mean(q)) for q in quarters]
    best = int(np.argmin(means))
    rise = means[-1] - means[best]
    if rise > TENTH * abs(means[best]) and rise > SURE * _error(quarters[best], quarters[-1]):
        higher = means[-1] > means[0]
        yield (error if higher else warning)(
            "loss_exploded" if higher else "loss_rising",
            f"the loss was {means[best]:.4g} on average in the run's quarter {best + 1} and is"
            f" {means[-1]:.4g} in its last",
            f"lower train.learning_rate ({run.train.learning_rate:g}) to a third, in a new workdir,"
            " and set train.grad_clip=1 if it is 0",
        )
    yield from spikes(steps, losses, run)
    fall = means[-2] - means[-1]
    if run.done >= 1.0 and fall > TENTH * means[-1] and fall > SURE * _error(*quarters[-2:]):
        yield note(
            "still_falling",
            f"the run is done, and its loss still fell from {means[-2]:.4g} to {means[-1]:.4g} in"
            " its last quarter",
            "more steps would help: a new workdir with a higher train.steps",
        )


def _error(first: np.ndarray, second: np.ndarray) -> float:
    """The standard error of the difference of two means, from the scatter around straight lines."""

    def variance(values: np.ndarray) -> float:
        if len(values) < 3:
            return float(np.var(values)) / len(values)
        line = np.polyval(np.polyfit(np.arange(len(values)), values, 1), np.arange(len(values)))
        return float(np.sum((values - line) ** 2) / (len(values) - 2)) / len(values)

    return math.sqrt(variance(first) + variance(second))


def spikes(steps: np.ndarray, losses: np.ndarray, run: Workdir) -> Iterator[Finding]:
    """Lines at which the loss lost half of all that it had gained."""
    before = np.minimum.accumulate(losses)[:-1]
    lost = losses[1:] - before
    gained = losses[0] - before
    usual = 1.4826 * float(np.median(np.abs(np.diff(losses))))  # a normal's standard deviation
    high = 1 + np.flatnonzero((lost > 0.5 * gained) & (lost > 6 * usual) & (gained > 0))
    high = [i for i in high if i + 1 < len(losses) and losses[i + 1] < losses[i]]
    if high:
        i = high[0]
        yield warning(
            "loss_spikes",
            f"{len(high)} times the loss jumped up and came back, first at step {int(steps[i]):,},"
            f" from {losses[:i].min():.4g} to {losses[i]:.4g}",
            f"lower train.learning_rate ({run.train.learning_rate:g}) or train.b2"
            f" ({run.train.b2:g}), or set train.grad_clip=1 if it is {run.train.grad_clip:g}",
        )


def warm_up(run: Workdir) -> Iterator[Finding]:
    """A loss that rises with the learning rate.

    That of weights trained before does, a little; it is well if half has come back since.
    """
    steps, losses = run.series("train/loss")
    warm = losses[steps <= run.train.warmup_steps]
    if len(warm) < 3:
        return
    halfway = 0.5 * (warm.min() + warm[-1])
    came_back = "init" in run.description and np.median(losses[-3:]) < halfway
    if warm[-1] > (1 + TENTH) * warm.min() and warm[-1] > warm[0] and not came_back:
        yield warning(
            "rises_in_warm_up",
            f"while the learning rate rose to {run.train.learning_rate:g} over"
            f" {run.train.warmup_steps:,} steps, the loss went from {warm.min():.4g} up to"
            f" {warm[-1]:.4g}: the rate is too high",
            "lower train.learning_rate to where the loss was least in the warm-up",
        )


def gradients(run: Workdir) -> Iterator[Finding]:
    """Norms of the gradient, before clipping."""
    steps, norms = run.series("train/grad_norm")
    clip = run.train.grad_clip
    if not len(norms):
        return
    if np.all(norms == 0.0):
        yield error(
            "no_gradient",
            "train/grad_norm is 0 at every log line: the loss depends on no weight",
            "look at the stage's settings and its loss",
        )
    late = norms[len(norms) // 2 :]
    if clip and len(norms) >= FEWEST_LINES and late.min() > clip:
        yield note(
            "always_clipped",
            f"in the second half of the run every log line's gradient norm ({late.min():.3g} to"
            f" {late.max():.3g}) is above train.grad_clip {clip:g}, so every step is clipped",
            "harmless with Adam, which divides by the gradient's size; to catch outliers alone, set"
            f" train.grad_clip to about {2 * float(np.median(late)):.2g}",
        )
    around = np.maximum(norms[:-2], norms[2:])
    past = steps[1:-1] > run.train.warmup_steps
    high = 1 + np.flatnonzero(past & (norms[1:-1] > 10 * around))
    if len(high):
        i = high[0]
        yield (note if clip else warning)(
            "gradient_spikes",
            f"{len(high)} times the gradient's norm jumped up and came back, first at step"
            f" {int(steps[i]):,}, from {norms[i - 1]:.3g} to {norms[i]:.3g}",
            "clipping took care of it" if clip else "set train.grad_clip=1 in a new workdir",
        )


def evaluations(run: Workdir) -> Iterator[Finding]:
    """The last evaluation against chance, or against doing nothing."""
    if too_early(run, run.step) and run.done < 1.0:
        return
    if "retrieval" in run.stage.figures:
        yield from retrieval(run)
    own, others = run.last("eval/cosine_z_i"), run.last("eval/cosine_z_i_shuffled")
    if own is not None and others is not None and own <= others + TENTH * (1 - others):
        yield error(
            "prior_ignores_captions",
            f"sampled embeddings have a cosine of {own:.3f} with their own captions' pictures, and"
            f" {others:.3f} with those of other captions",
            "check that captions belong to their pictures and that stage.caption_drop is about 0.1;"
            " then train longer",
        )
    steps, psnrs = run.series("eval/psnr")
    bicubic = run.last("eval/psnr_bicubic")
    if len(psnrs) and bicubic is not None and psnrs[-1] < bicubic:
        best, advice = int(np.argmax(psnrs)), "train longer; it passes bicubic once it can copy"
        if psnrs[best] > psnrs[-1] + FALLEN_DB:
            advice = (
                f"it was {psnrs[best]:.1f} dB at step {int(steps[best]):,}, so longer training does"
                " not help; "
            )
            advice += (
                f"its crops are {run.stage.crop:g} of a picture's side, and whole pictures are"
                " drawn: raise stage.crop"
                if run.stage.crop < 1
                else "more data, or fewer steps"
            )
        yield warning(
            "worse_than_bicubic",
            f"upsampled pictures have a PSNR of {psnrs[-1]:.1f} dB, bicubic ones {bicubic:.1f} dB",
            advice,
        )


def retrieval(run: Workdir) -> Iterator[Finding]:
    """CLIP's held-out retrieval: above chance, by the binomial's tail."""
    pairs = run.last("eval/pairs")
    if not pairs:
        return
    captions, pictures = (run.last(f"eval/{name}") or pairs for name in ("captions", "pictures"))
    if captions < pairs:
        yield note(
            "captions_repeat",
            f"of {int(pairs)} held-out pairs {int(captions)} captions are different, and ranks and"
            " chances are over those",
            "nothing, if your data are so; a CLIP can't tell apart what its captions don't",
        )
    told = 0
    for way, tries in (("image_to_text", pictures), ("text_to_image", captions)):
        own_chance = "" if way == "image_to_text" else f"{way}_"
        seen = []
        for k in (1, 5):
            found = run.last(f"eval/{way}_r{k}")
            chance = run.last(f"eval/{own_chance}chance_r{k}") or run.last(f"eval/chance_r{k}")
            if found is not None and chance and _tail(tries, tries, chance) < UNLIKELY:
                seen.append((k, found, chance))
        told += bool(seen)
        if seen and all(
            _tail(found * tries, tries, chance) > UNLIKELY for _, found, chance in seen
        ):
            k, found, chance = seen[-1]
            known = run.last("train/accuracy") or 0.0
            yield error(
                "retrieval_at_chance",
                f"{way.replace('_', ' ')} finds {found:.1%} of {int(pairs)} held-out pairs"
                f" {'among the first five' if k == 5 else 'at once'}, and chance {chance:.1%}",
                f"it finds {known:.0%} of those that it trains on, which it knows by heart: more"
                " data, or fewer steps"
                if known > BY_HEART
                else "check that captions belong to their pictures; then train longer, on more data"
                " or with a larger batch",
            )
    if not told:
        yield note(
            "heldout_tells_nothing",
            f"{int(pairs)} held-out pairs, {int(captions)} captions: so few that even if all were"
            " found it might be chance",
            "hold more out, such as with another config.heldout_split",
        )


def _tail(hits: float, tries: float, chance: float) -> float:
    """How likely at least so many of so many are found by chance."""
    n, at_least = round(tries), round(hits)
    terms = (
        math.exp(
            math.lgamma(n + 1)
            - math.lgamma(i + 1)
            - math.lgamma(n - i + 1)
            + i * math.log(chance)
            + (n - i) * math.log1p(-chance)
        )
        for i in range(at_least, n + 1)
    )
    return 1.0 if chance >= 1.0 else sum(terms)


def few_heldout(run: Workdir) -> Iterator[Finding]:
    """Whether figures are of so few pairs that each of them counts."""
    pairs = run.last("eval/pairs")
    if pairs and pairs < FEW:
        yield note(
            "few_held_out",
            f"all held-out figures are of {int(pairs)} pairs: one more that is right moves a"
            f" fraction of them by {1 / pairs:.1%}",
            "do not compare runs by them; hold more out, or measure with unclip evaluate --num",
        )


def overfitting(run: Workdir) -> Iterator[Finding]:
    """Held-out loss that rises while the training loss falls."""
    steps, held = run.series("eval/heldout_loss")
    own_steps, own = run.series("train/loss")
    if len(held) < 3 or not np.all(np.isfinite(held)):
        return
    best = int(np.argmin(held))
    at_best, at_end = (np.interp(steps[i], own_steps, own) for i in (best, -1))
    if held[-1] > (1 + TENTH) * held[best] and at_end < at_best:
        yield warning(
            "overfitting",
            f"the held-out loss was least at step {int(steps[best]):,} ({held[best]:.4g}) and is"
            f" {held[-1]:.4g} now, while the training loss fell from {at_best:.4g} to"
            f" {at_end:.4g}",
            "more data, data.augment, train.weight_decay or a smaller network;"
            " --config.train.best=heldout_loss keeps the best checkpoint",
        )
