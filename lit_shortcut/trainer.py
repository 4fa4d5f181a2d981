"""Lightning's trainer with one verb more: ``generate`` draws pictures and writes them to a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, RichProgressBar

from datamodules.listed import Listed
from datamodules.prompts import read_prompts
from lit_shortcut.callbacks.image_writer import ImageWriter
from lit_shortcut.callbacks.step_progress import StepProgress
from lit_shortcut.pictures import require_wanted
from lit_shortcut.tasks.generating import GenerateTask


class Trainer(L.Trainer):
    """Lightning's trainer, with :meth:`generate`."""

    callbacks: list[Callback]

    def generate(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        *,
        prompt: str | None = None,
        prompts: Path | None = None,
        labels: str | int | list[int] | None = None,
        num_images: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_steps: int | None = None,
        budget: int | None = None,
        compare: bool = False,
        output: Path = Path("pictures"),
        overwrite: bool = False,
    ) -> None:
        """Draw pictures of a prompt, of prompts in a file, or of classes, and write them to a folder.

        Args:
            model: a :class:`~lit_shortcut.tasks.generating.GenerateTask`.
            datamodule: leave it out; the options say what to draw.
            prompt: a text.
            prompts: file of texts: ``.txt``, a line each; ``.json``, a list of them; ``.jsonl``, a JSON value a line.
            labels: classes with commas between them, for a base without prompts: ``0,7``.
            num_images: in all, prompts or classes in turn; one for each by default.
            batch_size: images drawn at once.
            seed: of the first image, a 64-bit integer; the others count up.
            num_steps: N, steps of the decoding loop; the configuration's by default.
            budget: b, at how many of them the base runs; the configuration's by default.
            compare: also draw each picture with vanilla at the same seed, beside it.
            output: folder for the pictures.
            overwrite: delete pictures of other settings there.
        """
        if not isinstance(model, GenerateTask):
            raise MisconfigurationException(
                f"generate needs model.class_path {GenerateTask.__module__}.GenerateTask, got {type(model).__name__}"
            )
        if datamodule is not None:
            raise MisconfigurationException("generate takes prompts or labels in place of data; leave data out")
        texts = read_prompts(prompts) if prompts is not None else []
        if prompt is not None:
            texts = [prompt, *texts]
        classes = _numbers(labels)
        require_wanted(model.base, takes_prompts=bool(texts), takes_labels=bool(classes))
        data = Listed(texts, classes, num_images, batch_size, seed)
        others = [one for one in self.callbacks if not isinstance(one, ImageWriter)]  # that of an earlier call
        callbacks = [StepProgress() if isinstance(one, RichProgressBar) else one for one in others]
        self.callbacks = [*callbacks, ImageWriter(output, overwrite)]
        with _asked_for(model, num_steps, budget, compare):
            self.predict(model, datamodule=data, return_predictions=False)


@contextmanager
def _asked_for(model: GenerateTask, num_steps: int | None, budget: int | None, compare: bool) -> Iterator[None]:
    """Let ``model`` draw as one call asks for; the next has the model's own settings again."""
    own = model.decoding, model.budget, model.compare
    if num_steps is not None:
        model.decoding = model.decoding.at(num_steps)
    model.budget = model.budget if budget is None else budget
    model.compare = model.compare or compare
    try:
        yield
    finally:
        model.decoding, model.budget, model.compare = own


def _numbers(labels: str | int | list[int] | None) -> list[int]:
    """Return the classes that ``labels`` list."""
    if labels is None:
        return []
    if not isinstance(labels, str):
        return [labels] if isinstance(labels, int) else list(labels)
    try:
        return [int(label) for label in labels.split(",")]
    except ValueError as error:
        raise ValueError(f"labels must be numbers with commas between them, such as 0,7; got {labels!r}") from error
