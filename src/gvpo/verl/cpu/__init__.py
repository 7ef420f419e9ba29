"""verl without a GPU: a CPU platform and a Hugging Face rollout, registered from outside verl 0.9.

verl imports `gvpo.verl.cpu.register` in every process when VERL_USE_EXTERNAL_MODULES names it: `use()` sets
that for this process and those that it starts. Besides, choose `trainer.device=cpu` and
`actor_rollout_ref.rollout.name=hf`. For trying verl on a laptop and for tests; nothing here is fast.
"""

from __future__ import annotations

import os

MODULE = "gvpo.verl.cpu.register"


def use() -> dict[str, str]:
    """Set up this process and its children for verl on CPUs; call it before verl is imported.

    Returns:
        The environment variables that were set, for Ray's `runtime_env` on other machines.
    """
    wanted = {
        "VERL_USE_EXTERNAL_MODULES": MODULE,
        "VERL_PLATFORM": "cpu",
        # The key under which verl keeps its FSDP engine; the engine itself asks the platform.
        "VERL_ENGINE_DEVICE": "cuda",
        # Ray would hide the pretended GPUs from actors that ask for none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "TQ_NUM_THREADS": "1",
        # Ray makes its workers nice, which starves them on a busy laptop.
        "RAY_worker_niceness": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    others = [m for m in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if m and m != MODULE]
    wanted["VERL_USE_EXTERNAL_MODULES"] = ",".join([*others, MODULE])
    os.environ.update(wanted)
    return wanted


def overrides(workers: int = 2, *, cpus: int = 32, store_bytes: int = 200_000_000) -> list[str]:
    """Hydra overrides that put verl 0.9 on CPUs, in float32.

    Args:
        workers: training processes.
        cpus: what Ray believes to have; its actors mostly wait, and would not fit on two.
        store_bytes: size of Ray's object store.
    """
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    precision = "fsdp_config.mixed_precision"
    return [
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={workers}",
        "trainer.nnodes=1",
        f"+ray_kwargs.ray_init.num_cpus={cpus}",
        f"+ray_kwargs.ray_init.num_gpus={workers}",
        "+ray_kwargs.ray_init.include_dashboard=False",
        f"+ray_kwargs.ray_init.object_store_memory={store_bytes}",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"{actor}.strategy=fsdp2",
        f"{actor}.use_torch_compile=False",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.fsdp_config.model_dtype=fp32",
        f"+{actor}.{precision}.param_dtype=fp32",
        f"+{actor}.{precision}.reduce_dtype=fp32",
        f"+{actor}.{precision}.buffer_dtype=fp32",
        "actor_rollout_ref.ref.strategy=fsdp2",
        "actor_rollout_ref.ref.use_torch_compile=False",
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.ref.fsdp_config.model_dtype=fp32",
        f"+actor_rollout_ref.ref.{precision}.param_dtype=fp32",
        f"+actor_rollout_ref.ref.{precision}.reduce_dtype=fp32",
        f"+actor_rollout_ref.ref.{precision}.buffer_dtype=fp32",
        f"{rollout}.name=hf",
        # One server for all workers: it generates in batches, which two servers would halve.
        f"{rollout}.tensor_model_parallel_size={workers}",
        f"{rollout}.agent.num_workers=1",
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes=16",
        "reward.num_workers=1",
        "data.dataloader_num_workers=0",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "gvpo.poll_seconds=0.05",
    ]
