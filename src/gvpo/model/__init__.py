"""What is asked of a language model: log-probabilities, weighted likelihood of chosen tokens, generation."""
