"""From noise to latents: references of several samples as one batch, samplers, and the denoising loop.

The loop takes anything called like the network, so that training can sample from its own (sharded) model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from domainshuttle.model.domains import domain_id
from domainshuttle.model.flow import sampling_schedule
from domainshuttle.model.pictures import as_shown, fit_reference

Sampler = Literal["euler", "unipc"]
TRAIN_TIMESTEPS = 1000
"""The network's timestep is this times t."""


@dataclass(frozen=True)
class References:
    """Reference images of b samples, as the network takes them: see ``DomainShuttleTransformer3DModel.forward``."""

    latents: Tensor
    """[b, r, c, h, w]"""
    subjects: Tensor
    """[b, r] int64"""
    domains: Tensor
    """[b, r] int64, -1 for none"""
    mask: Tensor | None = None
    """[b, r] bool, True at images; None when every slot holds one."""

    def inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the network."""
        return {
            "reference_latents": self.latents,
            "reference_subjects": self.subjects,
            "reference_domains": self.domains,
            "reference_mask": self.mask,
        }

    def to(self, device: torch.device | str) -> References:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return References(self.latents.to(device), self.subjects.to(device), self.domains.to(device), mask)

    def repeat(self, count: int) -> References:
        """Each sample ``count`` times in a row."""
        mask = None if self.mask is None else self.mask.repeat_interleave(count, 0)
        return References(*(x.repeat_interleave(count, 0) for x in (self.latents, self.subjects, self.domains)), mask)

    @classmethod
    def stack(
        cls,
        latents: Sequence[Tensor],
        subjects: Sequence[Sequence[int]] | None = None,
        domains: Sequence[Sequence[int | str | None]] | None = None,
        *,
        num_domains: int = 5,
        fill_slots: int | None = None,
    ) -> References:
        """Samples with different numbers of references as one batch.

        Args:
            latents: of each sample, [r_i, c, h, w].
            subjects: subject of each image; default: each image shows a subject of its own.
            domains: domain of each image, as name, id or None; default: none.
            num_domains: how many ids there are.
            fill_slots: fill every sample up to this many slots with zero latents that are attended to, as the released
                model does. Default: pad to the longest sample and mask the padding.

        Raises:
            ValueError: when the counts differ, or a domain is unknown.
        """
        counts = [len(x) for x in latents]
        subjects = [range(n) for n in counts] if subjects is None else subjects
        domains = [[None] * n for n in counts] if domains is None else domains
        for name, given in (("reference_subjects", subjects), ("reference_domains", domains)):
            if [len(x) for x in given] != counts:
                raise ValueError(f"{name} has {[len(x) for x in given]} entries a sample for {counts} reference images")
        r = fill_slots if fill_slots is not None else max(counts, default=0)
        if max(counts, default=0) > r:
            raise ValueError(f"{max(counts)} reference images for {r} slots: drop some")
        b = len(counts)
        padded = latents[0].new_zeros(b, r, *latents[0].shape[1:])
        # an empty slot of the release has the place of its own subject
        slots = torch.arange(r).repeat(b, 1)
        ids = torch.full((b, r), -1)
        for i, n in enumerate(counts):
            padded[i, :n] = latents[i]
            slots[i, :n] = torch.tensor(list(subjects[i]), dtype=torch.long)
            ids[i, :n] = torch.tensor([domain_id(a, num_domains) for a in domains[i]], dtype=torch.long)
        mask = None
        if fill_slots is None and min(counts, default=0) < r:
            mask = torch.arange(r) < torch.tensor(counts)[:, None]
        return cls(padded, slots, ids, mask).to(padded.device)


def letterbox(image: Image.Image, height: int, width: int) -> Tensor:
    """Picture [3, height, width] in -1..1, as it is meant to be looked at, fitted as in training."""
    pixels = fit_reference(np.asarray(as_shown(image)), height, width)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def make_scheduler(sampler: Sampler, shift: float) -> SchedulerMixin:
    """Flow Euler or UniPC of diffusers, with a shift of the timesteps (release: UniPC, 5 for 480p, 12 for 720p).

    Raises:
        ValueError: for an unknown sampler.
    """
    if sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=shift)
    if sampler == "unipc":
        return UniPCMultistepScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
    raise ValueError(f"unknown sampler {sampler!r}; use 'euler' or 'unipc'")


def set_schedule(scheduler: SchedulerMixin, steps: int, device: torch.device | str) -> list[float]:
    """Set ``steps`` times from 1 towards 0, shifted by the scheduler; returns them as 1000 t."""
    sigmas = sampling_schedule(steps, shift=1.0)[:-1].double().numpy()  # the scheduler shifts them
    scheduler.set_timesteps(sigmas=sigmas, num_inference_steps=steps, device=device)
    scheduler.set_begin_index(0)
    return scheduler.timesteps.tolist()


@dataclass
class DenoisingState:
    """What the denoising loop works on; its observer may change it after each step."""

    latents: Tensor
    """[b, c, f, h, w] float32: first noise, at last the result."""
    prompt_embeds: Tensor
    """[b, l, text_dim]"""
    negative_prompt_embeds: Tensor | None = None
    """[b, l, text_dim], needed where a guidance scale is above 1."""
    stop: bool = False
    """Set to end the loop."""


@torch.no_grad()
def denoise(
    expert: Callable[[float], tuple[Callable[..., Any], float]],
    scheduler: SchedulerMixin,
    steps: int,
    state: DenoisingState,
    references: References | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    on_step: Callable[[int, float, DenoisingState], None] | None = None,
    reference_guidance: float | None = None,
) -> Tensor:
    """Latents [b, c, f, h, w] of a batch of samples.

    Guidance moves the prediction away from that for the negative text with the same references, as in the release.
    With ``reference_guidance`` that one is moved in turn away from the prediction without references.

    Args:
        expert: gives, for a time t in [0, 1], the network and its guidance scale; at most 1 is no guidance.
        scheduler: from :func:`make_scheduler`.
        steps: how many to take.
        state: noise and text embeddings.
        references: of the samples; None for none.
        attention_kwargs: of the network.
        on_step: called after each step with its number, its 1000 t and the state.
        reference_guidance: scale of the guidance by the references; None for none. It needs a model trained with
            dropped references, and a third evaluation a step.

    Raises:
        ValueError: for a guidance scale above 1 without negative text.
    """
    options: dict[str, Any] = {} if attention_kwargs is None else {"attention_kwargs": dict(attention_kwargs)}
    given = options | ({} if references is None else dict(references.inputs()))
    for i, timestep in enumerate(set_schedule(scheduler, steps, state.latents.device)):
        network, guidance = expert(timestep / TRAIN_TIMESTEPS)
        times = torch.full((state.latents.shape[0],), timestep, dtype=torch.float32, device=state.latents.device)
        velocity = network(state.latents, times, state.prompt_embeds, **given, return_dict=False)[0].float()
        if guidance > 1:
            if state.negative_prompt_embeds is None:
                raise ValueError(f"guidance scale {guidance} needs negative_prompt_embeds: pass them, or a scale of 1")
            base = network(state.latents, times, state.negative_prompt_embeds, **given, return_dict=False)[0].float()
            velocity = base + guidance * (velocity - base)
            if reference_guidance is not None and references is not None:
                bare = network(state.latents, times, state.negative_prompt_embeds, **options, return_dict=False)[0]
                velocity = velocity + (reference_guidance - 1) * (base - bare.float())
        state.latents = scheduler.step(velocity, scheduler.timesteps[i], state.latents, return_dict=False)[0]
        if on_step is not None:
            on_step(i, timestep, state)
        if state.stop:
            break
    return state.latents
