#!/usr/bin/env bash
# GVPO through verl's whole Ray pipeline on a CPU, with a model and prompts of your own:
#
#   MODEL=path/to/a/small/model DATA=folder/with/train.parquet/and/test.parquet bash examples/verl/run_cpu.sh
#
# For seeing how verl and GVPO work together; `gvpo verl quickstart` makes a model and data for itself.
set -euo pipefail

MODEL=${MODEL:?the folder of a small causal language model}
DATA=${DATA:?a folder made by gvpo data}

python3 -m gvpo.verl +machine=cpu trainer.n_gpus_per_node=2 \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/test.parquet" \
    data.train_batch_size=16 \
    data.max_prompt_length=256 \
    data.max_response_length=64 \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.gvpo_beta=0.1 \
    actor_rollout_ref.actor.optim.lr=1e-5 \
    actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.n=4 \
    trainer.logger='["console"]' \
    trainer.total_epochs=1 \
    "$@"
