"""What Lumina-DiMOO does beyond the contract of all bases: prompts, their lengths, and a grid with newlines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.prompt import Frame, SpecialTokens, Utf8Tokenizer
from lit_shortcut.bases.dimoo.toy import SPECIAL, toy_dimoo
from lit_shortcut.bases.prompted_llada import PromptContext
from lit_shortcut.contracts import Acceleration, Clock, Conditions
from lit_shortcut.decoding.halton import halton_order
from lit_shortcut.interface import Places
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, generate, sample
from lit_shortcut.weights import WeightsError

MakeConditions = Callable[..., Conditions]
DECODING = Decoding(
    6, "cosine_left", guidance=2.0, guidance_course="constant", confidence_noise=1.0, noise_course="constant"
)


def trained(width: int = 16, **options: Any) -> LLaDAShortcutNet:
    """A shortcut that predicts something else than its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = LLaDAShortcutNet(width, num_heads=2, mlp_width=32, **options)
        assert isinstance(network.widen, torch.nn.Linear)
        torch.nn.init.normal_(network.widen.weight, std=0.3)
    return network.eval().requires_grad_(False)


def remade(**changes: Any) -> DiMOO:
    """The toy base with other arguments."""
    toy = toy_dimoo()
    settings: dict[str, Any] = {
        "special": SPECIAL,
        "codebook_size": 8,
        "height": 8,
        "width": 8,
        "patch_size": 2,
        "max_prompt_tokens": 32,
        "template": "<{}>",
    }
    tokenizer = changes.pop("prompt_tokenizer", toy.prompt_tokenizer)
    return DiMOO(toy.transformer, toy.tokenizer, tokenizer, **(settings | changes))


def by_sequence(base: DiMOO, tokens: Tensor, prompt: str, grid: Frame) -> Tensor:
    """Features (H·W, C) of the image places, by the plain sequence of one sample, row by row and without padding."""
    special = base.special
    codes = [special.mask if code == base.spec.mask_id else special.first_code + code for code in tokens.tolist()]
    ids = [*base.prompt_tokenizer.encode("", base.template.format(prompt)), special.answer_start, special.boi]
    places = []
    for row in range(grid.height):
        places += range(len(ids), len(ids) + grid.width)
        ids += [*codes[row * grid.width : (row + 1) * grid.width], special.newline]
    ids += [special.eoi, special.answer_end]
    features: Tensor = base.transformer(torch.tensor([ids]), base.transformer.rotation(torch.arange(len(ids))[None]))
    return features[0, places]


@pytest.mark.parametrize("grid", [Frame(4, 4), Frame(2, 5), Frame(3, 1)])
def test_rows_in_our_order_equal_the_plain_sequence(prompted: MakeConditions, grid: Frame) -> None:
    base, conditions = remade(height=2 * grid.height, width=2 * grid.width), prompted(5)
    tokens = torch.randint(9, (5, base.spec.num_tokens), generator=torch.Generator().manual_seed(0))
    features = base.features(tokens, base.context(conditions, guided=True), Clock(0, 1))[:, :, : base.spec.num_tokens]
    for row, prompt in enumerate(conditions.prompts):
        for branch, text in enumerate((prompt, "<uncondition>")):
            expected = by_sequence(base, tokens[row], text, grid)
            torch.testing.assert_close(features[branch, row], expected, rtol=1e-4, atol=1e-5)


def test_rows_behind_a_shorter_prompt_are_zero(dimoo: DiMOO, prompted: MakeConditions) -> None:
    context = dimoo.context(prompted(3), guided=True)
    assert context.prefix is not None
    assert context.prefix.lengths.tolist() == [[11, 5, 17], [3, 3, 3]]
    features = dimoo.features(torch.zeros(3, 16, dtype=torch.long), context, Clock(0, 1))
    for branch, lengths in zip(features, context.prefix.lengths.tolist(), strict=True):
        for rows, length in zip(branch, lengths, strict=True):
            assert (rows.abs().amax(-1) > 0).tolist() == [True] * (24 + length) + [False] * (17 - length)


def test_a_batch_of_equal_prompts_needs_no_mask(dimoo: DiMOO, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = dimoo.transformer.forward
    monkeypatch.setattr(dimoo.transformer, "forward", lambda *args: seen.append(len(args)) or forward(*args))
    for prompts in (("one", "two"), ("one", "three")):
        conditions = Conditions(torch.arange(2), torch.arange(2), torch.arange(2), prompts)
        dimoo.features(torch.zeros(2, 16, dtype=torch.long), dimoo.context(conditions, guided=True), Clock(0, 1))
    assert seen == [2, 2, 3, 2]


@pytest.mark.parametrize(
    "options",
    [None, {}, {"grid": 4, "reach": 1}, {"grid": 4, "reach": 1, "rows": "masked", "anchored": True}, {"guided": True}],
    ids=["vanilla", "published", "neighbourhood", "neighbourhood, masked rows, anchored", "guided"],
)
def test_prompts_of_different_lengths_in_a_batch_give_the_tokens_they_give_alone(
    dimoo: DiMOO, prompted: MakeConditions, options: dict[str, Any] | None
) -> None:
    acceleration: Acceleration = Vanilla() if options is None else Accelerated(Even(2), Shortcut(trained(**options)))
    conditions = prompted(10)
    together = generate(dimoo, conditions, DECODING, acceleration).tokens
    for row in range(10):
        one = slice(row, row + 1)
        alone = generate(dimoo, Conditions(*(field[one] for field in conditions)), DECODING, acceleration).tokens
        assert torch.equal(alone[0], together[row])
    assert len(together.unique(dim=0)) == 10


def test_control_of_the_conditional_branch_begins_with_the_prompt(dimoo: DiMOO, prompted: MakeConditions) -> None:
    """Features after a shortcut step, by hand, sample by sample."""
    conditions, network = prompted(3), trained()
    first, second = list(sample(dimoo, conditions, DECODING, Accelerated(Even(1), Shortcut(network))))[:2]
    context = dimoo.context(conditions, guided=True)
    assert isinstance(context, PromptContext)
    assert context.prefix is not None
    for branch in range(2):
        for row in range(3):
            length = int(context.prefix.lengths[branch, row])
            rows, _ = dimoo.interface.row_places(torch.tensor([length]), 24 + length)
            codes, positions = first.committed.tokens[row], first.committed.positions[row]
            control, places = dimoo.transformer.wte(codes + SPECIAL.first_code), rows[0, positions]
            if branch == 0:
                control = torch.cat([dimoo.transformer.wte(context.ids[0, row, :length]), control])
                places = torch.cat([torch.arange(length), places])
            expected = network(
                first.features[branch, row, None, : 24 + length],
                control[None],
                second.state.masked_share[row, None],
                places=Places(network.encode_places(rows), network.encode_places(places[None])),
            )
            found = second.features[branch, row, None, : 24 + length]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (16, 32), (64, 16)])
def test_any_multiple_of_16_pixels_will_do(prompted: MakeConditions, height: int, width: int) -> None:
    base = remade(height=height, width=width, patch_size=16)
    tokens = generate(base, prompted(2), Decoding(2, guidance=1.0), Vanilla()).tokens
    assert tokens.shape == (2, height * width // 256)


@pytest.mark.parametrize(("height", "width"), [(32, 128), (128, 32)])
def test_halton_order_is_that_of_the_image_shape_though_a_square_has_as_many_tokens(
    prompted: MakeConditions, height: int, width: int
) -> None:
    base = remade(height=height, width=width, patch_size=16)
    steps = sample(base, prompted(1), Decoding(4, guidance=0.0, order="halton"), Vanilla())
    places = torch.cat([step.committed.positions[0] for step in steps])
    assert torch.equal(places, halton_order(height // 16, width // 16))
    assert not torch.equal(places, halton_order(4, 4))


def test_tied_head_is_the_embedding_table() -> None:
    base = toy_dimoo()
    assert not torch.equal(base.interface.head_weight, base.interface.code_embedding)
    base.transformer.ff_out = None
    tied = DiMOO(
        base.transformer, base.tokenizer, base.prompt_tokenizer, special=SPECIAL, codebook_size=8, template="{}"
    )
    assert torch.equal(tied.interface.head_weight, tied.interface.code_embedding)


# ---- bad input


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize("size", [0, 24, -16])
def test_size_that_is_no_multiple_of_16_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive multiple of 16 pixels, got {size}"):
        remade(patch_size=16, **{"height": 16, "width": 16, name: size})


def test_codes_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes 264\.\.279 lie outside the transformer's vocabulary of 272"):
        remade(codebook_size=16)


def test_tokenizer_without_the_special_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must know <uncondition> as token 262, but makes \[7\] of it"):
        remade(prompt_tokenizer=Utf8Tokenizer(uncondition=7))


@pytest.mark.parametrize("empty", ["", " \n"])
def test_empty_prompt_is_refused(dimoo: DiMOO, prompted: MakeConditions, empty: str) -> None:
    with pytest.raises(ValueError, match="expected a prompt, got an empty one"):
        dimoo.context(prompted(2)._replace(prompts=("a cat", empty)), guided=True)


def test_prompt_longer_than_the_context_is_refused(dimoo: DiMOO, prompted: MakeConditions) -> None:
    dimoo.context(prompted(1)._replace(prompts=("x" * 30,)), guided=False)
    with pytest.raises(ValueError, match=r"at most 32 tokens, template included; 'x+'… has 33"):
        dimoo.context(prompted(1)._replace(prompts=("x" * 31,)), guided=False)


def test_negative_prompt_takes_the_place_of_the_unconditional_one(prompted: MakeConditions) -> None:
    context = remade(negative="blurry").context(prompted(2), guided=True)
    assert isinstance(context, PromptContext)
    assert bytes(context.ids[1, 0, : len("<blurry>")].tolist()) == b"<blurry>"
    with pytest.raises(ValueError, match=r"at most 32 tokens, template included; 'x+'… has 33"):
        remade(negative="x" * 31)


def test_classes_in_place_of_prompts_are_refused(dimoo: DiMOO, conditions: MakeConditions) -> None:
    with pytest.raises(ValueError, match="expected a prompt for each of 2 samples, got 0"):
        dimoo.context(conditions(2), guided=True)


def test_shortcut_of_another_kind_of_base_is_refused(
    dimoo: DiMOO, prompted: MakeConditions, conditions: MakeConditions, base: Any
) -> None:
    maskgit_shortcut = Accelerated(Even(2), Shortcut(ShortcutNet(16, num_heads=2)))
    with pytest.raises(WeightsError, match=r"DiMOO: .*expected a LLaDAShortcutNet, found a ShortcutNet"):
        next(sample(dimoo, prompted(1), DECODING, maskgit_shortcut))
    dimoo_shortcut = Accelerated(Even(2), Shortcut(trained(32)))
    with pytest.raises(WeightsError, match=r"MaskGIT: .*expected a ShortcutNet, found a LLaDAShortcutNet"):
        next(sample(base, conditions(1), DECODING, dimoo_shortcut))
    with pytest.raises(WeightsError, match=r"DiMOO: .* grid of \(4, 4\); grid of the shortcut gives \(3, 3\)"):
        next(sample(dimoo, prompted(1), DECODING, Accelerated(Even(2), Shortcut(trained(grid=3, reach=1)))))
    with pytest.raises(WeightsError, match=r"width: expected 16.* 32"):
        next(sample(dimoo, prompted(1), DECODING, dimoo_shortcut))


def test_published_ids_are_the_defaults() -> None:
    special = SpecialTokens()
    assert (special.first_code, special.mask, special.newline) == (126356, 126336, 126084)
    assert Frame(64, 64).row_offsets().sort().values.tolist() == list(range(64 * 65 + 4))
