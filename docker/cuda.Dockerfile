# GVPO on NVIDIA GPUs, TRL with vLLM: docker build -f docker/cuda.Dockerfile -t gvpo:cuda . && docker run --gpus all gvpo:cuda
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
# Ubuntu keeps no older versions to pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git make python3-venv python3-dev && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv
WORKDIR /gvpo
COPY pyproject.toml README.md LICENSE ./
COPY src src
# vLLM decides which torch there is, and this folder which gvpo.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[vllm]'
WORKDIR /work
ENTRYPOINT ["gvpo"]
CMD ["doctor"]
