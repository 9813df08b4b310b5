# MLflow server with drivers for PostgreSQL and S3: make images
FROM docker.io/library/python:3.11-slim-bookworm AS installed
WORKDIR /build
COPY requirements.lock pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['server'], sep='\n')" \
      > server.txt \
    && sed -nE 's/^([A-Za-z0-9._-]+==[^ ]+) .*/\1/p' requirements.lock > versions.txt \
    && python3 -m venv /opt/mlflow \
    && /opt/mlflow/bin/pip install --disable-pip-version-check --requirement server.txt --constraint versions.txt

# make sbom
FROM installed AS inventory
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/cyclonedx \
    && /opt/cyclonedx/bin/pip install --disable-pip-version-check cyclonedx-bom==7.5.0 \
    && /opt/cyclonedx/bin/cyclonedx-py environment --output-file /mlflow.cdx.json /opt/mlflow

FROM scratch AS sbom
COPY --from=inventory /mlflow.cdx.json /

FROM docker.io/library/python:3.11-slim-bookworm AS mlflow
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="mplug-video MLflow" \
      org.opencontainers.image.description="MLflow's tracking server and registry for mPLUG-Video" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=installed /opt/mlflow /opt/mlflow
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp mlflow
ENV PATH=/opt/mlflow/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 5000
CMD ["mlflow", "server", "--help"]
