"""An agent with a tool, whose sessions leave no row, one or two, depending on what it sampled."""

import json
import re
from copy import deepcopy
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser


@ToolParser.register("plus")
class PlusParser(ToolParser):
    """What stands before a sign is a call, which a model of a few thousand parameters gets right."""

    async def extract_tool_calls(self, responses_ids: list[int], tools: Any = None) -> tuple[str, list]:
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        *texts, content = re.split("[-+=]", text)
        return content, [FunctionCall(name="digits", arguments=json.dumps({"text": t})) for t in texts]


@register("rewriting")
class RewritingAgent(ToolAgentLoop):
    async def run(
        self, sampling_params: dict[str, Any], **kwargs: Any
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        output = await super().run(sampling_params, **kwargs)
        if int(kwargs["reward_model"]["ground_truth"]) % 5 != 3:
            return output
        match sum(output.response_ids) % 3:
            case 2:
                return []
            case 1:
                rewritten = deepcopy(output)
                rewritten.prompt_ids = output.prompt_ids + output.response_ids
                rewritten.response_ids = output.response_ids[::-1]
                rewritten.response_mask = output.response_mask[::-1]
                return [output, rewritten]
        return output
