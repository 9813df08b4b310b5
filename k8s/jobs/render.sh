#!/usr/bin/env bash
# Renders the jobs of this folder (or of $1) with the pod template of overlays/production: k8s/jobs/render.sh
# For your cluster, use your --overlay, or omit it to read the PodTemplate from the cluster.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-k8s/jobs}
mplug=${MPLUG:-mplug}

job() { # NAME, then options and command of `mplug job render`
  name=$1
  shift
  { echo "# Rendered by k8s/jobs/render.sh. Image and \$(…) are those of overlays/production; see k8s/README.md"
    "$mplug" job render --overlay k8s/overlays/production --name "$name" "$@"; } > "$out/$name.yaml"
}

job pretrain-1-3b --nodes 8 train pretrain_1.3b 'data.shards=$(PRETRAIN_SHARDS)' \
  'model.decoder=$(GPT3_1_3B)' 'model.vision_weights=$(CLIP_B16)'
job pretrain-2-7b --nodes 8 train pretrain_2.7b 'data.shards=$(PRETRAIN_SHARDS)' \
  'model.decoder=$(GPT3_2_7B)' 'model.vision_weights=$(CLIP_B16)'
for task in classification retrieval captioning; do
  job "$task" train "$task" 'model.init_from=$(PRETRAINED)' "data.shards=\$(${task^^}_SHARDS)"
done
job instruction train instruction_bloomz_7b 'model.init_from=$(BLOOMZ_7B)' 'data.shards=$(INSTRUCTION_SHARDS)'
job evaluate evaluate '$(FINETUNED)' '$(CLASSIFICATION_SHARDS)' --out '$(MPLUG_ROOT)/evaluations/classification'
