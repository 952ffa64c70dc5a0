"""Keys of Axolotl that a run of ours has no place for, each with the reason, by the shape of its name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from mlxtune.config.imported.given import Given
from mlxtune.config.imported.translation import Translation

# Names, as shell patterns -> why they have no counterpart. The first that fits is the one.
REASONS = {
    """sample_packing* eval_sample_packing multipack_* batch_flattening pad_to_* pretrain_multipack_*""": (
        "rows of like length meet in a batch, and what they begin with alike is computed once; in one long row a "
        "recurrent model would carry one row's state into the next"
    ),
    """deepspeed deepcompile fsdp* ddp* *parallel* dp_* world_size local_rank ring_attn_func heads_k_stride device*
    max_memory gpu_memory_limit low_cpu_mem_usage qlora_sharded_* lora_on_cpu fp32_norm* accelerator_config
    experimental_* embeddings_skip_upcast""": "how CUDA GPUs share a model; several Macs share the rows (mlx.launch)",
    """*attention* attn_* flash_* *_kernel* liger_* *_liger torch_compile* cut_cross_entropy* chunked_cross_entropy*
    tiled_mlp* unsloth_* use_kernels plugins gemma4_hybrid_attn_impl sdpa_varlen fused_attn_* experts_implementation
    quantize_moe_experts llama4_linearized_experts""": (
        "a way to compute on CUDA; mlxtune takes the fastest of its own that it proves on your model (section fast)"
    ),
    """bf16 fp16 fp8* bfloat16 float16 float32 tf32 peft_autocast_adapter_dtype bnb_* gptq""": (
        "train.dtype auto takes the type of the model that is trained; convert --dtype chooses it"
    ),
    """model_type tokenizer_* processor_* base_model_config cls_model_config is_*_derived_model revision_of_model
    overrides_of_model_* model_quantization_*""": "the model's own folder says it",
    "trust_remote_code": "mlxtune runs no code that comes with a model",
    """dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard* preprocess_*
    skip_prepare_dataset num_dataset_shards_to_save dataloader_* remove_unused_columns push_dataset_to_hub
    is_preprocess streaming* total_num_tokens total_supervised_tokens""": (
        "tokenized rows are kept by themselves (data.cache)"
    ),
    "group_by_length": "rows of like length always meet in a batch",
    """logging_steps include_tokens_per_second include_tkps profiler_* gc_* torch_empty_cache_steps""": (
        "every step is in RUN/events.jsonl and on the page"
    ),
    "wandb_* mlflow_* comet_* trackio_* swanlab_*": "loggers are set up by their own variables",
    "hub_* hf_use_auth_token": "a run uploads nothing; mlxtune export --push does, after hf auth login",
    "resume_from_checkpoint auto_resume_*": "mlxtune train --resume --out RUN goes on with a run",
    "save_only_model save_safetensors save_first_step": "a checkpoint holds all that it takes to go on",
    """special_tokens tokens added_tokens_overrides resize_token_* fix_untrained_tokens shrink_embeddings
    mean_resizing_embeddings peft_trainable_token_indices""": (
        "the model keeps its tokens; those that data.template needs and the model lacks are added by themselves"
    ),
    """eval_batch_size eval_sequence_len eval_causal_lm_metrics do_*_eval generat* num_generation_samples""": (
        "see train.sample_prompts, and mlxtune eval"
    ),
    """adam_beta* adam_epsilon* optim_args optim_target_modules torchdistx_path qgalore_* dion_* lr_groups embedding_lr*
    lr_quadratic_warmup cosine_* lr_div_factor lr_scheduler_kwargs jagged_* loraplus_lr_embedding""": (
        "mlxtune's AdamW has betas 0.9 and 0.999, epsilon 1e-8, one rate, and a schedule that ends at 0"
    ),
    """relora* peft peft_layer_replication peft_init_lora_weights peft_ensure_weight_tying lora_alpha_pattern
    lora_fan_in_fan_out lora_target_parameters peft_layers_* unfrozen_parameters""": (
        "mlxtune's adapters are LoRA, rsLoRA and DoRA with one alpha, on layers that are named, in the last n blocks"
    ),
    "dpo_* cpo_alpha precompute_ref_log_probs trl vllm": "it is about TRL's trainers; see the section preference",
    "merge_lora merge_method": "mlxtune fuse merges",
    "loss_watchdog_*": "a run whose loss is no number stops; one far above the last ones is noted",
    "shuffle_merged_datasets shuffle_before_* curriculum_sampling": "data.order says in which order rows come",
    "eot_tokens default_system_message min_sample_len max_prompt_len": "rows and the template say it",
    """strict axolotl_config_path dataset_* gradient_checkpointing_kwargs activation_offloading""": (
        "it is about Axolotl's own running"
    ),
}


def leave_out_the_rest(given: Given, made: Translation) -> None:
    """Name every key that nobody asked for. One that only switches off what mlxtune does not have loses nothing."""
    for name in given.left():
        if given.tree[name] in (False, "", 0, [], {}):
            continue
        why = next((why for names, why in REASONS.items() if any(fnmatchcase(name, one) for one in names.split())), "")
        made.leave_out(name, why or "mlxtune knows no key of Axolotl by this name: nothing was made of it")
