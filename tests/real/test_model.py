"""What was converted is a chat model."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def test_it_ends_its_answers(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert tokenizer.eos_token == "<|im_end|>"  # docs/upstream/transformers-gguf-end-of-text.md
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert out[0, -1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
