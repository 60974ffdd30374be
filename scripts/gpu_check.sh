#!/usr/bin/env bash
# On a machine with a CUDA device or two: the GPU tests, the product itself against its plan, and both benchmarks, in
# under 8 minutes, then one table. Needs torch and what the package's extra [dev] brings importable by $PYTHON (default:
# python3), from an environment or from PYTHONPATH alone; moe_pretrain itself is taken from this checkout. Full output:
# outputs/gpu_check/.
# Exit code: 0 if every part ran and every test passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
logs=outputs/gpu_check
mkdir -p "$logs"

device=$("$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"error: {sys.executable}: {error}")
if not torch.cuda.is_available():
    sys.exit(f"error: {sys.executable} finds no CUDA device")
properties = torch.cuda.get_device_properties(0)
print(properties.name, properties.total_memory >> 30, torch.cuda.device_count(), sep="\t")') || exit 1
IFS=$'\t' read -r device gib devices <<<"$device"

failed=0
rows=()
# part SECONDS LOG COMMAND...: runs one part within its share of the time; what it says goes to the log and the screen.
part() {
    local seconds=$1 log=$logs/$2.log
    shift 2
    echo "== $*"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$log" || { failed=1; rows+=("$(basename "$log" .log)|FAILED, see $log"); }
}
# row TITLE LOG NAME COLUMN: one cell of the table that a benchmark printed, for each time it printed it.
row() {
    local value
    value=$(awk -F '  +' -v name="$3" -v column="$4" '$1 == name { print $column }' "$logs/$2.log" | paste -sd '|' | sed 's/|/; skewed /')
    [ -n "$value" ] && rows+=("$1|$value")
}

part 140 tests "$python" -m pytest -m gpu tests/gpu
rows+=("GPU tests|$(tail -n 1 "$logs/tests.log")")

# As a run does it: accumulation, several documents in a row, the balance level of the configuration.
# product TITLE LOG: what a benchmark of the product printed, measured / planned.
product() {
    row "$1: s a step" "$2" seconds 2
    row "  planned" "$2" seconds 3
    row "  tokens/s" "$2" tokens/s 2
    row "  MFU" "$2" MFU 2
    row "  peak GiB of a rank" "$2" "peak GiB of a rank" 2
    row "  planned" "$2" "peak GiB of a rank" 3
    row "  kernels of a micro-batch" "$2" "kernels of a micro-batch" 2
    row "  counted without a GPU" "$2" "kernels of a micro-batch" 3
    row "  GB beside products, counted" "$2" "GB beside products, of a micro-batch" 3
}
part 90 product "$python" scripts/bench/bench_product.py model=700m batch.global_batch_tokens=131072
product "product, 700m" product
if [ "$devices" -ge 2 ]; then
    part 60 product_2 "$python" -m torch.distributed.run --standalone --nproc-per-node=2 scripts/bench/bench_product.py \
        --steps=3 model=700m batch.global_batch_tokens=262144 parallel.processes=2 parallel.expert_parallel_size=2
    product "product, 700m, 2 GPUs, EP 2" product_2
else
    rows+=("product on 2 GPUs|left out: there is one")
fi

part 45 layer "$python" scripts/bench/bench_layer.py --tokens 16384 --rounds 40
row "layer, 700m shape: ms" layer moe_pretrain 2
row "layer: dense / ours" layer moe_pretrain 3
row "layer: OLMoE grouped_mm / ours" layer "OLMoE grouped_mm" 4
row "layer: DeepSpeed no drop / ours" layer "DeepSpeed MoE, no drop" 4

part 60 step_700m "$python" scripts/bench/bench_step.py --rounds 6 \
    model=700m batch.micro_batch_size=16 batch.global_batch_tokens=32768
row "step, 700m: tokens/s" step_700m moe_pretrain 3
row "step, 700m: MFU" step_700m moe_pretrain 5
row "step, 700m: ours / dense twin, tokens/s" step_700m "dense twin" 4
row "step, 700m: ours / transformers, tokens/s" step_700m "transformers Mixtral" 4

# 4 billion parameters take 67 GiB before the first activation.
if [ "$gib" -ge 100 ]; then
    part 80 step_4b "$python" scripts/bench/bench_step.py --rounds 3 --only moe_pretrain \
        model=4b model.recompute=full batch.micro_batch_size=8 batch.global_batch_tokens=16384
    row "step, 4b, recompute full: tokens/s" step_4b moe_pretrain 3
    row "step, 4b, recompute full: MFU" step_4b moe_pretrain 5
else
    rows+=("step, 4b|left out: needs a device of 100 GiB")
fi

printf '\n%-44s %s\n' "check" "$devices x $device, $gib GiB"
printf '%.0s-' {1..80}
printf '\n'
for entry in "${rows[@]}"; do
    printf '%-44s %s\n' "${entry%%|*}" "${entry#*|}"
done
exit "$failed"
