# A worker: droptune and PyTorch, nothing of your own. Build it from the repository's root:
#   docker build -f docker/worker.Dockerfile -t droptune-worker:0.1.0 .
# PyPI's torch brings CUDA (the host needs the driver and nvidia-container-toolkit only). For the
# CPU alone, and a tenth of the size, name PyTorch's CPU index:
#   --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Your project goes on top (`FROM droptune-worker:0.1.0`, `COPY . /work`) or is mounted at /work.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/droptune
ENV PATH=/opt/droptune/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml README.md LICENSE ./
COPY droptune ./droptune
COPY studies ./studies
RUN pip install --constraint constraints.txt .

FROM python:${PYTHON}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home droptune \
    && install -d -o droptune -g droptune /work
COPY --from=build /opt/droptune /opt/droptune
ENV PATH=/opt/droptune/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /work
# tini passes TERM on: the worker hands its trainings back within seconds and exits 75. Whether a
# worker lives is known from its beats in SQL, so there is no HEALTHCHECK here.
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "droptune"]
CMD ["worker", "start"]
