# GVPO on a CPU, with both engines: docker build -f docker/cpu.Dockerfile -t gvpo:cpu .
FROM python:3.11-slim
# Debian keeps no older versions to pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git make gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /gvpo
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[trl,verl]'
WORKDIR /work
ENTRYPOINT ["gvpo"]
CMD ["doctor"]
