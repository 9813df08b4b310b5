"""Jobs on a Kubernetes cluster: renders, validates, creates and follows them. Knows no kfp."""
