"""A shortcut in the pipelines of diffusers, which know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AmusedImg2ImgPipeline,
    AmusedInpaintPipeline,
    AmusedPipeline,
    AmusedScheduler,
    UVit2DModel,
    VQModel,
)
from torch import Tensor, nn

from lit_shortcut import disable_shortcut, enable_shortcut
from lit_shortcut.acceleration.accelerated import Accelerated, Predictor
from lit_shortcut.acceleration.origin import BaseReference, Origin
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.amused import AMUSEd
from lit_shortcut.bases.clip_text import EncodedContext
from lit_shortcut.bases.meissonic.adapter import Meissonic
from lit_shortcut.bases.meissonic.transformer import MeissonicTransformer
from lit_shortcut.contracts import Conditions
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, sample
from lit_shortcut.weights import WeightsError, fingerprint

SIZE, CODES, WIDTH, TEXT, PIXELS = 8, 32, 16, 12, 2  # PIXELS: side of the square that a token stands for
N, B = 6, 3
GUIDANCE = 4.0
Run = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.progress_bar", lambda self, **kwargs: Silent())


class Silent:
    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def update(self) -> None:
        pass


def make_transformer(resized: bool = False) -> UVit2DModel:
    torch.manual_seed(0)
    transformer = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=TEXT,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=TEXT,
        vocab_size=CODES + 8,
        codebook_size=CODES,
        in_channels=WIDTH,
        block_out_channels=WIDTH,
        num_res_blocks=2,  # convolutions reach every place from the border, without which places are alike
        downsample=resized,
        upsample=resized,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        sample_size=SIZE,
    )
    return lively(transformer)


def lively(transformer: nn.Module) -> Any:
    """``transformer`` whose places and codes differ visibly, so that rounding decides nothing."""
    for name, parameter in transformer.named_parameters():
        if parameter.dim() > 1:
            std = 1.0 if "embed" in name or "depthwise" in name else 1.5 * parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std)
    return transformer.eval().requires_grad_(False)


def make_parts(resized: bool = False) -> dict[str, Any]:
    transformer = make_transformer(resized)
    vqvae = VQModel(
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        num_vq_embeddings=CODES,
        norm_num_groups=1,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        force_upcast=True,
    ).eval()
    scheduler = AmusedScheduler(mask_token_id=CODES + 7)
    return {
        "vqvae": vqvae,
        "tokenizer": None,
        "text_encoder": None,
        "transformer": transformer,
        "scheduler": scheduler,
    }


def encoded(batch: int, guided: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"prompt_embeds": (batch, TEXT), "encoder_hidden_states": (batch, 5, TEXT)}
    names = [*shapes, *(f"negative_{name}" for name in shapes if guided)]
    return {name: torch.randn(shapes[name.removeprefix("negative_")], generator=generator) for name in names}


def from_text(batch: int = 2, guidance: float = GUIDANCE, **more: Any) -> dict[str, Any]:
    return {"num_inference_steps": N, "guidance_scale": guidance} | encoded(batch, guidance > 1) | more


def from_image(**more: Any) -> dict[str, Any]:
    image = torch.rand(2, 3, SIZE * PIXELS, SIZE * PIXELS, generator=torch.Generator().manual_seed(2))
    return from_text(image=image) | {"strength": 0.7} | more


def inpainting(**more: Any) -> dict[str, Any]:
    mask = torch.zeros(2, 1, SIZE * PIXELS, SIZE * PIXELS)
    mask[0, :, : SIZE // 2] = 1
    mask[1, :, -SIZE // 2 :] = 1  # as many places as the first, but others
    return from_image(mask_image=mask, strength=1.0) | more


PIPELINES: dict[str, tuple[Any, Callable[..., dict[str, Any]]]] = {
    "text": (AmusedPipeline, from_text),
    "image": (AmusedImg2ImgPipeline, from_image),
    "inpainting": (AmusedInpaintPipeline, inpainting),
}


@pytest.fixture(params=PIPELINES)
def pipe_and_run(request: pytest.FixtureRequest) -> tuple[Any, Run]:
    """A pipeline of random parts, and a run of it that returns images."""
    cls, arguments = PIPELINES[request.param]
    pipe = cls(**make_parts())

    def run(**more: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        images: Tensor = torch.as_tensor(pipe(**arguments(**more), generator=generator, output_type="np").images)
        return images

    return pipe, run


def make_shortcut(width: int = WIDTH, **arguments: Any) -> Shortcut:
    torch.manual_seed(4)
    network = ShortcutNet(width=width, num_heads=2, **arguments).eval().requires_grad_(False)
    nn.init.normal_(network.widen.weight, std=0.3)
    return Shortcut(network)


class Calls:
    """Counts the calls of a module that run it."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(self.add)

    def add(self, *args: object) -> None:
        self.count += 1


def test_full_budget_draws_bit_for_bit_what_the_pipeline_draws(pipe_and_run: tuple[Any, Run]) -> None:
    pipe, run = pipe_and_run
    expected = run()
    enable_shortcut(pipe, make_shortcut(), budget=N)
    assert torch.equal(run(), expected)
    disable_shortcut(pipe)
    enable_shortcut(pipe, Hold(), budget=B)
    assert not torch.equal(run(), expected)
    disable_shortcut(pipe)
    assert torch.equal(run(), expected)


def test_transformer_runs_at_its_budget_of_steps_and_run_after_run_alike(pipe_and_run: tuple[Any, Run]) -> None:
    pipe, run = pipe_and_run
    layers = Calls(pipe.transformer.transformer_layers[0])
    vanilla = run()
    total = layers.count
    enable_shortcut(pipe, make_shortcut(reach=1, grid=SIZE), budget=B)
    first, second = run(), run()
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert not torch.equal(first, vanilla)
    assert layers.count - total == 2 * (B if total == N else 2)  # from an image: four steps, the first and the third


def test_transformer_stays_the_object_it_was(pipe_and_run: tuple[Any, Run]) -> None:
    pipe, _ = pipe_and_run
    transformer, attributes, names = (
        pipe.transformer,
        set(pipe.transformer.__dict__),
        list(pipe.transformer.state_dict()),
    )
    enable_shortcut(pipe, make_shortcut(), budget=B)
    assert pipe.transformer is transformer
    assert list(transformer.state_dict()) == names
    disable_shortcut(pipe)
    assert set(transformer.__dict__) == attributes
    assert not transformer.mlm_layer.layer_norm._forward_hooks


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scheduler, which always draws, take the most probable code."""
    monkeypatch.setattr(torch, "multinomial", lambda probs, num_samples, generator=None: probs.argmax(-1, keepdim=True))


def context_of(states: dict[str, Tensor], guided: bool, batch: int) -> EncodedContext:
    branches = ["", "negative_"] if guided else [""]
    return EncodedContext(
        states=torch.stack([states[f"{branch}encoder_hidden_states"] for branch in branches]),
        pooled=torch.stack([states[f"{branch}prompt_embeds"] for branch in branches]),
        micro_conds=torch.tensor([16.0, 16.0, 0, 0, 6]).expand(len(branches), batch, -1),
    )


def own_loop(base: Any, predictor: Predictor, guidance: float, num_steps: int, budget: int) -> Tensor:
    ids = torch.arange(2)
    decoding = Decoding(
        num_steps=num_steps,
        schedule="cosine_each",
        guidance=guidance - 1 if guidance > 1 else 0.0,
        guidance_course="constant",
        temperature=0.0,
        confidence_noise=0.0,
    )
    context = context_of(encoded(2, guidance > 1), guidance > 1, 2)
    acceleration = Accelerated(Even(budget), predictor)
    *_, last = sample(base, Conditions(ids, ids, ids), decoding, acceleration, context)
    return last.tokens


@pytest.mark.usefixtures("greedy")
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("guidance", [GUIDANCE, 0.0])
@pytest.mark.parametrize(
    "make",
    [make_shortcut, lambda: make_shortcut(reach=1, grid=SIZE), lambda: make_shortcut(anchored=True), Hold],
    ids=["shortcut", "neighbourhood", "anchored", "hold"],
)
def test_pipeline_draws_what_our_own_loop_draws(make: Callable[[], Predictor], guidance: float, resized: bool) -> None:
    parts = make_parts(resized)
    pipe = AmusedPipeline(**parts)
    tokens = {}
    for budget in (B, 2):
        enable_shortcut(pipe, make(), budget=budget)
        drawn = pipe(**from_text(guidance=guidance), temperature=(0, 0), output_type="latent").images
        tokens[budget] = drawn.flatten(1)
        disable_shortcut(pipe)
    base = AMUSEd(parts["transformer"], nn.Identity(), nn.Identity(), patch_size=PIXELS)  # type: ignore[arg-type]
    for budget, drawn in tokens.items():
        assert torch.equal(drawn, own_loop(base, make(), guidance, N, budget))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_plan_is_given_the_numbers_that_the_scheduler_commits(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []
    masked: list[int] = []
    start = Even.start

    def starting(plan: Even, counts: list[int], predictor: Predictor) -> Any:
        given.append(list(counts))
        return start(plan, counts, predictor)

    def called(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        masked.append(int((ids[0] == CODES + 7).sum()))

    monkeypatch.setattr(Even, "start", starting)
    scheduler = AmusedScheduler(mask_token_id=CODES + 7, masking_schedule=schedule)
    pipe = AmusedPipeline(**make_parts() | {"scheduler": scheduler})
    pipe.transformer.register_forward_pre_hook(called, with_kwargs=True)
    enable_shortcut(pipe, Hold(), budget=B)
    pipe(**from_text(), output_type="latent")
    assert given[-1] == [before - after for before, after in pairwise([*masked, 0])]


class ReferenceMeissonic(MeissonicTransformer):
    """Called as the published pipeline calls it: logits (B, V, h, w) out."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        micro_conds: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        rows = super().forward(hidden_states, encoder_hidden_states, pooled_projections, micro_conds, timestep)
        image = rows.transpose(1, 2).unflatten(2, [side // self.stride for side in hidden_states.shape[1:]])
        for module in self.up_block.values():
            image = module(image)
        logits: Tensor = self.mlm_layer(image)
        return logits


class MeissonicPipeline:
    """The loop of the published pipeline, in latents."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scheduler = transformer, AmusedScheduler(mask_token_id=CODES + 7)

    @torch.no_grad()
    def __call__(self, states: dict[str, Tensor], num_inference_steps: int) -> Tensor:
        context = context_of(states, True, 2)
        latents = torch.full((2, SIZE, SIZE), CODES + 7)
        self.scheduler.set_timesteps(num_inference_steps, (0, 0), "cpu")
        for timestep in self.scheduler.timesteps:
            logits = self.transformer(
                hidden_states=torch.cat([latents] * 2),
                micro_conds=context.micro_conds.flip(0).flatten(0, 1),
                pooled_projections=context.pooled.flip(0).flatten(0, 1),
                encoder_hidden_states=context.states.flip(0).flatten(0, 1),
                timestep=timestep[None],
            )
            unconditional, conditional = logits.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            latents = self.scheduler.step(guided, timestep, latents).prev_sample
        return latents


@pytest.mark.usefixtures("greedy")
@pytest.mark.parametrize("resized", [False, True])
def test_meissonic_draws_what_our_own_loop_draws(resized: bool) -> None:
    torch.manual_seed(5)
    transformer: ReferenceMeissonic = lively(
        ReferenceMeissonic(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=12,
            num_attention_heads=1,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            axes_dims_rope=(4, 4, 4),
            vocab_size=CODES + 8,
            codebook_size=CODES,
            downsample=resized,
            upsample=resized,
        )
    )
    pipe, states = MeissonicPipeline(transformer), encoded(2)
    vanilla = pipe(states, N)
    stride = 2 if resized else 1
    shortcut = make_shortcut(TEXT, reach=1, grid=SIZE, stride=stride)
    enable_shortcut(pipe, shortcut, budget=N)
    assert torch.equal(pipe(states, N), vanilla)
    disable_shortcut(pipe)
    enable_shortcut(pipe, shortcut, budget=B)
    drawn = pipe(states, N).flatten(1)
    disable_shortcut(pipe)
    own = MeissonicTransformer(**transformer.hparams)
    own.load_state_dict(transformer.state_dict())
    base = Meissonic(own, nn.Identity(), nn.Identity(), height=16, width=16, patch_size=2)  # type: ignore[arg-type]
    assert torch.equal(drawn, own_loop(base, shortcut, GUIDANCE, N, B))


def origin_for(transformer: nn.Module, **changes: Any) -> Origin:
    return Origin(BaseReference(fingerprint(transformer.state_dict())), num_steps=N, budget=B, **changes)


def test_folder_of_a_shortcut_brings_its_own_budget(tmp_path: Path) -> None:
    pipe = AmusedPipeline(**make_parts())
    shortcut, origin = make_shortcut(), origin_for(pipe.transformer)
    Shortcut(shortcut.network, origin.base.fingerprint, origin=origin).save_pretrained(tmp_path)
    layers = Calls(pipe.transformer.transformer_layers[0])
    enable_shortcut(pipe, tmp_path)
    pipe(**from_text(), output_type="latent")
    assert layers.count == B
    with pytest.raises(WeightsError, match=rf"num_steps {N}.*one of 9"):
        pipe(**from_text(num_inference_steps=9), output_type="latent")


def test_half_precision_of_the_base_is_taken_for_the_base() -> None:
    pipe = AmusedPipeline(**make_parts())
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in pipe.transformer.state_dict().items()}
    enable_shortcut(pipe, Shortcut(make_shortcut().network, fingerprint(rounded)), budget=B)
    disable_shortcut(pipe)


def test_shortcut_of_another_base_is_refused() -> None:
    pipe = AmusedPipeline(**make_parts())
    with pytest.raises(WeightsError, match=r"base 0{16}, it cannot accelerate"):
        enable_shortcut(pipe, Shortcut(make_shortcut().network, "0" * 16), budget=B)
    disabled = pipe.transformer
    assert "forward" not in disabled.__dict__


def test_error_says_that_halves_of_other_precisions_cannot_be_compared() -> None:
    """Rounding to float16 and then to bfloat16 is not rounding to bfloat16."""
    pipe = AmusedPipeline(**make_parts())
    recorded = {name: tensor.to(torch.bfloat16) for name, tensor in pipe.transformer.state_dict().items()}
    pipe.transformer.half()
    with pytest.raises(WeightsError, match=r"cannot accelerate.*load the pipeline in float32: weights in float16"):
        enable_shortcut(pipe, Shortcut(make_shortcut().network, fingerprint(recorded)), budget=B)


def test_compiled_transformer_is_refused() -> None:
    pipe = AmusedPipeline(**make_parts())
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match=r"compiled by torch\.compile; expected it uncompiled"):
        enable_shortcut(pipe, make_shortcut(), budget=B)


def test_guided_shortcut_is_refused() -> None:
    pipe = AmusedPipeline(**make_parts())
    with pytest.raises(ValueError, match=r"guides the logits itself; train one with guided: false"):
        enable_shortcut(pipe, make_shortcut(guided=True), budget=B)


def test_shortcut_for_another_grid_is_refused() -> None:
    pipe = AmusedPipeline(**make_parts())
    enable_shortcut(pipe, make_shortcut(reach=1, grid=SIZE + 2), budget=B)
    with pytest.raises(WeightsError, match=r"grid of \(8, 8\).*\(10, 10\)"):
        pipe(**from_text())


@pytest.mark.parametrize("budget", [0, -1, N + 1])
def test_budget_outside_the_steps_is_refused(budget: int) -> None:
    pipe = AmusedPipeline(**make_parts())
    network, origin = make_shortcut().network, origin_for(pipe.transformer)
    with pytest.raises(ValueError, match=f"1..{N}.*got {budget}"):
        enable_shortcut(pipe, Shortcut(network, origin.base.fingerprint, origin=origin), budget=budget)


def test_budget_above_the_steps_is_refused_when_they_are_known() -> None:
    pipe = AmusedPipeline(**make_parts())
    enable_shortcut(pipe, Hold(), budget=N + 1)
    with pytest.raises(ValueError, match=f"1..{N}"):
        pipe(**from_text())


def test_second_shortcut_is_refused_and_so_is_taking_out_none() -> None:
    pipe = AmusedPipeline(**make_parts())
    with pytest.raises(ValueError, match="no shortcut"):
        disable_shortcut(pipe)
    enable_shortcut(pipe, Hold(), budget=B)
    with pytest.raises(ValueError, match="AmusedPipeline has a shortcut already"):
        enable_shortcut(pipe, Hold(), budget=B)


@pytest.mark.parametrize(
    "pipe",
    [
        SimpleNamespace(unet=nn.Identity()),
        SimpleNamespace(transformer=nn.Identity(), scheduler=AmusedScheduler(mask_token_id=1)),
        SimpleNamespace(transformer=make_transformer(), scheduler=SimpleNamespace(config=SimpleNamespace())),
    ],
    ids=["no transformer", "another transformer", "another scheduler"],
)
def test_pipeline_without_such_a_transformer_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="aMUSEd or Meissonic"):
        enable_shortcut(pipe, Hold(), budget=B)


def test_transformer_can_be_called_by_hand() -> None:
    pipe = AmusedPipeline(**make_parts())
    states = encoded(1)
    ids = torch.full((1, SIZE, SIZE), CODES + 7)
    arguments = (ids, states["encoder_hidden_states"], states["prompt_embeds"], torch.ones(1, 5))
    expected = pipe.transformer(*arguments)
    enable_shortcut(pipe, Hold(), budget=B)
    assert torch.equal(pipe.transformer(*arguments), expected)
    pipe(**from_text(), output_type="latent")
    assert torch.equal(pipe.transformer(*arguments), expected)
