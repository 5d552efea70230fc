"""All stages over each other, and what is done with them: captions in, pictures out."""

from unclip_jax.common import lazy

__all__, __getattr__, __dir__ = lazy.face(__name__, {"unclip": "UnCLIP"})
