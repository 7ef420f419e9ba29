"""A tokenizer that cannot be had is told in one sentence."""

import shutil
from pathlib import Path

import pytest

from gvpo.errors import InputError
from gvpo.model.tokenizer import load_tokenizer, read_template
from gvpo.sums import make_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> str:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_template_takes_the_place_of_the_tokenizer_s_own(model: str, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}=")
    template = read_template(tmp_path / "chat.jinja")
    tokenizer = load_tokenizer(model, template, needs_template=True, advice="--x FILE, or --y")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False) == "1+1="
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<eos>")


def test_what_is_missing_is_said(model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no chat template: give one with --x FILE, or --y to send"):
        load_tokenizer(model, needs_template=True, advice="--x FILE, or --y")
    with pytest.raises(InputError, match="there is no model at"):
        load_tokenizer(str(tmp_path / "none"), needs_template=False, advice="")
    shutil.rmtree(model)
    Path(model).mkdir()
    with pytest.raises(InputError, match="has no tokenizer that can be loaded"):
        load_tokenizer(model, needs_template=False, advice="")
    with pytest.raises(InputError, match=r"missing\.jinja cannot be read"):
        read_template(tmp_path / "missing.jinja")
    assert read_template(None) is None
