# Image of training pods and steps of Kubeflow Pipelines; has every command of `mplug`: make images
# torch from an index with CUDA builds (such as PyPI) includes CUDA; the node provides the driver. TORCH_INDEX sets another
# index for torch: https://download.pytorch.org/whl/cpu for the image of steps without a GPU.
FROM docker.io/library/python:3.11-slim-bookworm AS dependencies
WORKDIR /build
ARG TORCH_INDEX=
COPY requirements.lock pyproject.toml ./
# packages from pyproject.toml, versions from the lock, which also lists packages for tests and benchmarks
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > dependencies.txt \
    && sed -nE 's/^([A-Za-z0-9._-]+==[^ ]+) .*/\1/p' requirements.lock > versions.txt \
    && python3 -m venv /opt/mplug \
    && if [ -n "$TORCH_INDEX" ]; then \
         /opt/mplug/bin/pip install --disable-pip-version-check --index-url "$TORCH_INDEX" "$(grep ^torch== versions.txt)"; \
       fi \
    && /opt/mplug/bin/pip install --disable-pip-version-check --requirement dependencies.txt --constraint versions.txt

FROM dependencies AS installed
COPY README.md LICENSE NOTICE ./
COPY model model
COPY cli cli
COPY components components
COPY pipelines pipelines
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/mplug/bin/pip install --disable-pip-version-check --no-deps .

# make sbom
FROM installed AS inventory
COPY docker/bundled_libraries.py ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/cyclonedx \
    && /opt/cyclonedx/bin/pip install --disable-pip-version-check cyclonedx-bom==7.5.0 \
    && /opt/cyclonedx/bin/cyclonedx-py environment --output-file /training.cdx.json /opt/mplug \
    && python3 bundled_libraries.py /opt/mplug/lib/python3.11/site-packages /training.cdx.json

FROM scratch AS sbom
COPY --from=inventory /training.cdx.json /

FROM docker.io/library/python:3.11-slim-bookworm AS training
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="mplug-video training" \
      org.opencontainers.image.description="Pre-training, fine-tuning and evaluation of mPLUG-Video" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=installed /opt/mplug /opt/mplug
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp mplug \
    && install --directory --owner=mplug --group=mplug /cache
# all writes go to /tmp and /cache, so that the rest can be read-only
ENV PATH=/opt/mplug/bin:$PATH \
    HOME=/tmp \
    MPLUG_CACHE=/cache \
    MPLUG_GIT_COMMIT=$REVISION \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
CMD ["mplug", "--help"]
