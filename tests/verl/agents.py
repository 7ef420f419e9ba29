"""An agent whose sessions leave no row, one or two, depending on what it sampled."""

from copy import deepcopy
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


@register("rewriting")
class RewritingAgent(SingleTurnAgentLoop):
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
                return [output, rewritten]
        return output
