# PostgreSQL's own image cannot be had without a registry: Debian's package, started from the same variables.
FROM docker.io/library/python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends postgresql-15 \
    && rm -rf /var/lib/apt/lists/* \
    && usermod --uid 999 postgres && groupmod --gid 999 postgres
COPY postgres.sh /usr/local/bin/postgres.sh
ENV PATH=/usr/lib/postgresql/15/bin:$PATH
USER 999:999
CMD ["sh", "/usr/local/bin/postgres.sh"]
