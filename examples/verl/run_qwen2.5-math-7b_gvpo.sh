#!/usr/bin/env bash
# The published run of GVPO on verl 0.9: Qwen2.5-Math-7B on GSM8K and MATH, one node with 2 GPUs.
#
#   gvpo data gsm8k --output data/gsm8k && gvpo data math --output data/math
#   bash examples/verl/run_qwen2.5-math-7b_gvpo.sh
#
# Several nodes: `ray start --head` on the first, `ray start --address=HEAD:6379` on the others, gvpo and the same
# data and model paths on all of them, and then, on the first:
#   NNODES=4 GPUS=8 RAY_ADDRESS=auto bash examples/verl/run_qwen2.5-math-7b_gvpo.sh
# Everything after the script's name goes to Hydra and wins, for example `gvpo.reference=initial`.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-Math-7B}
DATA=${DATA:-data}
NNODES=${NNODES:-1}
GPUS=${GPUS:-2}

python3 -m gvpo.verl \
    algorithm.adv_estimator=grpo \
    algorithm.norm_adv_by_std_in_grpo=False \
    algorithm.use_kl_in_reward=False \
    data.train_files="['$DATA/gsm8k/train.parquet','$DATA/math/train.parquet']" \
    data.val_files="['$DATA/gsm8k/test.parquet','$DATA/math/test.parquet']" \
    data.train_batch_size=1024 \
    data.max_prompt_length=1024 \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=True \
    data.truncation=error \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.policy_loss.loss_mode=gvpo \
    actor_rollout_ref.actor.gvpo_beta=0.1 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 \
    actor_rollout_ref.actor.fsdp_config.param_offload=False \
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=False \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=4 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 \
    trainer.logger='["console","tensorboard"]' \
    trainer.project_name=gvpo \
    trainer.experiment_name=qwen2.5-math-7b \
    trainer.n_gpus_per_node="$GPUS" \
    trainer.nnodes="$NNODES" \
    trainer.save_freq=20 \
    trainer.test_freq=20 \
    trainer.total_epochs=15 \
    "$@"
