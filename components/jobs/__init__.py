"""Jobs on a Kubernetes cluster: rendered, created, followed to their end. No kfp here."""
