"""Which metrics belong together, in the order in which tables show them."""

from __future__ import annotations

GROUPS: dict[str, tuple[str, ...]] = {
    "Time": ("ttft_s", "tpot_median_s", "tpot_p90_s", "total_s", "prefill_tok_s", "decode_tok_s", "chars_s"),
    "Tokens": ("prompt_tokens", "prompt_tokens_unfiltered", "output_tokens", "output_chars", "finish_reason"),
    "Memory": (
        "weights_in_use_bytes", "weights_packed_bytes", "weights_kept_for_undo_bytes", "kv_in_use_bytes", "kv_committed_bytes", "kv_reserved_bytes", "peak_rss_bytes",
    ),
    "KV pages": ("kv_reused_tokens", "kv_shared_bytes", "kv_waste_bytes", "kv_faults_avoided", "kv_pages_ahead", "kv_pages_waited"),
    "Efficiency": ("chars_s_per_gib",),
    "Quality": (
        "baseline_answer_bits_per_byte", "agreement_tokens", "agreement_share", "keyword_recall", "rouge_l", "distinct_2", "repetition_rate",
    ),
}
