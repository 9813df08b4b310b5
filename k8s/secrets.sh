#!/usr/bin/env bash
# Makes the secrets that the manifests refer to, where they are not there yet: k8s/secrets.sh [NAMESPACE]
#   mplug-postgres   a random password of MLflow's database
#   mplug-s3         keys of the bucket: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment, or random ones
#                    for the S3 server of overlays/local, which takes whatever it is started with
# With --from-env only keys of the environment will do, as for a bucket that exists.
set -euo pipefail
from_env=false
[ "${1:-}" = --from-env ] && { from_env=true; shift; }
namespace=${1:-mplug}

secret() { # NAME KEY=VALUE…, by way of a pipe: arguments are readable from outside
  name=$1
  shift
  if kubectl --namespace "$namespace" get secret "$name" >/dev/null 2>&1; then
    echo "secret/$name is there already"
    return
  fi
  printf '%s\n' "$@" | kubectl --namespace "$namespace" create secret generic "$name" --from-env-file=/dev/stdin
}

random() { head -c "$1" /dev/urandom | od -An -tx1 | tr -d ' \n'; }

if $from_env && [ -z "${AWS_ACCESS_KEY_ID:-}${AWS_SECRET_ACCESS_KEY:-}" ]; then
  echo "error: --from-env needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY." >&2
  exit 2
fi
kubectl get namespace "$namespace" >/dev/null
secret mplug-postgres "POSTGRES_PASSWORD=$(random 24)"
secret mplug-s3 "AWS_ACCESS_KEY_ID=${AWS_ACCESS_KEY_ID:-$(random 8)}" \
  "AWS_SECRET_ACCESS_KEY=${AWS_SECRET_ACCESS_KEY:-$(random 20)}"
