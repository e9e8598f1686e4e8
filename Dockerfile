# For nodes of H100s on InfiniBand (not yet run on a GPU). Build: docker build -t finegrain .
# CUDA 12.6 and Python 3.11, as the locked torch 2.7.0 wants them; -devel has the compiler that Triton and
# a compiled MegaBlocks extension need.
FROM pytorch/pytorch:2.7.0-cuda12.6-cudnn9-devel

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# InfiniBand's user-space libraries (NCCL loads libibverbs when it starts), and what set-up calls.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        git make libibverbs1 ibverbs-providers librdmacm1 rdma-core infiniband-diags perftest openssh-client \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /finegrain

# The packages first: they change less often than the code.
COPY requirements.lock requirements-megablocks.lock ./
COPY launch/install.sh launch/install.sh
RUN PYTHON=$(command -v python3.11 || command -v python3) bash launch/install.sh

COPY . .

ENV PATH=/finegrain/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=8 \
    TORCH_NCCL_ASYNC_ERROR_HANDLING=1

CMD ["composer", "train/main.py", "yamls/smoke-gpu.yaml"]
