"""Golden tensors of the reference implementation; README.md beside this file says how they were made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import UNCONDITION, SpecialTokens
from lit_shortcut.contracts import Acceleration, Clock, Conditions, Control
from lit_shortcut.interface import Places
from lit_shortcut.networks.control import embed_control, lay_out_branches
from lit_shortcut.networks.llada_shortcut import NAMES, LLaDAShortcutNet
from lit_shortcut.published import fill
from lit_shortcut.sampling import Decoding, generate, sample
from lit_shortcut.tasks.recording import record
from lit_shortcut.weights import load_tensors

GOLDEN, META = load_tensors(Path(__file__).with_name("dimoo_tiny.safetensors"))
LENGTH = len(GOLDEN["in.prompt"])
PLACES = torch.arange(GOLDEN["in.tokens"].shape[1])[None]
SPECIAL = SpecialTokens(
    **{name: META[name] for name in ("mask", "newline", "boi", "eoi", "answer_start", "answer_end", "uncondition")},
    first_code=META["text_vocab"],
)


def part(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


class RecordedPrompts:
    def encode(self, text: str, template: str = "{}") -> list[int]:
        ids: list[int] = GOLDEN["in.uncond_prompt" if template == UNCONDITION else "in.prompt"].tolist()
        return ids


class NoTokenizer:
    def decode(self, tokens: Tensor) -> Tensor:
        raise AssertionError("not used here")


@pytest.fixture(scope="module")
def base() -> DiMOO:
    transformer = LLaDA(
        vocab_size=META["text_vocab"] + META["codebook"],
        width=META["d_model"],
        depth=META["n_layers"],
        num_heads=META["n_heads"],
        mlp_width=META["mlp_hidden_size"],
        rope_theta=META["rope_theta"],
        norm_eps=META["rms_norm_eps"],
    )
    transformer.load_state_dict(part("base.transformer."))
    side = 16 * META["grid"]
    return DiMOO(
        transformer,
        NoTokenizer(),
        RecordedPrompts(),
        special=SPECIAL,
        codebook_size=META["codebook"],
        height=side,
        width=side,
        template="{}",
    )


@pytest.fixture(scope="module")
def network() -> LLaDAShortcutNet:
    network = LLaDAShortcutNet(
        width=META["d_model"],
        num_heads=META["n_heads"],
        mlp_width=META["mlp_hidden_size"],
        rope_theta=META["rope_theta"],
        norm_eps=META["rms_norm_eps"],
        bottleneck_ratio=META["bottleneck_ratio"],
        num_blocks=META["n_block"],
    )
    fill(network, part("shortcut."), NAMES, Path("dimoo_tiny.safetensors"))
    return network


def one() -> Conditions:
    return Conditions(*(torch.zeros(1, dtype=torch.long) for _ in range(3)), prompts=("recorded",))


def in_sequence(base: DiMOO, features: Tensor, length: int) -> Tensor:
    """Rows (…, S, C) of a branch whose prompt has ``length`` tokens, in the order of the base's sequence."""
    assert base.interface.row_offsets is not None
    rows = features[..., : len(base.interface.row_offsets) + length, :]
    places, _ = base.interface.row_places(torch.tensor([length]), rows.shape[-2])
    return rows[..., places[0].argsort(), :]


def image_codes(sequence: Tensor) -> Tensor:
    """Codes (1, L), the mask as V, of the image places of a ``sequence`` (1, S)."""
    ids = sequence[:, LENGTH + 2 : -2].unflatten(1, (META["grid"], -1))[:, :, :-1].flatten(1)
    return torch.where(ids == SPECIAL.mask, META["codebook"], ids - SPECIAL.first_code)


def test_transformer_equals_the_reference(base: DiMOO) -> None:
    features = base.transformer(GOLDEN["in.tokens"], base.transformer.rotation(PLACES))
    torch.testing.assert_close(features, GOLDEN["out.feature"], rtol=1e-5, atol=1e-5)
    logits = features @ base.transformer.head_weight.T
    torch.testing.assert_close(logits, GOLDEN["out.logits"], rtol=1e-5, atol=1e-5)


def test_features_and_logits_of_the_base_equal_the_reference(base: DiMOO) -> None:
    context = base.context(one(), guided=False)
    features = base.features(image_codes(GOLDEN["in.tokens"]), context, Clock(0, 1))[0]
    torch.testing.assert_close(in_sequence(base, features, LENGTH), GOLDEN["out.feature"], rtol=1e-5, atol=1e-5)
    expected = GOLDEN["out.logits"][:, LENGTH + 2 : -2].unflatten(1, (META["grid"], -1))[:, :, :-1].flatten(1, 2)
    expected = expected[..., SPECIAL.first_code :]
    torch.testing.assert_close(base.interface.logits(features), expected, rtol=1e-5, atol=1e-5)


def test_next_features_equal_the_reference(base: DiMOO, network: LLaDAShortcutNet) -> None:
    places = GOLDEN["in.new_token_map"][0].nonzero().flatten()[None]
    control = base.transformer.wte(GOLDEN["in.new_token_ids"])
    encoded = Places(network.encode_places(PLACES), network.encode_places(places))
    following = network(GOLDEN["out.feature"], control, GOLDEN["in.mask_ratio"], places=encoded)
    torch.testing.assert_close(following, GOLDEN["out.next_feature"], rtol=1e-5, atol=1e-5)


def test_next_features_by_interface_and_prompt_equal_the_reference(base: DiMOO, network: LLaDAShortcutNet) -> None:
    context = base.context(one(), guided=True)
    assert context.prefix is not None
    offsets = base.interface.row_offsets
    assert offsets is not None
    committed = (
        GOLDEN["in.new_token_map"][0].nonzero().flatten()[LENGTH:] - LENGTH
    )  # behind the prompt, which is control
    positions = (offsets[:, None] == committed).int().argmax(dim=0)[None]
    control = Control(GOLDEN["in.new_token_ids"][:, LENGTH:] - SPECIAL.first_code, positions)
    rows, _ = base.interface.row_places(torch.tensor([LENGTH]), PLACES.shape[1])
    embedded = embed_control(base.interface, control, lay_out_branches(network, base.interface, context)[0])
    following = network(GOLDEN["out.feature"][:, rows[0]], embedded.tokens, GOLDEN["in.mask_ratio"], *embedded[1:])
    expected = GOLDEN["out.next_feature"]
    torch.testing.assert_close(in_sequence(base, following, LENGTH), expected, rtol=1e-5, atol=1e-5)


def decoding(num_steps: int) -> Decoding:
    return Decoding(
        num_steps,
        schedule="cosine_left",
        guidance=META["cfg_scale"],
        guidance_course="constant",
        temperature=0,
        confidence_noise=0,
    )


@pytest.mark.parametrize(
    ("run", "num_steps", "budget"), [("vanilla_n8", 8, None), ("shortcut_n12_b4", 12, 4), ("shortcut_n16_b5", 16, 5)]
)
def test_greedy_runs_equal_the_reference_token_for_token(
    base: DiMOO, network: LLaDAShortcutNet, run: str, num_steps: int, budget: int | None
) -> None:
    acceleration: Acceleration = Vanilla() if budget is None else Accelerated(Even(budget), Shortcut(network))
    codes = generate(base, one(), decoding(num_steps), acceleration).tokens
    assert torch.equal(codes + SPECIAL.first_code, GOLDEN[f"greedy.{run}.vq_ids"])
    steps = list(sample(base, one(), decoding(num_steps), acceleration))
    assert sum(step.is_full for step in steps) == (budget or num_steps)


def test_recorded_trajectories_equal_the_reference(base: DiMOO) -> None:
    recorded = record(base, one(), decoding(8))
    for branch, name in enumerate(("cond", "uncond")):
        golden = part(f"trajectory.{name}.")
        length = len(GOLDEN["in.prompt" if name == "cond" else "in.uncond_prompt"])
        features = in_sequence(base, recorded.features[0, branch], length)
        torch.testing.assert_close(features, golden["feat"], rtol=1e-5, atol=1e-5)
        order = golden["generation_order"][length + 2 : -2].unflatten(0, (META["grid"], -1))[:, :-1].flatten()
        assert torch.equal(recorded.committed_at[0], order)
        known = golden["tokens"][length + 2 : -2].unflatten(0, (META["grid"], -1))[:, :-1].flatten()
        assert torch.equal(recorded.tokens[0] + SPECIAL.first_code, known)
