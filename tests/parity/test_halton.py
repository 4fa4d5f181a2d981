"""Golden tensors of the reference implementation; README.md beside this file says how they were made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Vanilla
from lit_shortcut.bases.code_decoder import CodeDecoder
from lit_shortcut.bases.halton.llamagen import load_llamagen
from lit_shortcut.bases.halton.transformer import HaltonTransformer
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import Conditions
from lit_shortcut.decoding.halton import halton_order, rolled_starts
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.decoding.temperature import TemperatureCourse
from lit_shortcut.sampling import Decoding, Order, sample
from lit_shortcut.weights import load_tensors, save_tensors
from tests.parity.greedy import require_same_run

GOLDEN, META = load_tensors(Path(__file__).with_name("halton_tiny.safetensors"))
NUM_TOKENS = META["grid"] ** 2


def saved(folder: Path, prefix: str) -> Path:
    tensors = {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}
    save_tensors(folder / "published.safetensors", tensors, {})
    return folder / "published.safetensors"


def names(prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in sorted(GOLDEN) if name.startswith(prefix)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> CodeDecoder:
    return load_llamagen(
        saved(tmp_path_factory.mktemp("vq"), "vq."),
        codebook_size=META["codebook_size"],
        code_width=META["vq_embed_dim"],
        latent_width=META["vq_z_channels"],
        width=META["vq_ch"],
        multipliers=META["vq_ch_mult"],
        num_blocks=[META["vq_num_res_blocks"] + 1] * len(META["vq_ch_mult"]),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, decoder: CodeDecoder) -> MaskGIT:
    transformer = HaltonTransformer.load_published(
        saved(tmp_path_factory.mktemp("base"), "base."),
        codebook_size=META["codebook_size"],
        num_classes=META["nclass"],
        grid=META["grid"],
        width=META["hidden_dim"],
        depth=META["depth"],
        num_heads=META["heads"],
        mlp_width=META["swiglu_dim"],
        num_registers=META["register"],
    )
    return MaskGIT(transformer, decoder)


def test_features_and_logits_equal_the_reference(base: MaskGIT) -> None:
    classes = GOLDEN["in.label"].masked_fill(GOLDEN["in.drop_label"].bool(), META["nclass"])
    features = base.transformer(GOLDEN["in.tokens"].flatten(1), classes)
    torch.testing.assert_close(features, GOLDEN["out.feature"], rtol=1e-5, atol=1e-5)
    expected = GOLDEN["out.logits"][..., : META["codebook_size"]]
    torch.testing.assert_close(base.interface.logits(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", names("halton.order."))
def test_order_equals_the_reference(grid: str) -> None:
    rows, columns = GOLDEN[f"halton.order.{grid}"].unbind(1)
    assert torch.equal(halton_order(int(grid), int(grid)), rows * int(grid) + columns)


@pytest.mark.parametrize("shape", names("halton.counts."))
def test_counts_equal_the_reference(shape: str) -> None:
    grid, num_steps = shape.split("_n")
    height, width = map(int, grid.split("x"))
    counts = tokens_per_step("arccos_left", int(num_steps), height * width)
    assert counts == GOLDEN[f"halton.counts.{shape}"].tolist()


@pytest.mark.parametrize("name", META["temperature"])
def test_temperature_course_equals_the_reference(name: str) -> None:
    arguments = META["temperature"][name]
    course = TemperatureCourse(
        first=arguments.get("sm_temp_min", 1),
        last=arguments.get("sm_temp_max", 1),
        power=arguments.get("temp_pow", 1),
        warmup=arguments.get("temp_warmup", 0),
    )
    decoding = Decoding(arguments["step"], temperature_course=course)
    factors = torch.tensor([decoding.sharpness_at(step) for step in range(arguments["step"])])
    torch.testing.assert_close(factors, GOLDEN[f"halton.temperature.{name}"], rtol=1e-6, atol=0)


def seeds_that_roll_by(rolls: Tensor) -> Tensor:
    """A seed for each of ``rolls`` (B,), by which the reference rolls the order."""
    seeds = torch.arange(100 * NUM_TOKENS)
    starts = rolled_starts(seeds, NUM_TOKENS)
    return torch.stack([seeds[starts == start][0] for start in -rolls % NUM_TOKENS])


@pytest.mark.parametrize("run", META["steps"])
def test_greedy_runs_equal_the_reference_token_for_token(base: MaskGIT, run: str) -> None:
    labels = GOLDEN["in.greedy_label"]
    order: Order = "halton_rolled" if run in META["rolled"] else "halton"
    seeds = seeds_that_roll_by(GOLDEN["in.roll"]) if order == "halton_rolled" else torch.arange(len(labels))
    decoding = Decoding(
        META["steps"][run],
        schedule="arccos_left",
        guidance=META["guidance"][run],
        guidance_course="constant",
        temperature=0,
        order=order,
    )
    conditions = Conditions(torch.arange(len(labels)), seeds, labels)
    steps = list(sample(base, conditions, decoding, Vanilla()))
    require_same_run(base, steps, GOLDEN, run, lambda step: decoding.guidance)


def test_images_equal_the_reference(base: MaskGIT, decoder: CodeDecoder) -> None:
    images = decoder.pixels(GOLDEN["in.codes"].flatten(1))
    torch.testing.assert_close(images, GOLDEN["out.image"], rtol=1e-5, atol=1e-5)
    last = GOLDEN[f"greedy.{next(iter(META['steps']))}.tokens"][-1:]
    expected = GOLDEN["out.clamped_image"]
    torch.testing.assert_close(decoder.pixels(last).clamp(-1, 1), expected, rtol=1e-5, atol=1e-5)
    assert (base.decode(last).float() - (expected + 1) * 127.5).abs().max() < 0.51
