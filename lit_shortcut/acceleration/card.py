"""Model card of a shortcut: its use, and the results of ``lit-shortcut test``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lit_shortcut.acceleration.origin import CARD, Origin, read_config
from lit_shortcut.files import replacing

REPORT = "report.md"
PICTURES = ("grids.png", "pareto.png")

_TEXT = """---
{data}
---

# Shortcut for {base}

A light network that predicts the next step's features of a frozen masked image generation model, so that most passes
of the heavy model are skipped (MIGM-Shortcut, [arXiv 2602.23996](https://arxiv.org/abs/2602.23996)). The base is left
as it is, and is not part of this folder.

```python
from lit_shortcut import load

pipe = load("{address}", budget={budget})
pipe({asked}, seeds=[1]).images[0].save("picture.png")
```

| | |
|---|---|
| base | {base}{source}, fingerprint `{fingerprint}` |
| steps | {steps} |
| decoding | `{decoding}` |
| network | `{network}` |
| trained on | {trained_on} |
| licence | {licence} |
"""


def model_card(
    origin: Origin, network: dict[str, Any], measured: str = "", pictures: Sequence[str] = (), address: str = "FOLDER"
) -> str:
    """Return the card's Markdown.

    Args:
        origin: origin of the shortcut.
        network: class and ``hparams`` of its network.
        measured: Markdown of a report, with its table.
        pictures: names of the report's pictures, beside the card.
        address: address to load the shortcut from.
    """
    base = origin.base
    computed = f"{origin.budget} (plan `{origin.plan}`)" if origin.budget else "as many as asked for, by default all"
    on_hub = base.source.startswith("hf://")
    data = ModelCardData(
        license=origin.licence.lower() or None,
        library_name="lit-shortcut",
        base_model="/".join(base.source.removeprefix("hf://").partition("@")[0].split("/")[:2]) if on_hub else None,
        tags=["migm-shortcut", "masked-image-generation"],
    )
    text = _TEXT.format(
        data=data.to_yaml(),
        base=base.name or "a base of one's own",
        address=address,
        budget=origin.budget or max(1, origin.num_steps // 4),
        asked="labels=[0]" if origin.num_classes else '["a dark, wide coat"]',
        source=f" ({base.source}{f' at {base.revision}' * bool(base.revision)})" if on_hub else "",
        fingerprint=base.fingerprint,
        steps=f"N = {origin.num_steps}, of which the base computes {computed}",
        decoding=json.dumps(dict(origin.decoding)),
        network=json.dumps(network),
        trained_on=origin.trained_on,
        licence=origin.licence,
    )
    if measured:
        text += f"\n## Measured\n\n{measured}"
    return text + "".join(f"\n![{name.partition('.')[0]}]({name})\n" for name in pictures)


def write_card(folder: Path, report: Path) -> None:
    """Write the model card of the shortcut in ``folder``, with the results of ``lit-shortcut test``.

    Args:
        folder: folder of the shortcut.
        report: folder of the results, whose table and pictures go into the card.

    Raises:
        WeightsError: if ``folder`` does not hold a shortcut.
        ValueError: if ``report`` does not hold a report.
    """
    network, origin = read_config(folder)
    if not (report / REPORT).is_file():
        raise ValueError(f"{report / REPORT}: no such file; expected the results of lit-shortcut test")
    pictures = [name for name in PICTURES if (report / name).is_file()]
    for name in pictures:
        shutil.copyfile(report / name, folder / name)
    with replacing(folder / CARD) as aside:
        aside.write_text(
            model_card(origin, network, (report / REPORT).read_text(encoding="utf-8"), pictures, folder.as_posix()),
            encoding="utf-8",
        )
