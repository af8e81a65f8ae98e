#!/usr/bin/env bash
# From nothing to captions of scenes of digits: trains a tokenizer, an encoder,
# and a decoder on the frozen encoder; then how many captions are true, and how
# near they come to the references. Continues where it was stopped.
# Usage: bash launch/captions.sh [lookup|vit] [WORKDIR] [CONFIG ARGUMENTS]
#   such as: bash launch/captions.sh vit workdirs/vit_1 seed=1
set -euo pipefail
model="${1:-lookup}"
out="$(realpath -m "${2:-workdirs/captions_$model}")"
arguments="${3:+,$3}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$model" != lookup ] && [ "$model" != vit ]; then
  echo "error: model $model: want lookup or vit" >&2
  exit 1
fi
config="configs/digit_captions_$model.py"
source launch/env.sh captions

# Batches are small: two devices of one thread each make more of two cores than
# one device of two threads.
if [ "$(nproc)" -ge 2 ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
fi

tokenizer="$out/digits.model"
if [ ! -f "$tokenizer" ]; then
  python -m lookup_vit.preprocess.train_tokenizer --config="$config" \
    --vocab_size=128 --model_type=bpe --normalization=identity \
    --output="$tokenizer"
fi
python -m lookup_vit.train --workdir="$out/encoder" \
  --config="$config:task=classification$arguments"
python -m lookup_vit.train --workdir="$out/decoder" \
  --config="$config:tokenizer=$tokenizer,encoder=$out/encoder$arguments"
shopt -s nullglob
for results in "$out"/decoder/captions_test*.json; do
  echo "$results"
  python -m data.digit_captions.check --results="$results"
  python -m lookup_vit.analysis.caption_scores --metrics=CIDEr \
    --leave_one_out --results="$results" \
    --references="$out/decoder/references_test.json"
done
echo "Images with their captions:" "$out"/decoder/captions_test*.html
