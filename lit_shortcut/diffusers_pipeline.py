"""Shortcuts in unmodified pipelines of diffusers: at some steps one stands in for the transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_shortcut.acceleration.accelerated import Predictor, Vanilla
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases import amused
from lit_shortcut.bases.meissonic import transformer as meissonic
from lit_shortcut.contracts import Acceleration, Clock, Context, Control, FeatureFn, State, TokenSpec
from lit_shortcut.decoding.schedules import Schedule, tokens_per_step
from lit_shortcut.interface import TokenInterface
from lit_shortcut.pictures import PlanName, row_of
from lit_shortcut.sampling import Decoding
from lit_shortcut.weights import Precision, WeightsError, fingerprint

_INSTALLED = "_lit_shortcut"
_SCHEDULES: dict[str, Schedule] = {"cosine": "cosine_each", "linear": "linear_each"}  # the scheduler's names, and ours
_IDS = ("input_ids", "hidden_states")  # aMUSEd's name of the transformer's first argument, and Meissonic's


def enable_shortcut(
    pipe: Any,
    shortcut: str | Path | Predictor,
    budget: int | None = None,
    *,
    plan: PlanName | None = None,
    dtype: Precision | None = None,
) -> None:
    """Let ``pipe`` run its transformer at ``budget`` of its steps, and the shortcut at the others.

    For pipelines of diffusers that call ``transformer(ids, …) -> logits`` in a loop with a scheduler: aMUSEd (from
    text, from an image, inpainting) and Meissonic. What a shortcut needs is read from the ids of successive calls; the
    pipeline's own code and random numbers stay as they are, and a full budget changes no bit of the images.

    A run that begins midway, from an image, takes the beginning of the plan: its first step counts as the plan's first.

    Args:
        pipe: the pipeline.
        shortcut: folder of the shortcut, its address on the hub (``owner/repository``), or a predictor.
        budget: b of ``num_inference_steps``; None takes the shortcut's own, or all of them if it has none.
        plan: which steps the transformer runs at; None takes the shortcut's own.
        dtype: dtype that the shortcut runs in; None takes float32.

    Raises:
        ValueError: if the pipeline has no such transformer, or a shortcut already; if the shortcut is guided; or if the
            budget lies outside 1..N, which is raised only when the pipeline runs if N is not known before.
        WeightsError: if the shortcut is unavailable or damaged, or was trained for another base or N.
    """
    transformer = _transformer_of(pipe)
    if _INSTALLED in transformer.__dict__:
        raise ValueError(f"{type(pipe).__name__} has a shortcut already; disable_shortcut(pipe) removes it")
    predictor = Shortcut.from_pretrained(shortcut, dtype=dtype) if isinstance(shortcut, str | Path) else shortcut
    own, num_steps = "", 0
    if isinstance(predictor, Shortcut):
        if predictor.network.options.guided:
            raise ValueError(
                "a guided shortcut predicts features after guidance, and a pipeline of diffusers guides the logits "
                "itself; train one with guided: false"
            )
        origin, num_steps = predictor.origin, predictor.origin.num_steps
        budget, plan = budget if budget is not None else origin.budget or None, plan or cast(PlanName, origin.plan)
        own = _fingerprint_like(transformer, predictor.base_fingerprint)
        try:
            predictor.require_base(own)
        except WeightsError as error:
            if (held := next(transformer.parameters()).dtype) == torch.float32:
                raise
            raise WeightsError(
                f"{error}; if it is the same base, load the pipeline in float32: weights in "
                f"{str(held).removeprefix('torch.')} cannot be compared with those of another precision"
            ) from error

    def accelerate(num_steps: int) -> Acceleration:
        return row_of(predictor, plan or "even", budget, Decoding(num_steps)).acceleration

    accelerate(num_steps or max(1, budget or 1))
    _Installed(pipe, _RunningBase(transformer, int(pipe.scheduler.config.mask_token_id), own), accelerate).install()


def disable_shortcut(pipe: Any) -> None:
    """Let ``pipe`` run its transformer at every step again.

    Raises:
        ValueError: if it has no shortcut.
    """
    installed = getattr(getattr(pipe, "transformer", None), "__dict__", {}).get(_INSTALLED)
    if installed is None:
        raise ValueError(f"{type(pipe).__name__} has no shortcut to remove")
    installed.remove()


class _RunningBase:
    """The transformer of a running pipeline as a base, whose features come from the pipeline's own calls."""

    spec: TokenSpec
    interface: TokenInterface

    def __init__(self, transformer: nn.Module, mask_id: int, own_fingerprint: str) -> None:
        self.transformer, self.mask_id, self.fingerprint = transformer, mask_id, own_fingerprint
        self.call: Callable[[], Any] = lambda: None
        self.output: Any = None

    def begin(self, height: int, width: int, device: torch.device) -> None:
        """Build the interface for a grid of ``height`` × ``width`` tokens."""
        make = meissonic.interface_of if _is_compact(self.transformer) else _amused_interface
        with torch.no_grad():
            self.interface = make(self.transformer, height, width).to(device)
        codes, channels = self.interface.code_embedding.shape
        num_tokens = height * width
        self.spec = TokenSpec(num_tokens, self.interface.num_rows, channels, codes, self.mask_id, 0, height)

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        """Features (1, B, S, C) within the pipeline's own call, whose ``output`` is kept."""
        own: Any = self.transformer
        cut: nn.Module = own.project_from_hidden if _is_compact(own) else own.mlm_layer.layer_norm
        passed: list[Tensor] = []
        handle = cut.register_forward_hook(lambda module, inputs, output: passed.append(output))
        try:
            self.output = self.call()
        finally:
            handle.remove()
        rows = passed[-1]
        return rows.reshape(len(rows), -1, rows.shape[-1])[None]


class _Installed:
    """Replacement of a transformer's ``forward`` that decides, call by call, whether to run it.

    Guidance branches are rows of the batch: a shortcut treats them alike, so their number and order do not matter.
    """

    def __init__(self, pipe: Any, base: _RunningBase, accelerate: Callable[[int], Acceleration]) -> None:
        self.pipe, self.base, self.accelerate = pipe, base, accelerate
        self.timesteps: Tensor | None = None
        self.features_of: FeatureFn | None = None
        self.last = torch.empty(0)
        self.step = self.num_steps = 0

    def install(self) -> None:
        """Shadow ``forward`` on this one transformer; its class, weights and configuration stay as they are."""
        transformer = self.base.transformer
        self.shadowed = transformer.__dict__.get("forward")
        self.forward = transformer.forward
        transformer.__dict__.update({_INSTALLED: self, "forward": self})

    def remove(self) -> None:
        """Restore ``forward``."""
        transformer = self.base.transformer
        del transformer.__dict__[_INSTALLED], transformer.__dict__["forward"]
        if self.shadowed is not None:
            transformer.__dict__["forward"] = self.shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return logits (B, V, h, w), in the form that the transformer returns them in."""
        grid = args[0] if args else next(kwargs[name] for name in _IDS if name in kwargs)
        ids = grid.flatten(1)
        if self._is_new_run(ids):
            self._begin(grid)
        self.base.call = lambda: self.forward(*args, **kwargs)
        if self.features_of is None:
            return self.base.call()
        with torch.no_grad():
            state = self._state(ids)
            features, is_full = self.features_of(state)
            self.last, self.step = ids, self.step + 1
            if is_full is True:
                return self.base.output
            logits = self._logits(features[0], state.masked, grid)
        return (logits,) if isinstance(self.base.output, tuple) else logits

    def _is_new_run(self, ids: Tensor) -> bool:
        """Return whether this call begins a run; a pipeline sets its time steps at each run."""
        if self.pipe.scheduler.timesteps is not self.timesteps or self.step >= self.num_steps:
            return True
        if ids.shape != self.last.shape or ids.device != self.last.device:
            return self.step > 0
        return bool(((self.last != self.base.mask_id) & (ids != self.last)).any())

    def _begin(self, grid: Tensor) -> None:
        self.timesteps = self.pipe.scheduler.timesteps
        self.step, self.last, self.features_of = 0, grid.flatten(1), None
        if self.timesteps is None:  # called by hand, before any run
            return
        self.num_steps = len(self.timesteps)
        acceleration = self.accelerate(self.num_steps)
        if isinstance(acceleration, Vanilla):
            return
        _, height, width = grid.shape
        self.base.begin(height, width, grid.device)
        schedule = _SCHEDULES[getattr(self.pipe.scheduler.config, "masking_schedule", "cosine")]
        counts = tokens_per_step(schedule, self.num_steps, self.base.spec.num_tokens)
        self.features_of = acceleration.start(self.base, Context(), counts)

    def _state(self, ids: Tensor) -> State:
        is_masked = ids == self.base.mask_id
        share = is_masked.float().mean(dim=1)
        return State(Clock(self.step, self.num_steps), ids, self._committed(ids, is_masked), share, _places(is_masked))

    def _committed(self, ids: Tensor, is_masked: Tensor) -> Control:
        """Return the tokens committed since the last call; samples with different places at first differ in number."""
        is_new = (self.last == self.base.mask_id) & ~is_masked
        counts = is_new.sum(dim=1)
        fewest, most = torch.stack(counts.aminmax()).tolist()
        positions = is_new.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        tokens = ids.gather(1, positions)
        if fewest == most:
            return Control(tokens, positions)
        is_real = torch.arange(most, device=ids.device) < counts[:, None]
        return Control(tokens.where(is_real, 0), positions, is_real)

    def _logits(self, features: Tensor, masked: Tensor, grid: Tensor) -> Tensor:
        """Logits (B, V, h, w) of ``features`` (B, S, C); known places, which the scheduler ignores, may be 0."""
        interface = self.base.interface
        if masked.dtype == torch.bool:
            logits = interface.logits(features)
        else:
            own = interface.logits(features, masked)
            logits = own.new_zeros(*grid.flatten(1).shape, own.shape[-1])
            logits.scatter_(1, masked[..., None].expand_as(own), own)
        return logits.transpose(1, 2).unflatten(2, grid.shape[1:])


def _places(is_masked: Tensor) -> Tensor:
    """Places (B, M) where ``is_masked`` (B, L); the mask itself if samples differ in number."""
    counts = is_masked.sum(dim=1)
    if bool((counts != counts[0]).any()):
        return is_masked
    return is_masked.nonzero()[:, 1].view(len(is_masked), -1)


def _transformer_of(pipe: Any) -> nn.Module:
    transformer = getattr(pipe, "transformer", None)
    if hasattr(transformer, "_orig_mod"):
        raise ValueError(f"{type(pipe).__name__} has a transformer compiled by torch.compile; expected it uncompiled")
    needed = ("embed", "mlm_layer", "project_from_hidden")
    is_known = isinstance(transformer, nn.Module) and all(hasattr(transformer, name) for name in needed)
    if not is_known or not hasattr(getattr(getattr(pipe, "scheduler", None), "config", None), "mask_token_id"):
        raise ValueError(
            f"expected a pipeline with the transformer and scheduler of aMUSEd or Meissonic, got {type(pipe).__name__} "
            f"with {type(transformer).__name__}"
        )
    return cast(nn.Module, transformer)


def _is_compact(transformer: nn.Module) -> bool:
    """Return whether it is Meissonic's, whose features are taken before they are upsampled."""
    return hasattr(transformer, "single_transformer_blocks")


def _amused_interface(transformer: nn.Module, height: int, width: int) -> TokenInterface:
    return amused.interface_of(cast(Any, transformer), height * width)


def _fingerprint_like(transformer: nn.Module, expected: str | None) -> str:
    """Return the fingerprint of the weights: as they are, or rounded to a half precision if that gives ``expected``."""
    if expected is None:  # reading all weights takes a while
        return ""
    weights = transformer.state_dict()
    own = fingerprint(weights)
    if expected == own:
        return own
    for dtype in (torch.bfloat16, torch.float16):
        rounded = fingerprint({k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()})
        if rounded == expected:
            return rounded
    return own
