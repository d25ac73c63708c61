"""``DomainShuttlePipeline``: prompt and reference pictures in, video or picture out, as diffusers users know it."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from domainshuttle.model.domains import domain_id
from domainshuttle.model.encoders import BlockDCTCodec, TextEncoder, VideoEncoder, WanVideoEncoder
from domainshuttle.model.file_mode import UmaskMode
from domainshuttle.model.flow import sample_noise
from domainshuttle.model.sampling import DenoisingState, References, denoise, letterbox
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

SPATIAL_STRIDE, TEMPORAL_STRIDE = 8, 4
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt of Wan."""

Domains = Sequence[int | str | None]


class InputError(ValueError):
    """Arguments of a pipeline that contradict each other or the model: what is wrong with each, and what to use."""


@dataclass
class DomainShuttlePipelineOutput(BaseOutput):
    """What was generated, and what it cost."""

    frames: Any
    """A list of frames for each sample (``pil``), or [b, f, h, w, 3] (``np``), [b, f, 3, h, w] (``pt``), or latents."""
    seconds_per_step: list[float]
    """Time of each denoising step, for the whole batch."""
    peak_memory_bytes: int
    """Most memory in use: of the accelerator during the call, on a CPU of the process since its start."""


class DomainShuttlePipeline(UmaskMode, DiffusionPipeline):
    """Subject-driven text-to-video generation.

    Args:
        transformer: the network; with two experts, the one for high noise.
        scheduler: flow Euler or UniPC, see ``sampling.make_scheduler``.
        vae: Wan's VAE or the desk-size codec; None to work on latents.
        text_encoder: UMT5; None to work on text embeddings.
        tokenizer: of the text encoder.
        transformer_2: the expert for low noise.
        boundary_ratio: time t' from which on ``transformer`` is in charge; default the transformer's ``boundary``.
        fill_reference_slots: whether missing references are filled up with zero latents, as the released model was
            trained, rather than left out.
    """

    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _optional_components: ClassVar = ["vae", "text_encoder", "tokenizer", "transformer_2"]

    def __init__(
        self,
        transformer: DomainShuttleTransformer3DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKLWan | BlockDCTCodec | None = None,
        text_encoder: UMT5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        transformer_2: DomainShuttleTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        fill_reference_slots: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer_2=transformer_2,
        )
        if boundary_ratio is None and transformer_2 is not None:
            boundary_ratio = transformer.config.boundary
            if boundary_ratio is None:
                raise ValueError("two transformers, but no boundary between them: pass boundary_ratio (Wan2.2: 0.875)")
        self.register_to_config(boundary_ratio=boundary_ratio, fill_reference_slots=fill_reference_slots)
        self.video_processor = VideoProcessor(vae_scale_factor=SPATIAL_STRIDE)
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to end the loop; the latents so far are decoded."""
        return self._interrupt

    def video_encoder(self) -> VideoEncoder:
        """The VAE behind the interface that both kinds share.

        Raises:
            ValueError: when the pipeline has none.
        """
        if self.vae is None:
            raise ValueError("this pipeline has no vae: pass reference_latents and output_type='latent', or load a vae")
        return WanVideoEncoder(self.vae, "") if isinstance(self.vae, AutoencoderKLWan) else self.vae

    @torch.no_grad()
    def encode_prompt(self, prompt: Sequence[str]) -> Tensor:
        """Text embeddings [b, text_len, text_dim], padded with zeros.

        Raises:
            ValueError: when the pipeline has no text encoder.
        """
        return self._prompt_encoder().encode_padded(list(prompt)).to(self._execution_device)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a whole prompt, of which the model reads at most its text_len. Raises as `encode_prompt`."""
        return self._prompt_encoder().count_tokens(prompt)

    def _prompt_encoder(self) -> TextEncoder:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text_encoder and tokenizer: load them, or pass prompt_embeds")
        return TextEncoder(self.text_encoder, self.tokenizer, "", self.transformer.config.text_len)

    @torch.no_grad()
    def encode_references(
        self,
        references: Sequence[Sequence[Image.Image]],
        subjects: Sequence[Sequence[int]] | None,
        domains: Sequence[Domains] | None,
        height: int,
        width: int,
    ) -> References:
        """Pictures of each sample as latents of one video frame, scaled to fit and padded with white."""
        config = self.transformer.config
        counts = [len(images) for images in references]
        if max(counts) > config.max_references:
            raise InputError(f"{max(counts)} reference images, the model takes {config.max_references}: drop some")
        size = height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
        latents = torch.zeros(0, config.in_channels, *size, device=self._execution_device)
        pixels = [letterbox(image, height, width) for images in references for image in images]
        if pixels:
            latents = self.video_encoder().encode(torch.stack(pixels)[:, :, None].to(self._execution_device))[:, :, 0]
        return References.stack(
            latents.split(counts),
            subjects,
            domains,
            num_domains=config.num_domains,
            fill_slots=config.max_references if self.config.fill_reference_slots else None,
        )

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        seed: int | Sequence[int] | None,
    ) -> Tensor:
        """Noise [b, c, f, h, w] in float32; from a seed it is the same on every device and in every batch."""
        if seed is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        seeds = [seed + i for i in range(shape[0])] if isinstance(seed, int) else list(seed)
        if generator is not None or len(seeds) != shape[0]:
            raise ValueError(f"got {len(seeds)} seeds for {shape[0]} samples: give one each, and no generator")
        return sample_noise(0, torch.tensor(seeds), 0, shape[1:], device=self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = NEGATIVE_PROMPT,
        references: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        reference_subjects: Sequence[int] | Sequence[Sequence[int]] | None = None,
        reference_domains: Domains | Sequence[Domains] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 40,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        reference_guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        reference_latents: References | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DomainShuttlePipelineOutput | tuple[Any]:
        """Generate one video (or picture, with ``num_frames=1``) for each prompt.

        Args:
            prompt: one text, or one for each sample.
            negative_prompt: text to move away from, where the guidance scale is above 1.
            references: pictures of the subjects, for one prompt or for each; each subject's pictures together.
            reference_subjects: index of the subject on each picture; default: one picture a subject.
            reference_domains: domain that each subject shall have in the video: a name ("human", "Fantasy Domain"), an
                id, or None.
            height: of the video, a multiple of 16.
            width: of the video, a multiple of 16.
            num_frames: of the video, 4 n + 1.
            num_inference_steps: denoising steps.
            guidance_scale: 1 for no guidance; with two experts that of the high-noise one (release: 3).
            guidance_scale_2: of the low-noise expert (release: 4); default the same.
            reference_guidance_scale: of the guidance by the references, beside that by the text; None for none.
            num_videos_per_prompt: how many to make of each prompt.
            generator: of the noise, one or one for each sample.
            seed: instead of a generator: one for each sample; from a single one, sample i gets ``seed + i``.
            latents: noise [b, c, f, h, w] to start from; sets the size.
            prompt_embeds: [b, l, text_dim] instead of a prompt.
            negative_prompt_embeds: [b, l, text_dim] instead of a negative prompt.
            reference_latents: encoded references of all samples, instead of pictures.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: whether to return an output object rather than a tuple of the frames.
            attention_kwargs: of the network, e.g. the ``scale`` of LoRA layers.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` after each step; what it returns
                replaces the tensors.
            callback_on_step_end_tensor_inputs: which it gets of ``latents``, ``prompt_embeds`` and
                ``negative_prompt_embeds``.

        Raises:
            InputError: for arguments that contradict each other or the model, before anything is computed.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        one = isinstance(prompt, str)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if one and references is not None:  # a single prompt comes with plain lists
            references, reference_subjects, reference_domains = (
                None if x is None else [x] for x in (references, reference_subjects, reference_domains)
            )
        scales = guidance_scale, guidance_scale if guidance_scale_2 is None else guidance_scale_2
        self.check_inputs(
            prompts,
            prompt_embeds,
            height,
            width,
            num_frames,
            num_inference_steps,
            scales if reference_guidance_scale is None else (*scales, reference_guidance_scale),
            seed,
            references,
            reference_subjects,
            reference_domains,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        _reset_peak_memory(device)

        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompts or [])
        b = prompt_embeds.shape[0]
        if negative_prompt_embeds is None and max(scales) > 1:
            negatives = [negative_prompt] * b if isinstance(negative_prompt, str) else negative_prompt
            negative_prompt_embeds = self.encode_prompt(negatives)
        if references is not None:
            reference_latents = self.encode_references(references, reference_subjects, reference_domains, height, width)
        if latents is None:
            frames = (num_frames - 1) // TEMPORAL_STRIDE + 1
            size = frames, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
            shape = (b * num_videos_per_prompt, self.transformer.config.in_channels, *size)
            latents = self.prepare_latents(shape, generator, seed)

        def expert(t: float) -> tuple[Callable[..., Any], float]:
            if self.transformer_2 is None or t >= self.config.boundary_ratio:
                return self.transformer, scales[0]
            return self.transformer_2, scales[1]

        state = DenoisingState(
            latents.to(device, torch.float32),
            prompt_embeds.to(device).repeat_interleave(num_videos_per_prompt, 0),
            None
            if negative_prompt_embeds is None
            else negative_prompt_embeds.to(device).repeat_interleave(num_videos_per_prompt, 0),
        )
        ends: list[float] = []
        self._interrupt = False
        with self.progress_bar(total=num_inference_steps) as progress:

            def on_step(i: int, timestep: float, state: DenoisingState) -> None:
                _synchronise(device)
                ends.append(time.perf_counter())
                progress.update()
                if callback_on_step_end is not None:
                    tensors = {name: getattr(state, name) for name in callback_on_step_end_tensor_inputs}
                    for name, value in callback_on_step_end(self, i, timestep, tensors).items():
                        setattr(state, name, value)
                state.stop = self._interrupt

            _synchronise(device)
            started = time.perf_counter()
            latents = denoise(
                expert,
                self.scheduler,
                num_inference_steps,
                state,
                None if reference_latents is None else reference_latents.to(device).repeat(num_videos_per_prompt),
                attention_kwargs,
                on_step,
                reference_guidance_scale,
            )
        frames = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        seconds = [end - begin for begin, end in zip([started, *ends], ends, strict=False)]
        return DomainShuttlePipelineOutput(frames, seconds, _peak_memory(device))

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Frames of latents [b, c, f, h, w], one sample at a time, since the VAE's memory grows with each."""
        encoder = self.video_encoder()
        pixels = torch.cat([encoder.decode(sample[None]) for sample in latents])
        return self.video_processor.postprocess_video(pixels, output_type=output_type)

    def check_inputs(
        self,
        prompts: Sequence[str] | None,
        prompt_embeds: Tensor | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 40,
        guidance_scales: Sequence[float] = (),
        seed: int | Sequence[int] | None = None,
        references: Sequence[Sequence[Any]] | None = None,
        reference_subjects: Sequence[Sequence[int]] | None = None,
        reference_domains: Sequence[Domains] | None = None,
        callback_inputs: Sequence[str] = (),
    ) -> None:
        """Raise one InputError that lists what is wrong with the arguments of a call: lists have an entry a prompt."""
        problems = []
        if (prompts is None) == (prompt_embeds is None):
            problems.append("pass either prompt or prompt_embeds")
        _, ph, pw = self.transformer.config.patch_size
        multiple = SPATIAL_STRIDE * ph, SPATIAL_STRIDE * pw
        if height % multiple[0] or width % multiple[1] or min(height, width) < 1:
            nearest = [max(m, round(x / m) * m) for x, m in zip((height, width), multiple, strict=True)]
            problems.append(
                f"height x width {height}x{width} must be multiples of {multiple[0]} and {multiple[1]}: "
                f"use {nearest[0]}x{nearest[1]}"
            )
        if num_frames < 1 or (num_frames - 1) % TEMPORAL_STRIDE:
            nearest_frames = max(0, round((num_frames - 1) / TEMPORAL_STRIDE)) * TEMPORAL_STRIDE + 1
            problems.append(f"num_frames {num_frames} must be {TEMPORAL_STRIDE} n + 1: use {nearest_frames}")
        if num_inference_steps < 1:
            problems.append(f"num_inference_steps {num_inference_steps} must be at least 1")
        if wrong := [scale for scale in guidance_scales if not 0 <= scale < math.inf]:
            problems.append(f"guidance scale {wrong[0]} must be a number of at least 0, and 1 is no guidance")
        seeds = [seed] if isinstance(seed, int) else seed or []
        if wrong_seeds := [one for one in seeds if not -(2**63) <= one < 2**63]:
            problems.append(f"seed {wrong_seeds[0]} must be a whole number of 64 bits, such as 0")
        if references is not None:
            count = len(prompts) if prompts is not None else 0 if prompt_embeds is None else len(prompt_embeds)
            problems += self._reference_problems(references, reference_subjects, reference_domains, count)
        unknown = set(callback_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            problems.append(f"callback tensors {sorted(unknown)} are not among {self._callback_tensor_inputs}")
        if problems:
            raise InputError("; ".join(problems))

    def _reference_problems(
        self,
        references: Sequence[Sequence[Any]],
        subjects: Sequence[Sequence[int]] | None,
        domains: Sequence[Domains] | None,
        count: int,
    ) -> Iterator[str]:
        most, num_domains = self.transformer.config.max_references, self.transformer.config.num_domains
        if len(references) != count:
            yield f"references of {len(references)} samples for {count} prompts: pass a list for each prompt"
            return
        counts = [len(images) for images in references]
        if max(counts, default=0) > most:
            yield f"{max(counts)} reference images, the model takes {most}: drop some"
        given: Sequence[Any] | None
        for name, given in (("reference_subjects", subjects), ("reference_domains", domains)):
            if given is not None and (lengths := [len(entries) for entries in given]) != counts:
                yield f"{name} has {lengths} entries a sample for {counts} reference images"
        if wrong := [one for sample in subjects or () for one in sample if not 0 <= one < most]:
            yield f"subject {wrong[0]} must be one of 0 to {most - 1}"
        for domain in {domain for sample in domains or () for domain in sample}:
            try:
                domain_id(domain, num_domains)
            except ValueError as error:
                yield str(error)


def _synchronise(device: torch.device) -> None:
    """Wait for the accelerator, so that a step's time is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator since the reset, on a CPU of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
