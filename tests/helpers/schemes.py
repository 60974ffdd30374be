"""A model of every scheme that generates text, by the class of transformers that it is exported as."""

SHARED = ("model.moe.num_shared_experts=2", "model.moe.shared_expert_hidden_size=20")
LEADING = ("model.num_layers=3", "model.moe.num_leading_dense_layers=1")
QK_NORM, WHOLE, APART = "model.qk_norm=head", "model.qk_norm=whole", "model.head_size=10"
GATED, BOUNDED = "model.moe.shared_expert_gate=true", "model.moe.activation_limit=0.3"
GPT_OSS = ("model.moe.activation=gpt_oss", BOUNDED)
TAMED = ("router.bias=true", "router.logit_cap=2.0")
GROUPED = ("model.hidden_size=24", "model.num_heads=4", "model.num_key_value_heads=2", "model.tie_embeddings=false")
SIGMOID = "router.score=sigmoid"

CASES: dict[str, tuple[str, ...]] = {
    "MixtralForCausalLM": (("router=top_k", *GROUPED), ("router=top_k", APART)),
    "OlmoeForCausalLM": (("router=top_k", "router.weights=raw", WHOLE, *GROUPED),),
    "Qwen3MoeForCausalLM": (("router=top_k", QK_NORM, APART, *LEADING, *GROUPED),),
    "Qwen3ForCausalLM": (("router=dense", QK_NORM, APART, *GROUPED),),
    "LlamaForCausalLM": (("router=dense",), ("router=top_k", "model.moe.num_leading_dense_layers=2")),
    "Qwen2MoeForCausalLM": (
        ("router=top_k", "router.weights=raw"),
        ("router=top_k", "router.weights=raw", *SHARED, *LEADING, *GROUPED),
        ("router=top_k", "model.moe.num_shared_experts=1", "model.moe.shared_expert_hidden_size=12"),
        ("router=top_k", *SHARED, GATED),
    ),
    "Glm4MoeForCausalLM": (
        ("router=loss_free", *SHARED, "router.weight_scale=2.5", *LEADING),
        ("router=quantile", *SHARED, *GROUPED),
        ("router=top_k", SIGMOID, "router.weights=raw", *SHARED, QK_NORM),
    ),
    "MoePretrainForCausalLM": (
        ("router=dense", *LEADING),
        ("router=loss_free", "model.moe.num_experts=8", "router.num_groups=4", "router.groups_per_token=2", *SHARED),
        ("router=loss_free", "router.score=sqrt_softplus", *GROUPED, *LEADING),
        ("router=top_k", "router.projection_size=24", "router.weight_scale=1.5"),
        ("router=top_k", *TAMED, *GPT_OSS),
        ("router=loss_free", *SHARED, GATED, BOUNDED),
        ("router=top_k_factorised", "model.moe.gate_rank=6", "model.moe.expert_width_multiple=4"),
        ("router=quantile", WHOLE, APART, *GROUPED),
        ("router=hash", "router.weights=learned", "router.weight_scale=1.5", *SHARED),
        ("router=hash",),
        ("router=moce_ir", "model.moe.experts.pattern=[1,3]", "model.moe.expert_hidden_size=16", *SHARED),
        ("router=sinkhorn", *TAMED),
        ("router=sinkhorn", "router.score=sigmoid", "router.top_k=1"),
        ("router=k_means",),
        ("router=k_means", "router.rule=least_squares", "router.refit_every_steps=2"),
        ("router=expert_choice", *GROUPED),
        ("router=expert_threshold", *SHARED),
        ("router=relu", QK_NORM, *SHARED),
        ("router=top_p", "router.max_experts=3", *LEADING, *TAMED),
        ("router=top_p_renormalised",),
        ("router=attention_importance", *GROUPED, "router.scale=0.9", *TAMED),
        ("router=attention_importance", "router.importance=corrected_row_max", "router.exclude_self=true"),
        ("router=attention_importance", "router.importance=entropy", "router.complement=true"),
        (
            *("router=attention_importance_renormalised", "router.importance=predictor"),
            *("router.predictor_loss_weight=0.1", "router.max_experts=3"),
        ),
        ("router=attentive", "router.key_size=8", "router.num_candidates=3"),
        ("router=attentive_dense", "router.key_size=8", "router.weights=full"),
        ("router=attentive_low_rank", "router.key_size=8", "router.gate_rank=6"),
        ("router=autonomy", "router.gate_rank=6", *SHARED, *GPT_OSS),
        ("router=autonomy", "router.gate_rank=6", "router.gate_activation=recomputed", "router.weights=full"),
        ("router=autonomy_top_p", "router.gate_rank=6"),
        ("router=autonomy_expert_choice", "router.gate_rank=6"),
        ("router=dynmoe", "router.initial_experts=3", "model.moe.num_experts=6", *GROUPED),
        ("router=thor", *SHARED),
        ("router=moe_plus_plus",),
        (
            *("router=moe_plus_plus", "router.projection=two_layer", "router.weights=mixtral", "router.logit_std=0.7"),
            *("model.moe.experts.input_scale=2", *LEADING),
        ),
        ("router=top_p", "experts=zero_computation", "model.moe.experts.num_zero=2", *SHARED),
        (
            "router=top_k",
            "experts=unequal",
            "model.moe.experts.pattern=[1,1,2,4]",
            "model.moe.expert_hidden_size=16",
            BOUNDED,
        ),
        ("router=top_k", "model.moe.latent_size=8", "model.moe.latent_norm=true", *SHARED),
        ("router=loss_free", "model.moe.latent_size=8", "experts=unequal", "model.moe.experts.pattern=[1,3]", BOUNDED),
        ("router=loss_free", "experts=matrix_product", "model.moe.experts.num_cores=5", BOUNDED),
        ("router=top_k", "experts=matrix_product", "model.moe.experts.truncation=4", *GROUPED),
        ("router=top_k", "router.top_k=3", "combine=orthogonal"),
        ("router=relu", "combine=orthogonal", "model.moe.combine.form=symmetric"),
        ("router=top_p", "combine=orthogonal", "model.moe.combine.form=magnitudes", *SHARED),
        (
            "router=by_layer",
            "router.layers={1:{router:hash,weights:learned},2:{router:top_k,top_k:1,weights:raw},rest:loss_free}",
            *("model.num_layers=4", "model.moe.num_leading_dense_layers=1", *SHARED),
        ),
        (
            *("router=by_layer", "experts=zero_computation", "model.num_layers=5"),
            "router.layers={0:moe_plus_plus,1:random,2-3:moe_plus_plus,rest:expert_choice}",
        ),
        (
            *("router=by_layer", "model.moe.expert_width_multiple=4"),
            "router.layers={0:{router:autonomy,gate_rank:6},1:{router:autonomy_expert_choice,gate_rank:6}}",
        ),
        ("router=random",),
        ("router=uniform", "model.moe.num_experts=6"),
    ),
}

MERGED = (
    ("router=smear", "router.evaluation_segment_tokens=7", *GROUPED, *LEADING),
    ("router=lory", "router.segment_tokens=8", *SHARED, GATED, *GPT_OSS),
    ("router=lory", "router.segment_tokens=5", "router.first_segment=own_stop_gradient"),
)
"""Schemes that merge experts."""
