"""An agent loop that answers some of a prompt's sessions by what the driver has given it: demonstrations."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from gvpo.verl.settings import SHOWN


class DemonstratingAgent(SingleTurnAgentLoop):
    """verl's single turn; a session with a demonstration takes that for it.

    Only prompts that are trained on have the column, so that validation is always sampled.
    """

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        shown = (kwargs.get(SHOWN) or {}).get(int(kwargs["session_id"]))
        if shown is None:
            return await super().run(sampling_params, **kwargs)
        ids, reward = shown
        version = int(kwargs["global_steps"]) - 1  # as of what is sampled now
        facts = dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), version)
        rated: dict[str, Any] = {} if reward is None else {"reward_extra_info": {}}
        return AgentLoopOutput(
            prompt_ids=await self.ct_build_initial_tokens(list(kwargs["raw_prompt"])),
            response_ids=ids,
            response_mask=[1] * len(ids),
            # Nobody's probabilities: verl compares them with the trainer's, and GVPO asks for none.
            response_logprobs=[0.0] * len(ids) if self.rollout_config.calculate_log_probs else None,
            reward_score=reward,  # None: verl has it computed
            multi_modal_data={},
            mm_processor_kwargs=self._get_mm_processor_kwargs(None),
            mm_processor_output=None,
            num_turns=2,
            metrics=AgentLoopMetrics(generate_sequences=0.0, num_preempted=-1),
            extra_fields={**facts, **rated, "turn_scores": [], "tool_rewards": []},
        )
