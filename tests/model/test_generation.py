"""The pipeline, on desk-size encoders and a tiny Wan VAE. Run: pytest tests/model/test_generation.py"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from PIL import Image

from domainshuttle.model.convert import from_wan
from domainshuttle.model.encoders import BlockDCTCodec, byte_umt5
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.model.sampling import DenoisingState, References, denoise, letterbox, make_scheduler
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

MakeModel = Callable[..., DomainShuttleTransformer3DModel]
SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3}


@pytest.fixture
def make_pipe(make_model: MakeModel) -> Callable[..., DomainShuttlePipeline]:
    def make(sampler: str = "euler", shift: float = 5.0, experts: int = 1, **given: Any) -> DomainShuttlePipeline:
        text_encoder, tokenizer = byte_umt5()
        boundary = 0.875 if experts == 2 else None
        models = [make_model(seed=i, text_dim=64, text_len=24, boundary=boundary) for i in range(experts)]
        pipe = DomainShuttlePipeline(
            **{
                "transformer": models[0],
                "transformer_2": models[1] if experts == 2 else None,
                "scheduler": make_scheduler(sampler, shift),
                "vae": BlockDCTCodec(),
                "text_encoder": text_encoder,
                "tokenizer": tokenizer,
                **given,
            }
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


MakePipe = Callable[..., DomainShuttlePipeline]


def picture(colour: str, size: tuple[int, int] = (30, 60)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_outputs(frames: int, output_type: str, make_pipe: MakePipe) -> None:
    output = make_pipe()(
        "a red circle",
        references=[picture("red")],
        reference_domains=["Fantasy Domain"],
        seed=0,
        output_type=output_type,
        **SIZE | {"num_frames": frames},
    )
    if output_type == "pil":
        assert [len(clip) for clip in output.frames] == [frames]
        assert output.frames[0][0].size == (48, 32)
    else:
        shape = {"np": (1, frames, 32, 48, 3), "pt": (1, frames, 3, 32, 48), "latent": (1, 16, (frames + 3) // 4, 4, 6)}
        assert output.frames.shape == shape[output_type]
        assert np.isfinite(np.asarray(output.frames)).all()
    assert len(output.seconds_per_step) == 3
    assert output.peak_memory_bytes > 1e6


def test_samples_with_seeds_do_not_depend_on_their_batch(make_pipe: MakePipe) -> None:
    """Different prompts and different numbers of references in one batch."""
    pipe = make_pipe()
    prompts = ["a red circle", "two blue squares at the sea", "nothing"]
    references = [[picture("red")], [picture("blue"), picture("navy", (60, 30)), picture("black")], []]
    subjects, domains = [[0], [0, 0, 1], []], [["human"], ["fantasy", "fantasy", None], []]
    given = {"output_type": "latent", **SIZE}
    together = pipe(prompts, "bad", references, subjects, domains, seed=[7, 8, 9], **given).frames
    for i in range(3):
        alone = pipe(prompts[i], "bad", references[i], subjects[i], domains[i], seed=7 + i, **given).frames
        torch.testing.assert_close(together[i], alone[0], atol=2e-4, rtol=1e-4)
    again = pipe(prompts, "bad", references, subjects, domains, seed=7, **given).frames
    assert torch.equal(again, together)  # one seed counts up


def test_generators_and_several_videos_of_a_prompt(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    given = {"output_type": "latent", "guidance_scale": 1.0, **SIZE}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    two = pipe("a cat", generator=generators, num_videos_per_prompt=2, **given).frames
    one = pipe("a cat", generator=torch.Generator().manual_seed(1), **given).frames
    torch.testing.assert_close(two[1], one[0], atol=2e-4, rtol=1e-4)


def test_references_subjects_and_domains_matter(make_pipe: MakePipe) -> None:
    pipe = make_pipe()

    def frames(**given: Any) -> torch.Tensor:
        return pipe("a cat", seed=0, output_type="latent", guidance_scale=1.0, **given, **SIZE).frames

    images = [picture("red"), picture("blue")]
    results = [
        frames(),
        frames(references=images),
        frames(references=images[::-1]),
        frames(references=images, reference_subjects=[0, 0]),
        frames(references=images, reference_domains=["human", None]),
    ]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).abs().max() > 1e-3


def test_equals_diffusers_wan_pipeline_without_references(tiny_config: dict[str, Any]) -> None:
    """Same weights, scheduler and noise, with guidance and two experts."""
    torch.manual_seed(0)
    wans = [WanTransformer3DModel(**tiny_config | {"text_dim": 64}).eval() for _ in range(2)]
    text_encoder, tokenizer = byte_umt5()
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1, dim_mult=[1, 1, 1, 1], z_dim=16).eval()
    theirs = WanPipeline(tokenizer, text_encoder, vae, make_scheduler("unipc", 3.0), *wans, boundary_ratio=0.875)
    ours = DomainShuttlePipeline(
        from_wan(wans[0], text_len=24),
        make_scheduler("unipc", 3.0),
        vae,
        text_encoder,
        tokenizer,
        from_wan(wans[1], text_len=24),
        boundary_ratio=0.875,
    )
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 2, 4, 6)
    given = {"prompt": "a cat", "negative_prompt": "bad", "latents": noise, "guidance_scale": 3.0, **SIZE}
    given |= {"num_inference_steps": 6, "guidance_scale_2": 4.0}
    expected = theirs(**given, max_sequence_length=24, output_type="latent").frames
    scheduled = theirs.scheduler.sigmas
    assert ours(**given, output_type="latent").frames.isfinite().all()
    # Wan spaces its times from 1 to 1/1000, diffusers' pipeline likewise, the original code and ours from 1 to 0.
    assert (ours.scheduler.sigmas - scheduled).abs().max() < 2e-3
    ours.scheduler.set_timesteps = lambda num_inference_steps, device, sigmas: type(ours.scheduler).set_timesteps(
        ours.scheduler, num_inference_steps, device
    )
    torch.testing.assert_close(ours(**given, output_type="latent").frames, expected, atol=1e-4, rtol=1e-4)
    frames = theirs(**given, max_sequence_length=24, output_type="np").frames
    np.testing.assert_allclose(ours(**given, output_type="np").frames, frames, atol=1e-3)


def test_experts_switch_at_the_boundary(make_pipe: MakePipe) -> None:
    pipe = make_pipe(experts=2, shift=1.0)
    calls = []
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name)
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.append((name, float(args[1][0]))), with_kwargs=True
        )
    pipe("a cat", seed=0, output_type="latent", guidance_scale=1.0, **SIZE | {"num_inference_steps": 8})
    assert [name for name, t in calls] == ["transformer"] * 2 + ["transformer_2"] * 6
    assert calls[1][1] == 875.0  # the boundary itself is the high-noise expert's


def test_guidance_of_each_expert(make_pipe: MakePipe) -> None:
    pipe = make_pipe(experts=2, shift=1.0)
    counts = {"transformer": 0, "transformer_2": 0}
    for name in counts:

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        getattr(pipe, name).register_forward_hook(count)
    steps = {"num_inference_steps": 8}
    pipe("a cat", seed=0, output_type="latent", guidance_scale=1.0, guidance_scale_2=4.0, **SIZE | steps)
    assert counts == {"transformer": 2, "transformer_2": 12}


def test_euler_takes_the_written_out_steps(make_model: MakeModel) -> None:
    model = make_model()
    noise, text, negative = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    references = References.stack([torch.randn(1, 16, 4, 6), torch.randn(2, 16, 4, 6)], domains=[[0], [1, None]])
    state = DenoisingState(noise, text, negative)
    result = denoise(lambda t: (model, 3.0), make_scheduler("euler", 5.0), 4, state, references)
    latents, times = noise, [5 * t / (1 + 4 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    with torch.no_grad():
        for t, following in pairwise(times):
            at = torch.full((2,), 1000 * t)
            good, bad = (model(latents, at, e, **references.inputs()).sample for e in (text, negative))
            latents = latents + (following - t) * (bad + 3.0 * (good - bad))
    torch.testing.assert_close(result, latents, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"guidance scale 2\.0 needs negative_prompt_embeds"):
        denoise(lambda t: (model, 2.0), make_scheduler("euler", 5.0), 1, DenoisingState(noise, text))


def test_reference_guidance_moves_away_from_no_references(make_model: MakeModel) -> None:
    model = make_model()
    noise, text, negative = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    references = References.stack([torch.randn(1, 16, 4, 6), torch.randn(1, 16, 4, 6)])

    def run(scale: float | None) -> torch.Tensor:
        state = DenoisingState(noise, text, negative)
        scheduler = make_scheduler("euler", 5.0)
        return denoise(lambda t: (model, 2.0), scheduler, 1, state, references, reference_guidance=scale)

    at = torch.full((2,), 1000.0)
    with torch.no_grad():
        full, base = (model(noise, at, e, **references.inputs()).sample for e in (text, negative))
        bare = model(noise, at, negative).sample
    # one step from t = 1 to 0; with equal scales it is plain guidance away from neither text nor references
    torch.testing.assert_close(run(2.0), noise - (bare + 2.0 * (full - bare)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(1.0), run(None), atol=1e-5, rtol=1e-5)
    expected = noise - (bare + 3.0 * (base - bare) + 2.0 * (full - base))
    torch.testing.assert_close(run(3.0), expected, atol=1e-4, rtol=1e-4)


def test_callback_replaces_tensors_and_interrupts(make_pipe: MakePipe) -> None:
    pipe, seen = make_pipe(), []

    def callback(pipe: DomainShuttlePipeline, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep, sorted(tensors)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = pipe(
        "a cat",
        seed=0,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        **SIZE,
    )
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1:] == (1000.0, ["latents", "prompt_embeds"])
    assert not output.frames.any()


def test_exported_folder(make_pipe: MakePipe, tmp_path: Path) -> None:
    pipe = make_pipe(experts=2, fill_reference_slots=True)
    pipe.save_pretrained(tmp_path)
    loaded = DomainShuttlePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.boundary_ratio == 0.875
    given = {"prompt": "a cat", "references": [picture("red")], "seed": 1, "output_type": "np", **SIZE}
    np.testing.assert_allclose(loaded(**given).frames, pipe(**given).frames, atol=1e-4)


def test_filled_slots_are_the_releases(make_pipe: MakePipe) -> None:
    """Zero latents in each free slot, at that slot's own place, without domain or mask."""
    pipe = make_pipe(fill_reference_slots=True)
    references = pipe.encode_references([[picture("red")]], None, [["human"]], 32, 48)
    assert references.latents.shape == (1, 5, 16, 4, 6)
    assert not references.latents[:, 1:].any()
    assert references.subjects.tolist() == [[0, 1, 2, 3, 4]]
    assert references.domains.tolist() == [[0, -1, -1, -1, -1]]
    assert references.mask is None


def test_letterbox_pads_with_white() -> None:
    pixels = letterbox(picture("red", (10, 20)), 32, 48)
    assert pixels.shape == (3, 32, 48)
    assert (pixels[:, :, :16] == 1).all()
    assert (pixels[:, :, 32:] == 1).all()
    assert (pixels[0, :, 16:32] == 1).all()
    assert (pixels[1:, :, 16:32] == -1).all()
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (letterbox(transparent, 16, 16) == 1).all()


def test_without_encoders(make_pipe: MakePipe, make_model: MakeModel) -> None:
    pipe = make_pipe(vae=None, text_encoder=None, tokenizer=None)
    references = References.stack([torch.randn(2, 16, 4, 6)])
    given = {"prompt_embeds": torch.randn(1, 24, 64), "guidance_scale": 1.0, "seed": 0, **SIZE}
    assert pipe(**given, reference_latents=references, output_type="latent").frames.shape == (1, 16, 2, 4, 6)
    with pytest.raises(ValueError, match="no vae"):
        pipe(**given)
    with pytest.raises(ValueError, match="no text_encoder"):
        pipe("a cat", **SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "pass either prompt or prompt_embeds"),
        ({"height": 40}, "40x48 must be multiples of 16 and 16: use 32x48"),
        ({"num_frames": 4}, r"num_frames 4 must be 4 n \+ 1: use 5"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\] are not among"),
        ({"reference_domains": ["martian"]}, r"unknown domain 'martian'; expected one of human \(0\)"),
        ({"reference_domains": ["human", "human"]}, r"reference_domains has \[2\] entries a sample for \[1\]"),
        ({"references": [picture("red")] * 6}, "6 reference images, the model takes 5"),
        ({"prompt": ["a", "b"]}, "references of 1 samples for 2 prompts"),
        ({"seed": [1, 2]}, "2 seeds for 1 samples"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str, make_pipe: MakePipe) -> None:
    given = {"prompt": "a cat", "references": [picture("red")], "seed": 0, **SIZE}
    with pytest.raises(ValueError, match=message):
        make_pipe()(**given | change)


def test_two_experts_need_a_boundary(make_pipe: MakePipe, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="pass boundary_ratio"):
        make_pipe(transformer_2=make_model(text_dim=64))


def test_unknown_sampler() -> None:
    with pytest.raises(ValueError, match="'ddim'; use 'euler' or 'unipc'"):
        make_scheduler("ddim", 5.0)
