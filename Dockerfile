# The GPU environment: NVIDIA's vLLM container (vLLM 0.31.0, transformers 5.17, flash-attention, PyTorch 2.15.0a0,
# Python 3.12, CUDA 13.4) with Megatron-Core, Transformer Engine and this package on top.
#
#   docker build -t opsd_megatron .
#   docker build -t opsd_megatron --build-arg APEX_REF=25.09 .             # with NVIDIA's Apex, from its source
#   docker build -t opsd_megatron --build-arg TRANSFORMER_ENGINE= .        # without Transformer Engine
#   docker run --gpus all --ipc host --ulimit memlock=-1 -v "$PWD/runs:/runs" opsd_megatron ...
#
# `make test` lets pip resolve what is named here for Python 3.12, all wheels in one call, each without its dependencies;
# no image has been built by it.
ARG BASE=nvcr.io/nvidia/vllm:26.10-py3
FROM ${BASE}

# Whatever the base holds stays as NVIDIA built it: its versions are constraints on everything below.
RUN pip list --format=freeze --exclude pip --exclude setuptools > /opt/base-constraints.txt
ENV PIP_CONSTRAINT=/opt/base-constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Megatron-Core 0.16.1 and not a later one: it is what the package is written against and what the CPU tests run.
COPY requirements/gpu.txt /opt/gpu.txt
RUN pip install -r /opt/gpu.txt

# Megatron-Core 0.16.1 declares Transformer Engine >=2.9,<2.12. The torch extension comes as source and is compiled
# against the base's torch; the CUDA library is a wheel.
ARG TRANSFORMER_ENGINE=2.11.0
RUN if [ -n "${TRANSFORMER_ENGINE}" ]; then \
        pip install --no-build-isolation "transformer-engine[pytorch,core_cu13]==${TRANSFORMER_ENGINE}"; \
    fi

# NVIDIA's Apex is optional (Megatron-Core picks up its fused optimizer) and is not the package called apex on PyPI.
ARG APEX_REF=
RUN if [ -n "${APEX_REF}" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "git+https://github.com/NVIDIA/apex@${APEX_REF}"; \
    fi

COPY . /opt/opsd_megatron
WORKDIR /opt/opsd_megatron
RUN pip install --no-deps --no-build-isolation -e .

# Fail here, not on a cluster: the base is as it was, vLLM is there (imported only where an engine starts), and training
# and evaluation can be imported, with torch, Megatron-Core and Transformer Engine.
RUN pip list --format=freeze | grep -Fxf /opt/base-constraints.txt | sort > /tmp/kept.txt \
    && sort /opt/base-constraints.txt | diff - /tmp/kept.txt \
    && python -c "import importlib.metadata as m; [m.version(n) for n in ('torch', 'vllm', 'megatron-core')]; import opsd_megatron.trainer.setup, opsd_megatron.evaluation.stand_alone"
