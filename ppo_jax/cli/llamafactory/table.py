"""What becomes of each argument of LLaMA-Factory 0.9.3: translated, without effect here, or refused by name.

A refused argument may stand in a file with the value that it has by default: then it asks for nothing.
"""

import functools
import json
from pathlib import Path
from typing import Any

TRANSLATED: dict[str, str] = {
    "stage": "the command: sft, rm (`reward`), dpo, ppo; pt and kto are refused",
    "model_name_or_path": "model",
    "output_dir": "run_dir",
    "overwrite_output_dir": "overwrite; without it a run that is there is gone on with, as LLaMA-Factory does",
    "resume_from_checkpoint": "resume: true means yes, the path of a checkpoint is refused",
    "seed": "seed",
    "bf16": "compute.dtype bfloat16; what is trained stays float32",
    "pure_bf16": "compute.dtype bfloat16; what is trained stays float32 all the same",
    "quantization_bit": "compute.quantise: 8 is int8, 4 is int4; 2 and 3 are refused",
    "quantization_method": "bnb is the only one beside quantization_bit; the numbers are those of qwix",
    "disable_gradient_checkpointing": "compute.remat: full unless it is true",
    # -- data ---------------------------------------------------------------------------------------------------------
    "dataset": "data, pairs or prompts: DATASET_DIR/dataset_info.json:NAME; further ones are dataset.more",
    "dataset_dir": "where dataset_info.json is, seen from the working directory",
    "template": "dataset.template.name; without one it is read off the tokenizer's chat template (auto)",
    "default_system": "dataset.template.system",
    "tool_format": "dataset.template.tools",
    "enable_thinking": "dataset.template.thinking",
    "cutoff_len": "max_length, of prompts max_prompt; with too_long share, LLaMA-Factory's own way of cutting",
    "mask_history": "turns: last where true, else together",
    "max_samples": "dataset.max_samples",
    "mix_strategy": "concat: all rows count alike; interleave_*: dataset.weights, exact shares without end",
    "interleave_probs": "dataset.weights",
    "val_size": "held_out, or below 1 dataset.held_out_fraction; records that share a text stay together",
    "eval_dataset": "dataset.held_out_file; one of them",
    # -- adapters -----------------------------------------------------------------------------------------------------
    "finetuning_type": "adapter.kind (policy.kind, reward.kind): lora, freeze is top_k, full",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha; twice the rank by default",
    "lora_target": "adapter.targets; all: every linear map",
    "use_rslora": "adapter.alpha times the root of the rank, which is the same scale",
    "use_dora": "adapter.dora",
    "freeze_trainable_layers": "adapter.layers, from the top",
    "adapter_name_or_path": "start, one of them: it is gone on with, as large as it is; the reference is the base",
    "create_new_adapter": "model, where true: the adapter is merged into its base, with a new one on it",
    # -- steps --------------------------------------------------------------------------------------------------------
    "per_device_train_batch_size": "batch_size, times gradient_accumulation_steps and --devices; rm: two texts a pair",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs; of ppo loop.updates, with the rows that there are",
    "max_steps": "steps; of ppo loop.updates",
    "lr_scheduler_type": "loop.schedule: linear, cosine, constant and constant_with_warmup",
    "warmup_steps": "loop.warmup; our first step has a rate above 0",
    "warmup_ratio": "loop.warmup",
    "max_grad_norm": "max_grad_norm; 0 (no clipping) is a norm that is never reached",
    "weight_decay": "ppo.optimizer.weight_decay; other stages have none",
    "adam_beta1": "ppo.optimizer.b1; other stages have 0.9",
    "adam_beta2": "ppo.optimizer.b2; other stages have 0.999",
    "adam_epsilon": "ppo.optimizer.eps; other stages have 1e-8",
    "optim": "adamw_torch, adamw_torch_fused and adamw_hf are Adam with decoupled weight decay, as here",
    # -- when ---------------------------------------------------------------------------------------------------------
    "save_strategy": "loop.checkpoint_every: steps, epoch, or no (only the last one)",
    "save_steps": "loop.checkpoint_every; below 1 a share of all steps",
    "save_total_limit": "loop.keep; without it all checkpoints stay (loop.keep_every)",
    "eval_strategy": "loop.eval_every: steps, epoch, or no (before and after only)",
    "eval_steps": "loop.eval_every; logging_steps without it",
    "logging_steps": "every step is logged; loop.eval_every where eval_strategy is steps and eval_steps is not given",
    "load_best_model_at_end": "loop.best_metric; the best one is in export/best, beside the last one",
    "metric_for_best_model": "loop.best_metric: loss and accuracy",
    "report_to": "loop.log: wandb, mlflow, trackio (loop.project huggingface); TensorBoard's files are written anyway",
    # -- preferences --------------------------------------------------------------------------------------------------
    "pref_beta": "dpo.beta",
    "pref_loss": "sigmoid; the other losses are refused",
    "dpo_label_smoothing": "dpo.label_smoothing",
    # -- ppo ----------------------------------------------------------------------------------------------------------
    "reward_model": "reward; of type api with scoring.api.protocol llamafactory",
    "reward_model_type": "lora: adapter and value head on the policy's base; full: a model with one; api: a URL",
    "ppo_buffer_size": "ppo.num_minibatches; loop.batch_size is as many batches",
    "ppo_epochs": "ppo.epochs",
    "ppo_score_norm": "ppo.score.normalise: shift",
    "ppo_target": "hyper.kl_target; the coefficient starts at 0.2 and is adaptive with horizon 10000",
    "ppo_whiten_rewards": "ppo.score.whiten_rewards: scale (the mean stays)",
    "temperature": "hyper.temperature; log-probs are taken at it too, see below",
    "top_p": "ppo.sampling.top_p",
    "top_k": "ppo.sampling.top_k",
    "max_new_tokens": "ppo.sampling.response_length",
    "repetition_penalty": "ppo.sampling.repetition_penalty",
}

_TEXT_ONLY = "text alone is read here"
_FASTER = "it changes speed or memory, not the result; the compute and mesh options do that here"
_SERVING = "it is of inference, export or another engine, which training does not use"
_TRAINER = "it steers the Trainer of transformers, which does not run here"
NO_EFFECT: dict[str, str] = {
    _TEXT_ONLY: """media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels
        video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower
        freeze_multi_modal_projector""",
    _FASTER: """low_cpu_mem_usage flash_attn use_unsloth use_unsloth_gc enable_liger_kernel use_liger_kernel
        use_reentrant_gc upcast_layernorm upcast_lmhead_output offload_folder use_cache gradient_checkpointing
        gradient_checkpointing_kwargs preprocessing_batch_size preprocessing_num_workers data_shared_file_system
        dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory dataloader_persistent_workers tf32
        torch_compile torch_compile_backend torch_compile_mode torchdynamo torch_empty_cache_steps jit_mode_eval
        use_ipex per_device_eval_batch_size eval_accumulation_steps fsdp fsdp_config fsdp_min_num_params
        fsdp_transformer_layer_cls_to_wrap deepspeed tp_size accelerator_config mp_parameters length_column_name
        optim_target_modules average_tokens_across_devices""",
    _SERVING: """infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen
        sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend export_dir export_size export_device
        export_quantization_bit export_quantization_dataset export_quantization_nsamples export_quantization_maxlen
        export_legacy_format export_hub_model_id eval_num_beams generation_max_length generation_num_beams
        generation_config max_length length_penalty skip_special_tokens""",
    _TRAINER: """do_train do_eval prediction_loss_only eval_delay eval_on_start log_level log_level_replica
        log_on_each_node logging_dir logging_strategy logging_first_step logging_nan_inf_filter save_safetensors
        save_on_each_node save_only_model restore_callback_states_from_checkpoint fp16_opt_level half_precision_backend
        fp16_backend bf16_full_eval fp16_full_eval local_rank ddp_backend tpu_num_cores tpu_metrics_debug debug
        past_index run_name disable_tqdm remove_unused_columns label_names greater_is_better ignore_data_skip
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_timeout skip_memory_metrics
        use_legacy_prediction_loop include_inputs_for_metrics include_for_metrics eval_do_concat_batches
        batch_eval_metrics eval_use_gather_object include_tokens_per_second include_num_input_tokens_seen
        include_effective_tokens_per_second compute_accuracy plot_loss full_determinism data_seed no_cuda use_cpu
        use_mps_device auto_find_batch_size""",
    "Ray does not run here; several processes find one another by the distributed options": """ray_run_name
        ray_storage_path ray_storage_filesystem ray_num_workers resources_per_worker placement_strategy ray_init_kwargs
        ray_scope""",
    "the hub is told by its own environment variables (HF_TOKEN, HF_HOME); secrets do not belong into a file": """
        hf_hub_token ms_hub_token om_hub_token hub_token push_to_hub_token cache_dir""",
    "nothing is uploaded unless push_to_hub asks for it, which is refused": """hub_model_id hub_strategy
        hub_private_repo hub_always_push push_to_hub_model_id push_to_hub_organization""",
    "no code of a model or a data set is ever run": "trust_remote_code",
    "tokenizers are the fast ones": "use_fast_tokenizer",
    "rows are read one after another anyway, and all of them are shuffled": "streaming buffer_size overwrite_cache",
    "pad tokens are never learnt": "ignore_pad_token_for_loss",
    "it is printed nowhere": "print_param_status",
    "4 bits are whole numbers with a float32 scale for every 32 inputs, not NF4 with scales in 8 bits": """
        quantization_type double_quantization quantization_device_map""",
    "it matters only beside an argument that is refused": """kto_chosen_weight kto_rejected_weight simpo_gamma
        loraplus_lr_embedding pissa_iter pissa_convert galore_target galore_rank galore_update_interval galore_scale
        galore_proj_type galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj
        apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block
        badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose swanlab_project
        swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url
        swanlab_lark_secret adapter_folder""",
}

REFUSED: dict[str, str] = {
    "the reference is the base": """ref_model ref_model_adapters
        ref_model_quantization_bit""",
    "merge the adapter into the reward model first": "reward_model_adapters",
    "the reward model lies on the policy's base, in its bits": "reward_model_quantization_bit",
    "there is no dropout here": "lora_dropout",
    "only LoRA's own matrices are trained beside the base": "additional_target freeze_extra_modules",
    "whole layers are trained": "freeze_trainable_modules",
    "this kind of adapter is not had": "pissa_init use_llama_pro mixture_of_depths",
    "Adam is what trains here": """use_galore use_apollo use_badam use_adam_mini use_muon adafactor optim_args
        loraplus_lr_ratio""",
    "the vocabulary stays as it is": "resize_vocab add_tokens add_special_tokens split_special_tokens",
    "the model is run as its files say": "rope_scaling shift_attn moe_aux_loss_coef train_from_scratch",
    "the main revision is read; download another one and give its directory": "model_revision",
    "fp16 is not had; bf16 is": "fp16",
    "only training is run": "do_predict predict_with_generate",
    "one demonstration is one row": "packing neat_packing",
    "prompts are read and never learnt": "train_on_prompt",
    "data are read from their own files, never as tokens": "tokenized_path",
    "held-out data are measured together": "eval_on_each_dataset",
    "this term of the loss is not had": """pref_ftx ld_alpha label_smoothing_factor neftune_noise_alpha""",
    "the order of the data is always shuffled": "disable_shuffling sortish_sampler group_by_length",
    "the last batch is always full: it goes on with the next epoch": "dataloader_drop_last",
    "a run is as long as it says": "early_stopping_steps",
    "the three schedules have no further options": "lr_scheduler_kwargs",
    "batches are given by per_device_train_batch_size": "per_gpu_train_batch_size per_gpu_eval_batch_size",
    "PPO samples its responses": "do_sample num_beams",
    "models that read images are not had": "freeze_language_model",
    "other engines are not used": "infer_backend",
    "SwanLab is not had; W&B and TensorBoard are": "use_swanlab",
    "nothing is uploaded; the results lie in output_dir": "push_to_hub",
}


@functools.cache
def read_defaults() -> dict[str, Any]:
    """Read {argument: default} of LLaMA-Factory, as tests/parity/make_llamafactory_rows.py writes them."""
    groups = json.loads(Path(__file__).with_name("arguments.json").read_text(encoding="utf-8"))
    return {name: default for group in groups.values() for name, default in group.items()}


def find_reason(table: dict[str, str], name: str) -> str | None:
    """Find the reason under which a table lists an argument; None where it does not."""
    return next((reason for reason, names in table.items() if name in names.split()), None)
