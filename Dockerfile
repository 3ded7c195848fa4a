# docker build -t spo-ray:cpu .                          the quickstart:  docker run --rm --shm-size=2g spo-ray:cpu
# docker build -t spo-ray:gpu --build-arg BUILD=gpu .    a node of a cluster, see deploy/rayjob.yaml
FROM python:3.11-slim-bookworm

ARG BUILD=cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 ray
WORKDIR /home/ray/spo_ray
COPY --chown=ray:ray . .
USER 1000
RUN SPO_BUILD=${BUILD} make setup
ENV PATH="/home/ray/spo_ray/.venv/bin:${PATH}" \
    RAY_USAGE_STATS_ENABLED=0 \
    PYTHONUNBUFFERED=1

CMD ["spo-ray", "run", "--config", "configs/quickstart.yaml"]
