from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.prompts import Prompts, read_prompts

TEXTS = ["a red cat", "zwei größere Katzen", "三只猫\u2028和一只狗"]


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n".join(TEXTS) + "\n"),
        ("a.txt", "\r\n".join(f"  {text} " for text in TEXTS)),
        ("a.json", json.dumps(TEXTS)),
        ("a.json", json.dumps([{"prompt": text, "id": 7} for text in TEXTS], ensure_ascii=False)),
        ("a.jsonl", "\n".join(json.dumps(text) for text in TEXTS)),
        ("a.jsonl", "\n".join(json.dumps({"prompt": text}) for text in TEXTS) + "\n"),
        ("a.txt", "\ufeff" + "\n".join(TEXTS) + "\n \n\n"),
        ("a.json", "\ufeff" + json.dumps(TEXTS)),
        ("a.jsonl", "\ufeff" + "\r\n".join(json.dumps(text) for text in TEXTS) + "\r\n\r\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, name: str, content: str) -> None:
    assert read_prompts(written(tmp_path / name, content)) == TEXTS


def test_prompts_come_in_turn_each_image_with_a_seed_of_its_own(tmp_path: Path) -> None:
    source = Prompts(written(tmp_path / "a.txt", "\n".join(TEXTS)), num_images=5, batch_size=2)
    batches = list(source.loader())
    assert [batch.prompts for batch in batches] == [tuple(TEXTS[:2]), (TEXTS[2], TEXTS[0]), (TEXTS[1],)]
    assert [batch.labels.tolist() for batch in batches] == [[0, 1], [2, 0], [1]]
    assert len({seed for batch in batches for seed in batch.seeds.tolist()}) == 5
    assert Prompts(tmp_path / "a.txt").num_images == 3


def test_image_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\n".join(TEXTS))
    (together,) = Prompts(path, batch_size=3, seed=4).loader()
    for row, alone in enumerate(Prompts(path, seed=4).loader()):
        assert alone.seeds.tolist() == together.seeds.tolist()[row : row + 1]
        assert alone.prompts == together.prompts[row : row + 1]


def test_digest_is_of_the_prompts_and_their_order(tmp_path: Path) -> None:
    digests = [
        Prompts(written(tmp_path / name, content)).prompts_sha256
        for name, content in (("a.txt", "x\ny"), ("b.jsonl", '"x"\n"y"'), ("c.txt", "y\nx"), ("d.txt", "x y"))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\n\nthree", r"a\.txt: prompt 2: expected a text, found an empty one"),
        ("a.txt", "", r"a\.txt: expected at least one prompt, found none"),
        ("a.json", '["one", " "]', r"a\.json: prompt 2: expected a text, found an empty one"),
        ("a.json", '["one", 2]', r"a\.json: prompt 2: expected a string.*found 2"),
        ("a.json", '[{"text": "one"}]', r"a\.json: prompt 1: .*the key 'prompt', found {'text': 'one'}"),
        ("a.json", '{"prompt": "one"}', r"a\.json: expected a JSON list of prompts, found dict"),
        ("a.json", "[", r"a\.json: not a readable file of prompts"),
        ("a.jsonl", '"one"\n\n"two"\n', r"a\.jsonl: not a readable file of prompts .*line 2, column 1"),
        ("a.jsonl", '"one"\n"two"\n{"prompt" "x"}\n', r"a\.jsonl: not a readable file of prompts .*line 3, column 11"),
        ("a.csv", "one", r"a\.csv: expected a file of prompts ending in \.txt, \.json, \.jsonl"),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts(written(tmp_path / name, content))


def test_missing_file_and_other_encoding_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.txt: not a readable file of prompts"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not a readable file of prompts"):
        read_prompts(tmp_path / "latin.txt")


def test_nothing_to_generate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        Prompts(written(tmp_path / "a.txt", "one"), num_images=0)
