"""The loop that trains any stage, and what it reads, keeps and reports."""

from unclip_jax.common import lazy

__all__, __getattr__, __dir__ = lazy.face(
    __name__,
    {
        "config": "TrainConfig",
        "loop": "train",
        "optimizers": "make_optimizer",
        "step": "TrainState init_state make_train_step",
    },
)
