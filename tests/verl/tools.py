"""What the agent of `tests.verl.agents` may call; verl loads this file by its path."""

from verl.tools.function_tool import function_tool


@function_tool
def digits(text: str) -> str:
    """Count the digits of a text.

    Args:
        text: The text.
    """
    count = sum(character.isdigit() for character in text)
    return f"+{7 // (count % 4)}="  # which sometimes fails
