"""Tables of the README and the model card from result files: `python -m benchmarks.readme` writes them, `--check` fails when they are stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.metric_text import format_metric

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "larosa.md", ROOT / "docs" / "native.md", ROOT / "assets" / "models" / "chat" / "README.md")
RESULTS = ROOT / "benchmarks" / "results"
_COLUMNS = ("decode_tok_s", "ttft_s", "weights_in_use_bytes", "kv_in_use_bytes", "baseline_answer_bits_per_byte", "agreement_share")
_HEADINGS = ("method", "label", "decode (p10 to p90)", "first token", "weights in use", "KV in use", "bits/byte of the baseline's answers", "agreement")


def chat_table(data: dict[str, Any]) -> str:
    """One row a method, baseline first; medians over the questions."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + " --- |" * len(_HEADINGS)]
    for row in data["rows"]:
        if row.get("error"):
            lines.append(f"| `{row['method']}` | | {row['error']} |" + " |" * (len(_HEADINGS) - 3))
            continue
        cells = {name: format_metric(name, row["median"][name]) for name in _COLUMNS}
        cells["decode_tok_s"] += f" ({row['decode_tok_s_p10']:.0f} to {row['decode_tok_s_p90']:.0f})"
        lines.append(f"| `{row['method']}` | {row['label'] or 'reference'} | " + " | ".join(cells.values()) + " |")
    where, packages = data["provenance"], data["provenance"]["packages"]
    model = data["model"]
    lines += ["", f"Medians of {data['answers_per_method']} answers of {data['new_tokens']} tokens each, ABBA order, {model['model_id']} "
              f"(revision {model['revision']}), baseline in {model['dtype']}: {model['dtype_reason']}. {where['cpu']}, {where['threads']} threads, "
              f"torch {packages['torch']}, transformers {packages['transformers']}, {data['date']}, `make bench`."]
    return "\n".join(lines)


def model_card_table(data: dict[str, Any]) -> str:
    """The embedded chat model's figures."""
    def share(part: dict[str, Any]) -> str:
        return f"{part['share']:.0%} ({part['interval'][0]:.0%} to {part['interval'][1]:.0%}, n={part['n']})"

    topics, summaries = data["topics"], data["summaries"]
    rows = [
        ("keyword recall on held-out paraphrases of its topics", f"{topics['keyword_recall']:.2f} (n={topics['n']})"),
        ("keyword recall of the second answer in two-turn talks", f"{data['follow_ups']['keyword_recall']:.2f} (n={data['follow_ups']['n']})"),
        ("in-topic questions wrongly declined", share(topics["declined"])),
        ("questions outside its topics declined", share(data["unknown"]["declined"])),
        *((f"code word recalled from {length} tokens of context", share(part)) for length, part in data["recall_from_context"].items()),
        ("questions about a held-out text answered with its words", share(data["reading"])),
        ("keywords in the answers to the five built-in queries", f"{data['built_in']['keyword_recall']:.2f}"),
        ("summaries of held-out texts: length against the text", f"{summaries['length_ratio']:.2f}"),
        ("summaries: key terms kept / ROUGE-L", f"{summaries['key_terms_kept']:.2f} / {summaries['rouge_l']:.2f} (n={summaries['n']})"),
        *((f"bits per byte, {name}", f"{part['bits_per_byte']:.3f}") for name, part in data.get("bits_per_byte", {}).items()),
        *((f"nats per token by position, {name}", _by_position(part)) for name, part in data.get("bits_per_byte", {}).items()),
    ]
    return "\n".join(["| measured | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def larosa_table(data: dict[str, Any]) -> str:
    """Bits per byte of each variant at each sparsity, and what a token needs to read at half."""
    sparsities = sorted({row["sparsity"] for row in data["rows"]})
    found = {(row["variant"], row["sparsity"]): row for row in data["rows"]}
    dense, mib = data["dense"], 2**20
    more = "bits_per_byte_tempered" in dense
    extra = ["tempered at 50%", "KL at 50%"] if more else []
    lines = ["| variant | " + " | ".join((*(f"{s:.0%}" for s in sparsities), "weights a token needs at 50%", "agreement at 50%", *extra)) + " |", "|" + " --- |" * (len(sparsities) + 3 + len(extra))]
    dense_cells = [f"{dense['bits_per_byte_tempered']:.3f}", "0"] if more else []
    lines.append("| " + " | ".join(("dense model", f"{dense['bits_per_byte']:.3f}", *[""] * (len(sparsities) - 1), f"{dense['bytes_per_token'] / mib:.2f} MiB", "100%", *dense_cells)) + " |")
    for variant in dict.fromkeys(row["variant"] for row in data["rows"]):
        cells = [f"{row['bits_per_byte']:.3f}" if (row := found.get((variant, s))) else "does not reach" for s in sparsities]
        half = found.get((variant, 0.5))
        cells += [f"{half['bytes_per_token'] / mib:.2f} MiB", f"{half['agreement']:.0%}"] if half else ["", ""]
        cells += [f"{half['bits_per_byte_tempered']:.3f}", f"{half['kl_to_dense']:.2f}"] if half and more else [""] * len(extra)
        lines.append(f"| `{variant}` | " + " | ".join(cells) + " |")
    where, model = data["provenance"], data["model"]
    seconds = [c["seconds"] for c in data["calibration"].values() if c["seconds"] is not None]
    took = f" in at most {max(seconds):.0f} s a variant" if seconds else ""
    lines += ["", f"Bits per byte, lower is better; columns are the share of the blocks' weight bytes left out. {model['model_id']} in {model['dtype']}, {dense['tokens']} tokens of "
              f"{data['text']} scored as decode runs, calibrated on {data['calibration_text']}{took}. {where['cpu']}, {where['threads']} threads, {data['date']}."]
    return "\n".join(lines)


def _machine(data: dict[str, Any]) -> str:
    where = data["provenance"]
    return f"{where['cpu']}, {where['threads']} threads, torch {where['packages']['torch']}, transformers {where['packages']['transformers']}, {data['date']}."


def decode_table(data: dict[str, Any]) -> str:
    """Every method on every shape, baselines first, rivals last."""
    lines = ["| shape | method | executor | decode (p10 to p90) | against transformers | against rivals | MiB a token | of the bandwidth |", "|" + " --- |" * 8]
    for result in data["results"]:
        for row in result["rows"]:
            if row.get("error"):
                lines.append(f"| {result['shape']} | `{row['method']}` | | {row['error']} | | | | |")
                continue
            digits = 0 if row["decode_tok_s"] >= 100 else 1
            share = "cache" if row["cache_resident"] else f"{row['bandwidth_fraction']:.0%}"
            lines.append(f"| {result['shape']} | `{row['method']}` | {row['executor']} | {row['decode_tok_s']:,.{digits}f} tok/s ({row['p10']:,.{digits}f} to {row['p90']:,.{digits}f}) | "
                         f"{row['speedup_vs_baseline']:.2f}x | {_against_rivals(row)} | {row['bytes_per_token'] / 2**20:,.{0 if row['bytes_per_token'] > 2**27 else 1}f} | {share} |")
    first = data["results"][0]
    zeros = [f" Of {result['shape']}'s hidden units {result['relu_zeros']:.0%} are zero after ReLU, as set." for result in data["results"] if result.get("relu_zeros")]
    bandwidths = [result["read_bandwidth"] / 1e9 for result in data["results"]]
    lines += ["", f"Batch 1, {first['context']} tokens of context; against the faster of transformers' two, each method in turns with it (ABBA), whose own speed drifts from pair to pair. "
              f"The machine read {min(bandwidths):.0f} to {max(bandwidths):.0f} GB/s in these runs; *cache*: what a token reads fits the last-level cache of {first['cache_resident_below'] / 2**20:,.0f} MiB. "
              f"Shapes other than the embedded model have random weights.{''.join(zeros)} {_machine(data)}"]
    return "\n".join(lines)


def _against_rivals(row: dict[str, Any]) -> str:
    return ", ".join(f"{ratio:.2f}x {rival}" for rival, ratio in row.get("speedup_vs_peer", {}).items())


def prefill_table(data: dict[str, Any]) -> str:
    """Every method on every shape, the baseline first."""
    lines = ["| shape | method | prompt computed by | prefill (p10 to p90) | against transformers | against rivals |", "|" + " --- |" * 6]
    for result in data["results"]:
        for row in result["rows"]:
            if row.get("error"):
                lines.append(f"| {result['shape']} | `{row['method']}` | | {row['error']} | | |")
                continue
            lines.append(f"| {result['shape']} | `{row['method']}` | {row['executor']} | {row['prefill_tok_s']:,.0f} tok/s ({row['p10']:,.0f} to {row['p90']:,.0f}) | {row['speedup_vs_baseline']:.2f}x | {_against_rivals(row)} |")
    first = data["results"][0]
    lines += ["", f"Batch 1, a prompt of {first['tokens']} tokens in pieces of {first['chunk']} at most, against one forward call of transformers in bfloat16, each method in turns with it (ABBA); the median of {first['rows'][0]['runs'] // 2} rounds. "
              f"Shapes other than the embedded model have random weights. {_machine(data)}"]
    return "\n".join(lines)


def kernels_table(data: dict[str, Any]) -> str:
    """One product, dense and with chosen rows."""
    result = data["results"][0]
    lines = ["| weights | rows | time | GB/s of what is needed | against dense |", "|" + " --- |" * 5]
    lines += [f"| {r['kind']} | {r['how']} | {r['seconds'] * 1e6:.0f} us | {r['bytes_s'] / 1e9:.1f} | {r['speedup_vs_dense']:.2f}x |" for r in result["rows"]]
    lines += ["", f"{result['in_features']} inputs, {result['out_features']} outputs, {result['keep']:.0%} of the rows where some are chosen, matrices that no cache holds; this machine reads {result['read_bandwidth'] / 1e9:.1f} GB/s. {_machine(data)}"]
    return "\n".join(lines)


def kv_table(data: dict[str, Any]) -> str:
    """What a reservation costs, and what a second chat with the same beginning saves."""
    result, mib = data["results"][0], 2**20
    r = result["rows"][0]
    pages = r["waited_pages"] + r["ahead_pages"]
    rows = [
        (f"address space for {r['context']:,} tokens", f"{r['reserved_bytes'] / mib:.0f} MiB"), ("resident memory that costs before use", f"{r['rss_growth_before_use_bytes'] / 1024:.0f} KiB"),
        (f"committed after {r['tokens']:,} decode steps / grown resident memory", f"{r['committed_bytes'] / mib:.2f} / {r['rss_growth_after_use_bytes'] / mib:.2f} MiB in {r['regions']} regions"),
        ("used / committed and not used / copied", f"{r['used_bytes'] / mib:.2f} / {r['waste_bytes'] / mib:.2f} / {r['copied_bytes'] / mib:.2f} MiB"),
        ("pages committed in the background / that a step waited for", f"{r['ahead_pages']:,} / {r['waited_pages']:,} of {pages:,}"),
        ("step over untouched pages, median / p99", _step(r, "cold")), ("the same over committed pages", _step(r, "warm")),
        (f"the {r['steps_with_commits']} steps during which pages were committed, against their neighbours", f"{r['step_with_commits_over_neighbours']:.2f}x"),
        ("a cache that grows: median / p99, bytes copied", f"{_step(r, 'growing')}, {r['growing_copied_bytes'] / mib:.1f} MiB"),
        (f"a second chat's prompt, {r['second_prompt_tokens']} tokens, {r['prefix']} of them known: read anew / taken over", f"{r['anew_prompt_s']:.2f} / {r['shared_prompt_s']:.2f} s ({r['second_prompt_speedup']:.1f}x)"),
        ("memory that grew for it", f"{r['anew_grown_bytes'] / mib:.2f} / {r['shared_grown_bytes'] / mib:.2f} MiB, and {r['shared_shared_bytes'] / mib:.2f} MiB shared"),
    ]
    return "\n".join(["| measured | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), "",
                      f"{result['shape']}, native runtime in bfloat16, batch 1; other work on the machine when it began: load average {r['load_average']:.1f}. {_machine(data)}"])


def _step(row: dict[str, Any], side: str) -> str:
    return f"{row[f'{side}_p50_s'] * 1e3:.2f} / {row[f'{side}_p99_s'] * 1e3:.2f} ms ({row[f'{side}_p99_s'] / row[f'{side}_p50_s']:.2f}x)"


def _by_position(part: dict[str, Any]) -> str:
    return ", ".join(f"{value:.2f} {name}" for name, value in part["nats_per_token_by_position"].items() if value is not None)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "chat": ("chat-embedded.json", chat_table),
    "larosa-embedded": ("larosa-embedded.json", larosa_table),
    "larosa-stories260k": ("larosa-stories260k.json", larosa_table),
    "decode": ("decode.json", decode_table),
    "decode-avx2": ("decode-avx2.json", decode_table),
    "prefill": ("prefill.json", prefill_table),
    "prefill-avx2": ("prefill-avx2.json", prefill_table),
    "kernels": ("kernels.json", kernels_table),
    "kernels-avx2": ("kernels-avx2.json", kernels_table),
    "kv": ("kv.json", kv_table),
    "model-card": ("chat-model-card.json", model_card_table),
}


def render(text: str) -> str:
    """A page's text with every table between its marks made anew from its result file."""
    for name, (file, table) in TABLES.items():
        begin, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
        if begin in text:
            body = table(json.loads((RESULTS / file).read_text()))
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> None:
    """Write the tables, or check them."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = render(text)
        if "--check" not in sys.argv:
            page.write_text(fresh, encoding="utf-8")
        elif fresh != text:
            raise SystemExit(f"{page.relative_to(ROOT)}: a table differs from its result file. Run `python -m benchmarks.readme`.")


if __name__ == "__main__":
    main()
