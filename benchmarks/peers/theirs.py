"""The rows in PyTorch: diffusers' and transformers' modules, eager or through torch.compile."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers.pipelines.unclip import UnCLIPPipeline

from benchmarks.peers import sizes
from benchmarks.peers.sizes import GUIDANCE, LEARNING_RATE, STEPS, Inputs
from unclip_jax.models import ClipConfig

Work = Callable[[], Any]


class Theirs:
    """The same folders in diffusers' pipelines."""

    def __init__(self, folders: list[Path], dtype: str, device: str, compiled: bool) -> None:
        """Load them onto a device; `dtype` is "" for float32."""
        text2im, variations = folders
        self.device, self.is_compiled = device, compiled
        self.dtype = getattr(torch, dtype or "float32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pipeline = UnCLIPPipeline.from_pretrained(text2im, torch_dtype=self.dtype)
            self.image_encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(
                variations / "image_encoder", dtype=self.dtype
            )
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(device)
        self.image_encoder.to(device)

    def work(self, row: str, given: Inputs) -> Work:
        """What the row does."""
        torch.manual_seed(0)
        torch.compiler.reset()
        arrays = {name: self._tensor(v) for name, v in vars(given).items() if name != "prompts"}
        return getattr(self, f"_{row}")(arrays, given.prompts)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        if array.ndim == 4:
            array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
        tensor = torch.from_numpy(array).to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _compiled(self, module: Any) -> Any:
        """The module through torch.compile, also where an earlier row compiled it."""
        return torch.compile(getattr(module, "_orig_mod", module)) if self.is_compiled else module

    def _forward(self, function: Callable[[], torch.Tensor]) -> Work:
        def work() -> torch.Tensor:
            with torch.inference_mode():
                return self._done(function())

        return work

    def _done(self, value: torch.Tensor) -> torch.Tensor:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return value

    def _matmul(self, x, prompts) -> Work:
        a, b = map(self._tensor, sizes.matrices("cpu" if self.device == "cpu" else "gpu"))
        product = self._compiled(torch.matmul)
        return self._forward(lambda: product(a, b))

    def _clip_text(self, x, prompts) -> Work:
        encoder = self._compiled(self.pipeline.text_encoder)
        return self._forward(lambda: encoder(x["tokens"].long()).text_embeds)

    def _clip_image(self, x, prompts) -> Work:
        config = ClipConfig()
        mean, std = (
            torch.tensor(s, device=self.device, dtype=self.dtype).reshape(1, 3, 1, 1)
            for s in (config.pixel_mean, config.pixel_std)
        )
        encoder = self._compiled(self.image_encoder)

        def embed() -> torch.Tensor:
            return encoder(((x["pixels"] + 1) / 2 - mean) / std).image_embeds

        return self._forward(embed)

    def _prior_sample(self, x, prompts) -> Work:
        """The loop of UnCLIPPipeline.__call__, with the caption encoded beforehand."""
        prior, scheduler = self._compiled(self.pipeline.prior), self.pipeline.prior_scheduler
        empty = self.pipeline.tokenizer(
            [""] * len(x["t"]), padding="max_length", max_length=77, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            none = self.pipeline.text_encoder(empty.input_ids)
        z_t = torch.cat([none.text_embeds, x["z_t"]])
        states = torch.cat([none.last_hidden_state, x["states"]])
        mask = torch.cat([empty.attention_mask.bool(), x["mask"]])

        def sample() -> torch.Tensor:
            scheduler.set_timesteps(STEPS["prior"], device=self.device)
            latents = torch.randn(x["z_t"].shape, device=self.device, dtype=self.dtype)
            times = scheduler.timesteps
            for i, t in enumerate(times):
                predicted = prior(
                    torch.cat([latents] * 2),
                    timestep=t,
                    proj_embedding=z_t,
                    encoder_hidden_states=states,
                    attention_mask=mask,
                ).predicted_image_embedding
                without, with_text = predicted.chunk(2)
                predicted = without + GUIDANCE["prior"] * (with_text - without)
                previous = None if i + 1 == len(times) else times[i + 1]
                latents = scheduler.step(
                    predicted, timestep=t, sample=latents, prev_timestep=previous
                ).prev_sample
            return self.pipeline.prior.post_process_latents(latents)

        return self._forward(sample)

    def _decoder_inputs(self, x) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self.pipeline.text_proj.clip_extra_context_tokens
        with torch.inference_mode():
            context, emb = self.pipeline.text_proj(
                image_embeddings=x["z_i"],
                prompt_embeds=x["z_t"],
                text_encoder_hidden_states=x["states"],
                do_classifier_free_guidance=False,
            )
        mask = torch.nn.functional.pad(x["mask"], (tokens, 0), value=True)
        return context.clone(), emb.clone(), mask

    def _decoder_forward(self, x, prompts) -> Work:
        unet, (context, emb, mask) = self._compiled(self.pipeline.decoder), self._decoder_inputs(x)

        def forward() -> torch.Tensor:
            return unet(
                x["x_t"], x["t"], context, class_labels=emb, attention_mask=mask
            ).sample.permute(0, 2, 3, 1)

        return self._forward(forward)

    def _decoder_train(self, x, prompts) -> Work:
        context, emb, mask = self._decoder_inputs(x)
        inputs = (x["x_t"], x["t"], context)
        settings = {"class_labels": emb, "attention_mask": mask}
        return self._trained(self.pipeline.decoder, inputs, settings, x["target"])

    def _super_res_forward(self, x, prompts) -> Work:
        unet = self._compiled(self.pipeline.super_res_first)
        return self._forward(lambda: unet(x["high"], x["t"]).sample.permute(0, 2, 3, 1))

    def _super_res_train(self, x, prompts) -> Work:
        inputs = (x["high"], x["t"])
        return self._trained(self.pipeline.super_res_first, inputs, {}, x["high_target"])

    def _trained(self, module, inputs, settings, target) -> Work:
        """A step of AdamW on a copy; each call goes on from the one before."""
        module = copy.deepcopy(module).requires_grad_(True)
        network = self._compiled(module)
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=LEARNING_RATE, weight_decay=0.01, foreach=True
        )

        def work() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            predicted = network(*inputs, **settings).sample
            loss = (predicted.float() - target.float()).square().mean()
            loss.backward()
            optimizer.step()
            return self._done(loss.detach())

        return work

    def _text_to_image(self, x, prompts) -> Work:
        if self.is_compiled:
            for name in ("prior", "decoder", "super_res_first", "super_res_last", "text_encoder"):
                setattr(self.pipeline, name, self._compiled(getattr(self.pipeline, name)))

        def draw() -> np.ndarray:
            return self.pipeline(
                prompts,
                prior_num_inference_steps=STEPS["prior"],
                decoder_num_inference_steps=STEPS["decoder"],
                super_res_num_inference_steps=STEPS["super_res"],
                prior_guidance_scale=GUIDANCE["prior"],
                decoder_guidance_scale=GUIDANCE["decoder"],
                output_type="np",
            ).images

        return draw
