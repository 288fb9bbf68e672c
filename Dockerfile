# The package with all it needs, for GPUs, and an image for CI without them.
#
#   docker build --target gpu --tag REGISTRY/vlcp-dist:0.1.0 .
#   docker build --target ci --tag vlcp-dist-ci . && docker run --rm vlcp-dist-ci
#
# Weights and data are not in it: nodes see them on shared storage or fetch them. Not built by the project yet.

ARG UBUNTU=24.04
# torch's own wheels bring CUDA's libraries; of the base come the runtime and what the NVIDIA container toolkit reads.
ARG CUDA=13.0.1

FROM ubuntu:${UBUNTU} AS python
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# The libraries first: they change seldom, and this layer has nearly all the bytes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir vlcp_dist && touch vlcp_dist/__init__.py

FROM python AS gpu-packages
RUN pip install --constraint constraints.txt '.[gpu,s3,gcs]'
COPY vlcp_dist vlcp_dist
RUN pip install --no-deps --force-reinstall . && vlcp --help >/dev/null

FROM nvidia/cuda:${CUDA}-runtime-ubuntu${UBUNTU} AS gpu
# wget is what KubeRay's probes call, rsync what `ray up` copies with; gcc is for kernels that are compiled when first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ gcc python3 python3-dev rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --uid 1000 --create-home --shell /bin/bash vlcp \
    && mkdir --mode 1777 /cache
COPY --from=gpu-packages /opt/venv /opt/venv
# On nodes Ray is started with a token or not at all; a run that starts Ray for itself makes one.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 \
    VLCP_CACHE=/cache/vlcp HF_HOME=/cache/hf TOKENIZERS_PARALLELISM=false
USER 1000:1000
WORKDIR /home/vlcp
# Of the Ray that runs here, if one does; a container that only runs a command is healthy as long as it does.
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s --retries=3 \
    CMD ["sh", "-c", "if [ -e /tmp/ray/ray_current_cluster ]; then ray health-check; else vlcp --help >/dev/null; fi"]
CMD ["vlcp", "--help"]

FROM python AS ci
# Wheels of torch without CUDA: a gigabyte less.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make procps \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --uid 1000 --create-home --shell /bin/bash vlcp \
    && chown --recursive vlcp:vlcp /build
USER 1000:1000
COPY --chown=1000:1000 Makefile pyproject.toml constraints.txt README.md LICENSE ./
RUN make install EXTRAS=dev,cpu
COPY --chown=1000:1000 . .
CMD [".ci/run"]
