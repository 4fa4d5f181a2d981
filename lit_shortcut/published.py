"""Names in published MaskGIT and MIGM-Shortcut checkpoints, and ours."""

from __future__ import annotations

import re

from torch import Tensor

_MASKGIT = [
    (r"^tok_emb\.", "token_embedding."),
    (r"^pos_emb$", "position_embedding"),
    (r"^bias$", "head_bias"),
    (r"^first_layer\.0\.", "first.0."),
    (r"^first_layer\.2\.", "first.1."),  # the published block has dropout at 1 and 5
    (r"^first_layer\.4\.", "first.3."),
    (r"^first_layer\.6\.", "first.4."),
    (r"^last_layer\.0\.", "last.0."),
    (r"^last_layer\.2\.", "last.1."),
    (r"^last_layer\.4\.", "last.3."),
    (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"layers.\1.attention_norm."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.mha\.in_proj_", r"layers.\1.attention.in_proj."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.mha\.out_proj\.", r"layers.\1.attention.out_proj."),
    (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"layers.\1.mlp_norm."),
    (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.0\.", r"layers.\1.mlp.0."),
    (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.3\.", r"layers.\1.mlp.2."),
]

_SHORTCUT = [
    (r"^proj_in\.", "narrow_features."),
    (r"^new_token_proj_in\.", "narrow_control."),
    (r"^proj_out\.", "widen."),
    (r"^last_layer\.", "last."),
    (r"^time_embedder\.mlp\.", "time_mlp."),
    (r"^adaLN_modulation\.", "modulation."),
    (r"^blocks\.(\d+)\.(cross|self)_attn\.norm\.", r"blocks.\1.\2_norm."),
    (r"^blocks\.(\d+)\.(cross|self)_attn\.fn\.mha\.in_proj_", r"blocks.\1.\2_attention.in_proj."),
    (r"^blocks\.(\d+)\.(cross|self)_attn\.fn\.mha\.out_proj\.", r"blocks.\1.\2_attention.out_proj."),
    (r"^blocks\.(\d+)\.(cross|self)_attn_ff\.norm\.", r"blocks.\1.\2_mlp_norm."),
    (r"^blocks\.(\d+)\.(cross|self)_attn_ff\.fn\.net\.0\.", r"blocks.\1.\2_mlp.0."),
    (r"^blocks\.(\d+)\.(cross|self)_attn_ff\.fn\.net\.3\.", r"blocks.\1.\2_mlp.2."),
]


def maskgit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published MaskGIT transformer's state dict under the names of our MaskGITTransformer."""
    renamed = _rename(state, _MASKGIT)
    if "position_embedding" in renamed:
        renamed["position_embedding"] = renamed["position_embedding"].squeeze(0)
    return renamed


def shortcut_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published MIGM-Shortcut state dict under the names of our ShortcutNet."""
    return _rename(state, _SHORTCUT)


def _rename(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply the first rule that matches; other names pass as they are, for strict loading to name them."""
    return {_ours(name, rules): tensor for name, tensor in state.items()}


def _ours(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, matches = re.subn(pattern, replacement, name)
        if matches:
            return renamed
    return name
