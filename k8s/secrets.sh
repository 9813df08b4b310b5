#!/usr/bin/env bash
# Creates the secrets that the manifests refer to, unless they exist: k8s/secrets.sh [NAMESPACE]
#   mplug-postgres   a random password for MLflow's database
#   mplug-s3         keys of the bucket: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment, or random ones
#                    for the S3 server of overlays/local
# k8s/secrets.sh --copy-to NAMESPACE [FROM] copies keys and addresses of namespace FROM (default mplug) to another
# namespace, for pipelines whose steps run there.
set -euo pipefail

secret() { # NAME KEY=VALUE…; a pipe, because command-line arguments are visible to other users
  name=$1
  shift
  if kubectl --namespace "$namespace" get secret "$name" >/dev/null 2>&1; then
    echo "secret/$name already exists"
    return
  fi
  printf '%s\n' "$@" | kubectl --namespace "$namespace" create secret generic "$name" --from-env-file=/dev/stdin
}

random() { head -c "$1" /dev/urandom | od -An -tx1 | tr -d ' \n'; }

copy() { # KIND NAME DECODING, into $namespace
  kubectl --namespace "$from" get "$1" "$2" \
    --output "go-template={{range \$key, \$value := .data}}{{\$key}}={{\$value$3}}{{\"\\n\"}}{{end}}" |
    kubectl --namespace "$namespace" create ${1/secret/secret generic} "$2" --from-env-file=/dev/stdin \
      --dry-run=client --output yaml | kubectl --namespace "$namespace" apply --filename -
}

if [ "${1:-}" = --copy-to ]; then
  namespace=${2:?NAMESPACE is missing}
  from=${3:-mplug}
  copy configmap mplug-config ""
  copy secret mplug-s3 " | base64decode"
  exit
fi
namespace=${1:-mplug}
kubectl get namespace "$namespace" >/dev/null
secret mplug-s3 "AWS_ACCESS_KEY_ID=${AWS_ACCESS_KEY_ID:-$(random 8)}" \
  "AWS_SECRET_ACCESS_KEY=${AWS_SECRET_ACCESS_KEY:-$(random 20)}"
# last, because MLflow starts as soon as this one exists, and then needs the other one
secret mplug-postgres "POSTGRES_PASSWORD=$(random 24)"
