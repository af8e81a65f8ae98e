#!/usr/bin/env bash
# Sets everything up, trains a LookupViT and a ViT on real images, and shows
# accuracy against compute. Continues where it was stopped.
# Usage: bash launch/quickstart.sh [WORKDIR]
set -euo pipefail
out="$(realpath -m "${1:-workdirs/quickstart}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh ""

for model in lookup vit; do
  python -m lookup_vit.train --config="configs/digits_$model.py" \
    --workdir="$out/digits_$model"
done
python -m lookup_vit.analysis.accuracy_vs_flops \
  --workdirs="$out/digits_lookup,$out/digits_vit" \
  --output="$out/accuracy_vs_flops.png"
echo "Attention maps: $out/digits_lookup/attention_maps.png"
