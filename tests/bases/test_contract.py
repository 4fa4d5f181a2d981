"""Every base answers the same questions. A new base adds its maker to BASES."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_shortcut.contracts import Clock, Conditions, MaskedImageModel
from lit_shortcut.guidance import guide

OF_CLASSES = ["make_base", "make_base_with_vqgan", "make_halton"]
OF_PROMPTS = ["make_dimoo", "make_mmada", "make_cross", "make_amused", "make_meissonic", "make_monetico"]
BASES = [*OF_CLASSES, *OF_PROMPTS]  # fixtures: from a seed to a base with random weights
MakeBase = Callable[[int], MaskedImageModel]
MakeConditions = Callable[..., Conditions]
of_classes = pytest.mark.parametrize("maker", ["make_base", "make_halton"], indirect=True)


@pytest.fixture(params=BASES)
def maker(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make(maker: str, request: pytest.FixtureRequest) -> MakeBase:
    made: MakeBase = request.getfixturevalue(maker)
    return made


@pytest.fixture
def conditions(maker: str, conditions: MakeConditions, prompted: MakeConditions) -> MakeConditions:
    return prompted if maker in OF_PROMPTS else conditions


@pytest.fixture
def model(make: MakeBase) -> MaskedImageModel:
    return make(0)


def half_masked(model: MaskedImageModel, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.spec.codebook_size, (count, model.spec.num_tokens), generator=generator)
    return tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.5, model.spec.mask_id)


@pytest.mark.parametrize(
    "maker",
    ["make_base_with_vqgan", "make_halton", "make_mmada", "make_amused", "make_meissonic", "make_dimoo"],
    indirect=True,
)
def test_no_precision_casts_a_published_image_decoder(make: MakeBase) -> None:
    model = make(0)
    assert isinstance(model, nn.Module)
    tokens = torch.randint(model.spec.codebook_size, (2, model.spec.num_tokens), generator=torch.Generator())
    before = model.decode(tokens)
    model.to(torch.bfloat16)
    assert model.interface.code_embedding.dtype == torch.bfloat16
    assert torch.equal(model.decode(tokens), before)


@pytest.mark.parametrize("guided", [False, True])
def test_spec_tells_the_shapes(model: MaskedImageModel, conditions: MakeConditions, guided: bool) -> None:
    spec, branches = model.spec, 1 + guided
    context = model.context(conditions(3), guided=guided)
    features = model.features(half_masked(model, 3), context, Clock(0, 1))
    num_rows = features.shape[2]
    assert features.shape == (branches, 3, num_rows, spec.width)
    assert model.interface.num_rows <= num_rows <= spec.sequence_length
    assert num_rows == spec.sequence_length or context.prefix is not None
    assert model.interface.logits(features).shape == (branches, 3, spec.num_tokens, spec.codebook_size)
    places = torch.arange(spec.num_tokens).expand(3, -1)
    assert model.interface.embed(places % spec.codebook_size, places).shape == (3, spec.num_tokens, spec.width)


def test_mask_is_no_code(model: MaskedImageModel) -> None:
    assert not 0 <= model.spec.mask_id < model.spec.codebook_size


def test_first_rows_of_the_features_are_the_image_tokens(model: MaskedImageModel, conditions: MakeConditions) -> None:
    features = model.features(half_masked(model, 2), model.context(conditions(2), guided=True), Clock(0, 1))
    rest_changed = features.clone()
    rest_changed[..., model.interface.num_rows :, :] += 1
    every = model.interface.logits(features)
    assert torch.equal(model.interface.logits(rest_changed), every)
    places = torch.stack([torch.randperm(model.spec.num_tokens)[:5] for _ in range(2)])
    chosen = model.interface.logits(features, places)
    for row, own_places in enumerate(places):
        torch.testing.assert_close(chosen[:, row], every[:, row, own_places])


@pytest.mark.parametrize("scale", [0.0, 2.8])
def test_logits_of_guided_features_are_guided_logits_where_the_head_is_linear(
    model: MaskedImageModel, conditions: MakeConditions, scale: float
) -> None:
    """Sampling counts on it."""
    if not model.interface.is_linear:
        pytest.skip("the head is not linear")
    features = model.features(half_masked(model, 2), model.context(conditions(2), guided=True), Clock(0, 1))
    places = torch.tensor([[3, 1], [0, 2]])
    expected = guide(model.interface.logits(features, places), scale)
    guided = model.interface.row_logits(guide(model.interface.rows_at(features, places), scale), places)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


def test_features_know_where_a_token_stands(model: MaskedImageModel, conditions: MakeConditions) -> None:
    """Of all rows, that of the place whose token changed moves most (by a random network's residual path)."""
    context = model.context(conditions(1), guided=False)
    tokens = torch.full((1, model.spec.num_tokens), model.spec.mask_id)
    before = model.features(tokens, context, Clock(0, 1))
    for place in (0, 3, model.spec.num_tokens - 1):
        changed = tokens.clone()
        changed[0, place] = 1
        moved = (model.features(changed, context, Clock(0, 1)) - before).norm(dim=-1)[0, 0]
        assert int(moved.argmax()) == int(model.interface.rows_of(torch.tensor(place)))


def test_base_is_frozen(model: MaskedImageModel, conditions: MakeConditions) -> None:
    assert isinstance(model, nn.Module)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    features = model.features(half_masked(model, 1), model.context(conditions(1), guided=True), Clock(0, 1))
    assert not features.requires_grad
    assert not model.interface.logits(features).requires_grad


def test_base_stays_in_eval_inside_a_module_that_trains(model: MaskedImageModel) -> None:
    assert isinstance(model, nn.Module)
    nn.ModuleDict({"base": model}).train()
    assert not any(module.training for module in model.modules())


def test_fingerprint_is_of_the_weights(make: MakeBase) -> None:
    assert make(0).fingerprint == make(0).fingerprint
    assert len({make(seed).fingerprint for seed in range(4)}) == 4


@of_classes
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("offset", [-1, 0, 1000])
def test_class_out_of_range_is_refused(
    model: MaskedImageModel, conditions: MakeConditions, guided: bool, offset: int
) -> None:
    label = -1 if offset < 0 else model.spec.num_classes + offset
    wrong = conditions(2)._replace(labels=torch.tensor([0, label]))
    with pytest.raises(ValueError, match=rf"0\.\.{model.spec.num_classes - 1}.*{label}"):
        model.context(wrong, guided=guided)


@of_classes
def test_every_class_has_a_context_of_its_own(model: MaskedImageModel) -> None:
    everyone = torch.arange(model.spec.num_classes)
    context = model.context(Conditions(everyone, everyone, everyone), guided=True)
    features = model.features(half_masked(model, 1).expand(len(everyone), -1), context, Clock(0, 1))
    conditional, unconditional = features
    assert (conditional[1:] - conditional[:1]).abs().amax(dim=(1, 2)).min() > 1e-3
    torch.testing.assert_close(unconditional, unconditional[:1].expand_as(unconditional), rtol=1e-4, atol=1e-5)


def test_conditional_branch_is_the_same_without_the_other(model: MaskedImageModel, conditions: MakeConditions) -> None:
    tokens = half_masked(model, 3)
    context = model.context(conditions(3), guided=True)
    both = model.features(tokens, context, Clock(0, 1))
    unguided = model.features(tokens, model.context(conditions(3), guided=False), Clock(0, 1))
    torch.testing.assert_close(both[0, :, : unguided.shape[2]], unguided[0], rtol=1e-4, atol=1e-5)


def test_context_of_some_samples_is_that_of_a_smaller_batch(
    model: MaskedImageModel, conditions: MakeConditions
) -> None:
    tokens, context = half_masked(model, 3), model.context(conditions(3), guided=True)
    everyone = model.features(tokens, context, Clock(0, 1))
    first = model.features(tokens[:2], context.rows(torch.arange(2)), Clock(0, 1))
    torch.testing.assert_close(first, everyone[:, :2], rtol=1e-4, atol=1e-5)
    index = torch.tensor([2, 0])
    chosen = model.features(tokens[index], context.rows(index), Clock(0, 1))
    torch.testing.assert_close(chosen, everyone[:, index], rtol=1e-4, atol=1e-5)


def test_identity_names_the_base_and_is_json(make: MakeBase) -> None:
    assert make(0).identity() == make(0).identity()
    assert make(0).identity() != make(1).identity()
    assert json.loads(json.dumps(make(0).identity()))["fingerprint"] == make(0).fingerprint


def test_samples_of_a_batch_do_not_see_each_other(model: MaskedImageModel, conditions: MakeConditions) -> None:
    tokens, everyone = half_masked(model, 3), conditions(3)
    together = model.features(tokens, model.context(everyone, guided=True), Clock(0, 1))
    for row in range(3):
        context = model.context(Conditions(*(field[row : row + 1] for field in everyone)), guided=True)
        alone = model.features(tokens[row : row + 1], context, Clock(0, 1))
        torch.testing.assert_close(together[:, row, : alone.shape[2]], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_decode_gives_images_for_all_codes(model: MaskedImageModel) -> None:
    spec = model.spec
    tokens = torch.arange(2 * spec.num_tokens).view(2, -1) % spec.codebook_size
    images = model.decode(tokens)
    assert images.dtype == torch.uint8
    assert images.shape[:2] == (2, 3)
    assert images.shape[2] == images.shape[3]
    assert torch.equal(model.decode(tokens), images)
    alone = model.decode(tokens[1:])[0].int()
    assert (alone - images[1].int()).abs().max() <= 1  # convolutions of another batch size may round otherwise
