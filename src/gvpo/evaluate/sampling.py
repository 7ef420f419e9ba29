"""Completions from a model: by Transformers on a CPU or GPU, or by vLLM.

What is sampled depends on the prompt batch and its seed alone, never on what ran before, so that an
evaluation that was cut off goes on as if it had not been.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gvpo.errors import InputError, first_line, refused

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class SamplingOptions:
    """How completions are drawn: at temperature 0 by greedy decoding, with top_p 1 from all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024


@dataclass(frozen=True)
class Completion:
    """One completion: its text, its length in tokens, and whether `max_tokens` cut it off."""

    text: str
    tokens: int
    truncated: bool


class Sampler(ABC):
    """Draws one completion for each prompt.

    With `chat` the prompts are conversations, whose rendered text has all special tokens already. The `dtype`
    "auto" is that of the saved model, of which vLLM makes half precision where it is float32.

    Raises:
        InputError: the model or the engine cannot be loaded.
    """

    def __init__(
        self, model: str, tokenizer: Any, options: SamplingOptions, *, chat: bool, dtype: str = "auto"
    ) -> None:
        self.tokenizer, self.options, self.chat, self.dtype = tokenizer, options, chat, dtype
        with refused(f"the model {model} cannot be loaded", "give a folder or Hub id of a language model"):
            self._load(model)

    @abstractmethod
    def _load(self, model: str) -> None: ...

    def render(self, prompt: Prompt) -> str:
        """The text that the model is given."""
        if isinstance(prompt, str):
            return prompt
        return str(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))

    @abstractmethod
    def sample(self, texts: Sequence[str], seed: int) -> list[Completion]:
        """One completion for each text."""


class TransformersSampler(Sampler):
    """Batches through `generate`, a prompt read once for all its rows; on a GPU when there is one."""

    def _load(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=self.dtype).to(device).eval()
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        temperature, top_p = self.options.temperature, self.options.top_p
        drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        # A configuration of our own: one saved with the model may hold penalties and a top-k of 50.
        self.generation = GenerationConfig(
            do_sample=bool(drawn),
            **drawn,
            max_new_tokens=self.options.max_tokens,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def sample(self, texts: Sequence[str], seed: int) -> list[Completion]:
        import torch

        from gvpo.model.generation import shared_prompts

        inputs = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, add_special_tokens=not self.chat
        ).to(self.model.device)
        inputs.pop("token_type_ids", None)
        torch.manual_seed(seed)
        with torch.inference_mode(), shared_prompts(self.model):
            output = self.model.generate(**inputs, generation_config=self.generation)
        return [self._completion(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def _completion(self, tokens: list[int]) -> Completion:
        stop = next((position for position, token in enumerate(tokens, 1) if token in self.ends), None)
        kept = tokens[:stop]
        return Completion(self.tokenizer.decode(kept, skip_special_tokens=True), len(kept), stop is None)


class VLLMSampler(Sampler):
    """Batches through vLLM (the extra `gvpo[vllm]`), with a seed for each request."""

    def _load(self, model: str) -> None:
        # In this process: requests are scheduled in a fixed order, and nobody waits for a killed engine
        # (docs/upstream/vllm-killed-engine.md).
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with refused("vLLM is not installed", "pip install 'gvpo[vllm]', or use transformers", ImportError):
            from vllm import LLM  # type: ignore[import-not-found]
            from vllm.platforms import current_platform
        # Compiling takes a laptop longer than many an evaluation.
        self.engine = LLM(model=model, dtype=self.dtype, enforce_eager=current_platform.is_cpu())

    def sample(self, texts: Sequence[str], seed: int) -> list[Completion]:
        from vllm import SamplingParams

        parameters = [SamplingParams(**vars(self.options), seed=seed + index) for index in range(len(texts))]
        special = not self.chat
        prompts = [
            {"prompt_token_ids": self.tokenizer(text, add_special_tokens=special)["input_ids"]}
            for text in texts
        ]
        try:
            outputs = self.engine.generate(prompts, parameters, use_tqdm=False)
        except Exception as error:
            if not type(error).__module__.startswith("vllm."):
                raise
            raise InputError(
                f"vLLM gives no completions ({first_line(error)}): mend it, and the same command goes on."
            ) from error
        drawn = [request.outputs[0] for request in outputs]
        return [Completion(one.text, len(one.token_ids), one.finish_reason == "length") for one in drawn]
