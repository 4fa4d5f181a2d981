"""Numbers that make no sense are refused by name when a class is built, whatever it is."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest
from torch import nn

from datamodules.conditions import ClassLabels
from datamodules.images import ImageFolder
from datamodules.online import OnlineDataModule
from datamodules.prompts import Prompts
from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.acceleration.calibrated import Calibrated, CalibratedAdaptive
from lit_shortcut.acceleration.linear import Linear
from lit_shortcut.acceleration.plans import Adaptive, Early, Even
from lit_shortcut.acceleration.predictors import Taylor
from lit_shortcut.bases.code_decoder import CodeDecoder
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.llada import LLaDA
from lit_shortcut.bases.dimoo.prompt import Utf8Tokenizer
from lit_shortcut.bases.dimoo.toy import SPECIAL, GreyShades, toy_dimoo
from lit_shortcut.bases.halton.transformer import HaltonTransformer
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.bases.meissonic.transformer import MeissonicTransformer
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.bases.toy_cross import CrossToyBase
from lit_shortcut.bases.vq import VQDecoder
from lit_shortcut.callbacks.accelerated_sampling import AcceleratedSampling
from lit_shortcut.callbacks.ema import ModuleEMA
from lit_shortcut.callbacks.export import ExportShortcut
from lit_shortcut.callbacks.image_writer import ImageWriter
from lit_shortcut.callbacks.last_checkpoint import LastCheckpoint
from lit_shortcut.callbacks.plan_search import PlanSearch
from lit_shortcut.callbacks.report import Report
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.decoding.temperature import TemperatureCourse
from lit_shortcut.fashion.captions import CaptionedFashionMNIST
from lit_shortcut.fashion.classifier import ClassifierTask, FashionCNN, FashionFeatures
from lit_shortcut.fashion.clip import SmallCLIP
from lit_shortcut.fashion.images import FashionMNIST
from lit_shortcut.fashion.masked_modeling import MaskedModelingTask, PromptedMaskedModelingTask
from lit_shortcut.fashion.tokenizer import FSQTokenizer
from lit_shortcut.losses import HeadKL, MaskedMSE
from lit_shortcut.metrics.distances import InceptionScore, KernelDistance, Precision, Recall
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.bench import BenchTask
from lit_shortcut.tasks.evaluation import EvaluationTask
from lit_shortcut.tasks.generating import GenerateTask
from lit_shortcut.tasks.recording import RecordingTask
from lit_shortcut.tasks.reference import ReferenceTask
from lit_shortcut.tasks.shortcut import ShortcutTask
from tests.command_line import CONFIGS

CHECKPOINTS = CONFIGS.parent / "checkpoints"
HERE = Path("nowhere")  # nothing is read before the numbers are checked
ANY: Any = nn.Identity()
TOY = ToyBase()
ROW = [[6]]
SIX = Decoding(num_steps=6)
SHIPPED: dict[str, Any] = {"extractor": FashionFeatures.load(CHECKPOINTS / "fashion/classifier.safetensors")}
SHIPPED |= {"reference": CHECKPOINTS / "fashion/reference.safetensors"}
LABELS = ClassLabels(num_images=4, batch_size=2)
TRANSFORMER = {"codebook_size": 8, "num_classes": 2, "grid": 2, "width": 8, "depth": 1, "num_heads": 2, "mlp_width": 8}
MEISSONIC = {"num_layers": 1, "num_single_layers": 0, "attention_head_dim": 8, "num_attention_heads": 1}
MEISSONIC |= {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 2, 2)}
MEISSONIC |= {"vocab_size": 9, "codebook_size": 8}
LLADA = {"vocab_size": 8, "width": 8, "depth": 1, "num_heads": 2, "mlp_width": 8}
VQ = {"codebook_size": 8, "code_width": 4, "latent_width": 4, "width": 32}
LEVELS = {"multipliers": (1,), "attention_levels": ()}


def dimoo(**changes: Any) -> DiMOO:
    transformer = LLaDA(SPECIAL.first_code + 8, width=16, depth=1, num_heads=2, mlp_width=16)
    sizes = {"codebook_size": 8, "height": 8, "width": 8, "patch_size": 2, "max_prompt_tokens": 32} | changes
    return DiMOO(
        transformer, GreyShades(4), Utf8Tokenizer(SPECIAL.uncondition), special=SPECIAL, template="<{}>", **sizes
    )


def online(**changes: Any) -> OnlineDataModule:
    validation = ClassLabels(num_images=4, batch_size=2, seed=1)
    return OnlineDataModule(TOY, SIX, LABELS, validation, **{"batch_size": 8, "pool_images": 4} | changes)


def modeling(**changes: Any) -> MaskedModelingTask:
    return MaskedModelingTask(MaskGITTransformer(**TRANSFORMER), FSQTokenizer([8], 8, 4), **changes)


def prompted_modeling(**changes: Any) -> PromptedMaskedModelingTask:
    base = toy_dimoo()
    base.tokenizer.encode = None  # type: ignore[assignment]  # of grey shades there is none
    return PromptedMaskedModelingTask(base, **changes)


def sampling(**changes: Any) -> AcceleratedSampling:
    return AcceleratedSampling(TOY, SIX, [], LABELS, **changes)


def neighbourly(**changes: Any) -> ShortcutNet:
    return ShortcutNet(**{"width": 16, "num_heads": 2, "grid": 4, "reach": 1} | changes)


def build(made: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    def function(**changes: Any) -> Any:
        return made(**fixed | changes)

    return function


BOUNDS: list[tuple[Any, Callable[..., Any], dict[str, tuple[float | None, ...]]]] = [
    # class, how it is built, and by argument what is refused and last what is taken, None where a file is needed
    (
        ClassLabels,
        build(ClassLabels, num_images=1),
        dict.fromkeys(("num_images", "batch_size", "num_classes"), (-1, 0, 1)),
    ),
    (
        Prompts,
        build(Prompts, path=CONFIGS / "toy_dimoo/prompts.txt"),
        dict.fromkeys(("num_images", "batch_size"), (-1, 0, 1)),
    ),
    (
        ImageFolder,
        build(ImageFolder, folder=HERE),
        dict.fromkeys(("image_size", "batch_size"), (-1, 0, 1)) | {"num_workers": (-1, 0)},
    ),
    (
        TrajectoryDataModule,
        build(TrajectoryDataModule, source="nowhere"),
        dict.fromkeys(
            ("batch_size", "shuffle_shards", "validation_shards", "window", "max_gap", "validation_batch_size"),
            (-1, 0, 1),
        )
        | {"num_workers": (-1, 0)},
    ),
    (
        OnlineDataModule,
        online,
        {
            "batch_size": (-1, 0, 1),
            "pool_images": (-1, 0, 2),
            "window": (-1, 0, 1),
            "max_gap": (-1, 0, 1),
            "device_memory_gb": (-1, 0),
            "on_policy_budget": (-1, 0, 1),
        },
    ),
    (FashionMNIST, FashionMNIST, dict.fromkeys(("batch_size", "validation_images"), (-1, 0, 1))),
    (CaptionedFashionMNIST, CaptionedFashionMNIST, dict.fromkeys(("batch_size", "validation_images"), (-1, 0, 1))),
    (Even, Even, {"budget": (-1, 0, 1)}),
    (Early, Early, {"budget": (-1, 0, 1)}),
    (Adaptive, build(Adaptive, threshold=1.0), {"threshold": (-1, 0, 1), "max_gap": (-1, 0, 1)}),
    (Calibrated, build(Calibrated, path=HERE), {"budget": (-1, 0, None)}),
    (CalibratedAdaptive, build(CalibratedAdaptive, path=HERE), {"budget": (-1, 0, None)}),
    (Taylor, Taylor, {"order": (-1, 0, 1)}),
    (Linear, build(Linear, path=HERE), {"memory": (-1, 0, None)}),
    (
        Decoding,
        Decoding,
        {"num_steps": (-1, 0, 1), "temperature": (-1, 0), "confidence_noise": (-1, 0)},
    ),
    (TemperatureCourse, TemperatureCourse, {"first": (-1, 0, 1), "last": (-1, 0, 1), "warmup": (-1, 0)}),
    (MaskGITTransformer, build(MaskGITTransformer, **TRANSFORMER), dict.fromkeys(TRANSFORMER, (-1, 0, 2))),
    (
        HaltonTransformer,
        build(HaltonTransformer, **TRANSFORMER),
        dict.fromkeys(TRANSFORMER, (-1, 0, 2)) | {"num_registers": (-1, 0)},
    ),
    (
        LLaDA,
        build(LLaDA, **LLADA),
        dict.fromkeys(("vocab_size", "depth", "num_heads", "mlp_width"), (-1, 0, 1))
        | {"width": (-1, 0, 4), "rope_theta": (-1, 0, 1), "norm_eps": (-1, 0, 1)},
    ),
    (
        MeissonicTransformer,
        build(MeissonicTransformer, **MEISSONIC),
        dict.fromkeys(("num_attention_heads", "codebook_size", "joint_attention_dim"), (-1, 0, 1))
        | {"num_layers": (-1, 0), "num_single_layers": (-1, 0), "attention_head_dim": (-1, 0, 8)},
    ),
    (
        CodeDecoder,
        build(CodeDecoder, **VQ, **LEVELS, num_blocks=(1,)),
        dict.fromkeys(("codebook_size", "code_width", "latent_width", "chunk"), (-1, 0, 1)) | {"width": (-1, 0, 32)},
    ),
    (
        VQDecoder,
        build(VQDecoder, vqvae=ANY, height=2, width=2),
        dict.fromkeys(("height", "width", "chunk"), (-1, 0, 1)),
    ),
    (
        ToyBase,
        ToyBase,
        dict.fromkeys(("grid", "num_classes"), (-1, 0, 1)) | {"codebook_size": (0, 1, 2), "width": (-1, 0, 4)},
    ),
    (CrossToyBase, CrossToyBase, {"grid": (-1, 0, 1), "codebook_size": (0, 1, 2), "width": (-1, 0, 4)}),
    (
        DiMOO,
        dimoo,
        dict.fromkeys(("height", "width"), (-2, 0, 4))
        | {"codebook_size": (-1, 0, 1), "patch_size": (-1, 0, 1), "max_prompt_tokens": (-1, 0, 32)},
    ),
    (toy_dimoo, toy_dimoo, {"grid": (-1, 0, 1), "width": (-1, 0, 4)}),
    (
        ShortcutNet,
        neighbourly,
        {"width": (-1, 0, 4), "num_heads": (-1, 0, 1), "bottleneck_ratio": (-1, 0, 0.5, 1), "num_blocks": (-1, 0, 1)}
        | {"grid": (-1, 0, 2), "reach": (-1, 0), "stride": (-1, 0, 1), "num_convs": (-1, 0)},
    ),
    (
        LLaDAShortcutNet,
        build(LLaDAShortcutNet, width=16, num_heads=2, mlp_width=8, grid=4, reach=1),
        {"width": (-1, 0, 8), "num_heads": (-1, 0, 1), "mlp_width": (-1, 0, 1), "bottleneck_ratio": (-1, 0, 0.5, 1)}
        | {"num_blocks": (-1, 0, 1), "rope_theta": (-1, 0, 1), "norm_eps": (-1, 0, 1)}
        | {"grid": (-1, 0, 2), "reach": (-1, 0), "num_convs": (-1, 0)},
    ),
    (MaskedMSE, MaskedMSE, {"weight": (-1, 0, 1)}),
    (HeadKL, HeadKL, {"weight": (-1, 0, 1), "temperature": (-1, 0, 1)}),
    (KernelDistance, build(KernelDistance, **SHIPPED), {"subsets": (-1, 0, 1), "subset_size": (-1, 0, 1, 2)}),
    (Precision, build(Precision, **SHIPPED), {"neighbours": (-1, 0, 1)}),
    (Recall, build(Recall, **SHIPPED), {"neighbours": (-1, 0, 1)}),
    (InceptionScore, build(InceptionScore, classifier=ANY), {"splits": (-1, 0, 1)}),
    (FashionCNN, FashionCNN, dict.fromkeys(("num_classes", "width"), (-1, 0, 1))),
    (ClassifierTask, build(ClassifierTask, classifier=ANY), {"num_classes": (-1, 0, 2)}),
    (
        FSQTokenizer,
        build(FSQTokenizer, levels=[3], width=8, image_size=4),
        dict.fromkeys(("width", "image_size"), (-2, 0, 8)),
    ),
    (
        SmallCLIP,
        build(SmallCLIP, tokenizer="nowhere"),
        dict.fromkeys(("image_size", "patch_size", "width", "depth", "num_heads", "context"), (-1, 0, None)),
    ),
    (MaskedModelingTask, modeling, dict.fromkeys(("class_drop", "label_smoothing"), (-0.1, 1.1, 0))),
    (PromptedMaskedModelingTask, prompted_modeling, dict.fromkeys(("prompt_drop", "label_smoothing"), (-0.1, 1.1, 0))),
    (ShortcutTask, build(ShortcutTask, network=ANY), {"rollout_depth": (-1, 0, 1)}),
    (RecordingTask, build(RecordingTask, base=TOY), {"memory_limit_gb": (-1, float("nan"), 0)}),
    (
        EvaluationTask,
        build(EvaluationTask, base=TOY, rows=ROW, decoding=SIX),
        {"latency_rounds": (-1, 0), "grid_images": (-1, 0), "latency_batch_size": (-1, 0, 1)},
    ),
    (
        EvaluationTask,
        build(EvaluationTask, base=TOY, rows=ROW, decoding=SIX, random_weights=True),
        {"latency_rounds": (-1, 0, 1)},
    ),
    (BenchTask, build(BenchTask, base=TOY, rows=ROW, decoding=SIX), {"rounds": (-1, 0, 1)}),
    (
        ReferenceTask,
        build(ReferenceTask, extractor=ANY, path=HERE, images="none"),
        {"num_reference_features": (-1, 0)},
    ),
    (GenerateTask, build(GenerateTask, base=TOY, decoding=SIX), {"budget": (-1, 0, 6)}),
    (
        AcceleratedSampling,
        sampling,
        {"every_n_validations": (-1, 0, 1), "latency_rounds": (-1, 0), "grid_images": (-1, 0)},
    ),
    (ModuleEMA, ModuleEMA, {"decay": (-0.1, 1.1, 0)}),
    (ExportShortcut, build(ExportShortcut, path=HERE, licence="", trained_on=""), {"budget": (-1, 0)}),
    (Report, Report, {"step_share": (-0.1, 1.1, 0)}),
    (ImageWriter, build(ImageWriter, folder=HERE), {"grid_images": (-1, 0)}),
    (LastCheckpoint, build(LastCheckpoint, dirpath=HERE), {"every_n_train_steps": (-1, 0, 1)}),
    (PlanSearch, build(PlanSearch, path=HERE, budgets=[2]), {"max_gap": (-1, 0, 1)}),
    (TrajectoryWriter, build(TrajectoryWriter, folder=HERE), {"waiting": (-1, 0, 1)}),
]
UNBOUNDED = {"guidance", "power", "seed"}


def numbers_of(made: Any) -> set[str]:
    """Names of the numbers that ``made`` takes."""
    function = made.__init__ if inspect.isclass(made) else made
    hints = get_type_hints(function)
    kinds = {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}
    return {name for name, kind in kinds.items() if {int, float} & set(kind)}


@pytest.mark.parametrize(
    ("made", "name", "refused"),
    [(made, name, value) for _, made, bounds in BOUNDS for name, values in bounds.items() for value in values[:-1]],
)
def test_number_out_of_its_bounds_is_refused_by_name(made: Callable[..., Any], name: str, refused: float) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        made(**{name: refused})


@pytest.mark.parametrize(
    ("made", "name", "allowed"),
    [
        (made, name, values[-1])
        for _, made, bounds in BOUNDS
        for name, values in bounds.items()
        if values[-1] is not None
    ],
)
def test_number_at_its_bound_is_taken(made: Callable[..., Any], name: str, allowed: float) -> None:
    made(**{name: allowed})


def test_every_number_that_a_yaml_can_give_has_a_bound() -> None:
    listed: dict[Any, set[str]] = {}
    for cls, _, bounds in BOUNDS:
        listed.setdefault(cls, set()).update(bounds)
    text = "\n".join(path.read_text() for path in CONFIGS.glob("**/*.yaml"))
    for name in sorted(set(re.findall(r"class_path: ((?:lit_shortcut|datamodules)[\w.]+)", text))):
        module, _, attribute = name.rpartition(".")
        if not attribute[0].isupper():  # a function or method that reads the sizes from a file
            continue
        made = getattr(importlib.import_module(module), attribute)
        assert numbers_of(made) - UNBOUNDED <= listed.get(made, set()), name
