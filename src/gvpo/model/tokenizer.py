"""A model's tokenizer, fit for batches of prompts."""

from pathlib import Path
from typing import Any

from gvpo.errors import InputError, refused


def read_template(path: str | Path | None) -> str | None:
    """The text of a Jinja file; None for none.

    Raises:
        InputError: it cannot be read.
    """
    kinds = (OSError, UnicodeDecodeError)
    with refused(f"the chat template {path} cannot be read", "give a Jinja file", kinds):
        return None if path is None else Path(path).read_text(encoding="utf-8")


def load_tokenizer(
    model: str,
    chat_template: str | None = None,
    *,
    needs_template: bool,
    advice: str,
    images: bool = False,
    **options: Any,
) -> Any:
    """The tokenizer of a model, padding on the left, with a chat template where one is needed.

    Args:
        model: folder or Hub id.
        chat_template: to use in place of the tokenizer's own.
        needs_template: the prompts are conversations.
        advice: what gives it a template, or does without: "--chat-template FILE, or --plain".
        images: the processor instead, which takes images too.
        options: of `AutoTokenizer.from_pretrained`.

    Raises:
        InputError: there is no model, tokenizer or template.
    """
    from transformers import AutoProcessor, AutoTokenizer

    looks_local = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1 or Path(model).exists()
    if looks_local and not Path(model).is_dir():
        raise InputError(f"there is no model at {model}: give a folder that holds one, or a Hub id.")
    what, load = ("processor", AutoProcessor) if images else ("tokenizer", AutoTokenizer)
    with refused(f"{model} has no {what} that can be loaded", "save it beside the model"):
        processor = load.from_pretrained(model, padding_side="left", **options)
    if images and not hasattr(processor, "image_processor"):
        raise InputError(f"{model} takes no images: give a vision-language model, or leave image_column out.")
    tokenizer = getattr(processor, "tokenizer", processor)
    if chat_template is not None:
        processor.chat_template = chat_template
    if needs_template and not processor.chat_template:
        raise InputError(
            f"the tokenizer of {model} has no chat template: give one with {advice} to send the questions as "
            "they are."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor
