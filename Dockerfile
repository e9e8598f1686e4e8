# For nodes of H100s on InfiniBand (not yet run on a GPU). Build: docker build -t finegrain .
# CUDA 13.2, as the locked torch 2.15.0 requires: the driver must be of series 580 or newer. -devel has the
# compilers that Triton and MegaBlocks' extension need. Checked by hadolint and tests/test_dockerfile.py.
FROM pytorch/pytorch:2.15.0-cuda13.2-cudnn9-devel

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# InfiniBand's user-space libraries (NCCL loads libibverbs when it starts), tools that find a bad port or
# link, and pkill for launch/submit/node.sh. Versions are not pinned: the distribution keeps only the newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        git make procps openssh-client iproute2 \
        libibverbs1 ibverbs-providers librdmacm1 rdma-core infiniband-diags perftest \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /finegrain

# Packages first: they change less often than the code.
COPY requirements.lock requirements-megablocks.lock ./
COPY launch/install.sh launch/packages.sh launch/
RUN bash launch/install.sh

# --build-arg COMPILED_MEGABLOCKS=yes compiles MegaBlocks' own sort, histogram and cumulative sum for H100s,
# in place of PyTorch's (train/model/megablocks_ops.py). They are a small share of a step; the default needs
# no compiler.
ARG COMPILED_MEGABLOCKS=no
RUN if [ "$COMPILED_MEGABLOCKS" = yes ]; then \
        export TORCH_CUDA_ARCH_LIST=9.0 PATH="$PWD/.cache/tools/bin:$PATH" \
        && uv pip install --no-cache --python .venv/bin/python --reinstall-package megablocks --no-deps \
            --no-build-isolation --require-hashes -r requirements-megablocks.lock \
        && .venv/bin/python -c "import torch, megablocks_ops"; \
    fi

COPY . .

# --build-arg COMMIT=$(git rev-parse HEAD): the commit that runs report; .git is not in the image.
ARG COMMIT=unknown
# The ranks' other variables are in launch/submit/environment.py, for every launcher.
ENV PATH=/finegrain/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FINEGRAIN_COMMIT=$COMMIT

CMD ["composer", "train/main.py", "yamls/smoke-gpu.yaml"]
