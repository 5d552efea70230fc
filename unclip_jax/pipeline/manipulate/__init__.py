"""What can be done with an image, section 3 of the paper, and what its latents show.

    walk = Walk(steps=50)
    latents = encode(model, [image], walk)                      # (z_i, x_T)
    again = pictures(model, key, latents, walk)                 # the image itself
    others = pictures(model, key, latents, Walk(steps=50, eta=1.0), num=4)

Every value that a user turns, eta, guidance scale, theta, seed and caption, is traced: another one
compiles nothing. The number of steps and of pictures computed together is static.
"""

from unclip_jax.common import lazy

__all__, __getattr__, __dir__ = lazy.face(
    __name__,
    {
        "edits": "inpaint interpolate pictures reconstruct text_diff upscale",
        "latents": "Latents Walk decode embed encode noise render",
        "mixes": "MIXES img2img mix mixed",
        "probes": "ABLATIONS PCA_DIMS ablate_prior check_labels fit_pca overlay pca_embeddings"
        " zero_shot",
        "spheres": "slerp spherical_mean",
    },
)
