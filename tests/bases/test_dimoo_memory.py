"""What loading the published folder costs: its weights are mapped from the files, so they exist once at most."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_shortcut.bases.dimoo.llada import LLaDA
from tests.published_dimoo import CONFIG, SHARDS

STATUS = Path("/proc/self/status")
PROBE = """
import sys
from pathlib import Path
import torch
from lit_shortcut.bases.dimoo.published import load_transformer

def mib(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024

before = mib("VmRSS")
transformer = load_transformer(Path(sys.argv[1]), torch.bfloat16)
loaded = mib("VmHWM") - before
for tensor in transformer.state_dict().values():
    tensor.view(torch.uint8).max()
print(loaded, mib("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 192 MiB in bfloat16, in two shards."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"d_model": 1024, "mlp_hidden_size": 3072, "n_layers": 7, "embedding_size": 2600}
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes))
    with torch.device("meta"):
        shapes = LLaDA(vocab_size=2600, width=1024, depth=7, num_heads=2, mlp_width=3072).state_dict()
    tensors = {
        f"model.transformer.{name}": torch.ones(tensor.shape, dtype=torch.bfloat16) for name, tensor in shapes.items()
    }
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for shard, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / shard)
    weight_map = {name: shard for shard, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def growth(folder: Path) -> tuple[float, float]:
    """Growth of peak memory over the files' size: by loading, and by loading and reading all weights."""
    probe = [sys.executable, "-c", PROBE, str(folder)]
    run = subprocess.run(probe, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    size = sum((folder / shard).stat().st_size for shard in SHARDS) / 2**20
    loaded, read = (float(mib) / size for mib in run.stdout.split())
    return loaded, read


@pytest.mark.skipif(not STATUS.exists(), reason="peak memory of a process is told by Linux alone")
def test_weights_in_their_own_precision_are_mapped_and_never_held_twice(folder: Path) -> None:
    loaded, read = growth(folder)
    assert loaded < 0.2  # pages come when they are read
    assert 0.9 < read < 1.2
