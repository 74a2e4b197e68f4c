# docker build -t declip . && docker run --rm -v "$PWD:/work" declip embed builtin:lite2-minilm pictures --out index
# With a GPU: --build-arg BASE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime, and docker run --gpus all --shm-size 16g
# (loader processes need shared memory, of which Docker gives 64 MB: docs/scaling.md).
# On a CPU, --build-arg PIP_EXTRA_INDEX_URL=… with PyTorch's index of CPU builds saves 3 GB.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG PIP_EXTRA_INDEX_URL=
COPY pyproject.toml README.md LICENSE NOTICE /source/
COPY src /source/src
RUN pip install --no-cache-dir '/source[app,fast,onnx,open_clip,starter]' && useradd --create-home --uid 1000 declip
USER 1000
WORKDIR /work
ENTRYPOINT ["declip"]
CMD ["--help"]
