"""A user's text is text, whatever special tokens it spells; those of the template are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lit_shortcut.bases.dimoo.prompt import TEMPLATE, TextTokenizer, Utf8Tokenizer
from tests.published_dimoo import tokenizer

SHIPPED = Path("checkpoints/fashion_text/tokenizer.json")
NAMES = ("boi", "eoi", "answer_start", "answer_end", "uncondition", "mask", "system")


@pytest.fixture(params=["shipped", "with special tokens in the template", "non-special"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "shipped":
        return SHIPPED
    made = tokenizer(*NAMES) if "special tokens" in request.param else tokenizer()
    if request.param == "non-special":
        made.add_tokens([f"<{name}>" for name in NAMES])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def special_ids(path: Path) -> set[int]:
    return set(Tokenizer.from_file(str(path)).get_added_tokens_decoder())


@pytest.mark.parametrize("template", ["{}", TEMPLATE, "<boi> {}</s>", "<mask>{}<uncondition>!"])
@pytest.mark.parametrize("text", ["a dark, wide coat", " two  spaces ", "größer", ""])
def test_ordinary_text_becomes_what_the_library_makes_of_the_whole(path: Path, template: str, text: str) -> None:
    whole = Tokenizer.from_file(str(path)).encode(template.replace("{}", text)).ids
    assert TextTokenizer(path, None).encode(text, template) == whole


@pytest.mark.parametrize("template", ["{}", TEMPLATE, "<boi>{}<eoi>"])
@pytest.mark.parametrize("spelt", ["<mask>", "a <uncondition> cat", "</s>", "<boi><eoi>", "{}", "mask>"])
def test_special_token_spelt_in_a_prompt_is_text(path: Path, template: str, spelt: str) -> None:
    made, special = TextTokenizer(path, None), special_ids(path)
    of_template = [id_ for id_ in made.encode("", template) if id_ in special]
    ids = made.encode(spelt, template)
    assert [id_ for id_ in ids if id_ in special] == of_template
    assert spelt in Tokenizer.from_file(str(path)).decode(ids, skip_special_tokens=False)


def test_template_and_prompt_do_not_make_a_special_token_together(path: Path) -> None:
    assert not special_ids(path) & set(TextTokenizer(path, None).encode("mask", "<{}>"))


def test_byte_tokenizer_takes_text_as_bytes() -> None:
    made = Utf8Tokenizer(uncondition=256)
    assert made.encode("<uncondition>") == list(b"<uncondition>")
    assert made.encode("{}", "<uncondition>{}<uncondition>") == [256, *b"{}", 256]
