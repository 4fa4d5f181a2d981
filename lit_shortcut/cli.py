"""The ``lightning`` command, also ``lit-shortcut``: fit, validate, test, predict, generate; verify, card, app."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ActionYesNo, ArgumentParser, set_parsing_settings
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lit_shortcut.acceleration.card import write_card
from lit_shortcut.callbacks.progress import progress_bar
from lit_shortcut.callbacks.wandb_axes import WandbAxes
from lit_shortcut.callbacks.wandb_lineage import WandbLineage
from lit_shortcut.checkpoints import WholeCheckpointIO
from lit_shortcut.inputs import located, use_projects_of
from lit_shortcut.pipeline import Pipeline, load
from lit_shortcut.precision import require_precision, require_same_device
from lit_shortcut.trainer import Trainer
from lit_shortcut.trajectory import problems
from lit_shortcut.weights import read_pickle

_UNION_REPORT = "Does not validate against any of the Union subtypes"  # jsonargparse's; its cause is the class's error
_FLAGS = {  # options of generate
    "compare": "Also draw each picture with vanilla at the same seed, beside it.",
    "overwrite": "Delete pictures of other settings in the output folder.",
}
_VERIFY, _CARD, _APP = "verify", "card", "app"


class SaveConfig(SaveConfigCallback):
    """Pass the whole configuration to every logger; on W&B it is the run's config and a file of the run.

    Lightning's own callback writes one ``config.yaml`` into the logger's folder and refuses a second run there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"save_to_log_dir": False}))

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Log the configuration; called on the first rank only."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": yaml.safe_load(text)})
            if isinstance(logger, WandbLogger) and not logger.experiment.disabled:  # WANDB_MODE=disabled has no folder
                Path(logger.experiment.dir, "config_cli.yaml").write_text(text)


class ShortcutCLI(LightningCLI):
    """LightningCLI whose checkpoints are read without pickled code and never override the YAML."""

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Set up the parser as Lightning does, and list the other verbs in the help."""
        super().setup_parser(*args, **kwargs)
        self.parser.epilog = (
            f"lit-shortcut {_VERIFY} SET checks every byte of a recorded set of trajectories; "
            f"lit-shortcut {_CARD} SHORTCUT REPORT writes a shortcut's model card from the results of test; "
            f"lit-shortcut {_APP} --checkpoint SHORTCUT opens a page to try out a shortcut."
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's verbs and ``generate``, with their arguments that are not options."""
        return LightningCLI.subcommands() | {"generate": {"model", "datamodule", *_FLAGS}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse as Lightning does, but look for YAMLs and inputs outside the current folder, too."""
        words = sys.argv[1:] if args is None else args
        if not isinstance(words, list):
            super().parse_arguments(parser, args)
            return
        use_projects_of([])  # forget those of an earlier command in this process
        words, configs = _located(words)
        use_projects_of(configs)
        self.config = parser.parse_args(words)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "generate":
            for name, text in _FLAGS.items():  # unlike Lightning's options, they need no value
                parser.add_argument(
                    f"--{name}", action=ActionYesNo(no_prefix="no_"), nargs="?", default=False, help=text
                )
            self._subcommand_method_arguments[subcommand] += _FLAGS
            return parser
        parser.set_defaults(weights_only=True)
        if subcommand == "predict":
            parser.set_defaults(return_predictions=False)  # trajectories go to disk, not into memory
        return parser

    def instantiate_classes(self) -> None:
        """Instantiate as Lightning does, but raise a constructor's own error, not jsonargparse's report around it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            own: BaseException = error
            while own.__cause__ is not None and str(own).startswith(_UNION_REPORT):
                own = own.__cause__
            raise own from own.__cause__

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Instantiate as Lightning does, with checkpoints that survive a kill and progress that log files show, too.

        A ``CheckpointIO`` or progress bar named in the YAML is kept.

        Raises:
            ValueError: if the device lacks the precision, or the precision was chosen for another device.
        """
        trainer = super().instantiate_trainer(**kwargs)
        require_precision(str(trainer.precision), trainer.strategy.root_device)
        require_same_device(trainer.precision_plugin, trainer.strategy.root_device)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        trainer.callbacks = [  # type: ignore[attr-defined]
            progress_bar() if type(one) in (RichProgressBar, TQDMProgressBar) else one
            for one in trainer.callbacks  # type: ignore[attr-defined]
        ]
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Keep the model's YAML, which Lightning would replace with hyperparameters from the checkpoint.

        A damaged checkpoint is refused by name, which Lightning's error leaves out.
        """
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path and Path(path).is_file():
            read_pickle(Path(path))


def _located(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Return ``words`` with the YAMLs after ``--config`` replaced by their locations, and these locations."""
    found, configs = list(words), []
    for index, word in enumerate(found):
        option, equals, path = word.partition("=")
        if option not in ("--config", "-c"):
            continue
        if equals:
            configs.append(located(path))
            found[index] = f"{option}={configs[-1]}"
        elif index + 1 < len(found):
            configs.append(located(found[index + 1]))
            found[index + 1] = str(configs[-1])
    return found, configs


def verify(source: str, cache: Path | None = None) -> None:
    """Check every byte of a set of trajectories and name each file and sample that is damaged.

    The exit code is 1 if anything is wrong.

    Args:
        source: folder of the set, or URL prefix.
        cache: folder for fetched shards, one at a time; a temporary one by default.
    """
    count = 0
    for count, problem in enumerate(problems(source, cache), start=1):  # noqa: B007 - counts
        print(problem)  # noqa: T201 - what the command is for
    print(f"{source}: problems: {count}" if count else f"{source}: sound")  # noqa: T201
    if count:
        raise SystemExit(1)


def card(shortcut: Path, report: Path) -> None:
    """Write the model card of a shortcut, with the table and pictures that test measured.

    Args:
        shortcut: folder of the shortcut.
        report: folder of the results of test.
    """
    write_card(shortcut, report)


class _Built(ShortcutCLI):
    """The command ``generate``, built from its configuration but not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def app(
    config: Path | None = None, checkpoint: str | None = None, host: str | None = None, port: int | None = None
) -> None:
    """Open a page to try out a shortcut beside vanilla, until the process is stopped.

    Args:
        config: configuration of generate, such as configs/fashion_text/generate.yaml.
        checkpoint: instead, the folder of a shortcut or of an embedded base, or the shortcut's address on the hub.
        host: address to listen on, 127.0.0.1 by default; 0.0.0.0 lets other machines in.
        port: port to listen on; the first free one from 7860 on by default.

    Raises:
        ValueError: unless exactly one of ``config`` and ``checkpoint`` is given.
    """
    if (config is None) == (checkpoint is None):
        raise ValueError(f"expected --config or --checkpoint, got {'neither' if config is None else 'both'}")
    try:
        from lit_shortcut.app import serve  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ModuleNotFoundError("lit-shortcut app needs Gradio: pip install 'lit-shortcut[app]'") from error
    if checkpoint is not None:
        serve(load(checkpoint), host, port)
        return
    warnings.filterwarnings("ignore", message="LightningCLI.s args parameter")  # it replaces the process's own here
    built = _run(_Built, ["generate", "--config", str(config)])
    task: Any = built.trainer.precision_plugin.convert_module(built.model)
    pipeline = Pipeline(task.base, task.decoding, task.shortcut, task.plan, task.budget)
    serve(pipeline.to(built.trainer.strategy.root_device), host, port)


def main(args: ArgsType = None) -> None:
    """Run the command line ``args``, or the process's own."""
    words = sys.argv[1:] if args is None else args
    for name, function in ((_VERIFY, verify), (_CARD, card), (_APP, app)):
        if isinstance(words, list) and words[:1] == [name]:
            parser = ArgumentParser(prog=f"lit-shortcut {name}")
            parser.add_function_arguments(function, as_group=False, as_positional=True)
            function(**parser.instantiate(parser.parse_args(words[1:])).as_dict())
            return
    _run(ShortcutCLI, args)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()


def _run(kind: type[ShortcutCLI], args: ArgsType) -> ShortcutCLI:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)  # adverts for other packages
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${model.…} works under every verb
    os.environ.setdefault("WANDB_MODE", "offline")  # WANDB_MODE=online uploads
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # lightning 2.6 against torch 2.14 and later
    warnings.filterwarnings("ignore", message=".*is not supported by the model summary")  # it shows 32-bit sizes
    warnings.filterwarnings("ignore", message="Found .* in eval mode")  # frozen parts of a task are meant to be
    torch.set_float32_matmul_precision("high")
    return kind(
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        trainer_defaults={"callbacks": [WandbAxes(), WandbLineage()]},
        auto_configure_optimizers=False,  # tasks take the optimiser and its schedule as arguments
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=args,
    )


if __name__ == "__main__":
    main()
