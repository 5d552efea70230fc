"""What the configs that fine-tune Kandinsky 2.2 share: where everything comes from.

First convert Kandinsky, its prior's repository and its decoder's together:

    unclip convert kandinsky kandinsky-community/kandinsky-2-2-prior \
        kandinsky-community/kandinsky-2-2-decoder --out runs/kandinsky

Then name your own pairs, and train either stage, as configs/karlo/base.py says; the variants are
those there, :lora, :whole and :smoke, and one more. The decoder reads no captions, so pictures
alone will do. To sample with what was trained, put it in a folder beside the other stages, which
may be links: runs/mine/{clip,prior,decoder}.

CLIP is ViT-bigG/14, 2.5 B parameters. Its picture tower embeds all pictures once, before training
begins, and takes 10.2 GB in float32 while it does; the embeddings are kept (`unclip embed` makes
them on another machine). Its text tower, 2.8 GB, stays with the prior, and none of it with the
decoder.

    :plan   a stage whole as it is published, with how it trains whole, and no folder: for
            unclip plan --config=kandinsky/decoder:plan --topology=v5e:1x1 --sample=1 \
                --config.stage.sides='(768, 768)'

The figures of memory are counts of bytes, 1 GB = 1e9. Learning rates and lengths are ours: where to
begin, not what was found best. What any of it reaches on your data has not been measured.
"""

from unclip_jax import stages
from unclip_jax.configs.karlo.base import IN_BFLOAT16 as IN_BFLOAT16
from unclip_jax.configs.karlo.base import make as _make


def make(changes, variant, published, microbatch):
    """The config that fine-tunes a stage.

    Args:
        changes: the stage's kind, and what differs from the folder's.
        variant: see above.
        published: makes the stage as it is published.
        microbatch: examples that a chip computes at once.
    """
    plan = variant == "plan"
    settings = stages.describe(published()) if plan else changes
    told = {"microbatch": microbatch, "folder": "runs/kandinsky"}
    return _make(settings, "whole" if plan else variant, **told)
