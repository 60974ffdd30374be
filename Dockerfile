# GPU image, for a driver of 580.65.06 or newer on the host (CUDA 13): docker build -t moe_pretrain . ; docker run --gpus all --ipc=host -v "$PWD/outputs:/work/outputs" moe_pretrain
FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-venv python3.12-dev build-essential \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home researcher && install --directory --owner=researcher /work
USER researcher
WORKDIR /work

# Dependencies first: they change less often than the code.
COPY --chown=researcher pyproject.toml README.md LICENSE ./
COPY --chown=researcher configs configs
COPY --chown=researcher moe_pretrain moe_pretrain
COPY --chown=researcher scripts scripts
COPY --chown=researcher tests tests
RUN bash -c '. scripts/environment.sh && environment ""'

# `bash scripts/quickstart.sh` trains; `docker run ... bash scripts/test.sh` tests.
CMD ["bash", "scripts/quickstart.sh"]
